"""Several processes, called ranks, that run one model together."""

from fd_dsa.distributed.group import Group, summed

__all__ = ["Group", "summed"]
