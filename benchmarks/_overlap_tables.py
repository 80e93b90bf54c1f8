"""What docs/performance.md shows of benchmarks/results/overlap.json below its times."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks._harness import table_row, three_digits

_KINDS = ("graph", "eager", "graph, k_norm beside", "eager, k_norm beside")
_FP8 = "graph, FP8 QKV-A", "eager, FP8 QKV-A"
_MADE_BY_OTHERS = {"indexer_logits": "scores", "sparse_mla": "attention"}


def overlap_lines(result: Mapping[str, Any]) -> list[str]:
    """Lines of Markdown: what is saved and hidden at each size, and the thresholds."""
    alone = {"projections alone, us": "projections", "QKV-A alone, us": "QKV-A"}
    lines = _table(result["cases"], _KINDS, alone)
    in_fp8 = [case for case in result["cases"] if case["kind"] in _FP8]
    if in_fp8:
        alone["projections alone in FP8, us"] = "projections, FP8"
        lines += _table(in_fp8, _FP8, alone)
    # of runs in which packages of other projects could serve
    if "serving" in result:
        made = [(result["serving"].get(op, "our kernel"), of) for op, of in _MADE_BY_OTHERS.items()]
        lines += ["", f"The layer had {' and '.join(f'{who} for {of}' for who, of in made)}."]
    if "thresholds_tokens" in result:
        most = result["thresholds_tokens"]
        lines += [
            "",
            f"Up to {most['graph']} tokens in graphs, and up to {most['eager']} eager, no step "
            "lost more than 1% of the layer by its fork. By default only steps in graphs fork, in "
            f"this run up to {result['default_tokens']} tokens.",
        ]
    return lines


def _table(
    cases: Sequence[Mapping[str, Any]], kinds: Sequence[str], alone: Mapping[str, str]
) -> list[str]:
    """One row a number of tokens: parts by themselves, then what the fork saves in each kind."""
    head = ["tokens", *alone]
    for kind in kinds:
        head += [f"{kind}: saved", *(["hidden"] if kind.startswith("graph") else [])]
    lines = ["", table_row(head), "|---" * len(head) + "|"]
    for num_tokens in dict.fromkeys(case["num_tokens"] for case in cases):
        own = {c["kind"]: c for c in cases if c["num_tokens"] == num_tokens}
        parts = next(iter(own.values()))["alone_us"]
        cells = [str(num_tokens), *(three_digits(parts[name]) for name in alone.values())]
        for kind in kinds:
            case = own.get(kind)
            cells.append(f"{case['saved']:.1%}" if case else "")
            if kind.startswith("graph"):
                cells.append(f"{case['hidden']:.0%}" if case else "")
        lines.append(table_row(cells))
    return lines
