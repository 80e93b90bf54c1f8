"""How far two modes agree: token for token, and in the logits behind the tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from fd_dsa.accuracy.matrix.recording import Trace
from fd_dsa.accuracy.stats import Estimate, wilson


@dataclass(frozen=True)
class Parting:
    """Where an answer first differs.

    Attributes:
        key: of the request.
        position: of the token in the answer, from 0.
        tokens: the two tokens, that of the reference first; -1 where an answer has ended.
        gap: logit of the reference's token less that of the other one, in the reference; None
            where the other one is not among its candidates.
        logit_difference: largest difference of a candidate's logits at this position; None
            where the two have no candidate in common.
    """

    key: str
    position: int
    tokens: tuple[int, int]
    gap: float | None
    logit_difference: float | None


@dataclass(frozen=True)
class Agreement:
    """Answers of one mode beside those of another.

    Attributes:
        requests: how many were compared.
        partings: of the requests whose answers differ, in the order of the requests.
        tokens: positions compared: of each request up to its parting, that included.
        equal_bits: of these, positions at which all logits are equal bit for bit.
        logit_difference: largest difference of a candidate's logits before any parting.
        smallest_gap: smallest lead of a token over the second in the reference.
    """

    requests: int
    partings: tuple[Parting, ...]
    tokens: int
    equal_bits: int
    logit_difference: float
    smallest_gap: float

    @property
    def equal(self) -> int:
        """Requests whose answers agree to the last token."""
        return self.requests - len(self.partings)

    @property
    def share(self) -> Estimate:
        """Share of requests that agree, with its interval."""
        return wilson(self.equal, self.requests)

    @property
    def bit_for_bit(self) -> bool:
        """True if nothing differs, not even in the last bit of a logit."""
        return not self.partings and self.equal_bits == self.tokens

    def within_rounding(self, parting: Parting) -> bool:
        """True if the logits differ no more where two answers part than where they agree.

        Tokens part where two candidates lie closer together than the modes' logits, and that may
        be chance. A larger difference than anywhere else has another cause.
        """
        change = parting.logit_difference
        return change is not None and change <= self.logit_difference

    def to_json(self) -> dict[str, Any]:
        """All figures as JSON values."""
        data = asdict(self)
        for entry, parting in zip(data["partings"], self.partings, strict=True):
            entry["within_rounding"] = self.within_rounding(parting)
        return {**data, "equal": self.equal, "share": list(self.share)}


def agreement(reference: Mapping[str, Trace], other: Mapping[str, Trace]) -> Agreement:
    """Compare the answers of two modes to the requests of the second.

    Raises:
        ValueError: the first has not answered all of them.
    """
    if missing := sorted(set(other) - set(reference)):
        raise ValueError(f"requests {missing[:3]} were answered in one of two modes alone")
    partings, tokens, equal_bits, largest, gaps = [], 0, 0, 0.0, [np.inf]
    for key, two in other.items():
        one = reference[key]
        place = _first_difference(one, two)
        shared = min(len(one.token_ids), len(two.token_ids))
        before = shared if place is None else min(place, shared)
        largest = max([largest, *_differences(one, two, range(before))])
        if place is not None:
            partings.append(_parting(key, place, one, two))
        compared = before if place is None or place >= shared else place + 1
        tokens += compared
        equal_bits += int((one.checksums[:compared] == two.checksums[:compared]).sum())
        gaps.append(float(one.gaps[:compared].min(initial=np.inf)))
    return Agreement(len(other), tuple(partings), tokens, equal_bits, largest, min(gaps))


def _first_difference(one: Trace, two: Trace) -> int | None:
    """First position at which the tokens differ, or one answer has ended; None = nowhere."""
    shared = min(len(one.token_ids), len(two.token_ids))
    differs = np.flatnonzero(one.token_ids[:shared] != two.token_ids[:shared])
    if len(differs):
        return int(differs[0])
    return None if len(one.token_ids) == len(two.token_ids) else shared


def _differences(one: Trace, two: Trace, places: Sequence[int]) -> list[float]:
    """Largest difference of the logits of the common candidates at each of these positions."""
    found = []
    for place in places:
        common, left, right = np.intersect1d(
            one.candidates[place], two.candidates[place], return_indices=True
        )
        if len(common):
            change = one.logits[place][left] - two.logits[place][right]
            found.append(float(np.abs(change).max()))
    return found


def _parting(key: str, place: int, one: Trace, two: Trace) -> Parting:
    """What is known of the place where two answers part."""
    tokens = tuple(
        int(trace.token_ids[place]) if place < len(trace.token_ids) else -1 for trace in (one, two)
    )
    gap = None
    if -1 not in tokens:
        behind = np.flatnonzero(one.candidates[place] == tokens[1])
        if len(behind):
            gap = float(one.logits[place][0] - one.logits[place][behind[0]])
        changes = _differences(one, two, [place])
    else:
        changes = []
    return Parting(key, place, (tokens[0], tokens[1]), gap, changes[0] if changes else None)
