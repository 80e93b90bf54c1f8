"""/metrics: vLLM's names under our prefix, and numbers that are those of the requests."""

from __future__ import annotations

import asyncio
import random
import threading
from collections import defaultdict
from typing import Any, NoReturn

import pytest
from prometheus_client.parser import text_string_to_metric_families

from fd_dsa.runner.counters import EAGER_REASONS, Histogram
from fd_dsa.serve import metrics
from tests.engine.fakes import make_engine
from tests.engine.threaded import threaded
from tests.serve.conftest import TIMEOUT_S, Live, running, wait_until
from tests.serve.fake_engine import FakeEngine
from tests.serve.test_errors import complete

Samples = dict[str, dict[tuple[tuple[str, str], ...], float]]
# names that a dashboard made for vLLM asks for, its prefix replaced
GAUGES = ("num_requests_running", "num_requests_waiting", "kv_cache_usage_perc")
COUNTERS = (
    "prompt_tokens_total",
    "generation_tokens_total",
    "request_success_total",
    "prefix_cache_queries_total",
    "prefix_cache_hits_total",
    "num_preemptions_total",
    "mask_waits_total",
    "spec_decode_num_drafts_total",
    "spec_decode_num_draft_tokens_total",
    "spec_decode_num_accepted_tokens_total",
    "mask_offsets_skipped_total",
    "mask_offsets_launched_total",
    "sparse_tokens_total",
    "late_compilations_total",
    "graph_steps_total",
    "eager_steps_total",
)
HISTOGRAMS = (
    "time_to_first_token_seconds",
    "inter_token_latency_seconds",
    "e2e_request_latency_seconds",
    "request_queue_time_seconds",
    "request_prefill_time_seconds",
    "request_decode_time_seconds",
    "request_prompt_tokens",
    "request_generation_tokens",
    "step_prepare_seconds",
)


def scrape(live: Live) -> Samples:
    """Samples of a scrape, by name without prefix and by labels without the model's."""
    answer = live.http.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=")
    found: Samples = defaultdict(dict)
    for family in text_string_to_metric_families(answer.text):
        for sample in family.samples:
            if sample.name.startswith("fd_dsa:"):
                assert sample.labels.pop("model_name") == "demo"
                labels = tuple(sorted(sample.labels.items()))
                found[sample.name.removeprefix("fd_dsa:")][labels] = sample.value
    return found


def value(samples: Samples, name: str, **labels: str) -> float:
    """One number."""
    return samples[name][tuple(sorted(labels.items()))]


def test_all_names_are_there_before_the_first_request() -> None:
    with running(threaded(make_engine())) as live:
        samples = scrape(live)
        for name in (*GAUGES, *COUNTERS):
            assert samples[name], name
        for name in HISTOGRAMS:
            assert samples[f"{name}_bucket"] and samples[f"{name}_sum"], name
        kinds = {dict(labels)["kind"] for labels in samples["step_prepare_seconds_count"]}
        assert kinds == {"prefill", "decode", "mixed"}
        reasons = {dict(labels)["finished_reason"] for labels in samples["request_success_total"]}
        assert reasons == {"stop", "length", "abort", "error"}
        eager = {dict(labels)["reason"] for labels in samples["eager_steps_total"]}
        assert eager == set(EAGER_REASONS)
        told = dict(next(iter(samples["cache_config_info"])))
        assert told["block_size"] == "4" and told["num_gpu_blocks"] == "64"
        assert told["enable_prefix_caching"] == "True"
        assert "process_resident_memory_bytes" in live.http.get("/metrics").text


def test_an_engine_that_does_not_answer_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    async def snapshot() -> NoReturn:
        await asyncio.sleep(TIMEOUT_S)
        raise AssertionError

    engine = FakeEngine()
    monkeypatch.setattr(metrics, "SNAPSHOT_S", 0.1)
    with running(engine) as live:
        assert value(scrape(live), "engine_silent_seconds") == 0
        monkeypatch.setattr(engine, "snapshot", snapshot)
        engine.silent_s = 7.0
        samples = scrape(live)
        assert set(samples) == {"engine_silent_seconds"}
        assert value(samples, "engine_silent_seconds") == 7
        assert "process_resident_memory_bytes" in live.http.get("/metrics").text


def test_counts_are_those_of_the_requests() -> None:
    with running(threaded(make_engine())) as live:
        usages = []
        for number in range(5):
            prompt = [5 + number, *range(6, 6 + 3 * number)]
            answer = complete(live, prompt=prompt, max_tokens=6, ignore_eos=True, temperature=0)
            usages.append(answer.json()["usage"])
        samples = scrape(live)
        assert value(samples, "prompt_tokens_total") == sum(u["prompt_tokens"] for u in usages)
        assert value(samples, "generation_tokens_total") == 30
        assert value(samples, "request_success_total", finished_reason="length") == 5
        for name in HISTOGRAMS[:1] + HISTOGRAMS[2:8]:
            assert value(samples, f"{name}_count") == 5, name
        # all tokens but the first of each request
        assert value(samples, "inter_token_latency_seconds_count") == 25
        assert value(samples, "request_prompt_tokens_sum") == value(samples, "prompt_tokens_total")
        assert value(samples, "request_generation_tokens_sum") == 30
        assert value(samples, "request_generation_tokens_bucket", le="5.0") == 0
        assert value(samples, "request_generation_tokens_bucket", le="10.0") == 5
        assert value(samples, "num_requests_running") == 0
        assert value(samples, "kv_cache_usage_perc") == 0
        parts = ("queue", "prefill", "decode")
        total = sum(value(samples, f"request_{part}_time_seconds_sum") for part in parts)
        assert total == pytest.approx(value(samples, "e2e_request_latency_seconds_sum"))
        first = value(samples, "time_to_first_token_seconds_sum")
        assert first == pytest.approx(total - value(samples, "request_decode_time_seconds_sum"))


def test_prefix_hits_and_load() -> None:
    engine = make_engine()
    # a client that has left is noticed by a ping
    with running(threaded(engine), sse_ping_interval=0.2) as live:
        prompt = [5 + i % 30 for i in range(18)]
        cached = [
            complete(live, prompt=prompt, max_tokens=2).json()["usage"]["prompt_tokens_details"]
            for _ in range(2)
        ]
        assert [c["cached_tokens"] for c in cached] == [0, 16]
        samples = scrape(live)
        assert value(samples, "prefix_cache_queries_total") == 36
        assert value(samples, "prefix_cache_hits_total") == 16
        endless = {"prompt": [5], "max_tokens": 60, "ignore_eos": True, "stream": True}
        inside, opened = held(engine)
        with live.http.stream("POST", "/v1/completions", json=endless):
            assert inside.wait(TIMEOUT_S)
            samples = scrape(live)
            assert value(samples, "num_requests_running") == 1
            assert 0 < value(samples, "kv_cache_usage_perc") <= 1
        # else the request might come to its end before the server knows that nobody listens
        wait_until(lambda: not live.state.active)
        opened.set()
        ended = 'finished_reason="abort",model_name="demo"} 1.0'
        wait_until(lambda: ended in live.http.get("/metrics").text)


def held(engine: Any) -> tuple[threading.Event, threading.Event]:
    """Hold an engine in its next step: set once it waits there, and to be set to let it run."""
    inside, opened = threading.Event(), threading.Event()
    run = engine.runner.execute_model

    def execute_model(logits_indices: Any) -> Any:
        inside.set()
        assert opened.wait(TIMEOUT_S)
        return run(logits_indices)

    engine.runner.execute_model = execute_model
    return inside, opened


def test_preempted_requests_have_an_interval_for_each_token_too() -> None:
    engine = make_engine(num_blocks=16)
    _, opened = held(engine)
    with running(threaded(engine)) as live:
        threads = [
            threading.Thread(
                target=complete,
                args=(live,),
                kwargs={"prompt": [5 + i], "max_tokens": 50, "ignore_eos": True},
            )
            for i in range(4)
        ]
        for thread in threads:
            thread.start()
        # all at once, however late they come
        wait_until(lambda: len(live.state.active) == 4)
        opened.set()
        for thread in threads:
            thread.join()
        samples = scrape(live)
        assert value(samples, "num_preemptions_total") > 0
        assert value(samples, "generation_tokens_total") == 200
        assert value(samples, "inter_token_latency_seconds_count") == 196
        assert value(samples, "time_to_first_token_seconds_count") == 4


def test_a_histogram_counts_as_a_list_of_values_would() -> None:
    rng = random.Random(1)
    bounds = (1.0, 2.0, 5.0)
    values = [rng.choice([0.5, 1.0, 1.5, 2.0, 4.0, 5.0, 5.5, 100.0]) for _ in range(200)]
    histogram = Histogram(bounds)
    for number in values:
        histogram.observe(number)
    below = [sum(v <= bound for v in values) for bound in (*bounds, float("inf"))]
    assert histogram.counts == [b - a for a, b in zip([0, *below], below, strict=False)]
    assert histogram.total == pytest.approx(sum(values))
    twice = Histogram(bounds)
    twice.observe(1.5, times=3)
    assert (twice.counts, twice.total) == ([0, 3, 0, 0], 4.5)
