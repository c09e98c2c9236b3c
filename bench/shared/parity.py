"""Kernels against the reference inside a running decode: every call is made twice on the same inputs.

The reference chooses from the very bits that the kernel stored, so that a rounding in a proposal is no difference; what is left is
compared draw by draw (reference/equality.py), and decoding goes on from the kernel's result.
"""

from __future__ import annotations

import dataclasses

import torch

from reference import accept, attention, compact, draft, layout as layouts, schedule, tree as trees, tree_draft
from reference.equality import assert_equal_or_tied

LINKS = ("tokens", "parents", "depths", "first_child", "next_sibling", "ancestors")


class CheckedOps:
    """The ops of `ops`, checked. calls: comparisons so far. Raises AssertionError where no near tie explains a difference."""

    def __init__(self, ops):
        self._ops = ops
        self.calls = 0

    def draft_block(self, base_logits, anchors, head=None, **options):
        block = self._ops.draft_block(base_logits, anchors, head, keep_logits=True, **options)
        slots = options["state_indices"].long()
        stored = block.proposal.logits[slots]

        def run(decisions):
            want = draft.draft_block(
                base_logits, anchors, head, keep_logits=True, stored_logits=stored, decisions=decisions, **options
            )
            return _by_request(want.tokens[slots], want.flags)

        self.calls += 1
        assert_equal_or_tied(run, _by_request(block.tokens[slots], block.flags))
        return block

    def fixed_layout(self, block, draft_lens, **options):
        layout = self._ops.fixed_layout(block, draft_lens, **options)
        return self._same_rows("fixed_layout", layout, layouts.fixed_layout(block, draft_lens, **options))

    def _same_rows(self, op, layout, want):
        self.calls += 1
        for name in (
            "token_ids", "positions", "batch_indices", "logits_indices", "query_start_loc", "cu_num_logits", "num_rows",
            "draft_lens", "flags",
        ):  # fmt: skip
            if not torch.equal(getattr(layout, name), getattr(want, name).to(getattr(layout, name).dtype)):
                raise AssertionError(f"{op}: {name} differs")
        return layout

    def accept_chain(self, target_logits, layout, proposal=None, *, anchors, anchor_positions, **options):
        given = anchors.clone(), anchor_positions.clone()

        def run(decisions):
            ids, positions = (tensor.clone() for tensor in given)
            want = accept.accept_chain(
                target_logits, layout, proposal, anchors=ids, anchor_positions=positions, decisions=decisions, **options
            )
            return _by_request(want.tokens, want.num_accepted, want.last_row, want.flags)

        result = self._ops.accept_chain(
            target_logits, layout, proposal, anchors=anchors, anchor_positions=anchor_positions, **options
        )
        self.calls += 1
        assert_equal_or_tied(run, _by_request(result.tokens, result.num_accepted, result.last_row, result.flags))
        return result

    def schedule_prefixes(self, block, cost, **options):
        layout = self._ops.schedule_prefixes(block, cost, **options)
        return self._same_rows("schedule_prefixes", layout, schedule.schedule_prefixes(block, cost, **options))

    def draft_tree(self, base_logits, anchors, head=None, **options):
        tree = self._ops.draft_tree(base_logits, anchors, head, **options)
        slots = options["state_indices"].long()
        return self._same_tree(
            tree, slots, lambda decisions: tree_draft.draft_tree(base_logits, anchors, head, decisions=decisions, **options)
        )

    def expand_tree(self, tree, node_logits, **options):
        # The op extends the tree in place.
        before = dataclasses.replace(tree, **{name: getattr(tree, name).clone() for name in (*LINKS, "num_nodes", "flags")})
        tree = self._ops.expand_tree(tree, node_logits, **options)
        slots = options["state_indices"].long()
        return self._same_tree(
            tree, slots, lambda decisions: tree_draft.expand_tree(before, node_logits, decisions=decisions, **options)
        )

    def _same_tree(self, tree, slots, reference):
        def by_request(tree):
            return _by_request(*(getattr(tree, name)[slots] for name in (*LINKS, "num_nodes")), tree.flags)

        self.calls += 1
        assert_equal_or_tied(lambda decisions: by_request(reference(decisions)), by_request(tree))
        return tree

    def tree_layout(self, tree, **options):
        return self._same_rows("tree_layout", self._ops.tree_layout(tree, **options), layouts.tree_layout(tree, **options))

    def accept_tree(self, target_logits, layout, tree, *, anchors, anchor_positions, **options):
        given = anchors.clone(), anchor_positions.clone()

        def run(decisions):
            ids, positions = (tensor.clone() for tensor in given)
            want = trees.accept_tree(
                target_logits, layout, tree, anchors=ids, anchor_positions=positions, decisions=decisions, **options
            )
            return _by_request(want.tokens, want.num_accepted, want.path, want.kv_source, want.flags)

        result = self._ops.accept_tree(target_logits, layout, tree, anchors=anchors, anchor_positions=anchor_positions, **options)
        self.calls += 1
        assert_equal_or_tied(run, _by_request(result.tokens, result.num_accepted, result.path, result.kv_source, result.flags))
        return result

    def compact_kv(self, layers, acceptance, layout):
        want = [cache.clone() for cache in layers.caches]
        compact.compact_kv(want, acceptance, layout)
        self._ops.compact_kv(layers, acceptance, layout)
        self.calls += 1
        for index, (have, moved) in enumerate(zip(layers.caches, want, strict=True)):
            if not torch.equal(have.view(torch.uint8), moved.view(torch.uint8)):  # bits: what was never written is NaN
                raise AssertionError(f"compact_kv: cache {index} differs")

    def __getattr__(self, name):
        # Only ops with attention make the loop use paged caches.
        if name in ("plan_attention", "tree_attention") and hasattr(self._ops, name):
            return self._ops.plan_attention if name == "plan_attention" else self._tree_attention
        raise AttributeError(name)

    def _tree_attention(self, q, kv, layout, **options):
        out = self._ops.tree_attention(q, kv, layout, **options)
        exact = attention.tree_attention(q, kv, layout, **options)
        dense = attention.tree_attention(q, kv, layout, dtype=torch.float32, **options)
        self.calls += 1
        error, dense_error = ((x.double() - exact).abs().max().item() for x in (out, dense))
        # Twice the error of dense fp32, and one rounding to the dtype of the result.
        bound = 2 * dense_error + torch.finfo(q.dtype).eps * max(1.0, exact.abs().max().item())
        if not error <= bound:
            raise AssertionError(f"tree_attention: error {error:.3g} exceeds {bound:.3g}")
        return out


def _by_request(*columns) -> dict[int, tuple]:
    return dict(enumerate(zip(*(column.tolist() for column in columns), strict=True)))
