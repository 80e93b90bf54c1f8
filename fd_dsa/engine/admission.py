"""Blocks of a request that is admitted: those that exist, and new ones."""

from __future__ import annotations

import time
from collections.abc import Mapping

from fd_dsa.engine.block_manager import BlockManager, Reservation
from fd_dsa.engine.metrics import EngineStats
from fd_dsa.engine.request import Request


class Admission:
    """Finds the computed blocks of waiting requests, and counts prefix hits.

    Args:
        blocks: owner of the cache blocks.
        stats: counts tokens from the prefix cache.
    """

    def __init__(self, blocks: BlockManager, stats: EngineStats) -> None:
        self._blocks, self._stats = blocks, stats

    def reserve(self, request: Request, running: Mapping[int, Request]) -> Reservation | None:
        """Return the blocks of a waiting request, or None while it must wait.

        The request waits for free blocks, for its group to compute or score the prompt, and for
        copies from host memory. It waits for copies only while other requests run: they go on
        meanwhile.

        Args:
            running: running requests by `seq_id`, each of which keeps one spare block.
        """
        blocks, num_running = self._blocks, len(running)
        reservation = blocks.reservations.get(request.seq_id)
        if reservation is not None and not blocks.has_state(reservation, request.block_keys):
            # a later snapshot has taken the place of the one that the row would go on after
            blocks.free(request.seq_id)
            reservation = None
        if reservation is None:
            # a new request always needs a block
            if num_running >= blocks.num_free:
                return None
            cached = self._find_computed_blocks(request, running)
            if cached is None:
                return None
            reservation = blocks.reserve(
                request.seq_id,
                request.block_keys,
                len(request.token_ids),
                cached,
                num_running,
                reads_host=self._reads_prefix_cache(request),
            )
        if reservation is None or (num_running and not blocks.is_loaded(reservation)):
            return None
        return reservation

    def start(self, request: Request, reservation: Reservation) -> None:
        """Give a request its blocks and computed tokens, and count them at its first start."""
        self._blocks.admit(request.seq_id, request.block_keys, request.batch_row)
        block_size, state = self._blocks.block_size, request.state
        request.num_computed_tokens = reservation.num_cached * block_size
        if request.scheduled_time is not None:
            return
        state.num_cached_tokens = request.num_computed_tokens
        state.num_host_cached_tokens = reservation.num_loaded * block_size
        request.scheduled_time = time.monotonic()
        # the prompt of a group is looked up once
        is_counted = state.index == 0 and self._reads_prefix_cache(request)
        if self._blocks.enable_prefix_caching and is_counted:
            self._stats.prefix_cache_queries += len(state.prompt_token_ids)
            self._stats.prefix_cache_hits += state.num_cached_tokens
            self._stats.prefix_cache_host_hits += state.num_host_cached_tokens

    def _find_computed_blocks(
        self, request: Request, running: Mapping[int, Request]
    ) -> list[int] | None:
        """Return blocks that a waiting request may share.

        Returns:
            None while the request waits for its group, which computes the blocks or scores the
            prompt.
        """
        first = request.seq_id - request.state.index
        group = range(first, first + request.params.n)
        computing = [running[seq_id] for seq_id in group if seq_id in running]
        # one output of a group scores the prompt, and the others show its scores
        if computing and request.wants_prompt_logits:
            return None
        # cached tokens have no logits
        cached: list[int] = []
        if self._reads_prefix_cache(request):
            cached = self._blocks.find_cached_blocks(request.block_keys, len(request.token_ids))
        num_shared = self._blocks.num_shareable(len(request.state.prompt_token_ids))
        if len(cached) >= num_shared:
            return cached
        for other in computing:
            if other.num_computed_tokens >= num_shared * self._blocks.block_size:
                shared = self._blocks.shared_blocks(other.seq_id, num_shared)
                return max(cached, shared, key=len)
        return None if computing else cached

    def _reads_prefix_cache(self, request: Request) -> bool:
        """Return True if a request may share blocks of other requests."""
        return not (request.params.skip_reading_prefix_cache or request.wants_prompt_logits)
