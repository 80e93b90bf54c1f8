"""The log of the server: to stderr, as lines for people or as JSON objects."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone

# asked for by machines every few seconds
_QUIET_PATHS = ("/health", "/livez", "/metrics", "/readyz", "/startupz")
# one line of `fd_dsa.requests` for each output is what --log-requests asks for
_REQUESTS = "fd_dsa.requests"
_ACCESS = "uvicorn.access"
_SERVER = "fd_dsa.serve"
_REPEAT_S = 1.0
_MAX_KINDS = 1000


def set_up_logging(level: str, *, as_json: bool = False) -> None:
    """Log to stderr; uvicorn's own chatter only when debugging, no access lines of probes.

    Args:
        as_json: each line is an object with time, level, logger, message, and the fields that
            the record brings in `fields`.
    """
    handler = logging.StreamHandler(sys.stderr)
    text = logging.Formatter("%(asctime)s %(levelname)s %(message)s", datefmt="%H:%M:%S")
    handler.setFormatter(JsonFormatter() if as_json else text)
    handler.addFilter(RepeatFilter())
    logging.basicConfig(handlers=[handler], level=level.upper())
    if level != "debug":
        logging.getLogger("uvicorn.error").setLevel(logging.WARNING)
    for name in ("asyncio", "httpx", "httpcore"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger(_ACCESS).addFilter(
        lambda record: not any(f" {path} " in record.getMessage() for path in _QUIET_PATHS)
    )


class JsonFormatter(logging.Formatter):
    """A record as one line of JSON."""

    def format(self, record: logging.LogRecord) -> str:
        entry = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            entry["exception"] = self.formatException(record.exc_info)
        # json escapes what has no UTF-8 form, such as a lone surrogate of a request
        return json.dumps(entry, default=repr)


class RepeatFilter:
    """Lets one line of a kind through a second, so that a flood of requests cannot fill a disk.

    The next line of the kind has the number of those that were left out. Lines of --log-requests
    and access lines of requests that were served are all let through.

    Attributes:
        last_lines: kind of line -> time of its last line, and how many were left out since.
    """

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.last_lines: dict[object, tuple[float, int]] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        kind = _kind(record)
        if kind is None:
            return True
        now = self._clock()
        written_at, left_out = self.last_lines.get(kind, (-_REPEAT_S, 0))
        if now - written_at < _REPEAT_S:
            self.last_lines[kind] = written_at, left_out + 1
            return False
        if len(self.last_lines) >= _MAX_KINDS:
            self.last_lines.clear()
        self.last_lines[kind] = now, 0
        if left_out:
            record.msg = f"{record.getMessage()} ({left_out} lines like it were left out)"
            record.args = None
        return True


def _kind(record: logging.LogRecord) -> object:
    """What lines have in common that repeat each other; None where none does."""
    if record.name == _REQUESTS:
        return None
    if record.name == _ACCESS and isinstance(record.args, tuple) and len(record.args) == 5:
        _, method, _, _, status = record.args
        is_served = method == "POST" and isinstance(status, int) and status < 400
        return None if is_served else (_ACCESS, status)
    is_whole = record.msg == "%s" or (record.levelno < logging.WARNING and record.name != _SERVER)
    text = record.getMessage() if is_whole else str(record.msg)
    error = record.exc_info[0] if record.exc_info else None
    return record.name, record.levelno, text.partition("\n")[0], error
