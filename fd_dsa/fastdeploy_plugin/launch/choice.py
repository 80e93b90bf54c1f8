"""Which engine `--engine auto` takes: one device is enough for the embedded one, or it is not."""

from __future__ import annotations

import argparse
from importlib.util import find_spec
from pathlib import Path

from fd_dsa.config import demo_model_path
from fd_dsa.environment import (
    has_nvidia_gpu,
    installed_version,
    nvidia_smi,
    process_environment,
)
from fd_dsa.errors import BackendUnavailable, ConfigError
from fd_dsa.fastdeploy_plugin.launch.flags import PassedFlags

INSTALL = (
    "install it from Paddle's own package index (docs/fastdeploy.md has the commands), then fd_dsa "
    "beside it"
)


def fastdeploy_is_installed() -> bool:
    """True if this Python can find the package; it is not imported."""
    return find_spec("fastdeploy") is not None


def require_fastdeploy() -> None:
    """Refuse what needs FastDeploy where it is not installed.

    Raises:
        BackendUnavailable: says how to install it.
    """
    if not fastdeploy_is_installed():
        raise BackendUnavailable(f"FastDeploy is not installed in this Python; {INSTALL}")


def fastdeploy_version() -> str:
    """Version of the installed package, "" where its files do not tell."""
    # the package for CUDA, and its name in a build from source
    return installed_version("fastdeploy-gpu") or installed_version("fastdeploy")


def choose_engine(args: argparse.Namespace, passed: PassedFlags) -> tuple[str, str]:
    """The engine for `--engine auto`, and why in words; arguments as of `translate`.

    FastDeploy where it is installed and the request needs more than one device: a flag asks for
    several, or the weights do not fit the one device that the embedded engine would use. Without
    it the embedded engine serves on several GPUs, too, and on a CPU it alone does.

    Raises:
        BackendUnavailable: the flags need FastDeploy, which is not installed.
    """
    asked = _asked_for_more(args, passed)
    installed = fastdeploy_is_installed()
    if asked and not installed:
        raise BackendUnavailable(
            f"{asked}, which needs FastDeploy, and that is not installed in this Python; "
            f"{INSTALL}. --engine embedded serves without these flags"
        )
    size = args.tensor_parallel_size
    if size > 1 and not asked and getattr(args, "device", "auto") == "cpu":
        return "embedded", "FastDeploy serves on no CPU"
    if asked or (size > 1 and installed):
        return "fastdeploy", asked or f"--tensor-parallel-size is {size}"
    if not installed:
        return "embedded", "FastDeploy is not installed"
    fits, sizes = _weights_fit(args)
    if fits:
        return "embedded", f"one device is enough: {sizes}"
    return "fastdeploy", f"one device is not enough: {sizes}"


def refuse_for_embedded(args: argparse.Namespace, passed: PassedFlags) -> None:
    """Refuse flags that only FastDeploy can honour.

    Raises:
        ConfigError: names the first of them.
    """
    asked = _asked_for_more(args, passed)
    if asked:
        raise ConfigError(
            f"{asked}, which --engine embedded does not have; leave it out, or take "
            "--engine fastdeploy"
        )


def _asked_for_more(args: argparse.Namespace, passed: PassedFlags) -> str:
    """The flag that asks for what FastDeploy alone has, in words; "" without one."""
    if args.data_parallel_size > 1:
        return f"--data-parallel-size is {args.data_parallel_size}"
    if args.enable_expert_parallel:
        return "--enable-expert-parallel is set"
    if passed.arguments:
        return f"{passed.arguments[0]} stands after --"
    return ""


def _weights_fit(args: argparse.Namespace) -> tuple[bool, str]:
    """Whether the embedded engine could hold the weights, and the two sizes in words."""
    # these read JSON files and count; neither imports Paddle
    from fd_dsa.models.config import ModelConfig
    from fd_dsa.models.loader import quantisable_tensors
    from fd_dsa.models.memory_plan import available_memory_bytes, format_bytes, weight_bytes

    folder = Path(getattr(args, "model", demo_model_path())).expanduser()
    try:
        allow_unknown = getattr(args, "allow_unknown_config_fields", False)
        config = ModelConfig.from_folder(folder, allow_unknown=allow_unknown)
    except ConfigError:
        # the embedded engine refuses the folder with all that there is to say
        return True, "the model folder does not tell its size"
    gpu_bytes = _gpu_memory_bytes() if getattr(args, "device", "auto") != "cpu" else 0
    room = gpu_bytes or available_memory_bytes()
    where = "on the GPU" if gpu_bytes else "free in host memory"
    form: tuple[str, frozenset[str]] = "float32", frozenset()
    if gpu_bytes and getattr(args, "dtype", "auto") != "float32":
        form = "bfloat16", quantisable_tensors(config)
    needed = weight_bytes(config, *form)
    held = "FP8" if form[1] else form[0]
    sizes = f"weights {format_bytes(needed)} in {held}, {format_bytes(room)} {where}"
    return needed <= room, sizes


def _gpu_memory_bytes() -> int:
    """Memory of the GPU that the embedded engine would take.

    0 without one, with Paddle for CPUs alone, and where nvidia-smi does not say.
    """
    if not has_nvidia_gpu() or not installed_version("paddlepaddle-gpu"):
        return 0
    visible = process_environment().get("CUDA_VISIBLE_DEVICES", "0")
    memory = nvidia_smi("memory.total", visible.partition(",")[0].strip())
    # such as "81559 MiB", or "[N/A]"
    number = "".join(memory[:1]).partition(" ")[0]
    return int(number) << 20 if number.isdecimal() else 0
