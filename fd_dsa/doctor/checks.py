"""Self-check of every operator by every provider, on a CPU and on a device."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from fd_dsa.errors import describe_error
from fd_dsa.ops.cache_probes import CASES, TENSOR_CORE_CASES
from fd_dsa.ops.probes import Case, Memory, Outputs, require
from fd_dsa.ops.providers import (
    CUSTOM_OP,
    NUMPY,
    TENSOR_CORE,
    VARIABLE,
    available_providers,
    function,
    library_refusal,
    reason_for,
    requested,
)


def run_checks(device: str) -> list[dict[str, Any]]:
    """Check every provider on the CPU, and on `device` if that is another place.

    Returns:
        `name`, `device`, `provider`, `passed`, `detail` (the fault, or "") and `ms` of each check.
        `serves` is True for the provider of DeepSeek-V3.2's steps. `reason` says why the provider
        can or cannot serve. A provider that cannot serve passes unless FD_DSA_OP_PROVIDER requests
        it.

    Raises:
        ConfigError: FD_DSA_OP_PROVIDER has an invalid value.
    """
    asked, rows = requested(), []
    memories = {"cpu": Memory()}
    if device != "cpu":
        # imported late, because only devices need kernels
        from fd_dsa.device.allocation import paddle_allocator
        from fd_dsa.device.resolve import keep_float32

        # Paddle's GEMMs are a provider, with the same settings as in an engine
        keep_float32(device)
        memories[device] = Memory(paddle_allocator(device))
    for operator, case in CASES.items():
        host: Outputs = {}
        for place, memory in memories.items():
            wanted = asked.get(operator, "") if place == device else ""
            refused = {p: _unsupported_reason(operator, p, memory) for p in _on(operator, place)}
            able = [provider for provider, reason in refused.items() if not reason]
            chosen = wanted or next(iter(able), "")
            if wanted and wanted not in refused:
                refused[wanted] = f"it does not support tensors on {place}"
            for provider, reason in refused.items():
                detail, milliseconds = "", 0.0
                if provider in able:
                    others = "" if provider == chosen else f"; {chosen} serves"
                    reason = reason_for(provider) + others
                    detail, milliseconds = _checked(operator, provider, case, memory, host)
                elif provider == wanted:
                    detail, reason = f"{VARIABLE} requests it: {reason}", ""
                serves = provider == chosen
                rows.append(_row(operator, place, provider, reason, detail, milliseconds, serves))
    return rows


def check_float32(device: str) -> dict[str, Any]:
    """Check that float32 GEMMs of a device are float32. Returns a row of `run_checks`.

    Paddle uses TF32 on GPUs by default. The engine turns it off, and this check does too.
    """
    import paddle

    from fd_dsa.device.allocation import paddle_allocator
    from fd_dsa.device.resolve import keep_float32

    keep_float32(device)
    memory, begin, detail = Memory(paddle_allocator(device)), time.perf_counter(), ""
    try:
        # needs 13 bits of mantissa; TF32 has 11
        values = np.full((64, 64), 1 + 2**-12, np.float32)
        found = memory.get(paddle.matmul(memory.put(values), memory.put(np.eye(64, dtype="f4"))))
        require(found == values, f"1 + 2^-12 times 1 is {found.flat[0]:.9g}: that is TF32")
    except Exception as error:
        detail = describe_error(error).removeprefix("CheckFailed: ")
    milliseconds = 1e3 * (time.perf_counter() - begin)
    return _row("float32 GEMM", device, "paddle", "no TF32", detail, milliseconds, True)


def _row(
    name: str, device: str, provider: str, reason: str, detail: str, ms: float, serves: bool
) -> dict[str, Any]:
    return {
        "name": name,
        "device": device,
        "provider": provider,
        "reason": reason,
        "passed": not detail,
        "detail": detail,
        "ms": round(ms, 1),
        "serves": serves,
    }


def _on(operator: str, place: str) -> list[str]:
    """Return the providers for a place, without those of a missing library."""
    kind = place.partition(":")[0]
    providers = available_providers(operator, kind)
    return [p for p in providers if p != CUSTOM_OP or not library_refusal(operator, kind)[0]]


def _unsupported_reason(operator: str, provider: str, memory: Memory) -> str:
    """Return why a provider cannot run DeepSeek-V3.2's steps on a device, "" if it can."""
    if memory.allocate is None or operator not in ("sparse_mla", "topk"):
        return ""
    if provider not in (TENSOR_CORE, CUSTOM_OP):
        return ""
    from fd_dsa.ops.library_kernel import interpreter_refusal
    from fd_dsa.ops.mla.tensor_core import unsupported_reason
    from fd_dsa.triton_runtime.device_api import traits_for

    reason = interpreter_refusal() if provider == CUSTOM_OP else ""
    if operator == "topk" or reason:
        return reason
    capability = traits_for(memory.allocate((1,), "int32")).capability
    return unsupported_reason(capability, "bfloat16", "fp8_ds_mla", 512, 64) or ""


def _checked(
    operator: str, provider: str, case: Case, memory: Memory, host: Outputs
) -> tuple[str, float]:
    """Run a provider's case and return its fault ("" without one) and the milliseconds.

    The CPU's results are stored in `host`. Any exception counts as a fault.
    """
    if provider in (TENSOR_CORE, CUSTOM_OP):
        case = TENSOR_CORE_CASES.get(operator, case)
    begin, detail = time.perf_counter(), ""
    try:
        results = case.run(function(operator, provider), memory)
        out = next(results)
        if memory.on_host or not case.same_bytes:
            # the remaining part of the case compares the results with the definition
            list(results)
        else:
            _compare(host, out)
        if provider == NUMPY:
            host.update(out)
    except Exception as error:
        detail = describe_error(error).removeprefix("CheckFailed: ")
    return detail, 1e3 * (time.perf_counter() - begin)


def _compare(host: Outputs, out: Outputs) -> None:
    require(host, "no reference: the check on the CPU failed")
    for name, values in host.items():
        differ = int(np.count_nonzero(out[name] != values))
        require(differ == 0, f"{name}: {differ} of {values.size} values differ from the CPU's")


def as_lines(checks: list[dict[str, Any]]) -> list[str]:
    lines = ["  operator           device    served by          check      time  why"]
    for check in checks:
        mark = "ok" if check["passed"] else "FAILED"
        # a provider that cannot serve has no time
        shown = f"{mark:<7}{check['ms']:>5.0f} ms" if check["ms"] else f"{mark[:6]:<15}"
        if check["passed"] and not check["ms"]:
            shown = f"{'no':<15}"
        lines.append(
            f"  {check['name']:<18} {check['device']:<9} {check['provider']:<18} {shown}  "
            f"{check['reason']}".rstrip()
        )
        if check["detail"]:
            lines.append(f"    {check['detail']}")
    return lines
