"""Logits and greedy tokens against Hugging Face, for every chunk size and batch composition.

The reference comes from committed goldens, and again live from transformers, on models of other
seeds, where torch can be imported. Where rounding decides what the reference selects, its
selection is fed to our side, so that every position can be compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.parity.cases import CASES, GREEDY_PROMPT, GREEDY_STEPS, PROMPT_LENGTHS, Case
from tests.parity.choices import GREEDY, Choice, unpack
from tests.parity.engine_side import GREEDY_ROW, greedy, load_model, make_runner, prompt_logits
from tests.parity.feeding import feeding

GOLDENS = Path(__file__).parent.parent / "data" / "parity"
LIVE_SEED = 100
TOLERANCE = 1e-4
# a greedy step whose two best logits are closer may end with either
GREEDY_MARGIN = 1e-4
MAX_UNDECIDED_SHARE = 0.05
# more tokens than all prompts together, a block's edge, a prime
CHUNKS = (200, 16, 7)
# of several blocks, and one by one
MORE_CHUNKS = (64, 1)
# the models of the long comparisons that are not slow
QUICK_CASES = ("v32", "glm")


@dataclass(frozen=True)
class Golden:
    """Reference of one case.

    Attributes:
        prompts: (positions, logits there) of each prompt.
        greedy_tokens: int64 [GREEDY_STEPS].
        greedy_margins: float32 [GREEDY_STEPS]; the best logit over the second.
        undecided: what was selected at nearly tied scores in each prompt, and in `GREEDY`.
    """

    prompts: dict[int, tuple[np.ndarray, np.ndarray]]
    greedy_tokens: np.ndarray
    greedy_margins: np.ndarray
    undecided: dict[int, list[Choice]]

    @classmethod
    def load(cls, case: Case) -> Golden:
        """Read the committed file."""
        with np.load(GOLDENS / f"{case.name}.npz") as data:
            return cls(
                {n: (data[f"positions_{n}"], data[f"logits_{n}"]) for n in PROMPT_LENGTHS},
                data["greedy_tokens"],
                data["greedy_margins"],
                {n: unpack(data, n) for n in (*PROMPT_LENGTHS, GREEDY)},
            )

    @classmethod
    def compute(cls, case: Case, folder: Path) -> Golden:
        """Compute it by transformers, at all positions."""
        from tests.parity.hugging_face import references

        prompts, run = references(case, folder)
        return cls(
            {n: (np.arange(n), p.logits) for n, p in prompts.items()},
            run.tokens,
            run.margins,
            {n: p.undecided for n, p in prompts.items()} | {GREEDY: run.undecided},
        )

    @property
    def comparable_steps(self) -> int:
        """Greedy steps before the first whose two best logits are nearly tied."""
        close = np.flatnonzero(self.greedy_margins <= GREEDY_MARGIN)
        return int(close[0]) if len(close) else GREEDY_STEPS

    @property
    def undecided_sequences(self) -> list[str]:
        """The prompts and greedy runs that are fed, or cannot be compared to their end."""
        names = [f"prompt of {n}" for n in PROMPT_LENGTHS if self.undecided[n]]
        cut = self.undecided[GREEDY] or self.comparable_steps < GREEDY_STEPS
        return names + ["greedy"] * bool(cut)


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
MOST_SLOW = [
    *(
        pytest.param(
            (name, False),
            id=f"{name}-golden",
            marks=[] if name in QUICK_CASES else pytest.mark.slow,
        )
        for name in CASES
    ),
    *SOURCES[len(CASES) :],
]


@pytest.fixture(scope="module", params=SOURCES)
def both(request: pytest.FixtureRequest, references: References) -> SideBySide:
    """One case with its model loaded."""
    case, folder, golden = references.get(*request.param)
    return SideBySide(case, load_model(folder), golden)


def check_logits(found: np.ndarray, golden: Golden, length: int) -> None:
    """Compare a prompt at all positions that the reference holds."""
    positions, logits = golden.prompts[length]
    bound = TOLERANCE * np.abs(logits).max()
    difference = np.abs(found[positions] - logits).max(axis=1)
    worst = int(difference.argmax())
    assert (difference <= bound).all(), (
        f"prompt of {length}: position {positions[worst]} differs by "
        f"{difference[worst]:.2e}, allowed {bound:.2e}"
    )


def fed_logits(both: SideBySide, lengths: Sequence[int], chunk: int) -> list[np.ndarray]:
    """Logits of the prompts of `lengths` in one batch, fed with the reference's selections."""
    runner = make_runner(both.model)
    with feeding(runner, {row: both.golden.undecided[n] for row, n in enumerate(lengths)}):
        return prompt_logits(runner, [both.case.prompt(n) for n in lengths], chunk)


@pytest.mark.parametrize("chunk", CHUNKS)
def test_logits_in_one_batch(both: SideBySide, chunk: int) -> None:
    for logits, length in zip(fed_logits(both, PROMPT_LENGTHS, chunk), PROMPT_LENGTHS, strict=True):
        check_logits(logits, both.golden, length)


@pytest.mark.parametrize("both", MOST_SLOW, indirect=True)
@pytest.mark.parametrize("chunk", MORE_CHUNKS)
def test_logits_of_more_chunks(both: SideBySide, chunk: int) -> None:
    test_logits_in_one_batch(both, chunk)


@pytest.mark.parametrize("length", PROMPT_LENGTHS)
def test_logits_alone(both: SideBySide, length: int) -> None:
    (found,) = fed_logits(both, [length], 1000)
    check_logits(found, both.golden, length)


@pytest.mark.parametrize("both", MOST_SLOW, indirect=True)
def test_greedy_tokens_alone(both: SideBySide) -> None:
    check_greedy(both, beside=0)


@pytest.mark.parametrize("both", MOST_SLOW, indirect=True)
def test_greedy_tokens_beside_prefills(both: SideBySide) -> None:
    check_greedy(both, beside=6)


def check_greedy(both: SideBySide, beside: int) -> None:
    """Compare a greedy run in a batch with the prompts of `beside` others."""
    case, golden = both.case, both.golden
    others = [case.prompt(n) for n in range(100, 100 + beside)]
    runner = make_runner(both.model)
    with feeding(runner, {GREEDY_ROW: golden.undecided[GREEDY]}):
        tokens = greedy(runner, case.prompt(GREEDY_PROMPT), GREEDY_STEPS, others)
    end = golden.comparable_steps
    assert end > 0
    np.testing.assert_array_equal(tokens[:end], golden.greedy_tokens[:end])


@pytest.mark.parametrize("live", [pytest.param(False, id="golden"), LIVE])
def test_few_sequences_are_undecided(references: References, live: bool) -> None:
    undecided = {name: references.get(name, live)[2].undecided_sequences for name in CASES}
    sequences = len(CASES) * (len(PROMPT_LENGTHS) + 1)
    assert sum(map(len, undecided.values())) <= MAX_UNDECIDED_SHARE * sequences, undecided
