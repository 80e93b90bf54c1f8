"""Requests of an adapter to another runner: steps of given arrays, types, buffers."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from fd_dsa.attention import CacheLayout, DSAAttentionBackend, DSABackendConfig, StepHints
from fd_dsa.errors import ConfigError
from tests.kernel_memory import KernelMemory
from tests.step.helpers import as_numpy, assert_matches_oracle, builder_for, counts_of
from tests.strategies import StepBatch, make_batch

MIXED = make_batch([(4, 17, 4), (0, 9, 1), (0, 0, 0), (0, 30, 2)], 16, num_columns=3)
DECODE = make_batch([(0, 21, 1), (0, 10, 1)], 16, num_columns=3)
# at least what MIXED and DECODE hold
BOUNDS = StepHints(num_tokens=9, num_prefill_tokens=9, max_seqlen_k=48)


def config(**changes: Any) -> DSABackendConfig:
    """Of a small backend, with some fields replaced."""
    layout = CacheLayout("float32", 16, 6, 2, 4)
    plain = DSABackendConfig(2, 3, 8, 0.5, layout, 6, 32, 3)
    return dataclasses.replace(plain, **changes)


def on_device(memory: KernelMemory, **changes: Any) -> DSAAttentionBackend:
    """A backend over poisoned buffers in a kernel memory."""
    return DSAAttentionBackend(config(**changes), "gpu", memory.poisoned)


def longer(batch: StepBatch, rows: int = 6) -> SimpleNamespace:
    """A runner's object: arrays of all its rows, of which the step has the first."""
    spare = rows - batch.num_rows
    names = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time")
    fields = {n: np.concatenate([getattr(batch, n), np.zeros(spare, np.int32)]) for n in names}
    tables = np.concatenate([batch.block_tables, np.full((spare, 3), -1, np.int32)])
    return SimpleNamespace(**fields, block_tables=tables)


def test_the_step_has_the_rows_that_are_given() -> None:
    backend, meta = DSAAttentionBackend(config()), longer(MIXED)
    backend.build_step(meta, MIXED.inputs())
    assert_matches_oracle(meta.fd_dsa_step, MIXED)
    assert meta.seq_lens_encoder.shape == (6,)
    assert backend.attention_metadata is meta.fd_dsa_step
    for name in ("position_ids", "slot_mapping", "indexer_attn_mask_offsets"):
        assert getattr(meta, name) is getattr(meta.fd_dsa_step, name)


def test_a_step_of_device_tensors(kernel_memory: KernelMemory) -> None:
    m, backend = kernel_memory, on_device(kernel_memory)
    for batch in (MIXED, DECODE):
        meta, tensors = longer(batch), [m.put(array) for array in batch.inputs()]
        backend.build_step(meta, tensors, StepHints(**counts_of(batch)))
        assert_matches_oracle(meta.fd_dsa_step, batch, m.get)


def test_hints_of_device_tensors_may_be_upper_bounds(kernel_memory: KernelMemory) -> None:
    m, backend = kernel_memory, on_device(kernel_memory)
    for batch in (MIXED, DECODE):
        meta = SimpleNamespace()
        backend.build_step(meta, [m.put(array) for array in batch.inputs()], BOUNDS)
        step = meta.fd_dsa_step
        padding = BOUNDS.num_tokens - batch.num_tokens
        wanted = builder_for(batch).build(*batch.inputs()).slot_mapping
        assert m.get(step.slot_mapping).tolist() == wanted.tolist() + [-1] * padding
        assert (m.get(step.batch_id_per_token)[batch.num_tokens :] == -1).all()
        assert step.max_seqlen_k == 48


def test_device_tensors_without_hints_are_refused(kernel_memory: KernelMemory) -> None:
    backend, meta = on_device(kernel_memory), SimpleNamespace()
    tensors = [kernel_memory.put(array) for array in DECODE.inputs()]
    for hints in (None, StepHints(num_tokens=2)):
        with pytest.raises(ValueError, match=r"num_prefill_tokens, max_seqlen_k: needed with"):
            backend.build_step(meta, tensors, hints)
    assert not vars(meta)


@pytest.mark.parametrize("hints", [None, StepHints(), StepHints(num_padded_tokens=7)])
def test_on_a_cpu_the_lengths_say_it_all(hints: StepHints | None) -> None:
    meta = SimpleNamespace()
    DSAAttentionBackend(config()).build_step(meta, MIXED.inputs(), hints)
    padded = None if hints is None else hints.num_padded_tokens
    assert_matches_oracle(meta.fd_dsa_step, dataclasses.replace(MIXED, num_padded_tokens=padded))


def test_one_object_is_built_once() -> None:
    backend, meta = DSAAttentionBackend(config()), SimpleNamespace()
    backend.build_step(meta, MIXED.inputs())
    step = meta.fd_dsa_step
    backend.build_step(meta, DECODE.inputs())
    # also where the runner's own call comes second
    backend.init_attention_metadata(meta)
    assert (meta.fd_dsa_step, backend.builder.num_builds) == (step, 1)
    backend.build_step(SimpleNamespace(), DECODE.inputs())
    assert backend.builder.num_builds == 2


def test_hints_set_for_a_runner_s_call_stay_for_it() -> None:
    backend, meta = DSAAttentionBackend(config()), SimpleNamespace(**vars(longer(MIXED, 4)))
    backend.set_step_hints(StepHints(num_padded_tokens=9))
    backend.build_step(SimpleNamespace(), MIXED.inputs())
    backend.init_attention_metadata(meta)
    assert meta.slot_mapping.shape == [9]


def test_hints_of_a_call_go_before_those_that_were_set() -> None:
    backend, meta = DSAAttentionBackend(config()), SimpleNamespace(**vars(longer(MIXED, 4)))
    backend.set_step_hints(StepHints(num_padded_tokens=9))
    backend.init_attention_metadata(meta, StepHints(num_padded_tokens=8))
    assert meta.slot_mapping.shape == [8]
    # the step has used up both
    backend.init_attention_metadata(SimpleNamespace(**vars(longer(MIXED, 4))))
    assert backend.attention_metadata is not None
    assert backend.attention_metadata.slot_mapping.shape == [7]


def check_types_of_positions(
    backend: DSAAttentionBackend, inputs: Any, get: Any = as_numpy
) -> None:
    """A step has positions of the backend's type, and int64 for the operators here."""
    int32, meta = backend.config.int32_position_ids, SimpleNamespace()
    hints, padding = (None, []) if get is as_numpy else (BOUNDS, [0, 0])
    backend.build_step(meta, inputs, hints)
    step = meta.fd_dsa_step
    assert meta.position_ids is (step.position_ids_int32 if int32 else step.position_ids)
    positions = get(meta.position_ids)
    assert positions.dtype == (np.int32 if int32 else np.int64)
    assert positions.tolist() == [17, 18, 19, 20, 9, 30, 31, *padding]
    assert get(step.position_ids).dtype == np.int64


@pytest.mark.parametrize("int32", [False, True])
def test_positions_on_a_cpu_have_the_type_that_the_tree_takes(int32: bool) -> None:
    check_types_of_positions(DSAAttentionBackend(config(int32_position_ids=int32)), MIXED.inputs())


@pytest.mark.parametrize("int32", [False, True])
def test_positions_on_a_device_have_the_type_that_the_tree_takes(
    kernel_memory: KernelMemory, int32: bool
) -> None:
    m, backend = kernel_memory, on_device(kernel_memory, int32_position_ids=int32)
    check_types_of_positions(backend, [m.put(array) for array in MIXED.inputs()], m.get)


def test_activations_are_float32_on_a_cpu_and_float32_or_bfloat16_elsewhere(
    kernel_memory: KernelMemory,
) -> None:
    with pytest.raises(ConfigError, match=r"dtype: got 'float16', allowed are float32, bfloat16"):
        config(dtype="float16")
    with pytest.raises(ConfigError, match=r"dtype: got 'bfloat16'; must be float32 on a CPU"):
        DSAAttentionBackend(config(dtype="bfloat16"))
    assert on_device(kernel_memory, dtype="bfloat16").config.dtype == "bfloat16"


def test_a_cpu_has_no_buffers() -> None:
    attention = DSAAttentionBackend(config()).attention
    assert attention.mla_query_buffer(3) is attention.projection_buffers(3) is None


def test_a_device_has_one_buffer_of_each(kernel_memory: KernelMemory) -> None:
    attention, addresses = on_device(kernel_memory, dtype="bfloat16").attention, set()
    for size in (3, 32, 1):
        views = attention.mla_query_buffer(size), *attention.projection_buffers(size)
        assert [list(view.shape) for view in views] == [[size, 2, 8], [size, 4], [size, 3]]
        kinds = [str(view.dtype).rpartition(".")[2] for view in views]
        assert kinds == ["bfloat16", "bfloat16", "float32"]
        addresses.add(tuple(view.data_ptr() for view in views))
    assert len(addresses) == 1
