"""Kernels compiled for Hopper and launched on a driver that takes notes, without a GPU.

Where this process interprets kernels, they run in one that compiles.
"""

from __future__ import annotations

import re
import struct
from pathlib import Path

import pytest

from fd_dsa.errors import BackendUnavailable
from fd_dsa.triton_runtime import INTERPRETING, Pointer
from tests.triton_runtime.fakes import FakeLibrary, X, Y, run_module, scale_kernel

import triton

pytestmark = [pytest.mark.triton, pytest.mark.slow]
compiled = pytest.mark.skipif(INTERPRETING, reason="kernels are interpreted in this process")


@pytest.mark.skipif(not INTERPRETING, reason="the tests run in this process")
def test_in_a_compiling_process(tmp_path: Path) -> None:
    arguments = "pytest", "-q", "-p", "no:cacheprovider", __file__
    output = run_module(tmp_path, *arguments, TRITON_INTERPRET="0")
    assert "5 passed" in output, output


def test_the_cache_survives_a_restart(tmp_path: Path) -> None:
    for case in ("compile_ahead", "compile_ahead_again"):
        run_module(tmp_path, "tests.triton_runtime.gpu_cases", case, TRITON_INTERPRET="0")


@compiled
def test_what_the_driver_gets(library: FakeLibrary) -> None:
    kernel, rest = scale_kernel(), (0.5, True, 7)
    for _ in range(2):
        library.codes = "QQif?i"
        kernel[(2, 3)](X, Y, 5, *rest, BLOCK=64, num_warps=2)
        library.codes = "QQqf?i"
        kernel[(2, 3)](X, Y, 1 << 40, *rest, BLOCK=64, num_warps=2)
    values = [(0x7000, 0x8000, n, *rest) for n in (5, 1 << 40)]
    assert [launch.values for launch in library.launches] == values * 2
    assert {launch.block for launch in library.launches} == {(64, 1, 1)}
    assert len(library.loaded) == 2 and min(map(len, library.loaded)) > 1000


@compiled
def test_a_compiled_kernel_takes_what_a_launch_passes() -> None:
    pointer = Pointer("float32")
    made = scale_kernel().warmup(pointer, pointer, 5, 0.5, True, 7, BLOCK=64, capability=90)
    entry = re.search(r"\.entry\s+scale_kernel\s*\((.*?)\)", made.ptx, re.DOTALL)
    bits = [int(width) for width in re.findall(r"\.param\s+\.\w(\d+)\b", entry[1])]
    passed = [8 * struct.calcsize(code) for code in made.codes]
    # after the arguments at most two scratch pointers
    assert bits[: len(passed)] == passed and bits[len(passed) :] in ([64], [64, 64])


class _Untouchable:
    """A driver that nobody may ask anything."""

    def __getattr__(self, name: str) -> None:
        raise AssertionError(f"the active driver was asked for {name}")


@compiled
def test_the_active_driver_is_never_asked(library: FakeLibrary) -> None:
    config = triton.runtime.driver
    before, untouchable = dict(vars(config)), _Untouchable()
    config.set_active(untouchable)
    try:
        kernel = scale_kernel()
        for _ in range(2):
            kernel[(1,)](X, Y, 5, 0.5, True, 7, BLOCK=256)
        kernel.bind((1,), X, Y, 5, 0.5, True, 7, BLOCK=256)()
        assert config.active is untouchable
    finally:
        vars(config).update(before)
    assert len(library.launches) == 3


@compiled
def test_a_cache_that_cannot_be_written_is_named(
    library: FakeLibrary, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "file" / "cache"))
    with pytest.raises(BackendUnavailable, match=r"scale_kernel: Triton cannot write.*file.*set T"):
        scale_kernel()[(1,)](X, Y, 5, 0.5, True, 7, BLOCK=512)
    assert library.launches == []
