"""Decoding through the attention op over a paged cache gives the tokens of dense attention; the pool's bookkeeping."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch

from reference import attention, loop
from reference.model import Rows
from reference.paged import PagedCache
from tests.reference.toy_models import SYSTEMS, TARGET, make_dspark, requests_of


def _paged_ops(**changes):
    """The reference's ops, with attention in fp64 over pages."""

    def tree_attention(q, *arguments, plan, **options):
        return attention.tree_attention(q, *arguments, **options).to(q.dtype)

    extra = dict(plan_attention=lambda *arguments, **options: None, tree_attention=tree_attention)
    return SimpleNamespace(**vars(loop.REFERENCE_OPS), **extra | changes)


@pytest.mark.parametrize("name", ["draft model", "MTP", "block", "block, anchor and masks", "DSpark", "DSpark, causal"])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_every_system_gives_the_same_tokens(name, temperature):
    """Batches of two over five requests: slots are used again, and pages with them."""
    make, options = SYSTEMS[name]
    requests = requests_of(5, temperature)
    want = loop.decode(TARGET, make(TARGET), requests, batch_size=2, **options)
    have = loop.decode(TARGET, make(TARGET), requests, batch_size=2, ops=_paged_ops(), **options)
    for a, b in zip(have, want, strict=True):
        assert (a.output_ids, a.acceptance_lengths) == (b.output_ids, b.acceptance_lengths)


def test_wrong_attention_changes_tokens():
    """The comparison above has power: attention that loses the last key of each context does not pass it."""

    def short(q, kv, *arguments, plan, **options):
        lens = (kv.context_lens - 1).clamp(min=0)
        return attention.tree_attention(q, dataclasses.replace(kv, context_lens=lens), *arguments, **options).to(q.dtype)

    requests = requests_of(5, 1.0)
    want = loop.decode(TARGET, make_dspark(TARGET), requests)
    have = loop.decode(TARGET, make_dspark(TARGET), requests, ops=_paged_ops(tree_attention=short))
    assert any(a.output_ids != b.output_ids for a, b in zip(have, want, strict=True))


def test_the_pool_by_hand():
    shape = TARGET.shape
    cache = PagedCache(shape, 2, "cpu", torch.float32, ops=None, page_size=2)
    rows = Rows.of([(0, 0, 5), (1, 0, 2)], "cpu")
    cache.claim(rows)
    assert [len(table) for table in cache._tables] == [3, 1] and len(cache._free) == 4
    used = [page for table in cache._tables for page in table]
    assert len(set(used)) == 4 and sorted(used + cache._free) == list(range(8))
    keys = torch.randn(7, shape.kv_heads, shape.head_dim)
    cache.write(1, rows, keys, keys + 1)
    layout, slots = cache._layout(rows)
    assert slots.tolist() == [0, 1] and layout.query_start_loc.tolist() == [0, 5, 7] and layout.max_drafts == 4
    assert torch.equal(cache._keys[1].flatten(0, 1)[layout.slot_mapping], keys)
    assert cache._keys[0].isnan().all() and cache._keys[1].isnan().flatten(2).all(2).sum() == 16 - 7
    cache.crop(0, 3)
    assert len(cache._tables[0]) == 2 and len(cache._free) == 5
    cache.claim(Rows.of([(0, 3, 1)], "cpu"))
    kept = cache._places(Rows.of([(0, 0, 3)], "cpu"))
    assert cache.lengths == [4, 2] and torch.equal(cache._keys[1].flatten(0, 1)[kept], keys[:3])
    cache.crop(0, 0)
    cache.crop(1, 0)
    assert sorted(cache._free) == list(range(8))
    with pytest.raises(ValueError, match="positions: expected at most 0"):
        cache.claim(Rows.of([(0, 1, 1)], "cpu"))
    with pytest.raises(ValueError, match="length: expected 0 to 0"):
        cache.crop(0, 1)
