"""The text files which the data generator reads, with their origins and licences.

They are not part of this repository. `Sources.load(folder)` reads them from a folder of yours and
says which file is missing and where it comes from.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from .tables import load, words


@dataclass(frozen=True)
class DataFile:
    """A text file: its name in the data folder, origin, licence, SHA-256."""

    name: str
    origin: str
    licence: str
    sha256: str


DATA_FILES = tuple(DataFile(**file) for file in load("sources").files)

# the tales from here on are not trained on: haystacks and perplexities are taken from them
HELD_OUT = "THE STORY OF THE YOUTH WHO WENT FORTH TO LEARN WHAT FEAR WAS"

# a request of this form is also a prompt of IFEval, of which nothing may be trained on
LEFT_OUT = "Rewrite the following sentence in a more formal"


@dataclass
class Sources:
    """Texts from which documents are drawn.

    Attributes:
        problems: (question, answer) of GSM8K; the answer ends with "#### number".
        instructions: (request, answer) pairs of both instruction sets.
        tales: plain English prose; sentences and words are taken from it.
        play: plain text in another style, for raw passages and haystacks.
        sentences: sentences of the tales, 30 to 220 characters.
        words: lower-case words of 4 to 10 letters that occur at least 4 times.
        common: those that occur at least 25 times (most are one token each).
    """

    problems: list[tuple[str, str]]
    instructions: list[tuple[str, str]]
    tales: str
    play: str
    sentences: list[str] = field(init=False)
    words: list[str] = field(init=False)
    common: list[str] = field(init=False)

    def __post_init__(self) -> None:
        pieces = re.split(r"(?<=[.!?])\s+", self.tales)
        self.sentences = [s.strip().replace("\n", " ") for s in pieces if 30 < len(s) < 220]
        text = self.tales + " ".join(q for q, _ in self.problems[:3000])
        counts = Counter(re.findall(r"\b[a-z]{4,10}\b", text))
        self.words = [w for w, n in counts.items() if n >= 4] or words.spare_words
        self.common = [w for w, n in counts.items() if n >= 25] or words.spare_words

    @classmethod
    def load(cls, folder: str | Path) -> Sources:
        """Read all files of DATA_FILES from a folder.

        Raises:
            FileNotFoundError: a file is missing; the message names each and where it comes from.
        """
        folder = Path(folder)
        missing = [f for f in DATA_FILES if not (folder / f.name).is_file()]
        if missing:
            lines = [f"  {f.name}: {f.origin} ({f.licence})" for f in missing]
            raise FileNotFoundError(
                f"--data: {folder} lacks {len(missing)} of {len(DATA_FILES)} files; put there\n"
                + "\n".join(lines)
            )
        gsm, ins, seed, tales, play = (
            (folder / f.name).read_text(encoding="utf-8") for f in DATA_FILES
        )
        problems = [json.loads(line) for line in gsm.splitlines() if line.strip()]
        seed_tasks = [json.loads(line) for line in seed.splitlines() if line.strip()]
        return cls(
            problems=[(p["question"], p["answer"]) for p in problems],
            instructions=_pairs(json.loads(ins), seed_tasks),
            tales=re.sub(r"[ \t]+", " ", tales.rpartition(HELD_OUT)[0] or tales),
            play=play,
        )


def _pairs(records: list[dict], tasks: list[dict]) -> list[tuple[str, str]]:
    """Return (request, answer) of the records but for those of LEFT_OUT, then of the seed tasks.

    Of the tasks, every instance that is short enough for a short row.
    """
    used = [r for r in records if not r["instruction"].startswith(LEFT_OUT)]
    found = [("\n".join(filter(None, (r["instruction"], r["input"]))), r["output"]) for r in used]
    for task in tasks:
        for instance in task["instances"]:
            request = "\n".join(filter(None, (task["instruction"], instance["input"])))
            if len(request) <= 1500 and 0 < len(instance["output"]) <= 1500:
                found.append((request, instance["output"]))
    return found


def changed_files(folder: str | Path) -> list[str]:
    """Name of the present files whose SHA-256 is not the recorded one."""
    folder = Path(folder)
    return [
        f.name
        for f in DATA_FILES
        if hashlib.sha256((folder / f.name).read_bytes()).hexdigest() != f.sha256
    ]
