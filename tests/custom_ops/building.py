"""Builds of custom_ops/ for tests, kept under build/ by a hash of what they are made of."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from functools import cache
from importlib.metadata import distributions
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SOURCES = ROOT / "custom_ops"
CACHE = ROOT / "build" / "custom_ops"
EMULATED = Path(__file__).with_name("emulated")


def compiler() -> str:
    """Return the path of the C++ compiler, or skip the test without one."""
    found = shutil.which(os.environ.get("CXX", "g++"))
    if found is None:
        pytest.skip("THE CUSTOM OPERATORS CANNOT BE BUILT HERE: no C++ compiler")
    return found


def copy_sources(folder: Path) -> Path:
    """The sources of the package in another folder, where a build may leave its files."""
    ignored = shutil.ignore_patterns("build", "*.egg-info", "__pycache__")
    return Path(shutil.copytree(SOURCES, folder, ignore=ignored))


def run_setup(sources: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run setup.py of a copy. The caller checks the result."""
    return subprocess.run(
        [sys.executable, "-W", "ignore", "setup.py", *arguments],
        cwd=sources,
        env=os.environ | variables,
        capture_output=True,
        text=True,
    )


def sources_of_the_package() -> list[Path]:
    """Return all files that a build reads, without files that a build wrote."""
    patterns = ("*.*", "csrc/*.*", "fd_dsa_ops/*.py")
    return sorted(path for pattern in patterns for path in SOURCES.glob(pattern) if path.is_file())


def key_of(*parts: object) -> str:
    """Hash of the sources and of what else a build is made of."""
    installed = [f"{d.name} {d.version}" for d in distributions() if "paddlepaddle" in d.name]
    digest = hashlib.sha256(repr((*parts, sorted(installed))).encode())
    for path in sources_of_the_package():
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def pip_install(sources: Path, target: Path, *flags: str) -> None:
    """Build and install the package into a folder by pip."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", *flags]
    command += ["--disable-pip-version-check", "--target", str(target), str(sources)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def build_package() -> Path:
    """Folder that holds fd_dsa_ops as pip installs it beside Paddle's CPU wheel."""
    if find_spec("paddle") is None:
        pytest.skip("not installed: paddle")
    compiler()
    folder = CACHE / f"package-{key_of(sys.version_info[:2])}"
    if not folder.is_dir():
        CACHE.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
            sources, made = copy_sources(Path(scratch) / "sources"), Path(scratch) / "made"
            pip_install(sources, made, "--no-build-isolation")
            keep(made, folder)
    return folder


def keep(made: Path, folder: Path) -> None:
    """Move a build to its place. If two processes make it, the first one's is kept."""
    try:
        made.rename(folder)
    except OSError:
        if not folder.is_dir():
            raise


@cache
def load_package() -> Any:
    """The module fd_dsa_ops, loaded once a process, as Paddle takes its operators once.

    It is not put where an import would find it.
    """
    spec = spec_from_file_location("fd_dsa_ops", build_package() / "fd_dsa_ops" / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compile_library(source: Path, *folders: Path, define: str = "") -> Path:
    """A library made of one file and the headers of some folders, perhaps with a macro set."""
    headers = [path for folder in folders for path in sorted(folder.glob("*.*"))]
    # the states of several libraries in one process are not one
    flags = ["-O1", "-std=c++17", "-shared", "-fPIC", "-fno-gnu-unique", "-Wall", "-Wextra"]
    # fibers jump from stack to stack, which glibc's checks do not allow
    flags += ["-U_FORTIFY_SOURCE", "-Wno-unknown-pragmas", *(f"-I{folder}" for folder in folders)]
    flags += [f"-D{define}"] if define else []
    content = b"".join(path.read_bytes() for path in [source, *headers])
    digest = hashlib.sha256(content + " ".join(flags).encode())
    made = CACHE / f"{source.stem}-{digest.hexdigest()[:16]}.so"
    if not made.is_file():
        CACHE.mkdir(parents=True, exist_ok=True)
        scratch = made.with_suffix(f".{os.getpid()}")
        subprocess.run([compiler(), *flags, "-x", "c++", source, "-o", scratch], check=True)
        scratch.replace(made)
    return made


def emulated_library(name: str, define: str = "") -> Path:
    """The kernels of one source, compiled as C++: their threads run in turn."""
    source = EMULATED / f"{name}_emulated.cc"
    if not source.exists():
        source = SOURCES / "csrc" / f"{name}.cu"
    return compile_library(source, EMULATED, SOURCES / "csrc", define=define)


def faulty_library(name: str, folder: Path, file: str, right: str, wrong: str) -> Path:
    """`emulated_library` with a fault: `wrong` replaces the only `right` of `file`."""
    sources = Path(shutil.copytree(SOURCES / "csrc", folder / "csrc"))
    text = (sources / file).read_text()
    assert text.count(right) == 1, f"{file} has {text.count(right)} of {right!r}"
    (sources / file).write_text(text.replace(right, wrong))
    return compile_library(EMULATED / f"{name}_emulated.cc", EMULATED, sources)
