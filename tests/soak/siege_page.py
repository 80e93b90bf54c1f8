"""The results of `tests.soak.siege` as tables, in the file of each and in docs/results.

python -m tests.soak.siege_page      # writes the page docs/results/reliability.md again
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks._harness import RESULTS, ROOT, table_row, write_json
from tests.soak.siege_cases import CASES

ORDER = {name: place for place, name in enumerate(CASES)}
PAGE = ROOT / "docs/results/reliability.md"
FOLDER = RESULTS / "siege"
REGION = re.compile(r"(?<=<!-- siege: )([\w-]+)( -->\n).*?(?=<!-- end -->)", re.DOTALL)
HEAD = (
    *("requests", "answers", "/health, s", "gap, s (alone)", "memory grows by, MiB"),
    *("left after 60 s, MiB", "log grows by, KiB", "SIGTERM to the end, s"),
)


def _most(rows: Sequence[dict[str, Any]], name: str, digits: int) -> str:
    """The worst of the repeats; one without a figure is the worst."""
    values = [row[name] for row in rows]
    return "none" if None in values else f"{max(values):.{digits}f}"


def _row(case: str, rows: Sequence[dict[str, Any]]) -> str:
    """One kind of request."""
    answers: Counter[str] = Counter()
    for row in rows:
        answers.update(row["answers"])
    told = ", ".join(f"{status}: {count}" for status, count in sorted(answers.items()))
    gap = f"{_most(rows, 'gap_s', 2)} ({_most(rows, 'alone_s', 2)})"
    grown = [_most(rows, name, 0) for name in ("growth_mib", "left_mib", "log_kib")]
    health, drain = _most(rows, "health_s", 2), _most(rows, "drain_s", 1)
    return table_row([case, told, health, gap, *grown, drain])


def lines_of(rows: Sequence[dict[str, Any]]) -> list[str]:
    """A table of records, a line for each kind, the worst of its repeats."""
    cases = list(dict.fromkeys(row["case"] for row in rows))
    body = [_row(case, [row for row in rows if row["case"] == case]) for case in cases]
    return [table_row(HEAD), table_row(["---"] * len(HEAD)), *body]


def table(result: dict[str, Any]) -> str:
    """Markdown of a result."""
    env = result["env"]
    times = f"the worst of {result['repeats']}" if result["repeats"] > 1 else "once"
    where = (
        f"{env['cpu']}, {env['cpus']} processors; Python {env['python']}, paddlepaddle "
        f"{env['paddlepaddle']}; commit {env['commit'][:12]}; {times}."
    )
    return "\n".join([where, "", *lines_of(result["rows"])]) + "\n"


def results() -> Iterator[tuple[str, dict[str, Any]]]:
    """Names and contents of the committed results."""
    for path in sorted(FOLDER.glob("*.json")):
        yield path.stem, json.loads(path.read_text())


def filled(page: str) -> str:
    """The page with the tables of the committed results."""
    tables = {name: table(result) for name, result in results()}

    def region(found: re.Match[str]) -> str:
        return found[1] + found[2] + tables.get(found[1], "Not measured yet.\n")

    return REGION.sub(region, page)


def save(name: str, result: dict[str, Any]) -> None:
    """Keep a result by its name, and write the page again.

    Other kinds of an earlier result by that name stay where nothing else differs.
    """
    FOLDER.mkdir(parents=True, exist_ok=True)
    path, result = FOLDER / f"{name}.json", {"name": name} | result
    earlier = json.loads(path.read_text()) if path.exists() else {}
    if all(earlier.get(key) == value for key, value in result.items() if key != "rows"):
        cases = {row["case"] for row in result["rows"]}
        others = [row for row in earlier["rows"] if row["case"] not in cases]
        result["rows"] = sorted(others + result["rows"], key=lambda row: ORDER[row["case"]])
    write_json(path, result)
    main()


def main() -> None:
    """Write the page again."""
    PAGE.write_text(filled(PAGE.read_text("utf-8")), "utf-8")


if __name__ == "__main__":
    main()
