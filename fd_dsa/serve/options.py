"""What an operator allows, beside what the engine is built from."""

from __future__ import annotations

from dataclasses import dataclass, field

from fd_dsa.chat.parsers import AUTO
from fd_dsa.serve.flags import (
    DEFAULT_MAX_ANSWER_SCORES,
    DEFAULT_MAX_BODY_BYTES,
    DEFAULT_MAX_BODY_VALUES,
    DEFAULT_MAX_CONCURRENCY,
    PROMPT_BYTES_PER_TOKEN,
)
from fd_dsa.serve.hosts import HostRule
from fd_dsa.serve.listener import DEFAULT_MAX_CONNECTIONS


@dataclass(frozen=True)
class ChatSettings:
    """What the flags say of chat.

    Attributes:
        tool_call_parser: a name of `fd_dsa.chat.parsers.TOOL_FORMATS`, "auto" or "none".
        reasoning_parser: a name of `fd_dsa.chat.parsers.REASONING_FORMATS`, "auto" or "none".
        trust_request_chat_template: whether requests may bring templates.
    """

    tool_call_parser: str = AUTO
    reasoning_parser: str = AUTO
    trust_request_chat_template: bool = False


@dataclass(frozen=True)
class ServerOptions:
    """Access, limits and log of a server.

    Attributes:
        api_keys: keys of which a request must bring one; empty asks for none.
        max_body_bytes: longest body of a request.
        max_body_values: most that its values may count, see `BodyScan`.
        max_answer_scores: most log-probabilities of an answer, see `answer_size`.
        max_prompt_bytes: UTF-8 bytes of a prompt's text; None is `PROMPT_BYTES_PER_TOKEN` for each
            token of max_model_len.
        max_concurrency: running and waiting outputs at a time.
        max_connections: connections that may have a request in progress.
        hosts: what the Host header may name; None is everything.
        body_timeout_s: seconds that a client has for sending a body.
        log_requests: whether each output's end is a line of the log.
        serves_page: whether there is a page to talk to the model at /.
        chat: how conversations are rendered and answers read.
    """

    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = DEFAULT_MAX_BODY_BYTES
    max_body_values: int = DEFAULT_MAX_BODY_VALUES
    max_answer_scores: int = DEFAULT_MAX_ANSWER_SCORES
    max_prompt_bytes: int | None = None
    max_concurrency: int = DEFAULT_MAX_CONCURRENCY
    max_connections: int = DEFAULT_MAX_CONNECTIONS
    hosts: HostRule | None = None
    body_timeout_s: float = 60.0
    log_requests: bool = False
    serves_page: bool = True
    chat: ChatSettings = field(default_factory=ChatSettings)

    def limits(self, max_model_len: int) -> dict[str, int]:
        """Limits of requests by name, for a model of that context."""
        return {
            "max_body_bytes": self.max_body_bytes,
            "max_body_values": self.max_body_values,
            "max_answer_scores": self.max_answer_scores,
            "max_prompt_bytes": self.prompt_bytes(max_model_len),
            "max_concurrency": self.max_concurrency,
            "max_connections": self.max_connections,
        }

    def prompt_bytes(self, max_model_len: int) -> int:
        """Most UTF-8 bytes of a prompt's text for a model of that context, tokens."""
        if self.max_prompt_bytes is not None:
            return self.max_prompt_bytes
        return PROMPT_BYTES_PER_TOKEN * max_model_len
