"""Draft blocks and trees with given contents, and anchors that show which slot they came from."""

import numpy as np
import torch

from dspark_kernels.types import DraftBlock, DraftTree, OneHotProposal

LINKS = ("parents", "depths", "first_child", "next_sibling")


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


def block_of(confidence, tokens=None, requests=None):
    """A draft block with the given confidences [S][K]; draft k of slot s is 100 s + k unless given."""
    confidence = np.asarray(confidence, dtype=np.float32)
    # numpy's strides of an empty array are 0, which is not what an engine hands over
    confidence = torch.empty(confidence.shape).copy_(torch.from_numpy(confidence))
    slots, drafts = confidence.shape
    if tokens is None:
        tokens = 100 * torch.arange(slots)[:, None] + torch.arange(1, drafts + 1)[None, :]
    flags = torch.zeros(slots if requests is None else requests, dtype=torch.int32)
    return DraftBlock(
        tokens=torch.as_tensor(tokens, dtype=torch.int64), proposal=OneHotProposal(), flags=flags, confidence=confidence
    )


def anchored(slots):
    return dict(anchors=torch.arange(slots) + 7000, anchor_positions=10 * torch.arange(slots) + 10)


def tree_of(trees, nodes=None):
    """A DraftTree [S, M] from trees [[(token, parent), ...], ...], node 0 = the anchor (parent -1), elder siblings first."""
    nodes = nodes or max((len(tree) for tree in trees), default=1)
    fields = {name: torch.full((len(trees), nodes), -1, dtype=torch.int32) for name in LINKS}
    tokens = torch.full((len(trees), nodes), -1)
    ancestors = torch.zeros(len(trees), nodes, dtype=torch.int64)
    for s, tree in enumerate(trees):
        last_child = {}
        for m, (token, parent) in enumerate(tree):
            tokens[s, m] = token
            fields["parents"][s, m] = parent
            fields["depths"][s, m] = 0 if parent < 0 else fields["depths"][s, parent] + 1
            ancestors[s, m] = (ancestors[s, parent] if parent >= 0 else 0) | (1 << m)
            if parent in last_child:
                fields["next_sibling"][s, last_child[parent]] = m
            elif parent >= 0:
                fields["first_child"][s, parent] = m
            last_child[parent] = m
    return DraftTree(
        tokens=tokens,
        **fields,
        ancestors=ancestors,
        num_nodes=ints(*(len(tree) for tree in trees)),
        proposal=OneHotProposal(),
        drawn="one_hot",
        flags=torch.zeros(len(trees), dtype=torch.int32),
    )
