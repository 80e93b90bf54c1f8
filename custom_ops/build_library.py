"""The kernels as a C library that works without Paddle.

    python -m custom_ops.build_library      # prints the path of libfd_dsa_kernels.so

The build needs nvcc only, and the library takes tensors of any framework. It is placed in
`build/custom_ops/<hash>`, which git ignores. The hash covers the sources, the compiler, its flags
and NVCC_APPEND_FLAGS, so each build runs once and an outdated library is never loaded.
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
# architectures that the compiler does not know are left out
ARCHS = ("80", "90", "100")
# the name with the instructions of one architecture only, whose code runs on no other
FEATURES = {"90": "90a"}
NVCC_FLAGS = ("-O3", "-std=c++17", "-lineinfo", "-Xcompiler", "-fPIC,-Wall,-Wextra")
CUDA_FOLDER = "/usr/local/cuda"


class BuildError(RuntimeError):
    """A build of the library that failed, with the missing tool or nvcc's output as message."""


def find_nvcc() -> str | None:
    """Return the path of nvcc from $CUDA_HOME, from PATH or from CUDA's usual folder."""
    homes = [os.environ.get("CUDA_HOME"), CUDA_FOLDER]
    folders = [f"{home}/bin" for home in homes if home]
    return shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


def known_archs(nvcc: str) -> tuple[str, ...]:
    """Return the architectures of ARCHS that a compiler supports."""
    listed = subprocess.run([nvcc, "--list-gpu-arch"], capture_output=True, text=True).stdout
    known = set(re.findall(r"compute_(\d+)\b", listed))
    return tuple(arch for arch in ARCHS if arch in known)


def gencode(archs: Sequence[str]) -> list[str]:
    """Return nvcc's flags for code of each architecture.

    The last architecture is also kept as PTX, which the driver compiles for later GPUs.
    """
    names = [FEATURES.get(arch, arch) for arch in archs]
    flags = [f"-gencode=arch=compute_{name},code=sm_{name}" for name in names]
    return [*flags, f"-gencode=arch=compute_{archs[-1]},code=compute_{archs[-1]}"]


def _run(commands: list[list[str]]) -> None:
    """Run compilers in parallel.

    Raises:
        BuildError: a compiler failed; the message holds its output.
    """
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    running = [subprocess.Popen(command, cwd=SOURCES, **pipes) for command in commands]
    outputs = [process.communicate()[0] for process in running]
    for command, process, output in zip(commands, running, outputs, strict=True):
        if process.returncode:
            raise BuildError(f"{' '.join(command)}\n{output}")


def _key(*parts: object) -> str:
    """Return the hash of all inputs of a build."""
    digest = hashlib.sha256(repr(parts).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def build_library(archs: Sequence[str] | None = None) -> Path:
    """Return the path of the library, and build it if it is missing.

    Args:
        archs: architectures such as "90", or None for those of ARCHS that nvcc knows.

    Raises:
        BuildError: nvcc is missing or rejects a source.
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
        # two processes may build the same library, so a complete file replaces it at once
        library.replace(folder / LIBRARY)
    return folder / LIBRARY


if __name__ == "__main__":
    try:
        print(build_library(sys.argv[1:]))
    except BuildError as error:
        sys.exit(f"custom_ops: {error}")
