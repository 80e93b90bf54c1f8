"""What this machine has, and under which engine, model and machine a recording was made."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Any

import fd_dsa
from fd_dsa.accuracy.matrix.modes import CPU, CUSTOM_OPS, DEVICE, Mode
from fd_dsa.ops._fixed_order import fixed_order

# rooms that decide no token
_OTHER_ROOMS = ("accuracy", "doctor", "serve", "fastdeploy_plugin", "demo_model", "v4_prepare")


def why_not(mode: Mode, device: str) -> str | None:
    """Why a mode cannot run here, None where it can.

    Args:
        mode: any.
        device: where the reference runs, such as "cpu" or "gpu:0".
    """
    if mode.needs == CPU and device != "cpu":
        return "on a CPU alone"
    if mode.needs in (DEVICE, CUSTOM_OPS) and device == "cpu":
        return "runs on a device alone; on a CPU Paddle's operators are the only provider"
    if mode.needs == CUSTOM_OPS:
        from fd_dsa.custom_ops import build

        found = build()
        if found.kernels is None:
            return f"the custom operators are {found.state}, without kernels: {found.reason}"
    return None


def settings_of(model: Path, device: str) -> dict[str, Any]:
    """What must be the same for recordings to be compared: model, code, packages, device."""
    import numpy as np
    import paddle

    return {
        "model": model.name,
        "model_files": _digest(model.iterdir(), content=False),
        "code": _digest(_sources(), content=True),
        "fd_dsa": fd_dsa.__version__,
        "paddle": paddle.__version__,
        "numpy": np.__version__,
        "device": device,
        "machine": f"{platform.machine()}, {_processor()}",
    }


def providers(device: str) -> dict[str, str]:
    """Operator -> what serves it in this process, for reports."""
    if device == "cpu":
        order = ", sums in one order" if fixed_order() else ""
        return {"all operators": f"Paddle and NumPy{order}"}
    from fd_dsa.custom_ops import choices

    served = {one.operator: "custom_op" if one.serves else "triton" for one in choices()}
    return {**served, "all others": "Triton and Paddle"}


def _sources() -> list[Path]:
    """Files of the package whose code decides tokens."""
    root = Path(fd_dsa.__file__).parent
    files = [
        path for path in root.rglob("*.py") if path.relative_to(root).parts[0] not in _OTHER_ROOMS
    ]
    return [*files, Path(__file__).with_name("recording.py")]


def _digest(files: Any, *, content: bool) -> str:
    """SHA-256 over names and content, or names, sizes and times of change."""
    digest = hashlib.sha256()
    for path in sorted(file for file in files if file.is_file()):
        seen = path.stat()
        told = path.read_bytes() if content else f"{seen.st_size} {seen.st_mtime_ns}".encode()
        digest.update(path.name.encode() + b"\0" + told + b"\0")
    return digest.hexdigest()


def _processor() -> str:
    """Name of the processor, as far as the system says."""
    try:
        lines = Path("/proc/cpuinfo").read_text("ascii", "replace").splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor())
