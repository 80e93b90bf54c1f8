"""`paddle_jit`: a decorator that launches Triton kernels on Paddle tensors."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any, overload

from fd_dsa.environment import launches_overlap
from fd_dsa.errors import KernelUnavailable, LaunchError, describe_error, is_out_of_memory
from fd_dsa.triton_runtime import fastpath, serving
from fd_dsa.triton_runtime.bound import BoundLaunch
from fd_dsa.triton_runtime.compiler import Argument, Compiled, compile_kernel
from fd_dsa.triton_runtime.device_api import DeviceApi
from fd_dsa.triton_runtime.driver import cuda
from fd_dsa.triton_runtime.grid import Grid, resolve_grid
from fd_dsa.triton_runtime.interpreter import InterpretedVariant
from fd_dsa.triton_runtime.mode import INTERPRETING
from fd_dsa.triton_runtime.parameters import MISSING, OPTIONS, Signature
from fd_dsa.triton_runtime.variant import Variant

import triton

# from here on a kernel can be launched while the one before it runs, and wait for its end
_OVERLAPS_FROM = 90
# generated functions that are tried in order; some twenty in vain take as long as a look-up with
# all checks
_MAX_CHAIN = 16
# such chains, by the constants and options that callers name
_MAX_CHAINS = 256


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
    """A kernel that is launched by `kernel[grid](...)` on Paddle tensors.

    Args:
        fn: a Python function in Triton's language, or what `triton.jit` made of one.
        do_not_specialize: ints whose value never selects another compiled kernel; name every
            length here that changes from step to step.
        do_not_specialize_on_alignment: pointers and ints whose alignment never does.
        contiguous: tensors that must be contiguous.
        waits: every program calls `wait_for_inputs` ahead of its first write, and of its first
            read of anything but weights that were there before the step. From compute capability
            9.0 on the kernel is launched while the one before it runs.

    Returns:
        A `Kernel`, or with options only, the decorator that makes one.

    Raises:
        LaunchError: a declared name is no parameter.
    """
    declared = do_not_specialize, do_not_specialize_on_alignment, contiguous
    make = partial(Kernel, declared=declared, waits=waits)
    return make if fn is None else make(fn)


class Kernel:
    """A Triton kernel and its launches; made by `paddle_jit`.

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
        # what `triton.jit` made has `run`
        made: Any = fn if hasattr(fn, "run") else None
        function = fn if made is None else made.fn
        self.signature, self._waits = Signature(function, *declared), waits
        self.fn: Any = made or triton.jit(fn)
        self.arg_names = tuple(self.signature.parameters)
        self.__name__ = self.signature.kernel
        self.__doc__ = function.__doc__
        self._lock = threading.RLock()
        self._variants: dict[Any, Variant] = {}
        self._chains: dict[Any, list[Any]] = {}
        self._chained: set[Any] = set()
        parameters = self.signature.parameters.values()
        self._constants = {p.name for p in parameters if p.is_constexpr} | OPTIONS.keys()
        # what calls go to: all checks; the only function; the chain of their constants
        self._launch: Callable[..., None] = self.run

    def __getitem__(self, grid: Grid) -> Callable[..., None]:
        """The launch on this grid; call it with the kernel's arguments.

        Args:
            grid: one to three numbers of programs, or a function that makes them of a dict of all
                arguments and options by name.
        """
        if not callable(grid):
            grid = resolve_grid(self.__name__, grid, {}, {})
        return partial(self._launch, grid)

    def __call__(self, *_: object, **__: object) -> None:
        """Refuse a call without a grid.

        Raises:
            LaunchError: always; says how to launch.
        """
        name = self.__name__
        raise LaunchError(f"kernel {name}: called without a grid; launch it as {name}[grid](...)")

    def run(self, grid: Grid, *args: object, **kwargs: object) -> None:
        """Launch; the same as `kernel[grid](*args, **kwargs)`, with all checks.

        Raises:
            LaunchError: an argument or the grid cannot be used; it is named.
            BackendUnavailable: no GPU, and no interpreter either.
            DeviceError: the driver refuses the launch.
        """
        self._run(self._key(kwargs), grid, args, kwargs)

    def _run(
        self, key: Hashable, grid: Grid, args: Sequence[object], kwargs: Mapping[str, object]
    ) -> None:
        """See `run`; the next launch like this one finds a function by `key`."""
        values, options = self.signature.bind(args, kwargs)
        spelled = {name: kwargs[name] for name in kwargs if name in OPTIONS}
        api, variant = self._variant_for(values, options)
        self._extend_chain(api, variant, spelled, key)
        BoundLaunch(api, variant, grid, values, options)()

    def bind(
        self, grid: Grid, *args: object, scalars: tuple[str, ...] = (), **kwargs: object
    ) -> BoundLaunch:
        """A launch whose arguments are checked once, for buffers that never move.

        Args:
            grid: as for a launch; may be replaced in every call.
            args, kwargs: as for a launch; tensors are kept alive.
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
        """Compile ahead; load too, where a device is there, so that a launch has nothing to do.

        Args:
            args, kwargs: as for a launch, with `Pointer` instead of tensors, or tensors.
            capability: compile for this one without a device, 90 for Hopper, and load nothing.
            device: index of the device to load on.

        Returns:
            What was compiled; None in an interpreting process, which has nothing to compile.

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
        with serving.warming():
            return self._variant(arguments, options, device).compiled

    def _compile(
        self, arguments: Mapping[str, Argument], options: Mapping[str, object], capability: int
    ) -> tuple[Compiled, Mapping[str, object]]:
        """What is compiled, and the options of its launches: early if it waits on the device."""
        if not (self._waits and capability >= _OVERLAPS_FROM and launches_overlap()):
            return compile_kernel(self.fn, arguments, options, capability), options
        early = {**options, "launch_pdl": True}
        compiled = compile_kernel(self.fn, arguments, early, capability)
        # a Triton without the instruction makes none: then it must not start before its inputs
        return compiled, early if compiled.waits else options

    def _variant_for(
        self, values: Mapping[str, object], options: Mapping[str, object]
    ) -> tuple[DeviceApi, Variant]:
        """The variant that serves these arguments, made if it is new."""
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
        """The variant of the launch cache, compiled and loaded first if need be.

        It is visible to other threads only when it is complete.

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
                serving.announce_compilation(self.__name__, arguments, options)
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
        """A variant that is compiled and loaded, or that the interpreter runs."""
        if INTERPRETING:
            return InterpretedVariant(self.fn, self.signature, arguments, options)
        compiled, launched = self._compile(arguments, options, cuda().traits(device).capability)
        function = cuda().load(compiled, device)
        return Variant(self.signature, arguments, launched, compiled, function, device, cuda())

    def _key(self, kwargs: Mapping[str, object]) -> Hashable:
        """What a call's chain is found by: its named arguments, if they are all constants."""
        return tuple(kwargs.items()) if kwargs.keys() <= self._constants else ()

    def _dispatch(self, grid: Grid, *args: object, **kwargs: object) -> None:
        """Launch by the chain of the call's constants."""
        try:
            chain = self._chains.get(self._key(kwargs))
        except TypeError:
            # one of them is none: `run` names it
            chain = None
        (chain[0] if chain else self.run)(grid, *args, **kwargs)

    def _extend_chain(
        self, api: DeviceApi, variant: Variant, spelled: dict[str, object], key: Hashable
    ) -> None:
        """Give calls spelled like this one their own generated function."""
        spelling = (variant, api, tuple(spelled.items()), key)
        with self._lock:
            chain = self._chains.get(key, [])
            most = _MAX_CHAIN if chain or len(self._chains) < _MAX_CHAINS else 0
            if spelling in self._chained or len(chain) >= most:
                return
            miss = partial(self._after, key, len(chain))
            chain.append(fastpath.generate(variant, api, spelled, miss))
            self._launch = self._dispatch if self._chained else chain[0]
            self._chained.add(spelling)
            self._chains[key] = chain

    def _after(
        self,
        key: Hashable,
        position: int,
        grid: Grid,
        values: tuple[object, ...],
        spelled: dict[str, object],
    ) -> None:
        """Try the next generated function, and after the last one the long way."""
        chain = self._chains[key]
        if position + 1 < len(chain):
            chain[position + 1](grid, *values, **spelled)
        else:
            given = zip(self.arg_names, values, strict=True)
            named = {name: v for name, v in given if v is not MISSING}
            self._run(key, grid, (), named | spelled)
