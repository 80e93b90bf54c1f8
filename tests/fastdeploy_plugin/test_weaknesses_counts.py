"""What FastDeploy's own DSA path does once a layer, or once too often, and what ours does."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import pytest

from tests.fakes.trees import DEVELOP, TREES

from .side_by_side import (
    NUM_LAYERS,
    in_layers,
    launches,
    make_engine,
    ours,
    prompt,
    record_choices,
    upstream,
)

# engines by the dozen
pytestmark = pytest.mark.slow
# a prompt of 40 tokens and two decode steps
STEPS = 3
PROMPT = 40


@contextmanager
def _run(**overrides: Any) -> Iterator[Any]:
    """A prompt and its decode steps with everything counted."""
    from fastdeploy import _counters

    from tests.fakes.driver import Job

    engine = make_engine(**overrides)
    with _counters.watch():
        engine.generate([Job(prompt(PROMPT), STEPS)])
        yield engine


def _by_step(events: list[Any]) -> dict[int, int]:
    return dict(Counter(event.step for event in events))


@contextmanager
def _calls(owner: Any, name: str) -> Iterator[list[tuple[Any, ...]]]:
    """Arguments of every call of a function or method."""
    original, found = getattr(owner, name), []

    def counted(*args: Any, **kwargs: Any) -> Any:
        found.append(args)
        return original(*args, **kwargs)

    setattr(owner, name, counted)
    try:
        yield found
    finally:
        setattr(owner, name, original)


def test_no_layer_waits_for_the_device() -> None:
    """Upstream: a loop over rows and `.max().item()` in the indexer, `where` in the backend."""
    with upstream(), _run():
        waits = in_layers("sync")
        # in each layer: two bounds and a comparison of the row, and the longest window; then which
        # rows decode
        assert _by_step(waits) == {1: NUM_LAYERS * 4, 2: NUM_LAYERS, 3: NUM_LAYERS}
        assert {event.layer for event in waits} == set(range(NUM_LAYERS))
    for tree in ("pr7367", "develop"):
        with ours(TREES[tree]), _run():
            assert in_layers("sync") == []


def test_slots_are_made_once_a_step_in_one_launch() -> None:
    """Upstream: five operators of Paddle after the one for positions (#7367)."""
    with upstream(), _run():
        assert launches("slot_mapping") == dict.fromkeys(range(1, STEPS + 1), 5)
    from fd_dsa.step import StepMetadataBuilder

    for tree in ("pr7367", "develop"):
        with ours(TREES[tree]):
            engine = make_engine()
            from tests.fakes.driver import Job

            with _calls(StepMetadataBuilder, "build") as builds:
                engine.generate([Job(prompt(PROMPT), STEPS)])
            assert len(builds) == STEPS
            assert launches("slot_mapping") == {}


def test_layers_launch_none_of_fastdeploy_s_operators() -> None:
    """So that no launch of metadata can grow with the number of layers."""
    with upstream(TREES["develop"]), _run():
        assert {event.layer for event in in_layers("launch")} == set(range(NUM_LAYERS))
    with ours(TREES["develop"]), _run():
        assert in_layers("launch") == []


WINDOWS = replace(DEVELOP, name="windows", mask_offsets=True, sliding_windows=False)


def test_decode_steps_make_no_windows() -> None:
    """Upstream: #7598 takes and zeroes [2T] int32 and launches, since #8041 for every layer."""

    def of_windows() -> tuple[dict[int, int], list[int]]:
        from fastdeploy import _counters

        made = _counters.events("allocation", "zeros", "fastdeploy.model_executor.layers.attention")
        return launches("indexer_attn_mask_offsets"), [event.size for event in made]

    with upstream(WINDOWS), _run():
        sizes = [4 * 2 * tokens for tokens in (PROMPT, 1, 1) for _ in range(NUM_LAYERS)]
        assert of_windows() == (dict.fromkeys((1, 2, 3), NUM_LAYERS), sizes)
    with ours(WINDOWS), _run() as engine:
        assert of_windows() == ({}, [])
        # the newest step is one of decoding
        assert engine.runner.forward_meta.indexer_attn_mask_offsets is None


def test_schedules_are_made_once_a_step_at_most() -> None:
    """Upstream: a FlashMLA holder and a DeepGEMM schedule in every layer."""
    names = "flash_mla_schedule", "get_paged_mqa_logits_metadata"
    decode_steps = dict.fromkeys(range(2, STEPS + 1), NUM_LAYERS)
    with upstream(), _run():
        assert [launches(name) for name in names] == [decode_steps, decode_steps]
    with ours(), _run():
        assert all(count <= 1 for name in names for count in launches(name).values())


def _attended_tokens(engine: Any, side: str) -> dict[str, int]:
    """Tokens of a mixed step that attention kernels are given, in all layers."""
    import flash_mla

    from fd_dsa.attention.host import HostAttention
    from tests.fakes.driver import Job

    jobs = [Job(prompt(20), 9), Job(prompt(30, seed=1), 2, start_at=2)]
    for _ in range(2):
        engine.step(jobs)
    with (
        _calls(flash_mla, "flash_mla_sparse_fwd") as prefill,
        _calls(flash_mla, "flash_mla_with_kvcache") as decode,
        _calls(HostAttention, "attend") as attend,
    ):
        engine.step(jobs)
    return {
        "prefill": sum(args[0].shape[0] for args in prefill),
        "decode": sum(args[0].shape[0] for args in decode),
        "ours": sum(args[2].shape[0] for args in attend),
    }


def test_each_token_is_attended_once() -> None:
    """Upstream in April: both kernels run over all tokens of a mixed step; then it merges."""
    all_tokens = NUM_LAYERS * (1 + 30)
    with upstream(TREES["pr7367"]):
        found = _attended_tokens(make_engine(), "upstream")
        assert found == {"prefill": all_tokens, "decode": all_tokens, "ours": 0}
    with ours():
        found = _attended_tokens(make_engine(), "ours")
        assert found == {"prefill": 0, "decode": 0, "ours": all_tokens}


def test_no_maximum_is_taken_for_a_scale_that_nobody_reads() -> None:
    """Upstream in April: abs(compressed_kv).max() / 200, which ds_mla_cache_kernel.cu ignores."""
    with upstream(TREES["pr7367"]), _run():
        assert launches("kv_scale") == dict.fromkeys(range(1, STEPS + 1), 3 * NUM_LAYERS)
    with ours(), _run():
        assert launches("kv_scale") == {}


def test_logits_stay_within_a_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    """Upstream: [T, longest] and [rows, max_model_len] float32, whatever these are."""
    long = 4 * PROMPT
    sizes = {"max_num_batched_tokens": long, "index_topk": 8}

    def run() -> list[list[int]]:
        from tests.fakes.driver import Job

        return make_engine(**sizes).generate([Job(prompt(long), 2)])

    with upstream():
        run()
        in_rows_of_256 = [event.size // 1024 for event in in_layers("allocation", "logits")]
        assert in_rows_of_256 == [long] * NUM_LAYERS + [1] * NUM_LAYERS
    from fd_dsa.attention import host, step_plan

    with ours():
        whole = run()
    budget = 16 * long * 20
    monkeypatch.setattr(step_plan, "_SCORE_TILE_VALUES", budget)
    with ours(), _calls(host, "indexer_logits") as calls:
        assert run() == whole
        values = [q.shape[0] * q.shape[1] * len(slots) for q, _, _, slots, _ in calls]
        assert len(values) > NUM_LAYERS and max(values) <= budget


def _scored_rows(side: str, **overrides: Any) -> list[int]:
    """Decode rows that an indexer scores in a step with one of them, one prefill and idle rows."""
    import deep_gemm

    from fd_dsa.attention import host
    from tests.fakes.driver import Job

    engine = make_engine(index_topk=8, **overrides)
    jobs = [Job(prompt(20), 9), Job(prompt(30, seed=1), 2, start_at=2)]
    for _ in range(2):
        engine.step(jobs)
    with (
        _calls(deep_gemm, "fp8_paged_mqa_logits") as theirs,
        _calls(host, "paged_indexer_logits") as mine,
    ):
        engine.step(jobs)
    return [args[0].shape[0] for args in (theirs if side == "upstream" else mine)]


def test_decoding_scores_decode_rows_alone() -> None:
    """Upstream: a buffer of zeros in each layer, for rows that prefill too."""
    with upstream():
        assert _scored_rows("upstream") == [2] * NUM_LAYERS
    with ours():
        assert _scored_rows("ours") == [1] * NUM_LAYERS


def test_layers_have_no_unused_buffers() -> None:
    """Upstream: two int32 [max_model_len] in each indexer, which it never uses."""

    def of_positions(engine: Any) -> int:
        indexer = engine.runner.model.model.layers[0].self_attn.indexer
        longest = engine.config.model_config.max_model_len
        return sum(
            hasattr(value, "shape") and list(value.shape) == [longest]
            for value in [*vars(indexer).values(), *indexer.buffers()]
        )

    with upstream():
        assert of_positions(make_engine()) == 2
    with ours():
        assert of_positions(make_engine()) == 0


@pytest.mark.parametrize("tree", ["pr7367", "develop"])
def test_no_wait_for_six_integers(tree: str) -> None:
    """Upstream waits for a copy of them in every step, since #8041 once for each layer."""
    from fd_dsa.ops._host import as_numpy

    name = "get_block_shape_and_split_kv_block"
    count = NUM_LAYERS if TREES[tree].backend_per_layer else 1
    each = dict.fromkeys(range(1, STEPS + 1), count)
    with upstream(TREES[tree]), _run() as engine:
        from fastdeploy import _counters

        assert _by_step(_counters.events("sync", name)) == each
        exact = as_numpy(engine.runner.forward_meta.max_len_tensor_cpu).copy()
    with ours(TREES[tree]), _run() as engine:
        from fastdeploy import _counters

        assert launches(name) == {} and _counters.events("sync", name) == []
        # what the model reads is there: bounds, and exactly none where there is no prefill
        bounds = as_numpy(engine.runner.forward_meta.max_len_tensor_cpu)
        assert (bounds >= exact).all() and bounds[1] == exact[1] == 0


def test_a_step_s_tensors_keep_their_addresses() -> None:
    """Upstream: zeros(2T) of #7598 are new in each step."""

    def addresses(name: str) -> set[int]:
        from tests.fakes.driver import Job

        engine = make_engine()
        found, kept = [], []
        jobs = [Job(prompt(30), 2), Job(prompt(30, seed=1), 2, start_at=1)]
        for _ in range(2):
            engine.step(jobs)
            tensor = getattr(engine.runner.forward_meta, name)
            # so that no later tensor gets the memory
            kept.append(tensor)
            found.append(tensor.data_ptr())
        return set(found)

    with upstream(WINDOWS):
        assert len(addresses("indexer_attn_mask_offsets")) == 2
    with ours(WINDOWS):
        for name in ("position_ids", "slot_mapping", "indexer_attn_mask_offsets"):
            assert len(addresses(name)) == 1


def test_the_selection_has_one_buffer() -> None:
    """Upstream: full([T, topk], -1) in every layer."""
    with upstream(), _run():
        filled = in_layers("allocation", "full")
        assert _by_step(filled) == dict.fromkeys(range(1, STEPS + 1), NUM_LAYERS)
        assert filled[0].size == 4 * PROMPT * 256
    from tests.fakes.driver import Job

    with ours():
        engine = make_engine()
        record = record_choices(engine)
        engine.generate([Job(prompt(PROMPT), STEPS)])
        assert len(record.choices) == STEPS * NUM_LAYERS
        assert len({choice.address for choice in record.choices}) == 1


@pytest.mark.parametrize("tree", ["pr7367", "develop"])
def test_layers_create_no_tensor(tree: str) -> None:
    """All that Python creates in a layer's attention; upstream's are those of the tests above."""
    with upstream(TREES[tree]), _run():
        assert min(_by_step(in_layers("allocation")).values()) >= NUM_LAYERS
    with ours(TREES[tree]), _run():
        assert in_layers("allocation") == []
