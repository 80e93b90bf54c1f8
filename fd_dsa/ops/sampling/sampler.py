"""The sampler of a device: fixed buffers, parameters by slot, five launches a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fd_dsa.device.allocation import Allocate
from fd_dsa.device.staging import InputStaging
from fd_dsa.errors import ShapeError
from fd_dsa.ops.sampling.bracket_kernels import gather_kernel, masses_kernel
from fd_dsa.ops.sampling.draw_kernels import draw_kernel
from fd_dsa.ops.sampling.parameters import IN_PROMPT, RECORD, SlotParameters
from fd_dsa.ops.sampling.scan_kernels import scan_kernel, settle_kernel
from fd_dsa.ops.sampling.values import LEVELS, STATE
from fd_dsa.tensor import Tensor

import triton  # isort: skip

_MAX_BLOCK = 4096
_MIN_BLOCK = 64
_PART = 1024
_MANY_ROWS = 128


class DeviceSampler:
    """Samples one token for each row on a device, as `fd_dsa.engine.sampler.Sampler` does on a CPU.

    Rules of the slot (penalties, masks, bias, bans), temperature, min-p, top-k, top-p, one draw by
    inverse distribution function in the order of ids. Given equal logits, greedy tokens and codes
    are equal to the CPU's, and draws are where the number is not within 1e-6 of a border: weights
    are float32 exponentials, whose sums are exact.

    `sample` reads nothing back and allocates nothing, and its grids depend on the number of rows
    alone, so it may be captured; `set_slot` and `set_masks` must not be. They copy in the order of
    the current stream.

    Memory: 8 bytes for each logit of `max_rows` rows, 4 for each of `max_num_seqs`, and 66 kB a
    slot.

    Args:
        allocate: makes a contiguous tensor of a shape and dtype on the device.
        max_rows: most rows of a step; None: as many as slots.

    Attributes:
        tokens: int64 [max_rows] on the device; token of each row, NOT_FINITE or NO_TOKEN.
        records: int32 [max_num_seqs, RECORD] on the device; parameters of each slot.
        counts: int32 [max_num_seqs, vocab_size] on the device; how often a token is in the output
            of a slot with penalties, and IN_PROMPT.
    """

    def __init__(
        self, max_num_seqs: int, vocab_size: int, allocate: Allocate, max_rows: int | None = None
    ) -> None:
        block = triton.next_power_of_2(-(-vocab_size // 8))
        self._block = min(max(block, _MIN_BLOCK), _MAX_BLOCK)
        self._num_blocks = num_blocks = -(-vocab_size // self._block)
        self.max_rows = rows = max_rows or max_num_seqs
        self._vocab_size = vocab_size
        self._num_words = -(-vocab_size // 32)
        partials = (rows, LEVELS.value, num_blocks)
        self.tokens = allocate((rows,), "int64")
        self.records = allocate((max_num_seqs, RECORD), "int32")
        self._masks = allocate((rows, self._num_words), "int32")
        self.counts = allocate((max_num_seqs, vocab_size), "int32")
        self._adjusted = allocate((rows, vocab_size), "float32")
        self._best = allocate((rows, num_blocks, 3), "int32")
        self._state = allocate((rows, STATE.value), "int32")
        self._masses, self._sizes = allocate(partials, "float32"), allocate(partials, "int32")
        self._sums = allocate((rows, 2, num_blocks), "int64")
        self._lengths = allocate((rows, num_blocks), "int32")
        self._list = allocate((rows, num_blocks, self._block), "float32")
        # the largest copies are the masks of a step and the counts of a slot
        self._slab_size = max(RECORD, vocab_size, rows * self._num_words)
        self._staging = InputStaging(allocate, self._slab_size)

    def set_slot(
        self,
        slot: int,
        parameters: SlotParameters,
        prompt_token_ids: Sequence[int] = (),
        output_token_ids: Sequence[int] = (),
    ) -> None:
        """Queue the copies of what the rows of a slot are sampled by from now on.

        Args:
            slot: in [0, max_num_seqs).
            prompt_token_ids, output_token_ids: read if the request has penalties; tokens that are
                sampled from now on are counted on the device.

        Raises:
            ValueError: too many tokens are biased or banned.
        """
        self._copy(self.records, slot * RECORD, parameters.record(self._vocab_size))
        if parameters.is_penalized:
            size = self._vocab_size
            counts = np.bincount(np.array(output_token_ids, np.int64), minlength=size)
            counts = counts[:size].astype(np.int32)
            if parameters.repetition != 1:
                counts[np.array(prompt_token_ids, np.int64)] |= IN_PROMPT
            self._copy(self.counts, slot * size, counts)

    def warm_up(self, padding: Tensor) -> None:
        """Queue the launches of `max_rows` rows, which have forms of their own, on padding.

        Args:
            padding: int32 [max_rows] or longer on the device, all -1.
        """
        self.sample(self._adjusted, padding, padding, padding)

    def set_masks(self, masks: npt.NDArray[np.int32]) -> None:
        """Queue the copy of a step's masks, which `mask_rows` of `sample` refers to.

        Args:
            masks: int32 [n, ceil(vocab_size / 32)], n <= max_rows; bit i % 32 of value i // 32
                says whether token i may come, as grammars write them.
        """
        self._copy(self._masks, 0, masks.reshape(-1))

    def sample(
        self,
        logits: Tensor,
        slots: Tensor,
        positions: Tensor,
        mask_rows: Tensor,
        drafts: Tensor | None = None,
        verified: tuple[Tensor, Tensor, int] | None = None,
    ) -> None:
        """Queue the launches that write `tokens` for the rows of a step.

        Args:
            logits: float32 [num_rows, vocab_size], contiguous; stay as they are.
            slots: int32 [num_rows]; slot of each row, -1 = padding, which gets no token.
            positions: int32 or int64 [num_rows]; position of the token in the output of its
                request, from 0.
            mask_rows: int32 [num_rows]; row of the masks, -1 = every token may come.
            drafts: int64 [num_rows], written instead of `tokens`, and nothing is counted.
            verified: int32 token ids of the step and the flat token of each row, and most drafts
                of a slot: its further rows come after its drafts, and `verify_kernel` counts. None:
                a slot has one row.

        Raises:
            ShapeError: more rows than `max_rows`.
            LaunchError: a tensor is not contiguous, or not on the device.

        Cost: five launches. Greedy rows are read by the first one alone, rows with a temperature
        alone by two; those with top-k or top-p by three.
        """
        rows = logits.shape[0]
        if not rows:
            return
        if rows > min(self.max_rows, slots.shape[0]):
            raise ShapeError(
                f"sampling {rows} rows of {slots.shape[0]} slots; this sampler has {self.max_rows}"
            )
        tokens = self.tokens if drafts is None else drafts
        vocab, block, num_blocks = self._vocab_size, self._block, self._num_blocks
        # what no kernel reads without drafts
        ids, sampled, most = verified or (slots, slots, 0)
        counts_here = drafts is None and not most
        blocks, parts = triton.next_power_of_2(num_blocks), (rows, num_blocks)
        # a weight must be the same number in every launch, and penalties round as on a CPU
        options = {"VOCAB": vocab, "num_warps": 8, "enable_fp_fusion": False}
        scan_kernel[parts](
            logits, self._adjusted, slots, positions, self._masks, mask_rows, self.records,
            self.counts, ids, sampled, self._best, BLOCK=block, PART=min(block, _PART), MOST=most,
            **options,
        )  # fmt: skip
        options |= {"NUM_BLOCKS": num_blocks}
        settle_kernel[(rows,)](
            logits, self._adjusted, slots, mask_rows, self.records, self.counts, self._best,
            self._state, tokens, BLOCKS=blocks, COUNTS=counts_here, **options,
        )  # fmt: skip
        # in programs of one warp no sum waits for another one: faster where rows fill the device
        warps = 1 if rows >= _MANY_ROWS else 4
        options |= {"BLOCK": block, "num_warps": warps}
        # these masses are not those that a token is drawn by
        masses_kernel[parts](
            logits, self._adjusted, slots, self.records, self._state, self._masses, self._sizes,
            PART=min(block, 1024 * warps), **options | {"enable_fp_fusion": True},
        )  # fmt: skip
        options |= {"BLOCKS": blocks}
        lists = self._masses, self._sizes, self._sums, self._lengths, self._list
        gather_kernel[parts](
            logits, self._adjusted, slots, self.records, self._state, *lists,
            PART=min(block, 128 * warps), **options,
        )  # fmt: skip
        draw_kernel[(rows,)](
            logits, self._adjusted, slots, positions, self.records, self.counts, self._state,
            *lists, tokens, COUNTS=counts_here, **options | {"num_warps": 16, "maxnreg": 64},
        )  # fmt: skip

    def _copy(self, target: Tensor, offset: int, values: np.ndarray) -> None:
        """Queue a copy to int32 values of a buffer, after the launches that read them so far."""
        staging, size = self._staging, len(values)
        staging.next_slab()[:size] = values
        index = staging.upload(size)
        staging.acquire(index)
        source = staging.slabs.data_ptr() + 4 * index * self._slab_size
        address = target.data_ptr() + 4 * offset
        staging.transfers.copy("d2d", address, source).queue(4 * size)
        staging.release(index)
