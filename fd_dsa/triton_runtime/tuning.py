"""Arguments that are computed or measured instead of given: heuristics, autotuning."""

from __future__ import annotations

import statistics
import threading
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from fd_dsa.errors import LaunchError
from fd_dsa.triton_runtime import serving
from fd_dsa.triton_runtime.bound import BoundLaunch
from fd_dsa.triton_runtime.driver import cuda
from fd_dsa.triton_runtime.grid import Grid
from fd_dsa.triton_runtime.mode import INTERPRETING

import triton

_OPTIONS = ("num_warps", "num_stages", "num_ctas", "maxnreg")
_WARM_CALLS, _TIMED_CALLS = 2, 9


class HeuristicKernel:
    """A kernel with computed constants, launched like a `Kernel`; made by `heuristics`."""

    def __init__(self, kernel: Any, values: Mapping[str, Any]) -> None:
        self.kernel, self.fn, self._made = kernel, kernel.fn, dict(values)
        self.signature, self.arg_names = kernel.signature, kernel.arg_names
        self.__name__, self.__doc__ = kernel.__name__, kernel.__doc__

    def _added(self, grid: Grid | None, given: dict[str, Any]) -> dict[str, Any]:
        """What is made of the arguments of a call; a function sees what those before it made."""
        made: dict[str, Any] = {}
        for name, function in self._made.items():
            made[name] = function({**given, **made})
        return made

    def _given(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """All arguments of a call by name.

        Raises:
            LaunchError: too many, or one is given twice, by the call or by it and by what is here.
        """
        given = dict(zip(self.arg_names, args, strict=False))
        if len(args) > len(self.arg_names) or not given.keys().isdisjoint(kwargs):
            # raises the error that says what is wrong
            self.signature.bind(args, kwargs)
        given |= kwargs
        if not self._made.keys().isdisjoint(given):
            twice = ", ".join(map(repr, sorted(self._made.keys() & given)))
            raise LaunchError(
                f"kernel {self.__name__}: argument {twice} is given twice: by the call and by "
                "heuristics or autotune; leave it out of the call"
            )
        return given

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        """The launch on this grid; call it with the arguments that are not made here."""
        return partial(self.run, grid)

    def run(self, grid: Grid, *args: Any, **kwargs: Any) -> None:
        """Launch; as `Kernel.run`."""
        given = self._given(args, kwargs)
        self.kernel[grid](**given, **self._added(grid, given))

    def bind(
        self, grid: Grid, *args: Any, scalars: tuple[str, ...] = (), **kwargs: Any
    ) -> BoundLaunch:
        """A launch whose arguments are checked, and made, once; as `Kernel.bind`."""
        given = self._given(args, kwargs)
        return self.kernel.bind(grid, scalars=scalars, **given, **self._added(grid, given))

    def warmup(self, *args: Any, capability: int | None = None, device: int = 0, **kwargs: Any):
        """As `Kernel.warmup`."""
        given = self._given(args, kwargs)
        return self.kernel.warmup(
            capability=capability, device=device, **given, **self._added(None, given)
        )


class TunedKernel(HeuristicKernel):
    """A kernel with measured constants and options; made by `autotune`.

    Attributes:
        choices: configuration by key, as measured so far.
    """

    def __init__(self, kernel: Any, configs: Sequence[triton.Config], key: Sequence[str]) -> None:
        self._configs, self._key = [_settings(config) for config in configs], tuple(key)
        super().__init__(kernel, {name: None for config in self._configs for name in config})
        if not configs or any(config.pre_hook is not None for config in configs):
            raise LaunchError(
                f"kernel {self.__name__}: autotune needs one configuration at least, and none "
                "with a pre_hook"
            )
        for name in set(key) - set(self.arg_names):
            raise LaunchError(f"kernel {self.__name__}: tuning key {name!r} is no parameter")
        self._lock = threading.RLock()
        self.choices: dict[Any, dict[str, Any]] = {}

    def _added(self, grid: Grid | None, given: dict[str, Any]) -> dict[str, Any]:
        """The best configuration for these arguments, measured at the first time."""
        if len(self._configs) == 1 or INTERPRETING:
            return self._configs[0]
        # dtypes by identity: their text would cost more than the launch
        dtypes = [id(value.dtype) for value in given.values() if hasattr(value, "data_ptr")]
        key = (*(given.get(name) for name in self._key), *dtypes)
        if key in self.choices:
            return self.choices[key]
        with self._lock:
            if key not in self.choices:
                if serving.serves():
                    values = {name: given.get(name) for name in self._key}
                    problem = f"not tuned for {values} before freeze(); launch it so in the warm-up"
                    serving.announce(self.__name__, problem, "its first configuration is used")
                    self.choices[key] = self._configs[0]
                else:
                    self.choices[key] = self._fastest(grid, given)
            return self.choices[key]

    def _fastest(self, grid: Any, given: dict[str, Any]) -> dict[str, Any]:
        """The configuration of the shortest device time; those that cannot run are left out.

        Raises:
            LaunchError: none of them can run.
        """
        times, errors = [], []
        for config in self._configs:
            try:
                launch = self.kernel.bind(grid, **given, **config)
            except Exception as error:
                # too much shared memory, too many registers, a tile that does not compile
                errors.append(f"{config}: {error}")
                continue
            device, stream = launch.variant.device, launch.current_stream()
            for _ in range(_WARM_CALLS):
                launch()
            timed = [cuda().time_us(device, launch, stream) for _ in range(_TIMED_CALLS)]
            times.append((statistics.median(timed), len(times), config))
        if not times:
            raise LaunchError(
                f"kernel {self.__name__}: no configuration can run: {'; '.join(errors)}"
            )
        return min(times)[2]

    def warmup(self, *args: Any, capability: int | None = None, device: int = 0, **kwargs: Any):
        """Compile all configurations ahead, as `Kernel.warmup`; a list of what was compiled.

        Which of them is the fastest is measured at the first launch with tensors.
        """
        given = self._given(args, kwargs)
        return [
            self.kernel.warmup(capability=capability, device=device, **given, **config)
            for config in self._configs
        ]


def _settings(config: triton.Config) -> dict[str, Any]:
    """A configuration as keyword arguments of a launch."""
    options = {name: getattr(config, name, None) for name in _OPTIONS}
    return {**config.kwargs, **{k: v for k, v in options.items() if v is not None}}


def heuristics(
    values: Mapping[str, Callable[[dict[str, Any]], Any]],
) -> Callable[[Any], HeuristicKernel]:
    """A decorator above `paddle_jit` that computes constants from the other arguments.

    Args:
        values: parameter -> function of a dict of all given arguments by name.
    """
    return lambda kernel: HeuristicKernel(kernel, values)


def autotune(configs: Sequence[triton.Config], key: Sequence[str]) -> Callable[[Any], TunedKernel]:
    """A decorator above `paddle_jit` that measures configurations and keeps the fastest.

    The kernel runs many times while it is measured: it must only write its outputs. After
    `freeze()` nothing is measured any more, and a new key gets the first configuration.

    Args:
        configs: `triton.Config` objects, the safest first.
        key: parameters whose values select another choice; dtypes always do.
    """
    return lambda kernel: TunedKernel(kernel, configs, key)
