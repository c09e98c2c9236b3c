"""`python -m bench.decode --live`: what is on the screen at a time, from recorded rounds, without a terminal."""

import importlib.util
import io
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from bench.decode import __main__ as job, live, replay
from bench.shared.command import BadArgument
from reference.loop import Generation

ROOT = Path(__file__).resolve().parents[2]
needs_rich = pytest.mark.skipif(importlib.util.find_spec("rich") is None, reason="needs rich (the extra `live`)")

WORDS = ["one ", "two\n", "three ", "four ", "five ", "six ", "seven "]
PLAIN = Generation([90, *range(7)], [1] * 6, round_seconds=[0.2] * 6, accepted=[False] * 7)
# The last round emitted two tokens, one of which is beyond what was asked for.
DRAFTED = Generation(
    [90, *range(7)], [3, 1, 3], round_seconds=[0.3, 0.2, 0.4], accepted=[False, True, True, False, False, True, True]
)


def text(ids):
    return "".join("prompt " if i == 90 else WORDS[i] for i in ids)


def film(pace="measured", seconds=12.0):
    tracks = [replay.Track.of(name, g, 1, text) for name, g in (("plain", PLAIN), ("dspark", DRAFTED))]
    return replay.Film("prompt 0", text([90]), tracks, pace, seconds)


def console(**options):
    from rich.console import Console

    return Console(**dict(file=io.StringIO(), width=80, height=20, legacy_windows=False, _environ={}) | options)


def printed(now, **options):
    screen = console(**options)
    screen.print(live.frame(film(), now, screen, 20))
    return screen.file.getvalue()


# --- time -------------------------------------------------------------------------------------------------------------


def test_a_track_has_every_token_once_and_in_its_round():
    track = replay.Track.of("dspark", DRAFTED, 1, text)
    assert [[t.text for t in r.tokens] for r in track.rounds] == [WORDS[1:4], WORDS[4:5], WORDS[5:]]
    assert [t.text for t in track.after(3).tokens] == WORDS
    assert [t.accepted for t in track.after(3).tokens] == DRAFTED.accepted
    assert track.after(3).tokens_per_round == pytest.approx(7 / 3), "whole rounds, as in the table"
    assert track.after(0).tokens == (("one ", False),)


def test_rounds_keep_their_measured_proportions():
    shown = film()
    assert shown.scale == pytest.approx(10), "the slower track took 1.2 s and is shown in 12"
    assert shown.times == pytest.approx([0, 2, 3, 4, 5, 6, 8, 9, 10, 12])
    have = [[part.rounds for part in shown.at(now + 1e-6)] for now in shown.times]
    assert have == [[0, 0], [1, 0], [1, 1], [2, 1], [2, 2], [3, 2], [4, 2], [4, 3], [5, 3], [6, 3]]
    assert [part.seconds for part in shown.at(5.1)] == pytest.approx([0.4, 0.5])
    assert "10 times slower" in shown.speed and "10 times faster" in film(seconds=0.12).speed


def test_with_equal_rounds_only_tokens_per_round_count():
    shown = film("passes", 6.0)
    assert shown.times == pytest.approx([0, 1, 2, 3, 4, 5, 6])
    assert [len(part.tokens) for part in shown.at(3)] == [4, 7] and "equal rounds" in shown.speed


def test_every_time_of_a_film_shows_what_ended_then():
    """Sums of seconds are compared with themselves: no round is late by a rounding."""
    for shown in (film(), film(seconds=0.7), film("passes", 1 / 3)):
        counts = [sum(part.rounds for part in shown.at(now)) for now in shown.times]
        assert counts[0] == 0 and all(a < b for a, b in zip(counts, counts[1:], strict=False)) and counts[-1] == 9


def test_the_columns_are_plain_decoding_and_the_first_other_system():
    systems = [SimpleNamespace(name=n, label=n, ops=o) for n, o in (("mtp", None), ("autoregressive", None), ("dspark", None))]
    assert [s.name for s in replay.pair(systems)] == ["autoregressive", "mtp"]
    kernels = SimpleNamespace(name="dspark", label="dspark, kernels", ops=object())
    assert replay.pair([*systems, kernels]).other is kernels
    for few in (systems[1:2], systems[::2]):
        with pytest.raises(BadArgument, match="^--live: expected autoregressive and another system, got "):
            replay.pair(few)


# --- frames -----------------------------------------------------------------------------------------------------------


@needs_rich
def test_a_frame_as_text():
    lines = [line.rstrip() for line in printed(5.0).splitlines()]
    assert lines == [
        "prompt 0: rounds as long as measured, 10 times slower",
        "",
        "plain, 0.40 s                            dspark, 0.50 s",
        "prompt |[one ][two                       prompt |[one ]two",
        "][three ]                                three [four ][five ]",
        "3 tokens, 2 rounds, 1.00 per round       5 tokens, 2 rounds, 2.00 per round",
        "accepted drafts plain, the target's own tokens in brackets",
    ]


@needs_rich
def test_before_the_first_round_only_the_first_token_is_there():
    lines = printed(0.0).splitlines()
    assert lines[3].count("|[one ]") == 2 and lines[4].count("1 tokens, 0 rounds") == 2


@needs_rich
def test_where_there_is_colour_it_tells_the_kinds_apart():
    coloured = printed(12.0, force_terminal=True, color_system="standard")
    assert "\033[32mthree \033[0m" in coloured and "\033[1;31mfour \033[0m" in coloured
    assert "[one" not in coloured and "green" in coloured


@needs_rich
@pytest.mark.parametrize("environ", [{"NO_COLOR": "1", "TERM": "xterm-256color"}, {"TERM": "dumb"}])
def test_without_colour_brackets_do(environ):
    plain = printed(12.0, force_terminal=True, _environ=environ)
    assert "three [four ]" in plain and "\033[32m" not in plain and "\033[1;31m" not in plain and "in brackets" in plain


@needs_rich
@pytest.mark.parametrize("width", [80, 30])
def test_a_low_screen_shows_the_end_of_the_text(width):
    screen = console(width=width, height=9)
    long = film()
    long.prompt = "begin\n" + "line\n" * 30
    screen.print(live.frame(long, 12.0, screen, 9))
    lines = screen.file.getvalue().splitlines()
    assert len(lines) <= 9 and "begin" not in screen.file.getvalue() and "seven" in screen.file.getvalue()


@needs_rich
def test_characters_that_would_move_the_cursor_are_replaced():
    shown = film()
    shown.prompt = "a\033[2Jb\rc"
    screen = console()
    screen.print(live.frame(shown, 0.0, screen))
    assert (
        "\033" not in screen.file.getvalue()
        and "a\N{REPLACEMENT CHARACTER}[2Jb\N{REPLACEMENT CHARACTER}c" in screen.file.getvalue()
    )


# --- playing ----------------------------------------------------------------------------------------------------------


@needs_rich
def test_a_terminal_gets_a_frame_per_round_at_its_time():
    screen, slept = console(force_terminal=True, color_system="standard"), []
    live.show([film()], screen, slept.append)
    written = screen.file.getvalue()
    assert len(slept) == 10 and slept == pytest.approx(film().times, abs=2.0)
    assert written.count("rounds as long as measured") >= 10 and "7 tokens, 3 rounds, 2.33 per round" in written


@needs_rich
@pytest.mark.parametrize("options", [{}, {"force_terminal": True, "_environ": {"TERM": "dumb"}}])
def test_elsewhere_the_last_frame_is_printed_at_once(options):
    screen = console(**options)
    live.show([film()], screen, lambda seconds: pytest.fail("waited"))
    assert screen.file.getvalue().count("rounds as long as measured") == 1
    assert "7 tokens, 3 rounds" in screen.file.getvalue()


@needs_rich
def test_the_command_shows_the_counts_of_its_table(capsys):
    assert job.main(["--live", "--max-new-tokens", "12", "--prompts", str(ROOT / "MANIFEST.in")]) == 0
    out = capsys.readouterr().out
    live_part, table = out.split("\n1 prompts, ")
    rows = {line.split("  ")[0]: line.split("  ", 1)[1].split() for line in table.split("\n\n")[1].splitlines()[2:]}
    assert list(rows) == ["autoregressive", "dspark", "dspark, scheduled"]
    counted = re.findall(r"(\d+) tokens, (\d+) rounds, ([\d.]+) per round", live_part)
    assert counted[0] == ("12", "12", "1.00") and counted[1][0] == "12"
    assert [mean for _, _, mean in counted] == [rows[name][0] for name in ("autoregressive", "dspark")]


def test_a_missing_rich_takes_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "rich", None)
    assert job.main(["--live"]) == 2
    said = capsys.readouterr()
    assert said.out == "" and said.err.startswith("bench.decode: --live: needs rich, ") and said.err.count("\n") == 1


@needs_rich
def test_ctrl_c_while_tokens_appear(tmp_path):
    """In a terminal, where it waits for the next round: one line, status 130, the cursor visible again."""
    pty = pytest.importorskip("pty")
    leader, follower = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "bench.decode", "--live", "--seconds", "1000", "--max-new-tokens", "8", "--prompts",
         str(ROOT / "MANIFEST.in"), "--systems", "autoregressive,dspark"],
        cwd=ROOT, env={**os.environ, "TERM": "xterm"}, stdout=follower, stderr=subprocess.PIPE, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    os.close(follower)
    try:
        seen = b""
        while b"tokens, 0 rounds" not in seen:
            seen += os.read(leader, 4096)
        process.send_signal(signal.SIGINT)
        err = process.communicate(timeout=60)[1]
        try:
            while chunk := os.read(leader, 4096):
                seen += chunk
        except OSError:  # what a terminal says at its end
            pass
    finally:
        if process.poll() is None:
            process.kill()
        os.close(leader)
    assert (process.returncode, err) == (130, "bench.decode: stopped; nothing is written\n")
    assert seen.rfind(b"\033[?25h") > seen.rfind(b"\033[?25l") >= 0
