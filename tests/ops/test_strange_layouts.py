"""Batches made to hurt, laid out by hand: which token sits in which row follows from the definition alone, no reference is asked.

Request r of R has the anchor 100 + r at position 50 + 10 r and the drafts 10 r + 1, 10 r + 2, 10 r + 3.
"""

import pytest
import torch

import dspark_kernels as dk
from dspark_kernels import Flag

DRAFTS = 3
NONE = Flag(0)
TOP = 2**31 - 1


def fixed(lens, *, dtype=torch.int32, drafts=None, positions=None, **options):
    requests = len(lens)
    tokens = torch.tensor([[10 * r + k for k in (1, 2, 3)] for r in range(requests)], dtype=torch.int64).view(requests, DRAFTS)
    for (r, k), token in (drafts or {}).items():
        tokens[r, k] = token
    block = dk.DraftBlock(tokens, dk.OneHotProposal(), torch.zeros(requests, dtype=torch.int32))
    positions = [50 + 10 * r for r in range(requests)] if positions is None else positions
    given = dict(anchors=torch.arange(100, 100 + requests), anchor_positions=torch.tensor(positions, dtype=torch.int64))
    for name, kind in (("num_prefill_tokens", torch.int32), ("emits", torch.bool), ("state_indices", torch.int32)):
        if name in options:
            options[name] = torch.tensor(options[name], dtype=kind)
    if "block_tables" in options:
        options["block_tables"] = torch.tensor(options["block_tables"], dtype=torch.int32)
    return dk.fixed_layout(block, torch.tensor(lens, dtype=dtype), **given, **options)


# name -> (lens, options, rows that each request has, their tokens (0 in rows of prompts), requests with flags)
STRANGE = {
    "none drafts": ([0, 0], {}, [1, 1], [100, 101], {}),
    "all draft": ([3, 3], {}, [4, 4], [100, 1, 2, 3, 101, 11, 12, 13], {}),
    "ragged": ([1, 0, 2], {}, [2, 1, 3], [100, 1, 101, 102, 21, 22], {}),
    "one request": ([2], {}, [3], [100, 1, 2], {}),
    "lengths below 0": ([-1, -TOP - 1], {}, [1, 1], [100, 101], {}),
    "lengths beyond K": ([4, TOP], {}, [4, 4], [100, 1, 2, 3, 101, 11, 12, 13], {}),
    "lengths of 64 bits": ([1 << 40, -(1 << 40)], dict(dtype=torch.int64), [4, 1], [100, 1, 2, 3, 101], {}),
    "a length of 2^32 + 1": ([(1 << 32) + 1], dict(dtype=torch.int64), [4], [100, 1, 2, 3], {}),
    "a missing draft first": ([3], dict(drafts={(0, 0): -1}), [1], [100], {0: Flag.MISSING_DRAFT}),
    "a missing draft later": ([3], dict(drafts={(0, 1): -1}), [2], [100, 1], {0: Flag.MISSING_DRAFT}),
    "a missing draft beyond the length": ([1], dict(drafts={(0, 1): -1}), [2], [100, 1], {}),
    "a draft below -1": ([3], dict(drafts={(0, 2): -9}), [3], [100, 1, 2], {0: Flag.MISSING_DRAFT}),
    "no room but for anchors": ([3, 3], dict(max_rows=2), [1, 1], [100, 101], {}),
    "room for one draft": ([3, 3], dict(max_rows=3), [2, 1], [100, 1, 101], {}),
    "room for one request's drafts": ([3, 3], dict(max_rows=5), [4, 1], [100, 1, 2, 3, 101], {}),
    "room beyond the second": ([1, 3, 3], dict(max_rows=6), [2, 3, 1], [100, 1, 101, 11, 12, 102], {}),
    "more room than rows": ([1], dict(max_rows=9), [2], [100, 1], {}),
    "a prompt of one row": ([3, 1], dict(num_prefill_tokens=[1, 0], max_rows=9), [1, 2], [0, 101, 11], {}),
    "a prompt among requests": ([1, 3, 1], dict(num_prefill_tokens=[0, 3, 0], max_rows=9), [2, 3, 2], [100, 1, 0, 0, 0, 102, 21], {}),
    "a prompt takes a request's room": ([3, 3], dict(num_prefill_tokens=[0, 4], max_rows=6), [2, 4], [100, 1, 0, 0, 0, 0], {}),
    "nothing but prompts": ([3, 3], dict(num_prefill_tokens=[2, 1], max_rows=4), [2, 1], [0, 0, 0], {}),
    "a prompt below 0": ([1, 1], dict(num_prefill_tokens=[-5, 0], max_rows=9), [2, 2], [100, 1, 101, 11], {}),
    "nobody emits": ([3, 3], dict(emits=[False, False]), [1, 1], [100, 101], {}),
    "one emits": ([3, 3], dict(emits=[False, True]), [1, 4], [100, 101, 11, 12, 13], {}),
    "slots the other way round": ([1, 2], dict(state_indices=[1, 0]), [2, 3], [101, 11, 100, 1, 2], {}),
    "padding first": ([3, 1], dict(state_indices=[-1, 0]), [0, 2], [100, 1], {}),
    "padding last": ([1, 3], dict(state_indices=[1, -1]), [2, 0], [101, 11], {}),
    "padding everywhere": ([3, 3], dict(state_indices=[-1, -1]), [0, 0], [], {}),
    "a slot beyond the last": ([3, 1], dict(state_indices=[2, 0]), [0, 2], [100, 1], {}),
    "a slot below -1": ([3, 1], dict(state_indices=[-3, 0]), [0, 2], [100, 1], {}),
    "one slot twice": ([1, 1], dict(state_indices=[1, 1]), [2, 2], [101, 11, 101, 11], {}),
}  # fmt: skip


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_laid_out(name):
    lens, options, rows, tokens, flagged = STRANGE[name]
    options = dict(options)
    layout = fixed(lens, **options)
    used = sum(rows)
    assert layout.num_rows.tolist() == [used]
    assert layout.query_start_loc.tolist() == [sum(rows[:r]) for r in range(len(rows) + 1)]
    assert layout.token_ids[:used].tolist() == tokens
    assert layout.batch_indices.tolist() == [r for r, count in enumerate(rows) for _ in range(count)] + [-1] * (
        len(layout.batch_indices) - used
    )
    slots = options.get("state_indices", range(len(rows)))
    prompts = options.get("num_prefill_tokens", [0] * len(rows))
    for r, count in enumerate(rows):
        first = sum(rows[:r])
        have = layout.positions[first : first + count].tolist()
        if prompts[r] <= 0:
            assert have == [50 + 10 * slots[r] + i for i in range(count)]
            assert int(layout.draft_lens[r]) == max(count - 1, 0)
        assert Flag(int(layout.flags[r])) == flagged.get(r, NONE)


@pytest.mark.parametrize(
    "position, tables, page_size, wanted",
    [
        (0, [[5, 6]], 2, [10, 11, 12]),  # the first token of a text
        (1, [[5, 6]], 2, [11, 12, 13]),  # over the edge of a page
        (2, [[5, 6]], 2, [12, 13, -1]),  # beyond the table
        (0, [[5, -1]], 2, [10, 11, -1]),  # a page that is not there
        (9, [[5, 6]], 2, [-1, -1, -1]),  # nothing of it is there
        (0, [[0]], 1, [0, -1, -1]),
        (0, [[TOP // 16]], 16, [TOP // 16 * 16 + i for i in range(3)]),  # slots near 2^31
        (0, [[1 << 28]], 16, [(1 << 32) + i for i in range(3)]),  # and beyond 2^32
    ],
)
def test_where_keys_go(position, tables, page_size, wanted):
    layout = fixed([2], positions=[position], block_tables=tables, page_size=page_size)
    assert layout.slot_mapping[:3].tolist() == wanted and set(layout.slot_mapping[3:].tolist()) <= {-1}


def test_positions_far_out():
    far = (1 << 40) + 3
    assert fixed([2], positions=[far]).positions[:3].tolist() == [far, far + 1, far + 2]


def test_an_empty_batch():
    layout = fixed([])
    assert layout.num_rows.tolist() == [0] and layout.query_start_loc.tolist() == [0]
