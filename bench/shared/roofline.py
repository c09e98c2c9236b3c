"""What a decoding step would take on a GPU, from public figures: a model of the time, not a measurement.

    target step of B rows, R requests = kernels * gap + max(weights / bandwidth, 2 * parameters * B / flops)
                                        + (logits of B rows + key-value cache of R contexts) / bandwidth
    drafting for R requests           = the same of the drafter at R * K rows, and W2 once per position

Symbols: B rows of the target's pass (anchors and admitted drafts), R requests, K drafts. Weights are streamed once for all
rows, and products and streaming overlap completely (the roofline); attention over the context reads every request's cache once,
however many rows of that request there are, and overlaps with nothing. What is left out: prompts, sampling and acceptance beyond
one reading of the logits, the host, communication.

Sources. H200: 989 TFLOP/s dense bf16 and 4.8 TB/s on paper (NVIDIA's data sheet), about 4.3 TB/s for a measured device copy.
Qwen3-4B: its config.json. Drafter: arXiv 2607.05147 (5 layers of the target's shape, 5 target layers injected, rank 256, K = 7).
Assumed, not sourced: the share of peak that large products reach, the gap between kernels of a captured graph, the context.
"""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # which imports torch
    from dspark_kernels.types import CostTable


@dataclasses.dataclass(frozen=True)
class Machine:
    name: str = "H200"
    bytes_per_second: float = 4.3e12
    peak_flops: float = 989e12
    share_of_peak: float = 0.6
    kernel_gap: float = 1.5e-6  # s between the kernels of a graph

    @property
    def flops(self) -> float:
        return self.peak_flops * self.share_of_peak


@dataclasses.dataclass(frozen=True)
class Decoder:
    """Qwen3-4B and its published drafter, bf16, tied embeddings."""

    name: str = "Qwen3-4B"
    layers: int = 36
    hidden: int = 2560
    intermediate: int = 9728
    heads: int = 32
    kv_heads: int = 8
    head_dim: int = 128
    vocab: int = 151936
    draft_layers: int = 5
    injected_layers: int = 5
    rank: int = 256
    drafts: int = 7
    kernels_per_layer: int = 10
    bytes_per_number: int = 2

    @property
    def layer_parameters(self) -> int:
        attention = self.hidden * self.head_dim * (2 * self.heads + 2 * self.kv_heads)
        return attention + 3 * self.hidden * self.intermediate

    @property
    def head_parameters(self) -> int:
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        return self.layers * self.layer_parameters + self.head_parameters

    @property
    def draft_parameters(self) -> int:
        """What a block's rows go through; the injection of the context is for few rows and counts as weights to stream only."""
        return self.draft_layers * self.layer_parameters + self.head_parameters

    def cache_bytes(self, layers: int, context: int) -> int:
        return 2 * layers * self.kv_heads * self.head_dim * context * self.bytes_per_number


# The sizes that vLLM captures by default, up to 512 rows; larger steps run unpadded.
CAPTURED = (1, 2, 4, *range(8, 256, 8), *range(256, 513, 16))


def target_seconds(rows: int, requests: int, context: int, machine=Machine(), model=Decoder()) -> float:
    size = model.bytes_per_number
    products = max(model.parameters * size / machine.bytes_per_second, 2 * model.parameters * rows / machine.flops)
    moved = 2 * rows * model.vocab * size + requests * model.cache_bytes(model.layers, context)  # logits: written, read
    return model.layers * model.kernels_per_layer * machine.kernel_gap + products + moved / machine.bytes_per_second


def draft_seconds(requests: int, context: int, machine=Machine(), model=Decoder()) -> float:
    size, rows = model.bytes_per_number, requests * model.drafts
    weights = model.draft_parameters + model.injected_layers * model.hidden**2
    products = max(weights * size / machine.bytes_per_second, 2 * model.draft_parameters * rows / machine.flops)
    transition = model.drafts * model.vocab * model.rank * size / machine.bytes_per_second
    transition = max(transition, 2 * rows * model.vocab * model.rank / machine.flops)
    moved = 3 * rows * model.vocab * size  # base logits written and read, the draft logits written
    moved += requests * model.cache_bytes(model.draft_layers, context)
    gaps = (model.draft_layers * model.kernels_per_layer + 1) * machine.kernel_gap
    return gaps + products + transition + moved / machine.bytes_per_second


def table(requests: int, context: int, captured=CAPTURED, machine=Machine(), model=Decoder()) -> CostTable:
    """Steps of `requests` requests with `context` tokens each, up to all drafts verified. captured: () = no padding to graphs."""
    from dspark_kernels.types import CostTable

    largest = max(max(captured, default=0) + 1, requests * (1 + model.drafts), 2)
    sizes = list(range(1, largest + 1))
    return CostTable.from_curve(
        sizes,
        [target_seconds(rows, requests, context, machine, model) for rows in sizes],
        captured=captured,
        device="cpu",
        draft_sizes=sizes[: max(2, requests)],
        draft_seconds=[draft_seconds(n, context, machine, model) for n in sizes[: max(2, requests)]],
        info=describe(context, captured, machine, model) | {"requests": requests},
    )


def describe(context: int, captured=CAPTURED, machine=Machine(), model=Decoder()) -> dict:
    """The inputs, as a table's `info` keeps them."""
    return {
        "modelled": "a roofline from public figures, not measured",
        "machine": dataclasses.asdict(machine),
        "model": dataclasses.asdict(model),
        "parameters": model.parameters,
        "draft_parameters": model.draft_parameters,
        "context": context,
        "captured": list(captured),
    }


def lines(context: int, captured=CAPTURED, machine=Machine(), model=Decoder()) -> list[str]:
    """The inputs for the screen."""
    padded = f"padded to graphs of up to {captured[-1]} rows" if captured else "not padded to graphs"
    return [
        f"costs: MODELLED, not measured: {model.name} in bf16 on one {machine.name}, roofline (bench/shared/roofline.py)",
        f"  {machine.bytes_per_second / 1e12:g} TB/s (a measured copy), {machine.share_of_peak:.0%} (assumed) of"
        f" {machine.peak_flops / 1e12:g} TFLOP/s, {1e6 * machine.kernel_gap:g} us (assumed) between kernels, {padded}",
        f"  target {model.parameters / 1e9:.2f}e9 parameters, drafter {model.draft_parameters / 1e9:.2f}e9 and K = {model.drafts},"
        f" every request at {context} tokens of context",
    ]
