"""`fd-dsa run-batch`: answers the requests of an OpenAI batch file.

Source of both formats: OpenAI's Batch API. Source of the flags: vLLM's `run-batch`.
"""

from __future__ import annotations

import argparse
import asyncio
import io
import json
import os
import sys
import uuid
from collections.abc import Callable, Mapping, Sequence
from contextlib import aclosing, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import httpx
import orjson
from rich.progress import Progress

from fd_dsa.client.load import MAX_RETRIES, FailedAttempt, Request, Sender, TimedRequest
from fd_dsa.client.own_server import check_passed, server_at
from fd_dsa.client.remote import examine_server, incomplete
from fd_dsa.command_line.failures import reports_failures
from fd_dsa.command_line.inputs import MAX_BYTES, read_bounded
from fd_dsa.command_line.outputs import append_line, is_special, open_part, result_file
from fd_dsa.command_line.parser import Parser, split_flags
from fd_dsa.command_line.report import Terminal
from fd_dsa.command_line.values import add_numbers
from fd_dsa.commands import own_command
from fd_dsa.errors import ConfigError, shorten, system_reason, writing
from fd_dsa.signals import signal_end

MAX_REQUESTS = 50_000
"""Maximum number of requests of an input file, the same as OpenAI's."""
_URLS = ("/v1/chat/completions", "/v1/completions")


@dataclass(frozen=True)
class Item:
    """A line of the input."""

    line: int
    custom_id: str
    url: str
    body: dict[str, Any]


def build_parser() -> Parser:
    parser = Parser(
        prog=own_command("run-batch"),
        usage="%(prog)s -i FILE -o FILE [flags] [-- flags of the server that is started]",
        description="Answer the requests of an OpenAI batch file, one JSON object a line.",
    )
    parser.add_argument("-i", "--input-file", metavar="FILE", required=True, help="requests")
    parser.add_argument(
        "-o", "--output-file", metavar="FILE", required=True, help="answers, as they come"
    )
    parser.add_argument(
        "--model",
        metavar="MODEL",
        help="with --base-url the served name of requests without one, else a folder to serve "
        "(default: the demo model)",
    )
    parser.add_argument("--base-url", metavar="URL", help="server URL, e.g. http://HOST:PORT/v1")
    add_numbers(
        parser,
        ("--max-concurrency", int, 1, 64, "requests in flight"),
        ("--retries", int, 0, 3, "per request"),
        maxima={"--retries": MAX_RETRIES},
    )
    return parser


@reports_failures
def main(arguments: list[str]) -> int:
    """Answer a batch.

    Returns:
        Exit status: 0 if every request was answered, 1 if some failed or the server went away, 2 if
            it cannot begin.
    """
    own, passed = split_flags(arguments)
    args = build_parser().parse_args(own)
    check_passed(args.base_url, passed)
    items = read_batch(args.input_file)
    output = result_file("--output-file", args.output_file, args.input_file)
    if is_special(output):
        with writing("--output-file", output):
            file: IO[str] = output.open("w", encoding="ascii")
    else:
        file = open_part("--output-file", output, args.input_file)
    part = Path(file.name)
    with file:
        try:
            return _answer(args, passed, items, file, output)
        except BaseException as error:
            if part != output and not file.closed and not os.fstat(file.fileno()).st_size:
                part.unlink()
            elif isinstance(error, KeyboardInterrupt):
                line, _ = signal_end(error)
                raise type(error)(f"{line}; the answers that came are in {part}") from None
            raise


def _answer(
    args: argparse.Namespace, passed: Sequence[str], items: list[Item], file: IO[str], output: Path
) -> int:
    is_own = args.base_url is None
    with server_at(args.base_url, args.model if is_own else None, passed, "--model") as base_url:
        default = _check_models(items, base_url, None if is_own else args.model)
        failed = asyncio.run(_send(args, base_url, default, items, file))
    # renamed before it is closed, because another run may rename a file without a lock
    with writing("--output-file", output), file:
        if file.name != str(output):
            os.replace(file.name, output)
    total = len(items)
    sys.stderr.write(f"{total - failed} of {total} requests answered, see {args.output_file}\n")
    return 1 if failed else 0


def read_batch(path: str) -> list[Item]:
    """Read and check the requests of a file.

    Raises:
        ConfigError: the file is invalid. The message has the line, the field and the rule.
    """
    items: list[Item] = []
    lines: dict[str, int] = {}
    try:
        data = read_bounded(path, MAX_BYTES)
    except ConfigError as error:
        raise ConfigError(f"--input-file: {error}") from None
    except OSError as error:
        reason = system_reason(error)
        raise ConfigError(f"--input-file: {shorten(path)} cannot be read ({reason})") from error
    for number, line in enumerate(io.BytesIO(data), 1):
        if not line.strip():
            continue
        if len(items) == MAX_REQUESTS:
            raise ConfigError(f"{path}: allowed: at most {MAX_REQUESTS} requests; split it")
        item = _read_item(f"{path}: line {number}", number, line)
        first = lines.setdefault(item.custom_id, number)
        if first != number:
            raise ConfigError(
                f"{path}: line {number}: custom_id: got {shorten(item.custom_id)} again, line "
                f"{first} has it; each request needs its own"
            )
        items.append(item)
    if not items:
        raise ConfigError(f"--input-file: {path}: has no request; allowed: one or more")
    return items


def _read_item(where: str, number: int, line: bytes) -> Item:
    try:
        # orjson refuses values that cannot be sent: NaN, numbers over float64, lone surrogates
        data = orjson.loads(line.rstrip())
    except orjson.JSONDecodeError as error:
        reason = f"column {error.colno}: {error.msg}"
        raise ConfigError(f"{where}: is not valid JSON: {reason}") from None

    def field(name: str, allowed: str, is_good: Callable[[Any], object]) -> Any:
        value = data.get(name) if isinstance(data, Mapping) else None
        if not is_good(value):
            shown = repr(value)
            shown = shown if len(shown) <= 80 else f"{shown[:80]}..."
            raise ConfigError(f"{where}: {name}: got {shown}, allowed: {allowed}")
        return value

    custom_id = field("custom_id", "a text, not empty", lambda x: isinstance(x, str) and x)
    field("method", "'POST'", lambda value: value == "POST")
    url = field("url", ", ".join(_URLS), lambda value: value in _URLS)
    body = field("body", "an object", lambda value: isinstance(value, dict))
    if body.get("stream"):
        raise ConfigError(f"{where}: body.stream: got {shorten(body['stream'])}, allowed: false")
    if not isinstance(body.get("model"), str | None):
        raise ConfigError(f"{where}: body.model: got {shorten(body['model'])}, allowed: a text")
    return Item(number, custom_id, url, body)


def _check_models(items: list[Item], base_url: str, model: str | None) -> str:
    """Return the model of requests without one, and refuse unknown models."""
    default = examine_server(base_url, model).model
    known = {default, None}
    for item in items:
        name = item.body.get("model")
        try:
            if name not in known:
                known.add(examine_server(base_url, name).model)
        except ConfigError as error:
            reason = str(error).removeprefix("--model: ")
            raise ConfigError(
                f"--input-file: line {item.line}: body.model: {reason}; for a server that is "
                f"started: -- --served-model-name NAME"
            ) from None
    return default


async def _send(
    args: argparse.Namespace, base_url: str, model: str, items: list[Item], file: IO[str]
) -> int:
    """Write an answer for each request as it arrives, and return the number of failures."""
    sender = Sender(base_url, concurrency=args.max_concurrency, retries=args.retries)
    requests = [
        Request(item.url.removeprefix("/v1"), {"model": model, **item.body}) for item in items
    ]
    failed = 0
    progress = Progress(console=Terminal(stderr=True))
    # before 14.3 rich ends a disabled one with an empty line
    with progress if sys.stderr.isatty() else nullcontext():
        bar = progress.add_task("requests", total=len(items))
        async with aclosing(sender.run(requests, _read)) as results:
            async for sent in results:
                failed += sent.error is not None
                with writing("--output-file", file.name):
                    append_line(file, json.dumps(_line(items[sent.index], sent)))
                progress.advance(bar)
    return failed


async def _read(reply: httpx.Response, started: float) -> dict[str, object]:
    await reply.aread()
    try:
        body = reply.json()
    except ValueError as error:
        raise FailedAttempt("status 200 without JSON") from error
    if failure := incomplete(body):
        raise FailedAttempt(failure)
    return _response(reply, body)


def _response(reply: httpx.Response, body: object) -> dict[str, object]:
    """Return the `response` of a line of the output file."""
    request_id = reply.headers.get("x-request-id", "")
    return {"status_code": reply.status_code, "request_id": request_id, "body": body}


def _line(item: Item, sent: TimedRequest[dict[str, object]]) -> dict[str, Any]:
    response, error = sent.value, None
    if sent.reply is not None:
        try:
            body = sent.reply.json()
        except ValueError:
            body = {"error": {"message": sent.error}}
        response = _response(sent.reply, body)
    elif sent.error is not None:
        error = {"code": "no_reply", "message": sent.error}
    ids = {"id": f"batch_req_{uuid.uuid4().hex}", "custom_id": item.custom_id}
    return {**ids, "response": response, "error": error}
