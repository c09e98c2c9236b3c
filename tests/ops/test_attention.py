"""tree_attention against reference/attention.py: masks, lengths, windows, pages, types, parts; and its properties.

Every case poisons what no row may see with NaN (reference/cases), and outputs before the call. `parts` cuts contexts into parts
of a few keys and rows into tiles, where the interpreter's own configuration would keep them whole.
"""

import dataclasses
import math

import pytest
import torch
from hypothesis import HealthCheck, given, settings, strategies as st

import dspark_kernels as dk
from dspark_kernels.launch import attention as attention_launch
from reference import attention, cases
from tests.ops.attention_checks import casts_fp8, chain_as_tree, check, plan_of, run, small_parts
from tests.ops.far import far_apart

FP8 = torch.float8_e4m3fn


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.setattr(attention_launch, "pick", small_parts(attention_launch.pick))


OPTIONS = [
    dict(),
    dict(cached=True, page_size=1, scattered=True),
    dict(window=1, page_size=7),
    dict(window=6, cached=True, swapped=True),
    dict(window=64, softcap=2.0, scale=0.3, sinks=True),
    dict(query_heads=5, kv_heads=1, head_dim=80, page_size=16, position_dtype=torch.int64),
    dict(query_heads=16, kv_heads=1, head_dim=4, scattered=True, padding_requests=1),
    dict(query_heads=3, kv_heads=3, head_dim=64, sinks=True, cached=True),
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "+".join(o) or "plain")
@pytest.mark.parametrize("mask", ["chain", "full", "tree"])
def test_equals_the_reference_in_parts(parts, mask, options):
    rows, contexts = ((3, 0, 18, 1, 2), (37, 9, 66, 0, 130)) if mask == "tree" else ((3, 0, 5, 1), (37, 9, 130, 0))
    check(cases.attention_case(seed=len(options), rows=rows, contexts=contexts, mask=mask, **options))


@pytest.mark.parametrize("mask", ["chain", "full", "tree"])
def test_equals_the_reference_whole(mask):
    check(cases.attention_case(rows=(8, 1, 0, 64), contexts=(300, 129, 128, 5), mask=mask))
    check(cases.attention_case(rows=(8, 1), contexts=(300, 129), mask=mask, window=100, sinks=True, by_slot=mask == "tree"))


@pytest.mark.parametrize(
    "types",
    [
        dict(dtype=torch.bfloat16),
        dict(dtype=torch.float16, cached=True),
        dict(dtype=torch.bfloat16, cache_dtype=FP8),
        dict(dtype=torch.float16, cache_dtype=FP8, cached=True),
        dict(dtype=torch.float32, cache_dtype=FP8),
    ],
    ids=str,
)
@pytest.mark.parametrize("native", [True, False])
def test_number_types(monkeypatch, types, native):
    """fp8 by the GPU's cast and by bits; errors no worse than eager PyTorch's in the same dtype."""
    if not native and "cache_dtype" not in types:
        pytest.skip("only an fp8 cache is widened")
    if native and "cache_dtype" in types and not casts_fp8():
        pytest.skip("this architecture has no fp8 casts")
    monkeypatch.setattr(attention_launch, "pick", small_parts(attention_launch.pick, native_fp8=native))
    for mask in ("chain", "tree"):
        check(cases.attention_case(seed=4, rows=(5, 2), contexts=(70, 90), head_dim=64, mask=mask, **types))


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("k_scale, v_scale", [([0.7, 0.2], [1.5]), ([0.7], [1.5, 0.4]), ([0.7, 0.2], [1.5, 0.4])])
def test_scales_of_each_head(parts, cached, k_scale, v_scale):
    """A scale per KV head or one for all, for keys and values apart."""
    case = cases.attention_case(seed=32, rows=(3, 2), contexts=(40, 21), dtype=torch.float16, cache_dtype=FP8, cached=cached)
    kv = dataclasses.replace(case.kv, k_scale=torch.tensor(k_scale), v_scale=torch.tensor(v_scale))
    check(dataclasses.replace(case, kv=kv))


@pytest.mark.parametrize("mask", ["chain", "tree"])
def test_strides_do_not_matter(parts, mask):
    """Queries, keys and values as slices of one tensor, outputs as slices of wider ones, of which nothing else is written."""
    case = cases.attention_case(seed=33, rows=(3, 0, 9), contexts=(37, 9, 70), mask=mask, query_heads=6, kv_heads=2, head_dim=32)
    want = run(case)
    q, k, v = torch.cat([case.q, case.k_new, case.v_new], 1).split([6, 2, 2], 1)
    assert not (q.is_contiguous() or k.is_contiguous() or v.is_contiguous())
    wide, wide_lse = torch.full((14, 9, 37), 7.0), torch.full((14, 9), 7.0)
    out = wide[:, 2:8, 3:35], wide_lse[:, 2:8]
    split = dataclasses.replace(case, q=q, k_new=k, v_new=v, ancestors=None if mask == "chain" else _spread(case.ancestors))
    dk.tree_attention(**split.arguments(), return_lse=True, out=out)
    for have, expected in zip(out, want, strict=True):
        assert torch.equal(have, expected)
        have.fill_(7.0)
    assert (wide == 7).all() and (wide_lse == 7).all()


def _spread(words):
    return torch.stack([words, ~words], 1)[:, 0]


def test_every_byte_of_fp8():
    """A context of 16 keys whose values are all 256 bytes: what a single visible key shows is what the byte means."""
    for native in (True, False) if casts_fp8() else (False,):
        values = torch.arange(256, dtype=torch.uint8).view(FP8).view(16, 1, 1, 16)
        keys = torch.zeros(16, 1, 1, 16).to(FP8)
        one = torch.ones(1)
        tables = torch.arange(16, dtype=torch.int32)[:, None].contiguous()
        kv = dk.PagedKV(keys, values, tables, torch.ones(16, dtype=torch.int32), k_scale=one, v_scale=one)
        layout = cases.attention_layout([1] * 16, [1] * 16, torch.zeros(16, dtype=torch.int64), None)
        # The own row's key is hidden by an ancestor word of 0.
        own = torch.zeros(16, 1, 16)
        arguments = dict(mask="tree", ancestors=torch.zeros(16, dtype=torch.int64), k_new=own, v_new=own)
        with pytest.MonkeyPatch.context() as patch:
            pick = attention_launch.pick
            patch.setattr(attention_launch, "pick", lambda *a: dataclasses.replace(pick(*a), native_fp8=native))  # noqa: B023
            out = dk.tree_attention(torch.zeros(16, 1, 16), kv, layout, **arguments)
        torch.testing.assert_close(out.view(-1), values.float().view(-1), rtol=0, atol=0, equal_nan=True)


@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data())
def test_any_shape(data):
    draw = data.draw
    requests = draw(st.integers(1, 5))
    mask = draw(st.sampled_from(["chain", "full", "tree"]))
    kv_heads = draw(st.integers(1, 3))
    options = dict(
        seed=draw(st.integers(0, 1000)),
        rows=tuple(draw(st.lists(st.integers(0, 20), min_size=requests, max_size=requests))),
        contexts=tuple(draw(st.lists(st.integers(0, 90), min_size=requests, max_size=requests))),
        kv_heads=kv_heads,
        query_heads=kv_heads * draw(st.integers(1, 7)),
        head_dim=draw(st.sampled_from([8, 16, 48, 64])),
        page_size=draw(st.sampled_from([1, 3, 16, 64])),
        mask=mask,
        cached=draw(st.booleans()),
        by_slot=mask == "tree" and draw(st.booleans()),
        scattered=draw(st.booleans()),
        padding_rows=draw(st.integers(0, 3)),
        sinks=draw(st.booleans()),
        window=draw(st.sampled_from([None, None, 1, 5, 40])),
        max_drafts=draw(st.sampled_from([None, 19])),
    )
    if sum(options["rows"]) + options["padding_rows"] == 0:
        options["padding_rows"] = 1
    changes = dict(programs=draw(st.sampled_from([1, 7, 40])), min_blocks=draw(st.integers(1, 3)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_launch, "pick", small_parts(attention_launch.pick, **changes))
        check(cases.attention_case(**options), batch_invariant=draw(st.booleans()))


# --- what must not matter ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [dict(), dict(window=1), dict(window=30, cached=True), dict(dtype=torch.bfloat16)], ids=str)
def test_a_chain_given_as_tree_has_the_same_bits(parts, options):
    case = cases.attention_case(seed=3, rows=(64, 7, 1), contexts=(0, 75, 130), **options)
    for have, want in zip(run(chain_as_tree(case)), run(case), strict=True):
        assert torch.equal(have, want)


@pytest.mark.parametrize("window", [None, 3, 9])
def test_a_tree_node_is_the_last_row_of_its_path(parts, window):
    sizes = dict(rows=(14,), contexts=(30,), kv_heads=1, query_heads=2, padding_rows=0)
    case = cases.attention_case(seed=5, mask="tree", window=window, **sizes)
    out, lse = run(case)
    for node, word in enumerate(case.ancestors.tolist()):
        path = [slot for slot in range(14) if word >> slot & 1]
        chain = dataclasses.replace(
            case, mask="chain", ancestors=None, q=case.q[path], k_new=case.k_new[path], v_new=case.v_new[path],
            layout=cases.attention_layout([len(path)], [30], torch.arange(len(path)), None),
        )  # fmt: skip
        want, want_lse = run(chain)
        torch.testing.assert_close(out[node], want[-1], rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(lse[node], want_lse[-1], rtol=1e-5, atol=1e-6)


def test_a_wide_tree_in_a_window(parts):
    """Children of the anchor in late tiles are as near to the context as those in the first."""
    case = cases.attention_case(seed=6, rows=(50,), contexts=(60,), mask="tree", window=9, padding_rows=0)
    case.ancestors.copy_(cases.ancestor_words([-1] + [0] * 49))
    check(case)


def test_more_than_64_rows_of_a_tree_batch_are_a_chain(parts):
    """A piece of a prompt beside trees: its words are not read."""
    for window in (None, 20):
        check(cases.attention_case(seed=6, rows=(9, 70, 0), contexts=(33, 20, 8), query_heads=2, mask="tree", window=window))


def test_a_prompt_shares_the_batch(parts):
    """150 rows beside one and five: several tiles, the later ones with less of the context in their window."""
    for options in (dict(), dict(window=70), dict(mask="full", window=70), dict(cached=True)):
        sizes = dict(rows=(1, 150, 5), contexts=(90, 100, 0), kv_heads=1, query_heads=2, head_dim=16)
        check(cases.attention_case(seed=7, **sizes, **options))


def _permuted(case, order):
    """The requests of a case without slots in another order."""
    starts = case.layout.query_start_loc.tolist()
    index = [row for r in order for row in range(starts[r], starts[r + 1])]
    index += range(starts[-1], case.q.shape[0])
    counts = [starts[r + 1] - starts[r] for r in order]
    take = lambda t: None if t is None else t[index]  # noqa: E731
    kv = dataclasses.replace(case.kv, block_tables=case.kv.block_tables[order], context_lens=case.kv.context_lens[order])
    contexts = kv.context_lens.tolist()
    layout = cases.attention_layout(counts, contexts, torch.zeros(len(index), dtype=torch.int64), take(case.layout.slot_mapping))
    changed = dict(q=case.q[index], kv=kv, layout=layout, ancestors=take(case.ancestors))
    return dataclasses.replace(case, **changed, k_new=take(case.k_new), v_new=take(case.v_new)), index


@pytest.mark.parametrize("mask", ["chain", "tree"])
def test_order_of_requests_does_not_matter(parts, mask):
    """The table depends on the order only through the numbering: with equal parts the bits are equal."""
    case = cases.attention_case(seed=8, rows=(3, 5, 0, 2), contexts=(37, 90, 9, 0), mask=mask, window=60)
    want = run(case)
    other, index = _permuted(case, [2, 3, 1, 0])
    for have, expected in zip(run(other), want, strict=True):
        assert torch.equal(have, expected[index])


def test_order_of_pages_does_not_matter(parts):
    case = cases.attention_case(seed=9, rows=(3, 5), contexts=(37, 90), cached=True, dtype=torch.bfloat16)
    pages = case.kv.k_cache.shape[0]
    order = torch.randperm(pages, generator=torch.Generator().manual_seed(0))
    place = order.argsort()  # page p of the old cache is page place[p] of the new one
    tables = case.kv.block_tables.clone()
    used = tables < pages
    tables[used] = place[tables[used].long()].int()
    at = case.layout.slot_mapping.clamp(min=0)
    mapping = torch.where(case.layout.slot_mapping < 0, -1, place[at // 4] * 4 + at % 4)
    moved = dataclasses.replace(
        case,
        kv=dataclasses.replace(case.kv, k_cache=case.kv.k_cache[order], v_cache=case.kv.v_cache[order], block_tables=tables),
        layout=dataclasses.replace(case.layout, slot_mapping=mapping),
    )
    for have, want in zip(run(moved), run(case), strict=True):
        assert torch.equal(have, want)


def test_any_number_of_parts_is_right(monkeypatch):
    """Parts change the rounding and nothing else."""
    case = cases.attention_case(seed=10, rows=(4, 2), contexts=(200, 130), dtype=torch.bfloat16, sinks=True)
    pick = attention_launch.pick
    for programs in (1, 3, 8, 100):
        monkeypatch.setattr(attention_launch, "pick", small_parts(pick, programs=programs))
        check(case)


def _workspace():
    return dk.Workspace(2, 3, 100, "cpu", query_heads=3, kv_heads=1, head_dim=32, max_rows=16)


def test_parts_that_arrive_in_any_order_give_the_same_bits(monkeypatch):
    """Whoever arrives last merges, in the order of the parts: programs run backwards, shuffled, and all at once."""
    from triton.runtime.interpreter import InterpreterBuilder

    from dspark_kernels.testing import interpreter

    monkeypatch.setattr(attention_launch, "pick", small_parts(attention_launch.pick, programs=24))
    case = cases.attention_case(seed=11, rows=(4, 1), contexts=(200, 130), kv_heads=1, query_heads=3)
    want = run(case)
    workspace, place = _workspace(), InterpreterBuilder.set_grid_idx
    shuffled = torch.randperm(24, generator=torch.Generator().manual_seed(0)).tolist()

    def again():
        workspace.scratch.fill_(-1)
        assert all(torch.equal(a, b) for a, b in zip(run(case, workspace=workspace), want, strict=True))
        assert (workspace.counters == 0).all(), "counters were not left clean"

    for order in (lambda x, n: n - 1 - x, lambda x, n: [p for p in shuffled if p < n][x]):
        with monkeypatch.context() as patch:
            patch.setattr(
                InterpreterBuilder, "set_grid_idx", lambda self, x, y, z, order=order: place(self, order(x, self.grid_dim[0]), y, z)
            )
            again()
    with interpreter.threads(24):
        again()


# --- bad values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("mask", ["chain", "tree"])
def test_an_own_row_that_broke_reaches_only_rows_that_see_it(parts, mask, value):
    """A draft that overflowed corrupts itself and its descendants, not the anchor."""
    case = cases.attention_case(seed=12, rows=(6, 9), contexts=(20, 33), mask=mask, padding_rows=0)
    want, _ = run(case)
    row = 6 + 4  # row 4 of request 1
    for side in (case.k_new, case.v_new):
        broken = side.clone()
        broken[row, :, 3] = value
        out, _ = run(dataclasses.replace(case, **{"k_new" if side is case.k_new else "v_new": broken}))
        words = case.ancestors[6:] if mask == "tree" else attention.chain_ancestors(9)
        sees = torch.tensor([False] * 6 + [bool(word >> 4 & 1) for word in words.tolist()])
        assert torch.equal(out[~sees], want[~sees])
        assert (~out[sees].isfinite()).flatten(1).any(1).all()


def test_a_page_id_out_of_range_hides_its_keys(parts):
    case = cases.attention_case(seed=13, rows=(3,), contexts=(38,))
    want = run(dataclasses.replace(case, kv=dataclasses.replace(case.kv, context_lens=torch.tensor([36], dtype=torch.int32))))
    for page in (-1, case.kv.k_cache.shape[0], 2**31 - 1, -(2**31)):
        tables = case.kv.block_tables.clone()
        tables[0, 9] = page
        bad = dataclasses.replace(case, kv=dataclasses.replace(case.kv, block_tables=tables))
        for have, expected in zip(run(bad), want, strict=True):
            torch.testing.assert_close(have, expected, rtol=1e-5, atol=1e-6)
        with pytest.raises(ValueError, match="kv.block_tables: expected page ids"):
            dk.tree_attention(**bad.arguments(), validate=True)


def test_lengths_that_cannot_be_reach_no_memory():
    case = cases.attention_case(seed=14, rows=(3, 2), contexts=(5, 6), cached=True, max_drafts=2)
    for lens in ([10**9, -7], [2**31 - 1, -(2**31)]):
        kv = dataclasses.replace(case.kv, context_lens=torch.tensor(lens, dtype=torch.int32))
        out, lse = run(dataclasses.replace(case, kv=kv))
        assert (lse[5:] == -math.inf).all() and (out[5:] == 0).all()
        with pytest.raises(ValueError, match="kv.context_lens"):
            dk.tree_attention(**dataclasses.replace(case, kv=kv).arguments(), validate=True)
    # Beyond 32 bits a length is still too long or negative, not what its low half says.
    have = [
        run(dataclasses.replace(case, kv=dataclasses.replace(case.kv, context_lens=torch.tensor(lens))))
        for lens in ([2**32 + 1, -(2**32) + 2], [2**62, -(2**62)], [4 * case.kv.block_tables.shape[1], 0])
    ]
    for few in have[:2]:
        assert all(torch.equal(a, b) for a, b in zip(few, have[2], strict=True))
    for mapping in (-1, 10**9, 2**62):
        layout = dataclasses.replace(case.layout, slot_mapping=torch.full_like(case.layout.slot_mapping, mapping))
        hidden = dataclasses.replace(case, layout=layout)
        blind = dataclasses.replace(case, mask="tree", ancestors=torch.zeros(7, dtype=torch.int64))
        for have, want in zip(run(hidden), run(blind), strict=True):
            torch.testing.assert_close(have, want, rtol=1e-5, atol=1e-6)


def test_starts_that_do_not_ascend_leave_the_counters_clean(monkeypatch):
    """They ask for more items than any layout of so many rows has: a tile cut off between its parts must not wait for them."""
    monkeypatch.setattr(attention_launch, "pick", small_parts(attention_launch.pick, programs=2))
    for last in (48, 40, 17):
        case = cases.attention_case(
            seed=29, rows=(0,) * 8 + (48,), contexts=(0,) * 8 + (150,), kv_heads=1, query_heads=3, padding_rows=0
        )  # fmt: skip
        case.layout.query_start_loc.copy_(torch.tensor([0, 48, 0, 48, 0, 48, 0, 48, 0, last]))
        workspace = dk.Workspace(9, 3, 100, "cpu", query_heads=3, kv_heads=1, head_dim=32, max_rows=48)
        plan = plan_of(case)
        run(case, plan=plan, workspace=workspace)
        assert (workspace.counters == 0).all()
        tiles = [-(-rows * 3 // plan.block_m) for rows in (48, 48, 48, 48, last)]  # of 3 query heads, requests with rows
        assert plan.counts[0] == min(sum(tiles), plan.items.shape[0])


@pytest.mark.parametrize("word, message", [(0b111, "not to name later slots"), (0b001, "the node itself"), (0, "the node itself")])
def test_ancestor_words_that_are_no_tree(parts, word, message):
    """Harmless on the device, where bits mean what they say; refused where the host is asked to look."""
    case = cases.attention_case(seed=15, rows=(3, 2), contexts=(5, 36), mask="tree")
    case.ancestors[1] = word
    check(case)
    with pytest.raises(ValueError, match=message):
        dk.tree_attention(**case.arguments(), validate=True)
    case.ancestors[1] = word | 1 << 40  # a slot that the request does not have
    out, lse = run(case)
    assert out.isfinite().all()


def test_validation_accepts_what_is_right(parts):
    for options in (dict(mask="tree", rows=(64, 3)), dict(mask="tree", by_slot=True, rows=(9, 3)), dict(cached=True, rows=(9, 3))):
        case = cases.attention_case(seed=16, contexts=(5, 36), scattered=True, **options)
        run(case, validate=True)
    for by_slot in (False, True):  # 70 rows are a chain, whatever their words are
        case = cases.attention_case(seed=16, rows=(70, 3), contexts=(5, 36), mask="tree", by_slot=by_slot)
        run(case, validate=True)


def test_validation_needs_the_slots_of_a_plan(parts):
    case = cases.attention_case(seed=16, scattered=True)
    plan = plan_of(case)
    run(case, plan=plan, validate=True)
    with pytest.raises(ValueError, match="state_indices: expected those that plan was made with"):
        run(dataclasses.replace(case, state_indices=None), plan=plan, validate=True)


def test_a_slot_out_of_range_is_padding(parts):
    case = cases.attention_case(seed=17, rows=(3, 4), contexts=(20, 33), scattered=True)
    for slot in (5, 2**31 - 1, -(2**31)):
        case.state_indices[1] = slot
        out, lse = run(case, validate=True)
        assert (out[3:] == 0).all() and (lse[3:] == -math.inf).all()


@pytest.mark.parametrize("name, known", [("sm_103", "sm_100"), ("sm_121", "sm_120"), ("sm_87", "sm_86"), ("gfx941", "gfx942")])
def test_an_unknown_gpu_is_configured_as_its_family(name, known):
    from dspark_kernels.launch import arch

    like = arch.KNOWN[known]
    other = dataclasses.replace(like, name=name)
    for sizes in ((None, 128, 2, 2, 8), (8, 64, 2, 1, 8), (64, 256, 2, 2, 1), (64, 64, 4, 4, 8)):
        assert attention_launch.pick(other, *sizes) == attention_launch.pick(like, *sizes)


def test_a_request_without_slot_gets_zeros(parts):
    case = cases.attention_case(seed=17, rows=(3, 4), contexts=(20, 33), padding_requests=1, sinks=True)
    out, lse = run(case)
    assert (out[3:] == 0).all() and (lse[3:] == -math.inf).all()


def test_offsets_beyond_32_bits():
    case = cases.attention_case(seed=18, rows=(2,), contexts=(9,), page_size=4, padding_rows=0, cached=True, dtype=torch.bfloat16)
    want = run(case)
    pages, size, heads, dim = case.kv.k_cache.shape

    def far(cache):
        # [pages, size, heads, D] with pages more than 2^30 elements apart
        apart = far_apart(cache.permute(1, 2, 0, 3).reshape(size * heads, pages, dim))
        return apart.unflatten(0, (size, heads)).permute(2, 0, 1, 3)

    assert max(case.kv.block_tables[0, :3].tolist()) >= 2
    for name in ("k_cache", "v_cache"):
        kv = dataclasses.replace(case.kv, **{name: far(getattr(case.kv, name))})
        for have, expected in zip(run(dataclasses.replace(case, kv=kv)), want, strict=True):
            assert torch.equal(have, expected)


@pytest.mark.parametrize("rows", [(3, 0, 5), (0, 0)])
def test_rows_before_the_first_request_get_zeros(parts, rows):
    """Any row of no request, on either side."""
    case = cases.attention_case(seed=30, rows=rows, contexts=(37, 9, 70)[: len(rows)], padding_rows=4)
    want = run(case)
    case.layout.query_start_loc.add_(3)
    rolled = {name: getattr(case, name).roll(3, 0) for name in ("q", "k_new", "v_new")}
    for have, expected in zip(run(dataclasses.replace(case, **rolled)), want, strict=True):
        assert torch.equal(have, expected.roll(3, 0))


# --- sizes that are nothing -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows, contexts", [((), ()), ((0,), (7,)), ((0, 0), (0, 0)), ((1,), (0,))])
def test_small_batches(rows, contexts):
    for mask in ("chain", "full", "tree"):
        check(cases.attention_case(rows=rows, contexts=contexts, mask=mask, padding_rows=3))
    case = cases.attention_case(rows=rows, contexts=contexts, padding_rows=0)
    assert dk.tree_attention(**case.arguments()).shape == case.q.shape
