"""Script like those of `kernel_forms.py` for experts in four bits, at sizes of DeepSeek-V3.2."""

from __future__ import annotations

FOUR_BITS = """
from fd_dsa.ops.expert_gemm import block_sizes, configuration, expert_gemm_kernel

for kind, group in ("e4m3", 16), ("e8m0", 32), ("int4", 128), ("int4", 32):
    types = {"x_ptr": "bfloat16", "out_ptr": "bfloat16", "weight_ptr": "uint8",
             "weight_scales_ptr": "int32" if kind == "int4" else "uint8"}
    absent = dict(x_scales_ptr=None, out_scales_ptr=None)
    absent |= {"weight_factors_ptr": None} if kind == "int4" else {}
    for tokens, columns, width in ((1, 2048, 7168), (1, 7168, 2048), (128, 7168, 512),
                                   (256, 2048, 7168), (256, 7168, 512),
                                   (8192, 2048, 7168), (8192, 7168, 2048)):
            gated = columns == 2048
            tiling = configuration(kind, 8 * tokens, 256, gated, columns, width, SHARED)
            compile("experts", expert_gemm_kernel, types, ROW_PAIRS=8 if gated else 1,
                    NUM_EXPERTS=256, WIDTH=width, COLUMNS=columns, GATED=gated,
                    ROUND_SCALES=False, NATIVE=False, EXPERTS=256, LIMIT=None, GROUP=group,
                    KIND=kind, **absent, blocks=2 if tiling.maxnreg else 1,
                    **block_sizes(kind, columns, width, tiling))
"""
