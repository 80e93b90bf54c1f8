"""Compiled launches on a GPU, on torch memory: values, streams, captures, threads, processes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fd_dsa.device.transfers import transfers_for
from fd_dsa.errors import LaunchError
from fd_dsa.triton_runtime import paddle_jit, start_next, wait_for_inputs
from tests.triton_runtime.fakes import in_threads, run_module

import triton.language as tl

try:
    import torch
except ImportError:
    # the marker skips these tests there
    torch = None

pytestmark = pytest.mark.gpu


@pytest.fixture(autouse=True)
def registered() -> None:
    from benchmarks._torch_device import register

    register()


@paddle_jit(do_not_specialize=("n", "value"))
def fill_kernel(out_ptr, n, value, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(out_ptr + offsets, value, mask=offsets < n)


@paddle_jit
def echo_kernel(out_ptr, flag, small, big, huge, number, half_ptr, byte_ptr, none, one):
    tl.store(out_ptr + 0, flag.to(tl.int64))
    tl.store(out_ptr + 1, small.to(tl.int64))
    tl.store(out_ptr + 2, big)
    tl.store(out_ptr + 3, huge.to(tl.int64, bitcast=True))
    tl.store(out_ptr + 4, number.to(tl.int32, bitcast=True).to(tl.int64))
    tl.store(out_ptr + 5, tl.load(half_ptr).to(tl.float32).to(tl.int64))
    tl.store(out_ptr + 6, tl.load(byte_ptr).to(tl.int64))
    if none is None:
        tl.store(out_ptr + 7, one)


@paddle_jit
def where_kernel(out_ptr):
    x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    row = (z * tl.num_programs(1) + y) * tl.num_programs(0) + x
    tl.store(out_ptr + row * 3 + 0, x)
    tl.store(out_ptr + row * 3 + 1, y)
    tl.store(out_ptr + row * 3 + 2, z)


@paddle_jit
def dot_kernel(a_ptr, b_ptr, out_ptr, K, TILE: tl.constexpr):
    rows = tl.arange(0, TILE)
    total = tl.zeros((TILE, TILE), tl.float32)
    for start in range(0, K, TILE):
        a = tl.load(a_ptr + rows[:, None] * K + start + rows[None, :])
        b = tl.load(b_ptr + (start + rows[:, None]) * TILE + rows[None, :])
        total += tl.dot(a, b)
    tl.store(out_ptr + rows[:, None] * TILE + rows[None, :], total)


@paddle_jit(do_not_specialize=("n", "shift"), waits=True)
def shift_kernel(x_ptr, out_ptr, n, shift, BLOCK: tl.constexpr):
    wait_for_inputs()
    start_next()
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + (offsets + shift) % n, mask=offsets < n)
    tl.store(out_ptr + offsets, x + 1, mask=offsets < n)


def _out(n: int = 1000) -> Any:
    return torch.full((n,), -1.0, device="cuda")


def test_every_kind_of_argument_arrives() -> None:
    out = torch.full((8,), -1, dtype=torch.int64, device="cuda")
    half = torch.tensor([3.0], dtype=torch.bfloat16, device="cuda")
    byte = torch.tensor([0, 200], dtype=torch.uint8, device="cuda")[1:]
    big, huge = -(1 << 40) - 3, (1 << 63) + 5
    for _ in range(2):
        out.fill_(-1)
        echo_kernel[(1,)](out, True, -77, big, huge, 1.5, half, byte, None, 1)
        assert out.tolist() == [1, -77, big, huge - (1 << 64), 0x3FC00000, 3, 200, 1]
    launch = echo_kernel.bind((1,), out, True, -77, big, huge, 1.5, half, byte, None, 1)
    out.fill_(-1)
    launch()
    assert out.tolist() == [1, -77, big, huge - (1 << 64), 0x3FC00000, 3, 200, 1]


def test_grid() -> None:
    for _ in range(2):
        out = torch.full((24, 3), -1, dtype=torch.int32, device="cuda")
        where_kernel[(2, 3, 4)](out)
        expected = [[x, y, z] for z in range(4) for y in range(3) for x in range(2)]
        assert out.tolist() == expected


@pytest.mark.parametrize("stages", [1, 3])
def test_large_shared_memory(stages: int) -> None:
    # drawn on the host: a capture that failed earlier leaves torch's generator of the GPU useless
    a, b = (torch.randn(shape).bfloat16().cuda() for shape in ((128, 1024), (1024, 128)))
    out = torch.empty(128, 128, device="cuda")
    dot_kernel[(1,)](a, b, out, 1024, TILE=128, num_stages=stages, num_warps=8)
    torch.testing.assert_close(out, a.float() @ b.float(), atol=1e-2, rtol=1e-3)


def test_launch_attributes() -> None:
    for value in (2.0, 3.0):
        out = _out()
        fill_kernel[(8,)](out, 1000, value, BLOCK=128, launch_pdl=True)
        assert (out == value).all()


def test_current_stream() -> None:
    side, out = torch.cuda.Stream(), _out()
    bound = fill_kernel.bind((8,), out, 1000, 0.0, BLOCK=128, scalars=("n", "value"))
    side.wait_stream(torch.cuda.current_stream())
    for value, launch in ((1.0, bound), (2.0, None)):
        torch.cuda.synchronize()
        with torch.cuda.stream(side):
            # the stream is busy for long; what is queued on another one overtakes it
            torch.cuda._sleep(200_000_000)
            if launch is None:
                fill_kernel[(8,)](out, 1000, value, BLOCK=128)
            else:
                launch(1000, value)
        assert not side.query()
        assert (out.clone() != value).all()
        side.synchronize()
        assert (out == value).all()


def test_capture_by_torch() -> None:
    out = _out()
    bound = fill_kernel.bind((8,), out, 500, 7.0, BLOCK=128)
    fill_kernel[(8,)](out, 1000, 5.0, BLOCK=128)
    out.fill_(-1)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        fill_kernel[(8,)](out, 1000, 5.0, BLOCK=128)
        bound()
    torch.cuda.synchronize()
    assert (out == -1).all()
    for _ in range(2):
        out.fill_(-1)
        graph.replay()
        assert (out[:500] == 7).all() and (out[500:] == 5).all()


@pytest.mark.parametrize("captured", [False, True])
def test_early_launches_keep_their_order(captured: bool) -> None:
    # each launch reads what all programs of the one before wrote, and overwrites what it read
    n, shift, rounds = 1 << 17, 70001, 50
    grid, main, side = (n // 128,), torch.cuda.Stream(), torch.cuda.Stream()
    x, y, beside = (torch.zeros(n, dtype=torch.int32, device="cuda") for _ in range(3))

    def step() -> None:
        now = torch.cuda.current_stream()
        for _ in range(rounds):
            shift_kernel[grid](x, y, n, shift, BLOCK=128)
            side.wait_stream(now)
            with torch.cuda.stream(side):
                shift_kernel[grid](y, beside, n, shift, BLOCK=128)
            shift_kernel[grid](y, x, n, shift, BLOCK=128)
            now.wait_stream(side)
            shift_kernel[grid](beside, y, n, shift, BLOCK=128)
            shift_kernel[grid](y, x, n, shift, BLOCK=128)

    torch.cuda.synchronize()
    with torch.cuda.stream(main):
        step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    if captured:
        with torch.cuda.graph(graph, stream=main):
            step()
    start = torch.arange(n, dtype=torch.int32, device="cuda")
    for _ in range(3):
        x.copy_(start)
        torch.cuda.synchronize()
        if captured:
            graph.replay()
        else:
            with torch.cuda.stream(main):
                step()
        torch.cuda.synchronize()
        assert (x == start.roll(-4 * rounds * shift) + 4 * rounds).all()


def test_what_is_given_back_during_a_capture_does_not_end_it() -> None:
    x = torch.zeros(4, device="cuda")
    transfers = transfers_for(x)
    owned = [transfers.host_buffer(1 << 20), transfers.event()]
    graph = torch.cuda.CUDAGraph()
    torch.cuda.synchronize()
    # the mode in which any thread's unsafe call ends the capture
    with torch.cuda.graph(graph, capture_error_mode="global"):
        x.add_(1)
        owned.clear()
        x.add_(1)
    graph.replay()
    assert x.tolist() == [2.0] * 4


def test_four_threads() -> None:
    outs = [_out() for _ in range(4)]
    torch.cuda.synchronize()
    bound = fill_kernel.bind((8,), outs[0], 1000, 0.0, BLOCK=128, scalars=("n", "value"))

    @paddle_jit(do_not_specialize=("n", "value"))
    def new_kernel(out_ptr, n, value, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + offsets, value, mask=offsets < n)

    def work(index: int) -> None:
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for step in range(300):
                new_kernel[(8,)](outs[index], 1000, float(step), BLOCK=128)
                if index == 0:
                    bound(1000, step + 0.5)
                new_kernel[(4,)](outs[index], 512, index + step / 512, BLOCK=128)
        stream.synchronize()

    in_threads(work, 4)
    for index, out in enumerate(outs):
        assert (out[:512] == index + 299 / 512).all()
        assert (out[512:] == (299.5 if index == 0 else 299)).all()


def test_a_thread_that_never_used_cuda() -> None:
    out = _out()
    fill_kernel[(8,)](out, 1000, 5.0, BLOCK=128)
    torch.cuda.synchronize()
    in_threads(lambda _: fill_kernel[(8,)](out, 1000, 6.0, BLOCK=128), 1)
    assert (out == 6).all()


def test_processors() -> None:
    found = transfers_for(_out()).traits.num_processors
    assert found == torch.cuda.get_device_properties(0).multi_processor_count


def test_two_devices() -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    for device in (1, 0, 1):
        with torch.cuda.device(device):
            out = torch.full((1000,), -1.0, device=f"cuda:{device}")
            fill_kernel[(8,)](out, 1000, float(device), BLOCK=128)
            assert (out == device).all()
    with pytest.raises(LaunchError, match="on device 1, but the current device is 0"):
        fill_kernel[(8,)](torch.zeros(1000, device="cuda:1"), 1000, 5.0, BLOCK=128)


@pytest.mark.parametrize("name", ["stock_first", "ours_first", "capture_after_warmup"])
def test_process(name: str, tmp_path: Path) -> None:
    run_module(tmp_path, "tests.triton_runtime.gpu_cases", name)
