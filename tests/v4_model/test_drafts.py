"""Engines over DeepSeek-V4 with drafts: no output depends on them, whatever was accepted."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa import SamplingParams
from fd_dsa.engine.batch import ScheduledBatch
from fd_dsa.engine.draft_state import DraftCosts
from fd_dsa.startup import build
from fd_dsa.v4_attention.pooling import PoolingPlan
from tests.one_order import check_equal_bits
from tests.v4_model.cases import Case
from tests.v4_model.drafts import KINDS, LOADS, MIXED, MOST, Answers, double_of, offline
from tests.v4_model.ours import load_model
from tests.v4_model.quantised import CASE as QUANTISED
from tests.v4_model.quantised import FP4, write_pair
from tests.v4_model.test_engine import FORMS, engine_of, tokens_of
from tests.v4_model.test_wrong_builds import put_in

SHARES = {"wrong": 0.0, "often right": 0.5, "right": 1.0}
ALIKE = {"wrong", "right"}
BY_TIME = ["mixed", pytest.param("released", marks=pytest.mark.slow)]


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Each load's model with its layer, and its answers without drafts."""
    found = {}
    for name, load in LOADS.items():
        model = load_model(load.case.write(tmp_path_factory.mktemp(name), "deepseek"), mtp=True)
        plain, engine, _ = load.answers(model, None)
        assert engine.stats().num_preemptions and engine.stats().prefix_cache_hits
        found[name] = model, plain
    return found


def tokens(answers: Answers) -> dict[tuple[str, int], list[int]]:
    return {name: output.token_ids for name, output in answers.items()}


@pytest.mark.parametrize(
    ("share", "most"),
    [
        # where all drafts are right, or none, their number makes little difference
        pytest.param(share, most, marks=[pytest.mark.slow] * (share in ALIKE and most < MOST))
        for share in SHARES
        for most in range(1, MOST + 1)
    ],
)
@pytest.mark.parametrize("name", BY_TIME)
def test_every_answer_is_that_without_drafts(
    name: str, share: str, most: int, models: dict[str, Any], caplog: pytest.LogCaptureFixture
) -> None:
    """The layer runs as ever, and a double decides how many drafts are right."""
    model, plain = models[name]
    make = double_of(plain, SHARES[share], most, seed=most)
    found, engine, drafter = LOADS[name].answers(model, make, most)
    assert tokens(found) == tokens(plain)
    stats = engine.stats()
    assert stats.num_preemptions and stats.prefix_cache_hits and not stats.num_used_blocks
    if share == "often right":
        assert drafter.accepted == {*range(most + 1)}
    assert (stats.num_accepted_tokens == stats.num_draft_tokens) == (share == "right")
    assert "failed" not in caplog.text


@pytest.mark.parametrize(
    "seed", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 12))]
)
def test_random_loads(seed: int, models: dict[str, Any]) -> None:
    """Prompts of random lengths, steps and caches of random sizes."""
    rng, (model, _) = np.random.default_rng(seed), models["mixed"]
    load = replace(
        LOADS["mixed"],
        lengths=tuple(rng.integers(3, 60, len(KINDS)).tolist()),
        num_new=int(rng.integers(5, 35)),
        num_blocks=int(rng.integers(6, 15)),
        budget=int(rng.integers(6, 40)),
    )
    plain, _, _ = load.answers(model, None)
    most, share = int(rng.integers(1, MOST + 1)), rng.random()
    found, _, _ = load.answers(model, double_of(plain, share, most, seed), most)
    assert tokens(found) == tokens(plain)


@pytest.mark.parametrize("name", BY_TIME)
def test_drafts_are_those_of_an_offline_computation(name: str, models: dict[str, Any]) -> None:
    """Drafts follow any number of rejections, prefix hits and preemptions."""
    load, (model, plain) = LOADS[name], models[name]
    _, _, drafter = load.answers(model, double_of(plain, 0.5, MOST))
    same: list[list[bool]] = [[], [], []]
    for request, proposed in drafter.proposed.items():
        params = request.params
        if params.temperature == 0 and params.repetition_penalty == 1:
            for place, drafts in proposed.items():
                wanted = offline(load, model, request.token_ids[:place], len(drafts))
                for depth, pair in enumerate(zip(drafts, wanted, strict=True)):
                    same[depth].append(pair[0] == pair[1])
    assert min(map(len, same)) > 30
    # after a fork a shared block's last key is that of another continuation
    assert min(map(np.mean, same)) > 0.95


FAULTS: dict[str, tuple[Any, str, str, str]] = {
    "states of rejected drafts stay": (
        *(PoolingPlan, "__init__"),
        *("cfg.source_rows(ratio)", "pool"),
    ),
    "rejected drafts count as computed": (
        *(ScheduledBatch, "accept_drafts"),
        *("self.num_accepted[request] +=", "request.num_computed_tokens += not is_accepted; "
          "self.num_accepted[request] +="),
    ),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_shows(fault: str, models: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    model, plain = models["mixed"]
    put_in(monkeypatch, *FAULTS[fault])
    try:
        found, _, _ = LOADS["mixed"].answers(model, double_of(plain, 0.5, MOST))
    except (AssertionError, ValueError, IndexError):
        return
    assert tokens(found) != tokens(plain)


# all bits are equal, drafts or none, from any source
PROGRAM = """
import sys
from fd_dsa.environment import prepare_cpu_runtime
prepare_cpu_runtime()
from pathlib import Path
from fd_dsa.engine.prompt_lookup import PromptLookup
from tests.engine.mtp_engine import shown
from tests.v4_model.cases import Case
from tests.v4_model.drafts import LOADS, MOST, DoubleDrafter, double_of
from tests.v4_model.ours import load_model
for name, load in LOADS.items():
    model = load_model(load.case.write(Path(sys.argv[1]) / name), mtp=True)
    plain, _, _ = load.answers(model, None)
    drafters = {
        "layer": lambda runner: DoubleDrafter(runner, MOST, None),
        "double": double_of(plain, 0.5, MOST),
        "ngram": lambda runner: PromptLookup(3, 1),
    }
    for method, make in drafters.items():
        ends, engine, _ = load.answers(model, make)
        assert plain.keys() == ends.keys()
        for key, output in ends.items():
            assert shown(output) == shown(plain[key]), (name, method, key)
        stats = engine.stats()
        assert stats.num_preemptions and stats.prefix_cache_hits and stats.num_draft_tokens
print("equal")
"""


@pytest.mark.slow
def test_no_bit_depends_on_drafts(tmp_path: Path) -> None:
    check_equal_bits(PROGRAM, str(tmp_path))


@pytest.fixture
def cheap_drafts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drafts that always pay, in place of measured times."""
    costs = DraftCosts({1: [1.0, 1.01, 1.02, 1.03]})
    monkeypatch.setattr(build, "measure_step_costs", lambda *_: costs)


def drafting(method: str, **more: int) -> dict[str, Any]:
    """The flag."""
    return {"speculative_config": {"method": method, "num_speculative_tokens": MOST, **more}}


@pytest.mark.usefixtures("cheap_drafts")
@pytest.mark.parametrize(
    "form",
    ["all at once", *(pytest.param(form, marks=pytest.mark.slow) for form in [*FORMS][1:])],
)
def test_served_answers(form: str, tmp_path: Path) -> None:
    """By the flag, in batches of all forms, greedy and drawn, with several outputs."""
    folder = MIXED.write_served(tmp_path)
    stem = MIXED.prompt(24)
    prompts = [stem + MIXED.prompt(n) for n in (1, 9, 40)] + [stem * 2]
    kinds = [
        SamplingParams(temperature=0, max_tokens=20, ignore_eos=True),
        SamplingParams(temperature=1.0, seed=5, n=3, max_tokens=9, ignore_eos=True),
    ]
    found = []
    for flags in ({}, drafting("mtp"), drafting("ngram", prompt_lookup_min=1)):
        with engine_of(folder, **(FORMS[form] | flags)) as llm:
            # the second round finds the prompts in the prefix cache
            found.append([tokens_of(llm, prompts, kind) for kind in kinds * 2])
            assert (llm.stats().num_draft_tokens > 0) == bool(flags)
    assert found[1] == found[0] and found[2] == found[0]


@pytest.mark.slow
@pytest.mark.usefixtures("cheap_drafts")
def test_served_answers_of_a_quantised_folder(tmp_path: Path) -> None:
    case = Case("quantised", QUANTISED.changes | {"num_nextn_predict_layers": 1}, seed=22)
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    found = []
    for folder in write_pair(tmp_path, FP4, case):
        for flags in ({}, drafting("mtp")):
            with engine_of(folder, **flags) as llm:
                found.append(tokens_of(llm, [case.prompt(n) for n in (7, 30)], params))
                drafts = llm.stats().num_draft_tokens, llm.stats().num_accepted_tokens
                assert bool(drafts[0]) == bool(flags)
    assert found[1:] == found[:1] * 3
