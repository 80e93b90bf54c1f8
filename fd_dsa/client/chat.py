"""`fd-dsa chat`: a conversation in the terminal, with a server that runs or one that it starts."""

from __future__ import annotations

import argparse
import contextlib
import io
import sys
from collections.abc import Generator, Iterator, Sequence
from typing import Any, TextIO

import httpx

from fd_dsa.chat.events import Event
from fd_dsa.client.own_server import server_at
from fd_dsa.client.remote import (
    error_message,
    examine_server,
    http_options,
    read_event,
    transport_reason,
)
from fd_dsa.errors import RemoteError
from fd_dsa.serve.flag_values import exit_status, number, reader
from fd_dsa.serve.parser import Parser

Message = dict[str, str]
_COMMANDS = "/reset forgets the conversation, /system TEXT sets the system prompt, /exit ends"
_TIMEOUT_S = 600.0
_UTF8 = reader(lambda text: text.encode().decode(), "UTF-8")
# one conversation at a time, whose beginning is computed once
_OWN_FLAGS = ("--max-num-seqs", "1", "--enable-prefix-caching")


class Partner:
    """The model of an OpenAI-compatible server that answers.

    Args:
        base_url: as `normal_base_url` gives it.
        model: name to send; None: the only one of the server.
        fields: further fields of every request.

    Raises:
        ConfigError: the server cannot be reached or has no such model.
    """

    def __init__(self, base_url: str, model: str | None, fields: dict[str, Any]) -> None:
        self._base_url = base_url
        self.name = examine_server(base_url, model).model
        self._fields = fields

    def answer(self, messages: Sequence[Message]) -> Generator[Event, None, None]:
        """The next message of the assistant, its reasoning and its content, in pieces.

        Raises:
            RemoteError: there is none, or no more of it; says why.
        """
        body = {"model": self.name, "messages": list(messages), "stream": True, **self._fields}
        url = f"{self._base_url}/chat/completions"
        try:
            with (
                httpx.Client(**http_options(self._base_url, _TIMEOUT_S)) as http,
                http.stream("POST", url, json=body) as reply,
            ):
                if reply.status_code != 200:
                    reply.read()
                    raise RemoteError(f"status {reply.status_code}: {error_message(reply)}")
                for line in reply.iter_lines():
                    chunk = read_event(line)
                    for choice in (chunk or {}).get("choices", ()):
                        delta = choice["delta"]
                        # vLLM has a shorter name for the reasoning
                        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
                        if reasoning:
                            yield Event("reasoning", reasoning)
                        if delta.get("content"):
                            yield Event("content", delta["content"])
        except httpx.HTTPError as error:
            raise RemoteError(transport_reason(error)) from error


def build_parser() -> Parser:
    """The flags."""
    parser = Parser(
        prog="fd-dsa chat",
        description="Talk to a model, line by line; of a pipe every line is a message.",
        epilog=_COMMANDS,
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="with --base-url a served name, else a folder to serve (default: the demo model)",
    )
    parser.add_argument("--base-url", metavar="URL", help="of a server, as http://HOST:PORT/v1")
    parser.add_argument("--system", metavar="TEXT", type=_UTF8, help="system prompt")
    parser.add_argument("--temperature", metavar="T", type=number(float, 0))
    parser.add_argument("--max-tokens", metavar="N", type=number(int, 1), help="of each answer")
    parser.add_argument("--seed", metavar="N", type=number(int, 0))
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Talk until /exit or the end of the input; returns the exit status.

    Args:
        argv: arguments without the command's name.

    Returns:
        0; of a pipe 1 when a message was not answered; 2 when it cannot begin; 130 after Ctrl-C
        that no answer was there to take.
    """
    return exit_status(lambda: _main(build_parser().parse_args(argv)))


def _main(args: argparse.Namespace) -> int:
    names = ("temperature", "max_tokens", "seed")
    fields = {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    if isinstance(sys.stdin, io.TextIOWrapper):
        # a line that is no UTF-8 is refused, not the end
        sys.stdin.reconfigure(errors="surrogateescape")
    is_own = args.base_url is None
    with server_at(args.base_url, args.model, _OWN_FLAGS, "MODEL") as base_url:
        partner = Partner(base_url, None if is_own else args.model, fields)
        return Conversation(partner, args.system, is_terminal=sys.stdin.isatty()).run()


class Conversation:
    """Reads messages from stdin and writes answers to stdout.

    Args:
        partner: who answers.
        system: system prompt; None or empty: none.
        is_terminal: somebody types: prompts are shown, and a failed answer is no end.
    """

    def __init__(self, partner: Partner, system: str | None, *, is_terminal: bool) -> None:
        self._partner = partner
        self._system = system
        self._is_terminal = is_terminal
        # where a line of an answer has begun
        self._open: TextIO | None = None
        self._messages: list[Message] = []

    def run(self) -> int:
        """Talk; returns the exit status."""
        if self._is_terminal:
            with contextlib.suppress(ImportError):
                # input() then has a history and can be edited
                import readline  # noqa: F401
            sys.stderr.write(f"{self._partner.name}; {_COMMANDS}, Ctrl-C stops an answer\n")
        status = 0
        for text in self._lines():
            if text == "/exit":
                break
            if not self._take(text):
                status = 1
                if not self._is_terminal:
                    break
        return 0 if self._is_terminal else status

    def _lines(self) -> Iterator[str]:
        """Lines of the input."""
        while True:
            try:
                yield input("> " if self._is_terminal else "").strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                self._leave_line()
                raise

    def _take(self, text: str) -> bool:
        """Do what a line asks for; False where that fails."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            byte = ord(text[error.start]) & 0xFF
            where = f"byte 0x{byte:02x} as character {error.start + 1} of a line"
            sys.stderr.write(f"fd_dsa: error: stdin: got {where}, allowed is UTF-8\n")
            return False
        if text.startswith("/"):
            self._command(text)
            return True
        return not text or self._ask(text)

    def _command(self, text: str) -> None:
        """Do what a line with a slash says."""
        command, _, rest = text.partition(" ")
        if command == "/reset":
            self._messages = []
        elif command == "/system":
            self._system, self._messages = rest.strip(), []
        else:
            sys.stderr.write(f"unknown command {command!r}; {_COMMANDS}\n")

    def _ask(self, text: str) -> bool:
        """Print the answer to a message; False where it failed.

        A message that was not answered, or whose answer was stopped before its first word, is
        left out of the conversation.
        """
        system = [{"role": "system", "content": self._system}] if self._system else []
        asked = [*self._messages, {"role": "user", "content": text}]
        pieces = []
        try:
            with contextlib.closing(self._partner.answer([*system, *asked])) as answer:
                for event in answer:
                    if event.kind == "content":
                        pieces.append(event.text)
                    self._show(event)
        except RemoteError as error:
            self._end_line()
            sys.stderr.write(f"fd_dsa: error: {error}\n")
            return False
        except KeyboardInterrupt:
            if not self._is_terminal:
                raise
            if not pieces:
                self._leave_line()
                return True
        finally:
            self._end_line()
        self._messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        return True

    def _leave_line(self) -> None:
        """On a terminal, go on below the line on which Ctrl-C was typed."""
        if self._is_terminal and self._open is None:
            sys.stderr.write("\n")

    def _show(self, event: Event) -> None:
        """Print a piece of an answer: content on stdout, reasoning on stderr for who types."""
        is_content = event.kind == "content"
        if not (is_content or self._is_terminal):
            return
        stream = sys.stdout if is_content else sys.stderr
        if self._open is not stream:
            self._end_line()
            # first, so that Ctrl-C finds the line open as soon as it is seen
            self._open = stream
            stream.write("" if is_content else "[reasoning] ")
        stream.write(event.text)
        stream.flush()

    def _end_line(self) -> None:
        """End the line of what was printed last."""
        if self._open is not None:
            self._open.write("\n")
            self._open.flush()
            self._open = None
