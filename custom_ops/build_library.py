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
# those that the compiler does not know are left out
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
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)\b", listed))
    return tuple(arch for arch in ARCHS if arch in known)


def gencode(archs: Sequence[str]) -> list[str]:
    """Flags of nvcc: code of each architecture, and for later ones what the driver compiles."""
    names = [FEATURES.get(arch, arch) for arch in archs]
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def _run(commands: list[list[str]]) -> None:
    """Run compilers, all at once; what one of them wrote is in the error.

    Raises:
        BuildError: one of them failed.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(command, cwd=SOURCES, **pipes) for command in commands]
    outputs = [process.communicate()[0] for process in running]
    for command, process, output in zip(commands, running, outputs, strict=True):
        if process.returncode:
            raise BuildError(f"{' '.join(command)}\n{output}")


def _key(*parts: object) -> str:
    """Hash of everything that a build is made of."""
    digest = hashlib.sha256(repr(parts).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


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
    flags = [*NVCC_FLAGS, *gencode(archs or known_archs(nvcc)), "--threads", "0"]
    compiler = subprocess.run([nvcc, "--version"], capture_output=True, text=True).stdout
    key = _key(compiler, flags, os.environ.get("NVCC_APPEND_FLAGS", ""))
    folder = CACHE / f"kernels-{key}"
    if (folder / LIBRARY).is_file():
        return folder / LIBRARY
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        units = {path.name: f"{scratch}/{path.stem}.o" for path in sorted(SOURCES.glob("*.cu"))}
        _run([[nvcc, *flags, "-c", name, "-o", made] for name, made in units.items()])
        library = Path(scratch) / LIBRARY
        _run([[nvcc, "-shared", "-cudart", "static", "-o", str(library), *units.values()]])
        folder.mkdir(exist_ok=True)
        # the library moves last and at once: two processes may build the same one
        library.replace(folder / LIBRARY)
    return folder / LIBRARY


if __name__ == "__main__":
    try:
        print(build_library(sys.argv[1:]))
    except BuildError as error:
        sys.exit(f"custom_ops: {error}")
