"""The backend's step: FastDeploy's ForwardMeta in all forms, its fields in the tree's dtypes."""

from __future__ import annotations

import sys
from types import SimpleNamespace
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa.errors import CapacityError, MissingStepError
from fd_dsa.fastdeploy_plugin.steps import fill_max_lens
from tests.fakes import golden
from tests.fastdeploy_plugin.steps import (
    config,
    forward_meta,
    int32,
    make_backend,
    registered,
    values,
    write,
)

LENGTHS = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time")


def prepared(num_tokens: int = golden.NUM_TOKENS, **overrides: Any) -> Any:
    """A step of a new backend."""
    backend = make_backend()
    meta = forward_meta(backend, num_tokens, **overrides)
    backend.init_attention_metadata(meta)
    return meta


@pytest.mark.parametrize("launched", [13, 14, 64])
@pytest.mark.parametrize("name", ["pr7367", "develop"])
def test_the_worked_step(name: str, launched: int) -> None:
    """The overlap schedule predicts the count of tokens; the surplus is padding."""
    with registered(name):
        meta = prepared(launched)
    surplus = launched - golden.NUM_TOKENS
    assert meta.position_ids.dtype == meta.indexer_attn_mask_offsets.dtype == paddle.int32
    assert meta.slot_mapping.dtype == paddle.int64
    assert values(meta.position_ids) == golden.POSITIONS + [0] * surplus
    assert values(meta.slot_mapping) == golden.SLOTS + [-1] * surplus
    windows = np.asarray(meta.indexer_attn_mask_offsets).reshape(-1, 2)
    assert list(map(tuple, windows)) == golden.WINDOWS + [(0, 0)] * surplus


@pytest.mark.parametrize("rank", [1, 2])
@pytest.mark.parametrize("running", [LENGTHS[2:], (*LENGTHS[:2], "block_tables")], ids=str)
def test_slots_and_running_rows_are_the_same_step(rank: int, running: tuple[str, ...]) -> None:
    """Runners give `[S]`, `[S, 1]` or `[B]`, and not the same for all four."""
    full = {}
    for name, tensor in golden.tensors().items():
        if name in (*LENGTHS, "block_tables") and name not in running:
            # rows past the running ones hold what a request left there
            more = np.full((3, *tensor.shape[1:]), 5, np.int32)
            tensor = int32(np.concatenate([np.asarray(tensor), more]))
        full[name] = tensor.reshape([-1, 1]) if name in LENGTHS and rank == 2 else tensor
    with registered():
        meta = prepared(**full)
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


def test_what_is_missing_is_named() -> None:
    """Fields of the runner, caches, and the step itself."""
    with registered():
        backend = make_backend()
        with pytest.raises(MissingStepError, match="init_attention_metadata"):
            backend.current_core()
        for name in (*LENGTHS, "block_tables"):
            with pytest.raises(MissingStepError, match=f"forward_meta.{name} is None"):
                backend.init_attention_metadata(forward_meta(backend, **{name: None}))
        with pytest.raises(MissingStepError, match=r"forward_meta.caches\[0\] is None"):
            write(backend, forward_meta(backend, caches=None))


def test_more_tokens_than_configured_are_refused() -> None:
    with registered():
        # 64 scheduled tokens beside one of each of 8 rows
        prepared(72)
        with pytest.raises(CapacityError, match="73"):
            prepared(73)


def test_a_step_is_made_once_and_let_go_with_its_caches() -> None:
    with registered():
        backend = make_backend()
        meta = forward_meta(backend)
        for _ in range(3):
            backend.init_attention_metadata(meta)
        assert backend.core.builder.num_builds == 1
        references = sys.getrefcount(meta)
        backend.drop_step_state()
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
        # a hint is of one step, and a capture leaves the values of its warm-up
        for is_capturing, second in ((False, 13), (True, 0)):
            if is_capturing:
                backend.transfers = SimpleNamespace(is_capturing=lambda: True)
            again = forward_meta(backend)
            backend.bound_lengths(again, 13, True)
            assert values(again.max_len_tensor_cpu)[1] == second


@pytest.mark.parametrize("entries", [1, 6, 9])
def test_bounds_fit_the_tensor_of_the_tree(entries: int) -> None:
    """Entries past the sixth are another tree's own."""
    target = paddle.full([entries], -5, "int32")
    fill_max_lens(target, 7, True, tokens_per_row=2, max_keys=99)
    assert target.tolist() == [7, 7, 99, 99, 99, 99, -5, -5, -5][:entries]
    fill_max_lens(target, 0, False, tokens_per_row=2, max_keys=99)
    assert target.tolist() == [0, 0, 0, 0, 0, 0, -5, -5, -5][:entries]
