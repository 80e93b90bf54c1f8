"""Warm-up of a runner: kernels compiled and decode steps captured before the first request."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from fd_dsa.errors import DeviceError
from fd_dsa.startup.plan import EnginePlan

if TYPE_CHECKING:
    from fd_dsa.runner.model_runner import ModelRunner


def warm_up(runner: ModelRunner, plan: EnginePlan) -> str:
    """Compile the kernels of a device and capture decode steps.

    From then on a step that compiles a kernel logs a warning. A CPU and Triton's interpreter have
    nothing to compile or capture.

    Returns:
        The work that was done, for the log.

    Raises:
        DeviceError: one of several ranks cannot capture, so that graphs of the others would hang.
    """
    if plan.device == "cpu" or interprets(plan.device):
        return "not needed on this device"
    from fd_dsa.runner.step_graphs import PaddleCapture
    from fd_dsa.triton_runtime import freeze, warming

    start = time.perf_counter()
    # another engine of this process may have frozen the kernels
    with warming():
        runner.warm_up(before_captures=not plan.config.enforce_eager)
        ready = time.perf_counter()
        if not plan.config.enforce_eager:
            runner.capture_graphs(plan.config.capture_sizes, PaddleCapture)
            if not runner.captured_sizes and plan.config.tensor_parallel_size > 1:
                # the other ranks may have captured
                raise DeviceError("steps cannot be captured; start with --enforce-eager")
    freeze()
    done = f"kernels ready after {ready - start:.1f} s"
    if not (graphs := runner.graphs):
        return done
    sizes = ", ".join(map(str, runner.captured_sizes))
    sizes += " rows, further drafts" if graphs.drafts else " rows"
    seconds = time.perf_counter() - ready
    return f"{done}, decode steps of {sizes} and short prompts captured in {seconds:.1f} s"


def interprets(device: str) -> bool:
    """Return True if kernels run in Triton's interpreter, whose times mean nothing."""
    if device == "cpu":
        return False
    from fd_dsa.triton_runtime import INTERPRETING

    return INTERPRETING
