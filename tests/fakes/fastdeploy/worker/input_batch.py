"""The runner's persistent buffers (`worker/input_batch.py` at 39d329f2)."""

from __future__ import annotations

from typing import Any

import paddle

from fastdeploy import _tree


class InputBatch:
    """Buffers as attributes and as items; an unknown name is a KeyError either way."""

    def __init__(self, fields: dict[str, Any]) -> None:
        vars(self).update(fields)

    def __getitem__(self, name: str) -> Any:
        return vars(self)[name]

    def __setitem__(self, name: str, value: Any) -> None:
        vars(self)[name] = value

    def get(self, name: str, default: Any = None) -> Any:
        return vars(self).get(name, default)

    def pop(self, name: str, *default: Any) -> Any:
        return vars(self).pop(name, *default)

    def update(self, fields: dict[str, Any]) -> None:
        vars(self).update(fields)


def make_share_inputs(fd_config: Any, num_draft_tokens: int) -> InputBatch:
    """All buffers of a runner."""
    fields = _rows(fd_config) | _tokens(fd_config) | _host_copies(fd_config)
    if num_draft_tokens:
        fields |= _speculative(fd_config, num_draft_tokens)
    return InputBatch(fields)


def _rows(fd_config: Any) -> dict[str, Any]:
    """Return the fields of a slot of the batch."""
    slots, longest = fd_config.scheduler_config.max_num_seqs, fd_config.model_config.max_model_len
    cache = fd_config.cache_config
    columns = -(-longest // cache.block_size) + cache.enc_dec_block_num
    lengths = ("seq_lens_encoder", "seq_lens_decoder", "seq_lens_this_time_buffer")
    fields = {name: paddle.zeros([slots], dtype="int32") for name in lengths}
    fields["step_seq_lens_decoder"] = paddle.zeros([slots, 1], dtype="int32")
    fields["seq_lens_this_time"] = fields["seq_lens_this_time_buffer"]
    fields |= {
        name: paddle.zeros([slots, 1], dtype="int64")
        for name in ("prompt_lens", "step_idx", "max_dec_len")
    }
    return fields | {
        "input_ids": paddle.zeros([slots, longest], dtype="int64"),
        "block_tables": paddle.full([slots, columns], -1, dtype="int32"),
        "stop_flags": paddle.full([slots, 1], True, dtype="bool"),
        "is_block_step": paddle.full([slots], False, dtype="bool"),
        "preempted_idx": paddle.zeros([slots, 1], dtype="int32"),
    }


def _tokens(fd_config: Any) -> dict[str, Any]:
    """Return the fields of a token of the step, filled by `copy_`, which adopts shapes."""
    slots = fd_config.scheduler_config.max_num_seqs
    tokens = slots * fd_config.get_max_chunk_tokens()
    fields = {
        "ids_remove_padding": paddle.zeros([tokens], dtype="int64"),
        "batch_id_per_token": paddle.full([tokens, 1], -1, dtype="int32"),
        "cu_seqlens_q": paddle.zeros([slots + 1], dtype="int32"),
        "cu_seqlens_k": paddle.zeros([slots + 1], dtype="int32"),
    }
    # of one chunk, however many rows there are
    chunk = [fd_config.get_max_chunk_tokens()]
    dtype = _tree.current().position_dtype
    fields["position_ids_buffer"] = paddle.zeros(chunk, dtype=dtype)
    fields["slot_mapping_buffer"] = paddle.zeros(chunk, dtype="int64")
    return fields


def _host_copies(fd_config: Any) -> dict[str, Any]:
    """Page-locked copies, and flags that never leave the host."""
    slots = fd_config.scheduler_config.max_num_seqs
    cpu = paddle.CPUPlace()
    return {
        "seq_lens_this_time_cpu": paddle.zeros([slots, 1], dtype="int32", device=cpu),
        "is_chunk_step": paddle.zeros([slots], dtype="bool", device=cpu),
    }


def _speculative(fd_config: Any, num_draft_tokens: int) -> dict[str, Any]:
    """Drafts after the last token of each row."""
    slots = fd_config.scheduler_config.max_num_seqs
    return {"draft_tokens": paddle.full([slots, num_draft_tokens + 1], -1, dtype="int64")}
