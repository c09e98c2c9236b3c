"""Which logits processors of a call become sampling settings of the ops, and which run on the logits first.

transformers applies its processors one after the other. The end of the list becomes settings as far as it is in the ops' own order:

    repetition penalty, temperature, top-k, top-p, min-p

each at most once and with the values that the ops know. Everything before runs on the logits, row by row, as it would there.
Of several tokens that tie for the last place of top-k, transformers keeps all and the ops keep the lowest ids.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...types import Penalties, SamplingTensors

_REFUSED = {
    "UnbatchedClassifierFreeGuidanceLogitsProcessor": "guidance_scale, which runs the model on a text of its own",
    "SynthIDTextWatermarkLogitsProcessor": "SynthID watermarks, which remember the last step",
}


class Settings(NamedTuple):
    """Of one call.

    sampling: of draft and target; None = every row greedy. before: processors that run on the target's logits. penalised_from: the
    first column of the texts whose ids the repetition penalty counts, of all rows or int64 [B, 1].
    """

    sampling: SamplingTensors | None
    before: list
    penalised_from: int | Tensor = 0


def read(processors, do_sample: bool, seeds: Tensor, columns: int) -> Settings:
    """processors: a LogitsProcessorList. seeds: int64 [B]. columns: of the longest text. Raises ValueError for what is refused."""
    for processor in processors:
        reason = _REFUSED.get(type(processor).__name__)
        if reason is not None:
            raise ValueError(f"logits_processor: expected no {reason}, got {type(processor).__name__}")
    values, before = _end_of(list(processors))
    if not do_sample:
        # Nothing but a penalty can move the arg-max; what else a user gave stands before it or changes nothing.
        values = {name: value for name, value in values.items() if name == "repetition"}
    repetition = values.get("repetition")
    if not do_sample and repetition is None:
        return Settings(None, before)
    rows, device = seeds.shape[0], seeds.device

    def full(name: str, dtype: torch.dtype) -> Tensor | None:
        return torch.full((rows,), values[name], dtype=dtype, device=device) if name in values else None

    penalties = None
    if repetition is not None:
        unused = torch.full((rows, columns), -1, device=device)
        penalties = Penalties(
            unused, torch.zeros_like(unused, dtype=torch.int32), torch.full((rows,), repetition.penalty, device=device)
        )
    sampling = SamplingTensors(
        torch.full((rows,), values.get("temperature", 1.0 if do_sample else 0.0), device=device),
        seeds,
        top_k=full("top_k", torch.int32),
        top_p=full("top_p", torch.float32),
        min_p=full("min_p", torch.float32),
        penalties=penalties,
    )
    start = getattr(repetition, "prompt_ignore_length", None)  # in transformers 5.24 the left padding of each row
    return Settings(sampling, before, start.to(device)[:, None] if isinstance(start, Tensor) else start or 0)


def penalise(settings: Settings, texts: Tensor, lengths: Tensor) -> None:
    """Write the ids of texts [B, columns], of which row b has lengths[b] columns, into the penalties, each id once per row."""
    if settings.sampling is None or settings.sampling.penalties is None:
        return
    columns = torch.arange(texts.shape[1], device=texts.device)
    unused = (columns >= lengths[:, None]) | (columns < settings.penalised_from)
    ids = texts.masked_fill(unused, -1).sort(1).values
    ids[:, 1:].masked_fill_(ids[:, 1:] == ids[:, :-1].clone(), -1)
    settings.sampling.penalties.token_ids.copy_(ids)


def _end_of(processors: list) -> tuple[dict, list]:
    """The settings that the end of the list says, and the processors before it."""
    from transformers.generation import logits_process as theirs

    known = (
        (theirs.RepetitionPenaltyLogitsProcessor, "repetition", lambda own: own),
        (theirs.TemperatureLogitsWarper, "temperature", lambda own: own.temperature),
        (theirs.TopKLogitsWarper, "top_k", lambda own: own.top_k),
        (theirs.TopPLogitsWarper, "top_p", lambda own: own.top_p),
        (theirs.MinPLogitsWarper, "min_p", lambda own: own.min_p),
    )
    values: dict = {}
    place = len(known)
    while processors:
        index = next((i for i, (kind, _, _) in enumerate(known) if type(processors[-1]) is kind), len(known))
        if index >= place or not _is_plain(processors[-1]):
            break
        _, name, read_value = known[index]
        values[name] = read_value(processors[-1])
        processors, place = processors[:-1], index
    return values, processors


def _is_plain(warper) -> bool:
    """Whether a filter removes what it does not keep, and may keep a single token."""
    removed = getattr(warper, "filter_value", -torch.inf) == -torch.inf
    return removed and (getattr(warper, "min_tokens_to_keep", 1) <= 1 or hasattr(warper, "top_k"))
