"""What the kernels are compared with: the same steps in plain PyTorch, as functions of tensors.

They do what an engine without kernels does: a loop over draft positions, a softmax of whole rows, a sort and cumulative sums. They
draw their own noise (so their tokens differ from the ops' while their distribution does not), take full blocks only (every draft of
every request verified), set no flags and know neither padding rows nor NaN: all of that is left out in their favour. Nothing here
waits for the device, so each can be captured in a CUDA graph, compiled by torch.compile, or called as it is.

Symbols: R requests, K drafts, V vocabulary, r rank, H hidden size, N rows of the target's pass.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from dspark_kernels import GatedMarkovHead, RnnMarkovHead

UNIT = 1 << 24  # of survival, and the limit of a cost, as in reference/schedule.py


@dataclasses.dataclass(frozen=True)
class Baseline:
    """function(*arguments(inputs)); inputs: those of the op."""

    function: Callable
    arguments: Callable[[dict], tuple]


def _draw(probabilities: Tensor, noise: Tensor | None) -> Tensor:
    """An id per row, with probability proportional to its entry: the smallest of exponential clocks.

    noise: their times at rate 1.
    """
    noise = torch.empty_like(probabilities).exponential_() if noise is None else noise
    return (probabilities / noise).argmax(-1)


def _latent(embedded, hidden, state, weight, bias):
    """Latents of a gated ([h; W1[x]]) or rnn ([state; W1[x]; h]) head in the weights' dtype, and the next state."""
    if weight.shape[0] == embedded.shape[1]:
        return torch.sigmoid(torch.cat([hidden, embedded], -1) @ weight.T + bias) * embedded, state
    gate, candidate, output = (torch.cat([state, embedded, hidden], -1) @ weight.T + bias).chunk(3, -1)
    gate = torch.sigmoid(gate)
    return torch.tanh(output), gate * state + (1 - gate) * torch.tanh(candidate)


def _filtered(row, temperature, top_k, top_p):
    """Logits with -inf outside top_k, then top_p, by a sort of the row."""
    values, order = row.float().sort(dim=-1, descending=True, stable=True)
    keep = torch.arange(row.shape[1], device=row.device) < top_k[:, None]
    probs = (values / temperature[:, None]).masked_fill(~keep, -torch.inf).softmax(-1)
    keep &= (probs.cumsum(-1) - probs < top_p[:, None]) | (top_p[:, None] >= 1)
    return row.masked_fill(~torch.zeros_like(keep).scatter(-1, order, keep), -torch.inf)


def draft_block(base_logits, anchors, w1, w2, hidden, weight, bias, sts_temperatures, temperature, mix_weight=None, mix_bias=None,
                top_k=None, top_p=None, noise=None):  # fmt: skip
    """Drafts left to right: tokens [R, K], logits [R, K, V], lse [R, K], confidence [R, K] (None where there is none).

    temperature None: greedy. noise: [R, K, V] exponential times, or drawn here. The bias is rounded to the logits' dtype and added
    in it, as engines do. mix_weight, mix_bias: of a gated or rnn head.
    """
    token, tokens, logits, lses, features, state = anchors, [], [], [], [], None
    for k in range(base_logits.shape[1]):
        row = base_logits[:, k]
        if w1 is not None:
            embedded = latent = w1[token]
            if mix_weight is not None:
                state = torch.zeros_like(embedded) if state is None else state
                latent, state = _latent(embedded, hidden[:, k], state, mix_weight, mix_bias)
            row = row + latent @ w2.T
            if weight is not None:
                features.append(torch.cat([hidden[:, k], embedded], -1))
        if temperature is None:
            token = row.argmax(-1)
        else:
            row = row if top_k is None else _filtered(row, temperature, top_k, top_p)
            scaled = row.float() / temperature[:, None]
            lse = scaled.logsumexp(-1)
            token = _draw((scaled - lse[:, None]).exp(), None if noise is None else noise[:, k])
            logits.append(row)
            lses.append(lse)
        tokens.append(token)
    confidence = None
    if features:
        raw = torch.stack(features, 1) @ weight
        raw = raw.float() if bias is None else (raw + bias).float()
        confidence = torch.sigmoid(raw if sts_temperatures is None else raw / sts_temperatures)
    stacked = (torch.stack(logits, 1), torch.stack(lses, 1)) if logits else (None, None)
    return torch.stack(tokens, 1), *stacked, confidence


def _draft_arguments(inputs):
    """A quantised W2 is widened here, outside of what is timed."""
    head, confidence, sampling = inputs["head"], inputs["confidence"], inputs["sampling"]
    w2 = None if head is None else head.w2
    if w2 is not None and head.w2_scale is not None:
        w2 = (w2.float() * head.w2_scale[:, None]).to(head.w1.dtype)
    mixing = None, None
    if isinstance(head, GatedMarkovHead):
        mixing = head.gate_weight, head.gate_bias
    elif isinstance(head, RnnMarkovHead):
        mixing = head.joint_weight, head.joint_bias
    return (
        inputs["base_logits"],
        inputs["anchors"],
        None if head is None else head.w1,
        w2,
        inputs["hidden"],
        None if confidence is None else confidence.weight,
        None if confidence is None else confidence.bias,
        None if confidence is None else confidence.sts_temperatures,
        None if sampling is None else sampling.temperature,
        *mixing,
        None if sampling is None else sampling.top_k,
        None if sampling is None else sampling.top_p,
    )


def draft_candidates(base_logits, candidates, anchors, w1, w2, hidden, weight, bias, sts_temperatures, temperature, noise=None):
    """`draft_block` on the best of base_logits: tokens [R, K], ids [R, K, C], logits [R, K, C], lse [R, K], confidence [R, K]."""
    base, ids = base_logits.topk(candidates, dim=-1)
    rows = w2[ids]  # [R, K, C, r]
    token, tokens, logits, lses, features = anchors, [], [], [], []
    for k in range(base.shape[1]):
        latent = w1[token]
        row = base[:, k] + (rows[:, k] @ latent[..., None])[..., 0]
        features.append(torch.cat([hidden[:, k], latent], -1))
        scaled = row.float() / temperature[:, None]
        lse = scaled.logsumexp(-1)
        drawn = _draw((scaled - lse[:, None]).exp(), None if noise is None else noise[:, k])
        token = ids[:, k].gather(1, drawn[:, None])[:, 0]
        tokens.append(token)
        logits.append(row)
        lses.append(lse)
    raw = torch.stack(features, 1) @ weight
    raw = raw.float() if bias is None else (raw + bias).float()
    confidence = torch.sigmoid(raw if sts_temperatures is None else raw / sts_temperatures)
    return torch.stack(tokens, 1), ids, torch.stack(logits, 1), torch.stack(lses, 1), confidence


def _candidate_arguments(inputs):
    base_logits, *others = _draft_arguments(inputs)[:9]  # a vanilla head, no filters
    return base_logits, inputs["candidates"], *others


def accept_chain(target_logits, drafts, draft_logits, lse, temperature, uniforms=None, noise=None):
    """Token rule over full blocks: tokens int64 [R, K + 1] (-1 behind the last) and num_accepted [R].

    target_logits: [R (K + 1), V]. drafts: [R, K]. draft_logits [R, K, V] and lse [R, K], or None: deterministic drafts.
    temperature None: greedy. uniforms: [R, K] uniforms, noise: [R, V] exponential times, or drawn here.
    """
    requests, width = drafts.shape
    rows = target_logits.view(requests, width + 1, -1)
    if temperature is None:
        best = rows.argmax(-1)
        accepted = (best[:, :-1] == drafts).long().cumprod(1).sum(1)
        token = best.gather(1, accepted[:, None])
        return _emitted(drafts, accepted, token), accepted
    target = (rows.float() / temperature[:, None, None]).softmax(-1)
    drafted = target[:, :-1].gather(2, drafts[..., None])[..., 0]
    uniforms = torch.rand_like(drafted) if uniforms is None else uniforms
    if draft_logits is None:
        passes = uniforms < drafted
    else:
        drawn = draft_logits.gather(2, drafts[..., None])[..., 0].float() / temperature[:, None]
        passes = uniforms * (drawn - lse).exp() < drafted
    accepted = passes.long().cumprod(1).sum(1)
    each = torch.arange(requests, device=drafts.device)
    last, rejected = target[each, accepted], accepted.clamp(max=width - 1)
    if draft_logits is None:
        residual = last.scatter(1, drafts[each, rejected][:, None], 0.0)
    else:
        proposed = (draft_logits[each, rejected].float() / temperature[:, None] - lse[each, rejected][:, None]).exp()
        residual = (last - proposed).clamp(min=0)
    weights = torch.where((accepted == width)[:, None], last, residual)
    return _emitted(drafts, accepted, _draw(weights, noise)[:, None]), accepted


def _emitted(drafts, accepted, token):
    """[R, K + 1]: the accepted drafts, the token, then -1."""
    requests, width = drafts.shape
    at = torch.arange(width + 1, device=drafts.device)
    padded = torch.cat([drafts, drafts.new_full((requests, 1), -1)], 1)
    return torch.where(at < accepted[:, None], padded, torch.where(at == accepted[:, None], token, -1))


def _accept_arguments(inputs):
    layout, sampling = inputs["layout"], inputs["sampling"]
    requests = layout.draft_lens.shape[0]
    drafts = layout.token_ids.view(requests, layout.max_drafts + 1)[:, 1:]
    proposal = inputs["proposal"]
    dense = sampling is not None and hasattr(proposal, "logits")
    return (
        inputs["target_logits"],
        drafts,
        proposal.logits if dense else None,
        proposal.lse if dense else None,
        None if sampling is None else sampling.temperature,
    )


def rows_of(lens, tokens, depths, anchors, anchor_positions, block_tables, page_size: int, first_logit: int = 0):
    """A packed layout from lengths [R]: the tensors of VerifyLayout but flags, in its order (slot_mapping last).

    tokens: [R, K]; depths: [R, K + 1] or None (a chain). first_logit: rows of a request before the first that gives logits.
    """
    requests, width = tokens.shape
    starts = torch.nn.functional.pad((lens + 1).cumsum(0), (1, 0))
    capacity = requests * (width + 1)
    row = torch.arange(capacity, device=tokens.device)
    owner = torch.searchsorted(starts[1:], row, right=True)
    used = owner < requests
    owner = owner.clamp(max=requests - 1)
    local = (row - starts[owner]).clamp(max=width)
    ids = torch.cat([anchors[:, None], tokens], 1)[owner, local]
    base = anchor_positions[owner]
    cache = base + local
    positions = cache if depths is None else base + depths[owner, local]
    slots = block_tables[owner, cache // page_size].long() * page_size + cache % page_size
    logit_starts = starts - first_logit * torch.arange(requests + 1, device=tokens.device)
    logit_owner = torch.searchsorted(logit_starts[1:], row, right=True)
    behind = logit_owner.clamp(max=requests - 1)
    logit_rows = torch.where(logit_owner < requests, starts[behind] + first_logit + row - logit_starts[behind], 0)
    return (
        lens.int(), starts.int(), logit_starts.int(), torch.where(used, ids, 0), torch.where(used, positions, 0),
        torch.where(used, owner, -1).int(), logit_rows.int(), starts[-1:].int(), torch.where(used, slots, -1),
    )  # fmt: skip


LAYOUT_FIELDS = (
    "draft_lens", "query_start_loc", "cu_num_logits", "token_ids", "positions", "batch_indices", "logits_indices", "num_rows",
    "slot_mapping",
)  # fmt: skip


def _survival(confidence):
    return (confidence.clamp(0, 1).cumprod(1) * UNIT).floor().long()


def _units(seconds):
    return (seconds * 1e7 + 0.5).floor().clamp(1, UNIT - 1).long()  # halves up


def schedule_prefixes(
    tokens, confidence, stale, seconds, draft_seconds, budget, anchors, anchor_positions, block_tables, page_size: int
):  # fmt: skip
    """Drafts by survival, by sort and cumulative sum; then their rows (`rows_of`).

    budget int32 [1]: that many; stale [R, K]: the best number under those; neither: until the first that does not pay.
    """
    requests, width = tokens.shape
    # Position before request: ties keep that order.
    survival = _survival(confidence).T.reshape(-1)
    ordered, order = torch.sort(survival, descending=True, stable=True)
    possible = (ordered > 0).sum()
    if budget is not None:
        number = torch.minimum(budget[0], possible)
    else:
        costs = (_units(seconds) + _units(draft_seconds[requests]))[requests : requests * (width + 1) + 1]
        likely = ordered if stale is None else torch.sort(_survival(stale).T.reshape(-1), descending=True).values
        tau = torch.nn.functional.pad(likely.cumsum(0), (1, 0)) + requests * UNIT
        if stale is None:
            pays = (tau[1:] * costs[:-1] > tau[:-1] * costs[1:]) & (likely > 0)
            number = pays.long().cumprod(0).sum()
        else:
            number = torch.minimum((tau.double() / costs.double()).argmax(), possible)
    taken = torch.zeros_like(order).scatter_(0, order, (torch.arange(order.shape[0], device=order.device) < number).long())
    lens = taken.view(width, requests).sum(0)
    return rows_of(lens, tokens, None, anchors, anchor_positions, block_tables, page_size)


def _schedule_arguments(inputs):
    cost, block = inputs["cost"], inputs["block"]
    return (
        block.tokens,
        block.confidence,
        inputs.get("stale_confidence"),
        None if cost is None else cost.seconds,
        None if cost is None else cost.draft_seconds,
        inputs.get("budget"),
        inputs["anchors"],
        inputs["anchor_positions"],
        inputs["block_tables"],
        inputs["page_size"],
    )


def fixed_layout(lens, tokens, anchors, anchor_positions, block_tables, page_size: int):
    """Rows for lengths chosen elsewhere."""
    return rows_of(lens.clamp(0, tokens.shape[1]), tokens, None, anchors, anchor_positions, block_tables, page_size)


def tree_layout(nodes, tokens, depths, anchor_positions, block_tables, page_size: int):
    """Rows for trees: tokens, depths [R, M], node 0 the anchor."""
    return rows_of(nodes - 1, tokens[:, 1:], depths, tokens[:, 0], anchor_positions, block_tables, page_size)


def draft_layout(anchors, anchor_positions, block_tables, page_size: int, block_size: int, mask_token_id: int):
    """The drafter's own block, anchor first."""
    masks = anchors.new_full((anchors.shape[0], block_size - 1), mask_token_id)
    lens = torch.full_like(anchors, block_size - 1)
    return rows_of(lens, masks, None, anchors, anchor_positions, block_tables, page_size)


def _pages(inputs):
    return inputs["anchor_positions"], inputs["block_tables"], inputs["page_size"]


BASELINES = {
    "draft_block": Baseline(draft_block, _draft_arguments),
    "draft_candidates": Baseline(draft_candidates, _candidate_arguments),
    "accept_chain": Baseline(accept_chain, _accept_arguments),
    "schedule_prefixes": Baseline(schedule_prefixes, _schedule_arguments),
    "fixed_layout": Baseline(fixed_layout, lambda i: (i["draft_lens"], i["block"].tokens, i["anchors"], *_pages(i))),
    "tree_layout": Baseline(tree_layout, lambda i: (i["tree"].num_nodes, i["tree"].tokens, i["tree"].depths, *_pages(i))),
    "draft_layout": Baseline(draft_layout, lambda i: (i["anchors"], *_pages(i), i["block_size"], i["mask_token_id"])),
}
