"""Every form of the kernels that score, choose and attend compiles for Hopper, on any machine."""

from __future__ import annotations

import pytest

from tests.compiling import output_of

SHARED_BYTES_OF_A_BLOCK = 227 << 10

SCRIPT = """
import triton.language as tl
from fd_dsa.triton_runtime import Pointer
from fd_dsa.ops.logits import triton_kernel as logits
from fd_dsa.ops.mla import triton_kernel as mla
from fd_dsa.ops.topk import triton_kernel as topk

TYPES = {"position_ids_ptr": "int64", "batch_id_per_token_ptr": "int32", "slots_ptr": "int32",
         "block_tables_ptr": "int32", "logits_ptr": "float32", "weights_ptr": "float32"}

def compile(label, kernel, types=None, **constants):
    types = {**TYPES, **(types or {})}
    names = [name for name in kernel.arg_names if name not in constants]
    arguments = {n: Pointer(types[n]) if n.endswith("_ptr") else 7 for n in names}
    compiled = kernel.warmup(**arguments, **constants, num_warps=4, capability=90)
    print(label, compiled.shared_bytes)

for q, cache, wide in (("float32", "float32", tl.float32), ("float32", "bfloat16", tl.float32),
                       ("bfloat16", "bfloat16", tl.bfloat16), ("uint8", "uint8", tl.float16)):
    fp8 = cache == "uint8"
    compile("logits", logits.logits_kernel, {"q_ptr": q, "cache_ptr": cache}, HEAD_DIM=128,
            BLOCK_SIZE=64, FP8=fp8, WIDE=wide, BLOCK_N=logits._BLOCK_N, BLOCK_H=logits._BLOCK_H,
            BLOCK_D=logits._BLOCK_D)
compile("topk", topk.topk_kernel, BLOCK_SIZE=64, BLOCK=topk._BLOCK)
for q, cache in (("float32", "float32"), ("float32", "int16"), ("float32", "uint8"),
                 ("bfloat16", "bfloat16"), ("bfloat16", "uint8")):
    wide = tl.bfloat16 if q == "bfloat16" else tl.float32
    compile("mla", mla.sparse_mla_kernel, {"q_ptr": q, "cache_ptr": cache, "out_ptr": q},
            softmax_scale=0.1, RANK=512, ROPE=64, RANK_PADDED=512, ROPE_PADDED=64,
            FP8=cache == "uint8", WIDE=wide, QUANT_TILE=128, BLOCK_H=mla._BLOCK_H,
            BLOCK_N=mla._BLOCK_N, BLOCK_D=mla._BLOCK_D)
"""


@pytest.mark.triton
def test_every_form_compiles() -> None:
    said = output_of(SCRIPT)
    found = [line.split() for line in said.splitlines()]
    assert [name for name, _ in found] == ["logits"] * 4 + ["topk"] + ["mla"] * 5
    assert all(int(size) <= SHARED_BYTES_OF_A_BLOCK for _, size in found)
