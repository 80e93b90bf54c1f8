"""What an engine answered, token by token, with the logits that decided.

Of each token the likeliest candidates and a checksum of all logits are kept: enough to say where
two modes part, whether the candidates lay within rounding there, and whether all before was equal
bit for bit.
"""

from __future__ import annotations

import io
import json
import zipfile
import zlib
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from fd_dsa.engine.sampling_params import SamplingParams

if TYPE_CHECKING:
    from fd_dsa.engine.engine import LLMEngine

NUM_CANDIDATES = 8


@dataclass(frozen=True)
class Request:
    """What an engine is asked.

    Attributes:
        key: unique in its workload.
        token_ids: of the prompt.
        max_tokens: of the answer.
        ignore_eos: whether the answer goes on to `max_tokens` in any case.
    """

    key: str
    token_ids: tuple[int, ...]
    max_tokens: int
    ignore_eos: bool = False


@dataclass(frozen=True)
class Trace:
    """One answer.

    Attributes:
        text: of the answer.
        finish_reason: as the engine gave it.
        token_ids: int64 [n].
        candidates: int64 [n, NUM_CANDIDATES]; tokens of the largest logits, in descending order.
        logits: float32 [n, NUM_CANDIDATES]; theirs.
        checksums: uint32 [n]; of all logits, bit for bit.
    """

    text: str
    finish_reason: str
    token_ids: NDArray[np.int64]
    candidates: NDArray[np.int64]
    logits: NDArray[np.float32]
    checksums: NDArray[np.uint32]

    @property
    def gaps(self) -> NDArray[np.float32]:
        """float32 [n]: largest logit less the second largest."""
        return self.logits[:, 0] - self.logits[:, 1]


_ARRAYS = ("token_ids", "candidates", "logits", "checksums")


class WatchedRunner:
    """A runner that shows the logits of its last step; all else is the runner's own."""

    def __init__(self, runner: Any) -> None:
        self._runner = runner
        self.logits: NDArray[np.float32] = np.empty((0, 0), np.float32)

    def __getattr__(self, name: str) -> Any:
        """Of the runner itself."""
        return getattr(self._runner, name)

    def execute_model(self, logits_indices: NDArray[np.int64]) -> NDArray[np.float32]:
        """See RunnerProtocol."""
        self.logits = self._runner.execute_model(logits_indices)
        return self.logits


def record(
    engine: LLMEngine,
    requests: Sequence[Request],
    progress: Callable[[int], None] = lambda tokens: None,
) -> dict[str, Trace]:
    """Greedy answers of an engine that nobody else uses, all requests given to it at once.

    Args:
        engine: over any runner.
        requests: with distinct keys.
        progress: called with the number of new tokens after each step.

    Raises:
        ValueError: a request can never fit into the engine; names the numbers.
        RuntimeError: the engine gave up on a request, such as for logits that are not finite.
    """
    watched = WatchedRunner(engine.runner)
    engine.runner = watched
    tracks = {request.key: _Track() for request in requests}
    try:
        for request in requests:
            params = SamplingParams(
                temperature=0.0, max_tokens=request.max_tokens, ignore_eos=request.ignore_eos
            )
            engine.add_request(request.key, request.token_ids, params)
        while engine.has_unfinished_requests():
            # the engine gives its outputs in the order of the rows of logits
            outputs = engine.step()
            for row, output in enumerate(outputs):
                if output.error is not None:
                    raise output.error
                tracks[output.request_id].add(output, watched.logits[row])
            progress(len(outputs))
    finally:
        engine.runner = watched._runner
        for key in tracks:
            engine.abort_request(key)
    return {key: track.trace() for key, track in tracks.items()}


class _Track:
    """An answer that is growing."""

    def __init__(self) -> None:
        self._rows: list[tuple[int, NDArray[np.int64], NDArray[np.float32], int]] = []
        self._text, self._finish_reason = "", ""

    def add(self, output: Any, logits: NDArray[np.float32]) -> None:
        """Take the token that an output adds, and the logits of which it is the largest."""
        count = min(NUM_CANDIDATES, len(logits))
        best = np.argpartition(-logits, count - 1)[:count]
        # equal logits in the order of their tokens, as the sampler takes them
        best = best[np.lexsort((best, -logits[best]))]
        checksum = zlib.crc32(np.ascontiguousarray(logits).tobytes())
        self._rows.append((output.new_token_ids[0], best, logits[best], checksum))
        if output.finished:
            self._text, self._finish_reason = output.text, output.finish_reason

    def trace(self) -> Trace:
        """The whole answer."""
        ids, candidates, logits, checksums = zip(*self._rows, strict=True)
        return Trace(
            self._text,
            self._finish_reason,
            np.array(ids, np.int64),
            np.stack(candidates).astype(np.int64),
            np.stack(logits),
            np.array(checksums, np.uint32),
        )


def pack(
    traces: Mapping[str, Trace], facts: Mapping[str, Any], losses: NDArray[np.float64] | None
) -> bytes:
    """Traces, JSON facts and losses of a text as the bytes of one NPZ file."""
    arrays: dict[str, NDArray[Any]] = {
        name: np.concatenate([getattr(trace, name) for trace in traces.values()])
        for name in _ARRAYS
    }
    if losses is not None:
        arrays["losses"] = losses
    head = {
        "facts": dict(facts),
        "answers": [
            [key, len(trace.token_ids), trace.text, trace.finish_reason]
            for key, trace in traces.items()
        ],
    }
    buffer = io.BytesIO()
    text = np.frombuffer(json.dumps(head).encode("ascii"), np.uint8)
    np.savez_compressed(buffer, **{"head": text, **arrays})  # type: ignore[arg-type]
    return buffer.getvalue()


def unpack(data: bytes) -> tuple[dict[str, Trace], dict[str, Any], NDArray[np.float64] | None]:
    """What `pack` was given.

    Raises:
        ValueError: the bytes are no such file.
    """
    try:
        with np.load(io.BytesIO(data), allow_pickle=False) as file:
            head = json.loads(file["head"].tobytes())
            arrays = {name: file[name] for name in _ARRAYS}
            losses = dict(file).get("losses")
        counts = [entry[1] for entry in head["answers"]]
        if any(len(array) != sum(counts) for array in arrays.values()):
            raise ValueError("its arrays have other lengths than it says")
        return dict(_split(head["answers"], arrays)), head["facts"], losses
    except (KeyError, OSError, EOFError, TypeError, zlib.error, zipfile.BadZipFile) as error:
        raise ValueError(f"{type(error).__name__}: {error}") from error


def _split(
    answers: Sequence[Sequence[Any]], arrays: Mapping[str, NDArray[Any]]
) -> Iterable[tuple[str, Trace]]:
    """Key and trace of each answer, from the arrays of all."""
    start = 0
    for key, count, text, finish_reason in answers:
        parts = {name: array[start : start + count] for name, array in arrays.items()}
        start += count
        yield key, Trace(text=text, finish_reason=finish_reason, **parts)
