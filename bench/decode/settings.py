"""Defaults of bench.decode, and refusals of impossible arguments."""

from __future__ import annotations

import importlib.util
import json
import math
from pathlib import Path

from bench.shared.command import BadArgument, check_above_zero, check_file, check_least
from bench.shared.source import literal

SYSTEMS = literal("bench.decode.systems", "SYSTEMS")
SUFFIX, MAX_NODES = (literal("bench.decode.trees", name) for name in ("SUFFIX", "MAX_NODES"))
PACES = literal("bench.decode.replay", "PACES")
RULES, POLICIES = literal("reference.loop", "RULES"), literal("reference.schedule", "POLICIES")

DEFAULTS = dict(max_new_tokens=64, num_prompts=16, batch_size=8, temperature=[1.0, 0.0], confidence_threshold=[0.0, 0.3])
INTERPRETED = dict(max_new_tokens=32, num_prompts=4, tree_nodes=[16])  # with --kernels on a CPU
# With --live: a text that fits a screen, the same in both columns, and requests one by one, so that a round's time is its own.
LIVE = dict(max_new_tokens=128, num_prompts=1, batch_size=1, temperature=[0.0], confidence_threshold=[0.0])
LIVE_SYSTEMS, LIVE_PACE, LIVE_SECONDS = ["autoregressive", "dspark"], "measured", 12.0


def check(arguments) -> None:
    """Fill in defaults. Raises BadArgument for impossible arguments."""
    a = arguments
    slow = a.kernels and a.device.startswith("cpu")
    _check_live(a, slow)
    defaults = DEFAULTS | LIVE if a.live else DEFAULTS | INTERPRETED if slow else DEFAULTS
    a.temperature = defaults["temperature"] if a.temperature is None else list(dict.fromkeys(a.temperature))
    if a.confidence_threshold is None:
        a.confidence_threshold = defaults["confidence_threshold"]
    a.confidence_threshold = list(dict.fromkeys(a.confidence_threshold))
    if a.batch_size is None:
        a.batch_size = defaults["batch_size"]
    if a.num_prompts is None and a.prompts is None:
        a.num_prompts = defaults["num_prompts"]
    if a.max_new_tokens is None:
        a.max_new_tokens = defaults["max_new_tokens"]
    if a.tree_nodes is None:
        a.tree_nodes = defaults.get("tree_nodes")
    for name, value in (("num-prompts", a.num_prompts), ("max-new-tokens", a.max_new_tokens), ("batch-size", a.batch_size)):
        check_least(f"--{name}", value, 1)
    for value in a.temperature:
        if not (math.isfinite(value) and value >= 0):
            raise BadArgument(f"--temperature: expected a number of at least 0, got {value:g}")
    for value in a.confidence_threshold:
        if not 0 <= value <= 1:
            raise BadArgument(f"--confidence-threshold: expected a number from 0 to 1, got {value:g}")
    for value in a.tree_nodes or ():
        if not 2 <= value <= MAX_NODES:
            raise BadArgument(f"--tree-nodes: expected 2 to {MAX_NODES}, got {value}")
    if not -(1 << 31) <= a.seed < 1 << 31:
        raise BadArgument(f"--seed: expected a 32-bit integer, got {a.seed}")
    if a.systems is not None:
        a.systems = [name.strip() for name in a.systems.split(",")]
        for name in a.systems:
            if name not in SYSTEMS:
                raise BadArgument(f"--systems: expected names among {', '.join(SYSTEMS)}, got {name!r}")
            if a.transformers and name.endswith(SUFFIX):
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
    check_file("--out", a.out)
    if a.prompts is not None:
        a.prompts = prompts_of(a.prompts)


def _check_live(a, slow: bool) -> None:
    """Arguments of --live, and which systems it needs. Raises BadArgument."""
    if not a.live:
        for name, value in (("pace", a.pace), ("seconds", a.seconds)):
            if value is not None:
                raise BadArgument(f"--{name}: expected together with --live")
        return
    if slow:
        raise BadArgument("--live: expected without --kernels on a CPU, the interpreter's times say nothing")
    if a.batch_size not in (None, 1):
        raise BadArgument(f"--batch-size: expected 1 with --live, which shows the times of single requests, got {a.batch_size}")
    check_above_zero("--seconds", a.seconds)
    if importlib.util.find_spec("rich") is None:
        raise BadArgument("--live: needs rich, which is not installed (pip install dspark_kernels[live])")
    if a.systems is None and a.model is None:
        a.systems = ",".join(LIVE_SYSTEMS)
    a.pace = a.pace or LIVE_PACE
    a.seconds = a.seconds or LIVE_SECONDS


def prompts_of(path: str) -> list:
    """The prompts of a file, text or ids: a JSON list, or a text that is one prompt. Raises BadArgument."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise BadArgument(f"--prompts: {path}: {error.strerror}") from None
    except ValueError:
        raise BadArgument(f"--prompts: {path}: expected text in UTF-8, got other bytes") from None
    if Path(path).suffix.lower() != ".json" and not text.lstrip().startswith("["):
        if not text.strip():
            raise BadArgument(f"--prompts: {path}: expected a text, got an empty file")
        return [text]
    try:
        prompts = json.loads(text)
    except ValueError as error:
        if Path(path).suffix.lower() != ".json":
            return [text]
        raise BadArgument(f"--prompts: {path}: expected JSON, got a file that does not parse ({error})") from None
    if not isinstance(prompts, list) or not prompts:
        raise BadArgument(f"--prompts: {path}: expected a JSON list with at least one prompt")
    return prompts
