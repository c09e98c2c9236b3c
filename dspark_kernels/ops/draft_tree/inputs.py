"""What the ops that make draft trees share: a call with its arguments checked, and the tree it is written to.

Symbols: R requests, S request slots, K positions, V vocabulary, H hidden size, M nodes.
"""

from __future__ import annotations

import dataclasses
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from ...checks import INT_DTYPES, LOGIT_DTYPES, check_choice, check_int, check_optional, check_tensor, check_type, not_yet
from ...choices import METHODS, STATIC_METHODS, Drawn, Method, StaticMethod
from ...library import Out
from ...types import ConfidenceHead, DenseProposal, DraftTree, MarkovHead, OneHotProposal, Proposal, SamplingTensors
from ..draft import dense as draft

MAX_NODES = 64
SAMPLED = ("iid", "without_replacement")


def drawn_by(method: Method) -> Drawn:
    """How a method chooses children."""
    return method if method == "iid" or method == "without_replacement" else "one_hot"


# Settings that no method supports.
_REFUSED = {
    "top_k": "a top-k filter along a tree is",
    "top_p": "a top-p filter along a tree is",
    "min_p": "a min-p filter along a tree is",
    "token_bitmask": "a mask of tokens along a tree is",
    "penalties": "penalties along a tree are",
}


@dataclasses.dataclass(frozen=True)
class TreeCall:
    """The checked arguments of `draft_tree`, documented there; R, K, V >= 1."""

    base_logits: Tensor
    anchors: Tensor
    head: MarkovHead | None
    anchor_positions: Tensor
    method: Method
    num_nodes: int
    branching: tuple[int, ...] | None
    node_budgets: Tensor | None
    sampling: SamplingTensors | None
    hidden: Tensor | None
    confidence: ConfidenceHead | None
    candidates: int | None
    draft_to_target: Tensor | None
    state_indices: Tensor | None


class Nodes(NamedTuple):
    """The tensors of a tree's nodes, as torch.library knows them."""

    tokens: Out[Tensor]
    parents: Out[Tensor]
    depths: Out[Tensor]
    first_child: Out[Tensor]
    next_sibling: Out[Tensor]
    ancestors: Out[Tensor]
    num_nodes: Out[Tensor]

    def pointers(self) -> dict[str, Tensor]:
        """The same tensors under the names that kernels use."""
        return {f"{name}_ptr": tensor for name, tensor in self._asdict().items()}


def nodes_of(tree: DraftTree) -> Nodes:
    return Nodes(**{name: getattr(tree, name) for name in Nodes._fields})


def check_call(op: str, call: TreeCall) -> None:
    """Check every argument of `draft_tree`. What a method does not support, the method refuses itself."""
    rows, drafts, vocab = draft._check_inputs(call.base_logits, call.anchors, call.anchor_positions, call.state_indices)
    device, slots = call.base_logits.device, call.anchors.shape[0]
    check_choice("method", call.method, METHODS)
    check_int("num_nodes", call.num_nodes, low=1, high=MAX_NODES)
    check_branching(call)
    check_optional("node_budgets", call.node_budgets, dtype=torch.int32, shape=(rows,), device=device, contiguous=True)
    check_optional("draft_to_target", call.draft_to_target, dtype=torch.int64, shape=(vocab,), device=device, contiguous=True)
    check_settings(op, call.sampling, call.method, slots, device)
    hidden_size = draft._check_hidden(call.hidden, call.head, call.confidence, rows, drafts, device)
    draft._check_head(call.head, None, vocab, hidden_size, 0, slots, device)
    draft._check_confidence(call.confidence, hidden_size, call.head, drafts, 0, device)
    if call.candidates is not None:
        check_int("candidates", call.candidates, low=1)


def check_branching(call: TreeCall) -> None:
    if call.method not in STATIC_METHODS:
        if call.branching is not None:
            raise ValueError(f"branching: expected None with method {call.method!r}, got {call.branching}")
        return
    if not isinstance(call.branching, (tuple, list)) or not call.branching:
        raise ValueError(f"branching: expected a tuple of at least one int with method {call.method!r}, got {call.branching}")
    for depth, wanted in enumerate(call.branching):
        check_int(f"branching[{depth}]", wanted, low=1)


def check_settings(op: str, sampling: SamplingTensors | None, method: Method, slots: int, device: torch.device) -> None:
    if sampling is None:
        if method in SAMPLED:
            raise ValueError(f"sampling: expected SamplingTensors with method {method!r}, got None")
        return
    check_type("sampling", sampling, SamplingTensors)
    check_tensor("sampling.temperature", sampling.temperature, shape=(slots,), device=device)
    for name, what in _REFUSED.items():
        if getattr(sampling, name) is not None:
            not_yet(op, f"sampling.{name}", what)
    if sampling.logit_bias is not None and method not in STATIC_METHODS:
        not_yet(op, "sampling.logit_bias", f"with method {method!r} it is")


class Biased(Protocol):
    """What `target_ids` reads of a call."""

    @property
    def base_logits(self) -> Tensor: ...
    @property
    def anchors(self) -> Tensor: ...
    @property
    def sampling(self) -> SamplingTensors | None: ...
    @property
    def head(self) -> MarkovHead | None: ...
    @property
    def draft_to_target(self) -> Tensor | None: ...


def target_ids(call: Biased) -> int:
    """Number of target ids that head, bias and map have; of a call with `sampling`, `head`, `draft_to_target`."""
    logits, slots = call.base_logits, call.anchors.shape[0]
    _, drafts, vocab = logits.shape
    return draft._check_sampling(call.sampling, call.head, call.draft_to_target, slots, drafts, vocab, logits.device)


def allocate(
    slots: int,
    rows: int,
    nodes: int,
    like: Tensor | None,
    drawn: Drawn,
    ids: Tensor | None,
    device: torch.device,
    survival: bool = False,
) -> DraftTree:
    """A tree in which no slot has a node yet. like: logits [..., V] of the dtype and width that the nodes' distributions are kept
    in, None where none are; ids: `draft_to_target` of these."""

    def filled(*shape: int, fill: float = -1, dtype: torch.dtype = torch.int32) -> Tensor:
        return torch.full(shape, fill, dtype=dtype, device=device)

    proposal: Proposal = OneHotProposal()
    if like is not None:
        # A node without children has no distribution: its row is zero.
        proposal = DenseProposal(torch.zeros(slots, nodes, like.shape[-1], dtype=like.dtype, device=device), draft_to_target=ids)
    return DraftTree(
        tokens=filled(slots, nodes, dtype=torch.int64),
        parents=filled(slots, nodes),
        depths=filled(slots, nodes),
        first_child=filled(slots, nodes),
        next_sibling=filled(slots, nodes),
        ancestors=filled(slots, nodes, fill=0, dtype=torch.int64),
        num_nodes=filled(slots, fill=0),
        proposal=proposal,
        drawn=drawn,
        flags=filled(rows, fill=0),
        survival=filled(slots, nodes, fill=0.0, dtype=torch.float32) if survival else None,
    )


def check_out(
    out: DraftTree,
    slots: int,
    rows: int,
    nodes: int,
    like: Tensor | None,
    drawn: Drawn,
    ids: Tensor | None,
    device: torch.device,
) -> DraftTree:
    """Check a caller's tree against what `allocate` would make from the same arguments."""
    check_type("out", out, DraftTree)
    check_tensor("out.tokens", out.tokens, shape=(slots, nodes), device=device)
    check_tensor("out.flags", out.flags, shape=(rows,), device=device, contiguous=True)
    if out.drawn != drawn:
        raise ValueError(f"out.drawn: expected {drawn!r}, got {out.drawn!r}")
    if like is None:
        check_type("out.proposal", out.proposal, OneHotProposal)
    else:
        check_type("out.proposal", out.proposal, DenseProposal)
        assert isinstance(out.proposal, DenseProposal)  # checked
        shape = (slots, nodes, like.shape[-1])
        check_tensor("out.proposal.logits", out.proposal.logits, dtype=like.dtype, shape=shape, device=device)
        if (out.proposal.draft_to_target is None) != (ids is None):
            raise ValueError(f"out.proposal.draft_to_target: expected {'None' if ids is None else 'the map'}, as in this call")
    return out


def check_expansion(
    op: str,
    tree: DraftTree,
    node_logits: Tensor,
    depth: int,
    branching: int,
    anchor_positions: Tensor,
    method: StaticMethod,
    sampling: SamplingTensors | None,
    node_budgets: Tensor | None,
    draft_to_target: Tensor | None,
    state_indices: Tensor | None,
) -> None:
    """Check every argument of `expand_tree`."""
    check_type("tree", tree, DraftTree)
    check_tensor("node_logits", node_logits, dtype=LOGIT_DTYPES, shape=("R", "F", "V"), last_contiguous=True)
    rows, width, vocab = node_logits.shape
    device, slots = node_logits.device, tree.tokens.shape[0]
    check_tensor("tree.tokens", tree.tokens, device=device)
    if width == 0 or vocab == 0:
        raise ValueError(f"node_logits: expected F >= 1 and V >= 1, got shape {list(node_logits.shape)}")
    check_choice("method", method, STATIC_METHODS)
    check_int("depth", depth, low=0)
    check_int("branching", branching, low=1)
    check_tensor("tree.flags", tree.flags, shape=(rows,), device=device, contiguous=True)
    if state_indices is None and slots != rows:
        raise ValueError(f"tree.tokens: expected {rows} rows (one per request, no state_indices), got {slots}")
    check_optional("state_indices", state_indices, dtype=INT_DTYPES, shape=(rows,), device=device, contiguous=True)
    check_tensor("anchor_positions", anchor_positions, dtype=INT_DTYPES, shape=(slots,), device=device)
    check_optional("node_budgets", node_budgets, dtype=torch.int32, shape=(rows,), device=device, contiguous=True)
    check_optional("draft_to_target", draft_to_target, dtype=torch.int64, shape=(vocab,), device=device, contiguous=True)
    check_settings(op, sampling, method, slots, device)
