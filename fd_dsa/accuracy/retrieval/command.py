"""The `retrieval` command: flags, plan, run, report."""

from __future__ import annotations

import argparse
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

from fd_dsa.accuracy.retrieval.plan import Limits, Plan, default_lengths, parse_lengths
from fd_dsa.accuracy.retrieval.prompts import TASKS, PromptBuilder, TokenCounter
from fd_dsa.accuracy.retrieval.scoring import Results, score_answer
from fd_dsa.accuracy.run import add_run_flags, connected
from fd_dsa.accuracy.scores import Scores
from fd_dsa.command_line.parser import Parser
from fd_dsa.command_line.values import add_numbers, reader
from fd_dsa.config import demo_model_path
from fd_dsa.engine.tokenizer import Tokenizer
from fd_dsa.errors import ConfigError, flag_error
from fd_dsa.models.config_reader import FieldReader, read_json_object

_MAX_TOKENS = 64
# depths and trials of a cell: of a usual run, and around index_topk
_USUAL = (0.0, 0.25, 0.5, 0.75, 1.0), 5
_CONTINUITY = (0.0, 0.5, 1.0), 10


def fill_parser(parser: Parser) -> None:
    parser.set_defaults(run=run)
    add_run_flags(parser, out="retrieval", max_tokens=_MAX_TOKENS)
    group = parser.add_argument_group("prompts")
    group.add_argument(
        "--tasks",
        metavar="LIST",
        type=reader(_tasks, f"of {', '.join(TASKS)}"),
        default=tuple(TASKS),
        help=f"of {', '.join(TASKS)} (default: all)",
    )
    group.add_argument(
        "--lengths",
        metavar="LIST",
        help="tokens of the whole prompt; topk is index_topk, max leaves room for the answer: "
        "512,topk,topk+1,4*topk,max (default: topk/2, doubled up to max)",
    )
    group.add_argument(
        "--depths",
        metavar="LIST",
        type=reader(_depths, "numbers from 0 (start) to 1 (end)"),
        help="place of the needle, 0 to 1 (default: 0,0.25,0.5,0.75,1)",
    )
    add_numbers(
        group,
        ("--trials", int, 1, None, "prompts a cell (default: 5, with --continuity 10)"),
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


def _tasks(text: str) -> tuple[str, ...]:
    """Parse a list such as `variables,passkey` into tasks, in the order of `TASKS`."""
    return tuple(sorted(set(text.split(",")), key=list(TASKS).index))


def _depths(text: str) -> tuple[float, ...]:
    """Parse a list such as `0,0.5,1` into distinct ascending depths."""
    depths = {round(float(part), 4) for part in text.split(",")}
    if not all(0 <= depth <= 1 for depth in depths):
        raise ValueError
    return tuple(sorted(depths))


def run(args: argparse.Namespace) -> int:
    """Ask, score and report. Returns 0."""
    folder = _tokenizer_folder(args)
    counter = TokenCounter(Tokenizer.from_folder(folder), f"--tokenizer: {folder}", args.thinking)
    known_topk, longest = _known_sizes(folder)
    topk = args.index_topk or known_topk
    depths, trials = _CONTINUITY if args.continuity else _USUAL
    known: dict[str, Any] = {
        "tasks": args.tasks,
        "depths": args.depths or depths,
        "trials": args.trials or trials,
        "seed": args.seed,
        "paired": args.continuity,
        "max_tokens": args.max_tokens,
    }
    # check the plan before a server is started
    builder = PromptBuilder(counter)
    if longest is not None:
        whole = Plan(lengths=_lengths(args, Limits(topk, longest, args.max_tokens)), **known)
        list(replace(whole, lengths=whole.lengths[:1]).questions(builder))
    with connected(args) as target:
        known_lengths = [n for n in (longest, target.info.max_model_len) if n is not None]
        limits = Limits(topk, min(known_lengths, default=None), args.max_tokens)
        plan = Plan(lengths=_lengths(args, limits), **known)
        questions = list(plan.questions(builder))
        kept = target.collect("retrieval", questions, {**plan.to_json(), "index_topk": topk})
    answers = [kept.answers[question.key] for question in questions]
    scores = Scores(kept.settings, tuple(map(score_answer, answers)))
    Results(scores, plan, topk).publish(Path(args.out))
    return 0


def _tokenizer_folder(args: argparse.Namespace) -> Path:
    if args.tokenizer is None and args.base_url is not None:
        raise ConfigError(
            "--tokenizer: not given with --base-url; give the folder of the served model's "
            "tokenizer, by which prompts get their lengths"
        )
    given = args.serve if args.tokenizer is None else args.tokenizer
    folder = str(demo_model_path() if given is None else given)
    # an empty text, for example from an unset variable of a script, is not this folder
    if not folder or not os.path.isdir(folder):
        raise flag_error("tokenizer", folder, "an existing folder that holds tokenizer.json")
    return Path(folder)


def _known_sizes(folder: Path) -> tuple[int | None, int | None]:
    """Return index_topk and max_position_embeddings of a folder's config.json, None if unknown."""
    config = folder / "config.json"
    known = read_json_object(config) if config.is_file() else {}
    reader = FieldReader(known, f"--tokenizer: {config}")
    names = ("index_topk", "max_position_embeddings")
    topk, longest = (reader.integer(name, None) if name in known else None for name in names)
    return topk, longest


def _lengths(args: argparse.Namespace, limits: Limits) -> tuple[int, ...]:
    """Return the lengths of --lengths, those around index_topk, or the usual ones."""
    if args.lengths is None and not args.continuity:
        return default_lengths(limits)
    # the first length is dense for the whole answer
    far = args.max_tokens
    around = f"topk-{far},topk-2,topk-1,topk,topk+1,topk+2,topk+{far},2*topk"
    return parse_lengths(args.lengths or around, limits)
