"""Whether decode steps of the embedded engine would be captured into CUDA graphs on a device."""

from __future__ import annotations

from typing import Any

from fd_dsa.config import EngineConfig


def facts(device: str, interpreting: bool) -> dict[str, Any]:
    """`sizes` that are captured without flags, none where `reason` says why nothing is."""
    reason = _reason_against(device, interpreting)
    return {"sizes": [] if reason else list(EngineConfig().capture_sizes), "reason": reason}


def as_line(found: dict[str, Any]) -> str:
    """The report for a person."""
    if found["reason"]:
        return f"graphs     none: {found['reason']}"
    sizes = ", ".join(map(str, found["sizes"]))
    return f"graphs     decode steps of {sizes} rows, unless flags say otherwise"


def _reason_against(device: str, interpreting: bool) -> str:
    """Why nothing is captured; "" if it is."""
    if device == "cpu":
        return "a CPU has none"
    if interpreting:
        return "Triton kernels are interpreted in this process"
    from paddle.device.cuda.graphs import is_cuda_graph_supported

    return "" if is_cuda_graph_supported() else "this build of Paddle has no CUDA graphs"
