"""Compilation of a kernel for a given target, without a GPU, a driver or Triton's active driver.

Results are written to Triton's own cache on disk (`TRITON_CACHE_DIR`), where later processes find
them.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fd_dsa.errors import BackendUnavailable

import triton

# before 3.6 Triton's compiler does not support several threads
_COMPILING = threading.Lock()

# type of a number -> its code in `struct`; pointers are "Q"
_CODES = {"i1": "?", "i32": "i", "i64": "q", "u64": "Q", "fp32": "f"}


class Argument(NamedTuple):
    """Properties of one argument that the compiler uses, a part of the launch cache's key.

    Attributes:
        type: Triton's type such as "*bf16" or "i32"; "constexpr" if the value is compiled in.
        divisible: True if the address or the int is known to be a multiple of 16.
        value: the constant; None for other arguments.
        kind: difference between constants that are equal: the type, because True, 1 and 1.0 are
            equal, and the text of a float, because 0.0 and -0.0 are.
    """

    type: str
    divisible: bool = False
    value: Any = None
    kind: object = None

    @property
    def is_constant(self) -> bool:
        return self.type == "constexpr"

    @property
    def is_pointer(self) -> bool:
        return self.type.startswith("*")


@dataclass(frozen=True)
class Compiled:
    """Kernel compiled for one target, before it is loaded.

    Attributes:
        name: symbol in the image.
        image: the cubin.
        ptx: assembly of the image.
        shared_bytes: dynamic shared memory of a block.
        num_warps: warps of a block, with those that the compiler added.
        codes: `struct` codes of the arguments that are passed, in order.
    """

    name: str
    image: bytes
    ptx: str
    shared_bytes: int
    num_warps: int
    codes: str

    @property
    def waits(self) -> bool:
        """True if the kernel waits for earlier kernels, so that PDL is safe."""
        return "griddepcontrol.wait" in self.ptx


def argument_codes(arguments: Mapping[str, Argument]) -> str:
    """Return the `struct` codes of the arguments that a launch passes, in order."""
    passed = (argument.type for argument in arguments.values() if not argument.is_constant)
    return "".join(_CODES.get(kind, "Q") for kind in passed)


def compile_kernel(
    fn: Callable[..., object],
    arguments: Mapping[str, Argument],
    options: Mapping[str, object],
    capability: int,
) -> Compiled:
    """Compile a kernel, or take the result from the cache on disk.

    Args:
        capability: compute capability, 90 for Hopper.

    Raises:
        BackendUnavailable: the kernel needs scratch memory, or the cache on disk cannot be written.
        Exception: error of Triton's compiler.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: argument.type for name, argument in arguments.items()}
    constants = {
        (i,): argument.value
        for i, argument in enumerate(arguments.values())
        if argument.is_constant
    }
    # the form of Triton's own launcher, so that both find the same cache entries
    attributes = {
        (i,): [["tt.divisibility", 16]] if argument.divisible else []
        for i, argument in enumerate(arguments.values())
    }
    set_options = {name: value for name, value in options.items() if value is not None}
    try:
        with _COMPILING:
            kernel = triton.compile(
                ASTSource(fn, signature, constants, attributes),
                target=GPUTarget("cuda", capability, 32),
                options=set_options,
            )
    except OSError as error:
        raise BackendUnavailable(
            f"kernel {fn.__name__}: Triton cannot write its cache: {error}; set "
            "TRITON_CACHE_DIR (~/.triton/cache by default) and TMPDIR to folders that this "
            "process can write to"
        ) from error
    metadata = kernel.metadata
    for scratch in ("global_scratch_size", "profile_scratch_size"):
        if getattr(metadata, scratch, 0):
            raise BackendUnavailable(
                f"kernel {metadata.name}: needs {getattr(metadata, scratch)} bytes of "
                f"{scratch.removesuffix('_size')}, which this launcher does not allocate; "
                "do not make tensor descriptors in the kernel"
            )
    return Compiled(
        name=metadata.name,
        image=kernel.asm["cubin"],
        ptx=kernel.asm["ptx"],
        shared_bytes=metadata.shared,
        num_warps=metadata.num_warps,
        codes=argument_codes(arguments),
    )
