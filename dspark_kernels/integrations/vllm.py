"""vLLM: `draft_block` and `accept_chain` in its model runner V2, through its plug-ins.

`register` is the entry point of `vllm.general_plugins`, so installing the package is enough. What it does by version, what it
leaves to the engine, and how to switch it off: docs/engine-vllm.md. Shapes below: R requests, S request slots, K drafts of each,
L rows of logits, V vocabulary, H hidden size, r Markov rank.

Read from the sources of vLLM 0.32.0 and 0.33.0.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Callable

import torch
from torch import Tensor

from ..cost import CostTable
from ..ops.accept.chain import accept_chain
from ..ops.draft.dense import draft_block
from ..ops.layout.schedule import schedule_prefixes
from ..scheduling import plan_budget
from ..types import ConfidenceHead, DenseProposal, DraftBlock, MarkovHead, OneHotProposal, SamplingTensors, VerifyLayout
from . import guard
from .guard import Part, Reporter, refuse_if
from .rows import AnchorsBySlot, rows_of

VARIABLE = "DSPARK_KERNELS_VLLM"  # which parts to use: see `guard.wanted_parts`
PARTS = ("accept", "draft", "schedule")
DEFAULT_PARTS = ("accept", "draft")  # "schedule" has never run in an engine

_SPEC_DECODE = "vllm.v1.worker.gpu.spec_decode"
_SAMPLER = f"{_SPEC_DECODE}.rejection_sampler"
_SPECULATOR = f"{_SPEC_DECODE}.dspark.speculator"
_ADAPTIVE = f"{_SPEC_DECODE}.adaptive_verification"
_MODEL = "vllm.model_executor.models.qwen3_dspark"
_MODEL_STATE = "vllm.v1.worker.gpu.model_states.interface"

_REJECTION_SAMPLE = (
    "target_logits", "draft_logits", "draft_sampled", "cu_num_logits", "pos", "idx_mapping", "expanded_idx_mapping",
    "expanded_local_pos", "temperature", "seed", "num_speculative_steps", "synthetic_conditional_rates", "use_fp64",
    "use_block_verification", "contexts", "watermarking", "watermarking_skip_mask", "watermark_key",
)  # fmt: skip
_FLY = ("fly_window_size", "fly_entropy_threshold", "fly_entropy_top_k")
_VERIFY = (
    "self", "logits", "draft_logits", "draft_sampled", "pos", "cu_num_logits", "idx_mapping", "idx_mapping_np",
    "expanded_idx_mapping", "expanded_local_pos", "seq_lens_upper_bound_np", "verify_draft_sampled",
)  # fmt: skip
_ASSIGN_BUDGET = ("confidence_probs", "idx_mapping", "capacities", "draft_budget", "num_steps")


@dataclasses.dataclass(frozen=True)
class Version:
    """What a version of vLLM must have for the adapter to touch it.

    signatures: part -> place of a function ("module:name") -> names of its parameters.
    draft_hook: whether the speculator asks its model for `sample_sequential`; without it the speculator's method is replaced.
    """

    signatures: dict[str, dict[str, tuple[str, ...]]]
    draft_hook: bool


def _version(*, fly: bool, draft_hook: bool) -> Version:
    accept = {
        f"{_SAMPLER}:rejection_sample": _REJECTION_SAMPLE + (_FLY if fly else ()),
        f"{_SAMPLER}:RejectionSampler._verify": _VERIFY,
        f"{_MODEL_STATE}:ModelState.custom_sampler": ("self", "sampler"),
    }
    draft = {
        f"{_SPECULATOR}:DSparkSpeculator._sample_sequential": ("self", "num_reqs", "head_hidden"),
        f"{_MODEL}:Qwen3DSparkForCausalLM.compute_draft_logits": ("self", "hidden_states"),
        f"{_MODEL}:DSparkMarkovHead.bias": ("self", "markov_embed", "logits_processor"),
        f"{_MODEL}:DSparkConfidenceHead.forward": ("self", "hidden", "markov_embed"),
    }
    schedule = {
        f"{_ADAPTIVE}:_assign_draft_token_budget": _ASSIGN_BUDGET,
        f"{_ADAPTIVE}:AdaptiveVerificationManager.get_num_tokens": ("self", "num_tokens_per_req", "draft_tokens"),
    }
    return Version(dict(accept=accept, draft=draft, schedule=schedule), draft_hook)


VERSIONS = {"0.32.0": _version(fly=False, draft_hook=False), "0.33.0": _version(fly=True, draft_hook=True)}

_report = Reporter("vllm")
_parts = {name: Part(name, _report) for name in PARTS}
_scratch = guard.Scratch()


# --- registration -----------------------------------------------------------------------------------------------------


def register() -> None:
    """Put the ops into the vLLM of this process; called by vLLM in each of its processes, once or more. Never raises."""
    try:
        for line in _register():
            _report.info(line)
    except Exception as fault:
        _report.error(f"nothing is replaced: {type(fault).__name__}: {fault}", trace=True)


def _register() -> list[str]:
    """Replaces what the environment asks for, and says what, a line each."""
    parts = guard.wanted_parts(VARIABLE, PARTS, DEFAULT_PARTS)
    if not parts:
        return [f"nothing is replaced ({VARIABLE} is off)"]
    found = guard.module("vllm").__version__.split("+")[0]
    if found not in VERSIONS:
        return [f"nothing is replaced: vLLM {found} is not one of {', '.join(VERSIONS)}"]
    version = VERSIONS[found]
    lines = []
    for name in parts:
        unlike = guard.unlike(version.signatures[name])
        if unlike is None:
            lines.append(f"{name}: {_INSTALL[name](version)} (vLLM {found})")
        else:
            lines.append(f"{name}: not replaced: vLLM {found} has another {unlike} than expected")
    return lines


def _install_accept(version: Version) -> str:
    state = guard.resolve(f"{_MODEL_STATE}:ModelState")
    guard.replace(state, "custom_sampler", lambda own: _custom_sampler(own, _parts["accept"]))
    return "accept_chain is the rejection sampler, through ModelState.custom_sampler"


def _install_draft(version: Version) -> str:
    part = _parts["draft"]
    model = guard.resolve(f"{_MODEL}:Qwen3DSparkForCausalLM")
    if version.draft_hook:
        if not hasattr(model, "sample_sequential"):
            model.sample_sequential = _sample_sequential_hook(part)
        return "draft_block samples the blocks of Qwen3DSparkForCausalLM, through its sample_sequential"
    guard.replace(
        guard.resolve(f"{_SPECULATOR}:DSparkSpeculator"), "_sample_sequential", lambda own: _sample_method(own, part, model)
    )
    return "draft_block samples the blocks of Qwen3DSparkForCausalLM, in place of DSparkSpeculator._sample_sequential"


def _install_schedule(version: Version) -> str:
    part = _parts["schedule"]
    module = guard.module(_ADAPTIVE)
    guard.replace(module, "_assign_draft_token_budget_compiled", lambda own: _assign_budget(own, part))
    guard.replace(module.AdaptiveVerificationManager, "get_num_tokens", lambda own: _get_num_tokens(own, part))
    return "plan_budget and schedule_prefixes choose the drafts to verify, in place of two functions of adaptive_verification"


_INSTALL: dict[str, Callable[[Version], str]] = dict(accept=_install_accept, draft=_install_draft, schedule=_install_schedule)


# --- acceptance -------------------------------------------------------------------------------------------------------


def rejection_sample(
    target_logits: Tensor,
    draft_logits: Tensor | None,
    draft_sampled: Tensor,
    cu_num_logits: Tensor,
    pos: Tensor,
    idx_mapping: Tensor,
    expanded_idx_mapping: Tensor,
    expanded_local_pos: Tensor,
    temperature: Tensor,
    seed: Tensor,
    num_speculative_steps: int,
    synthetic_conditional_rates: Tensor | None = None,
    use_fp64: bool = False,
    use_block_verification: bool = False,
    contexts: Tensor | None = None,
    watermarking: Tensor | None = None,
    watermarking_skip_mask: Tensor | None = None,
    watermark_key: int | None = None,
    fly_window_size: int = 0,
    fly_entropy_threshold: float = 0.3,
    fly_entropy_top_k: int = 3,
) -> tuple[Tensor, Tensor]:
    """`accept_chain` with the arguments of vLLM's function of this name (rejection_sampler_utils.py, model runner V2).

    Args:
        target_logits: [L, V], already divided by the temperature and filtered.
        draft_logits: [S, K, V], before the temperature; None = drafts chosen deterministically.
        draft_sampled: int32 or int64 [L], the token of each row; -1 = a draft to reject.
        cu_num_logits: [R + 1]. pos: [L]. idx_mapping: [R], request slots. temperature, seed: fp32 and int64 [S].
        synthetic_conditional_rates: fp32 [K], forced acceptance, not lossless.
        use_block_verification: the block rule.
        expanded_idx_mapping, expanded_local_pos, use_fp64: not read; what they say follows from the others.

    Returns:
        Tokens int64 [R, K + 1], -1 behind the emitted ones, and their numbers int32 [R].

    Raises:
        Refused: watermarks; FLy, which is not lossless.
    """
    refuse_if(any(given is not None for given in (contexts, watermarking, watermarking_skip_mask, watermark_key)), "a watermark")
    refuse_if(bool(fly_window_size), "FLy verification, which is not lossless")
    target_logits, draft_logits = guard.columns_of_both(target_logits, draft_logits)
    proposal = None if draft_logits is None else DenseProposal(draft_logits, temperature=temperature)
    requests, device = len(idx_mapping), target_logits.device
    accepted = accept_chain(
        target_logits,
        VerifyLayout.of_rows(cu_num_logits, draft_sampled, pos, num_speculative_steps),
        proposal,
        sampling=SamplingTensors(temperature, seed),
        rule="block" if use_block_verification else "token",
        target_scaled=True,
        synthetic_rates=synthetic_conditional_rates,
        state_indices=idx_mapping.contiguous(),
        workspace=_scratch(requests, num_speculative_steps, target_logits.shape[1], device),
    )
    return accepted.tokens, accepted.num_emitted


@functools.cache
def rejection_sampler_class() -> type:
    """vLLM's `RejectionSampler` with `accept_chain` in the place of its kernels, as a class of the vLLM of this process."""
    base = guard.resolve(f"{_SAMPLER}:RejectionSampler")

    class DSparkRejectionSampler(base):
        """Verifies with `accept_chain`; settings, log-probabilities and chunks stay the engine's."""

        part = _parts["accept"]

        def _verify(
            self, logits, draft_logits, draft_sampled, pos, cu_num_logits, idx_mapping, idx_mapping_np, expanded_idx_mapping,
            expanded_local_pos, seq_lens_upper_bound_np, verify_draft_sampled,
        ):  # fmt: skip
            def ours():
                refuse_if(self.watermark_key is not None, "a watermark")
                fly = getattr(self, "fly_window_size", 0)
                refuse_if(bool(fly), "FLy verification, which is not lossless")
                processed = self.sampler.apply_sampling_params(
                    logits, expanded_idx_mapping, idx_mapping, idx_mapping_np, pos, draft_sampled, expanded_local_pos,
                    seq_lens_upper_bound_np,
                )  # fmt: skip
                states = self.sampler.sampling_states
                sampled, number = rejection_sample(
                    processed, draft_logits, verify_draft_sampled, cu_num_logits, pos, idx_mapping, expanded_idx_mapping,
                    expanded_local_pos, states.temperature.gpu, states.seeds.gpu, self.num_speculative_steps,
                    self.synthetic_conditional_rates, use_block_verification=self.use_block_verification,
                )  # fmt: skip
                return processed, sampled, number

            def own():
                return base._verify(
                    self, logits, draft_logits, draft_sampled, pos, cu_num_logits, idx_mapping, idx_mapping_np,
                    expanded_idx_mapping, expanded_local_pos, seq_lens_upper_bound_np, verify_draft_sampled,
                )  # fmt: skip

            return self.part(ours, own)

    return DSparkRejectionSampler


def _custom_sampler(own: Callable, part: Part) -> Callable:
    """`ModelState.custom_sampler`: ours where the model has none of its own."""

    def custom_sampler(self, sampler):
        def ours():
            chosen = own(self, sampler)
            config = self.vllm_config
            if chosen is not None or config.speculative_config is None:
                return chosen
            refuse_if(getattr(config, "watermark_config", None) is not None, "a watermark")
            refuse_if(config.speculative_config.rejection_sample_method == "fly", "FLy verification, which is not lossless")
            refuse_if(config.parallel_config.tensor_parallel_size > 1, "tensor parallelism")
            return sampler, rejection_sampler_class()(sampler, config.speculative_config, self.device)

        return part(ours, lambda: own(self, sampler))

    return custom_sampler


# --- drafting ---------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Drafter:
    """What of a speculator stays the same from step to step."""

    head: MarkovHead
    confidence: ConfidenceHead | None
    draft_to_target: Tensor | None  # int64 [Vd]
    anchors: AnchorsBySlot
    tokens: Tensor  # int64 [S, K]
    scores: tuple[Tensor, Tensor] | None  # fp32 [S, K] each, with a confidence head: calibrated, and logits
    logits: Tensor | None  # [S, K, Vd], where vLLM's draft_logits have the target's vocabulary instead


_drafters: weakref.WeakKeyDictionary = weakref.WeakKeyDictionary()  # speculator -> _Drafter


def sample_sequential(model, speculator, num_reqs: int, head_hidden: Tensor) -> bool:
    """Sample the blocks of a step with `draft_block`, as vLLM's hook of this name wants it (dspark/speculator.py).

    model: a `Qwen3DSparkForCausalLM`. speculator: its `DSparkSpeculator`. head_hidden: [rows, H], the backbone's output.
    Writes speculator.draft_tokens [:R] by row, draft_logits [S, K, V] by slot, draft_token_confidence_probs [:R] by row.

    Returns:
        True: the step is sampled.

    Raises:
        Refused: before anything is written.
    """
    drafts = speculator.num_speculative_steps
    count = num_reqs * drafts
    drafter = _drafters.get(speculator)
    if drafter is None:
        drafter = _drafters[speculator] = _drafter(model, speculator)
        _check_block(speculator)
    slots = speculator.sample_idx_mapping[:count].view(num_reqs, drafts)[:, 0].contiguous()
    positions = speculator.sample_pos[:count].view(num_reqs, drafts)
    _check_first_rows(speculator, slots, positions)
    hidden = head_hidden[speculator.sample_indices[:count]]
    base = model.compute_draft_logits(hidden)
    vocab_size, kept = base.shape[-1], speculator.draft_logits
    base = base.view(num_reqs, drafts, vocab_size)
    # sample_pos is the position of the drafted token, one behind the anchor for the first.
    anchors = speculator.input_buffers.input_ids[speculator._anchor_idx[:num_reqs]]
    anchors, anchor_positions = drafter.anchors.write(anchors, positions[:, 0] - 1, slots)
    proposal, sampling = OneHotProposal(), None
    if kept is not None:
        base = base.to(kept.dtype)
        sampling = SamplingTensors(speculator.temperature, speculator.seeds)
        stored = kept[..., :vocab_size] if drafter.logits is None else drafter.logits
        proposal = DenseProposal(stored, draft_to_target=drafter.draft_to_target)
    confidence, logits = drafter.scores or (None, None)
    draft_block(
        base,
        anchors,
        drafter.head,
        anchor_positions=anchor_positions,
        sampling=sampling,
        hidden=hidden.view(num_reqs, drafts, -1),
        confidence=drafter.confidence,
        draft_to_target=drafter.draft_to_target,
        state_indices=slots,
        out=DraftBlock(drafter.tokens, proposal, torch.empty_like(slots, dtype=torch.int32), confidence, logits),
        workspace=_scratch(num_reqs, drafts, vocab_size, base.device),
    )
    rows_of(drafter.tokens, slots, 0, speculator.draft_tokens[:num_reqs])
    if confidence is not None:
        rows_of(confidence, slots, 0, speculator.draft_token_confidence_probs[:num_reqs])
    if drafter.logits is not None:
        kept.index_copy_(2, drafter.draft_to_target, drafter.logits)
    return True


def _drafter(model, speculator) -> _Drafter:
    """Raises `Refused` for what `draft_block` does not do here."""
    head, processor, watermarker = model.model.markov_head, model.logits_processor, speculator.draft_watermarker
    refuse_if(speculator._draft_topk is not None, "a draft of top-k candidates (dspark_draft_topk)")
    refuse_if(watermarker is not None, "a watermark")
    refuse_if(speculator.acceptance_estimator is not None, "an acceptance estimator without a confidence head")
    refuse_if(processor.scale != 1.0 or processor.soft_cap is not None, "a scale or soft cap of the draft's logits")
    refuse_if(hasattr(model, "apply_output_logit_transform"), "a transform of the draft's logits")
    refuse_if(speculator.vllm_config.parallel_config.tensor_parallel_size > 1, "tensor parallelism")
    w1, w2 = head.markov_w1.weight.detach(), head.markov_w2.weight.detach()
    refuse_if(not w2.is_floating_point() or w2.dtype.itemsize < 2 or w2.shape[1:] != w1.shape[1:], "a quantised Markov head")
    offsets, width = model.draft_id_to_target_id, processor.org_vocab_size
    target_width = speculator.vocab_size
    refuse_if(offsets is None and width < getattr(model, "target_vocab_size", width), "a reduced vocabulary without a map")
    slots, drafts = len(speculator.temperature), speculator.num_speculative_steps
    device = w1.device
    draft_to_target, logits = None, None
    if offsets is not None:
        draft_to_target = torch.arange(width, device=device) + offsets.detach()
        if speculator.draft_logits is not None:
            refuse_if(speculator.draft_logits.shape[-1] < target_width, "a reduced vocabulary without room for the target's")
            logits = torch.zeros(slots, drafts, width, dtype=speculator.draft_logits.dtype, device=device)
            speculator.draft_logits.fill_(-torch.inf)  # the ids that the draft never proposes
    confidence, scores = None, None
    if speculator.use_confidence_head:
        linear = model.model.confidence_head.proj
        bias = None if linear.bias is None else linear.bias.detach()
        confidence = ConfidenceHead(linear.weight.detach()[0], bias)
        scores = tuple(torch.zeros(slots, drafts, dtype=torch.float32, device=device) for _ in range(2))
    tokens = torch.zeros(slots, drafts, dtype=torch.int64, device=device)
    head = MarkovHead(w1, w2[:width])
    return _Drafter(head, confidence, draft_to_target, AnchorsBySlot(slots, device), tokens, scores, logits)


def _sample_sequential_hook(part: Part) -> Callable:
    """`sample_sequential` as a method of the draft model; False makes the speculator sample itself."""

    def hook(self, speculator, num_reqs, head_hidden):
        return part(lambda: sample_sequential(self, speculator, num_reqs, head_hidden), lambda: False)

    return hook


def _sample_method(own: Callable, part: Part, model: type) -> Callable:
    """`DSparkSpeculator._sample_sequential` for versions without the hook; drafters of other classes keep their own."""

    def _sample_sequential(self, num_reqs, head_hidden):
        def ours():
            refuse_if(not isinstance(self.model, model), f"a {type(self.model).__name__}")
            sample_sequential(self.model, self, num_reqs, head_hidden)

        return part(ours, lambda: own(self, num_reqs, head_hidden))

    return _sample_sequential


def _check_block(speculator) -> None:
    """Say loudly what makes acceptance collapse: output stays right, and almost no draft is accepted."""
    config = speculator.draft_model_config.hf_config
    drafts, queries = speculator.num_speculative_steps, speculator.num_query_per_req
    block = getattr(config, "block_size", None)
    if block is not None and drafts != block:
        _report.error(
            f"few drafts will be accepted: the drafter was trained on blocks of {block}, num_speculative_tokens is {drafts}"
        )
    if queries != drafts + (not speculator.sample_from_anchor):
        anchor = "the anchor drafts too" if speculator.sample_from_anchor else "the anchor does not draft"
        _report.error(f"few drafts will be accepted: {queries} queries per request for {drafts} drafts, where {anchor}")
    mask = getattr(config, "mask_token_id", None)
    if mask is not None and mask != speculator.parallel_drafting_token_id:
        used = speculator.parallel_drafting_token_id
        _report.error(f"few drafts will be accepted: the drafter's mask token is {mask}, the engine fills in {used}")


_seen: weakref.WeakSet = weakref.WeakSet()  # speculators whose rows were looked at


def _check_first_rows(speculator, slots: Tensor, positions: Tensor) -> None:
    """The same for the ids and positions of the first step that has a request: the only one that waits for the device."""
    capturing = slots.is_cuda and torch.cuda.is_current_stream_capturing()
    if speculator in _seen or capturing or int(slots[0]) < 0:
        return
    _seen.add(speculator)
    queries, start = speculator.num_query_per_req, int(speculator._anchor_idx[-1])
    if start != (len(speculator._anchor_idx) - 1) * queries:
        _report.error(f"few drafts will be accepted: anchors are not every {queries} rows")
    first = positions[0].tolist()
    if first != list(range(first[0], first[0] + len(first))):
        _report.error(f"few drafts will be accepted: drafts of one block have positions {first}")
    ids = speculator.input_buffers.input_ids[:queries].tolist()
    if set(ids[1:]) - {speculator.parallel_drafting_token_id}:
        _report.error(f"few drafts will be accepted: behind the anchor stand the ids {ids[1:]}, not the mask token")


# --- scheduling -------------------------------------------------------------------------------------------------------


def assign_draft_token_budget(
    confidence_probs: Tensor, idx_mapping: Tensor, capacities: Tensor, draft_budget: int, num_steps: int
) -> None:
    """`schedule_prefixes` with the arguments of vLLM's `_assign_draft_token_budget` (adaptive_verification.py).

    confidence_probs: fp32 [S, K]. idx_mapping: [R]. capacities: int32 [R], scheduled drafts in, admitted drafts out, in all
    exactly draft_budget, which is less than their sum. vLLM counts rows with that number before it is known.
    """
    slots, device = len(confidence_probs), confidence_probs.device
    zeros = torch.zeros(slots, dtype=torch.int64, device=device)
    block = DraftBlock(
        torch.zeros(slots, num_steps, dtype=torch.int64, device=device),
        OneHotProposal(),
        torch.zeros(len(idx_mapping), dtype=torch.int32, device=device),
        confidence_probs,
    )
    layout = schedule_prefixes(
        block,
        None,
        anchors=zeros,
        anchor_positions=zeros,
        policy="budget",
        budget=torch.full((1,), draft_budget, dtype=torch.int32, device=device),
        max_len=capacities,
        state_indices=idx_mapping.contiguous(),
    )
    lens = layout.draft_lens
    # Drafts that surely fail (survival below 2^-24) are never admitted; where the budget wants them too, the first rows get them.
    left = capacities - lens
    more = (draft_budget - lens.sum() - (left.cumsum(0) - left)).clamp(min=0).minimum(left)
    capacities.copy_(lens + more)


def _assign_budget(own: Callable, part: Part) -> Callable:
    def _assign_draft_token_budget(confidence_probs, idx_mapping, capacities, draft_budget, num_steps):
        arguments = (confidence_probs, idx_mapping, capacities, draft_budget, num_steps)
        return part(lambda: assign_draft_token_budget(*arguments), lambda: own(*arguments))

    return _assign_draft_token_budget


def _get_num_tokens(own: Callable, part: Part) -> Callable:
    """`AdaptiveVerificationManager.get_num_tokens`: the engine keeps its books, `plan_budget` decides the number of drafts."""

    def get_num_tokens(self, num_tokens_per_req, draft_tokens):
        tokens = own(self, num_tokens_per_req, draft_tokens)

        def ours():
            drafts, others, _ = self._batch_budget
            budget = _planned(self, list(drafts.values()), list(others.values()), list(num_tokens_per_req))
            self._batch_budget = drafts, others, budget
            return sum(others.values()) + budget

        return part(ours, lambda: tokens)

    return get_num_tokens


def _planned(manager, drafts: list[int], others: list[int], requests: list[str]) -> int:
    """Drafts of the whole batch. drafts, others: tokens of each request that are drafts, and that are not."""
    slots = [manager.req_states.req_id_to_index[name] for name in requests]
    stale = torch.from_numpy(manager._stale_confidences[manager._stale_idx].np[slots]).float()
    decodes = [count > 0 for count in drafts]
    refuse_if(any(rows != 1 for rows, decoding in zip(others, decodes, strict=True) if decoding), "several anchors of a request")
    computed, prefill = manager.req_states.num_computed_tokens_np[slots], manager.req_states.prefill_len.np[slots]
    emits = torch.from_numpy(computed) + torch.tensor(others) >= torch.from_numpy(prefill)
    room = max(0, manager._max_total_logits - len(requests) * manager.num_bonus_tokens)
    prompts = [0 if decoding else rows for rows, decoding in zip(others, decodes, strict=True)]
    return plan_budget(
        stale,
        _cost_table(manager),
        max_len=torch.tensor(drafts, dtype=torch.int32),
        max_rows=sum(others) + min(sum(drafts), room),
        num_prefill_tokens=torch.tensor(prompts, dtype=torch.int32),
        emits=emits,
    )


def _cost_table(manager) -> CostTable:
    """vLLM's tables, in milliseconds by requests and by rows; a drafting step may have cost 0 there."""
    draft, verify = (torch.from_numpy(table).float().div(1000).clamp(min=1e-9) for table in manager.cost_tables)
    return CostTable(seconds=verify, draft_seconds=draft)
