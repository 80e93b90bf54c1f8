"""DeepSeek-V4 with drafts on the device: logits after rejected ones, and the CPU's tokens."""

from __future__ import annotations

import gc
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa import LLM, SamplingParams
from fd_dsa.engine.draft_state import DraftCosts
from fd_dsa.engine.request import Request
from fd_dsa.startup import build
from fd_dsa.startup.capture import capture_graphs
from tests.engine.drafters import KnowingDrafter
from tests.gpu_rig import Rig
from tests.gpu_rig.captures import capture_of
from tests.gpu_rig.device.test_v4_captured import RELEASED, SMALL
from tests.gpu_rig.device.test_v4_model import (
    SMOOTH,
    device_model,
    device_runner,
    poison_pools,
    tokens_of,
    worst,
)
from tests.v4_model.cases import Case
from tests.v4_model.ours import load_model, make_runner, prompt_logits, run_step

pytestmark = [pytest.mark.gpu_rig, pytest.mark.triton, pytest.mark.own_process]
slow = pytest.mark.slow

MOST, ROW = 3, 1


@pytest.mark.parametrize(
    ("name", "length", "begin", "all_wrong"),
    [
        ("small", 40, 3, True),
        ("small", 60, 3, False),
        pytest.param("released", 150, 118, True, marks=slow),
    ],
)
def test_rejected_drafts_leave_nothing(
    name: str, length: int, begin: int, all_wrong: bool, rig: Rig, tmp_path: Path
) -> None:
    """Steps of a token and its drafts, of which none or any number is right, have CPU logits."""
    case = Case(name, {"small": SMALL, "released": RELEASED}[name], seed=51)
    folder, prompt = case.write(tmp_path), case.prompt(length)
    [wanted] = prompt_logits(make_runner(load_model(folder), case.block_size), [prompt], length)
    longest = 96 if name == "small" else 256
    model, sizes = device_model(folder, rig, "float32"), (case.block_size, 3, longest, 0, MOST)
    runner = device_runner(model, rig, "float32", *sizes)
    rng, done, found = np.random.default_rng(1), begin, []
    for first in range(0, begin, 40):
        run_step(runner, {ROW: (prompt[first : min(first + 40, begin)], first)})
    while done < length:
        count = MOST + 1 if all_wrong else int(rng.integers(1, MOST + 2))
        right = 1 if all_wrong else min(int(rng.integers(1, count + 1)), length - done)
        wrong = rng.integers(2, 90, count - right).tolist()
        logits = run_step(runner, {ROW: (prompt[done : done + right] + wrong, done)})[ROW]
        found.append(logits[:right])
        done += right
    assert worst([np.concatenate(found)], [wanted[begin:]]) < 1e-4


class PromptKnower(KnowingDrafter):
    """Knows what follows a prompt, and says it in a share of the cases."""

    def answer(self, request: Request) -> list[int]:
        return self._answers[tuple(request.state.prompt_token_ids)]


@pytest.mark.parametrize(
    ("form", "sizes_of_graphs"),
    [
        ("hits", ()),
        ("preemption", (4, 8)),
        pytest.param("hits", (4, 8), marks=slow),
        pytest.param("preemption", (), marks=slow),
    ],
)
def test_tokens_of_the_engine(
    form: str,
    rig: Rig,
    tmp_path: Path,
    sizes_of_graphs: tuple[int, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Answers with drafts, right and wrong ones, are those of a CPU without drafts."""
    costs = DraftCosts({1: [1.0, 1.01, 1.02, 1.03]})
    monkeypatch.setattr(build, "measure_step_costs", lambda *_: costs)
    case = Case("smooth", SMOOTH, seed=43)
    folder, begin = case.write_served(tmp_path), case.prompt(24)
    prompts = [[*begin, *begin[:6]], [*begin, 7, *begin[:6]], [*begin[:17], *case.prompt(6)]]
    # longer answers than the blocks have room for
    max_tokens = 20 if form == "preemption" else 12
    params = SamplingParams(temperature=0, max_tokens=max_tokens, ignore_eos=True)
    sizes: dict[str, Any] = {"block_size": 16, "max_num_seqs": 4, "max_model_len": 64}
    with LLM(model=folder, device="cpu", **sizes) as llm:
        wanted = tokens_of(llm, prompts, params)
    lookup = {"method": "ngram", "num_speculative_tokens": MOST}
    own = sizes | {"dtype": "float32", "enforce_eager": True, "speculative_config": lookup}
    own |= {"max_num_batched_tokens": 24}
    own |= {"num_gpu_blocks_override": 5} if form == "preemption" else {}
    with LLM(model=folder, device=rig.device, **own) as llm:
        runner, spec_decoder = llm.engine.runner, llm.engine.spec_decoder
        answers: Any = dict(zip(map(tuple, prompts), wanted, strict=True))
        assert spec_decoder is not None
        spec_decoder.drafter = PromptKnower(answers, 0.6, 90, seed=1)
        if sizes_of_graphs:
            capture_graphs(runner, sizes_of_graphs, capture_of(rig))
        poison_pools(runner)
        for _ in range(2):
            assert tokens_of(llm, prompts, params) == wanted
        stats = llm.stats()
        assert stats.num_draft_tokens > stats.num_accepted_tokens > 20
        assert (stats.num_preemptions > 0) == (form == "preemption")
        assert (stats.prefix_cache_hits > 0) or form == "preemption"
        assert (runner.counters.graph_steps["decode"] > 0) == bool(sizes_of_graphs)
        runner.graphs = None
    gc.collect()
