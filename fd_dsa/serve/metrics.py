"""The engine's counts: GET /metrics for Prometheus, and a line of the log while it works.

Names are vLLM's with our prefix, so that its dashboards can be used again. The numbers are made
into families when they are asked for; a step of the engine knows nothing of Prometheus.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Iterator
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from fastapi import APIRouter
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import (
    CounterMetricFamily,
    GaugeMetricFamily,
    HistogramMetricFamily,
    InfoMetricFamily,
    Metric,
)
from prometheus_client.registry import Collector
from starlette.responses import Response

from fd_dsa.engine.metrics import EngineMetrics
from fd_dsa.engine.stats import EngineStats
from fd_dsa.runner.counters import Histogram
from fd_dsa.serve.state import State

if TYPE_CHECKING:
    from fd_dsa.engine.async_engine import AsyncEngine

PREFIX = "fd_dsa:"

logger = logging.getLogger("fd_dsa.serve")
router = APIRouter()

# attribute of EngineMetrics and name of the metric -> help
_HISTOGRAMS = {
    "time_to_first_token": ("time_to_first_token_seconds", "arrival to first token"),
    "inter_token_latency": ("inter_token_latency_seconds", "token to next token of a request"),
    "e2e_request_latency": ("e2e_request_latency_seconds", "arrival to end"),
    "request_queue_time": ("request_queue_time_seconds", "arrival to first step"),
    "request_prefill_time": ("request_prefill_time_seconds", "first step to first token"),
    "request_decode_time": ("request_decode_time_seconds", "first token to end"),
    "request_prompt_tokens": ("request_prompt_tokens", "prompt tokens of an ended request"),
    "request_generation_tokens": ("request_generation_tokens", "output tokens of an ended request"),
}
# attribute of EngineStats -> name of the metric, help
_GAUGES = {
    "num_running": ("num_requests_running", "requests that take part in steps"),
    "num_waiting": ("num_requests_waiting", "requests that wait for a row or for cache blocks"),
    "kv_cache_usage": ("kv_cache_usage_perc", "share of the cache blocks in use, 0 to 1"),
}
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "prompt tokens of the requests that have come"),
    "generated_tokens": ("generation_tokens", "tokens generated"),
    "num_preemptions": ("num_preemptions", "requests that gave up their cache blocks"),
    "prefix_cache_queries": ("prefix_cache_queries", "prompt tokens looked for in the cache"),
    "prefix_cache_hits": ("prefix_cache_hits", "prompt tokens found in the cache"),
}
_STEP_COUNTERS = {
    "mask_offsets_launched": "steps with prefill tokens, whose windows were computed",
    "mask_offsets_skipped": "steps that only decoded, without windows",
    "sparse_tokens": "tokens that had more keys than the indexer chooses",
}


@router.get("/metrics", summary="Counters and histograms for Prometheus")
async def metrics(state: State) -> Response:
    """The engine's metrics and memory and files of the processes; the latter alone while it loads.

    `process_*` are of the HTTP process, `fd_dsa_engine_process_*` of the engine's own.
    """
    registry = CollectorRegistry(auto_describe=False)
    engine = state.loaded_engine
    if engine is not None and engine.errored is None:
        registry.register(EngineCollector(state.served_model_names[0], *await engine.snapshot()))
    registry.register(PROCESS_COLLECTOR)
    pid = None if engine is None else engine.pid
    if pid is not None:
        registry.register(
            ProcessCollector(namespace="fd_dsa_engine", pid=lambda: pid, registry=None)
        )
    # 3 ms; threads may all be busy with requests
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class EngineCollector(Collector):
    """Makes the families of one scrape.

    Args:
        model_name: label of every metric.
        stats: load and counters of the engine.
        counts: histograms and further counters.
    """

    def __init__(self, model_name: str, stats: EngineStats, counts: EngineMetrics) -> None:
        self._labels = {"model_name": model_name}
        self._stats = stats
        self._counts = counts

    def collect(self) -> Iterator[Metric]:
        """Every metric."""
        stats, counts = self._stats, self._counts
        for attribute, (name, text) in _GAUGES.items():
            yield self._one(GaugeMetricFamily, name, text, getattr(stats, attribute))
        for attribute, (name, text) in _COUNTERS.items():
            yield self._one(CounterMetricFamily, name, text, getattr(stats, attribute))
        for attribute, text in _STEP_COUNTERS.items():
            yield self._one(CounterMetricFamily, attribute, text, getattr(counts.steps, attribute))
        yield self._finished(counts.finished)
        for attribute, (name, text) in _HISTOGRAMS.items():
            family = self._histograms(name, text)
            _add(family, [*self._labels.values()], getattr(counts, attribute))
            yield family
        family = self._histograms(
            "step_prepare_seconds", "host time of a step's metadata", ("kind",)
        )
        for kind, histogram in counts.steps.prepare_s.items():
            _add(family, [*self._labels.values(), kind], histogram)
        yield family
        info = InfoMetricFamily(f"{PREFIX}cache_config", "the caches", labels=list(self._labels))
        info.add_metric(list(self._labels.values()), counts.cache_config)
        yield info

    def _one(self, kind: Any, name: str, text: str, value: float) -> Metric:
        """A family with one number."""
        family = kind(f"{PREFIX}{name}", text, labels=list(self._labels))
        family.add_metric(list(self._labels.values()), value)
        return family

    def _finished(self, finished: dict[str, int]) -> Metric:
        """Ended requests by the way they ended."""
        family = CounterMetricFamily(
            f"{PREFIX}request_success",
            "ended requests",
            labels=[*self._labels, "finished_reason"],
        )
        for reason, count in finished.items():
            family.add_metric([*self._labels.values(), reason], count)
        return family

    def _histograms(
        self, name: str, text: str, labels: tuple[str, ...] = ()
    ) -> HistogramMetricFamily:
        """An empty family of histograms."""
        return HistogramMetricFamily(f"{PREFIX}{name}", text, labels=[*self._labels, *labels])


def _add(family: HistogramMetricFamily, labels: list[str], histogram: Histogram) -> None:
    """Add a histogram in Prometheus' form, whose buckets hold what is below them too."""
    total = histogram.total
    # one copy: the engine goes on counting
    counts = accumulate(tuple(histogram.counts))
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    family.add_metric(labels, list(zip(bounds, counts, strict=True)), total)


async def log_while_busy(engine: AsyncEngine, interval_s: float = 10.0) -> None:
    """Log load and throughput of each interval in which the engine worked, as vLLM does.

    Args:
        engine: running.
        interval_s: seconds between two looks.
    """
    (before, _), looked = await engine.snapshot(), time.monotonic()
    while True:
        await asyncio.sleep(interval_s)
        (now, _), at = await engine.snapshot(), time.monotonic()
        if now.num_steps != before.num_steps or now.num_running or now.num_waiting:
            logger.info("%s", _line(before, now, at - looked))
        before, looked = now, at


def _line(before: EngineStats, now: EngineStats, seconds: float) -> str:
    """What happened between two looks."""
    prefill = (now.computed_prompt_tokens - before.computed_prompt_tokens) / seconds
    decode = (now.generated_tokens - before.generated_tokens) / seconds
    queries = now.prefix_cache_queries - before.prefix_cache_queries
    hits = now.prefix_cache_hits - before.prefix_cache_hits
    share = f"{100 * hits / queries:.0f} %" if queries else "none asked"
    return (
        f"running {now.num_running}, waiting {now.num_waiting}, prefill {prefill:,.0f} tok/s, "
        f"decode {decode:,.0f} tok/s, kv {100 * now.kv_cache_usage:.0f} %, prefix hits {share}"
    )
