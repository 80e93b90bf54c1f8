"""Kernels compile for Hopper at the sizes of real models, on any machine, in every Triton."""

from __future__ import annotations

import pytest

from tests.compiling import output_of

SHARED_BYTES_OF_A_BLOCK = 227 << 10

SCRIPT = """
import triton.language as tl
from fd_dsa.ops._dense_kernels import rms_norm_kernel, rows_at_kernel, silu_and_mul_kernel
from fd_dsa.ops._expert_kernels import choose_experts_kernel, sum_experts_kernel
from fd_dsa.ops.cache_write.triton_kernel import write_caches_kernel
from fd_dsa.ops.logits import triton_kernel as logits
from fd_dsa.ops.mla import triton_kernel as mla
from fd_dsa.ops.mla_query.triton_kernel import BLOCK_ROWS, NUM_WARPS, prepare_mla_query_kernel
from fd_dsa.ops.positions_kernel import _BLOCK, position_ids_kernel
from fd_dsa.ops.query.triton_kernel import prepare_query_kernel
from fd_dsa.ops.topk import triton_kernel as topk
from fd_dsa.triton_runtime import Pointer

INT32 = ("batch_id_per_token_ptr", "slots_ptr", "block_tables_ptr", "index_ptr",
         "seq_lens_decoder_ptr", "seq_lens_this_time_ptr")
INT64 = "position_ids_ptr", "slot_mapping_ptr"
UINT8 = "latent_ptr", "q_out_ptr", "chosen_ptr"
TYPES = (dict.fromkeys(INT32, "int32") | dict.fromkeys(INT64, "int64")
         | dict.fromkeys(UINT8, "uint8"))
FLOATS = "epsilon", "scaling", "kv_eps", "k_eps", "weights_scale", "softmax_scale"

def compile(label, kernel, types={}, num_warps=4, fusion=True, **constants):
    def argument(name):
        if name.endswith("_ptr"):
            return Pointer((TYPES | types).get(name, "float32"))
        if name.endswith("head_stride"):
            return 192
        return 0.5 if name in FLOATS else 7
    arguments = {name: argument(name) for name in kernel.arg_names if name not in constants}
    options = {} if fusion else {"enable_fp_fusion": False}
    made = kernel.warmup(**arguments, **constants, num_warps=num_warps, capability=90, **options)
    print(label, made.shared_bytes)

for q, cache, wide in (("float32", "float32", tl.float32), ("float32", "bfloat16", tl.float32),
                       ("bfloat16", "bfloat16", tl.bfloat16), ("uint8", "uint8", tl.float16)):
    compile("logits", logits.logits_kernel, {"q_ptr": q, "cache_ptr": cache}, HEAD_DIM=128,
            BLOCK_SIZE=64, FP8=cache == "uint8", WIDE=wide, BLOCK_N=logits._BLOCK_N,
            BLOCK_H=logits._BLOCK_H, BLOCK_D=logits._BLOCK_D)
compile("topk", topk.topk_kernel, BLOCK_SIZE=64, BLOCK=topk._BLOCK)
for q, cache in (("float32", "float32"), ("float32", "int16"), ("float32", "uint8"),
                 ("bfloat16", "bfloat16"), ("bfloat16", "uint8")):
    wide = tl.bfloat16 if q == "bfloat16" else tl.float32
    compile("mla", mla.sparse_mla_kernel, {"q_ptr": q, "cache_ptr": cache, "out_ptr": q},
            RANK=512, ROPE=64, RANK_PADDED=512, ROPE_PADDED=64, FP8=cache == "uint8", WIDE=wide,
            QUANT_TILE=128, BLOCK_H=mla._BLOCK_H, BLOCK_N=mla._BLOCK_N, BLOCK_D=mla._BLOCK_D)
for cache, rank in (("uint8", 512), ("bfloat16", 576)):
    compile("dequantize", mla.dequantize_kernel, {"cache_ptr": cache, "slots_ptr": "int64"},
            RANK=rank, ROPE=576 - rank, FP8=cache == "uint8", QUANT_TILE=128, WIDTH=1024,
            BLOCK_N=mla._BLOCK_N)
compile("positions", position_ids_kernel, {"position_ids_ptr": "int32"}, BLOCK=_BLOCK)
compile("norm", rms_norm_kernel, num_warps=8, WIDTH=7168, BLOCK=8192)
compile("norm", rms_norm_kernel, WIDTH=384, BLOCK=512)
compile("silu", silu_and_mul_kernel, WIDTH=2048, BLOCK=1024)
for index in ("int32", "int64"):
    compile("rows", rows_at_kernel, {"index_ptr": index}, WIDTH=7168, BLOCK=1024)
CHOICES = (256, 8, 4, 8), (256, 1, 1, 8), (8, 1, 1, 2), (9, 3, 1, 2)
for experts, groups, top_groups, top in CHOICES:
    size = 1 << (experts // groups - 1).bit_length()
    compile("choice", choose_experts_kernel, num_warps=8, NUM_EXPERTS=experts, TOP_K=top,
            NUM_GROUPS=groups, TOP_GROUPS=top_groups, NORM=True,
            GROUPS=1 << (groups - 1).bit_length(), SIZE=size)
compile("sum", sum_experts_kernel, NUM_EXPERTS=256, WIDTH=7168, BLOCK=1024)
KEYS = dict(INTERLEAVED=False, HADAMARD=False, UE8M0=True, HALF=32)
for positions in ({}, {"position_ids_ptr": None}):
    for tokens in (1, 2):
        compile("write", write_caches_kernel, {"index_ptr": "uint8"}, 1, False, RANK=512,
                BLOCK_SIZE=64, TILE=128, TILES=4, FP8=True, BLOCK_TOKENS=tokens, **KEYS,
                **positions)
    # programs that divide the heads of a token evenly, and others
    for heads in (64, 7):
        compile("query", prepare_query_kernel, {}, 1, False, HEADS=heads, QUANTIZED=True,
                BLOCK_ROWS=8, **KEYS, **positions)
    for dtype in ("float32", "bfloat16"):
        types = dict.fromkeys(("latent_ptr", "pe_ptr", "out_ptr"), dtype)
        compile("mla_query", prepare_mla_query_kernel, types, NUM_WARPS, False, HEADS=128,
                RANK=512, HALF=32, PADDED_RANK=512, BLOCK_ROWS=BLOCK_ROWS, **positions)
"""


@pytest.mark.triton
@pytest.mark.slow
def test_every_form_compiles() -> None:
    compiled = [line.split() for line in output_of(SCRIPT).splitlines()]
    assert [name for name, _ in compiled] == [
        *["logits"] * 4,
        "topk",
        *["mla"] * 5,
        *["dequantize"] * 2,
        "positions",
        *["norm"] * 2,
        "silu",
        *["rows"] * 2,
        *["choice"] * 4,
        "sum",
        *[*["write"] * 2, *["query"] * 2, *["mla_query"] * 2] * 2,
    ]
    assert all(int(size) <= SHARED_BYTES_OF_A_BLOCK for _, size in compiled)
