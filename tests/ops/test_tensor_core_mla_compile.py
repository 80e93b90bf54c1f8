"""Every chosen form of sparse MLA on tensor cores compiles for Hopper as it was meant to."""

from __future__ import annotations

import pytest

from tests.compiling import output_of

SHARED_BYTES_OF_A_PROCESSOR = 227 << 10
# registers that do not fit: a few that are read again outside the GEMMs cost little
MOST_STACK_BYTES = 288

SCRIPT = """
import re, subprocess, tempfile
from collections import defaultdict
from pathlib import Path
import triton
from fd_dsa.ops.mla import tensor_core as core, tensor_core_kernel as kernels
from fd_dsa.triton_runtime import Pointer

TYPES = {"q_ptr": "bfloat16", "slots_ptr": "int32", "out_ptr": "bfloat16", "lse_ptr": "float32",
         "partial_ptr": "float32", "partial_lse_ptr": "float32"}
# the upper half of a descriptor is how a wgmma reads shared memory, the lower one where
DESCRIPTOR = r"(?:or\\.b64|add\\.s64)\\s+%rd\\d+, (%rd\\d+), (-?\\d{19});"
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

def compile(label, kernel, per_processor, num_warps, num_stages, types, **constants):
    types = TYPES | types
    names = [name for name in kernel.arg_names if name not in constants]
    arguments = {n: Pointer(types[n]) if n.endswith("_ptr") else 7 for n in names}
    if "scale_log2" in names:
        arguments["scale_log2"] = 0.1
    options = {"num_warps": num_warps, "num_stages": num_stages, "capability": 90}
    found = kernel.warmup(**arguments, **constants, **options)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(found.image)
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    ways = defaultdict(set)
    for address, constant in re.findall(DESCRIPTOR, found.ptx):
        ways[address].add(int(constant) >> 32)
    registers, stack = re.search(r"REG:(\\d+) STACK:(\\d+)", text).groups()
    print(label, per_processor, found.num_warps, registers, stack, found.shared_bytes,
          found.ptx.count("wgmma.mma_async"), found.ptx.count("cp.async.cg"),
          max(map(len, ways.values()), default=0))

# heads, tokens, whether the cache holds records, whether the entries are split
for heads, tokens, fp8, split in ((8, 9, True, False), (16, 9, True, False), (32, 9, True, True),
                                  (64, 9, True, False), (64, 2, True, True), (8, 9, False, True),
                                  (16, 9, False, False), (32, 9, False, True),
                                  (64, 9, False, False)):
    form = core.form_for(heads, tokens, fp8)
    constants = {"BLOCK_H": form.block_h, "BLOCK_N": form.block_n, "SWAPPED": form.swapped}
    kernel = kernels.attend_copied_kernel
    if not form.copied:
        kernel, constants["FP8"] = kernels.attend_kernel, fp8
    absent = ("out_ptr", "lse_ptr") if split else ("partial_ptr", "partial_lse_ptr")
    constants |= dict.fromkeys(absent)
    # keys copied ahead or not; rows of an instruction: 64 keys or heads, or 16 heads
    label = "ahead" if form.copied and form.num_stages > 1 else "now"
    label += f",{heads},{'fp8' if fp8 else 'bf16'},"
    label += f"{min(form.block_n if form.swapped else form.block_h, 64)}"
    compile(label, kernel, form.per_processor, form.num_warps, form.num_stages,
            {"cache_ptr": "uint8" if fp8 else "bfloat16"}, **constants)
for most, columns, warps in core._COMBINE:
    compile("combine", kernels.combine_kernel, 4, warps, 1, {}, MAX_SPLITS=most, COLUMNS=columns)
"""


@pytest.mark.triton
def test_every_form_compiles() -> None:
    said = output_of(SCRIPT)
    found = [line.split() for line in said.splitlines()]
    assert len(found) == 9 + 2
    for name, *numbers in found:
        programs, warps, registers, stack, shared, products, copies, ways = map(int, numbers)
        assert programs * (shared + 1024) <= SHARED_BYTES_OF_A_PROCESSOR, name
        assert programs * warps * 32 * registers <= 65536, name
        assert stack <= MOST_STACK_BYTES, name
        # of eight heads not every Triton makes instructions of 64 rows
        if ",8," not in name:
            assert (products > 0) == name.endswith(",64"), name
        assert (copies > 0) == name.startswith("ahead"), name
        # CUDA 12.8's ptxas loses an address that wgmma read in two ways: wrong results
        assert ways <= 1, name
