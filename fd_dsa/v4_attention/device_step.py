"""Index arrays of a step of DeepSeek-V4 on a device, made by one launch from the runner's tensors.

The launch may be captured with the layers that read its arrays. Nothing is copied from the host in
addition to the runner's inputs.
"""

from __future__ import annotations

from dataclasses import dataclass

from fd_dsa.device.allocation import Allocate
from fd_dsa.models.deepseek_v4.config import CSA, HCA, DeepseekV4Config
from fd_dsa.ops.v4_entries import Plan
from fd_dsa.ops.v4_places import TokenPlaces
from fd_dsa.ops.v4_plain import PlainPlaces
from fd_dsa.runner.input_batch import InputBatch
from fd_dsa.step import ForwardMeta
from fd_dsa.tensor import Tensor
from fd_dsa.triton_runtime import next_power_of_2
from fd_dsa.v4_attention.device_pools import DeviceLayout
from fd_dsa.v4_prepare.place_kernel import place_step_kernel

# tokens that a program places at a time, programs of a row, and rows summed at a time
_TOKENS, _MAX_PARTS, _MAX_ROWS = 128, 16, 1024


@dataclass(frozen=True, slots=True)
class DeviceStep:
    """The index arrays of one step.

    Attributes:
        num_tokens: tokens of the step with its padding.
        places: places of its tokens.
        ring_rows: int32 [num_tokens or more], row of each key in the rings, -1 = not kept.
        snapshot_rows: int32 [num_tokens or more], row of each key in the ring of a snapshot, -1 =
            in none; None if the step writes no snapshots.
        plans: work of the compressors, by kind of layer. Kept sources are also those of snapshots.
        has_prompts: True if a row may have more new tokens than its drafts plus one.
        index_view: the step as the indexer sees it, with entries as keys; None if every token
            attends to all entries.
        plain: places of the rows whose records become values first; None if tokens of all rows read
            records.
    """

    num_tokens: int
    places: TokenPlaces
    ring_rows: Tensor
    snapshot_rows: Tensor | None
    plans: dict[str, Plan]
    has_prompts: bool
    index_view: ForwardMeta | None
    plain: PlainPlaces | None = None


class StepPlaces:
    """Arrays of all steps, at addresses that never move.

    Args:
        layout: sizes of the pools that the steps write.
        batch: its limits bound the steps.
    """

    def __init__(self, layout: DeviceLayout, batch: InputBatch, allocate: Allocate) -> None:
        self._layout, self._config = layout, layout.config
        self._row_tile = min(next_power_of_2(batch.max_num_seqs), _MAX_ROWS)
        self._arrays = [allocate(*array) for array in array_sizes(layout.config, batch)]

    def fill(
        self,
        before: Tensor,
        new: Tensor,
        block_table: Tensor,
        num_tokens: int,
        longest: int,
        slots: Tensor | None = None,
        *,
        has_prompts: bool,
    ) -> DeviceStep:
        """Enqueue the launch for a step, and return its arrays.

        Args:
            before, new: int32 [num_rows], tokens of each row before the step and in it.
            block_table: int32 [num_rows, columns], blocks of each row.
            num_tokens: at least the tokens of the step; the rest is padding.
            longest: at least the length of every row after the step, tokens.
            slots: int32 [num_rows], `InputBatch.snapshot_slots`; None = no snapshots.
            has_prompts: as for DeviceStep.
        """
        config, (num_rows, columns) = self._config, block_table.shape
        positions, rows, starts, ring_rows, newest, *lists, snapshot_rows = self._arrays
        of_csa = self._plan(CSA, lists[:3], num_tokens, num_rows)
        of_hca = self._plan(HCA, lists[3:], num_tokens, num_rows)
        parts = min(-(-num_tokens // _TOKENS), _MAX_PARTS)
        place_step_kernel[num_rows + 1, parts](
            before, new, block_table, slots, *self._arrays, num_rows, num_tokens, columns,
            *(of_csa.num_entries, of_csa.num_kept, of_hca.num_entries, of_hca.num_kept),
            WINDOW=config.sliding_window, RING=self._layout.ring_rows,
            BLOCK_SIZE=self._layout.block_size, CSA_RATIO=of_csa.ratio, HCA_RATIO=of_hca.ratio,
            ROW_TILE=self._row_tile, TILE=_TOKENS, num_warps=4,
        )  # fmt: skip
        if slots is not None:
            of_csa = of_csa._replace(num_kept=of_csa.num_kept + num_rows * of_csa.pool)
        places = TokenPlaces(positions, rows, starts, block_table)
        view = self._index_view(places, newest, num_tokens, longest, has_prompts=has_prompts)
        plans = {CSA: of_csa, HCA: of_hca}
        of_snapshots = None if slots is None else snapshot_rows
        return DeviceStep(num_tokens, places, ring_rows, of_snapshots, plans, has_prompts, view)

    def _plan(self, kind: str, lists: list[Tensor], num_tokens: int, num_rows: int) -> Plan:
        """Return the plan of the layers of a kind, whose lists the launch fills."""
        ratio, pool = self._config.compress_rates[kind], self._config.pooled_tokens(kind)
        counts = _plan_sizes(self._config, kind, num_tokens, num_rows)
        ring = self._layout.state_rows(kind)
        return Plan(lists[0], lists[1], lists[2], *counts, ratio, pool, ring)

    def _index_view(
        self,
        places: TokenPlaces,
        newest: Tensor,
        num_tokens: int,
        longest: int,
        *,
        has_prompts: bool,
    ) -> ForwardMeta | None:
        """Return the step with entries in place of tokens, None if no token has to select.

        Tokens of prompts have no windows: they see the entries up to their newest one.
        """
        entries = longest // self._config.compress_rates[CSA]
        if CSA not in self._config.layer_types or entries <= self._config.index_topk:
            return None
        # only the windows of prompts need lengths
        return ForwardMeta(
            seq_lens_encoder=None, seq_lens_decoder=None, seq_lens_this_time=None,
            cu_seqlens_q=places.starts, block_tables=places.block_table,
            batch_id_per_token=places.rows, position_ids=newest, position_ids_int32=None,
            slot_mapping=None, indexer_attn_mask_offsets=None, cu_seqlens_kg=None,
            num_prefill_tokens=num_tokens if has_prompts else 0,
            num_decode_tokens=0 if has_prompts else num_tokens, max_seqlen_k=entries,
        )  # fmt: skip


def array_sizes(config: DeepseekV4Config, batch: InputBatch) -> list[tuple[tuple[int, ...], str]]:
    """Return shape and type of the arrays of a StepPlaces, in the order of the kernel."""
    tokens, rows = batch.max_num_tokens, batch.max_num_seqs
    sizes: list[tuple[tuple[int, ...], str]] = [((tokens,), "int32")] * 2
    sizes += [((rows + 1,), "int32"), ((tokens,), "int32"), ((tokens,), "int64")]
    for kind in (CSA, HCA):
        entries, kept = _plan_sizes(config, kind, tokens, rows)
        # at the end of a block no HCA entry is unfinished
        kept += rows * config.pooled_tokens(kind) if kind == CSA else 0
        sizes += [((entries, 4), "int32"), ((entries,), "int32"), ((kept, 4), "int32")]
    return [*sizes, ((tokens,), "int32")]


def _plan_sizes(
    config: DeepseekV4Config, kind: str, num_tokens: int, num_rows: int
) -> tuple[int, int]:
    """Return `num_entries` and `num_kept` of a Plan for any step of `num_tokens` in `num_rows`."""
    ratio, rows = config.compress_rates[kind], min(num_rows, num_tokens)
    # a row of n tokens finishes at most ceil(n / ratio) entries
    entries = (num_tokens + rows * (ratio - 1)) // ratio
    return entries, min(num_tokens, rows * config.pooled_tokens(kind))
