"""The figures of docs/performance.md: ratios of groups of cases, and what its pictures show.

Every ratio is the time of the other side divided by ours: above 1 fd_dsa is faster.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks._harness import RESULTS, three_digits
from benchmarks._render import Case, Result, Table, load, refusal

OURS = "fd_dsa"


@dataclass(frozen=True)
class Figure:
    """One row of the table: a group of cases against one kind of peer.

    Attributes:
        what: what was measured.
        page: its full tables, in docs/results.
        peer: what fd_dsa is compared with.
        result: name of the result, and of the benchmark that makes it.
        ratios: of all cases of the group.
    """

    what: str
    page: str
    peer: str
    result: str
    ratios: Callable[[Result], Iterable[float]]


def _of(*labels: str, chosen: Callable[[Case], bool] = lambda case: True) -> Any:
    """Ratios of the fastest of some sides, in the cases of a group."""

    def ratios(result: Result) -> Iterator[float]:
        for case in result["cases"]:
            found = [case["ratios"][label] for label in labels if label in case["ratios"]]
            if found and chosen(case):
                yield min(found)

    return ratios


def _engine(result: Result) -> Iterator[float]:
    return (case["ratio_p50"] for case in result["cases"])


def _server(result: Result) -> Iterator[float]:
    return (1 - case["servers"][OURS]["loss"] for case in result["cases"])


def _gaps(result: Result) -> Iterator[float]:
    """Gaps of a stream without a target against those with one."""
    none, *targets = result["sides"]
    return (none["gap_ms"]["p99"] / side["gap_ms"]["p99"] for side in targets)


def _exact(result: Result) -> Iterator[float]:
    return (c["ratio_best_exact"] for c in result["cases"] if "ratio_best_exact" in c)


def _mla(kind: str, *heads: int) -> Any:
    def chosen(case: Case) -> bool:
        return case["kind"] == kind and case["heads"] in heads

    return _of(*FLASH_MLA, chosen=chosen)


def _mla_triton(kind: str, *heads: int) -> Any:
    """FlashMLA against the Triton kernel, which serves where `custom_ops/` is not built."""

    def ratios(result: Result) -> Iterator[float]:
        for case in result["cases"]:
            peers = [case["times"][x]["p50"] for x in FLASH_MLA if x in case["times"]]
            if peers and case["kind"] == kind and case["heads"] in heads:
                yield min(peers) / case["times"]["ours"]["p50"]

    return ratios


def _v4(label: str) -> Any:
    return _of(label, chosen=lambda case: case.get("kind") == "host")


def _prompt(case: Case) -> bool:
    return case["case"].startswith("prompt")


FLASH_MLA = "FlashMLA of vLLM", "FlashMLA of SGLang"
FIGURES = (
    Figure("tokens/s of the engine", "engine", "Hugging Face `generate`", "engine_cpu", _engine),
    Figure(
        "tokens/s over HTTP", "server", "the engine called directly", "server_overhead", _server
    ),
    Figure(
        "99th percentile of a stream's gaps beside a long prompt, with a target",
        *("server", "the same engine without a target", "stream_gaps"),
        _gaps,
    ),
    Figure(
        "metadata of a decode or prefill step, in a graph",
        *("step_metadata", "122 chains of operators, as before FastDeploy #7367", "step_metadata"),
        _of("122 chains"),
    ),
    Figure(
        "norms, RoPE, quantisation and both cache writes",
        *("cache_write", "vLLM's two writes alone", "cache_write"),
        _of("vLLM's two writes"),
    ),
    Figure(
        *("query of the indexer", "indexer", "vLLM's kernel", "indexer_query"),
        _of("vLLM's kernel"),
    ),
    Figure(
        *("indexer logits, prompts", "indexer_logits", "DeepGEMM", "indexer_logits"),
        _of("DeepGEMM", chosen=_prompt),
    ),
    Figure(
        *("indexer logits, decode, 1 to 4 tokens a row", "indexer_logits", "DeepGEMM"),
        "indexer_logits",
        _of("DeepGEMM", chosen=lambda case: not _prompt(case)),
    ),
    Figure("top-k", "topk", "the fastest exact kernel of FlashInfer, vLLM, torch", "topk", _exact),
    *(
        Figure(f"sparse MLA, {name}", "sparse_mla", "the faster FlashMLA", "sparse_mla", ratios)
        for name, ratios in (
            ("decode, 8 to 32 heads", _mla("decode", 8, 16, 32)),
            ("decode, 64 and 128 heads", _mla("decode", 64, 128)),
            ("prompts over bfloat16, 8 to 128 heads", _mla("prefill bf16", 8, 16, 32, 64, 128)),
            ("prompts over FP8, 8 to 32 heads", _mla("prefill FP8", 8, 16, 32)),
            ("prompts over FP8, 64 and 128 heads", _mla("prefill FP8", 64, 128)),
        )
    ),
    Figure(
        "decode step of 61 layers, in a graph",
        *("layer_stack", "the fastest kernels of the peers", "layer_stack"),
        _of("peers", chosen=lambda case: case["kind"] == "graph"),
    ),
    Figure(
        "host time of a decode step's index lists, DeepSeek-V4",
        *("v4_prepare", "ROCm/ATOM #728 in NumPy", "v4_prepare"),
        _v4("vectorised"),
    ),
)
# what serves where custom_ops/ is not built
TRITON_ALONE = tuple(
    Figure(f"sparse MLA, {name}", "sparse_mla", "the faster FlashMLA", "sparse_mla", ratios)
    for name, ratios in (
        ("decode, 8 to 32 heads", _mla_triton("decode", 8, 16, 32)),
        ("decode, 64 and 128 heads", _mla_triton("decode", 64, 128)),
        ("prompts over bfloat16, 8 to 32 heads", _mla_triton("prefill bf16", 8, 16, 32)),
        ("prompts over bfloat16, 64 and 128 heads", _mla_triton("prefill bf16", 64, 128)),
        ("prompts over FP8, 8 to 32 heads", _mla_triton("prefill FP8", 8, 16, 32)),
        ("prompts over FP8, 64 and 128 heads", _mla_triton("prefill FP8", 64, 128)),
    )
)
REGIONS = {"headline": FIGURES, "without_custom_ops": TRITON_ALONE}


def region(name: str, folder: Path = RESULTS) -> str:
    """A table of docs/performance.md, by the name of its marks."""
    return "\n".join(_TABLE.lines({"rows": list(_rows(REGIONS[name], folder))})) + "\n"


def _rows(figures: Iterable[Figure], folder: Path) -> Iterator[dict[str, Any]]:
    for figure in figures:
        path = folder / f"{figure.result}.json"
        if not path.exists():
            continue
        result = load(path)
        ratios = sorted(figure.ratios(result))
        if ratios and not refusal(result):
            env = result["env"]
            machine = env.get("gpu") or f"{env['cpu']}, {env['cpus']} cores"
            yield {"figure": figure, "ratios": ratios, "on": machine}


def _range(row: dict[str, Any]) -> str:
    return " to ".join(three_digits(row["ratios"][index]) for index in (0, -1))


def _slower(row: dict[str, Any]) -> str:
    ratios = row["ratios"]
    return f"{sum(ratio < 1 for ratio in ratios)} of {len(ratios)}"


_TABLE = Table(
    "rows",
    [
        ("what", lambda row: f"[{row['figure'].what}](results/{row['figure'].page}.md)"),
        ("against", lambda row: row["figure"].peer),
        ("ratio", _range),
        ("slower in", _slower),
        ("on", "{on}"),
        ("command", lambda row: f"`python -m benchmarks.{row['figure'].result}`"),
    ],
)


@dataclass(frozen=True)
class Picture:
    """A picture of a flagship: some cases, the time of every side by ours.

    Attributes:
        sides: other side in the picture -> the labels of which it shows the fastest.
        cases: names of the cases that are drawn.
    """

    sides: dict[str, Sequence[str]]
    cases: Sequence[str]


_PEERS = ("FlashInfer det", "FlashInfer", "FlashInfer cl.", "vLLM pre.", "vLLM dec.", "torch")
PICTURES = {
    "indexer_logits": Picture(
        {"DeepGEMM": ("DeepGEMM",)},
        (
            *(f"prompt, 64 heads, {x}" for x in ("2048 of 32k", "8192 of 8k", "8192 of 64k")),
            *(f"decode, 64 heads, {x}" for x in ("1 x 4k", "1 x 128k", "32 x 32k", "128 x 128k")),
            *(f"decode, 64 heads, 64 x 32k, {n} tokens" for n in (2, 3, 4)),
        ),
    ),
    "topk": Picture(
        {
            "fastest exact of the others": ("FlashInfer low", *_PEERS),
            "FlashInfer, same rule for equal scores": ("FlashInfer low",),
        },
        (
            *("1 x 4k", "1 x 32k", "1 x 128k", "32 x 32k", "32 x 128k", "128 x 64k"),
            *("2048 x 8k", "2048 x 32k", "4096 x 64k"),
        ),
    ),
    "sparse_mla": Picture(
        {x: (x,) for x in FLASH_MLA},
        (
            *(f"decode, {heads} heads, batch 32" for heads in (8, 16, 32, 64, 128)),
            *(f"prefill, {heads} heads, 8 k, bf16" for heads in (16, 128)),
            *(f"prefill, {heads} heads, 8 k, FP8" for heads in (16, 128)),
        ),
    ),
    "layer_stack": Picture(
        {"peers": ("peers",), "A": ("A",), "B": ("B",)},
        tuple(
            f"{heads} heads, {size}, graph"
            for heads in (16, 128)
            for size in ("1 x 4k", "32 x 4k", "32 x 32k", "128 x 128k")
        ),
    ),
}
PICTURED = ("engine_cpu", *PICTURES)


def drawn(name: str, result: Result) -> list[dict[str, Any]]:
    """What a flagship's picture shows, a group a case: relative times and their labels."""
    if name == "engine_cpu":
        return [_engine_group(case) for case in result["cases"]]
    picture = PICTURES[name]
    by_name = {case["case"]: case for case in result["cases"]}
    return [_group(picture, by_name[name]) for name in picture.cases if name in by_name]


def _group(picture: Picture, case: Case) -> dict[str, Any]:
    times = {label: time["p50"] for label, time in case["times"].items()}
    us = {OURS: times[case["ours"]]}
    for side, labels in picture.sides.items():
        own = [times[label] for label in labels if label in times]
        if own:
            us[side] = min(own)
    return {
        "case": case["case"],
        "relative": {side: x / us[OURS] for side, x in us.items()},
        "text": {side: f"{three_digits(x)} us" for side, x in us.items()},
    }


def _engine_group(case: Case) -> dict[str, Any]:
    sides = {OURS: case["candidate"], "Hugging Face": case["baseline"]}
    rate = {name: side["tokens_per_s"] for name, side in sides.items()}
    return {
        "case": "{requests} x {prompt_tokens} + {new_tokens} tokens".format_map(case["case"]),
        "relative": dict(zip(sides, (1, case["ratio_p50"]), strict=True)),
        "text": {name: f"{three_digits(x)} tokens/s" for name, x in rate.items()},
    }
