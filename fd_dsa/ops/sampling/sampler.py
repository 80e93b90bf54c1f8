"""Sampler of a device, with fixed buffers, parameters by batch row, and five launches a step."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from fd_dsa.device.allocation import Allocate
from fd_dsa.device.staging import InputStaging
from fd_dsa.errors import ShapeError
from fd_dsa.ops.sampling.cut_kernels import draw_kernel, gather_kernel, masses_kernel
from fd_dsa.ops.sampling.parameters import IN_PROMPT, RECORD, RowParameters
from fd_dsa.ops.sampling.scan_kernels import LEVELS, STATE, scan_kernel, settle_kernel
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2

# tokens of a block, and of the part of a block to which rules are applied at a time
_MAX_BLOCK = 4096
_MIN_BLOCK = 64
_PART = 1024
# rows that fill the device with programs of one warp
_MANY_ROWS = 128


class DeviceSampler:
    """Sampler of one token a row on a device, like `fd_dsa.engine.sampler.Sampler` on a CPU.

    A row passes the rules of its batch row (penalties, masks, bias, bans), temperature, min-p,
    top-k and top-p. Its token is found by the inverse distribution function in the order of ids.
    With equal logits, greedy tokens and codes are equal to the CPU's. Random tokens are equal
    unless the random number is within 1e-6 of a border, because weights are float32 exponentials.
    Their sums are exact.

    `sample` may be captured: it does not wait for the device, it allocates no memory, and its grids
    depend only on the number of rows. `set_parameters` and `set_masks` must not be captured. They
    copy in the order of the current stream.

    Memory: 8 bytes for each logit of `max_rows` rows, 4 for each of `max_num_seqs`, and 66 kB for
    each batch row.

    Args:
        allocate: makes a contiguous tensor of a shape and dtype on the device.
        max_rows: maximum number of rows of a step. None = `max_num_seqs`.

    Attributes:
        tokens: int64 [max_rows] on the device; token of each row, NOT_FINITE or NO_TOKEN.
        records: int32 [max_num_seqs, RECORD] on the device; parameters of each batch row.
        counts: int32 [max_num_seqs, vocab_size] on the device; number of occurrences of a token in
            the output of a batch row with penalties, and the flag IN_PROMPT.
    """

    def __init__(
        self, max_num_seqs: int, vocab_size: int, allocate: Allocate, max_rows: int | None = None
    ) -> None:
        block = next_power_of_2(-(-vocab_size // 8))
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
        # the slab holds the largest copy: a record, counts of a batch row, or the masks of a step
        self._slab_size = max(RECORD, vocab_size, rows * self._num_words)
        self._staging = InputStaging(allocate, self._slab_size)

    def set_parameters(
        self,
        batch_row: int,
        parameters: RowParameters,
        prompt_token_ids: Sequence[int] = (),
        output_token_ids: Sequence[int] = (),
    ) -> None:
        """Enqueue copies of the parameters of a batch row, for the steps after this call.

        Args:
            batch_row: row of the request, in [0, max_num_seqs).
            prompt_token_ids, output_token_ids: tokens so far, for a request with penalties. The
                device counts tokens that are sampled later.

        Raises:
            ValueError: too many tokens are biased or banned.
        """
        self._copy(self.records, batch_row * RECORD, parameters.record(self._vocab_size))
        if parameters.is_penalized:
            size = self._vocab_size
            counts = np.bincount(np.array(output_token_ids, np.int64), minlength=size)
            counts = counts[:size].astype(np.int32)
            if parameters.repetition != 1:
                counts[np.array(prompt_token_ids, np.int64)] |= IN_PROMPT
            self._copy(self.counts, batch_row * size, counts)

    def warm_up(self, padding: Tensor) -> None:
        """Enqueue the launches of `max_rows` rows of padding, which compiles their kernels.

        Args:
            padding: int32 [max_rows] or longer on the device, all -1.
        """
        self.sample(self._adjusted, padding, padding, padding)

    def set_masks(self, masks: npt.NDArray[np.int32]) -> None:
        """Enqueue the copy of a step's masks, for `mask_rows` of `sample`.

        Args:
            masks: int32 [n, ceil(vocab_size / 32)], n <= max_rows, in the form of grammars. Bit
                i % 32 of value i // 32 is 1 if token i is allowed.
        """
        self._copy(self._masks, 0, masks.reshape(-1))

    def sample(
        self,
        logits: Tensor,
        batch_rows: Tensor,
        positions: Tensor,
        mask_rows: Tensor,
        drafts: Tensor | None = None,
        verified: tuple[Tensor, Tensor, int] | None = None,
    ) -> None:
        """Enqueue the launches that write `tokens` for the rows of a step.

        Args:
            logits: float32 [num_rows, vocab_size], contiguous. They stay unchanged.
            batch_rows: int32 [num_rows]; batch row of each one, -1 = padding, which gets no token.
            positions: int32 or int64 [num_rows]; position of the token in the output of its
                request, from 0.
            mask_rows: int32 [num_rows]; row of the masks, -1 = all tokens are allowed.
            drafts: int64 [num_rows], written instead of `tokens`. Drafts are not counted.
            verified: int32 token ids of the step, the flat token of each row, and the maximum
                number of drafts of a request. It then has a row for each draft too, and
                `verify_kernel` counts its tokens. None if each request has one row.

        Raises:
            ShapeError: there are more rows than `max_rows`.
            LaunchError: a tensor is not contiguous, or not on the device.

        Cost: five launches. The first one reads greedy rows. Two read rows with only a temperature,
        and three read rows with top-k or top-p.
        """
        rows = logits.shape[0]
        if not rows:
            return
        if rows > min(self.max_rows, batch_rows.shape[0]):
            raise ShapeError(
                f"sampling {rows} rows of logits with {batch_rows.shape[0]} batch rows; this "
                f"sampler has {self.max_rows}"
            )
        tokens = self.tokens if drafts is None else drafts
        vocab, block, num_blocks = self._vocab_size, self._block, self._num_blocks
        # without drafts no kernel reads `ids` and `sampled`
        ids, sampled, max_drafts = verified or (batch_rows, batch_rows, 0)
        counts_here = drafts is None and not max_drafts
        blocks, parts = next_power_of_2(num_blocks), (rows, num_blocks)
        # a weight must be the same number in every launch, and penalties round as on a CPU
        options = {"VOCAB": vocab, "num_warps": 8, "enable_fp_fusion": False}
        scan_kernel[parts](
            logits, self._adjusted, batch_rows, positions, self._masks, mask_rows, self.records,
            self.counts, ids, sampled, self._best, BLOCK=block, PART=min(block, _PART),
            MAX_DRAFTS=max_drafts, **options,
        )  # fmt: skip
        options |= {"NUM_BLOCKS": num_blocks}
        settle_kernel[(rows,)](
            logits, self._adjusted, batch_rows, mask_rows, self.records, self.counts, self._best,
            self._state, tokens, BLOCKS=blocks, COUNTS=counts_here, **options,
        )  # fmt: skip
        # programs of one warp never wait for another warp: faster if the rows fill the device
        warps = 1 if rows >= _MANY_ROWS else 4
        options |= {"BLOCK": block, "num_warps": warps}
        # these masses only bracket the cuts, so they need not be exact
        masses_kernel[parts](
            logits, self._adjusted, batch_rows, self.records, self._state, self._masses,
            self._sizes, PART=min(block, 1024 * warps), **options | {"enable_fp_fusion": True},
        )  # fmt: skip
        options |= {"BLOCKS": blocks}
        lists = self._masses, self._sizes, self._sums, self._lengths, self._list
        gather_kernel[parts](
            logits, self._adjusted, batch_rows, self.records, self._state, *lists,
            PART=min(block, 128 * warps), **options,
        )  # fmt: skip
        draw_kernel[(rows,)](
            logits, self._adjusted, batch_rows, positions, self.records, self.counts, self._state,
            *lists, tokens, COUNTS=counts_here, **options | {"num_warps": 16, "maxnreg": 64},
        )  # fmt: skip

    def _copy(self, target: Tensor, offset: int, values: np.ndarray) -> None:
        """Enqueue a copy to int32 values of a buffer, after all launches so far."""
        staging, size = self._staging, len(values)
        staging.next_slab()[:size] = values
        index = staging.upload(size)
        staging.acquire(index)
        source = staging.slabs.data_ptr() + 4 * index * self._slab_size
        address = target.data_ptr() + 4 * offset
        staging.transfers.copy("d2d", address, source).queue(4 * size)
        staging.release(index)
