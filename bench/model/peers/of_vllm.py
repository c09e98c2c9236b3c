"""vLLM's steps: its second model runner (`v1/worker/gpu`), which is the one that drafts with a Markov head, and the rejection
sampler of its first (`v1/sample/rejection_sampler.py`)."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from bench.model.peers.load import Package
from bench.model.peers.step import REQUESTS, Step, Stream, empty, flat, ids, reals
from bench.shared.cases.case import BF16, DRAFTS, RANK, VOCAB


def package() -> Package:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice

    return Package(
        "vllm",
        modules={
            "rejection": "vllm.v1.worker.gpu.spec_decode.rejection_sampler_utils",
            "sampler": "vllm.v1.worker.gpu.spec_decode.rejection_sampler",
            "gumbel": "vllm.v1.worker.gpu.sample.gumbel",
            "batch": "vllm.v1.worker.gpu.input_batch",
            "first": "vllm.v1.sample.rejection_sampler",
        },
        beside=(
            "vllm.v1.worker.gpu.sample.watermark",
            "vllm.v1.watermarking.prfs.philox",
            "vllm.v1.watermarking.prfs.base",
            "vllm.v1.spec_decode.fly",
            "vllm.model_executor.warmup.jit_warmup",
            "vllm.model_executor.warmup.jit_warmup_triton_helper",
        ),
        # It takes Triton for missing where it finds no GPU.
        stands_in={"vllm.triton_utils": {"triton": triton, "tl": tl, "tldevice": libdevice, "HAS_TRITON": True}},
    )


def _block(c) -> int:
    return c["BLOCK_SIZE"]


# --- acceptance, second runner ----------------------------------------------------------------------------------------


def _accept(m: SimpleNamespace, requests: int, dense: bool, scaled: bool) -> None:
    """RejectionSampler.__call__ of one chunk without penalties, bias, masks, filters or log-probabilities."""
    rows = requests * (DRAFTS + 1)
    logits, of_row, local, pos = flat(rows), ids(rows), ids(rows), ids(rows, dtype=torch.int64)
    prefill, first_row, slots, temperature = ids(requests), ids(requests + 1), ids(requests), reals(requests)
    drafts, pos = m.sampler.gather_draft_sampled(ids(rows), pos, ids(rows), of_row, local, prefill)
    if scaled:
        logits = torch.empty_like(logits, dtype=torch.float32).copy_(logits)
        m.gumbel.apply_temperature(logits, of_row, temperature)
    draft_logits = flat(requests, DRAFTS) if dense else None
    _, accepted = m.rejection.rejection_sample(
        logits, draft_logits, drafts, first_row, pos, slots, of_row, local, temperature, ids(requests, dtype=torch.int64), DRAFTS
    )
    m.batch.get_num_sampled_and_rejected(accepted, ids(requests), first_row, slots, prefill)


def _acceptance(requests: int, kind: str, scaled: bool) -> Step:
    rows, drafts = requests * (DRAFTS + 1), requests * DRAFTS
    target, draft = 4 if scaled else BF16, BF16 if kind == "dense" else 0
    path = "runner 2" + ("" if kind == "greedy" else ", temperature not 1" if scaled else ", temperature 1")
    return Step(
        "accept_chain", f"{kind}_r{requests}", path, kind != "greedy",
        functools.partial(_accept, requests=requests, dense=kind == "dense", scaled=scaled),
        {
            "_temperature_kernel": (Stream(rows, 4, 8, _block),),
            "_compute_local_logits_stats_kernel": (Stream(drafts, target + draft, target + draft, _block),),
            "_resample_kernel": (Stream(requests, target + draft, target + draft, _block),),
        },
        "gathers draft ids and counts rejections, as its runner does; a row a request is drawn from",
    )  # fmt: skip


# --- acceptance, first runner -----------------------------------------------------------------------------------------


def _accept_first(m: SimpleNamespace, requests: int, dense: bool, sampled: bool) -> None:
    """RejectionSampler.forward without penalties, masks, filters or log-probabilities; of the sampler of the bonus token its torch
    ops."""
    drafts = requests * DRAFTS
    logits, temperature, last = flat(requests * (DRAFTS + 1)), reals(requests), ids(requests)
    bonus = logits[ids(requests)].to(torch.float32)
    if sampled:
        bonus = bonus.div_(temperature.unsqueeze(1)).softmax(-1, dtype=torch.float32)
        bonus.div_(torch.empty_like(bonus).exponential_())
    bonus = bonus.argmax(-1)
    target = logits[ids(drafts)].to(torch.float32).clone()
    if sampled:
        target.div_(m.first.expand_batch_to_tokens(temperature, last, drafts, replace_from=0, replace_to=1).unsqueeze(-1))
    settings = SimpleNamespace(all_greedy=not sampled, all_random=sampled, temperature=temperature, generators={})
    m.first.rejection_sample(
        ids(drafts),
        [DRAFTS] * requests,
        DRAFTS,
        last,
        reals(drafts, VOCAB) if dense else None,
        target,
        bonus.unsqueeze(1),
        settings,
    )


def _acceptance_first(requests: int, kind: str) -> Step:
    dense = 4 if kind == "dense" else 0
    moves = 4 + dense + 4 / DRAFTS  # the noise of a request is that of all its rows
    note = "the bonus token and what is around the kernels are torch ops"
    return Step(
        "accept_chain", f"{kind}_r{requests}", "runner 1", kind != "greedy",
        functools.partial(_accept_first, requests=requests, dense=bool(dense), sampled=kind != "greedy"),
        {"sample_recovered_tokens_kernel": (Stream(requests * DRAFTS, 8 + dense, moves, _block, span=VOCAB),)},
        note + ("; probabilities of the draft are given" if dense else ""),
    )  # fmt: skip


# --- drafting ---------------------------------------------------------------------------------------------------------


def _draft(m: SimpleNamespace, requests: int, sampled: bool) -> None:
    """DSparkSpeculator._sample_sequential after the base logits, vanilla head, without confidence."""
    base, w1, w2 = flat(requests, DRAFTS), empty(VOCAB, RANK), empty(VOCAB, RANK)
    slots, pos = ids(requests, DRAFTS), ids(requests, DRAFTS, dtype=torch.int64)
    cache, columns, tokens = flat(requests, DRAFTS), ids(DRAFTS), ids(requests, DRAFTS, dtype=torch.int64)
    temperature, seeds, last = reals(requests), ids(requests, dtype=torch.int64), ids(requests)
    for i in range(DRAFTS):
        logits = base[:, i] + F.linear(F.embedding(last, w1), w2)
        if sampled:
            last = m.gumbel.gumbel_sample(
                logits, slots[:, i], temperature, seeds, pos[:, i] - 1, apply_temperature=True, is_drafting=True,
                logits_cache=cache, logits_cache_col=columns[i],
            )  # fmt: skip
        else:
            last = logits.argmax(dim=-1)
        tokens[:, i] = last


def _drafting(requests: int, sampled: bool) -> Step:
    return Step(
        "draft_block", f"{'sampled' if sampled else 'greedy'}_r{requests}", "runner 2", sampled,
        functools.partial(_draft, requests=requests, sampled=sampled),
        {"_gumbel_sample_kernel": (Stream(requests, BF16, 2 * BF16, _block),)},
        "the rows of W1, the product with W2 and its sum with the base logits are torch ops",
    )  # fmt: skip


def steps() -> list[Step]:
    found = []
    for requests in REQUESTS:
        found.append(_acceptance(requests, "greedy", scaled=False))
        found += [_acceptance(requests, kind, scaled) for kind in ("one_hot", "dense") for scaled in (False, True)]
        found += [_acceptance_first(requests, kind) for kind in ("greedy", "one_hot", "dense")]
        found += [_drafting(requests, sampled) for sampled in (True, False)]
    return found
