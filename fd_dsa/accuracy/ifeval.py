"""`ifeval`: ask a server the prompts, keep its answers, score them. `score`: score kept answers.

Whatever would end a run is looked for before the first request: the prompts, the checkers and
their sentence model, the folder, the server and the model's name.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fd_dsa.accuracy import scorer
from fd_dsa.accuracy.answers import Run, read_run
from fd_dsa.accuracy.ifeval_report import show_report, write_report
from fd_dsa.accuracy.prompts import OFFICIAL, Prompt, read_prompts, set_warning
from fd_dsa.accuracy.report import check_folder
from fd_dsa.accuracy.run import add_run_flags, connected
from fd_dsa.accuracy.scores import Scores
from fd_dsa.accuracy.types import ANSWERS_FILE, Answer
from fd_dsa.errors import ConfigError

TASK = "ifeval"
MAX_TOKENS = 1280
"""As in lm-eval's task; a lower limit fails prompts that ask for up to 1,200 words."""

_OUT = "ifeval"
_END_OF_THOUGHT = "</think>"


def add_parser(subparsers: argparse._SubParsersAction[Any]) -> None:
    """Add the parsers of `ifeval` and `score`."""
    ifeval = subparsers.add_parser(
        "ifeval",
        allow_abbrev=False,
        help="ask a server the IFEval prompts and score its answers",
        description="Ask an OpenAI-compatible server the IFEval prompts, keep every answer, score "
        "them. The same command goes on with a run that was interrupted.",
        usage="%(prog)s [flags] [-- flags of python -m fd_dsa.serve]",
    )
    ifeval.add_argument(
        "--prompts", metavar="FILE", help="JSONL of prompts (default: the official 541)"
    )
    ifeval.add_argument(
        "--subset",
        metavar="N",
        type=_positive,
        help="N prompts only, spread evenly over the file; not comparable with the whole set",
    )
    ifeval.add_argument(
        "--answers-only",
        action="store_true",
        help="keep the answers and score them later, or elsewhere, by `score`",
    )
    add_run_flags(ifeval, out=_OUT, max_tokens=MAX_TOKENS)
    ifeval.set_defaults(run=run)
    score = subparsers.add_parser(
        "score",
        allow_abbrev=False,
        help="score the kept answers of an IFEval run again",
        description="Score the answers that an IFEval run has kept. Asks no server.",
    )
    score.add_argument(
        "run_folder", metavar="RUN", help=f"folder of the run, or its {ANSWERS_FILE}"
    )
    score.add_argument(
        "--out", metavar="DIR", help="folder for scores and report (default: that of the answers)"
    )
    score.set_defaults(run=run_score)


def _positive(text: str) -> int:
    """A number of prompts."""
    if not (text.isascii() and text.isdigit() and int(text)):
        raise argparse.ArgumentTypeError(f"got {text!r}; allowed is a whole number from 1 on")
    return int(text)


def run(args: argparse.Namespace) -> int:
    """The command `ifeval`; returns 0 when all answers are there and scored."""
    prompts = read_prompts(args.prompts)
    settings = _prompt_settings(args.prompts, prompts)
    if args.subset is not None:
        prompts = _spread(prompts, args.subset)
    settings["num_prompts"] = len(prompts)
    if not args.answers_only:
        scorer.ready(prompts)
    questions = [prompt.to_question(args.max_tokens) for prompt in prompts]
    with connected(args) as target:
        kept = target.collect(TASK, questions, settings)
    if args.answers_only:
        sys.stdout.write(f"{len(kept.answers)} answers are in {Path(args.out) / ANSWERS_FILE}\n")
        return 0
    return _score(kept, Path(args.out) / ANSWERS_FILE, Path(args.out))


def run_score(args: argparse.Namespace) -> int:
    """The command `score`; returns 0 when the answers are scored."""
    path = Path(args.run_folder)
    file = path / ANSWERS_FILE if path.is_dir() else path
    kept = read_run(file)
    if kept.settings.task != TASK:
        raise ConfigError(f"{file}: holds a run of {kept.settings.task}; score reads ifeval")
    out = file.parent if args.out is None else Path(args.out)
    check_folder(out)
    return _score(kept, file, out)


def _prompt_settings(path: str | None, prompts: Sequence[Prompt]) -> dict[str, Any]:
    """What tells which prompts a run asks."""
    source = OFFICIAL if path is None else Path(path)
    return {
        "prompts": "official" if path is None else source.name,
        "prompts_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "prompts_in_file": len(prompts),
    }


def _spread(prompts: list[Prompt], count: int) -> list[Prompt]:
    """`count` prompts, evenly spread over all of them."""
    if count > len(prompts):
        raise ConfigError(f"--subset: got {count}; the file has {len(prompts)} prompts")
    return [prompts[i * len(prompts) // count] for i in range(count)]


def _prompts_of(kept: Run, file: Path) -> list[Prompt]:
    """The prompts of the answers, which a run keeps beside them, in the order of their keys."""
    found = []
    for key, record in kept.records.items():
        if record.answer.error is not None:
            continue
        try:
            rules: Mapping[str, Any] = record.metadata
            text = record.messages[-1]["content"]
            found.append(Prompt(key, text, tuple(rules["instruction_ids"]), tuple(rules["kwargs"])))
        except (LookupError, TypeError) as error:
            raise ConfigError(
                f"{file}: the answer to {key!r} lacks its prompt or its instructions"
            ) from error
    if not found:
        raise ConfigError(f"{file}: holds no answer yet; there is nothing to score")
    official = {prompt.key: place for place, prompt in enumerate(read_prompts())}
    return sorted(found, key=lambda prompt: (official.get(prompt.key, len(official)), prompt.key))


def _score(kept: Run, file: Path, out: Path) -> int:
    """Score, show, write; the order of prompts, which intervals may depend on, is always one."""
    prompts = _prompts_of(kept, file)
    versions = scorer.ready(prompts)
    answers, stripped = _without_reasoning([kept.answers[prompt.key] for prompt in prompts])
    settings = replace(
        kept.settings, task_settings={**kept.settings.task_settings, "scorer": versions}
    )
    scores = Scores(settings, tuple(scorer.score(prompts, answers)))
    notes = _notes(prompts, stripped)
    show_report(scores, notes)
    paths = write_report(out, scores, notes)
    sys.stdout.write(f"\nwritten: {', '.join(str(path) for path in paths)}\n")
    return 0


def _without_reasoning(answers: Sequence[Answer]) -> tuple[list[Answer], int]:
    """The answers without what a model thinks aloud before them, and how many did."""
    stripped = [
        replace(answer, text=answer.text.rpartition(_END_OF_THOUGHT)[2].lstrip())
        if _END_OF_THOUGHT in answer.text
        else answer
        for answer in answers
    ]
    return stripped, sum(_END_OF_THOUGHT in answer.text for answer in answers)


def _notes(prompts: Sequence[Prompt], stripped: int) -> list[str]:
    """What a reader of the figures has to know."""
    notes = []
    if warning := set_warning(prompts):
        notes.append(f"Warning: {warning}.")
    if drawn := scorer.random_keys(prompts):
        notes.append(
            f"The grade of {', '.join(drawn)} is drawn by the checkers, with a fixed seed here; "
            "other scorers may differ there."
        )
    if stripped:
        notes.append(
            f"{stripped} answers hold {_END_OF_THOUGHT}; what stands before it was not scored."
        )
    return notes
