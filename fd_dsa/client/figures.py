"""From timings to the figures, the table and the plot of a benchmark."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fd_dsa.client.report import Table
from fd_dsa.client.timing import Timing
from fd_dsa.errors import BackendUnavailable

PERCENTILES = (50, 90, 95, 99)
LATENCIES = {
    "ttft_ms": "time to first token",
    "tpot_ms": "time per output token, the first left out",
    "itl_ms": "inter-token latency",
    "e2e_ms": "end to end",
}
"""Field of the result -> what it is; all in milliseconds."""


def samples(timings: Sequence[Timing]) -> dict[str, list[float]]:
    """Milliseconds of each of `LATENCIES`, of the requests that were answered."""
    values: dict[str, list[float]] = {name: [] for name in LATENCIES}
    for timing in timings:
        if timing.error is not None or timing.ttft_s is None:
            continue
        values["ttft_ms"].append(1000 * timing.ttft_s)
        values["e2e_ms"].append(1000 * timing.e2e_s)
        values["itl_ms"] += [1000 * interval for interval in timing.itl_s]
        if timing.output_tokens > 1:
            rest = timing.e2e_s - timing.ttft_s
            values["tpot_ms"].append(1000 * rest / (timing.output_tokens - 1))
    return values


def summarise(timings: Sequence[Timing], duration_s: float) -> dict[str, Any]:
    """The figures of a run: counts, throughput, and mean and percentiles of each latency."""
    answered = [timing for timing in timings if timing.error is None]
    prompt_tokens = sum(timing.prompt_tokens for timing in answered)
    output_tokens = sum(timing.output_tokens for timing in answered)
    latencies = {name: _distribution(values) for name, values in samples(timings).items()}
    return {
        "completed": len(answered),
        "failed": len(timings) - len(answered),
        "retries": sum(timing.attempts - 1 for timing in timings),
        "duration_s": duration_s,
        "total_input_tokens": prompt_tokens,
        "total_output_tokens": output_tokens,
        "request_throughput": len(answered) / duration_s,
        "output_throughput": output_tokens / duration_s,
        "total_token_throughput": (prompt_tokens + output_tokens) / duration_s,
        **latencies,
    }


def _distribution(values: Sequence[float]) -> dict[str, float] | None:
    """Mean and percentiles; None without values."""
    if not values:
        return None
    cuts = np.percentile(values, PERCENTILES)
    named = {f"p{p}": float(cut) for p, cut in zip(PERCENTILES, cuts, strict=True)}
    return {"mean": float(np.mean(values)), **named}


def tables(result: Mapping[str, Any]) -> list[str | Table]:
    """What the terminal shows of `summarise`."""
    counts = (
        ("requests answered", f"{result['completed']}"),
        ("requests failed", f"{result['failed']}"),
        ("further attempts", f"{result['retries']}"),
        ("seconds", f"{result['duration_s']:.2f}"),
        ("prompt tokens", f"{result['total_input_tokens']}"),
        ("output tokens", f"{result['total_output_tokens']}"),
        ("requests/s", f"{result['request_throughput']:.2f}"),
        ("output tokens/s", f"{result['output_throughput']:.1f}"),
        ("prompt and output tokens/s", f"{result['total_token_throughput']:.1f}"),
    )
    columns = ("mean", *(f"p{p}" for p in PERCENTILES))
    rows = []
    for name, label in LATENCIES.items():
        figures = result[name]
        cells = ["-" if figures is None else f"{figures[column]:.2f}" for column in columns]
        rows.append((label, *cells))
    return [
        Table("", ("run", ""), counts),
        Table("", ("latency, ms", *columns), tuple(rows)),
    ]


def plot(timings: Sequence[Timing], title: str) -> str:
    """SVG: for each latency, the share of requests or tokens that took at most so long.

    Raises:
        BackendUnavailable: matplotlib is missing.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise BackendUnavailable(
            "--plot needs matplotlib; install fd_dsa[bench], or leave --plot out"
        ) from error
    with matplotlib.rc_context({"svg.hashsalt": "fd_dsa", "svg.fonttype": "none"}):
        figure = Figure(figsize=(9, 2.6 * 2), layout="constrained")
        figure.suptitle(title, fontsize=10)
        panels = figure.subplots(2, 2).ravel()
        for axes, (name, values) in zip(panels, samples(timings).items(), strict=True):
            shares = np.arange(1, len(values) + 1) / max(1, len(values))
            axes.step(np.sort(values), shares, where="post")
            axes.set_title(LATENCIES[name], fontsize=9)
            axes.set_xlabel("ms")
            axes.set_ylim(0, 1.02)
            axes.set_xlim(left=0)
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
        return out.getvalue()
