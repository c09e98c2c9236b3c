"""What the tests of the suite use: the function behind checks of the form of its output, seeds, sizes, decoding.

`Run` is for functions on chains, `TreeRun` for functions on draft trees; the two forms: suite.py.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .chain import models
from .chain.edges import Detected
from .tree import models as tree_models

FALSE_ALARM = 1e-4
FINDINGS = 100
LEVEL = FALSE_ALARM / FINDINGS
_MIX = -7046029254386353131  # 2^64 / golden ratio


class Settings(NamedTuple):
    """Of a run of the suite, as `suite.check` takes them; None: the suite's own."""

    requests: int
    seed: int
    device: str | torch.device
    draft: Callable[..., Tensor] | None
    schedule: Callable[[Tensor], Tensor] | None
    dtype: torch.dtype


class _Run:
    def __init__(self, function: Callable[..., Tensor], rule: str, settings: Settings, draft: Callable[..., Tensor]) -> None:
        """draft: where the settings have none."""
        requests, seed, device, own_draft, schedule, dtype = settings
        self.function, self.rule, self.requests, self.seed = function, rule, requests, seed
        self.device, self.dtype, self.level = torch.device(device), dtype, LEVEL
        self.draft = own_draft or draft
        self.schedule = schedule or models.schedule
        self._plays: dict[str, tuple[models.Model, Tensor, Tensor]] = {}

    def seeds(self, purpose: str, count: int | None = None) -> Tensor:
        """Seeds [count], others for every purpose; neighbours are far apart."""
        first = sum(ord(letter) * 131**i for i, letter in enumerate(purpose)) % (1 << 40) + self.seed * 1000003
        index = torch.arange(self.requests if count is None else count, device=self.device)
        seeds: Tensor = (index + first) * _MIX
        return seeds

    def model(self, model: models.Model) -> models.Model:
        target, draft = (table.to(self.device, self.dtype).float() for table in (model.target, model.draft))
        return models.Model(target, draft, model.confidence.to(self.device))

    def play(self, model: models.Model, drafts: Any, **options: Any) -> models.Play:
        raise NotImplementedError

    def call(self, *arguments: Any) -> Tensor:
        raise NotImplementedError

    def _probe(self) -> None:
        raise NotImplementedError

    def probe(self) -> None:
        """Call the function once, on an ordinary batch of two requests; whatever it raises passes through."""
        with contextlib.suppress(Detected):  # of the form of its output: the tests say so
            self._probe()

    def decode(
        self, purpose: str, model: models.Model, drafts: Any, tokens: int, rounds: int | None, **options: Any
    ) -> tuple[models.Model, Tensor, Tensor]:
        """(model, history [R, tokens], drafts accepted in the first round [R]). drafts: how many, or the shapes of trees."""
        if purpose not in self._plays:
            model = self.model(model)
            seeds = self.seeds(purpose)
            self._plays[purpose] = (
                model, *self.play(model, drafts, **options).decode(seeds, tokens, rounds, 3, salt=len(purpose))
            )  # fmt: skip
        return self._plays[purpose]

    def call_with(
        self,
        tensors: Sequence[Tensor | None],
        temperature: Tensor | float,
        seeds: Tensor | None,
        lens: Tensor | int,
        anchor_position: int,
        words: tuple[str, ...] = (),
    ) -> Tensor:
        """Tokens, on the CPU, of one call with these tensors, then words, temperature, seeds, and so on; moved to the device."""
        first = tensors[0]
        assert first is not None  # the logits that verify
        requests = first.shape[0]

        def move(x: Tensor | None) -> Tensor | None:
            return None if x is None else x if x.device == self.device else x.to(self.device)

        def whole(x: Tensor | float, dtype: torch.dtype) -> Tensor:
            return torch.as_tensor(x, dtype=dtype).expand(requests).contiguous()

        if self.rule.startswith("greedy"):
            temperature = 0.0
        seeds = self.seeds("rows", requests) if seeds is None else seeds
        out = self.call(
            *map(move, tensors),
            *words,
            move(whole(temperature, torch.float32)),
            move(seeds),
            move(whole(lens, torch.int32)),
            move(whole(anchor_position, torch.int64)),
        )
        return out.cpu()

    def tokens_of(self, out: object, shape: tuple[int, int], vocab: int) -> tuple[Tensor, Tensor]:
        """The function's tokens, int64, and how many, once they are tokens with -1 behind."""
        if not isinstance(out, Tensor) or out.dtype not in (torch.int64, torch.int32):
            kind = out.dtype if isinstance(out, Tensor) else type(out).__name__
            raise Detected(f"expected tokens in int64 or int32, got {kind}")
        if tuple(out.shape) != shape:
            raise Detected(f"expected tokens {list(shape)}, got {list(out.shape)}")
        out = out.to(device=self.device, dtype=torch.int64)
        count = (out >= 0).sum(1)
        index = torch.arange(shape[1], device=out.device)
        # In order of what a request can be told first.
        self.form("an id beyond the vocabulary", (out >= vocab).any(1), out)
        self.form("no token", count < 1, out)
        self.form("something else than -1 behind the tokens", (torch.where(index < count[:, None], -1, out) != -1).any(1), out)
        return out, count

    def form(self, what: str, wrong: Tensor, out: Tensor) -> None:
        if bool(wrong.any()):
            r = int(wrong.long().argmax())
            raise Detected(f"{what}: {int(wrong.sum())} of {len(wrong)} requests, request {r} got {out[r].tolist()}")


class Run(_Run):
    """Of a function on chains."""

    def __init__(self, function: Callable[..., Tensor], rule: str, settings: Settings) -> None:
        super().__init__(function, rule, settings, models.draft_coupled if rule == "coupled" else models.draft)

    def _probe(self) -> None:
        drafts = torch.tensor([[1, 2], [0, 3]])
        self.call_rows(torch.arange(30.0).view(2, 3, 5) % 4, drafts, torch.zeros(2, 2, 5))

    def play(self, model: models.Model, drafts: int, **options: Any) -> models.Play:
        return models.Play(self.call, model, drafts, draft=self.draft, schedule=self.schedule, dtype=self.dtype, **options)

    def call_rows(
        self,
        target: Tensor,
        drafts: Tensor,
        draft_logits: Tensor | None,
        seeds: Tensor | None = None,
        *,
        lens: Tensor | int | None = None,
        temperature: Tensor | float = 1.0,
        anchor_position: int = 7,
    ) -> Tensor:
        """Tokens [R, K+1], on the CPU, of one call with these rows."""
        return self.call_with(
            (target, drafts, draft_logits), temperature, seeds, drafts.shape[1] if lens is None else lens, anchor_position
        )  # fmt: skip

    def call(self, *arguments: Any) -> Tensor:
        """The function's tokens, int64, once their form is right."""
        target_logits, draft_tokens, _, _, _, draft_lens, _ = arguments
        drafts, lens = draft_tokens.clone(), draft_lens.to(torch.int64)
        requests, num_drafts = drafts.shape
        out, count = self.tokens_of(self.function(*arguments), (requests, num_drafts + 1), target_logits.shape[2])
        index = torch.arange(num_drafts + 1, device=out.device)
        padded = torch.nn.functional.pad(drafts, (0, 1), value=-1)
        self.form("more than the admitted drafts and one token", count > lens + 1, out)
        self.form("a token that is not the draft before the last", ((index < count[:, None] - 1) & (out != padded)).any(1), out)
        return out


class TreeRun(_Run):
    """Of a function on trees. drawn: the ways of making children that it is for."""

    def __init__(self, function: Callable[..., Tensor], rule: str, settings: Settings, drawn: tuple[str, ...]) -> None:
        super().__init__(function, rule, settings, tree_models.draft)
        self.drawn = drawn

    def _probe(self) -> None:
        tokens, parents = torch.tensor([[0, 1, 2], [4, 0, 3]]), torch.tensor([[-1, 0, 1], [-1, 0, 0]], dtype=torch.int32)
        drawn = self.drawn[0]
        self.call_rows(
            torch.arange(30.0).view(2, 3, 5) % 4, tokens, parents, None if drawn == "one_hot" else torch.zeros(2, 3, 5), drawn
        )

    def play(self, model: models.Model, drafts: tuple[tree_models.Shape, ...], **options: Any) -> tree_models.TreePlay:
        return tree_models.TreePlay.of(self.call, model, drafts, draft=self.draft, dtype=self.dtype, **options)

    def call_rows(
        self,
        node_logits: Tensor,
        tokens: Tensor,
        parents: Tensor,
        draft_logits: Tensor | None,
        drawn: str,
        seeds: Tensor | None = None,
        *,
        num_nodes: Tensor | int | None = None,
        temperature: Tensor | float = 1.0,
        anchor_position: int = 7,
    ) -> Tensor:
        """Tokens [R, M], on the CPU, of one call with these trees."""
        return self.call_with(
            (node_logits, tokens, parents, draft_logits), temperature, seeds, tokens.shape[1] if num_nodes is None else num_nodes,
            anchor_position, words=(drawn,),
        )  # fmt: skip

    def call(self, *arguments: Any) -> Tensor:
        """The function's tokens, int64, once their form is right."""
        node_logits, tokens, parents, _, _, _, _, num_nodes, _ = arguments
        given = tokens.clone(), parents.clone(), num_nodes.to(torch.int64)
        out, count = self.tokens_of(self.function(*arguments), tuple(tokens.shape), node_logits.shape[2])
        self.form("a path that is none of the tree's", ~self._is_path(out, count, *given), out)
        return out

    def _is_path(self, out: Tensor, count: Tensor, tokens: Tensor, parents: Tensor, num_nodes: Tensor) -> Tensor:
        """Whether the tokens before the last lead from child to child. Siblings may have the same token: all are followed."""
        index = torch.arange(tokens.shape[1], device=tokens.device)
        exists = index < num_nodes[:, None]
        inside = exists & (parents >= 0)
        parents = torch.where(inside, parents.long(), 0)
        reached = (index == 0) & exists
        good = torch.ones_like(count, dtype=torch.bool)
        for depth in range(tokens.shape[1] - 1):
            following = inside & reached.gather(1, parents) & (tokens == out[:, depth, None])
            goes = depth < count - 1
            good &= ~goes | following.any(1)
            reached = torch.where(goes[:, None], following, reached)
        return good
