"""What every command says to bad arguments, to --help and to Ctrl-C: one line, an exit status, no traceback, and no torch imported.

Arguments are tried in one process in which torch cannot be imported: what would import it fails.
"""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from bench.shared import command, source

ROOT = Path(__file__).resolve().parents[2]
COMMANDS = sorted(
    {path.parent.name if path.name == "__main__.py" else path.stem for path in (ROOT / "bench").glob("*.py")}
    | {path.parent.name for path in (ROOT / "bench").glob("*/__main__.py")}
)
COMMANDS = [f"bench.{name}" for name in COMMANDS if name not in ("__init__", "bench")] + ["bench.assets.build"]

# Starts commands one after another: a list of (module, arguments) comes in, a list of (exit status, stdout, stderr) goes out.
DRIVER = """
import contextlib, importlib, io, json, sys
sys.modules["torch"] = sys.modules["numpy"] = sys.modules["triton"] = None
found = []
for module, arguments in json.load(sys.stdin):
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        try:
            try:
                main = importlib.import_module(module + ".__main__").main
            except ModuleNotFoundError:
                main = importlib.import_module(module).main
            status = main(arguments)
        except SystemExit as end:
            status = end.code
        except BaseException as error:
            status = f"{type(error).__name__}: {error}"
    found.append((status, out.getvalue(), err.getvalue()))
json.dump(found, sys.stdout)
"""


def without_torch(calls):
    """What commands answer in a process that has no torch, no numpy and no Triton."""
    done = subprocess.run(
        [sys.executable, "-c", DRIVER], cwd=ROOT, input=json.dumps(calls), capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout)


# id -> (command, arguments, what the one line says behind the command's name).
BAD = {
    "decode_unknown_option": ("bench.decode", ["--nonsense"], "unrecognized arguments: --nonsense"),
    "decode_word_for_a_number": ("bench.decode", ["--seed", "x"], "argument --seed: invalid int value: 'x'"),
    "decode_number_missing": ("bench.decode", ["--batch-size"], "argument --batch-size: expected one argument"),
    "decode_batch_of_none": ("bench.decode", ["--batch-size", "0"], "--batch-size: expected at least 1, got 0"),
    "decode_negative_tokens": ("bench.decode", ["--max-new-tokens", "-3"], "--max-new-tokens: expected at least 1, got -3"),
    "decode_infinite_temperature": ("bench.decode", ["--temperature", "inf"], "--temperature: expected a number of at least 0"),
    "decode_unknown_rule": ("bench.decode", ["--rule", "fair"], "argument --rule: invalid choice: 'fair'"),
    "decode_unknown_dtype": ("bench.decode", ["--dtype", "int8"], "argument --dtype: invalid choice: 'int8'"),
    "decode_unknown_policy": ("bench.decode", ["--policy", "all"], "argument --policy: invalid choice: 'all'"),
    "decode_unknown_system": ("bench.decode", ["--systems", "eagle"], "--systems: expected names among autoregressive"),
    "decode_empty_system": ("bench.decode", ["--systems", "mtp,"], "--systems: expected names among autoregressive"),
    "decode_small_tree": ("bench.decode", ["--tree-nodes", "1"], "--tree-nodes: expected 2 to 64, got 1"),
    "decode_kernels_of_a_rule": ("bench.decode", ["--kernels", "--rule", "block"], "--kernels: expected --rule token"),
    "decode_chat_alone": ("bench.decode", ["--chat"], "--chat: expected together with --model"),
    "decode_thinking_alone": ("bench.decode", ["--model", "x", "--thinking"], "--thinking: expected together with --chat"),
    "decode_prompts_missing": ("bench.decode", ["--prompts", "/nowhere.txt"], "--prompts: /nowhere.txt: No such file or directory"),
    "decode_prompts_a_folder": ("bench.decode", ["--prompts", "/"], "--prompts: /: Is a directory"),
    "decode_out_in_no_folder": ("bench.decode", ["--out", "/nowhere/x.json"], "--out: expected a file in a folder that exists"),
    "decode_out_a_folder": ("bench.decode", ["--out", "/"], "--out: expected a file in a folder that exists, got /"),
    "decode_pace_alone": ("bench.decode", ["--pace", "passes"], "--pace: expected together with --live"),
    "decode_seconds_alone": ("bench.decode", ["--seconds", "3"], "--seconds: expected together with --live"),
    "decode_live_in_batches": ("bench.decode", ["--live", "--batch-size", "8"], "--batch-size: expected 1 with --live"),
    "decode_live_in_no_time": ("bench.decode", ["--live", "--seconds", "0"], "--seconds: expected a number above 0, got 0"),
    "decode_live_interpreted": ("bench.decode", ["--live", "--kernels"], "--live: expected without --kernels on a CPU"),
    "decode_unknown_pace": ("bench.decode", ["--pace", "fast"], "argument --pace: invalid choice: 'fast'"),
    "load_concurrency_a_word": ("bench.load", ["--concurrency", "1,many"], "--concurrency: expected whole numbers"),
    "load_concurrency_of_none": ("bench.load", ["--concurrency", "0"], "--concurrency: expected numbers from 1 to 4096"),
    "load_mix_above_one": ("bench.load", ["--mix", "1.5"], "--mix: expected a number from 0 to 1, got 1.5"),
    "load_mix_no_number": ("bench.load", ["--mix", "nan"], "--mix: expected a number from 0 to 1, got nan"),
    "load_two_costs": ("bench.load", ["--cost", "x", "--measure-cost"], "--cost: expected without --measure-cost, got both"),
    "load_nothing_to_save": ("bench.load", ["--save-cost", "x"], "--save-cost: expected together with --measure-cost"),
    "load_plot_of_no_kind": ("bench.load", ["--plot", "x.jpg"], "--plot: expected a name that ends in .png or .svg"),
    "load_out_in_no_folder": ("bench.load", ["--out", "/nowhere/x.csv"], "--out: expected a file in a folder that exists"),
    "kernels_out_in_no_folder": ("bench.kernels", ["--out", "/nowhere/x"], "--out: expected a file in a folder that exists"),
    "kernels_two_ways": ("bench.kernels", ["--counters", "--host"], "--host: expected without --counters, got both"),
    "kernels_requests_alone": ("bench.kernels", ["--requests", "8"], "--requests: expected together with --counters"),
    "kernels_requests_of_none": ("bench.kernels", ["--counters", "--requests", "0"], "--requests: expected at least 1, got 0"),
    "round_requests_a_word": ("bench.round", ["--requests", "few"], "--requests: expected whole numbers"),
    "round_requests_too_many": ("bench.round", ["--requests", "4096"], "--requests: expected numbers from 1 to 1024"),
    "round_no_layer": ("bench.round", ["--layers", "0"], "--layers: expected at least 1, got 0"),
    "round_time_of_zero": ("bench.round", ["--target-ms", "0"], "--target-ms: expected a number above 0, got 0"),
    "round_infinite_bytes": ("bench.round", ["--target-bytes", "inf"], "--target-bytes: expected a number above 0, got inf"),
    "compile_unknown_arch": ("bench.compile", ["--arch", "sm_70"], "argument --arch: invalid choice: 'sm_70'"),
    "compile_unknown_op": ("bench.compile", ["--op", "softmax"], "argument --op: invalid choice: 'softmax'"),
    "compile_no_job": ("bench.compile", ["--jobs", "0"], "--jobs: expected at least 1, got 0"),
    "compile_old_missing": ("bench.compile", ["--compare", "/nowhere.csv"], "--compare: expected a report, got /nowhere.csv"),
    "model_unknown_arch": ("bench.model", ["--arch", "gfx942"], "argument --arch: invalid choice: 'gfx942'"),
    "model_one_report": ("bench.model", ["--compare", "a.csv"], "argument --compare: expected 2 arguments"),
    "model_reports_missing": ("bench.model", ["--compare", "/a.csv", "/b.csv"], "--compare: expected a report, got /a.csv"),
    "tune_unknown_kernel": ("bench.tune", ["--kernel", "softmax"], "argument --kernel: invalid choice: 'softmax'"),
    "tune_no_second": ("bench.tune", ["--seconds", "0"], "--seconds: expected more than 0, got 0"),
    "tune_out_no_folder": ("bench.tune", ["--compile-only", "--out", "/nowhere"], "--out: expected a folder that exists"),
    "gpu_no_minute": ("bench.gpu", ["--minutes", "-1"], "--minutes: expected more than 0, got -1"),
    "gpu_no_out": ("bench.gpu", [], "--out: expected a folder, got none"),
    "plot_results_missing": ("bench.plot", ["--results", "/nowhere"], "--results: expected a folder that exists, got /nowhere"),
    "plot_out_missing": ("bench.plot", ["--out", "/nowhere"], "--out: expected a folder that exists, got /nowhere"),
    "report_of_nothing": ("bench.report", ["--results", "/nowhere"], "--results: expected a folder that exists, got /nowhere"),
    "report_out_a_folder": ("bench.report", ["--out", "/"], "--out: expected a file in a folder that exists, got /"),
    "systems_one_prompt": ("bench.systems", ["--prompts", "1"], "--prompts: expected at least 2, got 1"),
    "systems_few_tokens": ("bench.systems", ["--new-tokens", "3"], "--new-tokens: expected at least 14, got 3"),
    "systems_no_table": ("bench.systems", ["--table", "--out", "/x.json"], "--out: /x.json: no such file"),
    "launches_out_a_folder": ("bench.launches", ["--out", "/"], "--out: expected a file in a folder that exists, got /"),
    "candidates_no_stride": ("bench.candidates", ["--stride", "0"], "--stride: expected at least 1, got 0"),
    "candidates_out_in_no_folder": ("bench.candidates", ["--out", "/nowhere/x"], "--out: expected a file in a folder"),
    "pruning_no_text": ("bench.pruning", ["--texts", "0"], "--texts: expected at least 1, got 0"),
    "quantised_negative_stride": ("bench.quantised", ["--stride", "-6"], "--stride: expected at least 1, got -6"),
    "filters_no_vocabulary": ("bench.filters", ["--vocab", "0"], "--vocab: expected at least 1, got 0"),
    "filters_cold": ("bench.filters", ["--temperature", "0"], "--temperature: expected a number above 0, got 0"),
    "inspect_nothing": ("bench.inspect", [], "the following arguments are required: DIR"),
    "engines_an_argument": ("bench.engines", ["vllm"], "unrecognized arguments: vllm"),
    "build_nowhere": ("bench.assets.build", [], "the following arguments are required: --out"),
    "build_no_thread": ("bench.assets.build", ["--out", "x", "--threads", "0"], "--threads: expected at least 1, got 0"),
    "build_unknown_stage": ("bench.assets.build", ["--out", "x", "--only", "eagle"], "--only: expected one of corpus"),
    "build_quick_installed": ("bench.assets.build", ["--out", "x", "--quick", "--install"], "--install: expected without --quick"),
}


@pytest.fixture(scope="module")
def answers():
    """To every entry of BAD, and to --help of every command."""
    calls = {name: (module, arguments) for name, (module, arguments, _) in BAD.items()}
    calls |= {f"help of {module}": (module, ["--help"]) for module in COMMANDS}
    return dict(zip(calls, without_torch(list(calls.values())), strict=True))


@pytest.mark.parametrize("name", BAD)
def test_a_bad_argument_takes_one_line_and_no_torch(answers, name):
    status, out, err = answers[name]
    module, _, message = BAD[name]
    assert (status, out) == (2, "") and err.startswith(f"{module}: {message}") and err.count("\n") == 1, (status, err)


@pytest.mark.parametrize("module", COMMANDS)
def test_help_says_what_a_command_is_and_takes_no_torch(answers, module):
    status, out, err = answers[f"help of {module}"]
    assert (status, err) == (0, "") and out.startswith(f"usage: python -m {module} ")
    path = ROOT.joinpath(*module.split("."))
    text = (path / "__main__.py" if path.is_dir() else path.with_suffix(".py")).read_text(encoding="utf-8")
    assert re.sub(r"\s+", "", text.split('"""')[1].split("\n")[0]) in re.sub(r"\s+", "", out), "its first sentence"


def test_every_command_is_tried():
    assert {module for module, _, _ in BAD.values()} == set(COMMANDS) and len(BAD) > 60


# Commands that write a file or a folder; the others print.
PRINT = {"bench.engines", "bench.filters", "bench.inspect"}


@pytest.mark.parametrize("module", COMMANDS)
def test_a_command_that_writes_takes_out(answers, module):
    assert ("--out " in answers[f"help of {module}"][1]) == (module not in PRINT)


def test_bad_answers_by_a_process_of_their_own():
    """The same from a shell: nothing of Python's shows."""
    done = subprocess.run([sys.executable, "-m", "bench.decode", "--rule", "fair"], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("bench.decode: argument --rule: invalid choice")


def test_a_reader_that_has_enough_ends_a_command_silently():
    program = "import sys\nfrom bench.shared import command\n"
    program += "parser = lambda: command.Parser('bench.long', 'A command.\\n')\n"
    program += "work = lambda arguments: [print(number, flush=True) for number in range(10**5)]\n"
    program += "sys.exit(command.run(parser, None, work, []))"
    shell = f"set -o pipefail; {sys.executable} -c {shlex.quote(program)} | head -1"
    done = subprocess.run(["bash", "-c", shell], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (141, "0\n", "")


# --- names that are read from source ----------------------------------------------------------------------------------


READ = [
    ("bench.compile.cases", "CASES"), ("bench.decode.models", "DTYPES"), ("bench.decode.replay", "PACES"), ("bench.decode.systems", "SYSTEMS"),
    ("bench.decode.trees", "SUFFIX"), ("bench.decode.trees", "MAX_NODES"), ("bench.load.simulation", "MEAN_TOKENS"),
    ("bench.load.report", "COLUMNS"), ("bench.model.constants", "MACHINES"), ("bench.shared.acceptance", "DOMAINS"),
    ("bench.shared.measure", "SAMPLES"), ("bench.shared.measure", "QUICK_SAMPLES"), ("bench.shared.systems", "DRAFTS"),
    ("bench.tune.kernels", "KERNELS"), ("reference.loop", "RULES"), ("reference.schedule", "POLICIES"),
]  # fmt: skip

# In a process of its own: some of these modules decide that kernels are not interpreted.
VALUES = """
import importlib, json, sys
plain = lambda value: list(value) if isinstance(value, dict) else value
print(json.dumps([plain(getattr(importlib.import_module(module), name)) for module, name in json.load(sys.stdin)]))
from dspark_kernels.launch.arch import KNOWN
print(json.dumps(sorted(KNOWN)))
"""


def test_what_is_read_from_source_is_what_the_modules_say():
    pytest.importorskip("triton")
    done = subprocess.run([sys.executable, "-c", VALUES], cwd=ROOT, input=json.dumps(READ), capture_output=True, text=True)
    values, known = map(json.loads, done.stdout.splitlines())
    for (module, name), value in zip(READ, values, strict=True):
        have = source.literal(module, name)
        assert json.loads(json.dumps(list(have) if isinstance(have, dict) else have)) == value, name
    assert source.architectures() == known


def test_every_name_that_is_read_from_source_is_compared():
    found = set()
    for path in (ROOT / "bench").rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        for module, name in re.findall(r'literal\("([\w.]+)", (?:"(\w+)"|name)\)', text):
            names = [name] if name else re.findall(rf'literal\("{module}", name\) for name in \(([^)]*)\)', text)[0].split(", ")
            found |= {(module, each.strip('"')) for each in names}
    assert found == set(READ)


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


def stopped(write):
    """(exit status, what is said) of a command that is stopped after `write(out)`."""

    def parser():
        p = command.Parser("bench.stopped", "A command.\n")
        p.add_argument("--out")
        return p

    def work(arguments):
        write(Path(arguments.out))
        raise KeyboardInterrupt

    return lambda out: command.run(parser, None, work, ["--out", str(out)])


def test_ctrl_c_says_that_nothing_is_written(tmp_path, capsys):
    (tmp_path / "old.csv").write_text("before")
    assert stopped(lambda out: None)(tmp_path / "old.csv") == 130
    assert capsys.readouterr().err == "bench.stopped: stopped; nothing is written\n"


def test_ctrl_c_names_the_file_that_holds_what_was_done(tmp_path, capsys):
    file = tmp_path / "rows.csv"
    assert stopped(lambda out: out.write_text("a row"))(file) == 130
    assert capsys.readouterr().err == f"bench.stopped: stopped; what was done until then is kept in {file}\n"


def test_ctrl_c_names_the_files_of_a_folder(tmp_path, capsys):
    (tmp_path / "old.csv").write_text("before")

    def write(out):
        (out / "stage").mkdir()
        for name in ("a", "b", "stage/c", "stage/d", "stage/e"):
            (out / name).write_text("x")

    assert stopped(write)(tmp_path) == 130
    err = capsys.readouterr().err
    assert err.startswith(f"bench.stopped: stopped; what was done until then is kept in {tmp_path / 'a'}, ")
    assert err.endswith(" and 2 more files\n") and "old.csv" not in err and err.count("\n") == 1


def _heed_interrupts():
    """Before the command begins: a process started in the background ignores Ctrl-C, and so would what it starts."""
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def interrupted(arguments, ready):
    """A command in a session of its own, sent Ctrl-C (to all of its processes, as a terminal does) once `ready(its output)`."""
    process = subprocess.Popen(
        [sys.executable, "-u", "-m", *arguments], cwd=ROOT, env={**os.environ, "TRITON_INTERPRET": ""}, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, preexec_fn=_heed_interrupts,
    )  # fmt: skip
    try:
        for line in process.stdout:
            if ready(line):
                break
        os.killpg(process.pid, signal.SIGINT)
        begun = time.monotonic()
        out, err = process.communicate(timeout=60)
        return process.returncode, err, time.monotonic() - begun
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_ctrl_c_while_workers_compile(tmp_path):
    """One line, though the workers are interrupted too, and no waiting for what they are at."""
    pytest.importorskip("triton")
    out = tmp_path / "compile.csv"
    arguments = [
        "bench.compile",
        "--arch",
        "sm_90",
        "--op",
        "fixed_layout",
        "--op",
        "draft_block",
        "--jobs",
        "2",
        "--out",
        str(out),
    ]
    status, err, seconds = interrupted(arguments, lambda line: "fixed_layout" in line)
    assert status == 130 and seconds < 10
    assert err == f"bench.compile: stopped; what was done until then is kept in {out}\n" and "fixed_layout" in out.read_text()


@pytest.mark.slow
def test_ctrl_c_while_stages_are_built(tmp_path):
    """The stage that runs in a process of its own is ended without a word."""
    status, err, _ = interrupted(["bench.assets.build", "--quick", "--out", str(tmp_path)], lambda line: ": begins" in line)
    assert status == 130 and err.startswith("bench.assets.build: stopped; what was done until then is kept in "), err
    assert err.count("\n") == 1
