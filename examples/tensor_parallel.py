"""Decoding with the vocabulary split over the processes of a torch.distributed group, started by torchrun:

    torchrun --nproc-per-node 2 examples/tensor_parallel.py [rounds]

Every rank has the columns of its ids and no rank gathers logits. Over NCCL where each process has a GPU, else over gloo on CPUs with
the kernels in Triton's interpreter.
"""

import os
import sys

import torch
import torch.distributed as dist

ON_GPUS = torch.cuda.device_count() >= int(os.environ.get("LOCAL_WORLD_SIZE", 1))
if not ON_GPUS:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # set before Triton is imported

import dspark_kernels as dk  # noqa: E402
from dspark_kernels.integrations.distributed import VocabularyShards  # noqa: E402


def main(device: str, rounds: int = 4) -> list[list[int]]:
    """Decode for `rounds` rounds; returns the tokens that each request emitted, the same on every rank."""
    requests, drafts, vocab, rank = 2, 2, 1100, 8
    # A real engine pads its vocabulary like this. Cuts at multiples of 1024 ids have the bits of the whole op.
    width = -(-vocab // dist.get_world_size() // 1024) * 1024
    shards = VocabularyShards(vocab, requests, drafts, width=width, device=device)
    torch.manual_seed(0)  # the same weights everywhere, of which each rank keeps its shard
    target_table = 3 * torch.randn(vocab, vocab)
    w1, w2 = torch.randn(vocab, rank), torch.randn(vocab, rank) * rank**-0.5
    noise = torch.randn(drafts - 1, vocab, vocab)
    target = shards.shard_of(target_table).to(device)  # [V, W]: next-token logits after each token
    drafter = shards.shard_of(torch.stack([target_table - w1 @ w2.T, *noise], 1)).to(device)  # [V, K, W]
    head = shards.shard_of_head(dk.MarkovHead(w1.to(device), w2.to(device)))
    sampling = dk.SamplingTensors(torch.tensor([1.0, 0.7], device=device), torch.tensor([1, 2], device=device))
    place = dict(anchors=torch.tensor([7, 42], device=device), anchor_positions=torch.tensor([11, 5], device=device))
    lengths = torch.full((requests,), drafts, dtype=torch.int32, device=device)
    emitted = [[] for _ in range(requests)]
    for _ in range(rounds):
        block = shards.draft_block(drafter[place["anchors"]], head=head, sampling=sampling, **place)
        layout = dk.fixed_layout(block, lengths, **place)
        step = shards.accept_chain(target[layout.token_ids], layout, block.proposal, sampling=sampling, **place)
        for tokens, count, row in zip(emitted, step.num_emitted.tolist(), step.tokens.tolist(), strict=True):
            tokens += row[:count]
    return emitted


if __name__ == "__main__":
    device = f"cuda:{os.environ['LOCAL_RANK']}" if ON_GPUS else "cpu"
    if ON_GPUS:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if ON_GPUS else "gloo")
    emitted = main(device, int(sys.argv[1]) if len(sys.argv) > 1 else 4)
    everywhere = [None] * dist.get_world_size()
    dist.all_gather_object(everywhere, emitted)
    assert all(other == emitted for other in everywhere), "ranks disagree"
    if dist.get_rank() == 0:
        for request, tokens in enumerate(emitted):
            print(f"request {request}: {tokens}")
    dist.destroy_process_group()
