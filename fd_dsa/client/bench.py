"""`fd-dsa bench`: sends random prompts to a server and measures its latencies."""

from __future__ import annotations

import argparse
import asyncio
import math
import platform
import sys
import time
from dataclasses import asdict
from typing import Any

import numpy as np

from fd_dsa import __version__
from fd_dsa.client import bench_flags
from fd_dsa.client.load import MAX_RETRIES, Sender
from fd_dsa.client.own_server import add_server_flags, check_passed, server_at
from fd_dsa.client.remote import ServerInfo, examine_server, shown_url
from fd_dsa.client.timing import Timing, measure, summarise, tables
from fd_dsa.command_line.failures import reports_failures
from fd_dsa.command_line.outputs import result_file, write_result
from fd_dsa.command_line.parser import Parser, split_flags
from fd_dsa.command_line.report import as_json, show
from fd_dsa.command_line.values import add_numbers, check_prompt_tokens, number, reader
from fd_dsa.commands import own_command
from fd_dsa.errors import ConfigError, RemoteError, flag_error, renaming

_WARM_UP = 2
# each request has a task of the event loop
_MAX_PROMPTS = 1_000_000
# seconds of a week
_MAX_DURATION_S = 604_800
# ids that every vocabulary has, and with few special tokens among them
_LOWEST_ID, _HIGHEST_ID = 100, 1000


def build_parser() -> Parser:
    parser = Parser(
        prog=own_command("bench"),
        usage="%(prog)s [flags] [-- flags of the server that is started]",
        description="Measure an OpenAI-compatible server with random prompts of equal length.",
    )
    add_server_flags(parser)
    add_numbers(
        parser,
        ("--num-prompts", int, 1, 64, "requests"),
        ("--random-input-len", int, 1, 256, "tokens of each prompt"),
        ("--random-output-len", int, 1, 64, "tokens of each answer"),
        ("--retries", int, 0, 3, "per request"),
        ("--seed", int, 0, 0, "seed for prompts and intervals"),
        maxima={"--retries": MAX_RETRIES},
    )
    parser.add_argument(
        "--request-rate",
        metavar="R",
        type=reader(float, "a number above 0, or inf", lambda rate: rate > 0),
        default=math.inf,
        help="requests a second, at random intervals (default: inf, all at once)",
    )
    parser.add_argument(
        "--max-concurrency",
        metavar="N",
        type=number(int, 1),
        help="requests in flight (default: no limit)",
    )
    parser.add_argument("--output", metavar="FILE", help="write all figures as JSON")
    bench_flags.add_flags(parser)
    return parser


def parse_args(arguments: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Read the flags of the command, in which those of other benchmarks have been replaced.

    Returns:
        The flags, and the flags of the server that is started. The first also have `not_needed`,
        the reasons of removed flags, and `address_flags`, the names of those that chose the server.

    Raises:
        ConfigError: a flag has a wrong value, is unknown, or would change the figures.
    """
    own, passed = split_flags(arguments)
    own, not_needed = bench_flags.translate(own)
    args = build_parser().parse_args(own)
    total = args.num_prompts * args.random_input_len
    check_prompt_tokens("--num-prompts and --random-input-len", total)
    total = args.num_prompts * args.random_output_len
    check_prompt_tokens("--num-prompts and --random-output-len", total, "answers")
    if args.num_prompts > _MAX_PROMPTS:
        raise flag_error("num_prompts", args.num_prompts, f"at most {_MAX_PROMPTS}")
    duration_s = (args.num_prompts - 1) / args.request_rate
    if duration_s > _MAX_DURATION_S:
        raise ConfigError(
            f"--num-prompts and --request-rate: {args.num_prompts} requests at "
            f"{args.request_rate} a second start within {duration_s:g} s, allowed: at most "
            f"{_MAX_DURATION_S} s, a week"
        )
    running = bench_flags.running_server(args)
    if running is not None and args.serve is not None:
        raise ConfigError("--serve: got it with --host, --port or --backend; leave one of them out")
    check_passed(running or args.base_url, passed)
    if args.base_url is not None:
        named = {"--host": args.host, "--port": args.port}
        not_needed |= {flag: "--base-url has it" for flag, value in named.items() if value}
    args.address_flags = bench_flags.address_flags(args)
    args.base_url = running or args.base_url
    args.output = bench_flags.result_file(args) or args.output
    args.not_needed = not_needed
    return args, passed


@reports_failures
def main(arguments: list[str]) -> int:
    """Run a benchmark.

    Returns:
        Exit status: 0 if every request was answered, 1 if some failed or the server went away, 2 if
            it cannot begin.
    """
    args, passed = parse_args(arguments)
    for flag, reason in args.not_needed.items():
        sys.stderr.write(f"{flag} is not needed here: {reason}\n")
    # check before the measurement, which may take an hour
    if args.output is not None:
        args.output = result_file("--output", args.output)
    with server_at(args.base_url, args.serve, passed, "--serve") as base_url:
        with renaming({"--base-url": args.address_flags}):
            info = examine_server(base_url, args.served_model_name or args.model)
        total = args.random_input_len + args.random_output_len
        if info.max_model_len is not None and total > info.max_model_len:
            raise ConfigError(
                f"--random-input-len and --random-output-len: got {total} together, the server's "
                f"max_model_len is {info.max_model_len}"
            )
        timings, duration_s = asyncio.run(_measure(args, base_url, info.model))
    return _report(args, info, timings, duration_s)


async def _measure(
    args: argparse.Namespace, base_url: str, model: str
) -> tuple[list[Timing], float]:
    sender = Sender(base_url, concurrency=args.max_concurrency, retries=args.retries)
    # another seed, so that the server has not cached the measured prompts
    warm_up = random_prompts(_WARM_UP, args.random_input_len, args.seed + 1)
    length = args.random_output_len
    warmed, _ = await measure(sender, model, warm_up, [0.0] * _WARM_UP, length)
    for timing in warmed:
        if timing.error is not None:
            raise RemoteError(f"{shown_url(base_url)} does not answer: {timing.error}")
    prompts = random_prompts(args.num_prompts, args.random_input_len, args.seed)
    starts = start_times(args.num_prompts, args.request_rate, args.seed)
    return await measure(sender, model, prompts, starts, length)


def random_prompts(num_prompts: int, length: int, seed: int) -> list[list[int]]:
    """Return the token ids of `num_prompts` prompts with `length` random tokens each.

    Token ids have the same length for every tokenizer. No two prompts share a prefix, so a prefix
    cache has no effect.
    """
    generator = np.random.default_rng(seed)
    drawn = generator.integers(_LOWEST_ID, _HIGHEST_ID, (num_prompts, length))
    return [[int(token) for token in row] for row in drawn]


def start_times(num_prompts: int, request_rate: float, seed: int) -> list[float]:
    """Return the start time of each request, seconds after the beginning.

    Args:
        request_rate: mean rate of a Poisson process, requests per second. Infinity = all at once.
    """
    if math.isinf(request_rate):
        return [0.0] * num_prompts
    generator = np.random.default_rng(seed)
    gaps = generator.exponential(1 / request_rate, num_prompts)
    gaps[0] = 0.0
    return [float(at) for at in np.cumsum(gaps)]


def _report(
    args: argparse.Namespace, info: ServerInfo, timings: list[Timing], duration_s: float
) -> int:
    result = summarise(timings, duration_s)
    names = ("num_prompts", "random_input_len", "random_output_len", "max_concurrency", "retries")
    settings = {name: getattr(args, name) for name in (*names, "seed")}
    settings["request_rate"] = None if math.isinf(args.request_rate) else args.request_rate
    show(tables(result))
    for reason in sorted({timing.error for timing in timings if timing.error is not None}):
        sys.stderr.write(f"failed: {reason}\n")
    if args.output is not None:
        report: dict[str, Any] = {
            "date": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
            "model": info.model,
            "settings": settings,
            "server": info.facts,
            "client": {
                "fd_dsa": __version__,
                "python": platform.python_version(),
                "machine": platform.platform(),
            },
            "result": result,
            "requests": [asdict(timing) for timing in timings],
        }
        write_result("--output", args.output, as_json(report))
        if args.save_result:
            sys.stderr.write(f"the figures are in {args.output}\n")
    return 0 if result["failed"] == 0 else 1
