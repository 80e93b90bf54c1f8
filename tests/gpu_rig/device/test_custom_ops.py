"""The operators of custom_ops/ on Paddle tensors of the device: its memory, its stream, graphs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa import custom_ops
from fd_dsa.doctor import custom_ops as section
from tests.custom_ops.position_rows import MANY, expected, lengths_of
from tests.custom_ops.test_step_metadata import BATCH, OUTPUTS, REFUSED, arguments_for, assert_right
from tests.gpu_rig import Rig
from tests.gpu_rig import custom_ops as packages
from tests.strategies import make_batch

pytestmark = pytest.mark.gpu_rig

STEPS = {
    "decode": [(0, 61 + n, 1 + n % 3) for n in range(300)] + [(0, 0, 0)],
    "prefill": [(70, 0, 70), (3000, 64, 3000)],
    "mixed": [(0, 40, 1), (650, 64, 650), (0, 0, 0), (0, 127, 2)],
    "idle": [(0, 0, 0), (0, 9, 0)],
}
_loaded = cache(packages.load)


@pytest.fixture
def ops(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """The package as installed, built for the form of this session."""
    if rig.form == "guard":
        pytest.skip("the kernels of a form without a GPU are host code, which faults here")
    module = _loaded(rig.form)
    monkeypatch.setitem(sys.modules, "fd_dsa_ops", module)
    custom_ops.use_library(None)
    yield module
    custom_ops.use_library(None)


def on_device(rig: Rig, given: dict[str, Any]) -> dict[str, Any]:
    """Arguments whose tensors lie on the device."""
    return {
        name: paddle.to_tensor(value.numpy(), place=rig.place)
        if isinstance(value, paddle.Tensor)
        else value
        for name, value in given.items()
    }


@pytest.mark.parametrize("name", STEPS)
def test_a_step_is_written_in_place_without_copies(rig: Rig, ops: ModuleType, name: str) -> None:
    batch = make_batch(STEPS[name], 64, num_padded_tokens=sum(n for *_, n in STEPS[name]) + 90)
    given = on_device(rig, arguments_for(batch))
    with rig.strict(), rig.counting() as counted:
        for _ in range(3):
            found = ops.fd_dsa_step_metadata(**given)
    assert counted.delta == {}
    assert_right(given, batch)
    for tensor, field in zip(found, OUTPUTS, strict=True):
        if field in given:
            assert tensor.data_ptr() == given[field].data_ptr(), field
            assert tensor.place.is_custom_place(), field


@pytest.mark.parametrize("name", MANY)
def test_position_ids(rig: Rig, ops: ModuleType, name: str) -> None:
    size = sum(new for *_, new in MANY[name]) + 5
    positions = paddle.to_tensor(np.full(size, -91, np.int32), place=rig.place)
    tensors = [paddle.to_tensor(lengths, place=rig.place) for lengths in lengths_of(MANY[name])]
    with rig.strict(), rig.counting() as counted:
        ops.get_position_ids_and_mask_encoder_batch(*tensors, positions)
    assert counted.delta == {}
    np.testing.assert_array_equal(positions.numpy(), expected(MANY[name], size))


@pytest.mark.parametrize("name", REFUSED)
def test_what_is_refused_is_named_and_nothing_is_written(
    rig: Rig, ops: ModuleType, name: str
) -> None:
    given = arguments_for(BATCH)
    spoil, words = REFUSED[name]
    spoil(given)
    given = on_device(rig, given)
    with pytest.raises(OSError, match=r"^fd_dsa_step_metadata: ") as caught:
        ops.fd_dsa_step_metadata(**given)
    for word in words:
        assert word in str(caught.value), str(caught.value)
    for field in OUTPUTS.keys() - {"position_ids"}:
        assert given[field] is None or (given[field].numpy() == -91).all(), field


def test_tensors_of_two_places_are_refused(rig: Rig, ops: ModuleType) -> None:
    given = on_device(rig, arguments_for(make_batch(STEPS["mixed"], 64)))
    given["slot_mapping"] = given["slot_mapping"].cpu()
    with pytest.raises(OSError, match=r"slot_mapping: lies on Place\(cpu\), the first tensor on "):
        ops.fd_dsa_step_metadata(**given)


def test_the_stream_of_the_launch_is_paddles(real_rig: Rig, ops: ModuleType) -> None:
    batch = make_batch(STEPS["mixed"], 64)
    given = on_device(real_rig, arguments_for(batch))
    for stream in (paddle.device.Stream(real_rig.place), paddle.device.Stream(real_rig.place)):
        for field in OUTPUTS:
            given[field].fill_(-91)
        paddle.device.synchronize(real_rig.place)
        with paddle.device.stream_guard(stream), real_rig.capture() as captured:
            ops.fd_dsa_step_metadata(**given)
        # what a capture of that stream holds was queued on it, and has not run
        assert captured.graph is not None and captured.graph.num_nodes == 1
        assert (given["position_ids"].numpy() == -91).all()
        captured.replay()
        assert_right(given, batch)


def test_the_doctor_checks_them_on_the_device(rig: Rig, ops: ModuleType) -> None:
    found = section.facts(rig.device)
    assert found["state"] == "built" and section.is_healthy(found), found
    places = [(check["name"], check["device"]) for check in found["checks"]]
    assert sorted(places) == sorted((n, p) for n in ops.__all__ for p in ("cpu", rig.device))


def test_a_builder_takes_the_kernel(real_rig: Rig, ops: ModuleType) -> None:
    from tests.step.helpers import assert_matches_oracle, builder_for

    batch = make_batch(STEPS["mixed"], 64)
    builder = builder_for(batch, device=real_rig.device)
    assert custom_ops.choices() == [
        custom_ops.Choice("step_metadata", True, "agrees with the definition")
    ]
    for _ in range(2):
        meta = builder.build(*batch.inputs())
        assert_matches_oracle(meta, batch, lambda tensor: tensor.numpy())
