"""The launch path down to the driver's arguments, on a driver that takes notes."""

from __future__ import annotations

import gc
import sys
import weakref
from itertools import combinations
from typing import Any

import numpy as np
import pytest

from fd_dsa.errors import DeviceError, LaunchError
from fd_dsa.triton_runtime import paddle_jit
from tests.triton_runtime.fakes import (
    FakeApi,
    FakeLibrary,
    FakeTensor,
    X,
    Y,
    in_threads,
    scale_kernel,
)

import triton
import triton.language as tl

pytestmark = pytest.mark.triton

BASE = {"x_ptr": X, "y_ptr": Y, "n": 5, "factor": 0.5, "flag": True, "stride": 7, "BLOCK": 64}


def test_what_the_driver_gets(library: FakeLibrary, api: FakeApi) -> None:
    kernel = scale_kernel()
    for n in (5, 1, 16, -3):
        kernel[(2, 3)](X, Y, n, 0.5, True, 7, BLOCK=64, num_warps=2)
        api.stream += 1
    launches = library.launches
    assert [launch.values for launch in launches] == [
        (0x7000, 0x8000, n, 0.5, True, 7) for n in (5, 1, 16, -3)
    ]
    assert {launch.grid for launch in launches} == {(2, 3, 1)}
    assert {launch.block for launch in launches} == {(64, 1, 1)}
    assert [launch.stream for launch in launches] == [0xABC0 + i for i in range(4)]
    assert len({launch.function for launch in launches}) == len(library.loaded) == 1


def test_positional_and_keyword_arguments_are_one_variant(library: FakeLibrary) -> None:
    kernel = scale_kernel()
    kernel[(1,)](X, Y, 5, 0.5, True, 7, 64)
    kernel[(1,)](X, Y, 5, BLOCK=64, stride=7, flag=True, factor=0.5)
    kernel[(1,)](y_ptr=Y, x_ptr=X, n=5, BLOCK=64, stride=7, flag=True, factor=0.5)
    assert len(library.loaded) == 1
    assert len({launch.values for launch in library.launches}) == 1


@pytest.mark.parametrize(
    ("change", "codes"),
    [
        ({"x_ptr": FakeTensor(0x7004)}, "QQif?i"),
        ({"x_ptr": FakeTensor(0x7000, "fake.bfloat16")}, "QQif?i"),
        ({"n": 1 << 40}, "QQqf?i"),
        ({"n": 1 << 63}, "QQQf?i"),
        ({"stride": 1}, "QQif?"),
        ({"stride": 32}, "QQif?i"),
        ({"flag": None}, "QQifi"),
        # an int that equals the bool
        ({"flag": 1}, "QQifi"),
        ({"factor": 2}, "QQii?i"),
        ({"BLOCK": 128}, "QQif?i"),
        ({"num_warps": 8}, "QQif?i"),
        ({"enable_fp_fusion": False}, "QQif?i"),
    ],
)
def test_what_makes_another_variant(library: FakeLibrary, change: dict, codes: str) -> None:
    kernel = scale_kernel()
    for _ in range(2):
        library.codes = "QQif?i"
        kernel[(1,)](**BASE)
        library.codes = codes
        kernel[(1,)](**BASE | change)
    assert len(library.loaded) == 2
    first, second, third, fourth = (launch.function for launch in library.launches)
    assert first == third != second == fourth
    given = BASE | change
    passed = [v for v in library.launches[1].values if not isinstance(v, bool)]
    assert passed[2] == given["n"]
    assert passed[0] == given["x_ptr"].address


@paddle_jit
def fill_kernel(out_ptr, VALUE: tl.constexpr):
    tl.store(out_ptr + tl.arange(0, 16), VALUE)


def test_a_nan_constant_is_compiled_once(library: FakeLibrary) -> None:
    library.codes = "Q"
    for _ in range(3):
        fill_kernel[(1,)](X, float("nan"))
    assert (len(library.loaded), len(library.launches)) == (1, 3)
    fill_kernel[(1,)](X, 1.0)
    assert len(library.loaded) == 2


def test_constants_that_differ_in_their_sign_alone(library: FakeLibrary) -> None:
    library.codes = "Q"
    for _ in range(2):
        for value in (0.0, -0.0, 0):
            fill_kernel[(1,)](X, VALUE=value)
    assert len(library.loaded) == 3
    functions = [launch.function for launch in library.launches]
    assert functions[:3] == functions[3:]


# the defaults: other spellings of one variant
DEFAULTS = {"num_warps": 4, "num_stages": 3, "enable_fp_fusion": True, "maxnreg": None}
SPELLINGS = [dict(part) for n in range(5) for part in combinations(DEFAULTS.items(), n)]


def count_checks(kernel: Any, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """Return a list that gets an entry for each launch of a kernel that passes all checks."""
    checked: list[None] = []
    bind = kernel.signature.bind

    def counted(*given: Any) -> Any:
        checked.append(None)
        return bind(*given)

    monkeypatch.setattr(kernel.signature, "bind", counted)
    return checked


def test_each_spelling_passes_all_checks_once(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = scale_kernel()
    checked = count_checks(kernel, monkeypatch)
    for _ in range(3):
        for spelling in SPELLINGS:
            kernel[(1,)](**BASE, **spelling)
    assert (len(library.loaded), len(library.launches)) == (1, 48)
    assert len(checked) == 16


def test_each_constant_passes_all_checks_once(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel, library.codes = paddle_jit(fill_kernel.fn), "Q"
    checked = count_checks(kernel, monkeypatch)
    for _ in range(4):
        # True and a float equal a number before them
        for value in (*range(40), True, 10.0, 0.5):
            kernel[(1,)](X, VALUE=value, num_warps=8)
    assert len(library.loaded) == len(checked) == 43
    functions = [launch.function for launch in library.launches]
    assert functions[:43] == functions[-43:]
    with pytest.raises(LaunchError, match="'VALUE' is a list, but it is compiled in"):
        kernel[(1,)](X, VALUE=[1], num_warps=8)


def test_ints_that_select_no_variant_pass_all_checks_once(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch
) -> None:
    kernel = scale_kernel()
    checked = count_checks(kernel, monkeypatch)
    for n in (5, 1, 16, -3, 0, (1 << 31) - 1, -(1 << 31)):
        kernel[(1,)](X, Y, n, 0.5, True, 7, BLOCK=64)
    assert len(checked) == len(library.loaded) == 1
    # one more variant for each of these, and a launch of 64 bits passes all checks every time
    for _ in range(2):
        for stride in (1, 32, 7):
            kernel[(1,)](X, Y, 5, 0.5, True, stride, BLOCK=64)
        kernel[(1,)](X, Y, 1 << 31, 0.5, True, 7, BLOCK=64)
        kernel[(1,)](X, Y, 6, 0.5, True, 7, BLOCK=64)
    assert (len(checked), len(library.loaded)) == (5, 4)


def test_the_tensors_of_every_launch_are_checked(library: FakeLibrary) -> None:
    kernel = scale_kernel()
    for _ in range(2):
        kernel[(1,)](X, Y, 5, 0.5, True, 7, BLOCK=64)
    moved = FakeTensor(0x9000)
    kernel[(1,)](moved, Y, 6, 0.5, True, 7, BLOCK=64)
    moved.address, moved.device = 0xA000, -1
    for tensor, message in (
        (moved, r"scale_kernel: argument 'x_ptr'.*host memory"),
        (FakeTensor(0x9000, dense=False), "'x_ptr' .*not contiguous"),
        (FakeTensor(0x9000, "fake.complex64"), "'x_ptr' has dtype complex64"),
    ):
        with pytest.raises(LaunchError, match=message):
            kernel[(1,)](tensor, Y, 6, 0.5, True, 7, BLOCK=64)
    assert [launch.values[0] for launch in library.launches] == [0x7000, 0x7000, 0x9000]


def test_an_address_used_again_by_another_tensor_is_checked(library: FakeLibrary) -> None:
    kernel = scale_kernel()
    first = FakeTensor(0xB000)
    for _ in range(2):
        kernel[(1,)](first, Y, 5, 0.5, True, 7, BLOCK=64)
    del first
    gc.collect()
    kernel[(1,)](FakeTensor(0xB000, "fake.bfloat16"), Y, 5, 0.5, True, 7, BLOCK=64)
    assert len(library.loaded) == 2
    assert library.launches[-1].function != library.launches[0].function


def test_tensors_are_not_kept_alive(library: FakeLibrary) -> None:
    kernel, tensor = scale_kernel(), FakeTensor(0xB000)
    for _ in range(2):
        kernel[(1,)](tensor, Y, 5, 0.5, True, 7, BLOCK=64)
    alive = weakref.ref(tensor)
    del tensor
    gc.collect()
    assert alive() is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"x_ptr": FakeTensor(0x7000, device=-1)}, "argument 'x_ptr': the tensor is in host"),
        ({"x_ptr": FakeTensor(0x7000, device=1)}, "'y_ptr' is a .* on device 0, but 'x_ptr'"),
        ({"x_ptr": FakeTensor(0x7000, dense=False)}, "argument 'x_ptr' .*not contiguous"),
        ({"y_ptr": FakeTensor(0x7000, "fake.complex64")}, "'y_ptr' has dtype complex64"),
        ({"n": "5"}, "argument 'n' is a str"),
        ({"n": 1 << 64}, "argument 'n' is 18446744073709551616, beyond 64 bits"),
        ({"size": 3}, "unexpected keyword argument 'size'; parameters are x_ptr"),
        ({"num_warps": 3}, "option num_warps is 3, .* powers of two from 1 to 32"),
        ({"num_warps": "4"}, "option num_warps is '4'"),
        ({"BLOCK": [8]}, "argument 'BLOCK' is a list, but it is compiled in"),
        ({"BLOCK": X}, "argument 'BLOCK' is a FakeTensor"),
    ],
)
@pytest.mark.parametrize("warm", [0, 2])
def test_refusals(library: FakeLibrary, change: dict, message: str, warm: int) -> None:
    kernel = scale_kernel()
    for _ in range(warm):
        kernel[(1,)](**BASE)
    with pytest.raises(LaunchError, match=f"kernel scale_kernel: .*{message}"):
        kernel[(1,)](**BASE | change)
    assert len(library.launches) == warm


@pytest.mark.parametrize("warm", [0, 2])
def test_missing_argument(library: FakeLibrary, warm: int) -> None:
    kernel = scale_kernel()
    for _ in range(warm):
        kernel[(1,)](**BASE)
    with pytest.raises(LaunchError, match="scale_kernel: missing a required argument: 'stride'"):
        kernel[(1,)](X, Y, 5, 0.5, True, BLOCK=64)
    with pytest.raises(LaunchError, match="multiple values for argument 'x_ptr'"):
        scale_kernel()[(1,)](*BASE.values(), x_ptr=X)


def test_tensor_on_another_device_than_the_current_one(library: FakeLibrary, api: FakeApi) -> None:
    library.num_devices = 2
    kernel = scale_kernel()
    for _ in range(2):
        kernel[(1,)](X, Y, 5, 0.5, True, 7, BLOCK=64)
    api.device = 1
    with pytest.raises(LaunchError, match="on device 0, but the current device is 1"):
        kernel[(1,)](X, Y, 5, 0.5, True, 7, BLOCK=64)
    there = [FakeTensor(0x7000, device=1), FakeTensor(0x8000, device=1)]
    for _ in range(2):
        kernel[(1,)](*there, 5, 0.5, True, 7, BLOCK=64)
    assert len(library.loaded) == 2


def test_grids(library: FakeLibrary) -> None:
    kernel = scale_kernel()

    def cover(meta: dict) -> tuple[int]:
        return (triton.cdiv(meta["n"], meta["BLOCK"]) * meta["num_warps"],)

    for _ in range(2):
        kernel[cover](X, Y, 130, 0.5, True, 7, BLOCK=64, num_warps=2)
        kernel[[4, 5, 6]](X, Y, 130, 0.5, True, 7, BLOCK=64, num_warps=2)
        kernel[(4, 0)](X, Y, 130, 0.5, True, 7, BLOCK=64, num_warps=2)
        kernel[cover](X, Y, 0, 0.5, True, 7, BLOCK=64, num_warps=2)
    assert [launch.grid for launch in library.launches] == [(6, 1, 1), (4, 5, 6)] * 2
    launched = len(library.launches)
    for wrong in ((1, 2, 3, 4), (), (-1,), (1.5,), ("a",), 3, None, (1 << 31,), (1, 65536)):
        for grid in (wrong, lambda meta, wrong=wrong: wrong):
            with pytest.raises(LaunchError, match="wanted one to three numbers"):
                kernel[grid](X, Y, 130, 0.5, True, 7, BLOCK=64)
    assert len(library.launches) == launched


def test_numpy_scalars(library: FakeLibrary) -> None:
    kernel = scale_kernel()
    for _ in range(2):
        kernel[(1,)](X, Y, np.int64(5), np.float32(0.5), np.bool_(True), np.int32(7), BLOCK=64)
    assert library.launches[1].values == (0x7000, 0x8000, 5, 0.5, True, 7)


def test_first_launches_of_many_threads_compile_once(library: FakeLibrary) -> None:
    kernel = scale_kernel()

    def work(value: int) -> None:
        for _ in range(50):
            kernel[(1,)](X, Y, value, 0.5, True, 7, BLOCK=64)

    in_threads(work, 8)
    assert len(library.loaded) == 1
    counts = [sum(launch.values[2] == i for launch in library.launches) for i in range(8)]
    assert counts == [50] * 8


def test_a_thread_without_context_gets_one(library: FakeLibrary) -> None:
    kernel = scale_kernel()
    kernel[(1,)](X, Y, 5, 0.5, True, 7, BLOCK=64)
    library.needs_context = True
    in_threads(lambda _: kernel[(1,)](X, Y, 6, 0.5, True, 7, BLOCK=64), 1)
    assert library.launches[-1].values[2] == 6


def test_another_context_is_put_back(library: FakeLibrary) -> None:
    kernel = scale_kernel()
    library.enter(0x1001)
    for n in (5, 6):
        kernel[(1,)](X, Y, n, 0.5, True, 7, BLOCK=64)
        assert library.context() == 0x1001
    assert [launch.values[2] for launch in library.launches] == [5, 6]


def test_errors_of_the_driver(library: FakeLibrary, monkeypatch: pytest.MonkeyPatch) -> None:
    kernel = scale_kernel()
    monkeypatch.setattr(library, "cuLaunchKernelEx", lambda *args: 700)
    for _ in range(2):
        with pytest.raises(DeviceError, match=r"launch of kernel .*scale_kernel: CUDA error 700"):
            kernel[(1,)](X, Y, 5, 0.5, True, 7, BLOCK=64)


def test_modules_and_import_paths_are_left_alone(library: FakeLibrary) -> None:
    kernel = scale_kernel()
    kernel[(1,)](X, Y, 5, 0.5, True, 7, BLOCK=64)
    before = dict(sys.modules), list(sys.meta_path)
    for n in (5, 16):
        kernel[(1,)](X, Y, n, 0.5, True, 7, BLOCK=64)
    assert before == (dict(sys.modules), list(sys.meta_path))


def test_a_call_without_a_grid_says_how_to_launch():
    @paddle_jit
    def kernel(x):
        pass

    with pytest.raises(LaunchError, match=r"kernel kernel: called without a grid; launch .*\[grid"):
        kernel(5)
