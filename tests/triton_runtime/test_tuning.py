"""Heuristics and autotuning, interpreted here and compiled on a driver that takes notes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import pytest

from fd_dsa.errors import LaunchError
from fd_dsa.triton_runtime import (
    INTERPRETING,
    Pointer,
    autotune,
    freeze,
    heuristics,
    paddle_jit,
    register_device_api,
    warming,
)
from tests.triton_runtime.fakes import FakeApi, FakeLibrary, FakeTensor, driven_by

import triton
import triton.language as tl

try:
    import paddle
except ImportError:
    paddle = None

pytestmark = pytest.mark.triton
interpreted = pytest.mark.skipif(
    not INTERPRETING or paddle is None, reason="kernels are compiled in this process"
)
CONFIGS = [triton.Config({"BLOCK": block}, num_warps=block // 32) for block in (64, 128, 256)]


def computed():
    @heuristics({"BLOCK": lambda args: triton.next_power_of_2(args["n"])})
    @paddle_jit(do_not_specialize=("n",))
    def fill_kernel(out_ptr, n, BLOCK: tl.constexpr):
        offsets = tl.arange(0, BLOCK)
        tl.store(out_ptr + offsets, BLOCK, mask=offsets < n)

    return fill_kernel


def tuned(configs: list | None = None, key: tuple[str, ...] = ("n",)):
    @autotune(CONFIGS if configs is None else configs, key=key)
    @paddle_jit(do_not_specialize=("n",))
    def fill_kernel(out_ptr, n, BLOCK: tl.constexpr):
        offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
        tl.store(out_ptr + offsets, BLOCK, mask=offsets < n)

    return fill_kernel


def cover(meta: dict) -> tuple[int]:
    return (triton.cdiv(meta["n"], meta["BLOCK"]),)


@interpreted
def test_computed_constant() -> None:
    out = paddle.zeros([100], dtype="int32")
    computed()[(1,)](out, 100)
    assert (out.numpy() == 128).all()
    launch = computed().bind((1,), out, 50)
    launch()
    assert (out.numpy()[:50] == 64).all()


@interpreted
def test_first_configuration_when_interpreted() -> None:
    out = paddle.zeros([100], dtype="int32")
    tuned()[cover](out, 100)
    assert (out.numpy() == 64).all()


class TimedLibrary(FakeLibrary):
    """A library on which a launch of many warps is fast, except that 8 are too many."""

    def cuEventElapsedTime(self, elapsed_ms: object, begin: object, end: object) -> int:
        num_warps = self.launches[-1].block[0] // 32
        elapsed_ms._obj.value = {2: 3.0, 4: 1.0, 8: 2.0}[num_warps]
        return 0


@pytest.fixture
def library(compiling: None) -> Iterator[TimedLibrary]:
    register_device_api(FakeTensor, FakeApi())
    with driven_by(TimedLibrary(codes="Qi")) as library:
        yield library


def test_fastest_configuration(library: TimedLibrary) -> None:
    kernel, out = tuned(), FakeTensor(0x7000, "fake.int32")
    kernel[cover](out, 1000)
    assert [config["BLOCK"] for config in kernel.choices.values()] == [128]
    assert (library.launches[-1].grid[0], library.launches[-1].block[0]) == (8, 128)
    measured = len(library.launches)
    kernel[cover](out, 1000)
    kernel.bind(cover, out, 1000)()
    assert len(library.launches) == measured + 2
    kernel[cover](out, 900)
    kernel[cover](FakeTensor(0x7000, "fake.int64"), 900)
    assert len(kernel.choices) == 3


def test_nothing_is_measured_while_serving(
    library: TimedLibrary, caplog: pytest.LogCaptureFixture
) -> None:
    kernel, out = tuned(), FakeTensor(0x7000, "fake.int32")
    assert len(kernel.warmup(Pointer("int32"), 5)) == 3
    freeze()
    for _ in range(3):
        kernel[cover](out, 1000)
    assert [launch.block[0] for launch in library.launches] == [64] * 3
    assert len(caplog.records) == 1
    assert "kernel fill_kernel: not tuned for {'n': 1000}" in caplog.text
    with warming():
        kernel[cover](out, 900)
    assert library.launches[-1].block[0] == 128
    freeze(strict=True)
    with pytest.raises(LaunchError, match="not tuned for"):
        kernel[cover](out, 800)


def test_wrong_declarations() -> None:
    with pytest.raises(LaunchError, match="needs one configuration at least"):
        tuned([])
    with pytest.raises(LaunchError, match="tuning key 'm' is no parameter"):
        tuned(key=("m",))
    with pytest.raises(LaunchError, match="declares 'm', which is no parameter"):
        paddle_jit(do_not_specialize=("m",))(_plain)


def _plain(out_ptr):
    tl.store(out_ptr, 1)


@pytest.mark.parametrize("make", [computed, tuned])
def test_what_is_made_here_cannot_be_given_as_well(make: Callable[[], Any]) -> None:
    kernel = make()
    for launch in (kernel[(1,)], partial(kernel.bind, (1,))):
        with pytest.raises(LaunchError, match="'BLOCK' is given twice"):
            launch(None, 8, BLOCK=64)
        with pytest.raises(LaunchError, match="multiple values for argument 'n'"):
            launch(None, 8, n=8)
