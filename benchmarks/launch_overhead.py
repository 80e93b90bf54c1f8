"""Host cost of one kernel launch, with 5 and with 18 arguments, unbound and bound.

The host is timed, and the device is waited for outside the clock. The labels are:

- `driver`: the driver's launch function in a loop in C, with everything prepared.
- Triton's own `kernel[grid]`.
- The same with a change of Triton's active driver around it, as in FastDeploy #6897.
- Triton's compiled launch function on plain integers (Triton 3.6 only).
- Ours. "new tensors" means that every launch gets other tensor objects than the one before. An
  unbound launch checks all its tensors, a bound one checked them when it was made.

If Paddle and the test plug-in are installed, the same kernels are launched on Paddle tensors too.
There another side is Triton with Paddle's torch stand-in switched on and off around every launch.
"""

from __future__ import annotations

import ctypes
import subprocess
import sys
import tempfile
from argparse import Namespace
from collections.abc import Callable, Iterator
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import _gpu
from fd_dsa.triton_runtime import BoundLaunch, paddle_jit
from fd_dsa.triton_runtime.device_api import api_for_type
from fd_dsa.triton_runtime.driver import cuda

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
    """Return our form of a kernel.

    Each kind of memory has its own form, as in a process with only that kind.
    """
    return paddle_jit(do_not_specialize=tuple(KERNELS[count][2]))(KERNELS[count][0])


@cache
def _c_loop() -> Any:
    """Return the loop in C, compiled for this run."""
    folder = Path(tempfile.mkdtemp(prefix="fd_dsa_loop_"))
    (folder / "loop.c").write_text(_LOOP)
    command = ["gcc", "-O2", "-shared", "-fPIC", "-o", str(folder / "loop.so"), "loop.c"]
    subprocess.run(command, cwd=folder, check=True)
    return ctypes.CDLL(str(folder / "loop.so")).loop


def driver_loop(bound: BoundLaunch, values: dict[str, Any], stream: int) -> Callable[[], None]:
    """Return a call that makes `LAUNCHES_A_CALL` launches by the driver's own function, from C.

    Args:
        bound: the launch to repeat.
        values: its arguments by name.
        stream: CUDA stream of the launches.
    """
    variant = bound.variant
    addresses = [values[p.name].data_ptr() for p in variant.tensors]
    memory = variant.fill(addresses, [values[p.name] for p in variant.numbers], bound.grid)
    memory.set_stream(stream)
    config, function, arguments, _ = memory.call
    loop, launch = _c_loop(), variant.enqueue

    def call() -> None:
        code = loop(launch, config, function, arguments, LAUNCHES_A_CALL)
        variant.driver.check(code, "launch")

    # the pointers refer to this memory
    call.memory = memory  # type: ignore[attr-defined]
    return call


def swapped(launch: Callable[[], None], other_driver: Any) -> Callable[[], None]:
    """Return the launch between a change of Triton's active driver and the change back.

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


def triton_c_function(kernel: Any, arguments: list[Any], stream: int) -> Sides:
    """Return calls of Triton's compiled launch function with integers, if Triton is 3.6."""
    if not triton.__version__.startswith("3.6."):
        return {}
    compiled = kernel.warmup(*arguments, BLOCK=BLOCK, grid=GRID)
    compiled = compiled.result() if hasattr(compiled, "result") else compiled
    plain = [a.data_ptr() if hasattr(a, "data_ptr") else a for a in arguments]
    # `run` loads the kernel, before which there is no `function`
    function = compiled.run.launch
    head = (1, 1, 1, stream, compiled.function, False, False, None, None)
    every = (*head, compiled.packed_metadata, None, None, None, *plain, BLOCK)
    return {"triton C function": [lambda: function(*every)]}


def _paddle_driver(api: Any) -> Any:
    """Return a driver of Triton with Paddle's device and stream, made without its constructor."""
    from triton.backends.nvidia.driver import CudaDriver, CudaLauncher, CudaUtils

    class PaddleDriver(CudaDriver):
        def __init__(self) -> None:
            self.utils, self.launcher_cls = CudaUtils(), CudaLauncher
            self.get_current_device = lambda: 0
            self.set_current_device = lambda device: None
            self.get_device_capability = lambda device=0: divmod(
                cuda().traits(device).capability, 10
            )
            self.get_current_stream = api.current_stream

    return PaddleDriver()


def _in_stand_in(launch: Callable[[], None], driver: Any) -> Callable[[], None]:
    """Return the launch inside Paddle's torch stand-in, as in FastDeploy before #6897 and #6913."""
    import paddle

    guarded = paddle.use_compat_guard(enable=True, silent=True)(launch)

    def call() -> None:
        triton.runtime.driver.set_active(driver)
        guarded()

    return call


def tensors_of(count: int, memory: str) -> list[Any]:
    """Return inputs, and an output full of NaN, on the GPU.

    Args:
        count: a key of KERNELS.
        memory: "torch" or "Paddle", by whose tensors it is held; Paddle's needs the test plug-in.
    """
    num_tensors = KERNELS[count][1]
    arrays = [np.random.default_rng(i).random(BLOCK, np.float32) for i in range(num_tensors)]
    arrays[-1].fill(np.nan)
    if memory == "torch":
        return [torch.from_numpy(array).cuda() for array in arrays]
    import paddle

    from tests.gpu_rig import load

    place = load("real").place
    return [paddle.to_tensor(array, place=place) for array in arrays]


def sides_of(count: int, memory: str) -> Sides:
    """Return the checked calls by label for a number of arguments, the driver's at the front."""
    stock, _, named = KERNELS[count]
    numbers = tuple(named.values())
    first, second = tensors_of(count, memory), tensors_of(count, memory)
    api = api_for_type(type(first[0]))
    stream = api.current_stream(0)
    kernel = ours(count, memory)
    bound = kernel.bind(GRID, *first, *numbers, BLOCK=BLOCK)
    values = dict(zip(kernel.arg_names, [*first, *numbers, BLOCK], strict=True))
    sides: Sides = {"driver": [driver_loop(bound, values, stream)]}

    def stock_call() -> None:
        stock[GRID](*first, *numbers, BLOCK=BLOCK)

    if memory == "torch":
        sides["triton kernel[grid]"] = [stock_call]
        # another driver object of Triton's, as the one that upstream's wrapper makes for Paddle
        driver = type(triton.runtime.driver.active)()
    else:
        driver = _paddle_driver(api)
        sides["triton in the torch stand-in"] = [_in_stand_in(stock_call, driver)]
    sides["triton, active driver swapped"] = [swapped(stock_call, driver)]
    if memory == "torch":
        sides |= triton_c_function(stock, [*first, *numbers], stream)
    sides |= {
        "fd_dsa new tensors": [
            lambda: kernel[GRID](*first, *numbers, BLOCK=BLOCK),
            lambda: kernel[GRID](*second, *numbers, BLOCK=BLOCK),
        ],
        "fd_dsa unbound": [lambda: kernel[GRID](*first, *numbers, BLOCK=BLOCK)],
        "fd_dsa bound": [bound],
    }
    on_host = torch.Tensor.cpu if memory == "torch" else lambda x: x
    wanted = sum(on_host(x).numpy().astype(np.float64) for x in first[:-1]) + sum(numbers[1:])
    for label, calls in sides.items():
        calls[0]()
        found = on_host(first[-1]).numpy()
        if memory == "torch":
            first[-1].fill_(float("nan"))
        np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-4, err_msg=label)
    return sides


def compare(record: _gpu.Recorder, count: int, memory: str) -> None:
    """Measure all sides in one loop, and add cases for unbound and for bound launches."""
    times = _gpu.interleaved(sides_of(count, memory), mode="host")
    times["driver"] = {name: us / LAUNCHES_A_CALL for name, us in times["driver"].items()}
    others = {"unbound": {"fd_dsa bound"}, "bound": {"fd_dsa unbound", "fd_dsa new tensors"}}
    for kind, left_out in others.items():
        record.case(
            f"{count} arguments, {kind}, {memory} tensors",
            {label: time for label, time in times.items() if label not in left_out},
            ours=f"fd_dsa {kind}",
            floor_us=times["driver"]["p50"],
            tier="T1p" if memory == "Paddle" else "T1",
        )


def compare_on_paddle(record: _gpu.Recorder) -> None:
    """Add the cases on Paddle tensors, or a note with the reason why they are missing."""
    try:
        for count in KERNELS:
            compare(record, count, "Paddle")
    except Exception as error:
        record.note(paddle=f"not run: {type(error).__name__}: {error}")


def cases(record: _gpu.Recorder, args: Namespace) -> Iterator[tuple[str, _gpu.Case]]:
    """Yield two cases for each kernel on torch tensors, and on Paddle's if Paddle is there."""
    for count in KERNELS:
        yield f"{count} arguments", partial(compare, record, count, "torch")
    yield "Paddle tensors", partial(compare_on_paddle, record)


main = partial(_gpu.main, "launch_overhead", __doc__, cases)

if __name__ == "__main__":
    sys.exit(main())
