"""Kernels and whole-process cases for the tests on a GPU; each case runs in a process of its own.

`python -m tests.triton_runtime.gpu_cases CASE`.
"""

from __future__ import annotations

import sys
import threading
from typing import Any

from fd_dsa.triton_runtime import Pointer, freeze, paddle_jit
from tests.triton_runtime.fakes import in_threads

import triton
import triton.language as tl


@triton.jit
def stock_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n)
    tl.store(out_ptr + offsets, x + 1.0, mask=offsets < n)


@paddle_jit(do_not_specialize=("n",))
def double_kernel(x_ptr, out_ptr, n, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + offsets, mask=offsets < n)
    tl.store(out_ptr + offsets, x * 2.0, mask=offsets < n)


N = 1000
GRID = (triton.cdiv(N, 128),)


def _tensors() -> tuple[Any, Any]:
    """Numbers on the GPU, and an output of the same size."""
    import torch

    from benchmarks._torch_device import register

    register()
    x = torch.arange(N, dtype=torch.float32, device="cuda")
    return x, torch.full_like(x, float("nan"))


def _stock(x: Any, out: Any) -> None:
    """One launch by Triton itself, checked."""
    out.fill_(float("nan"))
    stock_kernel[GRID](x, out, N, BLOCK=128)
    assert (out == x + 1).all()


def _ours(x: Any, out: Any) -> None:
    """One launch by fd_dsa, checked."""
    out.fill_(float("nan"))
    double_kernel[GRID](x, out, N, BLOCK=128)
    assert (out == x * 2).all()


def _alternate(first: Any, second: Any) -> None:
    """Both launchers in turn, on two streams; the active driver stays the same object."""
    import torch

    x, out = _tensors()
    first(x, out)
    second(x, out)
    active, finders = triton.runtime.driver.active, list(sys.meta_path)
    modules = set(sys.modules)
    side = torch.cuda.Stream()
    for stream in (side, torch.cuda.current_stream(), side):
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for run in (first, second, second, first):
                run(x, out)
        torch.cuda.synchronize()
    assert triton.runtime.driver.active is active
    assert sys.meta_path == finders
    assert {
        name for name in set(sys.modules) - modules if "fd_dsa" in name or "paddle" in name
    } == set()


def stock_first() -> None:
    """Triton creates its driver, then fd_dsa launches."""
    _alternate(_stock, _ours)


def ours_first() -> None:
    """fd_dsa launches before Triton has a driver."""
    _alternate(_ours, _stock)


def capture_after_warmup() -> None:
    """The first launch of a warmed-up kernel is inside a capture."""
    import torch

    x, out = _tensors()
    double_kernel.warmup(Pointer("float32"), Pointer("float32"), 5, BLOCK=128)
    freeze(strict=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        double_kernel[GRID](x, out, N, BLOCK=128)
    torch.cuda.synchronize()
    assert out.isnan().all()
    graph.replay()
    assert (out == x * 2).all()


def compile_ahead() -> None:
    """Compiles for Hopper without a driver; `TRITON_INTERPRET=0` on a machine without a GPU."""
    pointer = Pointer("float32")
    compiled = double_kernel.warmup(pointer, pointer, 5, BLOCK=128, capability=90)
    assert compiled is not None and len(compiled.image) > 1000


def compile_ahead_again() -> None:
    """The same, from the cache on disk."""
    from triton.compiler import ASTSource

    ASTSource.make_ir = None
    compile_ahead()


def paddle_without_torch() -> None:
    """Launches on Paddle tensors, from two threads, and torch is not there afterwards."""
    from tests.gpu_rig import load

    rig = load("real")
    import paddle

    x = paddle.to_tensor(list(range(N)), dtype="float32", place=rig.place)
    before = None
    for _ in range(3):
        out = paddle.zeros([N], "float32").to(rig.place)
        double_kernel[GRID](x, out, N, BLOCK=128)
        paddle.device.synchronize(rig.place)
        assert (out.numpy() == x.numpy() * 2).all()
        state = list(sys.meta_path), set(sys.modules)
        assert before in (None, state)
        before = state
    in_threads(lambda _: double_kernel[GRID](x, out, N, BLOCK=128), 1)
    assert "torch" not in sys.modules


def paddle_beside_the_compat_guard() -> None:
    """Launches on Paddle tensors while another thread switches Paddle's torch stand-in."""
    from tests.gpu_rig import load

    rig = load("real")
    import paddle

    x = paddle.to_tensor(list(range(N)), dtype="float32", place=rig.place)
    out = paddle.zeros([N], "float32").to(rig.place)
    done = threading.Event()

    def switch() -> None:
        while not done.is_set():
            with paddle.use_compat_guard(enable=True, silent=True):
                pass

    thread = threading.Thread(target=switch)
    thread.start()
    try:
        for _ in range(200):
            double_kernel[GRID](x, out, N, BLOCK=128)
    finally:
        done.set()
        thread.join()
    paddle.device.synchronize(rig.place)
    assert (out.numpy() == x.numpy() * 2).all()


if __name__ == "__main__":
    # the module's own kernels are those of the import, not of `__main__`
    from tests.triton_runtime import gpu_cases

    getattr(gpu_cases, sys.argv[1])()
