"""The page of all results: it stands alone, says how each number was found, and says what the files say."""

import csv
import re
import shutil
from html.parser import HTMLParser

import pytest

from bench.report import __main__ as job, page
from bench.shared.measure import Row
from bench.shared.paths import RESULTS


class Reader(HTMLParser):
    """What a browser would fetch, the tags that are open, the text of each section."""

    def __init__(self, text: str):
        super().__init__()
        self.fetched, self.open, self.sections = [], [], {}
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.fetched += [attributes[name] for name in ("src", "href") if name in attributes]
        if tag == "section":
            self.sections[attributes["id"]] = ""
        if tag not in ("meta", "img", "link"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "section" in self.open:
            self.sections[list(self.sections)[-1]] += data + " "


def made(folder, capsys, *arguments):
    out = folder / "report.html"
    assert job.main(["--results", str(folder), "--out", str(out), *arguments]) == 0
    return Reader(out.read_text(encoding="utf-8")), capsys.readouterr().out


def test_the_committed_results_make_a_page_that_stands_alone(tmp_path, capsys):
    out = tmp_path / "page.html"
    assert job.main(["--out", str(out)]) == 0
    text = out.read_text(encoding="utf-8")
    read = Reader(text)
    assert not read.open and len(text) < 3_000_000
    assert all(source.startswith(("data:image/", "#")) for source in read.fetched) and "url(" not in text
    assert {source[1:] for source in read.fetched if source[0] == "#"} == set(read.sections)
    words = dict(modelled="MODELLED", compiled="COMPILED", counted="COUNTED", right="CHECKED", load="SIMULATED")
    assert all(word in read.sections[name] for name, word in words.items())
    if not list(RESULTS.glob("kernels-*.csv")):
        assert "NOT MEASURED" in read.sections["measured"] and "not there: kernels-<gpu>.csv" in capsys.readouterr().out
    with (RESULTS / "compile.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    for arch in {row["arch"] for row in rows}:
        count = sum(row["arch"] == arch for row in rows)
        assert re.search(rf"{arch}\s+{count}\s", read.sections["compiled"]), arch


def test_what_is_not_there_is_named_with_its_command(tmp_path, capsys):
    read, said = made(tmp_path, capsys)
    for name, how in (("model/h200.csv", "bench.model"), ("compile.csv", "bench.compile"), ("load.svg", "bench.load")):
        assert f"not there: {name} (python -m {how}" in said
    assert "is not there" in read.sections["compiled"] and not any(source.startswith("data:") for source in read.fetched)


def test_times_of_a_gpu_are_shown_as_measured(tmp_path, capsys):
    row = dict.fromkeys(Row.__dataclass_fields__, "") | dict(
        op="accept_chain", case="<dense>", contender="kernel", call="graph", cache="cold", p50_us="12.345", share_of_floor="0.5"
    )
    with (tmp_path / "kernels-some-gpu.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, row)
        writer.writeheader()
        writer.writerows([row, row | dict(call="eager", p50_us="99.5")])
    read, _ = made(tmp_path, capsys)
    text = read.sections["measured"]
    assert "MEASURED" in text and "NOT MEASURED" not in text and "some-gpu" in text
    assert "12.3" in text and "<dense>" in text and "99.5" not in text


def test_a_file_of_another_kind_is_refused(tmp_path, capsys):
    shutil.copy(RESULTS / "load.csv", tmp_path / "compile.csv")
    assert job.main(["--results", str(tmp_path)]) == 2
    assert "compile.csv: has no column op, case, arch" in capsys.readouterr().err
    assert job.main(["--results", str(tmp_path / "nowhere")]) == 2
    assert "--results: expected a folder that exists" in capsys.readouterr().err


@pytest.mark.parametrize("value, width", [(2.0, "100.0%"), (0.5, "25.0%")])
def test_bars_and_marks_share_one_scale(value, width):
    html = page.bars([page.Bar("a", value, (1.0,), ""), page.Bar("b", 2.0, (), "")])
    assert f'class="bar" style="width:{width}"' in html and 'class="mark" style="left:50.0%"' in html
