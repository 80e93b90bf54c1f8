"""Whether fd_dsa_ops is built, what it serves, and whether its operators agree with definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fd_dsa import custom_ops
from fd_dsa.doctor.case import CheckFailed, Memory, require
from fd_dsa.environment import OP_PROVIDERS

Put = Callable[[np.ndarray], Any]
Operator = Callable[..., Any]
# encoder, decoder and new lengths: a prompt behind a cached prefix, a decode row, an idle one
_LENGTHS = ([3, 0, 0], [2, 4, 0], [3, 1, 0])


def position_ids(operator: Operator, put: Put) -> None:
    """Positions of a small step, and what is after them."""
    positions = put(np.full(6, -7, np.int32))
    operator(*(put(np.array(values, np.int32)) for values in _LENGTHS), positions)
    found = positions.tolist()
    require(found == [2, 3, 4, 4, -7, -7], f"positions are {found}, not 2, 3, 4, 4 and the rest")


CHECKS: dict[str, Callable[[Operator, Put], None]] = {
    "get_position_ids_and_mask_encoder_batch": position_ids,
}


def facts(device: str) -> dict[str, Any]:
    """`state` ("built", "missing" or "broken"), `reason`, `path`, `serves` and `checks`.

    Args:
        device: where operators are checked beside the CPU.

    Returns:
        Plain JSON values. `serves`: operator -> `provider` and `reason` on a GPU, both "" where
        nothing was chosen; `checks`: `name`, `device`, `passed`, `detail` of each operator and
        place for which the package is built.
    """
    found = custom_ops.build()
    chosen = {choice.operator: choice for choice in custom_ops.choices()}
    places = ["cpu"] + [device] * (device != "cpu" and found.kernels is not None)
    return {
        "state": found.state,
        "reason": found.reason,
        "path": found.path,
        "serves": {operator: _choice(chosen.get(operator)) for operator in OP_PROVIDERS},
        "checks": [
            _checked(name, place) for name in CHECKS if name in found.operators for place in places
        ],
    }


def _choice(choice: custom_ops.Choice | None) -> dict[str, str]:
    """What serves an operator on GPUs, and why."""
    if choice is None:
        return {"provider": "", "reason": ""}
    provider = custom_ops.CUSTOM_OP if choice.serves else custom_ops.TRITON
    return {"provider": provider, "reason": choice.reason}


def _checked(name: str, device: str) -> dict[str, Any]:
    """The finding for one operator in one place; whatever its check raises is that."""
    import paddle

    memory = Memory(device)
    put = paddle.to_tensor if memory.on_host else memory.put
    detail = ""
    try:
        CHECKS[name](getattr(custom_ops.package(), name), put)
    except Exception as error:
        kind = "" if isinstance(error, CheckFailed) else f"{type(error).__name__}: "
        detail = kind + str(error).strip().partition("\n")[0]
    return {"name": name, "device": device, "passed": not detail, "detail": detail}


def is_healthy(found: dict[str, Any]) -> bool:
    """Whether the package is absent, or whole and right."""
    return found["state"] != custom_ops.BROKEN and all(c["passed"] for c in found["checks"])


def as_lines(found: dict[str, Any]) -> list[str]:
    """The facts for a person."""
    mark = "BROKEN" if found["state"] == custom_ops.BROKEN else found["state"]
    path = f" ({found['path']})" if found["path"] else ""
    lines = [f"custom ops {mark}: {found['reason']}{path}"]
    for check in found["checks"]:
        said = "ok" if check["passed"] else f"FAILED: {check['detail']}"
        lines.append(f"           {check['name']} on {check['device']}: {said}")
    for operator, choice in found["serves"].items():
        if choice["provider"]:
            served = f"{operator} on a GPU: {choice['provider']} serves ({choice['reason']})"
            lines.append(f"           {served}")
    return lines
