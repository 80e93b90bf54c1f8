"""Export to and import from the Hugging Face format (bfloat16, experts one by one)."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from .config import BOS, EOS, FIXED_FIELDS, PAD
from .model import DemoModel
from .tables import load as load_table

TOKENS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
names = load_table("tensors")  # ours -> Hugging Face's, of a layer or an expert
ROUTER_BIAS = "mlp.gate.e_score_correction_bias"


def named_tensors(model: DemoModel) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield Hugging Face name and tensor of every weight. Expert tensors are slices."""
    yield "model.embed_tokens.weight", model.embed
    yield "lm_head.weight", model.head
    yield "model.norm.weight", model.norm
    for i, layer in enumerate(model.layers):
        start = f"model.layers.{i}."
        dense = "g" in layer
        for key, name in (names.attention | (names.dense if dense else names.moe)).items():
            yield start + name, layer[key]
        if dense:
            continue
        yield start + ROUTER_BIAS, model.bias[i]
        for expert in range(layer["eg"].shape[0]):
            for key, name in names.expert.items():
                yield f"{start}mlp.experts.{expert}.{name}", layer[key][expert]


def save(model: DemoModel, folder: str | Path) -> None:
    """Write model.safetensors, in bfloat16 but the router's bias, and both configurations."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {
        name: tensor.detach()
        .to("cpu", torch.float32 if name.endswith(ROUTER_BIAS) else torch.bfloat16)
        .contiguous()
        .clone()
        for name, tensor in named_tensors(model)
    }
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    fields = {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        **model.config,
        **FIXED_FIELDS,
        **TOKENS,
    }
    generation = {**TOKENS, "do_sample": False, "max_new_tokens": 256}
    for name, values in (("config", fields), ("generation_config", generation)):
        text = json.dumps(values, indent=2) + "\n"
        (folder / f"{name}.json").write_text(text, encoding="utf-8")


@torch.no_grad()
def load(folder: str | Path) -> DemoModel:
    """Return the model of an exported folder, weights in float32."""
    folder = Path(folder)
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = DemoModel(fields)
    tensors = load_file(folder / "model.safetensors")
    for name, tensor in named_tensors(model):
        tensor.copy_(tensors[name])
    return model
