"""What an operator allows, beside what the engine is built from."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from fd_dsa.chat.parser import AUTO
from fd_dsa.serve.listener import DEFAULT_MAX_CONNECTIONS

if TYPE_CHECKING:
    from fd_dsa.serve.guard import HostRule

PROMPT_BYTES_PER_TOKEN = 16
"""Bytes of a prompt's text for each token of the context, unless --max-prompt-bytes says more."""


@dataclass(frozen=True)
class ServerOptions:
    """Access, limits, log and chat formats of a server; each field is the flag of the same name.

    Two fields are no flags: `hosts` and `body_timeout_s`.

    Attributes:
        api_key: keys of which a request must bring one; empty asks for none.
        max_body_size: bytes of a request's body: two million token ids.
        max_body_values: most that its values may count, see `check_values`: two million token
            ids, or a quarter of a million texts.
        max_answer_scores: most log-probabilities of an answer, see `answer_size`: some 40 MiB of
            JSON.
        max_prompt_bytes: UTF-8 bytes of a prompt's text; None is `PROMPT_BYTES_PER_TOKEN` for each
            token of max_model_len.
        max_concurrency: running and waiting outputs at a time.
        max_connections: connections that may have a request in progress.
        log_requests: whether each output's end is a line of the log.
        disable_ui: whether there is no page to talk to the model at /.
        tool_call_parser: a name of `fd_dsa.chat.parser.TOOL_FORMATS`, "auto" or "none".
        reasoning_parser: a name of `fd_dsa.chat.parser.REASONING_FORMATS`, "auto" or "none".
        trust_request_chat_template: whether requests may bring templates.
        hosts: what the Host header may name; None is everything.
        body_timeout_s: seconds that a client has for sending a body.
    """

    api_key: Sequence[str] = ()
    max_body_size: int = 16 << 20
    max_body_values: int = 1 << 21
    max_answer_scores: int = 1 << 19
    max_prompt_bytes: int | None = None
    max_concurrency: int = 512
    max_connections: int = DEFAULT_MAX_CONNECTIONS
    log_requests: bool = False
    disable_ui: bool = False
    tool_call_parser: str = AUTO
    reasoning_parser: str = AUTO
    trust_request_chat_template: bool = False
    hosts: HostRule | None = None
    body_timeout_s: float = 60.0

    def limits(self, max_model_len: int) -> dict[str, int]:
        """Limits of requests by name, for a model of that context."""
        return {
            "max_body_bytes": self.max_body_size,
            "max_body_values": self.max_body_values,
            "max_answer_scores": self.max_answer_scores,
            "max_prompt_bytes": self.prompt_bytes(max_model_len),
            "max_concurrency": self.max_concurrency,
            "max_connections": self.max_connections,
        }

    def prompt_bytes(self, max_model_len: int) -> int:
        """Most UTF-8 bytes of a prompt's text for a model of that context, tokens."""
        return self.max_prompt_bytes or PROMPT_BYTES_PER_TOKEN * max_model_len
