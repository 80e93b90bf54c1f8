"""The backend's step: FastDeploy's ForwardMeta in all forms, its fields in the tree's dtypes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fd_dsa.errors import CapacityError, MissingStepError
from fd_dsa.fastdeploy_plugin.steps import fill_max_lens
from tests.fakes import golden
from tests.fastdeploy_plugin.steps import (
    config,
    decode_only,
    forward_meta,
    int32,
    make_backend,
    registered,
    values,
)

TREES = ["pr7367", "develop"]
LENGTHS = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time")


def offsets(meta: Any) -> list[tuple[int, int]]:
    """The windows of a step as pairs."""
    return [tuple(pair) for pair in np.asarray(meta.indexer_attn_mask_offsets).reshape(-1, 2)]


@pytest.mark.parametrize("name", TREES)
def test_the_worked_step(name: str) -> None:
    with registered(name):
        backend = make_backend()
        meta = forward_meta(backend)
        backend.init_attention_metadata(meta)
    assert meta.position_ids.dtype == paddle.int32
    assert values(meta.position_ids) == golden.POSITIONS
    assert meta.slot_mapping.dtype == paddle.int64
    assert values(meta.slot_mapping) == golden.SLOTS
    assert meta.indexer_attn_mask_offsets.dtype == paddle.int32
    assert offsets(meta) == golden.WINDOWS
    step = meta.fd_dsa_step
    assert values(step.batch_id_per_token) == golden.BATCH_IDS
    # the layers' own positions are int64 in all trees
    assert step.position_ids.dtype == paddle.int64


def test_a_decode_only_step_has_no_windows_and_memory_past_it_is_clean() -> None:
    """A graph of a larger size reads that memory: slot -1, position 0, no row."""
    with registered():
        backend = make_backend()
        long = forward_meta(backend)
        backend.init_attention_metadata(long)
        meta = forward_meta(backend, 5, **decode_only())
        backend.init_attention_metadata(meta)
        assert meta.indexer_attn_mask_offsets is None
        assert values(meta.position_ids) == [130, 3, 20, 21, 22]
        assert values(meta.slot_mapping) == [578, 259, 212, 213, 214]
        step = long.fd_dsa_step
        assert values(step.slot_mapping)[5:] == [-1] * 8
        assert values(step.position_ids)[5:] == [0] * 8
        assert values(step.batch_id_per_token)[5:] == [-1] * 8


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("running", ["this_time", "all but this_time", "none", "tables"])
def test_slots_and_running_rows_are_the_same_step(rank: int, running: str) -> None:
    """Runners give `[S]`, `[S, 1]` or `[B]`, and not the same for all four."""
    names = {
        "this_time": LENGTHS[2:],
        "all but this_time": (*LENGTHS[:2], "block_tables"),
        "none": LENGTHS[:2],
        "tables": ("block_tables",),
    }[running]
    full = {}
    for name, tensor in golden.tensors().items():
        if name in (*LENGTHS, "block_tables") and name not in names:
            # rows past the running ones hold what a request left there
            more = np.full((3, *tensor.shape[1:]), 5, np.int32)
            tensor = int32(np.concatenate([np.asarray(tensor), more]))
        if name in LENGTHS and rank == 2:
            tensor = tensor.reshape([-1, 1])
        full[name] = tensor
    with registered():
        backend = make_backend()
        meta = forward_meta(backend, **full)
        backend.init_attention_metadata(meta)
    assert values(meta.slot_mapping) == golden.SLOTS
    assert values(meta.fd_dsa_step.cu_seqlens_q) == golden.CU_SEQLENS_Q


def test_steps_of_requests_are_counted_in_the_log(
    fresh_log: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with registered(), caplog.at_level("INFO", "fd_dsa"):
        backend = make_backend()
        for number in range(12):
            meta = forward_meta(backend)
            # a profile run, then requests
            meta.is_dummy_or_profile_run = number == 0
            backend.init_attention_metadata(meta)
    lines = [record.message for record in caplog.records if "steps prepared" in record.message]
    tokens = len(golden.POSITIONS)
    assert lines == [
        f"fd_dsa: steps prepared: {count}, with prompts: {count}, tokens: {count * tokens}"
        for count in (1, 10)
    ]


@pytest.mark.parametrize("launched", [14, 20, 64])
def test_more_tokens_launched_than_there_are(launched: int) -> None:
    """The overlap schedule predicts the count; the surplus is padding."""
    with registered():
        backend = make_backend()
        meta = forward_meta(backend, launched)
        backend.init_attention_metadata(meta)
    surplus = launched - golden.NUM_TOKENS
    assert values(meta.position_ids) == golden.POSITIONS + [0] * surplus
    assert values(meta.slot_mapping) == golden.SLOTS + [-1] * surplus
    assert offsets(meta) == golden.WINDOWS + [(0, 0)] * surplus


def test_a_step_without_tokens() -> None:
    """An idle rank of expert parallelism."""
    idle = {name: int32([0] * 5) for name in LENGTHS}
    with registered():
        backend = make_backend()
        meta = forward_meta(backend, 0, **idle)
        meta.max_len_tensor_cpu.fill_(7)
        backend.init_attention_metadata(meta)
    assert meta.position_ids.shape == [0]
    assert meta.indexer_attn_mask_offsets is None
    assert values(meta.max_len_tensor_cpu) == [0] * 6


def test_what_the_runner_must_fill_is_named() -> None:
    with registered():
        backend = make_backend()
        for name in (*LENGTHS, "block_tables"):
            meta = forward_meta(backend, **{name: None})
            with pytest.raises(MissingStepError, match=f"forward_meta.{name} is None"):
                backend.init_attention_metadata(meta)


def test_more_tokens_than_configured_are_refused() -> None:
    with registered():
        # 64 scheduled tokens beside one of each of 8 rows
        backend = make_backend()
        backend.init_attention_metadata(forward_meta(backend, 72))
        with pytest.raises(CapacityError, match="72"):
            backend.init_attention_metadata(forward_meta(backend, 73))


def test_layers_before_the_first_step_are_refused() -> None:
    with registered():
        backend = make_backend()
        with pytest.raises(MissingStepError, match="init_attention_metadata"):
            backend.write_layer(None, None, None, None, 0, forward_meta(backend))


def test_a_step_is_made_once_and_let_go_with_its_caches() -> None:
    with registered():
        backend = make_backend()
        meta = forward_meta(backend)
        for _ in range(3):
            backend.init_attention_metadata(meta)
        assert backend.core.builder.num_builds == 1
        references = sys.getrefcount(meta)
        backend.forget_step()
        # the plug-in's and the core's own
        assert sys.getrefcount(meta) == references - 2
        with pytest.raises(MissingStepError, match="another step"):
            backend.current_core().current_step(meta)


@pytest.mark.parametrize(
    ("has_prefill", "drafts", "longest"), [(None, 0, 13), (False, 0, 1), (False, 3, 4)]
)
def test_bounds_of_the_maxima(has_prefill: bool | None, drafts: int, longest: int) -> None:
    how = {"method": "ngram", "num_speculative_tokens": drafts} if drafts else {}
    expected = [longest, 0 if has_prefill is False else 13, 256, 256, 256, 256]
    with registered():
        backend = make_backend(config(**how))
        backend.set_step_hints(has_prefill)
        meta = forward_meta(backend)
        backend.init_attention_metadata(meta)
        assert values(meta.max_len_tensor_cpu) == expected
        if has_prefill is None:
            # what FastDeploy's own operator, which waits for the device, would give
            assert (np.array(expected) >= golden.MAXIMA).all()
        # a hint is of one step
        again = forward_meta(backend)
        backend.init_attention_metadata(again)
        assert values(again.max_len_tensor_cpu)[1] == 13


@given(
    entries=st.integers(1, 9),
    num_tokens=st.integers(0, 100),
    has_prefill=st.booleans(),
    tokens_per_row=st.integers(1, 4),
)
def test_bounds_fit_the_tensor_of_the_tree(
    entries: int, num_tokens: int, has_prefill: bool, tokens_per_row: int
) -> None:
    target = paddle.full([entries], -5, "int32")
    fill_max_lens(target, num_tokens, has_prefill, tokens_per_row=tokens_per_row, max_keys=99)
    longest = num_tokens if has_prefill else min(num_tokens, tokens_per_row)
    keys = 99 if num_tokens else 0
    known = [longest, num_tokens if has_prefill else 0, keys, keys, keys, keys]
    # entries past the sixth are another tree's own
    assert target.tolist() == (known + [-5] * 3)[:entries]


def test_bounds_stay_as_they_are_during_a_capture() -> None:
    with registered():
        backend = make_backend()
        backend.init_attention_metadata(forward_meta(backend))
        meta = forward_meta(backend)
        for is_capturing, first in ((True, 0), (False, 13)):
            backend._transfers = SimpleNamespace(is_capturing=lambda answer=is_capturing: answer)
            backend._bound_lengths(meta, 13, True)
            assert values(meta.max_len_tensor_cpu)[0] == first
