"""DeepSeek-V4's layer for multi-token prediction by its definition, in doubles, token by token."""

from __future__ import annotations

from typing import Any

import numpy as np

Tensors = dict[str, np.ndarray]


def rms(x: np.ndarray, epsilon: float, weight: Any = 1.0) -> np.ndarray:
    """RMSNorm of the last axis."""
    found: np.ndarray = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + epsilon) * weight
    return found


def sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


class MtpReference:
    """The layer of a checkpoint.

    Args:
        fields: config.json.
        tensors: the checkpoint under the names of the releases.
    """

    def __init__(self, fields: dict[str, Any], tensors: Tensors) -> None:
        self._fields, self._eps = fields, fields["rms_norm_eps"]
        wide = {name: one.astype(np.float64) for name, one in tensors.items()}
        self._own = {k.removeprefix("mtp.0."): v for k, v in wide.items() if k.startswith("mtp.0.")}
        self._embed = wide["embed.weight"]
        self._head = wide.get("head.weight", self._embed)

    def streams(self, next_ids: np.ndarray, streams: np.ndarray) -> np.ndarray:
        """Streams after the layer [n, num_streams, hidden_size] of tokens 0 to n - 1.

        Args:
            next_ids: int [n], the token after each.
            streams: [n, num_streams, hidden_size], before the model sums them.
        """
        own = self._own
        embedded = (
            rms(self._embed[next_ids], self._eps, own["enorm.weight"]) @ own["e_proj.weight"].T
        )
        s = rms(streams.astype(np.float64), self._eps, own["hnorm.weight"]) @ own["h_proj.weight"].T
        s = s + embedded[:, None]
        for site, block in (("attn", self._attend), ("ffn", self._experts)):
            mixes = [self._mixes(site, one) for one in s]
            x = np.array([pre @ one for (pre, _, _), one in zip(mixes, s, strict=True)])
            y = block(rms(x, self._eps, own[f"{site}_norm.weight"]))
            pairs = zip(mixes, y, s, strict=True)
            s = np.array([np.outer(post, out) + a.T @ one for (_, post, a), out, one in pairs])
        return s

    def logits(self, streams: np.ndarray) -> np.ndarray:
        """Logits [n, vocab_size] of streams after the layer."""
        own, summed = self._own, []
        for one in streams:
            mixed = rms(one.reshape(-1), self._eps) @ own["hc_head_fn"].T
            weights = sigmoid(mixed * own["hc_head_scale"] + own["hc_head_base"])
            summed.append((weights + self._fields["hc_eps"]) @ one)
        normed = rms(np.array(summed), self._eps, own["norm.weight"])
        found: np.ndarray = normed @ self._head.T
        return found

    def _mixes(self, site: str, one: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Weights of reading, of writing, and the matrix between the streams, of one token."""
        n, eps = len(one), self._fields["hc_eps"]
        fn, base, scale = (self._own[f"hc_{site}_{part}"] for part in ("fn", "base", "scale"))
        m = rms(one.reshape(-1), self._eps) @ fn.T
        pre = sigmoid(m[:n] * scale[0] + base[:n]) + eps
        post = 2 * sigmoid(m[n : 2 * n] * scale[1] + base[n : 2 * n])
        a = np.exp((m[2 * n :] * scale[2] + base[2 * n :]).reshape(n, n))
        a = a / a.sum(axis=1, keepdims=True) + eps
        a = a / (a.sum(axis=0, keepdims=True) + eps)
        for _ in range(self._fields["hc_sinkhorn_iters"] - 1):
            a = a / (a.sum(axis=1, keepdims=True) + eps)
            a = a / (a.sum(axis=0, keepdims=True) + eps)
        return pre, post, a

    def _rotated(self, x: np.ndarray, position: int, sign: float = 1.0) -> np.ndarray:
        """Rotate the pairs of the last channels of [..., head_dim], for windows."""
        width, x = self._fields["qk_rope_head_dim"], x.copy()
        angle = position * self._fields["rope_theta"] ** (-2 * np.arange(width // 2) / width)
        turned = x[..., -width:]
        even, odd = turned[..., 0::2].copy(), turned[..., 1::2].copy()
        cos, sin = np.cos(angle), sign * np.sin(angle)
        turned[..., 0::2], turned[..., 1::2] = even * cos - odd * sin, odd * cos + even * sin
        return x

    def _attend(self, x: np.ndarray) -> np.ndarray:
        """Attention to the window of each token."""
        own = {k.removeprefix("attn."): v for k, v in self._own.items() if k.startswith("attn.")}
        fields, out, keys = self._fields, [], []
        heads, width, groups = (
            fields[name] for name in ("num_attention_heads", "head_dim", "o_groups")
        )
        for position, token in enumerate(x):
            latent = rms(own["wq_a.weight"] @ token, self._eps, own["q_norm.weight"])
            q = rms((own["wq_b.weight"] @ latent).reshape(heads, width), self._eps)
            key = rms(own["wkv.weight"] @ token, self._eps, own["kv_norm.weight"])
            keys.append(self._rotated(key, position))
            window = np.array(keys[-fields["sliding_window"] :])
            scores = np.exp(self._rotated(q, position) @ window.T / np.sqrt(width))
            scores /= scores.sum(axis=1, keepdims=True) + np.exp(own["attn_sink"])[:, None]
            values = self._rotated(scores @ window, position, -1.0).reshape(groups, -1)
            low = own["wo_a.weight"].reshape(groups, -1, values.shape[1])
            parts = [part @ value for part, value in zip(low, values, strict=True)]
            out.append(own["wo_b.weight"] @ np.concatenate(parts))
        return np.array(out)

    def _experts(self, x: np.ndarray) -> np.ndarray:
        """The shared expert, and those with the best scores."""
        own, fields, out = self._own, self._fields, []
        limit = fields["swiglu_limit"]

        def expert(name: str, token: np.ndarray) -> np.ndarray:
            w1, w2, w3 = (own[f"ffn.{name}.w{i}.weight"] for i in (1, 2, 3))
            gate = np.minimum(w1 @ token, limit)
            found: np.ndarray = w2 @ (gate * sigmoid(gate) * np.clip(w3 @ token, -limit, limit))
            return found

        for token in x:
            scores = np.sqrt(np.log1p(np.exp(own["ffn.gate.weight"] @ token)))
            best = np.argsort(-(scores + own["ffn.gate.bias"]))[: fields["num_experts_per_tok"]]
            y = expert("shared_experts", token)
            for j in best:
                share = scores[j] / scores[best].sum() * fields["routed_scaling_factor"]
                y = y + share * expert(f"experts.{j}", token)
            out.append(y)
        return np.array(out)
