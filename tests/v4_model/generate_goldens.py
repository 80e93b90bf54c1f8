"""Writes tests/data/v4_model/<case>.npz: logits of transformers for some cases.

    python -m tests.v4_model.generate_goldens

Needs torch and transformers (`pip install '.[oracle]'`). A golden keeps the logits of at most
`KEPT` positions of each prompt, its edges and an even spread; the live comparison looks at all.
One case has greedy answers too.
"""

from __future__ import annotations

import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

import numpy as np

from benchmarks._harness import parser_of
from tests.v4_model.cases import CASES, GOLDEN, GREEDY, GREEDY_PROMPTS, STEPS
from tests.v4_model.hugging_face import greedy, load, logits

FOLDER = Path(__file__).parent.parent / "data" / "v4_model"
KEPT = 8


def main() -> int:
    """Write all goldens."""
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in GOLDEN:
        case, arrays = CASES[name], {}
        with tempfile.TemporaryDirectory() as folder:
            model = load(case.write(Path(folder)))
            found = {length: logits(model, case.prompt(length)) for length in case.lengths}
            if name == GREEDY:
                runs = [greedy(model, case.prompt(n), STEPS) for n in GREEDY_PROMPTS]
                arrays["greedy_tokens"] = np.array([tokens for tokens, _ in runs])
                arrays["greedy_margins"] = np.array([margins for _, margins in runs])
        for length, one in found.items():
            kept = np.unique(np.linspace(0, length - 1, KEPT).round().astype(np.int64))
            arrays[f"positions_{length}"], arrays[f"logits_{length}"] = kept, one[kept]
        made_by = f"torch {version('torch')}, transformers {version('transformers')}"
        np.savez_compressed(FOLDER / f"{name}.npz", **arrays, made_by=np.array(made_by))
        print(f"{name}: |logits| up to {max(np.abs(one).max() for one in found.values()):.2f}")
    return 0


if __name__ == "__main__":
    parser_of(__doc__).parse_args()
    sys.exit(main())
