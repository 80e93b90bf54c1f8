"""Check the subjects of commits: `package: Verb object`, in the imperative, 60 characters at most.

    python tools/commit_subject.py FILE     # the message in a file, as git calls a commit-msg hook
    python tools/commit_subject.py --new    # the commits that origin/main lacks, and the newest one

Merges, reverts and commits that a rebase will fold are left as git writes them.
"""

from __future__ import annotations

import argparse
import difflib
import re
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

TREE = Path(__file__).resolve().parents[1]
MAX_LENGTH = 60
BY_GIT = ("Merge ", 'Revert "', "fixup! ", "squash! ", "amend! ")
VERBS = frozenset((TREE / "tools/commit_verbs.txt").read_text("utf-8").split())
"""Verbs that a subject may begin with; a missing one is added with the commit that needs it."""


def scopes() -> set[str]:
    """Return the allowed words before the colon: packages, folders of the tree, and a few parts."""
    packages = {path.stem for path in (TREE / "fd_dsa").iterdir() if not path.name.startswith("_")}
    folders = {path.name for path in TREE.iterdir() if path.is_dir()}
    parts = {path.name for parent in ("tests", "tools") for path in (TREE / parent).iterdir()}
    return {name for name in packages | folders | parts if name.isidentifier()} | {"build", "ci"}


def problem(subject: str) -> str:
    """Return the rule that a subject breaks and what to do, or ""."""
    if subject.startswith(BY_GIT):
        return ""
    scope, colon, rest = subject.partition(": ")
    if not colon:
        return "must be `package: Verb object`; put the package and a colon first"
    if scope not in scopes():
        near = difflib.get_close_matches(scope, sorted(scopes()), n=1)
        hint = f"did you mean {near[0]!r}?" if near else "such as engine, docs, tests or tools"
        return f"{scope!r} is no package or folder of the tree; {hint}"
    verb = rest.partition(" ")[0]
    if verb not in VERBS:
        return _no_verb(verb)
    if verb == rest:
        return f"{verb!r} has no object; name what changes"
    if len(subject) > MAX_LENGTH:
        return f"has {len(subject)} characters; {MAX_LENGTH} are allowed, reasons go into the body"
    if rest.endswith((".", "!", "…")):
        return "ends with a full stop; leave it out"
    return ""


def _no_verb(word: str) -> str:
    """Return what is wrong with the first word after the colon."""
    base = word.capitalize()
    stems = [base, base[:-1], base[:-2], base[:-3], base[:-3] + "e", base[:-1] + "e"]
    stems += [base[:-3] + "y", base[:-4]] if len(base) > 4 else []
    found = [stem for stem in stems if stem in VERBS]
    if found and re.search(r"(?:ed|ing|s)$", word):
        return f"{word!r} is not in the imperative; write {found[0]!r}"
    if base in VERBS:
        return f"{word!r} must begin with a capital letter: {base!r}"
    return (
        f"{word!r} is no verb of tools/commit_verbs.txt; complete 'this commit will ...', or add "
        "the verb there"
    )


def new_subjects() -> Iterator[str]:
    """Yield the subjects of the commits that origin/main lacks, and that of the newest commit."""
    log = ["git", "log", "--format=%s"]
    known = subprocess.run(
        ["git", "rev-parse", "--verify", "--quiet", "origin/main"], cwd=TREE, capture_output=True
    )
    ranges = [["-1"], ["--no-merges", "origin/main..HEAD"]] if known.returncode == 0 else [["-1"]]
    for arguments in ranges:
        lines = subprocess.run(
            [*log, *arguments], cwd=TREE, capture_output=True, text=True, check=True
        )
        yield from lines.stdout.splitlines()


def main(argv: Sequence[str] | None = None) -> int:
    """Check one message or the new commits; returns 1 if a subject breaks a rule."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("file", nargs="?", type=Path, help="file with the message of a commit")
    what.add_argument("--new", action="store_true", help="check the commits that are new here")
    options = parser.parse_args(argv)
    if options.new:
        subjects = list(dict.fromkeys(new_subjects()))
    else:
        lines = options.file.read_text("utf-8").splitlines()
        subjects = [next((line for line in lines if line.strip() and line[0] != "#"), "")]
    bad = [(subject, why) for subject in subjects if (why := problem(subject))]
    for subject, why in bad:
        print(f"commit subject: got {subject!r}; {why}", file=sys.stderr)
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
