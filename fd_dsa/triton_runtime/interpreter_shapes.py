"""Shapes of the language's blocks, made once a process where they are interpreted.

Every operation makes a block type and a tensor, and both make a new shape, which is a tuple of the
language with a type and a name of its own: half the time of a kernel of small blocks. A shape gives
the same objects each time, and nothing changes them; so they are shared.
"""

from __future__ import annotations

from typing import Any

import triton.language.core as tl

# attributes that a class is known to set; another release's class is left alone
_OF_A_TYPE = {"element_ty", "shape", "numel", "name"}
_OF_A_TENSOR = {"handle", "shape", "numel", "type", "dtype"}


def remember_shapes() -> None:
    """Let block types and tensors of this process share the shapes that they have in common."""
    block = tl.block_type(tl.float32, [2, 4])
    if set(vars(block)) == _OF_A_TYPE:
        _remember_types()
    if set(vars(tl.tensor(None, block))) == _OF_A_TENSOR:
        _remember_tensors()


def _remember_types() -> None:
    """Shape, number of elements and name of a block type, by its elements and shape."""
    original = tl.block_type.__init__
    known: dict[tuple[Any, ...], tuple[Any, Any, str]] = {}

    def init(self: Any, element_ty: Any, shape: Any) -> None:
        values = shape.values if isinstance(shape, tl.tuple) else shape
        key = (element_ty.name, *map(tl._unwrap_if_constexpr, values))
        shared = known.get(key)
        if shared is None:
            original(self, element_ty, shape)
            known[key] = self.shape, self.numel, self.name
            return
        self.element_ty = element_ty
        self.shape, self.numel, self.name = shared

    tl.block_type.__init__ = init


def _remember_tensors() -> None:
    """Shape and number of elements of a tensor, by the shape of its type."""
    original = tl.tensor.__init__
    known: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def init(self: Any, handle: Any, type: Any) -> None:
        key = tuple(type.shape.values) if type.is_block() else ()
        shared = known.get(key)
        if shared is None:
            original(self, handle, type)
            known[key] = self.shape, self.numel
            return
        self.handle, self.type, self.dtype = handle, type, type.scalar
        self.shape, self.numel = shared

    tl.tensor.__init__ = init
