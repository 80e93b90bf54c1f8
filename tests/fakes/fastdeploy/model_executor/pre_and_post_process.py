"""Before and after the model (`model_executor/pre_and_post_process.py`): operators of a step.

On a GPU they are kernels: custom_ops/gpu_ops/get_padding_offset.cu, update_inputs_v1.cu,
recover_decode_task.cu and, with drafts, speculate_decoding/.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from fastdeploy._arrays import host, tensor_of, writable

UNUSED_ID = 2
THREADS_OF_A_BLOCK = 1024


def pre_process(
    token_num: int,
    input_ids: Any,
    seq_lens_this_time: Any,
    use_speculate: bool,
    draft_tokens: Any,
    seq_lens_encoder: Any,
    seq_lens_decoder: Any,
) -> tuple[Any, Any, Any, Any]:
    """The step's tokens, packed; `token_num` may be more than there are.

    Returns:
        ids int64 [token_num], 2 past the last; rows int32 [token_num], -1 past the last; prefix
        sums of the step's tokens and of the rows' keys, int32 [B + 1].
    """
    now = host(seq_lens_this_time).reshape(-1)
    encoder, decoder = (
        host(x).reshape(-1)[: len(now)] for x in (seq_lens_encoder, seq_lens_decoder)
    )
    ids = np.full(token_num, UNUSED_ID, np.int64)
    rows = np.full(token_num, -1, np.int32)
    place = 0
    for row, count in enumerate(now.tolist()):
        drafted = use_speculate and encoder[row] == 0
        source = host(draft_tokens) if drafted else host(input_ids)
        end = min(place + count, token_num)
        ids[place:end], rows[place:end] = source[row, : end - place], row
        place += count
    cu_q = _prefix_sums(now)
    cu_k = _prefix_sums(now + decoder)
    return tuple(tensor_of(one, input_ids.place) for one in (ids, rows, cu_q, cu_k))


def _prefix_sums(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)


def recover_decode_task(share_inputs: Any, block_size: int) -> None:
    """Blocked rows whose next block has come go on decoding."""
    blocked = np.flatnonzero(host(share_inputs["is_block_step"]))
    tables, parked = (host(share_inputs[n]) for n in ("block_tables", "step_seq_lens_decoder"))
    for row in blocked:
        cached = int(parked.reshape(-1)[row])
        if tables[row, cached // block_size] >= 0:
            set_row(share_inputs, row, (0, cached, 1), stopped=False)
            _set(share_inputs, "is_block_step", row, False)


def set_row(
    share_inputs: Any, row: int, lengths: tuple[int, int, int], *, stopped: bool | None = None
) -> None:
    """Write (encoder, decoder, this_time) of a row, and its stop flag if given."""
    names = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time_buffer")
    for name, value in zip(names, lengths, strict=True):
        _set(share_inputs, name, row, value)
    if stopped is not None:
        _set(share_inputs, "stop_flags", row, stopped)


def _set(share_inputs: Any, name: str, row: int, value: Any) -> None:
    with writable(share_inputs[name]) as values:
        values.reshape(len(values), -1)[row, 0] = value


def update_inputs_v1(share_inputs: Any, next_tokens: dict[int, list[int]], block_size: int) -> None:
    """Every row after the step; `next_tokens` are those that its sampler accepted.

    Raises:
        RuntimeError: more rows than one block of the kernel has threads.
    """
    now = host(share_inputs["seq_lens_this_time"]).reshape(-1).copy()
    if len(now) > THREADS_OF_A_BLOCK:
        raise RuntimeError(f"update_inputs_v1: {len(now)} rows, a block has {THREADS_OF_A_BLOCK}")
    for row in range(len(now)):
        _update_row(share_inputs, row, int(now[row]), next_tokens.get(row, []), block_size)


def _update_row(share_inputs: Any, row: int, now: int, tokens: list[int], block_size: int) -> None:
    """One thread of update_inputs_v1."""
    fields = ("stop_flags", "prompt_lens", "seq_lens_decoder", "seq_lens_encoder")
    stopped, prompt, cached, encoder = (
        int(host(share_inputs[name]).reshape(-1)[row]) for name in fields
    )
    if stopped:
        set_row(share_inputs, row, (0, 0, 0))
        return
    if cached + now < prompt:
        # a chunk that does not end the prompt: the next one is a task of its own
        set_row(share_inputs, row, (0, 0, 0), stopped=True)
        return
    cached += now if encoder or not tokens else len(tokens)
    set_row(share_inputs, row, (0, cached, 1))
    if tokens:
        with writable(share_inputs["input_ids"]) as ids:
            ids[row, 0] = tokens[-1]
    if host(share_inputs["block_tables"])[row, cached // block_size] < 0:
        _set(share_inputs, "step_seq_lens_decoder", row, cached)
        set_row(share_inputs, row, (0, 0, 0), stopped=True)
        _set(share_inputs, "is_block_step", row, True)
