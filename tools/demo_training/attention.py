"""MLA and the lightning indexer as plain functions of tensors and one layer's weights.

Each function is compiled once and serves all layers. N = tokens of the batch (rows x length), B
rows, T length, H heads, Hi indexer heads. Layouts: MLA rope rotates neighbouring pairs, the
indexer rotates halves, and the indexer's rope part is the first 64 of its 128 dimensions.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F

Weights = dict[str, torch.Tensor]
MASKED = -1e9  # not -inf: 0 * inf would put NaN into the KL


def rms_norm(x: torch.Tensor, weight: torch.Tensor, eps: float = 1e-6) -> torch.Tensor:
    """Return RMS norm in float32, result in the dtype of x."""
    y = x.float()
    return (y * torch.rsqrt(y.pow(2).mean(-1, keepdim=True) + eps) * weight).to(x.dtype)


def rope_pairs(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x0, x1), (x2, x3) ...

    Args:
        x: [N, h, R].
        cos, sin: [N, 1, R/2].
    """
    a, b = x[..., 0::2].float(), x[..., 1::2].float()
    return torch.stack((a * cos - b * sin, a * sin + b * cos), -1).flatten(-2).to(x.dtype)


def rope_halves(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the pairs (x0, x_{R/2}), (x1, x_{R/2+1}) ..., with shapes as in rope_pairs."""
    a, b = x.float().chunk(2, -1)
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1).to(x.dtype)


class AttentionFunctions:
    """The attention functions for one model configuration (a dict of Hugging Face field names)."""

    def __init__(self, config: dict):
        self.heads = config["num_attention_heads"]
        self.nope, self.rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
        self.value, self.latent = config["v_head_dim"], config["kv_lora_rank"]
        self.index_heads, self.index_dim = config["index_n_heads"], config["index_head_dim"]

    def project(self, x, cos, sin, p: Weights):
        """Return normed hidden [N, D], q latent [N, R], q and k [N, H, 128], v [N, H, 64]."""
        n = x.shape[0]
        a = rms_norm(x, p["ln1"])
        q_latent = rms_norm(F.linear(a, p["q_a"]), p["q_a_ln"])
        q = F.linear(q_latent, p["q_b"]).view(n, self.heads, self.nope + self.rope)
        kv = F.linear(a, p["kv_a"])
        latent = rms_norm(kv[:, : self.latent], p["kv_a_ln"])
        expanded = F.linear(latent, p["kv_b"]).view(n, self.heads, self.nope + self.value)
        q = torch.cat((q[..., : self.nope], rope_pairs(q[..., self.nope :], cos, sin)), -1)
        k_rope = rope_pairs(kv[:, None, self.latent :], cos, sin).expand(n, self.heads, self.rope)
        k = torch.cat((expanded[..., : self.nope], k_rope.to(expanded.dtype)), -1)
        return a, q_latent, q, k, expanded[..., self.nope :].contiguous()

    def index(self, a, q_latent, cos, sin, p: Weights):
        """Return indexer q [N, Hi, 128], k [N, 128] and head weights [N, Hi], without gradient."""
        a, q_latent = a.detach(), q_latent.detach()
        heads, dim, r = self.index_heads, self.index_dim, self.rope
        q = F.linear(q_latent, p["wq_b"]).view(-1, heads, dim)
        k = F.layer_norm(F.linear(a, p["wk"]).float(), (dim,), p["k_w"], p["k_b"], 1e-6)[:, None]
        q = torch.cat((rope_halves(q[..., :r], cos, sin), q[..., r:]), -1)
        k = torch.cat((rope_halves(k[..., :r], cos, sin), k[..., r:]), -1)
        weights = F.linear(a, p["w_proj"]).float() * (heads**-0.5 * dim**-0.5)
        return q, k[:, 0].to(q.dtype), weights


def index_scores(q, k, weights):
    """Return causal scores, float32 [B, T, T], of q [B, T, Hi, 128], k [B, T, 128] and weights."""
    rows, length, heads, dim = q.shape
    dots = (q.reshape(rows, length * heads, dim) @ k.transpose(1, 2)).view(
        rows, length, heads, length
    )
    scores = (F.relu(dots).float() * weights[..., None]).sum(2)
    i = torch.arange(length, device=scores.device)
    return scores.masked_fill(i[None, :] > i[:, None], MASKED)


def select(scores: torch.Tensor, topk: int) -> torch.Tensor:
    """Return the causal top-k set of each query, bool [B, T, T]. topk 0 keeps all.

    By scatter of indices: a threshold would keep too many, since scores tie at exactly 0. Rows
    shorter than topk need the causal mask once more.
    """
    length = scores.shape[-1]
    i = torch.arange(length, device=scores.device)
    keep = (i[None, :] <= i[:, None])[None]
    if topk and topk < length:
        chosen = scores.detach().topk(topk, -1, sorted=False).indices
        keep = keep & torch.zeros_like(scores, dtype=torch.bool).scatter(-1, chosen, True)
    return keep


def indexed_attention(q, k, v, index_q, index_k, weights, topk: int):
    """Return attention over the top-k set (topk 0: dense), and the indexer's KL to it.

    Args:
        q, k: [B, H, T, 128]; v: [B, H, T, 64].
        index_q: [B, T, Hi, 128]; index_k: [B, T, 128]; weights: [B, T, Hi].
        topk: size of the selected set, tokens; 0 = dense attention, as in the indexer's warm-up.

    Returns:
        output [B, H, T, 64], and KL(mean attention of the heads ‖ softmax of the scores) in nats,
        the mean over tokens. Both are on the selected set. The attention is detached there, so that
        the KL trains only the indexer.
    """
    scores = index_scores(index_q, index_k, weights)
    keep = select(scores, topk)
    dots = (q @ k.transpose(-1, -2)).float() * (q.shape[-1] ** -0.5)
    attention = dots.masked_fill(~keep[:, None], float("-inf")).softmax(-1)
    target = attention.detach().mean(1)
    log_index = scores.masked_fill(~keep, MASKED).log_softmax(-1)
    kl = (target * (torch.log(target + 1e-9) - log_index)).masked_fill(~keep, 0.0).sum(-1)
    return attention.to(v.dtype) @ v, kl.mean()
