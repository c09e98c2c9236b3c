"""The embedded systems side by side: tokens per round, acceptance by position, draft times, calibration across domains.

What each number is: bench/systems.py. The distributions of the drafters are computed here from base logits and head in plain
PyTorch; the reference is `reference.draft` with `reference.heads`. All but the times depends on the weights and seeds alone.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import assets
from bench.shared import acceptance, paths, summary
from dspark_kernels.calibration import fit_sts, reliability, survival
from dspark_kernels.types import DraftBlock, GatedMarkovHead, MarkovHead, OneHotProposal, RnnMarkovHead
from reference import loop
from reference.drafters import MTP, Anchors, Autoregressive, Block, Committed, Drafter, DraftModel, DSpark
from reference.model import Rows, Target

RESULTS = paths.RESULTS / "systems.json"
README = assets.FOLDER / "README.md"
FORMAT = "dspark_kernels systems"
SYSTEMS = {
    "draft-model": ("draft_model", DraftModel),
    "mtp": ("mtp", MTP),
    "block": ("block", Block),
    "dspark": ("dspark", DSpark),
    "dspark-gated": ("dspark_gated", DSpark),
    "dspark-rnn": ("dspark_rnn", DSpark),
}
DRAFTS = 7
TEMPERATURES = (1.0, 0.0)
STRIDE = 3  # tokens between two cuts, about what a round emits
BATCH = 8
SEED = 1


def drafters(target: Target, folder: Path = assets.FOLDER) -> dict[str, Drafter]:
    """Every drafter that is shipped, with up to 7 drafts a round."""
    found = {}
    for name, (file, kind) in SYSTEMS.items():
        if assets.there(file, folder):
            config, tensors = assets.weights(file, folder)
            step_wise = kind in (DraftModel, MTP)
            found[name] = kind(config | ({"max_drafts": DRAFTS} if step_wise else {}), tensors, target)
    return found


# --- decoding ---------------------------------------------------------------------------------------------------------


def decoded(
    target: Target, drafter: Drafter, prompts: Sequence[list[int]], new_tokens: int, temperature: float, domain: int
) -> list[loop.Generation]:
    """Generations of the prompts; a prompt's noise depends on its domain and number alone."""
    requests = [
        loop.Request(prompt, new_tokens, temperature, seed=(SEED << 8 | domain) << 16 | index)
        for index, prompt in enumerate(prompts)
    ]
    return loop.decode(target, drafter, requests, batch_size=BATCH)


def ratio(above: Sequence[float], below: Sequence[float]) -> tuple[float, float]:
    """Ratio of the sums, and its standard error from leaving out one at a time."""
    a, b = (torch.tensor(values, dtype=torch.float64) for values in (above, below))
    without = (a.sum() - a) / (b.sum() - b)
    spread = (len(a) - 1) / len(a) * (without - without.mean()).square().sum()
    return float(a.sum() / b.sum()), float(spread.sqrt())


def rollout(generations: list) -> dict:
    found = summary.Summary.of(generations)
    tokens = [sum(g.acceptance_lengths) for g in generations]
    tau, error = ratio(tokens, [len(g.acceptance_lengths) for g in generations])
    return {
        "rounds": sum(len(g.acceptance_lengths) for g in generations),
        "tau": round(tau, 4),
        "error": round(error, 4),
        "acceptance": [None if share != share else round(share, 4) for share in found.acceptance],
        "lengths": [g.acceptance_lengths for g in generations],
    }


# --- the text's own tokens as drafts ----------------------------------------------------------------------------------


def biases(
    head: MarkovHead | None, tokens: Tensor, hidden: Tensor | None, state: Tensor | None
) -> tuple[Tensor | float, Tensor | None]:
    """(bias [R, V], state) of the next position after `tokens` [R]. hidden: [R, d]."""
    if head is None:
        return 0.0, None
    latent = F.embedding(tokens, head.w1)
    if isinstance(head, GatedMarkovHead):
        latent = torch.sigmoid(F.linear(torch.cat([hidden, latent], -1), head.gate_weight, head.gate_bias)) * latent
    elif isinstance(head, RnnMarkovHead):
        state = torch.zeros_like(latent) if state is None else state
        joint = F.linear(torch.cat([state, latent, hidden], -1), head.joint_weight, head.joint_bias)
        gate, candidate, output = joint.chunk(3, -1)
        state = torch.sigmoid(gate) * state + (1 - torch.sigmoid(gate)) * torch.tanh(candidate)
        latent = torch.tanh(output)
    return F.linear(latent, head.w2), state


class PlainOps:
    """A draft op in plain PyTorch that keeps the logits: greedy, or, where `forced` [R, K] is given, these tokens."""

    def __init__(self):
        self.forced: Tensor | None = None
        self.logits: list[Tensor] = []  # [R, V] per draft

    def draft_block(self, base_logits, anchors, head=None, *, hidden=None, first_draft=0, state_indices=None, **_) -> DraftBlock:
        slots = state_indices.long()
        previous, state, tokens = anchors[slots], None, []
        for k in range(base_logits.shape[1]):
            bias, state = biases(head, previous, None if hidden is None else hidden[:, k], state)
            logits = base_logits[:, k] + bias
            self.logits.append(logits)
            previous = logits.argmax(-1) if self.forced is None else self.forced[:, first_draft + k]
            tokens.append(previous)
        placed = torch.full((anchors.shape[0], len(tokens)), -1)
        placed[slots] = torch.stack(tokens, 1)
        return DraftBlock(placed, OneHotProposal(), torch.zeros(len(slots), dtype=torch.int32))


def cuts(target: Target, drafter: Drafter, texts: Tensor, first: int, *, drafts: int = DRAFTS, stride: int = STRIDE) -> Iterator:
    """(logits [R, K, V], the target's logits [R, K, V], seconds of drafting) where the anchor stands at first, first + stride, ...

    texts: int64 [R, T]. drafts: at most the drafter's own number. Rows before the anchor are committed as in the loop; the drafts
    are the texts' own tokens.
    """
    count, length = texts.shape
    drafts = min(drafts, drafter.max_drafts)
    rows = Rows.of([(slot, 0, length) for slot in range(count)], target.device)
    output = target.forward(texts.flatten(), rows, target.new_cache(count), drafter.feature_layers)
    wanted = target.logits(output.hidden).view(count, length, -1)
    pre_norm = output.pre_norm.view(count, length, -1)
    features = None if output.features is None else output.features.view(count, length, -1)
    drafter.start(count)
    slots, done, ops = list(range(count)), 0, PlainOps()
    for anchor in range(first, length - drafts, stride):
        rows = Rows.of([(slot, done, anchor - done) for slot in slots], target.device)
        taken = slice(done, anchor)
        committed = Committed(
            rows,
            texts[:, taken].flatten(),
            texts[:, done + 1 : anchor + 1].flatten(),
            pre_norm[:, taken].flatten(0, 1),
            None if features is None else features[:, taken].flatten(0, 1),
        )
        anchors = Anchors.of(texts[:, anchor], torch.full((count,), anchor), slots)
        ops.forced, ops.logits = texts[:, anchor + 1 : anchor + 1 + drafts], []
        begun = time.process_time()
        drafter.commit(committed)
        drafter.propose(anchors, drafts=drafts, sampling=None, noise="draft", ops=ops)
        seconds = time.process_time() - begun
        yield torch.stack(ops.logits, 1), wanted[:, anchor : anchor + drafts], seconds
        done = anchor


@torch.inference_mode()
def accepted(target: Target, drafter: Drafter, texts: Tensor, first: int) -> Tensor:
    """Probability that draft k is accepted after the text's own tokens, fp64 [R, cuts, K]."""
    found = []
    for drafted, targeted, _ in cuts(target, drafter, texts, first):
        distance = (drafted.double().softmax(-1) - targeted.double().softmax(-1)).abs().sum(-1)
        found.append(1 - distance / 2)
    return torch.stack(found, 1)


def teacher_forced(probs: Tensor) -> dict:
    """probs: acceptance probabilities [R, cuts, K]."""
    reached = probs.cumprod(-1)
    by_text = (1 + reached.sum(-1)).mean(1)
    by_position = reached.mean((0, 1)).tolist()
    given = [now / before for now, before in zip(by_position, [1.0, *by_position], strict=False)]
    tau, error = ratio(by_text.tolist(), [1.0] * len(by_text))
    return {
        "cuts": probs.shape[0] * probs.shape[1],
        "tau": round(tau, 4),
        "error": round(error, 4),
        "acceptance": [round(share, 4) for share in given],
        "reached": [round(share, 4) for share in by_position],
        "by_text": [round(value, 5) for value in by_text.tolist()],
    }


@torch.inference_mode()
def draft_times(target: Target, found: dict[str, Drafter], text: Tensor, first: int) -> dict[str, list[float]]:
    """CPU milliseconds by system and number of drafts. text: [1, T]. Systems take turns: a busy machine is unfair to none."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    taken: dict[tuple[str, int], list[float]] = {}
    try:
        for turn in range(3):
            for drafts in range(1, DRAFTS + 1):
                for name, drafter in found.items():
                    if drafts > drafter.max_drafts:
                        continue
                    # The first cut reads the whole prompt; the first turn warms up.
                    seconds = [seconds for _, _, seconds in cuts(target, drafter, text, first, drafts=drafts)][1:]
                    if turn:
                        taken.setdefault((name, drafts), []).extend(seconds)
    finally:
        torch.set_num_threads(threads)
    return {
        name: [round(1e3 * statistics.median(taken[name, k]), 3) for k in range(1, drafter.max_drafts + 1)]
        for name, drafter in found.items()
    }


# --- calibration ------------------------------------------------------------------------------------------------------


def calibration(rounds: dict[str, acceptance.Rounds]) -> list[dict]:
    """Every domain under temperatures fitted on every other one."""
    found = []
    for fitted, source in rounds.items():
        temperatures = fit_sts(source.logits, source.survived)
        for domain, observed in rounds.items():
            if domain == fitted:
                continue
            row = {"fitted": fitted, "domain": domain, "rounds": len(observed)}
            for name, used in (("before", None), ("after", temperatures)):
                predicted = survival(observed.logits, used)
                bins = reliability(predicted, observed.survived, bins=10)
                row[name] = round(acceptance.mean_ece(predicted, observed.survived), 5)
                row[f"{name}_bins"] = [
                    [round(p, 4), round(o, 4), int(n)]
                    for p, o, n in zip(bins.predicted.tolist(), bins.survived.tolist(), bins.counts.tolist(), strict=True)
                    if n
                ]
            found.append(row)
    return found


# --- all of it --------------------------------------------------------------------------------------------------------


def texts_of(generations: list, prompt: int, new_tokens: int) -> Tensor:
    return torch.tensor([generation.output_ids[: prompt + new_tokens] for generation in generations])


def measure(
    folder: Path = assets.FOLDER, *, prompts: int = 16, new_tokens: int = 96, progress: Callable[[str], None] = lambda text: None
) -> dict:
    """Everything but the calibration."""
    target = Target(*assets.weights("target", folder))
    found, tokenizer = drafters(target, folder), assets.tokenizer(folder)
    rows, forced, times = [], [], None
    for number, domain in enumerate(assets.domains(folder)):
        ids = [tokenizer.encode(text) for text in assets.prompts(domain, folder)[:prompts]]
        plain = decoded(target, Autoregressive(), ids, new_tokens, 1.0, number)
        texts, first = texts_of(plain, len(ids[0]), new_tokens), len(ids[0])
        nats = -torch.tensor([x for g in plain for x in g.expected_logprobs]).double().mean()
        for name, drafter in found.items():
            for temperature in TEMPERATURES:
                progress(f"{domain}, {name}, T = {temperature:g}")
                generations = decoded(target, drafter, ids, new_tokens, temperature, number)
                rows.append({"domain": domain, "system": name, "temperature": temperature, **rollout(generations)})
            progress(f"{domain}, {name}, teacher-forced")
            row = teacher_forced(accepted(target, drafter, texts, first))
            forced.append({"domain": domain, "system": name, "nats": round(float(nats), 3), **row})
        if times is None:
            progress("draft times")
            times = draft_times(target, found, texts[:1], first)
    return {
        "format": FORMAT,
        "prompts": prompts,
        "new_tokens": new_tokens,
        "drafts": DRAFTS,
        "seed": SEED,
        "decoded": rows,
        "teacher_forced": forced,
        "draft_ms": times,
    }


def save(path: Path, found: dict) -> None:
    """JSON, a row of a list on a line. Raises OSError."""
    parts = []
    for key, value in found.items():
        if isinstance(value, list):
            text = "[\n" + ",\n".join(json.dumps(row) for row in value) + "\n]"
        else:
            text = json.dumps(value)
        parts.append(f"{json.dumps(key)}: {text}")
    Path(path).write_text("{" + ",\n".join(parts) + "}\n", encoding="utf-8")


def load(path: Path = RESULTS) -> dict:
    """Raises OSError, or ValueError that names the file."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got a file that does not parse ({error})") from None
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path}: expected {FORMAT!r}")
    return found


def table(found: dict) -> str:
    """Markdown: systems by domain, then the calibration."""
    lines = [
        "| domain (nats per token) | system | tau, T = 1 | tau, T = 0 | teacher-forced tau"
        " | acceptance of draft 1, 2, ... given those before it, % | CPU ms for all drafts |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for row in found["teacher_forced"]:
        cells = [f"{row['domain']} ({row['nats']:.2f})", row["system"]]
        for temperature in TEMPERATURES:
            own = _row(found["decoded"], domain=row["domain"], system=row["system"], temperature=temperature)
            cells.append(f"{own['tau']:.2f} ±{own['error']:.2f}")
        cells.append(f"{row['tau']:.2f} ±{row['error']:.2f}")
        cells.append(" ".join(f"{100 * share:.0f}" for share in row["acceptance"]))
        cells.append(f"{found['draft_ms'][row['system']][-1]:.2f}")
        lines.append("| " + " | ".join(cells) + " |")
    lines += ["", "| temperatures from | domain | ECE before, % | ECE after, % |", "| --- | --- | --- | --- |"]
    for row in found["calibration"]:
        lines.append(f"| {row['fitted']} | {row['domain']} | {100 * row['before']:.2f} | {100 * row['after']:.2f} |")
    return "\n".join(lines)


BEGIN, END = "<!-- python -m bench.systems --readme -->\n", "\n<!-- end -->"


def in_readme(text: str) -> str:
    """The tables that a README has. Raises ValueError where their marks are not in it."""
    before, begin, rest = text.partition(BEGIN)
    tables, end, _ = rest.partition(END)
    if not begin or not end:
        raise ValueError(f"README: expected {BEGIN.strip()!r} and {END.strip()!r} around the tables")
    return tables


def write_readme(found: dict, path: Path = README) -> None:
    """Raises OSError and ValueError."""
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace(BEGIN + in_readme(text) + END, BEGIN + table(found) + END), encoding="utf-8")


def _row(rows: list[dict], **wanted) -> dict:
    return next(row for row in rows if all(row[key] == value for key, value in wanted.items()))
