"""Token counts of a step: what the caller says, what the arrays say, and what is allowed."""

from __future__ import annotations

from operator import index
from typing import NamedTuple

import numpy as np

from fd_dsa.errors import CapacityError
from fd_dsa.step.checks import StepLimits, StepTotals


class GivenCounts(NamedTuple):
    """What the caller of `build` says about the step; None where it says nothing."""

    num_padded_tokens: int | None = None
    num_tokens: int | None = None
    num_prefill_tokens: int | None = None
    max_seqlen_k: int | None = None

    def check_types(self) -> None:
        """Refuse what is no integer.

        Raises:
            ValueError: names the count.
        """
        for name, count in zip(self._fields, self, strict=True):
            if count is not None and not isinstance(count, int | np.integer):
                raise ValueError(f"{name}: got {count!r}, allowed are integers and None")


class StepCounts(NamedTuple):
    """What the host knows of a step, whoever counted it."""

    num_padded_tokens: int
    num_tokens: int
    num_prefill_tokens: int
    max_seqlen_k: int


def check_host_counts(totals: StepTotals, limits: StepLimits, given: GivenCounts) -> StepCounts:
    """Counts of a step whose arrays were read, from what the caller says and what is.

    Raises:
        ValueError: a given count disagrees with the arrays, or padding below the token count.
        CapacityError: padding above `max_num_tokens`.
    """
    for name, count, found in (
        ("num_tokens", given.num_tokens, totals.num_tokens),
        ("num_prefill_tokens", given.num_prefill_tokens, totals.num_prefill_tokens),
    ):
        if count is not None and count != found:
            raise ValueError(
                f"{name}: got {count}, the lengths of the rows say {found}; pass the number of "
                "this step, or leave it out with host arrays"
            )
    max_seqlen_k = totals.max_seqlen_k
    if given.max_seqlen_k is not None:
        if given.max_seqlen_k < max_seqlen_k:
            raise ValueError(
                f"max_seqlen_k: got {given.max_seqlen_k}, row {int(totals.seq_lens_k.argmax())} "
                f"has {max_seqlen_k} keys; pass that or an upper bound"
            )
        max_seqlen_k = index(given.max_seqlen_k)
    padded = check_padding(totals.num_tokens, limits, given.num_padded_tokens)
    return StepCounts(padded, totals.num_tokens, totals.num_prefill_tokens, max_seqlen_k)


def check_padding(num_tokens: int, limits: StepLimits, num_padded_tokens: int | None) -> int:
    """Padded token count of a step; without one, its token count.

    Raises:
        ValueError: padding below the token count.
        CapacityError: padding above `max_num_tokens`.
    """
    if num_padded_tokens is None:
        return num_tokens
    if num_padded_tokens < num_tokens:
        raise ValueError(
            f"num_padded_tokens: got {num_padded_tokens}, the step has {num_tokens} tokens; "
            "pass at least that"
        )
    if num_padded_tokens > limits.max_num_tokens:
        raise CapacityError(
            f"num_padded_tokens: got {num_padded_tokens}, allowed are at most max_num_tokens = "
            f"{limits.max_num_tokens}; pad less or raise it"
        )
    return index(num_padded_tokens)


def check_device_counts(limits: StepLimits, given: GivenCounts) -> StepCounts:
    """Counts of a step whose arrays lie on a device and are not read.

    Raises:
        ValueError: one of the three is missing, negative, or more prefill tokens than tokens.
        CapacityError: more tokens or padding than `max_num_tokens`.
    """
    num_padded_tokens, num_tokens, num_prefill_tokens, max_seqlen_k = given
    if num_tokens is None or num_prefill_tokens is None or max_seqlen_k is None:
        missing = [name for name in GivenCounts._fields[1:] if getattr(given, name) is None]
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
    return StepCounts(
        check_padding(num_tokens, limits, num_padded_tokens),
        index(num_tokens),
        index(num_prefill_tokens),
        index(max_seqlen_k),
    )
