"""What completions and chat completions have in common."""

from __future__ import annotations

from typing import Any, ClassVar

from pydantic import Field

from fd_dsa.serve.errors import FieldError
from fd_dsa.serve.protocol.fields import Body
from fd_dsa.serve.protocol.sampling import SamplingFields
from fd_dsa.serve.protocol.unsupported import check_extra_fields


class StreamOptions(Body):
    """`stream_options`; with `include_usage` a last chunk without choices carries the usage."""

    include_usage: bool | None = None


class GenerationRequest(SamplingFields):
    """Model, stream, sampling and structured output."""

    unsupported_fields: ClassVar[dict[str, tuple[Any, ...]]]

    model: str | None = Field(None, description="A served name; the first one by default.")
    stream: bool | None = None
    stream_options: StreamOptions | None = None

    @property
    def include_usage(self) -> bool:
        """True when the stream ends with a usage chunk."""
        return bool(self.stream_options and self.stream_options.include_usage)

    def check_supported(self) -> None:
        """Raise ApiError 400 for a field that cannot be honoured; see `unsupported`."""
        check_extra_fields(self.model_extra or {}, self.unsupported_fields)
        if self.stream_options is not None and not self.stream:
            raise FieldError(
                'stream_options: given without streaming; set "stream": true or leave it out'
            )
        if self.prompt_logprobs is not None and self.stream:
            raise FieldError(
                "prompt_logprobs: cannot be streamed; leave out stream, or ask for echo with "
                "logprobs in /v1/completions"
            )
