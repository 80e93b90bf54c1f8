"""What the doctor finds before it runs anything: machine, versions, GPU, device."""

from __future__ import annotations

import platform
from importlib.util import find_spec
from typing import Any

from fd_dsa.config import EngineConfig
from fd_dsa.environment import (
    has_nvidia_gpu,
    installed_version,
    nvidia_smi,
    prepare_cpu_runtime,
    usable_cpus,
)
from fd_dsa.errors import BackendUnavailable

_PACKAGES = ("paddlepaddle", "paddlepaddle-gpu", "triton", "numpy")
_NEEDED = {
    "numpy": "pip install numpy",
    "paddle": "pip install '.[cpu]'",
    "triton": "pip install triton",
}


def facts() -> dict[str, Any]:
    """`machine`, `packages` and `gpu`; nothing is imported."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {usable_cpus()} processors, "
        f"Python {platform.python_version()}",
        "packages": {name: installed_version(name) for name in _PACKAGES},
        "gpu": _gpu(),
    }


def _gpu() -> dict[str, str] | None:
    """Name and driver of the first NVIDIA GPU; None without one."""
    if not has_nvidia_gpu():
        return None
    name, _, driver = "".join(nvidia_smi("name,driver_version", "0")).partition(", ")
    return {"name": name or "unknown (nvidia-smi does not answer)", "driver": driver or "unknown"}


def device_to_check(asked: str | None) -> str:
    """The device whose kernels are checked: that asked for, or the best one Paddle has.

    Raises:
        BackendUnavailable: a package is missing, or Paddle has no such device.
    """
    for package, cure in _NEEDED.items():
        if find_spec(package) is None:
            raise BackendUnavailable(f"{package} is not installed; {cure}, then run this again")
    prepare_cpu_runtime()
    # Triton, which this imports, was looked for above
    from fd_dsa.step.device import paddle_device_counts

    counts = paddle_device_counts()
    devices = [f"{kind}:{number}" for kind, count in counts.items() for number in range(count)]
    if asked is None:
        return [*devices, "cpu"][0]
    if asked == "cpu" or asked in devices or f"{asked}:0" in devices:
        return asked
    raise BackendUnavailable(
        f"--device: got {asked!r}, the installed Paddle has: {', '.join(['cpu', *devices])}"
    )


def not_checked(device: str, gpu: dict[str, str] | None, interpreting: bool) -> str:
    """What the self-check leaves open, in words; "" where it leaves nothing.

    Args:
        device: where the operators were checked.
        gpu: name and driver of the GPU, None without one.
        interpreting: whether Triton kernels run in the interpreter.
    """
    if device != "cpu":
        where = "Triton kernels are interpreted in this process (TRITON_INTERPRET)."
        return f"No GPU kernel was run: {where}" if interpreting else ""
    if gpu is None:
        return "No GPU kernel was run: this machine has no NVIDIA GPU. The CPU was checked alone."
    return (
        "No GPU kernel was run: the GPU is there, but the device is the CPU (Paddle without CUDA, "
        "or --device cpu). With paddlepaddle-gpu installed, run this again."
    )


def graph_facts(device: str, interpreting: bool) -> dict[str, Any]:
    """Sizes of decode steps that the embedded engine would capture on a device without flags.

    Returns:
        `sizes`, none where `reason` says why nothing is captured.
    """
    reason = ""
    if device == "cpu":
        reason = "a CPU has none"
    elif interpreting:
        reason = "Triton kernels are interpreted in this process"
    else:
        from paddle.device.cuda.graphs import is_cuda_graph_supported

        if not is_cuda_graph_supported():
            reason = "this build of Paddle has no CUDA graphs"
    return {"sizes": [] if reason else list(EngineConfig().capture_sizes), "reason": reason}


def graph_line(found: dict[str, Any]) -> str:
    """The same for a person."""
    if found["reason"]:
        return f"graphs     none: {found['reason']}"
    sizes = ", ".join(map(str, found["sizes"]))
    return f"graphs     decode steps of {sizes} rows, unless flags say otherwise"
