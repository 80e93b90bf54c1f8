"""Staged copies run beside the work of the step before, race with nothing, and wait for nothing.

The same as figures: `python -m tests.gpu_rig.overlap_proof --out DIR`.
"""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.device.allocation import paddle_allocator
from fd_dsa.device.staging import InputStaging
from fd_dsa.device.transfers import transfers_for
from fd_dsa.errors import LaunchError
from fd_dsa.triton_runtime.driver import cuda
from tests.gpu_rig import Rig
from tests.gpu_rig.overlap_proof import (
    BUSY_US,
    GUARDS,
    RACE_STEPS,
    SPOILED_STEPS,
    STEPS,
    engine_steps,
    overlap_run,
    race,
    spoiled,
)
from tests.gpu_rig.staged_steps import RunnerSteps, SlabSteps, V4Steps
from tests.gpu_rig.timing import Clock, HostDelay, Spin, around_copies, stream_of

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]

WAYS: dict[str, Callable[..., Any]] = {
    "slabs": SlabSteps,
    "runner": RunnerSteps,
    "v4": V4Steps,
}
LONG_US = 20_000
# of SPOILED_STEPS; how many more there are is a matter of speed
FEW = 10
_HOST_MEMORY, _DEVICE_MEMORY = 1, 2


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> Callable[..., Any]:
    """Return the maker of the steps of one way to the device."""
    return WAYS[request.param]


def sized(rig: Rig, on_gpu: int) -> int:
    """A number of steps; a few where kernels are interpreted."""
    return on_gpu if rig.is_real else 4


def memory_type(address: int) -> int:
    """The driver's type of the memory at an address."""
    kind = ctypes.c_uint()
    cuda().call(0, "cuPointerGetAttribute", ctypes.byref(kind), 2, ctypes.c_uint64(address))
    return kind.value


def test_copies_run_beside_the_step_before(rig: Rig, way: Callable[..., Any]) -> None:
    num_steps = sized(rig, STEPS)
    work = Spin(rig).graph(BUSY_US)
    steps = way(rig, num_steps)
    figures = overlap_run(rig, steps, num_steps, work).figures()
    control = overlap_run(rig, steps, num_steps, work, control=True).figures()
    assert steps.wrong(num_steps).tolist() == []
    # without a GPU nothing runs beside anything
    if rig.is_real:
        assert figures["work_us"] >= 500, figures
        assert figures["median"] >= 0.9 and figures["share_of_steps_above_80"] >= 0.95, figures
        assert control["median"] < 0.1, control


def test_a_step_waits_for_nothing(rig: Rig, way: Callable[..., Any]) -> None:
    num_steps = sized(rig, 50)
    steps, clock = way(rig, num_steps), Clock(rig, 2 * num_steps)
    work = Spin(rig).graph(BUSY_US)
    engine_steps(steps, 3, work, clock)
    with rig.strict(), rig.counting() as counted:
        engine_steps(steps, num_steps, work, clock)
    copies = {"h2d_async": num_steps}
    if way is RunnerSteps:
        copies["d2d_async"] = num_steps
    num_bytes = counted.delta.pop("h2d_bytes")
    assert num_bytes > 0 and counted.delta.pop("d2d_bytes", num_bytes) == num_bytes
    assert counted.delta == copies
    assert steps.wrong(num_steps).tolist() == []


def test_no_step_is_spoiled(rig: Rig, way: Callable[..., Any]) -> None:
    num_steps = sized(rig, RACE_STEPS)
    assert race(rig, way(rig, num_steps), num_steps, seed=5).tolist() == []


@pytest.mark.parametrize("guard", GUARDS)
def test_without_one_guard_steps_are_spoiled(
    real_rig: Rig, way: Callable[..., Any], guard: str
) -> None:
    steps = way(real_rig, SPOILED_STEPS)
    assert len(spoiled(real_rig, steps, [guard])) > FEW


def test_one_slab_is_right_with_its_guards(rig: Rig) -> None:
    num_steps = sized(rig, 300)
    steps = SlabSteps(rig, num_steps, num_slabs=1)
    assert race(rig, steps, num_steps, copy=200.0).tolist() == []


def test_staging_memory_is_page_locked_and_no_tensor(rig: Rig) -> None:
    staging = InputStaging(paddle_allocator(rig.device), 1024)
    slab = staging.next_slab()
    address = slab.ctypes.data
    # where it is stays so, whatever is done with its values
    paddle.to_tensor(slab, place=rig.place)
    staging.upload(1024)
    assert type(slab) is np.ndarray and slab.ctypes.data == address
    assert staging.slabs.place.is_custom_place()
    if rig.is_real:
        assert memory_type(address) == _HOST_MEMORY
        assert memory_type(staging.slabs.data_ptr()) == _DEVICE_MEMORY


def test_slabs_in_host_memory_are_refused(real_rig: Rig) -> None:
    def allocate(shape: tuple[int, ...], dtype: str) -> Any:
        return paddle.to_tensor(np.zeros(shape, dtype), place=paddle.CPUPlace())

    with pytest.raises(LaunchError, match=r"the tensor is on Place\(cpu\)"):
        InputStaging(allocate, 1024)


def test_the_host_goes_on_while_the_device_is_busy(real_rig: Rig, way: Callable[..., Any]) -> None:
    steps, spin, clock = way(real_rig, 4), Spin(real_rig), Clock(real_rig)
    engine_steps(steps, 2, lambda: None, clock)
    spin(LONG_US)
    end = clock.mark()
    steps.stage(2)
    steps.expand(2)
    assert not clock.is_past(end)
    clock.wait(end)
    assert steps.wrong(3).tolist() == []


def test_a_copy_to_the_host_is_read_after_its_event(real_rig: Rig) -> None:
    tensor = paddle.to_tensor(np.full(1024, 7, np.int32), place=real_rig.place)
    transfers, spin = transfers_for(tensor), Spin(real_rig)
    target = transfers.host_buffer(4096).view(np.int32)
    done = transfers.event()
    spin(LONG_US)
    transfers.to_host(target, tensor)
    done.record()
    # here FastDeploy #7221 read
    assert (target == 0).all() and not done.done()
    done.wait()
    assert (target == 7).all()


def test_memory_of_a_staging_that_is_gone_is_not_written(real_rig: Rig) -> None:
    size, delay = 1 << 18, HostDelay(real_rig)
    staging = InputStaging(paddle_allocator(real_rig.device), size, 1)
    address = staging.slabs.data_ptr()
    staging.next_slab()[:] = 1
    with around_copies(lambda copy: delay(stream_of(copy), LONG_US), lambda copy: None):
        staging.upload(size)
    del staging
    gc.collect()
    # the allocator hands the memory of the slabs out again, after what other tests have left
    zeros, others = np.zeros((1, size), np.int32), []
    while not others or abs(others[-1].data_ptr() - address) >= zeros.nbytes:
        assert len(others) < 1000
        others.append(paddle.to_tensor(zeros, place=real_rig.place))
    paddle.device.synchronize(real_rig.device)
    assert not any(other.numpy().any() for other in others)


def test_a_step_is_not_staged_in_a_capture(real_rig: Rig, way: Callable[..., Any]) -> None:
    steps, spin = way(real_rig, 4), Spin(real_rig)
    with real_rig.capture() as capture:
        spin(10)
        with pytest.raises(RuntimeError, match="capture"):
            steps.stage(0)
    capture.replay()
    steps.stage(0)
    steps.expand(0)
    assert steps.wrong(1).tolist() == []
