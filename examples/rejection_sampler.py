"""Replace a rejection sampler written in torch by accept_chain: python examples/rejection_sampler.py

Both functions below take what an engine has after its target's pass, and return the tokens of every request: accepted drafts, the
correction or bonus token, then -1. Temperature, top-p and a grammar's mask (int32 words, lowest bit first, as xgrammar fills them)
are applied to the target. Symbols: R requests, K drafts of each, V vocabulary.
"""

import os

import torch

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ.setdefault("TRITON_INTERPRET", "1")  # kernels then run in Triton's interpreter; set before it is imported

import dspark_kernels as dk  # noqa: E402


def in_torch(logits, drafts, draft_probs, temperature, top_p, bitmask):
    """logits [R, K + 1, V], drafts [R, K], draft_probs [R, K, V], temperature and top_p [R], bitmask int32 [R, K + 1, V / 32]."""
    allowed = (bitmask[..., None] >> torch.arange(32, device=logits.device) & 1).flatten(-2)[..., : logits.shape[-1]] == 1
    probs = (logits.masked_fill(~allowed, -torch.inf) / temperature[:, None, None]).softmax(-1)
    ordered, order = probs.sort(-1, descending=True)
    kept = ordered.cumsum(-1) - ordered < top_p[:, None, None]  # the token that crosses the threshold stays
    probs = torch.zeros_like(probs).scatter(-1, order, ordered * kept)
    probs = probs / probs.sum(-1, keepdim=True)
    target, draft = (rows.gather(-1, drafts[..., None])[..., 0] for rows in (probs[:, :-1], draft_probs))
    accepted = (torch.rand_like(draft) * draft < target).long().cumprod(-1).sum(-1)
    rest = torch.cat([(probs[:, :-1] - draft_probs).clamp(min=0), probs[:, -1:]], 1)
    last = torch.multinomial(rest[torch.arange(len(rest)), accepted], 1)
    tokens = torch.nn.functional.pad(drafts, (0, 1)).scatter(1, accepted[:, None], last)
    return tokens.masked_fill(torch.arange(tokens.shape[1], device=tokens.device) > accepted[:, None], -1)


def in_one_launch(logits, drafts, draft_probs, temperature, top_p, bitmask, seeds, positions):
    """The same, from the same arguments; seeds and positions [R] of each request's last emitted token address its random numbers."""
    requests, count = drafts.shape
    starts = torch.arange(0, requests * (count + 1) + 1, count + 1, device=logits.device)
    ids = torch.nn.functional.pad(drafts, (1, 0))  # the first is the token before the drafts, which acceptance does not read
    places = positions[:, None] + torch.arange(count + 1, device=logits.device)
    layout = dk.VerifyLayout.of_rows(starts, ids.flatten(), places.flatten(), count)
    sampling = dk.SamplingTensors(temperature, seeds, top_p=top_p, token_bitmask=bitmask.flatten(0, 1))
    return dk.accept_chain(logits.flatten(0, 1), layout, dk.DenseProposal.of_probs(draft_probs), sampling=sampling).tokens


def inputs(requests=4, count=3, vocab=50):
    """A step of a drafter that guesses well, under a grammar that forbids one id in four."""
    torch.manual_seed(0)
    logits = 3 * torch.randn(requests, count + 1, vocab, device=DEVICE)
    draft_probs = (logits[:, :-1] + torch.randn(requests, count, vocab, device=DEVICE)).softmax(-1)
    drafts = torch.multinomial(draft_probs.flatten(0, 1), 1).view(requests, count)
    bits = (torch.rand(requests, count + 1, -(-vocab // 32), 32, device=DEVICE) > 0.25) << torch.arange(32, device=DEVICE)
    settings = (torch.linspace(0.5, 1.0, requests, device=DEVICE), torch.full((requests,), 0.9, device=DEVICE))
    return (logits, drafts, draft_probs, *settings, bits.sum(-1).to(torch.int32))


if __name__ == "__main__":
    step = inputs()
    seeds, positions = torch.arange(4, device=DEVICE), torch.full((4,), 17, device=DEVICE)
    print("drafts:", step[1].tolist())
    print("torch:", in_torch(*step).tolist())
    print("accept_chain:", in_one_launch(*step, seeds, positions).tolist())
