"""The engine's metrics: GET /metrics for Prometheus, and log lines while it is busy.

Names are vLLM's with our prefix, so that its dashboards can be reused. Metric families are made on
request, so that steps of the engine do not depend on Prometheus.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from itertools import accumulate
from typing import TYPE_CHECKING

from fastapi import APIRouter
from prometheus_client import (
    CONTENT_TYPE_LATEST,
    PROCESS_COLLECTOR,
    CollectorRegistry,
    Gauge,
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

from fd_dsa.engine.metrics import EngineMetrics, EngineStats
from fd_dsa.runner.counters import Histogram
from fd_dsa.serve.state import State

if TYPE_CHECKING:
    from fd_dsa.engine.async_engine import AsyncEngine

PREFIX = "fd_dsa:"
SNAPSHOT_S = 5.0
"""Maximum time that a scrape waits for the engine, which answers between two steps, seconds."""

logger = logging.getLogger("fd_dsa.serve")
router = APIRouter()

# attribute of EngineMetrics -> name of the metric, help
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
    "host_cache_usage": ("host_cache_usage_perc", "share of the host blocks in use, 0 to 1"),
}
_COUNTERS = {
    "prompt_tokens": ("prompt_tokens", "prompt tokens of all received requests"),
    "generated_tokens": ("generation_tokens", "tokens generated"),
    "num_preemptions": ("num_preemptions", "preempted requests"),
    "num_mask_waits": (
        "mask_waits",
        "steps whose sampling waited for the tokens of the previous step",
    ),
    "prefix_cache_queries": ("prefix_cache_queries", "prompt tokens looked up in the prefix cache"),
    "prefix_cache_hits": ("prefix_cache_hits", "prompt tokens found in the prefix cache"),
    "prefix_cache_host_hits": (
        "prefix_cache_host_hits",
        "prompt tokens found in host memory, counted in prefix_cache_hits too",
    ),
    "num_drafts": ("spec_decode_num_drafts", "verifications of the drafts of a request"),
    "num_draft_tokens": ("spec_decode_num_draft_tokens", "verified drafts"),
    "num_accepted_tokens": ("spec_decode_num_accepted_tokens", "accepted drafts"),
}
_STEP_COUNTERS = {
    "mask_offsets_launched": ("mask_offsets_launched", "steps with prefill tokens, with windows"),
    "mask_offsets_skipped": ("mask_offsets_skipped", "decode-only steps, without windows"),
    "sparse_tokens": ("sparse_tokens", "tokens with more keys than the indexer selects"),
    "late_compilations": ("late_compilations", "kernels compiled after the start of the server"),
}


@router.get(
    "/metrics",
    summary="Counters and histograms for Prometheus",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
async def metrics(state: State) -> Response:
    """Return metrics of the engine and of the processes.

    During loading only the latter exist. While the engine's process does not answer,
    `engine_silent_seconds` is there, too.

    `process_*` belong to the HTTP process, `fd_dsa_engine_process_*` to the engine's process.
    """
    registry = CollectorRegistry(auto_describe=False)
    engine = state.loaded_engine
    if engine is not None and engine.errored is None:
        name, text = f"{PREFIX}engine_silent_seconds", "time for which the engine has not answered"
        gauge = Gauge(name, text, ["model_name"], registry=registry)
        gauge.labels(state.served_model_names[0]).set(engine.silent_s)
        # a scraper would wait for a stopped process, and have nothing
        with suppress(asyncio.TimeoutError):
            snapshot = await asyncio.wait_for(engine.snapshot(), SNAPSHOT_S)
            registry.register(_EngineCollector(state.served_model_names[0], *snapshot))
    registry.register(PROCESS_COLLECTOR)
    pid = None if engine is None else engine.pid
    if pid is not None:
        registry.register(
            ProcessCollector(namespace="fd_dsa_engine", pid=lambda: pid, registry=None)
        )
    # takes 3 ms; all threads may be busy with requests
    return Response(generate_latest(registry), media_type=CONTENT_TYPE_LATEST)


class _EngineCollector(Collector):
    def __init__(self, model_name: str, stats: EngineStats, counts: EngineMetrics) -> None:
        self._model_name, self._stats, self._counts = model_name, stats, counts

    def collect(self) -> Iterator[Metric]:
        counts = self._counts
        for kind, source, known in (
            (GaugeMetricFamily, self._stats, _GAUGES),
            (CounterMetricFamily, self._stats, _COUNTERS),
            (CounterMetricFamily, counts.steps, _STEP_COUNTERS),
            (HistogramMetricFamily, counts, _HISTOGRAMS),
        ):
            for attribute, (name, text) in known.items():
                yield self._family(kind, name, text, {"": getattr(source, attribute)})
        ended, text = counts.finished, "ended requests"
        yield self._family(CounterMetricFamily, "request_success", text, ended, "finished_reason")
        name, text = (
            "spec_decode_num_accepted_tokens_per_pos",
            "accepted drafts by position in the step",
        )
        by_position = {str(i): count for i, count in enumerate(self._stats.accepted_per_position)}
        yield self._family(CounterMetricFamily, name, text, by_position, "position")
        times, text = counts.steps.prepare_s, "host time of a step's metadata"
        yield self._family(HistogramMetricFamily, "step_prepare_seconds", text, times, "kind")
        replayed, text = counts.steps.graph_steps, "steps replayed from a CUDA graph"
        yield self._family(CounterMetricFamily, "graph_steps", text, replayed, "kind")
        text = "steps on a device that no graph served"
        steps = counts.steps.eager_steps
        yield self._family(CounterMetricFamily, "eager_steps", text, steps, "reason")
        caches = {"": counts.cache_config}
        yield self._family(InfoMetricFamily, "cache_config", "the caches", caches)

    def _family(
        self,
        kind: Callable[..., Metric],
        name: str,
        text: str,
        values: Mapping[str, object],
        label: str = "",
    ) -> Metric:
        """Return a family of one metric.

        `values` is keyed by `label`, or by "" without a label.
        """
        labels = ["model_name", *filter(None, [label])]
        family: Metric = kind(f"{PREFIX}{name}", text, labels=labels)
        for own, value in values.items():
            shown = [self._model_name, *filter(None, [own])]
            parts = _buckets(value) if isinstance(value, Histogram) else (value,)
            family.add_metric(shown, *parts)  # type: ignore[attr-defined]
        return family


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, int]], float]:
    """Return Prometheus's cumulative buckets of a histogram, and its sum."""
    total = histogram.total
    # one copy, because the engine keeps counting
    counts = accumulate(tuple(histogram.counts))
    bounds = [*(str(float(bound)) for bound in histogram.bounds), "+Inf"]
    return list(zip(bounds, counts, strict=True)), total


async def log_while_busy(engine: AsyncEngine, interval_s: float = 10.0) -> None:
    """Log load and throughput of each interval in which the engine worked, like vLLM."""
    (before, _), looked = await engine.snapshot(), time.monotonic()
    while True:
        await asyncio.sleep(interval_s)
        (now, _), at = await engine.snapshot(), time.monotonic()
        if now.num_steps != before.num_steps or now.num_running or now.num_waiting:
            logger.info("%s", _line(before, now, at - looked))
        before, looked = now, at


def _line(before: EngineStats, now: EngineStats, seconds: float) -> str:
    prefill = (now.computed_prompt_tokens - before.computed_prompt_tokens) / seconds
    decode = (now.generated_tokens - before.generated_tokens) / seconds
    queries = now.prefix_cache_queries - before.prefix_cache_queries
    hits = now.prefix_cache_hits - before.prefix_cache_hits
    share = f"{100 * hits / queries:.0f} %" if queries else "no queries"
    return (
        f"running {now.num_running}, waiting {now.num_waiting}, prefill {prefill:,.0f} tok/s, "
        f"decode {decode:,.0f} tok/s, kv {100 * now.kv_cache_usage:.0f} %, prefix hits {share}"
    )
