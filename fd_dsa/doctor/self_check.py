"""Small random cases of every operator, on a CPU and on a device, against their definitions.

The definitions are written again here, in float64 and without the package's arithmetic.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from fd_dsa import custom_ops
from fd_dsa.doctor import attention_checks as attention
from fd_dsa.doctor import projection_checks as projection
from fd_dsa.doctor import write_checks as write
from fd_dsa.doctor.case import Check, CheckFailed, Memory, Outputs, require
from fd_dsa.ops._provider import PADDLE, TRITON, provider_reason, provider_table
from fd_dsa.step import StepMetadataBuilder


def step_metadata(memory: Memory) -> Outputs:
    """A prefill row behind a cached prefix, a decode row and an idle one."""
    device = "numpy" if memory.on_host else memory.device
    builder = StepMetadataBuilder(4, 16, 4, 2, num_blocks=16, device=device)
    lens = [np.array(x, np.int32) for x in ([3, 0, 0], [2, 4, 0], [3, 1, 0])]
    tables = np.random.default_rng(1).permutation(12).astype(np.int32).reshape(3, 4)
    meta = builder.build(*lens, tables)
    names = ("batch_id_per_token", "position_ids", "slot_mapping", "cu_seqlens_q", "cache_seqlens")
    names += ("cu_seqlens_kg", "indexer_attn_mask_offsets")
    return {"tables": tables} | {name: memory.get(getattr(meta, name)) for name in names}


def is_step_metadata(out: Outputs) -> None:
    """The numbers of that step, worked by hand."""
    wanted = {
        "batch_id_per_token": [0, 0, 0, 1],
        "position_ids": [2, 3, 4, 4],
        "cu_seqlens_q": [0, 3, 4, 4],
        "cache_seqlens": [0, 5, 0],
        "cu_seqlens_kg": [0, 5, 6, 6],
        "indexer_attn_mask_offsets": [0, 3, 0, 4, 0, 5, 0, 0],
    }
    for name, values in wanted.items():
        require(out[name].tolist() == values, f"{name} is {out[name].tolist()}, not {values}")
    rows, positions = wanted["batch_id_per_token"], wanted["position_ids"]
    tables = out["tables"]
    slots = [2 * tables[b, p // 2] + p % 2 for b, p in zip(rows, positions, strict=True)]
    require(out["slot_mapping"] == slots, f"slot_mapping is {out['slot_mapping']}, not {slots}")


CHECKS = {
    "step_metadata": Check(step_metadata, is_step_metadata),
    "indexer_projection": Check(
        projection.indexer_projection, projection.is_indexer_projection, same_bytes=False
    ),
    "cache_write": Check(write.cache_write, write.is_cache_write),
    "indexer_query": Check(write.indexer_query, write.is_indexer_query),
    "indexer_logits": Check(attention.logits, attention.is_logits, same_bytes=False),
    "topk": Check(attention.topk, attention.is_topk),
    "mla_query": Check(projection.mla_query, projection.is_mla_query),
    "sparse_mla": Check(attention.mla, attention.is_mla, same_bytes=False),
}


def run_checks(device: str) -> list[dict[str, Any]]:
    """Check every operator on the CPU, and on `device` where that is another one.

    Returns:
        `name`, `device`, `provider` and `reason` (what serves the operator there and why, "" where
        it came to no choice), `passed`, `detail` (what was wrong, or "") and `ms` of each check.
    """
    found = []
    for name, check in CHECKS.items():
        host: Outputs = {}
        found.append(_timed(name, "cpu", partial(_check_host, check, host)))
        if device != "cpu":
            found.append(_timed(name, device, partial(_check_device, check, device, host)))
    return found


def _check_host(check: Check, host: Outputs) -> None:
    """Run an operator on the CPU and keep what it gave, if that is right."""
    out = check.run(Memory("cpu"))
    check.is_right(out)
    host.update(out)


def _check_device(check: Check, device: str, host: Outputs) -> None:
    """Run an operator on a device and compare with the CPU's bytes, or with the definition."""
    if not check.same_bytes:
        check.is_right(check.run(Memory(device)))
        return
    require(host, "nothing to compare with: the check on the CPU failed")
    found = check.run(Memory(device))
    for name, values in host.items():
        differ = int(np.count_nonzero(found[name] != values))
        require(differ == 0, f"{name}: {differ} of {values.size} values differ from the CPU's")


def _timed(name: str, device: str, check: Callable[[], None]) -> dict[str, Any]:
    """Run a check; whatever it raises is its finding."""
    begin, detail = time.perf_counter(), ""
    try:
        check()
    except Exception as error:
        first_line = str(error).strip().partition("\n")[0]
        kind = "" if isinstance(error, CheckFailed) else f"{type(error).__name__}: "
        detail = kind + first_line
    milliseconds = 1e3 * (time.perf_counter() - begin)
    provider = _provider(name, device.partition(":")[0])
    return {
        "name": name,
        "device": device,
        "provider": provider,
        "reason": provider_reason(provider) if provider else "",
        "passed": not detail,
        "detail": detail,
        "ms": round(milliseconds, 1),
    }


def _provider(name: str, kind: str) -> str:
    """What served an operator on a kind of device; "" where the check did not come to a choice."""
    if name == "step_metadata":
        chosen = {choice.operator: choice.serves for choice in custom_ops.choices()}
        on_gpu = custom_ops.CUSTOM_OP if chosen.get(name) else TRITON
        return PADDLE if kind == "cpu" else on_gpu
    return provider_table().get(name, {}).get(kind, "")
