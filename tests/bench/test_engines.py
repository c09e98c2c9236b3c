"""bench/shared/engines.py with stand-ins for the engines' modules: correct ones, wrong ones, other signatures, and none at all."""

import inspect
import sys
import types

import pytest
import torch

pytest.importorskip("triton")

from bench.kernels import __main__ as job
from bench.shared import engines, measure, timing
from bench.shared.cases import layout as lc
from bench.shared.cases.accept import Accept
from bench.shared.cases.attention import Attention
from bench.shared.cases.case import Case
from bench.shared.cases.draft import Draft

CPU = torch.device("cpu")
FLASHINFER, VLLM, SGLANG = (f"softmax + {name}" for name in ("flashinfer", "vllm", "sgl_kernel"))
DENSE, ONE_HOT, GREEDY = (Accept(3, *rest, drafts=2, vocab=50) for rest in (("dense",), ("one_hot",), ("one_hot", False)))


def accepted_by(target, draft, ids):
    """[R, W] of the token rule for probabilities [R, W, V] and [R, K, V] and drafts [R, K], row by row."""
    found = torch.full((ids.shape[0], ids.shape[1] + 1), -1)
    for r, drafts in enumerate(ids.long().tolist()):
        for k, token in enumerate(drafts):
            if torch.rand(()) * draft[r, k, token] >= target[r, k, token]:
                found[r, k] = torch.multinomial((target[r, k] - draft[r, k]).clamp(min=0), 1)
                break
            found[r, k] = token
        else:
            found[r, len(drafts)] = torch.multinomial(target[r, -1], 1)
    return found


def one_hot(ids, vocab):
    return torch.nn.functional.one_hot(ids.long(), vocab).float()


def chain_speculative_sampling(draft_probs, draft_token_ids, target_probs, maybe_output_accepted_token_num=None,
                               maybe_output_emitted_draft_token_num=None, deterministic=True, generator=None, seed=None,
                               offset=None):  # fmt: skip
    assert seed.dtype == torch.int64 and draft_token_ids.dtype == torch.int32
    tokens = accepted_by(target_probs, draft_probs, draft_token_ids)
    return tokens.int(), torch.full((tokens.shape[0],), 77), ((tokens >= 0).sum(1) - 1).int()


def older_chain_speculative_sampling(draft_probs, draft_token_ids, uniform_samples, target_probs):
    raise NotImplementedError


def sampling_from_logits(logits, indices=None, deterministic=True, generator=None):
    return torch.multinomial(logits.softmax(-1), 1)[:, 0].int()


def rejection(target, drafts, lens, longest, ends, draft_probs, bonus):
    assert ends.tolist() == [longest * (r + 1) for r in range(len(lens))] and drafts.dtype == bonus.dtype == torch.int32
    ids = drafts.view(len(lens), longest)
    target = target.view(len(lens), longest, -1)
    drafted = one_hot(ids, target.shape[2]) if draft_probs is None else draft_probs.view_as(target)
    return accepted_by(torch.cat([target, one_hot(bonus, target.shape[2])], 1), drafted, ids).int()


def of_probabilities(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, target_probs,
                     bonus_token_ids, sampling_metadata):  # fmt: skip
    if sampling_metadata.all_greedy:
        target_probs = one_hot(target_probs.argmax(-1), target_probs.shape[1])
    else:
        assert torch.allclose(target_probs.sum(-1), torch.ones(()))
    return rejection(
        target_probs, draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, bonus_token_ids
    )


def of_logits(draft_token_ids, num_draft_tokens, max_spec_len, cu_num_draft_tokens, draft_probs, target_logits, bonus_token_ids,
              sampling_metadata, synthetic_mode=False):  # fmt: skip
    return rejection(
        target_logits.softmax(-1),
        draft_token_ids,
        num_draft_tokens,
        max_spec_len,
        cu_num_draft_tokens,
        draft_probs,
        bonus_token_ids,
    )


def walk(predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling, target):
    """The way down a tree whose nodes have one child, each taken with its probability; then a token from the residual."""
    nodes = candidates.shape[1]
    assert (retrive_next_token == torch.tensor([*range(1, nodes), -1])).all() and (retrive_next_sibling == -1).all()
    for r in range(candidates.shape[0]):
        node, count = 0, 0
        accept_index[r, 0] = retrive_index[r, 0]
        while True:
            child, probs = int(retrive_next_token[r, node]), target[r, node].clone()
            if child < 0 or torch.rand(()) >= probs[candidates[r, child]]:
                break
            predicts[retrive_index[r, node]] = candidates[r, child]
            node, count = child, count + 1
            accept_index[r, count] = retrive_index[r, node]
        if child >= 0:
            probs[candidates[r, child]] = 0
        predicts[retrive_index[r, node]] = torch.multinomial(probs, 1)[0]
        accept_token_num[r] = count


def tree_sampling(predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling,
                  uniform_samples, uniform_samples_for_final_sampling, target_probs, threshold_single=1.0):  # fmt: skip
    assert uniform_samples.shape == candidates.shape
    tree = (predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling)
    walk(*tree, target_probs)


def tree_sampling_with_scratch(predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token,
                               retrive_next_sibling, uniform_samples, uniform_samples_for_final_sampling, target_probs,
                               draft_probs, threshold_single=1.0):  # fmt: skip
    assert draft_probs.shape == target_probs.shape and not draft_probs.any()
    tree = (predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling)
    walk(*tree, target_probs)


def verify_tree_greedy(predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token,
                       retrive_next_sibling, target_predict):  # fmt: skip
    tree = (predicts, accept_index, accept_token_num, candidates, retrive_index, retrive_next_token, retrive_next_sibling)
    walk(*tree, one_hot(target_predict, 50))


class Wrapper:
    """Attention over pages, one request at a time. shift: keys too few."""

    shift = 0

    def __init__(self, float_workspace_buffer, kv_layout="NHD"):
        assert kv_layout == "NHD"

    def plan(self, qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, num_qo_heads, num_kv_heads, head_dim_qk,
             page_size, custom_mask=None, causal=False, sm_scale=None, q_data_type=None, kv_data_type=None):  # fmt: skip
        self.planned = qo_indptr, paged_kv_indptr, paged_kv_indices, paged_kv_last_page_len, page_size, custom_mask, causal

    def run(self, q, paged_kv_cache):
        starts, pages, indices, last, page_size, mask, causal = self.planned
        out, at = torch.empty_like(q), 0
        for r in range(len(last)):
            mine = indices[pages[r] : pages[r + 1]].long()
            count = (len(mine) - 1) * page_size + int(last[r])
            k, v = (c[mine].flatten(0, 1)[:count].transpose(0, 1)[None] for c in paged_kv_cache)
            rows = int(starts[r + 1] - starts[r])
            assert causal == (mask is None)
            seen = torch.ones(rows, count, dtype=torch.bool).tril(count - rows - self.shift)
            if mask is not None:
                seen = mask[at : at + rows * count].view(rows, count)
                at += rows * count
            queries = q[starts[r] : starts[r + 1]].transpose(0, 1)[None]
            got = torch.nn.functional.scaled_dot_product_attention(queries, k, v, attn_mask=seen, enable_gqa=True)
            out[starts[r] : starts[r + 1]] = got[0].transpose(0, 1)
        return out


class Shifted(Wrapper):
    shift = 1


def put(monkeypatch, name, **functions):
    """A module of this name, its parents too."""
    parts = name.split(".")
    for n in range(1, len(parts) + 1):
        path = ".".join(parts[:n])
        if path not in sys.modules:
            monkeypatch.setitem(sys.modules, path, types.ModuleType(path))
    for key, function in functions.items():
        monkeypatch.setattr(sys.modules[name], key, function, raising=False)


REJECTION = "vllm.v1.sample.rejection_sampler"
RIGHT = [
    (FLASHINFER, DENSE, "flashinfer.sampling", dict(chain_speculative_sampling=chain_speculative_sampling)),
    (VLLM, DENSE, REJECTION, dict(rejection_sample=of_probabilities)),
    (VLLM, ONE_HOT, REJECTION, dict(rejection_sample=of_logits)),
    (VLLM, GREEDY, REJECTION, dict(rejection_sample=of_probabilities)),
    (SGLANG, ONE_HOT, "sgl_kernel", dict(tree_speculative_sampling_target_only=tree_sampling)),
    (SGLANG, ONE_HOT, "sgl_kernel", dict(tree_speculative_sampling_target_only=tree_sampling_with_scratch)),
    (SGLANG, GREEDY, "sgl_kernel", dict(verify_tree_greedy=verify_tree_greedy)),
    ("flashinfer", Draft(3, rank=0, drafts=2, vocab=50), "flashinfer.sampling", dict(sampling_from_logits=sampling_from_logits)),
]


@pytest.mark.parametrize("name, spec, module, functions", RIGHT)
def test_a_right_engine_passes_and_a_wrong_one_does_not(monkeypatch, name, spec, module, functions):
    put(monkeypatch, module, **functions)
    inputs = spec.make(1)
    assert engines.installed(spec.op, inputs) == [name]
    baseline = engines.checked(spec.op, name, inputs)
    assert isinstance(baseline.function(*baseline.arguments(inputs)), (tuple, torch.Tensor))  # at the real inputs, too
    ((key, right),) = functions.items()

    def wrong(*arguments, **given):
        result = right(*arguments, **given)
        tokens = given["predicts"] if result is None else result[0] if isinstance(result, tuple) else result
        tokens.view(-1)[0] += 1
        return result

    wrong.__signature__ = inspect.signature(right)
    monkeypatch.setattr(sys.modules[module], key, wrong)
    with pytest.raises(AssertionError, match="tokens of point masses differ"):
        engines.checked(spec.op, name, inputs)


def test_wrong_counts_and_shapes_are_found(monkeypatch):
    def wrong(change):
        put(monkeypatch, "flashinfer.sampling", chain_speculative_sampling=lambda seed, offset, **given: change(
            *chain_speculative_sampling(**given, seed=seed, offset=offset)))  # fmt: skip
        engines.checked("accept_chain", FLASHINFER, DENSE.make(1))

    with pytest.raises(AssertionError, match="accepted drafts of point masses differ"):
        wrong(lambda tokens, each, emitted: (tokens, each, emitted + 1))
    with pytest.raises(AssertionError, match=r"tokens of shape \(3, 2\), expected \(3, 3\)"):
        wrong(lambda tokens, each, emitted: (tokens[:, :2], each, emitted))


def test_an_engine_that_has_a_softmax_uses_its_own(monkeypatch):
    used = []

    def softmax(logits, temperature=None, enable_pdl=None):
        used.append((tuple(logits.shape), temperature.tolist()))
        return (logits.float() / temperature[:, None]).softmax(-1)

    put(monkeypatch, "flashinfer.sampling", chain_speculative_sampling=chain_speculative_sampling, softmax=softmax)
    engines.checked("accept_chain", FLASHINFER, DENSE.make(1))
    assert used == 2 * [((9, 50), [1.0] * 9)]


@pytest.mark.parametrize("mask", ["chain", "tree"])
def test_attention(monkeypatch, mask):
    put(monkeypatch, "flashinfer", BatchPrefillWithPagedKVCacheWrapper=Wrapper)
    spec = Attention(2, 600, rows=5, mask=mask, query_heads=2, kv_heads=1, head_dim=64)
    inputs = spec.make(1)
    assert engines.installed(spec.op, inputs) == ["flashinfer"]
    engines.checked(spec.op, "flashinfer", inputs)
    if mask == "chain":  # a key too few shows in the own rows
        monkeypatch.setattr(sys.modules["flashinfer"], "BatchPrefillWithPagedKVCacheWrapper", Shifted)
        with pytest.raises(AssertionError, match="attention"):
            engines.checked(spec.op, "flashinfer", inputs)
    assert engines.installed(spec.op, Attention(1, 9, rows=2, head_dim=32, query_heads=2, kv_heads=1).make(1)) == []


def test_nothing_is_compared_where_nothing_is_installed_or_another_thing_is_done(monkeypatch):
    for name in ("flashinfer", "vllm", "sgl_kernel"):
        monkeypatch.setitem(sys.modules, name, None)  # what import finds where there is no such module
    for spec in (DENSE, ONE_HOT, GREEDY, Draft(2, rank=0, drafts=2, vocab=50), lc.Fixed(3)):
        assert engines.installed(spec.op, spec.make(1)) == []
    monkeypatch.undo()
    for module in ("flashinfer.sampling", REJECTION, "sgl_kernel"):
        put(monkeypatch, module)
    other = dict(drafts=2, vocab=700)
    for spec in (Accept(2, "sparse", candidates=9, **other), Accept(2, rule="block", **other),
                 Accept(2, "one_hot", settings="filters", **other), Accept(2, "one_hot", logprobs="raw", **other),
                 Draft(2, rank=4, hidden=8, **other), Draft(2, sampled=False, rank=0, **other)):  # fmt: skip
        assert engines.installed(spec.op, spec.make(1)) == [], spec


def test_rows_of_a_right_engine_one_of_another_signature_and_one_that_does_not_import(monkeypatch):
    put(monkeypatch, "flashinfer.sampling", chain_speculative_sampling=older_chain_speculative_sampling)
    put(monkeypatch, REJECTION, rejection_sample=of_logits)

    def once(case, spec, name, how, cache, calls, flush, bench):
        calls[0]()
        return measure.Row(case.op, case.name, name, how, cache, "ok")

    monkeypatch.setattr(measure, "_measured", once)
    machine = timing.Machine("Fake GPU", "1", "2", "3", "abc", multiprocessors=10, lanes=128, l2_bytes=1, max_sm_clock="1000")
    bench = measure.Bench(
        device=CPU, clock=None, machine=machine, bandwidth=1e9, samples=2, baselines=("pytorch", "engines"), small=False,
        capture=lambda call: call, facts=dict,
    )  # fmt: skip
    case = Case("accept_chain", "tiny", DENSE)
    rows = measure.run(case, bench)
    status = {(row.contender, row.call): row.status for row in rows}
    for call in ("graph", "eager"):
        assert status["kernel", call] == status["pytorch", call] == status[VLLM, call] == "ok"
        text = status[FLASHINFER, call]
        assert text.startswith("failed: TypeError: ") and "uniform_samples" in text

    def broken(name):
        raise OSError("libcudart.so: cannot open shared object file")

    monkeypatch.setattr(engines.importlib, "import_module", broken)
    assert engines.installed("accept_chain", DENSE.make(1)) == [FLASHINFER, VLLM]
    with pytest.raises(OSError, match="libcudart"):
        engines.checked("accept_chain", VLLM, DENSE.make(1))


def test_the_help_names_them():
    assert "flashinfer, vllm and" in job.parser().format_help()
