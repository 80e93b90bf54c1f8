"""Builds the plug-in's four forms with g++, and nvcc for the one on a GPU.

    python -m tests.gpu_rig [fake] [guard] [null] [real]

A build lands in `build/gpu_rig/<form>-<hash>/librig.so`, which git ignores. The hash covers the
sources, the flags and Paddle's version, so nothing is built twice and nothing stale is loaded.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

FORMS = ("fake", "guard", "null", "real")
LIBRARY = "librig.so"
SOURCES = Path(__file__).parent / "plugin"
CACHE = Path(__file__).parents[2] / "build" / "gpu_rig"
CUDA_FOLDER = "/usr/local/cuda"

COMMON = ("plugin.cc", "view_kernels.cc", "op_kernels.cc")
HOST = ("host_runtime.cc",)
NULL = ("null_kernels.cc",)
CUDA = ("cuda_runtime.cc", "cuda_graphs.cc", "cublas.cc")
# loops for g++, kernels for nvcc
BOTH = "elementwise.cu"

CXX_FLAGS = ("-O2", "-std=c++17", "-fPIC", "-shared", "-Wall", "-Wextra")
NVCC_FLAGS = ("-O2", "-std=c++17", "-arch=sm_90", "-Xcompiler", "-fPIC,-Wall,-Wextra")
# the C API of kernels is found only if the plug-in itself asks for the library that has it
LINK_FLAGS = ("-l:libphi_core.so", "-l:libcommon.so", "-Wl,--allow-shlib-undefined")
# Paddle's own, where a compiler would take an archive
LINK_FLAGS += ("-l:libstdc++.so.6",)
CUDA_LINK_FLAGS = ("-lcudart_static", "-lpthread", "-ldl", "-lrt")


class BuildError(RuntimeError):
    """A form cannot be built here; the message names what is missing, or is the compiler's."""


@dataclass(frozen=True)
class Tools:
    """Places of the compilers and of Paddle's headers and libraries."""

    cxx: str
    paddle: Path
    nvcc: str | None = None
    cuda: Path | None = None


def paddle_folder() -> Path:
    """Folder of the installed Paddle, without importing it.

    Raises:
        BuildError: there is none.
    """
    spec = find_spec("paddle")
    if spec is None or spec.origin is None:
        raise BuildError("Paddle is not installed: pip install paddlepaddle")
    return Path(spec.origin).parent


def find_nvcc() -> str | None:
    """Path of nvcc: in $CUDA_HOME, on the path, or in CUDA's usual folder."""
    homes = [os.environ.get("CUDA_HOME"), CUDA_FOLDER]
    folders = [f"{home}/bin" for home in homes if home]
    return shutil.which("nvcc", path=os.pathsep.join([*folders, os.environ.get("PATH", "")]))


def _cuda_folder(nvcc: str) -> Path:
    """Folder with CUDA's headers and static runtime, as nvcc itself names it."""
    output = subprocess.run(
        [nvcc, "--dryrun", "-c", "-o", "/dev/null", str(SOURCES / BOTH)],
        capture_output=True,
        text=True,
    ).stderr
    top = [line.partition("TOP=")[2] for line in output.splitlines() if "TOP=" in line]
    if not top:
        raise BuildError(f"{nvcc} --dryrun names no folder of CUDA:\n{output}")
    return Path(top[0]).resolve()


def find_tools(form: str) -> Tools:
    """Return the tools that build this form.

    Raises:
        BuildError: a compiler or Paddle's headers are missing; names them.
    """
    cxx = shutil.which(os.environ.get("CXX", "g++"))
    if cxx is None:
        raise BuildError("no C++ compiler: install g++ or set CXX")
    paddle = paddle_folder()
    if not (paddle / "include/paddle/phi/capi/all.h").is_file():
        raise BuildError(f"{paddle} has no headers; install paddlepaddle from its wheel")
    if form != "real":
        return Tools(cxx, paddle)
    nvcc = find_nvcc()
    if nvcc is None:
        raise BuildError("no nvcc: install the CUDA toolkit, or set CUDA_HOME to it")
    return Tools(cxx, paddle, nvcc, _cuda_folder(nvcc))


def _key(form: str) -> str:
    """Hash of everything that a build of this form is made of."""
    try:
        paddle = version("paddlepaddle")
    except PackageNotFoundError as error:
        raise BuildError("the rig needs the CPU wheel: pip install paddlepaddle") from error
    flags = (CXX_FLAGS, NVCC_FLAGS, LINK_FLAGS, CUDA_LINK_FLAGS)
    digest = hashlib.sha256(repr((form, paddle, flags)).encode())
    for path in sorted(SOURCES.iterdir()):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:16]


def run_compiler(command: list[str], folder: Path = SOURCES) -> None:
    """Call a compiler in the folder of its sources.

    Raises:
        BuildError: it refused a source; has what it wrote.
    """
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")


def _compile(form: str, tools: Tools, folder: Path) -> None:
    """Write the library of a form into a folder."""
    paddle_flags = ["-isystem", str(tools.paddle / "include"), f"-L{tools.paddle / 'libs'}"]
    command = [tools.cxx, *CXX_FLAGS, *paddle_flags, *COMMON]
    if form == "real":
        kernels = folder / "elementwise.o"
        run_compiler([str(tools.nvcc), *NVCC_FLAGS, "-c", BOTH, "-o", str(kernels)])
        command += ["-isystem", f"{tools.cuda}/include", *CUDA, str(kernels)]
        command += [f"-L{tools.cuda}/lib64", *CUDA_LINK_FLAGS]
    elif form == "null":
        command += ["-DRIG_NULL", *HOST, *NULL]
    else:
        guard = ["-DRIG_GUARD"] if form == "guard" else []
        command += [*guard, *HOST, "-x", "c++", BOTH, "-x", "none"]
    run_compiler([*command, *LINK_FLAGS, "-o", str(folder / LIBRARY)])


def folder_of(form: str) -> Path:
    """Folder of the build of a form, which may not be there yet."""
    return CACHE / f"{form}-{_key(form)}"


def build(form: str) -> Path:
    """Folder with the library of a form, built now if it is not there yet.

    Args:
        form: "fake", "guard", "null" or "real".

    Raises:
        BuildError: a tool is missing, or a compiler refused a source.
    """
    if form not in FORMS:
        raise BuildError(f"form: got {form!r}, allowed: {', '.join(FORMS)}")
    folder = folder_of(form)
    if (folder / LIBRARY).is_file():
        return folder
    tools = find_tools(form)
    CACHE.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        work = Path(scratch) / "work"
        work.mkdir()
        _compile(form, tools, work)
        folder.mkdir(exist_ok=True)
        # it appears last and at once; of two processes that build it, the first one's stays
        with suppress(FileExistsError):
            os.link(work / LIBRARY, folder / LIBRARY)
    return folder
