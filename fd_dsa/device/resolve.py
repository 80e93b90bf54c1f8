"""Device of a model: its name on this machine, its free memory, its traits."""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

from fd_dsa.device.allocation import paddle_device_counts, paddle_place
from fd_dsa.errors import BackendUnavailable, flag_error

if TYPE_CHECKING:
    from fd_dsa.triton_runtime.driver import GpuTraits


def resolve_device(name: str) -> str:
    """Resolve `EngineConfig.device` to "cpu", "gpu:0" or a custom device such as "name:0".

    Raises:
        BackendUnavailable: the installed Paddle has no such device, or sees none.
    """
    if name == "cpu":
        return "cpu"
    import paddle

    is_gpu_build = paddle.device.is_compiled_with_cuda()
    has_gpu = is_gpu_build and paddle.device.cuda.device_count() > 0
    if name == "auto":
        return "gpu:0" if has_gpu else "cpu"
    if name not in ("gpu", "gpu:0"):
        if name.startswith("gpu:"):
            # the engine's thread has device 0, because it sets no device
            raise BackendUnavailable(
                f"--device: got {name!r}, allowed is 'gpu'; choose the GPU by CUDA_VISIBLE_DEVICES"
            )
        paddle_place(name)
        return name
    if not is_gpu_build:
        raise BackendUnavailable(
            f"--device: got {name!r}, but the installed Paddle is built for CPUs; install "
            "paddlepaddle-gpu from Paddle's own package index, or take --device cpu"
        )
    if not has_gpu:
        raise BackendUnavailable(
            f"--device: got {name!r}, but Paddle sees no GPU; check the driver and "
            "CUDA_VISIBLE_DEVICES, or take --device cpu"
        )
    return "gpu:0"


def device_of_rank(device: str, rank: int, size: int) -> str:
    """Make the device of one of several ranks the current one of its thread, and return it.

    Args:
        device: device of rank 0, as returned by `resolve_device`.
        rank: rank of this process.
        size: number of ranks that share the model.

    Raises:
        ConfigError: there are fewer devices of its kind.
    """
    if device == "cpu":
        return device
    import paddle

    kind = device.partition(":")[0]
    count = paddle_device_counts().get(kind, 0)
    if count < size:
        allowed = f"at most {count}, the devices {kind!r} that Paddle sees"
        raise flag_error("tensor_parallel_size", size, allowed, "check CUDA_VISIBLE_DEVICES")
    own = f"{kind}:{rank}"
    paddle.device.set_device(own)
    return own


def keep_float32(device: str) -> None:
    """Make a GPU multiply float32 matrices in float32, for the whole process.

    Paddle uses TF32 by default, which has 10 bits of mantissa.
    """
    if device.startswith("gpu"):
        from paddle.base import core

        core.set_cublas_switch(False)


def free_device_bytes(device: str, utilization: float = 1.0) -> int | None:
    """Return the free bytes of a device within a share of its memory.

    Args:
        device: as returned by `resolve_device`.
        utilization: share of the device's memory that all processes may use together, 0 to 1.

    Returns:
        Free bytes, 0 or more. None if the device's memory is host memory.

    Raises:
        DeviceError: the CUDA driver fails.
    """
    if device == "cpu":
        return None
    from fd_dsa.triton_runtime import INTERPRETING

    if INTERPRETING:
        return None
    from fd_dsa.triton_runtime.driver import cuda

    free, total = ctypes.c_size_t(), ctypes.c_size_t()
    with cuda().context(_index_of(device)):
        code = cuda().library.cuMemGetInfo_v2(ctypes.byref(free), ctypes.byref(total))
        cuda().check(code, "cuMemGetInfo_v2")
    return max(free.value - int((1 - utilization) * total.value), 0)


def traits_of(device: str) -> GpuTraits:
    """Return the traits of a GPU, by which kernels are selected and sized."""
    from fd_dsa.triton_runtime.driver import cuda

    return cuda().traits(_index_of(device))


def _index_of(device: str) -> int:
    """Return the number in "gpu:0", 0 without a number."""
    return int(device.partition(":")[2] or 0)
