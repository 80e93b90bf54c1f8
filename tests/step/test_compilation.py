"""Both step kernels compile for Hopper, on any machine."""

from __future__ import annotations

import pytest

from fd_dsa.step.device import DECODE_TILE, DECODE_WARPS, MIXED_TILE, MIXED_WARPS, row_tile_for
from tests.compiling import output_of

SCRIPT = """
import sys
from fd_dsa.step import kernel
from fd_dsa.triton_runtime import Pointer

name, *numbers = sys.argv[1:]
max_num_seqs, row_tile, int32_positions, tile, warps = map(int, numbers)
kernel = getattr(kernel, name)
wide = {"position_ids_ptr", "slot_mapping_ptr"}
unused = () if int32_positions else ("position_ids_int32_ptr",)
arguments = {
    name: None if name in unused else Pointer("int64" if name in wide else "int32")
    if name.endswith("_ptr") else 7
    for name in kernel.arg_names
}
arguments |= {"BLOCK_SIZE": 64, "ROW_TILE": row_tile, "NUM_ROW_TILES": -(-max_num_seqs // row_tile),
              "TILE": tile}
compiled = kernel.warmup(**arguments, num_warps=warps, capability=90)
print(compiled.num_warps, compiled.shared_bytes)
"""


@pytest.mark.triton
@pytest.mark.parametrize(
    ("kernel", "tile", "warps"),
    [
        ("decode_step_metadata_kernel", DECODE_TILE, DECODE_WARPS),
        ("mixed_step_metadata_kernel", MIXED_TILE, MIXED_WARPS),
    ],
)
@pytest.mark.parametrize("max_num_seqs", [1, 100, 256, 1024, 4096])
def test_every_capacity_compiles(max_num_seqs: int, kernel: str, tile: int, warps: int) -> None:
    # the largest with positions of both types
    numbers = max_num_seqs, row_tile_for(max_num_seqs), int(max_num_seqs == 4096), tile, warps
    found_warps, shared_bytes = map(int, output_of(SCRIPT, kernel, *map(str, numbers)).split())
    assert found_warps == warps
    assert shared_bytes <= 16 << 10
