"""Request bodies of the OpenAI API as this server reads them.

Unknown fields are ignored. Fields that other servers know and that would change the result are
listed in `unsupported` with the values that mean "off"; any other value is refused, never ignored.
"""

from __future__ import annotations

from fd_dsa.serve.protocol.chat import ChatCompletionRequest
from fd_dsa.serve.protocol.completion import CompletionRequest
from fd_dsa.serve.protocol.unsupported import IN_CHAT, IN_COMPLETIONS

__all__ = ["IN_CHAT", "IN_COMPLETIONS", "ChatCompletionRequest", "CompletionRequest"]
