"""DeepSeek-V4 after prefix hits: logits and tokens of requests that compute their whole prompt."""

from __future__ import annotations

import gc
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.runner import ModelRunner
from fd_dsa.startup.capture import capture_graphs
from tests.gpu_rig import Rig
from tests.gpu_rig.captures import capture_of
from tests.gpu_rig.device.test_v4_captured import RELEASED, SMALL, captured
from tests.gpu_rig.device.test_v4_model import (
    FEW_ITERATIONS,
    SMOOTH,
    device_model,
    device_runner,
    poison_pools,
    tokens_of,
    worst,
)
from tests.gpu_rig.rows import NO_SLOTS, logits_of_rows
from tests.v4_model.cases import Case
from tests.v4_model.drafts import MTP
from tests.v4_model.ours import load_model, make_runner, prompt_logits

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.own_process]
slow = pytest.mark.slow

ROWS, SNAPSHOTS = 4, 2
# of the runner: first row that computes the beginning, and the one that goes on after it
FIRST, SECOND, OTHER = 0, 1, 3
LAYER = {"method": "mtp", "num_speculative_tokens": 2}
Step = dict[int, tuple[list[int], int]]


def chunks(rng: np.random.Generator, begin: int, end: int) -> Iterator[tuple[int, int]]:
    """Bounds of random chunks."""
    while begin < end:
        stop = min(begin + int(rng.choice([1, 1, 2, 5, 13, 24])), end)
        yield begin, stop
        begin = stop


def run(runner: ModelRunner, step: Step, slots: Mapping[int, int] = NO_SLOTS) -> np.ndarray:
    """Logits of the last token of each row: of each its new tokens and how many went before.

    `slots` are the places of snapshots that the step writes.
    """
    rows = [(row, ids, done, len(ids) > 1 or not done) for row, (ids, done) in sorted(step.items())]
    return logits_of_rows(runner, rows, slots)


def logits_after(
    runner: ModelRunner,
    prompt: list[int],
    cached: int,
    seed: int,
    *,
    is_hit: bool,
    num_past: int = 0,
) -> dict[int, np.ndarray]:
    """Logits of the last tokens of random chunks from `cached` on, beside another request.

    With a hit the state comes from another row, whose request has gone on since, and the row has
    the state of a third request before. With `num_past` the last chunk of the other row runs past
    `cached` by so many tokens, and its step writes the snapshot.
    """
    rng, table = np.random.default_rng(seed), runner.input_batch.block_tables
    copy, slot = runner.attn_backends[0].copy_slot, ROWS + 1
    other = rng.integers(2, 90, len(prompt)).tolist()
    first = FIRST if is_hit else SECOND
    for begin, end in chunks(rng, 0, cached):
        slots = {}
        if is_hit and num_past and end == cached:
            end, slots[FIRST] = cached + num_past, slot
            if begin:
                copy(FIRST, slot)
        run(runner, {first: (prompt[begin:end], begin)}, slots)
    if is_hit:
        if not num_past:
            copy(FIRST, slot)
        run(runner, {FIRST: (other[:20], cached)})
        run(runner, {SECOND: (other[:40], 0), OTHER: (other[:8], 0)})
        num_blocks = cached // runner.input_batch.block_size
        runner.input_batch.set_blocks(SECOND, table[FIRST, :num_blocks])
        copy(slot, SECOND)
    found = {}
    for begin, end in chunks(rng, cached, len(prompt)):
        step: Step = {SECOND: (prompt[begin:end], begin), OTHER: (other[begin:end], begin - cached)}
        found[end - 1] = run(runner, step)[0]
    return found


@contextmanager
def runner_of(
    rig: Rig,
    model: Any,
    dtype: str,
    block: int,
    longest: int,
    is_captured: bool,
    kv_cache_dtype: str | None = None,
) -> Iterator[ModelRunner]:
    """A runner with snapshots, whose unwritten cache rows are infinite."""
    sizes = block, ROWS, longest, SNAPSHOTS
    runner = device_runner(model, rig, dtype, *sizes, kv_cache_dtype=kv_cache_dtype)
    graphs = captured(rig, runner, (2,)) if is_captured else nullcontext()
    with graphs:
        poison_pools(runner)
        yield runner


@pytest.mark.parametrize(
    ("dtype", "num_blocks", "is_captured"),
    [
        ("float32", 1, False),
        ("bfloat16", 2, True),
        *(pytest.param("float32", 2, is_captured, marks=slow) for is_captured in (False, True)),
    ],
)
def test_logits_after_a_hit(
    rig: Rig, tmp_path: Path, dtype: str, num_blocks: int, is_captured: bool
) -> None:
    """They are the bits of a row that has computed all its tokens, in the same chunks."""
    case = Case("small", SMALL, seed=41)
    folder = case.write(tmp_path)
    model, cpu = device_model(folder, rig, dtype), load_model(folder)
    cached = num_blocks * case.block_size
    prompt, found = case.prompt(cached + 22), []
    for is_hit in (False, True):
        made = runner_of(rig, model, dtype, case.block_size, 96, is_captured)
        with made as runner:
            found.append(logits_after(runner, prompt, cached, num_blocks, is_hit=is_hit))
            assert is_captured == (runner.counters.graph_steps["decode"] > 0)
    own, after_hit = (np.array([*logits.values()]) for logits in found)
    np.testing.assert_array_equal(after_hit, own)
    if dtype == "float32":
        [wanted] = prompt_logits(make_runner(cpu, case.block_size), [prompt], 40)
        assert worst([after_hit], [wanted[[*found[1]]]]) < 1e-4


@pytest.mark.parametrize(
    ("num_past", "seed"),
    [(3, 0), *(pytest.param(*form, marks=slow) for form in ((1, 1), (16, 2), (16, 3), (5, 4)))],
)
def test_logits_after_a_snapshot_inside_of_a_chunk(
    rig: Rig, tmp_path: Path, num_past: int, seed: int
) -> None:
    """Its keys are of the step that writes it, or of steps before, and older ones are infinite."""
    case = Case("small", SMALL, seed=41)
    folder = case.write(tmp_path)
    model, cached = device_model(folder, rig, "float32"), 2 * case.block_size
    prompt = case.prompt(cached + 22)
    [wanted] = prompt_logits(make_runner(load_model(folder), case.block_size), [prompt], 40)
    with runner_of(rig, model, "float32", case.block_size, 96, False) as runner:
        found = logits_after(runner, prompt, cached, seed, is_hit=True, num_past=num_past)
    assert worst([np.array([*found.values()])], [wanted[[*found]]]) < 1e-4


@slow
@pytest.mark.parametrize("num_past", [0, 9])
def test_a_hit_at_released_sizes(rig: Rig, tmp_path: Path, num_past: int) -> None:
    """Windows, ratios and blocks have their released sizes."""
    case = Case("released", RELEASED | FEW_ITERATIONS, seed=42)
    folder = case.write(tmp_path)
    model, prompt = device_model(folder, rig, "float32"), case.prompt(150)
    [wanted] = prompt_logits(make_runner(load_model(folder), case.block_size), [prompt], 75)
    with runner_of(rig, model, "float32", case.block_size, 256, False) as runner:
        cached = case.block_size
        found = logits_after(runner, prompt, cached, 0, is_hit=True, num_past=num_past)
    assert worst([np.array([*found.values()])], [wanted[[*found]]]) < 1e-4


FORMS: dict[str, dict[str, Any]] = {
    "chunks of 24 beside answers": {"max_num_batched_tokens": 24},
    "preemption": {"num_gpu_blocks_override": 5, "max_num_batched_tokens": 24},
}


@pytest.mark.parametrize(
    ("form", "sizes_of_graphs"),
    [
        ("chunks of 24 beside answers", (2, 4)),
        ("preemption", ()),
        pytest.param("chunks of 24 beside answers", (), marks=slow),
        pytest.param("preemption", (2, 4), marks=slow),
    ],
)
def test_tokens_of_the_engine(
    form: str, rig: Rig, tmp_path: Path, sizes_of_graphs: tuple[int, ...]
) -> None:
    """Requests that begin alike, one of them with several outputs, have the CPU's tokens."""
    case = Case("smooth", SMOOTH, seed=43)
    folder, begin = case.write_served(tmp_path), case.prompt(45)
    prompts = [[*begin, 9], [*begin, 7, 8], [*begin[:17], *case.prompt(20)]]
    one, two = (SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, n=n) for n in (1, 2))
    sizes = {"block_size": 16, "max_num_seqs": 4, "max_model_len": 64}
    with LLM(model=folder, device="cpu", **sizes) as llm:
        wanted = tokens_of(llm, prompts, one)
    own = sizes | {"dtype": "float32", "enforce_eager": True} | FORMS[form]
    with LLM(model=folder, device=rig.device, **own) as llm:
        runner = llm.engine.runner
        if sizes_of_graphs:
            capture_graphs(runner, sizes_of_graphs, capture_of(rig))
        poison_pools(runner)
        assert tokens_of(llm, prompts[:1], two) == wanted[:1] * 2
        assert tokens_of(llm, prompts, one) == wanted
        stats = llm.stats()
        assert stats.prefix_cache_hits > 0
        assert (stats.num_preemptions > 0) == (form == "preemption")
        assert (runner.counters.graph_steps["decode"] > 0) == bool(sizes_of_graphs)
        runner.graphs = None
    gc.collect()


@pytest.mark.parametrize(
    "fields",
    [
        {},
        pytest.param({"kv_cache_dtype": "fp8"}, marks=slow),
        pytest.param({"speculative_config": LAYER}, marks=slow),
    ],
    ids=["plain", "fp8", "layer"],
)
def test_a_second_turn_goes_on_after_host_memory(
    fields: dict[str, Any], rig: Rig, tmp_path: Path
) -> None:
    """Its blocks and its snapshot are infinite on the device before they are copied back."""
    case = Case("smooth", SMOOTH | MTP, seed=44)
    folder, prompt, other = case.write_served(tmp_path), case.prompt(40), case.prompt(61)[:2:-1]
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    sizes: dict[str, Any] = {"block_size": 16, "max_num_seqs": 2, "max_model_len": 64}
    own: dict[str, Any] = {"dtype": "float32", "enforce_eager": True, "device": rig.device}
    own |= {"max_num_batched_tokens": 24} | fields
    found = []
    for more in ({}, {"num_gpu_blocks_override": 4, "kv_offload_bytes": "8M"}):
        with LLM(model=folder, **sizes, **own, **more) as llm:
            runner, copies = llm.engine.runner, list[tuple[int, int]]()
            [first] = tokens_of(llm, [prompt], greedy)
            turn = [*prompt, *first, *case.prompt(5)]
            tokens_of(llm, [other], greedy)
            if more:
                poison_pools(runner)
                runner.state_copy = recorded(runner.state_copy, copies)
            [output] = llm.generate([turn], greedy)
            found.append((first, output.token_ids, output.num_cached_tokens))
            assert (llm.stats().num_draft_tokens > 0) == ("speculative_config" in fields)
            assert output.num_host_cached_tokens == (32 if more else 0)
    assert found[0] == found[1] and found[0][2] == 32
    # from the places after those of the rows and 16 snapshots
    assert [target < 2 for source, target in copies if source >= 2 + 16] == [True]
    gc.collect()


def recorded(copy: Any, copies: list[tuple[int, int]]) -> Any:
    """The same copies of states, which are kept in a list too."""

    def copied(source: int, target: int) -> None:
        copies.append((source, target))
        copy(source, target)

    return copied
