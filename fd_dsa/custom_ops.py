"""The package fd_dsa_ops, which custom_ops/ builds: is it here, and which operators it serves.

fd_dsa works without it. Where it is built with CUDA kernels, a kernel of it serves an operator on
a GPU once it has agreed with ours on small cases; FD_DSA_OP_PROVIDER decides otherwise. All this
is decided once a process, when an operator is first set up, and logged once.
"""

from __future__ import annotations

import ctypes
import logging
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fd_dsa.environment import op_provider
from fd_dsa.errors import BackendUnavailable

logger = logging.getLogger(__name__)

PACKAGE = "fd_dsa_ops"
CUSTOM_OP, TRITON = "custom_op", "triton"
BUILT, MISSING, BROKEN = "built", "missing", "broken"


@dataclass(frozen=True, slots=True)
class Build:
    """What is known of the package.

    Attributes:
        state: "built", "missing" or "broken".
        reason: in words: for which Paddle and GPUs it was built, or what is wrong.
        path: the library; "" where there is none.
        kernels: the library with CUDA kernels, None without.
        operators: names under which Paddle has its operators.
    """

    state: str
    reason: str
    path: str = ""
    kernels: Any = field(default=None, compare=False)
    operators: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Choice:
    """Whether a custom operator serves on a GPU, and why or why not."""

    operator: str
    serves: bool
    reason: str


_build: Build | None = None
_choices: dict[str, Choice] = {}


def build() -> Build:
    """What is known of the package; it is imported at the first call."""
    global _build
    if _build is None:
        _build = _examine()
    return _build


def package() -> Any:
    """The module, whose functions are Paddle's operators.

    Raises:
        BackendUnavailable: it is missing or broken.
    """
    found = build()
    if not found.operators:
        raise BackendUnavailable(
            f"{PACKAGE} has no operators here; it is {found.state}: {found.reason}"
        )
    return import_module(PACKAGE)


def use_library(path: Path | str | None) -> None:
    """Take the kernels of a C library, as `custom_ops.build_library` makes it without Paddle.

    For tensors of another library than Paddle. None goes back to the package. Choices made before
    hold no longer; an object that was set up by one keeps what it has.

    Raises:
        BackendUnavailable: the file cannot be loaded.
    """
    global _build
    _build = None
    _choices.clear()
    if path is None:
        return
    try:
        kernels = ctypes.CDLL(str(path))
    except OSError as error:
        raise BackendUnavailable(f"{path}: {error}; build it again") from error
    _build = Build(BUILT, "as a C library", str(path), kernels)


def choose(operator: str, probe: Callable[[Any], str]) -> Any:
    """The library whose kernel serves an operator on GPUs, None where Triton's does.

    Decided at the first call for an operator and logged then; the same ever after.

    Args:
        operator: name of the operator, as FD_DSA_OP_PROVIDER has it.
        probe: runs the kernel of the library that it is given on small cases; returns what is
            wrong, or "". What it raises is wrong too.

    Raises:
        ConfigError: FD_DSA_OP_PROVIDER cannot be read.
        BackendUnavailable: it asks for the custom operator, which cannot serve.
    """
    chosen = _choices.get(operator)
    if chosen is None:
        chosen = _choices[operator] = _choose(operator, probe)
    return build().kernels if chosen.serves else None


def choices() -> list[Choice]:
    """What was chosen so far, in order of the operators."""
    return [_choices[operator] for operator in sorted(_choices)]


def _choose(operator: str, probe: Callable[[Any], str]) -> Choice:
    """Decide and log."""
    wanted = op_provider(operator)
    if wanted == TRITON:
        choice = Choice(operator, False, "FD_DSA_OP_PROVIDER asks for Triton")
    else:
        wrong = _reason_against(probe)
        choice = Choice(operator, not wrong, wrong or "agrees with the definition")
    if wanted == CUSTOM_OP and not choice.serves:
        raise BackendUnavailable(
            f"FD_DSA_OP_PROVIDER: {operator}=custom_op cannot be had: {choice.reason}; build it "
            "(make custom-ops, or pip install ./custom_ops) or leave the variable out"
        )
    provider = CUSTOM_OP if choice.serves else TRITON
    found = build()
    in_vain = not choice.serves and wanted is None and (found.state == BROKEN or found.kernels)
    level = logging.WARNING if in_vain else logging.INFO
    logger.log(level, "%s on a GPU: %s serves (%s)", operator, provider, choice.reason)
    return choice


def _reason_against(probe: Callable[[Any], str]) -> str:
    """Why the package does not serve an operator; "" where it does."""
    found = build()
    if found.state != BUILT:
        return f"{PACKAGE} is {found.state}: {found.reason}"
    if found.kernels is None:
        return f"{PACKAGE} is built {found.reason}"
    try:
        return probe(found.kernels)
    except Exception as error:
        return f"its probe failed: {type(error).__name__}: {error}"


def _examine() -> Build:
    """Look for the package and import it."""
    try:
        if sys.modules.get(PACKAGE) is None and find_spec(PACKAGE) is None:
            return Build(MISSING, "not installed; make custom-ops, or pip install ./custom_ops")
        package = import_module(PACKAGE)
        path, made = str(package.LIBRARY), package.BUILD
        operators = tuple(package.__all__)
    except Exception as error:
        # a half-made package raises anything
        return Build(BROKEN, _first_line(error))
    if not made["archs"]:
        what = f"for Paddle {made['paddle']} without CUDA kernels"
        return Build(BUILT, what, path, None, operators)
    what = f"for Paddle {made['paddle']} with kernels for {', '.join(made['archs'])}"
    return Build(BUILT, what, path, ctypes.CDLL(path), operators)


def _first_line(error: Exception) -> str:
    """An error in one line, with its type unless that says nothing."""
    said = str(error).strip().partition("\n")[0]
    return said if isinstance(error, ImportError) and said else f"{type(error).__name__}: {said}"
