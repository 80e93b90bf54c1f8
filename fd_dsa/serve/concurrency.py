"""The limit on running and waiting outputs; requests beyond it are a 429."""

from __future__ import annotations

from fd_dsa.serve.errors import ApiError, FieldError

_RETRY_AFTER_S = 1


class ConcurrencyLimit:
    """Counts the running and waiting outputs of all requests; used in the event loop alone.

    Args:
        limit: most outputs at a time, the --max-concurrency of the server.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.num_admitted = 0

    def admit(self) -> Ticket:
        """A ticket for one output of a request that has just come in; give it back with `release`.

        Raises:
            ApiError: 429, the server has as many as it takes.
        """
        ticket = Ticket(self)
        ticket.extend(1)
        return ticket


class Ticket:
    """What one HTTP request holds of the limit."""

    def __init__(self, concurrency: ConcurrencyLimit) -> None:
        self._concurrency = concurrency
        self._num_outputs = 0

    def extend(self, num_outputs: int, param: str = "prompt") -> None:
        """Hold so many outputs in all, not fewer than before.

        Args:
            num_outputs: choices that the request asks for.
            param: the field of the request that says how many.

        Raises:
            ApiError: 400, no server with this limit could take the request; 429, not now.
        """
        concurrency = self._concurrency
        if num_outputs > concurrency.limit:
            raise FieldError(
                f"{param}: the request asks for {num_outputs} outputs, --max-concurrency is "
                f"{concurrency.limit}; send fewer at a time"
            )
        added = max(num_outputs - self._num_outputs, 0)
        if concurrency.num_admitted + added > concurrency.limit:
            raise ApiError(
                429,
                f"the server has {concurrency.num_admitted} outputs running and waiting, "
                f"--max-concurrency is {concurrency.limit}; send the request again later",
                code="too_many_requests",
                headers={"Retry-After": str(_RETRY_AFTER_S)},
            )
        concurrency.num_admitted += added
        self._num_outputs += added

    def release(self) -> None:
        """Give everything back; may be called twice."""
        self._concurrency.num_admitted -= self._num_outputs
        self._num_outputs = 0
