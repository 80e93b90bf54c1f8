"""The benchmark of messages between ranks, in a short form."""

from __future__ import annotations

import re
import subprocess
import sys

from benchmarks._harness import ROOT
from benchmarks.rank_messages import CASES


def test_both_forms_give_other_processes_the_same_tables() -> None:
    command = [sys.executable, "-m", "benchmarks.rank_messages", "--readers", "2", "--steps", "3"]
    # it compares the tables, and fails if they differ
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    sizes = [int(text.replace(",", "")) for text in re.findall(r"bytes ([\d,]+),", done.stdout)]
    # two lines a case; ratios are no whole numbers
    assert len(sizes) == 2 * len(CASES)
    assert all(whole > ours for whole, ours in zip(sizes[::2], sizes[1::2], strict=True))
