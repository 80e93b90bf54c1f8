"""transformers' log-probabilities of a block-FP8 checkpoint, in float32 of its weights.

    python exact_logprobs.py MODEL SEQUENCES OUT DEVICE

Nothing is quantised but what the checkpoint stores, so it is what engines in FP8 come near to.
SEQUENCES is a JSON file of [[token ids, how many last positions count], ...]; of each, OUT/N.npy is
float32 [count, vocab_size]: what comes after each of them.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from transformers import DeepseekV32Config, DeepseekV32ForCausalLM

BLOCK = 128


def tensors(folder: Path, device: str) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield names and float32 values of a checkpoint."""
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, "pt", device=device) as file:
            names = set(file.keys())
            for name in names:
                if name.endswith("_scale_inv"):
                    continue
                tensor = file.get_tensor(name).float()
                if (scale := f"{name}_scale_inv") in names:
                    spread = file.get_tensor(scale).repeat_interleave(BLOCK, 0)
                    spread = spread.repeat_interleave(BLOCK, 1)
                    tensor *= spread[: tensor.shape[0], : tensor.shape[1]]
                yield name, tensor


def place(model: Any, name: str) -> torch.Tensor:
    """Return the parameter of a checkpoint's tensor. The experts of a layer share one."""
    before, found, rest = name.partition(".experts.")
    if not found:
        return model.get_parameter_or_buffer(name)
    expert, kind, _ = rest.split(".")
    experts = model.get_submodule(f"{before}.experts")
    if kind == "down_proj":
        return experts.down_proj[int(expert)]
    gate, up = experts.gate_up_proj[int(expert)].chunk(2)
    return gate if kind == "gate_proj" else up


@torch.inference_mode()
def main() -> None:
    """Compute and write."""
    folder, out, device = Path(sys.argv[1]), Path(sys.argv[3]), sys.argv[4]
    torch.set_float32_matmul_precision("highest")
    torch.set_default_device(device)
    settings = json.loads((folder / "config.json").read_text())
    del settings["quantization_config"], settings["torch_dtype"]
    config = DeepseekV32Config(**settings, attn_implementation="sdpa")
    model = DeepseekV32ForCausalLM(config).eval()
    for name, tensor in tensors(folder, device):
        place(model, name).copy_(tensor)
    sequences = json.loads(Path(sys.argv[2]).read_text())
    for index, (ids, count) in enumerate(sequences):
        logits = model(torch.tensor([ids]), logits_to_keep=count).logits[0]
        np.save(out / f"{index}.npy", torch.log_softmax(logits.float(), -1).cpu().numpy())


if __name__ == "__main__":
    main()
