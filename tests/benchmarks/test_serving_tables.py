"""How results of the engine and the server on a CPU are shown, and what their workers measure."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from benchmarks import growth
from benchmarks._harness import Worker, write_json
from benchmarks.report import region

ENV = {
    "date": "2026-01-02",
    "cpu": "Some CPU",
    "cpus": 2,
    "python": "3.12.3",
    "paddlepaddle": "3.3.1",
    "commit": "c" * 40,
    "dirty": False,
}


def rendered(folder: Path, name: str, result: dict[str, Any]) -> str:
    write_json(folder / f"{name}.json", {"name": name, "env": ENV, "tier": "T0"} | result)
    return region(name, folder)


def side(loss: float) -> dict[str, Any]:
    return {
        "tokens_per_s": 95.0,
        "loss": loss,
        "loss_spread": [loss - 0.01, loss + 0.01],
        "added_ms_a_token": {"p20": 1.0, "p50": 1.25, "p80": 1.5},
        "cpu_per_token": {"serve_us": 40.0, "client_us": 9.0, "all_us": 900.0},
    }


def test_a_server_beside_the_engine(tmp_path: Path) -> None:
    row = {"arrangement": "apart", "streams": 8, "engine_tokens_per_s": 100.0}
    row["servers"] = {"fd_dsa": side(0.05), "before": side(0.2)}
    result = {"prompt_tokens": 64, "new_tokens": 128, "rounds": 5, "cases": [row]}
    baseline = {"commit": "b" * 40, "dirty": False}
    text = rendered(tmp_path, "server_overhead", result | {"baseline": baseline})
    assert f"Some CPU, 2 processors; {'Python 3.12.3, paddlepaddle 3.3.1'}; commit cccc" in text
    assert "before: bbbbbbbbbbbb." in text
    assert "| apart | 8 | 100.0 | 95.0 | 5.0% (4.0%, 6.0%) | 1.25 | 40 |" in text
    assert "| 95.0 | 20.0% (19.0%, 21.0%) | 1.25 | 40 | 9 |" in text


def test_gaps_of_a_stream(tmp_path: Path) -> None:
    gaps = {"p50": 131.2, "p99": 189.4, "max": 203.0, "count": 367}
    row = {
        "target_ms": 200.0,
        "first_gap_ms": gaps | {"p99": 190.6},
        "gap_ms": gaps,
        "round_p99_ms": [190.6, 189.4],
        "prompt_s": {"p50": 48.8},
        "prompt_tokens_per_s": 340.2,
        "prompts_ratio": 0.99,
        "prompts_ratio_spread": [0.98, 1.01],
    }
    result = {"prompt_tokens": 8000, "rounds": 5, "alone": [2, 2048], "clock": "processor"}
    text = rendered(tmp_path, "stream_gaps", result | {"sides": [row | {"target_ms": 0.0}, row]})
    figures = "131 | 189 | 203 | 191 | 203 | 48.8 | 340 | 0.990 (0.980, 1.010) |"
    assert f"| none | {figures}" in text and f"| 200 | {figures}" in text
    assert "processor time of one thread" in text


def test_growth(tmp_path: Path) -> None:
    us = {"1": {"p50": 40.0}, "256": {"p50": 700.0}}
    cases = [
        {
            "case": {"layers": layers, "rows": 1, "context": 30},
            "metadata": {"builds": 1.0, "bytes": 1234, "us": 90.0},
            "launches": 2 + 14 * layers,
        }
        for layers in (2, 4)
    ]
    result = {
        "host_time": [
            {
                "vocab_size": 129280,
                "sampling": "greedy",
                "sides": {"fd_dsa": {"us": us, "a_us": 37, "b_us": 2.6}},
            }
        ],
        "pass_us": {"4096": {"p50": 110.0}, "129280": {"p50": 4321.0}},
        "growth": {"cases": cases, "launches_a_layer": 14, "launches_are_linear": True},
    }
    text = rendered(tmp_path, "growth", result)
    assert "| 129,280 | greedy | fd_dsa | 37 + 2.60 | 40.0 | 700 |" in text
    assert "of 256 rows alone takes 110 us (4,096) and 4,321 us (129,280)." in text
    assert "| 4 | 1 | 30 | 1 | 1,234 | 58 |" in text
    assert "Each further layer adds 14 launches." in text


def test_sampler(tmp_path: Path) -> None:
    case = {"spread": "normal", "sampling": "top-p 0.95", "ratio": 4.0}
    case |= {"ms": {"fd_dsa": {"p50": 9.5}, "before": {"p50": 38.0}}}
    case |= {"draws": 10016, "differing": 0}
    result = {"cases": [case], "baseline": {"commit": "b" * 40, "dirty": False}}
    text = rendered(tmp_path, "sampler", result)
    assert "before: bbbbbbbbbbbb." in text
    assert "| normal | top-p 0.95 | 38.0 | 9.50 | 4.00 | 0 of 10,016 |" in text


def test_memory(tmp_path: Path) -> None:
    cache = {"model": "A", "layers": 61, "indexer_layers": 61}
    cache |= {"wanted": 788, "planned": 788, "allocated": 788}
    prompt = {
        "context": 131072,
        "device": {"scores_mib": 512.0},
        "cpu": {"numpy_mib": 29.1, "paddle_mib": 12.1},
        "cpu_tokens": 16,
    }
    engine = {"layers": 6, "bytes_a_token_and_layer": 788.0}
    result = {"budget_mib": 512, "caches": [cache], "prompts": [prompt], "engine": engine}
    text = rendered(tmp_path, "memory_use", result)
    assert "| A | 61 | 61 | 788.00 | 788.00 | 788.00 |" in text
    assert "| 131,072 | 512 | 16 | 29 | 12 |" in text


def test_a_profile_before_and_now(tmp_path: Path) -> None:
    us = {"before": {"schedule": 50.0, "forward": 9000.0}, "fd_dsa": {"schedule": 25.0}}
    us["fd_dsa"]["forward"] = 8000.0
    case = {"requests": 32, "context": 256, "sampling": "greedy", "us": us}
    serving = [{"requests": 1, "us": {"fd_dsa": 150.0}}]
    text = rendered(tmp_path, "step_profile", {"cases": [case], "serving": serving})
    assert "| part, us | 32 x 256, greedy |" in text
    assert "| schedule | 50.0 → 25.0 |" in text and "| forward | 9,000 → 8,000 |" in text
    assert "- Serving, 1 stream: 150 us" in text


def test_the_engine_is_timed_with_all_requests_decoding() -> None:
    with Worker("benchmarks.workers.engine_host") as worker:
        for requests in (1, 40):
            case = {"requests": requests, "sampling": {"temperature": 0}, "steps": 3}
            answer = worker.call(op="host_us", **case, vocab_size=129_280)
            assert len(answer["us"]) == 3 and min(answer["us"]) > 0


def test_a_worker_of_another_checkout_is_refused_where_that_has_no_package(tmp_path: Path) -> None:
    with (
        Worker("benchmarks.workers.engine_host", checkout=tmp_path) as worker,
        pytest.raises(RuntimeError, match="worker ended with status 1"),
    ):
        worker.call(op="pass_us", requests=1, steps=1, vocab_size=4096)


def test_a_line_through_the_medians() -> None:
    times = {n: [100 + 3 * n] * 3 for n in growth.REQUESTS}
    fitted = growth._fitted(times)
    assert fitted["a_us"] == pytest.approx(100) and fitted["b_us"] == pytest.approx(3)
