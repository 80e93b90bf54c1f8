"""The parts of docs/results that need a comparison or a choice of columns.

Each table and function without an underscore is a part "@NAME" of shown.json.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from benchmarks._harness import three_digits
from benchmarks._render import (
    Case,
    Column,
    Result,
    Table,
    cpu_machine,
    labels_of,
    largest_errors,
    left_out,
    paragraphs,
    time_cell,
)
from benchmarks._stack_shapes import ALL, EAGER, GRAPH, PEERS


def profiles_of_steps(result: Result) -> Iterator[str]:
    """The functions with the most time of their own, of each profiled step."""
    columns = [
        ("function", lambda f: f"`{f['name'].removeprefix('~:')}`"),
        ("calls", "{calls_per_step:.0f}"),
        ("share of the time", "{share:.1%}"),
    ]
    head = "Profile of a decode step of {requests} x {context}, {ms:.1f} ms without the profiler:"
    for profile in result["profile"]:
        yield from paragraphs(profile, [head, Table(lambda p: p["functions"][:6], columns)])


def _of_server(label: str, form: str) -> Callable[[Case], str]:
    return lambda case: form.format_map(case["servers"][label])


def _server_columns(result: Result) -> list[Column]:
    columns: list[Column] = [("processors", "{arrangement}"), ("streams", "{streams}")]
    columns.append(("engine, tokens/s", "{engine_tokens_per_s:.1f}"))
    for label in result["cases"][0]["servers"]:
        forms = {
            "server, tokens/s" if label == "fd_dsa" else "server before, tokens/s": (
                "{tokens_per_s:.1f}"
            ),
            "loss (least, most)": "{loss:.1%} ({loss_spread[0]:.1%}, {loss_spread[1]:.1%})",
            "added, ms a token": "{added_ms_a_token[p50]:.2f}",
            "event loop, us a token": "{cpu_per_token[serve_us]:.0f}",
        }
        columns += [(head, _of_server(label, form)) for head, form in forms.items()]
    columns.append(("client, us a token", "{servers[fd_dsa][cpu_per_token][client_us]:.0f}"))
    return columns


servers = Table("cases", _server_columns)


def texts(result: Result) -> Iterator[str]:
    """Where errors of FP8 caches were measured, and on what."""
    form = "{env[cpu]}, {env[cpus]} processors; paddlepaddle {env[paddlepaddle]}, numpy "
    form += "{env[numpy]}; commit {env[commit]:.12}. Texts of "
    lengths = ", ".join(map(str, result["texts"]))
    yield f"{form.format_map(result)}{lengths} tokens, {result['index_topk']} keys selected."


def server_about(result: Result) -> Iterator[str]:
    """Where the servers were measured, and with which streams."""
    about = "{prompt_tokens} + {new_tokens} tokens a stream, {rounds} rounds."
    yield f"{next(cpu_machine(result))} {about.format_map(result)}"


def stream_about(result: Result) -> Iterator[str]:
    """Where the gaps were measured, beside which prompts and by which clock."""
    about = (
        "A stream beside a prompt of {prompt_tokens:,} tokens, rounds after the first: {rounds}; "
        "prompts alone: {alone[0]} of {alone[1]:,} tokens. Times are "
    ).format_map(result)
    clock = "processor time of one thread" if result["clock"] == "processor" else "wall-clock time"
    yield f"{next(cpu_machine(result))} {about}{clock}."


def _host_times(result: Result) -> Iterator[Mapping[str, Any]]:
    for entry in result["host_time"]:
        for label, side in entry["sides"].items():
            yield entry | side | {"label": label}


def _numbers(result: Result) -> list[str]:
    return list(result["host_time"][0]["sides"]["fd_dsa"]["us"])


def _growth_columns(result: Result) -> list[Column]:
    return [
        ("vocabulary", "{vocab_size:,}"),
        ("sampling", "{sampling}"),
        ("package", "{label}"),
        ("a + b a request, us", "{a_us:.0f} + {b_us:.2f}"),
        *((f"{n}, us", lambda row, n=n: f"{row['us'][n]['p50']:~}") for n in _numbers(result)),
    ]


host_times = Table(_host_times, _growth_columns)


def passes(result: Result) -> Iterator[str]:
    """The time of a pass over the logits alone."""
    found = [f"{us['p50']:~} us ({int(size):,})" for size, us in result["pass_us"].items()]
    rows = _numbers(result)[-1]
    yield f"A pass over the logits of {rows} rows alone takes {' and '.join(found)}."


def more_layers(result: Result) -> Iterator[str]:
    """How launches grow with layers, where they grow linearly."""
    if result["growth"]["launches_are_linear"]:
        yield f"Each further layer adds {result['growth']['launches_a_layer']:.0f} launches."


def _before_after(us: Mapping[str, Any]) -> str:
    """Microseconds before and now, where both were measured."""
    return " → ".join(three_digits(us[x]) for x in ("before", "fd_dsa") if x in us)


def _part_columns(result: Result) -> list[Column]:
    def column(case: Case) -> Column:
        def cell(part: str) -> str:
            return _before_after({label: us[part] for label, us in case["us"].items()})

        return "{requests} x {context}, {sampling}".format_map(case), cell

    return [("part, us", lambda part: part), *map(column, result["cases"])]


step_parts = Table(lambda r: next(iter(r["cases"][0]["us"].values())), _part_columns)


def serving(result: Result) -> Iterator[str]:
    """The event loop's time a step."""
    lines = []
    for entry in result["serving"]:
        streams = f"{entry['requests']} stream" + "s" * (entry["requests"] > 1)
        us = _before_after(entry["us"])
        lines.append(f"- Serving, {streams}: {us} us of the event loop a step.")
    yield "\n".join(lines)


def _decode_columns(result: Result) -> list[Column]:
    ways = labels_of(result["cases"])

    def in_runner(way: str) -> Callable[[Case], str]:
        return lambda case: f"{case['runner'][way]['p50']:~}" if way in case["runner"] else ""

    return [
        ("rows x context", "{case}"),
        *((f"{way}, us", time_cell(way)) for way in ways),
        *((f"{way}, in the runner, us", in_runner(way)) for way in ways),
        ("tier", "{tier}"),
    ]


decode_steps = Table("cases", _decode_columns)


def decode_counts(result: Result) -> Iterator[str]:
    """What a step does besides launches, and the ways that failed."""
    cases = result["cases"]
    for way in labels_of(cases):
        counted = [case["counted"][way] for case in cases if way in case["counted"]]
        names = sorted({name for found in counted for name in found if "bytes" not in name})
        counts = ", ".join(f"{max(found.get(n, 0) for found in counted)} {n}" for n in names)
        yield f"A step, {way}, at most: {counts.replace('_', ' ') or 'nothing beside launches'}."
    for way, why in result.get("failed", {}).items():
        yield f"Failed: {way} ({why})."


def _stalls(kernel: Mapping[str, Any]) -> str:
    return ", ".join(list(kernel["stalls"])[:2]).replace("_", " ")


def _metric(name: str) -> Column:
    return name, lambda kernel: kernel["metrics"].get(name, "")


kernels = Table(
    "kernels",
    [
        ("kernel", lambda k: f"{k.get('subject', '')} `{k['kernel']}`".strip()),
        *map(_metric, ("duration", "registers a thread", "occupancy reached")),
        *map(_metric, ("DRAM, of its peak", "L2 hits")),
        ("waits most for", _stalls),
    ],
)


_HIDDEN = "graph", "graph, k_norm beside", "graph, FP8 QKV-A"
_KINDS = ("graph", "eager", "graph, k_norm beside", "eager, k_norm beside")
_FP8 = "graph, FP8 QKV-A", "eager, FP8 QKV-A"


def _overlap_table(result: Result, kinds: Sequence[str], alone: Mapping[str, str]) -> Table:
    """A row a number of tokens: parts by themselves, then what the fork saves in each kind."""
    rows: dict[int, dict[str, Case]] = {}
    for case in result["cases"]:
        if case["kind"] in kinds:
            rows.setdefault(case["num_tokens"], {})[case["kind"]] = case

    def share(kind: str, name: str, form: str) -> Callable[[dict[str, Case]], str]:
        return lambda row: format(row[kind][name], form) if kind in row else ""

    def part(name: str) -> Callable[[dict[str, Case]], str]:
        return lambda row: three_digits(next(iter(row.values()))["alone_us"][name])

    columns: list[Column] = [("tokens", lambda row: str(next(iter(row.values()))["num_tokens"]))]
    columns += [(head, part(name)) for head, name in alone.items()]
    for kind in kinds:
        columns.append((f"{kind}: saved", share(kind, "saved", ".1%")))
        if kind in _HIDDEN:
            columns.append(("hidden", share(kind, "hidden", ".0%")))
    return Table(lambda _: rows.values(), columns)


def overlap(result: Result) -> Iterator[str]:
    """What is saved and hidden at each size, and the thresholds."""
    alone = {"projections alone, us": "projections", "QKV-A alone, us": "QKV-A"}
    yield from paragraphs(result, [_overlap_table(result, _KINDS, alone)])
    if any(case["kind"] in _FP8 for case in result["cases"]):
        alone["projections alone in FP8, us"] = "projections, FP8"
        yield from paragraphs(result, [_overlap_table(result, _FP8, alone)])
    # of runs in which packages of other projects could serve
    if "serving" in result:
        made = {"scores": "indexer_logits", "attention": "sparse_mla"}
        made_by = (f"{result['serving'].get(op, 'our kernel')} for {of}" for of, op in made.items())
        yield f"The layer had {' and '.join(made_by)}."
    if "thresholds_tokens" in result:
        yield (
            "Up to {thresholds_tokens[graph]} tokens in graphs, and up to "
            "{thresholds_tokens[eager]} eager, no step lost more than 1% of the layer by its fork. "
            "By default only steps in graphs fork, in this run up to {default_tokens} tokens."
        ).format_map(result)


def _least(cases: Sequence[Case], note: str) -> str:
    """The least value of a note and the case that has it."""
    worst = min(cases, key=lambda case: case[note])
    return f"{three_digits(worst[note])} ({worst['case']})"


_TOPK_SIZES: dict[str, Callable[[Case], bool]] = {
    "everywhere": lambda case: True,
    "at 32 rows and more of 32k and more": lambda c: c["rows"] >= 32 and c["width"] >= 32 << 10,
    "at one row of 16k and more": lambda c: c["rows"] == 1 and c["width"] >= 16 << 10,
}


def topk(result: Result) -> Iterator[str]:
    """Least ratios over all cases and over the large ones, and what inexact peers miss."""
    peers = {
        "ratio_same_rule": f"the peer with our rule for equal scores ({result['same_rule']})",
        "ratio_best_exact": "the fastest exact peer of each case",
    }
    for note, peer in peers.items():
        parts = [
            f"{where} at least {_least(own, note)}"
            for where, chosen in _TOPK_SIZES.items()
            if (own := [case for case in result["cases"] if note in case and chosen(case)])
        ]
        if parts:
            yield f"Time of {peer}, relative to ours: {', '.join(parts)}."
    missed: dict[str, tuple[float, str]] = {}
    for case in result["cases"]:
        for label, right in case.get("share_right", {}).items():
            missed[label] = max(missed.get(label, (0.0, "")), (1 - right, case["case"]))
    if missed:
        shares = [
            f"{k} up to {share:.1%} ({where})" for k, (share, where) in sorted(missed.items())
        ]
        yield f"Scores chosen that are not among the best: {', '.join(shares)}."


def sparse_mla(result: Result) -> Iterator[str]:
    """Least ratios to the fastest peer of each kind of case, and the errors of all sides."""
    groups: dict[str, dict[float, list[Case]]] = {}
    for case in result["cases"]:
        if case["ratio_best"]:
            groups.setdefault(case["kind"], {}).setdefault(case["gate"], []).append(case)
    for kind, gates in groups.items():
        parts = []
        for gate, own in gates.items():
            heads = ", ".join(str(n) for n in dict.fromkeys(case["heads"] for case in own))
            parts.append(f"at {heads} heads at least {_least(own, 'ratio_best')}, aim {gate}")
        yield f"Time of the fastest peer relative to ours, {kind}: {'; '.join(parts)}."
    if errors := largest_errors(result["cases"]):
        yield f"Largest error against attention in doubles, relative: {errors}."
    yield from left_out(result["cases"])


def _wanted(cases: Sequence[Case]) -> Iterator[str]:
    """The least ratio of A and of B for each aim."""
    groups: dict[tuple[str, float], list[tuple[float, str]]] = {}
    for case in cases:
        for label, least in case["wanted"].items():
            # elsewhere both baselines, in graphs and eager, are one group
            name = "A and B elsewhere" if least == 1 else f"{label}, {case['kind']}"
            found = case["ratios"][label], f"{label}, {case['case']}"
            groups.setdefault((name, least), []).append(found)
    for (name, least), every in groups.items():
        ratio, where = min(every)
        verdict = "met" if ratio >= least else "missed"
        yield f"{name}: at least {ratio:.3f}x ({where}), aim {least:.3f}x: {verdict}."


def layer_stack(result: Result) -> Iterator[str]:
    """Least ratios where some are wanted, those to the peers, counts, errors, what is missing."""
    cases = result["cases"]
    yield from _wanted(cases)
    for kind in (GRAPH, EAGER):
        for label, whose in ((ALL, "of all that FastDeploy's layers launch"), (PEERS, "of peers")):
            own = [c for c in cases if c["kind"] == kind and label in c["ratios"]]
            if own:
                found = sorted((c["ratios"][label], c["case"]) for c in own)
                spread = " to ".join(
                    f"{three_digits(x)} ({where})" for x, where in (found[0], found[-1])
                )
                yield f"Time {whose} relative to ours, {kind}: {spread}."
    counted = [case["package_alone"] for case in cases if "package_alone" in case]
    if counted:
        names = {"launches": "launches", "copies": "copies", "host_waits": "waits of the host"}
        names["allocations"] = "allocations"
        counts = ", ".join(f"{max(c[key] for c in counted)} {name}" for key, name in names.items())
        yield (
            f"A step without torch's GEMMs, which allocate their results, is at most {counts}"
            "; the columns above count whole eager steps."
        )
    made_by = {f"{what} by {who}" for case in cases for what, who in case["made_by"].items()}
    if made_by:
        yield f"The fastest of the peers, in one case or another: {', '.join(sorted(made_by))}."
    if errors := largest_errors(cases, "attention"):
        yield f"Largest error of a layer's attention against doubles, relative: {errors}."
    yield from left_out(cases)
    others = [name for name, serves in result.get("custom_ops", {}).items() if serves is not True]
    if others:
        yield f"Of custom_ops/ did not serve: {', '.join(others)}."


def unguarded(result: Result) -> Iterator[str]:
    """How many steps are read wrong without guards."""
    for case in result["cases"]:
        if case.get("unguarded"):
            found = "; ".join(f"{name}: {wrong}" for name, wrong in case["unguarded"].items())
            form = "{case} without guards, steps read wrong of {unguarded_steps}: "
            yield f"{form.format_map(case)}{found}."
