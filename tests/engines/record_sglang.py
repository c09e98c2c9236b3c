"""Records what SGLang's kernel accepts under the acceptance uniforms of this package: tests/data/sglang_chain.npz.

    python tests/engines/record_sglang.py reject_sampling.py [--requests 48] [--out FILE]

The argument is sglang/kernels/ops/speculative/reject_sampling.py of SGLang 0.5.23, which imports Triton alone: it is loaded without the
rest of SGLang, and its kernel runs in Triton's interpreter. Prints on how many requests `accept_chain` agrees, by rule.
"""

import argparse
import importlib.util
import os
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"  # before Triton is imported

import numpy as np
import torch

import dspark_kernels as dk
from dspark_kernels.testing import interpreter
from reference import philox

DRAFTS, VOCAB = 3, 20
DATA = Path(__file__).resolve().parents[1] / "data" / "sglang_chain.npz"


def inputs(requests: int) -> dict:
    """Logits on a grid, so that they are exact in fp16; drafts drawn from the draft's distribution."""
    generator = torch.Generator().manual_seed(0)
    random = lambda *shape: (32 * torch.randn(*shape, generator=generator)).round() / 16  # noqa: E731
    target = random(requests, DRAFTS + 1, VOCAB)
    draft = ((0.7 * target[:, :-1] + 0.5 * random(requests, DRAFTS, VOCAB)) * 16).round() / 16
    temperature = torch.tensor([0.6, 1.0, 1.5])[torch.arange(requests) % 3]
    probs = (draft / temperature[:, None, None]).softmax(-1)
    return dict(
        target_logits=target,
        draft_logits=draft,
        temperature=temperature,
        drafts=torch.multinomial(probs.flatten(0, 1), 1, generator=generator).view(requests, DRAFTS),
        seeds=torch.randint(-(2**63), 2**63 - 1, (requests,), generator=generator),
        anchor_positions=torch.randint(0, 5000, (requests,), generator=generator),
    )


def uniforms(seeds: torch.Tensor, anchor_positions: torch.Tensor) -> torch.Tensor:
    """fp32 [R, K]: what `accept_chain` draws for each draft (docs/randomness.md)."""
    lane = torch.zeros(1, dtype=torch.int64)
    return torch.tensor([
        [float(philox.uniform(philox.words(seed, lane, anchor + k, anchor, dk.Stream.ACCEPT, 0))) for k in range(1, DRAFTS + 1)]
        for seed, anchor in zip(seeds.tolist(), anchor_positions.tolist(), strict=True)
    ])  # fmt: skip


def theirs(module, given: dict, block: bool) -> torch.Tensor:
    """int32 [R]: accepted drafts of each request, by SGLang."""
    requests = len(given["seeds"])
    slots = torch.arange(requests * (DRAFTS + 1)).view(requests, -1)
    accepted = torch.zeros(requests, dtype=torch.int32)
    scale = given["temperature"][:, None, None]
    module.chain_speculative_sampling_triton(
        predicts=torch.zeros(slots.numel(), dtype=torch.int32),
        accept_index=torch.full_like(slots, -1),
        accept_token_num=accepted,
        candidates=torch.nn.functional.pad(given["drafts"], (1, 0)),  # the anchor first
        retrive_index=slots,
        retrive_next_token=None,
        retrive_next_sibling=None,
        uniform_samples=uniforms(given["seeds"], given["anchor_positions"]),
        uniform_samples_for_final_sampling=torch.full((requests,), 0.5),
        target_probs=(given["target_logits"] / scale).softmax(-1),
        draft_probs=(given["draft_logits"] / scale).softmax(-1),
        threshold_single=1.0,
        threshold_acc=1.0,
        deterministic=True,
        block_verification=block,
    )
    return accepted


def ours(given: dict, rule: str) -> torch.Tensor:
    """The same by `accept_chain`."""
    requests = len(given["seeds"])
    starts = torch.arange(0, requests * (DRAFTS + 1) + 1, DRAFTS + 1)
    ids = torch.nn.functional.pad(given["drafts"], (1, 0)).flatten()
    positions = (given["anchor_positions"][:, None] + torch.arange(DRAFTS + 1)).flatten()
    layout = dk.VerifyLayout.of_rows(starts, ids, positions, DRAFTS)
    sampling = dk.SamplingTensors(given["temperature"], given["seeds"])
    logits, proposal = given["target_logits"].flatten(0, 1), dk.DenseProposal(given["draft_logits"])
    return dk.accept_chain(logits, layout, proposal, sampling=sampling, rule=rule).num_accepted


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path, help="SGLang's reject_sampling.py")
    parser.add_argument("--requests", type=int, default=48)
    parser.add_argument("--out", type=Path, default=DATA)
    arguments = parser.parse_args()
    interpreter.repair()
    spec = importlib.util.spec_from_file_location("reject_sampling", arguments.file)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    given = inputs(arguments.requests)
    found = {rule: theirs(module, given, rule == "block") for rule in ("token", "block")}
    for rule, accepted in found.items():
        agree = int((ours(given, rule) == accepted).sum())
        print(f"{rule}: {agree} of {arguments.requests} agree; accepted drafts {accepted.bincount().tolist()}")
    arrays = {name: value.numpy() for name, value in given.items()} | {f"accepted_{rule}": a.numpy() for rule, a in found.items()}
    for name in ("target_logits", "draft_logits"):
        arrays[name] = arrays[name].astype(np.float16)
    np.savez_compressed(arguments.out, **arrays)


if __name__ == "__main__":
    main()
