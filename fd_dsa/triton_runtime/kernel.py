"""`paddle_jit`, a decorator that launches Triton kernels on Paddle tensors."""

from __future__ import annotations

import struct
import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, overload

from fd_dsa.environment import launches_overlap
from fd_dsa.errors import (
    FdDsaError,
    KernelUnavailable,
    LaunchError,
    describe_error,
    is_out_of_memory,
)
from fd_dsa.triton_runtime import compile_freeze
from fd_dsa.triton_runtime.compile_ahead import MODE, CompileAhead, Order
from fd_dsa.triton_runtime.compiler import Argument, Compiled, argument_codes, compile_kernel
from fd_dsa.triton_runtime.device_api import DeviceApi
from fd_dsa.triton_runtime.driver import cuda
from fd_dsa.triton_runtime.interpreter import InterpretedVariant
from fd_dsa.triton_runtime.launch import (
    ADDRESS,
    DTYPE,
    BoundLaunch,
    Grid,
    Spelling,
    Variant,
    has_key,
    picker,
    resolve_grid,
)
from fd_dsa.triton_runtime.mode import INTERPRETING
from fd_dsa.triton_runtime.parameters import Signature

import triton

# compute capability from which a kernel can be launched while the previous kernel runs
_OVERLAPS_FROM = 90
# keys that are kept for a spelling; calls with other keys pass all checks in every launch
_MAX_KNOWN = 4096


@overload
def paddle_jit(
    fn: Callable[..., object],
    *,
    do_not_specialize: Iterable[str] = (),
    do_not_specialize_on_alignment: Iterable[str] = (),
    contiguous: Iterable[str] = (),
    waits: bool = False,
) -> Kernel: ...
@overload
def paddle_jit(
    fn: None = None,
    *,
    do_not_specialize: Iterable[str] = (),
    do_not_specialize_on_alignment: Iterable[str] = (),
    contiguous: Iterable[str] = (),
    waits: bool = False,
) -> Callable[[Callable[..., object]], Kernel]: ...


def paddle_jit(
    fn: Callable[..., object] | None = None,
    *,
    do_not_specialize: Iterable[str] = (),
    do_not_specialize_on_alignment: Iterable[str] = (),
    contiguous: Iterable[str] = (),
    waits: bool = False,
) -> Kernel | Callable[[Callable[..., object]], Kernel]:
    """Make a kernel that `kernel[grid](...)` launches on Paddle tensors.

    Args:
        fn: Python function in Triton's language, or the result of `triton.jit` for one.
        do_not_specialize: ints whose value never selects another compiled kernel. Name every
            length here that changes from step to step.
        do_not_specialize_on_alignment: pointers and ints whose alignment never selects another
            compiled kernel.
        contiguous: tensors that must be contiguous.
        waits: True if every program calls `wait_for_inputs` before its first write, and before
            its first read of anything but weights. From compute capability 9.0 on such a kernel
            is launched while the previous one runs.

    Returns:
        The kernel, or a decorator that makes one if only options are given.

    Raises:
        LaunchError: a declared name is no parameter.
    """
    declared = do_not_specialize, do_not_specialize_on_alignment, contiguous
    make = partial(Kernel, declared=declared, waits=waits)
    return make if fn is None else make(fn)


class Kernel:
    """Triton kernel and its launches, made by `paddle_jit`.

    Attributes:
        fn: the `triton.jit` function, for calls from other kernels.
        signature: its parameters.
    """

    def __init__(
        self,
        fn: Callable[..., object],
        declared: tuple[Iterable[str], Iterable[str], Iterable[str]],
        waits: bool,
    ) -> None:
        # a result of `triton.jit` has `run`
        made: Any = fn if hasattr(fn, "run") else None
        function = fn if made is None else made.fn
        self.signature, self._waits = Signature(function, *declared), waits
        self.fn: Any = made or triton.jit(fn)
        self.arg_names = tuple(self.signature.parameters)
        self.__name__, self.__module__ = self.signature.kernel, function.__module__
        self.__doc__ = function.__doc__
        self._lock = threading.RLock()
        self._variants: dict[Hashable, Variant] = {}
        self._spellings: dict[Hashable, Spelling] = {}

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        """Return the launch on this grid, which is called with the kernel's arguments.

        Args:
            grid: one to three numbers of programs, or a function that makes them of a dict of all
                arguments and options by name.
        """
        ahead = MODE.ahead
        kernel = self if ahead is None else ahead.stand_in(self, _StandIn)
        if callable(grid):
            return partial(kernel.run, grid)
        return partial(kernel._launch, resolve_grid(self.__name__, grid, {}, {}))

    def __call__(self, *_: object, **__: object) -> None:
        """Refuse a call without a grid.

        Raises:
            LaunchError: always. The message says how to launch.
        """
        name = self.__name__
        raise LaunchError(f"kernel {name}: called without a grid; launch it as {name}[grid](...)")

    def _launch(self, grid: tuple[int, int, int], *args: Any, **kwargs: Any) -> None:
        """Launch like an earlier call with such arguments, else with all checks."""
        values = (*args, *kwargs.values())
        memory = None
        try:
            spelling = self._spellings[(*kwargs, *map(type, values))]
            tensors = spelling.tensors(values)
            addresses = [*map(ADDRESS, tensors)]
            variant, numbers, _ = spelling.known[spelling.key(values, tensors, addresses)]
            if spelling.can_launch(variant, tensors, addresses):
                if 0 in grid:
                    return
                memory = variant.fill(addresses, numbers(values), grid)
        except (KeyError, TypeError, struct.error, FdDsaError):
            # the checks below find the same problem and name it
            pass
        if memory is None:
            self.run(grid, *args, **kwargs)
        else:
            variant.launch(memory, spelling.api.current_stream(variant.device))

    def run(self, grid: Grid, *args: object, **kwargs: object) -> None:
        """Launch as `kernel[grid](*args, **kwargs)` does, with all checks.

        Raises:
            LaunchError: an argument or the grid cannot be used. The message names it.
            BackendUnavailable: there is neither a GPU nor an interpreter.
            DeviceError: the driver refuses the launch.
        """
        values, options = self.signature.bind(args, kwargs)
        api, variant = self._variant_for(values, options)
        self._remember(api, variant, args, kwargs)
        BoundLaunch(api, variant, grid, values, options)()

    def bind(
        self, grid: Grid, *args: object, scalars: tuple[str, ...] = (), **kwargs: object
    ) -> BoundLaunch:
        """Make a launch whose arguments are checked once, for buffers that never move.

        Args:
            grid: as for a launch. Every call may replace it.
            args, kwargs: as for a launch. Tensors are kept alive.
            scalars: names of numbers that every call passes, in this order. Ints among them
                must be declared in `do_not_specialize`.

        Raises:
            LaunchError: as for a launch, or a name in `scalars` cannot change.
        """
        values, options = self.signature.bind(args, kwargs)
        self.signature.check_changing(scalars, values)
        api, variant = self._variant_for(values, options)
        return BoundLaunch(api, variant, grid, values, options, scalars)

    def warmup(
        self, *args: object, capability: int | None = None, device: int = 0, **kwargs: object
    ) -> Compiled | None:
        """Compile and load a variant before its first launch.

        Args:
            args, kwargs: as for a launch, with `Pointer` instead of tensors, or tensors.
            capability: compute capability to compile for, without a device and without loading;
                90 for Hopper.
            device: index of the device to load on.

        Returns:
            The compiled kernel. None if this process interprets its kernels.

        Raises:
            LaunchError: as for a launch.
            BackendUnavailable: no capability is given and there is no device.
        """
        values, options = self.signature.bind(args, kwargs)
        arguments = self.signature.describe_all(values)
        if INTERPRETING:
            return None
        if capability is not None:
            return self._compile(arguments, options, capability)[0]
        with compile_freeze.warming():
            return self._variant(arguments, options, device).compiled

    def _compiled_options(
        self, options: Mapping[str, object], capability: int
    ) -> Mapping[str, object]:
        """Return the options that a variant is compiled with, with or without PDL."""
        overlaps = self._waits and capability >= _OVERLAPS_FROM and launches_overlap()
        return {**options, "launch_pdl": True} if overlaps else options

    def _compile(
        self, arguments: Mapping[str, Argument], options: Mapping[str, object], capability: int
    ) -> tuple[Compiled, Mapping[str, object]]:
        """Compile a variant. Returns it and the options of its launches, with or without PDL."""
        wanted = self._compiled_options(options, capability)
        compiled = compile_kernel(self.fn, arguments, wanted, capability)
        # Triton before 3.5 emits no wait, so the kernel would start before its inputs are written
        return compiled, wanted if compiled.waits else options

    def _variant_for(
        self, values: Mapping[str, object], options: Mapping[str, object]
    ) -> tuple[DeviceApi, Variant]:
        """Return the variant for these arguments, and the interface to their library."""
        arguments = self.signature.describe_all(values)
        api, device = self.signature.place_of(values, arguments)
        if cuda().num_devices > 1 and api.current_device() != device:
            raise LaunchError(
                f"kernel {self.__name__}: the tensors are on device {device}, but the current "
                f"device is {api.current_device()}; make {device} current first"
            )
        return api, self._variant(arguments, options, device)

    def _variant(
        self, arguments: dict[str, Argument], options: Mapping[str, object], device: int
    ) -> Variant:
        """Return a variant of the launch cache, compiled and loaded first if it is new.

        Other threads see it when it is complete.

        Raises:
            KernelUnavailable: it cannot be compiled or loaded.
        """
        key = device, tuple(arguments.values()), tuple(options.items())
        variant = self._variants.get(key)
        if variant is not None:
            return variant
        with self._lock:
            if key in self._variants:
                return self._variants[key]
            if not INTERPRETING:
                compile_freeze.announce_compilation(self.__name__, arguments, options)
            try:
                variant = self._new_variant(arguments, options, device)
            except Exception as error:
                if is_out_of_memory(error):
                    raise
                # Triton's compiler raises errors of many types
                raise KernelUnavailable(
                    f"kernel {self.__name__}: it cannot be compiled and loaded for device "
                    f"{device}: {describe_error(error)}"
                ) from error
            self._variants[key] = variant
            return variant

    def _new_variant(
        self, arguments: dict[str, Argument], options: Mapping[str, object], device: int
    ) -> Variant:
        """Make a variant that is compiled and loaded, or that the interpreter runs."""
        if INTERPRETING:
            return InterpretedVariant(self.fn, self.signature, arguments, options)
        compiled, launched = self._compile(arguments, options, cuda().traits(device).capability)
        function = cuda().load(compiled, device)
        return Variant(self.signature, arguments, launched, compiled, function, device, cuda())

    def _remember(
        self, api: DeviceApi, variant: Variant, args: Sequence[Any], kwargs: Mapping[str, Any]
    ) -> None:
        """Remember the variant for later calls that are spelled like this one."""
        values, names = (*args, *kwargs.values()), (*self.arg_names[: len(args)], *kwargs)
        if not has_key(variant, names, values):
            return
        types = [*map(type, values)]
        with self._lock:
            spelling = self._spellings.get((*kwargs, *types))
            if spelling is None:
                spelling = Spelling(api, self.signature, names, types)
            if len(spelling.known) < _MAX_KNOWN:
                tensors = spelling.tensors(values)
                key = spelling.key(values, tensors, [*map(ADDRESS, tensors)])
                numbers = picker(names.index(p.name) for p in variant.numbers)
                spelling.known[key] = variant, numbers, [*map(DTYPE, tensors)]
                self._spellings[(*kwargs, *types)] = spelling


class _StandIn(Kernel):
    """Stand-in for a kernel, whose launches only have their variants compiled.

    Args:
        kernel: kernel whose later launches need the variants.
        ahead: compiles them.
    """

    def __init__(self, kernel: Kernel, ahead: CompileAhead) -> None:
        vars(self).update(vars(kernel))
        self._kernel, self._ahead = kernel, ahead
        self._variants, self._spellings = {}, {}

    def _new_variant(
        self, arguments: dict[str, Argument], options: Mapping[str, object], device: int
    ) -> Variant:
        """Order a variant, unless the kernel has it, and return one that does nothing."""
        key = device, tuple(arguments.values()), tuple(options.items())
        if key not in self._kernel._variants:
            capability = cuda().traits(device).capability
            wanted = self._compiled_options(options, capability)
            names = self.__module__, self.__name__, self.fn.cache_key
            self._ahead.add(Order(*names, arguments, wanted, capability))
        nothing = Compiled(self.__name__, b"", "", 0, 1, argument_codes(arguments))
        variant = Variant(self.signature, arguments, options, nothing, 0, device, cuda())
        variant.enqueue = lambda *call: 0
        return variant
