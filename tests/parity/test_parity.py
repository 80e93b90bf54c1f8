"""Logits and greedy tokens against Hugging Face, for every chunk size and batch composition.

The reference comes from committed goldens, and again live from transformers, on models of other
seeds, where torch can be imported.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity.cases import CASES, GREEDY_PROMPT, GREEDY_STEPS, PROMPT_LENGTHS, Case
from tests.parity.engine_side import greedy, load_model, make_runner, prompt_logits

GOLDENS = Path(__file__).parent.parent / "data" / "parity"
LIVE_SEED = 100
TOLERANCE = 1e-4
# a greedy step whose two best logits are closer may end with either
GREEDY_MARGIN = 1e-4
MAX_UNDECIDED_SHARE = 0.05
# more tokens than all prompts together, a block's edge, a prime, one by one
CHUNKS = (200, 64, 16, 7, 1)


@dataclass(frozen=True)
class Golden:
    """Reference of one case.

    Attributes:
        prompts: (positions, logits there, first undecided position) of each prompt.
        greedy_tokens: int64 [GREEDY_STEPS].
        greedy_margins: float32 [GREEDY_STEPS]; the best logit over the second.
        greedy_decided: steps before the first whose selections are nearly tied.
    """

    prompts: dict[int, tuple[np.ndarray, np.ndarray, int]]
    greedy_tokens: np.ndarray
    greedy_margins: np.ndarray
    greedy_decided: int

    @classmethod
    def load(cls, case: Case) -> Golden:
        """From the committed file."""
        with np.load(GOLDENS / f"{case.name}.npz") as data:
            prompts = {
                n: (data[f"positions_{n}"], data[f"logits_{n}"], int(data[f"decided_{n}"]))
                for n in PROMPT_LENGTHS
            }
            return cls(
                prompts,
                data["greedy_tokens"],
                data["greedy_margins"],
                int(data["greedy_decided"]),
            )

    @classmethod
    def compute(cls, case: Case, folder: Path) -> Golden:
        """From transformers, at all positions."""
        from tests.parity.hugging_face import references

        prompts, run = references(case, folder)
        return cls(
            {n: (np.arange(n), p.logits, p.decided) for n, p in prompts.items()},
            run.tokens,
            run.margins,
            run.decided,
        )

    @property
    def comparable_steps(self) -> int:
        """Greedy steps before the first undecided selection or nearly tied pair of logits."""
        close = np.flatnonzero(self.greedy_margins <= GREEDY_MARGIN)
        return min([self.greedy_decided, *close[:1].tolist()])

    @property
    def undecided(self) -> list[str]:
        """The sequences, prompts and greedy run, that cannot be compared to their end."""
        names = [f"prompt of {n}" for n, (_, _, decided) in self.prompts.items() if decided < n]
        return names + ["greedy"] * (self.comparable_steps < GREEDY_STEPS)


@dataclass(frozen=True)
class SideBySide:
    """One case: our model with its weights loaded, and the reference."""

    case: Case
    model: Any
    golden: Golden


class References:
    """Every case's checkpoint and reference, made when first asked for and kept."""

    def __init__(self, tmp_path_factory: pytest.TempPathFactory) -> None:
        self._folders = tmp_path_factory
        self._made: dict[tuple[str, bool], tuple[Case, Path, Golden]] = {}

    def get(self, name: str, live: bool) -> tuple[Case, Path, Golden]:
        """The case (live: with another seed), the folder of its checkpoint, its reference."""
        if (name, live) not in self._made:
            case = CASES[name]
            if live:
                case = replace(case, seed=case.seed + LIVE_SEED)
            folder = case.write(self._folders.mktemp(name))
            golden = Golden.compute(case, folder) if live else Golden.load(case)
            self._made[name, live] = (case, folder, golden)
        return self._made[name, live]


@pytest.fixture(scope="module")
def references(tmp_path_factory: pytest.TempPathFactory) -> References:
    """The references of this module."""
    return References(tmp_path_factory)


LIVE = pytest.param(True, id="live", marks=pytest.mark.oracle)
SOURCES = [
    *(pytest.param((name, False), id=f"{name}-golden") for name in CASES),
    *(pytest.param((name, True), id=f"{name}-live", marks=LIVE.marks) for name in CASES),
]


@pytest.fixture(scope="module", params=SOURCES)
def both(request: pytest.FixtureRequest, references: References) -> SideBySide:
    """One case with its model loaded."""
    case, folder, golden = references.get(*request.param)
    return SideBySide(case, load_model(folder), golden)


def check_logits(found: np.ndarray, golden: Golden, length: int) -> int:
    """Compare at the decided positions; returns how many were compared."""
    positions, logits, decided = golden.prompts[length]
    keep = positions < decided
    bound = TOLERANCE * np.abs(logits).max()
    difference = np.abs(found[positions[keep]] - logits[keep]).max(axis=1, initial=0.0)
    worst = int(difference.argmax()) if len(difference) else 0
    assert (difference <= bound).all(), (
        f"prompt of {length}: position {positions[keep][worst]} differs by "
        f"{difference[worst]:.2e}, allowed {bound:.2e}"
    )
    return int(keep.sum())


@pytest.mark.parametrize("chunk", CHUNKS)
def test_logits_in_one_batch(both: SideBySide, chunk: int) -> None:
    case, model, golden = both.case, both.model, both.golden
    found = prompt_logits(make_runner(model), [case.prompt(n) for n in PROMPT_LENGTHS], chunk)
    compared = sum(
        check_logits(logits, golden, n) for logits, n in zip(found, PROMPT_LENGTHS, strict=True)
    )
    assert compared > 0


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_logits_alone(both: SideBySide, length: int) -> None:
    case, model, golden = both.case, both.model, both.golden
    (found,) = prompt_logits(make_runner(model), [case.prompt(length)], 1000)
    check_logits(found, golden, length)


@pytest.mark.parametrize("beside", [0, 6], ids=["alone", "beside prefills"])
def test_greedy_tokens(both: SideBySide, beside: int) -> None:
    case, model, golden = both.case, both.model, both.golden
    others = [case.prompt(n) for n in range(100, 100 + beside)]
    tokens = greedy(make_runner(model), case.prompt(GREEDY_PROMPT), GREEDY_STEPS, others)
    end = golden.comparable_steps
    assert end > 0
    np.testing.assert_array_equal(tokens[:end], golden.greedy_tokens[:end])


@pytest.mark.parametrize("live", [pytest.param(False, id="golden"), LIVE])
def test_few_sequences_are_undecided(references: References, live: bool) -> None:
    undecided = {name: references.get(name, live)[2].undecided for name in CASES}
    sequences = len(CASES) * (len(PROMPT_LENGTHS) + 1)
    assert sum(map(len, undecided.values())) <= MAX_UNDECIDED_SHARE * sequences, undecided
