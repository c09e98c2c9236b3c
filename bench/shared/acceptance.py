"""Measured rounds of the embedded drafter: what its confidence head said of a block, and how many of its drafts were accepted.

    survived draft k  <=>  accepted >= k;   confidence_k = sigmoid(logit_k / T_k), T from `calibration.fit_sts`

Symbols: N rounds, K drafts per round. A round: the target reads a piece of real text up to a cut, emits a token, the drafter
drafts K tokens after it, all K are verified. One round per cut, at every token of the second half of each text: a model this small
wanders off to its own kind of text within a few rounds, and would make all domains alike (foreign text: 2.1 tokens per round at
cuts of the text itself, 2.5 when 96 tokens are continued).

The number accepted under any shorter length L is min(accepted, L): the token rule decides draft k with an acceptance uniform of its
own and the two probabilities of that one draft, and neither knows how many drafts follow.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import SimpleNamespace

import torch
from torch import Tensor

from bench import assets
from dspark_kernels.calibration import expected_calibration_error, fit_sts, survival
from dspark_kernels.types import MarkovHead
from reference import loop
from reference.drafters import DSpark
from reference.model import Target

FILE = assets.FOLDER / "rounds.json"
TEXTS = assets.FOLDER / "texts.json"
FORMAT = "dspark_kernels rounds"
VERSION = 1
DOMAINS = {
    "code": "held-out Python source, what the models were trained on",
    "prose": "English prose",
    "foreign": "prose in eighteen other languages, accents and other scripts",
}
TEMPERATURE = 1.0
STRIDE = 1  # tokens between two cuts
DIGITS = 3  # of a stored logit
SEED = 0


@dataclasses.dataclass(frozen=True)
class Rounds:
    """logits: raw confidence logits fp32 [N, K]; accepted: int64 [N], 0 to K; prompt: int64 [N], which text."""

    logits: Tensor
    accepted: Tensor
    prompt: Tensor

    def __len__(self) -> int:
        return len(self.accepted)

    @property
    def drafts(self) -> int:
        return self.logits.shape[1]

    @property
    def survived(self) -> Tensor:
        """bool [N, K]: draft k was accepted, and so was every draft before it."""
        return torch.arange(self.drafts) < self.accepted[:, None]

    @property
    def tokens_per_round(self) -> float:
        return 1 + self.accepted.double().mean().item()

    def where(self, chosen: Tensor) -> Rounds:
        return Rounds(self.logits[chosen], self.accepted[chosen], self.prompt[chosen])


def texts(domain: str, folder: Path = assets.FOLDER) -> list[str]:
    """The texts of a domain, which no model was trained on; folder: of the embedded models."""
    return assets.prompts(folder=folder) if domain == "code" else json.loads(TEXTS.read_text(encoding="utf-8"))[domain]


def settings(folder: Path = assets.FOLDER) -> dict:
    """What a measurement depends on, as the file records it."""
    return {
        "drafter": "dspark",
        "rule": "token",
        "temperature": TEMPERATURE,
        "stride": STRIDE,
        "seed": SEED,
        "texts": {domain: len(texts(domain, folder)) for domain in DOMAINS},
    }


def measure(
    domain: str,
    prompts: Sequence[int] | None = None,
    progress: Callable[[int], None] | None = None,
    stride: int = STRIDE,
    change_head: Callable[[MarkovHead], MarkovHead] | None = None,
    folder: Path = assets.FOLDER,
    observe: Callable[[Tensor, Tensor, MarkovHead, Tensor], None] | None = None,
) -> Rounds:
    """Decode one round at every cut of the domain's texts (only those of these numbers).

    Reference ops in fp32, one request at a time, so that a round depends on nothing but its own text and cut. Every cut has a
    seed of its own. progress: called with the number of rounds done since the last call. change_head: gives the sequential head to
    draft with from the drafter's own. folder: where the models are. observe: called with base logits [1, K, V], anchors [1], the head
    and the drafts [1, K] of every block.
    """
    target = Target(*assets.weights("target", folder))
    drafter = DSpark(*assets.weights("dspark", folder), target)
    if change_head is not None:
        drafter.head = change_head(drafter.head)
    tokenizer, number = assets.tokenizer(folder), list(DOMAINS).index(domain)
    logits, accepted, prompt = [], [], []

    def draft_block(*arguments, **options):
        block = loop.REFERENCE_OPS.draft_block(*arguments, **options)
        logits.append(block.confidence_logits[0])
        if observe is not None:
            observe(*arguments[:3], block.tokens)
        return block

    ops = SimpleNamespace(**{**vars(loop.REFERENCE_OPS), "draft_block": draft_block})
    for index, text in enumerate(texts(domain, folder)):
        if prompts is not None and index not in prompts:
            continue
        ids = tokenizer.encode(text)
        requests = [
            loop.Request(ids[:cut], 1, TEMPERATURE, seed=((SEED << 8 | number) << 16 | index) << 16 | cut)
            for cut in range(len(ids) // 2, len(ids) + 1, stride)
        ]
        for generation in loop.decode(target, drafter, requests, ops=ops, batch_size=1):
            (length,) = generation.acceptance_lengths
            accepted.append(length - 1)
            prompt.append(index)
        if progress is not None:
            progress(len(requests))
    return Rounds(torch.stack(logits), torch.tensor(accepted), torch.tensor(prompt))


def joined(parts: Sequence[Rounds]) -> Rounds:
    """Rounds of several measurements, in their order."""
    return Rounds(*(torch.cat([getattr(part, name) for part in parts]) for name in ("logits", "accepted", "prompt")))


def save(path, rounds: Mapping[str, Rounds], recorded: Mapping) -> None:
    """Write rounds as JSON, a line each: text, accepted, K logits. Raises OSError."""
    parts = []
    for domain, found in rounds.items():
        lines = [
            json.dumps([p, a, *(round(x, DIGITS) for x in row)], separators=(",", ":"))
            for p, a, row in zip(found.prompt.tolist(), found.accepted.tolist(), found.logits.double().tolist(), strict=True)
        ]
        parts.append(f"{json.dumps(domain)}: [\n" + ",\n".join(lines) + "\n]")
    head = json.dumps({"format": FORMAT, "version": VERSION, "settings": dict(recorded)})
    Path(path).write_text(head[:-1] + ', "domains": {\n' + ",\n".join(parts) + "\n}}\n", encoding="utf-8")


def load(path=FILE) -> tuple[dict[str, Rounds], dict]:
    """(rounds by domain, recorded settings). Raises OSError, or ValueError that names the file."""
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: expected JSON, got a file that does not parse ({error})") from None
    if not isinstance(content, dict) or (content.get("format"), content.get("version")) != (FORMAT, VERSION):
        raise ValueError(f"{path}: expected {FORMAT!r}, version {VERSION}")
    domains = content.get("domains")
    if not isinstance(domains, dict) or not domains:
        raise ValueError(f"{path}: domains: expected at least one")
    found = {domain: _read(f"{path}: {domain}", lines) for domain, lines in domains.items()}
    if len({rounds.drafts for rounds in found.values()}) > 1:
        raise ValueError(f"{path}: expected as many logits per round in every domain")
    return found, content.get("settings", {})


def _read(name: str, lines) -> Rounds:
    try:
        table = torch.tensor(lines, dtype=torch.float64)
        assert table.dim() == 2 and len(table) and table.shape[1] >= 3
    except (TypeError, ValueError, AssertionError):
        raise ValueError(f"{name}: expected rows of text, accepted and at least one logit, all of one length") from None
    prompt, accepted, drafts = table[:, 0], table[:, 1], table.shape[1] - 2
    if not bool(table.isfinite().all() & (accepted == accepted.floor()).all() & (0 <= accepted).all() & (accepted <= drafts).all()):
        raise ValueError(f"{name}: expected finite logits and accepted from 0 to {drafts}")
    return Rounds(table[:, 2:].float(), accepted.long(), prompt.long())


@dataclasses.dataclass(frozen=True)
class Calibrated:
    """Held-out rounds of a domain with calibrated confidences fp32 [N, K], and mean ECE over positions without and with T."""

    confidence: Tensor
    accepted: Tensor
    before: float
    after: float

    @property
    def tokens_per_round(self) -> float:
        """With every draft verified."""
        return 1 + self.accepted.double().mean().item()


def calibrate(rounds: Mapping[str, Rounds]) -> tuple[dict[str, Calibrated], Tensor]:
    """(held-out rounds by domain, temperatures fp32 [K]): fitted on the even texts of all domains, applied to the odd ones.

    Whole texts are held out, since two cuts of one text share most of their context. One set of temperatures for all domains: an
    engine does not know them apart. Raises ValueError where a half is empty.
    """
    even = {domain: found.where(found.prompt % 2 == 0) for domain, found in rounds.items()}
    odd = {domain: found.where(found.prompt % 2 == 1) for domain, found in rounds.items()}
    for domain in rounds:
        if not len(even[domain]) or not len(odd[domain]):
            raise ValueError(f"{domain}: expected rounds of texts with even and with odd numbers")
    fit = list(even.values())
    temperatures = fit_sts(torch.cat([r.logits for r in fit]), torch.cat([r.survived for r in fit]))
    held_out = {}
    for domain, found in odd.items():
        confidence = (found.logits.double() / temperatures.double()).sigmoid().float()
        before, after = (mean_ece(survival(found.logits, t), found.survived) for t in (None, temperatures))
        held_out[domain] = Calibrated(confidence, found.accepted, before, after)
    return held_out, temperatures


def mean_ece(predicted: Tensor, survived: Tensor) -> float:
    """Mean over draft positions of the expected calibration error. predicted fp64 [N, K], survived bool [N, K]."""
    errors = [expected_calibration_error(predicted[:, k], survived[:, k]) for k in range(predicted.shape[1])]
    return sum(errors) / len(errors)
