"""Compare ways of decoding on real text: plain, speculative with a draft model, MTP, blockwise parallel, DSpark.

All systems run the same loop, target, prompts and sampling; only the drafter differs, or that it drafts a tree, of nodes that are
chosen and walked or of nodes that are drawn ("sampled"), beside the chain that verifies as many rows. Without arguments the
embedded demo models continue held-out Python source. A table per temperature, then whether each system's output is the target's
own. What a checkpoint holds: python -m bench.inspect DIR.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from types import SimpleNamespace

import torch

from bench import assets, lossless, trees
from bench.models import DTYPES, BadArgument, Models, first_line, load, naming
from bench.shared import summary
from bench.shared.parity import CheckedOps
from dspark_kernels.types import CostTable
from reference.drafters import Autoregressive, Drafter, TreeShape
from reference.loop import RULES, Generation, Request, decode
from reference.schedule import POLICIES

SYSTEMS = ("autoregressive", "draft-model", "mtp", "mtp-tree", "block", "block-tree", "dspark", "dspark-tree")
DEFAULTS = dict(max_new_tokens=64, num_prompts=16, batch_size=8, temperature=[1.0, 0.0], confidence_threshold=[0.0, 0.3])
INTERPRETED = dict(max_new_tokens=32, num_prompts=4, tree_nodes=[16])  # with --kernels on a CPU


@dataclasses.dataclass(frozen=True)
class System:
    """A row of the table."""

    name: str  # one of SYSTEMS
    source: str
    drafter: Drafter
    threshold: float = 0.0
    cost: CostTable | None = None  # schedule by measured times, instead of a threshold
    drafts: int | None = None  # per round, where not all that the drafter makes
    tree: TreeShape | None = None
    ops: object = None  # None: the reference's

    @property
    def label(self) -> str:
        label = self.name + (f", {self.source}" if self.source else "")
        label += f", {self.drafts} drafts" if self.drafts is not None else ""
        label += f", {self.tree.num_nodes} nodes" if self.tree is not None else ""
        label += ", sampled" if trees.sampled(self.tree) else ""
        label += f", threshold {self.threshold:g}" if self.threshold else ""
        return label + (", scheduled" if self.cost is not None else "") + (", kernels" if self.ops else "")


@dataclasses.dataclass(frozen=True)
class Run:
    """A system's generations at one temperature."""

    system: System
    temperature: float
    generations: list[Generation]


def parser() -> argparse.ArgumentParser:
    text = "\n".join(__doc__.splitlines()[2:]) + "\n\ncolumns:\n" + summary.legend()
    p = argparse.ArgumentParser(
        prog="python -m bench.decode",
        description=__doc__.splitlines()[0],
        epilog=text,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    models = p.add_argument_group("models")
    models.add_argument(
        "--model", "--target", metavar="DIR",
        help="target checkpoint (Qwen3ForCausalLM; any causal language model with --transformers; default: the embedded one)",
    )  # fmt: skip
    models.add_argument(
        "--transformers", action="store_true",
        help="run the target by its own class of Hugging Face transformers (pip install dspark_kernels[transformers])",
    )  # fmt: skip
    models.add_argument(
        "--drafter", metavar="DIR", action="append", default=[],
        help="drafter checkpoint for --model: Qwen3DSparkModel, Gemma4DSparkModel, DFlashDraftModel, or Qwen3ForCausalLM as draft"
        " model (repeatable)",
    )  # fmt: skip
    models.add_argument("--device", default="cpu", help="where the models run (default: %(default)s)")
    models.add_argument("--dtype", choices=DTYPES, default="float32", help="what they compute in (default: %(default)s)")
    work = p.add_argument_group("what is decoded")
    work.add_argument(
        "--prompts", metavar="FILE",
        help="JSON list of token-id lists, or of strings where the model has a tokenizer (default: embedded text)",
    )  # fmt: skip
    work.add_argument(
        "--chat", action="store_true",
        help="strings are a user's messages: the model's chat template is put around them (needs transformers; a list of objects"
        " with role and content is a conversation)",
    )  # fmt: skip
    work.add_argument("--thinking", action="store_true", help="what --chat tells a template that knows enable_thinking")
    work.add_argument(
        "--ignore-stop-tokens", action="store_true",
        help="go on to --max-new-tokens (default: end at what the model's generation_config.json names, or with --chat its"
        " tokenizer)",
    )  # fmt: skip
    work.add_argument(
        "--num-prompts", type=int, metavar="N",
        help=f"use the first N (default: {DEFAULTS['num_prompts']}, with --kernels on a CPU {INTERPRETED['num_prompts']}; all of"
        " --prompts)",
    )  # fmt: skip
    work.add_argument(
        "--max-new-tokens", type=int, metavar="N",
        help=f"default: {DEFAULTS['max_new_tokens']}, with --kernels on a CPU {INTERPRETED['max_new_tokens']}",
    )  # fmt: skip
    work.add_argument("--temperature", type=float, action="append", metavar="T", help="0 is greedy (repeatable; default: 1 and 0)")
    work.add_argument("--seed", type=int, default=0, help="of all noise (default: %(default)s)")
    how = p.add_argument_group("how")
    how.add_argument(
        "--systems", metavar="NAME[,NAME]",
        help=f"any of {', '.join(SYSTEMS)} (default: all there are; of --model, trees only where named)",
    )  # fmt: skip
    how.add_argument("--rule", choices=RULES, default="token", help="acceptance rule of chains (default: %(default)s)")
    how.add_argument(
        "--tree-nodes", type=int, action="append", metavar="M",
        help="nodes of trees, the anchor included (repeatable; default: 16, of dspark-tree 16 and 32, with --kernels on a CPU 16)",
    )  # fmt: skip
    how.add_argument(
        "--confidence-threshold", type=float, action="append", metavar="T",
        help="of dspark: 0 verifies the whole block, T up to the first draft whose confidence is below T"
        " (repeatable, a row each; default: 0 and 0.3)",
    )  # fmt: skip
    how.add_argument(
        "--cost", metavar="FILE",
        help="a row of dspark scheduled by these times of a step (JSON of CostTable.save; default: measured ones of the embedded"
        " models on two CPU cores, none with --model)",
    )  # fmt: skip
    how.add_argument("--policy", choices=POLICIES, default="causal", help="how that row is scheduled (default: %(default)s)")
    how.add_argument(
        "--batch-size", type=int, metavar="N", default=DEFAULTS["batch_size"], help="requests at once (default: %(default)s)"
    )
    how.add_argument(
        "--kernels", action="store_true",
        help="run dspark and trees through the Triton ops too, and compare with the reference (on a CPU: in Triton's interpreter)",
    )  # fmt: skip
    out = p.add_argument_group("output")
    out.add_argument("--json", metavar="FILE", help="write output_ids, acceptance_lengths and proposal_lengths of every run")
    out.add_argument(
        "--show", action="store_true", help="print the texts of the last system: accepted drafts green, the target's own red"
    )
    return p


def check(arguments) -> None:
    """Fill in defaults and refuse what cannot be. Raises BadArgument."""
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
    if a.json is not None:
        path = Path(a.json)
        if path.is_dir() or not path.resolve().parent.is_dir():
            raise BadArgument(f"--json: expected a file in a directory that exists, got {a.json}")
    try:
        torch.empty(1, device=a.device)
    except Exception as error:  # torch has a different exception for every kind of device it lacks
        raise BadArgument(f"--device: expected one that torch has here, got {a.device!r} ({first_line(error)})") from None


def read_prompts(arguments, models: Models) -> list[list[int]]:
    """Token ids of every prompt. Raises BadArgument."""
    if arguments.prompts is None:
        prompts = assets.prompts()
        if models.encode is None:
            raise BadArgument(
                "--prompts: expected a JSON list of token-id lists, for --model has no tokenizer.json that can be read"
                " (reading one needs: pip install tokenizers)"
            )
    else:
        try:
            prompts = json.loads(Path(arguments.prompts).read_text(encoding="utf-8"))
        except OSError as error:
            raise BadArgument(f"--prompts: {arguments.prompts}: {error.strerror}") from None
        except ValueError as error:
            raise BadArgument(f"--prompts: {arguments.prompts}: expected JSON, got a file that does not parse ({error})") from None
        if not isinstance(prompts, list) or not prompts:
            raise BadArgument(f"--prompts: {arguments.prompts}: expected a JSON list with at least one prompt")
    count = arguments.num_prompts
    if count is not None and count > len(prompts):
        raise BadArgument(f"--num-prompts: expected at most {len(prompts)}, which is all there are, got {count}")
    vocab = models.target.shape.vocab
    result = []
    for index, prompt in enumerate(prompts[:count]):
        if arguments.chat and isinstance(prompt, str):
            prompt = [{"role": "user", "content": prompt}]
        if arguments.chat and isinstance(prompt, list) and prompt and all(isinstance(turn, dict) for turn in prompt):
            with naming("--prompts", f"prompt {index}: "):
                prompt = models.chat(prompt)
        if isinstance(prompt, str):
            if models.encode is None:
                raise BadArgument(f"--prompts: prompt {index} is text, but the model has no tokenizer that can be read")
            prompt = models.encode(prompt)
        if not isinstance(prompt, list) or not prompt or not all(type(t) is int and 0 <= t < vocab for t in prompt):
            raise BadArgument(f"--prompts: prompt {index}: expected text or a list of ids from 0 to {vocab - 1}, at least one")
        result.append(prompt)
    return result


def kernel_ops(device: str):
    """The Triton ops in the shape the loop takes; on a CPU in Triton's interpreter. Raises BadArgument."""
    if torch.device(device).type == "cpu":
        from dspark_kernels.testing import interpreter

        with naming("--kernels"):
            interpreter.repair()
    import dspark_kernels as dk

    return SimpleNamespace(
        draft_block=dk.draft_block,
        fixed_layout=dk.fixed_layout,
        accept_chain=dk.accept_chain,
        schedule_prefixes=dk.schedule_prefixes,
        draft_tree=dk.draft_tree,
        expand_tree=dk.expand_tree,
        tree_layout=dk.tree_layout,
        accept_tree=dk.accept_tree,
        compact_kv=dk.compact_kv,
        plan_attention=dk.plan_attention,
        tree_attention=dk.tree_attention,
    )


def systems_of(arguments, models: Models) -> list[System]:
    """Rows of the table. Raises BadArgument."""
    there = ["autoregressive"]
    for name, _, _ in models.drafters:
        there += [name, name + trees.SUFFIX] if name + trees.SUFFIX in trees.NODES else [name]
    wanted = arguments.systems
    if wanted is None:
        wanted = [name for name in there if arguments.model is None or not name.endswith(trees.SUFFIX)]
    for name in wanted:
        if name not in there:
            known = ", ".join(dict.fromkeys(there))
            raise BadArgument(f"--systems: expected names among {known} (with these models), got {name!r}")
    systems = [System("autoregressive", "", Autoregressive())] if "autoregressive" in wanted else []
    ops = kernel_ops(arguments.device) if arguments.kernels else None
    for name, source, make in models.drafters:
        if name not in wanted and name + trees.SUFFIX not in wanted:
            continue
        drafter = make()
        if name in wanted:
            thresholds = arguments.confidence_threshold if name == "dspark" else [0.0]
            if any(thresholds) and not drafter.has_confidence:
                thresholds = [0.0]
            rows = [System(name, source, drafter, threshold) for threshold in thresholds]
            if drafter.has_confidence and models.cost is not None:
                rows.append(System(name, source, drafter, cost=models.cost))
            systems += rows
            if ops is not None and (name == "dspark" or name + trees.SUFFIX in wanted):
                systems += [dataclasses.replace(row, ops=ops) for row in rows]
        if name + trees.SUFFIX in wanted:
            systems += _tree_systems(arguments, name, source, drafter, ops)
    if arguments.cost is not None and not any(system.cost is not None for system in systems):
        raise BadArgument("--cost: expected a drafter with a confidence head among the systems, there is none")
    if arguments.kernels and not any(system.ops for system in systems):
        raise BadArgument("--kernels: expected dspark among the systems, or a tree, there is none")
    return systems


def _tree_systems(arguments, name: str, source: str, drafter: Drafter, ops) -> list[System]:
    """Rows of a drafter's trees, each below the chain that verifies as many rows; through the kernels, too."""
    systems = []
    for num_nodes in dict.fromkeys(arguments.tree_nodes or trees.NODES[name + trees.SUFFIX]):
        chain = trees.chain(drafter, num_nodes)
        if chain is not None:
            systems.append(System(name, source, chain[0], drafts=chain[1]))
        for shape in trees.shapes(drafter, num_nodes):
            if arguments.tree_nodes is not None or not trees.sampled(shape) or num_nodes <= trees.SAMPLED_NODES.get(name, 0):
                systems.append(System(name + trees.SUFFIX, source, drafter, tree=shape))
    return systems + ([dataclasses.replace(row, ops=ops) for row in systems] if ops is not None else [])


class Progress:
    """Bar of output tokens on stderr, where tqdm is installed and somebody watches."""

    def __init__(self, total: int):
        self._bar = None
        try:
            from tqdm import tqdm
        except ImportError:
            return
        self._bar = tqdm(total=total, unit="tok", leave=False, disable=not sys.stderr.isatty())

    def start(self, label: str) -> None:
        if self._bar is not None:
            self._bar.set_description(label)

    def __call__(self, tokens: int) -> None:
        if self._bar is not None:
            self._bar.update(tokens)

    def close(self) -> None:
        if self._bar is not None:
            self._bar.close()


def run_all(arguments, models: Models, systems: Sequence[System], prompts: Sequence[list[int]]) -> list[Run]:
    """Every system at every temperature."""
    # Greedy, what is drawn is chosen: such a tree would be another row of the same.
    rows = [(s, t) for t in arguments.temperature for s in systems if t > 0 or not trees.sampled(s.tree)]
    progress = Progress(len(rows) * len(prompts) * arguments.max_new_tokens)
    runs = []
    for system, temperature in rows:
        progress.start(f"{system.label}, T = {temperature:g}")
        run = _prepared(arguments, models, system, temperature)
        if system.ops is None or not arguments.device.startswith("cpu"):  # nobody reads the interpreter's times
            run(prompts[:1], 2 * system.drafter.max_drafts + 2)  # first calls set threads and memory up; not timed
        runs.append(Run(system, temperature, run(prompts, arguments.max_new_tokens, progress)))
    progress.close()
    return runs


def _prepared(arguments, models: Models, system: System, temperature: float):
    """decode(...) with all but prompts and length filled in."""

    def run(prompts, max_new_tokens, progress=None):
        requests = [
            Request(prompt, max_new_tokens, temperature, arguments.seed << 32 | index, models.stop_tokens)
            for index, prompt in enumerate(prompts)
        ]
        return decode(
            models.target,
            system.drafter,
            requests,
            rule=arguments.rule,
            max_drafts=system.drafts,
            confidence_threshold=system.threshold,
            cost=system.cost,
            policy=arguments.policy,
            tree=system.tree,
            ops=system.ops,
            batch_size=arguments.batch_size,
            progress=progress,
        )

    return run


def verdicts(arguments, models: Models, runs: Sequence[Run], prompts) -> list[tuple[str, lossless.Verdict]]:
    """Every run against plain decoding at its temperature, and runs of kernels against the reference's."""
    found = []
    exact = None
    for run in runs:
        plain = next((r for r in runs if r.system.name == "autoregressive" and r.temperature == run.temperature), None)
        label = f"{run.system.label}, T = {run.temperature:g}"
        if plain is not None and plain is not run:
            if run.temperature > 0:
                verdict = lossless.sampled(run.generations, plain.generations)
            else:
                exact = exact or models.exact()
                verdict = lossless.greedy(run.generations, plain.generations, models.target, exact)
            found.append((label, verdict))
        if run.system.ops is not None:
            reference = next(
                r for r in runs if r.temperature == run.temperature and r.system == dataclasses.replace(run.system, ops=None)
            )
            found.append((f"{label} against the reference", _same(arguments, models, run, reference, prompts)))
    return found


def _same(arguments, models: Models, run: Run, reference: Run, prompts) -> lossless.Verdict:
    """Kernels against the reference: the same tokens and lengths in every round, or call by call up to near ties."""
    keys = ("output_ids", "acceptance_lengths", "proposal_lengths")
    pairs = list(zip(run.generations, reference.generations, strict=True))
    parted = [index for index, (have, want) in enumerate(pairs) if any(getattr(have, k) != getattr(want, k) for k in keys)]
    rounds = sum(len(g.acceptance_lengths) for g in run.generations)
    text = f"{len(pairs)} requests, {rounds} rounds: "
    if not parted:
        return lossless.Verdict(True, text + "all tokens and lengths identical")
    # A rounding in a stored proposal or a near tie leads to another text. Decoding again, every call on the same inputs.
    checked = CheckedOps(run.system.ops)
    try:
        _prepared(arguments, models, dataclasses.replace(run.system, ops=checked), run.temperature)(
            prompts, arguments.max_new_tokens
        )
    except AssertionError as error:
        return lossless.Verdict(False, f"{text}{len(parted)} requests differ, and a call does: {first_line(error)}")
    return lossless.Verdict(True, f"{text}{len(parted)} part at roundings; each of {checked.calls} calls equal up to near ties")


def as_json(arguments, runs: Sequence[Run], prompts) -> dict:
    keys = ("output_ids", "acceptance_lengths", "proposal_lengths")
    return {
        "model": arguments.model or "embedded",
        "rule": arguments.rule,
        "max_new_tokens": arguments.max_new_tokens,
        "seed": arguments.seed,
        "runs": [
            {
                "system": run.system.name,
                "drafter": run.system.source or None,
                "temperature": run.temperature,
                "confidence_threshold": run.system.threshold,
                "policy": None if run.system.cost is None else arguments.policy,
                "max_drafts": run.system.drafts,
                "tree": None if run.system.tree is None else dataclasses.asdict(run.system.tree),
                "kernels": run.system.ops is not None,
                **{
                    key: (None if isinstance(value, float) and math.isnan(value) else value)
                    for key, value in dataclasses.asdict(summary.Summary.of(run.generations)).items()
                },
                "prompts": [{key: getattr(g, key) for key in keys} for g in run.generations],
            }
            for run in runs
        ],
    }


def show(run: Run, models: Models, prompts: Sequence[list[int]]) -> str:
    """Texts with accepted drafts and the target's own tokens told apart: by colour, or by brackets where there is none."""
    coloured = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    paint = {True: ("\033[32m", "\033[0m"), False: ("\033[1;31m", "\033[0m")} if coloured else {True: ("", ""), False: ("[", "]")}
    parts = [f"{run.system.label}, T = {run.temperature:g}: accepted drafts " + ("green" if coloured else "plain")]
    parts[0] += ", the target's own tokens " + ("red" if coloured else "in brackets")
    for prompt, generation in zip(prompts, run.generations, strict=True):
        text = ["-" * 80, "\n", models.decode(prompt), "|"]
        for token, accepted in zip(generation.output_ids[len(prompt) :], generation.accepted, strict=True):
            start, end = paint[accepted]
            text.append(start + models.decode([token]) + end)
        parts.append("".join(text))
    return "\n".join(parts)


def main(argv: Sequence[str] | None = None) -> int:
    """0: done and lossless; 1: a system's output is not the target's; 2: a bad argument."""
    arguments = parser().parse_args(argv)
    try:
        check(arguments)
        if arguments.kernels and torch.device(arguments.device).type == "cpu":
            os.environ["TRITON_INTERPRET"] = "1"  # read when Triton is imported, which a target's own class may do
        models = load(arguments)
        prompts = read_prompts(arguments, models)
        systems = systems_of(arguments, models)
        torch.manual_seed(0)
        runs = run_all(arguments, models, systems, prompts)
    except BadArgument as error:
        print(f"bench.decode: {error}", file=sys.stderr)
        return 2
    print(
        f"{len(prompts)} prompts, up to {arguments.max_new_tokens} new tokens each, batches of {arguments.batch_size}, rule"
        f" {arguments.rule}, {arguments.dtype} on {arguments.device}"
    )
    for temperature in arguments.temperature:
        rows = [
            summary.row(run.system.label, summary.Summary.of(run.generations)) for run in runs if run.temperature == temperature
        ]
        print(f"\n{summary.table(f'T = {temperature:g}', rows)}")
    judged = verdicts(arguments, models, runs, prompts)
    if judged:
        print("\nlossless:")
        width = max(len(label) for label, _ in judged)
        for label, verdict in judged:
            print(f"  {'ok ' if verdict.passed else 'NOT'}  {label.ljust(width)}  {verdict.text}")
    if arguments.show:
        print()
        print(show(runs[-1], models, prompts))
    if arguments.json is not None:
        Path(arguments.json).write_text(json.dumps(as_json(arguments, runs, prompts)) + "\n")
    return 0 if all(verdict.passed for _, verdict in judged) else 1


if __name__ == "__main__":
    sys.exit(main())
