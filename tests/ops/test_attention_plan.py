"""plan_attention: its work table, its sharing by layers; and what tree_attention and plan_attention refuse."""

import dataclasses
import math

import pytest
import torch

import dspark_kernels as dk
from dspark_kernels.launch import attention as attention_launch
from reference import cases
from tests.ops.attention_checks import check, plan_of, run, small_parts


@pytest.fixture
def parts(monkeypatch):
    monkeypatch.setattr(attention_launch, "pick", small_parts(attention_launch.pick))


@pytest.mark.parametrize("invariant", [False, True])
@pytest.mark.parametrize("window", [None, 40])
def test_the_table_covers_every_key_once(parts, invariant, window):
    rows, contexts = (3, 0, 40, 1, 7), (37, 9, 100, 0, 230)
    case = cases.attention_case(seed=19, rows=rows, contexts=contexts, window=window, scattered=True)
    plan = plan_of(case, batch_invariant=invariant)
    group = 3
    items = plan.items[: int(plan.counts[0])].tolist()
    assert plan.counts[1:].tolist() == [0, sum(rows)]
    tiles, partial = {}, []
    for slot, context, first, count, tile, part, parts_, begin, end, at in items:
        tiles.setdefault((slot, tile), []).append((part, parts_, begin, end))
        request = case.state_indices.tolist().index(slot)
        assert (context, count) == (contexts[request], rows[request]) and first == sum(rows[:request])
        if parts_ > 1:
            partial += range(at, at + min(plan.block_m, count * group - tile * plan.block_m))
    assert len(set(partial)) == len(partial) and max(partial, default=-1) < plan.partial_rows
    assert len(tiles) == sum(-(-n * group // plan.block_m) for n in rows)
    for (slot, _), found in tiles.items():
        context = contexts[case.state_indices.tolist().index(slot)]
        assert [part for part, *_ in found] == list(range(found[0][1])), "parts in order, one after the other"
        keys = [key for _, _, begin, end in found for key in range(begin, end)]
        low = 0 if window is None else max(0, context - window)
        assert keys == list(range(keys[0] if keys else context, context)) and (not keys or keys[0] <= low)
    assert window is not None or any(found[0][1] > 1 for found in tiles.values())


def test_a_long_request_is_split_whatever_its_rows_and_its_neighbours():
    """Splitting comes from all work, never from the longest query; here as a GPU of 132 multiprocessors would do it."""
    pick = attention_launch.pick
    with pytest.MonkeyPatch.context() as patch:
        # The real configuration's table, made in the interpreter.
        from dspark_kernels.launch import arch

        patch.setattr(attention_launch, "pick", lambda _, *rest: pick(arch.KNOWN["sm_90"], *rest))
        batches = [((1,), (131072,)), ((8,), (131072,)), ((8,) * 34, (32768,) * 34)]
        batches.append(((8,) * 64, (131072,) + (1024,) * 63))
        for rows, contexts in batches:
            kv = dk.PagedKV(
                torch.empty(1, 128, 8, 128, dtype=torch.bfloat16), torch.empty(1, 128, 8, 128, dtype=torch.bfloat16),
                torch.zeros(len(rows), 1024, dtype=torch.int32), torch.tensor(contexts),
            )  # fmt: skip
            layout = cases.attention_layout(list(rows), list(contexts), torch.zeros(sum(rows), dtype=torch.int64), None, 7)
            plan = dk.plan_attention(layout, kv, query_heads=32)
            items = plan.items[: int(plan.counts[0])]
            blocks = (items[:, 8] - items[:, 7] + plan.block_n - 1) // plan.block_n
            # As the launch hands them out: program p has items p, p + programs, ... of (item, KV head).
            load = torch.zeros(plan.programs, dtype=torch.int64)
            work = blocks.repeat_interleave(8)
            load.index_add_(0, torch.arange(len(work)) % plan.programs, work.long() + 2)
            even = int(work.sum()) / plan.programs
            assert load.max() <= 1.3 * even + 10, (rows, contexts, int(load.max()), even)


def test_a_plan_is_shared_by_layers_and_written_in_place(parts):
    case = cases.attention_case(seed=20, rows=(3, 0, 5), contexts=(37, 9, 130), scattered=True)
    plan = plan_of(case)
    want = run(case)
    for have, expected in zip(run(dataclasses.replace(case, state_indices=None), plan=plan), want, strict=True):
        assert torch.equal(have, expected)
    plan.items.fill_(-9)
    plan.counts.fill_(-9)
    assert plan_of(case, out=plan) is plan
    workspace = dk.Workspace(3, 4, 100, "cpu", query_heads=6, kv_heads=2, head_dim=32, max_rows=16)
    for _ in range(2):
        workspace.scratch.fill_(-1)
        for have, expected in zip(run(case, plan=plan, workspace=workspace), want, strict=True):
            assert torch.equal(have, expected)
        assert (workspace.counters == 0).all()


@pytest.mark.parametrize("invariant", [False, True])
def test_a_workspace_has_room_for_every_smaller_batch(invariant):
    from dspark_kernels.launch import arch
    from dspark_kernels.ops.attention import plan as op

    g = torch.Generator().manual_seed(22)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    for name in arch.KNOWN:
        with arch.override(name):
            heads = (8 * (1 << draw(0, 4)), 8, 128)
            counters, scratch = op._needs(64, 512, *heads, invariant, torch.device("cpu"))
            for _ in range(100):
                rows, size = draw(1, 512), (2, 4)[draw(0, 1)]
                most = None if draw(0, 2) == 0 else draw(1, 20)
                cached, longest, asked = (size, 1)[draw(0, 1)], draw(1, 1 << 18), invariant and draw(0, 1) == 1
                sizes = op._sizes(arch.current(torch.device("cpu")), draw(1, 64), rows, most, *heads, size, cached, longest, asked)
                have = op.words_needed(sizes.max_items, sizes.partial_rows, heads[1], heads[2])
                assert have[0] <= counters and have[1] <= scratch


def test_programs_can_be_limited(parts):
    case = cases.attention_case(seed=21, rows=(3, 5), contexts=(37, 130))
    plan = plan_of(case, max_programs=3)
    assert plan.programs == 3
    check(case, plan=plan)


# --- refusals ---------------------------------------------------------------------------------------------------------


def _kv(case, **changes):
    return dict(kv=dataclasses.replace(case.kv, **changes))


def _cut(case, rows=2):
    """Arguments for the first rows alone, as a layout of one request per slot that has nothing else."""
    layout = cases.attention_layout([rows, 0, 0], [37, 9, 70], torch.zeros(rows, dtype=torch.int64), None)
    return dict(q=case.q[:rows], k_new=case.k_new[:rows], v_new=case.v_new[:rows], layout=layout)


def _wider(case):
    return dataclasses.replace(case.kv, block_tables=torch.cat([case.kv.block_tables, case.kv.block_tables[:, :1]], 1))


def _fewer(case):
    """The case in two requests of the same rows and slots."""
    layout = cases.attention_layout([3, 5], [37, 70], torch.zeros(10, dtype=torch.int64), None)
    return dataclasses.replace(case, layout=layout, state_indices=torch.tensor([0, 2], dtype=torch.int32))


def _slotted(case, slots):
    """The case in a cache of more slots."""
    more = torch.arange(slots).clamp(max=2)
    kv = dataclasses.replace(case.kv, block_tables=case.kv.block_tables[more], context_lens=case.kv.context_lens[more])
    return dataclasses.replace(case, kv=kv, state_indices=torch.arange(3, dtype=torch.int32))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (lambda c: dict(q=c.q.double()), TypeError, "q: expected dtype"),
        (lambda c: dict(q=c.q[:, :5]), ValueError, "q: expected a multiple of 2 heads"),
        (lambda c: dict(q=c.q[..., :16].contiguous()), ValueError, "q: expected head size 32"),
        (lambda c: dict(q=c.q[:4]), ValueError, "layout.token_ids: expected shape"),
        (lambda c: dict(mask="causal"), ValueError, "mask: expected one of"),
        (lambda c: dict(mask="tree"), ValueError, "ancestors: expected int64 words or a DraftTree with mask 'tree', got NoneType"),
        (lambda c: dict(ancestors=torch.zeros(10).long()), ValueError, "ancestors: expected None with mask 'chain'"),
        (lambda c: dict(mask="tree", ancestors=torch.zeros(10).int()), TypeError, "ancestors: expected dtype int64"),
        (lambda c: dict(mask="tree", ancestors=torch.zeros(9).long()), ValueError, "ancestors: expected shape"),
        (lambda c: dict(mask="tree", ancestors=torch.zeros(3, 65).long()), ValueError, "ancestors: expected at most 64 nodes"),
        (lambda c: dict(v_new=None), ValueError, "v_new: expected both"),
        (lambda c: dict(k_new=None, v_new=None), ValueError, "k_new: expected .* with a layout without slot_mapping"),
        (lambda c: dict(k_new=c.k_new[:, :1]), ValueError, "k_new: expected shape"),
        (lambda c: dict(v_new=c.v_new.half()), TypeError, "v_new: expected dtype"),
        (lambda c: _kv(c, k_cache=c.kv.k_cache.half(), v_cache=c.kv.v_cache.half()), TypeError, "kv.k_cache: expected dtype"),
        (
            lambda c: _kv(c, block_tables=c.kv.block_tables[:2], context_lens=c.kv.context_lens[:2]), ValueError,
            "kv.block_tables: expected 3 rows",
        ),
        (lambda c: dict(window=0), ValueError, "window: expected"),
        (lambda c: dict(window=1.5), TypeError, "window: expected an int"),
        (lambda c: dict(softcap=0.0), ValueError, "softcap: expected"),
        (lambda c: dict(softcap="1"), TypeError, "softcap: expected a number"),
        (lambda c: dict(scale=math.nan), ValueError, "scale: expected a finite number"),
        (lambda c: dict(sinks=torch.zeros(2)), ValueError, "sinks: expected shape"),
        (lambda c: dict(state_indices=torch.zeros(3)), TypeError, "state_indices: expected dtype int32 or int64"),
        (lambda c: dict(out=torch.zeros(1)), ValueError, "out: expected shape"),
        (lambda c: dict(return_lse=True, out=torch.zeros(1)), TypeError, "out: expected a pair"),
        (lambda c: dict(workspace=dk.Workspace(1, 1, 1, "cpu")), ValueError, "workspace: expected room for attention of 3"),
        (lambda c: dict(plan=plan_of(c, batch_invariant=True)), ValueError, "plan.batch_invariant: expected False"),
        (lambda c: dict(plan=plan_of(c, max_programs=1), kv=_wider(c)), ValueError, "plan.max_keys: expected 88, as this call"),
        (lambda c: dict(plan=plan_of(c), **_cut(c)), ValueError, "plan.rows: expected 2, as this call has it, got 10"),
        (lambda c: dict(plan=plan_of(_fewer(c))), ValueError, "plan.requests: expected 3, as this call has it, got 2"),
        (lambda c: dict(plan=plan_of(_slotted(c, 5))), ValueError, "plan.slots: expected 3, as this call has it, got 5"),
        (lambda c: dict(plan=plan_of(c), window=3), ValueError, "plan.window: expected 3"),
        (lambda c: dict(plan="no"), TypeError, "plan: expected AttentionPlan"),
    ],
)  # fmt: skip
def test_refused_arguments(monkeypatch, change, error, message):
    monkeypatch.setattr(attention_launch, "pick", small_parts(attention_launch.pick, programs=400))
    case = cases.attention_case()
    with pytest.raises(error, match=message):
        dk.tree_attention(**case.arguments() | change(case))


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(query_heads=5), ValueError, "query_heads: expected a multiple of 2"),
        (dict(query_heads=0), ValueError, "query_heads: expected >= 1"),
        (dict(dtype=torch.float64), ValueError, "dtype: expected one of"),
        (dict(window=-1), ValueError, "window: expected"),
        (dict(max_programs=0), ValueError, "max_programs: expected >= 1"),
    ],
)
def test_refused_plans(change, error, message):
    case = cases.attention_case()
    with pytest.raises(error, match=message):
        dk.plan_attention(**dict(layout=case.layout, kv=case.kv, query_heads=6) | change)


def test_a_plan_for_other_sizes_is_not_overwritten():
    case, other = cases.attention_case(), cases.attention_case(query_heads=2)
    with pytest.raises(ValueError, match="out.query_heads: expected 2, got 6"):
        dk.plan_attention(other.layout, other.kv, query_heads=2, out=plan_of(case))
    with pytest.raises(ValueError, match="out.rows: expected 11, got 10"):
        plan_of(cases.attention_case(padding_rows=3), out=plan_of(case))
