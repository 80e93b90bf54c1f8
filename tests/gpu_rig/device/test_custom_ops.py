"""The operators of custom_ops/ on Paddle tensors of the device: its memory, its stream, graphs."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from functools import cache
from types import ModuleType

import numpy as np
import paddle
import pytest

from fd_dsa import custom_ops
from fd_dsa.doctor import checks
from tests.custom_ops.position_rows import MANY, expected, lengths_of
from tests.gpu_rig import Rig
from tests.gpu_rig import custom_ops as packages

pytestmark = pytest.mark.gpu_rig

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


@pytest.mark.parametrize("name", MANY)
def test_position_ids(rig: Rig, ops: ModuleType, name: str) -> None:
    size = sum(new for *_, new in MANY[name]) + 5
    positions = paddle.to_tensor(np.full(size, -91, np.int32), place=rig.place)
    tensors = [paddle.to_tensor(lengths, place=rig.place) for lengths in lengths_of(MANY[name])]
    with rig.strict(), rig.counting() as counted:
        ops.get_position_ids_and_mask_encoder_batch(*tensors, positions)
    assert counted.delta == {}
    np.testing.assert_array_equal(positions.numpy(), expected(MANY[name], size))


def test_tensors_of_two_places_are_refused(rig: Rig, ops: ModuleType) -> None:
    lengths = [paddle.to_tensor(one, place=rig.place) for one in lengths_of([(0, 3, 1), (2, 1, 2)])]
    positions = paddle.full([3], -91, dtype="int32")
    with pytest.raises(OSError, match=r"position_ids: is on Place\(cpu\), the first tensor on "):
        ops.get_position_ids_and_mask_encoder_batch(*lengths, positions.cpu())


def test_the_stream_of_the_launch_is_paddles(real_rig: Rig, ops: ModuleType) -> None:
    rows = MANY[next(iter(MANY))]
    size = sum(new for *_, new in rows)
    lengths = [paddle.to_tensor(one, place=real_rig.place) for one in lengths_of(rows)]
    positions = paddle.to_tensor(np.full(size, -91, np.int32), place=real_rig.place)
    for stream in (paddle.device.Stream(real_rig.place), paddle.device.Stream(real_rig.place)):
        positions.fill_(-91)
        paddle.device.synchronize(real_rig.place)
        with paddle.device.stream_guard(stream), real_rig.capture() as captured:
            ops.get_position_ids_and_mask_encoder_batch(*lengths, positions)
        # what a capture of that stream holds was queued on it, and has not run
        assert captured.num_nodes == 1
        assert (positions.numpy() == -91).all()
        captured.replay()
        np.testing.assert_array_equal(positions.numpy(), expected(rows, size))


def test_the_doctor_checks_them_on_the_device(rig: Rig, ops: ModuleType) -> None:
    rows = [row for row in checks.run_checks(rig.device) if row["provider"] == "custom_op"]
    assert all(row["passed"] for row in rows), rows
    places = {row["device"] for row in rows if row["name"] == "position_ids"}
    assert places == {"cpu", rig.device}
