"""The tree keeps its rules, and the checker finds what breaks them."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests._layout import CUDA_SOURCES, LONG_FILE_MARK, MAX_LINES, violations

ROOT = Path(__file__).resolve().parent.parent


def test_tree_keeps_the_rules() -> None:
    assert violations(ROOT) == []


def test_import_of_the_package_is_light() -> None:
    heavy = {"fastapi", "numpy", "paddle", "pydantic", "torch", "transformers", "triton"}
    code = f"import fd_dsa, sys; print(*({heavy} & sys.modules.keys()))"
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert result.stdout.split() == []


def _tree(root: Path, files: dict[str, str]) -> Path:
    """A small package with these files below `fd_dsa`, `__init__` files added."""
    package = root / "fd_dsa"
    for name, text in files.items():
        path = package / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    for folder in {package, *(path.parent for path in package.rglob("*.py"))}:
        (folder / "__init__.py").touch()
    return root


CLEAN = {
    "errors.py": "class Error(Exception): ...\n",
    "environment.py": "import os\nfrom fd_dsa.errors import Error\nHOME = os.environ.get('HOME')\n",
    "config.py": "from fd_dsa.environment import HOME\n",
    "step/builder.py": "import numpy\nimport triton.language\nfrom fd_dsa.step import host\n",
    "step/host.py": "from ..errors import Error\n",
    "triton_runtime/driver.py": "from triton.runtime import driver\n",
    "serve/app.py": "def start() -> None:\n    from fd_dsa.engine import llm\n",
    "ops/kernel.py": "@triton.jit\ndef add(x, BLOCK: tl.constexpr):\n    return x\n",
    "engine/llm.py": "from fd_dsa import __version__\n",
    "serve/__main__.py": "from fd_dsa.cli import main\n",
    "cli.py": "import fd_dsa.serve.app\n",
}


def test_clean_tree_has_no_violation(tmp_path: Path) -> None:
    assert violations(_tree(tmp_path, CLEAN)) == []


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("step/up.py", "from fd_dsa.engine import llm\n", "fd_dsa.engine.llm, a higher room"),
        ("step/up.py", "from ..engine import llm\n", "fd_dsa.engine.llm, a higher room"),
        ("step/up.py", "import fd_dsa.engine.llm as x\n", "fd_dsa.engine.llm, a higher room"),
        ("step/up.py", "def f():\n    import fd_dsa.cli\n", "fd_dsa.cli, a higher room"),
        (
            "step/up.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import fd_dsa.cli\n",
            "fd_dsa.cli, a higher room",
        ),
        ("errors.py", "import fd_dsa.config\n", "fd_dsa.config, a higher room"),
        ("step/host.py", "import fd_dsa.step.builder\n", "cycle fd_dsa.step.builder"),
        ("step/host.py", "def f():\n    from . import builder\n", "cycle fd_dsa.step.builder"),
        (
            "step/host.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from . import builder\n",
            "cycle fd_dsa.step.builder",
        ),
        ("gadgets/new.py", "", "room 'gadgets' has no place"),
        ("engine/x.py", "import torch\n", "imports torch; no room may"),
        ("engine/x.py", "from transformers import x\n", "no room may"),
        ("serve/x.py", "import fastdeploy.engine\n", "only fastdeploy_plugin may"),
        ("ops/x.py", "import triton.runtime.driver\n", "only triton_runtime may"),
        ("ops/x.py", "from triton import compiler\n", "only triton_runtime may"),
        ("serve/x.py", "import os\nKEY = os.getenv('KEY')\n", "reads the environment"),
        ("serve/x.py", "import os as system\nsystem.environ\n", "reads the environment"),
        ("serve/x.py", "from os import environ\n", "reads the environment"),
        ("runner/x.py", "x = hasattr(y, 'z')\n", "hasattr of another object"),
        ("attention/x.py", "def f(m):\n    return getattr(m, 'z', None)\n", "getattr of another"),
        ("serve/x.py", "def f(x: int):\n    pass\n", "f lacks an annotation"),
        ("serve/x.py", "def f(*x) -> None: ...\n", "f lacks an annotation"),
        ("serve/x.py", "def f(x: list[Any]) -> None: ...\n", "1 of 3 parameters have Any"),
        ("serve/x.py", "x = 0\n" * (MAX_LINES + 1), f"{MAX_LINES + 1} lines"),
    ],
)
def test_checker_finds(tmp_path: Path, name: str, text: str, expected: str) -> None:
    found = violations(_tree(tmp_path, {**CLEAN, name: text}))
    assert [line for line in found if expected in line]


def test_cuda_files_have_limits(tmp_path: Path) -> None:
    root = _tree(tmp_path, CLEAN)
    for folder in CUDA_SOURCES:
        source = root / folder / "new.cu"
        source.parent.mkdir(parents=True)
        source.write_text("//\n" * MAX_LINES)
        assert violations(root) == []
        source.write_text("//\n" * (MAX_LINES + 1))
        [found] = violations(root)
        assert f"{MAX_LINES + 1} lines, allowed {MAX_LINES}" in found
        source.unlink()


def test_a_long_file_may_give_a_reason(tmp_path: Path) -> None:
    text = f'"""{LONG_FILE_MARK}one table."""\n' + "x = 0\n" * MAX_LINES
    assert violations(_tree(tmp_path, {**CLEAN, "serve/x.py": text})) == []


def test_the_package_is_found_from_beside_its_clone(tmp_path: Path) -> None:
    """A clone in the current folder, without `__init__.py`, must not stand for the package."""
    (tmp_path / "fd_dsa").mkdir()
    variables = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-c", "import fd_dsa; print(fd_dsa.__version__)"]
    done = subprocess.run(command, cwd=tmp_path, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
