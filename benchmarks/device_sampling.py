"""Sampling on the device: rows of 129,280 logits, five launches, against operators of torch.

Logits are normal, of standard deviation 3. torch's side is what a sampler without kernels of its
own launches: the largest logit; or softmax, a sort where probabilities are cut, sums, and a search
for one number a row. Tokens are compared first: greedy ones with torch's, drawn ones are in the
nucleus, summed in doubles. The floor is one reading of the logits.
"""

from __future__ import annotations

import sys
from argparse import Namespace
from collections.abc import Iterator
from functools import partial
from typing import Any

import torch

from benchmarks import _gpu
from fd_dsa.ops.sampling.parameters import RowParameters
from fd_dsa.ops.sampling.sampler import DeviceSampler

VOCAB = 129_280
ROWS = (1, 32, 256)
SAMPLING = {
    "greedy": RowParameters(temperature=0.0),
    "temperature 1": RowParameters(),
    "top-p 0.95": RowParameters(top_p=0.95),
    "top-k 50, top-p 0.9": RowParameters(top_k=50, top_p=0.9),
}


def by_torch(logits: torch.Tensor, how: RowParameters, uniform: torch.Tensor) -> torch.Tensor:
    """Return a token of each row by operators."""
    if how.temperature == 0:
        return logits.argmax(-1)
    is_cut = how.top_k or how.top_p < 1
    probabilities, ids = logits.softmax(-1), None
    if is_cut:
        probabilities, ids = probabilities.sort(-1, descending=True)
    if how.top_k:
        probabilities = probabilities[:, : how.top_k] / probabilities[:, : how.top_k].sum(-1, True)
    sums = probabilities.cumsum(-1)
    if is_cut:
        # up to and with the first sum that reaches top_p
        last = torch.searchsorted(sums, torch.full_like(uniform, how.top_p))
        mass = sums.gather(1, last.clamp(max=sums.shape[1] - 1))
    else:
        mass = sums[:, -1:]
    place = torch.searchsorted(sums, uniform * mass).clamp(max=sums.shape[1] - 1)
    return (place if ids is None else ids.gather(1, place))[:, 0]


def is_right(logits: torch.Tensor, how: RowParameters, tokens: torch.Tensor) -> bool:
    """Return True if greedy tokens are torch's, and sampled ones are in the nucleus."""
    if how.temperature == 0:
        return torch.equal(tokens, logits.argmax(-1))
    probabilities, ids = logits.double().softmax(-1).sort(-1, descending=True)
    kept = probabilities[:, : how.top_k or VOCAB]
    before = kept.cumsum(-1) - kept
    place = (ids == tokens[:, None]).int().argmax(-1, keepdim=True)
    if not bool((place < kept.shape[1]).all()):
        return False
    return bool((before.gather(1, place) < (how.top_p + 1e-4) * kept.sum(-1, True)).all())


def compare(record: _gpu.Recorder, num_rows: int, name: str) -> bool:
    """Measure a case. Returns False if a token is wrong."""
    how = SAMPLING[name]

    def allocate(shape: tuple[int, ...], dtype: str) -> torch.Tensor:
        return torch.zeros(shape, device="cuda", dtype=getattr(torch, dtype))

    sampler = DeviceSampler(num_rows, VOCAB, allocate)
    for batch_row in range(num_rows):
        sampler.set_parameters(batch_row, how)
    nbytes = 4 * num_rows * VOCAB
    sets = [3 * torch.randn(num_rows, VOCAB, device="cuda") for _ in range(_gpu.num_sets(nbytes))]
    uniform = torch.rand(num_rows, 1, device="cuda")
    batch_rows = torch.arange(num_rows, device="cuda", dtype=torch.int32)
    positions, masks = torch.zeros_like(batch_rows), torch.full_like(batch_rows, -1)

    def ours(logits: torch.Tensor) -> None:
        sampler.sample(logits, batch_rows, positions, masks)

    ours(sets[0])
    tokens = sampler.tokens.clone()
    if not all(is_right(sets[0], how, one) for one in (tokens, by_torch(sets[0], how, uniform))):
        return False
    sides: dict[str, list[Any]] = {
        "torch": [partial(by_torch, logits, how, uniform) for logits in sets],
        "fd_dsa": [partial(ours, logits) for logits in sets],
    }
    times = _gpu.interleaved(sides, rounds=10)
    record.case(f"{num_rows} rows, {name}", times, ours="fd_dsa", bytes_moved=nbytes)
    return True


def cases(record: _gpu.Recorder, args: Namespace) -> Iterator[tuple[str, _gpu.Case]]:
    """Yield a case for each number of rows and each way to sample."""
    for num_rows in ROWS[-1:] if args.quick else ROWS:
        for name in SAMPLING:
            yield f"{num_rows} rows, {name}", partial(compare, record, num_rows, name)


main = partial(_gpu.main, "device_sampling", __doc__, cases)

if __name__ == "__main__":
    sys.exit(main())
