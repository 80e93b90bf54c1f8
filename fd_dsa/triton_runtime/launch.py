"""Launches of a compiled kernel: its variant and how a call finds it, its memory, and the grid."""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from functools import lru_cache, reduce
from operator import attrgetter, itemgetter, methodcaller, or_
from typing import Any

from fd_dsa.errors import LaunchError
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime.compile_ahead import MODE
from fd_dsa.triton_runtime.compiler import Argument, Compiled
from fd_dsa.triton_runtime.device_api import DeviceApi
from fd_dsa.triton_runtime.driver import Driver
from fd_dsa.triton_runtime.parameters import Signature

Grid = tuple[int, ...] | Callable[[Mapping[str, Any]], tuple[int, ...]]
"""Numbers of programs, or a function that makes them of all arguments and options by name."""

ADDRESS, DTYPE = methodcaller("data_ptr"), attrgetter("dtype")
_IS_CONTIGUOUS = methodcaller("is_contiguous")
_Values = Sequence[Any]
_Picker = Callable[[_Values], Any]
# exact types of numbers; NumPy's numbers and subclasses pass all checks in every launch
_NUMBERS = (int, float, bool, type(None))

# CUDA's limits along x, y and z
_GRID_LIMITS = ((1 << 31) - 1, 65535, 65535)
_WARP_SIZE = 32
# scratch pointers that a kernel takes after its arguments, null here: one or two by Triton version
_SCRATCH_POINTERS = 2
_OVERLAP_LAUNCHES = 6
# CUlaunchConfig: grid 3 x u32, block 3 x u32, shared u32, stream, attributes, their number
_CONFIG = struct.Struct("=IIIIIIIxxxxQQIxxxx")
_STREAM_OFFSET = 32
# CUlaunchAttribute: number, padding to 8, value of 64 bytes
_ATTRIBUTE = struct.Struct("=Ixxxx64s")


def next_power_of_2(n: int) -> int:
    """Return the least power of two that is at least `n`, for n > 0.

    Triton's function can be called in kernels too, and takes 4 us on the host.
    """
    return 1 << (n - 1).bit_length()


def resolve_grid(
    kernel: str, grid: Grid, arguments: Mapping[str, object], options: Mapping[str, object]
) -> tuple[int, int, int]:
    """Return the grid as three numbers.

    Raises:
        LaunchError: the grid has no such form, or is out of CUDA's range.
    """
    sizes = grid({**options, **arguments}) if callable(grid) else grid
    try:
        # most launches have one of a few grids
        return _three_numbers(kernel, sizes)
    except TypeError:
        # a list has no hash
        return _three_numbers.__wrapped__(kernel, sizes)


@lru_cache(maxsize=4096)
def _three_numbers(kernel: str, sizes: Iterable[int]) -> tuple[int, int, int]:
    try:
        numbers = tuple(int(n) for n in sizes)
        fits = 1 <= len(numbers) <= 3 and all(
            n == size and 0 <= n <= limit
            for n, size, limit in zip(numbers, sizes, _GRID_LIMITS, strict=False)
        )
    except (TypeError, ValueError):
        fits = False
    if not fits:
        raise LaunchError(
            f"kernel {kernel}: grid {sizes!r}: wanted one to three numbers of programs, x in "
            f"0..{_GRID_LIMITS[0]}, y and z in 0..{_GRID_LIMITS[1]}, for example (8,)"
        )
    x, y, z = (*numbers, 1, 1)[:3]
    return x, y, z


class LaunchMemory:
    """Arguments and configuration of one launch, which the driver copies during the call.

    Attributes:
        buffer: addresses, numbers and the configuration of `Variant.values`.
        call: arguments of the driver's launch function.
        stream: CUDA stream in the configuration.
    """

    __slots__ = ("_kept", "_stream_offset", "buffer", "call", "stream")

    def __init__(
        self,
        buffer: ctypes.Array[ctypes.c_char],
        call: tuple[object, ...],
        stream_offset: int,
        kept: object,
    ) -> None:
        self.buffer, self.call, self.stream = buffer, call, 0
        self._stream_offset, self._kept = stream_offset, kept

    def set_stream(self, stream: int) -> None:
        """Launch on this stream from now on."""
        struct.pack_into("=Q", self.buffer, self._stream_offset, stream)
        self.stream = stream


class Variant:
    """Loaded kernel for fixed dtypes, alignments, constants, options and device.

    Attributes:
        device: index of the device that it is loaded on.
        compiled: result of the compiler.
        enqueue: function that launches `*LaunchMemory.call` and returns the driver's error code.
        tensors, numbers: parameters whose values a launch passes, in order of their declaration.
        values: packs addresses of the tensors, numbers, and the grid from offset 0 on.
        grid_offset: offset of the grid, with which the driver's configuration begins.
    """

    def __init__(
        self,
        signature: Signature,
        arguments: Mapping[str, Argument],
        options: Mapping[str, object],
        compiled: Compiled,
        function: int,
        device: int,
        driver: Driver,
    ) -> None:
        self.signature, self.arguments, self.device = signature, arguments, device
        self.compiled, self.driver, self.enqueue = compiled, driver, driver.library.cuLaunchKernelEx
        passed = [p for p in signature.parameters.values() if not arguments[p.name].is_constant]
        self.tensors = [p for p in passed if arguments[p.name].is_pointer]
        self.numbers = [p for p in passed if not arguments[p.name].is_pointer]
        code_of = dict(zip([p.name for p in passed], compiled.codes, strict=True))
        order = [p.name for p in self.tensors + self.numbers]
        codes = "".join(code_of[name] for name in order)
        starts = (struct.calcsize(codes[:i] + "0" + code) for i, code in enumerate(codes))
        start_of = dict(zip(order, starts, strict=True))
        self._offsets = [start_of[p.name] for p in passed]
        end = struct.calcsize(codes)
        self.grid_offset = -(-end // 8) * 8
        padding = f"{self.grid_offset - end}x" if self.grid_offset > end else ""
        self.values = struct.Struct(f"@{codes}{padding}III")
        self._function = ctypes.c_void_p(function)
        packed = _ATTRIBUTE.pack(_OVERLAP_LAUNCHES, struct.pack("=I", 1))
        self._overlap = ctypes.create_string_buffer(packed) if options["launch_pdl"] else None
        self._null = ctypes.c_uint64(0)
        # a thread takes memory out of the list while it launches, so two never share one
        self._free: list[LaunchMemory] = []

    def fill(
        self, addresses: Sequence[int], numbers: Sequence[object], grid: tuple[int, int, int]
    ) -> LaunchMemory:
        """Return memory for one launch with these values.

        Raises:
            struct.error: a number has another type, or is out of its range.
        """
        try:
            memory = self._free.pop()
        except IndexError:
            memory = self._new_memory()
        self.values.pack_into(memory.buffer, 0, *addresses, *numbers, *grid)
        return memory

    def launch(self, memory: LaunchMemory, stream: int) -> None:
        """Enqueue the launch on a stream, and take its memory back.

        Raises:
            DeviceError: the driver refuses the launch.
        """
        if stream != memory.stream:
            memory.set_stream(stream)
        code = self.enqueue(*memory.call)
        if code:
            name = f"launch of kernel {self.signature.kernel}"
            self.driver.recover(code, self.device, name, self.enqueue, memory.call)
        self._free.append(memory)

    def _new_memory(self) -> LaunchMemory:
        """Return memory with the configuration of all launches, except for grid and stream."""
        compiled = self.compiled
        buffer = ctypes.create_string_buffer(self.grid_offset + _CONFIG.size)
        base, block = ctypes.addressof(buffer), compiled.num_warps * _WARP_SIZE
        attributes = (0, 0) if self._overlap is None else (ctypes.addressof(self._overlap), 1)
        config = (1, 1, 1, block, 1, 1, compiled.shared_bytes, 0, *attributes)
        _CONFIG.pack_into(buffer, self.grid_offset, *config)
        addresses = [base + offset for offset in self._offsets]
        addresses += [ctypes.addressof(self._null)] * _SCRATCH_POINTERS
        pointers = (ctypes.c_void_p * len(addresses))(*addresses)
        call = (
            ctypes.c_void_p(base + self.grid_offset),
            self._function,
            ctypes.c_void_p(ctypes.addressof(pointers)),
            None,
        )
        return LaunchMemory(buffer, call, self.grid_offset + _STREAM_OFFSET, (pointers, self))


class BoundLaunch:
    """Launch of a kernel on buffers that never move, made by `Kernel.bind`.

    All arguments are checked once. A call looks up the current stream and calls the driver. Calls
    from several threads are safe. A value given for a scalar holds for that call only.

    Attributes:
        variant: compiled kernel that it launches.
        grid: three numbers of programs.
    """

    def __init__(
        self,
        api: DeviceApi,
        variant: Variant,
        grid: Grid,
        values: Mapping[str, object],
        options: Mapping[str, object],
        scalars: tuple[str, ...] = (),
    ) -> None:
        self.variant, self._api, self._options = variant, api, options
        self._values, self._scalars = values, scalars
        self._grid_function = grid if callable(grid) else None
        self.grid = self._resolve(grid, values)
        self._numbers = [values[p.name] for p in variant.numbers]
        names = [p.name for p in variant.numbers]
        self._scalar_places = [names.index(name) for name in scalars]
        self._addresses = self._addresses_of(values)

    def __call__(self, *scalars: object, grid: Grid | None = None) -> None:
        """Launch on the current stream.

        Args:
            scalars: values of the scalars that were named when the launch was bound, all or none.
            grid: another grid for this call.

        Raises:
            LaunchError: the number or the type of the scalars is wrong.
            DeviceError: the driver refuses the launch.
        """
        variant, numbers, values = self.variant, self._numbers, self._values
        if scalars:
            if len(scalars) != len(self._scalars):
                raise self._unfit(scalars, f"it has {len(self._scalars) or 'none'}")
            numbers = numbers.copy()
            for place, value in zip(self._scalar_places, scalars, strict=True):
                numbers[place] = value
        sizes = self.grid
        if grid is not None or self._grid_function is not None:
            named = {**values, **dict(zip(self._scalars, scalars, strict=False))}
            sizes = self._resolve(grid or self._grid_function or self.grid, named)
        if 0 in sizes or MODE.ahead is not None:
            return
        try:
            memory = variant.fill(self._addresses, numbers, sizes)
        except struct.error as error:
            raise self._unfit(scalars, error) from None
        variant.launch(memory, self._api.current_stream(variant.device))

    def exchange(self, **tensors: Tensor) -> None:
        """Replace bound tensors, all or none. Each one is checked as at binding.

        Raises:
            LaunchError: dtype, device or alignment is not what the kernel was compiled for.
        """
        signature, values = self.variant.signature, {**self._values, **tensors}
        for name, tensor in tensors.items():
            if not hasattr(self._values.get(name), "data_ptr"):
                raise LaunchError(f"kernel {signature.kernel}: no tensor is bound to {name!r}")
            if not hasattr(tensor, "data_ptr"):
                problem = f"is a {type(tensor).__name__}; a tensor is bound there"
                raise signature.error(name, problem)
            bound = self.variant.arguments[name]
            new = signature.describe(signature.parameters[name], tensor)
            device = signature.device_of(name, tensor, self._api)
            if new.type != bound.type or device != self.variant.device:
                raise signature.error(
                    name,
                    f"is {new.type} on device {device}, bound is {bound.type} on device "
                    f"{self.variant.device}",
                )
            if bound.divisible and not new.divisible:
                raise signature.error(
                    name,
                    "starts at an address that 16 does not divide, unlike the bound tensor; bind a "
                    "launch of its own for it",
                )
        # the addresses change in one assignment, for calls of other threads
        self._values, self._addresses = values, self._addresses_of(values)

    def _addresses_of(self, values: Mapping[str, Any]) -> list[int]:
        return [values[p.name].data_ptr() for p in self.variant.tensors]

    def _resolve(self, grid: Grid, values: Mapping[str, object]) -> tuple[int, int, int]:
        return resolve_grid(self.variant.signature.kernel, grid, values, self._options)

    def _unfit(self, scalars: tuple[object, ...], reason: object) -> LaunchError:
        """Make the error for scalars that are too many, too few or of another type."""
        kinds = ", ".join(f"{n}: {self.variant.arguments[n].type}" for n in self._scalars)
        return LaunchError(
            f"kernel {self.variant.signature.kernel}: {scalars} do not fit the scalars of the "
            f"bound launch ({kinds}): {reason}"
        )


class Spelling:
    """Calls of a kernel with the same argument names and types.

    Its functions take arguments out of the values of a call.

    Attributes:
        api: interface to the library of the tensors.
        tensors: function for the tensors, in the order of `Variant.tensors`.
        known: variant, function for its numbers and dtypes of the tensors, by the key of a call.
            The key has the identity of each dtype, so the dtypes are kept alive.
    """

    def __init__(
        self, api: DeviceApi, signature: Signature, names: Sequence[str], types: Sequence[type]
    ) -> None:
        places = {name: place for place, name in enumerate(names)}
        given = [p for p in signature.parameters.values() if p.name in places]
        passed = [p for p in given if not p.is_constexpr]
        tensors = [p for p in passed if hasattr(types[places[p.name]], "data_ptr")]
        ints = [p for p in passed if types[places[p.name]] is int]
        constants = places.keys() - {p.name for p in passed}
        self.api = api
        self.tensors = picker(places[p.name] for p in tensors)
        self._contiguous = picker(i for i, p in enumerate(tensors) if p.contiguous)
        self._aligned = picker(i for i, p in enumerate(tensors) if p.specialize_alignment)
        self._constants = picker(sorted(places[name] for name in constants))
        self._specialized = picker(
            places[p.name] for p in ints if p.specialize or p.specialize_alignment
        )
        self.known: dict[Hashable, tuple[Variant, _Picker, list[object]]] = {}

    def key(self, values: _Values, tensors: _Values, addresses: list[int]) -> Hashable:
        """Return the key of a call. Calls with the same key, on one device, share a variant."""
        aligned = self._aligned(addresses)
        return (
            *self._constants(values),
            *map(id, map(DTYPE, tensors)),
            *map(_specialization, self._specialized(values)),
            # most calls have only aligned tensors, which one test of all addresses shows
            reduce(or_, aligned, 0) & 15 and tuple(address & 15 == 0 for address in aligned),
        )

    def can_launch(self, variant: Variant, tensors: _Values, addresses: list[int]) -> bool:
        """Return True if the tensors are where a variant runs, and contiguous where declared."""
        device = variant.device
        return (
            self.api.are_on(tensors, addresses, device)
            and all(map(_IS_CONTIGUOUS, self._contiguous(tensors)))
            and (variant.driver.num_devices == 1 or self.api.current_device() == device)
        )


def picker(places: Iterable[int]) -> _Picker:
    """Return a function that takes the values at some places out of a sequence."""
    chosen = list(places)
    if len(chosen) > 1:
        return itemgetter(*chosen)
    # a slice, because `itemgetter` returns a single item bare
    start = chosen[0] if chosen else 0
    return itemgetter(slice(start, start + len(chosen)))


def _specialization(value: int) -> int:
    """Return 1 for the int 1, 16 for another int divisible by 16, 0 for other ints."""
    return 1 if value == 1 else 0 if value & 15 else 16


def has_key(variant: Variant, names: Sequence[str], values: Sequence[Any]) -> bool:
    """Return True if a key selects this variant for calls with such names and values."""
    parameters, arguments = variant.signature.parameters, variant.arguments
    for name, value in zip(names, values, strict=True):
        parameter, kind = parameters.get(name), type(value)
        if parameter is None or parameter.is_constexpr:
            # a key does not distinguish 0.0 and -0.0, and does not find NaN
            is_plain = kind is not float or abs(value) > 0
        else:
            is_plain = kind in _NUMBERS or hasattr(kind, "data_ptr")
        if not is_plain:
            return False
    passed = {p.name: arguments[p.name].type for p in variant.tensors + variant.numbers}
    return passed.keys() <= set(names) and not {"i64", "u64"} & set(passed.values())
