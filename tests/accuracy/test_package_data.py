"""Installed and published files with the room's data and their notices."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from fd_dsa.accuracy.prompts import OFFICIAL

ROOT = Path(__file__).resolve().parents[2]
DATA = Path("fd_dsa/accuracy/data")
BUILD = "from setuptools import build_meta as b; print(b.build_{}('dist'))"


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The project with this room alone, so that building takes a second."""
    folder = tmp_path_factory.mktemp("source")
    typed = "fd_dsa/py.typed"
    built = "pyproject.toml", "setup.py", "MANIFEST.in"
    # a part of the tests, which cannot run without the others
    test = "tests/test_errors.py"
    for name in (*built, "README.md", "LICENSE", "fd_dsa/__init__.py", typed, test):
        (folder / name).parent.mkdir(exist_ok=True)
        shutil.copy(ROOT / name, folder / name)
    # other processes write there
    no_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "fd_dsa/accuracy", folder / "fd_dsa/accuracy", ignore=no_caches)
    return folder


def _build(source: Path, kind: str) -> Path:
    """Build a `wheel` or an `sdist`."""
    code = BUILD.format(kind)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], cwd=source, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    return source / "dist" / result.stdout.split()[-1]


@pytest.mark.slow
def test_wheel_and_sdist_hold_the_prompts(source: Path) -> None:
    folders = (DATA, Path("fd_dsa/accuracy/retrieval/data"))
    wanted = sorted(str(f / path.name) for f in folders for path in (ROOT / f).iterdir())
    assert str(DATA / OFFICIAL.name) in wanted
    assert str(DATA / "ifeval_prompts.NOTICE") in wanted
    with zipfile.ZipFile(_build(source, "wheel")) as wheel:
        assert sorted(name for name in wheel.namelist() if "/data/" in name) == wanted
        assert wheel.read(str(DATA / OFFICIAL.name)) == OFFICIAL.read_bytes()
        # type checkers read the annotations of an installed package only if it holds this file
        assert "fd_dsa/py.typed" in wheel.namelist()
    with tarfile.open(_build(source, "sdist")) as sdist:
        names = [name.partition("/")[2] for name in sdist.getnames()]
    assert {*wanted, "fd_dsa/py.typed"} <= set(names)
    # setuptools would add files of tests by their names, without those that they import
    assert not [name for name in names if name.startswith("tests")]
