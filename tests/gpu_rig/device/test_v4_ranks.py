"""DeepSeek-V4 on two ranks whose model is on a device: the CPU's tokens, with graphs and hits.

The ranks are the threads of `test_ranks`.
"""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import paddle
import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.config import EngineConfig
from fd_dsa.distributed import Group, device, nccl
from fd_dsa.distributed.host import Shared
from fd_dsa.engine.caches import V4Caches
from fd_dsa.engine.engine import LLMEngine
from fd_dsa.engine.mtp_drafter import DeviceMtpDrafter
from fd_dsa.engine.speculation import SpecDecoder
from fd_dsa.runner import InputBatch
from fd_dsa.startup.build import build_runner
from fd_dsa.startup.capture import capture_graphs
from fd_dsa.startup.host_tier import add_host_tier
from fd_dsa.startup.plan import EnginePlan, make_plan
from fd_dsa.startup.progress import StartupProgress
from tests.engine.fakes import run_all
from tests.gpu_rig import Rig
from tests.gpu_rig.captures import stand_in
from tests.gpu_rig.device.test_ranks import Driver, Followed, Ranks, ThroughHost, Turns, Worker
from tests.gpu_rig.device.test_v4_captured import pools_of
from tests.gpu_rig.device.test_v4_model import (
    SMOOTH,
    device_model,
    device_runner,
    poison_pools,
    tokens_of,
    worst,
)
from tests.gpu_rig.device.test_v4_mtp import on_device
from tests.v4_model.cases import Case
from tests.v4_model.drafts import MTP
from tests.v4_model.ours import prompt_logits, run_step
from tests.v4_model.quantised import CASE as QUANTISED
from tests.v4_model.quantised import FP4, write_pair

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.slow, pytest.mark.own_process]

SIZES: dict[str, Any] = {"block_size": 16, "max_num_seqs": 4, "max_model_len": 64}
LAYER = {"method": "mtp", "num_speculative_tokens": 2}


def plan_of(folder: Path, rig: Rig, **fields: Any) -> EnginePlan:
    """The plan of one of two ranks on the one device of the rig."""
    own = SIZES | {"dtype": "float32", "enforce_eager": True, "max_num_batched_tokens": 24}
    plan = make_plan(EngineConfig(model=folder, device=rig.device, **(own | fields)))
    part, whole = plan.whole_config.split(2), plan.input_batch
    columns = whole.block_tables.shape[1]
    batch = InputBatch(whole.max_num_seqs, whole.max_num_tokens, columns, whole.block_size)
    caches = V4Caches(plan.config, part, batch)
    return replace(plan, model_config=part, input_batch=batch, caches=caches)


def runner_of(kind: type[Any], group: Turns, plan: EnginePlan, sizes: tuple[int, ...]) -> Any:
    """A rank's runner as the start builds it, with graphs of some sizes and infinite pools."""
    runner = build_runner(plan, group, StartupProgress(), kind)
    if sizes:
        # a step of 32 tokens is divided in a graph, too
        capture_graphs(runner, sizes, stand_in, (32,))
        assert runner.graphs and runner.graphs.sizes == sizes
    poison_pools(runner)
    return runner


def engine_of(runner: Any, plan: EnginePlan) -> LLMEngine:
    """An engine on the runner of rank 0, with snapshots, and the drafts of the plan."""
    most = plan.config.max_drafts
    spec_decoder = SpecDecoder(DeviceMtpDrafter(runner), most) if most else None
    engine = LLMEngine(
        runner,
        plan.tokenizer,
        num_blocks=plan.memory.num_blocks,
        max_model_len=plan.max_model_len,
        eos_token_ids=plan.model_config.eos_token_ids,
        spec_decoder=spec_decoder,
    )
    engine.block_manager.shares_blocks = plan.caches.shares_blocks
    engine.block_manager.repeats_chunks = plan.caches.repeats_chunks
    snapshots = plan.caches.snapshots(runner.copy_state, plan.memory.num_host_snapshots)
    assert snapshots is not None
    engine.block_manager.use_snapshots(snapshots)
    if runner.block_store is not None:
        add_host_tier(engine, runner.block_store, plan)
    return engine


def answers(engine: LLMEngine, prompts: list[list[int]], params: SamplingParams) -> list[list[int]]:
    """Tokens of requests in one batch."""
    for number, prompt in enumerate(prompts):
        engine.add_request(str(number), prompt, params)
    done = run_all(engine)
    return [output.token_ids for number in range(len(prompts)) for output in done[str(number)][-1:]]


@pytest.mark.parametrize(
    ("sizes", "fields"),
    [
        ((4,), {"max_num_batched_tokens": 32}),
        ((), {"num_gpu_blocks_override": 5}),
        ((), {"num_gpu_blocks_override": 5, "kv_offload_bytes": "8M"}),
        ((), {"speculative_config": LAYER, "max_num_batched_tokens": 32}),
    ],
    ids=["graphs", "preemption", "host memory", "layer"],
)
def test_tokens_of_two_ranks_are_those_of_a_cpu(
    rig: Rig,
    sizes: tuple[int, ...],
    fields: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Prompts that begin alike, so that rows go on after snapshots.

    Where steps may have 32 tokens, eager ones are padded to them and divided into equal parts.
    """
    if rig.is_real:
        pytest.skip("its ranks are processes")
    case = Case("smooth", SMOOTH | MTP, seed=43)
    folder, begin = case.write_served(tmp_path), case.prompt(45)
    # the last one takes four blocks
    prompts = [[*begin, 9], [*begin, 7, 8], [*begin[:17], *case.prompt(20)], case.prompt(60)[::-1]]
    # of two tokens that alone come, drafts of random weights are often right
    two: dict[str, Any] = {"logit_bias": {2: 50.0, 3: 50.0}}
    greedy = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True, **two)
    with LLM(model=folder, device="cpu", **SIZES) as llm:
        wanted = tokens_of(llm, prompts, greedy)
    shared = Shared.create(2)
    groups = first, second = Turns(0, shared), Turns(1, shared)
    through = [ThroughHost(group) for group in groups]
    monkeypatch.setattr(device, "DeviceGroup", lambda rank, *given: through[rank])
    monkeypatch.setenv("FD_DSA_DIVIDED_MIN_TOKENS", "1")
    monkeypatch.setattr(nccl, "new_unique_id", lambda: bytes(128))
    with Turns.turn:
        plans = [plan_of(folder, rig, **fields) for _ in range(2)]
        other = Followed(rig, second, lambda: runner_of(Worker, second, plans[1], sizes))
        runner = runner_of(Driver, first, plans[0], sizes)
        runner.lead(Ranks(first))
        engine = engine_of(runner, plans[0])
        assert answers(engine, prompts[:1], greedy) == wanted[:1]
        assert answers(engine, prompts[:3], greedy) == wanted[:3]
        if "kv_offload_bytes" in fields:
            for number in (3, 0):
                assert answers(engine, [prompts[number]], greedy) == [wanted[number]]
        stats = engine.stats()
        assert stats.prefix_cache_hits > 0
        assert (stats.prefix_cache_host_hits > 0) == ("kv_offload_bytes" in fields)
        assert (stats.num_preemptions > 0) == ("num_gpu_blocks_override" in fields)
        assert (stats.num_accepted_tokens > 0) == ("speculative_config" in fields)
        for kind in ("decode", "prefill"):
            assert (runner.counters.graph_steps[kind] > 0) == bool(sizes)
        assert (through[0].num_scattered > 0) == ("max_num_batched_tokens" in fields)
        first.send(b"")
    other.join()
    (worker,) = other.workers
    assert worker.batches == runner.batches and len(runner.batches) > 8
    assert worker.drafts == runner.drafts
    # to the bit: keys, entries and states, snapshots among them
    for own, one in zip(pools_of(runner), pools_of(worker), strict=True):
        np.testing.assert_array_equal(own.numpy(), one.numpy())
    first.close()


def on_two_ranks(rig: Rig, work: Callable[[ThroughHost], Any]) -> list[Any]:
    """The results of two ranks that make the same calls."""
    shared = Shared.create(2)
    groups = [Turns(rank, shared) for rank in range(2)]

    def run(group: Turns) -> Any:
        with Turns.turn:
            paddle.set_device(rig.device)
            return work(ThroughHost(group))

    try:
        with ThreadPoolExecutor(2) as threads:
            return [one.result(timeout=300) for one in [threads.submit(run, g) for g in groups]]
    finally:
        groups[0].close()


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-4), ("bfloat16", 0.02)])
def test_logits_of_released_weights(rig: Rig, tmp_path: Path, dtype: str, bound: float) -> None:
    """In bfloat16 experts keep four bits, and a rank has one group of each row."""
    if rig.is_real:
        pytest.skip("its ranks are processes")
    folder, _ = write_pair(tmp_path, FP4)
    has_four_bits = dtype == "bfloat16"

    def logits(group: Group | None) -> list[np.ndarray]:
        model = device_model(folder, rig, dtype, four_bits=has_four_bits, group=group)
        return prompt_logits(device_runner(model, rig, dtype, 16), [QUANTISED.prompt(9)], 9)

    wanted, ranks = logits(None), on_two_ranks(rig, logits)
    np.testing.assert_array_equal(ranks[0][0], ranks[1][0])
    assert worst(ranks[0], wanted) < bound


def test_equal_parts_of_a_step_change_no_logits(
    rig: Rig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps whose tokens select entries, and the layer for drafts over their streams.

    Kernels for few tokens add in another order.
    """
    if rig.is_real:
        pytest.skip("its ranks are processes")
    case = Case("parts", SMOOTH | MTP | {"index_topk": 6}, seed=71)
    folder, prompt, chunk = case.write(tmp_path), case.prompt(65), 32

    def results(group: ThroughHost) -> tuple[list[Any], int]:
        model = device_model(folder, rig, "float32", mtp=True, group=group)
        runner, found = device_runner(model, rig, "float32", case.block_size), list[Any]()
        for begin in (0, chunk):
            ids = prompt[begin : begin + chunk + 1]
            found.append(run_step(runner, {0: (ids[:-1], begin)})[0])
            assert runner.forward_meta.hidden_states.shape[0] == chunk
            found.append(on_device(runner, ids[1:])[1])
        return found, group.num_scattered

    whole = on_two_ranks(rig, results)
    monkeypatch.setenv("FD_DSA_DIVIDED_MIN_TOKENS", "1")
    divided = on_two_ranks(rig, results)
    for (found, num_scattered), (wanted, none) in zip(divided, whole, strict=True):
        assert worst(found, wanted) < 1e-5
        assert (num_scattered, none) == (16, 0)
    np.testing.assert_array_equal(*(found for found, _ in divided))
