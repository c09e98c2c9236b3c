"""compact_kv against reference/compact.py: the bytes of every cache, those that stay included."""

import dataclasses

import pytest
import torch
from hypothesis import given, settings, strategies as st

import dspark_kernels as dk
from dspark_kernels.launch import compact as launch
from reference import compact as reference
from tests.ops.compact_cases import bytes_of, case_of

DTYPES = (torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.float16, torch.uint8)


def check(case):
    want = [plane.clone(memory_format=torch.preserve_format) for plane in (*case.caches, *case.extra)]
    reference.compact_kv(want, case.acceptance, case.layout)
    pairs = list(zip(case.caches[::2], case.caches[1::2], strict=True))
    assert dk.compact_kv(dk.KVLayers.of(pairs), case.acceptance, case.layout, extra=case.extra) is None
    for number, (have, wanted) in enumerate(zip((*case.caches, *case.extra), want, strict=True)):
        assert torch.equal(bytes_of(have), bytes_of(wanted)), f"cache {number}"


@settings(max_examples=12, deadline=None)
@given(st.data())
def test_equals_reference(data):
    draw = data.draw
    requests, nodes = draw(st.sampled_from([1, 2, 5])), draw(st.sampled_from([1, 2, 7, 13, 64]))
    kinds, dtypes = st.sampled_from(["plain", "heads first", "apart"]), st.sampled_from(DTYPES)
    check(
        case_of(
            draw(st.integers(0, 10**6)),
            requests,
            nodes,
            draw(st.sampled_from([1, 3, 16, 100])),
            tuple(draw(kinds) for _ in range(draw(st.integers(1, 2)))),
            (draw(dtypes),),
            draw(st.sampled_from([None, requests + 5])),
            draw(st.integers(0, 3)),
        )
    )


@pytest.mark.parametrize("rows, chunk", [(1, 128), (2, 32), (4, 128)])
def test_blocks_of_any_size_move_overlapping_paths(monkeypatch, rows, chunk):
    """Long paths, so that rows written are sources of other rows; layers of several dtypes in one launch."""
    monkeypatch.setattr(launch, "pick", lambda *a: launch.CompactConfig(rows, chunk, 1))
    overlaps = 0
    for seed in range(2):
        case = case_of(seed, 2, 24, 4, ("plain", "heads first"), (torch.float8_e4m3fn,))
        for path in case.acceptance.kv_source.tolist():
            overlaps += sum(path[0] + j in path[1:j] for j in range(1, len(path)) if path[j] >= 0)
        check(case)
    assert overlaps > 5


def test_a_slot_without_a_page_is_left_alone():
    """Neither read nor written: what lies around the caches stays, too."""
    for missing in (1, 2, 4):
        case = case_of(3, 1, 6, 4)
        whole = [torch.cat([plane, plane, plane]) for plane in case.caches]
        case.caches = [plane[len(plane) // 3 : -len(plane) // 3] for plane in whole]
        guarded = [bytes_of(plane).clone() for plane in whole]
        start = case.layout.query_start_loc[0]
        case.acceptance.kv_source[0, :4] = start + torch.tensor([0, 2, 4, 5])
        case.acceptance.num_accepted[0] = 3
        case.layout.slot_mapping[start + missing] = -1
        check(case)
        size = len(whole[0]) // 3
        for have, want in zip(whole, guarded, strict=True):
            assert torch.equal(bytes_of(have)[:size], want[:size]) and torch.equal(bytes_of(have)[-size:], want[-size:])


def test_a_chain_moves_nothing():
    case = case_of(3, 2, 6, 4)
    case.acceptance.kv_source.copy_(case.layout.query_start_loc[:2, None] + torch.arange(6))
    case.acceptance.num_accepted.fill_(5)
    before = [bytes_of(plane).clone() for plane in case.caches]
    check(case)
    assert all(torch.equal(bytes_of(have), want) for have, want in zip(case.caches, before, strict=True))


def test_caches_that_moved_are_found(monkeypatch):
    """As torch.compile may do, the op is handed copies: their own addresses count."""
    case = case_of(4, 3, 9, 4, ("plain", "apart"))
    layers = dk.KVLayers.of(zip(case.caches[::2], case.caches[1::2], strict=True))
    copies = [plane.clone() for plane in case.caches]
    want = [plane.clone() for plane in case.caches]
    reference.compact_kv(want, case.acceptance, case.layout)
    dk.compact_kv(dataclasses.replace(layers, caches=tuple(copies)), case.acceptance, case.layout)
    assert all(torch.equal(bytes_of(have), bytes_of(wanted)) for have, wanted in zip(copies, want, strict=True))


@pytest.mark.parametrize(
    "change, error, name",
    [
        (dict(layers=None), TypeError, "layers"),
        (dict(acceptance=None), TypeError, "acceptance"),
        (dict(layout=None), TypeError, "layout"),
        (dict(extra=[torch.zeros(4, 5)]), ValueError, "extra[0]"),
        (dict(extra=[3]), TypeError, "extra[0]"),
    ],
)
def test_bad_arguments_are_named(change, error, name):
    case = case_of(5, 1, 3, 4)
    given = dict(layers=dk.KVLayers.of([case.caches]), acceptance=case.acceptance, layout=case.layout) | change
    with pytest.raises(error) as caught:
        dk.compact_kv(given["layers"], given["acceptance"], given["layout"], extra=given.get("extra", ()))
    assert str(caught.value).startswith(f"{name}: expected")


def test_results_that_cannot_be_compacted_are_named():
    case = case_of(6, 1, 3, 4)
    layers = dk.KVLayers.of([case.caches])
    with pytest.raises(ValueError, match="^acceptance.kv_source: expected"):
        dk.compact_kv(layers, dataclasses.replace(case.acceptance, kv_source=None), case.layout)
    with pytest.raises(ValueError, match="^layout.slot_mapping: expected"):
        dk.compact_kv(layers, case.acceptance, dataclasses.replace(case.layout, slot_mapping=None))
    with pytest.raises(ValueError, match="^layers: expected at least one"):
        dk.KVLayers.of([])
    with pytest.raises(ValueError, match=r"^layers\[0\]: expected a slot of contiguous parts"):
        dk.KVLayers.of([(torch.zeros(2, 4, 5, 9)[..., :3, :8:2],)])
