"""Which implementation of an operator serves where its tensors are, and why not a faster one.

`OPERATORS` is the table: operator -> provider -> function, the fastest provider first. The first
one that can serve does, unless FD_DSA_OP_PROVIDER asks for another. A choice is logged once.
"""

from __future__ import annotations

import ctypes
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from types import MappingProxyType
from typing import Any

import numpy as np

from fd_dsa import custom_ops
from fd_dsa.environment import choose_triton_mode, variable
from fd_dsa.errors import BackendUnavailable, ConfigError, KernelUnavailable
from fd_dsa.tensor import Array

logger = logging.getLogger(__name__)

PADDLE, TRITON, TENSOR_CORE, CUSTOM_OP = "paddle", "triton", "triton_tensor_core", "custom_op"
GEMM = "gemm"
VARIABLE = "FD_DSA_OP_PROVIDER"

# functions of one operator take the same arguments
OPERATORS: dict[str, dict[str, str]] = {
    "step_metadata": {
        PADDLE: "step.builder.StepMetadataBuilder",
        TRITON: "step.builder.StepMetadataBuilder",
    },
    "position_ids": {
        CUSTOM_OP: "ops.positions.registered_position_ids",
        PADDLE: "ops.positions.position_ids_on_host",
        TRITON: "ops.positions_kernel.position_ids",
    },
    "indexer_projection": {
        PADDLE: "ops.indexer_projection.project_on_host",
        TRITON: "ops.indexer_projection.triton_kernel.project_indexer",
        GEMM: "ops.indexer_projection.gemms.project_by_gemms",
    },
    "cache_write": {
        PADDLE: "ops.cache_write.paddle_impl.write_caches",
        TRITON: "ops.cache_write.triton_kernel.write_caches",
    },
    "indexer_query": {
        PADDLE: "ops.query.prepare_on_host",
        TRITON: "ops.query.triton_kernel.prepare_indexer_query",
    },
    "indexer_logits": {
        TENSOR_CORE: "ops.logits.tile_kernel.score_step",
        PADDLE: "ops.logits.paddle_impl.score_step",
        TRITON: "ops.logits.triton_kernel.score_pages",
    },
    "topk": {
        CUSTOM_OP: "ops.topk.custom_op.select_slots",
        PADDLE: "ops.topk.paddle_impl.select_slots",
        TRITON: "ops.topk.triton_kernel.select_slots",
    },
    "mla_query": {
        PADDLE: "ops.mla_query.prepare_on_host",
        TRITON: "ops.mla_query.triton_kernel.prepare_mla_query",
    },
    "sparse_mla": {
        CUSTOM_OP: "ops.mla.custom_op.attend_slots",
        TENSOR_CORE: "ops.mla.tensor_core.attend_slots",
        PADDLE: "ops.mla.paddle_impl.attend_slots",
        TRITON: "ops.mla.triton_kernel.attend_slots",
    },
    "dequantize": {
        PADDLE: "ops.mla.paddle_impl.dequantize",
        TRITON: "ops.mla.triton_kernel.dequantize",
    },
}


@dataclass(frozen=True, slots=True)
class Choice:
    """What serves an operator on one kind of device.

    Attributes:
        provider: a key of `OPERATORS[operator]`.
        reason: why it serves.
        against: faster provider -> why it does not.
    """

    provider: str
    reason: str
    against: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        refused = (f"not {provider}: {reason}" for provider, reason in self.against.items())
        return f"{self.provider} ({'; '.join([self.reason, *refused])})"


_choices: dict[tuple[str, str], Choice] = {}
# (operator, kind of device, provider) -> why it was refused, until `asking_for` ends
_refused: dict[tuple[str, str, str], str] = {}
_asked: dict[str, str] | None = None


def device_kind(tensor: Any) -> str:
    """Where a tensor is: "cpu", or the name of its device without a number.

    Args:
        tensor: a NumPy array, a Paddle tensor, or anything with a `device` that has a `type`.
    """
    if isinstance(tensor, np.ndarray):
        return "cpu"
    if getattr(tensor, "place", None) is None:
        return str(tensor.device.type)
    return "cpu" if tensor.place.is_cpu_place() else device_name(tensor).partition(":")[0]


def device_name(tensor: Any) -> str:
    """Where a Paddle tensor is: "cpu", "gpu:0" or "name:0"."""
    # a place prints as Place(name:0)
    return str(tensor.place).removeprefix("Place(").removesuffix(")")


def activation_dtypes(tensor: Array) -> tuple[str, ...]:
    """Dtypes of activations that operators take where `tensor` is; NumPy has no bfloat16."""
    return ("float32",) if device_kind(tensor) == "cpu" else ("float32", "bfloat16")


def function(operator: str, provider: str) -> Callable[..., Any]:
    """The function of a provider; its module is imported by the first call."""
    return getattr(*_place(operator, provider))


@cache
def _place(operator: str, provider: str) -> tuple[Any, str]:
    """Module and name of a provider's function."""
    module, _, name = OPERATORS[operator][provider].rpartition(".")
    return import_module(f"fd_dsa.{module}"), name


def serving(operator: str, tensor: Array) -> Callable[..., Any]:
    """The function that serves an operator where `tensor` is; for operators without conditions.

    It checks nothing: the layers of the engine call it with what they made themselves.

    Raises:
        ConfigError, BackendUnavailable: see `choose`.

    Cost: two dictionary look-ups after the first call for a kind of device.
    """
    return function(operator, provider_of(operator, tensor))


def provider_of(operator: str, tensor: Array) -> str:
    """Name of the provider that `serving` gives; the same errors and cost."""
    kind = device_kind(tensor)
    return (_choices.get((operator, kind)) or choose(operator, kind)).provider


def refuse(operator: str, kind: str, provider: str, error: KernelUnavailable) -> None:
    """Serve an operator by another provider from now on; the next `choose` logs a warning.

    Args:
        kind: of device, as `device_kind` names it.
        provider: the one whose kernel cannot be compiled.

    Raises:
        KernelUnavailable: `error`, if no other provider may serve: FD_DSA_OP_PROVIDER asks for
            this one, or it is the last one.
    """
    others = [other for other in on(operator, kind) if other != provider]
    left = [other for other in others if (operator, kind, other) not in _refused]
    if requested().get(operator) == provider or not left:
        raise error
    _refused[operator, kind, provider] = str(error)
    _choices.pop((operator, kind), None)


def call(
    operator: str, kind: str, provider: Callable[[], str], *arguments: object, **options: object
) -> Any:
    """Call the function that serves; of the next provider if a kernel cannot be compiled.

    Args:
        kind: of device, as `device_kind` names it.
        provider: chooses; asked again after a refusal.
        arguments, options: of the function.

    Raises:
        KernelUnavailable: see `refuse`.
    """
    while True:
        chosen = provider()
        try:
            return function(operator, chosen)(*arguments, **options)
        except KernelUnavailable as error:
            refuse(operator, kind, chosen, error)


def is_refused(operator: str, kind: str, provider: str) -> bool:
    """True if `refuse` was called for a provider."""
    return (operator, kind, provider) in _refused


def choose(
    operator: str,
    kind: str,
    conditions: Mapping[str, str | None] = MappingProxyType({}),
    probe: Callable[[ctypes.CDLL], str] | None = None,
) -> Choice:
    """The provider that serves; remembered for `table`, and logged where it is new.

    Args:
        kind: of device, as `device_kind` names it.
        conditions: provider -> why it cannot serve these shapes, types and this GPU; None or "" if
            it can.
        probe: runs the kernel of the library that it is given on small cases; returns what is
            wrong, or "". None: nothing of the library needs to agree first.

    Raises:
        ConfigError: FD_DSA_OP_PROVIDER cannot be read.
        BackendUnavailable: it asks for a provider that cannot serve.
    """
    choice, level, is_new = _decide(operator, kind, conditions, probe)
    if is_new:
        logger.log(level, "%s on %s: %s", operator, kind, choice)
    return choice


def _decide(
    operator: str,
    kind: str,
    conditions: Mapping[str, str | None] = MappingProxyType({}),
    probe: Callable[[ctypes.CDLL], str] | None = None,
) -> tuple[Choice, int, bool]:
    """Choose as `choose` does, without a line in the log.

    Returns:
        The choice, the level of its line, and False if the log has the line already.
    """
    asked, against, level = requested().get(operator), {}, logging.INFO
    for provider in [asked] if asked else on(operator, kind):
        reason = conditions.get(provider)
        if not reason and is_refused(operator, kind, provider):
            reason, level = _refused[operator, kind, provider], logging.WARNING
        if provider not in on(operator, kind):
            reason = f"it serves tensors on {'a CPU' if provider == PADDLE else 'a device'}"
        if not reason and provider == CUSTOM_OP:
            reason, is_fault = why_not_library(operator, kind, probe)
            level = logging.WARNING if is_fault else level
        if reason:
            against[provider] = reason
            continue
        choice = Choice(provider, reason_for(provider), against)
        is_new = _choices.get((operator, kind)) != choice
        _choices[operator, kind] = choice
        return choice, level, is_new
    raise BackendUnavailable(
        f"{VARIABLE}: {operator}={asked} cannot serve on {kind}: {', '.join(against.values())}"
    )


def settle(kind: str) -> None:
    """Choose for all operators without conditions, when an attention is made.

    The log gets one line for all operators that are served alike.

    Raises:
        ConfigError, BackendUnavailable: see `choose`.
    """
    alike: dict[tuple[int, str], list[str]] = {}
    for operator in OPERATORS:
        if not {CUSTOM_OP, TENSOR_CORE} & set(on(operator, kind)):
            choice, level, is_new = _decide(operator, kind)
            if is_new:
                alike.setdefault((level, str(choice)), []).append(operator)
    for (level, choice_text), operators in alike.items():
        logger.log(level, "%s on %s: %s", ", ".join(operators), kind, choice_text)


def table() -> dict[str, dict[str, Choice]]:
    """Choices made so far: operator -> kind of device -> Choice."""
    by_operator: dict[str, dict[str, Choice]] = {}
    for (operator, kind), choice in sorted(_choices.items()):
        by_operator.setdefault(operator, {})[kind] = choice
    return by_operator


def forget() -> None:
    """Forget what was chosen, where another library of custom_ops/ is taken."""
    _choices.clear()


@contextmanager
def asking_for(asked: Mapping[str, str]) -> Iterator[None]:
    """Choose again inside: by these pairs, or without pairs by FD_DSA_OP_PROVIDER.

    Choices and refusals end with it. Refusals of before hold again after it.
    """
    global _asked, _refused
    before = _asked, _refused
    _asked, _refused = dict(asked) or None, {}
    forget()
    try:
        yield
    finally:
        _asked, _refused = before
        forget()


def requested() -> dict[str, str]:
    """Operator -> provider that `asking_for` or FD_DSA_OP_PROVIDER asks for.

    Raises:
        ConfigError: a pair of another form, an unknown operator, or a provider that it has not.
    """
    if _asked is not None:
        return _asked
    text = variable(VARIABLE)
    return parse(text.split(","), VARIABLE, text) if text else {}


def parse(pairs: Iterable[str], source: str, text: str) -> dict[str, str]:
    """Operator -> provider of pairs such as `topk=triton`; empty ones do not count.

    Args:
        source: name of the variable or flag, for errors.
        text: what the user wrote, likewise.

    Raises:
        ConfigError: as of `requested`.
    """
    asked = {}
    for pair in filter(None, map(str.strip, pairs)):
        operator, _, provider = pair.partition("=")
        if provider not in OPERATORS.get(operator, ()):
            known = {operator: OPERATORS[operator]} if operator in OPERATORS else OPERATORS
            allowed = ", ".join(f"{op}={p}" for op, served in known.items() for p in served)
            raise ConfigError(
                f"{source}: got {pair!r} in {text!r}, allowed: {allowed}, separated by commas"
            )
        asked[operator] = provider
    return asked


def reason_for(provider: str) -> str:
    """Why a provider serves where it does, in words."""
    if provider == PADDLE:
        return "CPU: NumPy; GEMMs by oneDNN or Paddle"
    if provider == GEMM:
        return "a device, Paddle's GEMMs"
    if provider == CUSTOM_OP:
        return "of fd_dsa_ops, agrees with the definition"
    # asked here, not at import: a process that stays on the CPU decides nothing about Triton
    kernel = f"{'an interpreted' if choose_triton_mode() else 'a compiled'} Triton kernel"
    return f"a device, {kernel}{' for tensor cores' if provider == TENSOR_CORE else ''}"


def on(operator: str, kind: str) -> list[str]:
    """Providers of an operator for tensors on a kind of device, the fastest first."""
    on_host = (PADDLE, CUSTOM_OP) if operator == "position_ids" else (PADDLE,)
    names = OPERATORS[operator]
    return [p for p in names if (p in on_host if kind == "cpu" else p != PADDLE)]


def why_not_library(
    operator: str, kind: str, probe: Callable[[ctypes.CDLL], str] | None = None
) -> tuple[str, bool]:
    """Why fd_dsa_ops does not serve, "" if it does; and whether something is wrong with it."""
    build = custom_ops.build()
    if build.state != custom_ops.BUILT:
        return f"{custom_ops.PACKAGE} is {build.state}: {build.reason}", (
            build.state == custom_ops.BROKEN
        )
    if operator == "position_ids" and not build.operators:
        return f"{custom_ops.PACKAGE} is built {build.reason}, without Paddle's operators", False
    if build.kernels is None and kind != "cpu":
        return f"{custom_ops.PACKAGE} is built {build.reason}", False
    try:
        reason = probe(build.kernels) if probe else ""
    except Exception as error:
        reason = f"its probe failed: {type(error).__name__}: {error}"
    return reason, bool(reason)
