"""draft_tree and expand_tree, node by node, in fp64.

    top_k                children of a node at depth d: its branching[d] best tokens (EAGLE's static trees, arXiv 2401.15077)
    best_first           the nodes of greatest product of q_k(x_k), positions independent (DDTree)
    conditioned          the same with q_k(x | x_{k-1}) of the sequential head: siblings' children differ by their own parent
                         with a confidence head both rank by survival: q_k(x) c_k, c_k computed at the parent, never from x
    iid                  branching[d] independent draws from the node's law (SpecInfer, arXiv 2305.09781)
    without_replacement  the branching[d] best keys of one Gumbel race (Sequoia, arXiv 2402.12374)

Symbols: R requests, S slots, K positions, V vocabulary, M nodes with the anchor; q the law after a node, softmax of (U + B) / T, U
the base logits of the next depth, B the head's bias of the node's token; a node of depth d decides position anchor + d.
"""

from __future__ import annotations

import copy
import math

import torch
from torch import Tensor

from dspark_kernels.types import ConfidenceHead, DenseProposal, DraftTree, Flag, MarkovHead, OneHotProposal, SamplingTensors

from . import heads
from .decisions import Decisions
from .logits import adjusted, inverse_temperature, read_logits, target_ids
from .sources import PhiloxSource

METHODS = ("conditioned", "best_first", "top_k", "iid", "without_replacement")
SAMPLED = ("iid", "without_replacement")
MAX_NODES = 64


class Growing:
    """A tree of one request while it grows."""

    def __init__(self, anchor: int, room: int):
        self.tokens, self.parents, self.depths, self.room = [anchor], [-1], [0], room
        self.survival = [1.0]

    def add(self, parent: int, token: int, survival: float = 0.0) -> int:
        self.survival.append(survival)
        self.tokens.append(token)
        self.parents.append(parent)
        self.depths.append(self.depths[parent] + 1)
        return len(self.tokens) - 1

    @property
    def full(self) -> bool:
        return len(self.tokens) >= self.room

    def cut(self, count: int) -> None:
        """Keep the first nodes, and the survival of all."""
        self.tokens, self.parents, self.depths = (of_node[:count] for of_node in (self.tokens, self.parents, self.depths))


def draft_tree(
    base_logits: Tensor,
    anchors: Tensor,
    head: MarkovHead | None = None,
    *,
    anchor_positions: Tensor,
    method: str = "conditioned",
    num_nodes: int,
    branching: tuple[int, ...] | None = None,
    node_budgets: Tensor | None = None,
    sampling: SamplingTensors | None = None,
    hidden: Tensor | None = None,
    confidence: ConfidenceHead | None = None,
    candidates: int | None = None,
    draft_to_target: Tensor | None = None,
    state_indices: Tensor | None = None,
    out=None,
    workspace=None,
    stored_logits: Tensor | None = None,
    decisions: Decisions | None = None,
) -> DraftTree:
    """Trees of at most num_nodes nodes, the anchor included, from a block's logits [R, K, V].

    num_nodes: 1 to 64. branching: children of a node by its depth, for "top_k" and the sampled methods, depth by depth, cut at
    num_nodes; a depth that begins with a full tree is not looked at. node_budgets: int32 [R], nodes of each request (clamped to
    [1, num_nodes]); for the sampled methods they must not depend on this round's draws. candidates: children come from the C best
    base logits of their position alone. A greedy request of a sampled method gets its best tokens. Path probabilities are compared
    at the sampling temperature (greedy: 1).
    Ties: the lowest node, then the lowest id. confidence: rank by survival, the product of q and of confidences along the path.
    stored_logits: [S, M, V] a kernel's laws; the children are then chosen from these bits. decisions: records margins.
    """
    for name, value in (("out", out), ("workspace", workspace)):
        if value is not None:
            raise ValueError(f"{name}: expected None, the reference allocates its results, got {type(value).__name__}")
    if method not in METHODS:
        raise ValueError(f"method: expected one of {METHODS}, got {method!r}")
    if not 1 <= num_nodes <= MAX_NODES:
        raise ValueError(f"num_nodes: expected in [1, {MAX_NODES}], got {num_nodes}")
    static = method not in ("conditioned", "best_first")
    if static != (branching is not None):
        raise ValueError(f"branching: expected {'a tuple' if static else 'None'} with method {method!r}, got {branching}")
    if method == "iid" and draft_to_target is not None:
        raise ValueError("draft_to_target: expected None with method 'iid', got a map")
    if method in SAMPLED and sampling is None:
        raise ValueError(f"sampling: expected SamplingTensors with method {method!r}, got None")
    if static and confidence is not None:
        raise ValueError(f"confidence: expected None with method {method!r}, got a head")
    decisions = Decisions() if decisions is None else decisions
    unused = unused_ids(draft_to_target, head, sampling)
    batch, drafts, vocab = base_logits.shape
    embedding = head  # what the confidence knows a node's token by
    slots, device = anchors.shape[0], base_logits.device
    head = None if method == "best_first" else head
    depth_limit = drafts if branching is None else min(drafts, len(branching))
    stored = torch.zeros(slots, num_nodes, vocab, dtype=base_logits.dtype, device=device) if method in SAMPLED else None
    grown: dict[int, Growing] = {}
    flags = torch.zeros(batch, dtype=torch.int32, device=device)
    w2 = heads.output_weights(head)
    for r in range(batch):
        slot = r if state_indices is None else int(state_indices[r])
        if not 0 <= slot < slots:
            continue
        anchor, position = int(anchors[slot]), int(anchor_positions[slot])
        if head is not None and not 0 <= anchor < head.w1.shape[0]:
            flags[r] |= int(Flag.BAD_TOKEN_ID)
        room = num_nodes if node_budgets is None else max(1, min(int(node_budgets[r]), num_nodes))
        tree = grown[slot] = Growing(anchor, room)
        scale = inverse_temperature(float(sampling.temperature[slot])) if sampling is not None else 0.0
        source = PhiloxSource(int(sampling.seed[slot]) if sampling is not None else 0, position, decisions, r)
        states = {0: heads.Transition(head, w2)}
        rows: dict[int, Tensor] = {}

        def law_after(node, r=r, tree=tree, states=states, rows=rows, slot=slot):
            """Logits of the children of a node, fp64 [V], rounded once to the logits' dtype where they are kept."""
            if node not in rows:
                depth = tree.depths[node]
                base = base_logits[r, depth].double()
                states[node] = copy.copy(states[tree.parents[node]] if node else states[0])
                total = base + states[node].bias(tree.tokens[node], None if hidden is None else hidden[r, depth])
                total = _settled(total, sampling, slot, draft_to_target, unused)
                if candidates is not None:
                    flags[r] |= int(Flag.NAN) if bool(base.isnan().any()) else 0
                    outside = torch.ones(vocab, dtype=torch.bool, device=device)
                    outside[torch.where(base.isnan(), -math.inf, base).argsort(descending=True, stable=True)[:candidates]] = False
                    total = torch.where(outside, -math.inf, total)
                _, seen = read_logits(total)
                flags[r] |= seen
                total = torch.where(total.isnan(), -math.inf, total)
                if stored is not None:
                    stored[slot, node] = total.to(stored.dtype)
                    total = (stored if stored_logits is None else stored_logits)[slot, node].double()
                rows[node] = total
            return rows[node]

        def log_confidence(node, r=r, tree=tree):
            """ln of the chance that a child of the node survives, given that the node did; NaN counts as 0."""
            if confidence is None:
                return 0.0
            depth = tree.depths[node]
            logit = heads.confidence_logit(confidence, hidden[r, depth], heads.embed(embedding, tree.tokens[node]))
            if confidence.sts_temperatures is not None:
                logit /= float(confidence.sts_temperatures[depth])
            found = float(torch.nn.functional.logsigmoid(torch.tensor(logit, dtype=torch.float64)))
            return -math.inf if math.isnan(found) else found

        if static:
            lanes = lanes_of(draft_to_target, unused)
            _by_shape(tree, branching, depth_limit, law_after, method, scale, source, position, decisions, r, lanes)
        else:
            search, ruler = ([], [], [0.0]), scale if scale > 0 else 1.0
            _by_probability(tree, search, depth_limit, law_after, log_confidence, ruler, decisions, r)
            told, count, tree.room = int(flags[r]), len(tree.tokens), num_nodes
            # The search goes on beyond a budget for the survival of all nodes that there could be, and for nothing else.
            _by_probability(tree, search, depth_limit, law_after, log_confidence, ruler, decisions, r)
            flags[r] = told
            tree.cut(count)
    proposal = OneHotProposal() if stored is None else DenseProposal(stored, draft_to_target=draft_to_target)
    drawn = method if method in SAMPLED else "one_hot"
    return packed(grown, slots, num_nodes, device, proposal, drawn, flags, with_survival=not static)


def unused_ids(draft_to_target: Tensor | None, head, sampling) -> Tensor | None:
    """bool [V]: entries of a map that stand for no token."""
    if draft_to_target is None:
        return None
    return (draft_to_target < 0) | (draft_to_target >= target_ids(head, sampling))


def lanes_of(draft_to_target: Tensor | None, unused: Tensor | None) -> tuple[Tensor, Tensor] | None:
    """Entries of a map in the order of the target's ids, which decides ties, and those ids, which address the noise."""
    if draft_to_target is None:
        return None
    order = torch.argsort(draft_to_target, stable=True)
    order = order[~unused[order]]
    return order, draft_to_target[order]


def _settled(row: Tensor, sampling, slot: int, draft_to_target, unused) -> Tensor:
    """A row with its bias, -inf where there is no token."""
    if sampling is not None and sampling.logit_bias is not None:
        row = adjusted(row, sampling, slot, 0, [], draft_to_target, unused)
    return row if unused is None else row.masked_fill(unused, -math.inf)


def _by_shape(tree, branching, depth_limit, law_after, method, scale, source, position, decisions, request, lanes):
    """Depth by depth, each node's children side by side."""
    node = 0
    while node < len(tree.tokens) and tree.depths[node] < depth_limit:
        begins = node == 0 or tree.depths[node] > tree.depths[node - 1]
        if begins and tree.full:
            return
        logits, wanted = law_after(node), branching[tree.depths[node]]
        _children(tree, node, wanted, logits, method, scale, source, position, decisions, request, lanes)
        node += 1


def _children(tree, node, wanted, logits, method, scale, source, position, decisions, request, lanes=None):
    """Up to `wanted` children of a node, drawn or chosen one after another; fewer where no token is left or the tree is full."""
    order, ids = (None, None) if lanes is None else lanes
    left = logits.clone() if order is None else logits[order]
    for _ in range(wanted):
        if tree.full or not bool((left > -math.inf).any()):
            return
        if method in SAMPLED and scale > 0:
            decided = position + tree.depths[node] + 1
            if method == "iid":
                token = source.draft_by_leaf(decided, left * scale, node=len(tree.tokens))
            else:
                token = source.draft(decided, left * scale, node=node, lanes=ids)
        else:
            token = decisions.pick(request, "top", left)
        tree.add(node, token if ids is None else int(ids[token]))
        if method != "iid" or scale == 0:
            left[token] = -math.inf


def _by_probability(tree, search, depth_limit, law_after, log_confidence, scale, decisions, request):
    """The best child of all that the tree does not have yet, one after another.

    search: by node, ln of the survival of every child it might get (taken ones -inf), their ids, and ln of its own. A tree has
    fewer nodes than a node's MAX_NODES best children, so that the others never matter.
    """
    logs, ids, reached = search
    while not tree.full:
        for node in range(len(logs), len(tree.tokens)):
            if tree.depths[node] < depth_limit:
                keys = reached[node] + log_confidence(node) + _log_law(law_after(node) * scale)
                best = keys.argsort(descending=True, stable=True)[:MAX_NODES].sort().values
                logs.append(keys[best])
                ids.append(best)
            else:
                logs.append(torch.full_like(logs[0], -math.inf))
                ids.append(ids[0])
        keys = torch.cat(logs)
        if not bool((keys > -math.inf).any()):
            return
        parent, place = divmod(_best_path(keys, logs[0].shape[0], decisions, request), logs[0].shape[0])
        reached.append(float(logs[parent][place]))
        tree.add(parent, int(ids[parent][place]), math.exp(reached[-1]))
        logs[parent][place] = -math.inf


def _best_path(keys: Tensor, width: int, decisions: Decisions, request: int) -> int:
    """The largest key, of `width` for each node.

    Children of two nodes may tie in fp64 and not in fp32, whose roundings differ: a near tie, and expected.
    """
    best = int(torch.argmax((keys == keys.max()).int()))
    others = keys.clone()
    others[best] = -math.inf
    second = int(torch.argmax((others == others.max()).int()))
    gap = float(keys[best] - others[second])
    if best // width == second // width or not gap <= 1e-12 * max(1.0, abs(float(keys[best]))):
        return decisions.pick(request, "path", keys)
    return second if decisions.flipped(request, "path", 0.0, 1.0, chance=1.0) else best


def _log_law(scaled: Tensor) -> Tensor:
    """ln softmax; all on the lowest of several +inf; -inf everywhere where there is no logit."""
    top = float(scaled.max())
    if math.isfinite(top):
        return scaled - torch.logsumexp(scaled, 0)
    law = torch.full_like(scaled, -math.inf)
    if top > 0:
        law[int(torch.argmax((scaled == top).int()))] = 0.0
    return law


def packed(grown, slots, nodes, device, proposal, drawn, flags, with_survival=False) -> DraftTree:
    """Tensors [S, M] of the trees; nodes that are not there are -1, their ancestor words 0."""
    names = ("parents", "depths", "first_child", "next_sibling")
    links = {name: torch.full((slots, nodes), -1, dtype=torch.int32) for name in names}
    tokens, ancestors = torch.full((slots, nodes), -1), torch.zeros(slots, nodes, dtype=torch.int64)
    counts = torch.zeros(slots, dtype=torch.int32)
    survival = torch.zeros(slots, nodes)
    for slot, tree in grown.items():
        counts[slot] = len(tree.tokens)
        survival[slot, : len(tree.survival)] = torch.tensor(tree.survival, dtype=torch.float64)
        youngest: dict[int, int] = {}
        for node, (token, parent) in enumerate(zip(tree.tokens, tree.parents, strict=True)):
            tokens[slot, node] = token
            links["parents"][slot, node], links["depths"][slot, node] = parent, tree.depths[node]
            word = 1 << node if node < 63 else -(2**63)
            ancestors[slot, node] = word | (int(ancestors[slot, parent]) if node else 0)
            if parent in youngest:
                links["next_sibling"][slot, youngest[parent]] = node
            elif node:
                links["first_child"][slot, parent] = node
            youngest[parent] = node
    on_device = {name: link.to(device) for name, link in links.items()}
    return DraftTree(
        tokens.to(device), **on_device, ancestors=ancestors.to(device), num_nodes=counts.to(device), proposal=proposal,
        drawn=drawn, flags=flags, survival=survival.to(device) if with_survival else None,
    )  # fmt: skip


def expand_tree(
    tree: DraftTree,
    node_logits: Tensor,
    *,
    depth: int,
    branching: int,
    anchor_positions: Tensor,
    method: str = "top_k",
    sampling: SamplingTensors | None = None,
    node_budgets: Tensor | None = None,
    draft_to_target: Tensor | None = None,
    state_indices: Tensor | None = None,
    out=None,
    workspace=None,
    decisions: Decisions | None = None,
) -> DraftTree:
    """The tree with `branching` children for each node of this depth, for drafters with a forward pass per depth (MTP, EAGLE).

    node_logits: [R, F, V], row f belongs to the request's f-th node of `depth`. The tree must end with those nodes; it keeps M as
    its room, node_budgets int32 [R] cuts it. Methods "top_k", "iid", "without_replacement", as in `draft_tree`; the laws of nodes
    of other depths stay as they are.
    """
    for name, value in (("out", out), ("workspace", workspace)):
        if value is not None:
            raise ValueError(f"{name}: expected None, the reference allocates its results, got {type(value).__name__}")
    if method not in ("top_k", *SAMPLED):
        raise ValueError(f"method: expected one of 'top_k', 'iid', 'without_replacement', got {method!r}")
    decisions = Decisions() if decisions is None else decisions
    slots, nodes = tree.tokens.shape
    unused = unused_ids(draft_to_target, None, sampling)
    stored = None
    if method in SAMPLED:
        if isinstance(tree.proposal, DenseProposal):
            stored = tree.proposal.logits.clone()
        else:
            stored = torch.zeros(slots, nodes, node_logits.shape[2], dtype=node_logits.dtype, device=node_logits.device)
    flags = tree.flags.clone()
    grown = {}
    for slot, count in enumerate(tree.num_nodes.tolist()):
        if count > 0:
            old = grown[slot] = Growing(int(tree.tokens[slot, 0]), nodes)
            for node in range(1, count):
                old.add(int(tree.parents[slot, node]), int(tree.tokens[slot, node]))
    for r in range(node_logits.shape[0]):
        slot = r if state_indices is None else int(state_indices[r])
        if slot not in grown:
            continue
        growing = grown[slot]
        if node_budgets is not None:
            growing.room = max(1, min(int(node_budgets[r]), nodes))
        position = int(anchor_positions[slot])
        scale = inverse_temperature(float(sampling.temperature[slot])) if sampling is not None else 0.0
        source = PhiloxSource(int(sampling.seed[slot]) if sampling is not None else 0, position, decisions, r)
        frontier = [] if growing.full else [node for node, at in enumerate(growing.depths) if at == depth]
        for row, node in enumerate(frontier[: node_logits.shape[1]]):
            logits, seen = read_logits(_settled(node_logits[r, row].double(), sampling, slot, draft_to_target, unused))
            flags[r] |= seen
            if stored is not None:
                stored[slot, node] = logits.to(stored.dtype)
                logits = stored[slot, node].double()
            lanes = lanes_of(draft_to_target, unused)
            _children(growing, node, branching, logits, method, scale, source, position, decisions, r, lanes)
    proposal = tree.proposal if stored is None else DenseProposal(stored, draft_to_target=draft_to_target)
    return packed(grown, slots, nodes, node_logits.device, proposal, method if method in SAMPLED else "one_hot", flags)
