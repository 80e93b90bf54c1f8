"""`fd-dsa bench`: its load, its figures, and a run against a server that it starts."""

from __future__ import annotations

import asyncio
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fd_dsa.cli import main
from fd_dsa.client.bench import parse_args, random_prompts, start_times
from fd_dsa.client.load import Sender
from fd_dsa.client.timing import LATENCIES, Timing, measure, summarise, tables
from fd_dsa.errors import RemoteError
from fd_dsa.serve import state
from fd_dsa.serve.errors import ApiError
from tests.client.scripted import aborted, scripted
from tests.serve.conftest import running
from tests.serve.fake_engine import FakeEngine
from tests.serve.processes import run_console


class AnyTokens(FakeEngine):
    """Takes every token id."""

    def validate(self, prompt_token_ids: object, params: object) -> None:
        """Nothing is wrong."""


def test_prompts_have_the_length_asked_for_and_begin_differently() -> None:
    prompts = random_prompts(50, 7, seed=1)
    assert {len(prompt) for prompt in prompts} == {7}
    assert len({tuple(prompt[:3]) for prompt in prompts}) == 50
    assert prompts == random_prompts(50, 7, seed=1) != random_prompts(50, 7, seed=2)


def test_requests_come_at_once_or_as_a_poisson_process() -> None:
    assert start_times(3, math.inf, seed=0) == [0.0, 0.0, 0.0]
    times = start_times(20_000, 4.0, seed=0)
    gaps = np.diff(times)
    assert times[0] == 0.0
    # the mean is 1/4, and of an exponential distribution so is the deviation
    assert gaps.mean() == pytest.approx(0.25, rel=0.03)
    assert gaps.std() == pytest.approx(0.25, rel=0.03)


@pytest.mark.parametrize("rate", [1e-320, 5e-5, 1e308])
def test_any_rate_of_a_short_run_is_accepted(rate: float) -> None:
    assert parse_args(["--num-prompts", "1", "--request-rate", f"{rate}"])[0].request_rate == rate
    assert start_times(1, rate, seed=0) == [0.0]
    assert all(map(math.isfinite, start_times(20, max(rate, 5e-5), seed=0)))


def test_waits_between_attempts_stay_finite(monkeypatch: pytest.MonkeyPatch) -> None:
    waits: list[float] = []
    sleep = asyncio.sleep

    async def note(seconds: float) -> None:
        waits.append(seconds)
        await sleep(0)

    sender = Sender("http://127.0.0.1:1", retries=1500)
    monkeypatch.setattr("fd_dsa.client.load.asyncio.sleep", note)
    timings, _ = asyncio.run(measure(sender, "demo", [[101]], [0.0], 5))
    assert timings[0].attempts == 1501 and max(waits) <= 30


def test_figures_are_those_of_the_timings() -> None:
    timings = [
        Timing(0.0, 0.1, [0.02, 0.04], 0.16, 10, 3, 2, 4, attempts=1),
        Timing(0.5, 0.3, [0.06], 0.36, 20, 2, 1, 1, attempts=3),
        Timing(0.5, 0.2, [9.0], 9.0, 99, 99, attempts=4, error="lost"),
    ]
    found = summarise(timings, 2.0)
    assert (found["completed"], found["failed"], found["retries"]) == (2, 1, 5)
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (30, 5)
    assert (found["draft_tokens"], found["accepted_tokens"]) == (8, 3)
    assert ("drafts accepted", "37.5 % of 8") in tables(found)[0].rows
    assert summarise(timings[2:], 1.0)["acceptance_rate"] is None
    assert found["request_throughput"] == 1.0
    assert found["output_throughput"] == 2.5
    assert found["total_token_throughput"] == 17.5
    assert found["ttft_ms"]["p50"] == pytest.approx(200)
    assert found["itl_ms"]["mean"] == pytest.approx(40)
    assert found["tpot_ms"]["mean"] == pytest.approx((30 + 60) / 2)
    assert found["e2e_ms"]["p99"] == pytest.approx(160 + 0.99 * 200)
    assert [summarise([], 1.0)[name] for name in LATENCIES] == [None] * 4


def test_refused_requests_are_sent_again_but_not_for_ever(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    prompts = random_prompts(4, 5, seed=0)
    with running(AnyTokens(), max_concurrency=1) as live:
        num_refused = 0

        class Refusal(ApiError):
            """The first request ends once the three others were refused."""

            def __init__(self, *args: Any, **fields: Any) -> None:
                nonlocal num_refused
                num_refused += 1
                live.engine.is_held = num_refused < 3
                super().__init__(*args, **fields)

        monkeypatch.setattr(state, "ApiError", Refusal)
        for retries in (9, 0):
            num_refused, live.engine.is_held = 0, True
            sender = Sender(f"{live.url}/v1", retries=retries)
            timings, _ = asyncio.run(measure(sender, "demo", prompts, [0.0] * 4, 4))
            served = [timing for timing in timings if timing.error is None]
            assert len(served) == (4 if retries else 1)
            assert {timing.output_tokens for timing in served} == {4}
            assert {timing.prompt_tokens for timing in served} == {5}
            assert {len(timing.itl_s) for timing in served} == {3}
            assert (max(timing.attempts for timing in timings) > 1) == bool(retries)
            errors = [timing.error for timing in timings if timing.error is not None]
            assert all(error.startswith("status 429: ") for error in errors)


def test_failures_inside_a_stream_are_told() -> None:
    engine = AnyTokens()
    engine.nan_after = 2
    with running(engine) as live:
        sender = Sender(f"{live.url}/v1", retries=0)
        timings, _ = asyncio.run(measure(sender, "demo", [[101]], [0.0], 5))
        assert timings[0].error is not None
    with scripted(lambda body: aborted()) as server:
        sender = Sender(server.base_url, retries=0)
        timings, _ = asyncio.run(measure(sender, "demo", [[101]], [0.0], 5))
        assert timings[0].error == "finish_reason abort: the answer is incomplete"
    with pytest.raises(RemoteError, match="404"), running(AnyTokens()) as live:
        asyncio.run(measure(Sender(f"{live.url}/v1"), "other", [[101]], [0.0], 5))


def test_starts_that_fail_are_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    with running(AnyTokens(max_model_len=100)) as live:
        cases = {
            ("--request-rate", "0"): "--request-rate: got '0'",
            ("--num-prompts", "none"): "--num-prompts: got 'none'",
            ("--num-prompts", f"{10**12}"): "tokens of prompts, allowed: at most 268435456 in all",
            ("--num-prompts", "1000001"): "--num-prompts: got 1000001, allowed: at most 1000000",
            ("--retries", "1001"): "--retries: got '1001'; must be a whole number from 0 to 1000",
            ("--random-output-len", f"{10**9}"): "64000000000 tokens of answers, allowed: at most",
            ("--request-rate", "1e-320"): "64 requests at 1e-320 a second start within inf s",
            ("--request-rate", "1e-4"): "start within 630000 s, allowed: at most 604800 s, a week",
            ("--request-rate", "nan"): "got 'nan'; must be a number above 0, or inf",
            ("--output", "no/such/file"): "no/such/file: the folder does not exist",
            ("--output", "."): ". is a folder; give a file",
            ("--serve", ""): "--serve: got '', allowed: a local folder",
            ("--base-url", live.url, "--", "--seed", "1"): "flags after --",
            ("--base-url", live.url): "got 320 together, the server's max_model_len is 100",
            ("--base-url", live.url, "--model", "other"): "--model: got 'other'",
        }
        for arguments, reason in cases.items():
            assert main(["bench", *arguments]) == 2
            shown = capsys.readouterr()
            assert shown.out == "" and reason in shown.err
            assert shown.err.count("\n") == 1


def test_a_full_disk_names_the_file_behind_the_table(capsys: pytest.CaptureFixture[str]) -> None:
    sizes = ("--num-prompts", "2", "--random-input-len", "4", "--random-output-len", "3")
    with running(AnyTokens()) as live:
        assert main(["bench", "--base-url", live.url, *sizes, "--output", "/dev/full"]) == 2
    shown = capsys.readouterr()
    line = "fd_dsa: error: --output: /dev/full cannot be written (no space left on device)\n"
    assert LATENCIES["ttft_ms"] in shown.out and shown.err == line


@pytest.mark.slow
def test_a_run_against_a_server_of_its_own(tmp_path: Path) -> None:
    sizes = ("--num-prompts", "6", "--random-input-len", "40", "--random-output-len", "8")
    load = ("--request-rate", "20", "--max-concurrency", "4", "--seed", "5")
    files = ("--output", "found.json")
    done = run_console(tmp_path, "bench", *sizes, *load, *files, "--", "--max-model-len", "128")
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "found.json").read_text("utf-8"))
    assert report["settings"] == {
        "num_prompts": 6,
        "random_input_len": 40,
        "random_output_len": 8,
        "request_rate": 20.0,
        "max_concurrency": 4,
        "retries": 3,
        "seed": 5,
    }
    assert report["server"]["max_model_len"] == 128
    assert report["server"]["version"] == report["client"]["fd_dsa"]
    result = report["result"]
    assert (result["completed"], result["failed"]) == (6, 0)
    assert (result["total_input_tokens"], result["total_output_tokens"]) == (6 * 40, 6 * 8)
    first = [1000 * request["ttft_s"] for request in report["requests"]]
    assert result["ttft_ms"]["p90"] == pytest.approx(float(np.percentile(first, 90)))
    for name, label in LATENCIES.items():
        figures = result[name]
        assert 0 < figures["p50"] <= figures["p90"] <= figures["p99"]
        assert label in done.stdout
    assert f"{result['output_throughput']:.1f}" in done.stdout
