"""The DeepSeek-V3.2 architecture for training: no cache, whole rows, a dict of weights a layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from .attention import AttentionFunctions, Weights, indexed_attention, rms_norm

INDEXER = ("wq_b", "wk", "k_w", "k_b", "w_proj")


def dense_block(x, o, p: Weights):
    """Apply output projection and dense MLP to x [N, D] and o [N, H * 64]."""
    x = x + F.linear(o, p["o"])
    m = rms_norm(x, p["ln2"])
    return x + F.linear(F.silu(F.linear(m, p["g"])) * F.linear(m, p["u"]), p["d"])


def expert_block(x, o, p: Weights, bias, chosen: int, scale: float):
    """Apply output projection and MoE. Returns also loads of experts and the balance term.

    All experts run as one wide MLP whose activation is scaled by the routing weight (0 where an
    expert is not chosen): exact, and faster at this size than any gather.
    """
    x = x + F.linear(o, p["o"])
    m = rms_norm(x, p["ln2"])
    experts, width, hidden = p["eg"].shape
    with torch.autocast(x.device.type, enabled=False):
        gate = torch.sigmoid(F.linear(m.float(), p["gate"].float()))
    top = (gate.detach() + bias).topk(chosen, -1).indices
    hot = torch.zeros_like(gate).scatter(-1, top, 1.0)
    weight = gate * hot
    weight = weight / (weight.sum(-1, keepdim=True) + 1e-20) * scale
    up = F.linear(m, p["eu"].reshape(experts * width, hidden))
    act = F.silu(F.linear(m, p["eg"].reshape(experts * width, hidden))) * up
    act = (act.view(-1, experts, width) * weight[..., None].to(act.dtype)).view(-1, experts * width)
    routed = F.linear(act, p["ed"].permute(1, 0, 2).reshape(hidden, experts * width))
    shared = F.linear(F.silu(F.linear(m, p["sg"])) * F.linear(m, p["su"]), p["sd"])
    load = hot.mean(0)
    share = (gate / (gate.sum(-1, keepdim=True) + 1e-9)).mean(0)
    return x + routed + shared, load, experts / chosen * (load * share).sum()


def token_loss(x, norm, head, targets, weights):
    """Return the mean cross entropy of x [N, D] with targets and weights [N]."""
    logits = F.linear(rms_norm(x, norm), head).float()
    loss = F.cross_entropy(logits, targets, reduction="none")
    return (loss * weights).sum() / weights.sum().clamp(min=1)


@dataclass
class Pass:
    """Result of a forward pass: hidden [N, D], loads per MoE layer, sums of KL and balance."""

    hidden: torch.Tensor
    loads: list[torch.Tensor]
    kl: torch.Tensor | float
    balance: torch.Tensor | float


class DemoModel(nn.Module):
    """Weights and forward pass. `config` has the Hugging Face field names of config.MODEL."""

    def __init__(self, config: dict):
        super().__init__()
        self.config = config
        self.attention = AttentionFunctions(config)
        vocab, hidden = config["vocab_size"], config["hidden_size"]
        self.embed = _matrix(vocab, hidden, std=0.3)
        self.head = _matrix(vocab, hidden, std=0.02)
        self.norm = _ones(hidden)
        self.layers = nn.ModuleList(
            nn.ParameterDict(_layer_weights(config, i < config["first_k_dense_replace"]))
            for i in range(config["num_hidden_layers"])
        )
        layers, experts = config["num_hidden_layers"], config["n_routed_experts"]
        self.register_buffer("bias", torch.zeros(layers, experts))

    def functions(self, compiled: bool = False) -> dict[str, Callable]:
        """Return the parts of a layer, compiled or as they are."""
        parts = {
            "project": self.attention.project,
            "index": self.attention.index,
            "attend": indexed_attention,
            "dense": dense_block,
            "experts": expert_block,
        }
        if not compiled:
            return parts
        return {name: torch.compile(f, dynamic=False) for name, f in parts.items()}

    def angles(self, length: int, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return cos and sin [rows * length, 1, rope/2] of positions 0 .. length-1."""
        device, dim = self.embed.device, self.config["qk_rope_head_dim"]
        steps = torch.arange(0, dim, 2, device=device).float() / dim
        frequency = self.config["rope_theta"] ** (-steps)
        angle = torch.arange(length, device=device).float()[:, None] * frequency
        return angle.cos().repeat(rows, 1)[:, None], angle.sin().repeat(rows, 1)[:, None]

    def forward(self, ids, mode: str = "dense", topk: int = 0, functions=None, window: int = 0):
        """Run rows of ids [B, T].

        Args:
            ids: int64 [B, T].
            mode: "dense"; "kl" (dense attention and the indexer's KL); "sparse" (top-k set and KL).
            topk: size of the selected set in mode "sparse".
            functions: parts from `functions()`; compiled ones in training.
            window: in mode "dense", only the last `window` tokens are seen (0 = all).
        """
        parts = functions or self.functions()
        rows, length = ids.shape
        cos, sin = self.angles(length, rows)
        x = F.embedding(ids.reshape(-1), self.embed)
        out = Pass(x, [], 0.0, 0.0)
        chosen, scale = self.config["num_experts_per_tok"], self.config["routed_scaling_factor"]
        for i, layer in enumerate(self.layers):
            p = dict(layer)
            a, q_latent, q, k, v = parts["project"](x, cos, sin, p)
            q, k, v = (z.view(rows, length, *z.shape[1:]).transpose(1, 2) for z in (q, k, v))
            if mode == "dense":
                o = _dense_attention(q, k, v, window)
            else:
                iq, ik, w = parts["index"](a, q_latent, cos, sin, p)
                iq, ik, w = (z.view(rows, length, *z.shape[1:]) for z in (iq, ik, w))
                o, kl = parts["attend"](q, k, v, iq, ik, w, topk if mode == "sparse" else 0)
                out.kl = out.kl + kl
            o = o.transpose(1, 2).reshape(rows * length, -1)
            if "g" in p:
                x = parts["dense"](x, o, p)
            else:
                x, load, balance = parts["experts"](x, o, p, self.bias[i], chosen, scale)
                out.loads.append(load)
                out.balance = out.balance + balance
        out.hidden = x
        return out

    def logits(self, ids, **kwargs) -> torch.Tensor:
        """Return logits [B, T, vocab], with the arguments of forward."""
        x = self(ids, **kwargs).hidden
        return F.linear(rms_norm(x, self.norm), self.head).view(*ids.shape, -1)


def _dense_attention(q, k, v, window: int) -> torch.Tensor:
    if not window:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True)
    j = torch.arange(q.shape[2], device=q.device)
    mask = (j[None] <= j[:, None]) & (j[None] > j[:, None] - window)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _matrix(*shape: int, std: float | None = None) -> nn.Parameter:
    """Return normal weights. The default deviation is 1 / sqrt(inputs)."""
    return nn.Parameter(torch.randn(*shape) * (shape[-1] ** -0.5 if std is None else std))


def _ones(size: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(size))


def _layer_weights(c: dict, dense: bool) -> dict[str, nn.Parameter]:
    """Return fresh weights of a layer by short names (long ones: checkpoint.HF_NAMES)."""
    hidden, heads = c["hidden_size"], c["num_attention_heads"]
    q_rank, kv_rank = c["q_lora_rank"], c["kv_lora_rank"]
    nope, rope, value = c["qk_nope_head_dim"], c["qk_rope_head_dim"], c["v_head_dim"]
    experts, width = c["n_routed_experts"], c["moe_intermediate_size"]
    shared, wide, dim = width * c["n_shared_experts"], c["intermediate_size"], c["index_head_dim"]
    weights = {
        "ln1": _ones(hidden),
        "ln2": _ones(hidden),
        "q_a": _matrix(q_rank, hidden),
        "q_a_ln": _ones(q_rank),
        "q_b": _matrix(heads * (nope + rope), q_rank),
        "kv_a": _matrix(kv_rank + rope, hidden),
        "kv_a_ln": _ones(kv_rank),
        "kv_b": _matrix(heads * (nope + value), kv_rank),
        "o": _matrix(hidden, heads * value, std=0.01),
        "wq_b": _matrix(c["index_n_heads"] * dim, q_rank),
        "wk": _matrix(dim, hidden),
        "k_w": _ones(dim),
        "k_b": nn.Parameter(torch.zeros(dim)),
        "w_proj": _matrix(c["index_n_heads"], hidden),
    }
    if dense:
        weights |= {"g": _matrix(wide, hidden), "u": _matrix(wide, hidden)}
        return weights | {"d": _matrix(hidden, wide, std=0.01)}
    return weights | {
        "gate": _matrix(experts, hidden, std=0.02),
        "eg": _matrix(experts, width, hidden),
        "eu": _matrix(experts, width, hidden),
        "ed": _matrix(experts, hidden, width, std=0.01),
        "sg": _matrix(shared, hidden),
        "su": _matrix(shared, hidden),
        "sd": _matrix(hidden, shared, std=0.01),
    }
