"""Forms of the kernels compile for the GPUs it is for, on any machine, and do not spill."""

from __future__ import annotations

import pytest

from tests.compiling import output_of

SCRIPT = """
import re, subprocess, sys, tempfile
from pathlib import Path
from fd_dsa.triton_runtime import Pointer
from fd_dsa.v4_prepare.kernel import csa_rows_kernel, expand_kernel as kernel
from fd_dsa.v4_prepare.launch import expand_arguments
from tests.v4_prepare.cases import serving_config
import triton

capability, *names = sys.argv[1:]
decode = serving_config(256, 131072, 3)
forms = {
    "decode": (decode, True),
    "paged decode": (serving_config(128, 8192, 1, swa="paged"), False),
    "one row": (serving_config(1, 1024, 0), False),
    "table": (serving_config(8, 1 << 20, 3, hca_mode="table"), True),
    "chunks": (
        serving_config(129, 16384, 1, max_num_tokens=8448, max_tokens_per_seq=8192), False
    ),
}
tool = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"
for name in names:
    cfg, has_rollback = forms[name]
    given = {n: Pointer("int32") for n in kernel.arg_names if n.endswith("_ptr")}
    if not has_rollback:
        given["rollback_ptr"] = None
    if cfg.hca_mode == "table":
        given["hca_idx_ptr"] = None
    given |= expand_arguments(cfg)
    given |= {"slab_offset": 1 << 40, "error_address": 1 << 40, "num_rollback": 7}
    compiled = kernel.warmup(**given, capability=int(capability))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        Path(file.name).write_bytes(compiled.image)
        text = subprocess.run(
            [tool, "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    print(*re.search(r"REG:(\\d+) STACK:(\\d+)", text).groups(), compiled.shared_bytes)
# rows of chosen entries: a small model, V4-Flash, V4-Pro
for topk in (3, 512, 1024) if capability == "90" else ():
    given = {n: Pointer("int32") if n.endswith("_ptr") else 7 for n in csa_rows_kernel.arg_names}
    given |= {"TOPK": topk, "ENTRIES_PER_BLOCK": 32, "TILE": 512 if topk > 3 else 4}
    assert csa_rows_kernel.warmup(**given, capability=90).image
"""


@pytest.mark.triton
@pytest.mark.parametrize(
    ("capability", "forms"),
    [
        (80, ["decode"]),
        (90, ["decode", "paged decode", "one row", "table", "chunks"]),
        (100, ["decode"]),
    ],
)
def test_forms_compile_without_spills(capability: int, forms: list[str]) -> None:
    output = output_of(SCRIPT, str(capability), *forms)
    found = [tuple(map(int, line.split())) for line in output.splitlines()]
    assert len(found) == len(forms)
    for registers, stack_bytes, shared_bytes in found:
        assert stack_bytes == 0
        assert registers <= 168
        assert shared_bytes <= 16 << 10
