"""An engine over the null driver, as the only rank or as rank 0 of several."""

from __future__ import annotations

import ctypes
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from tests.gpu_rig import load
from tests.null_driver.build import NAMES, OPERATORS, build

# a checkout of an earlier release has the second one
BUILDERS = ("fd_dsa.startup.build", "fd_dsa.engine.factory")
# modules that check kernels by their results
CHECKS = (
    "fd_dsa.ops.topk.custom_op",
    "fd_dsa.ops.mla.tensor_core",
    "fd_dsa.models.four_bit_check",
)

# layers of every kind, with released widths
V4: dict[str, Any] = {
    "model_type": "deepseek_v4",
    "compress_ratios": [0, 4, 128, 4],
    "num_hidden_layers": 4,
    "num_hash_layers": 1,
    "n_routed_experts": 16,
    "torch_dtype": "bfloat16",
}
# formats of its releases
V4_FORMATS: dict[str, Any] = {
    "quantization_config": {"quant_method": "fp8", "scale_fmt": "ue8m0"},
    "expert_dtype": "fp4",
}


class NullDriver:
    """The driver in this process, made before anything imports Paddle.

    Attributes:
        device: the first device, as a `device` argument takes it.
        ordered: forms of kernels that a start has processes compile, each with `launches` before.
        unforeseen: kernels that the start then compiles itself.

    Args:
        num_devices: GPUs that the process sees.
    """

    def __init__(self, num_devices: int = 1) -> None:
        os.environ["RIG_DEVICES"] = str(num_devices)
        # otherwise a machine without a GPU interprets the kernels
        os.environ["TRITON_INTERPRET"] = "0"
        self.device = load("null").device
        package = import_module("fd_dsa")
        folder = build(Path(package.__file__ or "").parents[1] / "custom_ops" / "csrc")
        # the package finds a library that is loaded
        self._libraries = [ctypes.CDLL(str(folder / name)) for name in NAMES.values()]
        import_module("fd_dsa.custom_ops").use_library(folder / OPERATORS)
        self.ordered: dict[object, int] = {}
        self.unforeseen: list[str] = []
        self._leave_out_compiler()
        for name in CHECKS:
            replace(import_module(name), "difference", lambda *arguments: "")

    def launches(self) -> int:
        """Return the kernels, GEMMs and collectives that were enqueued so far."""
        return sum(library.null_launches() for library in self._libraries)

    def _leave_out_compiler(self) -> None:
        """Give the launcher kernels without code, which wait for the kernel before."""
        from fd_dsa.triton_runtime import compiler, kernel

        # an earlier release has no such module
        with suppress(ModuleNotFoundError):
            ahead = import_module("fd_dsa.triton_runtime.compile_ahead")

            def order(_: Any, wanted: Any) -> None:
                form = _form(wanted.name, wanted.arguments, wanted.options)
                self.ordered[form] = self.launches()

            replace(ahead.CompileAhead, "add", order)

        def compile_nothing(fn: Any, arguments: Any, options: Any, capability: int) -> Any:
            if self.ordered and _form(fn.__name__, arguments, options) not in self.ordered:
                self.unforeseen.append(fn.__name__)
            codes = compiler.argument_codes(arguments)
            ptx = "griddepcontrol.wait"
            return compiler.Compiled(fn.__name__, b"", ptx, 0, options["num_warps"], codes)

        for module in (compiler, kernel):
            replace(module, "compile_kernel", compile_nothing)


class AbsentRanks:
    """Ranks of an engine from 1 on, which are not there. Their answers are those of rank 0.

    Attributes:
        group: group of rank 0.
    """

    def __init__(self, config: Any) -> None:
        self.group = AbsentGroup(config.tensor_parallel_size)

    @contextmanager
    def step(self, message: bytes | None) -> Iterator[None]:
        """Send a message to nobody."""
        yield

    def on_failure(self, call: object) -> None:
        """Take a function that is never called."""

    def ready(self) -> None:
        """Take note that the start is over."""

    def close(self) -> None:
        """Nothing is held."""


class AbsentGroup:
    """Group of rank 0 in host memory, without the other ranks."""

    rank, has_devices, failure = 0, False, None

    def __init__(self, size: int) -> None:
        self.size = size

    def all_gather(self, tensor: np.ndarray) -> np.ndarray:
        """Return this rank's array for each rank."""
        return np.stack([tensor] * self.size)

    def barrier(self) -> None:
        """Wait for nobody."""

    def check(self) -> None:
        """Find every rank alive."""

    def close(self) -> None:
        """Nothing is held."""


def open_engine(driver: NullDriver, model: Mapping[str, Any], folder: Path, **config: Any) -> Any:
    """Build an engine whose weights have no values, and whose kernels are warm.

    Args:
        driver: its first device holds the model.
        model: fields of config.json.
        folder: an empty one for config.json.
        config: fields of EngineConfig.
    """
    from fd_dsa.config import EngineConfig, demo_model_path

    (folder / "config.json").write_text(json.dumps(model))
    fields = {"load_format": "dummy", "tokenizer": demo_model_path(), "device": driver.device}
    builder = import_first(BUILDERS)
    replace(builder, "Ranks", AbsentRanks)
    return builder.build_engine(EngineConfig(model=folder, **fields, **config))


def import_first(names: Sequence[str]) -> Any:
    """Return the first of these modules that is there."""
    for name in names:
        with suppress(ModuleNotFoundError):
            return import_module(name)
    raise ModuleNotFoundError(f"none of {', '.join(names)}")


def replace(module: Any, name: str, value: object) -> None:
    """Replace a function or class that a module has."""
    assert hasattr(module, name), f"{module.__name__} has no {name}"
    setattr(module, name, value)


def _form(name: str, arguments: Mapping[str, Any], options: Mapping[str, Any]) -> object:
    """Return what tells a compiled kernel from others."""
    return name, tuple(arguments.values()), tuple(options.items())
