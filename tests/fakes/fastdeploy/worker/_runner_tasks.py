"""Tasks of the scheduler become states of rows (`GPUModelRunner.insert_tasks_v1`)."""

from __future__ import annotations

from typing import Any

from fastdeploy._arrays import writable
from fastdeploy.engine.request import Request, RequestType
from fastdeploy.model_executor.pre_and_post_process import set_row


class RunnerTasks:
    """The part of the runner that the scheduler talks to."""

    def insert_tasks_v1(self, req_dicts: list[Request], num_running_requests: int) -> None:
        """Bring rows into the states that the next step runs from.

        Args:
            req_dicts: tasks in any order, at most one a row.
            num_running_requests: rows of the step; ones without tasks go on as they are.
        """
        for request in req_dicts:
            if request.task_type is RequestType.PREFILL:
                self._insert_prefill(request)
            elif request.task_type is RequestType.DECODE:
                self._set_blocks(request)
            else:
                self._preempt(request)
        buffer = self.share_inputs["seq_lens_this_time_buffer"]
        self.share_inputs["seq_lens_this_time"] = buffer[:num_running_requests]

    def _insert_prefill(self, request: Request) -> None:
        """A first or later chunk, a prefix hit, a resumed request, a decode node's first step."""
        row, start, end = request.idx, request.prefill_start_index, request.prefill_end_index
        tokens = request.prompt_token_ids + request.output_token_ids
        self._write("prompt_lens", row, len(tokens))
        self._write("step_idx", row, len(request.output_token_ids))
        self._write("max_dec_len", row, request.max_tokens)
        self._write("is_chunk_step", row, end < len(tokens))
        self._write("is_block_step", row, False)
        self._set_blocks(request)
        count = end - start
        with writable(self.share_inputs["input_ids"]) as ids:
            ids[row, :count] = tokens[start:end]
        if request.disaggregate_decode:
            # the keys came from the prefill node: a decode row from its first step on
            if self.speculative_decoding:
                with writable(self.share_inputs["draft_tokens"]) as drafts:
                    drafts[row, :count] = tokens[start:end]
            set_row(self.share_inputs, row, (0, start, count), stopped=False)
            return
        set_row(self.share_inputs, row, (count, start, count), stopped=False)
        self.exist_prefill_flag = True

    def _preempt(self, request: Request) -> None:
        self._write("preempted_idx", request.idx, 1)
        self._write("is_block_step", request.idx, False)
        self._set_blocks(Request(request.idx, request.task_type))
        set_row(self.share_inputs, request.idx, (0, 0, 0), stopped=True)

    def _set_blocks(self, request: Request) -> None:
        """The row's table: -1, then the blocks that it owns now."""
        with writable(self.share_inputs["block_tables"]) as tables:
            tables[request.idx] = -1
            tables[request.idx, : len(request.block_tables)] = request.block_tables

    def _write(self, name: str, row: int, value: Any) -> None:
        with writable(self.share_inputs[name]) as values:
            values.reshape(len(values), -1)[row, 0] = value
