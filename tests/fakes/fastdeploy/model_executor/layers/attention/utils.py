"""`layers/attention/utils.py`."""

from __future__ import annotations

from typing import Any


def init_rank_and_device_id(fd_config: Any) -> tuple[int, int]:
    """The rank among all devices, and the number of the device that it runs on."""
    parallel = fd_config.parallel_config
    rank = (
        parallel.expert_parallel_size * parallel.data_parallel_rank
        if parallel.expert_parallel_size > 1
        else parallel.tensor_parallel_rank
    )
    devices = str(parallel.device_ids).split(",")
    return rank, int(devices[rank % len(devices)])
