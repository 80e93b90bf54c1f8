"""Which implementation of an operator serves a tensor: decided once, logged once.

A provider is a module of the operator's folder: `paddle_impl` on a CPU, `triton_kernel` on
any other device. Both hold the operator's function under its public name and arguments. In the
steps of a model two operators have a second kernel, on tensor cores, which takes fewer shapes.
"""

from __future__ import annotations

import logging
from importlib.util import find_spec
from typing import Any

import numpy as np

from fd_dsa.custom_ops import CUSTOM_OP
from fd_dsa.environment import choose_triton_mode
from fd_dsa.errors import BackendUnavailable

logger = logging.getLogger(__name__)

PADDLE, TRITON, TENSOR_CORE = "paddle", "triton", "triton_tensor_core"
_choices: dict[tuple[str, str], str] = {}
# of operators with two Triton kernels: why that on tensor cores does not serve, None if it does
_against: dict[tuple[str, str], str | None] = {}


def device_kind(tensor: Any) -> str:
    """Where a tensor lies: "cpu", or the name of its device without a number.

    Args:
        tensor: a NumPy array, a Paddle tensor, or anything with a `device` that has a `type`.
    """
    if isinstance(tensor, np.ndarray):
        return "cpu"
    place = getattr(tensor, "place", None)
    if place is None:
        return str(tensor.device.type)
    if place.is_cpu_place():
        return "cpu"
    # a custom place prints as Place(name:0)
    return "gpu" if place.is_gpu_place() else str(place).removeprefix("Place(").split(":")[0]


def provider_for(operator: str, tensor: Any) -> str:
    """ "paddle" or "triton": what runs `operator` where `tensor` lies.

    Args:
        operator: name of the operator's folder, for example "cache_write".
        tensor: one of its arguments.

    Raises:
        BackendUnavailable: the tensor lies on a device for which the operator has no kernel.

    Cost: a dictionary look-up after the first call for an operator and kind of device.
    """
    kind = device_kind(tensor)
    chosen = _choices.get((operator, kind))
    return _choose(operator, kind) if chosen is None else chosen


def provider_table() -> dict[str, dict[str, str]]:
    """Choices made so far: operator -> kind of device -> provider."""
    table: dict[str, dict[str, str]] = {}
    kernels = {key: TRITON if reason else TENSOR_CORE for key, reason in _against.items()}
    for (operator, kind), chosen in sorted({**_choices, **kernels}.items()):
        table.setdefault(operator, {})[kind] = chosen
    return table


def settle_kernel(operator: str, kind: str, reason: str | None) -> None:
    """Remember which of two Triton kernels serves the steps of a model, and log it once.

    Args:
        kind: of device, as `device_kind` names it; nothing serves on "cpu".
        reason: why the one on tensor cores does not; None if it does.
    """
    key = operator, kind
    if kind == "cpu" or _against.get(key, "") == reason:
        return
    _against[key] = reason
    if reason is None:
        chosen, why = TENSOR_CORE, provider_reason(TENSOR_CORE)
    else:
        chosen, why = TRITON, f"not {TENSOR_CORE}: {reason}"
    logger.info("%s on %s: %s (%s)", operator, kind, chosen, why)


def kernel_reasons() -> dict[str, dict[str, str]]:
    """Operator -> kind of device -> why no kernel on tensor cores serves the steps of a model."""
    found: dict[str, dict[str, str]] = {}
    for (operator, kind), reason in sorted(_against.items()):
        if reason is not None:
            found.setdefault(operator, {})[kind] = reason
    return found


def provider_reason(provider: str) -> str:
    """Why a provider serves where it does, in words."""
    if provider == PADDLE:
        return "a CPU: NumPy, and products by Paddle"
    if provider == CUSTOM_OP:
        return "a GPU, and agrees with the definition"
    # asked here, not at import: a process that stays on the CPU decides nothing about Triton
    kernel = f"{'an interpreted' if choose_triton_mode() else 'a compiled'} Triton kernel"
    return f"a device, {kernel}{' for tensor cores' if provider == TENSOR_CORE else ''}"


def _choose(operator: str, kind: str) -> str:
    """Decide, log and remember."""
    chosen = PADDLE if kind == "cpu" else TRITON
    if chosen == TRITON and find_spec(f"fd_dsa.ops.{operator}.triton_kernel") is None:
        raise BackendUnavailable(
            f"{operator}: no kernel for tensors on {kind!r}; it runs on CPU tensors"
        )
    logger.info("%s on %s: %s (%s)", operator, kind, chosen, provider_reason(chosen))
    _choices[operator, kind] = chosen
    return chosen
