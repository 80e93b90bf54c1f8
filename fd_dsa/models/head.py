"""Logits of a head whose rows several ranks may divide."""

from __future__ import annotations

from fd_dsa.distributed import Group
from fd_dsa.ops.linear import Linear
from fd_dsa.tensor import StepArray


def logits_of(
    head: Linear, hidden_states: StepArray, group: Group | None, out: StepArray | None
) -> StepArray:
    """Return logits float32 [n, vocab_size] of hidden states, from all ranks of a group.

    Args:
        head: weight from hidden states to logits, with the rows of this rank.
        group: ranks that divide the rows of the head; None = this rank has all rows.
        out: memory of the logits on a device; None allocates.
    """
    if group is None:
        return head.matmul(hidden_states, out)
    logits = head.matmul(hidden_states)
    gathered = group.all_gather(logits)
    if out is not None:
        # imported only for a device, because it loads kernels
        from fd_dsa.ops.dense_kernels import join_columns

        return join_columns(gathered, out)
    return gathered.transpose([1, 0, 2]).reshape([-1, group.size * logits.shape[1]])
