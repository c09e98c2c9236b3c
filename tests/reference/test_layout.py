"""reference/layout.py against rows made by hand: chains, trees, the drafter's own block."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from dspark_kernels.types import Flag
from reference.layout import draft_layout, fixed_layout, tree_layout
from tests.blocks import anchored, block_of, ints, tree_of


def test_fixed_layout_clamps_and_cuts():
    tokens = [[5, 6, 7], [5, -1, 7], [5, 6, -1], [-3, 6, 7], [5, 6, 7]]
    layout = fixed_layout(block_of(np.ones((5, 3)), tokens), torch.tensor([9, 3, 2, 1, -2]), **anchored(5))
    assert layout.draft_lens.tolist() == [3, 1, 2, 0, 0]
    assert layout.flags.tolist() == [0, Flag.MISSING_DRAFT, 0, Flag.MISSING_DRAFT, 0]
    assert layout.token_ids.tolist() == [7000, 5, 6, 7, 7001, 5, 7002, 5, 6, 7003, 7004] + [0] * 9
    assert layout.positions.tolist()[:11] == [10, 11, 12, 13, 20, 21, 30, 31, 32, 40, 50]
    assert layout.slot_mapping is None


def test_fixed_layout_cuts_rows_that_do_not_fit():
    block = block_of(np.ones((3, 3)))
    for rows, expected in ((12, [3, 3, 3]), (7, [3, 1, 0]), (5, [2, 0, 0]), (3, [0, 0, 0])):
        layout = fixed_layout(block, ints(3, 3, 3), max_rows=rows, **anchored(3))
        assert layout.draft_lens.tolist() == expected
        assert layout.cu_num_logits.tolist() == layout.query_start_loc.tolist()
        assert layout.num_rows.tolist() == [min(rows, 12)] == [layout.query_start_loc[-1]]
    # Prefill rows come before any draft; what is too long even so is cut and then has no token to go on from.
    rules = dict(num_prefill_tokens=ints(0, 4, 0), **anchored(3))
    layout = fixed_layout(block, ints(3, 3, 3), max_rows=7, **rules)
    assert layout.query_start_loc.tolist() == [0, 2, 6, 7] and layout.cu_num_logits.tolist() == [0, 2, 3, 4]
    layout = fixed_layout(block, ints(3, 3, 3), max_rows=4, **rules)
    assert layout.query_start_loc.tolist() == [0, 1, 4, 4] and layout.cu_num_logits.tolist() == [0, 1, 1, 1]
    assert layout.draft_lens.tolist() == [0, 0, 0]


def test_slot_mapping_outside_the_block_table_writes_nothing():
    layout = fixed_layout(
        block_of(np.ones((2, 3))),
        ints(3, 3),
        anchors=torch.tensor([1, 2]),
        anchor_positions=torch.tensor([6, 0]),
        block_tables=ints(5, 3, -1, 4).reshape(2, 2),
        page_size=4,
    )
    assert layout.slot_mapping.tolist() == [14, 15, -1, -1, -1, -1, -1, -1]
    layout = fixed_layout(
        block_of(np.ones((1, 2))),
        ints(2),
        anchors=torch.tensor([1]),
        anchor_positions=torch.tensor([1]),
        block_tables=ints(9, 2, 7, 0).reshape(1, 4),
        page_size=1,
    )
    assert layout.slot_mapping.tolist() == [2, 7, 0]


def test_draft_layout_anchor_first():
    layout = draft_layout(
        torch.tensor([11, 12, -5]),
        torch.tensor([4, 0, 9], dtype=torch.int32),
        block_size=3,
        mask_token_id=99,
        block_tables=torch.arange(6, dtype=torch.int32).reshape(3, 2),
        page_size=8,
        state_indices=ints(2, -1, 0),
    )
    assert layout.token_ids.tolist() == [0, 99, 99, 11, 99, 99, 0, 0, 0]
    assert layout.positions.tolist() == [9, 10, 11, 4, 5, 6, 0, 0, 0]
    assert layout.batch_indices.tolist() == [0, 0, 0, 2, 2, 2, -1, -1, -1]
    assert layout.query_start_loc.tolist() == layout.cu_num_logits.tolist() == [0, 3, 3, 6]
    assert layout.logits_indices.tolist() == [0, 1, 2, 3, 4, 5, 0, 0, 0]
    assert layout.slot_mapping.tolist() == [41, 42, 43, 4, 5, 6, -1, -1, -1]
    assert layout.draft_lens.tolist() == [2, 0, 2] and layout.max_drafts == 2
    assert layout.flags.tolist() == [Flag.BAD_TOKEN_ID, 0, 0]


def test_draft_layout_masks_only_predict():
    layout = draft_layout(torch.tensor([11, 12]), torch.tensor([4, 0]), block_size=2, mask_token_id=0, anchor_first=False)
    assert layout.token_ids.tolist() == [11, 0, 0, 12, 0, 0]
    assert layout.positions.tolist() == [4, 5, 6, 0, 1, 2]
    assert layout.query_start_loc.tolist() == [0, 3, 6] and layout.cu_num_logits.tolist() == [0, 2, 4]
    assert layout.logits_indices.tolist() == [1, 2, 4, 5, 0, 0]
    assert layout.draft_lens.tolist() == [2, 2]
    one = draft_layout(torch.tensor([11]), torch.tensor([4]), block_size=1, mask_token_id=0)
    assert one.token_ids.tolist() == [11] and one.logits_indices.tolist() == [0] and one.draft_lens.tolist() == [0]


# An anchor with two children; the first child has two, the second one: 0 -> 1, 2; 1 -> 3, 4; 2 -> 5.
BRANCHED = [(50, -1), (51, 0), (52, 0), (53, 1), (54, 1), (55, 2)]


def test_tree_rows_sit_at_their_depth_and_are_cached_by_their_node():
    trees = tree_of([BRANCHED, [(60, -1), (61, 0), (62, 1)], [(70, -1)]])
    layout = tree_layout(
        trees,
        anchor_positions=ints(6, 3, 0),
        block_tables=torch.arange(9, dtype=torch.int32).reshape(3, 3),
        page_size=4,
        state_indices=ints(1, -1, 0, 2),
    )
    assert layout.token_ids.tolist() == [60, 61, 62, 50, 51, 52, 53, 54, 55, 70] + [0] * 14
    assert layout.positions.tolist() == [3, 4, 5, 6, 7, 7, 8, 8, 8, 0] + [0] * 14
    assert layout.slot_mapping.tolist() == [15, 16, 17, 6, 7, 8, 9, 10, 11, 24] + [-1] * 14
    assert layout.batch_indices.tolist() == [0, 0, 0, 2, 2, 2, 2, 2, 2, 3] + [-1] * 14
    assert layout.query_start_loc.tolist() == layout.cu_num_logits.tolist() == [0, 3, 3, 9, 10]
    assert layout.logits_indices.tolist() == list(range(10)) + [0] * 14
    assert layout.draft_lens.tolist() == [2, 0, 5, 0] and layout.max_drafts == 5
    assert layout.flags.tolist() == [0, 0, 0, 0]


def test_trees_are_cut_to_trees():
    trees = tree_of([BRANCHED, [(-9, -1), (61, 0), (-1, 0), (63, 1)], BRANCHED])
    trees.num_nodes[0], trees.num_nodes[2] = 99, -3
    layout = tree_layout(trees, anchor_positions=ints(1, 2, 3))
    assert layout.draft_lens.tolist() == [5, 1, 0]
    assert layout.flags.tolist() == [0, Flag.MISSING_DRAFT | Flag.BAD_TOKEN_ID, 0]
    assert layout.token_ids.tolist()[:9] == [50, 51, 52, 53, 54, 55, 0, 61, 50]
    # Anchors and prompts first, then nodes; a node's parents are among those that are left.
    layout = tree_layout(trees, anchor_positions=ints(1, 2, 3), num_prefill_tokens=ints(0, 2, 0), max_rows=7)
    assert layout.query_start_loc.tolist() == [0, 4, 6, 7] and layout.cu_num_logits.tolist() == [0, 4, 5, 6]
    assert layout.positions.tolist() == [1, 2, 2, 3, 2, 3, 3]
    quiet = tree_layout(trees, anchor_positions=ints(1, 2, 3), emits=torch.tensor([False, True, True]))
    assert quiet.query_start_loc.tolist() == [0, 1, 3, 4] and quiet.cu_num_logits.tolist() == [0, 0, 2, 3]


def test_empty_batches():
    empty = torch.zeros(0, dtype=torch.int64)
    for layout in (
        fixed_layout(block_of(np.zeros((0, 3))), empty.int(), anchors=empty, anchor_positions=empty),
        draft_layout(empty, empty, block_size=3, mask_token_id=1),
        tree_layout(tree_of([]), anchor_positions=empty),
    ):
        assert layout.query_start_loc.tolist() == layout.cu_num_logits.tolist() == layout.num_rows.tolist() == [0]
        assert layout.token_ids.numel() == layout.draft_lens.numel() == 0


def test_refused_inputs():
    with pytest.raises(ValueError, match="draft_lens"):
        fixed_layout(block_of([[0.5]]), ints(1, 1), **anchored(1))
    with pytest.raises(ValueError, match="block_size"):
        draft_layout(torch.tensor([1]), torch.tensor([1]), block_size=0, mask_token_id=1)
    with pytest.raises(ValueError, match="mask_token_id"):
        draft_layout(torch.tensor([1]), torch.tensor([1]), block_size=1, mask_token_id=-1)
