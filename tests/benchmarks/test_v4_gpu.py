"""Floors and launches of `benchmarks.v4_gpu`, and a whole run in small."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import v4_gpu
from benchmarks._gpu_engine_model import Case
from benchmarks._v4_gpu_model import CASES, V4Shape, decode_bytes, drafted_bytes, floor
from benchmarks.gpu_engine import add_peers, entry
from benchmarks.real_widths import agreement, is_worse
from benchmarks.workers.gpu_engine import by_class
from benchmarks.workers.v4_gpu import CLASSES, LAYER, STEP, by_kind
from fd_dsa.models.deepseek_v4.config import DeepseekV4Config
from fd_dsa.models.expected_tensors import expected_tensors
from fd_dsa.models.registry import read_config
from tests.benchmarks.results import result as made_up
from tests.benchmarks.results import shown
from tests.models.published import V4_FLASH

HALF, WHOLE = V4Shape(), V4Shape(43, 256)


@pytest.mark.parametrize(
    ("shape", "rows", "context", "ms"),
    [
        (HALF, 1, 4096, 2.60),
        (HALF, 8, 4096, 7.29),
        (HALF, 32, 4096, 15.4),
        (HALF, 128, 4096, 19.5),
        (HALF, 32, 131072, 16.1),
        (WHOLE, 1, 32768, 2.62),
        (WHOLE, 32, 4096, 20.2),
        (WHOLE, 128, 131072, 38.0),
    ],
)
def test_floors_of_decode_steps(shape: V4Shape, rows: int, context: int, ms: float) -> None:
    """The numbers are from another program, which adds the bytes of single tensors."""
    assert floor(Case("", "decode", rows, context, 1), shape) == pytest.approx(ms, rel=0.005)


@pytest.mark.parametrize(("tokens", "speed"), [(2048, 52e3), (4096, 50e3), (8192, 49e3)])
def test_floors_of_prompts(tokens: int, speed: float) -> None:
    assert floor(Case("", "prefill", 1, tokens, 1), WHOLE) == pytest.approx(speed, rel=0.01)


def test_very_many_rows_read_all_weights_of_the_file(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(V4_FLASH))
    config = read_config(tmp_path)
    assert isinstance(config, DeepseekV4Config)
    stored = 0.0
    for name, tensor in expected_tensors(config).items():
        if "embed_tokens" in name or name.endswith("tid2eid"):
            # a step reads a row of each token
            continue
        size: float = 2
        if tensor.may_be_fp4:
            size = 0.5 + 1 / 32
        elif tensor.quantisable:
            size = 1 + 1 / 128**2
        elif "hc_" in name or name.endswith((".ape", ".attn_sink", ".bias")):
            size = 4
        stored += size * tensor.num_elements
    # one more row, beside which the experts do not count
    rows, few = 1 << 20, WHOLE._replace(experts=6)
    of_a_row = decode_bytes(few, 2, 0) - decode_bytes(few, 1, 0)
    read = decode_bytes(WHOLE, rows, 0) - rows * of_a_row
    assert read == pytest.approx(stored, rel=0.002)


def test_launches_are_counted_by_the_kind_of_a_layer() -> None:
    layers = {"window": 2, "CSA": 5, "HCA": 3}
    kinds = ["window", "CSA", "HCA", "CSA"]
    step = [STEP, "embedding"]
    for kind in kinds:
        step += ["expand_streams_kernel", f"{LAYER}_1", *["other"] * (layers[kind] - 2)]
    # the last layer is followed by the head, and does not count
    cut = step[5:], step[:-7]
    found = by_kind([*cut[0], *[*step, "head"] * 3, *cut[1]], kinds)
    assert found == {kind: {"launches": n, "most": n} for kind, n in layers.items()}


def test_waits_are_the_rest_of_a_step_without_the_profiler() -> None:
    profiles: dict[str, Any] = {"8": {"busy_us": 9000.0, "layers": {}}, "8192": {"busy_us": 1.0}}
    cases = [{"case": name, "ours_value": 10.0} for name in ("decode-8x4k", "prefill-1x8k")]
    [found] = v4_gpu.waits_of(profiles, cases)
    assert (found["rows"], found["share"]) == (8, pytest.approx(0.1))


def test_each_kernel_has_a_class() -> None:
    kernels = [["attend_v4_kernel", 4.0, 1, 2.0], ["expert_gemm_kernel", 3.0, 1, 3.0]]
    kernels.append(["unknown", 1.0, 1, 1.0])
    rows = by_class({"1": {"kernels": kernels, "busy_us": 6.0}}, CLASSES)
    found = {row["class"]: row["us_1"] for row in rows if row["us_1"]}
    assert found == {"attention": 2, "routed experts": 3, "rest": 1, "any kernel runs": 6}


def test_the_page_shows_cases_launches_waits_and_hits(tmp_path: Path) -> None:
    cases = [
        entry("decode-1x4k", CASES["decode-1x4k"], 5.2, 2.6) | {"of_floor": 0.5},
        entry("mixed-64x2k", CASES["mixed-64x2k"], 9000.0, None),
    ]
    profiles: dict[str, Any] = {"1": {"layers": {"CSA": {"launches": 19.0, "most": 20}}}}
    profiles["1"]["busy_us"] = 5000.0
    memory = {"planned": {"weights": 88.2e9}, "bytes_per_token": 6880.0, "planned_bytes": 1.35e11}
    memory |= {"used_bytes": 1.34e11, "num_tokens": 65536}
    changes = {"memory": memory, "memory_after": memory, "late_compilations": 0}
    changes |= {"start": {"engine_s": 41.0, "first_token_s": 0.05}}
    changes |= {"launches": v4_gpu.launches_of(profiles, 1)}
    changes |= {"waits": v4_gpu.waits_of(profiles, cases)}
    changes |= {"hits": [{"rows": 8, "experts": 40.5, "even": HALF.even_hits(8)}]}
    text = shown(tmp_path, made_up("v4_gpu", cases, **changes))
    # without a peer, and without a floor
    assert "| case | fd_dsa | unit | floor | of the floor |" in text
    assert "| decode-1x4k | 5.20 | ms a token | 2.60 | 50% |" in text
    assert "| mixed-64x2k | 9,000.00 | tokens/s |" in text
    assert "Start with 88.2 GB of random weights: 41 s; first token after that in 50 ms." in text
    assert "| 1 | 19 (gate 20, goal 17) |" in text and "| 1 | 5,200 | 5,000 | 3.8% |" in text
    assert "| 8 | 40.5 | 40.8 |" in text
    assert "A token takes 6,880 bytes of caches, and the plan has blocks for 65,536 tokens." in text


def test_figures_of_the_peer_stand_beside_ours(tmp_path: Path) -> None:
    records = [
        {"name": "warm", "tpot_ms": 1.0},
        {"name": "decode-1x4k", "tpot_ms": 8.0},
        {"name": "prefill-1x8k", "error": "out of memory"},
    ]
    lines = "\n".join(f"echo 'RESULT {json.dumps(record)}'" for record in records)
    # the flags that it is called with go to a file
    (tmp_path / "run.sh").write_text(f'echo "$CONFIG $@" > {tmp_path}/called\n{lines}\n')
    cases = {name: CASES[name] for name in ("decode-1x4k", "prefill-1x8k")}
    found = made_up("v4_gpu", [entry(n, c, 5.0, None) for n, c in cases.items()])
    path = tmp_path / "v4_gpu.json"
    add_peers(found, path, cases, tmp_path, "--model-type deepseek_v4")
    decode, prefill = json.loads(path.read_text())["cases"]
    assert (decode["peer_value"], decode["ratio"]) == (8.0, 1.6)
    assert prefill["peer_value"] is None
    called = (tmp_path / "called").read_text()
    assert called.startswith("--model-type deepseek_v4 bench --out ")
    assert called.endswith("--tp 1 --scenarios warm,decode-1x4k:3,prefill-1x8k:2\n")


@pytest.mark.parametrize("rows", [1, 32])
def test_floors_of_two_gpus(rows: int) -> None:
    """Both share experts, heads and the output head, whose bytes are added here once more."""
    one, two = (decode_bytes(WHOLE._replace(ranks=n), rows, 4096) for n in (1, 2))
    w, hits = V4_FLASH, WHOLE.even_hits(rows)
    hidden, width = w["hidden_size"], w["moe_intermediate_size"]
    heads = w["num_attention_heads"] * w["head_dim"]
    low = w["o_groups"] * w["o_lora_rank"]
    shared = hits * 3 * hidden * width * (0.5 + 1 / 32)
    shared += 3 * hidden * width + heads * (w["q_lora_rank"] + w["o_lora_rank"]) + low * hidden
    shared = w["num_hidden_layers"] * shared + 2 * w["vocab_size"] * hidden
    assert one - two == pytest.approx(shared / 2, rel=0.001)
    alone, beside = (
        floor(Case("", "prefill", 1, 8192, 1), s) for s in (WHOLE, WHOLE._replace(ranks=2))
    )
    assert alone and beside and 1.7 < beside / alone < 2


def test_a_dry_run_of_two_ranks(tmp_path: Path) -> None:
    pytest.importorskip("paddle", reason="the engine computes on Paddle")
    flags = ["--dry", "-tp", "2", "--layers", "4", "--experts", "8", "--cases", "decode-1x4k"]
    assert v4_gpu.main([*flags, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "v4_gpu_2.json").read_text())
    (case,) = result["cases"]
    assert (result["ranks"], case["target"]) == (2, "V36") and case["ours_value"] > 0


def test_a_dry_run_measures_each_kind_of_case(tmp_path: Path) -> None:
    pytest.importorskip("paddle", reason="the engine computes on Paddle")
    names = "decode-1x4k", "prefill-1x8k", "mixed-64x2k", "decode-32x32k"
    flags = ["--dry", "--layers", "4", "--experts", "8", "--cases", ",".join(names)]
    assert v4_gpu.main([*flags, "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "v4_gpu.json").read_text())
    assert result["tier"] == "dry" and (result["layers"], result["experts"]) == (4, 8)
    assert [case["case"] for case in result["cases"]] == list(names)
    for case in result["cases"]:
        assert case["ours_value"] > 0 and ("of_floor" in case) == (case["floor"] is not None)
    assert result["late_compilations"] == 0 and result["memory"]["bytes_per_token"] > 0
    assert result["start"]["first_token_s"] > 0


def test_bytes_of_drafts() -> None:
    """Two tokens a row read up to twice the experts, and no more than the layer in addition."""
    for rows in (1, 8, 32, 128):
        known, layer = (drafted_bytes(V4Shape(), rows, 4096, has) for has in (False, True))
        experts = V4Shape().even_hits(2 * rows) / V4Shape().even_hits(rows)
        # keys and sources of another token count, too
        assert 1 < known < experts + 0.02
        assert known < layer < known + 0.15


def test_engines_agree_where_the_lead_is_clear() -> None:
    peer = [[[1, -0.1], [2, -2.0]], [[1, -0.7], [2, -0.8]], [[3, -0.2], [4, -3.0]]]
    ours = [[[1, -0.1], [2, -2.0]], [[2, -0.7], [1, -0.8]], [[4, -0.2], [3, -3.0]]]
    found = agreement(ours, peer)
    assert found == {"peer_leads": 2, "different": 1}
    assert is_worse(found | {"mean_difference": 0.0})
    assert not is_worse({"peer_leads": 40, "different": 2, "mean_difference": 0.05})
    assert is_worse({"peer_leads": 40, "different": 0, "mean_difference": 0.2})
