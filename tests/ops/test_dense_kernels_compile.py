"""Launches between the products of a layer compile for Hopper, at the sizes of real models."""

from __future__ import annotations

import pytest

from tests.compiling import output_of

SCRIPT = """
from fd_dsa.triton_runtime import Pointer
from fd_dsa.ops._dense_kernels import rms_norm_kernel, rows_at_kernel, silu_and_mul_kernel
from fd_dsa.ops._expert_kernels import choose_experts_kernel, sum_experts_kernel

FLOATS = ("epsilon", "scaling")
TYPES = {"chosen_ptr": "uint8"}

def compile(label, kernel, num_warps=4, index="int32", **constants):
    types = TYPES | {"index_ptr": index}
    def argument(name):
        if name.endswith("_ptr"):
            return Pointer(types.get(name, "float32"))
        return 0.5 if name in FLOATS else 7
    arguments = {name: argument(name) for name in kernel.arg_names if name not in constants}
    kernel.warmup(**arguments, **constants, num_warps=num_warps, capability=90)
    print(label)

compile("norm", rms_norm_kernel, 8, WIDTH=7168, BLOCK=8192)
compile("norm", rms_norm_kernel, WIDTH=384, BLOCK=512)
compile("silu", silu_and_mul_kernel, WIDTH=2048, BLOCK=1024)
for index in ("int32", "int64"):
    compile("rows", rows_at_kernel, index=index, WIDTH=7168, BLOCK=1024)
CHOICES = (256, 8, 4, 8), (256, 1, 1, 8), (8, 1, 1, 2), (9, 3, 1, 2)
for experts, groups, top_groups, top in CHOICES:
    size = 1 << (experts // groups - 1).bit_length()
    compile("choice", choose_experts_kernel, 8, NUM_EXPERTS=experts, TOP_K=top, NUM_GROUPS=groups,
            TOP_GROUPS=top_groups, NORM=True, GROUPS=1 << (groups - 1).bit_length(), SIZE=size)
compile("sum", sum_experts_kernel, NUM_EXPERTS=256, WIDTH=7168, BLOCK=1024)
"""


@pytest.mark.triton
def test_every_form_compiles() -> None:
    said = output_of(SCRIPT)
    assert said.split() == [
        *["norm"] * 2,
        "silu",
        *["rows"] * 2,
        *["choice"] * 4,
        "sum",
    ]
