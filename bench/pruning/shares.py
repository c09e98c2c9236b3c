"""Tiles that could be skipped, and their share by batch size (bench/pruning)."""

from __future__ import annotations

import csv

import torch
from torch import Tensor

from bench.shared import acceptance
from dspark_kernels import MarkovHead

COLUMNS = ("logits", "requests", "batches", "share_skipped")
TILE = 64
BATCHES = (1, 8, 64)
VOCAB, RANK, SYNTHETIC_ROWS = 151936, 256, 64
SYNTHETIC = [(spread, peak, bias) for spread in (1.0, 3.0) for peak in (10.0, 20.0) for bias in (0.1, 1.0)]


def skippable(base: Tensor, latents: Tensor, w2: Tensor) -> Tensor:
    """bool [N, tiles] from base logits [N, V], latents [N, r] and W2 [V, r], fp32."""
    tiles = -(-base.shape[1] // TILE)
    missing = tiles * TILE - base.shape[1]
    best = (base + latents @ w2.T).amax(1)
    top = torch.nn.functional.pad(base, (0, missing), value=-torch.inf).view(-1, tiles, TILE).amax(2)
    norms = torch.nn.functional.pad(w2.norm(dim=1), (0, missing)).view(tiles, TILE).amax(1)
    return top + latents.norm(dim=1)[:, None] * norms < best[:, None]


def shares(name: str, skipped: Tensor, seed: int = 0) -> list[dict]:
    """Rows of the report from bool [N, tiles]: for batches of each size, drawn from the N without putting back."""
    order = torch.randperm(len(skipped), generator=torch.Generator().manual_seed(seed))
    rows = []
    for requests in BATCHES:
        batches = len(skipped) // requests
        if batches:
            share = skipped[order[: batches * requests]].view(batches, requests, -1).all(1).double().mean().item()
            rows.append(dict(zip(COLUMNS, (name, requests, batches, f"{share:.4f}"), strict=True)))
    return rows


def embedded(domain: str, texts: range, stride: int) -> Tensor:
    """bool [N, tiles] of all positions of the embedded drafter's blocks on texts of a domain."""
    found = []

    def observe(base: Tensor, anchors: Tensor, head: MarkovHead, drafts: Tensor) -> None:
        previous = torch.cat([anchors, drafts[0, :-1]])
        found.append(skippable(base[0].float(), head.w1[previous].float(), head.w2.float()))

    acceptance.measure(domain, texts, stride=stride, observe=observe)
    return torch.cat(found)


def synthetic(spread: float, peak: float, bias: float, vocab: int = VOCAB, rows: int = SYNTHETIC_ROWS) -> Tensor:
    """bool [rows, tiles] of random logits of standard deviation `spread`, one of them raised to `peak`."""
    generator = torch.Generator().manual_seed(0)
    w2 = torch.randn(vocab, RANK, generator=generator)
    latents = torch.randn(rows, RANK, generator=generator) * bias / RANK**0.5
    base = torch.randn(rows, vocab, generator=generator) * spread
    base[torch.arange(rows), torch.randint(vocab, (rows,), generator=generator)] = peak
    return skippable(base, latents, w2)


def run(options) -> int:
    """0: done."""
    cases = [
        (f"embedded, {domain}", lambda d=domain: embedded(d, range(options.texts), options.stride)) for domain in acceptance.DOMAINS
    ]
    cases += [
        (f"synthetic, spread {spread:g}, peak {peak:g}, bias {bias:g}", lambda s=spread, p=peak, b=bias: synthetic(s, p, b))
        for spread, peak, bias in SYNTHETIC
    ]
    rows = []
    for name, skipped in cases:
        rows += (added := shares(name, skipped()))
        print(f"{name:44}", *(f"R = {row['requests']}: {row['share_skipped']}" for row in added), sep="  ", flush=True)
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    return 0
