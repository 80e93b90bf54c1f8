"""The `retrieval` command: flags, plan, run, report."""

from __future__ import annotations

import argparse
import hashlib
from pathlib import Path
from typing import Any

from fd_dsa.accuracy.retrieval.plan import (
    CONTINUITY_DEPTHS,
    DEFAULT_DEPTHS,
    Limits,
    Plan,
    continuity_lengths,
    default_lengths,
    parse_depths,
    parse_lengths,
    parse_tasks,
)
from fd_dsa.accuracy.retrieval.prompts import TASKS, PromptBuilder, TokenCounter, sentences
from fd_dsa.accuracy.retrieval.scoring import Results, files, parts, score_answer
from fd_dsa.accuracy.run import add_run_flags, connected
from fd_dsa.accuracy.scores import REPORT_FILE
from fd_dsa.command_line import report
from fd_dsa.command_line.parser import Parser
from fd_dsa.command_line.values import add_numbers
from fd_dsa.config import demo_model_path
from fd_dsa.errors import ConfigError

_MAX_TOKENS, _TRIALS = 64, 5


def fill_parser(parser: Parser) -> None:
    parser.set_defaults(run=run)
    add_run_flags(parser, out="retrieval", max_tokens=_MAX_TOKENS)
    group = parser.add_argument_group("prompts")
    for flag, text in (
        ("--tasks", f"of {', '.join(TASKS)} (default: all)"),
        (
            "--lengths",
            "tokens of the whole prompt; topk is index_topk, max leaves room for the answer: "
            "512,topk,topk+1,4*topk,max (default: topk/2, doubled up to max)",
        ),
        ("--depths", "place of the needle, 0 to 1 (default: 0,0.25,0.5,0.75,1)"),
    ):
        group.add_argument(flag, metavar="LIST", help=text)
    add_numbers(
        group,
        ("--trials", int, 1, None, f"prompts a cell (default: {_TRIALS}, with --continuity 10)"),
        ("--index-topk", int, 1, None, "of the model (default: config.json beside the tokenizer)"),
    )
    group.add_argument(
        "--continuity",
        action="store_true",
        help="the same items at lengths around index_topk: does anything break there?",
    )
    group.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder of the served model, at least its tokenizer (default: that of --serve; "
        "with --base-url it must be given)",
    )


def run(args: argparse.Namespace) -> int:
    """Ask, score and report. Returns 0."""
    counter = TokenCounter(_tokenizer_folder(args), args.thinking)
    topk = args.index_topk or counter.index_topk
    depths, trials = (CONTINUITY_DEPTHS, 10) if args.continuity else (DEFAULT_DEPTHS, _TRIALS)
    known: dict[str, Any] = {
        "tasks": tuple(TASKS) if args.tasks is None else parse_tasks(args.tasks),
        "depths": depths if args.depths is None else parse_depths(args.depths),
        "trials": args.trials or trials,
        "seed": args.seed,
        "paired": args.continuity,
        "max_tokens": args.max_tokens,
    }
    # check the plan before a server is started
    builder, longest = PromptBuilder(counter), counter.max_position_embeddings
    if longest is not None:
        first = _lengths(args, Limits(topk, longest))[:1]
        list(Plan(lengths=first, **known).questions(builder))
    with connected(args) as target:
        known_lengths = [n for n in (longest, target.info.max_model_len) if n is not None]
        limits = Limits(topk, min(known_lengths, default=None))
        plan = Plan(lengths=_lengths(args, limits), **known)
        questions = list(plan.questions(builder))
        tokenizer = (counter.folder / "tokenizer.json").read_bytes()
        decisive = {
            **plan.to_json(),
            "index_topk": topk,
            "tokenizer_sha256": hashlib.sha256(tokenizer).hexdigest(),
            "haystack_sha256": hashlib.sha256("\n".join(sentences()).encode()).hexdigest(),
        }
        kept = target.collect("retrieval", questions, decisive)
    scores = [score_answer(kept.records[question.key]) for question in questions]
    results, out = Results(kept.settings, plan, scores, topk), Path(args.out)
    report.write_files(out, files(results))
    report.show([*parts(results), f"Report: {out / REPORT_FILE}"])
    return 0


def _tokenizer_folder(args: argparse.Namespace) -> Path:
    if args.tokenizer is not None:
        return Path(args.tokenizer)
    if args.base_url is not None:
        raise ConfigError(
            "--tokenizer: not given with --base-url; give the folder of the served model's "
            "tokenizer, by which prompts get their lengths"
        )
    return Path(args.serve) if args.serve else demo_model_path()


def _lengths(args: argparse.Namespace, limits: Limits) -> tuple[int, ...]:
    if args.lengths is not None:
        return parse_lengths(args.lengths, limits, args.max_tokens)
    if args.continuity:
        return continuity_lengths(limits, args.max_tokens)
    return default_lengths(limits, args.max_tokens)
