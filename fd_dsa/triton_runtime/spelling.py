"""Spellings of a kernel's calls, by which a launch finds its variant without all checks."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from functools import reduce
from operator import attrgetter, itemgetter, methodcaller, or_
from typing import Any

from fd_dsa.triton_runtime.device_api import DeviceApi
from fd_dsa.triton_runtime.launch import Variant
from fd_dsa.triton_runtime.parameters import Signature

ADDRESS, DTYPE = methodcaller("data_ptr"), attrgetter("dtype")
_IS_CONTIGUOUS = methodcaller("is_contiguous")
_Values = Sequence[Any]
_Picker = Callable[[_Values], Any]
# exact types of numbers; NumPy's numbers and subclasses pass all checks in every launch
_NUMBERS = (int, float, bool, type(None))


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
