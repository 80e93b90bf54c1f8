"""Forms of the tile kernel compile for Hopper as they are meant: what the compiler made of them."""

from __future__ import annotations

import json

import pytest

from tests.compiling import output_of

REGISTERS, SHARED_BYTES = 65536, 227 << 10
# what a block of a processor has beside its own
_RESERVED_BYTES = 1 << 10

SCRIPT = """
import json, re, subprocess, sys, tempfile
from pathlib import Path
import triton
from fd_dsa.ops.logits.tile_forms import decode_form, padded_heads, prompt_form
from fd_dsa.ops.logits.tile_kernel import tile_kernel
from fd_dsa.ops.logits.tile_schedule import _LANES, _NUM_WARPS, tile_schedule_kernel
from fd_dsa.triton_runtime import Pointer

TYPES = {"q_ptr": "uint8", "cache_ptr": "uint8", "position_ids_ptr": "int64",
         "weights_ptr": "float32", "logits_ptr": "float32"}
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

def compiled(kernel, **constants):
    names = [name for name in kernel.arg_names if name not in constants]
    given = {n: Pointer(TYPES.get(n, "int32")) if n.endswith("_ptr") else 7 for n in names}
    made = kernel.warmup(**given, **constants, capability=90)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(made.image)
        command = [tool, "-res-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    registers, stack = map(int, re.search(r"REG:(\\d+) STACK:(\\d+)", text).groups())
    return {"registers": registers, "stack": stack, "shared": made.shared_bytes,
            "products": sorted(set(re.findall(r"wgmma.mma_async\\S*", made.ptx))),
            "in_flight": max(map(int, re.findall(r"cp.async.wait_group\\s+(\\d+)", made.ptx)),
                             default=0)}

compiled(tile_schedule_kernel, PAGE=64, LANES=_LANES, num_warps=_NUM_WARPS)
for heads, tokens in json.loads(sys.argv[1]):
    form = decode_form(heads, tokens) if tokens else prompt_form(heads)
    found = compiled(
        tile_kernel, NUM_HEADS=heads, HEADS=padded_heads(heads), WIDTH=128, PAGE=64,
        FIRST=form.first_tokens, REST=form.rest_tokens, num_warps=form.num_warps,
        num_stages=form.num_stages, maxnreg=form.maxnreg,
    )
    print(json.dumps(found | {"warps": form.num_warps, "stages": form.num_stages,
                              "blocks": form.programs_per_processor}))
"""


@pytest.mark.triton
def test_forms_are_what_they_are_chosen_for() -> None:
    # heads, and tokens of a decode row or 0 for a step with prompts
    forms = [(64, 0), (32, 0), (64, 1), (64, 2), (64, 3)]
    said = output_of(SCRIPT, json.dumps(forms))
    found = [json.loads(line) for line in said.splitlines()]
    assert len(found) == len(forms)
    for form, made in zip(forms, found, strict=True):
        # products of e4m3 numbers on tensor cores, and pages copied ahead of them
        assert made["products"] and all("e4m3.e4m3" in name for name in made["products"]), form
        assert made["in_flight"] == made["stages"] - 2, form
        # only a few numbers of a tile are kept in memory, outside of the loop over its pages
        assert made["stack"] <= 32, form
        threads = made["blocks"] * made["warps"] * 32
        assert threads * -(-made["registers"] // 8) * 8 <= REGISTERS, form
        assert made["blocks"] * (made["shared"] + _RESERVED_BYTES) <= SHARED_BYTES, form
