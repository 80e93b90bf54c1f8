"""Make the tables and plots of docs/performance.md from benchmarks/results/*.json.

    python -m benchmarks.report                  # rewrites the page between its marks, and plots
    python -m benchmarks.report RUN.tar.gz       # first takes the results of a gpu_run archive

The page is prose by hand and one marked region a result; a region is a function of its JSON file.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tarfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks import _serving_tables as serving
from benchmarks._decode_tables import decode_lines
from benchmarks._harness import RESULTS, ROOT, table_row, three_digits, write_json
from benchmarks._overlap_tables import overlap_lines
from benchmarks._sparse_mla_tables import sparse_mla_sentences
from benchmarks._stack_tables import layer_stack_sentences
from benchmarks._staging_tables import staging_lines
from benchmarks._topk_tables import topk_sentences
from benchmarks._v4_tables import v4_prepare_tables

PAGE = ROOT / "docs" / "performance.md"
IMAGES = ROOT / "docs" / "img"
_REGION = re.compile(r"<!-- result: (\w+) -->\n(.*?)<!-- end -->\n", re.DOTALL)
# whole numbers of a case which are shown beside its times
_COUNTS = {"launches": "launches", "host_waits": "host waits", "allocations": "allocations"}
_WITHOUT_PLOT = (
    *("decode_steps", "engine_cpu", "growth", "memory_use", "sampler", "server_overhead"),
    *("step_profile", "indexer_logits", "layer_stack", "sparse_mla", "topk"),
    "stream_gaps",
)
_BARS = "the table above as bars"
_CAPTIONS = {
    "overlap": "the kernels of a layer by stream; above the whole layer, below its begin",
    **dict.fromkeys(
        ("staging", "v4_prepare"),
        "the work of some steps and their copies, by stream; below, the end of one of them",
    ),
}
_PROFILE_COLUMNS = (
    "duration",
    "registers a thread",
    "occupancy reached",
    "DRAM, of its peak",
    "L2 hits",
)


def engine_cpu(result: dict[str, Any]) -> str:
    """Markdown of benchmarks/results/engine_cpu.json."""
    env, growth = result["env"], result["growth"]
    lines = [
        f"{env['cpu']}, {env['cpus']} processors; Python {env['python']}, paddlepaddle "
        f"{env['paddlepaddle']}, torch {env['torch']}, transformers {env['transformers']}; commit "
        f"{env['commit'][:12]}.",
        "",
        "| requests x prompt + new tokens | fd_dsa, tokens/s | transformers, tokens/s | ratio "
        "(least, most) | first token, fd_dsa |",
        "|---|---|---|---|---|",
    ]
    for row in result["cases"]:
        case, ours, low_high = row["case"], row["candidate"], row["ratio_spread"]
        lines.append(
            f"| {case['requests']} x {case['prompt_tokens']} + {case['new_tokens']} "
            f"| {ours['tokens_per_s']:.1f} | {row['baseline']['tokens_per_s']:.1f} "
            f"| {row['ratio_p50']:.2f} ({low_high[0]:.2f}, {low_high[1]:.2f}) "
            f"| {ours['time_to_first_token_s']['p50'] * 1e3:.0f} ms |"
        )
    lines += [
        "",
        f"Decode step of one request: {growth['a_ms']:.1f} ms + {growth['b_ms_per_1k']:.2f} ms "
        f"per 1,000 tokens of context. The indexer's scan alone (scores and top-k of all layers, "
        f"on the same pages): {growth['scan_b_ms_per_1k']:.2f} ms per 1,000. Ratio "
        f"{growth['b_over_scan']:.2f}.",
    ]
    for profile in result["profile"]:
        lines += [
            "",
            f"Profile of a decode step of {profile['requests']} x {profile['context']}, "
            f"{profile['ms']:.1f} ms without the profiler:",
            "",
            "| function | calls | share of the time |",
            "|---|---|---|",
        ]
        lines += [
            f"| `{f['name'].removeprefix('~:')}` | {f['calls_per_step']:.0f} | {f['share']:.1%} |"
            for f in profile["functions"][:6]
        ]
    return "\n".join(lines) + "\n"


def _machine(env: Mapping[str, Any]) -> str:
    """Where and on what a GPU result was taken, in one line."""
    versions = ", ".join(
        f"{name} {env[name]}" for name in ("torch", "triton", "paddlepaddle") if env.get(name)
    )
    return (
        f"{env.get('date', '')}, {env['gpu']}, driver {env['driver']}; Python {env['python']}, "
        f"{versions}; commit {env['commit'][:12]}."
    )


def _refusal(result: Mapping[str, Any]) -> str | None:
    """Why the figures of a result may not be shown; None where they may."""
    # the ceilings run no kernel of ours
    if result["gate"] != "passed" and result["name"] != "ceilings":
        return f"The correctness tests of this run: {result['gate']}. No figures.\n"
    if result["env"].get("form", "real") != "real":
        return "Measured without a GPU, to try the commands. No figures.\n"
    if result["env"]["dirty"]:
        return "The tree that was measured is no commit. No figures.\n"
    return None


def _ceilings_line(result: Mapping[str, Any]) -> str:
    """The ceilings of the run, and the clocks as they were found."""
    ceilings, clocks = result["ceilings"], result["clocks"]
    found = ", ".join(
        f"{when} {c['clocks.sm']} and {c['power.draw']}"
        for when, c in zip(("before", "after"), clocks, strict=False)
        if "clocks.sm" in c
    )
    line = (
        f"In the same run: copy {ceilings['copy_bytes_per_s'] / 1e12:.2f} TB/s read and written, "
        f"an empty kernel in a graph {ceilings['node_us']:.2f} us"
    )
    return f"{line}; SM clock and power {found}." if found else f"{line}."


def gpu_table(result: Mapping[str, Any]) -> str:
    """Markdown of a result that a GPU benchmark recorded (benchmarks/_gpu.py)."""
    refused = _refusal(result)
    if refused:
        return refused
    cases = result["cases"]
    if not cases:
        return "\n".join(["No case was timed.", *_gaps(result)]) + "\n"
    labels = list(dict.fromkeys(label for case in cases for label in case["times"]))
    counts = [key for key in _COUNTS if any(key in case for case in cases)]
    head = ["case", *(f"{label}, us" for label in labels), "of the floor"]
    head += [*(_COUNTS[key] for key in counts), "tier"]
    lines = [_machine(result["env"]), "", table_row(head), "|---" * len(head) + "|"]
    for case in cases:
        cells = [case["case"], *(_time_cell(case, label) for label in labels)]
        share = case["percent_of_floor"]
        cells.append(f"{share:.0f}%" if share >= 1 else "< 1%")
        cells += [str(case.get(key, "")) for key in counts]
        lines.append(table_row([*cells, case["tier"]]))
    spread = max((t["p80"] - t["p20"]) / t["p50"] for c in cases for t in c["times"].values())
    lines += ["", f"{_ceilings_line(result)} Largest spread, p20 to p80: {spread:.1%}."]
    return "\n".join([*lines, *_gaps(result)]) + "\n"


def _gaps(result: Mapping[str, Any]) -> Iterator[str]:
    """Paragraphs about cases that are not in a table."""
    if result.get("failed"):
        yield f"\nFailed: {', '.join(result['failed'])}."
    if result.get("not_run"):
        yield f"\nNot run, for want of time: {', '.join(result['not_run'])}."
    if "error" in result:
        yield f"\nThe run was cut off: {result['error']}."


def _time_cell(case: Mapping[str, Any], label: str) -> str:
    """A median in microseconds; for the other side also how many times ours it is."""
    if label not in case["times"]:
        return ""
    time = three_digits(case["times"][label]["p50"])
    if label == case["ours"]:
        return f"**{time}**"
    return f"{time} ({three_digits(case['ratios'][label])}x)"


def ceilings(result: Mapping[str, Any]) -> str:
    """Markdown of what the GPU and its driver reach by themselves."""
    refused = _refusal(result)
    if refused:
        return refused
    rows = {
        "device copy, bytes read plus written": "{copy_bytes_per_s:.2f} TB/s",
        "bfloat16 product, 8192 x 8192, random": "{matrix_flops_per_s:.0f} TFLOP/s",
        "host, raw launch with 1, 5, 18 arguments": (
            "{launch_1_us:.2f}, {launch_5_us:.2f}, {launch_18_us:.2f} us"
        ),
        "host, event record": "{event_record_us:.2f} us",
        "from node to node of a graph, empty kernels": "{graph_node_us:.2f} us",
    }
    values = result | result["ceilings"]
    values["copy_bytes_per_s"] /= 1e12
    values["matrix_flops_per_s"] /= 1e12
    table = [table_row([name, form.format(**values)]) for name, form in rows.items()]
    lines = [_machine(result["env"]), "", "| ceiling | measured |", "|---|---|", *table]
    return "\n".join(lines) + "\n"


def profiles(result: Mapping[str, Any]) -> str:
    """Markdown of what Nsight Compute said about each kernel."""
    refused = _refusal(result)
    if refused:
        return refused
    head = ["kernel", *_PROFILE_COLUMNS, "waits most for"]
    lines = [_machine(result["env"]), "", table_row(head), "|---" * len(head) + "|"]
    for kernel in result["kernels"]:
        cells = [f"{kernel.get('subject', '')} `{kernel['kernel']}`".strip()]
        cells += [kernel["metrics"].get(name, "") for name in _PROFILE_COLUMNS]
        cells.append(", ".join(list(kernel["stalls"])[:2]).replace("_", " "))
        lines.append(table_row(cells))
    return "\n".join(lines) + "\n"


def overlap(result: Mapping[str, Any]) -> str:
    """Markdown of benchmarks/results/overlap.json: the times, and what the threshold comes from."""
    text = gpu_table(result)
    if _refusal(result):
        return text
    return text + "\n".join(overlap_lines(result)) + "\n"


def step_metadata(result: Mapping[str, Any]) -> str:
    """Markdown of benchmarks/results/step_metadata.json: the times, and the custom operator."""
    text = gpu_table(result)
    found = [
        c["effects"]["custom op"] for c in result["cases"] if "custom op" in c.get("effects", {})
    ]
    if _refusal(result) or not found:
        return text
    most = {what: max(effects[key] for effects in found) for key, what in _COUNTS.items()}
    counts = ", ".join(f"{count} {what}" for what, count in most.items())
    return f"{text}\nThe custom operator, at most in any of these steps: {counts}.\n"


def _with_sentences(
    result: Mapping[str, Any], sentences: Callable[[Mapping[str, Any]], Iterable[str]]
) -> str:
    """The table of a result and what is said of it."""
    lines = [] if _refusal(result) else [f"\n{text}\n" for text in sentences(result)]
    return "".join([gpu_table(result), *lines])


def v4_prepare(result: Mapping[str, Any]) -> str:
    """Markdown of benchmarks/results/v4_prepare.json: all sizes, aims, and what is faster."""
    refused = _refusal(result)
    if refused:
        return refused
    lines = [_machine(result["env"]), *v4_prepare_tables(result), "", _ceilings_line(result)]
    if "error" in result:
        lines += ["", f"The run was cut off: {result['error']}."]
    return "\n".join(lines) + "\n"


def _only_lines(
    result: Mapping[str, Any], lines: Callable[[Mapping[str, Any]], Iterable[str]]
) -> str:
    """A result that has a table of its own."""
    refused = _refusal(result)
    if refused:
        return refused
    return "\n".join([_machine(result["env"]), *lines(result)]) + "\n"


_MADE_BY = {
    "decode_steps": partial(_only_lines, lines=decode_lines),
    "engine_cpu": engine_cpu,
    "growth": serving.growth,
    "memory_use": serving.memory_use,
    "sampler": serving.sampler,
    "server_overhead": serving.server_overhead,
    "step_profile": serving.step_profile,
    "stream_gaps": serving.stream_gaps,
    "ceilings": ceilings,
    "layer_stack": partial(_with_sentences, sentences=layer_stack_sentences),
    "overlap": overlap,
    "profiles": profiles,
    "sparse_mla": partial(_with_sentences, sentences=sparse_mla_sentences),
    "staging": partial(_only_lines, lines=staging_lines),
    "step_metadata": step_metadata,
    "topk": partial(_with_sentences, sentences=topk_sentences),
    "v4_prepare": v4_prepare,
}


def region(name: str, folder: Path = RESULTS) -> str:
    """What stands between the marks of a result.

    Args:
        name: name of the result's file, without its ending.
        folder: where the results are.
    """
    path = folder / f"{name}.json"
    if not path.exists():
        return "Not measured yet.\n"
    result = json.loads(path.read_text())
    text = _MADE_BY.get(name, gpu_table)(result)
    if plotted(name, result):
        caption = _CAPTIONS.get(name, _BARS)
        text += f"\n![{caption}](img/{name}.svg)\n"
    return text


def plotted(name: str, result: Mapping[str, Any]) -> bool:
    """True for a result that has a plot: something to draw, and nothing against showing it."""
    shows = result.get("timeline") if name in _CAPTIONS else result.get("cases")
    return name not in _WITHOUT_PLOT and bool(shows) and not _refusal(result)


def plots(folder: Path = RESULTS) -> Iterator[tuple[Path, dict[str, Any]]]:
    """Every plot of the page and the result that it shows."""
    for path in sorted(folder.glob("*.json")):
        result = json.loads(path.read_text())
        if plotted(path.stem, result):
            yield IMAGES / f"{path.stem}.svg", result


def regions(page: str) -> dict[str, str]:
    """Name of each marked region of a page -> what stands there."""
    return dict(_REGION.findall(page))


def filled(page: str, folder: Path = RESULTS) -> str:
    """The page with every region made anew."""
    return _REGION.sub(
        lambda m: f"<!-- result: {m[1]} -->\n{region(m[1], folder)}<!-- end -->\n", page
    )


def take(archive: Path, names: Iterable[str], folder: Path = RESULTS) -> list[str]:
    """Copy results out of an archive of `gpu_run`; those that may not be shown stay there.

    Args:
        archive: the file that `gpu_run --archive` wrote.
        names: results wanted.
        folder: where they go.

    Returns:
        A line about each of them.
    """
    said = []
    with tarfile.open(archive) as files:
        held = set(files.getnames())
        for name in names:
            member = f"gpu_run/{name}.json"
            if member not in held:
                continue
            content = files.extractfile(member)
            assert content is not None
            result = json.loads(content.read())
            refused = _refusal(result)
            if refused is None:
                write_json(folder / f"{name}.json", result)
            said.append(f"{name}: {(refused or 'taken').strip()}")
    return said


def main(argv: Sequence[str] | None = None) -> int:
    """Rewrite the page and, where matplotlib is installed, the plots; returns 0."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("archive", type=Path, nargs="?", help="archive of a gpu_run to take from")
    args = parser.parse_args(argv)
    if args.archive:
        print("\n".join(take(args.archive, regions(PAGE.read_text("utf-8")))))
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")
    print(f"{PAGE.relative_to(ROOT)}: {', '.join(regions(PAGE.read_text('utf-8')))}")
    if find_spec("matplotlib") is None:
        print("plots left as they are: matplotlib is not installed (extra `bench`)")
        return 0
    from benchmarks.plots import picture

    for path, result in plots():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(picture(result), "utf-8")
        print(path.relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
