"""`python -m fd_dsa.accuracy compare`: two runs, paired, or two published lines of a table."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from fd_dsa.accuracy import plots, published, report
from fd_dsa.accuracy.comparison_report import JSON_FILE, PAGE_FILE, PICTURE_FILE, files, parts
from fd_dsa.accuracy.paired import PROMPTS, compare
from fd_dsa.accuracy.scores import read_scores
from fd_dsa.errors import ConfigError

# of the list of flips on the terminal; the files hold all
_SHOWN_FLIPS = 20
_EPILOG = """\
BEFORE and AFTER are folders of scored runs, or their scores.json. With --counts they are the
published figures of two runs: percentages or counts of the four metrics, with commas between them,
  compare --counts 86.69,91.01,89.46,93.05 87.80,91.61,90.94,93.65
in the order prompt strict, instruction strict, prompt loose, instruction loose.
"""


def add_parser(subparsers: Any) -> None:
    """Add the parser of `compare`."""
    parser = subparsers.add_parser(
        "compare",
        description="Compare two runs on the same prompts: flips, exact test, intervals, verdict.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    parser.add_argument("before", metavar="BEFORE", help="first run")
    parser.add_argument("after", metavar="AFTER", help="second run")
    parser.add_argument("--out", type=Path, metavar="DIR", help="write JSON, page and picture here")
    parser.add_argument(
        "--allow",
        action="append",
        default=[],
        metavar="FIELD",
        help=f"compare although FIELD differs; `{PROMPTS}`: on the common ones; repeatable",
    )
    parser.add_argument("--counts", action="store_true", help="figures of a table, not folders")
    parser.add_argument("--prompts", type=int, metavar="N", help="of a table's runs (541)")
    parser.add_argument("--instructions", type=int, metavar="N", help="of a table's runs (834)")


def run(args: argparse.Namespace) -> int:
    """Compare and report; 0 whatever the verdict is.

    Raises:
        ConfigError: a run cannot be read, or the two do not belong together.
    """
    if args.out is not None:
        report.check_folder(args.out)
        plots.require()
    if args.counts:
        return _run_published(args)
    for flag in ("prompts", "instructions"):
        if getattr(args, flag) is not None:
            raise ConfigError(f"--{flag}: only with --counts; runs know their own number")
    before, after = read_scores(Path(args.before)), read_scores(Path(args.after))
    found = compare(before, after, args.allow)
    names = _names(Path(args.before), Path(args.after))
    report.show(parts(found, names, _SHOWN_FLIPS))
    if args.out is not None:
        report.write_files(args.out, files(found, names))
        report.show([f"Written to {args.out}: {JSON_FILE}, {PAGE_FILE}, {PICTURE_FILE}"])
    return 0


def _run_published(args: argparse.Namespace) -> int:
    """The form for tables without results of each prompt."""
    if args.allow:
        raise ConfigError("--allow: not with --counts; a table has no settings to compare")
    prompts = 541 if args.prompts is None else args.prompts
    instructions = 834 if args.instructions is None else args.instructions
    table = published.read_table(args.before, args.after, prompts, instructions)
    report.show(published.parts(table))
    if args.out is not None:
        report.write_files(args.out, published.files(table, JSON_FILE, PAGE_FILE, PICTURE_FILE))
        report.show([f"Written to {args.out}: {JSON_FILE}, {PAGE_FILE}, {PICTURE_FILE}"])
    return 0


def _names(before: Path, after: Path) -> tuple[str, str]:
    """Names of the runs: their folders', or before and after where those are the same."""
    folders = [path if path.is_dir() else path.parent for path in (before, after)]
    names = [folder.resolve().name for folder in folders]
    return ("before", "after") if names[0] == names[1] else (names[0], names[1])
