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

PART_BYTES = 15 << 20
TOKENS = {"bos_token_id": BOS, "eos_token_id": EOS, "pad_token_id": PAD}
names = load_table("tensors")  # ours -> Hugging Face's, of a layer or an expert
ROUTER_BIAS = "mlp.gate.e_score_correction_bias"


def named_tensors(model: DemoModel) -> Iterator[tuple[str, torch.Tensor]]:
    """(Hugging Face name, tensor of the model) of every weight; expert tensors are slices."""
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


def export(model: DemoModel) -> dict[str, torch.Tensor]:
    """CPU copies in bfloat16; the router's selection bias stays float32."""
    return {
        name: tensor.detach()
        .to("cpu", torch.float32 if name.endswith(ROUTER_BIAS) else torch.bfloat16)
        .contiguous()
        .clone()
        for name, tensor in named_tensors(model)
    }


@torch.no_grad()
def restore(model: DemoModel, tensors: dict[str, torch.Tensor]) -> None:
    """Copies exported tensors into a model of the same configuration."""
    for name, tensor in named_tensors(model):
        tensor.copy_(tensors[name])


def save(model: DemoModel, folder: str | Path) -> None:
    """Writes model.safetensors, config.json and generation_config.json."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file(export(model), folder / "model.safetensors", metadata={"format": "pt"})
    fields = {
        "architectures": ["DeepseekV32ForCausalLM"],
        "model_type": "deepseek_v32",
        **model.config,
        **FIXED_FIELDS,
        **TOKENS,
    }
    _write_json(folder / "config.json", fields)
    write_generation_settings(folder)


def write_generation_settings(folder: str | Path) -> None:
    """Writes generation_config.json."""
    fields = {**TOKENS, "do_sample": False, "max_new_tokens": 256}
    _write_json(Path(folder) / "generation_config.json", fields)


def _write_json(path: Path, fields: dict) -> None:
    path.write_text(json.dumps(fields, indent=2) + "\n", encoding="utf-8")


def load(folder: str | Path) -> DemoModel:
    """The model of an exported folder, weights in float32."""
    folder = Path(folder)
    fields = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    model = DemoModel(fields)
    restore(model, load_file(folder / "model.safetensors"))
    return model


def split(folder: str | Path, target: str | Path) -> None:
    """Writes model.safetensors of a folder as parts of 15 MiB: model.part0, model.part1 ..."""
    blob = (Path(folder) / "model.safetensors").read_bytes()
    for i, start in enumerate(range(0, len(blob), PART_BYTES)):
        (Path(target) / f"model.part{i}").write_bytes(blob[start : start + PART_BYTES])


def join(parts: str | Path, folder: str | Path) -> None:
    """Writes model.safetensors into a folder from the parts of `split`."""
    found = sorted(Path(parts).glob("model.part*"), key=lambda p: int(p.suffix[len(".part") :]))
    if not found:
        raise FileNotFoundError(f"join: no model.part* in {parts}; give the folder of the parts")
    blob = b"".join(part.read_bytes() for part in found)
    (Path(folder) / "model.safetensors").write_bytes(blob)
