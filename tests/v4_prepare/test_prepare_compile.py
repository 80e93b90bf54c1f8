"""The kernels of the derived lists compile for Hopper, on any machine."""

from __future__ import annotations

import pytest

from tests.compiling import output_of

SCRIPT = """
from fd_dsa.triton_runtime import Pointer
from fd_dsa.v4_prepare.list_kernel import csa_rows_kernel, fused_list_kernel

def compile(kernel, without=(), **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    arguments = {n: Pointer("int32") if n.endswith("_ptr") else 7 for n in names}
    kernel.warmup(**arguments | dict.fromkeys(without), **constants, capability=90)
    print(kernel.__name__, *without)

# a small model, V4-Flash, V4-Pro
for topk in (3, 512, 1024):
    compile(csa_rows_kernel, TOPK=topk, ENTRIES_PER_BLOCK=32, TILE=512 if topk > 3 else 4)
# CSA lists not translated yet, others, window only
for without in (["compressed_ptr"], [], ["compressed_indptr_ptr", "compressed_ptr"]):
    compile(fused_list_kernel, without, WINDOW=128, WINDOW_TILE=128, SUM_TILE=1024, TILE=256)
"""


@pytest.mark.triton
def test_every_form_compiles() -> None:
    said = output_of(SCRIPT)
    assert len(said.splitlines()) == 6
