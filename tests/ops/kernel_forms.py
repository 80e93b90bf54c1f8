"""Scripts that compile kernels at the sizes of real models and print what came of each form.

They run after a line that sets CAPABILITY and SHARED, the target's bytes of shared memory a block.
"""

from __future__ import annotations

COMMON = """
import json, re, subprocess, tempfile
from collections import defaultdict
from pathlib import Path
import triton, triton.language as tl
from fd_dsa.triton_runtime import Pointer
from tests.compiling import is_serialized

INT32 = ("batch_id_per_token_ptr", "slots_ptr", "block_tables_ptr", "index_ptr", "tiles_ptr",
         "seq_lens_decoder_ptr", "seq_lens_this_time_ptr", "seq_lens_encoder_ptr", "programs_ptr",
         "offsets_ptr", "key_starts_ptr", "cu_seqlens_q_ptr", "work_ends_ptr", "ids_ptr",
         "pairs_ptr", "counts_ptr")
INT64 = "position_ids_ptr", "slot_mapping_ptr"

def integers(kernel):
    return {name: "int64" if name in INT64 else "int32" for name in kernel.arg_names}

# a weight of experts in another type
NOT_FOUR_BITS = dict(weight_factors_ptr=None, GROUP=0, KIND="")
# of steps of decode tokens only
NO_WINDOWS = dict.fromkeys(("offsets_ptr", "key_starts_ptr", "seq_lens_encoder_ptr"))
UINT8 = "latent_ptr", "q_out_ptr"
TYPES = (dict.fromkeys(INT32, "int32") | dict.fromkeys(INT64, "int64")
         | dict.fromkeys(UINT8, "uint8"))
FLOATS = ("mean", "deviation", "epsilon", "scaling", "kv_eps", "k_eps", "weights_scale",
          "softmax_scale", "scale_log2")
# the upper half of a descriptor is how a wgmma reads shared memory, the lower one where
# an access to global memory
ACCESS = r"(?:ld|st|atom|red)\\.[\\w.]*global|cp\\.async\\.c"
DESCRIPTOR = r"(?:or\\.b64|add\\.s64)\\s+%rd\\d+, (%rd\\d+), (-?\\d{19});"
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

seen = set()
NATIVE = CAPABILITY >= 89

def compile(label, kernel, types={}, fusion=True, blocks=1, capability=CAPABILITY, **options):
    if CAPABILITY != 90:
        # each kernel once for the types of its operands; of GEMMs, whose tiles differ, every form
        form = label, *sorted(types.items()), *sorted(k for k, v in options.items() if v is None)
        if label.startswith(("mla now", "mla ahead")) or capability != CAPABILITY or (
                form in seen and not label.startswith(("experts", "fp8", "stages"))):
            return
        seen.add(form)
    def argument(name):
        if name.endswith("_ptr"):
            return Pointer((TYPES | types).get(name, "float32"))
        if name.endswith("stride"):
            return 192
        return 0.5 if name in FLOATS else 7
    options |= {} if fusion else {"enable_fp_fusion": False}
    arguments = {name: argument(name) for name in kernel.arg_names if name not in options}
    try:
        made = kernel.warmup(**arguments, **options, capability=capability)
    except Exception as error:
        causes = [error]
        while causes[-1].__cause__ is not None:
            causes.append(causes[-1].__cause__)
        if not any("fp8e4nv not supported" in str(cause) for cause in causes):
            raise
        return print(json.dumps({"label": label, "needs_fp8": True}))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.image)
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\\d+) STACK:(\\d+)", text).groups())
    ways = defaultdict(set)
    for address, constant in re.findall(DESCRIPTOR, made.ptx):
        ways[address].add(int(constant) >> 32)
    ahead = made.ptx.partition("griddepcontrol.wait")[0] if made.waits else ""
    accesses = re.findall(ACCESS, ahead)
    print(json.dumps({
        "label": label, "kernel": made.name, "waits": made.waits, "loads_ahead": len(accesses),
        "only_loads": all(access.startswith("ld") for access in accesses),
        "next": made.ptx.count("griddepcontrol.launch_dependents"),
        "registers": registers, "stack": stack, "shared": made.shared_bytes,
        "warps": made.num_warps, "blocks": blocks, "stages": options.get("num_stages"),
        "products": sorted(set(re.findall(r"wgmma.mma_async\\S*", made.ptx))),
        "serialized": CAPABILITY == 90 and is_serialized(made.ptx),
        "copies": made.ptx.count("cp.async.cg"),
        "in_flight": max(map(int, re.findall(r"cp.async.wait_group\\s+(\\d+)", made.ptx)),
                         default=0),
        "ways": max(map(len, ways.values()), default=0)}))
"""

EVERY = """
from fd_dsa.ops import dense_kernels as dense
from fd_dsa.ops.expert_gemm import block_sizes, configuration, expert_gemm_kernel
from fd_dsa.ops.expert_kernels import choose_experts_kernel, sum_experts_kernel
from fd_dsa.ops.expert_pairs import group_pairs_kernel
from fd_dsa.ops.fill_kernels import fill_codes_kernel, fill_kernel
from fd_dsa.ops.cache_write.triton_kernel import write_caches_kernel
from fd_dsa.ops.logits.triton_kernel import logits_kernel
from fd_dsa.ops.mla.records import dequantize_kernel as records_kernel
from fd_dsa.ops.mla.triton_kernel import dequantize_kernel, sparse_mla_kernel
from fd_dsa.ops.query_kernels import MLA_BLOCK_ROWS, MLA_NUM_WARPS, prepare_mla_query_kernel
from fd_dsa.ops.positions_kernel import position_ids_kernel
from fd_dsa.ops.query_kernels import prepare_query_kernel
from fd_dsa.ops.head_gemm import join_columns_kernel
from fd_dsa.ops.mtp_kernels import mtp_inputs_kernel
from fd_dsa.ops.sampling.cut_kernels import draw_kernel, gather_kernel, masses_kernel
from fd_dsa.ops.sampling.scan_kernels import scan_kernel, settle_kernel
from fd_dsa.ops.sampling.verify_kernel import (
    extend_kernel,
    follow_kernel,
    verify_kernel,
)
from fd_dsa.ops.topk.triton_kernel import topk_kernel
from fd_dsa.step import device_provider as step
from fd_dsa.v4_prepare.kernel import csa_rows_kernel

for q, cache, wide in (("float32", "float32", tl.float32), ("float32", "bfloat16", tl.float32),
                       ("bfloat16", "bfloat16", tl.bfloat16), ("uint8", "uint8", tl.float16)):
    compile("logits", logits_kernel, {"q_ptr": q, "cache_ptr": cache}, HEAD_DIM=128,
            BLOCK_SIZE=64, FP8=cache == "uint8", WIDE=wide)
compile("logits", logits_kernel, HEAD_DIM=128, BLOCK_SIZE=64, FP8=False, WIDE=tl.float32,
        **NO_WINDOWS)
compile("topk", topk_kernel, BLOCK_SIZE=64)
compile("topk", topk_kernel, BLOCK_SIZE=64, **NO_WINDOWS)
for q, cache in (("float32", "float32"), ("float32", "int16"), ("float32", "uint8"),
                 ("bfloat16", "bfloat16"), ("bfloat16", "uint8")):
    wide = tl.bfloat16 if q == "bfloat16" else tl.float32
    compile("mla", sparse_mla_kernel, {"q_ptr": q, "cache_ptr": cache, "out_ptr": q}, RANK=512,
            ROPE=64, RANK_PADDED=512, ROPE_PADDED=64, FP8=cache == "uint8", WIDE=wide)
for cache, rank in (("uint8", 512), ("bfloat16", 576)):
    compile("dequantize", dequantize_kernel, {"cache_ptr": cache, "slots_ptr": "int64"},
            RANK=rank, ROPE=576 - rank, FP8=cache == "uint8", WIDTH=1024)
compile("records", records_kernel, {"cache_ptr": "uint8"}, num_warps=8, BLOCK_SIZE=64, ROWS=16)
compile("positions", position_ids_kernel, {"position_ids_ptr": "int32"})
plain = dict(codes_ptr=None, scales_ptr=None, ROUND_SCALES=False)
for dtype in ("float32", "bfloat16"):
    names = "x_ptr", "delta_ptr", "sum_ptr", "out_ptr", "table_ptr"
    types = dict.fromkeys(names, dtype) | {"codes_ptr": "uint8"}
    for added in ({}, dict(delta_ptr=None, sum_ptr=None)):
        for quantized in (plain, dict(ROUND_SCALES=True)):
            compile("norm", dense.rms_norm_kernel, types, num_warps=16, WIDTH=7168, BLOCK=8192,
                    **added, **quantized)
    sizes = dict(BLOCK=1024, LIMIT=None)
    compile("silu", dense.activate_kernel, types, WIDTH=2048, GATED=True, **sizes, **plain)
    compile("silu", dense.activate_kernel, types, WIDTH=2048, GATED=True, **sizes, out_ptr=None,
            ROUND_SCALES=True)
    compile("quantize", dense.activate_kernel, types, WIDTH=7168, GATED=False, **sizes,
            out_ptr=None, ROUND_SCALES=False)
    compile("join", join_columns_kernel, {"parts_ptr": dtype}, WIDTH=16160, BLOCK=1024)
    compile("join", join_columns_kernel, {"parts_ptr": dtype, "out_ptr": dtype}, WIDTH=3072,
            BLOCK=1024)
    for index in ("int32", "int64"):
        compile("rows", dense.rows_at_kernel, types | {"index_ptr": index}, WIDTH=7168,
                MISSING=0, BLOCK=1024)
for dtype in ("float32", "bfloat16", "uint8"):
    for random in (False, True):
        compile("fill", fill_kernel, {"out_ptr": dtype}, RANDOM=random, BLOCK=1024)
for is_integer in (False, True):
    compile("fill", fill_codes_kernel, {"out_ptr": "uint8"}, INTEGERS=is_integer, BLOCK=1024)
# of several tokens, of one, and of more than a launch lists
LISTS = {}, {"scratch_ptr": None}, dict.fromkeys(("pairs_ptr", "counts_ptr", "scratch_ptr"))
CHOICES = (256, 8, 4, 8), (256, 1, 1, 8), (8, 1, 1, 2), (9, 3, 1, 2)
for experts, groups, top_groups, top in CHOICES:
    size = 1 << (experts // groups - 1).bit_length()
    for absent in LISTS:
        compile("choice", choose_experts_kernel, num_warps=1, NUM_EXPERTS=experts, TOP_K=top,
                NUM_GROUPS=groups, TOP_GROUPS=top_groups, NORM=True, SCORE="sigmoid",
                GROUPS=1 << (groups - 1).bit_length(), SIZE=size,
                EXPERTS=1 << (experts - 1).bit_length(), MAX_PAIRS=64 * top, **absent)
for block, warps in (1024, 4), (4096, 8):
    compile("group", group_pairs_kernel, BLOCK=block, num_warps=warps)
for kind in ("float32", "bfloat16"):
    for tokens in (1, 256, 8192):
        for gated in (False, True):
            compile("experts", expert_gemm_kernel, dict(x_ptr=kind, weight_ptr=kind, out_ptr=kind),
                    x_scales_ptr=None, weight_scales_ptr=None, out_scales_ptr=None, ROW_PAIRS=8,
                    NUM_EXPERTS=256, WIDTH=7168, COLUMNS=2048, GATED=gated, ROUND_SCALES=False,
                    NATIVE=NATIVE, EXPERTS=256, LIMIT=None, **NOT_FOUR_BITS,
                    **block_sizes(kind, 2048, 7168, configuration(kind, 8 * tokens, 256, gated,
                                                                  2048, 7168, SHARED)))
    compile("sum", sum_experts_kernel, dict.fromkeys(("parts_ptr", "base_ptr", "out_ptr"), kind),
            TOP_K=8, WIDTH=7168, BLOCK=1024)
KEYS = dict(INTERLEAVED=False, HADAMARD=False, UE8M0=True, HALF=32, num_warps=1)
for positions in ({}, {"position_ids_ptr": None}):
    for tokens in (1, 2):
        compile("write", write_caches_kernel, {"index_ptr": "uint8"}, False, RANK=512,
                BLOCK_SIZE=64, TILE=128, TILES=4, FP8=True, BLOCK_TOKENS=tokens, **KEYS,
                **positions)
    # programs that divide the heads of a token evenly, and others
    for heads in (64, 7):
        compile("query", prepare_query_kernel, {}, False, HEADS=heads, QUANTIZED=True,
                BLOCK_ROWS=8, **KEYS, **positions)
    for dtype in ("float32", "bfloat16"):
        types = dict.fromkeys(("latent_ptr", "pe_ptr", "out_ptr"), dtype)
        compile("mla_query", prepare_mla_query_kernel, types, False, HEADS=128, RANK=512, HALF=32,
                PADDED_RANK=512, BLOCK_ROWS=MLA_BLOCK_ROWS, num_warps=MLA_NUM_WARPS, **positions)
plain_caches = dict.fromkeys(("latent_ptr", "index_ptr"), "bfloat16")
compile("write", write_caches_kernel, plain_caches, False, RANK=512, BLOCK_SIZE=64, TILE=128,
        TILES=4, FP8=False, BLOCK_TOKENS=1, **KEYS)
compile("query", prepare_query_kernel, dict.fromkeys(("q_ptr", "q_out_ptr"), "bfloat16"), False,
        HEADS=64, QUANTIZED=False, BLOCK_ROWS=8, **KEYS)
# vocabularies of one block, of DeepSeek-V3.2, and of twice as many tokens
SAMPLED = dict.fromkeys(("batch_rows_ptr", "mask_rows_ptr", "records_ptr", "masks_ptr",
                         "counts_ptr", "best_ptr", "state_ptr", "sizes_ptr", "lengths_ptr",
                         "sampled_ptr"), "int32")
SAMPLED |= dict.fromkeys(("positions_ptr", "sums_ptr", "tokens_ptr"), "int64")
for vocab, block in (50, 64), (129280, 4096), (262144, 4096):
    blocks = -(-vocab // block)
    padded = 1 << (blocks - 1).bit_length()
    parts = dict(VOCAB=vocab, NUM_BLOCKS=blocks)
    whole = dict(BLOCKS=padded, **parts)
    for most in (0, 3):
        compile("scan", scan_kernel, SAMPLED, False, num_warps=8, VOCAB=vocab, BLOCK=block,
                PART=min(block, 1024), MAX_DRAFTS=most)
    for counts in (False, True):
        compile("settle", settle_kernel, SAMPLED, False, num_warps=8, COUNTS=counts, **whole)
        compile("draw", draw_kernel, SAMPLED, False, num_warps=16, maxnreg=64, COUNTS=counts,
                BLOCK=block, **whole)
    for warps in (1, 4):
        compile("masses", masses_kernel, SAMPLED, num_warps=warps, BLOCK=block,
                PART=min(block, 1024 * warps), **parts)
        compile("gather", gather_kernel, SAMPLED, False, num_warps=warps, BLOCK=block,
                PART=min(block, 128 * warps), **whole)
PLACED = dict.fromkeys(("ids_ptr", "sampled_ptr", "batch_rows_ptr", "positions_ptr",
                        "logits_indptr_ptr", "cached_ptr", "lengths_ptr", "next_ptr",
                        "pending_source_ptr", "known_ptr", "records_ptr", "outputs_ptr"), "int32")
for most in (1, 2, 3):
    compile("verify", verify_kernel, PLACED | dict.fromkeys(("tokens_ptr", "newest_ptr"), "int64"),
            False, num_warps=1, STRIDE=128, MAX_DRAFTS=most, VOCAB=129280)
compile("extend", extend_kernel, PLACED, False, num_warps=4, STRIDE=128, BLOCK=256)
compile("follow", follow_kernel, PLACED | {"tokens_ptr": "int64"}, False, num_warps=4, BLOCK=256)
for dtype in ("float32", "bfloat16"):
    types = dict.fromkeys(("table_ptr", "hidden_ptr", "out_ptr"), dtype)
    for ids in ("int32", "int64"):
        types |= {"ids_ptr": ids, "positions_ptr": "int64"}
        compile("mtp", mtp_inputs_kernel, types, num_warps=8, WIDTH=7168, BLOCK=8192)
# the largest with positions of both types
for rows in (1, 100, 256, 1024, 4096):
    narrow = {} if rows == 4096 else {"position_ids_int32_ptr": None}
    tile = step.row_tile_for(rows)
    for kernel, size, warps in (
        (step.decode_step_metadata_kernel, step.DECODE_TILE, step.DECODE_WARPS),
        (step.mixed_step_metadata_kernel, step.MIXED_TILE, step.MIXED_WARPS),
    ):
        compile("step", kernel, integers(kernel), BLOCK_SIZE=64, ROW_TILE=tile, TILE=size,
                NUM_ROW_TILES=-(-rows // tile), num_warps=warps, **narrow)
# rows of chosen entries: a small model, V4-Flash, V4-Pro
for topk in (3, 512, 1024):
    compile("v4 rows", csa_rows_kernel, integers(csa_rows_kernel), TOPK=topk, ENTRIES_PER_BLOCK=32,
            TILE=512 if topk > 3 else 4)
"""

TUNED = """
from fd_dsa.ops.mla import prompt
from fd_dsa.ops.mla.prompt_kernel import (
    attend_prompts_kernel, gather_keys_kernel, list_absorbed_kernel,
)
from fd_dsa.ops import expert_gemm as experts, fp8_gemm as gemm, side_by_side as beside
from fd_dsa.ops.head_gemm import head_gemm_kernel
from fd_dsa.ops.indexer_projection import triton_kernel as projection
from fd_dsa.ops.logits.tile_configs import decode_config, padded_heads, prompt_config
from fd_dsa.ops.logits.tile_kernel import tile_kernel
from fd_dsa.ops.logits.tile_schedule import tile_schedule_kernel
from fd_dsa.ops.mla import tensor_core as core, tensor_core_kernel as kernels
from fd_dsa.v4_prepare.kernel import expand_kernel
from fd_dsa.v4_prepare.launch import expand_arguments
from tests.v4_prepare.cases import serving_config

# DeepSeek-V3.2 and GLM-5; what is quantised for the GEMM after it has no plain result
types = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "rope_ptr", "out_ptr", "latents_ptr"), "bfloat16")
types |= {"codes_ptr": "uint8"}
for nope, values in (128, 128), (192, 256):
    tiling = next(prompt.fitting(nope, 64, values, SHARED))
    absent = ("out_ptr",) if values == 128 else ("codes_ptr", "scales_ptr")
    compile(f"prompts {nope}", attend_prompts_kernel, types, NOPE=nope, HALF=32, VALUES=values,
            NOPE_PADDED=triton.next_power_of_2(nope), VALUES_PADDED=values, ROUND_SCALES=True,
            ROWS=128, **tiling.options, **dict.fromkeys(absent))
# the head with FD_DSA_BATCH_INVARIANT=1, keys of every head in a captured step with prompts, and
# MLA's query of a few and of many tokens
ABSENT = dict.fromkeys(("codes_ptr", "scales_ptr", "rows_ptr"))
plain = dict.fromkeys(("x_ptr", "weight_ptr"), "bfloat16")
for width, out, tokens, half in (7168, 129280, 128, 0), (512, 128, 128, 0), (128, 512, 16, 32), (
        128, 512, 128, 32):
    options = ABSENT | ({} if width == 512 else {"count_ptr": None})
    compile(f"linear {tokens}", head_gemm_kernel, plain if half == 0 else plain | {
                "out_ptr": "bfloat16", "angle_rows_ptr": "int32"}, half == 0, IN=width, OUT=out,
            HALF=half, IN_FIRST=half > 0, ROUND_SCALES=False, BLOCK_TOKENS=tokens, BLOCK_IN=64,
            BLOCK_OUT=128, num_warps=4 if tokens == 16 else 8, num_stages=3, **options)
for rows in 1, 1024:
    compile("absorbed", list_absorbed_kernel, ROWS=rows, PLACES=16)
for cache in "uint8", "bfloat16":
    compile("keys", gather_keys_kernel, types | {"cache_ptr": cache}, BLOCK_SIZE=64, RANK=512,
            ROPE=64, RANK_PADDED=512, FP8=cache == "uint8", ROWS=128, KEYS=16)
for tokens in (1, 200, 1000):
    for dtype, wide in (("bfloat16", tl.bfloat16), ("float32", tl.float32)):
        types = dict.fromkeys(("hidden_ptr", "wk_ptr", "weights_proj_ptr"), dtype)
        # both weights, and weights_proj alone
        for width in (128, 0) if dtype == "bfloat16" else (128,):
            types["index_k_ptr"] = dtype if width else "float32"
            arguments = dict(num_tokens=tokens, HIDDEN=7168, WIDTH=width, HEADS=64, WIDE=wide,
                             scratch_ptr=None if tokens > 512 else Pointer("float32"))
            _, options = projection.launch_options(arguments, projection.configuration(tokens))
            compile("project", projection.project_indexer_kernel, types, **arguments, **options)
# one row of q_a, wk and kv_a, of q_b, of down on a rank of eight, and of a width that ends in a
# part of a group; o_proj, a prompt; the number is that of the tiles of a stage
def fp8_gemm(rows, columns, width, groups, none, **types):
    coded = "out_ptr" in none
    tiling = gemm.configuration(rows, columns, width, quantizes=coded)
    _, options = gemm.launch_options(rows, columns, width, tiling)
    if options["SPLITS"] == 1 and not (coded and tiling.groups > 1):
        options["scratch_ptr"] = None
    compile("fp8 2" if tiling.groups == 1 else "stages of groups", gemm.fp8_linear_kernel,
            dict(x_ptr="uint8", weight_ptr="uint8", **types), WIDTH=width, COLUMNS=columns,
            NATIVE=NATIVE, NUM_GROUPS=groups, ROUND_SCALES=coded, **dict.fromkeys(none), **options)
for rows, columns, width in ((1, 2240, 7168), (1, 24576, 1536), (1, 7168, 256), (1, 64, 200),
                             (64, 7168, 16384), (8192, 4096, 7168)):
    fp8_gemm(rows, columns, width, 1, ("codes_ptr", "scales_ptr"), out_ptr="bfloat16")
# wo_a of DeepSeek-V4, whole and on a rank of eight, whose results are codes
for rows, columns in (1, 8192), (1, 1024), (16, 8192), (32, 8192), (64, 8192), (8192, 8192):
    fp8_gemm(rows, columns, 4096, columns // 1024, ("out_ptr",), codes_ptr="uint8")
# wq_a and wkv of V4-Flash beside the bfloat16 weights of CSA and HCA layers; shared experts of
# V4-Flash and V3.2 beside a router
types = dict(x_ptr="bfloat16", x_codes_ptr="uint8", weight_ptr="uint8", other_ptr="bfloat16",
             out_ptr="bfloat16", codes_ptr="uint8")
for rows, columns, others, width in ((1, 1536, 2624, 4096), (1, 1536, 1024, 4096),
                                     (32, 1536, 2624, 4096), (32, 4096, 256, 7168),
                                     (1, 2048, 256, 4096), (8, 2048, 256, 7168)):
    gated = columns == 2048
    absent = ("out_ptr",) if gated else ("codes_ptr", "scales_ptr")
    for is_split in (True, False):
        _, options = beside.division(rows, columns, others, width, gated, is_split)
        compile("beside", beside.side_by_side_kernel, types, WIDTH=width, COLUMNS=columns,
                OTHER_COLUMNS=others, GATED=gated, LIMIT=10.0 if gated else None,
                ROUND_SCALES=gated, NATIVE=NATIVE, **options,
                **dict.fromkeys(absent if is_split else (*absent, "scratch_ptr")))
types = dict.fromkeys(("x_ptr", "weight_ptr", "codes_ptr"), "uint8")
for tokens in (1, 32, 512, 8192):
    # whole, and the second GEMM of a rank of 8
    for gated, columns, width in (True, 2048, 7168), (False, 7168, 2048), (False, 7168, 256):
        tiling = experts.configuration("uint8", 8 * tokens, 256, gated, columns, width, SHARED)
        out = dict(out_ptr="uint8") if gated else dict(out_ptr="bfloat16")
        compile("fp8 3" if gated else "fp8 2", experts.expert_gemm_kernel, types | out,
                ROW_PAIRS=8 if gated else 1, NUM_EXPERTS=256, WIDTH=width, COLUMNS=columns,
                GATED=gated, ROUND_SCALES=True, NATIVE=NATIVE, EXPERTS=256, LIMIT=None,
                **NOT_FOUR_BITS, **experts.block_sizes("uint8", columns, width, tiling),
                **({} if gated else dict(out_scales_ptr=None)))
compile("schedule", tile_schedule_kernel, num_warps=8)
compile("schedule", tile_schedule_kernel, num_warps=8, **NO_WINDOWS)
# heads, tokens of a decode row or 0 for a step with prompts, and blocks that serve DeepSeek-V4
for heads, tokens, kind, block in (
        (64, 0, "uint8", 0), (32, 0, "uint8", 0), (64, 1, "uint8", 0), (64, 2, "uint8", 0),
        (64, 3, "uint8", 0), (64, 0, "uint8", 64), (64, 0, "uint8", 32), (64, 1, "uint8", 32),
        (64, 0, "bfloat16", 0), (32, 0, "bfloat16", 0), (64, 0, "bfloat16", 64),
        (64, 0, "bfloat16", 32), (64, 1, "bfloat16", 32), (64, 2, "bfloat16", 32),
        (64, 3, "bfloat16", 64)):
    fp8 = kind == "uint8"
    config = (decode_config(heads, tokens, is_fp8=fp8) if tokens
              else prompt_config(heads, is_fp8=fp8))
    compile(f"tiles {heads} {tokens} {kind}", tile_kernel, {"q_ptr": kind, "cache_ptr": kind},
            blocks=config.programs_per_processor, BLOCK_SIZE=block or 64, ROW=132 if fp8 else 128,
            NUM_HEADS=heads, HEADS=padded_heads(heads),
            FIRST=config.first_tokens, REST=config.rest_tokens, num_warps=config.num_warps,
            num_stages=config.num_stages, maxnreg=config.maxnreg,
            **NO_WINDOWS if tokens or block else {})
# heads, tokens, whether the cache holds records, whether the entries are split
for heads, tokens, fp8, split in ((8, 9, True, False), (16, 9, True, False), (32, 9, True, True),
                                  (64, 9, True, False), (64, 2, True, True), (8, 9, False, True),
                                  (16, 9, False, False), (32, 9, False, True),
                                  (64, 9, False, False)):
    config = core.kernel_config(heads, tokens, fp8)
    absent = ("out_ptr", "lse_ptr") if split else ("partial_ptr", "partial_lse_ptr")
    types = dict.fromkeys(("q_ptr", "out_ptr"), "bfloat16")
    # keys copied ahead or not; rows of an instruction: 64 keys or heads, or 16 heads
    label = "mla ahead" if config.copied and config.num_stages > 1 else "mla now"
    label += f",{heads},{min(config.block_n if config.swapped else config.block_h, 64)}"
    compile(label, kernels.attend_kernel, types | {"cache_ptr": "uint8" if fp8 else "bfloat16"},
            blocks=config.per_processor, num_warps=config.num_warps, num_stages=config.num_stages,
            BLOCK_H=config.block_h, BLOCK_N=config.block_n, SWAPPED=config.swapped, FP8=fp8,
            COPIED=config.copied, **dict.fromkeys(absent))
for most, columns, warps in core.COMBINE_CONFIGS:
    compile("combine", kernels.combine_kernel, {"out_ptr": "bfloat16"}, num_warps=warps, blocks=4,
            num_stages=1, MAX_SPLITS=most, COLUMNS=columns)
decode = serving_config(256, 131072, 3)
chunks = {"max_num_tokens": 8448, "max_tokens_per_seq": 8192}
for capability, cfg, absent in (
    (80, decode, []),
    (90, decode, []),
    (90, serving_config(128, 8192, 1, swa="paged"), ["rollback_ptr"]),
    (90, serving_config(1, 1024, 0), ["rollback_ptr"]),
    (90, serving_config(8, 1 << 20, 3, hca_mode="table"), ["hca_idx_ptr"]),
    (90, serving_config(129, 16384, 1, **chunks), ["rollback_ptr"]),
    (100, decode, []),
):
    compile("expand", expand_kernel, integers(expand_kernel), capability=capability,
            slab_offset=1 << 40, error_address=1 << 40, **expand_arguments(cfg),
            **dict.fromkeys(absent))
"""
