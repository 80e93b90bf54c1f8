"""Rows of all steps of the warm-up."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.startup.graph_sizes import powers_below
from fd_dsa.startup.trial_rows import TrialRow

_ONE_PROMPT_TOKEN = TrialRow(1, 0, True)
# below it the form of a kernel may change at any number of tokens
_EVERY_SIZE = 64


def sparse_steps(batch: InputBatch, max_dense_keys: int) -> list[list[TrialRow]]:
    """Return steps of all kinds and magnitudes. The last step can continue the one before it.

    The limits between most forms of a kernel are powers of two, so steps at and just below each
    power use them.

    Args:
        batch: its limits bound the steps.
        max_dense_keys: longest row whose tokens attend to all keys.
    """
    longest = batch.max_row_len
    chunk, cached = min(batch.max_num_tokens, longest), _selected(batch, max_dense_keys)
    # longer rows score and select keys, and their prompts attend in another form
    steps = [
        [TrialRow(size, before, True)]
        for before in (0, cached)
        for size in _at_powers(chunk)
        if size <= longest - before
    ]
    # several prompts together may have more tokens than a row
    max_tokens = min(batch.max_num_tokens, longest * batch.max_num_seqs)
    for size in [size for size in _at_powers(max_tokens) if size > chunk]:
        begins = range(0, size, longest)
        steps.append([TrialRow(min(longest, size - begin), 0, True) for begin in begins])
    # decode rows alongside a prompt, all of them within the selection
    max_rows = min(batch.max_num_seqs, batch.max_num_tokens)
    for i in range(max(max_rows, cached).bit_length()):
        decode = TrialRow(1, max(min(1 << i, cached) - 1, 0), False)
        steps.append([decode] * min(1 << i, max_rows - 1) + [_ONE_PROMPT_TOKEN])
    decodes = [TrialRow(1, before, False) for before in (max(cached - 1, 0), cached)]
    return [*steps, *([row] for row in decodes)]


def dense_steps(
    batch: InputBatch, max_dense_keys: int, max_drafts: int = 0
) -> Iterator[list[TrialRow]]:
    """Yield steps of many sizes. Each changes one or two of the numbers that select forms.

    Args:
        batch: its limits bound the steps.
        max_dense_keys: longest row whose tokens attend to all keys.
        max_drafts: maximum number of drafts of a row that decodes.
    """
    longest, max_tokens = batch.max_row_len, batch.max_num_tokens
    max_rows = min(batch.max_num_seqs, max_tokens)
    chunk, cached = min(max_tokens, longest), _selected(batch, max_dense_keys)
    # tokens of a prompt, before the selection begins and after
    for before in (0, cached):
        yield from ([TrialRow(n, before, True)] for n in _sizes(min(chunk, longest - before)))
    # keys of a prompt that attends to all of them
    for keys in _sizes(cached):
        new = min(keys, chunk, 16)
        yield [TrialRow(new, keys - new, True)]
    # tokens of a prompt that attend to selected keys, after one that does not
    if cached:
        for n in _sizes(min(chunk, longest - cached + 1) - 1):
            yield [TrialRow(n + 1, cached - 1, True)]
    # tokens of a prompt beside a row that decodes
    if max_rows > 1:
        for n in _sizes(min(max_tokens - 1, longest)):
            yield [TrialRow(1, cached, False), TrialRow(n, 0, True)]
    # rows that decode, by their numbers of tokens and of keys: alone, and beside a prompt
    of_row = 1 + max_drafts
    alone, beside = min(max_rows * of_row, max_tokens), min((max_rows - 1) * of_row, max_tokens - 1)
    # of one row, any number
    sizes = sorted({*_at_powers(alone), *range(1, of_row + 1)})
    for n, keys in product(sizes, (*_at_powers(max(cached, 1)), cached + 1)):
        yield _decode_rows(n, keys, max_rows)
        if n <= beside:
            yield [*_decode_rows(n, keys, max_rows - 1), _ONE_PROMPT_TOKEN]


def _decode_rows(num_tokens: int, keys: int, max_rows: int) -> list[TrialRow]:
    """Return rows that decode some tokens, with drafts only if there are more tokens than rows.

    Args:
        keys: length of each row after the step. A row with more tokens is longer.
    """
    each, num_longer = divmod(num_tokens, rows := min(num_tokens, max_rows))
    sizes = [each + 1] * num_longer + [each] * (rows - num_longer)
    return [TrialRow(n, max(keys - n, 0), False) for n in sizes]


def _selected(batch: InputBatch, max_dense_keys: int) -> int:
    """Return the number of tokens in a row after which its next token selects keys."""
    return min(max_dense_keys, batch.max_row_len - 1)


def _sizes(limit: int) -> list[int]:
    """Return all small numbers up to a limit, then those around each multiple of half a power."""
    large = (size for power in powers_below(limit) for size in (power, power + power // 2))
    near = {size + by for size in large for by in (-1, 0, 1)}
    return sorted(
        {n for n in {*near, *range(1, _EVERY_SIZE + 1), limit - 1, limit} if 0 < n <= limit}
    )


def _at_powers(limit: int) -> list[int]:
    """Return a limit, and the numbers at and just below each power of two below it, ascending."""
    powers = powers_below(limit)
    return sorted({*powers, *(power - 1 for power in powers[1:]), limit})
