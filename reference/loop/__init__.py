"""The decoding loop that every system shares: propose -> schedule -> verify -> accept -> commit.

One round of a request turns its anchor (the last emitted token, not yet in the target's cache) into num_accepted + 1
tokens:

1. propose: the drafter makes K drafts and keeps the distribution that each was drawn from;
2. schedule: a length per request (all K, up to a confidence threshold, or by measured costs), and the packed rows;
3. verify: one pass of the target over the anchors and admitted drafts of all requests, and the prompts of new ones;
4. accept: lossless acceptance, then a correction or bonus token, which is the next anchor (a prompt's last row has no
   drafts to verify: its bonus is the first new token);
5. commit: rejected rows leave the caches, and the drafter gets what the target computed for the rows that stay.

With a tree the drafter makes up to M - 1 drafts, several of which may follow the same token. All of them are verified, each at the
position of its depth and seeing its ancestors alone. Afterwards the cached rows of the accepted path move next to each other.

Every request has a request slot, and everything that outlives a round is indexed by slot; the batch consists of the busy slots. All
random numbers are addressed by the request's own seed and positions, never by slot or batch row.

Files: sequence.py (a request and its measurements), chains.py (the steps of a round for chains), trees.py (the same for trees).

Source of the round: "DSpark: Confidence-Scheduled Speculative Decoding with Semi-Autoregressive Generation", arXiv
2607.05147.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Sequence
from types import SimpleNamespace

import torch

from dspark_kernels.types import CostTable

from ..accept import accept_chain
from ..draft import draft_block
from ..drafters import Drafter, TreeShape
from ..layout import fixed_layout, tree_layout
from ..model import Target
from ..schedule import schedule_prefixes
from ..tree import accept_tree
from ..tree_draft import draft_tree, expand_tree
from .chains import Batch
from .sequence import Clock, Generation, Request, Seconds
from .trees import TreeBatch

__all__ = ["Generation", "REFERENCE_OPS", "RULES", "Request", "TREE_RULES", "decode"]
RULES = ("token", "block", "coupled")
TREE_RULES = ("walk", "recursive", "traversal")
REFERENCE_OPS = SimpleNamespace(
    draft_block=draft_block,
    fixed_layout=fixed_layout,
    schedule_prefixes=schedule_prefixes,
    accept_chain=accept_chain,
    draft_tree=draft_tree,
    expand_tree=expand_tree,
    tree_layout=tree_layout,
    accept_tree=accept_tree,
)


def decode(
    target: Target,
    drafter: Drafter,
    requests: Sequence[Request],
    *,
    rule: str = "token",
    max_drafts: int | None = None,
    confidence_threshold: float = 0.0,
    cost: CostTable | None = None,
    policy: str = "causal",
    tree: TreeShape | None = None,
    ops: SimpleNamespace | None = None,
    batch_size: int = 8,
    progress: Callable[[int], None] | None = None,
) -> list[Generation]:
    """Decode every request; results in the order of `requests`.

    Args:
        target: reference.model.Target.
        drafter: a reference.drafters.Drafter (Autoregressive(target) for plain decoding).
        rule: "token", "block" or "coupled", for chains.
        max_drafts: >= 1, drafts per round are at most this many (None = the drafter's own number).
        confidence_threshold: 0 = verify the whole block; t = up to the first draft whose confidence is below t. Needs a
            drafter with a confidence head.
        cost, policy: schedule with measured costs instead (ops.schedule_prefixes); same need.
        tree: draft and verify trees of this shape, with its own rule, in place of chains (a drafter with propose_tree).
        ops: namespace with draft_block, fixed_layout, accept_chain and schedule_prefixes, for trees draft_tree, expand_tree,
            tree_layout and accept_tree (default: the reference's). With plan_attention and tree_attention, for trees compact_kv
            too, target and drafter attend through them, over paged caches.
        batch_size: requests decoded at once; as one leaves, the next takes its slot.
        progress: called with the number of new output tokens after each step.

    Raises:
        ValueError: a bad argument or request, or scheduling by confidence with a drafter that gives none.
    """
    _check(target, drafter, requests, rule, max_drafts, confidence_threshold, cost, tree, batch_size)
    drafts = drafter.max_drafts if max_drafts is None else min(max_drafts, drafter.max_drafts)
    slots = min(batch_size, len(requests))
    if tree is None:
        greedy = not any(request.temperature > 0 for request in requests)
        batch = Batch(target, drafter, ops or REFERENCE_OPS, slots, drafts, rule, greedy)
    else:
        batch = TreeBatch(target, drafter, ops or REFERENCE_OPS, slots, tree)
    waiting = collections.deque(enumerate(requests))
    done: dict[int, Generation] = {}
    with torch.inference_mode():
        while waiting or batch.sequences:
            while waiting and batch.free:
                batch.admit(*waiting.popleft())
            clock = Clock(target.device)
            proposed = batch.propose()
            drafting = clock.lap()
            layout = batch.schedule(proposed, confidence_threshold, cost, policy)
            verified = batch.verify(layout)
            acceptance = batch.accept(verified.logits, layout, proposed)
            verifying = clock.lap()
            before = [len(sequence.ids) for sequence in batch.sequences]
            batch.commit(verified, acceptance)
            seconds = Seconds(drafting, verifying, committing=clock.lap())
            batch.record(proposed, layout, verified.logits, acceptance, seconds)
            if progress is not None:
                progress(sum(s.new_output(length) for s, length in zip(batch.sequences, before, strict=True)))
            for sequence in batch.leave():
                done[sequence.index] = sequence.finish()
    return [done[index] for index in range(len(requests))]


def _check(target, drafter, requests, rule, max_drafts, confidence_threshold, cost, tree, batch_size):
    if rule not in RULES:
        raise ValueError(f"rule: expected one of {', '.join(map(repr, RULES))}, got {rule!r}")
    if max_drafts is not None and max_drafts < 1:
        raise ValueError(f"max_drafts: expected >= 1, got {max_drafts}")
    if not 0.0 <= confidence_threshold <= 1.0:
        raise ValueError(f"confidence_threshold: expected a number in [0, 1], got {confidence_threshold}")
    if batch_size < 1:
        raise ValueError(f"batch_size: expected >= 1, got {batch_size}")
    if cost is not None and confidence_threshold > 0:
        raise ValueError("confidence_threshold: expected 0 together with cost, which schedules too")
    if (cost is not None or confidence_threshold > 0) and not drafter.has_confidence:
        raise ValueError(f"drafter: expected one with a confidence head to schedule by, got {type(drafter).__name__}")
    if tree is not None:
        if tree.rule not in TREE_RULES:
            raise ValueError(f"tree.rule: expected one of {', '.join(map(repr, TREE_RULES))}, got {tree.rule!r}")
        if type(drafter).propose_tree is Drafter.propose_tree:
            raise ValueError(f"tree: expected a drafter that drafts trees, got {type(drafter).__name__}")
        if cost is not None or confidence_threshold > 0 or max_drafts is not None:
            raise ValueError("tree: expected None together with cost, confidence_threshold or max_drafts, which cut chains")
    for index, request in enumerate(requests):
        if len(request.prompt) < 1 or not all(0 <= token < target.shape.vocab for token in request.prompt):
            raise ValueError(f"requests[{index}].prompt: expected ids from 0 to {target.shape.vocab - 1}, at least one")
        if request.max_new_tokens < 1:
            raise ValueError(f"requests[{index}].max_new_tokens: expected >= 1, got {request.max_new_tokens}")
        if not -(1 << 63) <= request.seed < 1 << 63:
            raise ValueError(f"requests[{index}].seed: expected a 64-bit integer, got {request.seed}")
