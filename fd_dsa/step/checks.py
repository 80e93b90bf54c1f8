"""Checks of the inputs of a step, all before the first write."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import index
from typing import Any, NamedTuple, NoReturn, SupportsIndex

import numpy as np

from fd_dsa.device.host_tensor import Int32Array, Int64Array, host_array
from fd_dsa.errors import CapacityError, DtypeError, ShapeError
from fd_dsa.tensor import Array

INT32_MAX = 2**31 - 1


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Sizes that every step of one builder keeps to. Arguments are those of the builder.

    Raises:
        ValueError: a size is no integer, is below 1, or has indices that do not fit int32.
    """

    max_num_seqs: int
    max_num_tokens: int
    max_blocks_per_seq: int
    block_size: int
    num_blocks: int | None

    def __post_init__(self) -> None:
        for name in ("max_num_seqs", "max_num_tokens", "max_blocks_per_seq", "block_size"):
            _check_size(name, getattr(self, name))
        if self.num_blocks is not None:
            _check_size("num_blocks", self.num_blocks)
        if self.max_seq_len > INT32_MAX:
            raise ValueError(
                f"max_blocks_per_seq: {self.max_blocks_per_seq} blocks of {self.block_size} tokens "
                f"hold {self.max_seq_len} tokens, lengths are int32 (at most {INT32_MAX}); "
                "make the block table narrower"
            )

    @property
    def max_seq_len(self) -> int:
        """Maximum length of a row, tokens."""
        return self.max_blocks_per_seq * self.block_size


INPUTS = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time", "block_tables")
"""Names of the four arrays of a step: int32 [B] three times and [B, max_blocks_per_seq]."""
HostInputs = tuple[Int32Array, Int32Array, Int32Array, Int32Array]
Counts = tuple[int, int, int, int]
"""Counts of a step that has passed all checks, in the order of `StepHints`."""


class StepHints(NamedTuple):
    """Counts of a step that the runner knows without reading the lengths, None = not known.

    With tensors on a device the first three are required, and each may be an upper bound. On a CPU
    the lengths are read, so a token count must be exact, and `max_seqlen_k` is an upper bound.

    Attributes:
        num_tokens, num_prefill_tokens: number of tokens of the step, and of its prefill rows.
        max_seqlen_k: number of keys of the longest row.
        num_padded_tokens: T of the token arrays; None = `num_tokens`.
    """

    num_tokens: int | None = None
    num_prefill_tokens: int | None = None
    max_seqlen_k: int | None = None
    num_padded_tokens: int | None = None

    def check_types(self) -> None:
        """Refuse a count that is no integer, by a ValueError."""
        for name, count in zip(self._fields, self, strict=True):
            if count is not None and not isinstance(count, int | np.integer):
                raise ValueError(f"{name}: got {count!r}, allowed are integers and None")


def check_host_step(
    arrays: Sequence[Any], limits: StepLimits, hints: StepHints
) -> tuple[HostInputs, Counts]:
    """Check a step of four NumPy arrays or CPU tensors in full.

    Returns:
        The inputs as NumPy arrays, and the counts of the step.

    Raises:
        BackendUnavailable: a tensor on a device.
        DtypeError: neither arrays nor tensors, or not of int32.
        ShapeError, CapacityError, ValueError: names the field, the found and the allowed.
    """
    chunks, computed, scheduled, tables = map(host_array, INPUTS, arrays)
    inputs = chunks, computed, scheduled, tables
    check_arrays(inputs, np.int32, limits)
    return inputs, check_values(inputs, limits, hints)


def check_arrays(arrays: Sequence[Array], int32: object, limits: StepLimits) -> None:
    """Check dtypes and shapes of the four inputs of a step, arrays or tensors.

    Args:
        arrays: see `INPUTS`.
        int32: dtype int32 of the library of the arrays.
        limits: sizes of the builder.

    Raises:
        DtypeError, ShapeError, CapacityError: names the field, the found and the allowed.
    """
    rows = tuple(arrays[2].shape)
    if len(rows) != 1:
        raise ShapeError(f"seq_lens_this_time: got shape {rows}, allowed is [rows]; flatten it")
    shapes = rows, rows, rows, (rows[0], limits.max_blocks_per_seq)
    for name, array, expected in zip(INPUTS, arrays, shapes, strict=True):
        if array.dtype is not int32 and array.dtype != int32:
            raise DtypeError(f"{name}: got dtype {array.dtype}, allowed is int32; convert it")
        shape = tuple(array.shape)
        if shape != expected:
            rule = "[rows, max_blocks_per_seq]" if name == "block_tables" else "[rows]"
            raise ShapeError(
                f"{name}: got shape {shape}, allowed is {expected} = {rule} (seq_lens_this_time "
                f"has shape {rows}); pass one entry for each row of the step"
            )
    if rows[0] > limits.max_num_seqs:
        raise CapacityError(
            f"seq_lens_this_time: got {rows[0]} rows, allowed are at most max_num_seqs = "
            f"{limits.max_num_seqs}; schedule fewer rows or raise max_num_seqs"
        )


def check_values(inputs: HostInputs, limits: StepLimits, hints: StepHints) -> Counts:
    """Check lengths and block ids, and count the tokens and keys of the step.

    Sums are int64, so that no int32 input can wrap into a plausible number.

    Raises:
        ValueError: a negative length, or a prefill chunk that is neither 0 nor all of the row's
            tokens. Or a row needs a block id that is no block, or a hint disagrees.
        CapacityError: too many tokens, keys, blocks or padding.
    """
    chunks, computed, scheduled, _ = inputs
    # the sign bit of the union is set if any of the three is negative
    if ((chunks | computed | scheduled) < 0).any():
        _raise_negative(inputs)
    num_prefill_tokens = int(chunks.sum(dtype=np.int64))
    if num_prefill_tokens:
        inconsistent = (chunks != 0) & (chunks != scheduled)
        if inconsistent.any():
            _raise_inconsistent(inputs, int(inconsistent.argmax()))
    num_tokens = int(scheduled.sum(dtype=np.int64))
    if num_tokens > limits.max_num_tokens:
        raise CapacityError(
            f"seq_lens_this_time: the rows hold {num_tokens} tokens "
            f"(most in row {int(scheduled.argmax())}: {int(scheduled.max())}), allowed are at most "
            f"max_num_tokens = {limits.max_num_tokens}; schedule fewer tokens or raise it"
        )
    seq_lens_k = np.add(computed, scheduled, dtype=np.int64)
    seq_lens_k *= scheduled > 0
    max_seqlen_k = int(seq_lens_k.max(initial=0))
    _check_blocks(inputs, limits, seq_lens_k, max_seqlen_k)
    if num_prefill_tokens and (gathered := gathered_keys(inputs)).sum() > INT32_MAX:
        raise CapacityError(
            f"seq_lens_decoder: the prefill rows gather {int(gathered.sum())} keys "
            f"(most in row {int(gathered.argmax())}: {int(gathered.max())}), allowed are at most "
            f"{INT32_MAX} in one step; schedule fewer prefill rows together"
        )
    for name, hint, counted in (
        ("num_tokens", hints.num_tokens, num_tokens),
        ("num_prefill_tokens", hints.num_prefill_tokens, num_prefill_tokens),
    ):
        if hint is not None and hint != counted:
            raise ValueError(
                f"{name}: got {hint}, the lengths of the rows say {counted}; pass the number of "
                "this step, or leave it out with host arrays"
            )
    if hints.max_seqlen_k is not None:
        if hints.max_seqlen_k < max_seqlen_k:
            raise ValueError(
                f"max_seqlen_k: got {hints.max_seqlen_k}, row {int(seq_lens_k.argmax())} "
                f"has {max_seqlen_k} keys; pass that or an upper bound"
            )
        max_seqlen_k = index(hints.max_seqlen_k)
    padded = _padded_tokens(num_tokens, limits, hints)
    return num_tokens, num_prefill_tokens, max_seqlen_k, padded


def gathered_keys(inputs: HostInputs) -> Int64Array:
    """Return the number of gathered keys of each row of a step with prefill rows, int64 [B].

    A prefill row gathers all of its keys. Decode rows reserve one key for each token.
    """
    chunks, computed, scheduled, _ = inputs
    seq_lens_k = np.add(computed, scheduled, dtype=np.int64)
    return np.where(chunks > 0, seq_lens_k, scheduled)


def check_device_counts(limits: StepLimits, hints: StepHints) -> Counts:
    """Check and return the counts of a step whose arrays stay unread on a device.

    Raises:
        ValueError: one of the first three is missing or negative, or there are more prefill tokens
            than tokens.
        CapacityError: more tokens or padding than `max_num_tokens`.
    """
    num_tokens, num_prefill_tokens, max_seqlen_k, _ = hints
    if num_tokens is None or num_prefill_tokens is None or max_seqlen_k is None:
        missing = [name for name in StepHints._fields[:3] if getattr(hints, name) is None]
        raise ValueError(
            f"{', '.join(missing)}: needed with device tensors, which are never read back; pass "
            "what the scheduler knows"
        )
    if not 0 <= num_prefill_tokens <= num_tokens:
        raise ValueError(
            f"num_prefill_tokens: got {num_prefill_tokens}, allowed are 0..num_tokens = "
            f"{num_tokens}; pass the numbers of this step"
        )
    if max_seqlen_k < 0:
        raise ValueError(f"max_seqlen_k: got {max_seqlen_k}, allowed is 0 or more")
    if num_tokens > limits.max_num_tokens:
        raise CapacityError(
            f"num_tokens: got {num_tokens}, allowed are at most max_num_tokens = "
            f"{limits.max_num_tokens}; schedule fewer tokens or raise it"
        )
    padded = _padded_tokens(num_tokens, limits, hints)
    return index(num_tokens), index(num_prefill_tokens), index(max_seqlen_k), padded


def _padded_tokens(num_tokens: int, limits: StepLimits, hints: StepHints) -> int:
    """Return the padded token count of a step, by default its token count."""
    padded = hints.num_padded_tokens
    if padded is None:
        return index(num_tokens)
    if padded < num_tokens:
        raise ValueError(
            f"num_padded_tokens: got {padded}, the step has {num_tokens} tokens; pass at least that"
        )
    if padded > limits.max_num_tokens:
        raise CapacityError(
            f"num_padded_tokens: got {padded}, allowed are at most max_num_tokens = "
            f"{limits.max_num_tokens}; pad less or raise it"
        )
    return index(padded)


def _check_size(name: str, value: object) -> None:
    """Refuse a size that is no integer, below 1 or past int32."""
    if not isinstance(value, SupportsIndex) or not 1 <= index(value) <= INT32_MAX:
        raise ValueError(f"{name}: got {value!r}, allowed are integers in 1..{INT32_MAX}")


def _check_blocks(
    inputs: HostInputs, limits: StepLimits, seq_lens_k: Int64Array, max_seqlen_k: int
) -> None:
    """Refuse a row that is longer than its table or needs an entry that is no block."""
    block_size = limits.block_size
    if max_seqlen_k > limits.max_seq_len:
        row = int(seq_lens_k.argmax())
        raise CapacityError(
            f"block_tables: {_length_of(inputs, row)} need {-(-max_seqlen_k // block_size)} blocks "
            f"of {block_size}, the table has {limits.max_blocks_per_seq} columns; "
            "raise max_blocks_per_seq or check the scheduler"
        )
    num_columns = -(-max_seqlen_k // block_size)
    num_blocks = INT32_MAX + 1 if limits.num_blocks is None else limits.num_blocks
    # as an unsigned number a negative id is above every bound, so one comparison finds both errors
    *_, tables = inputs
    bad = tables[:, :num_columns].view(np.uint32) >= num_blocks
    bad &= np.arange(0, num_columns * block_size, block_size) < seq_lens_k[:, None]
    if bad.any():
        row, column = (int(i) for i in np.argwhere(bad)[0])
        block = int(tables[row, column])
        allowed = "0 or more" if limits.num_blocks is None else f"0..{num_blocks - 1}"
        raise ValueError(
            f"block_tables: row {row}, column {column} is {block}, but "
            f"{_length_of(inputs, row)} need this block of {block_size}; allowed is {allowed}; "
            "allocate the block before the step"
        )


def _length_of(inputs: HostInputs, row: int) -> str:
    """Describe the length of a row for an error message."""
    _, computed, scheduled, _ = inputs
    return f"the {int(computed[row])} cached + {int(scheduled[row])} new tokens of row {row}"


def _raise_negative(inputs: HostInputs) -> NoReturn:
    """Raise the error about the first negative length."""
    lengths = np.stack(inputs[:3], axis=1)
    row, field = (int(i) for i in np.argwhere(lengths < 0)[0])
    raise ValueError(
        f"{INPUTS[field]}: row {row} is {int(lengths[row, field])}, "
        "allowed is 0 or more; check the scheduler"
    )


def _raise_inconsistent(inputs: HostInputs, row: int) -> NoReturn:
    """Raise the error about a row whose prefill chunk is only a part of its tokens."""
    chunks, _, scheduled, _ = inputs
    raise ValueError(
        f"seq_lens_encoder: row {row} is {int(chunks[row])} with "
        f"seq_lens_this_time {int(scheduled[row])}, allowed is 0 (decode or idle "
        "row) or all of the row's tokens (prefill row); check the scheduler"
    )
