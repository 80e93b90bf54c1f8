"""`fd-dsa chat`: a conversation in the terminal with a running server or its own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import sys
import time
from collections.abc import Generator, Iterator, Sequence
from typing import Any, TextIO

import httpx

from fd_dsa.chat.events import Event
from fd_dsa.client.own_server import server_at
from fd_dsa.client.remote import (
    error_message,
    examine_server,
    http_options,
    incomplete,
    read_event,
    transport_reason,
)
from fd_dsa.client.settings import (
    NAMES,
    add_setting_flags,
    fields_of,
    given_settings,
    read_setting,
)
from fd_dsa.command_line.failures import reports_failures
from fd_dsa.command_line.parser import Parser, nearest
from fd_dsa.command_line.values import reader
from fd_dsa.commands import own_command
from fd_dsa.errors import ConfigError, RemoteError, shorten, writing

Message = dict[str, str]
_COMMANDS = {
    "/help": "list the commands",
    "/reset": "forget the conversation",
    "/system TEXT": "set the system prompt and forget the conversation",
    "/set": f"list the settings ({', '.join(NAMES)})",
    "/set NAME VALUE": "change a setting; without a value, leave it to the server",
    "/save FILE": "write the conversation to a new file, as JSON",
    "/exit": "end",
    '"""': "begin and end a message of several lines; a pasted text needs no quotes",
}
_HINT = "/help lists the commands"
_QUOTES = '"""'
_TIMEOUT_S = 600.0
_UTF8 = reader(lambda text: text.encode().decode(), "UTF-8")
_MESSAGE = reader(
    lambda text: text.encode().decode(), "a text that is not empty, in UTF-8", str.strip
)
# one conversation at a time, whose prefix is computed once
_OWN_FLAGS = ("--max-num-seqs", "1", "--enable-prefix-caching")


class ChatSession:
    """Sends messages to a model of an OpenAI-compatible server.

    Args:
        settings: fields of every request, see `fd_dsa.client.settings`. May be changed.

    Attributes:
        figures: summary line of the last answer.

    Raises:
        ConfigError: the server cannot be reached or has no such model.
    """

    def __init__(self, base_url: str, model: str | None, settings: dict[str, object]) -> None:
        self._base_url = base_url
        self.name = examine_server(base_url, model, "MODEL").model
        self.settings = settings
        self.figures = ""

    def answer(self, messages: Sequence[Message]) -> Generator[Event, None, None]:
        """Yield the pieces of the assistant's next message, its reasoning and its content.

        Raises:
            RemoteError: there is no answer, or it was cut off. The message has the reason.
        """
        body = {
            "model": self.name,
            "messages": list(messages),
            "stream": True,
            "stream_options": {"include_usage": True},
            **fields_of(self.settings),
        }
        url = f"{self._base_url}/chat/completions"
        usage: dict[str, Any] = {}
        begin, times = time.perf_counter(), []
        try:
            with (
                httpx.Client(**http_options(self._base_url, _TIMEOUT_S)) as http,
                http.stream("POST", url, json=body) as reply,
            ):
                if reply.status_code != 200:
                    reply.read()
                    raise RemoteError(f"status {reply.status_code}: {error_message(reply)}")
                for line in reply.iter_lines():
                    chunk = read_event(line) or {}
                    if failure := incomplete(chunk):
                        raise RemoteError(failure)
                    usage = chunk.get("usage") or usage
                    for choice in chunk.get("choices", ()):
                        delta = choice["delta"]
                        times.append(time.perf_counter())
                        # vLLM has a shorter name for the reasoning
                        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
                        if reasoning:
                            yield Event("reasoning", reasoning)
                        if delta.get("content"):
                            yield Event("content", delta["content"])
        except httpx.HTTPError as error:
            raise RemoteError(transport_reason(error)) from error
        finally:
            self.figures = _figures(begin, times, usage)


def _figures(begin: float, times: Sequence[float], usage: dict[str, Any]) -> str:
    """Return the summary line of an answer.

    A stopped answer has no counts from the server.

    Args:
        times: arrival time of each piece. The first piece has only the role.
    """
    if len(times) < 2:
        return ""
    # the first piece has only the role
    first, last, pieces = times[1], times[-1], len(times) - 1
    output = usage.get("completion_tokens", pieces)
    parts = [f"prompt {usage['prompt_tokens']}"] if usage else []
    parts.append(f"output {output}" if usage else f"output {pieces} or more, stopped")
    if last > first and output > 1:
        parts.append(f"{(output - 1) / (last - first):.1f} tok/s")
    return " · ".join([*parts, f"TTFT {1000 * (first - begin):.0f} ms"])


def build_parser() -> Parser:
    parser = Parser(
        prog=own_command("chat"),
        description="Talk to a model, line by line; from a pipe, each line is a message.",
        epilog=f"In the conversation {_HINT}.",
    )
    parser.add_argument(
        "model",
        metavar="MODEL",
        nargs="?",
        help="with --base-url a served name, else a folder to serve (default: the demo model)",
    )
    parser.add_argument("--base-url", metavar="URL", help="server URL, e.g. http://HOST:PORT/v1")
    parser.add_argument(
        "-q",
        "--quick",
        metavar="TEXT",
        type=_MESSAGE,
        help="print the answer to one message, and end",
    )
    parser.add_argument("--system", metavar="TEXT", type=_UTF8, help="system prompt")
    add_setting_flags(parser)
    return parser


@reports_failures
def main(arguments: list[str]) -> int:
    """Talk until /exit or the end of the input.

    Returns:
        Exit status: 0 after a conversation. For a pipe or -q, 1 if a message was not answered. 2 if
            it cannot begin, 130 after a Ctrl-C outside an answer, 143 after SIGTERM.
    """
    args = build_parser().parse_args(arguments)
    settings = given_settings(args)
    if isinstance(sys.stdin, io.TextIOWrapper):
        # a line that is not UTF-8 is refused and does not end the input
        sys.stdin.reconfigure(errors="surrogateescape")
    is_own = args.base_url is None
    with server_at(args.base_url, args.model, _OWN_FLAGS, "MODEL") as base_url:
        session = ChatSession(base_url, None if is_own else args.model, settings)
        if args.quick is not None:
            return 0 if Conversation(session, args.system, is_terminal=False).ask(args.quick) else 1
        return Conversation(session, args.system, is_terminal=sys.stdin.isatty()).run()


class Conversation:
    """Reads messages from stdin and writes answers to stdout.

    Args:
        is_terminal: True shows prompts, and goes on after a failed answer.

    Attributes:
        messages: questions and answers so far, without the system prompt.
    """

    def __init__(self, session: ChatSession, system: str | None, *, is_terminal: bool) -> None:
        self._session = session
        self._system = system
        self._is_terminal = is_terminal
        # stream on which a line of an answer has begun
        self._open: TextIO | None = None
        self.messages: list[Message] = []

    def run(self) -> int:
        """Talk and return the exit status."""
        if self._is_terminal:
            with contextlib.suppress(ImportError):
                # gives input() a history and editing
                import readline

                # Python disables this mode, in which pasted lines are one message
                readline.parse_and_bind("set enable-bracketed-paste on")
            sys.stderr.write(f"{self._session.name}; {_HINT}, Ctrl-C stops an answer\n")
        status = 0
        for text in self._lines():
            if text == "/exit":
                break
            if not self._handle_line(text):
                status = 1
                if not self._is_terminal:
                    break
        return 0 if self._is_terminal else status

    def _lines(self) -> Iterator[str]:
        while True:
            try:
                text = self._line("> ").strip()
                while text.startswith(_QUOTES) and not text[len(_QUOTES) :].endswith(_QUOTES):
                    text += "\n" + self._line("... ")
            except EOFError:
                return
            except KeyboardInterrupt:
                self._leave_line()
                raise
            if text.startswith(_QUOTES):
                text = text[len(_QUOTES) : -len(_QUOTES)].strip("\n")
            yield text

    def _line(self, prompt: str) -> str:
        return input(prompt if self._is_terminal else "")

    def _handle_line(self, text: str) -> bool:
        """Handle a command or a message. Returns False if it fails."""
        try:
            text.encode()
        except UnicodeEncodeError as error:
            byte = ord(text[error.start]) & 0xFF
            where = f"byte 0x{byte:02x} as character {error.start + 1} of a line"
            sys.stderr.write(f"fd_dsa: error: stdin: got {where}, allowed is UTF-8\n")
            return False
        if text.startswith("/"):
            try:
                self._command(text)
            except (ConfigError, OSError) as error:
                sys.stderr.write(f"fd_dsa: error: {error}\n")
            return True
        return not text or self.ask(text)

    def _command(self, text: str) -> None:
        command, *words = text.split(maxsplit=1)
        rest = words[0].strip() if words else ""
        if command == "/help":
            for name, purpose in _COMMANDS.items():
                sys.stderr.write(f"  {name:<16} {purpose}\n")
        elif command == "/reset":
            self.messages = []
        elif command == "/system":
            self._system, self.messages = rest, []
        elif command == "/set":
            self._set(*rest.split(maxsplit=1))
        elif command == "/save":
            self._save(rest)
        else:
            known = [name.split()[0] for name in _COMMANDS]
            hint = nearest(command, known, _HINT)
            sys.stderr.write(f"unknown command {shorten(command)}; {hint}\n")

    def _set(self, name: str = "", value: str = "") -> None:
        settings = self._session.settings
        if not name:
            shown = ", ".join(f"{name} {value}" for name, value in settings.items())
            sys.stderr.write(f"{shown or 'all settings are those of the server'}\n")
        elif value:
            settings[name.replace("-", "_")] = read_setting(name, value)
        elif settings.pop(name.replace("-", "_"), None) is None:
            raise ConfigError(f"/set: {shorten(name)} is not set; /set NAME VALUE sets one")

    def _save(self, path: str) -> None:
        if not path:
            raise ConfigError("/save: got no name, allowed: a new file")
        system = [{"role": "system", "content": self._system}] if self._system else []
        saved = {
            "model": self._session.name,
            "settings": self._session.settings,
            "messages": [*system, *self.messages],
        }
        with writing("/save", path), open(path, "x", encoding="utf-8") as file:
            try:
                file.write(json.dumps(saved, indent=1, ensure_ascii=False) + "\n")
                file.flush()
            except OSError:
                os.unlink(path)
                raise
        sys.stderr.write(f"{len(saved['messages'])} messages are in {path}\n")

    def ask(self, text: str) -> bool:
        """Print the answer to a message. Returns False if it fails.

        A message stays out of the conversation if it was not answered, or if its answer was stopped
        before the first word.
        """
        system = [{"role": "system", "content": self._system}] if self._system else []
        asked = [*self.messages, {"role": "user", "content": text}]
        pieces = []
        try:
            with contextlib.closing(self._session.answer([*system, *asked])) as answer:
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
        if self._is_terminal and self._session.figures:
            sys.stderr.write(f"[{self._session.figures}]\n")
        self.messages = [*asked, {"role": "assistant", "content": "".join(pieces)}]
        return True

    def _leave_line(self) -> None:
        """On a terminal, begin a new line after the line with Ctrl-C."""
        if self._is_terminal and self._open is None:
            sys.stderr.write("\n")

    def _show(self, event: Event) -> None:
        """Print a piece of an answer: content on stdout, reasoning on stderr of a terminal."""
        is_content = event.kind == "content"
        if not (is_content or self._is_terminal):
            return
        stream = sys.stdout if is_content else sys.stderr
        if self._open is not stream:
            self._end_line()
            # set before writing, so that a Ctrl-C in between finds the line open
            self._open = stream
            stream.write("" if is_content else "[reasoning] ")
        stream.write(event.text)
        stream.flush()

    def _end_line(self) -> None:
        if self._open is not None:
            self._open.write("\n")
            self._open.flush()
            self._open = None
