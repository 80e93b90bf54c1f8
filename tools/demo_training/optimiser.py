"""Muon for the matrices of the blocks, AdamW for the rest."""

from __future__ import annotations

import torch

from .model import INDEXER, DemoModel

NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class Muon:
    """Momentum and an orthogonalised update, batched over the matrices of one shape.

    Source: Keller Jordan et al., Muon (2024): Nesterov momentum, five Newton-Schulz steps in
    bfloat16.
    """

    def __init__(self, params, momentum: float = 0.95, decay: float = 0.02):
        self.momentum, self.decay = momentum, decay
        self.groups: dict[tuple[int, int], list] = {}
        for p in params:
            self.groups.setdefault(tuple(p.shape[-2:]), []).append(p)
        self.state = {id(p): torch.zeros_like(p) for ps in self.groups.values() for p in ps}

    def state_dict(self) -> list[torch.Tensor]:
        """Return the momentum of each matrix, in the order of the groups."""
        return list(self.state.values())

    @torch.no_grad()
    def load_state_dict(self, momenta: list[torch.Tensor]) -> None:
        """Take over what `state_dict` gave."""
        for mine, given in zip(self.state.values(), momenta, strict=True):
            mine.copy_(given)

    @torch.no_grad()
    def step(self, rate: torch.Tensor) -> None:
        """Update the weights with a learning rate, which may be on the GPU."""
        for (rows, cols), params in self.groups.items():
            grads, means = [p.grad for p in params], [self.state[id(p)] for p in params]
            torch._foreach_lerp_(means, grads, 1 - self.momentum)
            update = torch._foreach_lerp(grads, means, self.momentum)
            x = torch.cat([u.reshape(-1, rows, cols) for u in update]).bfloat16()
            x = _orthogonal(x.mT if rows > cols else x)
            x = (x.mT if rows > cols else x).float() * (rate * max(1, rows / cols) ** 0.5)
            start = 0
            for p in params:
                count = p.numel() // (rows * cols)
                p.mul_(1 - rate * self.decay).sub_(x[start : start + count].view_as(p))
                start += count


def _orthogonal(x: torch.Tensor) -> torch.Tensor:
    """Return matrices with singular values near 1, for x [n, rows <= cols, cols]."""
    a, b, c = NEWTON_SCHULZ
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x


class Optimiser:
    """Both optimisers, clipping, and the groups: blocks, vocabulary and norms, router, indexer.

    Learning rates are tensors beside the weights, so that a captured step reads new ones.
    """

    def __init__(self, model: DemoModel, rates: dict[str, float]):
        self.indexer = [layer[k] for layer in model.layers for k in INDEXER]
        routers = [layer["gate"] for layer in model.layers if "gate" in layer]
        apart = {id(p) for p in (*self.indexer, *routers, model.embed, model.head)}
        blocks = [p for p in model.parameters() if p.ndim >= 2 and id(p) not in apart]
        inside = {id(p) for p in (*blocks, *self.indexer, *routers)}
        self.rest = [p for p in model.parameters() if id(p) not in inside]
        self.model, self.rates = model, rates
        on_gpu = model.embed.is_cuda
        self.current = {name: torch.zeros((), device=model.embed.device) for name in rates}
        self.muon = Muon(blocks)
        groups = (("adam", self.rest), ("gate", routers), ("indexer", self.indexer))
        self.adam = torch.optim.AdamW(
            [{"params": ps, "lr": self.current[name]} for name, ps in groups],
            betas=(0.9, 0.95),
            weight_decay=0.0,
            fused=on_gpu,
            capturable=on_gpu,
        )

    def set_rates(self, factor: float, indexer_factor: float) -> None:
        """Set the learning rates of the next steps. `factor` scales all but the indexer's."""
        for name, rate in self.rates.items():
            self.current[name].fill_(rate * (indexer_factor if name == "indexer" else factor))

    def step(self, with_indexer: bool) -> None:
        """Update the weights and drop the gradients."""
        torch.nn.utils.clip_grad_norm_(self.rest, 1.0)
        if with_indexer:
            torch.nn.utils.clip_grad_norm_(self.indexer, 1.0)
        self.adam.step()
        self.muon.step(self.current["muon"])
        for p in self.model.parameters():
            p.grad = None

    def state_dict(self) -> dict:
        """Return the state of both optimisers."""
        return {"adam": self.adam.state_dict(), "muon": self.muon.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        """Take over what `state_dict` gave."""
        self.adam.load_state_dict(state["adam"])
        for group, name in zip(self.adam.param_groups, ("adam", "gate", "indexer"), strict=True):
            group["lr"] = self.current[name]
        self.muon.load_state_dict(state["muon"])
