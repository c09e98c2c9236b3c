"""reference/attention.py against a loop over rows, heads and keys in Python floats, and by its properties."""

from __future__ import annotations

import math

import pytest
import torch

from reference.attention import ancestor_bits, chain_ancestors, dense_attention, packed_attention

TOLERANCE = dict(rtol=1e-12, atol=1e-12)
# A tree of 9 nodes with branches of unequal depth: parent of each node, -1 = the root.
PARENTS = [-1, 0, 0, 1, 1, 2, 3, 6, 5]


def ancestor_words(parents):
    words = []
    for node, parent in enumerate(parents):
        words.append((words[parent] if parent >= 0 else 0) | 1 << node)
    return torch.tensor(words, dtype=torch.int64)


def path_to(node, parents=PARENTS):
    path = [node]
    while parents[path[-1]] >= 0:
        path.append(parents[path[-1]])
    return path[::-1]


def inputs(n, context, query_heads=4, kv_heads=2, size=8, value_size=None, seed=0, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)

    value_size = value_size or size
    return (
        normal(n, query_heads, size),
        normal(context, kv_heads, size),
        normal(context, kv_heads, value_size),
        normal(n, kv_heads, size),
        normal(n, kv_heads, value_size),
    )


def naive(
    q,
    k_context,
    v_context,
    k_new,
    v_new,
    *,
    mask="chain",
    parents=None,
    scale=None,
    window=None,
    softcap=None,
    sinks=None,
):
    """One row, one head, one visible key at a time, in Python floats."""
    n, heads, size = q.shape
    context, group = len(k_context), heads // k_new.shape[1]
    scale = size**-0.5 if scale is None else scale
    out, lses = torch.zeros(n, heads, v_new.shape[-1], dtype=torch.float64), torch.zeros(n, heads, dtype=torch.float64)
    for i in range(n):
        if mask == "chain":
            own = {s: s for s in range(i + 1)}
        elif mask == "full":
            own = {s: s for s in range(n)}
        else:
            own = {s: depth for depth, s in enumerate(path_to(i, parents))}
        here = context + own[i]
        visible = [(k_context[j], v_context[j]) for j in range(context) if window is None or here - j < window]
        visible += [(k_new[s], v_new[s]) for s, depth in own.items() if window is None or here - (context + depth) < window]
        for h in range(heads):
            scores = []
            for key, _ in visible:
                score = scale * sum(a * b for a, b in zip(q[i, h].tolist(), key[h // group].tolist(), strict=True))
                scores.append(score if softcap is None else softcap * math.tanh(score / softcap))
            total = sum(map(math.exp, scores)) + (0 if sinks is None else math.exp(sinks[h].item()))
            for score, (_, value) in zip(scores, visible, strict=True):
                out[i, h] += math.exp(score) / total * value[h // group]
            lses[i, h] = math.log(total)
    return out, lses


OPTIONS = [
    dict(),
    dict(scale=0.7),
    dict(softcap=1.5),
    dict(sinks=torch.tensor([0.3, -2.0, 5.0, 0.0], dtype=torch.float64)),
    dict(window=1),
    dict(window=3),
    dict(window=7, softcap=2.0, scale=1.3, sinks=torch.tensor([1.0, -1.0, 0.5, 9.0], dtype=torch.float64)),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("context", [0, 1, 6])
@pytest.mark.parametrize("mask", ["chain", "full", "tree"])
def test_equals_the_loop(mask, context, options):
    arguments = inputs(len(PARENTS), context, value_size=5)
    tree = dict(ancestors=ancestor_words(PARENTS)) if mask == "tree" else {}
    out, lse = dense_attention(*arguments, mask=mask, return_lse=True, **tree, **options)
    expected, expected_lse = naive(*arguments, mask=mask, parents=PARENTS, **options)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    torch.testing.assert_close(lse, expected_lse, **TOLERANCE)


@pytest.mark.parametrize("query_heads, kv_heads", [(1, 1), (6, 6), (6, 2), (8, 1), (7, 1)])
def test_head_groups(query_heads, kv_heads):
    arguments = inputs(5, 4, query_heads, kv_heads)
    out, lse = dense_attention(*arguments, return_lse=True)
    expected, expected_lse = naive(*arguments)
    torch.testing.assert_close(out, expected, **TOLERANCE)
    torch.testing.assert_close(lse, expected_lse, **TOLERANCE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_arithmetic_type(dtype):
    """Inputs are widened before anything is computed; fp32 arithmetic is fp32-accurate."""
    arguments = inputs(5, 4, dtype=dtype)
    expected, _ = naive(*(a.double() for a in arguments))
    exact = dense_attention(*arguments)
    assert exact.dtype == torch.float64
    torch.testing.assert_close(exact, expected, **TOLERANCE)
    single = dense_attention(*arguments, dtype=torch.float32)
    assert single.dtype == torch.float32
    torch.testing.assert_close(single.double(), expected, rtol=1e-5, atol=1e-6)


def test_chain_ancestors():
    assert chain_ancestors(4).tolist() == [1, 3, 7, 15]
    words = chain_ancestors(64)
    assert words.dtype == torch.int64 and words[62] == 2**63 - 1 and words[63] == -1
    assert torch.equal(ancestor_bits(words), torch.ones(64, 64, dtype=torch.bool).tril())
    assert chain_ancestors(0).shape == (0,)


@pytest.mark.parametrize("window", [None, 1, 3, 11])
@pytest.mark.parametrize("n, context", [(1, 0), (7, 5), (64, 3)])
def test_chain_given_as_tree_is_identical(n, context, window):
    arguments = inputs(n, context, size=4)
    chain = dense_attention(*arguments, window=window, return_lse=True)
    tree = dense_attention(*arguments, mask="tree", ancestors=chain_ancestors(n), window=window, return_lse=True)
    assert torch.equal(chain[0], tree[0]) and torch.equal(chain[1], tree[1])


@pytest.mark.parametrize("window", [None, 1, 2, 3, 6])
@pytest.mark.parametrize("context", [0, 4])
def test_tree_node_equals_the_end_of_its_path(context, window):
    """Windows go by depth: a node's deeper cousins in between take nothing away from its window."""
    q, k_context, v_context, k_new, v_new = inputs(len(PARENTS), context)
    words = ancestor_words(PARENTS)
    out = dense_attention(q, k_context, v_context, k_new, v_new, mask="tree", ancestors=words, window=window)
    for node in range(len(PARENTS)):
        path = path_to(node)
        chain = dense_attention(q[path], k_context, v_context, k_new[path], v_new[path], window=window)
        torch.testing.assert_close(out[node], chain[-1], **TOLERANCE)


def test_window_of_a_tree_counts_depth_not_slots():
    # Node 7 has the path 0, 1, 3, 6, 7: with a window of 4 it sees 1, 3, 6, 7, though slot 1 is six slots back.
    arguments = inputs(len(PARENTS), 3)
    rules = dict(mask="tree", ancestors=ancestor_words(PARENTS), window=4)
    before = dense_attention(*arguments, **rules)
    for slot, visible in ((0, False), (1, True), (2, False), (3, True), (5, False), (6, True), (7, True), (8, False)):
        changed = [a.clone() for a in arguments]
        changed[4][slot] += 1
        assert torch.equal(dense_attention(*changed, **rules)[7], before[7]) != visible, slot
    changed = [a.clone() for a in arguments]
    changed[2] += 1  # context: out of node 7's window, inside node 0's
    assert torch.equal(dense_attention(*changed, **rules)[7], before[7])
    assert not torch.equal(dense_attention(*changed, **rules)[0], before[0])


def test_full_mask_sees_both_directions():
    arguments = inputs(4, 3)
    before = dense_attention(*arguments, mask="full", window=2)
    last, first = [a.clone() for a in arguments], [a.clone() for a in arguments]
    last[4][3] += 1
    first[4][0] += 1
    # A window limits what lies behind, never what lies ahead.
    assert not (dense_attention(*last, mask="full", window=2) == before).flatten(1).all(1).any()
    assert (dense_attention(*first, mask="full", window=2) == before).flatten(1).all(1).tolist() == [
        False,
        False,
        True,
        True,
    ]
    # Order inside the block does not matter without a window.
    order = torch.tensor([2, 0, 3, 1])
    shuffled = [arguments[0][order], arguments[1], arguments[2], arguments[3][order], arguments[4][order]]
    expected = dense_attention(*arguments, mask="full")[order]
    torch.testing.assert_close(dense_attention(*shuffled, mask="full"), expected, **TOLERANCE)


def test_lse_merges_parts():
    """Context alone and own rows alone, merged by their lse, give the whole; the sink belongs to one part only."""
    q, k_context, v_context, k_new, v_new = inputs(5, 6)
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    whole = dense_attention(q, k_context, v_context, k_new, v_new, sinks=sinks, return_lse=True)
    empty = k_context[:0], v_context[:0]
    parts = [dense_attention(q, *empty, k_new, v_new, sinks=sinks, return_lse=True)]
    blind = dict(mask="tree", ancestors=torch.zeros(5, dtype=torch.int64))
    parts.append(dense_attention(q, k_context, v_context, k_new, v_new, return_lse=True, **blind))
    lse = torch.logaddexp(parts[0][1], parts[1][1])
    merged = sum(out * (part - lse).exp()[..., None] for out, part in parts)
    torch.testing.assert_close(merged, whole[0], **TOLERANCE)
    torch.testing.assert_close(lse, whole[1], **TOLERANCE)


def test_a_row_that_sees_nothing():
    arguments = inputs(3, 0)
    words = torch.tensor([1, 0, 4], dtype=torch.int64)
    out, lse = dense_attention(*arguments, mask="tree", ancestors=words, return_lse=True)
    assert (out[1] == 0).all() and (lse[1] == -math.inf).all()
    assert torch.equal(out[0], arguments[4][0].repeat_interleave(2, 0))
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0], dtype=torch.float64)
    out, lse = dense_attention(*arguments, mask="tree", ancestors=words, sinks=sinks, return_lse=True)
    assert (out[1] == 0).all()
    torch.testing.assert_close(lse[1], sinks, **TOLERANCE)


def test_no_rows():
    for context in (0, 3):
        out, lse = dense_attention(*inputs(0, context), return_lse=True)
        assert out.shape == (0, 4, 8) and lse.shape == (0, 4)


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("rules", [dict(), dict(window=2), dict(mask="tree", ancestors=ancestor_words(PARENTS))], ids=str)
def test_unseen_keys_do_not_leak(rules, value):
    """A broken key or value corrupts exactly the rows that see it; everyone else keeps the same result."""
    arguments = inputs(len(PARENTS), 4)
    before = dense_attention(*arguments, **rules)
    for position in range(4 + len(PARENTS)):
        changed = [a.clone() for a in arguments]
        probe = [a.clone() for a in arguments]
        for side in (1, 2):
            where = changed[side] if position < 4 else changed[side + 2]
            where[position if position < 4 else position - 4, 1] = value  # KV head 1: query heads 2 and 3
        (probe[2] if position < 4 else probe[4])[position if position < 4 else position - 4, 1] += 1
        after = dense_attention(*changed, **rules)
        sees = (dense_attention(*probe, **rules) != before).flatten(1).any(1)
        assert torch.isnan(after[sees][:, 2:]).all()
        torch.testing.assert_close(after[~sees], before[~sees], **TOLERANCE)
        torch.testing.assert_close(after[:, :2], before[:, :2], **TOLERANCE)


def test_infinite_value_reaches_its_element_alone():
    arguments = inputs(3, 2)
    before = dense_attention(*arguments)
    arguments[4][1, 0, 5] = math.inf
    after = dense_attention(*arguments)
    hit = torch.zeros(3, 4, 8, dtype=torch.bool)
    hit[1:, :2, 5] = True
    assert (after[hit] == math.inf).all()
    torch.testing.assert_close(after[~hit], before[~hit], **TOLERANCE)


def test_packed_rows():
    """Requests of 3, 0 and 5 rows over contexts of 4, 2 and 0 keys, then padding rows full of NaN."""
    counts, contexts = (3, 0, 5), (4, 2, 0)
    q, _, _, k_new, v_new = inputs(11, 0)
    for tensor in (q, k_new, v_new):
        tensor[8:] = math.nan
    pairs = [inputs(1, context, seed=9 + context)[1:3] for context in contexts]
    words = torch.cat([ancestor_words(PARENTS[: counts[0]]), ancestor_words(PARENTS[: counts[2]]), torch.full((3,), -1)])
    starts = torch.tensor([0, 3, 3, 8], dtype=torch.int32)
    for rules in (dict(), dict(mask="full"), dict(mask="tree", ancestors=words), dict(window=2, softcap=3.0)):
        out, lse = packed_attention(q, pairs, k_new, v_new, starts, return_lse=True, **rules)
        assert torch.equal(out, packed_attention(q, pairs, k_new, v_new, starts, **rules))
        for rows, (k_context, v_context) in ((slice(0, 3), pairs[0]), (slice(3, 8), pairs[2])):
            single = dict(rules, ancestors=words[rows]) if "ancestors" in rules else rules
            expected = dense_attention(q[rows], k_context, v_context, k_new[rows], v_new[rows], return_lse=True, **single)
            assert torch.equal(out[rows], expected[0]) and torch.equal(lse[rows], expected[1])
        assert (out[8:] == 0).all() and (lse[8:] == -math.inf).all()


@pytest.mark.parametrize(
    "rules, error, message",
    [
        (dict(mask="causal"), ValueError, "mask"),
        (dict(mask="tree"), ValueError, "ancestors"),
        (dict(ancestors=chain_ancestors(3)), ValueError, "ancestors"),
        (dict(mask="tree", ancestors=chain_ancestors(2)), ValueError, "ancestors"),
        (dict(mask="tree", ancestors=chain_ancestors(3).int()), ValueError, "ancestors"),
        (dict(window=0), ValueError, "window"),
        (dict(softcap=0.0), ValueError, "softcap"),
        (dict(dtype=torch.bfloat16), TypeError, "dtype"),
    ],
)
def test_refused_arguments(rules, error, message):
    with pytest.raises(error, match=message):
        dense_attention(*inputs(3, 2), **rules)


def test_refused_shapes():
    with pytest.raises(ValueError, match="heads"):
        dense_attention(*inputs(3, 2, query_heads=5))
    q, k_context, v_context, k_new, v_new = inputs(65, 0, size=2)
    with pytest.raises(ValueError, match="ancestors"):
        dense_attention(q, k_context, v_context, k_new, v_new, mask="tree", ancestors=torch.ones(65, dtype=torch.int64))
    with pytest.raises(ValueError, match="contexts"):
        packed_attention(q, [(k_context, v_context)], k_new, v_new, torch.tensor([0, 3, 65]))
    with pytest.raises(ValueError, match="n:"):
        chain_ancestors(65)
