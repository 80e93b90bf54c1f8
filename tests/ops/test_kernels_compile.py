"""Kernels compile for every GPU at the sizes of real models, on any machine, in every Triton.

Of those that were tuned for Hopper: they compile for it as they were meant to.
"""

from __future__ import annotations

import json
import re
from importlib.metadata import version
from typing import Any

import pytest

from tests.compiling import output_of
from tests.ops.four_bit_forms import FOUR_BITS
from tests.ops.kernel_forms import COMMON, EVERY, TUNED
from tests.ops.v4_kernel_forms import V4

# minutes of work, which begin before those of other files
pytestmark = [pytest.mark.triton, pytest.mark.timeout(1200)]

REGISTERS = 65536
# of a block, by compute capability: A100, L40S, Hopper, Blackwell, RTX PRO 6000
SHARED = {80: 163 << 10, 89: 99 << 10, 90: 227 << 10, 100: 227 << 10, 120: 99 << 10}
# of a processor of Hopper
SHARED_BYTES = 228 << 10
# what a block of a processor has beside its own
RESERVED_BYTES = 1 << 10
# registers that do not fit: a few that are read again outside the GEMMs cost little
MOST_STACK_BYTES = 288
# kernels that do not wait for those before them, and those that read a weight ahead of the wait
ALONE = "dequantize", "records", "positions", "fill", "step", "v4 rows", "expand"
ALONE += (
    "place",
    "snapshots",
    "scan",
    "settle",
    "masses",
    "gather",
    "draw",
    "verify",
    "follow",
    "extend",
    "plain rows",
    "plain keys",
)
AHEAD = "norm", "choice", "streams", "stages"
# before, Triton has no `gdc_wait`, or calls it otherwise
CAN_WAIT = tuple(map(int, re.findall(r"\d+", version("triton"))[:2])) >= (3, 5)


def compiled(script: str, capability: int = 90) -> list[dict[str, Any]]:
    """Return the kernels that a script compiled, in its order."""
    target = f"CAPABILITY, SHARED = {capability}, {SHARED[capability]}\n"
    made = [json.loads(line) for line in output_of(target + COMMON + script).splitlines()]
    assert not [form["label"] for form in made if form.get("serialized")]
    return made


def assert_waits(form: dict[str, Any]) -> None:
    """A kernel of a decode step waits before it reads anything but weights, and writes."""
    name = re.split(r"[ ,]", form["label"])[0]
    waits = CAN_WAIT and form["label"] not in ALONE
    assert form["waits"] == waits, form["label"]
    assert form["only_loads"] and (form["loads_ahead"] > 0) == (waits and name in AHEAD), name
    assert waits or not form["next"], name


def assert_fits(form: dict[str, Any]) -> None:
    """A processor of Hopper holds the blocks for which the tiles were chosen."""
    name, blocks = form["label"], form["blocks"]
    assert blocks * (form["shared"] + RESERVED_BYTES) <= SHARED_BYTES + RESERVED_BYTES, name
    registers = blocks * form["warps"] * 32 * -(-form["registers"] // 8) * 8
    assert registers <= REGISTERS, name


@pytest.mark.slow
def test_every_form_compiles() -> None:
    made = compiled(EVERY)
    assert [form["label"] for form in made] == [
        *["logits"] * 5,
        *["topk"] * 2,
        *["mla"] * 5,
        *["dequantize"] * 2,
        *["records", "positions"],
        *[*["norm"] * 4, *["silu"] * 2, "quantize", *["join"] * 2, *["rows"] * 2] * 2,
        *["fill"] * 8,
        *["choice"] * 12,
        *["group"] * 2,
        *[*["experts"] * 6, "sum"] * 2,
        *[*["write"] * 2, *["query"] * 2, *["mla_query"] * 2] * 2,
        *["write", "query"],
        *["scan", "scan", *["settle", "draw"] * 2, *["masses", "gather"] * 2] * 3,
        *["verify"] * 3,
        *["extend", "follow"],
        *["mtp"] * 4,
        *["step"] * 10,
        *["v4 rows"] * 3,
    ]
    for form in made:
        assert_waits(form)
        most = 16 << 10 if form["label"] == "step" else SHARED_BYTES
        assert form["shared"] <= most, form["label"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_forms_of_deepseek_v4(capability: int) -> None:
    made = compiled(V4, capability)
    names = {"streams", "norm", "rotate", "write", "keep", "attend", "silu", "experts"}
    names |= {"combine", "choice", "look up", "place", "snapshots", "last streams"}
    names |= {"plain rows", "plain keys"}
    # with FP8 activations or records
    codes = "norm", "rotate", "write", "attend", "combine"
    assert {form["label"] for form in made} == names
    for form in made:
        if "needs_fp8" in form:
            assert capability < 89 and form["label"] in codes
            continue
        if capability == 90:
            assert_waits(form)
        assert form["shared"] <= SHARED[capability], form["label"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 90])
def test_forms_of_experts_in_four_bits(capability: int) -> None:
    made = compiled(FOUR_BITS, capability)
    assert len(made) == 4 * 7
    for form in made:
        assert form["shared"] <= SHARED[capability]
        if capability == 90:
            assert_waits(form)
            assert_fits(form)
            # GEMMs on tensor cores, and tiles copied ahead of them
            assert form["products"] and all("bf16.bf16" in p for p in form["products"])
            assert form["in_flight"] and form["ways"] <= 1
            assert form["stack"] <= MOST_STACK_BYTES


@pytest.mark.slow
def test_tuned_forms_are_what_they_are_chosen_for() -> None:
    made = compiled(TUNED)
    assert len(made) == 4 + 4 + 9 + 4 + 6 + 12 + 12 + 2 + 15 + 9 + 4 + 9
    for form in made:
        assert_waits(form)
        assert_fits(form)
        name = form["label"]
        if name == "expand":
            assert form["stack"] == 0 and form["registers"] <= 168 and form["shared"] <= 16 << 10
        if name.startswith("tiles"):
            # products on tensor cores, and pages copied ahead of them
            kind = "e4m3.e4m3" if name.endswith("uint8") else "bf16.bf16"
            assert form["products"] and all(kind in p for p in form["products"]), name
            assert form["in_flight"] == form["stages"] - 2, name
            # only a few numbers of a tile are kept in memory, outside of the loop over its pages
            assert form["stack"] <= 32, name
        if name.startswith("fp8"):
            # products of codes on tensor cores, and tiles of every operand copied ahead of them
            assert form["products"] and all("e4m3.e4m3" in p for p in form["products"]), name
            assert form["in_flight"] == int(name.split()[1]) * (form["stages"] - 2), name
            assert form["stack"] <= MOST_STACK_BYTES and form["ways"] <= 1, name
        if name == "stages of groups":
            # weights of a single stage are read ahead of the wait, others are copied in stages
            assert bool(form["copies"]) == (form["stages"] > 1), name
            assert form["in_flight"] == 2 * max(0, form["stages"] - 2), name
            assert form["copies"] or form["loads_ahead"] > 1, name
            assert form["stack"] == 0 and form["registers"] <= 168, name
        if name == "beside":
            # products of codes and of bfloat16 on tensor cores, and tiles copied ahead of them
            types = {product.rpartition("f32.")[2] for product in form["products"]}
            assert types == {"e4m3.e4m3", "bf16.bf16"} and form["in_flight"], name
            assert form["stack"] == 0 and form["ways"] <= 1, name
        if name.startswith("linear"):
            # wgmma multiplies 64 rows or more
            assert bool(form["products"]) == name.endswith(" 128"), name
            assert form["ways"] <= 1 and form["in_flight"], name
            assert form["stack"] == 0, name
        if name.startswith("prompts"):
            # both GEMMs on tensor cores, and tiles of keys copied ahead of them
            assert len(form["products"]) == 2 and form["ways"] <= 1 and form["copies"], name
            assert form["stack"] <= MOST_STACK_BYTES, name
        if name.startswith(("mla", "combine")):
            assert form["stack"] <= MOST_STACK_BYTES, name
            # CUDA 12.8's ptxas loses an address that wgmma read in two ways: wrong results
            assert form["ways"] <= 1, name
            assert (form["copies"] > 0) == name.startswith("mla ahead"), name
            # of eight heads not every Triton makes instructions of 64 rows
            if ",8," not in name:
                assert bool(form["products"]) == name.endswith(",64"), name


WAITING = """
import os
from fd_dsa.ops.dense_kernels import rms_norm_kernel
from fd_dsa.ops.head_gemm import head_gemm_kernel

for capability, switch in (80, ""), (89, "1"), (90, ""), (90, "1"), (90, "0"), (100, ""):
    os.environ["FD_DSA_PDL"] = switch
    label = f"norm {capability} {switch}"
    compile(label, rms_norm_kernel, capability=capability, WIDTH=128, BLOCK=128,
            ROUND_SCALES=False, **dict.fromkeys(("delta_ptr", "sum_ptr", "codes_ptr",
                                                 "scales_ptr")))
    compile(f"heads {capability} {switch}", head_gemm_kernel, capability=capability, IN=128,
            OUT=128, HALF=0, IN_FIRST=True, ROUND_SCALES=False, BLOCK_TOKENS=16, BLOCK_IN=32,
            BLOCK_OUT=32, codes_ptr=None, scales_ptr=None, rows_ptr=None, count_ptr=None)
"""


def test_kernels_wait_where_the_device_can() -> None:
    made = compiled(WAITING)
    assert len(made) == 12
    for form in made:
        _, capability, switch = form["label"].split(" ")
        waits = CAN_WAIT and int(capability) >= 90 and switch != "0"
        assert (form["waits"], form["next"]) == (waits, waits), form["label"]


@pytest.mark.slow
@pytest.mark.parametrize("capability", [80, 89, 100, 120])
def test_kernels_compile_for_other_gpus(capability: int) -> None:
    """Those that serve there: docs/models.md has the table."""
    made = compiled(EVERY + TUNED, capability)
    assert len(made) > 60
    needs_fp8 = {form["label"].split()[0] for form in made if "needs_fp8" in form}
    # what writes codes, or reads them for a GEMM
    writers = {"norm", "silu", "quantize", "fill", "write", "query", "fp8", "tiles", "prompts"}
    writers |= {"beside", "stages"}
    readers = {"logits", "mla", "dequantize", "records", "keys"}
    assert needs_fp8 == (writers | readers if capability < 89 else set())
    served = {form["label"].split()[0] for form in made if "needs_fp8" not in form}
    # with caches and weights of bfloat16, everything but the quantisation
    assert served >= {
        "prompts",
        "keys",
        "logits",
        "topk",
        "mla",
        "norm",
        "silu",
        "experts",
        "sum",
        "write",
        "query",
    }
    for form in made:
        assert form.get("shared", 0) <= SHARED[capability], form["label"]
        assert form.get("waits", False) <= (capability >= 90), form["label"]
