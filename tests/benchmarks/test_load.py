"""The load of random arrivals: what is drawn, its figures, both sides, and a whole run in small."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import asdict
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import load
from benchmarks._arrivals import LENGTHS, RATES, Arrival, Load, figures, rates_of
from benchmarks._harness import Answering, peer_command
from benchmarks.workers import load_client

PEER = Path(__file__).parent.parent / "fakes" / "vllm_peer"
# no request is left out, and the limits of a good answer are 1 s and 50 ms
ALL = Load("chat", 1.0, seconds=10.0, warm_up_s=0.0)


def drawn(name: str, rate: float, *, run: int = 1, seed: int = 1, most: int = 33024) -> Any:
    """The requests of a run."""
    return Load(name, rate, seconds=20.0, seed=seed).arrivals(run, 4096, most)


def test_the_same_seed_gives_the_same_arrivals() -> None:
    first, second, other = (drawn("short", 5.0, seed=seed) for seed in (1, 1, 2))
    assert first == second
    assert first != other


def test_no_prompt_begins_as_one_of_another_run_or_load() -> None:
    runs = [
        drawn("chat", 8.0, run=0),
        drawn("chat", 8.0),
        drawn("chat", 6.0),
        drawn("short", 8.0),
    ]
    # four tokens are the shortest prompt
    begins = [tuple(one.prompt[:4]) for requests in runs for one in requests]
    assert len(set(begins)) == len(begins) > 400
    sizes = [[(one.at, len(one.prompt), one.new_tokens) for one in run] for run in runs]
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("name", LENGTHS)
def test_arrivals_have_their_rate_and_lengths(name: str) -> None:
    lengths = LENGTHS[name]
    requests = Load(name, 40.0, seconds=50.0).arrivals(1, 1000, 33024)
    # 2,000 arrivals with a standard deviation of 45
    assert abs(len(requests) - 2000) < 200
    times = [one.at for one in requests]
    assert times == sorted(times) and times[0] > 0 and times[-1] < 50
    for values, (low, high, shape) in (
        ([len(one.prompt) for one in requests], lengths.prompt),
        ([one.new_tokens for one in requests], lengths.answer),
    ):
        assert low <= min(values) and max(values) <= high
        middle = (low + high) / 2 if shape is None else np.exp(shape[0])
        assert np.median(values) == pytest.approx(middle, rel=0.15)
    ids = {token for one in requests[:50] for token in one.prompt}
    assert min(ids) >= 10 and max(ids) < 1000


def test_a_short_context_cuts_both_lengths() -> None:
    requests = drawn("1k1k", 9.0, most=100)
    assert {(len(one.prompt), one.new_tokens) for one in requests} == {(50, 50)}


def test_every_number_of_gpus_has_known_distributions() -> None:
    assert {name for rates in RATES.values() for name in rates} == set(LENGTHS)
    assert rates_of(2) == RATES[1] and rates_of(8) == RATES[8]


def answers(*times: list[float]) -> list[dict[str, Any]]:
    """Answers whose tokens came at these times."""
    return [{"times": list(one)} for one in times]


def test_figures_of_known_times() -> None:
    requests = [Arrival(0.5, [1], 2), Arrival(2.0, [1], 3), Arrival(4.0, [1], 1)]
    after_a_second = Load("chat", 1.0, seconds=11.0, warm_up_s=1.0)
    found = figures(after_a_second, requests, answers([9.0, 9.5], [2.25, 2.5, 2.75], [4.5]))
    # the first request is not counted, save for its tokens
    assert found["requests"] == 2 and found["failed"] == 0
    assert found["first_token_ms"]["p50"] == pytest.approx(375)
    assert found["token_ms"]["p50"] == pytest.approx(125)
    assert found["gap_ms"] == pytest.approx({"p50": 250, "p99": 250})
    assert found["tokens_per_s"] == pytest.approx(6 / 9.5)
    # of the answer with one token
    assert found["good_per_s"] == pytest.approx(0.1)


def test_a_good_answer_keeps_both_limits() -> None:
    requests = [Arrival(0.0, [1], 3)] * 3
    quick, late, slow = [0.5, 0.55, 0.6], [1.5, 1.55, 1.6], [0.5, 0.75, 1.0]
    found = figures(ALL, requests, answers(quick, late, slow))
    assert found["good_per_s"] == pytest.approx(0.1)


def test_failed_requests_are_counted_and_have_no_latency() -> None:
    requests = [Arrival(0.0, [1], 2)] * 4
    came = answers([0.5, 0.51], [9.0], [], [9.0, 9.1])
    came[2]["error"] = came[3]["error"] = "HTTP/1.1 503"
    found = figures(ALL, requests, came)
    assert (found["requests"], found["failed"]) == (4, 3)
    assert found["errors"] == {"HTTP/1.1 503": 2, "the answer lacks tokens": 1}
    assert found["first_token_ms"]["p99"] == pytest.approx(500)
    assert found["good_per_s"] == pytest.approx(0.1)


def test_a_load_without_a_whole_answer_has_no_latencies() -> None:
    found = figures(ALL, [Arrival(0.0, [1], 2)], answers([]))
    assert found["failed"] == 1 and found["tokens_per_s"] == 0
    assert found["token_ms"] == {"p50": None, "p99": None}


EVENTS = b"""data: {"choices": [{"token_ids": [5, 6]}]}\n\ndata: %b\n\ndata: [DONE]\n\n"""


class _Handler(BaseHTTPRequestHandler):
    """Answers 503 to the prompt 1, an error after two tokens to 2, and three tokens to others."""

    def do_POST(self) -> None:
        (prompt,) = json.loads(self.rfile.read(int(self.headers["Content-Length"])))["prompt"]
        self.send_response(503 if prompt == 1 else 200)
        self.end_headers()
        last = b'{"error": {"message": "gone"}}'
        if prompt == 1:
            self.wfile.write(last)
        else:
            choices = b'{"choices": [{"token_ids": [7]}]}'
            self.wfile.write(EVENTS % (last if prompt == 2 else choices))

    def log_message(self, *_: Any) -> None:
        pass


def test_our_client_keeps_what_a_server_refuses(tmp_path: Path) -> None:
    path = tmp_path / "load.json"
    path.write_text(json.dumps([asdict(Arrival(0.0, [token], 3)) for token in (1, 2, 3)]))
    with ThreadingHTTPServer(("127.0.0.1", 0), _Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        host, port = server.server_address[:2]
        refused, cut_off, whole = load_client.replay(str(host), port, str(path))["answers"]
        server.shutdown()
    assert refused["times"] == [] and "503" in refused["error"] and "gone" in refused["error"]
    assert len(cut_off["times"]) == 2 and "gone" in cut_off["error"]
    assert len(whole["times"]) == 3 and "error" not in whole
    # nobody listens there any more
    answers = load_client.replay(str(host), port, str(path))["answers"]
    assert ["ConnectionRefused" in one["error"] for one in answers] == [True] * 3


@pytest.fixture
def vllm() -> Iterator[Answering]:
    """The peer's worker on the double of vLLM."""
    options = json.dumps({"max_model_len": 100, "tensor_parallel_size": 1})
    with Answering(peer_command(PEER, "vllm_load.py", "model", options, "--tp", "1")) as worker:
        yield worker


def test_vllm_answers_every_request_at_its_time(vllm: Answering, tmp_path: Path) -> None:
    requests = [Arrival(0.2, [7] * 5, 4), Arrival(0.0, [8], 3), Arrival(0.1, [9] * 99, 2)]
    path = tmp_path / "load.json"
    path.write_text(json.dumps([asdict(one) for one in requests]))
    assert vllm.call(op="version") == "0.26.0"
    # one engine takes several loads
    for _ in range(2):
        done = vllm.call(op="replay", load=str(path))
        early, refused = done["answers"][1], done["answers"][2]
        assert [len(one["times"]) for one in done["answers"]] == [4, 3, 0]
        assert done["answers"][0]["times"][0] > 0.2 > early["times"][-1]
        assert "the prompt has 99 tokens" in refused["error"]
        assert done["seconds"] > 0.2 and 0 <= done["loop_share"] <= 1
        assert figures(ALL, requests, done["answers"])["failed"] == 1


def test_a_folder_without_vllm_is_refused_before_ours_is_measured(tmp_path: Path) -> None:
    (tmp_path / "run.sh").write_text("exit 2\n")
    with pytest.raises(SystemExit, match="runs no `python` with vllm and vllm_bench"):
        load.main(["--dry", "--out", str(tmp_path / "out"), "--peer", str(tmp_path)])
    assert not list((tmp_path / "out").iterdir())


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["-tp", "4", "--lengths", "8k1k"], "8k1k has no rates here; give --rates"),
        (["--dry", "--earlier", "--peer", str(PEER)], "chat, 4/s: measure ours first"),
    ],
)
def test_a_command_that_cannot_measure_says_why(
    tmp_path: Path, flags: list[str], said: str
) -> None:
    with pytest.raises(SystemExit, match=said):
        load.main([*flags, "--out", str(tmp_path)])


@pytest.mark.slow
def test_a_dry_run_compares_both_sides(tmp_path: Path) -> None:
    flags = ["--dry", "--out", str(tmp_path)]
    assert load.main([*flags, "--peer", str(PEER)]) == 0
    result = json.loads((tmp_path / "load.json").read_text())
    assert result["tier"] == "dry" and set(result["start_s"]) == {"fd_dsa", "vLLM"}
    (one,) = result["loads"]
    ours, peer = one["sides"]["fd_dsa"], one["sides"]["vLLM"]
    assert ours["requests"] == peer["requests"] > 3 and ours["failed"] == peer["failed"] == 0
    assert ours["steps"] == {"decode graph": 0, "graph with prompts": 0, "eager": 1}
    cases = {case["figure"]: case for case in result["cases"]}
    assert all(case["case"].startswith("chat, 4/s: ") for case in cases.values())
    first = cases["first token p50"]
    assert (first["target"], first["unit"]) == ("P35", "ms")
    assert first["ratio"] == pytest.approx(first["peer_value"] / first["ours_value"])
    (gaps,) = result["gaps"]
    assert gaps["target_ms"] == 200 and gaps["p99_ms"] == ours["gap_ms"]["p99"]
    assert gaps["ratio"] == pytest.approx(200 / gaps["p99_ms"])
    # the peer alone, a few seconds later
    before = first["peer_taken"]["taken"]
    assert load.main([*flags, "--peer", str(PEER), "--earlier"]) == 0
    (again,) = json.loads((tmp_path / "load.json").read_text())["loads"]
    assert again["sides"]["fd_dsa"] == ours
    assert again["sides"]["vLLM"]["taken"]["taken"] > before
