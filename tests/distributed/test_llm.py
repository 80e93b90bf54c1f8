"""The demo model on ranks that are processes: outputs of one process, and ends that name a rank."""

from __future__ import annotations

import dataclasses
import multiprocessing
import os
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.distributed.host import HostGroup
from fd_dsa.engine.draft_state import DraftCosts
from fd_dsa.engine.logprobs import TokenLogprobs
from fd_dsa.engine.output import RequestOutput
from fd_dsa.engine.structured_outputs import StructuredOutputsParams
from fd_dsa.errors import ConfigError, RankError
from fd_dsa.startup import build
from fd_dsa.startup.measure import measure_step_table
from fd_dsa.startup.ranks import Ranks
from tests import proc
from tests.proc import children
from tests.serve.processes import environment

# so few blocks that requests are preempted, and prompts in chunks
SMALL = {"device": "cpu", "max_model_len": 192, "num_gpu_blocks_override": 48, "block_size": 4}
SMALL |= {"max_num_batched_tokens": 48, "speculative_config": "none"}
LONG = "One day, Tom and Lily went to the park with a red ball and a big dog. " * 6
SHARED = LONG[: len(LONG) // 2]
CHOICE = StructuredOutputsParams(choice=["big", "little"])
ASKED: list[tuple[str, dict[str, Any]]] = [
    ("Once upon a time", {"temperature": 0, "logprobs": 3}),
    (LONG, {"temperature": 0, "prompt_logprobs": 1, "logprobs": 1}),
    (SHARED + "The cat", {"temperature": 0.8, "seed": 3, "n": 3, "logprobs": 0}),
    (SHARED + "The dog", {"temperature": 1, "top_p": 0.9, "top_k": 40, "seed": 5, "logprobs": 0}),
    ("A bird", {"temperature": 0, "repetition_penalty": 1.3, "logit_bias": {20: 4.0}}),
    ("A fish", {"temperature": 0, "structured_outputs": CHOICE}),
    ("A frog", {"temperature": 0, "stop": ["."], "max_tokens": 30, "logprobs": 1}),
    (LONG + "Then", {"temperature": 0, "return_topk_positions": True, "logprobs": 1}),
]
PARAMS = [SamplingParams(**{"max_tokens": 12, **params}) for _, params in ASKED]
PROMPTS = [prompt for prompt, _ in ASKED]
# further apart than rounding moves two tokens
CLEAR = 1e-3


@pytest.fixture(scope="module")
def alone() -> Iterator[LLM]:
    """The model in this process."""
    with LLM(**SMALL) as llm:
        yield llm


@pytest.fixture(scope="module")
def shared() -> Iterator[LLM]:
    """The same, shared with another process."""
    with LLM(**SMALL, tensor_parallel_size=2) as llm:
        yield llm


def compare_scores(
    expected: list[TokenLogprobs] | None, found: list[TokenLogprobs] | None
) -> int | None:
    """Return where two lists of scores part at tokens of equal probability, or None."""
    for place, (one, other) in enumerate(zip(expected or (), found or (), strict=True)):
        if one is None or other is None:
            assert one is other
            continue
        if one.token_id != other.token_id:
            gap = one.score.logprob - other.score.logprob
            assert abs(gap) < CLEAR
            return place
        assert one.score.logprob == pytest.approx(other.score.logprob, abs=1e-4)
    return None


def layers_of(output: RequestOutput) -> list[np.ndarray]:
    """Return the choices of each layer for the last token, where the request asked for them."""
    shown = output.topk_positions
    return [] if shown is None else [np.array([shown.position]), *shown.layers]


def compare(expected: list[RequestOutput], found: list[RequestOutput]) -> None:
    assert [(o.request_id.split("-")[1], o.index) for o in expected] == [
        (o.request_id.split("-")[1], o.index) for o in found
    ]
    for one, other in zip(expected, found, strict=True):
        assert compare_scores(one.prompt_logprobs, other.prompt_logprobs) is None
        if compare_scores(one.logprobs, other.logprobs) is None:
            fields = "token_ids", "text", "finish_reason", "stop_reason", "error"
            assert {n: getattr(one, n) for n in fields} == {n: getattr(other, n) for n in fields}
            for ours, theirs in zip(layers_of(one), layers_of(other), strict=True):
                # one key instead of another whose score is as high, at most
                assert len(np.intersect1d(ours, theirs)) >= len(ours) - 1


def ranks_left() -> list[int]:
    """Processes of ranks, without the process of grammars, which stays."""
    lines = {pid: proc.read(pid, "cmdline") for pid in children(os.getpid())}
    return [pid for pid, line in lines.items() if line and "fd_dsa.grammars" not in line]


def test_steps_are_measured_on_all_ranks(shared: LLM) -> None:
    """Before any request. The next test finds the outputs of one process."""
    table = measure_step_table(shared.engine.runner, 192, (24, 48))
    assert table is not None and table.sizes == [24, 48]
    assert all(0 < few <= many for few, many in (table.short, table.near[1], table.far[1]))


def test_outputs_are_those_of_one_process(alone: LLM, shared: LLM) -> None:
    compare(alone.generate(PROMPTS, PARAMS), shared.generate(PROMPTS, PARAMS))
    stats = [dataclasses.asdict(llm.stats()) for llm in (alone, shared)]
    assert stats[0]["num_preemptions"] > 0 and stats[0]["num_steps"] > 15
    same = [key for key, value in stats[0].items() if isinstance(value, int)]
    assert [stats[0][key] for key in same] == [stats[1][key] for key in same]


def test_divided_scores_give_the_bits_of_undivided_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    """Prompts past the selection, a prefix hit, and decode rows beside them."""
    options = {"device": "cpu", "max_model_len": 1024, "max_num_batched_tokens": 640}
    params = SamplingParams(temperature=0, max_tokens=6, logprobs=1, return_topk_positions=True)
    prompts = ["Once upon a time", LONG * 5, LONG * 7 + "Then", LONG * 5 + "The cat"]
    gather, bounds = HostGroup.all_gather_rows, []

    def recorded(self: HostGroup, rows: np.ndarray, given: list[int]) -> None:
        bounds.append(given)
        gather(self, rows, given)

    monkeypatch.setattr(HostGroup, "all_gather_rows", recorded)
    found = []
    for least in ("0", "100"):
        monkeypatch.setenv("FD_DSA_DIVIDED_MIN_TOKENS", least)
        assert not bounds
        with LLM(**options, tensor_parallel_size=2, speculative_config="none") as llm:
            outputs = [*llm.generate(prompts[:2], params), *llm.generate(prompts[2:], params)]
        found.append(
            [
                (one.token_ids, one.logprobs, [layer.tolist() for layer in layers_of(one)])
                for one in outputs
            ]
        )
        assert outputs[2].num_cached_tokens > 256
    # both ranks have parts
    assert len(bounds) > 6 and all(middle - begin > 0 for begin, middle, _ in bounds)
    assert found[0] == found[1]


def test_drafts_of_two_processes_are_those_of_one(
    alone: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    # fixed costs, because measured ones depend on the load of the machine
    costs = DraftCosts({1: [1.0, 1.1, 1.2, 1.3]})
    monkeypatch.setattr(build, "measure_step_costs", lambda *_: costs)
    options = SMALL | {"speculative_config": {"method": "mtp", "num_speculative_tokens": 3}}
    stats = []
    for size in (1, 2):
        with LLM(**options, tensor_parallel_size=size) as llm:
            compare(alone.generate(PROMPTS, PARAMS), llm.generate(PROMPTS, PARAMS))
            stats.append(dataclasses.asdict(llm.stats()))
    counters = [{k: v for k, v in one.items() if isinstance(v, int)} for one in stats]
    assert counters[0] == counters[1]
    assert counters[0]["num_accepted_tokens"] > 8 and counters[0]["num_preemptions"] > 0


def test_a_caller_who_leaves_and_one_who_is_refused_disturb_nobody(alone: LLM, shared: LLM) -> None:
    stream = shared.generate(LONG, PARAMS[0], stream=True)
    next(stream)
    stream.close()
    with pytest.raises(ValueError, match="max_model_len"):
        shared.generate([1] * 300, PARAMS[0])
    compare(alone.generate(PROMPTS[:1], PARAMS[:1]), shared.generate(PROMPTS[:1], PARAMS[:1]))


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_forked_process_ends_without_the_ranks(alone: LLM, shared: LLM) -> None:
    for end in (shared.close, shared.engine.runner.ranks.close):
        forked = multiprocessing.get_context("fork").Process(target=end)
        forked.start()
        forked.join(60)
        assert forked.exitcode == 0
    compare(alone.generate(PROMPTS[:1], PARAMS[:1]), shared.generate(PROMPTS[:1], PARAMS[:1]))


def test_a_killed_rank_is_named_at_once_and_later(shared: LLM) -> None:
    """The last test with this model."""
    ranks = shared.engine.runner.ranks
    stream = shared.generate("Once", SamplingParams(max_tokens=150, ignore_eos=True), stream=True)
    next(stream)
    begin = time.monotonic()
    os.kill(ranks.processes[0].pid, signal.SIGKILL)
    with pytest.raises(RankError, match=r"^rank 1 \(process \d+\) ended by signal 9 \(SIGKILL\)"):
        list(stream)
    with pytest.raises(RankError, match=r"^rank 1 "):
        shared.generate("Once", PARAMS[0])
    assert time.monotonic() - begin < 10


def test_what_several_ranks_cannot_do_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="tensor_parallel_size: got 0, allowed: "):
        LLM(**SMALL, tensor_parallel_size=0)


# the process of a rank, which does something else instead of a function of its own
RANK = """
import os, signal, sys, time
{patch}
from fd_dsa.startup.rank import main
main()
"""
AT_LOAD = """
import fd_dsa.models.loader as loader
def load_weights(*args):
    {what}
loader.load_weights = load_weights
"""
# between two meetings of all ranks; a GPU's captures are there
IN_WARM_UP = """
from fd_dsa.environment import prepare_cpu_runtime
prepare_cpu_runtime()
import fd_dsa.startup.build as factory
def warm_up(*args):
    {what}
factory.warm_up = warm_up
"""
IN_STEP = """
from fd_dsa.environment import prepare_cpu_runtime
prepare_cpu_runtime()
from fd_dsa.runner.ranks import WorkerRunner
run = WorkerRunner.run
steps = []
def slow(self, indices):
    steps.append(indices)
    if len(steps) == 3:
        {what}
    run(self, indices)
WorkerRunner.run = slow
"""
KILL, STOP = (f"os.kill(os.getpid(), signal.{name})" for name in ("SIGKILL", "SIGSTOP"))
NO_MEMORY = "raise MemoryError('no page is free')"
ENDS = {
    "killed-at-load": (AT_LOAD, KILL, r"ended by signal 9 \(SIGKILL\); the system may have been"),
    "no-memory-at-load": (AT_LOAD, NO_MEMORY, "failed: MemoryError: no page is free"),
    "stopped-at-load": (AT_LOAD, STOP, "was stopped for 6.5 s by a signal"),
    "killed-in-the-warm-up": (IN_WARM_UP, KILL, r"ended by signal 9 \(SIGKILL\)"),
    "no-memory-in-a-step": (IN_STEP, NO_MEMORY, "failed: MemoryError: no page is free"),
    "stopped-in-a-step": (IN_STEP, STOP, "was stopped for 6.5 s by a signal"),
    "ends-in-a-step": (IN_STEP, "os._exit(3)", "ended with status 3"),
}


@pytest.mark.slow
@pytest.mark.parametrize("end", ENDS)
def test_each_end_of_a_rank_names_it(end: str, monkeypatch: pytest.MonkeyPatch) -> None:
    where, what, message = ENDS[end]
    program = RANK.format(patch=where.format(what=what))
    monkeypatch.setattr(Ranks, "COMMAND", (sys.executable, "-c", textwrap.dedent(program)))
    named = pytest.raises(RankError, match=rf"^rank 1 \(process \d+\) {message}")
    with ExitStack() as stack, named:
        llm = stack.enter_context(LLM(**SMALL, tensor_parallel_size=2))
        llm.generate(PROMPTS[:2], PARAMS[:2])
    assert ranks_left() == []


@pytest.mark.slow
def test_four_ranks(alone: LLM) -> None:
    with LLM(**SMALL, tensor_parallel_size=4) as llm:
        compare(alone.generate(PROMPTS, PARAMS), llm.generate(PROMPTS, PARAMS))
    assert ranks_left() == []
    with pytest.raises(RuntimeError, match="closed"):
        llm.generate("Once")


WAITING = """
import os, signal, sys, time
from fd_dsa.config import EngineConfig
from fd_dsa.startup.ranks import Ranks
Ranks.COMMAND = (sys.executable, "-c", "import time; time.sleep(60)")
ranks = Ranks(EngineConfig(device="cpu", tensor_parallel_size=3))
ranks.group.has_devices = True
with ranks.step(None):
    os.kill(ranks.processes[1].pid, signal.SIGKILL)
    time.sleep(60)
"""


@pytest.mark.slow
def test_a_wait_for_a_device_ends_with_the_process() -> None:
    begin = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", WAITING], env=environment(), capture_output=True, text=True
    )
    assert done.returncode == 1 and time.monotonic() - begin < 10
    assert "rank 2 (process " in done.stderr and "waits for a device, so it ends" in done.stderr
