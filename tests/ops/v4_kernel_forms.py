"""Script like those of `kernel_forms.py` for the kernels of DeepSeek-V4, at its released sizes."""

from __future__ import annotations

V4 = """
import itertools
from fd_dsa.cache_formats import v4_record_bytes
from fd_dsa.ops import dense_kernels as dense
from fd_dsa.ops.expert_gemm import block_sizes, configuration, expert_gemm_kernel
from fd_dsa.ops.expert_kernels import choose_experts_kernel
from fd_dsa.ops.expert_tables import look_up_experts_kernel
from fd_dsa.ops.slot_copy import copy_slot_kernel
from fd_dsa.ops.stream_kernels import expand_streams_kernel, read_streams_kernel
from fd_dsa.ops.v4_attend_kernel import attend_v4_kernel, combine_v4_kernel
from fd_dsa.ops import v4_plain
from fd_dsa.ops import v4_write_kernels as write
from fd_dsa.ops.v4_rotation import rotate_heads_kernel
from fd_dsa.v4_prepare.place_kernel import place_step_kernel

INT32_TYPES = dict.fromkeys(
    ("positions_ptr", "rows_ptr", "plan_ptr", "places_ptr", "kept_ptr", "starts_ptr",
     "is_plain_ptr", "plain_table_ptr", "blocks_ptr", "total_ptr",
     "block_table_ptr", "token_ids_ptr", "table_ptr", "before_ptr", "new_ptr", "ring_rows_ptr",
     *(f"{kind}_{part}_ptr" for kind in ("csa", "hca") for part in ("entries", "rows", "kept"))),
    "int32")
FLOATS += "norm_epsilon",
# of a launch that leaves the input of the next block to a second one
NO_READING = dict.fromkeys(("counts_ptr", "base_ptr", "scale_ptr", "norm_ptr", "next_ptr", "x_ptr",
                            "codes_ptr", "scales_ptr"))
WIDTH, INDEX, ROPE = 512, 128, 64
for kind in ("float32", "bfloat16"):
    names = ("streams_ptr", "change_ptr", "out_ptr", "x_ptr", "q_ptr", "keys_ptr", "ring_ptr",
             "pool_ptr", "entries_ptr", "index_entries_ptr")
    types = INT32_TYPES | dict.fromkeys(names, kind)
    # V4-Flash and V4-Pro; one or two launches between two blocks, and long prompts
    models = (4096, 4096, 4), (7168, 8192, 8)
    for (width, padded, warps), tile in itertools.product(models, (16, 64)):
        block = dict(WIDTH=width, STREAMS=4, PADDED=4, MIXES=24, COLUMNS=32, PARTS=width // 64,
                     PARTS_PADDED=padded // 64, ITERATIONS=20, PADDED_WIDTH=padded,
                     ROUND_SCALES=True)
        for absent in ({}, {"streams_ptr": None, "mixture_ptr": None},
                       {"change_ptr": None, "mixture_ptr": None}, {"fn_ptr": None},
                       {"mixture_ptr": None}):
            label = "streams" if "fn_ptr" not in absent else "last streams"
            compile(label, expand_streams_kernel, types, **block, TOKENS=tile,
                    BLOCK=64, num_warps=4, **NO_READING, **absent)
            if not absent.keys() & {"fn_ptr", "change_ptr"} and tile == 16:
                compile("norm", expand_streams_kernel, types | dict(codes_ptr="uint8"), **block,
                        TOKENS=1, BLOCK=64, num_warps=warps, **absent)
        if tile == 16:
            compile("norm", expand_streams_kernel, types, **block, TOKENS=1, BLOCK=64,
                    num_warps=warps, **dict.fromkeys(("next_ptr", "codes_ptr", "scales_ptr")))
        for absent in ({}, {"mixture_ptr": None}):
            for codes in ({}, {"codes_ptr": None, "scales_ptr": None}):
                compile("norm", read_streams_kernel, types | dict(codes_ptr="uint8"), **block,
                        num_warps=warps, **absent, **codes)
    for made in (kind, "uint8"):
        compile("rotate", rotate_heads_kernel, types | {"out_ptr": made}, WIDTH=INDEX, ROPE=ROPE,
                HEADS=16, PADDED=INDEX, STRIDE=40960, WEIGHTS_STRIDE=2624)
    # keys and entries, and the rows of their pools
    held = "keys_ptr", "ring_ptr", "pool_ptr", "entries_ptr", "index_entries_ptr"
    for key, row in ((kind, WIDTH), ("uint8", v4_record_bytes(WIDTH, ROPE))):
        pools = types | dict.fromkeys(held, key)
        norms = dict(STRIDE=1536, RANK=1024, RANK_PADDED=1024, ROUND_SCALES=True, WIDTH=WIDTH,
                     ROPE=ROPE, ROW=row, TILE=8, PADDED=WIDTH)
        pools |= dict(latents_ptr=kind, codes_ptr="uint8")
        no_index = dict.fromkeys(("index_gates_ptr", "index_norm_ptr", "index_entries_ptr"))
        no_entries = no_index | dict.fromkeys(
            ("sources_ptr", "states_ptr", "plan_ptr", "kept_ptr", "gates_ptr", "norm_ptr",
             "entries_ptr"))
        # a "rows_ptr" is that of the plan
        for halves, ratio, absent in ((2, 4, {}), (1, 128, no_index),
                                      (1, 1, no_entries | {"rows_ptr": None})):
            source = 2 * halves * (WIDTH + (INDEX if halves == 2 else 0))
            for ring in ({}, dict.fromkeys(("places_ptr", "ring_ptr"))):
                compile("write", write.write_step_kernel, pools, **norms, INDEX_WIDTH=INDEX,
                        SOURCE=source,
                        SOURCE_STRIDE=source + 64, HALVES=halves, RATIO=ratio, POOL=ratio * halves,
                        RING=ratio * halves, PER_BLOCK=256 // ratio, INDEX_PADDED=INDEX, **absent,
                        **ring)
            none = {name: None for name in ("sources_ptr", "kept_ptr", "states_ptr")
                    if name in absent}
            for snapshots in ({}, {"snapshot_places_ptr": None}):
                compile("keep", write.keep_step_kernel, pools, WIDTH=row, SOURCE=source,
                        SOURCE_STRIDE=source + 64, RING=ratio * halves, PADDED=1024, **none,
                        **snapshots)
        compile("snapshots", copy_slot_kernel, dict(slots_ptr=key), SIZE=128 * row, TILE=1024)
        for absent in ({}, {"slots_ptr": None}, {"pool_ptr": None, "slots_ptr": None}):
            for whole in ({"values_ptr": None, "lse_ptr": None}, {}):
                compile("attend", attend_v4_kernel, pools, Q_STRIDE=40960, WIDTH=WIDTH, ROPE=ROPE,
                        ROW=row, WINDOW=128, RING=128, RATIO=4, PER_BLOCK=64, HEADS=16,
                        KEYS=16 if kind == "float32" else 32, PADDED=WIDTH, ROUND_SCALES=True,
                        WIDE=tl.float32 if kind == "float32" else tl.bfloat16, num_stages=1,
                        codes_ptr=None, scales_ptr=None, **absent, **whole)
        if kind == "bfloat16":
            # of steps with prompts: stages, keys
            many = (2, 64) if SHARED >= 227 << 10 else (3, 32)
            many = many if key == "bfloat16" else (1, 32)
            fp8 = {"out_ptr": None} if NATIVE else {"codes_ptr": None, "scales_ptr": None}
            for heads, warps, stages, keys in ((16, 4, 1, 32), (64, 8, *many)):
                compile("attend", attend_v4_kernel, pools, Q_STRIDE=40960, WIDTH=WIDTH, ROPE=ROPE,
                        ROW=row, WINDOW=128, RING=128, RATIO=4, PER_BLOCK=64, HEADS=heads,
                        KEYS=keys, PADDED=WIDTH, WIDE=tl.bfloat16, ROUND_SCALES=True,
                        num_warps=warps, num_stages=stages, values_ptr=None, lse_ptr=None, **fp8)
    for splits, columns in ((4, 512), (32, 128)):
        for absent in ({"out_ptr": None}, {"codes_ptr": None, "scales_ptr": None}):
            compile("combine", combine_v4_kernel, types | {"codes_ptr": "uint8"}, WIDTH=WIDTH,
                    ROPE=ROPE, MAX_SPLITS=splits, COLUMNS=columns, ROUND_SCALES=True, **absent)
    compile("silu", dense.activate_kernel, types, WIDTH=2048, GATED=True, BLOCK=1024, LIMIT=10.0,
            codes_ptr=None, scales_ptr=None, ROUND_SCALES=False)
    for tokens in (1, 8192):
        compile("experts", expert_gemm_kernel, dict(x_ptr=kind, weight_ptr=kind, out_ptr=kind),
                x_scales_ptr=None, weight_scales_ptr=None, out_scales_ptr=None, ROW_PAIRS=6,
                NUM_EXPERTS=256, WIDTH=4096, COLUMNS=2048, GATED=True, ROUND_SCALES=False,
                NATIVE=NATIVE, EXPERTS=256, LIMIT=10.0, **NOT_FOUR_BITS,
                **block_sizes(kind, 2048, 4096, configuration(kind, 6 * tokens, 256, True,
                                                              2048, 4096, SHARED)))
for absent in ({}, {"slots_ptr": None}):
    compile("place", place_step_kernel, INT32_TYPES | {"newest_ptr": "int64"}, WINDOW=128,
            RING=131, BLOCK_SIZE=128, CSA_RATIO=4, HCA_RATIO=128, ROW_TILE=256, TILE=128, **absent)
records = dict.fromkeys(("keys_ptr", "ring_ptr", "pool_ptr"), "uint8")
compile("plain rows", v4_plain.place_plain_kernel, INT32_TYPES, MOST_DRAFTS=1, ENTRIES_PER_TOKEN=16,
        BLOCK_SIZE=256, RATIO=4, ROW_TILE=256, TILE=128)
for ratio, absent in ((4, {}), (128, {}), (4, {"pool_ptr": None})):
    compile("plain keys", v4_plain.fill_plain_kernel, INT32_TYPES | records, RING=129, WINDOW=128,
            RATIO=ratio, PER_BLOCK=256 // ratio, ROW=v4_record_bytes(WIDTH, ROPE), WIDTH=WIDTH,
            ROPE=ROPE, TILE=16, num_warps=8, **absent)
for experts in (256, 384):
    padded = 1 << (experts - 1).bit_length()
    sizes = dict(NUM_EXPERTS=experts, TOP_K=6, SCORE="sqrtsoftplus", EXPERTS=padded, MAX_PAIRS=512,
                 num_warps=1)
    # of several tokens, of one, and of more than a launch lists
    for absent in ((), ("scratch_ptr",), ("pairs_ptr", "counts_ptr", "scratch_ptr")):
        types, absent = INT32_TYPES, dict.fromkeys(absent)
        compile("choice", choose_experts_kernel, types | {"slot_mapping_ptr": "int32"},
                NUM_GROUPS=1, TOP_GROUPS=1, NORM=True, GROUPS=1, SIZE=padded, **sizes, **absent)
        compile("look up", look_up_experts_kernel, types, SIZE=8, **sizes, **absent)
"""
