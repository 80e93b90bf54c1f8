"""The kernels as a C library, for tensors of any framework: no Paddle is needed to build or load.

    python -m custom_ops.build_library      # prints the path of libfd_dsa_kernels.so

Needs nvcc alone. A build lands in `build/custom_ops/<hash>`, which git ignores; the hash covers
the sources, the compiler and the flags, those of NVCC_APPEND_FLAGS too, so nothing is built twice
and nothing stale is loaded.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

LIBRARY = "libfd_dsa_kernels.so"
SOURCES = Path(__file__).parent / "csrc"
CACHE = Path(__file__).parents[1] / "build" / "custom_ops"
ARCHS = ("80", "90", "100")
# of an architecture, the one that has its own instructions too; code for it runs there alone
FEATURES = {"90": "90a"}
NVCC_FLAGS = ("-O3", "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC,-Wall,-Wextra")
CUDA_FOLDER = "/usr/local/cuda"


class BuildError(RuntimeError):
    """The library cannot be built here; the message says what is missing or what nvcc said."""


def find_nvcc() -> str | None:
    """Path of nvcc: in $CUDA_HOME, on the path, or in CUDA's usual folder."""
    homes = [os.environ.get("CUDA_HOME"), CUDA_FOLDER]
    folders = [f"{home}/bin" for home in homes if home]
    return shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


def known_archs(nvcc: str) -> tuple[str, ...]:
    """Those of ARCHS for which a compiler makes code."""
    said = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)\b", said))
    return tuple(arch for arch in ARCHS if arch in known)


def _run(command: list[str]) -> None:
    """One compiler call; what it wrote is in the error."""
    done = subprocess.run(command, cwd=SOURCES, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _key(*parts: object) -> str:
    """Hash of everything that a build is made of."""
    digest = hashlib.sha256(repr(parts).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def compile_units(folder: Path, nvcc: str, archs: Sequence[str]) -> list[str]:
    """Object files of all CUDA sources, written into a folder, several at a time.

    Raises:
        BuildError: nvcc refuses a source.
    """
    names = [FEATURES.get(arch, arch) for arch in archs]
    code = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    objects, running = [], []
    for source in sorted(SOURCES.glob("*.cu")):
        objects.append(str(folder / f"{source.stem}.o"))
        command = [nvcc, *NVCC_FLAGS, *code, "--threads", "0", "-c", source.name, "-o", objects[-1]]
        pipe = subprocess.PIPE
        running.append(
            (command, subprocess.Popen(command, cwd=SOURCES, stdout=pipe, stderr=pipe, text=True))
        )
    said = [(command, process.communicate(), process) for command, process in running]
    for command, texts, process in said:
        if process.returncode:
            raise BuildError(f"{' '.join(command)}\n{''.join(texts)}")
    return objects


def build_library(archs: Sequence[str] | None = None) -> Path:
    """Path of the library, built now if it is not there yet.

    Args:
        archs: architectures such as "90"; None = those of ARCHS that nvcc knows.

    Raises:
        BuildError: there is no nvcc, or it refuses a source.
    """
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("no nvcc: install the CUDA toolkit, or set CUDA_HOME to it")
    archs = tuple(archs or known_archs(nvcc))
    compiler = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    flags = NVCC_FLAGS, os.environ.get("NVCC_APPEND_FLAGS", "")
    folder = CACHE / f"kernels-{_key(archs, FEATURES, compiler, *flags)}"
    if (folder / LIBRARY).is_file():
        return folder / LIBRARY
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        objects = compile_units(Path(scratch), nvcc, archs)
        made = Path(scratch) / LIBRARY
        _run([nvcc, "-shared", "-cudart", "static", "-o", str(made), *objects])
        folder.mkdir(exist_ok=True)
        # the library moves last and at once: two processes may build the same one
        made.replace(folder / LIBRARY)
    return folder / LIBRARY


if __name__ == "__main__":
    try:
        print(build_library(sys.argv[1:]))
    except BuildError as error:
        sys.exit(f"custom_ops: {error}")
