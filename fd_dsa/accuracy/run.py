"""A run of any task: reaches the server, asks missing questions, stores answers.

The folder `--out` then holds `answers.jsonl`, and `server.log` if the run started its server.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from rich.progress import Progress

from fd_dsa.accuracy.answers import Run, open_store
from fd_dsa.accuracy.scores import ANSWERS_FILE, RunSettings, prompts_sha256
from fd_dsa.client.load import MAX_RETRIES, Sender
from fd_dsa.client.own_server import OwnServer, add_server_flags, check_passed, own_server
from fd_dsa.client.questions import Question, ask
from fd_dsa.client.remote import ServerInfo, examine_server, normal_base_url, shown_url
from fd_dsa.client.settings import ON_OR_OFF, given_settings
from fd_dsa.command_line.report import Terminal, check_folder
from fd_dsa.command_line.values import add_numbers
from fd_dsa.commands import own_command
from fd_dsa.errors import ConfigError, RemoteError
from fd_dsa.signals import signal_end

# value of RunSettings.base_url if the run started its server
OWN = "own"


def add_run_flags(parser: argparse.ArgumentParser, *, out: str, max_tokens: int) -> None:
    """Add the flags that all tasks share.

    Args:
        out, max_tokens: defaults of the flags.
    """
    text = f"folder of the run (default: {out})"
    parser.add_argument("--out", metavar="DIR", default=out, help=text)
    server = parser.add_argument_group("server")
    add_server_flags(server)
    add_numbers(
        server,
        ("--concurrency", int, 1, 32, "requests in flight"),
        ("--retries", int, 0, 5, "further attempts after a failure that may pass"),
        ("--timeout", float, 0.001, 600.0, "longest wait for an answer, seconds"),
        maxima={"--retries": MAX_RETRIES},
    )
    generation = parser.add_argument_group("generation")
    add_numbers(
        generation,
        ("--max-tokens", int, 1, max_tokens, "longest answer"),
        ("--temperature", float, 0, 0.0, "0 is greedy"),
        ("--seed", int, 0, 0, "of every request"),
    )
    generation.add_argument(
        "--thinking",
        metavar="on|off",
        type=ON_OR_OFF,
        help="mode requested from the chat template (default: the template's own)",
    )


@dataclass(frozen=True)
class ServerUnderTest:
    """A server that is ready for questions.

    Attributes:
        own: the server that the run itself started, or None.
    """

    args: argparse.Namespace
    sender: Sender
    info: ServerInfo
    own: OwnServer | None

    def settings(self, task: str, task_settings: dict[str, object]) -> RunSettings:
        """Return all settings that determine the answers."""
        args, facts, url = self.args, dict(self.info.facts), shown_url(self.sender.base_url)
        if self.own is not None:
            url, facts["command"] = OWN, list(self.own.command)
        names = ("temperature", "max_tokens", "seed", "concurrency", "thinking")
        asked = {name: getattr(args, name) for name in names}
        return RunSettings(
            task, url, self.info.model, **asked, server=facts, task_settings=task_settings
        )

    def collect(
        self, task: str, questions: Sequence[Question], task_settings: dict[str, object]
    ) -> Run:
        """Ask the questions without an answer and store every answer.

        Returns:
            The run with all answers.

        Raises:
            RemoteError: the server went away or left a question without an answer.
            KeyboardInterrupt: Ctrl-C or SIGTERM. Both messages have the number of stored answers
                and the command that continues the run.
        """
        path = Path(self.args.out) / ANSWERS_FILE
        task_settings = {**task_settings, "prompts_sha256": prompts_sha256(questions)}
        with open_store(path, self.settings(task, task_settings)) as run:
            missing = run.missing(questions)
            ended: RemoteError | KeyboardInterrupt | None = None
            try:
                asyncio.run(self._ask(task, missing, len(questions), run))
            except (RemoteError, KeyboardInterrupt) as error:
                ended = error
            left = run.missing(questions)
        if not left:
            return run
        command = own_command("accuracy", *self.args.arguments)
        kept = (
            f"{len(questions) - len(left)} of {len(questions)} answers are kept in {path}; "
            f"the same command asks the others: {command}"
        )
        if isinstance(ended, KeyboardInterrupt):
            raise type(ended)(f"{signal_end(ended)[0]}; {kept}")
        failure = ended or f"{left[-1].key}: {run.failures[left[-1].key].error}"
        log = f" (its log: {self.own.log})" if self.own is not None else ""
        raise RemoteError(f"{failure}{log}; {kept}")

    async def _ask(self, task: str, missing: list[Question], total: int, run: Run) -> None:
        by_key = {question.key: question for question in missing}
        with Progress(console=Terminal(stderr=True)) as progress:
            bar = progress.add_task(task, total=total, completed=total - len(missing))
            settings = given_settings(self.args, ("temperature", "seed", "thinking"))
            asked = ask(self.sender, self.info.model, missing, settings)
            async with contextlib.aclosing(asked) as answers:
                async for answer in answers:
                    run.add(by_key[answer.key], answer)
                    progress.advance(bar, answer.error is None)


@contextmanager
def connected(args: argparse.Namespace) -> Iterator[ServerUnderTest]:
    """Yield an examined server that accepts questions, until the block ends."""
    out = Path(args.out)
    check_folder(out)
    check_passed(args.base_url, args.passed)
    with contextlib.ExitStack() as stack:
        own, url = None, args.base_url
        if url is None:
            with Terminal(stderr=True).status("starting the server"):
                server = own_server(args.serve, args.passed, out / "server.log")
                own = stack.enter_context(server)
            url = own.base_url
        sender = Sender(normal_base_url(url), args.concurrency, args.retries, args.timeout)
        info = examine_server(sender.base_url, args.model)
        if info.max_model_len is not None and args.max_tokens >= info.max_model_len:
            raise ConfigError(
                f"--max-tokens: got {args.max_tokens}; {info.model} takes {info.max_model_len} "
                "tokens, prompt and answer together"
            )
        yield ServerUnderTest(args, sender, info, own)
