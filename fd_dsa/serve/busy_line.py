"""One line of the log every ten seconds while the engine works, as vLLM writes it."""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from fd_dsa.engine.async_engine import AsyncEngine
    from fd_dsa.engine.stats import EngineStats

logger = logging.getLogger("fd_dsa.serve")


async def log_while_busy(engine: AsyncEngine, interval_s: float = 10.0) -> None:
    """Log load and throughput of each interval in which tokens were computed or requests waited.

    Args:
        engine: running.
        interval_s: seconds between two looks.
    """
    (before, _), looked = await engine.snapshot(), time.monotonic()
    while True:
        await asyncio.sleep(interval_s)
        (now, _), at = await engine.snapshot(), time.monotonic()
        if now.num_steps != before.num_steps or now.num_running or now.num_waiting:
            logger.info("%s", _line(before, now, at - looked))
        before, looked = now, at


def _line(before: EngineStats, now: EngineStats, seconds: float) -> str:
    """What happened between two looks."""
    prefill = (now.computed_prompt_tokens - before.computed_prompt_tokens) / seconds
    decode = (now.generated_tokens - before.generated_tokens) / seconds
    queries = now.prefix_cache_queries - before.prefix_cache_queries
    hits = now.prefix_cache_hits - before.prefix_cache_hits
    share = f"{100 * hits / queries:.0f} %" if queries else "none asked"
    return (
        f"running {now.num_running}, waiting {now.num_waiting}, prefill {prefill:,.0f} tok/s, "
        f"decode {decode:,.0f} tok/s, kv {100 * now.kv_cache_usage:.0f} %, prefix hits {share}"
    )
