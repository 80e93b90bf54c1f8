"""Counts what a JSON body holds while its bytes arrive, before anything is paid for parsing it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from fd_dsa.serve.errors import ApiError

MAX_DEPTH = 64
"""Lists and objects around a value; schemas of tools have some twenty."""

CONTAINER_WEIGHT = 8
"""What a text, a name, a list or an object counts; a number counts 1.

Parsed, a number takes 40 bytes and each of the others 80 to 230.
"""

_QUOTE, _BACKSLASH, _COMMA = b'"\\,'
# depth that a byte adds outside of texts
_STEPS = np.zeros(256, np.int8)
_STEPS[list(b"[{")] = 1
_STEPS[list(b"]}")] = -1

UInt8 = npt.NDArray[np.uint8]


class BodyScan:
    """The weight of the values of one body and how deep they nest.

    Each comma counts 1; each list, object and text, names of fields among them, counts
    `CONTAINER_WEIGHT`. Exact for every split into chunks, also inside of an escape. Bytes that are
    no JSON are counted by the same rules; the parser refuses them later.

    Args:
        max_weight: most that a body may count, the --max-body-values of the server.

    Attributes:
        weight: of the bytes so far.
        deepest: most lists and objects around a place so far.
    """

    def __init__(self, max_weight: int) -> None:
        self.weight = 0
        self.deepest = 0
        self._max_weight = max_weight
        self._depth = 0
        self._in_text = False
        # whether the next byte is escaped
        self._escaped = False

    def feed(self, chunk: bytes) -> None:
        """Count the next bytes.

        Raises:
            ApiError: 413, the body holds too much; 400, it nests too deeply.
        """
        if not chunk:
            return
        codes = np.frombuffer(chunk, np.uint8)
        quotes = self._quotes(codes)
        # 1 after an odd number of quotes: inside a text
        inside = np.bitwise_xor.accumulate(quotes)
        inside ^= self._in_text
        outside = inside == 0
        steps = _STEPS[codes]
        steps *= outside
        places = np.flatnonzero(steps)
        if len(places):
            depths = self._depth + np.cumsum(steps[places], dtype=np.int64)
            self._depth = int(depths[-1])
            self.deepest = max(self.deepest, int(depths.max()))
        num_opened = int(np.count_nonzero(quotes & inside)) + int(np.count_nonzero(steps == 1))
        num_commas = int(np.count_nonzero((codes == _COMMA) & outside))
        self.weight += CONTAINER_WEIGHT * num_opened + num_commas
        self._in_text = bool(inside[-1])
        self._check()

    def _quotes(self, codes: UInt8) -> UInt8:
        """1 for each quotation mark that begins or ends a text, uint8 [n]."""
        quotes = (codes == _QUOTE).view(np.uint8)
        slashes = np.flatnonzero(codes == _BACKSLASH)
        was_escaped, self._escaped = self._escaped, False
        if was_escaped:
            # the first byte means itself, so a run of backslashes begins after it
            quotes[0] = 0
            slashes = slashes[int(len(slashes) > 0 and slashes[0] == 0) :]
        if not len(slashes):
            return quotes
        is_last = np.append(np.diff(slashes) != 1, True)
        is_first = np.append(True, is_last[:-1])
        lasts = slashes[is_last]
        # a run of an odd number escapes the byte after it
        after = lasts[(lasts - slashes[is_first]) % 2 == 0] + 1
        self._escaped = bool(len(after)) and int(after[-1]) == len(codes)
        quotes[after[: len(after) - self._escaped]] = 0
        return quotes

    def _check(self) -> None:
        """Raise the refusal of a body that is over a limit."""
        if self.deepest > MAX_DEPTH:
            raise ApiError(
                400,
                f"body nests too deeply: got more than {MAX_DEPTH} lists and objects inside of "
                "each other; send a request that is flatter",
            )
        if self.weight > self._max_weight:
            raise ApiError(
                413,
                f"the body holds more than {self._max_weight} values, the --max-body-values of "
                f"this server; each number counts 1, each text, name, list and object "
                f"{CONTAINER_WEIGHT}",
            )
