"""The prose of the tree is checked for phrases that read as translated.

The list of phrases is tests/data/phrases.txt; lines that may keep one are in phrases_allowed.txt.
"""

from __future__ import annotations

import io
import re
import subprocess
import tokenize
from collections.abc import Iterator
from pathlib import Path

TREE = Path(__file__).parents[1]
DATA = TREE / "tests" / "data"
# generated, or written by others
SKIPPED = ("benchmarks/results/", "docs/results/", "fd_dsa/demo_model/", "tests/data/")
SUFFIXES = (".py", ".md", ".cc", ".cu", ".cuh", ".h")


def phrases() -> list[tuple[re.Pattern[str], str]]:
    """What is looked for, and what to say instead."""
    lines = (DATA / "phrases.txt").read_text().splitlines()
    pairs = [re.split(r" {2,}", line, maxsplit=1) for line in lines if line[:1] not in ("", "#")]
    # complaints() also searches for the lower case of a pattern
    assert not any(re.search(r"\\[A-Z]", pattern) for pattern, _ in pairs)
    return [(re.compile(pattern, re.IGNORECASE), instead) for pattern, instead in pairs]


def allowed() -> set[str]:
    """`path: line` of every exception."""
    lines = (DATA / "phrases_allowed.txt").read_text().splitlines()
    return {line for line in lines if line[:1] not in ("", "#")}


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Numbers and texts of the lines of a file that hold prose: of Python comments and strings."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix != ".py":
        yield from enumerate(lines, start=1)
        return
    numbers = set()
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline):
        if token.type == tokenize.COMMENT or "STRING" in tokenize.tok_name[token.type]:
            numbers.update(range(token.start[0], token.end[0] + 1))
    yield from ((number, lines[number - 1]) for number in sorted(numbers))


def complaints(path: str, listed: list[tuple[re.Pattern[str], str]]) -> Iterator[tuple[str, str]]:
    """`path: line` and the complaint of each line with a listed phrase."""
    # one search leaves out nearly every file, and is fast because it need not ignore case
    any_listed = re.compile("|".join(f"(?:{pattern.pattern.lower()})" for pattern, _ in listed))
    if not any_listed.search((TREE / path).read_text(encoding="utf-8").lower()):
        return
    for number, line in prose(TREE / path):
        for pattern, instead in listed:
            match = pattern.search(line)
            if match:
                where = f"{path}: {line.strip()}"
                yield where, f"{path}:{number}: {match[0]!r}: say {instead}: {line.strip()}"


def tracked() -> list[str]:
    """Paths of the files with prose of ours."""
    names = subprocess.run(
        ["git", "ls-files"], cwd=TREE, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    return [
        n
        for n in names
        if n.endswith(SUFFIXES) and not n.startswith(SKIPPED) and n != "CHANGELOG.md"
    ]


def test_no_line_has_a_listed_phrase() -> None:
    listed, exceptions = phrases(), allowed()
    hits = [hit for path in tracked() if (TREE / path).exists() for hit in complaints(path, listed)]
    bad = [complaint for where, complaint in hits if where not in exceptions]
    assert not bad, "\n".join([f"{len(bad)} lines:", *bad])
    unused = exceptions - {where for where, _ in hits}
    assert not unused, f"exceptions that no line needs: {sorted(unused)}"


def test_phrases_are_found_in_prose_alone(tmp_path: Path) -> None:
    file = tmp_path / "some.py"
    file.write_text('"""Weights lie\non the device."""\nbehind = 1  # the row behind it\n')
    assert [number for number, _ in prose(file)] == [1, 2, 3]
    assert [number for number, _ in prose(TREE / "Makefile")][:2] == [1, 2]
    patterns = [pattern for pattern, _ in phrases()]
    assert any(p.search("the caches lie on the device") for p in patterns)
    assert not any(p.search("behind a reverse proxy") for p in patterns)
