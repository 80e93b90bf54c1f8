"""Whether fd_dsa_ops is built, what it serves, and whether its operators agree with definitions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from fd_dsa import custom_ops
from fd_dsa.doctor.case import CheckFailed, Memory, require
from fd_dsa.doctor.self_check import is_step_metadata
from fd_dsa.environment import OP_PROVIDERS

Put = Callable[[np.ndarray], Any]
Operator = Callable[..., Any]
# encoder, decoder and new lengths: a prompt behind a cached prefix, a decode row, an idle one
_LENGTHS = ([3, 0, 0], [2, 4, 0], [3, 1, 0])


def step_metadata(operator: Operator, put: Put) -> None:
    """The step of the doctor's own check, by the operator."""
    tables = np.random.default_rng(1).permutation(12).astype(np.int32).reshape(3, 4)
    sizes = {"batch_id_per_token": 4, "cu_seqlens_q": 4, "cache_seqlens": 3, "cu_seqlens_kg": 4}
    sizes |= {"position_ids": 4, "slot_mapping": 4, "indexer_attn_mask_offsets": 8}
    wide = ("position_ids", "slot_mapping")
    out = {n: put(np.full(s, -7, np.int64 if n in wide else np.int32)) for n, s in sizes.items()}
    lengths = [put(np.array(values, np.int32)) for values in _LENGTHS]
    operator(*lengths, put(tables), **out, block_size=2, num_blocks=16)
    is_step_metadata({"tables": tables} | {name: array.numpy() for name, array in out.items()})


def position_ids(operator: Operator, put: Put) -> None:
    """Positions of that step, and what lies behind them."""
    positions = put(np.full(6, -7, np.int32))
    operator(*(put(np.array(values, np.int32)) for values in _LENGTHS), positions)
    found = positions.tolist()
    require(found == [2, 3, 4, 4, -7, -7], f"positions are {found}, not 2, 3, 4, 4 and the rest")


def topk(operator: Operator, put: Put) -> None:
    """Ties to the lower position, NaN below every number, -1 behind a short row."""
    scores = np.array([[1, 5, 5, np.nan], [-0.0, 0, 7, 3], [2, 1, 9, 9]], np.float32)
    chosen = put(np.full((3, 2), -7, np.int32))
    operator(put(scores), put(np.array([4, 3, 1], np.int32)), chosen)
    found = chosen.tolist()
    wanted = [[1, 2], [0, 2], [0, -1]]
    require(found == wanted, f"positions are {found}, not {wanted}")


def topk_slots(operator: Operator, put: Put) -> None:
    """The same choice as slots of a cache whose blocks are shuffled; a padded token has none."""
    scores = np.array([[1, 5, 5, 0], [4, 0, 7, 3], [9, 9, 9, 9]], np.float32)
    positions, rows = np.array([3, 2, 0], np.int64), np.array([0, 1, -1], np.int32)
    tables = np.array([[4, 1], [0, 3]], np.int32)
    chosen = put(np.full((3, 2), -7, np.int32))
    inputs = (put(array) for array in (scores, positions, rows, tables))
    numbers = {"block_size": 2, "num_blocks": 5, "first_token": 0, "num_rows": -1}
    operator(*inputs, slots=chosen, **numbers)
    found = chosen.tolist()
    wanted = [[9, 2], [0, 6], [-1, -1]]
    require(found == wanted, f"slots are {found}, not {wanted}")


CHECKS: dict[str, Callable[[Operator, Put], None]] = {
    "fd_dsa_step_metadata": step_metadata,
    "get_position_ids_and_mask_encoder_batch": position_ids,
    "fd_dsa_topk": topk,
    "fd_dsa_topk_slots": topk_slots,
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
