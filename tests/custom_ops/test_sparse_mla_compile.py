"""What the compiler makes of the kernels of sparse MLA; no GPU is needed."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from custom_ops import build_library
from tests.custom_ops.test_build import toolkit


@pytest.mark.parametrize(("name", "kernels"), [("wide", 6), ("narrow", 4)])
def test_products_are_not_serialised_and_nothing_is_spilled(
    tmp_path: Path, name: str, kernels: int
) -> None:
    home = toolkit()
    source = build_library.SOURCES / f"sparse_mla_{name}.cu"
    command = [f"{home}/bin/nvcc", "-O3", "-std=c++17", "-Xptxas", "-v", "-c", str(source)]
    command += ["-gencode=arch=compute_90a,code=sm_90a", "-o", str(tmp_path / "kernel.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # ptxas says so where a product has to wait for the one before it
    assert "serialized" not in done.stderr and "setmaxnreg" not in done.stderr, done.stderr
    spilled = [
        int(line.split("bytes spill stores")[0].split(",")[-1])
        for line in done.stderr.splitlines()
        if "bytes spill stores" in line
    ]
    assert spilled == [0] * kernels, done.stderr
