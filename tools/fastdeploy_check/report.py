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
    """The page.

    Args:
        result: what goes into the JSON file, whole or as far as it has come.
        names: the checks that were asked for, in their order.
    """
    env = result["env"]
    env = env | {"commit": f"{env['commit']}{' with changes' if env['dirty'] else ''}"}
    lines = [
        f"# fastdeploy_check: {'all passed' if result['passed'] else 'NOT passed'}",
        "",
        f"`{env['command']}`",
        "",
        *_table(("what", "is"), ((title, env[key] or "none") for key, title in _VERSIONS.items())),
        *_section("Which path serves"),
        *_table(("started for", "which serves", "why"), _paths(env["paths"])),
        *_section("What the plug-in looks for"),
        *_table(("check", "result"), _tree(env["paths"])),
    ]
    for name in names:
        found = result.get(name, {"passed": False, "error": "not run"})
        lines += _section(f"{name}: {'passed' if found['passed'] else 'NOT passed'}")
        # what a failed check has found before goes with it
        lines += [found["error"]] if "error" in found else _BODY[name](found)
    said = result.get("log", {})
    lines += _section("What fd_dsa logged in its server")
    lines += _table(("line", "times"), ((f"`{line}`", n) for line, n in said.items()))
    return "\n".join(lines) + "\n"


def _section(title: str) -> list[str]:
    return ["", f"## {title}", ""]


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> list[str]:
    """A table; one line of words where it has no rows."""
    body = [table_row([_cell(cell) for cell in row]) for row in rows]
    return [table_row(head), table_row(["---"] * len(head)), *body] if body else ["Nothing."]


def _cell(value: Any) -> str:
    """A value that cannot break its row."""
    return " ".join(str(value).split()).replace("|", "\\|")


def _paths(paths: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    for name, found in paths.items():
        serves = "fd_dsa" if found.get("live") else "FastDeploy's own"
        yield name, found["error"] or serves, found.get("why", "")


def _tree(paths: Mapping[str, Any]) -> Iterable[Sequence[Any]]:
    for check in paths[OURS].get("checks", []):
        yield check["name"], check["reason"] or "ok"


def _smoke(found: Mapping[str, Any]) -> list[str]:
    return _table(("asked for", "answer"), [(key, found[key]) for key in ("completion", "chat")])


def _parity(found: Mapping[str, Any]) -> list[str]:
    head = ("case", "same tokens", "of", "gap", "result")
    cases = enumerate(found["cases"], 1)
    return _table(
        head,
        (
            (number, one["same"], one["tokens"], one["gap"] or 0, _mark(one["passed"]))
            for number, one in cases
        ),
    )


def _mark(passed: bool) -> str:
    return "ok" if passed else "DIFFERENT"


def _step_time(found: Mapping[str, Any]) -> list[str]:
    head = ("requests", "FastDeploy, ms", "fd_dsa, ms", "ratio")
    rows = []
    for one in found["entries"]:
        theirs, ours = (one[side]["us"]["p50"] / 1e3 for side in ("baseline", "candidate"))
        row = (one["case"]["batch"], f"{theirs:.2f}", f"{ours:.2f}", f"{one['ratio_p50']:.3f}")
        rows.append(row)
    return _table(head, rows)


_BODY = {"smoke": _smoke, "parity": _parity, "step_time": _step_time}
