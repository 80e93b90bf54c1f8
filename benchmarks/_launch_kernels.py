"""The kernels of `launch_overhead`, and the launches that it compares."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

from fd_dsa.triton_runtime import BoundLaunch, paddle_jit

import triton
import triton.language as tl

LAUNCHES_A_CALL = 5
"""Launches in one call of `driver_loop`: few, so that the device's queue never fills up."""

BLOCK = 128
GRID = (1,)
Sides = dict[str, list[Any]]

_LOOP = """
typedef int (*launch_t)(void *, void *, void *, void *);
int loop(launch_t launch, void *config, void *function, void *arguments, int n) {
    int code = 0;
    while (n--) code |= launch(config, function, arguments, 0);
    return code;
}
"""


@triton.jit
def _five(x_ptr, y_ptr, out_ptr, n, shift, BLOCK: tl.constexpr):
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(x_ptr + offsets, mask=mask) + tl.load(y_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, x + shift, mask=mask)


@triton.jit
def _eighteen(
    a_ptr, b_ptr, c_ptr, d_ptr, e_ptr, f_ptr, g_ptr, h_ptr, i_ptr, j_ptr, k_ptr, l_ptr, out_ptr,
    n, shift, p, q, r,
    BLOCK: tl.constexpr,
):  # fmt: skip
    offsets = tl.arange(0, BLOCK)
    mask = offsets < n
    x = tl.load(a_ptr + offsets, mask=mask) + tl.load(b_ptr + offsets, mask=mask)
    x += tl.load(c_ptr + offsets, mask=mask) + tl.load(d_ptr + offsets, mask=mask)
    x += tl.load(e_ptr + offsets, mask=mask) + tl.load(f_ptr + offsets, mask=mask)
    x += tl.load(g_ptr + offsets, mask=mask) + tl.load(h_ptr + offsets, mask=mask)
    x += tl.load(i_ptr + offsets, mask=mask) + tl.load(j_ptr + offsets, mask=mask)
    x += tl.load(k_ptr + offsets, mask=mask) + tl.load(l_ptr + offsets, mask=mask)
    tl.store(out_ptr + offsets, x + shift + p + q + r, mask=mask)


# run-time arguments -> Triton's kernel, how many tensors, then the numbers by name
KERNELS: dict[int, tuple[Any, int, dict[str, int]]] = {
    5: (_five, 3, {"n": BLOCK, "shift": 3}),
    18: (_eighteen, 13, {"n": BLOCK, "shift": 3, "p": 5, "q": 7, "r": 11}),
}


@cache
def ours(count: int, memory: str) -> Any:
    """Our form of a kernel; one for each kind of memory, as in a process that has only that one."""
    return paddle_jit(do_not_specialize=tuple(KERNELS[count][2]))(KERNELS[count][0])


@cache
def _c_loop() -> Any:
    """The loop in C, compiled for this run."""
    folder = Path(tempfile.mkdtemp(prefix="fd_dsa_loop_"))
    (folder / "loop.c").write_text(_LOOP)
    command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(folder / "loop.so"), "loop.c"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "loop.so")).loop


def stock_call(count: int, tensors: list[Any]) -> Callable[[], None]:
    """Triton's own launch of a kernel."""
    stock, _, named = KERNELS[count]
    numbers = tuple(named.values())

    def call() -> None:
        stock[GRID](*tensors, *numbers, BLOCK=BLOCK)

    return call


def sides_of(
    count: int, memory: str, tensors: tuple[list[Any], list[Any]], stream: int, others: Sides
) -> Sides:
    """Label -> the calls of one number of arguments: the driver's, then `others`, then ours.

    Args:
        count: a key of KERNELS.
        memory: as of `ours`.
        tensors: two sets of inputs with an output.
        stream: where the driver launches.
        others: label -> calls.
    """
    kernel, numbers = ours(count, memory), tuple(KERNELS[count][2].values())
    first, second = tensors
    bound = kernel.bind(GRID, *first, *numbers, BLOCK=BLOCK)
    values = dict(zip(kernel.arg_names, [*first, *numbers, BLOCK], strict=True))
    return {
        "driver": [driver_loop(bound, values, stream)],
        **others,
        "fd_dsa new tensors": [
            lambda: kernel[GRID](*first, *numbers, BLOCK=BLOCK),
            lambda: kernel[GRID](*second, *numbers, BLOCK=BLOCK),
        ],
        "fd_dsa unbound": [lambda: kernel[GRID](*first, *numbers, BLOCK=BLOCK)],
        "fd_dsa bound": [bound],
    }


def driver_loop(bound: BoundLaunch, values: dict[str, Any], stream: int) -> Callable[[], None]:
    """A call that makes `LAUNCHES_A_CALL` launches by the driver's own function, from C.

    Args:
        bound: the launch to repeat.
        values: its arguments by name.
        stream: where to launch.
    """
    variant = bound.variant
    frame = variant.frame()
    variant.pack(frame, values, bound.grid)
    frame.set_stream(stream)
    config, function, arguments, _ = frame.call
    loop, launch = _c_loop(), variant.driver.launch

    def call() -> None:
        code = loop(launch, config, function, arguments, LAUNCHES_A_CALL)
        variant.driver.check(code, "launch")

    # the frame owns the memory that the pointers refer to
    call.frame = frame  # type: ignore[attr-defined]
    return call


def swapped(launch: Callable[[], None], other_driver: Any) -> Callable[[], None]:
    """The launch between a change of Triton's active driver and the change back.

    What FastDeploy #6897 does around every launch when torch is installed.
    """
    drivers = triton.runtime.driver

    def call() -> None:
        drivers.set_active(other_driver)
        try:
            launch()
        finally:
            drivers.reset_active()

    return call


def triton_c_function(kernel: Any, arguments: list[Any], stream: int) -> Callable[[], None] | None:
    """Triton's own compiled launch function called with integers; None but with Triton 3.6."""
    if not triton.__version__.startswith("3.6."):
        return None
    compiled = kernel.warmup(*arguments, BLOCK=BLOCK, grid=(1,))
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    launcher = compiled.run
    plain = [a.data_ptr() if hasattr(a, "data_ptr") else a for a in arguments]
    head = (1, 1, 1, stream, compiled.function, False, False, None, None)
    every = (*head, compiled.packed_metadata, None, None, None, *plain, BLOCK)
    function = launcher.launch
    return lambda: function(*every)
