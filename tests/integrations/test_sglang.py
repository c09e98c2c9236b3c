"""The adapter of SGLang on arrays as SGLang 0.5.23 lays them out; no SGLang is needed.

Layouts: [R, W] candidates with the anchor first, all rows of logits whatever is verified, verify_lens that count the anchor (0 = a
padding row), temperatures [R, 1], tree links in any order.
"""

import inspect
import sys
import types
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import reference.accept
import reference.draft
from dspark_kernels import DenseProposal, GatedMarkovHead, MarkovHead, RnnMarkovHead, SamplingTensors, VerifyLayout
from dspark_kernels.integrations import guard, sglang as adapter

DATA = Path(__file__).resolve().parents[1] / "data"
R, K, V, H, RANK = 3, 3, 29, 6, 4
W = K + 1
POSITIONS, KEY = torch.tensor([30, 7, 12]), 12345


def grid(*shape):
    return torch.randn(*shape).mul(16).round() / 16


def requests_of_step(**names):
    """Requests noted for a step: pool places 5, 2, 9; the second has a seed of its own."""
    names = names or dict(a=None, b=77, c=None)
    placed = [
        SimpleNamespace(rid=name, req_pool_idx=place, sampling_params=SimpleNamespace(sampling_seed=seed))
        for (name, seed), place in zip(names.items(), (5, 2, 9), strict=True)
    ]
    requests = adapter.Requests()
    batch = SimpleNamespace(req_pool_indices=torch.tensor([5, 2, 9]), reqs=placed)
    window = SimpleNamespace(positions_2d=POSITIONS[:, None] + torch.arange(W))
    proposer = SimpleNamespace(noise=SimpleNamespace(key=KEY))
    requests.note(proposer, batch=batch, verify_window=window, bs=R, draft_input=None)
    return requests, batch, window, proposer


def test_seeds_belong_to_requests():
    requests, batch, window, proposer = requests_of_step()
    seeds, positions = requests.rows(R, torch.device("cpu"))
    before, address = seeds.clone(), seeds.data_ptr()
    assert torch.equal(positions, POSITIONS) and before[1] == 77 and len(set(before.tolist())) == R
    # Other rows, and another request in place 2.
    batch.req_pool_indices, batch.reqs = torch.tensor([9, 5, 2]), [batch.reqs[2], batch.reqs[0], batch.reqs[1]]
    batch.reqs[2] = SimpleNamespace(rid="d", req_pool_idx=2, sampling_params=SimpleNamespace(sampling_seed=None))
    requests.note(proposer, batch=batch, verify_window=window, bs=R)
    after = requests.rows(R, torch.device("cpu"))[0]
    assert after[:2].tolist() == before[[2, 0]].tolist() and after[2] != 77 and after.data_ptr() == address


def head(kind):
    module = type(kind, (), {})()
    module.markov_w1, module.markov_w2 = (SimpleNamespace(weight=torch.randn(V, RANK)) for _ in range(2))
    module.gate_proj, module.joint_proj = torch.nn.Linear(H + RANK, RANK), torch.nn.Linear(2 * RANK + H, 3 * RANK)
    module.vocab_shard, module.step_logits_dtype = None, lambda dtype: torch.promote_types(dtype, torch.float32)
    return module


@pytest.mark.parametrize("kind, greedy", [("VanillaMarkov", False), ("GatedMarkovHead", False), ("RNNHead", True)])
def test_drafts_equal_the_reference(kind, greedy):
    torch.manual_seed(1)
    requests = requests_of_step()[0]
    module, base, hidden = head(kind), grid(R, K, V).bfloat16(), torch.randn(R, K, H)
    temperature = torch.tensor([0.9, 0.0, 1.0])
    noise = SimpleNamespace(key=KEY, offset=torch.zeros(1, dtype=torch.int64))
    kept = None if greedy else torch.full((R, K, V), 7.0)
    tokens, logits = adapter.draft_markov_block(
        requests, markov_head=module, base_logits=base, anchor_tokens=torch.tensor([3, 4, 5], dtype=torch.int32),
        draft_hidden=hidden, step_temperatures=temperature, noise=noise, logits_out=kept, greedy_draft=greedy,
        tp_sync=SimpleNamespace(_tp_group=SimpleNamespace(world_size=1)),
    )  # fmt: skip
    weights = module.markov_w1.weight, module.markov_w2.weight, None
    wanted_head = {
        "VanillaMarkov": lambda: MarkovHead(*weights),
        "GatedMarkovHead": lambda: GatedMarkovHead(
            *weights, gate_weight=module.gate_proj.weight.detach(), gate_bias=module.gate_proj.bias.detach()
        ),
        "RNNHead": lambda: RnnMarkovHead(
            *weights, joint_weight=module.joint_proj.weight.detach(), joint_bias=module.joint_proj.bias.detach()
        ),
    }[kind]()
    seeds = requests.rows(R, torch.device("cpu"))[0]
    wanted = reference.draft.draft_block(
        base.float(), torch.tensor([3, 4, 5]), wanted_head, anchor_positions=POSITIONS, hidden=hidden,
        sampling=None if greedy else SamplingTensors(temperature, seeds),
    )  # fmt: skip
    assert torch.equal(tokens, wanted.tokens)
    assert (logits is None) if greedy else logits is kept
    if not greedy:
        torch.testing.assert_close(kept, wanted.proposal.logits)
    assert noise.offset.item() == (not greedy)


def test_drafts_refused():
    module = head("VanillaMarkov")
    common = dict(base_logits=grid(R, K, V), anchor_tokens=torch.zeros(R), draft_hidden=None, step_temperatures=None, noise=None)
    alone = SimpleNamespace(_tp_group=SimpleNamespace(world_size=1))
    for refused, sync in (
        (module, SimpleNamespace(_tp_group=SimpleNamespace(world_size=2))),
        (head("Nemotron35VanillaMarkov"), alone),
    ):
        with pytest.raises(guard.Refused):
            adapter.draft_markov_block(adapter.Requests(), markov_head=refused, tp_sync=sync, **common)
    module.vocab_shard = object()
    with pytest.raises(guard.Refused):
        adapter.draft_markov_block(adapter.Requests(), markov_head=module, tp_sync=alone, **common)


@pytest.mark.parametrize("block", [False, True])
def test_acceptance_equals_the_reference(block):
    found = set()
    for seed in range(4):
        torch.manual_seed(seed)
        requests = requests_of_step()[0]
        target, drafts = grid(R * W + 2, V + 3), grid(R, K, V)  # padded rows and columns, as a graph leaves them
        candidates = torch.randint(0, V, (R, W))
        candidates[:, 1:] = target[: R * W, :V].argmax(-1).view(R, W)[:, :-1]
        candidates[1, 1 + seed % 2] += seed < 2
        candidates %= V
        greedy = torch.tensor([True, False, False])
        info = SimpleNamespace(
            is_all_greedy=False, temperatures=torch.tensor([[1.0], [0.8], [1.2]]), need_top_k_sampling=True, top_ks=torch.tensor([1, 5, 9]),
            need_top_p_sampling=True, top_ps=torch.tensor([1.0, 0.9, 1.0]),
        )  # fmt: skip
        drawn = SimpleNamespace(
            greedy_mask=greedy, greedy_draft=False, corrected_logits=drafts, temperatures=torch.tensor([1.0, 0.8, 1.2])
        )
        cut = SimpleNamespace(verify_lens=torch.tensor([4, 3, 0], dtype=torch.int32))
        accepted, bonus, trimmed = adapter.accept_draft_tokens(
            requests, candidates=candidates, target_logits=target, draft_block=drawn, sampling_info=info, draft_input=None, gamma=K,
            verify_num_draft_tokens=W, cutoff_layout=cut, block_verification=block,
        )  # fmt: skip
        rows = [0, 1, 2, 3, 4, 5, 6, 8]  # request 2 verifies nothing
        starts = torch.tensor([0, 4, 7, 8], dtype=torch.int32)
        layout = VerifyLayout.of_rows(starts, candidates.reshape(-1)[rows], POSITIONS.repeat_interleave(W)[rows], K)
        seeds = requests.rows(R, torch.device("cpu"))[0]
        temperature = torch.tensor([0.0, 0.8, 1.2])
        wanted = reference.accept.accept_chain(
            target[rows, :V].contiguous(), layout, DenseProposal(drafts, temperature=temperature), rule="block" if block else "token",
            sampling=SamplingTensors(temperature, seeds, info.top_ks.int(), info.top_ps),
        )  # fmt: skip
        assert torch.equal(accepted, wanted.num_accepted) and torch.equal(bonus, wanted.next_token)
        assert trimmed.tolist() == [0, 0, 0] and accepted.dtype == torch.int32 and bonus.dtype == torch.int64
        assert accepted[0] == K and accepted[2] == 0
        found.add(int(accepted[1]))
    assert len(found) > 1


@pytest.mark.parametrize("rule", ["token", "block"])
def test_acceptance_equals_sglang_under_the_same_uniforms(rule):
    """What SGLang 0.5.23's kernel accepted when it was given the acceptance uniforms of these seeds and positions."""
    recorded = {name: torch.from_numpy(array) for name, array in np.load(DATA / "sglang_chain.npz").items()}
    target, drafts, temperature = recorded["target_logits"].flatten(0, 1), recorded["drafts"], recorded["temperature"]
    count = len(drafts)
    info = SimpleNamespace(
        is_all_greedy=False, temperatures=temperature[:, None], need_top_k_sampling=False, need_top_p_sampling=False
    )
    drawn = SimpleNamespace(
        greedy_mask=torch.zeros(count, dtype=torch.bool), greedy_draft=False, corrected_logits=recorded["draft_logits"],
        temperatures=temperature,
    )  # fmt: skip
    accepted, _, _ = adapter.accept_draft_tokens(
        SimpleNamespace(rows=lambda count, device: (recorded["seeds"], recorded["anchor_positions"])),
        candidates=torch.cat([torch.zeros(count, 1, dtype=torch.int64), drafts], 1), target_logits=target, draft_block=drawn,
        sampling_info=info, draft_input=None, gamma=3, verify_num_draft_tokens=4, block_verification=rule == "block",
    )  # fmt: skip
    assert torch.equal(accepted, recorded[f"accepted_{rule}"]) and set(accepted.tolist()) == {0, 1, 2, 3}
    assert not torch.equal(recorded["accepted_token"], recorded["accepted_block"])


def test_greedy_acceptance_is_exact():
    target = grid(2 * W, V)
    best = target.argmax(-1).view(2, W)
    candidates = torch.cat([torch.zeros(2, 1, dtype=torch.int64), best[:, :-1]], 1)
    candidates[1, 2] += 1
    drawn = SimpleNamespace(greedy_mask=torch.ones(2, dtype=torch.bool))
    accepted, bonus, _ = adapter.accept_draft_tokens(
        adapter.Requests(), candidates=candidates, target_logits=target, draft_block=drawn, sampling_info=None, draft_input=None,
        gamma=K, verify_num_draft_tokens=W,
    )  # fmt: skip
    assert accepted.tolist() == [K, 1] and bonus.tolist() == [int(best[0, K]), int(best[1, 1])]


def test_verified_lengths():
    """The rule of SGLang's schedule_verify_lens_topk, said again in plain Python."""
    torch.manual_seed(2)
    for budget, least, most in ((0, 1, 0), (4, 1, 0), (7, 1, 3), (5, 2, 0), (99, 0, 0)):
        confidence = torch.rand(5, K).mul(8).round() / 8  # with ties, and zeros
        cfg = SimpleNamespace(min_verify_len=least, survival_eps=1e-6, resolved_max_verify_len=lambda most=most: most or W)
        survival = confidence[:, : most or W].cumprod(1)
        order = sorted((-float(s), k, r) for r, row in enumerate(survival) for k, s in enumerate(row) if s >= cfg.survival_eps)
        taken = [r for _, _, r in order[:budget]]
        wanted = [min(max(least + taken.count(r), least, 1), most or W) for r in range(5)]
        lens = adapter.schedule_verify_lens_topk(confidence=confidence, budget=budget, cfg=cfg)
        assert lens.tolist() == wanted and lens.dtype == torch.int32


# Node 0 has children 4, 2; node 4 has 1, 5; node 1 has 3; node 6 is out of the tree.
FIRST, NEXT = [4, 3, -1, -1, 1, -1, -1], [-1, 5, -1, -1, 2, -1, -1]
PARENTS = [-1, 4, 0, 1, 0, 4, -1]


def test_tree_links_in_any_order():
    order, parents, lens = adapter._parents_first(torch.tensor([FIRST]), torch.tensor([NEXT]))
    order, parents = order[0].tolist(), parents[0].tolist()
    assert order[0] == 0 and order[-1] == 6 and lens.tolist() == [6] and sorted(order) == list(range(7))
    for new, old in enumerate(order[:6]):
        assert parents[new] < new and (parents[new] < 0) == (old == 0)
        assert old == 0 or order[parents[new]] == PARENTS[old]
    assert order.index(4) < order.index(2) and order.index(1) < order.index(5)


def test_tree_acceptance():
    """Nodes whose token the target surely draws are the path; at the root tokens are distributed as the target's."""
    nodes, count = 7, 60
    torch.manual_seed(0)
    tokens = torch.tensor([0, 11, 12, 13, 14, 15, 16])
    probs = torch.zeros(nodes, V)
    probs[0, [14, 12, 20]] = torch.tensor([0.5, 0.25, 0.25])
    probs[4, 11], probs[1, 13], probs[3, 21], probs[2, 22] = 1, 1, 1, 1
    probs[5:, 0] = 1
    predicts = torch.full((count * nodes,), -7, dtype=torch.int32)
    index, number = torch.full((count, 5), -1, dtype=torch.int32), torch.zeros(count, dtype=torch.int32)
    place = torch.arange(count * nodes).view(count, nodes)
    adapter.tree_speculative_sampling_target_only(
        predicts, index, number, tokens.expand(count, nodes), place, torch.tensor(FIRST).expand(count, nodes),
        torch.tensor(NEXT).expand(count, nodes), torch.rand(count, nodes), torch.rand(count), probs.expand(count, nodes, V),
        torch.zeros(1),
    )  # fmt: skip
    paths = {3: ([0, 4, 1, 3], [14, 11, 13, 21]), 1: ([0, 2], [12, 22]), 0: ([0], [20])}
    for request in range(count):
        path, emitted = paths[int(number[request])]
        assert index[request].tolist() == [*place[request, path].tolist(), *[-1] * (5 - len(path))]
        written = dict.fromkeys(range(nodes), -7) | dict(zip(path, emitted, strict=True))
        assert predicts[place[request]].tolist() == [written[node] for node in range(nodes)]
    seen = torch.tensor([(number == n).sum() for n in (3, 1, 0)]).double()
    due = torch.tensor([0.5, 0.25, 0.25], dtype=torch.float64) * count
    assert ((seen - due) ** 2 / due).sum() < 13.8  # 2 degrees, 1 in 1000
    with pytest.raises(guard.Refused):
        adapter.tree_speculative_sampling_target_only(*[None] * 11, threshold_acc=0.9)


# --- registration -----------------------------------------------------------------------------------------------------


@pytest.fixture
def fake(monkeypatch):
    """Modules with the places and signatures of SGLang, and its registry; [(target, hook)] of what is registered."""
    registered, made = [], {}

    def module(name, **names):
        made[name] = types.ModuleType(name)
        vars(made[name]).update(names)
        monkeypatch.setitem(sys.modules, name, made[name])
        return made[name]

    module("sglang", __version__="0.5.23")
    register = lambda target, hook, kind: registered.append((target, hook))  # noqa: E731
    kinds = SimpleNamespace(AROUND="around")
    module("sglang.srt.plugins.hook_registry", HookType=kinds, HookRegistry=SimpleNamespace(register=register))
    for modules, path, names in (adapter._DRAFT, adapter._PROPOSE, adapter._ACCEPT, adapter._SCHEDULE, adapter._TREE):
        own = lambda *arguments, **named: "own"  # noqa: E731
        own.__signature__ = inspect.Signature([inspect.Parameter(n, inspect.Parameter.POSITIONAL_OR_KEYWORD) for n in names])
        owner, *rest = path.split(".")
        value = SimpleNamespace(**{rest[0]: own}) if rest else own
        for name in modules:
            setattr(made.get(name) or module(name), owner, value)
    monkeypatch.delenv(adapter.VARIABLE, raising=False)
    return made, registered


def test_registration(fake, monkeypatch):
    made, registered = fake
    assert "nothing is hooked" in adapter._register()[0] and not registered
    monkeypatch.setenv(adapter.VARIABLE, "all")
    assert len(adapter._register()) == 4
    targets = [target for target, _ in registered]
    assert len(set(targets)) == len(targets) == 9
    for modules, path, _ in (adapter._DRAFT, adapter._ACCEPT, adapter._TREE):
        assert all(f"{module}.{path}" in targets for module in modules)  # in every module that imports it
    hooks = dict(registered)
    # A hook that cannot serve a call gives the engine's answer, and raises nothing.
    assert all(hook(lambda *a, **k: "own", SimpleNamespace(), batch=None) == "own" for hook in hooks.values())


def test_nothing_is_hooked_elsewhere(fake, monkeypatch):
    made, registered = fake
    monkeypatch.setenv(adapter.VARIABLE, "draft,tree")
    made[adapter._DRAFT[0][0]].draft_markov_block = lambda markov_head: None
    made[adapter._TREE[0][0]].tree_speculative_sampling_target_only = None  # as without its CUDA build
    assert all("not hooked" in line for line in adapter._register()) and not registered
    made["sglang"].__version__ = "0.6.0"
    assert adapter._register() == ["nothing is hooked: SGLang 0.6.0 is not one of 0.5.23"]
    monkeypatch.setenv(adapter.VARIABLE, "drafts")
    adapter.register()
    assert not registered
