"""The log of the server: to stderr, as lines for people or as JSON objects."""

from __future__ import annotations

import json
import logging
import sys
from datetime import datetime, timezone

# asked for by machines every few seconds
_QUIET_PATHS = ("/health", "/livez", "/metrics", "/readyz", "/startupz")


def set_up_logging(level: str, *, as_json: bool = False) -> None:
    """Log to stderr; uvicorn's own chatter only when debugging, no access lines of probes.

    Args:
        level: debug, info, warning or error.
        as_json: each line is an object with time, level, logger, message, and the fields that
            the record brings in `fields`.
    """
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(JsonFormatter() if as_json else text)
    logging.basicConfig(handlers=[handler], level=level.upper())
    if level != "debug":
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    for name in ("asyncio", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("uvicorn.access").addFilter(_is_worth_a_line)


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        """The object of a record."""
        told = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            told["exception"] = self.formatException(record.exc_info)
        # json escapes what has no UTF-8 form, such as a lone surrogate of a request
        return json.dumps(told, default=repr)


def _is_worth_a_line(record: logging.LogRecord) -> bool:
    """False for access lines of probes and scrapes."""
    message = record.getMessage()
    return not any(f" {path} " in message for path in _QUIET_PATHS)
