"""The host builder: all outputs of a step in NumPy, over arrays that may be used again."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fd_dsa.errors import DtypeError, ShapeError
from fd_dsa.v4_prepare.checks import check_step, step_inputs
from fd_dsa.v4_prepare.compressed import write_csa, write_hca_list, write_offsets
from fd_dsa.v4_prepare.config import OUTPUT_SHAPES, V4PrepareConfig
from fd_dsa.v4_prepare.plan import StepRows, step_rows, step_tokens, write_layout, write_plans
from fd_dsa.v4_prepare.window import write_window

Int32Array = npt.NDArray[np.int32]


@dataclass
class V4Arrays:
    """All outputs of a step, int32, at full capacity (`OUTPUT_SHAPES`); t = token, b = row.

    Attributes:
        config: sizes of the step; Tcap tokens, Bcap rows, W, topk, r1, r2 are its fields.
        positions: [Tcap] position of t; pad 0.
        req_of_token: [Tcap] b; pad -1.
        cu_q: [Bcap + 1] prefix sums of q; pad T.
        ctx: [Bcap] tokens of b after the step, an idle row's too; pad 0.
        win_idx: [Tcap, W] rows of the window keys that t reads from the pool, ascending; pad -1.
        win_len: [Tcap] how many; pad 0.
        ext_len: [Tcap] how many more t reads from the step's own keys, the rows up to t; pad 0.
        swa_write: [Tcap] row where the key of t goes; -1 = nowhere (a ring keeps the last W).
        hca_indptr: [Tcap + 1] where the HCA entries of t start in `hca_idx`; the last repeated.
        hca_idx: [cap_h] rows of entries 0..(p + 1) // r2 - 1 of each token; undefined behind the
            total. None in table mode.
        csa_visible: [Tcap] (p + 1) // r1, CSA entries that t may choose from; pad 0.
        csa_indptr: [Tcap + 1] prefix sums of min(csa_visible, topk); the last repeated.
        plan_r1, plan_r2: [cap_p, 4] one row an entry that the step finishes, in token order:
            (t, b, p, sources from the state ring); pad -1.
        plan_dst_r1, plan_dst_r2: [cap_p] row of that entry; pad -1.
        wplan_r1, wplan_r2: [cap_w, 4] the same columns for the last K(r) tokens of each row, which
            go into row slot * (K(r) + k) + p % (K(r) + k) of the state ring; pad -1.
        counts: [8] B, T, entries of hca_idx, of csa_indptr, rows of plan_r1, wplan_r1, plan_r2,
            wplan_r2.
    """

    config: V4PrepareConfig
    positions: Int32Array
    req_of_token: Int32Array
    cu_q: Int32Array
    ctx: Int32Array
    win_idx: Int32Array
    win_len: Int32Array
    ext_len: Int32Array
    swa_write: Int32Array
    hca_indptr: Int32Array
    csa_visible: Int32Array
    csa_indptr: Int32Array
    plan_r1: Int32Array
    plan_dst_r1: Int32Array
    wplan_r1: Int32Array
    plan_r2: Int32Array
    plan_dst_r2: Int32Array
    wplan_r2: Int32Array
    counts: Int32Array
    hca_idx: Int32Array | None = None

    def __post_init__(self) -> None:
        for name, shape in OUTPUT_SHAPES(self.config).items():
            array = getattr(self, name)
            if not isinstance(array, np.ndarray) or array.shape != shape:
                got = getattr(array, "shape", type(array).__name__)
                raise ShapeError(
                    f"{name}: got {got}, must be {shape}; take the shapes of OUTPUT_SHAPES"
                )
            if array.dtype != np.int32 or not array.flags.c_contiguous:
                raise DtypeError(
                    f"{name}: got {array.dtype} with strides {array.strides}, must be int32 and "
                    "C-contiguous; allocate it with numpy.empty(shape, numpy.int32)"
                )

    @classmethod
    def allocate(cls, cfg: V4PrepareConfig) -> V4Arrays:
        """Arrays with undefined contents."""
        arrays = {name: np.empty(shape, np.int32) for name, shape in OUTPUT_SHAPES(cfg).items()}
        return cls(cfg, **arrays)


def v4_prepare_np(
    cfg: V4PrepareConfig,
    ctx: Any,
    q: Any,
    slot: Any,
    block_table: Any,
    out: V4Arrays | None = None,
) -> V4Arrays:
    """All outputs of one step, computed on the host.

    Token j of row b stands at position p = ctx[b] - q[b] + j. It reads the window keys
    p-W+1..p and entry e of ratio r if e < (p + 1) // r: counts are per token, since the tokens of
    one row may lie on both sides of the end of an entry.

    Args:
        cfg: sizes of the step.
        ctx: [B], any integer dtype or a list; tokens of each row after the step.
        q: [B]; tokens of each row in the step, 0 = idle row.
        slot: [B]; owner of the row's rings, no two active rows alike; ignored for idle rows.
        block_table: [B, columns]; the first ceil(ctx / block_size) cells of an active row are its
            blocks, the others are ignored.
        out: arrays to fill, whatever they held; None = new ones.

    Returns:
        `out`, or the new arrays; pads written.

    Raises:
        V4PrepareError: a rule is broken; `.code` says which, `.row` where; nothing was written.
        ValueError: `out` belongs to another configuration.

    Cost: a fixed number of NumPy calls, and one copy a token where the HCA list is long; memory
    beside `out` in proportion to the window cells of the step and its part of the block table.
    Source: the idea is ROCm/ATOM #728.
    """
    inputs = step_inputs(cfg, ctx, q, slot, block_table)
    num_tokens = check_step(cfg, inputs)
    if out is None:
        out = V4Arrays.allocate(cfg)
    elif out.config != cfg:
        raise ValueError(
            f"out: got arrays of {out.config}, must be of {cfg}; allocate them with "
            "V4Arrays.allocate(cfg)"
        )
    _fill(cfg, step_rows(inputs), num_tokens, out)
    return out


def _fill(cfg: V4PrepareConfig, rows: StepRows, num_tokens: int, out: V4Arrays) -> None:
    """Write every output of a checked step."""
    tokens = step_tokens(rows, num_tokens)
    write_layout(
        rows,
        tokens,
        positions=out.positions,
        req_of_token=out.req_of_token,
        cu_q=out.cu_q,
        ctx=out.ctx,
    )
    write_window(
        cfg,
        rows,
        tokens,
        win_idx=out.win_idx,
        win_len=out.win_len,
        ext_len=out.ext_len,
        swa_write=out.swa_write,
    )
    num_hca = write_offsets((tokens.position + 1) // cfg.hca_ratio, out.hca_indptr)
    if out.hca_idx is not None:
        write_hca_list(cfg, rows.block_table, tokens.row, out.hca_indptr, out.hca_idx)
    num_csa = write_csa(
        cfg, tokens.position, csa_visible=out.csa_visible, csa_indptr=out.csa_indptr
    )
    counts = [len(rows.q), num_tokens, num_hca, num_csa]
    for name, ratio in (("r1", cfg.csa_ratio), ("r2", cfg.hca_ratio)):
        counts += write_plans(
            cfg,
            rows,
            tokens,
            ratio,
            plan=getattr(out, f"plan_{name}"),
            plan_dst=getattr(out, f"plan_dst_{name}"),
            wplan=getattr(out, f"wplan_{name}"),
        )
    out.counts[:] = counts
