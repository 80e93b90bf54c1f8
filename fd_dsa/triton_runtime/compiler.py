"""Compiling a kernel for a stated target: no driver, no GPU and no active Triton driver needed.

Results land in Triton's own cache on disk (`TRITON_CACHE_DIR`), so a second process compiles
nothing.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from fd_dsa.errors import BackendUnavailable

import triton

# Triton's compiler was not made for several threads before 3.6
_COMPILING = threading.Lock()

# scalar type -> its code in `struct`; pointers are "Q"
_CODES = {"i1": "?", "i32": "i", "i64": "q", "u64": "Q", "fp32": "f"}


class Argument(NamedTuple):
    """What the compiler knows of one argument; a part of the launch cache's key.

    Attributes:
        type: Triton's type such as "*bf16" or "i32"; "constexpr" where the value is compiled in.
        divisible: the address or the int is a multiple of 16.
        value: the constant; None for other arguments.
        kind: of the constant, what equality leaves out: its type, as True, 1 and 1.0 are equal, and
            of a float its text, as 0.0 and -0.0 are.
    """

    type: str
    divisible: bool = False
    value: Any = None
    kind: object = None


@dataclass(frozen=True)
class Compiled:
    """A kernel compiled for one target, not loaded yet.

    Attributes:
        name: symbol in the image.
        image: the cubin.
        ptx: its assembly.
        shared_bytes: dynamic shared memory a block.
        num_warps: warps a block, those that the compiler added included.
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
        """True if the kernel waits for those before it, so that it may be launched early."""
        return "griddepcontrol.wait" in self.ptx


def argument_codes(arguments: Mapping[str, Argument]) -> str:
    """`struct` codes of the arguments that a launch passes, in order."""
    types = (argument.type for argument in arguments.values())
    return "".join(_CODES.get(kind, "Q") for kind in types if kind != "constexpr")


def compile_kernel(
    fn: Callable[..., object],
    arguments: Mapping[str, Argument],
    options: Mapping[str, object],
    capability: int,
) -> Compiled:
    """Compile for a GPU's capability, 90 on Hopper, or take the result from the cache on disk.

    Raises:
        BackendUnavailable: the kernel uses a feature that needs scratch memory on the host, or
            the cache on disk cannot be written.
        Exception: what Triton's compiler raises about the kernel.
    """
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    signature = {name: argument.type for name, argument in arguments.items()}
    constants = {
        (i,): argument.value
        for i, argument in enumerate(arguments.values())
        if argument.type == "constexpr"
    }
    # spelled as Triton's own launcher spells them, which makes cache entries common
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
            f"kernel {fn.__name__}: Triton cannot write what it compiles: {error}; set "
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
