"""Markdown of the benchmarks of the engine and the server on a CPU."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from benchmarks._harness import table_row, three_digits

Result = Mapping[str, Any]


def _where(result: Result) -> str:
    """Machine, versions and commits of a result, in a line."""
    env = result["env"]
    line = (
        f"{env['date']}, {env['cpu']}, {env['cpus']} processors; Python {env['python']}, "
        f"paddlepaddle {env['paddlepaddle']}; commit {env['commit'][:12]}"
    )
    return (
        f"{line}, before: {result['baseline']['commit'][:12]}."
        if "baseline" in result
        else f"{line}."
    )


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    """A table with an empty line before it."""
    return ["", table_row(head), "|---" * len(head) + "|", *map(table_row, rows)]


def server_overhead(result: Result) -> str:
    """Markdown of benchmarks/results/server_overhead.json."""
    labels = list(result["cases"][0]["servers"])
    head = ["processors", "streams", "engine, tokens/s"]
    for label in labels:
        name = "server" if label == "fd_dsa" else "server before"
        head += [
            f"{name}, tokens/s",
            "loss (least, most)",
            "added, ms a token",
            "event loop, us a token",
        ]
    head.append("client, us a token")
    rows = []
    for row in result["cases"]:
        cells = [row["arrangement"], str(row["streams"]), f"{row['engine_tokens_per_s']:.1f}"]
        for label in labels:
            side = row["servers"][label]
            low, high = side["loss_spread"]
            cells += [
                f"{side['tokens_per_s']:.1f}",
                f"{side['loss']:.1%} ({low:.1%}, {high:.1%})",
                f"{side['added_ms_a_token']['p50']:.2f}",
                f"{side['cpu_per_token']['serve_us']:.0f}",
            ]
        cells.append(f"{row['servers']['fd_dsa']['cpu_per_token']['client_us']:.0f}")
        rows.append(cells)
    lengths = f"{result['prompt_tokens']} + {result['new_tokens']} tokens a stream"
    lines = [f"{_where(result)} {lengths}, {result['rounds']} rounds.", *_table(head, rows)]
    return "\n".join(lines) + "\n"


def stream_gaps(result: Result) -> str:
    """Markdown of benchmarks/results/stream_gaps.json: a row for each target."""
    head = ["target, ms", "gap p50, ms", "p99", "max", "first prompt of a fresh engine: p99", "max"]
    head += ["seconds of the prompt", "prompts alone, tokens/s", "of those without a target"]
    rows = []
    for side in result["sides"]:
        gaps, first, low_high = side["gap_ms"], side["first_gap_ms"], side["prompts_ratio_spread"]
        cells = [three_digits(gaps[name]) for name in ("p50", "p99", "max")]
        cells += [three_digits(first[name]) for name in ("p99", "max")]
        cells += [three_digits(side["prompt_s"]["p50"]), f"{side['prompt_tokens_per_s']:.0f}"]
        cells.append(f"{side['prompts_ratio']:.3f} ({low_high[0]:.3f}, {low_high[1]:.3f})")
        rows.append([f"{side['target_ms']:g}" if side["target_ms"] else "none", *cells])
    clock = "processor time of one thread" if result["clock"] == "processor" else "wall-clock time"
    about = (
        f"{_where(result)} A stream beside a prompt of {result['prompt_tokens']:,} tokens, "
        f"rounds after the first: {result['rounds']}; prompts alone: {result['alone'][0]} of "
        f"{result['alone'][1]:,} tokens. Times are {clock}."
    )
    return "\n".join([about, *_table(head, rows)]) + "\n"


def growth(result: Result) -> str:
    """Markdown of benchmarks/results/growth.json."""
    numbers = list(result["host_time"][0]["sides"]["fd_dsa"]["us"])
    head = ["vocabulary", "sampling", "package", "a + b a request, us"]
    head += [f"{n}, us" for n in numbers]
    rows = []
    for entry in result["host_time"]:
        for label, side in entry["sides"].items():
            fit = f"{side['a_us']:.0f} + {side['b_us']:.2f}"
            times = [three_digits(side["us"][n]["p50"]) for n in numbers]
            rows.append([f"{entry['vocab_size']:,}", entry["sampling"], label, fit, *times])
    lines = [_where(result), *_table(head, rows)]
    passes = " and ".join(
        f"{three_digits(us['p50'])} us ({int(vocab_size):,})"
        for vocab_size, us in result["pass_us"].items()
    )
    lines += ["", f"A pass over the logits of {numbers[-1]} rows alone takes {passes}."]
    found = result["growth"]
    head = ["layers", "rows", "context", "builds of the metadata", "its bytes", "launches a step"]
    rows = [
        [
            *(str(entry["case"][name]) for name in ("layers", "rows", "context")),
            f"{entry['metadata']['builds']:.0f}",
            f"{entry['metadata']['bytes']:,}",
            str(entry["launches"]),
        ]
        for entry in found["cases"]
    ]
    lines += _table(head, rows)
    if found["launches_are_linear"]:
        lines += ["", f"Each further layer adds {found['launches_a_layer']:.0f} launches."]
    return "\n".join(lines) + "\n"


def sampler(result: Result) -> str:
    """Markdown of benchmarks/results/sampler.json."""
    head = ["logits", "sampling", "before, ms", "now, ms", "ratio", "tokens that differ"]
    rows = [
        [
            case["spread"],
            case["sampling"],
            three_digits(case["ms"]["before"]["p50"]),
            three_digits(case["ms"]["fd_dsa"]["p50"]),
            f"{case['ratio']:.2f}",
            f"{case['differing']} of {case['draws']:,}",
        ]
        for case in result["cases"]
    ]
    return "\n".join([_where(result), *_table(head, rows)]) + "\n"


def memory_use(result: Result) -> str:
    """Markdown of benchmarks/results/memory_use.json."""
    head = ["model", "layers", "with an indexer", "wanted", "planned", "allocated"]
    rows = [
        [
            *(str(entry[name]) for name in ("model", "layers", "indexer_layers")),
            *(f"{entry[name]:.2f}" for name in ("wanted", "planned", "allocated")),
        ]
        for entry in result["caches"]
    ]
    lines = [_where(result), "", "Bytes a token and layer:", *_table(head, rows)]
    engine = result["engine"]
    lines += [
        "",
        f"Arrays of a running engine of the demo model, {engine['layers']} layers: "
        f"{engine['bytes_a_token_and_layer']:.2f}.",
        "",
        f"A prompt's chunk beside the caches, MiB; the budget is {result['budget_mib']}:",
    ]
    head = [
        "context",
        "device: scores",
        "CPU: tokens",
        "CPU: NumPy",
        "CPU: Paddle",
    ]
    rows = [
        [
            f"{entry['context']:,}",
            f"{entry['device']['scores_mib']:.0f}",
            str(entry["cpu_tokens"]),
            f"{entry['cpu']['numpy_mib']:.0f}",
            f"{entry['cpu']['paddle_mib']:.0f}",
        ]
        for entry in result["prompts"]
    ]
    return "\n".join([*lines, *_table(head, rows)]) + "\n"


def step_profile(result: Result) -> str:
    """Markdown of benchmarks/results/step_profile.json: a table of parts, a column a case."""
    cases = result["cases"]
    parts = list(next(iter(cases[0]["us"].values())))
    head = ["part, us", *(f"{c['requests']} x {c['context']}, {c['sampling']}" for c in cases)]
    rows = [[part, *(_before_after(case["us"], part) for case in cases)] for part in parts]
    lines = [_where(result), *_table(head, rows), ""]
    for entry in result["serving"]:
        us = {label: {"loop": value} for label, value in entry["us"].items()}
        streams = "1 stream" if entry["requests"] == 1 else f"{entry['requests']} streams"
        lines.append(
            f"- Serving, {streams}: {_before_after(us, 'loop')} us of the event loop a step."
        )
    return "\n".join(lines) + "\n"


def _before_after(us: Mapping[str, Mapping[str, float]], part: str) -> str:
    """Microseconds of a part, before and now where both were measured."""
    return " → ".join(
        three_digits(us[label][part]) for label in ("before", "fd_dsa") if label in us
    )
