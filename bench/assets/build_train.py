"""Training of the embedded models: losses, optimisers, and a loop that resumes where it was stopped.

    target          cross-entropy of the next token
    drafters        0.1 CE + 0.9 |q - p|_1 (+ BCE of the confidence against 1 - |q - p|_1 / 2), q the
                    drafter's distribution, p the target's; draft k of a block weighs exp(-(k - 1) / 4)
    matrices        Muon (momentum, then the nearest orthogonal matrix by Newton-Schulz); everything else AdamW
    learning rate   a short warm-up, constant, a linear cool-down over the second half

What a step reads depends on the seed, the stage and the step's number alone, so a resumed run goes on as if it had never stopped.
Teacher-forced acceptance of draft k: 1 - |q - p|_1 / 2 where all tokens before it are the text's own; tau = 1 + sum over k of the
product up to k. Sources: DSpark, arXiv 2607.05147; Muon: Jordan et al., kellerjordan.github.io/posts/muon, 2024.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import os
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from . import build_models as models
from .build_models import Blocks, Sizes

CE, L1 = 0.1, 0.9
DECAY = 4.0  # of the weights of a block's positions
MUON_RATE, ADAM_RATE = 0.02, 3e-3
WARM_UP, COOL_DOWN, LAST = 0.02, 0.5, 0.02
CLIP = 1.0
CHECKPOINT_SECONDS, REPORT_SECONDS = 60.0, 30.0
CALIBRATION = 8  # steps that are timed, after two that are not


def seeded(*names) -> torch.Generator:
    """Noise of its own for everything that has another name."""
    digest = hashlib.sha256("/".join(map(str, names)).encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))


def write(path: Path, save: Callable[[Path], None]) -> None:
    """Whole or not at all."""
    part = path.with_name(path.name + ".part")
    save(part)
    os.replace(part, path)


# --- optimisers -------------------------------------------------------------------------------------------------------


class Muon(torch.optim.Optimizer):
    """Momentum, made orthogonal: five Newton-Schulz steps in bf16, matrices of one shape together."""

    def __init__(self, parameters, lr: float, momentum: float = 0.95):
        super().__init__(list(parameters), dict(lr=lr, momentum=momentum))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            by_shape: dict[tuple, list] = {}
            for parameter in group["params"]:
                state = self.state[parameter]
                if "average" not in state:
                    state["average"] = torch.zeros_like(parameter)
                state["average"].lerp_(parameter.grad, 1 - group["momentum"])
                update = parameter.grad.lerp(state["average"], group["momentum"])
                by_shape.setdefault(tuple(parameter.shape), []).append((parameter, update))
            for (rows, columns), pairs in by_shape.items():
                x = torch.stack([update for _, update in pairs])
                x = x.bfloat16() if bf16_pays() else x
                x = x.mT.contiguous() if rows > columns else x
                x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
                for _ in range(5):
                    square = x @ x.mT
                    x = 3.4445 * x + (-4.7750 * square + 2.0315 * (square @ square)) @ x
                x = x.mT if rows > columns else x
                for (parameter, _), direction in zip(pairs, x, strict=True):
                    parameter.add_(direction.float(), alpha=-group["lr"] * max(1, rows / columns) ** 0.5)


def optimisers(tensors: dict[str, Tensor]) -> list[torch.optim.Optimizer]:
    def is_matrix(name):
        return tensors[name].dim() == 2 and not any(part in name for part in ("embed", "markov", "confidence"))

    matrices = [tensor for name, tensor in tensors.items() if is_matrix(name)]
    rest = [tensor for name, tensor in tensors.items() if not is_matrix(name)]
    found = [Muon(matrices, MUON_RATE)] if matrices else []
    return [*found, torch.optim.AdamW(rest, ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0)]


def rate(done: float) -> float:
    """Share of the learning rate when that share of the steps is done."""
    if done < WARM_UP:
        return (done + 1e-3) / WARM_UP
    return 1.0 if done < 1 - COOL_DOWN else LAST + (1 - LAST) * (1 - done) / COOL_DOWN


# --- losses -----------------------------------------------------------------------------------------------------------


def compared(drafted: Tensor, targeted: Tensor, tokens: Tensor, weights: Tensor) -> tuple[Tensor, Tensor]:
    """(loss, acceptance [...]) of draft and target logits [..., V], the text's tokens [...], weights that sum to 1 [...]."""
    distance = (drafted.softmax(-1) - targeted.softmax(-1)).abs().sum(-1)
    entropy = F.cross_entropy(drafted.flatten(0, -2), tokens.flatten(), reduction="none").view(tokens.shape)
    return ((CE * entropy + L1 * distance) * weights).sum(), (1 - distance / 2).detach()


@dataclasses.dataclass(frozen=True)
class Teacher:
    """The target that drafters learn from."""

    tensors: dict[str, Tensor]
    sizes: Sizes
    feature_layers: tuple[int, ...]

    @property
    def embedding(self) -> Tensor:
        return self.tensors["model.embed_tokens.weight"]

    def __call__(self, sequences: Tensor) -> models.Passed:
        with torch.no_grad():
            return models.language_model(self.tensors, self.sizes, sequences, self.feature_layers)


def target_loss(tensors, sizes: Sizes, sequences: Tensor) -> tuple[Tensor, Tensor]:
    """sequences [B, T + 1]; (nats per token, the same by position [B, T])."""
    hidden = models.language_model(tensors, sizes, sequences[:, :-1]).hidden
    found = models.logits(hidden, tensors["model.embed_tokens.weight"])
    nats = F.cross_entropy(found.flatten(0, 1), sequences[:, 1:].flatten(), reduction="none").view(hidden.shape[:2])
    return nats.mean(), nats.detach()


def draft_model_loss(tensors, sizes: Sizes, teacher: Teacher, sequences: Tensor, passed: models.Passed, anchors: Tensor):
    hidden = models.language_model(tensors, sizes, sequences[:, :-1]).hidden
    drafted = models.logits(hidden, tensors["model.embed_tokens.weight"])
    targeted = models.logits(passed.hidden[:, :-1], teacher.embedding)
    loss, acceptance = compared(drafted, targeted, sequences[:, 1:], torch.tensor(1 / hidden[..., 0].numel()))
    return loss, acceptance.flatten()[:, None]


def mtp_loss(tensors, sizes: Sizes, teacher: Teacher, sequences: Tensor, passed: models.Passed, anchors: Tensor):
    hidden = models.mtp_hidden(tensors, sizes, teacher.embedding, sequences[:, 1:-1], passed.pre_norm[:, :-2])
    drafted = models.logits(hidden, teacher.embedding)
    targeted = models.logits(passed.hidden[:, 1:-1], teacher.embedding)
    loss, acceptance = compared(drafted, targeted, sequences[:, 2:], torch.tensor(1 / hidden[..., 0].numel()))
    return loss, acceptance.flatten()[:, None]


def block_loss(
    tensors, sizes: Sizes, teacher: Teacher, sequences: Tensor, passed: models.Passed, anchors: Tensor, *, drafts: int,
    kind: str | None, backbone: dict[str, Tensor] | None = None,
):  # fmt: skip
    """kind: of the sequential head, None without one. backbone: where it is not trained, and `tensors` are a head alone."""
    blocks = Blocks(anchors, drafts)
    with torch.set_grad_enabled(backbone is None):
        hidden = models.block_hidden(backbone or tensors, sizes, teacher.embedding, sequences, passed.features, blocks)
    shape = (*anchors.shape, drafts)
    positions = blocks.positions
    drafted = models.logits(hidden, teacher.embedding).view(*shape, -1)
    of_target = passed.hidden.gather(1, positions[:, :, None].expand(-1, -1, passed.hidden.shape[-1]))
    targeted = models.logits(of_target, teacher.embedding).view(*shape, -1)
    weights = torch.exp(-torch.arange(drafts) / DECAY).expand(shape)
    weights = weights / weights.sum()
    if kind is not None:
        hidden = hidden.view(*shape, -1)
        bias, known = models.transition(tensors, kind, hidden, sequences.gather(1, positions).view(shape))
        drafted = drafted + bias.float()
    loss, acceptance = compared(drafted, targeted, sequences.gather(1, positions + 1).view(shape), weights)
    if kind is not None:
        said = models.confidence(tensors, hidden, known).float()
        loss = loss + (F.binary_cross_entropy_with_logits(said, acceptance, reduction="none") * weights).sum()
    return loss, acceptance.flatten(0, 1)


def tau(acceptance: Tensor) -> float:
    """Tokens per round of acceptances [rounds, K]."""
    return 1 + float(acceptance.double().cumprod(-1).sum(-1).mean())


# --- the loop ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Budget:
    """CPU-seconds to spend, from which the number of steps is made once; or the steps themselves."""

    cpu_seconds: float
    steps: int | None = None


@dataclasses.dataclass
class Progress:
    """Lines, or tqdm's bar where it is installed and somebody watches."""

    stage: str
    total: int
    done: int = 0
    _last: float = 0.0
    _bar: object = None

    def __post_init__(self):
        if sys.stderr.isatty():
            try:
                from tqdm import tqdm

                self._bar = tqdm(total=self.total, initial=self.done, desc=self.stage)
            except ImportError:
                pass

    def __call__(self, done: int, text: Callable[[], str] = str) -> None:
        now = time.monotonic()
        if self._bar is not None:
            self._bar.update(done - self._bar.n)
            if now - self._last > 1:
                self._bar.set_postfix_str(text())
                self._last = now
        elif now - self._last > REPORT_SECONDS or done == self.total:
            print(f"{self.stage}: {done}/{self.total} {text()}".rstrip(), flush=True)
            self._last = now


class Trainer:
    """Trains `tensors` in place. loss(step) -> (loss, acceptance or nats); folder: for its checkpoint and the number of steps."""

    def __init__(self, stage: str, tensors: dict[str, Tensor], loss: Callable[[int], tuple[Tensor, Tensor]], folder: Path):
        self.stage, self.tensors, self.loss, self.folder = stage, tensors, loss, folder
        for tensor in tensors.values():
            tensor.requires_grad_(True)
        self.optimisers = optimisers(tensors)
        self.rates = [group["lr"] for optimiser in self.optimisers for group in optimiser.param_groups]
        self.cpu_seconds, self.step_number = 0.0, 0

    def step(self, done: float) -> Tensor:
        """One step, when the share `done` of all is; what the loss gave beside the loss."""
        groups = [group for optimiser in self.optimisers for group in optimiser.param_groups]
        for group, whole in zip(groups, self.rates, strict=True):
            group["lr"] = whole * rate(done)
        for optimiser in self.optimisers:
            optimiser.zero_grad(set_to_none=True)
        loss, found = self.loss(self.step_number)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.tensors.values(), CLIP)
        for optimiser in self.optimisers:
            optimiser.step()
        self.step_number += 1
        return found

    def run(self, budget: Budget, described: Callable[[Tensor], str]) -> dict:
        """All steps, from the last checkpoint on; what was spent."""
        steps = self._steps(budget)
        self._resume()
        progress = Progress(self.stage, steps, self.step_number)
        saved, resumed = time.monotonic(), self.step_number
        while self.step_number < steps:
            before = time.process_time()
            found = self.step(self.step_number / steps)
            # The first step of a process may compile: it counts as the second one takes.
            weight = {1: 0, 2: 2}.get(self.step_number - resumed, 1)
            self.cpu_seconds += weight * (time.process_time() - before)
            progress(self.step_number, lambda found=found: f"{described(found)}, {self.cpu_seconds:.0f} CPU-s")
            if time.monotonic() - saved > CHECKPOINT_SECONDS:
                self.checkpoint()
                saved = time.monotonic()
        self.checkpoint()
        return {"steps": steps, "cpu_seconds": round(self.cpu_seconds, 3), "precision": "bf16" if bf16_pays() else "fp32"}

    def _steps(self, budget: Budget) -> int:
        file = self.folder / "steps.json"
        if budget.steps is not None:
            return budget.steps
        if file.is_file():
            return json.loads(file.read_text())["steps"]
        first = {name: tensor.detach().clone() for name, tensor in self.tensors.items()}
        taken = []
        for _ in range(2 + CALIBRATION):
            before = time.process_time()
            self.step(0.0)
            taken.append(time.process_time() - before)
        seconds = statistics.median(taken[2:])
        steps = max(2, round(budget.cpu_seconds / seconds))
        write(file, lambda path: path.write_text(json.dumps({"steps": steps, "seconds_per_step": round(seconds, 4)}) + "\n"))
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(first[name])
        self.optimisers, self.step_number = optimisers(self.tensors), 0
        return steps

    def checkpoint(self) -> None:
        state = {
            "tensors": {name: tensor.detach() for name, tensor in self.tensors.items()},
            "optimisers": [optimiser.state_dict() for optimiser in self.optimisers],
            "step": self.step_number,
            "cpu_seconds": self.cpu_seconds,
        }
        write(self.folder / "checkpoint.pt", lambda path: torch.save(state, path))

    def _resume(self) -> None:
        file = self.folder / "checkpoint.pt"
        if not file.is_file():
            return
        state = torch.load(file, weights_only=True)
        with torch.no_grad():
            for name, tensor in self.tensors.items():
                tensor.copy_(state["tensors"][name])
        for optimiser, kept in zip(self.optimisers, state["optimisers"], strict=True):
            optimiser.load_state_dict(kept)
        self.step_number, self.cpu_seconds = state["step"], state["cpu_seconds"]


def compiled(function: Callable, wanted: bool) -> Callable:
    """torch.compile'd where that works: it needs a C++ compiler, which is known at the first call only."""
    if not wanted:
        return function
    fast = torch.compile(function, dynamic=False)
    works: list[bool] = []

    def call(*arguments, **options):
        if works == [False]:
            return function(*arguments, **options)
        try:
            found = fast(*arguments, **options)
            works[:] = [True]
            return found
        except Exception as error:
            if works:
                raise
            warnings.warn(f"torch.compile does not work here, eager is slower: {type(error).__name__}", stacklevel=2)
            works[:] = [False]
            return function(*arguments, **options)

    return call


def autocast() -> torch.autocast:
    """bf16 where this processor multiplies it faster than fp32; without instructions for it, it is many times slower."""
    return torch.autocast("cpu", torch.bfloat16, enabled=bf16_pays())


@functools.cache
def bf16_pays() -> bool:
    def seconds(dtype):
        left, right = torch.ones(1024, 192, dtype=dtype), torch.ones(192, 512, dtype=dtype)
        taken = []
        for _ in range(5):
            before = time.process_time()
            left @ right
            taken.append(time.process_time() - before)
        return min(taken)

    return seconds(torch.bfloat16) < seconds(torch.float32)


def anchors_of(batch: int, count: int, length: int, drafts: int, generator: torch.Generator) -> Tensor:
    """[B, count] distinct positions from 1, each with `drafts` tokens after it."""
    places = torch.rand(batch, length - drafts - 1, generator=generator).argsort(1)[:, :count]
    return 1 + places.sort(1).values
