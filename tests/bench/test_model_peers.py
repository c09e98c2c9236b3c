"""The peers' report: its form, what the command says where no peer is installed, and what loads, records and follows a peer's
kernel, on a package written for the purpose; where a peer is installed, one of its steps is modelled."""

import csv
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("triton")

# What compiles without a GPU turns off the interpreter, which the other tests of this process need.
_INTERPRET = os.environ.get("TRITON_INTERPRET")

from bench.model import hot  # noqa: E402
from bench.model.peers import PEERS, load, record, way  # noqa: E402
from tests.bench.test_model import flow_of  # noqa: E402

if _INTERPRET is not None:
    os.environ["TRITON_INTERPRET"] = _INTERPRET

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "bench" / "results" / "model"
REPORT, OURS = FOLDER / "peers-h200.csv", FOLDER / "h200.csv"


def _read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def test_rows_name_their_versions_and_stand_beside_one_of_ours():
    rows = _read(REPORT)
    ours = {(row["op"], row["case"], row["arch"]) for row in _read(OURS)}
    assert {row["peer"] for row in rows} == set(PEERS)
    assert {row["status"] for row in rows} == {"MODELLED"}
    assert all(row["version"] and row["triton"] for row in rows)
    assert {(row["op"], row["case"], row["arch"]) for row in rows} <= ours
    assert all(float(row["low_us"]) <= float(row["us"]) <= float(row["high_us"]) for row in rows)


def test_a_step_is_the_sum_of_its_rows():
    steps = {}
    for row in _read(REPORT):
        steps.setdefault(tuple(row[name] for name in ("op", "case", "arch", "peer", "path")), []).append(row)
    for rows in steps.values():
        (step,) = [row for row in rows if row["kernel"] == "step"]
        parts = [row for row in rows if row is not step]
        assert step["note"] and all(row["note"] for row in parts if row["kernel"] == "torch ops")
        for column in ("launches", "torch_ops"):
            assert int(step[column]) == sum(int(row[column]) for row in parts)
        assert float(step["us"]) == pytest.approx(sum(float(row["us"]) for row in parts), rel=2e-3)


def test_a_peer_that_is_not_installed_is_said_to_be(tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("TRITON_INTERPRET", "PYTHONPATH")}
    command = [sys.executable, "-m", "bench.model", "--op", "compact_kv", "--out", str(tmp_path / "rows.csv")]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for name in PEERS:
        if importlib.util.find_spec(name) is None:
            assert f"{name}: not installed" in done.stdout.splitlines()
    assert not (tmp_path / "peers-rows.csv").exists()  # no peer compacts a cache


# --- loading ----------------------------------------------------------------------------------------------------------


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package that cannot be imported, with a module that needs one of its others, one that is missing, and one that is not."""
    folder = tmp_path / "engine"
    (folder / "deep").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('needs a GPU')")
    (folder / "deep" / "__init__.py").write_text("raise RuntimeError('needs a GPU')")
    (folder / "deep" / "beside.py").write_text("NUMBER = 3")
    (folder / "deep" / "kernels.py").write_text(
        "from engine.deep.beside import NUMBER\n"
        "from engine.config import Config, is_other\n"
        "from a_missing_party import Struct\n"
        "from engine.names import given\n"
        "class Record(Struct, frozen=True):\n    pass\n"
        "other = 1 if is_other() else 2\n"
        "def step(config: Config | None = None):\n    return is_other()\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    return load.Package(
        "engine",
        modules={"kernels": "engine.deep.kernels"},
        beside=("engine.deep.beside",),
        stands_in={"engine.names": {"given": 5}},
        third_party=("a_missing_party",),
    )


def test_modules_of_a_package_that_cannot_be_imported_are_loaded(package):
    with load.loaded(package) as (modules, absent):
        assert (modules.kernels.NUMBER, modules.kernels.other, modules.kernels.given) == (3, 2, 5)
        assert absent == ["engine.config", "a_missing_party"]
        with pytest.raises(RuntimeError, match="engine.config.is_other"):
            modules.kernels.step()
    assert not [name for name in sys.modules if name.partition(".")[0] in ("engine", "a_missing_party")]


def test_a_package_that_is_there_has_a_version_and_another_none():
    assert load.version("torch") == torch.__version__.partition("+")[0] or load.version("torch") == torch.__version__
    assert load.version("no_such_package") is None


# --- torch ops --------------------------------------------------------------------------------------------------------


def test_torch_ops_have_the_bytes_that_they_must_move():
    def step():
        logits = torch.empty(4, 100, device="meta")
        logits[1:].div_(torch.empty(1, 1, device="meta").expand(3, 100))  # 3 rows read and written, one divisor
        torch.nn.functional.embedding(torch.empty(2, dtype=torch.int64, device="meta"), logits)  # 2 rows picked
        logits.fill_(0.0)
        logits.argmax(-1)

    found = record.record(step, "sm_90")
    assert not found.launches
    assert found.ops == [("div_", 2 * 1200 + 4), ("embedding", 2 * 800 + 16), ("fill_", 1600), ("argmax", 1600 + 32)]


# --- the way through a kernel -----------------------------------------------------------------------------------------

BRANCHES = """
 LDG.E R0, desc[UR4][R2.64]
 ISETP.NE.AND P0, PT, R0, RZ, PT
 @P0 EXIT
 LDG.E.128 R4, desc[UR4][R2.64]
 ISETP.NE.AND P1, PT, R1, RZ, PT
 @P1 BRA {plain}
noise:
 IMAD R5, R4, R4, RZ
 IMAD R5, R5, R4, RZ
walk:
 LDG.E R6, desc[UR4][R2.64]
 IADD3 R1, R1, 0x1, RZ
 ISETP.LT.AND P2, PT, R1, R7, PT
 @P2 BRA {walk}
plain:
 STG.E desc[UR4][R2.64], R5
 EXIT
"""


def test_a_way_is_the_longest_where_requests_sample_and_the_shortest_that_streams_where_they_do_not():
    flow = flow_of(BRANCHES)
    long, short = (way.choose(flow, 16, longest=longest) for longest in (True, False))
    assert (len(long.straight), [len(loop.turn) for loop in long.loops]) == (10, [4])
    assert (len(short.straight), short.loops) == (8, [])
    assert long.wide == short.wide == 16
    part = way.hot_of(long, 16, walks=3)
    assert isinstance(part, hot.Hot) and part.how == "pass" and part.instructions == 10 + 3 * 4
    with pytest.raises(ValueError, match="32 bytes"):
        way.choose(flow, 32, longest=True)


def test_a_kernel_that_streams_nothing_takes_the_way_that_loads_most():
    part = way.hot_of(way.choose(flow_of(BRANCHES), 0, longest=False), 0, walks=3)
    assert part.how == "loop" and part.instructions == 4


# --- an installed peer ------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("name", PEERS)
def test_an_installed_peer_is_modelled(name, tmp_path):
    if importlib.util.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    command = [
        sys.executable,
        "-m",
        "bench.model",
        "--op",
        "accept_chain",
        "--case",
        "one_hot_r8",
        "--out",
        str(tmp_path / "rows.csv"),
    ]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0 and "not modelled" not in done.stdout, done.stdout + done.stderr
    rows = [row for row in _read(tmp_path / "peers-rows.csv") if row["peer"] == name]
    assert [row for row in rows if row["per_element"] and float(row["per_element"]) > 5 and row["kernel"] != "step"]
    committed = {(row["path"], row["kernel"]): row for row in _read(REPORT) if (row["peer"], row["case"]) == (name, "one_hot_r8")}
    for row in rows:
        old = committed[row["path"], row["kernel"]]
        if (row["version"], row["triton"]) == (old["version"], old["triton"]):
            assert row == old
