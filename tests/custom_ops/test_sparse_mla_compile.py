"""What the compiler makes of the kernel of sparse MLA for many heads; no GPU is needed."""

from __future__ import annotations

import subprocess
from pathlib import Path

from custom_ops import build_library
from tests.custom_ops.test_build import toolkit


def test_products_are_not_serialised_and_sums_stay_in_registers(tmp_path: Path) -> None:
    home = toolkit()
    source = build_library.SOURCES / "sparse_mla_wide.cu"
    command = [f"{home}/bin/nvcc", "-O3", "-std=c++17", "-Xptxas", "-v", "-c", str(source)]
    command += ["-gencode=arch=compute_90a,code=sm_90a", "-o", str(tmp_path / "wide.o")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    # ptxas says so where a product has to wait for the one before it
    assert "serialized" not in done.stderr and "setmaxnreg" not in done.stderr, done.stderr
    spilled = [
        int(line.split("bytes spill stores")[0].split(",")[-1])
        for line in done.stderr.splitlines()
        if "bytes spill stores" in line
    ]
    # a few addresses of the warps that bring records; a thread's sums alone are 512 bytes
    assert len(spilled) == 2 and max(spilled) <= 64, done.stderr
