"""What bench.decode does once its arguments are known: load, decode with every system, print, compare, write."""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch

from bench.decode import live, replay
from bench.decode.models import load
from bench.decode.output import as_json, show
from bench.decode.prompts import read_prompts
from bench.decode.runs import run_all, verdicts
from bench.decode.systems import systems_of
from bench.shared import summary
from bench.shared.command import BadArgument, first_line


def run(arguments) -> int:
    """0: done and lossless; 1: a system's output is not the target's. Raises BadArgument."""
    try:
        torch.empty(1, device=arguments.device)
    except Exception as error:  # torch has a different exception for every kind of device it lacks
        device = repr(arguments.device)
        raise BadArgument(f"--device: expected one that torch has here, got {device} ({first_line(error)})") from None
    if arguments.kernels and torch.device(arguments.device).type == "cpu":
        os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which a target's own class may do
    models = load(arguments)
    prompts = read_prompts(arguments, models)
    systems = systems_of(arguments, models)
    pair = replay.pair(systems) if arguments.live else None
    torch.manual_seed(0)
    runs = run_all(arguments, models, systems, prompts)
    if pair is not None:
        live.show(replay.films(arguments, models, pair, runs, prompts))
    print(
        f"{len(prompts)} prompts, up to {arguments.max_new_tokens} new tokens each, batches of {arguments.batch_size}, rule"
        f" {arguments.rule}, {arguments.dtype} on {arguments.device}"
    )
    for temperature in arguments.temperature:
        rows = [
            summary.row(run.system.label, summary.Summary.of(run.generations)) for run in runs if run.temperature == temperature
        ]
        print(f"\n{summary.table(f'T = {temperature:g}', rows)}")
    checked = verdicts(arguments, models, runs, prompts)
    if checked:
        print("\nlossless:")
        width = max(len(label) for label, _ in checked)
        for label, verdict in checked:
            print(f"  {'ok ' if verdict.passed else 'NOT'}  {label.ljust(width)}  {verdict.text}")
    if arguments.show:
        print()
        print(show(runs[-1], models, prompts))
    if arguments.out is not None:
        Path(arguments.out).write_text(json.dumps(as_json(arguments, runs)) + "\n")
    return 0 if all(verdict.passed for _, verdict in checked) else 1
