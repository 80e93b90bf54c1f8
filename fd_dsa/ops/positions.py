"""Operator that writes the positions of a step's tokens, as FastDeploy's custom op does."""

from __future__ import annotations

from importlib import import_module
from typing import Any

import numpy as np

from fd_dsa import custom_ops
from fd_dsa.device.host_tensor import as_tensor
from fd_dsa.ops.arrays import as_numpy, check_array, check_values, check_writable
from fd_dsa.ops.providers import device_kind, function, select_provider
from fd_dsa.tensor import Array


def position_ids(
    seq_lens_encoder: Array, seq_lens_decoder: Array, seq_lens_this_time: Array, position_ids: Array
) -> Any:
    """Write the positions of a step's tokens: seq_lens_decoder[b] + j for token j of row b.

    Args:
        seq_lens_encoder: int32 [num_rows], tokens of a prompt's chunk.
        seq_lens_decoder: int32 [num_rows], tokens in the cache before the step.
        seq_lens_this_time: int32 [num_rows], tokens of the step.
        position_ids: int32 [num_tokens or more], contiguous, written in place. Entries after the
            step's tokens keep their values.

    Returns:
        `position_ids`.

    Raises:
        ShapeError, DtypeError: an argument is not as above; before any work.
        ValueError: on a CPU, a negative length, or more tokens than `position_ids` holds. A device
            ignores tokens that do not fit.
        ConfigError, BackendUnavailable: FD_DSA_OP_PROVIDER, see `providers.select_provider`.

    Source: PaddlePaddle/FastDeploy #7367, `get_position_ids_and_mask_encoder_batch`.
    """
    name = "position_ids"
    check_array(name, "seq_lens_this_time", seq_lens_this_time, (None,), ("int32",))
    num_rows = seq_lens_this_time.shape[0]
    check_array(name, "seq_lens_encoder", seq_lens_encoder, (num_rows,), ("int32",))
    check_array(name, "seq_lens_decoder", seq_lens_decoder, (num_rows,), ("int32",))
    check_array(name, "position_ids", position_ids, (None,), ("int32",))
    kind = device_kind(position_ids)
    if kind == "cpu":
        check_writable(name, "position_ids", position_ids)
        for argument, lengths in (
            ("seq_lens_decoder", seq_lens_decoder),
            ("seq_lens_this_time", seq_lens_this_time),
        ):
            check_values(name, argument, as_numpy(lengths), 0, 2**31)
        total, room = int(as_numpy(seq_lens_this_time).sum()), position_ids.shape[0]
        if total > room:
            raise ValueError(
                f"{name}: position_ids holds {room} tokens, allowed are at least the {total} of "
                "seq_lens_this_time"
            )
    write = function(name, select_provider(name, kind).provider)
    write(seq_lens_encoder, seq_lens_decoder, seq_lens_this_time, position_ids)
    return position_ids


def registered_position_ids(*tensors: Array) -> None:
    """Write positions by the operator of fd_dsa_ops, which is registered with Paddle."""
    write = import_module(custom_ops.PACKAGE).get_position_ids_and_mask_encoder_batch
    write(*(as_tensor(x) if isinstance(x, np.ndarray) else x for x in tensors))


def position_ids_on_host(
    seq_lens_encoder: Array, seq_lens_decoder: Array, seq_lens_this_time: Array, position_ids: Array
) -> None:
    """Write positions on a CPU by NumPy."""
    known, new = as_numpy(seq_lens_decoder), as_numpy(seq_lens_this_time)
    first = np.cumsum(new) - new
    as_numpy(position_ids)[: new.sum()] = np.arange(new.sum()) + np.repeat(known - first, new)
