"""The buffers of a step: never moved, cleared where the last step was larger, never shared."""

from __future__ import annotations

import dataclasses
import gc
import os
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa.step import ForwardMeta, StepMetadataBuilder
from fd_dsa.step.checks import INPUTS
from tests.kernel_memory import KernelMemory
from tests.step.helpers import (
    ARRAY_FIELDS,
    PREFILL_FIELDS,
    ROW_FIELDS,
    TOKEN_FIELDS,
    Place,
    arrays_of,
    as_numpy,
    assert_matches_oracle,
    counts_of,
)
from tests.strategies import StepBatch, make_batch

REPOSITORY = Path(__file__).parents[2]

LARGE = make_batch([(20, 30, 20), (0, 60, 1), (6, 0, 6), (0, 5, 4), (0, 40, 1)], 16, num_columns=4)
SMALL = make_batch([(3, 2, 3), (0, 9, 1)], 16, num_columns=4)
SMALL_DECODE = make_batch([(0, 2, 1), (0, 9, 1)], 16, num_columns=4)


def _builder(place: Place | None = None, **sizes: Any) -> StepMetadataBuilder:
    """Of NumPy arrays or of a place, for all steps of this file."""
    sizes = {"max_num_seqs": 5, "max_num_tokens": 40, "num_blocks": None} | sizes
    return (place or Place("numpy", None)).builder(LARGE, **sizes)


def _build(builder: StepMetadataBuilder, batch: StepBatch) -> ForwardMeta:
    return builder.build(*batch.inputs())


def test_addresses_never_move(place: Place) -> None:
    builder = _builder(place)
    large = _build(builder, LARGE)
    first = {name: place.address(getattr(large, name)) for name in ARRAY_FIELDS}
    assert len(set(first.values())) == len(ARRAY_FIELDS)
    for batch in (SMALL, SMALL_DECODE, LARGE, SMALL):
        meta = _build(builder, batch)
        for name in ARRAY_FIELDS:
            array = getattr(meta, name)
            assert array is None or place.address(array) == first[name], name
            assert array is None or first[name] % 16 == 0, name
    assert builder.num_builds == 5


def test_a_step_of_known_size_makes_no_new_tensors(place: Place) -> None:
    builder = _builder(place)
    first, second = _build(builder, LARGE), _build(builder, LARGE)
    assert first is not second
    assert first != second
    for name in ARRAY_FIELDS:
        assert getattr(first, name) is getattr(second, name), name


@pytest.mark.parametrize("device", ["numpy", "cpu"])
def test_many_sizes_are_served_from_the_same_memory(device: str) -> None:
    builder = StepMetadataBuilder(2, 2000, 4, 512, device=device)
    addresses = set()
    for num_tokens in (*range(1, 600), 1):
        batch = make_batch([(num_tokens, 0, num_tokens)], 512, num_columns=4)
        meta = _build(builder, batch)
        addresses.add(Place(device, None).address(meta.slot_mapping))
        assert as_numpy(meta.position_ids)[-1] == num_tokens - 1
    assert len(addresses) == 1


def test_what_the_last_step_used_becomes_padding(place: Place) -> None:
    builder = _builder(place)
    large = _build(builder, LARGE)
    _build(builder, SMALL_DECODE)
    small = _build(builder, SMALL)
    padded = arrays_of(large, place.get)
    tokens, rows = SMALL.num_tokens, SMALL.num_rows
    assert (padded["batch_id_per_token"][tokens:] == -1).all()
    assert (padded["slot_mapping"][tokens:] == -1).all()
    assert not padded["position_ids"][tokens:].any()
    assert not padded["position_ids_int32"][tokens:].any()
    assert not padded["indexer_attn_mask_offsets"][2 * tokens :].any()
    assert (padded["block_tables"][rows:] == -1).all()
    assert (padded["cu_seqlens_q"][rows:] == tokens).all()
    assert (padded["cu_seqlens_kg"][rows:] == place.get(small.cu_seqlens_kg)[-1]).all()
    for name in ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time"):
        assert not padded[name][rows:].any(), name
    assert_matches_oracle(small, SMALL, place.get)


def test_int32_positions_are_written_where_they_are_asked_for(place: Place) -> None:
    asked, plain = _builder(place), _builder(place, int32_position_ids=False)
    for batch in (LARGE, SMALL, SMALL_DECODE):
        assert _build(plain, batch).position_ids_int32 is None
        meta = _build(asked, batch)
        narrow = place.get(meta.position_ids_int32)
        assert narrow.dtype == np.int32
        np.testing.assert_array_equal(narrow, place.get(meta.position_ids))


def test_inputs_are_copied(place: Place) -> None:
    inputs: list[Any] = [array.copy() for array in LARGE.inputs()]
    meta = _builder(place).build(*inputs)
    for array in inputs:
        array.fill(3)
    assert_matches_oracle(meta, LARGE, place.get)
    if place.name == "cpu":
        meta = _builder(place).build(*(inputs := place.put(LARGE)))
        for tensor in inputs:
            tensor.fill_(3)
        assert_matches_oracle(meta, LARGE)


def test_device_tensors_are_used_where_they_are(kernel_memory: KernelMemory) -> None:
    place = Place("", kernel_memory)
    tensors = place.put(LARGE)
    meta = _builder(place).build(*tensors, **counts_of(LARGE))
    for name, tensor in zip(INPUTS, tensors, strict=True):
        assert getattr(meta, name) is tensor


def test_a_new_builder_holds_padding_only(place: Place) -> None:
    nothing = make_batch([], 16, num_columns=4, num_padded_tokens=40)
    assert_matches_oracle(place.build(_builder(place), nothing, True), nothing, place.get)


def test_the_next_step_may_be_built_from_the_last_one() -> None:
    builder = _builder()
    meta = _build(builder, LARGE)
    # one token of each row again, as a decode step: the cached lengths are a view of the buffers
    this_time = (LARGE.seq_lens_this_time > 0).astype(np.int32)
    encoder = np.zeros(LARGE.num_rows, np.int32)
    wanted = dataclasses.replace(LARGE, seq_lens_encoder=encoder, seq_lens_this_time=this_time)
    again = builder.build(encoder, meta.seq_lens_decoder, this_time, meta.block_tables)
    assert_matches_oracle(again, wanted)


def test_a_decode_step_leaves_the_windows_alone(place: Place) -> None:
    builder = _builder(place)
    large = _build(builder, LARGE)
    before = {name: place.get(getattr(large, name)).copy() for name in PREFILL_FIELDS}
    meta = _build(builder, SMALL_DECODE)
    for name in PREFILL_FIELDS:
        assert getattr(meta, name) is None
        np.testing.assert_array_equal(place.get(getattr(large, name)), before[name])


def test_an_upper_bound_of_the_longest_row_is_kept() -> None:
    meta = _builder().build(*LARGE.inputs(), max_seqlen_k=64)
    assert meta.max_seqlen_k == 64


def test_the_metadata_can_be_neither_changed_nor_misspelt() -> None:
    meta = _build(_builder(), SMALL)
    with pytest.raises(dataclasses.FrozenInstanceError):
        meta.num_decode_tokens = 7
    with pytest.raises(AttributeError):
        _ = meta.slot_maping
    assert set(ForwardMeta.__slots__) >= {*ROW_FIELDS, *TOKEN_FIELDS, *PREFILL_FIELDS}


def test_the_views_do_not_keep_a_builder_alive_and_outlive_it(place: Place) -> None:
    builder = _builder(place)
    meta = _build(builder, SMALL)
    alive = weakref.ref(builder)
    gc.disable()
    try:
        del builder
        assert alive() is None
    finally:
        gc.enable()
    assert_matches_oracle(meta, SMALL, place.get)


def test_numpy_steps_need_no_paddle() -> None:
    script = """
import sys
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("paddle", "triton", "torch"):
            raise ImportError(f"{name} must not be imported")
sys.meta_path.insert(0, Refuse())
import numpy as np
from fd_dsa.step import StepMetadataBuilder
from fd_dsa.errors import BackendUnavailable
lengths = [np.array([n], np.int32) for n in (2, 1, 2)]
table = np.array([[5]], np.int32)
print(StepMetadataBuilder(1, 4, 1, 16, device="numpy").build(*lengths, table).slot_mapping)
try:
    StepMetadataBuilder(1, 4, 1, 16)
except BackendUnavailable as error:
    print(error)
"""
    result = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": str(REPOSITORY)},
    )
    assert result.returncode == 0, result.stderr
    slots, refusal = result.stdout.splitlines()
    assert slots == "[81 82]"
    assert "fd_dsa[cpu]" in refusal
