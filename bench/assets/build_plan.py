"""Sizes and budgets of the embedded models: the whole build, and a tiny one that shows that the script works."""

from __future__ import annotations

import dataclasses

LIMIT = 6_000_000  # bytes of all weights together


@dataclasses.dataclass(frozen=True)
class Plan:
    """Sizes of decoders: (hidden, intermediate, layers, query heads, key-value heads, head size)."""

    # corpus
    packages: int | None = None  # of each domain, None = all
    merges: int = 766
    mixture: tuple[float, ...] = (0.6, 0.2, 0.2)  # share of sequences of code, docs, tables
    length: int = 256  # tokens of a training sequence
    # target
    target: tuple[int, ...] = (192, 512, 6, 6, 2, 32)
    target_batch: int = 8
    target_seconds: float = 2400.0  # CPU-seconds, as all budgets
    # text of the target's own
    prompt: int = 64
    sequences: int = 8192
    evaluated: int = 96  # sequences from held-out prompts, to evaluate drafters on while they are trained
    # drafters
    feature_layers: tuple[int, ...] = (1, 3, 4)
    draft_model: tuple[int, ...] = (96, 256, 2, 3, 1, 32)
    block_layers: int = 2
    drafts: int = 7
    rank: int = 32
    batch: int = 6
    anchors: int = 32  # blocks in each sequence
    drafter_seconds: float = 600.0  # of every drafter; DSpark's last head_seconds of them go to its heads
    head_seconds: float = 100.0
    # what is shipped and measured
    prompts: tuple[int, ...] = (32, 16, 16)  # code, docs, tables
    rounds_stride: int = 1
    texts: int | None = None  # of each domain, None = all
    report_prompts: int = 16
    report_tokens: int = 96


FULL = Plan()
QUICK = Plan(
    packages=12, merges=62, length=64, target=(32, 64, 3, 2, 1, 16), target_batch=8, target_seconds=3.0, prompt=16, sequences=64,
    evaluated=16, feature_layers=(0, 1), draft_model=(16, 32, 1, 1, 1, 16), block_layers=1, drafts=4, rank=8, batch=4, anchors=8,
    drafter_seconds=2.0, head_seconds=0.5, prompts=(4, 2, 2), rounds_stride=8, texts=2, report_prompts=2, report_tokens=16,
)  # fmt: skip
