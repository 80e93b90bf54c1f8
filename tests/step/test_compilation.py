"""Every form of the step kernel compiles for Hopper, on any machine."""

from __future__ import annotations

import pytest

from fd_dsa.step.launch import DECODE_TILE, DECODE_WARPS, MIXED_TILE, MIXED_WARPS, row_tile_for
from tests.compiling import output_of

SCRIPT = """
import sys
from fd_dsa.step.kernel import step_metadata_kernel as kernel
from fd_dsa.triton_runtime import Pointer

max_num_seqs, row_tile, has_prefill, int32_positions, tile, warps = map(int, sys.argv[1:])
wide = {"position_ids_ptr", "slot_mapping_ptr"}
unused = () if has_prefill else ("seq_lens_encoder_ptr", "indexer_attn_mask_offsets_ptr",
                                 "cu_seqlens_kg_ptr")
if not int32_positions:
    unused += ("position_ids_int32_ptr",)
arguments = {
    name: None if name in unused else Pointer("int64" if name in wide else "int32")
    if name.endswith("_ptr") else 7
    for name in kernel.arg_names
}
arguments |= {"BLOCK_SIZE": 64, "HAS_PREFILL": bool(has_prefill), "ROW_TILE": row_tile,
              "NUM_ROW_TILES": -(-max_num_seqs // row_tile), "TILE": tile}
compiled = kernel.warmup(**arguments, num_warps=warps, capability=90)
print(compiled.num_warps, compiled.shared_bytes)
"""


@pytest.mark.triton
@pytest.mark.parametrize("has_prefill", [False, True])
@pytest.mark.parametrize("max_num_seqs", [1, 100, 256, 1024, 4096])
def test_every_capacity_compiles(max_num_seqs: int, has_prefill: bool) -> None:
    # the largest with positions of both types
    int32_positions = max_num_seqs == 4096
    tile, warps = (MIXED_TILE, MIXED_WARPS) if has_prefill else (DECODE_TILE, DECODE_WARPS)
    row_tile = row_tile_for(max_num_seqs)
    numbers = (max_num_seqs, row_tile, int(has_prefill), int(int32_positions), tile, warps)
    said = output_of(SCRIPT, *map(str, numbers))
    found_warps, shared_bytes = map(int, said.split())
    assert found_warps == warps
    assert shared_bytes <= 16 << 10
