"""Kernels that write keys and queries compile for Hopper in every supported Triton, anywhere."""

from __future__ import annotations

import pytest

from tests.compiling import output_of

SCRIPT = """
from fd_dsa.triton_runtime import Pointer
from fd_dsa.ops.cache_write.triton_kernel import write_caches_kernel
from fd_dsa.ops.query.triton_kernel import prepare_query_kernel
from fd_dsa.ops.mla_query.triton_kernel import BLOCK_ROWS, NUM_WARPS, prepare_mla_query_kernel

TYPES = {"position_ids_ptr": "int64", "slot_mapping_ptr": "int64", "latent_ptr": "uint8",
         "index_ptr": "uint8", "q_out_ptr": "uint8"}

def compile(label, kernel, types=TYPES, num_warps=1, **constants):
    def argument(name):
        if name.endswith("_ptr"):
            return Pointer(types.get(name, "float32"))
        if name.endswith("head_stride"):
            return 192
        return 0.5 if name in ("kv_eps", "k_eps", "weights_scale") else 7
    constants |= dict(HALF=32)
    if kernel is not prepare_mla_query_kernel:
        constants |= dict(INTERLEAVED=False, HADAMARD=False, UE8M0=True)
    arguments = {name: argument(name) for name in kernel.arg_names if name not in constants}
    kernel.warmup(
        **arguments, **constants, num_warps=num_warps, capability=90, enable_fp_fusion=False
    )
    print(label)

for positions in ({}, {"position_ids_ptr": None}):
    for tokens in (1, 2):
        compile("write", write_caches_kernel, RANK=512, BLOCK_SIZE=64, TILE=128, TILES=4, FP8=True,
                BLOCK_TOKENS=tokens, **positions)
    # programs that divide the heads of a token evenly, and others
    for heads in (64, 7):
        compile("query", prepare_query_kernel, HEADS=heads, QUANTIZED=True, BLOCK_ROWS=8,
                **positions)
    for dtype in ("float32", "bfloat16"):
        types = TYPES | dict.fromkeys(("latent_ptr", "pe_ptr", "out_ptr"), dtype)
        compile("mla", prepare_mla_query_kernel, types, NUM_WARPS, HEADS=128, RANK=512,
                PADDED_RANK=512, BLOCK_ROWS=BLOCK_ROWS, **positions)
"""


@pytest.mark.triton
def test_every_form_compiles() -> None:
    said = output_of(SCRIPT)
    assert said.split() == ["write", "write", "query", "query", *["mla"] * 2] * 2
