"""Host cost of one kernel launch, with 5 and with 18 arguments, unbound and bound.

`driver` is the driver's launch function in a loop in C, everything prepared. The host is timed,
and the device is waited for outside the clock. Other labels: Triton's own `kernel[grid]`; the
swap of Triton's active driver around it that FastDeploy #6897 makes; Triton's compiled launch
function on plain integers (Triton 3.6 only); ours. "new tensors" means that every launch gets
other tensor objects than the one before, so that all of them are checked again.

Where Paddle and the test plug-in are there, the same kernels are launched on Paddle tensors too,
and against Triton with Paddle's torch stand-in switched on and off around every launch.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch

from benchmarks import _gpu
from benchmarks._launch_kernels import (
    BLOCK,
    GRID,
    KERNELS,
    LAUNCHES_A_CALL,
    Sides,
    ours,
    sides_of,
    stock_call,
    swapped,
    triton_c_function,
)

import triton


def _tensors(count: int) -> list[torch.Tensor]:
    """Inputs, and an output full of NaN, on the GPU."""
    tensors = [torch.randn(BLOCK, device="cuda") for _ in range(count)]
    tensors[-1].fill_(float("nan"))
    return tensors


def _check(call: Any, inputs: list[Any], numbers: tuple[int, ...], out: Any, label: str) -> None:
    """Fail unless one call writes the right sums."""
    out.fill_(float("nan"))
    call()
    expected = sum(tensor.double() for tensor in inputs) + sum(numbers[1:])
    torch.testing.assert_close(
        out.double(), expected, atol=1e-4, rtol=1e-5, msg=lambda text: f"{label}: {text}"
    )


def _sides(count: int) -> dict[str, list[_gpu.Call]]:
    """Label -> the calls of one number of arguments on torch memory, each one checked."""
    stock, num_tensors, named = KERNELS[count]
    numbers = tuple(named.values())
    first, second = _tensors(num_tensors), _tensors(num_tensors)
    stream = torch._C._cuda_getCurrentRawStream(0)
    call = stock_call(count, first)
    # another driver object of Triton's, as the one that upstream's wrapper makes for Paddle
    other = type(triton.runtime.driver.active)()
    triton_sides: Sides = {
        "triton kernel[grid]": [call],
        "triton, active driver swapped": [swapped(call, other)],
        "triton C function": [triton_c_function(stock, [*first, *numbers], stream)],
    }
    sides = sides_of(count, "torch", (first, second), stream, triton_sides)
    sides = {label: calls for label, calls in sides.items() if None not in calls}
    for label, calls in sides.items():
        _check(calls[0], first[:-1], numbers, first[-1], label)
    return sides


def _record(record: _gpu.Recorder, count: int, sides: dict[str, list[Any]], where: str) -> None:
    """Measure all sides in one loop; a case for unbound and one for bound launches."""
    times = _gpu.interleaved(sides, mode="host")
    scale = {"driver": 1 / LAUNCHES_A_CALL}
    times = {
        label: {name: value * scale.get(label, 1) for name, value in found.items()}
        for label, found in times.items()
    }
    others = {"unbound": {"fd_dsa bound"}, "bound": {"fd_dsa unbound", "fd_dsa new tensors"}}
    for kind, left_out in others.items():
        record.case(
            f"{count} arguments, {kind}, {where}",
            {label: time for label, time in times.items() if label not in left_out},
            ours=f"fd_dsa {kind}",
            floor_us=times["driver"]["p50"],
            tier="T1p" if where.startswith("Paddle") else "T1",
        )


def _paddle_rows(record: _gpu.Recorder) -> None:
    """The rows on Paddle tensors, or a note that says why there are none."""
    if find_spec("paddle") is None:
        record.note(paddle="not run: no Paddle on this machine")
        return
    from benchmarks._launch_paddle import paddle_sides

    for count in KERNELS:
        try:
            sides = paddle_sides(count)
        except Exception as error:
            record.note(paddle=f"not run: {type(error).__name__}: {error}")
            return
        _record(record, count, sides, "Paddle tensors")


def subjects() -> dict[str, tuple[_gpu.Call, list[torch.Tensor]]]:
    """A bound and an unbound launch of the kernel with 18 arguments."""
    _, num_tensors, named = KERNELS[18]
    kernel, numbers = ours(18, "torch"), tuple(named.values())
    tensors = _tensors(num_tensors)
    bound = kernel.bind(GRID, *tensors, *numbers, BLOCK=BLOCK)
    return {
        "bound": (bound, [tensors[-1]]),
        "unbound": (lambda: kernel[GRID](*tensors, *numbers, BLOCK=BLOCK), [tensors[-1]]),
    }


def cases(record: _gpu.Recorder, args: Namespace) -> Iterator[tuple[str, _gpu.Case]]:
    """Two for each kernel on torch tensors, and where Paddle is, on Paddle's."""
    for count in KERNELS:
        name = f"{count} arguments"
        yield name, lambda count=count: _record(record, count, _sides(count), "torch tensors")
    yield "Paddle tensors", partial(_paddle_rows, record)


main = partial(_gpu.main, "launch_overhead", __doc__, cases)

if __name__ == "__main__":
    sys.exit(main())
