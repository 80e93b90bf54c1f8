"""The log of the server on stderr, as lines of text or JSON objects."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Callable
from datetime import datetime, timezone

from fd_dsa.serve.listener import PROBE_PATHS

# read every few seconds
_QUIET_PATHS = (*PROBE_PATHS, "/metrics")
# --log-requests asks for one line per output, so these are never collapsed
_REQUESTS = "fd_dsa.requests"
_ACCESS = "uvicorn.access"
_SERVER = "fd_dsa.serve"
_REPEAT_S = 1.0
_MAX_KINDS = 1000


def set_up_logging(level: str, *, as_json: bool = False) -> None:
    """Log to stderr, without probe requests and (unless debugging) uvicorn's messages.

    Args:
        level: log level, as in `logging`.
        as_json: write each line as an object with time, level, logger, message, and the record's
            own `fields`.
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
    """Formats a record as one line of JSON."""

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
        # json escapes text without a UTF-8 form, such as a lone surrogate from a request
        return json.dumps(entry, default=repr)


class RepeatFilter:
    """Passes one line of a kind per second, so that floods of requests fill no disk.

    The next line of the kind has the number of dropped lines. Lines of --log-requests, and access
    lines of requests that succeeded, always pass.

    Attributes:
        last_lines: kind of line -> (time of its last line, number of lines dropped since).
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
    """Return the key for collapsing repeated lines, or None if the line always passes."""
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
