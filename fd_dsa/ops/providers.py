"""Selection of the implementation ("provider") of each operator, by the device of its tensors.

`OPERATORS` is the table: operator -> provider -> function, the fastest provider first. The first
supported provider is selected, unless FD_DSA_OP_PROVIDER names another one. Each selection is
logged once, with the reason against every faster provider.
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
from fd_dsa.errors import BackendUnavailable, ConfigError, KernelUnavailable, shorten
from fd_dsa.tensor import Array

logger = logging.getLogger(__name__)

NUMPY, TRITON, TENSOR_CORE, CUSTOM_OP = "numpy", "triton", "triton_tensor_core", "custom_op"
GEMM = "gemm"
# names that FD_DSA_OP_PROVIDER also accepts
_FORMER_NAMES = {"paddle": NUMPY}
VARIABLE = "FD_DSA_OP_PROVIDER"

# all functions of an operator have the same arguments
OPERATORS: dict[str, dict[str, str]] = {
    "step_metadata": {
        NUMPY: "step.builder.StepMetadataBuilder",
        TRITON: "step.builder.StepMetadataBuilder",
    },
    "position_ids": {
        CUSTOM_OP: "ops.positions.registered_position_ids",
        NUMPY: "ops.positions.position_ids_on_host",
        TRITON: "ops.positions_kernel.position_ids",
    },
    "indexer_projection": {
        NUMPY: "ops.indexer_projection.project_on_host",
        TRITON: "ops.indexer_projection.triton_kernel.project_indexer",
        GEMM: "ops.indexer_projection.project_by_gemms",
    },
    "cache_write": {
        NUMPY: "ops.cache_write.write_on_host",
        TRITON: "ops.cache_write.triton_kernel.write_caches",
    },
    "indexer_query": {
        NUMPY: "ops.query.prepare_on_host",
        TRITON: "ops.query_kernels.prepare_indexer_query",
    },
    "indexer_logits": {
        TENSOR_CORE: "ops.logits.tile_kernel.score_step",
        NUMPY: "ops.logits.host_scores.score_step",
        TRITON: "ops.logits.triton_kernel.score_pages",
    },
    "topk": {
        CUSTOM_OP: "ops.topk.custom_op.select_slots",
        NUMPY: "ops.topk.select_on_host",
        TRITON: "ops.topk.triton_kernel.select_slots",
    },
    "mla_query": {
        NUMPY: "ops.mla_query.prepare_on_host",
        TRITON: "ops.query_kernels.prepare_mla_query",
    },
    "sparse_mla": {
        CUSTOM_OP: "ops.mla.custom_op.attend_slots",
        TENSOR_CORE: "ops.mla.tensor_core.attend_slots",
        NUMPY: "ops.mla.attend_on_host",
        TRITON: "ops.mla.triton_kernel.attend_slots",
    },
    "dequantize": {
        NUMPY: "ops.mla.dequantize_on_host",
        TRITON: "ops.mla.triton_kernel.dequantize",
    },
}


@dataclass(frozen=True, slots=True)
class SelectedProvider:
    """Selected provider of an operator on one kind of device.

    Attributes:
        provider: a key of `OPERATORS[operator]`.
        reason: description of the provider.
        rejected: faster provider -> reason against it.
    """

    provider: str
    reason: str
    rejected: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        refused = (f"not {provider}: {reason}" for provider, reason in self.rejected.items())
        return f"{self.provider} ({'; '.join([self.reason, *refused])})"


_selected: dict[tuple[str, str], SelectedProvider] = {}
# (operator, kind of device, provider) -> reason of the refusal, until `asking_for` ends
_refused: dict[tuple[str, str, str], str] = {}
_asked: dict[str, str] | None = None


def device_kind(tensor: Any) -> str:
    """Return the kind of device of a tensor: "cpu", or the device's name without a number.

    Args:
        tensor: a NumPy array, a Paddle tensor, or an object with a `device.type`.
    """
    if isinstance(tensor, np.ndarray):
        return "cpu"
    if getattr(tensor, "place", None) is None:
        return str(tensor.device.type)
    return "cpu" if tensor.place.is_cpu_place() else device_name(tensor).partition(":")[0]


def device_name(tensor: Any) -> str:
    """Return the device of a Paddle tensor: "cpu", "gpu:0" or "name:0"."""
    # str() of a place is Place(name:0)
    return str(tensor.place).removeprefix("Place(").removesuffix(")")


def activation_dtypes(tensor: Array) -> tuple[str, ...]:
    """Return the dtypes of activations that operators support on the device of `tensor`.

    NumPy has no bfloat16, so a CPU supports float32 only.
    """
    return ("float32",) if device_kind(tensor) == "cpu" else ("float32", "bfloat16")


def function(operator: str, provider: str) -> Callable[..., Any]:
    """Return the function of a provider. The first call imports its module."""
    return getattr(*_place(operator, provider))


@cache
def _place(operator: str, provider: str) -> tuple[Any, str]:
    """Return the module of a provider's function, and its name there."""
    module, _, name = OPERATORS[operator][provider].rpartition(".")
    return import_module(f"fd_dsa.{module}"), name


def selected_function(operator: str, tensor: Array) -> Callable[..., Any]:
    """Return the selected function of an operator for the device of `tensor`.

    The operator must be one without conditions, see `select_provider`. The function checks no
    arguments, because layers of the engine pass arrays that they made.

    Raises:
        ConfigError, BackendUnavailable: see `select_provider`.

    Cost: two dictionary look-ups after the first call for a kind of device.
    """
    kind = device_kind(tensor)
    selected = _selected.get((operator, kind)) or select_provider(operator, kind)
    return function(operator, selected.provider)


def refuse(operator: str, kind: str, provider: str, error: KernelUnavailable) -> None:
    """Exclude a provider whose kernel cannot be compiled. The next selection logs a warning.

    Args:
        kind: kind of device, as `device_kind` names it.
        provider: the provider.
        error: the compilation's error.

    Raises:
        KernelUnavailable: `error`, if FD_DSA_OP_PROVIDER names this provider, or if it is the last
            one.
    """
    others = [other for other in available_providers(operator, kind) if other != provider]
    left = [other for other in others if (operator, kind, other) not in _refused]
    if requested().get(operator) == provider or not left:
        raise error
    _refused[operator, kind, provider] = str(error)
    _selected.pop((operator, kind), None)


def call(
    operator: str, kind: str, provider: Callable[[], str], *arguments: object, **options: object
) -> Any:
    """Call the selected function, or the next provider's if a kernel cannot be compiled.

    Args:
        kind: kind of device, as `device_kind` names it.
        provider: selects the provider, also once more after a refusal.
        arguments, options: arguments of the function.

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
    """Return whether `refuse` was called for a provider."""
    return (operator, kind, provider) in _refused


def select_provider(
    operator: str,
    kind: str,
    conditions: Mapping[str, str | None] = MappingProxyType({}),
    probe: Callable[[ctypes.CDLL], str] | None = None,
) -> SelectedProvider:
    """Select a provider, keep it for `table`, and log it if it is new.

    Args:
        kind: kind of device, as `device_kind` names it.
        conditions: provider -> reason why it does not support these shapes, dtypes or this GPU;
            None or "" = supported.
        probe: runs the kernel of a library on small cases and returns the fault, or "". None = the
            library needs no check.

    Raises:
        ConfigError: FD_DSA_OP_PROVIDER has an invalid value.
        BackendUnavailable: FD_DSA_OP_PROVIDER names a provider that cannot serve.
    """
    selected, level, is_new = _select(operator, kind, conditions, probe)
    if is_new:
        logger.log(level, "%s on %s: %s", operator, kind, selected)
    return selected


def _select(
    operator: str,
    kind: str,
    conditions: Mapping[str, str | None] = MappingProxyType({}),
    probe: Callable[[ctypes.CDLL], str] | None = None,
) -> tuple[SelectedProvider, int, bool]:
    """Select as `select_provider`, without a log line.

    Returns:
        The selection, the level of its log line, and whether the selection is new.
    """
    asked, rejected, level = requested().get(operator), {}, logging.INFO
    for provider in [asked] if asked else available_providers(operator, kind):
        reason = conditions.get(provider)
        if not reason and is_refused(operator, kind, provider):
            reason, level = _refused[operator, kind, provider], logging.WARNING
        if provider not in available_providers(operator, kind):
            reason = f"it serves tensors on {'a CPU' if provider == NUMPY else 'a device'}"
        if not reason and provider == CUSTOM_OP:
            reason, is_fault = library_refusal(operator, kind, probe)
            level = logging.WARNING if is_fault else level
        if reason:
            rejected[provider] = reason
            continue
        selected = SelectedProvider(provider, reason_for(provider), rejected)
        is_new = _selected.get((operator, kind)) != selected
        _selected[operator, kind] = selected
        return selected, level, is_new
    raise BackendUnavailable(
        f"{VARIABLE}: {operator}={asked} cannot serve on {kind}: {', '.join(rejected.values())}"
    )


def unconditional(kind: str) -> list[str]:
    """Return the operators whose provider depends only on the kind of device."""
    providers = {operator: {*available_providers(operator, kind)} for operator in OPERATORS}
    return [one for one, all_ in providers.items() if not all_ & {CUSTOM_OP, TENSOR_CORE}]


def select_all(kind: str) -> None:
    """Select the providers of all operators without conditions, when an attention is made.

    Operators with the same provider and reason share a log line.

    Raises:
        ConfigError, BackendUnavailable: see `select_provider`.
    """
    alike: dict[tuple[int, str], list[str]] = {}
    for operator in unconditional(kind):
        selected, level, is_new = _select(operator, kind)
        if is_new:
            alike.setdefault((level, str(selected)), []).append(operator)
    for (level, text), operators in alike.items():
        logger.log(level, "%s on %s: %s", ", ".join(operators), kind, text)


def table() -> dict[str, dict[str, SelectedProvider]]:
    """Return the selections made so far: operator -> kind of device -> provider."""
    by_operator: dict[str, dict[str, SelectedProvider]] = {}
    for (operator, kind), selected in sorted(_selected.items()):
        by_operator.setdefault(operator, {})[kind] = selected
    return by_operator


def drop_selections() -> None:
    """Drop all selections, because another library of custom_ops/ is loaded."""
    _selected.clear()


@contextmanager
def asking_for(asked: Mapping[str, str]) -> Iterator[None]:
    """Select again inside the context, by these pairs, or without pairs by FD_DSA_OP_PROVIDER.

    Selections and refusals of the context end with it. Earlier refusals then apply again.
    """
    global _asked, _refused
    before = _asked, _refused
    _asked, _refused = dict(asked) or None, {}
    drop_selections()
    try:
        yield
    finally:
        _asked, _refused = before
        drop_selections()


def requested() -> dict[str, str]:
    """Return operator -> provider as `asking_for` or FD_DSA_OP_PROVIDER names them.

    Raises:
        ConfigError: a pair has another form, or names an unknown operator or provider.
    """
    if _asked is not None:
        return _asked
    text = variable(VARIABLE)
    return parse(text.split(","), VARIABLE, text) if text else {}


def parse(pairs: Iterable[str], source: str, text: str) -> dict[str, str]:
    """Return operator -> provider of pairs such as `topk=triton`.

    Args:
        pairs: pairs as text. Empty ones are ignored.
        source: name of the variable or flag, for errors.
        text: text of the user, for errors.

    Raises:
        ConfigError: see `requested`.
    """
    asked = {}
    for pair in filter(None, map(str.strip, pairs)):
        operator, _, provider = pair.partition("=")
        provider = _FORMER_NAMES.get(provider, provider)
        if provider not in OPERATORS.get(operator, ()):
            known = {operator: OPERATORS[operator]} if operator in OPERATORS else OPERATORS
            allowed = ", ".join(f"{op}={p}" for op, served in known.items() for p in served)
            raise ConfigError(
                f"{source}: got {shorten(pair)} in {shorten(text)}, allowed: {allowed}, separated "
                "by commas"
            )
        asked[operator] = provider
    return asked


def reason_for(provider: str) -> str:
    """Return the description of a provider."""
    if provider == NUMPY:
        return "CPU: NumPy; GEMMs by oneDNN or Paddle"
    if provider == GEMM:
        return "a device, Paddle's GEMMs"
    if provider == CUSTOM_OP:
        return "of fd_dsa_ops, agrees with the definition"
    # not at import, so that a process on a CPU does not decide about Triton
    kernel = f"{'an interpreted' if choose_triton_mode() else 'a compiled'} Triton kernel"
    return f"a device, {kernel}{' for tensor cores' if provider == TENSOR_CORE else ''}"


def available_providers(operator: str, kind: str) -> list[str]:
    """Return the providers of an operator for a kind of device, the fastest first."""
    on_host = (NUMPY, CUSTOM_OP) if operator == "position_ids" else (NUMPY,)
    return [p for p in OPERATORS[operator] if (p in on_host if kind == "cpu" else p != NUMPY)]


def library_refusal(
    operator: str, kind: str, probe: Callable[[ctypes.CDLL], str] | None = None
) -> tuple[str, bool]:
    """Return the reason why fd_dsa_ops cannot serve an operator, or "", and whether it is broken.

    Args:
        operator, kind, probe: see `select_provider`.
    """
    build = custom_ops.build()
    if build.state != custom_ops.BUILT:
        is_broken = build.state == custom_ops.BROKEN
        return f"{custom_ops.PACKAGE} is {build.state}: {build.reason}", is_broken
    if operator == "position_ids" and not build.operators:
        return f"{custom_ops.PACKAGE} is built {build.reason}, without Paddle's operators", False
    if build.kernels is None and kind != "cpu":
        return f"{custom_ops.PACKAGE} is built {build.reason}", False
    try:
        reason = probe(build.kernels) if probe else ""
    except Exception as error:
        reason = f"its probe failed: {type(error).__name__}: {error}"
    return reason, bool(reason)
