"""Logits of a block-FP8 folder by transformers in a process of its own.

    python -m tests.parity.hugging_face_fp8 KERNEL IDS.json OUT.npy FOLDER...

KERNEL "transformers" is the GEMM that transformers takes on a GPU: Triton kernels which it
downloads, or a package `finegrained_fp8` with the same sources where one can be imported. Without
either the process ends with status 3 and the reason in one line. KERNEL "torch" is a stand-in for
that one function: activations in e4m3 with a scale for each token and 128 values, float32 sums for
each block, then its scale. Everything else is transformers' own: how the folder is read, which
layers are FP8, where scales are. Without a GPU the stand-in runs on the CPU.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
import transformers
from transformers.integrations import finegrained_fp8
from transformers.quantizers.quantizer_finegrained_fp8 import FineGrainedFP8HfQuantizer

NO_KERNEL = 3
_CLASSES = {
    "deepseek_v32": transformers.DeepseekV32ForCausalLM,
    "glm_moe_dsa": transformers.GlmMoeDsaForCausalLM,
}


def matmul(
    x: Any, weight: Any, scales: Any, block_size: Any, dtype: Any, activation_scale: Any = None
) -> Any:
    """Transformers' GEMM of FP8 weights, in torch."""
    assert activation_scale is None
    rows, columns = block_size
    scales = scales.float().repeat_interleave(rows, 0)[: len(weight)]
    flat = x.float().reshape(-1, x.shape[-1])
    total = flat.new_zeros(len(flat), len(weight))
    for block, begin in enumerate(range(0, flat.shape[1], columns)):
        part = flat[:, begin : begin + columns]
        scale = (part.abs().amax(1, keepdim=True) / 448).clamp(min=1e-12)
        codes = (part / scale).to(torch.float8_e4m3fn).float()
        sums = codes @ weight[:, begin : begin + columns].float().T
        total += sums * scale * scales[:, block]
    return total.to(dtype).reshape(*x.shape[:-1], len(weight))


def set_kernel(kind: str) -> None:
    """Make transformers use a kernel; ends the process where it has none."""
    # the other kernel that it may download; its own is written for more models
    os.environ["TRANSFORMERS_DISABLE_DEEPGEMM_LINEAR"] = "1"
    found = matmul
    if kind == "transformers":
        if not torch.cuda.is_available():
            _leave("torch sees no GPU")
        try:
            found = finegrained_fp8.load_finegrained_fp8_kernel().matmul
        except Exception as downloading:
            try:
                from finegrained_fp8 import matmul_2d as found
            except ImportError:
                _leave(f"transformers {transformers.__version__}: {downloading}")
    entries = SimpleNamespace(matmul=found, batched_matmul=None, grouped_matmul=None)
    finegrained_fp8._FINEGRAINED_FP8 = entries


def _leave(reason: str) -> None:
    print(reason.partition("\n")[0])
    sys.exit(NO_KERNEL)


@torch.no_grad()
def logits_of(folder: Path, ids: list[int]) -> np.ndarray:
    """float32 [tokens, vocabulary] of one prompt."""
    cls = _CLASSES[json.loads((folder / "config.json").read_text())["model_type"]]
    # it would dequantise the weights where there is no GPU
    with mock.patch.object(FineGrainedFP8HfQuantizer, "validate_environment", lambda *a, **k: None):
        model, info = cls.from_pretrained(
            folder,
            dtype=torch.bfloat16,
            attn_implementation="eager",
            experts_implementation="eager",
            output_loading_info=True,
        )
    left = {key: info[key] for key in ("missing_keys", "unexpected_keys") if info[key]}
    kinds = [type(module).__name__ for module in model.modules()]
    assert not left and "FP8Linear" in kinds and "FP8Experts" in kinds, (left, set(kinds))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    logits = model.to(device).eval()(torch.tensor([ids], device=device)).logits[0]
    return np.asarray(logits.float().cpu().numpy())


def main() -> None:
    """Write the logits of each folder."""
    kind, ids, out, *folders = sys.argv[1:]
    set_kernel(kind)
    tokens = json.loads(Path(ids).read_text())
    np.save(out, np.stack([logits_of(Path(folder), tokens) for folder in folders]))


if __name__ == "__main__":
    main()
