"""Tests of a tree acceptance function on batches whose output is known in advance, token by token.

Where a node's row gives one id all probability, every lossless rule must go to the child with that id, or else say it: rows that
are read in the wrong place, nodes that do not exist and paths that are none show without any statistics. `run` is a `run.TreeRun`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..chain.edges import SURE, Detected, expect, expect_same_in_any_batch
from ..chain.rules import NEG_INF, at
from . import rules
from .asked import TreeRun
from .models import Shape

SHAPES = ((-1, 0, 0, 2, 2, 3), (-1, 0, 1, 2, 0, 4), (-1, 0, 0, 0, 1, 3))
VOCAB = 13


def _path(shape: Shape, node: int) -> list[int]:
    return [*_path(shape, shape[node]), node] if node > 0 else []


def _point_batch(vocab: int = VOCAB) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """(node logits, tokens, parents, num_nodes, what every lossless rule emits): every end of every shape, whole and trimmed."""
    nodes = len(SHAPES[0])
    counts: list[int] = []
    logits, tokens, parents, wanted = [], [], [], []
    for shape in SHAPES:
        for count in (nodes, nodes - 2):
            for end in range(count):
                r, index = len(counts), torch.arange(nodes)
                ids = (r + 2 * index) % vocab
                says = (r + 1) % vocab + torch.zeros_like(index)
                for child in range(nodes - 1, 0, -1):  # off the path: what leads to the first child
                    says[shape[child]] = ids[child]
                path = _path(shape, end)
                for parent, child in zip([0, *path], path, strict=False):
                    says[parent] = ids[child]
                says[end] = (r + 2 * end + 3) % vocab
                rows = torch.nn.functional.one_hot(says, vocab) * SURE
                logits.append(torch.where((index >= count)[:, None], rows.roll(2, 1), rows))
                tokens.append(ids)
                parents.append(torch.tensor(shape))
                counts.append(count)
                wanted.append(torch.tensor([*ids[path].tolist(), int(says[end]), *[-1] * (nodes - 1 - len(path))]))
    return torch.stack(logits).float(), torch.stack(tokens), torch.stack(parents).int(), torch.tensor(counts), torch.stack(wanted)


def _ways(run: TreeRun, draft_logits: Tensor) -> Iterator[tuple[str, str, Tensor | None]]:
    """For every way of making children that the function is for: (name, way, draft logits or None)."""
    for drawn in run.drawn:
        yield f"{drawn} children", drawn, None if drawn == "one_hot" else draft_logits


def rows(run: TreeRun) -> None:
    """each token from its own node's row: every end of every path, whole trees and trimmed ones, trees of several shapes"""
    target, tokens, parents, counts, wanted = _point_batch()
    for what, drawn, draft_logits in _ways(run, torch.zeros_like(target)):
        expect(what, run.call_rows(target, tokens, parents, draft_logits, drawn, num_nodes=counts), wanted)


def padding(run: TreeRun) -> None:
    """rows that are views of wider ones: what lies behind column V is never read"""
    for vocab in (13, 1029):
        target, tokens, parents, counts, wanted = (x[::3] for x in _point_batch(vocab))
        draft_logits = torch.zeros_like(target)
        wide = [torch.full((*x.shape[:-1], vocab + 7), 3 * SURE) for x in (target, draft_logits)]
        for buffer, x in zip(wide, (target, draft_logits), strict=True):
            buffer[..., :vocab] = x
        views = [buffer.to(run.device)[..., :vocab] for buffer in wide]
        drawn = run.drawn[-1]
        given = None if drawn == "one_hot" else views[1]
        expect(f"V={vocab}", run.call_rows(views[0], tokens, parents, given, drawn, num_nodes=counts), wanted)


def _best_children(logits: Tensor, parents: Tensor, anchors: Tensor) -> Tensor:
    """Tokens [R, M]: the children of a node are the best tokens of its row of logits [R, M, V]."""
    left, tokens = logits.clone(), anchors[:, None].repeat(1, parents.shape[1])
    index = torch.arange(len(parents))
    for node in range(1, parents.shape[1]):
        tokens[:, node] = at(left, parents[:, node]).argmax(1)
        left[index, parents[:, node], tokens[:, node]] = NEG_INF
    return tokens


def _random_parents(generator: torch.Generator, requests: int, nodes: int) -> Tensor:
    columns = [torch.randint(0, node, (requests,), generator=generator) for node in range(1, nodes)]
    return torch.stack([torch.full((requests,), -1), *columns], 1)


def greedy(run: TreeRun) -> None:
    """temperature 0: the path of arg-maxes whatever was drafted, ties to the lowest id, beside sampled requests too"""
    requests, nodes, vocab = 24, 6, 37
    generator = torch.Generator().manual_seed(1)
    parents = _random_parents(generator, requests, nodes)
    target = torch.randint(-4, 5, (requests, nodes, vocab), generator=generator).float()  # many ties
    draft_logits = target + 0.1 * torch.randn(target.shape, generator=generator)
    followed = torch.rand(requests, nodes, 1, generator=generator) < 0.6
    tokens = _best_children(torch.where(followed, target, -draft_logits), parents, parents[:, 1])
    counts = torch.randint(1, nodes + 1, (requests,), generator=generator)
    seeds = run.seeds("greedy", requests).cpu()
    cold = torch.zeros(requests)
    wanted = rules.greedy(target, tokens, parents, draft_logits, "iid", cold, seeds, counts, torch.full((requests,), 7))
    parents = parents.int()
    for what, drawn, given in _ways(run, draft_logits):
        out = run.call_rows(target, tokens, parents, given, drawn, seeds, num_nodes=counts, temperature=0.0)
        expect(what, out, wanted)
    if run.rule != "greedy_tree":
        cold = torch.arange(requests) % 2 == 0
        heat = torch.where(cold, 0.0, 1.0)
        out = run.call_rows(target, tokens, parents, given, drawn, seeds, num_nodes=counts, temperature=heat)
        expect("beside sampled requests", out[cold], wanted[cold])


def batch(run: TreeRun) -> None:
    """a request gets the same tokens whatever else is in the batch, in whatever row, and again"""
    requests, nodes, vocab = 12, 6, 1100
    generator = torch.Generator().manual_seed(2)
    parents = _random_parents(generator, requests, nodes)
    target = torch.randn(requests, nodes, vocab, generator=generator) * 3
    draft_logits = target + torch.randn(requests, nodes, vocab, generator=generator)
    tokens = _best_children(draft_logits, parents, parents[:, 1])
    parents = parents.int()
    counts = 1 + torch.arange(requests) % nodes
    heat = torch.full((requests,), 0.0 if run.rule == "greedy_tree" else 1.0)
    seeds = run.seeds("batch", requests).cpu()
    drawn = run.drawn[-1]

    def emitted(index: Tensor) -> Tensor:
        return run.call_rows(
            target[index], tokens[index], parents[index], None if drawn == "one_hot" else draft_logits[index], drawn, seeds[index],
            num_nodes=counts[index], temperature=heat[index],
        )  # fmt: skip

    expect_same_in_any_batch(emitted, requests)


def bad_rows(run: TreeRun) -> None:
    """NaN reads as -inf, +inf takes all, acceptance stops at a row without a finite logit, ids stay in range"""
    target, tokens, parents, counts, wanted = _point_batch()
    drawn = run.drawn[0]
    draft_logits = None if drawn == "one_hot" else torch.zeros_like(target)

    def emitted(rows: Tensor, given: Tensor | None = draft_logits) -> Tensor:
        return run.call_rows(rows, tokens, parents, given, drawn, num_nodes=counts)

    expect("NaN beside one id", emitted(torch.where(target == 0, float("nan"), target)), wanted)
    expect("+inf", emitted(torch.where(target == SURE, float("inf"), target)), wanted)
    # The first accepted node; where none is, a node that has no part in it.
    accepted = (wanted >= 0).sum(1) - 1
    corrupted = torch.where(accepted > 0, ((tokens == wanted[:, :1]) & (parents == 0)).long().argmax(1), 1)
    here = (torch.arange(tokens.shape[1]) == corrupted[:, None])[..., None]
    index = torch.arange(tokens.shape[1])
    stops = (accepted > 0)[:, None]
    for value in (float("nan"), NEG_INF):
        out = emitted(torch.where(here, value, target))
        any_id = stops & (index == 1)
        known = torch.where(stops & (index > 0), -1, wanted)
        expect(f"row of {value}", torch.where(any_id, -1, out), known)
    if draft_logits is not None and run.rule != "greedy_tree":
        emitted(target, draft_logits + float("nan"))


def extreme(run: TreeRun) -> None:
    """fp16 logits of 6e4 and temperatures of 1e-6: no overflow, no NaN, the arg-max though another is close"""
    target, tokens, parents, counts, wanted = _point_batch()
    target = torch.maximum(target, 0.95 * target.roll(-1, 2))
    draft_logits = torch.zeros_like(target)
    rows = torch.arange(len(draft_logits))
    for node in range(1, tokens.shape[1]):  # a node's children share its row
        draft_logits[rows, parents[:, node].long(), tokens[:, node]] = SURE
    drawn = run.drawn[-1]
    for what, scale, heat in (("large logits", 1000.0, 1.0), ("temperature 1e-6", 0.05, 1e-6), ("both", 1000.0, 1e-6)):
        halves = (target * scale).half(), None if drawn == "one_hot" else (draft_logits * scale).half()
        out = run.call_rows(halves[0], tokens, parents, halves[1], drawn, num_nodes=counts, temperature=heat)
        expect(what, out, wanted)


def empty(run: TreeRun) -> None:
    """no request, a tree of the root alone, room for the root alone"""
    drawn = run.drawn[-1]

    def draft(*shape: int) -> Tensor | None:
        return None if drawn == "one_hot" else torch.zeros(*shape, 13)

    none = run.call_rows(
        torch.zeros(0, 3, 13), torch.zeros(0, 3, dtype=torch.int64), torch.zeros(0, 3, dtype=torch.int32), draft(0, 3), drawn
    )  # fmt: skip
    if tuple(none.shape) != (0, 3):
        raise Detected(f"no request: expected tokens [0, 3], got {list(none.shape)}")
    target, tokens, parents, _, _ = _point_batch()
    for nodes in (tokens.shape[1], 1):
        wanted = torch.full((len(tokens), nodes), -1)
        wanted[:, 0] = target[:, 0].argmax(1)
        out = run.call_rows(
            target[:, :nodes], tokens[:, :nodes], parents[:, :nodes], draft(len(tokens), nodes), drawn, num_nodes=1
        )  # fmt: skip
        expect(f"the root, M={nodes}", out, wanted)
