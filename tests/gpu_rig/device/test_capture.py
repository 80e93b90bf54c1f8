"""Launches through our wrapper on Paddle's streams, events, and graphs."""

from __future__ import annotations

import numpy as np
import paddle
import pytest

from fd_dsa.triton_runtime import paddle_jit
from tests.gpu_rig import Rig

import triton.language as tl  # isort: skip

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]

N = 1000
GRID = (-(-N // 128),)


@paddle_jit(do_not_specialize=("n",))
def add_kernel(x_ptr, y_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, x + tl.load(y_ptr + offsets, mask=mask), mask=mask)


def numbers(start: int) -> paddle.Tensor:
    """float32 [N] on the device: start, start + 1, ..."""
    return paddle.to_tensor(np.arange(start, start + N, dtype=np.float32))


def launch(x: paddle.Tensor, y: paddle.Tensor, out: paddle.Tensor) -> None:
    add_kernel[GRID](x, y, out, N, BLOCK=128)


def expected(*starts: int) -> np.ndarray:
    return sum(np.arange(start, start + N, dtype=np.float32) for start in starts)


def test_a_launch_reads_and_writes_the_device(rig: Rig) -> None:
    x, y, out = numbers(1), numbers(5), paddle.zeros([N + 7])
    launch(x, y, out)
    with rig.counting() as counted:
        launch(x, y, out)
    assert counted.delta == {}
    np.testing.assert_array_equal(out.numpy()[:N], expected(1, 5))
    assert not out.numpy()[N:].any()


def test_launches_and_fallbacks_follow_each_other(rig: Rig) -> None:
    x, out = numbers(0), paddle.zeros([N])
    for _ in range(20):
        launch(x, x, out)
        # on the host, so the launch before and the next wait for it
        x = paddle.clip(out, -1e6, 1e6) / 2
    np.testing.assert_array_equal(out.numpy(), expected(0, 0))


def test_launches_go_to_the_current_stream(real_rig: Rig) -> None:
    x, y, out = numbers(1), numbers(2), paddle.zeros([N])
    launch(y, y, out)
    # nothing orders the two streams
    paddle.device.synchronize(real_rig.device)
    side = paddle.device.Stream(device=real_rig.device)
    main = real_rig.stream().value
    with paddle.device.stream_guard(side):
        assert real_rig.stream().value != main
        with real_rig.capture() as capture:
            launch(x, y, out)
        capture.replay()
        paddle.device.synchronize(real_rig.device)
    assert capture.num_nodes == 1
    np.testing.assert_array_equal(out.numpy(), expected(1, 2))


@pytest.mark.own_process
def test_a_replay_sees_new_inputs(real_rig: Rig) -> None:
    x, y, out = numbers(1), numbers(2), paddle.zeros([N])
    launch(x, y, out)
    with real_rig.capture() as capture:
        launch(x, y, out)
        out.add_(y)
    assert capture.num_nodes == 2
    for start in (10, 20):
        x.copy_(numbers(start), False)
        capture.replay()
        np.testing.assert_array_equal(out.numpy(), expected(start, 2, 2))


@pytest.mark.own_process
def test_a_failed_capture_raises_and_the_process_goes_on(real_rig: Rig) -> None:
    x, y, out = numbers(1), numbers(2), paddle.zeros([N])
    launch(x, y, out)
    # the fallback waits for the stream, which a capture forbids
    refusals = (RuntimeError, OSError, ValueError, SystemError)
    with pytest.raises(refusals), real_rig.capture():
        x.exp()
    launch(x, y, out)
    np.testing.assert_array_equal(out.numpy(), expected(1, 2))
    with real_rig.capture() as capture:
        launch(x, x, out)
    capture.replay()
    np.testing.assert_array_equal(out.numpy(), expected(1, 1))
