"""Builds the libraries that do nothing, with g++, into `build/gpu_rig`."""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

from tests.custom_ops.building import keep
from tests.gpu_rig.build import CACHE, find_tools, run_compiler

SOURCES = Path(__file__).parent / "libraries"
CUDA, CUBLASLT, NCCL = "libcuda.so.1", "libcublasLt.so.13", "libnccl.so.2"
OPERATORS = "libfd_dsa_kernels.so"
# the package finds a library by its name
NAMES = {"cuda.cc": CUDA, "cublaslt.cc": CUBLASLT, "nccl.cc": NCCL, "operators.cc": OPERATORS}
FLAGS = ("-O2", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra")


def build(headers: Path) -> Path:
    """Return the folder of the libraries, built now if it is not there yet.

    Args:
        headers: folder of the C headers of custom_ops/, by which the package passes structures.

    Raises:
        BuildError: g++ is missing, or it refused a source.
    """
    digest = hashlib.sha256(repr((FLAGS, NAMES)).encode())
    for path in [*sorted(SOURCES.iterdir()), *sorted(headers.glob("*.h"))]:
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    folder = CACHE / f"null_driver-{digest.hexdigest()[:16]}"
    if folder.is_dir():
        return folder
    compiler = [find_tools("null").cxx, *FLAGS, f"-I{headers.resolve()}"]
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        for source, name in NAMES.items():
            # with this name in it, a library that is loaded is found when the name is asked for
            names = [f"-Wl,-soname,{name}", "-o", str(made / name)]
            run_compiler([*compiler, source, *names], SOURCES)
        keep(made, folder)
    return folder
