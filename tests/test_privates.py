"""Tests use no private name of the package, but for a few that this file gives reasons for."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from tests._privates import private_uses

ROOT = Path(__file__).resolve().parent.parent

PLANTED = "plants defects in single functions, as tests/mutants.py does in single lines"
FASTDEPLOYS = "FastDeploy calls the runner by this name"
POISON = "overwrites buffers that hold nothing between steps, which nobody else reaches"
AUDIT = "recounts the owners of blocks, because figures of the block manager could hide a fault"
# (file, name; "" = any name) -> most uses, and the reason
EXCEPTIONS: dict[tuple[str, str], tuple[int, str]] = {
    ("fastdeploy_plugin/test_behaviours_graphs.py", "_dummy_run"): (1, FASTDEPLOYS),
    ("fastdeploy_plugin/test_runner.py", "_compute_position_ids_and_slot_mapping"): (
        1,
        FASTDEPLOYS,
    ),
    ("gpu_rig/device/test_captured_prompts.py", ""): (3, POISON),
    ("gpu_rig/device/test_v4_captured.py", ""): (2, POISON),
    ("gpu_rig/device/test_v4_plain.py", ""): (4, POISON),
    ("soak/audit.py", ""): (16, AUDIT),
    ("soak/test_histories.py", ""): (5, PLANTED),
    ("soak/test_host_tier.py", ""): (1, PLANTED),
    ("v4_model/test_mtp.py", ""): (6, PLANTED),
    ("v4_model/test_wrong_builds.py", ""): (34, PLANTED),
}


def test_tests_use_no_private_name_without_a_reason() -> None:
    counts: Counter[tuple[str, str]] = Counter()
    unexplained = []
    for use in private_uses(ROOT):
        key = next((k for k in ((use.path, use.name), (use.path, "")) if k in EXCEPTIONS), None)
        if key is None:
            unexplained.append(str(use))
        else:
            counts[key] += 1
    assert unexplained == []
    # a number that has fallen is written here, so that it cannot rise again
    assert counts == {key: most for key, (most, _) in EXCEPTIONS.items()}


PACKAGE = """
class Thing:
    def _turn(self, x):
        self._state = x

def _helper(): ...
_LIMIT = 3
"""
IMPORT = "from fd_dsa.thing import Thing\n"


@pytest.mark.parametrize(
    ("text", "kinds"),
    [
        ("from fd_dsa.thing import _helper\n", ["import"]),
        ("from fd_dsa._hidden import open_one\n", ["import"]),
        ("import fd_dsa._hidden as hidden\n", ["import"]),
        ("def test(thing): assert thing._state == 1\n", ["attribute"]),
        ("class Mine:\n    def test(self): self._state.append(1)\n", ["attribute"]),
        ('def test(patch): patch.setattr("fd_dsa.thing._LIMIT", 1)\n', ["string"]),
        ('def test(patch, thing): patch.setattr(thing, "_LIMIT", 1)\n', ["string"]),
        ("NAMES = '_LIMIT', '_state'\ndef test(x, n): setattr(x, n, 1)\n", ["string"] * 2),
        ('SCRIPT = """\nimport fd_dsa.thing as t\nt._LIMIT = 1\n"""\n', ["string"]),
        (
            "from fd_dsa.thing import Thing\nclass Mine(Thing):\n    def _turn(self): 1\n",
            ["override"],
        ),
        (IMPORT + "class A(Thing):\n    _turn = 1\n", ["override"]),
        (
            "class A(B):\n    def _turn(self): super()._turn()\n",
            ["attribute"],
        ),
    ],
)
def test_each_way_to_use_a_private_name_is_found(
    tmp_path: Path, text: str, kinds: list[str]
) -> None:
    assert [use.kind for use in private_uses(_tree(tmp_path, text))] == kinds


@pytest.mark.parametrize(
    "text",
    [
        "import os\ndef test(): os._exit(0)\n",
        "def test(row): row._replace(x=1)\n",
        "class Mine:\n    def __init__(self): self._state = 1\ndef test(m): m._state\n",
        "def _helper(): ...\ndef test(): _helper()\n",
        "from tests.thing import _helper\n",
        'def test(text): assert text.endswith("_LIMIT")\n',
        'def test():\n    """As `Thing._turn` does."""\n',
        IMPORT + "def test(): Thing().__class__\n",
    ],
)
def test_other_names_are_free(tmp_path: Path, text: str) -> None:
    assert private_uses(_tree(tmp_path, text)) == []


def _tree(root: Path, text: str) -> Path:
    """Write a package with private names, and one test file."""
    for name, content in {"fd_dsa/thing.py": PACKAGE, "tests/test_it.py": text}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
    return root
