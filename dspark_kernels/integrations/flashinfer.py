"""`chain_speculative_sampling` of FlashInfer on `accept_chain`: a drop-in with its signature and results.

Written against flashinfer-python 0.7.4, which is not imported. Where its own is called by module, one line replaces it:

    flashinfer.sampling.chain_speculative_sampling = dspark_kernels.integrations.flashinfer.chain_speculative_sampling

What differs: the random numbers, so the tokens drawn (their distribution is the same); a draft outside the vocabulary is rejected
where the original reads other memory; CPU tensors run where Triton's interpreter is on. Older versions, 0.6.18 among them, read the
first of several seeds only, and verify the first rejected draft a second time when they count what would be accepted alone.

Symbols: R requests, K drafts, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..checks import INT_DTYPES, LOGIT_DTYPES, check_optional, check_tensor
from ..ops.accept.chain import accept_chain
from ..types import Acceptance, DenseProposal, SamplingTensors, VerifyLayout

_SEEDS = (torch.int64, torch.uint64)


def chain_speculative_sampling(
    draft_probs: Tensor,
    draft_token_ids: Tensor,
    target_probs: Tensor,
    maybe_output_accepted_token_num: Tensor | None = None,
    maybe_output_emitted_draft_token_num: Tensor | None = None,
    deterministic: bool = True,
    generator: torch.Generator | None = None,
    seed: int | Tensor | None = None,
    offset: int | Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Speculative sampling of chains from probabilities, lossless (arXiv 2302.01318).

    Args:
        draft_probs: bf16, fp16 or fp32 [R, K, V], the distributions that the drafts were drawn from; read where they are.
        draft_token_ids: int32 or int64 [R, K].
        target_probs: bf16, fp16 or fp32 [R, K + 1, V]. Copied: acceptance reads logits, so their logarithm is taken, fp32.
        maybe_output_accepted_token_num, maybe_output_emitted_draft_token_num: int32 or int64 [R], added to in place if given.
        deterministic: not used; results are always the same for the same seed and offset.
        generator: where seed or offset is None, seeds are drawn from it, or from the device's default generator.
        seed, offset: ints, or both int64 or uint64 [1] or [R]. The same pair gives the same tokens, so change one of them between
            calls. A row's number in the batch is a part of its seed, as in the original. Tensors suit captured graphs.

    Returns:
        (output_token_ids int32 [R, K + 1]: accepted drafts, the correction or bonus token, then -1; accepted [R]: how many drafts
        pass when each is verified alone; emitted [R]: accepted drafts before the first rejection).

    Raises:
        TypeError, ValueError: an argument of the wrong type, dtype, shape or device; one of seed and offset a tensor, one not.
    """
    device = check_tensor("draft_probs", draft_probs, dtype=LOGIT_DTYPES, shape=("R", "K", "V")).device
    requests, drafts, vocab = draft_probs.shape
    check_tensor("draft_token_ids", draft_token_ids, dtype=INT_DTYPES, shape=(requests, drafts), device=device)
    check_tensor("target_probs", target_probs, dtype=LOGIT_DTYPES, shape=(requests, drafts + 1, vocab), device=device)
    counts = []
    for name, given in (
        ("maybe_output_accepted_token_num", maybe_output_accepted_token_num),
        ("maybe_output_emitted_draft_token_num", maybe_output_emitted_draft_token_num),
    ):
        check_optional(name, given, dtype=INT_DTYPES, shape=(requests,), device=device)
        counts.append(torch.zeros(requests, dtype=torch.int32, device=device) if given is None else given)
    seeds = _seeds(seed, offset, generator, requests, device)
    if draft_probs.stride(2) != 1:
        draft_probs = draft_probs.contiguous()
    acceptance = _accept(draft_probs, draft_token_ids, target_probs, seeds)
    counts[0] += _alone(draft_probs, draft_token_ids, target_probs, acceptance.num_accepted, seeds)
    counts[1] += acceptance.num_accepted
    return acceptance.tokens.to(torch.int32), counts[0], counts[1]


def _accept(draft_probs: Tensor, draft_token_ids: Tensor, target_probs: Tensor, seeds: Tensor) -> Acceptance:
    requests, drafts, vocab = draft_probs.shape
    device, rows = draft_probs.device, requests * (drafts + 1)
    # The entry before a request's drafts is its anchor's, which acceptance does not read; nor does it read other positions than its.
    token_ids = torch.nn.functional.pad(draft_token_ids, (1, 0)).flatten()
    starts = torch.arange(0, rows + 1, drafts + 1, dtype=torch.int32, device=device)
    layout = VerifyLayout.of_rows(starts, token_ids, torch.zeros_like(token_ids), drafts)
    sampling = SamplingTensors(torch.ones(requests, device=device), seeds)
    logits = target_probs.float().log().contiguous().view(rows, vocab)
    return accept_chain(logits, layout, DenseProposal.of_probs(draft_probs), sampling=sampling)


def _seeds(
    seed: int | Tensor | None, offset: int | Tensor | None, generator: torch.Generator | None, requests: int, device: torch.device
) -> Tensor:
    """int64 [R]."""
    if seed is None or offset is None:
        return torch.randint(-(2**63), 2**63 - 1, (requests,), dtype=torch.int64, generator=generator, device=device)
    if isinstance(seed, Tensor) != isinstance(offset, Tensor):
        raise ValueError("seed: expected a tensor where offset is one, and an int where it is an int, got one of each")
    first, second = (_words(name, value, requests, device) for name, value in (("seed", seed), ("offset", offset)))
    return _mixed(_mixed(first) + second) + torch.arange(requests, device=device)


def _words(name: str, value: int | Tensor, requests: int, device: torch.device) -> Tensor:
    """int64 [1] or [R]: the bits of a seed or an offset."""
    if isinstance(value, Tensor):
        check_tensor(name, value, dtype=_SEEDS, shape=("1 or R",), device=device)
        if value.shape[0] not in (1, requests):
            raise ValueError(f"{name}: expected 1 or {requests} entries, got {value.shape[0]}")
        return value.view(torch.int64)
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{name}: expected an int or a tensor, got {type(value).__name__}")
    return torch.full((1,), (value + 2**63) % 2**64 - 2**63, dtype=torch.int64, device=device)


def _mixed(words: Tensor) -> Tensor:
    """Bits that depend on all bits of int64 words: the finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    words = words - 7046029254386353131
    words = (words ^ ((words >> 30) & (2**34 - 1))) * -4658895280553007687
    words = (words ^ ((words >> 27) & (2**37 - 1))) * -7723592293110705685
    return words ^ ((words >> 31) & (2**33 - 1))


def _alone(draft_probs: Tensor, draft_token_ids: Tensor, target_probs: Tensor, accepted: Tensor, seeds: Tensor) -> Tensor:
    """[R]: how many drafts pass when each is verified alone. Those before the first rejection did, that one did not; the others, which
    acceptance does not reach, are verified here."""
    drafts = draft_token_ids.shape[1]
    ids = draft_token_ids.long()
    inside = (ids >= 0) & (ids < draft_probs.shape[2])
    at = torch.where(inside, ids, 0)[..., None]
    draft_prob, target_prob = (probs.gather(2, at)[..., 0].float() for probs in (draft_probs, target_probs[:, :drafts]))
    number = torch.arange(drafts, device=ids.device)
    # Words of no seed that acceptance draws with: the mix of a seed is not a seed.
    uniform = ((_mixed(_mixed(seeds)[:, None] + number) >> 11) & (2**53 - 1)).double() * 2.0**-53
    passes = inside & (uniform * draft_prob < target_prob) & (number > accepted[:, None])
    return accepted + passes.sum(1)
