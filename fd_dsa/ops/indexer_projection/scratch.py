"""Memory in which the programs of one launch add their sums, made once a device."""

from __future__ import annotations

import logging
from typing import Any

from fd_dsa.triton_runtime import INTERPRETING
from fd_dsa.triton_runtime.device import api_for_type
from fd_dsa.triton_runtime.streams import capture_query

NUM_COUNTERS = 1024
"""Tiles of a result whose sums may be split."""
NUM_PARTIALS = 1 << 20
"""float32 sums: 4 MiB, in the L2 of a Hopper GPU many times over."""

_logger = logging.getLogger(__name__)
_OF_DEVICE: dict[Any, Any] = {}


def new_scratch(like: Any) -> Any:
    """Scratch memory for launches that run one at a time.

    Args:
        like: a float32 tensor on the device.

    Returns:
        float32 [NUM_COUNTERS + NUM_PARTIALS]. Counters are float32 as the sums are, so that one
        tensor of any library holds both; they are zero between launches.
    """
    return like.new_zeros([NUM_COUNTERS + NUM_PARTIALS])


def scratch_beside(like: Any) -> Any:
    """The device's own scratch memory, made at the first call, or None.

    None in a capture before any launch outside of one: memory of a graph is no memory to keep, and
    its zeros would be written by a replay.
    """
    api = api_for_type(type(like))
    # interpreted kernels also run on what has no number, such as a CPU's memory
    key = api, str(getattr(like, "place", "")) if INTERPRETING else api.device_of(like)
    scratch = _OF_DEVICE.get(key)
    if scratch is None:
        if capture_query(like)():
            _logger.warning(
                "project_indexer: captured before its first run, so the graph keeps its slow form; "
                "run a step before the capture"
            )
            return None
        scratch = _OF_DEVICE.setdefault(key, new_scratch(like))
    return scratch
