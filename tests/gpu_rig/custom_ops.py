"""Builds fd_dsa_ops for the plug-in's device: Paddle's CPU wheel, and kernels of its own.

On a GPU the kernels are those of custom_ops/, by nvcc; the form "fake", whose device memory is
host memory, gets the operator's kernel on emulated threads.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from importlib.metadata import version
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType

from custom_ops import build_library, setup
from tests.custom_ops.building import CACHE, EMULATED, SOURCES, keep, key_of
from tests.gpu_rig.build import BuildError, find_tools

CXX_FLAGS = ("-O1", "-std=c++17", "-fPIC", "-shared", "-DPADDLE_WITH_CUSTOM_DEVICE")
LIBRARIES = ("libphi_core.so", "libphi.so", "libcommon.so", "libpaddle.so")
ARCHS = ("90",)


def _kernels(form: str, folder: Path) -> list[str]:
    """Return the compiler's arguments for the kernels, whose library is in the package's folder."""
    if form == "fake":
        folders = (f"-I{EMULATED}", f"-I{SOURCES / 'csrc'}")
        return [
            *folders,
            "-U_FORTIFY_SOURCE",
            "-x",
            "c++",
            str(SOURCES / "csrc/position_ids.cu"),
            "-x",
            "none",
        ]
    shutil.copy(build_library.build_library(ARCHS), folder)
    return [f"-L{folder}", f"-l:{build_library.LIBRARY}", "-Wl,-rpath,$ORIGIN"]


def build(form: str) -> Path:
    """Folder of the package fd_dsa_ops for a form, built now if it is not there yet.

    Args:
        form: "fake" or "real".

    Raises:
        BuildError: a tool is missing, or a compiler refused a source.
    """
    folder = CACHE / f"rig-{form}-{key_of(form, CXX_FLAGS, setup.LINK_FLAGS, ARCHS)}" / "fd_dsa_ops"
    if folder.is_dir():
        return folder
    tools = find_tools("fake")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=CACHE) as scratch:
        made = Path(shutil.copytree(SOURCES / "fd_dsa_ops", Path(scratch) / "fd_dsa_ops"))
        paddle = [f"-L{tools.paddle / name}" for name in ("libs", "base")]
        paddle += [f"-l:{name}" for name in LIBRARIES]
        headers = ["-isystem", str(tools.paddle / "include")]
        sources = sorted(str(path) for path in SOURCES.glob("*.cc"))
        command = [tools.cxx, *CXX_FLAGS, *headers, *sources, *_kernels(form, made)]
        command += [
            *paddle,
            *setup.LINK_FLAGS,
            "-Wl,--allow-shlib-undefined",
            "-o",
            str(made / "libfd_dsa_ops.so"),
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise BuildError(f"{' '.join(command)}\n{done.stdout}{done.stderr}")
        archs = [f"sm_{arch}" for arch in ARCHS]
        record = {"paddle": version("paddlepaddle"), "cuda": "of the plug-in", "archs": archs}
        (made / "build.json").write_text(json.dumps(record))
        keep(made, folder)
    return folder


def load(form: str) -> ModuleType:
    """The package of a form; Paddle takes its operators once a process."""
    spec = spec_from_file_location("fd_dsa_ops", build(form) / "__init__.py")
    assert spec is not None and spec.loader is not None
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
