"""What the tests of the suite use: the function behind checks of the form of its output, seeds, sizes, decoding.

`Run` is for functions on chains, `TreeRun` for functions on draft trees; the two forms: suite.py.
"""

from __future__ import annotations

import contextlib

import torch
from torch import Tensor

from .chain import models
from .chain.edges import Detected
from .tree import models as tree_models

FALSE_ALARM = 1e-4
FINDINGS = 100
LEVEL = FALSE_ALARM / FINDINGS
_MIX = -7046029254386353131  # 2^64 / golden ratio


class _Run:
    default_draft = staticmethod(models.draft)

    def __init__(self, function, rule, requests, seed, device, draft, schedule, dtype):
        self.function, self.rule, self.requests, self.seed = function, rule, requests, seed
        self.device, self.dtype, self.level = torch.device(device), dtype, LEVEL
        self.draft = draft or self.default_draft
        self.schedule = schedule or models.schedule
        self._plays: dict = {}

    def seeds(self, purpose: str, count: int | None = None) -> Tensor:
        """Seeds [count], others for every purpose; neighbours are far apart."""
        first = sum(ord(letter) * 131**i for i, letter in enumerate(purpose)) % (1 << 40) + self.seed * 1000003
        index = torch.arange(self.requests if count is None else count, device=self.device)
        return (index + first) * _MIX

    def model(self, model: models.Model) -> models.Model:
        tables = (table.to(self.device, self.dtype).float() for table in (model.target, model.draft))
        return models.Model(*tables, model.confidence.to(self.device))

    def play(self, model: models.Model, drafts, **options) -> models.Play:
        raise NotImplementedError

    def probe(self) -> None:
        """Call the function once, on an ordinary batch of two requests; whatever it raises passes through."""
        with contextlib.suppress(Detected):  # of the form of its output: the tests say so
            self._probe()

    def decode(self, purpose: str, model: models.Model, drafts, tokens: int, rounds: int | None, **options):
        """(model, history [R, tokens], drafts accepted in the first round [R]). drafts: how many, or the shapes of trees."""
        if purpose not in self._plays:
            model = self.model(model)
            seeds = self.seeds(purpose)
            self._plays[purpose] = (
                model, *self.play(model, drafts, **options).decode(seeds, tokens, rounds, 3, salt=len(purpose))
            )  # fmt: skip
        return self._plays[purpose]

    def call_with(self, tensors, temperature, seeds, lens, anchor_position, words=()) -> Tensor:
        """Tokens, on the CPU, of one call with these tensors, then words, temperature, seeds, and so on; moved to the device."""
        requests = tensors[0].shape[0]
        move = lambda x: None if x is None else x if x.device == self.device else x.to(self.device)  # noqa: E731
        whole = lambda x, dtype: torch.as_tensor(x, dtype=dtype).expand(requests).contiguous()  # noqa: E731
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

    def tokens_of(self, out, shape: tuple[int, int], vocab: int) -> tuple[Tensor, Tensor]:
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

    def form(self, what: str, wrong: Tensor, out: Tensor):
        if bool(wrong.any()):
            r = int(wrong.long().argmax())
            raise Detected(f"{what}: {int(wrong.sum())} of {len(wrong)} requests, request {r} got {out[r].tolist()}")


class Run(_Run):
    """Of a function on chains."""

    def __init__(self, function, rule, *rest):
        self.default_draft = models.draft_coupled if rule == "coupled" else models.draft
        super().__init__(function, rule, *rest)

    def _probe(self):
        drafts = torch.tensor([[1, 2], [0, 3]])
        self.call_rows(torch.arange(30.0).view(2, 3, 5) % 4, drafts, torch.zeros(2, 2, 5))

    def play(self, model: models.Model, drafts: int, **options) -> models.Play:
        return models.Play(self.call, model, drafts, draft=self.draft, schedule=self.schedule, dtype=self.dtype, **options)

    def call_rows(self, target, drafts, draft_logits, seeds=None, *, lens=None, temperature=1.0, anchor_position=7) -> Tensor:
        """Tokens [R, K+1], on the CPU, of one call with these rows."""
        return self.call_with(
            (target, drafts, draft_logits), temperature, seeds, drafts.shape[1] if lens is None else lens, anchor_position
        )  # fmt: skip

    def call(self, target_logits, draft_tokens, draft_logits, temperature, seeds, draft_lens, anchor_positions) -> Tensor:
        """The function's tokens, int64, once their form is right."""
        drafts, lens = draft_tokens.clone(), draft_lens.to(torch.int64)
        out = self.function(target_logits, draft_tokens, draft_logits, temperature, seeds, draft_lens, anchor_positions)
        requests, num_drafts = drafts.shape
        out, count = self.tokens_of(out, (requests, num_drafts + 1), target_logits.shape[2])
        index = torch.arange(num_drafts + 1, device=out.device)
        padded = torch.nn.functional.pad(drafts, (0, 1), value=-1)
        self.form("more than the admitted drafts and one token", count > lens + 1, out)
        self.form("a token that is not the draft before the last", ((index < count[:, None] - 1) & (out != padded)).any(1), out)
        return out


class TreeRun(_Run):
    """Of a function on trees. drawn: the ways of making children that it is for."""

    default_draft = staticmethod(tree_models.draft)

    def __init__(self, *arguments, drawn: tuple[str, ...]):
        super().__init__(*arguments)
        self.drawn = drawn

    def _probe(self):
        tokens, parents = torch.tensor([[0, 1, 2], [4, 0, 3]]), torch.tensor([[-1, 0, 1], [-1, 0, 0]], dtype=torch.int32)
        drawn = self.drawn[0]
        self.call_rows(
            torch.arange(30.0).view(2, 3, 5) % 4, tokens, parents, None if drawn == "one_hot" else torch.zeros(2, 3, 5), drawn
        )

    def play(self, model: models.Model, drafts, **options) -> tree_models.TreePlay:
        return tree_models.TreePlay.of(self.call, model, drafts, draft=self.draft, dtype=self.dtype, **options)

    def call_rows(
        self, node_logits, tokens, parents, draft_logits, drawn, seeds=None, *, num_nodes=None, temperature=1.0, anchor_position=7
    ) -> Tensor:
        """Tokens [R, M], on the CPU, of one call with these trees."""
        return self.call_with(
            (node_logits, tokens, parents, draft_logits), temperature, seeds, tokens.shape[1] if num_nodes is None else num_nodes,
            anchor_position, words=(drawn,),
        )  # fmt: skip

    def call(self, node_logits, tokens, parents, draft_logits, drawn, temperature, seeds, num_nodes, anchor_positions) -> Tensor:
        """The function's tokens, int64, once their form is right."""
        given = tokens.clone(), parents.clone(), num_nodes.to(torch.int64)
        out = self.function(
            node_logits, tokens, parents, draft_logits, drawn, temperature, seeds, num_nodes, anchor_positions
        )  # fmt: skip
        out, count = self.tokens_of(out, tuple(given[0].shape), node_logits.shape[2])
        self.form("a path that is none of the tree's", ~self._is_path(out, count, *given), out)
        return out

    def _is_path(self, out, count, tokens, parents, num_nodes) -> Tensor:
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
