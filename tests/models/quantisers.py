"""Quantisers of PyPI, each run as a program of its own on a folder in bfloat16 or float32.

`python -m tests.models.quantisers NAME SCHEME BASE OUT` writes the folder OUT, and next to it the
values that the quantiser's own decoder gives for the matrices in four bits (OUT.safetensors).
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast


def load(base: Path, dtype: torch.dtype = torch.float32) -> Any:
    """The model of a folder."""
    return AutoModelForCausalLM.from_pretrained(base, dtype=dtype)


def modules(folder: Path, codes: str, dtype: torch.dtype) -> Iterator[tuple[str, dict[str, Any]]]:
    """Name and tensors of each module whose codes have a name and a dtype."""
    tensors = load_file(folder / "model.safetensors")
    for name, one in tensors.items():
        if name.endswith(f".{codes}") and one.dtype == dtype:
            prefix = name.removesuffix(codes)
            own = {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}
            yield prefix, own


def llmcompressor(scheme: str, base: Path, out: Path) -> dict[str, torch.Tensor]:
    """A preset of llm-compressor for all linear layers but the head, rounded to nearest."""
    from llmcompressor import oneshot
    from llmcompressor.modifiers.quantization import QuantizationModifier

    model = load(base)
    recipe = QuantizationModifier(targets="Linear", scheme=scheme, ignore=["lm_head"])
    oneshot(model=model, recipe=recipe, pipeline="datafree")
    model.save_pretrained(out, save_compressed=True)
    dtype = torch.uint8 if scheme.startswith("NVFP4") else torch.int32
    found = modules(out, "weight_packed", dtype)
    return {f"{prefix}weight": decompressed(own) for prefix, own in found}


def decompressed(own: dict[str, Any]) -> torch.Tensor:
    """Values of a module in float32, from the codes that compressed-tensors unpacks."""
    from compressed_tensors.compressors import unpack_fp4_from_uint8, unpack_from_int32

    packed, scales = own["weight_packed"], own["weight_scale"].float()
    rows, groups = scales.shape
    if packed.dtype == torch.uint8:
        values = unpack_fp4_from_uint8(packed, rows, 2 * packed.shape[1], torch.float32)
        scales = scales / own["weight_global_scale"]
    else:
        values = unpack_from_int32(packed, 4, torch.Size((rows, 8 * packed.shape[1]))).float()
        if (zeros := own.get("weight_zero_point")) is not None:
            # its words hold eight rows, and a view of them needs columns that are next to another
            points = unpack_from_int32(zeros.T.contiguous(), 4, torch.Size((groups, rows)))
            values = values - points.T.float().repeat_interleave(values.shape[1] // groups, 1)
    return values * scales.repeat_interleave(values.shape[1] // groups, 1)


def modelopt(scheme: str, base: Path, out: Path) -> dict[str, torch.Tensor]:
    """NVIDIA ModelOpt with one of its configurations and random tokens to calibrate with."""
    import modelopt.torch.quantization as mtq
    from modelopt.torch.export import export_hf_checkpoint
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    model, tokens = load(base, torch.bfloat16), torch.arange(2, 66).reshape(2, 32)
    mtq.quantize(model, getattr(mtq, scheme), lambda one: one(tokens))
    export_hf_checkpoint(model, export_dir=out)
    found = {}
    for prefix, own in modules(out, "weight", torch.uint8):
        shape = (own["weight"].shape[0], 2 * own["weight"].shape[1])
        values = NVFP4QTensor(torch.Size(shape), torch.float32, own["weight"])
        found[f"{prefix}weight"] = values.dequantize(
            scale=own["weight_scale"], double_scale=own["weight_scale_2"], block_sizes={-1: 16}
        )
    return found


def autoround(scheme: str, base: Path, out: Path) -> dict[str, torch.Tensor]:
    """AutoRound, rounded to nearest: format, comma, sym or asym."""
    from auto_round import AutoRound
    from tokenizers import Tokenizer, models

    kind, symmetric = scheme.split(",")
    words = models.WordLevel({"a": 0, "b": 1}, unk_token="a")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words))
    # AutoRound would write float32 tensors of the folder instead of its own
    file, folders = base / "model.safetensors", []
    halves = {name: one.half() for name, one in load_file(file).items()}
    save_file(halves, file, metadata={"format": "pt"})
    for one in (kind, "fake"):
        method = AutoRound(
            *(load(base, torch.float16), tokenizer),
            bits=4,
            group_size=32,
            sym=symmetric == "sym",
            iters=0,
            disable_opt_rtn=True,
            device_map="cpu",
            low_gpu_mem_usage=False,
        )
        method.quantize_and_save(output_dir=str(out / one), format=one)
        folders.append(next((out / one).rglob("config.json")).parent)
    for made in folders[0].iterdir():
        made.rename(out / made.name)
    tensors = load_file(folders[1] / "model.safetensors")
    names = {f"{prefix}weight" for prefix, _ in modules(out, "qweight", torch.int32)}
    return {name: tensors[name].float() for name in names}


QUANTISERS: dict[str, Callable[[str, Path, Path], dict[str, torch.Tensor]]] = {
    "llmcompressor": llmcompressor,
    "modelopt": modelopt,
    "autoround": autoround,
}

if __name__ == "__main__":
    name, scheme, base, out = sys.argv[1:]
    values = QUANTISERS[name](scheme, Path(base), Path(out))
    save_file({n: one.float().contiguous() for n, one in values.items()}, f"{out}.safetensors")
