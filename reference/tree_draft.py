"""draft_tree and expand_tree, node by node, in fp64.

    top_k                children of a node at depth d: its branching[d] best tokens (EAGLE's static trees, arXiv 2401.15077)
    best_first           the nodes of greatest product of q_k(x_k), positions independent (DDTree)
    conditioned          the same with q_k(x | x_{k-1}) of the sequential head, so that a node's children depend on its own token;
                         with a confidence head both rank by survival: q_k(x) c_k, c_k computed at the parent, never from x
    iid                  branching[d] independent draws from the node's distribution (SpecInfer, arXiv 2305.09781)
    without_replacement  the branching[d] best keys of one Gumbel race (Sequoia, arXiv 2402.12374)

Symbols: R requests, S slots, K positions, V vocabulary, M nodes with the anchor; q the distribution after a node, softmax of
(U + B) / T, U the base logits of the next depth, B the head's bias of the node's token; a node of depth d decides position
anchor + d.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor

from dspark_kernels.types import ConfidenceHead, DenseProposal, DraftTree, Flag, MarkovHead, OneHotProposal, SamplingTensors

from . import heads
from .decisions import Decisions
from .logits import adjusted, inverse_temperature, read_logits, refuse_repeated, target_ids
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
        """Keep the first `count` nodes, and the survival of all."""
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
    num_nodes; a depth is skipped when the tree is full before it. node_budgets: int32 [R], nodes of each request (clamped to
    [1, num_nodes]); for the sampled methods they must not depend on this round's draws. candidates: children come from the C best
    base logits of their position alone. A greedy request of a sampled method gets its best tokens. Path probabilities are compared
    at the sampling temperature (greedy: 1). Ties: the lowest node, then the lowest id. confidence: rank by survival, the product of
    q and of confidences along the path. stored_logits: [S, M, V] the logits that a kernel stored; the children are then chosen from
    these bits. decisions: records margins.
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
    batch, drafts, vocab = base_logits.shape
    slots, device = anchors.shape[0], base_logits.device
    stored = torch.zeros(slots, num_nodes, vocab, dtype=base_logits.dtype, device=device) if method in SAMPLED else None
    flags = torch.zeros(batch, dtype=torch.int32, device=device)
    call = Call(
        base_logits, None if method == "best_first" else head, sampling, hidden, candidates, draft_to_target,
        unused_ids(draft_to_target, head, sampling), stored, stored_logits, flags,
    )  # fmt: skip
    survival = Survival(confidence, head, hidden)
    w2 = heads.output_weights(call.head)
    depth_limit = drafts if branching is None else min(drafts, len(branching))
    grown: dict[int, Growing] = {}
    for r in range(batch):
        slot = r if state_indices is None else int(state_indices[r])
        if not 0 <= slot < slots:
            continue
        anchor, position = int(anchors[slot]), int(anchor_positions[slot])
        if call.head is not None and not 0 <= anchor < head.w1.shape[0]:
            flags[r] |= int(Flag.BAD_TOKEN_ID)
        room = num_nodes if node_budgets is None else max(1, min(int(node_budgets[r]), num_nodes))
        tree = grown[slot] = Growing(anchor, room)
        scale = inverse_temperature(float(sampling.temperature[slot])) if sampling is not None else 0.0
        logits = NodeLogits(call, r, slot, tree, heads.Transition(call.head, w2))
        if static:
            source = PhiloxSource(int(sampling.seed[slot]) if sampling is not None else 0, position, decisions, r)
            columns = columns_of(draft_to_target, call.unused)
            chooser = Chooser(r, method, scale, position, source, decisions, columns)
            _grow_by_shape(tree, branching, depth_limit, logits, chooser)
        else:
            search = Search(tree, logits, survival, depth_limit, scale if scale > 0 else 1.0, decisions, r)
            search.grow()
            flags_within_budget, count, tree.room = int(flags[r]), len(tree.tokens), num_nodes
            # The search goes on beyond the budget, because survival is reported for all nodes that there could be.
            search.grow()
            flags[r] = flags_within_budget
            tree.cut(count)
    proposal = OneHotProposal() if stored is None else DenseProposal(stored, draft_to_target=draft_to_target)
    drawn = method if method in SAMPLED else "one_hot"
    return packed(grown, slots, num_nodes, device, proposal, drawn, flags, with_survival=not static)


class Call(NamedTuple):
    """What the requests of a call share."""

    base_logits: Tensor  # [R, K, V]
    head: MarkovHead | None
    sampling: SamplingTensors | None
    hidden: Tensor | None  # [R, K, H]
    candidates: int | None
    draft_to_target: Tensor | None  # int64 [V]
    unused: Tensor | None  # bool [V], entries of draft_to_target that stand for no token
    stored: Tensor | None  # [S, M, V], of the sampled methods
    stored_logits: Tensor | None  # [S, M, V], see draft_tree
    flags: Tensor  # int32 [R]


class NodeLogits:
    """Logits of the children of each node of one request, computed when they are first asked for."""

    def __init__(self, call: Call, request: int, slot: int, tree: Growing, transition: heads.Transition):
        self._call, self._request, self._slot, self._tree = call, request, slot, tree
        self._transitions = {0: transition}
        self._made: dict[int, Tensor] = {}

    def __getitem__(self, node: int) -> Tensor:
        """fp64 [V], rounded once to the logits' dtype where they are stored."""
        if node not in self._made:
            self._made[node] = self._make(node)
        return self._made[node]

    def _make(self, node: int) -> Tensor:
        call, r, tree = self._call, self._request, self._tree
        depth = tree.depths[node]
        base = call.base_logits[r, depth].double()
        transition = copy.copy(self._transitions[tree.parents[node]] if node else self._transitions[0])
        self._transitions[node] = transition
        total = base + transition.bias(tree.tokens[node], None if call.hidden is None else call.hidden[r, depth])
        total = _settled(total, call.sampling, self._slot, call.draft_to_target, call.unused)
        if call.candidates is not None:
            call.flags[r] |= int(Flag.NAN) if bool(base.isnan().any()) else 0
            outside = torch.ones_like(base, dtype=torch.bool)
            best = torch.where(base.isnan(), -math.inf, base).argsort(descending=True, stable=True)[: call.candidates]
            outside[best] = False
            total = torch.where(outside, -math.inf, total)
        call.flags[r] |= read_logits(total)[1]
        total = torch.where(total.isnan(), -math.inf, total)
        if call.stored is None:
            return total
        call.stored[self._slot, node] = total.to(call.stored.dtype)
        return (call.stored if call.stored_logits is None else call.stored_logits)[self._slot, node].double()


class Survival(NamedTuple):
    """The confidence head, and what it reads."""

    confidence: ConfidenceHead | None
    head: MarkovHead | None  # whose W1 embeds a node's token
    hidden: Tensor | None

    def log_confidence(self, request: int, depth: int, token: int) -> float:
        """ln of the probability that a child of this node survives, given that the node did; NaN counts as 0."""
        if self.confidence is None:
            return 0.0
        logit = heads.confidence_logit(self.confidence, self.hidden[request, depth], heads.embed(self.head, token))
        if self.confidence.sts_temperatures is not None:
            logit /= float(self.confidence.sts_temperatures[depth])
        found = float(torch.nn.functional.logsigmoid(torch.tensor(logit, dtype=torch.float64)))
        return -math.inf if math.isnan(found) else found


def unused_ids(draft_to_target: Tensor | None, head, sampling) -> Tensor | None:
    """bool [V]: entries of a map that stand for no token."""
    if draft_to_target is None:
        return None
    refuse_repeated(draft_to_target, target_ids(head, sampling))
    return (draft_to_target < 0) | (draft_to_target >= target_ids(head, sampling))


class Columns(NamedTuple):
    """The columns of a map that stand for a token, in the order of the target's ids, which decides ties."""

    order: Tensor  # int64 [n], columns
    ids: Tensor  # int64 [n], their ids, which address the noise


def columns_of(draft_to_target: Tensor | None, unused: Tensor | None) -> Columns | None:
    if draft_to_target is None:
        return None
    order = torch.argsort(draft_to_target, stable=True)
    order = order[~unused[order]]
    return Columns(order, draft_to_target[order])


def _settled(row: Tensor, sampling, slot: int, draft_to_target, unused) -> Tensor:
    """A row with its bias, -inf where there is no token."""
    if sampling is not None and sampling.logit_bias is not None:
        row = adjusted(row, sampling, slot, 0, [], draft_to_target, unused)
    return row if unused is None else row.masked_fill(unused, -math.inf)


class Chooser(NamedTuple):
    """How one request chooses the children of a node."""

    request: int
    method: str
    scale: float  # 1 / temperature, 0: greedy
    position: int  # of the anchor
    source: PhiloxSource
    decisions: Decisions
    columns: Columns | None

    def add_children(self, tree: Growing, node: int, wanted: int, logits: Tensor) -> None:
        """Up to `wanted` children, one after another; fewer where no token is left or the tree is full."""
        ids = None if self.columns is None else self.columns.ids
        left = logits.clone() if self.columns is None else logits[self.columns.order]
        for _ in range(wanted):
            if tree.full or not bool((left > -math.inf).any()):
                return
            column = self._choose(tree, node, left, ids)
            tree.add(node, column if ids is None else int(ids[column]))
            if self.method != "iid" or self.scale == 0:
                left[column] = -math.inf

    def _choose(self, tree: Growing, node: int, left: Tensor, ids: Tensor | None) -> int:
        if self.method not in SAMPLED or self.scale == 0:
            return self.decisions.pick(self.request, "top", left)
        position = self.position + tree.depths[node] + 1
        if self.method == "iid":
            return self.source.draft_by_block(position, left * self.scale, node=len(tree.tokens))
        return self.source.draft(position, left * self.scale, node=node, lanes=ids)


def _grow_by_shape(tree: Growing, branching, depth_limit: int, logits: NodeLogits, chooser: Chooser) -> None:
    """Depth by depth, each node's children side by side."""
    node = 0
    while node < len(tree.tokens) and tree.depths[node] < depth_limit:
        begins = node == 0 or tree.depths[node] > tree.depths[node - 1]
        if begins and tree.full:
            return
        chooser.add_children(tree, node, branching[tree.depths[node]], logits[node])
        node += 1


class Search:
    """Adds the best child of all that a tree does not have yet, one after another.

    A tree has fewer nodes than a node's MAX_NODES best children, so that no other child can ever be added.
    """

    def __init__(
        self, tree: Growing, logits: NodeLogits, survival: Survival, depth_limit: int, scale: float, decisions: Decisions,
        request: int,
    ):  # fmt: skip
        self._tree, self._logits, self._survival, self._depth_limit = tree, logits, survival, depth_limit
        self._scale, self._decisions, self._request = scale, decisions, request
        self._child_logs: list[Tensor] = []  # by node: ln of the survival of each child it might get, -inf once it has it
        self._child_ids: list[Tensor] = []
        self._node_logs = [0.0]  # by node: ln of its own survival

    def grow(self) -> None:
        """Add nodes until the tree is full or no child is left."""
        tree = self._tree
        while not tree.full:
            for node in range(len(self._child_logs), len(tree.tokens)):
                self._read_children(node)
            keys = torch.cat(self._child_logs)
            if not bool((keys > -math.inf).any()):
                return
            width = self._child_logs[0].shape[0]
            parent, place = divmod(_best_path(keys, width, self._decisions, self._request), width)
            self._node_logs.append(float(self._child_logs[parent][place]))
            tree.add(parent, int(self._child_ids[parent][place]), math.exp(self._node_logs[-1]))
            self._child_logs[parent][place] = -math.inf

    def _read_children(self, node: int) -> None:
        depth = self._tree.depths[node]
        if depth >= self._depth_limit:
            self._child_logs.append(torch.full_like(self._child_logs[0], -math.inf))
            self._child_ids.append(self._child_ids[0])
            return
        reached = self._node_logs[node] + self._survival.log_confidence(self._request, depth, self._tree.tokens[node])
        keys = reached + _log_softmax(self._logits[node] * self._scale)
        best = keys.argsort(descending=True, stable=True)[:MAX_NODES].sort().values
        self._child_logs.append(keys[best])
        self._child_ids.append(best)


def _best_path(keys: Tensor, width: int, decisions: Decisions, request: int) -> int:
    """The largest key, of `width` for each node.

    Children of two nodes may tie in fp64 and not in fp32, whose roundings differ; that is recorded as an expected near tie.
    """
    best = int(torch.argmax((keys == keys.max()).int()))
    others = keys.clone()
    others[best] = -math.inf
    second = int(torch.argmax((others == others.max()).int()))
    gap = float(keys[best] - others[second])
    if best // width == second // width or not gap <= 1e-12 * max(1.0, abs(float(keys[best]))):
        return decisions.pick(request, "path", keys)
    return second if decisions.flipped(request, "path", 0.0, 1.0, probability=1.0) else best


def _log_softmax(scaled: Tensor) -> Tensor:
    """ln softmax; the first of several +inf takes everything; -inf everywhere where there is no logit."""
    row_max = float(scaled.max())
    if math.isfinite(row_max):
        return scaled - torch.logsumexp(scaled, 0)
    logs = torch.full_like(scaled, -math.inf)
    if row_max > 0:
        logs[int(torch.argmax((scaled == row_max).int()))] = 0.0
    return logs


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
    its room, node_budgets int32 [R] cuts it. Methods "top_k", "iid", "without_replacement", as in `draft_tree`; the stored
    logits of nodes of other depths stay as they are.
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
    columns = columns_of(draft_to_target, unused)
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
        chooser = Chooser(r, method, scale, position, source, decisions, columns)
        frontier = [] if growing.full else [node for node, at in enumerate(growing.depths) if at == depth]
        for row, node in enumerate(frontier[: node_logits.shape[1]]):
            logits, row_flags = read_logits(_settled(node_logits[r, row].double(), sampling, slot, draft_to_target, unused))
            flags[r] |= row_flags
            if stored is not None:
                stored[slot, node] = logits.to(stored.dtype)
                logits = stored[slot, node].double()
            chooser.add_children(growing, node, branching, logits)
    proposal = tree.proposal if stored is None else DenseProposal(stored, draft_to_target=draft_to_target)
    return packed(grown, slots, nodes, node_logits.device, proposal, method if method in SAMPLED else "one_hot", flags)
