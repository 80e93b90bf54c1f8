"""State and contents of the optional package fd_dsa_ops, which custom_ops/ builds.

fd_dsa works without the package. If it is built with CUDA kernels, those for top-k and sparse MLA
serve after they have matched the definition on small cases: see `fd_dsa.ops.providers`. A start
checks the kernels for experts in four bits: see `fd_dsa.models.four_bit_check`. Other kernels serve
unchecked: see `fd_dsa.ops.library_kernel`.
"""

from __future__ import annotations

import ctypes
import sys
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fd_dsa.commands import pip_command, project_folder
from fd_dsa.errors import BackendUnavailable, describe_error

PACKAGE = "fd_dsa_ops"
_NO_KERNELS = "without CUDA kernels"
BUILT, MISSING, BROKEN = "built", "missing", "broken"


@dataclass(frozen=True, slots=True)
class Build:
    """State of the package.

    Attributes:
        state: "built", "missing" or "broken".
        reason: in words, the Paddle and GPUs it was built for, or the fault.
        path: the library, "" without one.
        kernels: the library with CUDA kernels, None without.
        operators: names of its operators in Paddle.
    """

    state: str
    reason: str
    path: str = ""
    kernels: Any = field(default=None, compare=False)
    operators: tuple[str, ...] = ()


_build: Build | None = None


def build() -> Build:
    """Return the state of the package, which is imported at the first call."""
    global _build
    if _build is None:
        _build = _examine()
    return _build


def use_library(path: Path | str | None) -> None:
    """Use the kernels of a C library, made by `custom_ops.build_library` without Paddle.

    The library is for tensors of another library than Paddle. Objects that were set up before keep
    their kernels.

    Args:
        path: the library. None = the package again.

    Raises:
        BackendUnavailable: the file cannot be loaded.
    """
    global _build
    _build = None
    if path is None:
        return
    try:
        kernels = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailable(f"{path}: {error}; build it again: {build_command()}") from error
    _build = Build(BUILT, "as a C library", str(path), kernels)


def build_command() -> str:
    """Return a shell line that builds the package for this Python."""
    return pip_command("--no-build-isolation", project_folder("custom_ops"))


def _examine() -> Build:
    """Find the package and import it."""
    try:
        if sys.modules.get(PACKAGE) is None and find_spec(PACKAGE) is None:
            return Build(MISSING, f"not installed; {build_command()} builds it")
        package = import_module(PACKAGE)
        path, made = str(package.LIBRARY), package.BUILD
        operators = tuple(package.__all__)
    except Exception as error:
        # an incomplete package may raise any exception
        reason = describe_error(error).removeprefix("ImportError: ")
        return Build(BROKEN, f"{reason}; build it again: {build_command()}")
    archs = ", ".join(made["archs"])
    what = f"for Paddle {made['paddle']} {f'with kernels for {archs}' if archs else _NO_KERNELS}"
    return Build(BUILT, what, path, ctypes.CDLL(path) if archs else None, operators)
