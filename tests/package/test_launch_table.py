"""Launch tables: the nearest shape, one warning for an unknown GPU, the configurations there always were, and their reasons."""

import dataclasses
import json
import warnings

import pytest
import torch

from dspark_kernels.launch import arch, attention, table
from dspark_kernels.launch.accept import chain as accept
from dspark_kernels.launch.draft import dense as draft
from dspark_kernels.launch.layout import fixed as layout, schedule
from dspark_kernels.launch.table import Entry

SM_90, SM_86, GFX942 = (arch.KNOWN[name] for name in ("sm_90", "sm_86", "gfx942"))


def entries(*shapes):
    return tuple(Entry(shape, {"number": number}, {}) for number, shape in enumerate(shapes))


def test_the_nearest_shape_of_the_same_kind_is_found():
    given = entries(dict(kind="a", rows=16), dict(kind="a", rows=256), dict(kind="b", rows=32), dict(kind="a", rows=64))

    def number(**shape):
        return table.nearest(given, shape, "here").config["number"]

    # Doublings are rounded up: 33 is nearer to 64 than to 16; of two as near, the first.
    for rows, want in ((1, 0), (16, 0), (17, 0), (32, 0), (33, 3), (64, 3), (65, 1), (129, 1), (10**6, 1)):
        assert number(kind="a", rows=rows) == want, rows
    assert number(kind="b", rows=10**6) == 2
    with pytest.raises(LookupError, match="here: no entry of the kind of .*'c'"):
        number(kind="c", rows=16)
    assert table.nearest(entries(dict(on=True), dict(on=False)), dict(on=False), "").config["number"] == 1
    both = entries(dict(rows=16, head=256), dict(rows=64, head=64))
    assert table.nearest(both, dict(rows=32, head=64), "").config["number"] == 1


def test_sizes_add_up():
    given = entries(dict(rows=16, head=64), dict(rows=64, head=64), dict(rows=16, head=256))
    for (rows, head), want in {(16, 128): 0, (32, 128): 0, (64, 128): 1, (16, 200): 2, (64, 256): 1, (32, 256): 2}.items():
        assert table.nearest(given, dict(rows=rows, head=head), "").config["number"] == want, (rows, head)


def test_an_unknown_gpu_runs_with_its_familys_table_and_says_so_once():
    other = dataclasses.replace(SM_90, name="sm_93", multiprocessors=50)
    table._said.discard("sm_93")
    with pytest.warns(UserWarning, match="no launch table for sm_93: kernels run with that of sm_90") as seen:
        first = schedule.pick(other, 512, 512)
        layout.pick(other, 64)
    assert len(seen) == 1 and first == schedule.pick(SM_90, 512, 512)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for known in arch.KNOWN.values():
            attention.pick(known, 8, 128, 2, 2, 8)
        attention.pick(arch.INTERPRETER, 8, 128, 2, 2, 8)
        attention.pick(other, 8, 128, 2, 2, 8)


def test_a_table_of_its_own_goes_before_the_familys(monkeypatch):
    own = {"layout": (Entry({"requests": 1}, {"block": 7, "num_warps": 1}, {}),)}
    monkeypatch.setitem(table._TABLES, "sm_94", own)
    assert layout.pick(dataclasses.replace(SM_90, name="sm_94"), 64).block == 7
    assert layout.pick(SM_90, 64).block != 7


def test_a_lookup_can_be_traced():
    """Also where a warning is due, which waits for the op itself."""
    torch._dynamo.reset()
    other = dataclasses.replace(SM_90, name="sm_95")

    def tile(x):
        return x + attention.pick(other, x.shape[0], 128, 2, 2, 8).block_m

    assert torch.compile(tile, fullgraph=True, backend="eager")(torch.zeros(17)).tolist() == [32] * 17


# What the picks were when they were formulas: (arguments, result without max_registers). Of the schedule: threads are requests.
SCHEDULES = {
    (32, 8): (64, 32, 32),
    (512, 512): (64, 512, 64),
    (1024, 512): (128, 1024, 128),
    (64, 4096): (64, 64, 32),
    (16384, 17408): (256, 2048, 256),
}
# packed rows, head, element, cached -> block_m, block_n, warps, stages, own block, own stages, programs, least blocks
ATTENTION = {
    "sm_90": {
        (None, 128, 2, 2): (64, 64, 8, 3, 32, 2, 132, 4),
        (32, 128, 2, 2): (32, 64, 4, 3, 32, 2, 264, 4),
        (5, 80, 2, 2): (16, 64, 4, 3, 32, 2, 264, 4),
        (33, 256, 2, 1): (32, 32, 8, 3, 32, 2, 132, 8),  # a tile of 64 x 256 spilled
        (100, 64, 4, 4): (16, 16, 8, 3, 16, 2, 132, 16),
    },
    "sm_86": {(8, 32, 2, 2): (16, 64, 4, 3, 32, 2, 168, 4), (8, 64, 2, 2): (16, 64, 4, 3, 32, 2, 84, 4)},
    "sm_100": {(32, 128, 2, 2): (32, 64, 4, 3, 16, 1, 296, 4)},
    "gfx942": {(64, 128, 2, 2): (32, 64, 4, 1, 16, 1, 304, 4), (None, 256, 2, 2): (32, 32, 8, 1, 16, 1, 304, 8)},
}
# warps, stages and programs per multiprocessor of the draft block in 16 bits: for one tile of requests, and for more
DRAFT = {
    "sm_80": ((4, 3, 2), (8, 3, 1)),
    "sm_86": ((4, 3, 1), (8, 3, 1)),
    "sm_89": ((4, 3, 1), (8, 3, 1)),
    "sm_90": ((4, 3, 2), (8, 3, 1)),
    "sm_100": ((8, 3, 1), (8, 3, 1)),
    "sm_120": ((4, 3, 1), (8, 3, 1)),
    "gfx942": ((4, 2, 1), (8, 1, 1)),
    "gfx950": ((4, 2, 1), (8, 2, 1)),
}
# the same in 32 bits, whose dots take 32 ranks and are not pipelined
DRAFT_FP32 = {"gfx942": ((8, 1, 1), (8, 1, 1)), "gfx950": ((8, 2, 1), (8, 2, 1))}
NVIDIA_FP32 = ((8, 2, 1), (8, 1, 1))


def test_the_tables_hold_what_was_chosen_before_there_were_tables():
    for (candidates, rows), (block, sort, threads) in SCHEDULES.items():
        for known in arch.KNOWN.values():
            lanes, registers = (32, 255) if known.vendor == "nvidia" else (64, None)
            want = schedule.ScheduleConfig(block, sort, max(1, threads // lanes), registers)
            assert schedule.pick(known, candidates, rows) == want
    for known in arch.KNOWN.values():
        limit = 255 if known.vendor == "nvidia" else None
        few, many = layout.LayoutConfig(128, 4, limit), layout.LayoutConfig(256, 8, limit)
        assert [layout.pick(known, n) for n in (1, 512, 513)] == [few, few, many]
        plans = [attention.pick_plan(known, n) for n in (1, 128, 512, 513)]
        few = attention.PlanConfig(128, 8 if known.name == "sm_89" else 4)  # 4 warps have a stack there at 256 requests
        assert plans == [attention.PlanConfig(128, 4)] * 2 + [few, attention.PlanConfig(512, 16)]
        for size, rank, ranks in ((2, 256, 256), (2, 1000, 64), (4, 256, 256), (2, 20, 256)):
            want = DRAFT[known.name] if size == 2 else DRAFT_FP32.get(known.name, NVIDIA_FP32)
            for one_tile, numbers in zip((True, False), want, strict=True):
                found = draft.pick(known, 151936, rank, size, one_tile, ranks)
                assert (found.num_warps, found.num_stages, found.programs_per_sm) == numbers and found.block_v == 64
                assert found.block_r == (32 if size == 4 or rank == 20 else min(256, ranks))
        assert accept.pick(known, 1, 149, 7, 1).chunk == 4 and accept.pick(known, 1, 2, 7, 1, "heavy").group == 2
    for name, cases in ATTENTION.items():
        for (rows, *rest), want in cases.items():
            found = attention.pick(arch.KNOWN[name], rows, *rest, 8)
            numbers = (
                found.block_m, found.block_n, found.num_warps, found.num_stages, found.own_block, found.own_stages,
                found.programs, found.min_blocks,
            )  # fmt: skip
            assert numbers == want, (name, rows, rest)


def test_a_tile_finds_itself():
    """The plan's tile decides the attention's configuration again."""
    for known in arch.KNOWN.values():
        for element, cached in ((2, 2), (2, 1), (4, 4), (4, 1)):
            for head in (16, 64, 128, 256):
                for rows in (1, 16, 24, 32, 64, 200, None):
                    found = attention.pick(known, rows, head, element, cached, 8)
                    assert attention.pick(known, found.block_m, head, element, cached, 8) == found


def test_every_entry_has_its_reason():
    for path in sorted(table.FOLDER.glob("*.json")):
        content = json.loads(path.read_text())
        assert content["gpu"] == path.stem
        for kernel, found in table.read(path).items():
            for entry in found:
                compiled, time = entry.why["compiled"], entry.why["time"]
                where = (path.stem, kernel, entry.shape)
                assert compiled["spills"] == 0 and compiled["registers"] > 0, where
                assert 0 <= compiled["shared"] <= compiled["shared_limit"], where
                assert compiled["shared_limit"] == arch.KNOWN[arch.Arch(path.stem, 0, 0).family].shared_memory, where
                assert time == "not measured" or (time["us"] > 0 and time["gpu"]), where
    assert {path.stem for path in table.FOLDER.glob("*.json")} >= set(arch.KNOWN)


def test_a_trial_replaces_the_table_and_ends():
    before = layout.pick(SM_90, 64)
    with table.trial("layout", {"requests": 64}, {"block": 32, "num_warps": 2}):
        assert layout.pick(SM_90, 3) == layout.LayoutConfig(32, 2, 255) and layout.pick(GFX942, 999) == layout.LayoutConfig(32, 2)
        assert schedule.pick(SM_86, 512, 512).block == 64
    assert layout.pick(SM_90, 64) == before
