"""The result as a page of Markdown, to be pasted into an issue."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from benchmarks._harness import table_row
from tools.fastdeploy_check.servers import OURS

_VERSIONS = {
    "fd_dsa": "fd_dsa",
    "commit": "commit",
    "fastdeploy": "FastDeploy",
    "paddlepaddle-gpu": "paddlepaddle-gpu",
    "paddlepaddle": "paddlepaddle",
    "numpy": "NumPy",
    "triton": "Triton",
    "python": "Python",
    "os": "system",
    "driver": "NVIDIA driver",
    "gpus": "GPUs",
    "cpu": "processor",
    "date": "date",
}


def as_markdown(result: Mapping[str, Any], names: Sequence[str]) -> str:
    """Return the page.

    Args:
        result: what goes into the JSON file, whole or as far as it has come.
        names: the checks that were asked for, in their order.
    """
    env = result["env"]
    env = env | {"commit": f"{env['commit']}{' with changes' if env['dirty'] else ''}"}
    paths = [
        (
            name,
            " ".join(f"{key}={value}" for key, value in one["variables"].items()),
            one["error"] or ("fd_dsa" if one.get("live") else "FastDeploy's own"),
            one.get("why", ""),
        )
        for name, one in env["paths"].items()
    ]
    tree = [(one["name"], one["reason"] or "ok") for one in env["paths"][OURS].get("checks", [])]
    lines = [
        f"# fastdeploy_check: {'all passed' if result['passed'] else 'NOT passed'}",
        "",
        f"`{env['command']}`",
        "",
        *_table(("what", "is"), ((title, env[key] or "none") for key, title in _VERSIONS.items())),
        *_section("Which path serves"),
        *_table(("started for", "with", "which serves", "why"), paths),
        *_section("What the plug-in looks for"),
        *_table(("check", "result"), tree),
    ]
    for name in names:
        found = result.get(name, {"passed": False, "error": "not run"})
        lines += _section(f"{name}: {'passed' if found['passed'] else 'NOT passed'}")
        lines += body(name, found)
    said = result.get("log", {})
    lines += _section("What fd_dsa logged in its server")
    lines += _table(("line", "times"), ((f"`{line}`", n) for line, n in said.items()))
    return "\n".join(lines) + "\n"


def body(name: str, found: Mapping[str, Any]) -> list[str]:
    """Return the lines of a check: a table, or the reason without one."""
    if "error" in found:
        return [found["error"]]
    if name == "smoke":
        return _table(
            ("asked for", "answer"), [(key, found[key]) for key in ("completion", "chat")]
        )
    if name == "parity":
        rows = [
            (n, c["same"], c["tokens"], c["gap"] or 0, "ok" if c["passed"] else "DIFFERENT")
            for n, c in enumerate(found["cases"], 1)
        ]
        return _table(("case", "same tokens", "of", "gap", "result"), rows)
    rows = []
    for entry in found["entries"]:
        ms = (f"{entry[side]['us']['p50'] / 1e3:.2f}" for side in ("baseline", "candidate"))
        rows.append((entry["case"]["batch"], *ms, f"{entry['ratio_p50']:.3f}"))
    return _table(("requests", "FastDeploy, ms", "fd_dsa, ms", "ratio"), rows)


def _section(title: str) -> list[str]:
    return ["", f"## {title}", ""]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """Format a table, or a line of words without rows."""
    body = [table_row([_cell(cell) for cell in row]) for row in rows]
    return [table_row(head), table_row(["---"] * len(head)), *body] if body else ["Nothing."]


def _cell(value: Any) -> str:
    """Return a value that cannot break its row."""
    return " ".join(str(value).split()).replace("|", "\\|")
