"""The double's operators against loops, with what upstream's get wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import paddle
import pytest

from tests.fakes import golden
from tests.fakes.trees import DEVELOP, installed
from tests.reference.rope import ref_rotate

random = np.random.default_rng


@pytest.fixture(params=["int32", "int64"])
def dtype(request: pytest.FixtureRequest) -> Iterator[str]:
    """Of positions in the tree that is installed."""
    with installed(replace(DEVELOP, position_dtype=request.param)):
        yield request.param


def _gpu() -> Any:
    from fastdeploy.model_executor.ops import gpu

    return gpu


def test_positions_of_the_worked_step(dtype: str) -> None:
    step = golden.tensors()
    lengths = [step[f"seq_lens_{name}"] for name in ("encoder", "decoder", "this_time")]
    positions = paddle.full([15], -7, dtype)
    operator = _gpu().get_position_ids_and_mask_encoder_batch
    operator(*lengths, positions)
    # the memory past the last token stays as it was
    assert positions.tolist() == [*golden.POSITIONS, -7, -7]
    with pytest.raises(TypeError):
        operator(*lengths, positions, positions)
    with pytest.raises(ValueError, match="position_ids is"):
        operator(*lengths, positions.astype("int64" if dtype == "int32" else "int32"))


def test_slots_of_the_runner_wrap_for_padding() -> None:
    with installed(DEVELOP):
        from fastdeploy.worker._runner_step import compute_slot_mapping

        step = golden.tensors()
        positions = paddle.to_tensor([*golden.POSITIONS, 3], dtype="int32")
        batch_ids = paddle.to_tensor([*golden.BATCH_IDS, -1], dtype="int32")
        slots = compute_slot_mapping(step["block_tables"], positions, batch_ids, 64)
    # -1 is the last row, whose first block is 3
    assert slots.tolist() == [*golden.SLOTS, 3 * 64 + 3]


@pytest.mark.parametrize("is_neox", [True, False])
def test_rotation_is_in_place_and_takes_the_tree_s_positions(dtype: str, is_neox: bool) -> None:
    table = random(5).standard_normal((7, 8)).astype(np.float32)
    q = random(6).standard_normal((3, 2, 12)).astype(np.float32)
    k = random(7).standard_normal((3, 1, 8)).astype(np.float32)
    positions = paddle.to_tensor([4, 0, 6], dtype=dtype)
    query, key, cache = (paddle.to_tensor(array) for array in (q, k, table))
    addresses = query.data_ptr(), key.data_ptr()
    rotate = _gpu().fused_rotary_position_encoding
    rotate(query, key, positions, cache, 8, is_neox)
    assert (query.data_ptr(), key.data_ptr()) == addresses
    for values, rotated in ((q, query), (k, key)):
        for t, position in enumerate((4, 0, 6)):
            for h in range(values.shape[1]):
                expected = values[t, h].copy()
                expected[:8] = _rotated(values[t, h, :8], table[position], not is_neox)
                assert np.allclose(rotated[t, h].numpy(), expected, atol=1e-5)
    wrong = positions.astype("int64" if dtype == "int32" else "int32")
    with pytest.raises(ValueError, match="position_ids"):
        rotate(query, key, wrong, cache, 8, is_neox)


def _rotated(x: np.ndarray, row: np.ndarray, interleaved: bool) -> np.ndarray:
    """The oracle on a row of cos and sin that need not be those of an angle."""
    cos, sin = np.split(row, 2)
    angles, radius = np.arctan2(sin, cos), np.hypot(sin, cos)
    turned = ref_rotate(x, angles, interleaved)
    return turned * (np.repeat(radius, 2) if interleaved else np.tile(radius, 2))
