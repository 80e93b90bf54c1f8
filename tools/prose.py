"""Check the form of the prose: phrases, docstrings of the package, sentences of the pages.

    python tools/prose.py            # fails on a listed phrase, or if a count has risen
    python tools/prose.py PATH ...   # prints every finding in these files, pages or folders
    python tools/prose.py --lower    # writes the counts that have fallen, or moved

A listed phrase is always an error. The other rules are counted, for each package and each page. A
count may only fall. tests/data has the phrases, their exceptions and the counts.
"""

from __future__ import annotations

import argparse
import ast
import io
import json
import re
import subprocess
import sys
import tokenize
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

TREE = Path(__file__).resolve().parents[1]
DATA = TREE / "tests" / "data"
LIMITS = DATA / "prose_limits.json"
PACKAGE = "fd_dsa"
# generated, or written by others
SKIPPED = ("benchmarks/results/", "fd_dsa/demo_model/", "tests/data/")
SUFFIXES = (".py", ".md", ".cc", ".cu", ".cuh", ".h")
MAX_WORDS = 25
"""Longest sentence, in words."""
_POINTS = re.compile(r"(?:What|Whether|How|Why|Which|Of|Those|That|One|Let|Have|Who)\b")
"""First words that point at a thing without naming it."""
_NEGATIVE = re.compile(r"\b(?:none|nothing|nobody|Nothing|Nobody)\b")
_WORD = re.compile(r"[\w'/-]*\w")
# the end of a sentence, in bold type too; what follows a colon is a sentence of its own
_END = re.compile(r"(?<=[.!?:])\*{0,2}\s+")
_PARTS = re.compile(r"\n\s*\n|\n(?=\s*(?:[-*] |\d+\. |\*{0,2}\w[\w, *`]*: ))|\|")
_CODE = re.compile(r"``[^`]+``|`[^`\n]+`")
Counts: TypeAlias = dict[str, dict[str, int]]
"""Group -> rule -> number of findings."""


class Finding(NamedTuple):
    """A place that breaks a rule.

    Attributes:
        group: package `fd_dsa/NAME`, or path of a page.
        rule: name of the rule.
        place: path and line.
        text: first words of the sentence or docstring.
    """

    group: str
    rule: str
    place: str
    text: str


def tracked() -> list[str]:
    """Return the paths of the files with prose of ours."""
    names = subprocess.run(
        ["git", "ls-files"], cwd=TREE, capture_output=True, text=True, check=True
    ).stdout.splitlines()
    # a file in conflict is listed once for each version
    kept = [n for n in dict.fromkeys(names) if n.endswith(SUFFIXES) and not n.startswith(SKIPPED)]
    return [name for name in kept if (TREE / name).exists()]


def phrases() -> list[tuple[re.Pattern[str], str]]:
    """Return the listed phrases, each with the words to use instead."""
    lines = (DATA / "phrases.txt").read_text("utf-8").splitlines()
    pairs = [re.split(r" {2,}", line, maxsplit=1) for line in lines if line[:1] not in ("", "#")]
    # complaints() also searches for the lower case of a pattern
    assert not any(re.search(r"\\[A-Z]", pattern) for pattern, _ in pairs)
    return [(re.compile(pattern, re.IGNORECASE), instead) for pattern, instead in pairs]


def allowed() -> set[str]:
    """Return `path: line` of every exception from the phrases."""
    lines = (DATA / "phrases_allowed.txt").read_text("utf-8").splitlines()
    return {line for line in lines if line[:1] not in ("", "#")}


def prose(path: Path) -> Iterator[tuple[int, str]]:
    """Yield number and text of each line with prose: comments and strings of Python files."""
    lines = path.read_text(encoding="utf-8").splitlines()
    if path.suffix != ".py":
        yield from enumerate(lines, start=1)
        return
    numbers: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO("\n".join(lines) + "\n").readline):
        if token.type == tokenize.COMMENT or "STRING" in tokenize.tok_name[token.type]:
            numbers.update(range(token.start[0], token.end[0] + 1))
    yield from ((number, lines[number - 1]) for number in sorted(numbers))


def complaints(path: str, listed: list[tuple[re.Pattern[str], str]]) -> Iterator[tuple[str, str]]:
    """Yield `path: line` and the complaint of each line with a listed phrase."""
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


def phrase_errors(paths: Iterable[str]) -> list[str]:
    """Return the complaints about listed phrases, and exceptions that no line needs."""
    listed, exceptions = phrases(), allowed()
    hits = [hit for path in paths for hit in complaints(path, listed)]
    unused = sorted(exceptions - {where for where, _ in hits})
    bad = [complaint for where, complaint in hits if where not in exceptions]
    return [*bad, *(f"tests/data/phrases_allowed.txt: no line needs {line!r}" for line in unused)]


def sentences(text: str) -> Iterator[str]:
    """Yield the sentences of a text, in which each list item, table cell and field has its own."""
    for part in _PARTS.split(text):
        joined = " ".join(part.split())
        yield from (found for found in _END.split(joined) if found)


def docstring_findings(path: str) -> Iterator[Finding]:
    """Yield what the docstrings of a Python file break.

    Args:
        path: file of the package, relative to the tree.
    """
    group = "/".join(path.split("/")[:2]).removesuffix(".py")
    kinds = ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef
    for node in ast.walk(ast.parse((TREE / path).read_text("utf-8"))):
        text = ast.get_docstring(node) if isinstance(node, kinds) else None
        if not text:
            continue
        head = text.partition("\n")[0]
        place = f"{path}:{getattr(node, 'lineno', 1)}"
        if _POINTS.match(head):
            yield Finding(group, "first words", place, head)
        if ";" in head:
            yield Finding(group, "semicolons", place, head)
        if len(_NEGATIVE.findall(_CODE.sub("", text))) > 1:
            yield Finding(group, "negatives", place, head)
        for sentence in sentences(_CODE.sub("X", text)):
            if len(_WORD.findall(sentence)) > MAX_WORDS:
                yield Finding(group, "long sentences", place, sentence)


def page_findings(path: str) -> Iterator[Finding]:
    """Yield what the sentences of an English page break; headings and code are left out."""
    text = (TREE / path).read_text("utf-8")
    text = re.sub(r"<!-- result: \w+ -->\n.*?<!-- end -->\n", "", text, flags=re.DOTALL)
    text = re.sub(r"<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r"(?ms)^```.*?^```$|^#.*?$", "", text)
    text = re.sub(r"!?\[([^\]]*)\]\([^)]*\)", r"\1", _CODE.sub("X", text))
    for sentence in sentences(text):
        plain = sentence.lstrip("-*( ")
        if _POINTS.match(plain):
            yield Finding(path, "first words", path, plain)
        num_words = len(_WORD.findall(plain))
        # a cell that only says "none" is a value
        if _NEGATIVE.search(plain) and num_words > 1:
            yield Finding(path, "negatives", path, plain)
        if num_words > MAX_WORDS:
            yield Finding(path, "long sentences", path, plain)


def findings(paths: Iterable[str]) -> Iterator[Finding]:
    """Yield every finding of the counted rules in some files."""
    for path in paths:
        if path.endswith(".py") and path.startswith(f"{PACKAGE}/"):
            yield from docstring_findings(path)
        elif path.endswith(".md") and not path.endswith(".zh.md"):
            yield from page_findings(path)


def counts(found: Iterable[Finding]) -> Counts:
    """Return the number of findings by group and rule, and by rule in the whole package."""
    counted: Counter[tuple[str, str]] = Counter()
    for finding in found:
        counted[finding.group, finding.rule] += 1
        if finding.group.startswith(PACKAGE):
            counted[PACKAGE, finding.rule] += 1
    groups: Counts = {}
    for (group, rule), count in sorted(counted.items()):
        groups.setdefault(group, {})[rule] = count
    return groups


def risen(now: Counts, limits: Counts) -> list[tuple[str, str]]:
    """Return group and rule of each count above its limit.

    A new page has the limit 0. Only the sums of the whole package bound a new package, because its
    files may come from others.
    """
    return [
        (group, rule)
        for group, rules in now.items()
        for rule, count in rules.items()
        if group in limits or not group.startswith(PACKAGE)
        if count > limits.get(group, {}).get(rule, 0)
    ]


def form_errors(found: Sequence[Finding]) -> list[str]:
    """Return a line for each count that has risen, followed by its places."""
    limits = json.loads(LIMITS.read_text("utf-8"))
    now = counts(found)
    lines = []
    for group, rule in risen(now, limits):
        limit = limits.get(group, {}).get(rule, 0)
        lines.append(f"{group}: {rule}: got {now[group][rule]}; may be {limit} at most:")
        places = (f for f in found if f[:2] == (group, rule))
        lines += [f"  {f.place}: {f.text[:90]}" for f in places]
    return lines


def lower(found: Sequence[Finding]) -> None:
    """Write the counts that have fallen, and those of new groups.

    Files may move between packages: if the sum of the whole package has not risen, the counts of
    its parts are written as they are.
    """
    limits = json.loads(LIMITS.read_text("utf-8")) if LIMITS.exists() else {}
    now = counts(found)
    whole = limits.get(PACKAGE, now.get(PACKAGE, {}))
    kept: Counts = {}
    for group, rules in now.items():
        for rule, count in rules.items():
            limit = limits.get(group, now[group]).get(rule, 0)
            is_moved = group.startswith(f"{PACKAGE}/") and now[PACKAGE][rule] <= whole.get(rule, 0)
            kept.setdefault(group, {})[rule] = count if is_moved else min(count, limit)
    LIMITS.write_text(json.dumps(kept, indent=1, sort_keys=True) + "\n", "utf-8")


def main(argv: Sequence[str] | None = None) -> int:
    """Run the checks; returns 1 if one fails."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("paths", nargs="*", help="files or folders whose findings are printed")
    parser.add_argument("--lower", action="store_true", help="write the counts that have fallen")
    options = parser.parse_args(argv)
    files = tracked()
    if options.paths:
        files = [file for file in files if file.startswith(tuple(options.paths))]
        found = list(findings(files))
        print(*(f"{f.place}: {f.rule}: {f.text}" for f in found), sep="\n")
        return int(bool(found))
    found = list(findings(files))
    if options.lower:
        lower(found)
    errors = phrase_errors(files) + form_errors(found)
    print(*errors, sep="\n", end="\n" if errors else "")
    return int(bool(errors))


if __name__ == "__main__":
    sys.exit(main())
