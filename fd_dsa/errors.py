"""Exceptions of fd_dsa, all derived from FdDsaError.

A message names the field, the value found, the rule and what to do.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from difflib import get_close_matches
from reprlib import Repr
from typing import Any


class _ShortRepr(Repr):
    """The `repr` of a value with a maximum length of its parts."""

    def __init__(self, max_chars: int) -> None:
        super().__init__()
        self.maxstring = self.maxother = max_chars
        self.maxlist = self.maxtuple = self.maxdict = 12

    def repr_int(self, x: int, level: int) -> str:
        """Return the digits of an integer, of a long one only its ends."""
        try:
            return super().repr_int(x, level)
        except ValueError:
            # Python writes at most 4,300 digits
            return f"an integer of {x.bit_length()} bits"


_SHORT, _LESS_SHORT = _ShortRepr(100), _ShortRepr(500)


def shorten(value: object) -> str:
    """Return the `repr` of a value from a flag, file or client, shortened to one line."""
    return _SHORT.repr(value)


def shorten_text(text: str) -> str:
    """Return a word or the text of an error without quotes, shortened to one line."""
    return _LESS_SHORT.repr(text)[1:-1] if len(text) > _LESS_SHORT.maxstring else text


def unique_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Make an object of a JSON text, as the `object_pairs_hook` of `json.loads`.

    Raises:
        ConfigError: a name is there twice. Readers disagree which of the two values counts.
    """
    made = dict(pairs)
    if len(made) < len(pairs):
        (twice, _), *_ = Counter(name for name, _ in pairs).most_common(1)
        raise ConfigError(f"the name {shorten(twice)} is there twice in one object")
    return made


# Similarity from which on two names look like a misspelling: --prot and --port, but not
# --trust-remote-code and --request-rate, which share a few letters
_NEAR = 0.7


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Return the known name that a wrong name most likely means."""
    names = list(known)
    begun = [one for one in names if len(name) > 3 and one.startswith(name)]
    return next(iter(begun or get_close_matches(name, names, 1, _NEAR)), None)


class FdDsaError(Exception):
    """Base of all errors that fd_dsa raises on purpose."""


class ShapeError(FdDsaError, ValueError):
    """An array has a wrong shape. The message has both shapes."""


class DtypeError(FdDsaError, ValueError):
    """An array has a wrong dtype."""


class ConfigError(FdDsaError, ValueError):
    """A flag or a field of the model folder has an unsupported value."""


class ArgumentError(FdDsaError, TypeError, ValueError):
    """An argument of a call has an unknown name, or a value of a wrong type or form.

    Python raises TypeError for the first and most libraries ValueError for the second, so this
    error is both.
    """


class CheckpointError(ConfigError):
    """A file or tensor of a checkpoint is missing, damaged, unexpected or misshapen."""


class CapacityError(FdDsaError, ValueError):
    """A step needs more tokens, rows or blocks than the buffers hold."""


class V4PrepareError(FdDsaError, ValueError):
    """A DeepSeek-V4 step (or its sizes) breaks a rule. Outputs are unchanged.

    Attributes:
        code: one of E_SHAPE, E_DTYPE, E_BATCH, E_QLEN, E_CTX, E_SLOT, E_TABLE, E_BLOCK, E_TOKENS,
            E_INDPTR.
        row: the row at fault, or -1 for the whole batch or the configuration.
    """

    def __init__(self, code: str, row: int, text: str) -> None:
        super().__init__(code, row, text)
        self.code = code
        self.row = row

    def __str__(self) -> str:
        code, row, text = self.args
        return f"v4_prepare: {code}: {'batch' if row < 0 else f'row {row}'}: {text}"


class LaunchError(FdDsaError, ValueError):
    """A Triton kernel cannot be launched. The message names the kernel and the argument."""


class BusyError(FdDsaError, RuntimeError):
    """Too much work of one kind is waiting. The caller may retry later."""


class DeviceError(FdDsaError, RuntimeError):
    """The CUDA driver reports an error. The message has its number and text."""


class RankError(FdDsaError, RuntimeError):
    """A rank of a group has ended or failed, so the others cannot continue.

    The message names the rank.
    """


class OverlapError(FdDsaError, RuntimeError):
    """Work is forked to a second stream inside another fork."""


class RemoteError(FdDsaError, RuntimeError):
    """A server cannot be reached, ends, or refuses every request."""


class MissingStepError(FdDsaError, RuntimeError):
    """A field of the step's metadata is read before the call that makes it."""


class BackendUnavailable(FdDsaError, ImportError):
    """A requested device, provider or package is not available on this machine."""


class KernelUnavailable(BackendUnavailable):
    """A Triton kernel cannot be compiled for a device, or cannot be loaded there.

    It is raised before the kernel is enqueued. If the kernel only makes an operator faster, the
    next provider replaces it from then on (`fd_dsa.ops.providers.refuse`).
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Return True if the memory of the host or of a device is full."""
    if isinstance(error, RankError):
        # a smaller step does not help, because the other ranks have ended
        return False
    # Paddle has its own error types for a full device; CUDA's is an OSError without a number
    return isinstance(error, MemoryError) or "out of memory" in describe_error(error).lower()


def describe_error(error: BaseException) -> str:
    """Return type and text of an error as one line, for Paddle's the line that names it."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    # Paddle prints its stack before the error
    text = next((line for line in reversed(lines) if "Error" in line), lines[0] if lines else "")
    return f"{type(error).__name__}: {text}"


def system_reason(error: Exception) -> str:
    """Return the reason of an error of the system, without number and path, or another's text."""
    reason = error.strerror if isinstance(error, OSError) else None
    return reason.lower() if reason else str(error)


@contextmanager
def writing(flag: str, path: object, hint: str = "") -> Iterator[None]:
    """Report an output that cannot be written inside, with flag, file and reason."""
    try:
        yield
    except OSError as error:
        reason, name = system_reason(error), shorten_text(str(path))
        raise ConfigError(f"{flag}: {name} cannot be written ({reason}){hint}") from error


@contextmanager
def renaming(flags: Mapping[str, str]) -> Iterator[None]:
    """Write flags in errors of the engine by the names that a command or a call has for them."""
    try:
        yield
    except FdDsaError as error:
        text = str(error)
        for flag, name in flags.items():
            text = re.sub(rf"{flag}(?![\w-])", name, text)
        if text == str(error):
            raise
        # a new one, because an ImportError keeps its first text
        raise type(error)(text).with_traceback(error.__traceback__) from error.__cause__


def flag_error(name: str, got: object, allowed: str, hint: str = "") -> ConfigError:
    """Make the error of one flag, or of `flag.key` in its JSON."""
    flag, dot, key = name.partition(".")
    text = f"--{flag.replace('_', '-')}{dot}{key}: got {shorten(got)}, allowed: {allowed}"
    return ConfigError(f"{text}; {hint}" if hint else text)


def argument_error(name: str, got: object, allowed: str, hint: str = "") -> ArgumentError:
    """Make the error of one argument of a call, such as `messages[0].role`."""
    text = f"{name}: got {shorten(got)}; must be {allowed}"
    return ArgumentError(f"{text}; {hint}" if hint else text)
