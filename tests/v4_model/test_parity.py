"""Logits against Hugging Face's, for every kind of layer, both sets of names and all chunk sizes.

The reference comes from committed goldens, and live from transformers, on models of other seeds.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.v4_model.cases import CASES, GOLDEN, Case
from tests.v4_model.ours import load_model, make_runner, prompt_logits

GOLDENS = Path(__file__).parent.parent / "data" / "v4_model"
# of logits of 3 to 18; the largest seen is 2.2e-5
TOLERANCE = 1e-4
# the goldens of all cases are compared in one chunk and in chunks of 7
CHUNKS = (64, 1)
LIVE_SEED = 100

Reference = dict[int, tuple[np.ndarray, np.ndarray]]


def golden(name: str) -> Reference:
    """Positions and logits of each prompt of a case."""
    with np.load(GOLDENS / f"{name}.npz") as data:
        return {n: (data[f"positions_{n}"], data[f"logits_{n}"]) for n in CASES[name].lengths}


def check(found: np.ndarray, reference: Reference, length: int) -> None:
    """Compare a prompt at all positions that the reference holds."""
    positions, logits = reference[length]
    difference = np.abs(found[positions] - logits).max(axis=1)
    worst = int(difference.argmax())
    assert difference[worst] <= TOLERANCE, (
        f"prompt of {length}: position {positions[worst]} differs by {difference[worst]:.2e}"
    )


def check_chunks(model: Any, case: Case, reference: Reference, chunks: tuple[int, ...]) -> None:
    """Compare all prompts, a few in a batch, for some chunk sizes."""
    lengths = case.lengths
    for chunk in chunks:
        for begin in range(0, len(lengths), 4):
            group = lengths[begin : begin + 4]
            runner = make_runner(model, case.block_size)
            found = prompt_logits(runner, [case.prompt(n) for n in group], chunk)
            for logits, length in zip(found, group, strict=True):
                check(logits, reference, length)


@pytest.mark.parametrize("name", GOLDEN)
def test_logits_are_the_goldens(name: str, tmp_path: Path) -> None:
    case = CASES[name]
    model = load_model(case.write(tmp_path, "deepseek"))
    check_chunks(model, case, golden(name), (1000, 7))


@pytest.mark.parametrize("chunk", CHUNKS)
def test_chunks_of_any_length(chunk: int, tmp_path: Path) -> None:
    case = CASES["mixed"]
    check_chunks(load_model(case.write(tmp_path)), case, golden("mixed"), (chunk,))


@pytest.fixture(params=CASES)
def live(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[Case, Any, Path]]:
    """A case of another seed, transformers' model of it, and its folder."""
    from tests.v4_model.hugging_face import load

    case = CASES[request.param]
    case = replace(case, seed=case.seed + LIVE_SEED)
    folder = case.write(tmp_path / "ours")
    yield case, load(folder), folder


@pytest.mark.oracle
def test_logits_live(live: tuple[Case, Any, Path]) -> None:
    from tests.v4_model.hugging_face import logits

    case, oracle, folder = live
    reference = {n: (np.arange(n), logits(oracle, case.prompt(n))) for n in case.lengths}
    check_chunks(load_model(folder), case, reference, (1000, 16, 7))


@pytest.mark.oracle
def test_what_save_pretrained_writes(live: tuple[Case, Any, Path], tmp_path: Path) -> None:
    from tests.v4_model.hugging_face import logits

    case, oracle, _ = live
    oracle.save_pretrained(tmp_path / "saved")
    model, length = load_model(tmp_path / "saved"), case.lengths[-1]
    (found,) = prompt_logits(make_runner(model, case.block_size), [case.prompt(length)], 64)
    reference = logits(oracle, case.prompt(length))
    check(found, {length: (np.arange(length), reference)}, length)
