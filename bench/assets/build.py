"""Build the embedded models from the standard library of the Python that runs this: corpus, tokenizer, target, drafters, report.

    python -m bench.assets.build --out DIR               everything, resumed where it stopped; about 80 minutes on two cores
    python -m bench.assets.build --out DIR --quick       the same in tiny sizes, some seconds a stage: shows that it works
    python -m bench.assets.build --out DIR --only STAGE  one stage (those before it must be done)
    python -m bench.assets.build --out DIR --install     then copy the finished files over those in bench/assets

Every stage writes into DIR/STAGE and ends with done.json: a hash of all it read (settings, outputs of the stages before it), hashes
of all it wrote, and what it spent. A stage whose hash still fits is skipped, one that was stopped goes on from its checkpoint.
Budgets are CPU-seconds, equal for every drafter; the first steps are timed, the number of steps follows and is recorded, and
--recorded FILE (a build.json) repeats a build with the same numbers of steps. Needs torch and numpy; a C++ compiler makes it
several times faster.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from bench.shared import command
from bench.shared.command import BadArgument

from . import FOLDER
from .build_plan import FULL, QUICK, Plan

STAGES = (
    "corpus", "tokenizer", "target", "text", "draft_model", "mtp", "block", "dspark", "head_vanilla", "head_gated", "head_rnn",
    "pack", "rounds", "report",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Context:
    """What a stage may know."""

    out: Path
    plan: Plan
    seed: int
    threads: int
    compile: bool
    recorded: dict[str, int]  # steps by stage

    def folder(self, stage: str) -> Path:
        return self.out / stage


@dataclasses.dataclass(frozen=True)
class Stage:
    """run(context) -> facts for the record. reads: the settings of the plan that it depends on. wide: uses all threads."""

    needs: tuple[str, ...]
    reads: tuple[str, ...]
    outputs: tuple[str, ...]
    run: Callable[[Context], dict]
    wide: bool = False


def stages() -> dict[str, Stage]:
    from . import build_stages as found  # which needs torch: --help does not

    model = ("target", "length")
    drafter = (*model, "feature_layers", "batch", "anchors", "drafts", "evaluated")
    block = (*drafter, "block_layers")
    taught = ("tokenizer", "target", "text")
    weights = ("weights.pt",)
    return {
        "corpus": Stage((), ("packages",), ("corpus.json",), found.corpus),
        "tokenizer": Stage(("corpus",), ("merges",), ("merges.json", "tokens.npz"), found.tokenizer),
        "target": Stage(("tokenizer",), (*model, "mixture", "target_batch", "target_seconds"), weights, found.target, wide=True),
        "text": Stage(
            ("tokenizer", "target"), (*model, "mixture", "prompt", "sequences", "evaluated"), ("text.npz",), found.text, wide=True
        ),
        "draft_model": Stage(taught, (*drafter, "draft_model", "drafter_seconds"), weights, found.draft_model),
        "mtp": Stage(taught, (*drafter, "drafter_seconds"), weights, found.mtp),
        "block": Stage(taught, (*block, "drafter_seconds"), weights, found.block),
        "dspark": Stage(taught, (*block, "rank", "drafter_seconds", "head_seconds"), weights, found.dspark),
        **{
            f"head_{kind}": Stage(
                (*taught, "dspark"), (*block, "head_seconds"), weights, lambda context, kind=kind: found.head(context, kind)
            )
            for kind in ("vanilla", "gated", "rnn")
        },
        "pack": Stage(
            ("corpus", "tokenizer", "target", "draft_model", "mtp", "block", "dspark", "head_vanilla", "head_gated", "head_rnn"),
            ("prompt", "prompts"),
            tuple(f"{name}.npz" for name in found.SHIPPED) + ("merges.json", "prompts.json", "domains.json", "build.json"),
            found.pack,
        ),
        "rounds": Stage(("pack",), ("rounds_stride", "texts"), ("rounds.json",), found.rounds),
        "report": Stage(("pack", "rounds"), ("report_prompts", "report_tokens"), ("systems.json",), found.report),
    }


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def inputs_of(name: str, stage: Stage, context: Context) -> str:
    """Hash of all that decides what a stage writes; KeyError where a stage before it is not done."""
    read = {
        "stage": name,
        "seed": context.seed,
        "settings": {key: dataclasses.asdict(context.plan)[key] for key in stage.reads},
        "steps": context.recorded.get(name),
        "outputs": {need: json.loads((context.folder(need) / "done.json").read_text())["outputs"] for need in stage.needs},
    }
    return hashlib.sha256(json.dumps(read, sort_keys=True).encode()).hexdigest()


def is_done(name: str, stage: Stage, context: Context) -> bool:
    try:
        done = json.loads((context.folder(name) / "done.json").read_text())
        return done["inputs"] == inputs_of(name, stage, context)
    except (OSError, ValueError, KeyError):
        return False


def run_stage(name: str, stage: Stage, context: Context) -> None:
    """Run, or go on with, one stage whose inputs are there."""
    import torch

    torch.set_num_threads(context.threads if stage.wide else 1)
    folder, inputs = context.folder(name), inputs_of(name, stage, context)
    begun = folder / "begun.json"
    if not begun.is_file() or json.loads(begun.read_text()) != inputs:
        shutil.rmtree(folder, ignore_errors=True)  # what is there was made from something else
        folder.mkdir(parents=True)
        begun.write_text(json.dumps(inputs))
    wall, cpu = time.monotonic(), time.process_time()
    print(f"{name}: begins", flush=True)
    facts = stage.run(context)
    record = {
        "inputs": inputs,
        "outputs": {file: sha256(folder / file) for file in stage.outputs},
        "wall_seconds": round(time.monotonic() - wall, 1),  # of this run: less than all where it was resumed
        "cpu_seconds": round(time.process_time() - cpu, 1),
        **facts,
    }
    (folder / "done.json").write_text(json.dumps(record, indent=1) + "\n")
    told = {key: value for key, value in record.items() if key not in ("inputs", "outputs", "held_out")}
    print(f"{name}: done, {json.dumps(told)}", flush=True)


def run_all(context: Context, arguments: Sequence[str]) -> int:
    """Every stage in a process of its own, as many at once as there are threads to give; the first failure ends it.

    What they print is appended to build.log.
    """
    running: dict[str, _Running] = {}
    with open(context.out / "build.log", "a", encoding="utf-8") as log:
        try:
            return _run_all(context, arguments, running, log)
        finally:
            for stage in running.values():
                stage.process.terminate()
                stage.ended()


@dataclasses.dataclass(frozen=True)
class _Running:
    """A stage's process, the thread that copies what it prints, and how many threads it was given."""

    process: subprocess.Popen
    copying: threading.Thread
    threads: int

    def ended(self) -> int:
        status = self.process.wait()
        self.copying.join(10)  # a process of its own that it left behind may hold the pipe
        return status


def _say(text: str, log) -> None:
    print(text, flush=True)
    log.write(text + "\n")
    log.flush()


def _copy(process: subprocess.Popen, log) -> None:
    for line in process.stdout:
        _say(line.rstrip("\n"), log)


def _run_all(context: Context, arguments: Sequence[str], running: dict, log) -> int:
    todo = dict(stages())
    while todo or running:
        for name, stage in list(todo.items()):
            if any(need in todo or need in running for need in stage.needs):
                continue
            if is_done(name, stage, context):
                _say(f"{name}: done before", log)
                del todo[name]
                break
            threads = context.threads if stage.wide else 1
            if threads + sum(other.threads for other in running.values()) <= context.threads:
                line = [sys.executable, "-m", "bench.assets.build", *arguments, "--only", name]
                # Waiting threads that spin would be counted as work.
                environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "passive"}
                # In a session of its own: Ctrl-C is for this process, which then ends the stages.
                process = subprocess.Popen(line, env=environment, stdout=subprocess.PIPE, text=True, start_new_session=True)
                copying = threading.Thread(target=_copy, args=(process, log), daemon=True)
                copying.start()
                running[name] = _Running(process, copying, threads)
                del todo[name]
                break
        else:
            time.sleep(0.2)
            for name, stage in list(running.items()):
                if stage.process.poll() is None:
                    continue
                del running[name]
                if stage.ended():
                    print(f"bench.assets.build: stage {name} failed; the same command goes on from here", file=sys.stderr)
                    return 1
    return 0


def install(out: Path) -> None:
    """Finished files over those in bench/assets, record and measurements over those in bench/results, tables into README.md."""
    from bench.shared import systems

    results = systems.RESULTS.parent
    for stage, to in (("pack", FOLDER), ("rounds", FOLDER), ("report", results)):
        done = json.loads((out / stage / "done.json").read_text())
        for file in done["outputs"]:
            shutil.copyfile(out / stage / file, (results if file == "build.json" else to) / file)
    shutil.copyfile(out / "build.log", results / "build.log")
    systems.write_readme(systems.load())
    print("installed; left to do: python -m bench.load --measure-cost --save-cost bench/assets/cost.json; python -m bench.plot")


def parser() -> command.Parser:
    p = command.Parser("bench.assets.build", __doc__)
    p.add_argument("--out", metavar="DIR", type=Path, required=True, help="where everything is written")
    p.add_argument("--quick", action="store_true", help="tiny sizes and budgets")
    cores = min(2, os.cpu_count() or 1)
    p.add_argument("--threads", type=int, default=cores, metavar="N", help="cores to use (default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, metavar="N", help="of all noise (default: %(default)s)")
    p.add_argument("--recorded", metavar="FILE", type=Path, help="a build.json: take the numbers of steps from it")
    p.add_argument("--no-compile", action="store_true", help="do without torch.compile")
    p.add_argument("--only", metavar="STAGE", help="run this stage")
    p.add_argument("--install", action="store_true", help="at the end, replace what bench/assets holds")
    return p


def check(arguments) -> None:
    """Read the numbers of steps to take. Raises BadArgument."""
    command.check_least("--threads", arguments.threads, 1)
    if arguments.install and arguments.quick:
        raise BadArgument("--install: expected without --quick, whose models are no good")
    if arguments.only is not None and arguments.only not in STAGES:
        raise BadArgument(f"--only: expected one of {', '.join(STAGES)}, got {arguments.only!r}")
    arguments.steps = {}
    if arguments.recorded is not None:
        try:
            found = json.loads(arguments.recorded.read_text())["stages"]
            arguments.steps = {stage: facts["steps"] for stage, facts in found.items() if "steps" in facts}
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            raise BadArgument(f"--recorded: expected a build.json, got {arguments.recorded}") from None


def main(argv: Sequence[str] | None = None) -> int:
    """0: done; 1: a stage failed; 2: a bad argument; 130: stopped."""
    argv = list(sys.argv[1:] if argv is None else argv)
    return command.run(parser, check, lambda arguments: build(arguments, argv), argv)


def build(arguments, argv: Sequence[str]) -> int:
    """argv: what the processes of single stages are given, too."""
    try:
        arguments.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BadArgument(f"--out: {arguments.out}: {error.strerror}") from None
    plan = QUICK if arguments.quick else FULL
    compiled = not (arguments.no_compile or arguments.quick)
    context = Context(arguments.out, plan, arguments.seed, arguments.threads, compiled, arguments.steps)
    if arguments.only is not None:
        found = stages()
        stage = found[arguments.only]
        missing = [need for need in stage.needs if not is_done(need, found[need], context)]
        if missing:
            raise BadArgument(f"--only: {arguments.only} needs {', '.join(missing)}, not done with these settings")
        if not is_done(arguments.only, stage, context):
            run_stage(arguments.only, stage, context)
        return 0
    print(f"Python {platform.python_version()}, {arguments.threads} threads", flush=True)
    begun = time.monotonic()
    status = run_all(context, [argument for argument in argv if argument != "--install"])
    if status == 0:
        print(f"all done in {(time.monotonic() - begun) / 60:.1f} minutes", flush=True)
        if arguments.install:
            install(arguments.out)
    return status


if __name__ == "__main__":
    sys.exit(main())
