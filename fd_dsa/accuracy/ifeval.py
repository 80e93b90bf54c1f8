"""`ifeval` asks a server the prompts and scores them, `score` scores stored answers.

Prompts, checkers, their sentence model, folder, server and model name are checked before the first
request, so that they cannot end a run later.
"""

from __future__ import annotations

import argparse
import hashlib
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from fd_dsa.accuracy import scorer
from fd_dsa.accuracy.answers import Run, read_run
from fd_dsa.accuracy.prompts import (
    OFFICIAL,
    Prompt,
    is_response_file,
    read_prompts,
    read_responses,
    set_warning,
)
from fd_dsa.accuracy.run import add_run_flags, connected
from fd_dsa.accuracy.scores import (
    ANSWERS_FILE,
    END_OF_THOUGHT,
    RunSettings,
    Scores,
    parts,
    without_reasoning,
    write_report,
)
from fd_dsa.client.questions import Answer
from fd_dsa.command_line.parser import Parser
from fd_dsa.command_line.report import check_folder, show
from fd_dsa.command_line.values import number
from fd_dsa.errors import ConfigError

TASK = "ifeval"
MAX_TOKENS = 1280
"""Same as in lm-eval's task.

Some prompts ask for up to 1,200 words and fail with less.
"""


def fill_parser(parser: Parser) -> None:
    parser.description = (
        "Ask an OpenAI-compatible server the IFEval prompts, keep every answer, score them. The "
        "same command continues an interrupted run."
    )
    parser.usage = "%(prog)s [flags] [-- flags of the server]"
    parser.add_argument(
        "--prompts", metavar="FILE", help="JSONL of prompts (default: the official 541)"
    )
    parser.add_argument(
        "--subset",
        metavar="N",
        type=number(int, 1),
        help="N prompts only, spread evenly over the file; not comparable with the whole set",
    )
    parser.add_argument(
        "--answers-only",
        action="store_true",
        help="keep the answers and score them later, or elsewhere, by `score`",
    )
    add_run_flags(parser, out=TASK, max_tokens=MAX_TOKENS)
    parser.set_defaults(run=run)


def fill_score_parser(parser: Parser) -> None:
    parser.description = (
        "Score the answers that an IFEval run has kept, or those of an official response file, "
        'JSON lines of {"prompt": ..., "response": ...}. Asks no server.'
    )
    parser.add_argument(
        "source",
        metavar="RUN",
        help=f"folder of a run, its {ANSWERS_FILE}, or a response file, its lines in any order",
    )
    parser.add_argument(
        "--prompts", metavar="FILE", help="of a response file (default: the official 541)"
    )
    parser.add_argument(
        "--out", metavar="DIR", help="folder for scores and report (default: that of the answers)"
    )
    parser.set_defaults(run=run_score)


def run(args: argparse.Namespace) -> int:
    prompts = read_prompts(args.prompts)
    settings = _prompt_settings(args.prompts, prompts)
    if args.subset is not None:
        if args.subset > len(prompts):
            raise ConfigError(f"--subset: got {args.subset}; the file has {len(prompts)} prompts")
        prompts = [prompts[i * len(prompts) // args.subset] for i in range(args.subset)]
    settings["num_prompts"] = len(prompts)
    if not args.answers_only:
        scorer.ready(prompts)
    questions = [prompt.to_question(args.max_tokens) for prompt in prompts]
    with connected(args) as target:
        kept = target.collect(TASK, questions, settings)
    if args.answers_only:
        sys.stdout.write(f"{len(kept.answers)} answers are in {Path(args.out) / ANSWERS_FILE}\n")
        return 0
    return _score(*_answered(kept, Path(args.out)), kept.settings, Path(args.out), [])


def run_score(args: argparse.Namespace) -> int:
    path = Path(args.source)
    file = path / ANSWERS_FILE if path.is_dir() else path
    out = file.parent if args.out is None else Path(args.out)
    if is_response_file(file):
        check_folder(out)
        return _score_responses(file, args.prompts, out)
    if args.prompts is not None:
        raise ConfigError("--prompts: only with a response file; a run keeps its prompts")
    kept = read_run(file)
    if kept.settings.task != TASK:
        raise ConfigError(f"{file}: holds a run of {kept.settings.task}; score reads ifeval")
    check_folder(out)
    return _score(*_answered(kept, file), kept.settings, out, [])


def _prompt_settings(path: str | None, prompts: Sequence[Prompt]) -> dict[str, Any]:
    source = OFFICIAL if path is None else Path(path)
    return {
        "prompts": "official" if path is None else source.name,
        "prompts_sha256": hashlib.sha256(source.read_bytes()).hexdigest(),
        "prompts_in_file": len(prompts),
    }


def _answered(kept: Run, file: Path) -> tuple[list[Prompt], list[Answer]]:
    """Return a run's stored prompts, in the official order, and their answers."""
    found = []
    for key, answer in kept.answers.items():
        try:
            text, rules = answer.messages[-1]["content"], answer.metadata
            found.append(Prompt(key, text, tuple(rules["instruction_ids"]), tuple(rules["kwargs"])))
        except (LookupError, TypeError) as error:
            raise ConfigError(
                f"{file}: the answer to {key!r} lacks its prompt or its instructions"
            ) from error
    if not found:
        raise ConfigError(f"{file}: has no answers to score yet")
    official = {prompt.key: place for place, prompt in enumerate(read_prompts())}
    found.sort(key=lambda prompt: (official.get(prompt.key, len(official)), prompt.key))
    return found, [kept.answers[prompt.key] for prompt in found]


def _score_responses(file: Path, prompt_file: str | None, out: Path) -> int:
    prompts = read_prompts(prompt_file)
    texts, notes = read_responses(file, prompts)
    known = _prompt_settings(prompt_file, prompts) | {"num_prompts": len(texts)}
    settings = RunSettings(TASK, None, file.stem, None, None, None, None, task_settings=known)
    answered = [prompt for prompt in prompts if prompt.key in texts]
    answers = [Answer(prompt.key, texts[prompt.key]) for prompt in answered]
    return _score(answered, answers, settings, out, notes)


def _score(
    prompts: Sequence[Prompt],
    answers: Sequence[Answer],
    settings: RunSettings,
    out: Path,
    notes: list[str],
) -> int:
    """Score, print and write.

    The order of prompts is fixed, because intervals may depend on it.
    """
    versions = scorer.ready(prompts)
    num_stripped = sum(END_OF_THOUGHT in answer.text for answer in answers)
    answers = [replace(answer, text=without_reasoning(answer.text)) for answer in answers]
    task_settings = {**settings.task_settings, "scorer": versions}
    settings = replace(settings, task_settings=task_settings)
    scores = Scores(settings, tuple(scorer.score(prompts, answers)))
    notes += _notes(prompts, num_stripped)
    show(parts(scores, notes))
    paths = write_report(out, scores, notes)
    sys.stdout.write(f"\nwritten: {', '.join(str(path) for path in paths)}\n")
    return 0


def _notes(prompts: Sequence[Prompt], num_stripped: int) -> list[str]:
    notes = []
    if warning := set_warning(prompts):
        notes.append(f"Warning: {warning}.")
    if drawn := scorer.random_keys(prompts):
        notes.append(
            f"The grade of {', '.join(drawn)} is drawn by the checkers, with a fixed seed here; "
            "other scorers may differ there."
        )
    if num_stripped:
        notes.append(
            f"{num_stripped} answers hold {END_OF_THOUGHT}; what is before it was not scored."
        )
    return notes
