"""Functions of installed serving engines that do what an op does, as baselines of bench.kernels beside plain PyTorch.

    ENGINES[op][name]   imported when asked for: an engine that is not installed gives no row; one whose function is another than
                        the one written against here gives a row with its error

What is timed: the function and, for acceptance, the target's softmax with temperature in front of it, which an engine must do too
(the names say "softmax +"), its random numbers and its outputs. Not timed, in an engine's favour: the draft's probabilities, which
the draft step has stored, as it has stored the op's proposal; the plan of attention, as for the op; and writing own keys and values
into the pages. Full blocks only, like plain PyTorch.

An engine is timed only after its results were right. Acceptance gets point masses, under which only one output is possible
(rejections at several places, and blocks that pass whole). Attention must equal plain PyTorch's, also with values on the own rows
alone, because a wrong mask would not show among thousands of context keys. Distributions are not tested here.

Signatures as of: flashinfer-ai/flashinfer fb28d72 (flashinfer/sampling.py, flashinfer/prefill.py); sgl-project/sglang 01fe7c2 and
6bfad8f (sgl-kernel/python/sgl_kernel/speculative.py, without and with draft_probs); vllm-project/vllm 7f6fc1c
(vllm/v1/sample/rejection_sampler.py), which took probabilities, and its successor, which takes logits.

Symbols: R requests, K drafts, W = K + 1, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import importlib
import inspect
import types
from collections.abc import Callable

import torch
from torch import Tensor

from bench.shared.baselines import BASELINES, Baseline, _draw, _emitted
from bench.shared.cases import attention as attention_cases  # noqa: F401  its PyTorch baseline checks attention
from bench.shared.cases.checks import require

FAR = -1e4  # a logit whose probability is 0 beside one of 0, in fp16, too


@dataclasses.dataclass(frozen=True)
class Engine:
    """module: what is imported. build(module) -> its Baseline. fits(inputs): whether it does what the op does there.

    check(baseline, inputs) raises AssertionError where its results are wrong.
    """

    module: str
    build: Callable[[types.ModuleType], Baseline]
    fits: Callable[[dict], bool]
    check: Callable[[Baseline, dict], None]


def installed(op: str, inputs: dict) -> list[str]:
    """Names of the engines to compare with on these inputs. One that is there and does not import is among them."""
    names = []
    for name, engine in ENGINES.get(op, {}).items():
        if not engine.fits(inputs):
            continue
        try:
            importlib.import_module(engine.module)
        except ModuleNotFoundError as error:
            if error.name is not None and (engine.module + ".").startswith(error.name + "."):
                continue
        except Exception:
            pass  # imported again, and reported, by whoever calls it
        names.append(name)
    return names


def checked(op: str, name: str, inputs: dict) -> Baseline:
    """The baseline, after its results were found right. Raises whatever the engine raises, AssertionError where they are wrong."""
    engine = ENGINES[op][name]
    baseline = engine.build(importlib.import_module(engine.module))
    engine.check(baseline, inputs)
    return baseline


def _known(function, **options) -> dict:
    """Those options that a version's function has."""
    return {name: value for name, value in options.items() if name in inspect.signature(function).parameters}


def _counter(device) -> dict:
    """On the device: a number on the host would wait for it, and could not be captured."""
    return dict(seed=torch.tensor([1], device=device), offset=torch.tensor([0], device=device))


def _softmax(rows: Tensor, temperature: Tensor) -> Tensor:
    return (rows.float() / temperature[:, None]).softmax(-1)


# --- acceptance -------------------------------------------------------------------------------------------------------


def _plain(inputs) -> bool:
    """The token rule, without what the engines' functions do elsewhere or not at all."""
    sampling = inputs["sampling"]
    settings = ("top_k", "top_p", "min_p", "logit_bias", "token_bitmask", "penalties")
    changed = sampling is not None and any(getattr(sampling, name) is not None for name in settings)
    return inputs["rule"] == "token" and inputs["logprobs"] is None and inputs["state_indices"] is None and not changed


def _is_dense(inputs) -> bool:
    proposal = inputs["proposal"]
    return inputs["sampling"] is not None and hasattr(proposal, "logits") and not hasattr(proposal, "ids")


def _is_one_hot(inputs) -> bool:
    """Also every greedy case."""
    return inputs["sampling"] is None or not hasattr(inputs["proposal"], "logits")


def _ids(inputs) -> Tensor:
    """Anchor and drafts [R, W]."""
    layout = inputs["layout"]
    return layout.token_ids.view(layout.draft_lens.shape[0], layout.max_drafts + 1)


def _draft_probs(inputs) -> Tensor | None:
    """[R, K, V] of a dense proposal."""
    if not _is_dense(inputs):
        return None
    return (inputs["proposal"].logits.float() / inputs["sampling"].temperature[:, None, None]).softmax(-1)


def _flashinfer_accept(sampling) -> Baseline:
    function = sampling.chain_speculative_sampling
    softmax = getattr(sampling, "softmax", _softmax)

    def call(rows, temperature, ids, draft_probs, counter):
        target_probs = softmax(rows, temperature).view(*ids.shape[:1], ids.shape[1] + 1, -1)
        tokens, _, accepted = function(draft_probs=draft_probs, draft_token_ids=ids, target_probs=target_probs, **counter)
        return tokens, accepted

    def arguments(inputs):
        ids = _ids(inputs)
        temperature = inputs["sampling"].temperature.repeat_interleave(ids.shape[1])
        counter = _known(function, **_counter(ids.device))
        return inputs["target_logits"], temperature, ids[:, 1:].int().contiguous(), _draft_probs(inputs), counter

    return Baseline(call, arguments)


def _vllm_accept(sampler) -> Baseline:
    function = sampler.rejection_sample
    # Its sixth argument, by age: probabilities or scaled logits.
    takes_probabilities = "target_probs" in inspect.signature(function).parameters

    def call(rows, temperature, drafts, lens, ends, draft_probs, metadata):
        width = lens[0] + 1
        rows = rows.view(len(lens), width, -1)
        target, bonus = rows[:, :-1].float(), rows[:, -1].float()
        if temperature is None:
            bonus = bonus.argmax(-1)
        else:
            target = target / temperature[:, None, None]
            bonus = _draw(_softmax(bonus, temperature), None)
            target = target.softmax(-1) if takes_probabilities else target
        target = target.contiguous().flatten(0, 1)
        tokens = function(drafts, lens, width - 1, ends, draft_probs, target, bonus.int()[:, None], metadata)
        return tokens, (tokens >= 0).sum(1) - 1

    def arguments(inputs):
        ids, sampling = _ids(inputs), inputs["sampling"]
        requests, width = ids.shape
        greedy, probs = sampling is None, _draft_probs(inputs)
        temperature = None if greedy else sampling.temperature
        # The fields of vLLM's SamplingMetadata that the function reads.
        metadata = types.SimpleNamespace(all_greedy=greedy, all_random=not greedy, temperature=temperature, generators={})
        ends = torch.arange(1, requests + 1, device=ids.device, dtype=torch.int32) * (width - 1)
        drafts = ids[:, 1:].int().flatten()
        probs = None if probs is None else probs.flatten(0, 1)
        return inputs["target_logits"], temperature, drafts, [width - 1] * requests, ends, probs, metadata

    return Baseline(call, arguments)


def _sglang_accept(sgl_kernel) -> Baseline:
    """A chain as a tree. The rule treats drafts as deterministic; draft_probs, where there is one, is its scratch."""

    def call(rows, temperature, ids, tree):
        requests, width = ids.shape
        predicts = torch.empty(requests * width, dtype=torch.int32, device=ids.device)
        index = torch.full((requests, width), -1, dtype=torch.int32, device=ids.device)
        accepted = torch.empty(requests, dtype=torch.int32, device=ids.device)
        given = dict(predicts=predicts, accept_index=index, accept_token_num=accepted, candidates=ids, **tree)
        if temperature is None:
            sgl_kernel.verify_tree_greedy(**given, target_predict=rows.argmax(-1).view(requests, width))
            return predicts, index, accepted
        target_probs = _softmax(rows, temperature).view(requests, width, -1)
        uniforms = torch.rand(requests, width + 1, device=ids.device)
        function = sgl_kernel.tree_speculative_sampling_target_only
        if "draft_probs" in inspect.signature(function).parameters:
            given["draft_probs"] = torch.zeros_like(target_probs)
        function(
            **given,
            uniform_samples=uniforms[:, :-1].contiguous(),
            uniform_samples_for_final_sampling=uniforms[:, -1].contiguous(),
            target_probs=target_probs,
        )
        return predicts, index, accepted

    def arguments(inputs):
        ids, sampling = _ids(inputs).contiguous(), inputs["sampling"]
        rows = torch.arange(ids.numel(), device=ids.device).view(ids.shape)
        following = (torch.arange(1, ids.shape[1] + 1, device=ids.device) % ids.shape[1]).expand(ids.shape).clone()
        following[:, -1] = -1
        tree = dict(retrive_index=rows, retrive_next_token=following, retrive_next_sibling=torch.full_like(ids, -1))
        temperature = None if sampling is None else sampling.temperature.repeat_interleave(ids.shape[1])
        return inputs["target_logits"], temperature, ids, tree

    return Baseline(call, arguments)


def _emitted_tokens(result) -> tuple[Tensor, Tensor]:
    """Tokens [R, W] with -1 behind the last, and accepted drafts [R]. SGLang's: a row's entry is the token behind that row."""
    if len(result) == 2:
        return result
    predicts, index, accepted = result
    inside = torch.arange(index.shape[1], device=index.device) <= accepted[:, None]
    return torch.where(inside, predicts[index.clamp(min=0).long()], -1), accepted


def _points(like: Tensor, ids: Tensor) -> Tensor:
    """Logits of point masses at ids, of the shape and dtype of `like`."""
    return torch.full_like(like, FAR).scatter_(-1, ids.view(*like.shape[:-1], 1), 0.0)


def _check_accept(baseline: Baseline, inputs: dict) -> None:
    """Point masses: request r passes (r + shift) % W drafts, so that one request alone is once rejected and once passes whole."""
    ids, vocab = _ids(inputs), inputs["target_logits"].shape[-1]
    requests, width = ids.shape
    drafts = ids[:, 1:].long()
    at = torch.arange(width, device=ids.device)
    for shift in ((width - 1) // 2, width - 1):
        stops = (torch.arange(requests, device=ids.device) + shift) % width
        others = (torch.cat([drafts, drafts[:, -1:]], 1) + 1) % vocab
        best = torch.where(at < stops[:, None], torch.cat([drafts, drafts[:, -1:]], 1), others)
        given = inputs | dict(target_logits=_points(inputs["target_logits"], best))
        if _is_dense(inputs):
            proposal = inputs["proposal"]
            points = dataclasses.replace(proposal, logits=_points(proposal.logits, drafts), lse=torch.zeros_like(proposal.lse))
            given["proposal"] = points
        tokens, accepted = _emitted_tokens(baseline.function(*baseline.arguments(given)))
        want = _emitted(drafts, stops, best.gather(1, stops[:, None]))
        require(tokens.shape == want.shape, f"tokens of shape {tuple(tokens.shape)}, expected {tuple(want.shape)}")
        require(torch.equal(tokens.long(), want), "tokens of point masses differ")
        require(torch.equal(accepted.long(), stops), "accepted drafts of point masses differ")


# --- drafting ---------------------------------------------------------------------------------------------------------


def _flashinfer_draft(sampling) -> Baseline:
    function = sampling.sampling_from_logits

    def call(rows, temperature, counter):
        return function(rows.float() / temperature[:, None], **counter)

    def arguments(inputs):
        rows = inputs["base_logits"]
        temperature = inputs["sampling"].temperature.repeat_interleave(rows.shape[1])
        return rows.flatten(0, 1), temperature, _known(function, **_counter(rows.device))

    return Baseline(call, arguments)


def _draft_fits(inputs) -> bool:
    """Positions that do not depend on each other: no head, no confidence."""
    sampling = inputs["sampling"]
    plain = sampling is not None and sampling.top_k is None and sampling.top_p is None and sampling.min_p is None
    return inputs["head"] is None and inputs["confidence"] is None and plain and "candidates" not in inputs


def _check_draft(baseline: Baseline, inputs: dict) -> None:
    rows = inputs["base_logits"]
    want = (torch.arange(rows.shape[0] * rows.shape[1], device=rows.device) * 7 + 3) % rows.shape[2]
    given = inputs | dict(base_logits=_points(rows, want))
    tokens = baseline.function(*baseline.arguments(given))
    require(tokens.shape == want.shape and torch.equal(tokens.long(), want), "tokens of point masses differ")


# --- attention --------------------------------------------------------------------------------------------------------

HEAD_DIMS = (64, 128, 256)
BUFFER = 128 << 20  # bytes, as its documentation recommends


def _flashinfer_attention(flashinfer) -> Baseline:
    wrapper_of = flashinfer.BatchPrefillWithPagedKVCacheWrapper

    def call(wrapper, q, caches):
        return wrapper.run(q, caches)

    def arguments(inputs):
        q, kv, layout, words = inputs["q"], inputs["kv"], inputs["layout"], inputs["ancestors"]
        requests, page_size = layout.draft_lens.shape[0], kv.k_cache.shape[1]
        rows, context = q.shape[0] // requests, int(kv.context_lens[0])
        pages = -(-(context + rows) // page_size)
        at = torch.arange(context, context + rows, device=q.device)
        slots = kv.block_tables[:, at // page_size].long() * page_size + at % page_size  # of this step's rows
        caches = []
        for cache, new in ((kv.k_cache, inputs["k_new"]), (kv.v_cache, inputs["v_new"])):
            cache = cache.nan_to_num()  # a copy: it holds NaN where no row may look
            cache.view(-1, *cache.shape[2:])[slots.flatten()] = new
            caches.append(cache)
        each = torch.arange(requests + 1, device=q.device, dtype=torch.int32)
        seen = None
        if words is not None:
            own = torch.arange(rows, device=q.device)
            seen = torch.ones(requests, rows, context + rows, dtype=torch.bool, device=q.device)
            seen[:, :, context:] = (words.view(requests, rows, 1) >> own) & 1 > 0
        wrapper = wrapper_of(torch.empty(BUFFER, dtype=torch.uint8, device=q.device), "NHD")
        wrapper.plan(
            each * rows,
            each * pages,
            kv.block_tables[:, :pages].int().flatten(),
            torch.full_like(each[1:], (context + rows - 1) % page_size + 1),
            q.shape[1],
            kv.k_cache.shape[2],
            q.shape[2],
            page_size,
            custom_mask=None if seen is None else seen.flatten(),
            causal=seen is None,
            sm_scale=inputs.get("scale"),
            q_data_type=q.dtype,
            kv_data_type=kv.k_cache.dtype,
        )
        return wrapper, q, tuple(caches)

    return Baseline(call, arguments)


def _attention_fits(inputs) -> bool:
    q, kv = inputs["q"], inputs["kv"]
    options = ("window", "softcap", "sinks", "state_indices")
    plain = inputs["k_new"] is not None and all(inputs.get(name) is None for name in options)
    half = q.dtype in (torch.float16, torch.bfloat16) and kv.k_cache.dtype == q.dtype
    return plain and half and q.shape[2] in HEAD_DIMS and inputs["mask"] in ("chain", "tree") and kv.k_cache.is_contiguous()


def _check_attention(baseline: Baseline, inputs: dict) -> None:
    """Within two roundings of each to the type of the result, relative to its largest element."""
    checker, kv = BASELINES["tree_attention"], inputs["kv"]
    own = dataclasses.replace(kv, v_cache=torch.zeros_like(kv.v_cache))
    for what, given in (("", inputs), (" over own rows", inputs | dict(kv=own))):
        out, want = (b.function(*b.arguments(given)) for b in (baseline, checker))
        require(out.shape == want.shape, f"attention of shape {tuple(out.shape)}, expected {tuple(want.shape)}")
        bound = 4 * torch.finfo(want.dtype).eps * want.abs().max().item()
        error = (out.float() - want.float()).abs().max().item()
        require(error <= bound, f"attention{what}: error {error:.3g} exceeds {bound:.3g}")


# --- the registry -----------------------------------------------------------------------------------------------------

ENGINES: dict[str, dict[str, Engine]] = {
    "accept_chain": {
        "softmax + flashinfer": Engine(
            "flashinfer.sampling", _flashinfer_accept, lambda i: _plain(i) and _is_dense(i), _check_accept
        ),
        "softmax + vllm": Engine(
            "vllm.v1.sample.rejection_sampler",
            _vllm_accept,
            lambda i: _plain(i) and (_is_dense(i) or _is_one_hot(i)),
            _check_accept,
        ),
        "softmax + sgl_kernel": Engine("sgl_kernel", _sglang_accept, lambda i: _plain(i) and _is_one_hot(i), _check_accept),
    },
    "draft_block": {
        "flashinfer": Engine("flashinfer.sampling", _flashinfer_draft, _draft_fits, _check_draft),
    },
    "tree_attention": {
        "flashinfer": Engine("flashinfer", _flashinfer_attention, _attention_fits, _check_attention),
    },
}
