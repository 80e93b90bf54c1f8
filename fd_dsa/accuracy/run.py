"""One run of any task: reach or start the server, ask what is missing, keep every answer.

    add_run_flags(parser, out=..., max_tokens=...)
    with connected(args) as target:             server, name of the model, its facts
        run = target.collect(task, questions, task_settings)

The folder `--out` then holds `answers.jsonl`, and `server.log` where the run started its server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import math
import shlex
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fd_dsa.accuracy.answers import AnswerStore, Run, open_store
from fd_dsa.accuracy.client import ChatClient
from fd_dsa.accuracy.preflight import ServerInfo, normal_base_url
from fd_dsa.accuracy.report import check_folder
from fd_dsa.accuracy.server import OwnServer, own_server
from fd_dsa.accuracy.types import ANSWERS_FILE, Answer, Question, RunSettings
from fd_dsa.errors import ConfigError, RemoteError

OWN = "own"
"""`RunSettings.base_url` of a run that started its server."""

LOG_FILE = "server.log"


def add_run_flags(parser: argparse.ArgumentParser, *, out: str, max_tokens: int) -> None:
    """The flags that all tasks share.

    Args:
        out: default folder.
        max_tokens: default longest answer.
    """
    parser.add_argument(
        "--out", metavar="DIR", default=out, help=f"folder of the run (default: {out})"
    )
    group = parser.add_argument_group("server")
    either = group.add_mutually_exclusive_group()
    either.add_argument(
        "--base-url", metavar="URL", help="of an OpenAI-compatible server, as http://HOST:PORT/v1"
    )
    either.add_argument(
        "--serve",
        metavar="MODEL",
        nargs="?",
        const="",
        help="start python -m fd_dsa.serve on MODEL for the time of the run, on the demo model "
        "without one; flags after -- are for it (the default without --base-url)",
    )
    group.add_argument("--model", metavar="NAME", help="name to send (default: the only served)")
    group.add_argument(
        "--concurrency",
        metavar="N",
        type=_number(int, 1),
        default=32,
        help="requests in flight (default: 32)",
    )
    group.add_argument(
        "--retries",
        metavar="N",
        type=_number(int, 0),
        default=5,
        help="further attempts after a failure that may pass (default: 5)",
    )
    group.add_argument(
        "--timeout",
        metavar="S",
        type=_number(float, 0.001),
        default=600.0,
        help="longest wait for an answer, seconds (default: 600)",
    )
    group = parser.add_argument_group("generation")
    group.add_argument(
        "--max-tokens",
        metavar="N",
        type=_number(int, 1),
        default=max_tokens,
        help=f"longest answer (default: {max_tokens})",
    )
    group.add_argument(
        "--temperature",
        metavar="T",
        type=_number(float, 0),
        default=0.0,
        help="0 is greedy (default: 0)",
    )
    group.add_argument(
        "--seed", metavar="N", type=_number(int, 0), default=0, help="of every request (default: 0)"
    )
    group.add_argument(
        "--thinking",
        choices=("on", "off"),
        help="asked of the chat template (default: nothing is asked, its own default counts)",
    )


def _number(kind: type, least: float) -> Callable[[str], Any]:
    """A parser of numbers with a smallest value."""

    def parse(text: str) -> Any:
        try:
            value = kind(text)
        except ValueError:
            value = math.nan
        if not least <= value < math.inf:
            what = "a whole number" if kind is int else "a number"
            raise argparse.ArgumentTypeError(f"got {text!r}; allowed is {what} from {least:g} on")
        return value

    return parse


@dataclass(frozen=True)
class Target:
    """A server that is ready to be asked.

    Attributes:
        args: the parsed flags of `add_run_flags`, and what the command line adds to them.
        client: for it; its model is known.
        info: what the server says of itself.
        own: the server, where the run started it.
    """

    args: argparse.Namespace
    client: ChatClient
    info: ServerInfo
    own: OwnServer | None

    def settings(self, task: str, task_settings: dict[str, Any]) -> RunSettings:
        """Everything that decides the answers."""
        args, facts = self.args, dict(self.info.facts)
        if self.own is not None:
            facts["command"] = list(self.own.command)
        thinking = None if args.thinking is None else args.thinking == "on"
        return RunSettings(
            task=task,
            base_url=self.client.base_url if self.own is None else OWN,
            model=self.info.model,
            temperature=args.temperature,
            max_tokens=args.max_tokens,
            seed=args.seed,
            concurrency=args.concurrency,
            thinking=thinking,
            server=facts,
            task_settings=task_settings,
        )

    def collect(
        self, task: str, questions: Sequence[Question], task_settings: dict[str, Any]
    ) -> Run:
        """Ask what has no answer yet and keep every answer; the run with all of them.

        Args:
            task: as `RunSettings.task`.
            questions: all of the run, each key once.
            task_settings: as in `RunSettings`; with other ones the run is not resumed.

        Raises:
            ValueError: a key is there twice.
            ConfigError: the folder holds another run; nothing was asked.
            RemoteError: the server went away, or left a question without an answer.
            KeyboardInterrupt: Ctrl-C or SIGTERM. Like the error above it says how many answers are
                kept, and the command that asks the others.
        """
        if len({question.key for question in questions}) != len(questions):
            raise ValueError(f"{task}: a key of its questions is there twice")
        path = Path(self.args.out) / ANSWERS_FILE
        with open_store(path, self.settings(task, task_settings)) as store:
            missing = store.missing(questions)
            failure = None
            try:
                interrupted = asyncio.run(self._ask(task, missing, len(questions), store))
            except RemoteError as error:
                interrupted, failure = False, str(error)
            left = store.missing(questions)
        if not left:
            return store.run
        command = shlex.join(["python", "-m", "fd_dsa.accuracy", *self.args.arguments])
        kept = (
            f"{len(questions) - len(left)} of {len(questions)} answers are kept in {path}; "
            f"the same command asks the others: {command}"
        )
        if interrupted:
            raise KeyboardInterrupt(f"interrupted; {kept}")
        if failure is None:
            failure = f"{left[-1].key}: {store.run.failures[left[-1].key].error}"
        log = f" (its log: {self.own.log})" if self.own is not None else ""
        raise RemoteError(f"{failure}{log}; {kept}")

    async def _ask(
        self, task: str, missing: list[Question], total: int, store: AnswerStore
    ) -> bool:
        """Ask and keep; True if a signal ended it early."""
        by_key = {question.key: question for question in missing}
        stopped = threading.Event()

        def stop() -> None:
            stopped.set()
            self.client.stop()

        with _signals_call(stop), _progress(task, total, total - len(missing)) as note:
            async with contextlib.aclosing(self.client.ask(missing)) as answers:
                async for answer in answers:
                    store.add(by_key[answer.key], answer)
                    note(answer)
        return stopped.is_set()


@contextmanager
def connected(args: argparse.Namespace) -> Iterator[Target]:
    """A server that takes questions, examined, until the block ends.

    Args:
        args: with the flags of `add_run_flags`, `passed` for a server of our own, and `arguments`,
            the command as it was given.

    Raises:
        ConfigError: flags that do not go together, a folder that cannot be written, a server that
            cannot be reached, does not start, or has no such model. Nothing was asked then.
    """
    out = Path(args.out)
    check_folder(out)
    with contextlib.ExitStack() as stack:
        own, url = None, args.base_url
        if url is None:
            with Console(stderr=True).status("starting the server"):
                server = own_server(args.serve or None, args.passed, out / LOG_FILE)
                own = stack.enter_context(server)
            url = own.base_url
        elif args.passed:
            raise ConfigError(
                f"{args.passed[0]} stands after --, where flags of the server stand that --serve "
                "starts; with --base-url none is started"
            )
        client = ChatClient(
            normal_base_url(url),
            args.model,
            temperature=args.temperature,
            seed=args.seed,
            thinking=None if args.thinking is None else args.thinking == "on",
            concurrency=args.concurrency,
            retries=args.retries,
            timeout_s=args.timeout,
        )
        info = client.preflight()
        if info.max_model_len is not None and args.max_tokens >= info.max_model_len:
            raise ConfigError(
                f"--max-tokens: got {args.max_tokens}; {info.model} takes {info.max_model_len} "
                "tokens, prompt and answer together"
            )
        yield Target(args, client, info, own)


@contextmanager
def _signals_call(stop: Callable[[], None]) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM call `stop` in the event loop; only the main thread can."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    loop, numbers = asyncio.get_running_loop(), (signal.SIGINT, signal.SIGTERM)
    for number in numbers:
        loop.add_signal_handler(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            loop.remove_signal_handler(number)


@contextmanager
def _progress(task: str, total: int, done: int) -> Iterator[Callable[[Answer], None]]:
    """A progress bar on stderr; the function counts one more answer."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[state]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    tokens = failed = 0
    with Progress(*columns, console=Console(stderr=True)) as progress:
        bar = progress.add_task(task, total=total, completed=done, state="")

        def note(answer: Answer) -> None:
            nonlocal tokens, failed
            tokens += answer.completion_tokens or 0
            failed += answer.error is not None
            elapsed = progress.tasks[bar].elapsed or 0.0
            state = f"{tokens / elapsed:.0f} tokens/s" if elapsed and tokens else ""
            if failed:
                state += f" {failed} failed"
            progress.update(bar, advance=answer.error is None, state=state)

        yield note
