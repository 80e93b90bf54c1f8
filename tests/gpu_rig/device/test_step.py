"""A step's metadata on the device: the CPU builder's arrays, without copies, waits or memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.errors import BackendUnavailable, LaunchError
from fd_dsa.step import ForwardMeta, StepMetadataBuilder
from tests.gpu_rig import Rig
from tests.kernel_memory import open_memory
from tests.step.helpers import ARRAY_FIELDS, COUNT_FIELDS, builder_for, counts_of
from tests.step.test_tail import check_captured_steps
from tests.strategies import StepBatch, make_batch

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton]

DECODE = [(0, 61 + n, 1) for n in range(5)] + [(0, 0, 0), (0, 40, 2)]
STEPS = {
    "decode": DECODE,
    "prefill": [(70, 0, 70), (3, 64, 3)],
    "mixed": [(0, 40, 1), (65, 64, 65), (0, 0, 0), (0, 127, 2)],
    "idle": [(0, 0, 0), (0, 9, 0)],
}


def make_step(name: str) -> StepBatch:
    """One of the steps, with padding after its tokens."""
    return make_batch(STEPS[name], 64, num_columns=3, num_padded_tokens=160)


def on_device(rig: Rig, batch: StepBatch, **sizes: Any) -> tuple[StepMetadataBuilder, list[Any]]:
    """A builder for the device, and the inputs of a step there."""
    builder = builder_for(batch, device=rig.device, **sizes)
    return builder, [paddle.to_tensor(array, place=rig.place) for array in batch.inputs()]


def assert_same_step(found: ForwardMeta, batch: StepBatch) -> None:
    """Every field equals the CPU builder's; arrays are on the device."""
    wanted = builder_for(batch).build(*batch.inputs(), batch.num_padded_tokens)
    for name in ARRAY_FIELDS:
        array, expected = getattr(found, name), getattr(wanted, name)
        assert (array is None) == (expected is None), name
        if expected is not None:
            assert array.place.is_custom_place(), name
            np.testing.assert_array_equal(array.numpy(), expected, err_msg=name, strict=True)
    for name in COUNT_FIELDS:
        assert getattr(found, name) == getattr(wanted, name), name


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_device_tensors_makes_no_copy_and_takes_no_memory(rig: Rig, name: str) -> None:
    batch = make_step(name)
    builder, tensors = on_device(rig, batch)
    # a step's views are made when its shape is first seen
    builder.build(*tensors, batch.num_padded_tokens, **counts_of(batch))
    with rig.strict(), rig.counting() as counted:
        meta = builder.build(*tensors, batch.num_padded_tokens, **counts_of(batch))
    assert counted.delta == {}
    assert_same_step(meta, batch)


@pytest.mark.parametrize("name", STEPS)
def test_a_step_of_host_arrays_makes_one_copy_in(rig: Rig, name: str) -> None:
    batch = make_step(name)
    builder, _ = on_device(rig, batch)
    builder.build(*batch.inputs(), batch.num_padded_tokens)
    with rig.strict(), rig.counting() as counted:
        meta = builder.build(*batch.inputs(), batch.num_padded_tokens)
    num_bytes = counted.delta.pop("h2d_bytes")
    # one to a slab on the device, one from there to the tensor that stays
    assert counted.delta == {"h2d_async": 1, "d2d_async": 1, "d2d_bytes": num_bytes}
    assert num_bytes >= sum(array.nbytes for array in batch.inputs())
    assert_same_step(meta, batch)


def test_the_first_step_of_a_shape_copies_nothing_either(rig: Rig) -> None:
    batch = make_step("mixed")
    builder, tensors = on_device(rig, batch)
    with rig.strict(), rig.counting() as counted:
        builder.build(*tensors, batch.num_padded_tokens, **counts_of(batch))
    assert counted.delta == {}


@pytest.mark.parametrize("number", ["9", "-1", "x"])
def test_a_device_that_is_not_there_is_refused_with_those_that_are(rig: Rig, number: str) -> None:
    with pytest.raises(BackendUnavailable, match=rf"got 'hopper:{number}'.*\('hopper:0'\)"):
        StepMetadataBuilder(1, 1, 1, 1, device=f"hopper:{number}")


def test_tensors_of_a_device_are_refused_by_a_builder_of_the_host(rig: Rig) -> None:
    batch = make_step("decode")
    _, tensors = on_device(rig, batch)
    builder = StepMetadataBuilder(len(tensors[0]), 99, tensors[3].shape[1], 16, device="numpy")
    with pytest.raises(BackendUnavailable, match=r"seq_lens_encoder: is on Place\(hopper:0\)"):
        builder.build(*tensors)


def test_a_tensor_that_is_not_on_the_device_is_refused(real_rig: Rig) -> None:
    batch = make_step("decode")
    builder, tensors = on_device(real_rig, batch)
    tensors[1] = tensors[1].cpu()
    with pytest.raises(LaunchError, match="cpu"):
        builder.build(*tensors, batch.num_padded_tokens, **counts_of(batch))


@pytest.mark.own_process
@pytest.mark.parametrize("has_prefill", [False, True], ids=["decode", "prefill"])
def test_the_tail_is_padding_around_replays(rig: Rig, has_prefill: bool) -> None:
    def capture(work: Callable[[], Any]) -> Callable[[], Any]:
        if not rig.is_real:
            return work
        with rig.capture() as captured:
            work()
        return captured.replay

    check_captured_steps(open_memory("rig"), capture, has_prefill=has_prefill)
