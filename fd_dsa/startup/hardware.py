"""Paddle and the device of an engine: release, threads, instructions."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec

from fd_dsa.commands import extra_command, pip_command
from fd_dsa.config import EngineConfig
from fd_dsa.environment import prepare_cpu_runtime, set_cpu_threads, usable_cpus
from fd_dsa.errors import BackendUnavailable, ConfigError

_OLDEST_PADDLE = (3, 3)


def prepare_paddle() -> None:
    """Set the environment that Paddle reads when it is imported.

    Raises:
        BackendUnavailable: Paddle is missing or too old.
    """
    if find_spec("paddle") is None:
        raise BackendUnavailable(
            f"paddle is not installed; for a CPU run: {extra_command('cpu')} "
            "(for a GPU install paddlepaddle-gpu from Paddle's own package index)"
        )
    for name in ("paddlepaddle", "paddlepaddle-gpu"):
        _check_version(name)
    prepare_cpu_runtime()


def _check_version(name: str) -> None:
    """Refuse a release of Paddle that is too old. Builds from source, 0.0.0, pass."""
    try:
        installed = version(name)
    except PackageNotFoundError:
        return
    numbers = tuple(int(word) for word in installed.split(".")[:2] if word.isdigit())
    if numbers != (0, 0) and numbers < _OLDEST_PADDLE:
        oldest = ".".join(map(str, _OLDEST_PADDLE))
        # only Paddle's own index has the builds for GPUs
        cure = f"install a newer {name} from Paddle's own package index"
        if name == "paddlepaddle":
            cure = pip_command("--upgrade", f"{name}>={oldest}")
        raise BackendUnavailable(
            f"{name} {installed} is too old, fd_dsa needs {oldest} or newer; {cure}"
        )


def choose_device(config: EngineConfig, rank: int) -> tuple[EngineConfig, int]:
    """Choose the device of a rank, and set up the process for it.

    Returns:
        The configuration with device, types and drafts resolved; and the number of CPU threads.

    Raises:
        ConfigError: the device does not support a flag.
        BackendUnavailable: there is no such device, or kernels cannot run on it.
    """
    from fd_dsa.device.resolve import device_of_rank, keep_float32, resolve_device
    from fd_dsa.ops.fixed_order import check_fixed_order

    size = config.tensor_parallel_size
    num_threads = set_cpu_threads(max(usable_cpus() // size, 1))
    device = resolve_device(config.device)
    if size > 1:
        device = device_of_rank(device, rank, size)
    config = config.on_device(device)
    _check_capability(config)
    keep_float32(device)
    check_fixed_order(device, size)
    return config, num_threads


def _check_capability(config: EngineConfig) -> None:
    """Refuse a GPU without the instructions that the kernels or the caches need."""
    if config.device == "cpu":
        return
    from fd_dsa.device.resolve import traits_of
    from fd_dsa.triton_runtime.driver import MIN_CAPABILITY

    device, capability = config.device, traits_of(config.device).capability
    if capability < MIN_CAPABILITY:
        raise BackendUnavailable(
            f"--device: got {device}, a GPU of compute capability {capability / 10}; kernels need "
            f"{MIN_CAPABILITY / 10} (A100) or later; take --device cpu"
        )
    if config.kv_cache_dtype == "fp8_ds_mla" and not has_fp8(device):
        from fd_dsa.triton_runtime.driver import FP8_CAPABILITY

        raise ConfigError(
            f"--kv-cache-dtype: got 'fp8_ds_mla', but {device} is of compute capability "
            f"{capability / 10} and FP8 needs {FP8_CAPABILITY / 10} or later; "
            f"take --kv-cache-dtype {config.dtype}"
        )


def warming_on(device: str) -> AbstractContextManager[None]:
    """Return a context of a start, in which kernels of a device compile without a warning.

    An earlier engine of this process may have ended its warm-up, and would count them.
    """
    if device == "cpu":
        return nullcontext()
    from fd_dsa.triton_runtime import warming

    return warming()


def has_fp8(device: str) -> bool:
    """Return True if a device computes with FP8 values, as a CPU does in float32."""
    if device == "cpu":
        return True
    from fd_dsa.device.resolve import traits_of
    from fd_dsa.triton_runtime.driver import FP8_CAPABILITY

    return traits_of(device).capability >= FP8_CAPABILITY
