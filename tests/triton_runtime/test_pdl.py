"""Kernels with programmatic dependent launch, down to the driver's arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from fd_dsa.triton_runtime import Compiled
from fd_dsa.triton_runtime import kernel as runtime_kernel
from fd_dsa.triton_runtime.driver import GpuTraits
from tests.triton_runtime.fakes import FakeLibrary, X, Y, fake_compile, scale_kernel

pytestmark = pytest.mark.triton


def test_launch_attributes(library: FakeLibrary) -> None:
    kernel = scale_kernel()
    for _ in range(2):
        kernel[(3,)](X, Y, 5, 0.5, True, 7, BLOCK=64, launch_pdl=True)
    for launch in library.launches:
        assert launch.grid == (3, 1, 1)
        assert [(number, value[:4]) for number, value in launch.attributes] == [(6, b"\1\0\0\0")]


@pytest.mark.parametrize(
    ("waits", "instruction", "capability", "switch", "early"),
    [
        (True, True, 90, None, True),
        (True, True, 100, "1", True),
        (True, True, 90, "0", False),
        (True, True, 89, None, False),
        # a Triton without the instruction
        (True, False, 90, None, False),
        (False, True, 90, None, False),
    ],
)
def test_kernels_that_wait_are_launched_with_pdl(
    library: FakeLibrary,
    monkeypatch: pytest.MonkeyPatch,
    waits: bool,
    instruction: bool,
    capability: int,
    switch: str | None,
    early: bool,
) -> None:
    compilations = []

    def compile_kernel(fn: Any, arguments: Any, options: Any, capability: int) -> Compiled:
        compilations.append(options["launch_pdl"])
        ptx = "griddepcontrol.wait;" if instruction and options["launch_pdl"] else ""
        return replace(fake_compile(fn, arguments, options, capability), ptx=ptx)

    if switch is None:
        monkeypatch.delenv("FD_DSA_PDL", raising=False)
    else:
        monkeypatch.setenv("FD_DSA_PDL", switch)
    monkeypatch.setattr(runtime_kernel, "compile_kernel", compile_kernel)
    traits = GpuTraits(capability, 132, 227 << 10)
    monkeypatch.setattr(runtime_kernel.cuda(), "traits", lambda device: traits)
    kernel = scale_kernel(waits=waits)
    for _ in range(2):
        kernel[(1,)](X, Y, 5, 0.5, True, 7, BLOCK=64)
    kernel.bind((1,), X, Y, 5, 0.5, True, 7, BLOCK=64)()
    numbers = [[number for number, _ in launch.attributes] for launch in library.launches]
    assert numbers == [[6] if early else []] * 3
    # the compiled form is found again, whatever it was made with
    assert compilations == [waits and capability >= 90 and switch != "0"]
