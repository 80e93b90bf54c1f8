"""Keys that the tokens of a step see: bounds as positions of their row, and cache slots.

A prompt token sees the keys `[ks, ke)` of its entry in `indexer_attn_mask_offsets`. Both count the
gathered keys of the step, and those of row b begin at `cu_seqlens_kg[b]`. So the bounds are the
positions `ks - cu_seqlens_kg[b]` and `ke - cu_seqlens_kg[b]` of the row. A bound outside of the
row's gathered keys is clipped to them. A decode token sees all keys up to its own position.

Device code reads the same arrays, see `key_bounds` of `device_functions.py`.

Source: `ks` and `ke` of PaddlePaddle/FastDeploy #7598.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np

from fd_dsa.errors import MissingStepError
from fd_dsa.ops.arrays import as_numpy
from fd_dsa.step import ForwardMeta


class PromptWindows(NamedTuple):
    """Arrays of a `ForwardMeta` that bound the keys of its prompt tokens.

    They are None in a step without prompt tokens.

    Attributes:
        offsets: int32 [2 T], `indexer_attn_mask_offsets`.
        key_starts: int32 [B + 1], `cu_seqlens_kg`.
        seq_lens_encoder: int32 [B], above 0 for a prompt row.
    """

    offsets: Any
    key_starts: Any
    seq_lens_encoder: Any


NO_WINDOWS = PromptWindows(None, None, None)


def prompt_windows(step: ForwardMeta) -> PromptWindows:
    """Return the windows of a step, or NO_WINDOWS if its tokens see the keys up to their positions.

    So do all tokens of a step without prompt tokens, or without `seq_lens_encoder`.

    Raises:
        MissingStepError: the step has prompt tokens, and a field of its windows is None.
    """
    if step.num_prefill_tokens == 0 or step.seq_lens_encoder is None:
        return NO_WINDOWS
    windows = PromptWindows(
        step.indexer_attn_mask_offsets, step.cu_seqlens_kg, step.seq_lens_encoder
    )
    if windows.offsets is None or windows.key_starts is None:
        name = "cu_seqlens_kg" if windows.key_starts is None else "indexer_attn_mask_offsets"
        raise MissingStepError(
            f"ForwardMeta.{name} is None, but the step has {step.num_prefill_tokens} prompt "
            "tokens: StepMetadataBuilder.build, or init_attention_metadata of the attention "
            "backend, must be called for this step first"
        )
    return windows


def key_bounds(step: ForwardMeta, num_tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the first key of each token and the end of its keys, as positions of its row.

    Args:
        step: metadata in host memory.
        num_tokens: tokens of the step, without padding.

    Returns:
        int64 [num_tokens] twice, 0 <= first <= end.

    Raises:
        MissingStepError: see `prompt_windows`.
    """
    end = as_numpy(step.position_ids)[:num_tokens] + 1
    windows = prompt_windows(step)
    if windows.offsets is None:
        return np.zeros(num_tokens, np.int64), end
    offsets, starts, encoder = map(as_numpy, windows)
    rows = as_numpy(step.batch_id_per_token)[:num_tokens]
    # int64, because an int32 could wrap into a plausible bound
    start, count = starts.astype(np.int64)[rows], np.diff(starts)[rows]
    first = np.minimum(np.maximum(offsets[: 2 * num_tokens : 2] - start, 0), count)
    stop = np.maximum(np.minimum(offsets[1 : 2 * num_tokens : 2] - start, count), first)
    is_prompt = encoder[rows] > 0
    if is_prompt.all():
        return first, stop
    return first * is_prompt, np.where(is_prompt, stop, end)


def positions_to_slots(
    positions: np.ndarray, batch_ids: np.ndarray, block_tables: np.ndarray, block_size: int
) -> np.ndarray:
    """Return the cache slots of positions: int32 [num_rows, k].

    slot = block_tables[b, p // block_size] * block_size + p % block_size

    Args:
        positions: int32 [num_rows, k], positions in a request; -1 gives slot -1.
        batch_ids: int [num_rows], rows of `block_tables`.
        block_tables: int32 [num_requests, max_blocks].
        block_size: tokens of a block.
    """
    block = block_tables[batch_ids[:, None], positions // block_size]
    return np.where(positions >= 0, block * block_size + positions % block_size, -1).astype(
        np.int32
    )
