"""SGLang: `draft_block`, `accept_chain`, `schedule_prefixes` and `accept_tree` through hooks of its plug-ins.

`register` is the entry point of `sglang.srt.plugins`. It hooks nothing unless DSPARK_KERNELS_SGLANG names parts, since no part has
run in an engine yet: tests compare each with the reference on arrays laid out as SGLang has them. What each part replaces and what
it leaves to the engine: docs/engine-sglang.md. Shapes below: R requests, K drafts of each, W = K + 1, V vocabulary, H hidden size.

Read from the sources of SGLang 0.5.23.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.accept.chain import accept_chain
from ..ops.accept.tree import accept_tree
from ..ops.draft.dense import draft_block
from ..ops.layout.schedule import schedule_prefixes
from ..types import (
    DenseProposal,
    DraftBlock,
    DraftTree,
    GatedMarkovHead,
    MarkovHead,
    OneHotProposal,
    RnnMarkovHead,
    SamplingTensors,
    VerifyLayout,
)
from . import guard
from .guard import Part, Reporter, refuse_if

VARIABLE = "DSPARK_KERNELS_SGLANG"  # which parts to use: see `guard.wanted_parts`
PARTS = ("draft", "accept", "schedule", "tree")
VERSIONS = ("0.5.23",)
MOST_ROWS = 4096  # requests of a batch
MOST_SLOTS = 1 << 16  # entries of the request pool

_DSPARK = "sglang.srt.speculative.dspark_components"
_KERNELS = "sglang.kernels.ops.speculative"

# part -> the function's own module, its importing modules, its name, its parameters. A hook replaces an attribute of one module,
# so a function that others import by name is hooked in each of them.
_DRAFT = (
    (f"{_DSPARK}.dspark_draft", f"{_DSPARK}.dspark_draft_sampler"),
    "draft_markov_block",
    ("markov_head", "base_logits", "anchor_tokens", "draft_hidden", "step_temperatures", "noise", "tp_sync", "logits_out",
     "greedy_draft"),
)  # fmt: skip
_PROPOSE = (
    (f"{_DSPARK}.dspark_draft",),
    "DraftBlockProposer.propose",
    ("self", "batch", "draft_input", "verify_window", "bs", "device", "target_model", "sampling_info", "anchor_prepared"),
)
_ACCEPT = (
    (f"{_DSPARK}.dspark_verify", f"{_DSPARK}.dspark_sampling_accept_graph"),
    "accept_draft_tokens",
    ("candidates", "target_logits", "draft_block", "sampling_info", "draft_input", "gamma", "verify_num_draft_tokens",
     "cutoff_layout", "fused_argmax", "block_verification", "rejection_noise"),
)  # fmt: skip
_SCHEDULE = ((f"{_KERNELS}.dspark.dspark_schedule",), "ScheduleVerifyLensTopk.triton", ("confidence", "budget", "cfg"))
_TREE = (
    (f"{_KERNELS}.verify_sampling", "sglang.srt.speculative.eagle_utils", "sglang.srt.speculative.dflash_utils"),
    "tree_speculative_sampling_target_only",
    ("predicts", "accept_index", "accept_token_num", "candidates", "retrive_index", "retrive_next_token",
     "retrive_next_sibling", "uniform_samples", "uniform_samples_for_final_sampling", "target_probs", "draft_probs",
     "threshold_single", "threshold_acc", "deterministic"),
)  # fmt: skip

_report = Reporter("sglang")


# --- registration -----------------------------------------------------------------------------------------------------


def register() -> None:
    """Register the hooks that the environment asks for; called by SGLang in each of its processes. Never raises."""
    try:
        for line in _register():
            _report.info(line)
    except Exception as fault:
        _report.error(f"nothing is hooked: {type(fault).__name__}: {fault}", trace=True)


def _register() -> list[str]:
    parts = guard.wanted_parts(VARIABLE, PARTS, ())
    if not parts:
        return [f"nothing is hooked; {VARIABLE}=draft,accept,schedule,tree turns parts on"]
    found = guard.module("sglang").__version__
    if found not in VERSIONS:
        return [f"nothing is hooked: SGLang {found} is not one of {', '.join(VERSIONS)}"]
    registry = guard.module("sglang.srt.plugins.hook_registry")
    requests, hooked, lines = Requests(), set(), []
    for name in parts:
        hooks = _hooks(name, requests)
        unlike = guard.unlike({f"{modules[0]}:{function}": names for (modules, function, names), _ in hooks})
        if unlike is not None:
            lines.append(f"{name}: not hooked: SGLang {found} has another {unlike} than expected")
            continue
        for (modules, function, _), hook in hooks:
            for target in (f"{module}.{function}" for module in modules):
                if target not in hooked:  # drafting and acceptance both need to know the requests
                    hooked.add(target)
                    registry.HookRegistry.register(target, hook, registry.HookType.AROUND)
        lines.append(f"{name}: hooked {', '.join(function for (_, function, _), _ in hooks)} (SGLang {found})")
    return lines


def _hooks(name: str, requests: Requests) -> list[tuple[tuple, Callable]]:
    """(what is hooked, the hook around it) of a part. A hook gets the engine's function first."""
    part = Part(name, _report)

    def around(ours: Callable) -> Callable:
        def hook(own, *args, **kwargs):
            return part(lambda: ours(*args, **kwargs), lambda: own(*args, **kwargs))

        return hook

    def propose(own, *args, **kwargs):
        part(lambda: requests.note(*args, **kwargs), lambda: None)
        return own(*args, **kwargs)

    if name == "draft":
        return [(_PROPOSE, propose), (_DRAFT, around(lambda **kwargs: draft_markov_block(requests, **kwargs)))]
    if name == "accept":
        return [(_PROPOSE, propose), (_ACCEPT, around(lambda **kwargs: accept_draft_tokens(requests, **kwargs)))]
    if name == "schedule":
        return [(_SCHEDULE, around(lambda cls, **kwargs: schedule_verify_lens_topk(**kwargs)))]
    return [(_TREE, around(tree_speculative_sampling_target_only))]


# --- seeds ------------------------------------------------------------------------------------------------------------


class Requests:
    """Seeds of requests by their place in SGLang's request pool, and seeds and anchor positions of this step's rows.

    SGLang draws noise by row and step, ours belongs to a request: a request draws alike in any row and batch. The rows are kept at
    addresses that never change, which captured graphs read.
    """

    def __init__(self):
        self._names: dict[int, object] = {}  # place in the pool -> the request there
        self._by_slot: Tensor | None = None  # int64 [MOST_SLOTS]

    def note(self, proposer, *, batch, verify_window, bs: int, **_) -> None:
        """Take down the step that begins: its requests and the positions of their anchors."""
        places = batch.req_pool_indices[:bs]
        self._allocate(places.device)
        fresh = [(place, request) for place, request in self._placed(batch) if self._names.get(place) != request.rid]
        if fresh:
            seeds = [_seed(request, proposer.noise.key) for _, request in fresh]
            at, seeds = (torch.tensor(values, dtype=torch.int64) for values in ([place for place, _ in fresh], seeds))
            self._by_slot[at.to(places.device)] = seeds.to(places.device)
            self._names.update((place, request.rid) for place, request in fresh)
        refuse_if(bs > MOST_ROWS, f"a batch of more than {MOST_ROWS} requests")
        self._seeds[:bs] = self._by_slot[places.long()]
        self._positions[:bs] = verify_window.positions_2d[:bs, 0]

    @staticmethod
    def _placed(batch):
        for request in batch.reqs or ():
            place = request.req_pool_idx
            refuse_if(place >= MOST_SLOTS, f"a request pool of more than {MOST_SLOTS} entries")
            yield place, request

    def rows(self, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Seeds and anchor positions of the first rows, int64 [R] each."""
        self._allocate(device)
        refuse_if(count > MOST_ROWS, f"a batch of more than {MOST_ROWS} requests")
        return self._seeds[:count], self._positions[:count]

    def _allocate(self, device: torch.device) -> None:
        if self._by_slot is None:
            sizes = (MOST_SLOTS, MOST_ROWS, MOST_ROWS)
            self._by_slot, self._seeds, self._positions = (torch.zeros(n, dtype=torch.int64, device=device) for n in sizes)


def _seed(request, key: int) -> int:
    """The request's own seed, else one that all ranks find alike: of its name and the server's key."""
    given = getattr(request.sampling_params, "sampling_seed", None)
    if given is not None:
        return int(given)
    digest = hashlib.blake2b(f"{key} {request.rid}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little", signed=True)


# --- drafting ---------------------------------------------------------------------------------------------------------


def draft_markov_block(
    requests: Requests,
    *,
    markov_head,
    base_logits: Tensor,
    anchor_tokens: Tensor,
    draft_hidden: Tensor | None,
    step_temperatures: Tensor,
    noise,
    tp_sync,
    logits_out: Tensor | None = None,
    greedy_draft: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """`draft_block` with the arguments of SGLang's function of this name (dspark_draft.py).

    base_logits: [R, K, V]. anchor_tokens: [R]. draft_hidden: [R, K, H]. step_temperatures: fp32 [R], 0 on greedy rows.
    Returns tokens int64 [R, K] and the logits they were drawn from [R, K, V], None for a greedy draft.
    """
    count, drafts, _ = base_logits.shape
    refuse_if(markov_head.vocab_shard is not None, "a sharded vocabulary")
    refuse_if(tp_sync._tp_group.world_size > 1, "tensor parallelism")
    head = _head(markov_head)
    dtype = markov_head.step_logits_dtype(base_logits.dtype)
    base_logits = base_logits.to(dtype)
    seeds, positions = requests.rows(count, base_logits.device)
    sampling = out = None
    if not greedy_draft:
        sampling = SamplingTensors(step_temperatures.contiguous(), seeds)
        if logits_out is None:
            logits_out = torch.empty_like(base_logits)
        tokens = torch.empty(count, drafts, dtype=torch.int64, device=base_logits.device)
        flags = torch.empty(count, dtype=torch.int32, device=base_logits.device)
        out = DraftBlock(tokens, DenseProposal(logits_out), flags)
        noise.offset.add_(1)
    hidden = None if type(head) is MarkovHead else draft_hidden
    block = draft_block(
        base_logits, anchor_tokens.contiguous(), head, anchor_positions=positions, sampling=sampling, hidden=hidden, out=out
    )
    return block.tokens, None if greedy_draft else logits_out


def _head(module) -> MarkovHead:
    kind = type(module).__name__
    refuse_if(kind not in ("VanillaMarkov", "GatedMarkovHead", "RNNHead"), f"a Markov head of type {kind}")
    w1, w2 = module.markov_w1.weight.detach(), module.markov_w2.weight.detach()
    if kind == "VanillaMarkov":
        return MarkovHead(w1, w2)
    if kind == "GatedMarkovHead":
        gate = module.gate_proj
        return GatedMarkovHead(w1, w2, gate_weight=gate.weight.detach(), gate_bias=gate.bias.detach())
    joint = module.joint_proj
    return RnnMarkovHead(w1, w2, joint_weight=joint.weight.detach(), joint_bias=joint.bias.detach())


# --- acceptance -------------------------------------------------------------------------------------------------------


def accept_draft_tokens(
    requests: Requests,
    *,
    candidates: Tensor,
    target_logits: Tensor,
    draft_block,
    sampling_info,
    draft_input,
    gamma: int,
    verify_num_draft_tokens: int,
    cutoff_layout=None,
    fused_argmax: bool = False,
    block_verification: bool = False,
    rejection_noise=None,
) -> tuple[Tensor, Tensor, Tensor]:
    """`accept_chain` with the arguments of SGLang's function of this name (dspark_verify.py).

    candidates: [R, W], the anchor, then the drafts. target_logits: [R * W, V], as the model gives them. cutoff_layout: its
    verify_lens [R] count the anchor; rows from there on are not read, and 0 is a padding row.

    Returns:
        Accepted drafts int32 [R], the token behind them int64 [R], and zeros int32 [R] (SGLang's count of accepted drafts that
        the cut took away: none is accepted there).
    """
    count, width = candidates.shape
    refuse_if(width != verify_num_draft_tokens, f"{width} candidates of {verify_num_draft_tokens} verified rows")
    device = candidates.device
    seeds, positions = requests.rows(count, device)
    starts = torch.arange(count + 1, dtype=torch.int32, device=device) * width
    by_row = positions[:, None].expand(count, width).reshape(-1)  # acceptance reads that of the anchor
    if cutoff_layout is not None:
        # A draft of -1 is rejected, and the token behind it comes from the target's own distribution.
        verified = cutoff_layout.verify_lens.to(device)[:, None]
        candidates = torch.where(torch.arange(width, device=device) < verified, candidates, -1)
    layout = VerifyLayout.of_rows(starts, candidates.reshape(-1), by_row, width - 1)
    sampling = proposal = None
    target_logits = target_logits[: count * width]
    if sampling_info is not None and not sampling_info.is_all_greedy:
        greedy = draft_block.greedy_mask
        temperature = torch.where(greedy, 0.0, sampling_info.temperatures.reshape(-1).float())
        top_k = sampling_info.top_ks.reshape(-1).int() if sampling_info.need_top_k_sampling else None
        top_p = sampling_info.top_ps.reshape(-1).float() if sampling_info.need_top_p_sampling else None
        sampling = SamplingTensors(temperature, seeds, top_k, top_p)
        if not draft_block.greedy_draft:
            target_logits, logits = guard.columns_of_both(target_logits, draft_block.corrected_logits)
            proposal = DenseProposal(logits, temperature=torch.where(greedy, 0.0, draft_block.temperatures.float()))
    rule = "block" if block_verification else "token"
    accepted = accept_chain(target_logits, layout, proposal, sampling=sampling, rule=rule)
    return accepted.num_accepted, accepted.next_token, torch.zeros_like(accepted.num_accepted)


def tree_speculative_sampling_target_only(
    predicts: Tensor,
    accept_index: Tensor,
    accept_token_num: Tensor,
    candidates: Tensor,
    retrive_index: Tensor,
    retrive_next_token: Tensor,
    retrive_next_sibling: Tensor,
    uniform_samples: Tensor,
    uniform_samples_for_final_sampling: Tensor,
    target_probs: Tensor,
    draft_probs: Tensor,
    threshold_single: float = 1.0,
    threshold_acc: float = 1.0,
    deterministic: bool = True,
) -> None:
    """`accept_tree` with the arguments of SGLang's function of this name (speculative/sampling.py); nodes were not drawn.

    candidates: [R, W], node 0 the anchor; retrive_index: [R, W], where a node stands in predicts; retrive_next_token and
    retrive_next_sibling: [R, W], first child and next sibling, -1 = none; target_probs: [R, W, V]. Writes predicts at the nodes of
    the accepted path, accept_index [R, depth] (those places) and accept_token_num [R]. The seeds are the bits of SGLang's own
    uniforms; draft_probs is all zeros and not read.
    """
    refuse_if(threshold_single < 1.0 or threshold_acc < 1.0, "an acceptance threshold below 1, which is not lossless")
    count, nodes = candidates.shape
    refuse_if(nodes > 64, "a tree of more than 64 nodes")
    device = candidates.device
    order, parents, lens = _parents_first(retrive_next_token.long(), retrive_next_sibling.long())
    tokens = candidates.long().gather(1, order)
    place = retrive_index.long().gather(1, order)
    starts = torch.arange(count + 1, dtype=torch.int32, device=device) * nodes
    layout = VerifyLayout.of_rows(starts, tokens.reshape(-1), torch.zeros_like(tokens).reshape(-1), nodes - 1)
    none = torch.full_like(parents, -1)
    # Walking reads parents alone of a tree.
    tree = DraftTree(
        tokens, parents, none, none, none, torch.zeros_like(tokens), lens, OneHotProposal(), "one_hot", torch.zeros_like(lens)
    )
    words = torch.stack([uniform_samples[:, 0], uniform_samples_for_final_sampling], 1).float().contiguous()
    seeds = words.view(torch.int32).long() @ torch.tensor([1, 1 << 32], device=device)
    ones = torch.ones(count, dtype=torch.float32, device=device)
    rows = (torch.arange(count, device=device)[:, None] * nodes + order).reshape(-1)
    logits = target_probs.reshape(count * nodes, -1)[rows].float().log()
    accepted = accept_tree(logits, layout, tree, sampling=SamplingTensors(ones, seeds), rule="walk", target_scaled=True)
    # Entries behind the path repeat the anchor's, which is written in any case: no shape depends on the data.
    on_path = torch.arange(nodes, device=device) <= accepted.num_accepted[:, None]
    path = torch.where(on_path, accepted.path, 0).long()
    emitted = torch.where(on_path, accepted.tokens, accepted.tokens[:, :1])
    predicts[place.gather(1, path).reshape(-1)] = emitted.reshape(-1).to(predicts.dtype)
    depth = min(accept_index.shape[1], nodes)
    kept = torch.where(on_path, place.gather(1, path), accept_index.new_tensor(-1).long())[:, :depth]
    accept_index[:, :depth] = torch.where(on_path[:, :depth], kept.to(accept_index.dtype), accept_index[:, :depth])
    accept_token_num.copy_(accepted.num_accepted)


def _parents_first(first_child: Tensor, next_sibling: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """An order of nodes with parents before children and elder before younger siblings, for links in any order.

    first_child, next_sibling: int64 [R, W], -1 = none. Returns the old number of each new node int64 [R, W] (nodes out of reach
    last), the new parent of each int32 [R, W], and the number of nodes in reach int32 [R].
    """
    count, nodes = first_child.shape
    node = torch.arange(nodes, device=first_child.device).expand(count, nodes)
    elder, parent = _sources(next_sibling), _sources(first_child)
    # By pointer doubling: after n steps a pointer has gone over 2^n links.
    rank, eldest = _distance(elder)
    parent = parent.gather(1, eldest)  # only an eldest child has its parent's link
    depth, root = _distance(parent)
    reached = (root == 0) & (depth < nodes)
    key = torch.where(reached, depth * nodes + rank, nodes * nodes)
    order = key.argsort(dim=1, stable=True)
    new = torch.zeros_like(order).scatter_(1, order, node)
    old_parent = parent.gather(1, order)
    parents = torch.where(old_parent >= 0, new.gather(1, old_parent.clamp(min=0)), -1)
    return order, parents.int(), reached.sum(1).int()


def _sources(links: Tensor) -> Tensor:
    """Of each node the node whose link leads to it, -1 = none."""
    count, nodes = links.shape
    node = torch.arange(nodes, device=links.device).expand(count, nodes)
    found = torch.full((count, nodes + 1), -1, dtype=torch.int64, device=links.device)
    return found.scatter_(1, torch.where(links >= 0, links, nodes), node)[:, :nodes]


def _distance(links: Tensor) -> tuple[Tensor, Tensor]:
    """Links from each node to the end of its chain, and the node there."""
    node = torch.arange(links.shape[1], device=links.device).expand_as(links)
    there, steps = torch.where(links >= 0, links, node), (links >= 0).long()
    for _ in range(max(1, (links.shape[1] - 1).bit_length())):
        steps, there = steps + steps.gather(1, there), there.gather(1, there)
    return steps, there


# --- scheduling -------------------------------------------------------------------------------------------------------


def schedule_verify_lens_topk(*, confidence: Tensor, budget: int, cfg) -> Tensor:
    """`schedule_prefixes` with the arguments of SGLang's ScheduleVerifyLensTopk (dspark_schedule.py).

    confidence: [R, K]. Returns verify_lens int32 [R], which count the anchor.
    """
    longest = cfg.resolved_max_verify_len()
    refuse_if(not 0 <= cfg.survival_eps <= 1, "a least survival outside [0, 1]")
    confidence = confidence[:, :longest].float().contiguous()
    count, drafts = confidence.shape
    zeros = torch.zeros(count, dtype=torch.int64, device=confidence.device)
    tokens = torch.zeros(count, drafts, dtype=torch.int64, device=confidence.device)
    layout = schedule_prefixes(
        DraftBlock(tokens, OneHotProposal(), zeros.int(), confidence),
        None,
        anchors=zeros,
        anchor_positions=zeros,
        policy="budget",
        budget=torch.full((1,), max(int(budget), 0), dtype=torch.int32, device=confidence.device),
        survival_floor=float(cfg.survival_eps),
    )
    return (layout.draft_lens + cfg.min_verify_len).clamp(max(cfg.min_verify_len, 1), longest)
