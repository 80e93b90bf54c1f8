"""docs/adding-a-model.md, followed to the letter on a copy of the package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import MISSING, fields
from pathlib import Path

import numpy as np

from fd_dsa.models.defaults import ModelDefaults
from tests.parity.cases import CASES, GREEDY_PROMPT
from tests.parity.test_parity import GOLDENS

TREE = Path(__file__).parents[2]
PAGE = TREE / "docs" / "adding-a-model.md"
STEPS = 48
# greedy tokens of a folder, with whichever fd_dsa comes first on the path
TOKENS = """
import json, sys
from pathlib import Path
from tests.parity.engine_side import greedy, load_model, make_runner
prompt = json.loads(sys.argv[2])
print(greedy(make_runner(load_model(Path(sys.argv[1]))), prompt, int(sys.argv[3])).tolist())
"""


def insert_before_end_of(text: str, table: str, end: str, entry: str) -> str:
    """`entry` as the last one of a table, whose closing line is `end`."""
    start = text.index(f"\n{table}")
    close = text.index(f"\n{end}\n", start) + 1
    return text[:close] + entry + text[close:]


def copied_tree(tmp_path: Path) -> Path:
    """The package, and the tests that run a model, with the page's entry in the registry."""
    ignored = shutil.ignore_patterns("__pycache__", "demo_model")
    shutil.copytree(TREE / "fd_dsa", tmp_path / "fd_dsa", ignore=ignored)
    (tmp_path / "tests").symlink_to(TREE / "tests")
    (entry,) = re.findall(r"```py\n(.*?) *```", PAGE.read_text(), re.DOTALL)
    registry = tmp_path / "fd_dsa" / "models" / "registry.py"
    registry.write_text(insert_before_end_of(registry.read_text(), "FAMILIES", "    )", entry))
    return tmp_path


def test_the_page_leads_to_hugging_faces_tokens(tmp_path: Path) -> None:
    defaults = [field.default for field in fields(ModelDefaults)]
    assert all(one is MISSING for one in defaults), "the page says otherwise"
    case = CASES["glm"]
    folder = case.write(tmp_path / "model")
    # what config.json does not say has to come from the new family
    values = {"model_type": "my_dsa", "num_key_value_heads": 4, "first_k_dense_replace": 1}
    (folder / "config.json").write_text(json.dumps(values))
    prompt = json.dumps(case.prompt(GREEDY_PROMPT))
    done = subprocess.run(
        [sys.executable, "-c", TOKENS, str(folder), prompt, str(STEPS)],
        cwd=copied_tree(tmp_path),
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with np.load(GOLDENS / "glm.npz") as golden:
        assert json.loads(done.stdout) == golden["greedy_tokens"][:STEPS].tolist()
