"""bench.model's reading of SASS: a listing written by hand, whose loops, classes and waits are known; occupancy counted by hand;
what its checks refuse."""

import pytest
import torch

from bench.model import constants, estimate, hot, measured, pace
from bench.model.check import Digests, grown, stale
from bench.model.constants import MACHINES
from bench.model.flow import Flow
from bench.model.sass import parse
from bench.shared.cases.case import Case
from bench.shared.measure import Row
from bench.shared.occupancy import resident
from dspark_kernels.launch.arch import KNOWN

CENTRAL = constants.LEVELS.index("central")

# A prefetch, a loop that streams 16 bytes a lane and turns around a rare path, and a wider read behind two branches.
STREAMING = """
 S2R R0, SR_TID.X
 LDG.E.128 R4, desc[UR4][R2.64]
 ISETP.GE.AND P0, PT, R0, R1, PT
 @P0 BRA {after}
head:
 LDG.E.128 R8, desc[UR4][R2.64+0x10]
 FADD R12, R4, R5
 MUFU.EX2 R13, R12
 FSETP.NAN.AND P1, PT, R12, R12, PT
 @!P1 BRA {usual}
 STS [R20], R12
 BAR.SYNC.DEFER_BLOCKING 0x0
usual:
 SHFL.BFLY PT, R14, R13, 0x10, 0x1f
 BAR.SYNC.DEFER_BLOCKING 0x0
 IADD3 R0, R0, 0x1, RZ
 IMAD.MOV.U32 R4, RZ, RZ, R8
 ISETP.LT.AND P0, PT, R0, R1, PT
 @P0 BRA {head}
after:
 @P2 BRA {end}
 @P3 BRA {end}
 LDG.E.128 R16, desc[UR4][R2.64]
 LDG.E.128 R24, desc[UR4][R2.64+0x20]
 STG.E.64 desc[UR4][R2.64], R16
end:
 EXIT
trap:
 BRA {trap}
 NOP
"""

# A loop over groups; in it the prologue of a pipelined loop asks for two tiles, each if there is one, and the loop for one more.
PIPELINED = """
 S2R R0, SR_TID.X
outer:
 ISETP.GT.AND P0, PT, R1, 0x0, PT
 @!P0 BRA {second}
 LDGSTS.E.BYPASS.128 [R4], desc[UR4][R2.64]
second:
 LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64+0x10]
 LDGSTS.E.BYPASS.128 [R6], desc[UR4][R2.64+0x20]
 @!P1 BRA {drained}
head:
 LDGSTS.E.BYPASS.128 [R7], desc[UR4][R2.64+0x30]
 FADD R12, R4, R5
 IADD3 R0, R0, 0x1, RZ
 ISETP.LT.AND P2, PT, R0, R1, PT
 @P2 BRA {head}
drained:
 ISETP.LT.AND P3, PT, R8, R9, PT
 @P3 BRA {outer}
 EXIT
"""

# No loop: a ticket that one thread takes, a load, a barrier, a part that the last program alone reaches.
ONE_PASS = """
 S2R R0, SR_TID.X
 BSSY B0, {drawn}
 @P0 BRA {skip}
 ATOMG.E.ADD.STRONG.GPU PT, R3, desc[UR6][R2.64], R11
skip:
 BSYNC B0
drawn:
 SHFL.IDX PT, R4, R3, RZ, 0x1f
 LDG.E.128 R8, desc[UR6][R4.64]
 FADD R12, R8, R9
 BAR.SYNC.DEFER_BLOCKING 0x0
 @P1 EXIT
 LDG.E.128 R16, desc[UR6][R4.64]
 HMMA.16816.F32.BF16 R24, R16, R18, R24
 EXIT
"""


def listing(text):
    """As cuobjdump prints it, with addresses for the names of lines."""
    lines, names = [], {}
    for line in text.strip("\n").splitlines():
        if line.endswith(":"):
            names[line[:-1]] = f"0x{16 * len(lines):x}"
        else:
            lines.append(line)
    header = "\tcode for sm_90a\n\t\tFunction : kernel\n"
    return header + "".join(
        f"        /*{16 * n:04x}*/ {line.format(**names)} ;      /* 0x0000001fff117819 */\n          /* 0x000fe200 */\n"
        for n, line in enumerate(lines)
    )


def flow_of(text):
    return Flow(parse(listing(text)))


def test_a_listing_is_read_by_classes():
    found = parse(listing(STREAMING))
    assert len(found) == 24 and found[3].predicate == "P0" and found[3].target == 17 * 16  # the trap is no instruction
    assert {i.name: i.kind for i in found} == {
        "S2R": "integer", "LDG": "global", "ISETP": "integer", "BRA": "control", "FADD": "fp", "MUFU": "special", "FSETP": "fp",
        "STS": "shared", "BAR": "barrier", "SHFL": "exchange", "IADD3": "integer", "IMAD": "integer", "STG": "global",
        "EXIT": "control", "NOP": "control",
    }  # fmt: skip
    assert [i.loaded for i in found if i.name == "LDG"] == [16] * 4 and [i.stored for i in found if i.stored] == [8]
    other = {i.name: i.kind for i in parse(listing(ONE_PASS))}
    assert other["ATOMG"] == "atomic" and other["HMMA"] == "tensor"


def test_the_loop_and_what_every_turn_meets():
    flow = flow_of(STREAMING)
    (loop,) = flow.loops
    assert flow.blocks[loop.head][0].address == 0x40
    addresses = [i.address for block in sorted(flow.of_a_turn(loop)) for i in flow.blocks[block]]
    assert addresses == [*range(0x40, 0x90, 16), *range(0xB0, 0x110, 16)]  # without the rare path at 0x90
    assert flow.conditions(loop.head) == 1 and flow.conditions(0) == 0


def test_a_loop_that_is_left_by_a_call():
    left = STREAMING.replace(" @P0 BRA {head}\n", " @!P0 CALL.REL.NOINC {after}\n BRA {head}\n")
    flow = flow_of(left)
    (loop,) = flow.loops
    assert {on for block in loop.blocks for on in flow.after[block]} - loop.blocks, "the loop ends"
    assert hot.find(flow_of(left), 128, 16 * 128).turn[-1].name == "BRA" and len(loop.blocks) == 4
    subroutine = STREAMING.replace(" IADD3 R0", " CALL.REL.NOINC {trap}\n IADD3 R0").replace(
        "trap:\n BRA {trap}", "trap:\n RET.REL.NODEC R18 0x0"
    )
    assert [i.name for i in hot.find(flow_of(subroutine), 128, 16 * 128).turn][-5:] == ["CALL", "IADD3", "IMAD", "ISETP", "BRA"]


def test_a_way_back_is_no_loop():
    text = " @P0 BRA {late}\nearly:\n FADD R1, R2, R3\n EXIT\nlate:\n FMUL R1, R2, R3\n BRA {early}\n"
    assert flow_of(text).loops == []


def test_the_hot_loop_is_the_one_that_streams():
    found = hot.find(flow_of(STREAMING), 128, 16 * 128)
    assert found.how == "loop" and found.turn[0].address == 0x40 and found.others == 2 and found.barriers == 1
    classes = {kind: count for kind, count in found.classes().items() if count}
    assert classes == dict(fp=2, integer=3, special=1, exchange=1, barrier=1, control=2, **{"global": 1})
    # A tile of twice the size is only loaded by the block behind two branches.
    wider = hot.find(flow_of(STREAMING), 128, 2 * 16 * 128)
    assert wider.how == "pass" and wider.turn[-1].name == "EXIT" and sum(i.name == "LDG" for i in wider.turn) == 3


def test_without_a_loop_it_is_the_pass_of_every_program():
    found = hot.find(flow_of(ONE_PASS), 32, 16 * 32)
    assert found.how == "pass" and found.barriers == 1 and found.others == 0
    # The atomic of one thread takes time, and is no instruction of every lane; what the last program does is not in the pass.
    assert [i.name for i in found.turn].count("ATOMG") == 1 and found.classes()["atomic"] == 0
    assert found.classes()["global"] == 1 and found.classes()["tensor"] == 0


def test_a_kernel_that_streams_nothing_has_a_pass():
    assert hot.find(flow_of(ONE_PASS), 32, 1 << 20).how == "pass"


def _us(text, warps=4):
    return pace.microseconds(parse(listing(text)), CENTRAL, warps, 1.0, 16)


def test_a_warp_waits_for_what_it_uses():
    load, use = " LDG.E.128 R4, desc[UR4][R2.64]\n", " FADD R8, R7, R7\n"
    dram, slot = constants.DRAM.central, 1e-3
    assert _us(load) == pytest.approx(slot)
    assert _us(load + use) == pytest.approx(slot + dram)
    assert _us(load + " FADD R8, R9, R9\n") == pytest.approx(2 * slot)  # another register
    assert _us(load + load.replace("R4", "R12") + use) == pytest.approx(slot + dram)  # two on the way at once
    assert _us(load + " LDG.E.128 R12, desc[UR4][R4.64]\n" + use.replace("R7", "R12")) == pytest.approx(slot + 2 * dram)
    assert _us(" LDG.E R4, desc[UR4][R2.64]\n FADD R8, R4, R4\n") == pytest.approx(slot + constants.L2.central)
    assert _us(" BAR.SYNC 0x0\n") == pytest.approx(slot + constants.BARRIER.central)
    assert _us(" MEMBAR.SC.GPU\n") == pytest.approx(slot + constants.FENCE.central)
    assert _us(" FADD R1, R2, R3\n" * 10, warps=8) == pytest.approx(20 * slot)  # two warps share a scheduler


def test_a_prefetch_is_waited_for_a_turn_later():
    turn = " FADD R20, R4, R4\n LDG.E.128 R4, desc[UR4][R2.64]\n" + " FADD R21, R22, R22\n" * 998
    long = parse(listing(turn))
    assert pace.of_a_turn(long, CENTRAL, 4, 1.0, 16) == pytest.approx(1.0)  # 1000 slots of a nanosecond hide the load
    assert pace.of_a_turn(long[:500], CENTRAL, 4, 1.0, 16) == pytest.approx(constants.DRAM.central + 1e-3)


def test_asynchronous_copies_are_waited_for_in_groups():
    copy = " LDGSTS.E.BYPASS.128 [R5], desc[UR4][R2.64]\n LDGDEPBAR\n"
    one_behind, all_of_it = " DEPBAR.LE SB0, 0x1\n", " DEPBAR.LE SB0, 0x0\n"
    assert _us(copy + one_behind) < 0.1 and _us(copy + all_of_it) > constants.DRAM.central
    assert _us(copy + copy + one_behind) == pytest.approx(constants.DRAM.central + 1e-3)


@pytest.mark.parametrize(
    ("text", "written", "read"),
    [
        ("IADD3 R4, P0, R2, R6, RZ", ["R4", "P0"], ["R2", "R6"]),
        ("ISETP.GE.AND P0, PT, R0, R1, P2", ["P0"], ["R0", "R1", "P2"]),
        ("@!P3 LDS.64 R6, [R20+UR4]", ["R6", "R7"], ["P3", "R20", "UR4"]),
        ("IMAD.WIDE R2, R0, 0x4, R8", ["R2", "R3"], ["R0", "R8"]),
        ("STG.E.64 desc[UR4][R2.64], R16", [], ["UR4", "R2", "R16"]),
        ("SHFL.BFLY PT, R14, R13, 0x10, 0x1f", ["R14"], ["R13"]),
    ],
)
def test_what_an_instruction_writes_and_reads(text, written, read):
    (instruction,) = parse(listing(f" {text}\n"))
    assert pace.registers(instruction) == (written, read)


def test_occupancy():
    h200, a40 = KNOWN["sm_90"], KNOWN["sm_86"]
    assert resident(h200, 32, 4, 0) == 16  # 64 warps
    assert resident(h200, 128, 4, 0) == 4  # 65536 / (128 x 128)
    assert resident(h200, 81, 4, 0) == 5  # registers are given by eights: 65536 / (88 x 128)
    assert resident(h200, 32, 8, 40 * 1024) == 5  # 228 / (40 + 1) KB
    assert resident(h200, 255, 8, 227 * 1024) == 1
    assert resident(h200, 16, 1, 0) == 32  # programs
    assert resident(a40, 32, 4, 0) == 12  # 48 warps
    assert resident(a40, 32, 4, 100 * 1024) == 0


def test_a_time_is_its_largest_bound_and_what_follows():
    h200 = MACHINES["sm_90"]
    found = hot.find(flow_of(STREAMING), 128, 16 * 128)
    nothing = estimate.Load(must_move=0, programs=1, turns=1, warps=4, resident=1, after=())
    once = estimate.estimate(found, nothing, h200)
    assert [time.bound for time in once] == ["life x waves"] * 3
    assert once[0].total < once[1].total < once[2].total
    much = estimate.estimate(found, nothing._replace(must_move=4.3e9), h200)[CENTRAL]
    assert (
        much.bound == "DRAM" and much.dram == pytest.approx(1000) and much.total == pytest.approx(1000 + constants.LAUNCH.central)
    )
    crowded = estimate.estimate(found, nothing._replace(programs=132 * 4, resident=2), h200)[CENTRAL]
    assert crowded.lives == pytest.approx(2 * once[CENTRAL].life)
    longer = estimate.estimate(found, nothing._replace(turns=11), h200)[CENTRAL]
    assert longer.life - once[CENTRAL].life == pytest.approx(10 * once[CENTRAL].turn)
    tail = estimate.Phase(estimate.Steps(l2=2, instructions=170), programs=264)
    later = estimate.estimate(found, nothing._replace(after=(tail,)), h200)[CENTRAL]
    assert later.after == pytest.approx(2 * (2 * constants.L2.central + 170 * constants.PACE.central / 1700))
    assert later.bound == "life x waves" if later.lives > later.after else later.bound == "what follows"


def test_a_pipelined_loop_and_not_its_prologue():
    found = hot.find(flow_of(PIPELINED), 128, 16 * 128)
    assert found.loops and [i.name for i in found.turn] == ["LDGSTS", "FADD", "IADD3", "ISETP", "BRA"]


def test_what_not_every_turn_meets_is_in_the_pessimistic_time_alone():
    found = hot.find(flow_of(STREAMING), 128, 16 * 128)
    assert found.others == 2 and len(found.turn) == 11
    for level, longer in zip(range(3), (1, 1, 1 + 2 / 11), strict=True):
        alone = estimate.turn_of(found._replace(others=0), level, 4, 1.7)
        assert estimate.turn_of(found, level, 4, 1.7) == pytest.approx(longer * alone)


def test_issue_counts_slots_and_slow_pipes():
    h200 = MACHINES["sm_90"]
    load = estimate.Load(must_move=0, programs=132, turns=1000, warps=4, resident=1, after=())
    slots = hot.find(flow_of(STREAMING), 128, 16 * 128)
    assert estimate.issued(slots, load, h200) == pytest.approx(1000 * 11 / 1700)  # a warp on each of the four schedulers
    special = slots._replace(turn=[i for i in slots.turn if i.name == "MUFU"] * 3)
    assert estimate.issued(special, load, h200) == pytest.approx(1000 * 3 * 8 / 1700)


# --- beside a GPU -----------------------------------------------------------------------------------------------------


def test_the_measured_time_is_that_of_cold_graphs(monkeypatch):
    case = Case("accept_chain", "r1", None)

    def rows(*times):
        return [Row("accept_chain", "r1", "kernel", call, cache, status, p50_us=time) for call, cache, status, time in times]

    done = rows(("graph", "warm", "ok", 1.0), ("graph", "cold", "ok", 2.0), ("eager", "cold", "ok", 3.0))
    monkeypatch.setattr(measured, "run", lambda case, bench: done)
    assert measured.median(case, None) == 2.0
    monkeypatch.setattr(measured, "run", lambda case, bench: rows(("", "", "red: differs", None)))
    assert measured.median(case, None) == "red: differs"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu_there_is_no_time():
    assert measured.microseconds([Case("accept_chain", "r1", None)], "sm_90") == {}


# --- what is refused --------------------------------------------------------------------------------------------------

ROW = dict(op="accept", case="r1", arch="sm_90", source="s", launch="l", ir="i", per_element="10", barriers_per_8kb="4", us="50")


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (dict(per_element="10.4"), 0),
        (dict(per_element="10.6"), 1),
        (dict(barriers_per_8kb="4.3"), 1),
        (dict(per_element="11", barriers_per_8kb="5"), 2),
        (dict(per_element="5", us="100"), 0),  # a time is a guess, and no reason to refuse a change
        (dict(per_element="11", ir="i"), 0),  # the same code is the same binary
        (dict(per_element="11", case="r2"), 0),  # a new case
    ],
)
def test_a_hot_part_that_grows_is_refused(changes, found):
    assert len(grown([ROW], [dict(ROW, **(dict(ir="j") | changes))])) == found


def test_a_hot_part_without_barriers_stays_so():
    assert len(grown([dict(ROW, barriers_per_8kb="0")], [dict(ROW, ir="j", barriers_per_8kb="0.1")])) == 1


def test_rows_of_other_code_are_stale():
    made = []

    def ir():
        made.append(1)
        return "i"

    key = ("accept", "r1", "sm_90")
    assert stale({key: Digests("s", "l", ir)}, [ROW]) == [] and not made
    assert stale({key: Digests("other", "l", ir)}, [ROW]) == [] and made  # rearranged, and the same binary
    assert stale({key: Digests("other", "l", lambda: "j")}, [ROW]) == [
        "accept r1 sm_90: compiles to another IR than when it was modelled"
    ]
    assert stale({key: Digests("s", "other", lambda: "j")}, [ROW]) != []
    assert stale({key: Digests("s", "l", ir)}, []) == ["accept r1 sm_90: not in the report"]
    assert stale({}, [ROW]) == ["accept r1 sm_90: in the report, but no such kernel"]
