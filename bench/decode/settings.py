"""Defaults of bench.decode, and refusals of impossible arguments."""

from __future__ import annotations

import math
from pathlib import Path

import torch

from bench.decode import trees
from bench.decode.systems import SYSTEMS
from bench.shared.arguments import BadArgument, first_line

DEFAULTS = dict(max_new_tokens=64, num_prompts=16, batch_size=8, temperature=[1.0, 0.0], confidence_threshold=[0.0, 0.3])
INTERPRETED = dict(max_new_tokens=32, num_prompts=4, tree_nodes=[16])  # with --kernels on a CPU


def check(arguments) -> None:
    """Fill in defaults. Raises BadArgument for impossible arguments."""
    a = arguments
    a.temperature = DEFAULTS["temperature"] if a.temperature is None else list(dict.fromkeys(a.temperature))
    if a.confidence_threshold is None:
        a.confidence_threshold = DEFAULTS["confidence_threshold"]
    a.confidence_threshold = list(dict.fromkeys(a.confidence_threshold))
    slow = a.kernels and a.device.startswith("cpu")
    defaults = DEFAULTS | INTERPRETED if slow else DEFAULTS
    if a.num_prompts is None and a.prompts is None:
        a.num_prompts = defaults["num_prompts"]
    if a.max_new_tokens is None:
        a.max_new_tokens = defaults["max_new_tokens"]
    if a.tree_nodes is None:
        a.tree_nodes = defaults.get("tree_nodes")
    for name, value in (("num-prompts", a.num_prompts), ("max-new-tokens", a.max_new_tokens), ("batch-size", a.batch_size)):
        if value is not None and value < 1:
            raise BadArgument(f"--{name}: expected at least 1, got {value}")
    for value in a.temperature:
        if not (math.isfinite(value) and value >= 0):
            raise BadArgument(f"--temperature: expected a number of at least 0, got {value:g}")
    for value in a.confidence_threshold:
        if not 0 <= value <= 1:
            raise BadArgument(f"--confidence-threshold: expected a number from 0 to 1, got {value:g}")
    for value in a.tree_nodes or ():
        if not 2 <= value <= trees.MAX_NODES:
            raise BadArgument(f"--tree-nodes: expected 2 to {trees.MAX_NODES}, got {value}")
    if not -(1 << 31) <= a.seed < 1 << 31:
        raise BadArgument(f"--seed: expected a 32-bit integer, got {a.seed}")
    if a.systems is not None:
        a.systems = [name.strip() for name in a.systems.split(",")]
        for name in a.systems:
            if name not in SYSTEMS:
                raise BadArgument(f"--systems: expected names among {', '.join(SYSTEMS)}, got {name!r}")
            if a.transformers and name.endswith(trees.SUFFIX):
                raise BadArgument(f"--systems: expected no {name} with --transformers, whose classes have no tree mask")
    if a.drafter and a.model is None:
        raise BadArgument("--drafter: expected together with --model, the embedded target has drafters of its own")
    for name, given in (("transformers", a.transformers), ("chat", a.chat)):
        if given and a.model is None:
            raise BadArgument(f"--{name}: expected together with --model, the embedded target is no such model")
    if a.thinking and not a.chat:
        raise BadArgument("--thinking: expected together with --chat")
    if a.kernels and a.rule != "token":
        raise BadArgument(f"--kernels: expected --rule token, the ops have no {a.rule!r} yet")
    if a.out is not None:
        path = Path(a.out)
        if path.is_dir() or not path.resolve().parent.is_dir():
            raise BadArgument(f"--out: expected a file in a directory that exists, got {a.out}")
    try:
        torch.empty(1, device=a.device)
    except Exception as error:  # torch has a different exception for every kind of device it lacks
        raise BadArgument(f"--device: expected one that torch has here, got {a.device!r} ({first_line(error)})") from None
