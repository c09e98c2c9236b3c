"""fixed_layout, tree_layout, draft_layout against reference/layout.py: every field, every element.

Ragged, padded, trimmed batches, with prompts among the requests, trees of all shapes.
"""

import pytest
import torch
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from reference import cases, layout as layouts
from tests.blocks import tree_of
from tests.ops.fields import assert_same, poisoned


def _block(tokens, requests):
    return dk.DraftBlock(tokens, dk.OneHotProposal(), torch.zeros(requests, dtype=torch.int32, device=tokens.device))


def _inputs(seed, requests, drafts, scattered=False, padding=0, missing=False, dtype=torch.int64):
    g = torch.Generator().manual_seed(seed)
    slots = requests + 3 if scattered else requests
    tokens = torch.randint(0, 1000, (slots, drafts), generator=g)
    if missing:
        tokens[torch.rand(tokens.shape, generator=g) < 0.2] = -1
    anchors = torch.randint(0, 1000, (slots,), generator=g)
    if missing and slots:
        anchors[0] = -1
    return dict(
        block=_block(tokens, requests),
        draft_lens=torch.randint(-1, drafts + 3, (requests,), generator=g).to(dtype),
        anchors=anchors.to(dtype),
        anchor_positions=torch.randint(0, 50000, (slots,), generator=g).to(dtype),
        state_indices=cases.slot_map(seed, requests, padding) if scattered else None,
    )


def _check(arguments):
    want = layouts.fixed_layout(**arguments)
    assert_same(dk.fixed_layout(**arguments), want)
    out = poisoned(want)
    assert dk.fixed_layout(**arguments, out=out) is out
    assert_same(out, want)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_equals_reference(data):
    requests = data.draw(st.sampled_from([1, 2, 7, 13]))
    drafts = data.draw(st.sampled_from([1, 3, 7]))
    scattered = data.draw(st.booleans())
    padding = data.draw(st.integers(0, requests - 1)) if scattered else 0
    seed = data.draw(st.integers(0, 10**6))
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    arguments = _inputs(seed, requests, drafts, scattered, padding, data.draw(st.booleans()), dtype)
    if data.draw(st.booleans()):
        arguments["max_rows"] = data.draw(st.integers(requests, requests * (drafts + 1) + 9))
    if data.draw(st.booleans()):
        slots = arguments["anchors"].shape[0]
        page = data.draw(st.sampled_from([1, 16, 24]))
        pages = 50010 // page if data.draw(st.booleans()) else 3
        g = torch.Generator().manual_seed(seed)
        arguments["block_tables"] = torch.randint(0, 10**6, (slots, pages), generator=g).to(torch.int32)
        arguments["page_size"] = page
    _check(arguments)


@pytest.mark.parametrize("seed", range(4))
def test_prefill_rows(seed):
    arguments = _inputs(seed, 7, 3, scattered=True, padding=1)
    g = torch.Generator().manual_seed(seed)
    prompt = torch.randint(0, 9, (7,), generator=g) * (torch.rand(7, generator=g) < 0.5)
    arguments |= dict(num_prefill_tokens=prompt.to(torch.int32), emits=torch.rand(7, generator=g) < 0.6, max_rows=64)
    _check(arguments)


def test_large_batch():
    _check(_inputs(5, 1000, 7))


def test_rows_of_one_request_follow_the_contract():
    tokens = torch.tensor([[11, 12, 13], [21, 22, 23]])
    layout = dk.fixed_layout(
        _block(tokens, 2), torch.tensor([2, 0]), anchors=torch.tensor([10, 20]), anchor_positions=torch.tensor([5, 9])
    )
    assert layout.token_ids.tolist() == [10, 11, 12, 20, 0, 0, 0, 0]
    assert layout.positions.tolist() == [5, 6, 7, 9, 0, 0, 0, 0]
    assert layout.batch_indices.tolist() == [0, 0, 0, 1, -1, -1, -1, -1]
    assert layout.query_start_loc.tolist() == layout.cu_num_logits.tolist() == [0, 3, 4]
    assert layout.logits_indices.tolist() == [0, 1, 2, 3, 0, 0, 0, 0]
    assert layout.num_rows.tolist() == [4] and layout.max_drafts == 3


def test_numbers_beyond_32_bits():
    """Lengths of 64 bits are clamped, not cut; prompts whose rows no 32 bits count are cut as any that are too long."""
    tokens = torch.tensor([[11, 12, 13]] * 3)
    given = dict(block=_block(tokens, 3), anchors=torch.tensor([1, 2, 3]), anchor_positions=torch.tensor([5, 6, 7]))
    layout = dk.fixed_layout(draft_lens=torch.tensor([2**32 + 1, 2**31, -(2**32)]), **given)
    assert layout.draft_lens.tolist() == [3, 3, 0]
    for prompts in ([0, 2**31 - 1, 0], [2**31 - 1] * 3, [0, 2**32, 2**40]):
        given |= dict(draft_lens=torch.tensor([3, 3, 3]), num_prefill_tokens=torch.tensor(prompts), max_rows=8)
        want = layouts.fixed_layout(**given | dict(num_prefill_tokens=torch.tensor(prompts).clamp(max=9)))
        assert_same(dk.fixed_layout(**given), want)


def test_empty_batch_is_zeros_without_a_launch():
    layout = dk.fixed_layout(
        _block(torch.empty(0, 3, dtype=torch.int64), 0),
        torch.empty(0, dtype=torch.int32),
        anchors=torch.empty(0, dtype=torch.int64),
        anchor_positions=torch.empty(0, dtype=torch.int64),
        max_rows=4,
    )
    assert layout.query_start_loc.tolist() == layout.cu_num_logits.tolist() == layout.num_rows.tolist() == [0]
    assert layout.batch_indices.tolist() == [-1] * 4 and layout.token_ids.tolist() == [0] * 4


@pytest.mark.parametrize(
    "change, error, name",
    [
        (dict(block=None), TypeError, "block"),
        (dict(draft_lens=torch.zeros(3)), TypeError, "draft_lens"),
        (dict(draft_lens=torch.zeros(4, dtype=torch.int32)), ValueError, "block.tokens"),
        (dict(anchors=torch.zeros(2, dtype=torch.int64)), ValueError, "anchors"),
        (dict(anchor_positions=torch.zeros(3)), TypeError, "anchor_positions"),
        (dict(anchor_positions=torch.zeros(3, dtype=torch.int32, device="meta")), ValueError, "anchor_positions"),
        (dict(max_rows=2), ValueError, "max_rows"),
        (dict(num_prefill_tokens=torch.zeros(3, dtype=torch.int32)), ValueError, "max_rows"),
        (dict(page_size=16), ValueError, "page_size"),
        (dict(block_tables=torch.zeros(3, 2), page_size=16), TypeError, "block_tables"),
        (dict(state_indices=torch.zeros(2, dtype=torch.int32)), ValueError, "state_indices"),
        (dict(workspace=3), TypeError, "workspace"),
    ],
)
def test_bad_arguments_are_named(change, error, name):
    arguments = _inputs(0, 3, 2) | change
    with pytest.raises(error, match=f"^{name.replace('.', chr(92) + '.')}: expected"):
        dk.fixed_layout(**arguments)


# --- trees and the drafter's own block ----------------------------------------------------------------------------------


def _random_tree(g, nodes):
    """[(token, parent), ...]: every node but the anchor under an earlier one."""
    parents = [-1] + [int(torch.randint(0, m, (1,), generator=g)) for m in range(1, nodes)]
    return [(int(torch.randint(0, 1000, (1,), generator=g)), parent) for parent in parents]


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_tree_rows_equal_the_reference(data):
    requests, nodes = data.draw(st.sampled_from([1, 3, 7])), data.draw(st.sampled_from([1, 2, 13, 64]))
    seed = data.draw(st.integers(0, 10**6))
    g = torch.Generator().manual_seed(seed)
    scattered = data.draw(st.booleans())
    slots = requests + 3 if scattered else requests
    tree = tree_of([_random_tree(g, int(torch.randint(1, nodes + 1, (1,), generator=g))) for _ in range(slots)], nodes)
    if data.draw(st.booleans()):
        tree.tokens[torch.rand(tree.tokens.shape, generator=g) < 0.05] = -1
        tree.num_nodes.copy_(torch.randint(-2, nodes + 3, (slots,), generator=g))
    arguments = dict(
        anchor_positions=torch.randint(0, 5000, (slots,), generator=g),
        state_indices=cases.slot_map(seed, requests, data.draw(st.integers(0, requests))) if scattered else None,
    )
    if data.draw(st.booleans()):
        prompt = torch.randint(0, 9, (requests,), generator=g) * (torch.rand(requests, generator=g) < 0.4)
        arguments |= dict(num_prefill_tokens=prompt.int(), emits=torch.rand(requests, generator=g) < 0.7)
        arguments["max_rows"] = data.draw(st.integers(requests, requests * nodes + 9))
    if data.draw(st.booleans()):
        arguments |= dict(block_tables=torch.randint(0, 10**6, (slots, 200), generator=g).int(), page_size=24)
    want = layouts.tree_layout(tree, **arguments)
    assert_same(dk.tree_layout(tree, **arguments), want)
    out = poisoned(want)
    assert dk.tree_layout(tree, **arguments, out=out) is out
    assert_same(out, want)


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_rows_of_the_drafters_block_equal_the_reference(data):
    requests, size = data.draw(st.sampled_from([1, 3, 13])), data.draw(st.sampled_from([1, 2, 7, 16]))
    seed = data.draw(st.integers(0, 10**6))
    g = torch.Generator().manual_seed(seed)
    scattered = data.draw(st.booleans())
    slots = requests + 3 if scattered else requests
    dtype = data.draw(st.sampled_from([torch.int32, torch.int64]))
    arguments = dict(
        anchors=torch.randint(-2, 1000, (slots,), generator=g).to(dtype),
        anchor_positions=torch.randint(0, 5000, (slots,), generator=g).to(dtype),
        block_size=size,
        mask_token_id=data.draw(st.sampled_from([0, 1, 151643])),
        anchor_first=data.draw(st.booleans()),
        state_indices=cases.slot_map(seed, requests, data.draw(st.integers(0, requests))) if scattered else None,
    )
    if data.draw(st.booleans()):
        arguments |= dict(block_tables=torch.randint(0, 10**6, (slots, 200), generator=g).int(), page_size=24)
    want = layouts.draft_layout(**arguments)
    assert_same(dk.draft_layout(**arguments), want)
    out = poisoned(want)
    assert dk.draft_layout(**arguments, out=out) is out
    assert_same(out, want)


def test_no_trees_and_no_blocks():
    empty = torch.empty(0, dtype=torch.int64)
    for layout in (
        dk.tree_layout(tree_of([]), anchor_positions=empty, max_rows=2),
        dk.draft_layout(empty, empty, block_size=3, mask_token_id=1),
    ):
        assert layout.query_start_loc.tolist() == layout.cu_num_logits.tolist() == layout.num_rows.tolist() == [0]
        assert layout.batch_indices.tolist() == [-1] * len(layout.token_ids)


@pytest.mark.parametrize(
    "change, error, name",
    [
        (dict(tree=None), TypeError, "tree"),
        (dict(anchor_positions=torch.zeros(3).long()), ValueError, "anchor_positions"),
        (dict(max_rows=1), ValueError, "max_rows"),
        (dict(num_prefill_tokens=torch.zeros(2).int()), ValueError, "max_rows"),
        (dict(page_size=4), ValueError, "page_size"),
        (dict(out=3), TypeError, "out"),
        (dict(state_indices=[0]), TypeError, "state_indices"),
    ],
)
def test_bad_arguments_of_trees_are_named(change, error, name):
    arguments = dict(tree=tree_of([[(5, -1), (6, 0)]] * 2), anchor_positions=torch.zeros(2).long()) | change
    with pytest.raises(error, match=f"^{name}: expected"):
        dk.tree_layout(**arguments)


@pytest.mark.parametrize(
    "change, error, name",
    [
        (dict(block_size=0), ValueError, "block_size"),
        (dict(mask_token_id=-1), ValueError, "mask_token_id"),
        (dict(mask_token_id=1.0), TypeError, "mask_token_id"),
        (dict(anchors=torch.zeros(2)), TypeError, "anchors"),
        (dict(anchor_positions=torch.zeros(3).long()), ValueError, "anchor_positions"),
        (dict(page_size=4), ValueError, "page_size"),
    ],
)
def test_bad_arguments_of_blocks_are_named(change, error, name):
    arguments = dict(anchors=torch.zeros(2).long(), anchor_positions=torch.zeros(2).long(), block_size=2, mask_token_id=1)
    with pytest.raises(error, match=f"^{name}: expected"):
        dk.draft_layout(**arguments | change)
