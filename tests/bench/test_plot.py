"""bench.plot on generated files: what is drawn, where it comes from, the same bytes again; nothing for what was not measured."""

import csv
import dataclasses
import sys

import pytest

pytest.importorskip("matplotlib")

from matplotlib.figure import Figure

from bench import plot
from bench.kernels import report as kernel_report
from bench.round import ops, report as round_report
from bench.shared import launch_table, measure, rows, system_figures, systems, timing
from bench.shared.round_ops import DECISIONS, GRAPH, OPS

GPU = dict(gpu="Stand-in", driver="1", torch="2", triton="3", commit="abc")


def kernel_rows():
    rows = []
    cases = (("draft_block", "sampled_r1", 1), ("draft_block", "sampled_r64", 64), ("tree_attention", "r8_c9", 8))
    for op, case, requests in cases:
        for contender, call, factor in (("kernel", "graph", 1), ("kernel", "eager", 2), ("pytorch", "graph", 5)):
            for cache in ("cold", "warm"):
                p50 = 10.0 * requests * factor
                with_target = (contender, call, cache, op) == ("kernel", "graph", "cold", "draft_block")
                row = measure.Row(op, case, contender, call, cache, "ok", p50, p50, p50, floor_us=8.0 * requests)
                row = dataclasses.replace(row, share_of_floor=0.8 / factor, **GPU)
                rows.append(dataclasses.replace(row, target_us=12.5 * requests, met="yes") if with_target else row)
    rows.append(measure.Row("accept_chain", "dense_r1", "kernel", "", "", "red: x"))
    return rows


def round_rows():
    found = []
    for requests in (1, 64):
        rows = round_report.predicted(ops.Sizes(requests), 4e12, round_report.Engine(1.0, 2.0, 1, 1))
        taken = {op: timing.Timing(1.0, 10.0 * requests, 3.0, 9) for op in (*OPS, GRAPH)}
        found += round_report.timed(rows, taken, GPU)
    return found


def launch_rows():
    made = []
    for setting in ("sampled", "greedy"):
        for op in DECISIONS:
            for contender, count in ((launch_table.OURS, 1), (launch_table.EAGER, 40)):
                made.append(
                    launch_table.Row(setting, op, "round", contender, count, count, 0, "counting", 7, "none", "2", "3", "abc")
                )
    return made


@pytest.fixture
def results(tmp_path):
    kernel_report.write(tmp_path / "kernels-stand-in.csv", kernel_rows())
    round_report.write(tmp_path / "round-stand-in.csv", round_rows())
    launch_table.write(tmp_path / "launches.csv", launch_rows())
    return tmp_path


def read(path):
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def words(figure):
    """All text of a figure."""
    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(lambda artist: hasattr(artist, "get_text")) if text.get_text()]


def test_everything_there_is_data_for_is_drawn_twice(results, capsys):
    assert plot.main(["--results", str(results)]) == 0
    names = {path.name for path in results.iterdir()} - {"kernels-stand-in.csv", "round-stand-in.csv", "launches.csv"}
    kinds = ("roofline-stand-in", "latency-stand-in", "round-stand-in", "launches", "acceptance")
    assert names == {f"{kind}.{suffix}" for kind in kinds for suffix in ("png", "svg")}
    for kind in kinds:
        assert (results / f"{kind}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in (results / f"{kind}.svg").read_text()
    assert "not measured" not in capsys.readouterr().out


def test_the_same_data_gives_the_same_files(results):
    (results / "other").mkdir()
    for folder in (results, results / "other"):
        plot.save(plot.launch_counts, launch_table.read(results / "launches.csv"), folder / "launches")
    for suffix in ("png", "svg"):
        assert (results / f"launches.{suffix}").read_bytes() == (results / "other" / f"launches.{suffix}").read_bytes()


def test_what_was_not_measured_is_not_drawn_and_said(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(plot, "save", lambda draw, data, path: [path])
    assert plot.main(["--results", str(tmp_path)]) == 0
    out = capsys.readouterr().out
    assert "[1/1] acceptance" in out and out.count("not measured, no picture") == 2


@pytest.fixture(scope="module")
def embedded():
    return systems.load()


def test_systems_have_a_panel_per_domain_and_lines_told_apart_without_colour(embedded):
    rows = embedded["teacher_forced"]
    for draw in (system_figures.systems_position, system_figures.systems_time):
        figure = Figure()
        draw(figure, embedded)
        domains = list(dict.fromkeys(row["domain"] for row in rows))
        assert [axes.get_title().split(",")[0] for axes in figure.axes] == domains
        for axes, domain in zip(figure.axes, domains, strict=True):
            own = [row for row in rows if row["domain"] == domain]
            assert [line.get_label() for line in axes.lines] == [row["system"] for row in own]
            assert len({(line.get_marker(), line.get_linestyle()) for line in axes.lines}) == len(own)
    figure = Figure()
    system_figures.systems_position(figure, embedded)
    assert list(figure.axes[0].lines[0].get_ydata()) == rows[0]["acceptance"]
    figure = Figure()
    system_figures.systems_time(figure, embedded)
    line = figure.axes[0].lines[0]
    assert list(line.get_xdata()) == embedded["draft_ms"][rows[0]["system"]]
    # With all drafts: the teacher-forced tau.
    assert line.get_ydata()[-1] == pytest.approx(rows[0]["tau"], abs=1e-3)


def test_reliability_shows_before_and_after(embedded):
    figure = Figure()
    system_figures.systems_reliability(figure, embedded)
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == len(embedded["calibration"])
    for axes, row in zip(panels, embedded["calibration"], strict=True):
        assert row["fitted"] in axes.get_title() and row["domain"] in axes.get_title()
        _, before, after = axes.lines
        assert before.get_marker() != after.get_marker() and before.get_linestyle() != after.get_linestyle()
        assert f"{100 * row['after']:.2f} %" in after.get_label()


def test_systems_are_drawn_where_they_were_measured(tmp_path):
    assert plot.pictures(tmp_path) == []
    (tmp_path / "systems.json").write_bytes(systems.RESULTS.read_bytes())
    assert [name for name, _, _ in plot.pictures(tmp_path)] == list(system_figures.SYSTEMS)


def test_a_file_without_times_hides_no_other(results, capsys, monkeypatch):
    monkeypatch.setattr(plot, "embedded_rounds", lambda: rows.read(results / "gone.csv"))
    made = plot.pictures
    wanted = ("roofline-broken", "latency-broken", "launches")
    monkeypatch.setattr(plot, "pictures", lambda folder: [picture for picture in made(folder) if picture[0] in wanted])
    kernel_report.write(results / "kernels-broken.csv", [kernel_rows()[-1]])
    assert plot.main(["--results", str(results)]) == 1
    out = capsys.readouterr().out
    assert "roofline-broken: cannot be drawn: LookupError: no cold graph replay" in out and "launches.png" in out
    assert "latency-broken: cannot be drawn" in out and "acceptance: cannot be drawn: FileNotFoundError" in out
    assert not list(results.glob("*broken.png"))


def test_the_roofline_shows_shares_of_cold_replays_and_targets(results):
    figure = Figure()
    plot.roofline(figure, read(results / "kernels-stand-in.csv"))
    (axes,) = figure.axes
    assert [bar.get_width() for bar in axes.patches] == [0.8] * 3
    assert len({bar.get_hatch() for bar in axes.patches}) == 2  # one per op: readable without colour
    assert {"80%, target met", "80%", "draft_block sampled_r64", "tree_attention r8_c9"} <= set(words(figure))
    ticks = [line.get_xdata()[0] for line in axes.lines]
    assert ticks == pytest.approx([8 / 12.5] * 2)


def test_latency_has_a_line_per_contender_and_the_floor(results):
    figure = Figure()
    plot.latency(figure, read(results / "kernels-stand-in.csv"))
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in panels] == ["draft_block sampled"]  # one batch size makes no line
    lines = {line.get_label(): line for line in panels[0].lines}
    assert set(lines) == {"kernel, graph", "kernel, eager", "pytorch, graph", "floor"}
    assert list(lines["pytorch, graph"].get_ydata()) == [50.0, 3200.0] and list(lines["floor"].get_ydata()) == [8.0, 512.0]
    assert len({line.get_marker() for line in lines.values()}) == 4


@pytest.mark.parametrize(
    "case, found",
    [("sampled_r64", ("sampled", 64)), ("r32_c8192_q8", ("c8192_q8", 32)), ("causal_r1024_k16", ("causal_k16", 1024)),
     ("r64", ("", 64)), ("tree32", None)],
)  # fmt: skip
def test_batch_sizes_are_read_from_names(case, found):
    assert plot._batch(case) == found


def test_a_round_shows_the_ops_the_graph_and_the_shares(results):
    figure = Figure()
    plot.whole_round(figure, read(results / "round-stand-in.csv"))
    left, right = figure.axes
    assert sum(bar.get_height() for bar in left.patches) == pytest.approx(200)
    assert {"10 us", "640 us", "all ops", *OPS} <= set(words(figure))
    all_ops, decisions = right.containers[:2]
    assert all_ops[0].get_height() == pytest.approx(100 * 10 / 3010, rel=1e-3)
    assert decisions[0].get_height() == pytest.approx(100 * 30 / 3010, rel=1e-3)


def test_launches_are_numbered(results):
    figure = Figure()
    plot.launch_counts(figure, launch_table.read(results / "launches.csv"))
    shown = words(figure)
    assert shown.count("40") == 6 and shown.count("120") == 2 and shown.count("3") == 2 and shown.count("1") == 6
    assert any("lower bound" in text for text in shown)


def test_acceptance_by_position():
    import torch

    from bench.shared.acceptance import Rounds

    found = Rounds(torch.zeros(4, 3), torch.tensor([0, 1, 3, 3]), torch.zeros(4).long())
    figure = Figure()
    plot.acceptance_curves(figure, {"code": found})
    given, reached = ([list(container[0].get_ydata()) for container in axes.containers][0] for axes in figure.axes)
    assert given == pytest.approx([3 / 4, 2 / 3, 1.0]) and reached == pytest.approx([3 / 4, 1 / 2, 1 / 2])
    assert any("2.75 tokens per round, 4 rounds" in text for text in words(figure))


def test_positions_that_nobody_reached_are_left_out():
    import torch

    from bench.shared.acceptance import Rounds

    found = Rounds(torch.zeros(2, 3), torch.tensor([0, 1]), torch.zeros(2).long())
    figure = Figure()
    plot.acceptance_curves(figure, {"code": found})
    assert list(figure.axes[0].containers[0][0].get_ydata()) == pytest.approx([1 / 2, 0.0])


def test_bad_arguments_are_one_line_and_exit_2(tmp_path, capsys, monkeypatch):
    for arguments in (["--results", str(tmp_path / "no")], ["--out", str(tmp_path / "no")], ["--bogus"]):
        assert plot.main(arguments) == 2
        error = capsys.readouterr().err
        assert error.startswith("bench.plot: ") and error.count("\n") == 1
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert plot.main(["--results", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "bench.plot: needs matplotlib: pip install dspark_kernels[plots]\n"
