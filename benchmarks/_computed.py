"""Figures that need more than a template: "@NAME" under "figures" and "results" in shown.json."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

from benchmarks._harness import RESULTS
from benchmarks._ratios import headline
from benchmarks._render import Case, Result, Table

# neighbouring launches of a layer that are not joined: the kernels of the shorter or of either
_PAIRS = (
    # sums of cuBLASLt
    ("splitKreduce",),
    # a program of the experts reads the choices of all tokens
    ("choose_experts", "group_pairs"),
    ("silu_and_mul",),
    ("write_caches", "prepare_mla_query"),
    # the experts of a token are in different programs
    ("sum_experts",),
)


def _other(name: str) -> Any:
    """Return another committed result."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


def _step_us(rows: int) -> float:
    """Return the time of a decode step without the profiler, of the profiles' commit."""
    cases = _other("gpu_engine_invariant")["cases"]
    (ms,) = (case["peer_value"] for case in cases if case["case"] == f"decode-{rows}x4k")
    return 1000.0 * float(ms)


def _saved_us(result: Result, rows: str) -> list[float]:
    """Return the largest saving of each joined pair: the time of its shorter launch."""
    kernels = result["profiles"][rows]["kernels"]
    return [
        min(us for kernel, us, *_ in kernels for name in pair if name in kernel) for pair in _PAIRS
    ]


def _launches(result: Result, rows: str) -> int:
    """Return the number of launches of a layer with experts in a decode step."""
    counts = (count for _, _, count, *_ in result["profiles"][rows]["kernels"])
    return sum(round(count / result["layers"]) for count in counts if count >= result["layers"] - 1)


def ifeval(result: Result) -> Iterator[str]:
    """Yield the pairs of `ifeval_pairs`: the machine, a table of all metrics, verdicts."""
    env = result["env"]
    machine = env["gpu"] or f"{env['cpu']}, {env['cpus']} processors"
    subset = f", {result['subset']} prompts only" if result["subset"] else ""
    yield (
        f"{env['date']}, {machine}; Python {env['python']}, paddlepaddle {env['paddlepaddle']}; "
        f"{result['model']}{subset}; commit {env['commit'][:12]}."
    )
    form = "{passed}/{total} = {value:.2f} [{low:.1f}, {high:.1f}]"
    columns: list[Any] = [
        *(("before → after", "{sides}"), ("metric", "{metric}")),
        *((f"{side}, % [95% interval]", f"{{{side}}}") for side in ("before", "after")),
        *(("worse", "{worse}"), ("better", "{better}"), ("p", "{p}")),
    ]
    rows = [
        {
            "sides": f"{pair['before']} → {pair['after']}",
            "metric": metric,
            **{side: form.format_map(found[side]) for side in ("before", "after")},
            **{key: found[key] for key in ("worse", "better")},
            "p": "" if found["p"] is None else f"{found['p']:.2g}",
        }
        for pair in result["pairs"]
        for metric, found in pair["metrics"].items()
    ]
    yield "\n".join(Table(lambda _: rows, columns).lines(result))
    for pair in result["pairs"]:
        yield f"{pair['before']} → {pair['after']}: {' '.join(pair['verdict'])}"


def _gpu_joins(rows: str) -> Callable[[Result], str]:
    def text(result: Result) -> str:
        saved, step = sum(_saved_us(result, rows)), _step_us(int(rows))
        return f"{saved:.0f} us of {step:,.0f} ({saved / step:.1%})"

    return text


def _between_launches(result: Result) -> str:
    idle = _step_us(1) - result["profiles"]["1"]["busy_us"]
    return f"{idle / result['profiles']['1']['launches']:.1f} us"


def _share(*classes: str, rows: str = "us_1") -> Callable[[Result], str]:
    """Make a function that formats the share of some classes in the time of all kernels."""

    def text(result: Result) -> str:
        us = {entry["class"]: entry[rows] for entry in result["classes"]}
        return f"{sum(us[name] for name in classes) / us['any kernel runs']:.0%}"

    return text


def _range(values: Iterable[float], form: str) -> str:
    """Format the smallest and the largest value."""
    low, *_, high = map(lambda x: format(x, form), sorted(values))
    return f"{low} to {high}"


def _v4_ratios(requests: int) -> Callable[[Result], str]:
    return lambda result: _range(
        (
            case["ratio_p50"]
            for model in result["models"].values()
            for case in model["cases"]
            if case["case"]["requests"] == requests
        ),
        ".1f",
    )


def _bound_launch(result: Result) -> str:
    """Format the host time of a bound launch beyond the driver's own launch."""
    times = [c["times"] for c in result["cases"] if "fd_dsa bound" in c["times"]]
    return _range((t["fd_dsa bound"]["p50"] - t["driver"]["p50"] for t in times), ".1f")


def _within(case: Case) -> bool:
    """Return True if a number of requests takes at most 0.3 ms and 3 us a request."""
    return bool(case["us"] <= 300 + 3 * case["requests"])


def _greedy(result: Result, vocabulary: int) -> list[dict[str, Any]]:
    """Return host time of greedy steps by number of requests."""
    (entry,) = (
        entry
        for entry in result["host_time"]
        if entry["vocab_size"] == vocabulary and entry["sampling"] == "greedy"
    )
    times = entry["sides"]["fd_dsa"]["us"]
    return [{"requests": int(n), "us": time["p50"]} for n, time in times.items()]


def _meets(vocabulary: int) -> Callable[[Result], str]:
    """Make a function that formats the largest count that meets the aim, and the next."""

    def text(result: Result) -> str:
        cases = _greedy(result, vocabulary)
        met = max(case["requests"] for case in cases if _within(case))
        missed = min((c for c in cases if not _within(c)), key=lambda c: int(c["requests"]))
        aim = 300 + 3 * missed["requests"]
        return (
            f"up to {met} requests meet it and steps of {missed['requests']} do not "
            f"({missed['us']:.0f} us, aim {aim})"
        )

    return text


def _slower(*starts: str) -> Callable[[Result], str]:
    """Make a function that formats the largest loss to DeepGEMM, by names of cases."""

    def text(result: Result) -> str:
        ratios = [
            case["ratios"]["DeepGEMM"]
            for case in result["cases"]
            if case["case"].startswith(starts) or case["case"].endswith(starts)
        ]
        return f"{1 / min(ratios) - 1:.0%}"

    return text


def _largest_ratio(result: Result) -> str:
    """Format the largest ratio over that of the bytes, of steps with drafts."""
    return f"{max(c['ratio'] / c['by_the_bytes'] for c in result['cases']):.2f}"


def _more_experts(result: Result) -> str:
    us = {entry["class"]: entry for entry in result["classes"]}["routed experts"]
    return f"{us['us_known'] / us['us_plain'] - 1:.0%}"


def _norm_us(result: Result) -> str:
    """Format the time of the norm after an all-reduce, and its share of a decode step."""
    case = result["cases"][0]
    us = case["fd_dsa_norm_us"] - case["fd_dsa_us"]
    (step,) = (
        c["ours_value"] for c in _other("gpu_engine_4")["cases"] if c["case"] == "decode-1x4k"
    )
    return f"{us:.0f} us, {2 * 61 * us / (1000 * step):.0%} of a step of one row"


def _over_floor(result: Result) -> str:
    case = result["cases"][0]
    return f"{case['ours_value'] / case['floor']:.1f}"


def _kernels_and_step(engine: str) -> Callable[[Result], str]:
    def text(result: Result) -> str:
        busy = result["profiles"]["1"]["busy_us"]
        (ms,) = (c["ours_value"] for c in _other(engine)["cases"] if c["case"] == "decode-1x4k")
        return f"{busy:,.0f} us of kernels, a step of {1000 * ms:,.0f} us without the profiler"

    return text


def _dense_at_128(result: Result) -> str:
    ratios = [c["cublaslt_us"] / c["ours_us"] for c in result["cases"] if c["rows"] == 128]
    return _range(ratios, ".2f")


def _experts(tokens: int) -> Callable[[Result], str]:
    """Make a function that formats the GEMMs, all launches, and the rate of the GEMMs."""

    def text(result: Result) -> str:
        (case,) = (c for c in result["cases"] if c["rows"] == tokens)
        both = case["gate_up_us"] + case["down_us"]
        return f"{both:,.0f} of {case['ours_us']:,.0f} us, at {case['floor_us'] / both:.0%}"

    return text


def _experts_missed(result: Result) -> str:
    """Format the numbers of tokens at which a peer is faster."""
    missed = [
        f"{c['rows']:,}"
        for c in result["cases"]
        if min(c["vllm_us"], c["deep_gemm_us"]) < c["ours_us"]
    ]
    return " and ".join([", ".join(missed[:-1]), missed[-1]])


def _four_bit_ratios(kind: str, first: int, last: int) -> Callable[[Result], str]:
    """Make a function that formats a kind's ratios to FP8 experts from `first` to `last` tokens."""
    return lambda result: _range(
        (c["ratio"][kind] for c in result["cases"] if first <= c["tokens"] <= last), ".2f"
    )


FUNCTIONS: Mapping[str, Callable[[Any], str]] = {
    "headline": headline,
    "joins_1": _gpu_joins("1"),
    "joins_32": _gpu_joins("32"),
    "launches_1": lambda result: str(_launches(result, "1")),
    "launches_32": lambda result: str(_launches(result, "32")),
    "between_launches": _between_launches,
    "waits": lambda r: f"{1 - r['profiles']['1']['busy_us'] / _step_us(1):.1%}",
    "attention_of_8k": _share("attention", rows="us_8192"),
    "experts_of_32": _share("routed experts", rows="us_32"),
    "three_classes": _share("GEMMs in FP8", "routed experts", "indexer"),
    "sums_of_1": _share("sums over ranks"),
    "sums_of_8k": _share("sums over ranks", rows="us_8192"),
    "v4_1": _v4_ratios(1),
    "v4_16": _v4_ratios(16),
    "bound_launch": _bound_launch,
    "meets_4096": _meets(4096),
    "meets_129280": _meets(129280),
    "slower_prompts": _slower("prompt"),
    "slower_drafts": _slower("2 tokens", "4 tokens"),
    "over_the_bytes": _largest_ratio,
    "more_experts": _more_experts,
    "norm": _norm_us,
    "over_floor": _over_floor,
    "kernels_4": _kernels_and_step("gpu_engine_4"),
    "kernels_2": _kernels_and_step("gpu_engine_2"),
    "dense_at_128": _dense_at_128,
    "experts_8192": _experts(8192),
    "experts_missed": _experts_missed,
    "mxfp4_short": _four_bit_ratios("mxfp4", 1, 512),
    "mxfp4_long": _four_bit_ratios("mxfp4", 2048, 8192),
    "nvfp4_8": _four_bit_ratios("nvfp4", 8, 8),
    "nvfp4_short": _four_bit_ratios("nvfp4", 32, 128),
    "nvfp4_512": _four_bit_ratios("nvfp4", 512, 512),
    "nvfp4_long": _four_bit_ratios("nvfp4", 2048, 8192),
    "int4_8": _four_bit_ratios("int4", 8, 8),
    "int4_short": _four_bit_ratios("int4", 32, 128),
    "int4_512": _four_bit_ratios("int4", 512, 512),
    "int4_long": _four_bit_ratios("int4", 2048, 8192),
}
"""Name -> figure of a result."""
