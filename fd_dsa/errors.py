"""Exceptions of fd_dsa, all of them FdDsaError.

A message says what, what was found, what is allowed and what to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from reprlib import Repr

_SHORT = Repr()
_SHORT.maxstring = _SHORT.maxother = 100
_SHORT.maxlist = _SHORT.maxtuple = _SHORT.maxdict = 12


def shorten(value: object) -> str:
    """The `repr` of a value that a file or a client has chosen, cut to a length for one line."""
    return _SHORT.repr(value)


# from here on two names look like one misspelt: --prot and --port, not --trust-remote-code and
# --request-rate, which share a few letters
_NEAR = 0.7


def nearest_name(name: str, known: Iterable[str]) -> str | None:
    """Find the known name that a wrong name most likely stands for."""
    names = list(known)
    begun = [one for one in names if len(name) > 3 and one.startswith(name)]
    return next(iter(begun or get_close_matches(name, names, 1, _NEAR)), None)


class FdDsaError(Exception):
    """Base of all errors that fd_dsa raises on purpose."""


class ShapeError(FdDsaError, ValueError):
    """An array has another shape than its contract says; both shapes are in the message."""


class DtypeError(FdDsaError, ValueError):
    """An array has another dtype than its contract says."""


class ConfigError(FdDsaError, ValueError):
    """A flag or a field of the model folder has a value that cannot be served."""


class ArgumentError(FdDsaError, TypeError, ValueError):
    """An argument of a call has an unknown name, or a value of another type or form.

    Python raises TypeError for the first and most libraries ValueError for the second, so the
    error is both.
    """


class CheckpointError(ConfigError):
    """A file or tensor of a checkpoint is missing, damaged, unexpected or of another shape."""


class CapacityError(FdDsaError, ValueError):
    """A step needs more tokens, rows or blocks than the buffers hold."""


class V4PrepareError(FdDsaError, ValueError):
    """A DeepSeek-V4 step (or its sizes) breaks a rule of its preparation; nothing was written.

    Attributes:
        code: one of E_SHAPE, E_DTYPE, E_BATCH, E_QLEN, E_CTX, E_SLOT, E_TABLE, E_BLOCK, E_TOKENS,
            E_INDPTR.
        row: the row at fault; -1 where the whole batch (or the configuration) is.
    """

    def __init__(self, code: str, row: int, text: str) -> None:
        super().__init__(code, row, text)
        self.code = code
        self.row = row

    def __str__(self) -> str:
        code, row, text = self.args
        return f"v4_prepare: {code}: {'batch' if row < 0 else f'row {row}'}: {text}"


class LaunchError(FdDsaError, ValueError):
    """A Triton kernel cannot be launched so; the message names the kernel and the argument."""


class BusyError(FdDsaError, RuntimeError):
    """Too much work of one kind waits; the same may be asked for again later."""


class DeviceError(FdDsaError, RuntimeError):
    """The CUDA driver reports an error; its number and text are in the message."""


class RankError(FdDsaError, RuntimeError):
    """A rank of a group has ended or fails, so the others cannot go on; the message names it."""


class OverlapError(FdDsaError, RuntimeError):
    """Work is forked to a second stream inside of work that is forked already."""


class RemoteError(FdDsaError, RuntimeError):
    """A server that is asked cannot be reached, goes away, or refuses every request."""


class MissingStepError(FdDsaError, RuntimeError):
    """A field of the step's metadata is read before the call that makes it."""


class BackendUnavailable(FdDsaError, ImportError):
    """A device, provider or package that was asked for cannot serve on this machine."""


class KernelUnavailable(BackendUnavailable):
    """A Triton kernel cannot be compiled for a device, or not be loaded there.

    It is raised before the kernel is queued. If the kernel belongs to a provider that is only
    faster than another one, the other one serves from then on (`fd_dsa.ops.providers.refuse`).
    """


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the memory of the host or of a device is full."""
    if isinstance(error, RankError):
        # no smaller step helps: the other ranks have ended
        return False
    # Paddle has errors of its own for a full device; those of CUDA are an OSError without a number
    return isinstance(error, MemoryError) or "out of memory" in describe_error(error).lower()


def describe_error(error: BaseException) -> str:
    """Type and text of an error in a line; of Paddle's, the last line that names an error."""
    lines = [line.strip() for line in str(error).strip().splitlines() if line.strip()]
    # Paddle's own stack comes first, what is wrong last
    text = next((line for line in reversed(lines) if "Error" in line), lines[0] if lines else "")
    return f"{type(error).__name__}: {text}"


@contextmanager
def writing(flag: str, path: object, hint: str = "") -> Iterator[None]:
    """Name the flag, the file and the reason where an output cannot be written inside."""
    try:
        yield
    except OSError as error:
        reason = (error.strerror or str(error)).lower()
        raise ConfigError(f"{flag}: {path} cannot be written ({reason}){hint}") from error


def flag_error(name: str, got: object, allowed: str, hint: str = "") -> ConfigError:
    """The error of one flag, or of `flag.key` in its JSON: what, got, allowed, what to do."""
    flag, dot, key = name.partition(".")
    text = f"--{flag.replace('_', '-')}{dot}{key}: got {got!r}, allowed: {allowed}"
    return ConfigError(f"{text}; {hint}" if hint else text)


def argument_error(name: str, got: object, allowed: str, hint: str = "") -> ArgumentError:
    """Make the error of one argument of a call, such as `messages[0].role`."""
    text = f"{name}: got {shorten(got)}; must be {allowed}"
    return ArgumentError(f"{text}; {hint}" if hint else text)
