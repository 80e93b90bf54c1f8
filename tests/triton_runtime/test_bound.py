"""Bound launches down to the driver's arguments."""

from __future__ import annotations

import pytest

from fd_dsa.errors import LaunchError
from tests.triton_runtime.fakes import (
    FakeApi,
    FakeLibrary,
    FakeTensor,
    Launch,
    X,
    Y,
    in_threads,
    scale_kernel,
)

pytestmark = pytest.mark.triton


def _values(launch: Launch) -> tuple:
    return launch.grid, launch.values


def test_bound_launch(library: FakeLibrary, api: FakeApi) -> None:
    kernel = scale_kernel()
    launch = kernel.bind((2,), X, Y, 5, 0.5, True, 7, BLOCK=64, scalars=("n", "factor"))
    asked = api.asked
    launch()
    launch(6, 0.25)
    launch(7, 1.0, grid=(9, 2))
    api.stream = 0xDEF0
    launch()
    assert api.asked == asked
    rest = (True, 7)
    assert [_values(launch) for launch in library.launches] == [
        ((2, 1, 1), (0x7000, 0x8000, 5, 0.5, *rest)),
        ((2, 1, 1), (0x7000, 0x8000, 6, 0.25, *rest)),
        ((9, 2, 1), (0x7000, 0x8000, 7, 1.0, *rest)),
        ((2, 1, 1), (0x7000, 0x8000, 5, 0.5, *rest)),
    ]
    assert [launch.stream for launch in library.launches] == [0xABC0] * 3 + [0xDEF0]
    kernel[(1,)](X, Y, 5, 0.5, True, 7, BLOCK=64)
    assert len(library.loaded) == 1


def test_bound_launch_without_scalars(library: FakeLibrary) -> None:
    launch = scale_kernel().bind((2,), X, Y, 5, 0.5, True, 7, BLOCK=64)
    launch()
    launch(grid=(4,))
    launch()
    launch(grid=(0,))
    assert [launch.grid[0] for launch in library.launches] == [2, 4, 2]
    with pytest.raises(LaunchError, match=r"do not fit the scalars.*it has none"):
        launch(5)


def test_bound_grid_function(library: FakeLibrary) -> None:
    launch = scale_kernel().bind(
        lambda meta: (meta["n"] * 2,), X, Y, 5, 0.5, True, 7, BLOCK=64, scalars=("n",)
    )
    launch()
    launch(6)
    launch(0)
    assert [launch.grid[0] for launch in library.launches] == [10, 12]


def test_exchange(library: FakeLibrary) -> None:
    launch = scale_kernel().bind((2,), X, Y, 5, 0.5, True, 7, BLOCK=64)
    launch.exchange(y_ptr=FakeTensor(0xC000))
    launch()
    assert library.launches[-1].values[:2] == (0x7000, 0xC000)
    for tensor, message in (
        (FakeTensor(0xC000, "fake.bfloat16"), r"is \*bf16 on device 0, bound is \*fp32"),
        (FakeTensor(0xC004), "an address that 16 does not divide"),
        (FakeTensor(0xC000, device=1), "on device 1, bound is"),
        (FakeTensor(0xC000, device=-1), "host memory"),
        (5, "'y_ptr' is a int; a tensor is bound there"),
    ):
        with pytest.raises(LaunchError, match=message):
            launch.exchange(y_ptr=tensor)
    with pytest.raises(LaunchError, match="no tensor is bound to 'n'"):
        launch.exchange(n=X)
    launch()
    assert library.launches[-1].values[:2] == (0x7000, 0xC000)


@pytest.mark.parametrize(
    ("scalars", "message"),
    [
        (("stride",), "'stride' changes from launch to launch.*do_not_specialize"),
        (("x_ptr",), "scalar 'x_ptr' is FakeTensor.*a number"),
        (("BLOCK",), "scalar 'BLOCK' is 64; a number that is passed"),
        (("m",), "scalar 'm' is no parameter"),
    ],
)
def test_scalars_that_cannot_change(library: FakeLibrary, scalars: tuple, message: str) -> None:
    with pytest.raises(LaunchError, match=message):
        scale_kernel().bind((2,), X, Y, 5, 0.5, True, 7, BLOCK=64, scalars=scalars)


def test_scalar_of_another_type(library: FakeLibrary) -> None:
    launch = scale_kernel().bind((2,), X, Y, 5, 0.5, True, 7, BLOCK=64, scalars=("n",))
    for wrong in (1 << 40, 0.5):
        with pytest.raises(LaunchError, match=r"do not fit the scalars .* \(n: i32"):
            launch(wrong)
    launch(8)
    assert library.launches[-1].values[2] == 8


def test_bound_launches_of_many_threads(library: FakeLibrary) -> None:
    launch = scale_kernel().bind((2,), X, Y, 5, 0.5, True, 7, BLOCK=64, scalars=("n",))

    def work(value: int) -> None:
        for _ in range(100):
            launch(value)

    in_threads(work, 4)
    counts = [sum(launch.values[2] == i for launch in library.launches) for i in range(4)]
    assert counts == [100] * 4
