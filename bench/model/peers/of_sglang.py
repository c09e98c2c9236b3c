"""SGLang's steps: the draft block of its Markov head, and its acceptance, by blocks of the vocabulary where that is switched on and
by one program a request where it is not."""

from __future__ import annotations

import functools
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from bench.model.peers.load import Package
from bench.model.peers.step import REQUESTS, Step, Stream, empty, flat, ids, reals
from bench.shared.cases.case import BF16, DRAFTS, RANK, VOCAB

_KERNELS = "sglang.kernels.ops.speculative"


def package() -> Package:
    return Package(
        "sglang",
        modules={
            "blockwise": f"{_KERNELS}.dspark.blockwise_rejection",
            "accept": f"{_KERNELS}.dspark.dspark_accept",
            "classic": f"{_KERNELS}.reject_sampling",
            "markov": f"{_KERNELS}.dspark.markov_sample",
            "greedy": f"{_KERNELS}.dspark.dspark_draft_model",
            "argmax": f"{_KERNELS}.row_argmax",
            "compare": f"{_KERNELS}.dflash",
        },
        beside=(f"{_KERNELS}.dspark.dispatch",),
        third_party=("msgspec", "flashinfer"),
    )


def _block(c) -> int:
    return c["BLOCK"]


def _block_v(c) -> int:
    return c["BLOCK_V"]


# --- acceptance: its logits are fp32 before they come here ------------------------------------------------------------


def _greedy(m: SimpleNamespace, requests: int) -> None:
    found = m.argmax.row_argmax(reals(requests * (DRAFTS + 1), VOCAB)).view(requests, DRAFTS + 1)
    drafts = ids(requests, DRAFTS + 1, dtype=torch.int64)
    m.compare._fused_correct_drafts_and_bonus_kernel[(requests,)](
        drafts, found, ids(requests), ids(requests, dtype=torch.int64), DRAFTS + 1, BLOCK=8
    )


def _accept_greedy(requests: int) -> Step:
    rows = requests * (DRAFTS + 1)
    return Step(
        "accept_chain", f"greedy_r{requests}", "fused argmax", False, functools.partial(_greedy, requests=requests),
        {
            "_argmax_partial_kernel": (Stream(rows, 4, 4, _block, span=-(-VOCAB // 64)),),
            "_medium_argmax_partial_kernel": (Stream(rows, 4, 4, _block),),
        },
        "fp32 logits",
    )  # fmt: skip


def _blockwise(m: SimpleNamespace, requests: int, dense: bool) -> None:
    m.blockwise.blockwise_rejection_triton(
        candidates=ids(requests, DRAFTS + 1, dtype=torch.int64),
        target_logits=reals(requests * (DRAFTS + 1), VOCAB),
        draft_logits=flat(requests, DRAFTS) if dense else None,
        target_temperatures=reals(requests, 1),
        draft_temperatures=reals(requests),
        noise=SimpleNamespace(key=0x1234567890ABCDEF, counter=ids(1, dtype=torch.int64)),
    )


def _accept_blockwise(requests: int, kind: str) -> Step:
    each = 4 + (BF16 if kind == "dense" else 0)
    return Step(
        "accept_chain", f"{kind}_r{requests}", "blockwise", True,
        functools.partial(_blockwise, requests=requests, dense=kind == "dense"),
        {
            "_stats_kernel": (Stream(requests * DRAFTS, each, each, _block),),
            "_resample_kernel": (Stream(requests, each, each, _block),),
        },
        "fp32 logits of the target; a row a request is drawn from",
    )  # fmt: skip


def _classic(m: SimpleNamespace, requests: int, dense: bool) -> None:
    """accept_draft_tokens without filters and FlashInfer."""
    slots, drafts = DRAFTS + 1, requests * DRAFTS
    if dense:
        draft = m.accept.softmax_temp_triton(logits=flat(drafts), temperatures=reals(requests), rows_per_request=DRAFTS)
    else:
        draft = torch.zeros(drafts, VOCAB, device="meta").scatter_(-1, ids(drafts, 1, dtype=torch.int64), 1.0)
    target = m.accept.softmax_temp_triton(
        logits=reals(requests * slots, VOCAB), temperatures=reals(requests), rows_per_request=slots
    )
    index, predicts, correct = ids(requests, slots), ids(requests * slots), ids(requests)
    retrieve = ids(requests, slots, dtype=torch.int64)
    coins, last = torch.rand(requests, DRAFTS, device="meta"), torch.rand(requests, device="meta")
    m.classic.chain_speculative_sampling_triton(
        predicts, index, correct, ids(requests, slots, dtype=torch.int64), retrieve, retrieve, retrieve, coins, last,
        target.view(requests, slots, VOCAB), draft.view(requests, DRAFTS, VOCAB), 1.0, 1.0, True,
    )  # fmt: skip
    torch.zeros_like(correct)
    m.accept.gather_two_level_bonus_triton(accept_index=index, predicts=predicts, correct_len=correct)


def _accept_classic(requests: int, kind: str) -> Step:
    dense = kind == "dense"
    softmax = Stream(requests * (DRAFTS + 1), 4, 8, _block_v, span=VOCAB)
    of_draft = Stream(requests * DRAFTS, BF16, BF16 + 4, _block_v, span=VOCAB)
    return Step(
        "accept_chain", f"{kind}_r{requests}", "classic", True, functools.partial(_classic, requests=requests, dense=dense),
        {
            "_softmax_temp_kernel": (of_draft, softmax) if dense else (softmax,),
            "speculative_sampling_classic_kernel": (Stream(requests, 8, 8, _block_v, span=VOCAB),),
        },
        "fp32 logits of the target; softmax by its Triton kernel, not FlashInfer's; both sweeps for the token go to the end",
    )  # fmt: skip


# --- drafting ---------------------------------------------------------------------------------------------------------


def _draft(m: SimpleNamespace, requests: int, sampled: bool) -> None:
    """draft_markov_block on one GPU, vanilla head."""
    base, w1, w2 = flat(requests, DRAFTS), empty(VOCAB, RANK), empty(VOCAB, RANK)
    temperatures, offset, kept = reals(requests), ids(1, dtype=torch.int64), flat(requests, DRAFTS)
    last, tokens = ids(requests, dtype=torch.int64), []
    for step in range(DRAFTS):
        latent = F.embedding(last, w1)
        if not sampled and requests == 1:
            last = m.greedy.markov_greedy_step_triton(base_logits=base[:, step], prev_embeds=latent, w2_weight=w2)
        else:
            last = m.markov.MarkovSampleStep.triton(
                base_logits=base[:, step], bias=F.linear(latent, w2), temperatures=temperatures, key=0x1234567890ABCDEF,
                offset=offset, step=step, step_dtype=torch.bfloat16, logits_out=kept[:, step] if sampled else None,
                has_sampled_rows=None if sampled else False,
            )  # fmt: skip
        tokens.append(last)
    if sampled:
        offset.add_(1)
    torch.stack(tokens, dim=1)


def _drafting(requests: int, sampled: bool) -> Step:
    streams = {
        "_markov_sample_partial_kernel": (Stream(requests, 2 * BF16, (3 if sampled else 2) * BF16, _block),),
        # A turn adds 32 of the 256 ranks to 256 logits.
        "_markov_greedy_partial_kernel": (
            Stream(requests, BF16 * RANK, BF16 * (RANK + 1), lambda c: c["BLOCK_V"] * c["BLOCK_R"] // RANK, span=256),
        ),
    }
    fused = not sampled and requests == 1
    products = "the rows of W1 are" if fused else "the rows of W1 and the product with W2 are"
    return Step(
        "draft_block", f"{'sampled' if sampled else 'greedy'}_r{requests}", "fused step" if fused else "Markov step", sampled,
        functools.partial(_draft, requests=requests, sampled=sampled), streams,
        f"{products} torch ops",
    )  # fmt: skip


def steps() -> list[Step]:
    found = []
    for requests in REQUESTS:
        found.append(_accept_greedy(requests))
        found += [make(requests, kind) for kind in ("one_hot", "dense") for make in (_accept_blockwise, _accept_classic)]
        found += [_drafting(requests, sampled) for sampled in (True, False)]
    return found
