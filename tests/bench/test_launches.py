"""bench.launches: what counts as a launch, what the ops of a round and plain PyTorch launch, and the committed table."""

import dataclasses

import pytest
import torch

from bench.launches import __main__ as job, count as launches
from bench.shared import launch_table, paths
from bench.shared.round_ops import DECISIONS

triton = pytest.importorskip("triton")

CPU = torch.device("cpu")


def operators(call):
    with launches.Operators() as seen:
        call()
    return [name.split(".")[1] for name in seen.names]


@pytest.mark.parametrize(
    "call, names",
    [
        (lambda x: x.view(4, 2)[1:, None].expand(3, 5, 2).transpose(0, 1), []),
        (lambda x: (torch.empty(3), torch.empty_like(x), x.new_empty(2), x.split(4), x.unbind(), x.detach(), x.reshape(2, 4)), []),
        (lambda x: x + 1, ["add"]),
        (lambda x: x.add_(1), ["add_"]),
        (lambda x: x.view(2, 4).T.reshape(8), ["clone"]),  # not contiguous: copied
        (lambda x: torch.zeros(3), ["zeros"]),
        (lambda x: x.double().sum(), ["_to_copy", "sum"]),
        (lambda x: torch.add(x, 1, out=torch.empty(8)), ["add"]),
        (lambda x: x.sort(), ["sort"]),
        (lambda x: torch.where(x > 0, x, 0.0), ["gt", "where"]),
        (lambda x: x[0].fill_(2), ["fill_"]),
        (lambda x: x.copy_(x.clone()), ["clone", "copy_"]),
    ],
)
def test_views_and_allocations_launch_nothing(call, names):
    x = torch.ones(8)
    assert operators(lambda: call(x)) == names


def test_triton_launches_are_counted_and_counting_ends(monkeypatch):
    import dspark_kernels as dk

    positions = torch.zeros(2, dtype=torch.int64)

    def call():
        return dk.draft_layout(positions, positions, block_size=3, mask_token_id=1)

    with launches.triton_launches() as seen:
        call()
        call()
    assert seen == ["draft_layout_kernel"] * 2
    call()
    assert len(seen) == 2
    with pytest.raises(RuntimeError), launches.triton_launches():
        raise RuntimeError
    with launches.triton_launches() as seen:
        pass
    assert seen == []


@pytest.fixture(scope="module")
def rows():
    return launches.count(CPU, True)


def test_every_op_is_one_launch_and_plain_pytorch_is_many(rows):
    ours = [row for row in rows if row.contender == launch_table.OURS]
    assert [(row.launches, row.triton_launches, row.torch_operators) for row in ours] == [(1, 1, 0)] * 10
    eager = {(row.setting, row.op): row for row in rows if row.contender == launch_table.EAGER}
    assert len(eager) == 8 and all(row.triton_launches == 0 and row.launches == row.torch_operators for row in eager.values())
    assert eager["sampled", "draft_block"].launches >= 7 * 11  # per draft: W1, product, sum, cast, scale, lse, exp, noise, max ...
    assert eager["greedy", "draft_block"].launches < eager["sampled", "draft_block"].launches
    assert all(row.drafts == 7 for row in rows)


def test_an_op_that_launches_more_is_seen(monkeypatch):
    import dspark_kernels as dk

    right = dk.accept_chain

    def twice(*args, **kwargs):
        right(*args, **{**kwargs, "out": None, "workspace": None})
        return right(*args, **kwargs)

    monkeypatch.setattr(dk, "accept_chain", twice)
    step = next(step for step in launches.steps(True, True) if step.op == "accept_chain")
    number, of_triton, _ = launches.on_host(launches.calls_of(step, CPU)[launch_table.OURS])
    assert of_triton == 2 and number > 2  # and without a workspace its counters are filled with zeros


def test_the_table_adds_up(rows):
    text = launch_table.table(rows).splitlines()
    totals = {}
    for row in rows:
        if row.op in DECISIONS:
            totals[row.setting, row.contender] = totals.get((row.setting, row.contender), 0) + row.launches
    for setting in ("sampled", "greedy"):
        ours, eager = (totals[setting, contender] for contender in (launch_table.OURS, launch_table.EAGER))
        assert ours == 3 and f"| **together, {setting}** | **3** | **{eager}** |" in text
    assert "lower bound" in text[-1] and "K = 7" in text[0]
    on_gpu = [dataclasses.replace(row, gpu="Fake", method="CUDA profiler") for row in rows]
    assert "lower bound" not in launch_table.table(on_gpu)


def test_the_committed_counts_are_those_of_the_code(rows, tmp_path):
    launch_table.write(tmp_path / "x.csv", rows)
    assert [(r.launches, r.op, r.contender, r.setting) for r in launch_table.read(tmp_path / "x.csv")] == [
        (r.launches, r.op, r.contender, r.setting) for r in rows
    ]
    committed = launch_table.read(paths.RESULTS / "launches.csv")
    if committed[0].gpu == "none" and committed[0].torch.split("+")[0] == torch.__version__.split("+")[0]:
        counts = [
            {(r.setting, r.op, r.contender): (r.launches, str(r.triton_launches)) for r in found} for found in (committed, rows)
        ]
        assert counts[0] == counts[1], "run python -m bench.launches"


def test_the_command(tmp_path, monkeypatch, capsys, rows):
    monkeypatch.setattr(launches, "count", lambda device, small: rows)
    assert job.main(["--out", str(tmp_path / "out.csv")]) == 0
    assert "**together, sampled**" in capsys.readouterr().out and (tmp_path / "out.csv").exists()
    assert job.main(["--out", str(tmp_path / "no" / "out.csv")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("bench.launches: --out: expected a file in a folder that exists") and error.count("\n") == 1
