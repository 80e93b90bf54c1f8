"""Writes tests/data/parity/<case>.npz: what Hugging Face says of each case.

    python -m tests.parity.generate_goldens

Needs torch and transformers (`pip install '.[oracle]'`). A golden keeps the logits of at most
`KEPT_POSITIONS` positions of each prompt (its edges and an even spread), so that the files stay
small; the live comparison looks at all of them. Undecided selections are kept from all positions.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks._harness import parser_of
from tests.parity.cases import CASES, PROMPT_LENGTHS
from tests.parity.choices import GREEDY, pack
from tests.parity.hugging_face import references

FOLDER = Path(__file__).parent.parent / "data" / "parity"
KEPT_POSITIONS = 10


def kept_positions(length: int) -> np.ndarray:
    """Positions of a prompt whose logits a golden holds, ascending."""
    return np.unique(np.linspace(0, length - 1, KEPT_POSITIONS).round().astype(np.int64))


def main() -> int:
    """Write all goldens; prints one line a case."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            prompts, greedy = references(case, case.write(Path(folder)))
        undecided = {length: prompts[length].undecided for length in PROMPT_LENGTHS}
        undecided[GREEDY] = greedy.undecided
        arrays = {
            "greedy_tokens": greedy.tokens,
            "greedy_margins": greedy.margins,
            **pack(undecided),
        }
        for length in PROMPT_LENGTHS:
            positions = kept_positions(length)
            arrays[f"positions_{length}"] = positions
            arrays[f"logits_{length}"] = prompts[length].logits[positions]
        arrays["made_by"] = np.array(
            f"torch {version('torch')}, transformers {version('transformers')}"
        )
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays)
        fed = {n: len(several) for n, several in undecided.items() if several}
        print(f"{name}: smallest greedy margin {greedy.margins.min():.2e}, undecided {fed}")
    return 0


if __name__ == "__main__":
    parser_of(__doc__).parse_args()
    sys.exit(main())
