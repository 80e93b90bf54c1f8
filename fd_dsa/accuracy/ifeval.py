"""`ifeval` asks a server the prompts and scores them, `score` scores stored answers.

Prompts, checkers, their sentence model, folder, server and model name are checked before the first
request, so that they cannot end a run later.
"""

from __future__ import annotations

import argparse
import os
import sys
from dataclasses import replace
from pathlib import Path

from fd_dsa.accuracy import scorer
from fd_dsa.accuracy.answers import read_run
from fd_dsa.accuracy.prompts import (
    MAX_TOKENS,
    read_prompts,
    read_responses,
    set_warning,
)
from fd_dsa.accuracy.run import add_run_flags, connected
from fd_dsa.accuracy.scores import (
    ANSWERS_FILE,
    RunSettings,
    Scores,
    metrics,
    parts,
    prompts_sha256,
    without_reasoning,
    write_report,
)
from fd_dsa.chat.parser import THINK_END
from fd_dsa.client.questions import Answer
from fd_dsa.command_line.parser import Parser
from fd_dsa.command_line.report import check_folder
from fd_dsa.command_line.values import number
from fd_dsa.errors import ConfigError

TASK = "ifeval"


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
    prompts = [replace(prompt, max_tokens=args.max_tokens) for prompt in read_prompts(args.prompts)]
    if args.subset is not None:
        if args.subset > len(prompts):
            raise ConfigError(f"--subset: got {args.subset}; the file has {len(prompts)} prompts")
        prompts = [prompts[i * len(prompts) // args.subset] for i in range(args.subset)]
    if not args.answers_only:
        scorer.ready(prompts)
    with connected(args) as target:
        kept = target.collect(TASK, prompts, {})
    if args.answers_only:
        sys.stdout.write(f"{len(kept.answers)} answers are in {Path(args.out) / ANSWERS_FILE}\n")
        return 0
    return _score(list(kept.answers.values()), kept.settings, Path(args.out), [])


def run_score(args: argparse.Namespace) -> int:
    path = Path(args.source)
    file = path / ANSWERS_FILE if os.path.isdir(path) else path
    out = file.parent if args.out is None else Path(args.out)
    check_folder(out)
    if file.name != ANSWERS_FILE:
        answers, notes = read_responses(file, read_prompts(args.prompts))
        settings = RunSettings(TASK, None, file.stem, None, None, None, None)
        return _score(answers, settings, out, notes)
    if args.prompts is not None:
        raise ConfigError("--prompts: only with a response file; a run keeps its prompts")
    kept = read_run(file)
    if kept.settings.task != TASK:
        raise ConfigError(f"{file}: holds a run of {kept.settings.task}; score reads ifeval")
    if not kept.answers:
        raise ConfigError(f"{file}: has no answers to score yet")
    return _score(list(kept.answers.values()), kept.settings, out, [])


def _score(answers: list[Answer], settings: RunSettings, out: Path, notes: list[str]) -> int:
    """Score, print and write, in the official order, because intervals may depend on it."""
    order = {prompt.key: place for place, prompt in enumerate(read_prompts())}
    answers.sort(key=lambda answer: (order.get(answer.key, len(order)), answer.key))
    versions = scorer.ready(answers)
    if warning := set_warning(answers):
        notes.append(f"Warning: {warning}.")
    if num_stripped := sum(THINK_END in answer.text for answer in answers):
        notes.append(f"{num_stripped} answers hold {THINK_END}; what is before it was not scored.")
    answers = [replace(answer, text=without_reasoning(answer.text)) for answer in answers]
    asked = {"prompts_sha256": prompts_sha256(answers), "scorer": versions}
    settings = replace(settings, task_settings=settings.task_settings | asked)
    scores = Scores(settings, tuple(scorer.score(answers)))
    figures = {name: metric.to_json() for name, metric in metrics(scores.prompts).items()}
    write_report(out, "IFEval", scores, parts(scores, notes), metrics=figures)
    return 0
