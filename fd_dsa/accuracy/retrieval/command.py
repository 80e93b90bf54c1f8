"""The command: flags, plan, run, report."""

from __future__ import annotations

import argparse
import asyncio
import hashlib
from contextlib import aclosing
from pathlib import Path
from typing import Any

from fd_dsa.accuracy import plots, report
from fd_dsa.accuracy.answers import Run
from fd_dsa.accuracy.client import ChatClient
from fd_dsa.accuracy.retrieval.haystack import sentences
from fd_dsa.accuracy.retrieval.plan import (
    CONTINUITY_DEPTHS,
    CONTINUITY_TASKS,
    DEFAULT_DEPTHS,
    DEFAULT_TASKS,
    Limits,
    Plan,
    continuity_lengths,
    default_lengths,
    parse_depths,
    parse_lengths,
    parse_tasks,
)
from fd_dsa.accuracy.retrieval.prompts import PromptBuilder
from fd_dsa.accuracy.retrieval.report import Results, files, parts
from fd_dsa.accuracy.retrieval.scoring import score_record
from fd_dsa.accuracy.retrieval.tasks import TASKS, TaskSizes, check_sizes
from fd_dsa.accuracy.retrieval.tokens import TokenCounter, check_lengths
from fd_dsa.accuracy.retrieval.wordings import WORDINGS, read_wording
from fd_dsa.accuracy.run import Target, add_run_flags, connected
from fd_dsa.accuracy.types import Question
from fd_dsa.config import demo_model_path
from fd_dsa.errors import ConfigError

_MAX_TOKENS = 64
_TRIALS, _CONTINUITY_TRIALS = 5, 10
# sentences of the two prompts that show whether the server counts as we do
_PROBES = (2, 40)


def add_parser(subparsers: Any) -> None:
    """Add the parser of `retrieval`."""
    parser = subparsers.add_parser(
        "retrieval", help="passkeys, needles and variables in long contexts", allow_abbrev=False
    )
    add_run_flags(parser, out="retrieval", max_tokens=_MAX_TOKENS)
    _add_prompt_flags(parser.add_argument_group("prompts"))
    group = parser.add_argument_group("lengths")
    group.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder of the served model, at least its tokenizer (default: that of --serve)",
    )
    group.add_argument(
        "--index-topk", metavar="N", help="of the model (default: config.json beside the tokenizer)"
    )


def _add_prompt_flags(group: argparse._ArgumentGroup) -> None:
    """Flags that decide what is hidden and asked."""
    group.add_argument(
        "--tasks",
        metavar="LIST",
        help=f"of {', '.join(TASKS)} (default: {','.join(DEFAULT_TASKS)})",
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
        help="where the needle stands, 0 to 1 (default: 0,0.25,0.5,0.75,1)",
    )
    group.add_argument("--trials", metavar="N", help=f"prompts a cell (default: {_TRIALS})")
    sizes = TaskSizes()
    group.add_argument("--keys", metavar="N", default=str(sizes.keys), help="numbers with keys")
    group.add_argument("--chains", metavar="N", default=str(sizes.chains), help="of variables")
    group.add_argument(
        "--hops", metavar="N", default=str(sizes.hops), help="of a chain after its first variable"
    )
    group.add_argument(
        "--wording",
        metavar="NAME",
        default="plain",
        help=f"{' or '.join(WORDINGS)}, or a JSON file (default: plain)",
    )
    group.add_argument(
        "--continuity",
        action="store_true",
        help="the same items at lengths around index_topk: does anything break there?",
    )


def run(args: argparse.Namespace) -> int:
    """Ask, score, report; returns 0.

    Raises:
        ConfigError: a flag or the server is not right; nothing was asked.
        RemoteError: the server left a question without an answer; all answers are kept.
    """
    plots.require()
    sizes = TaskSizes(*(_number(args, name, 1) for name in ("keys", "chains", "hops")))
    wording = read_wording(args.wording)
    check_sizes(sizes, wording)
    counter = TokenCounter(_tokenizer_folder(args), _thinking(args))
    topk = counter.index_topk if args.index_topk is None else _number(args, "index_topk", 1)
    trials = _CONTINUITY_TRIALS if args.continuity else _TRIALS
    tasks = CONTINUITY_TASKS if args.continuity else DEFAULT_TASKS
    depths = CONTINUITY_DEPTHS if args.continuity else DEFAULT_DEPTHS
    known: dict[str, Any] = {
        "tasks": tasks if args.tasks is None else parse_tasks(args.tasks),
        "depths": depths if args.depths is None else parse_depths(args.depths),
        "trials": trials if args.trials is None else _number(args, "trials", 1),
        "seed": args.seed,
        "paired": args.continuity,
        "max_tokens": args.max_tokens,
        "wording": wording,
        "sizes": sizes,
    }
    # what can be told without a server is told before one is started
    builder, longest = PromptBuilder(counter), counter.max_position_embeddings
    if longest is not None:
        first = _lengths(args, Limits(topk, longest))[:1]
        list(Plan(lengths=first, **known).questions(builder))
    with connected(args) as target:
        limits = Limits(topk, _least(longest, target.info.max_model_len))
        plan = Plan(lengths=_lengths(args, limits), **known)
        questions = list(plan.questions(builder))
        _probe(target.client, counter, explicit=args.tokenizer is not None)
        collected = target.collect("retrieval", questions, _task_settings(plan, counter, topk))
        _report(target, plan, collected, topk, [question.key for question in questions])
    return 0


def _number(args: argparse.Namespace, name: str, least: int) -> int:
    """A whole number of a flag."""
    text = str(getattr(args, name))
    if not text.isascii() or not text.isdigit() or int(text) < least:
        flag = "--" + name.replace("_", "-")
        raise ConfigError(f"{flag}: got {text!r}; allowed is a whole number from {least} on")
    return int(text)


def _thinking(args: argparse.Namespace) -> bool | None:
    """What the chat template is asked."""
    return None if args.thinking is None else args.thinking == "on"


def _tokenizer_folder(args: argparse.Namespace) -> Path:
    """That of the flag, of the model that is served for the run, or the demo model's."""
    if args.tokenizer is not None:
        return Path(args.tokenizer)
    return Path(args.serve) if args.serve else demo_model_path()


def _least(*values: int | None) -> int | None:
    """The smallest of those that are known."""
    return min((value for value in values if value is not None), default=None)


def _lengths(args: argparse.Namespace, limits: Limits) -> tuple[int, ...]:
    """Lengths of the flags, or the default ones within these limits."""
    if args.lengths is not None:
        return parse_lengths(args.lengths, limits, args.max_tokens)
    if args.continuity:
        return continuity_lengths(limits, args.max_tokens)
    return default_lengths(limits, args.max_tokens)


def _probe(client: ChatClient, counter: TokenCounter, *, explicit: bool) -> None:
    """Refuse a tokenizer that nobody gave and that counts otherwise than the server.

    Two prompts are sent, a short and a longer one: another template adds the same to both.
    """
    if explicit:
        return
    texts = [" ".join(sentences()[:count]) for count in _PROBES]
    ours = {text: counter.prompt(text) for text in texts}
    theirs = asyncio.run(_count(client, texts))
    differences = {theirs[text] - ours[text] for text in texts if theirs.get(text) is not None}
    if len(differences) > 1:
        text = texts[-1]
        raise ConfigError(
            f"--tokenizer: not given, and {counter.folder} counts {ours[text]} tokens where the "
            f"server counts {theirs[text]}; give the folder of the served model's tokenizer"
        )


async def _count(client: ChatClient, texts: list[str]) -> dict[str, int]:
    """Tokens of each text as a prompt, as the server counts; a text without an answer is absent."""
    questions = [Question(text, ({"role": "user", "content": text},), 1) for text in texts]
    found = {}
    async with aclosing(client.ask(questions)) as answers:
        async for answer in answers:
            if answer.prompt_tokens is not None:
                found[answer.key] = answer.prompt_tokens
    return found


def _task_settings(plan: Plan, counter: TokenCounter, topk: int | None) -> dict[str, Any]:
    """What decides the prompts, as JSON; the tokenizer and the tales by their SHA-256."""
    tales = "\n".join(sentences()).encode()
    return {
        **plan.to_json(),
        "index_topk": topk,
        "tokenizer_sha256": _sha256((counter.folder / "tokenizer.json").read_bytes()),
        "haystack_sha256": _sha256(tales),
    }


def _sha256(data: bytes) -> str:
    """In hexadecimal."""
    return hashlib.sha256(data).hexdigest()


def _report(target: Target, plan: Plan, run: Run, topk: int | None, keys: list[str]) -> None:
    """Score, print, write."""
    scores = [score_record(run.records[key]) for key in keys]
    lengths = check_lengths((score.cell.length, score.answer.prompt_tokens) for score in scores)
    results = Results(run.settings, plan, scores, lengths, topk)
    out = Path(target.args.out)
    report.write_files(out, files(results))
    report.show([*parts(results), f"Report: {out / 'report.md'}"])
