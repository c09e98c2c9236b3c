"""What engines hand over: rows of logits, ids of either width, slots and batch rows, scaled targets, probabilities."""

import copy
import dataclasses

import pytest
import torch

import dspark_kernels as dk
from dspark_kernels.integrations import rows
from reference import accept as reference_accept, cases, layout as layouts, tree as reference_tree
from tests.ops.accept_checks import PER_REQUEST, check
from tests.ops.fields import assert_same

INTS = (torch.int32, torch.int64)


def engine_rows(layout, ids=torch.int64, behind=0):
    """(cu_num_logits, token_ids, positions) at the logit rows of a layout, with `behind` rows of rubbish after them."""
    used = layout.logits_indices[: int(layout.cu_num_logits[-1])]
    rubbish = torch.full((behind,), 7)
    token_ids = torch.cat([layout.token_ids[used], rubbish]).to(ids)
    return layout.cu_num_logits, token_ids, torch.cat([layout.positions[used], rubbish]).to(ids)


def assert_fields(have, want):
    for field in dataclasses.fields(want):
        a, b = getattr(have, field.name), getattr(want, field.name)
        assert torch.equal(a, b) and a.dtype == b.dtype if isinstance(b, torch.Tensor) else a == b, field.name


@pytest.mark.parametrize("ids", INTS)
@pytest.mark.parametrize("starts", [[0, 3, 3, 5, 6, 6], [0, 0, 0], [0, 4], [0]])
def test_layout_of_rows(starts, ids):
    cu = torch.tensor(starts, dtype=ids)
    token_ids = torch.randint(-1, 9, (8,), dtype=ids)
    layout = dk.VerifyLayout.of_rows(cu, token_ids, token_ids + 5, 3)
    assert layout.token_ids is token_ids
    assert_fields(layout, layouts.layout_of_rows(cu, token_ids, token_ids + 5, 3))


@pytest.mark.parametrize("rule", ["token", "block", "coupled"])
def test_acceptance_over_rows_of_an_engine(rule):
    """int32 ids, padding rows and requests, a draft that was taken back: as the reference, and as by forward rows."""
    case = cases.accept_case(seed=5, requests=6, drafts=3, vocab=90, rule=rule, scattered=True, padding=2, exact_rows=True)
    case.layout.token_ids[case.layout.logits_indices[1]] = -1
    whole = check(case)
    cu, token_ids, positions = engine_rows(case.layout, torch.int32, behind=4)
    logits = torch.cat([case.target_logits, torch.full((4, 90), float("nan")).to(case.target_logits.dtype)])
    by_row = dataclasses.replace(case, layout=dk.VerifyLayout.of_rows(cu, token_ids, positions, 3), target_logits=logits)
    acceptance = check(by_row)
    for name in PER_REQUEST:
        if name != "last_row":
            assert torch.equal(getattr(acceptance, name), getattr(whole, name)), name


SWAPPED = {"state_indices", "token_ids", "positions", "anchors", "anchor_positions", "seed"}


def swapped(name, value):
    """The argument with slots as int64, and every other id, position and seed as int32."""
    if isinstance(value, torch.Tensor) and name in SWAPPED:
        return value.to(torch.int64 if name == "state_indices" else torch.int32)
    if isinstance(value, (dk.SamplingTensors, dk.VerifyLayout)):
        fields = {field.name: swapped(field.name, getattr(value, field.name)) for field in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    return value


def small_seeds(arguments):
    """Seeds that both widths hold, negative ones among them."""
    sampling = arguments.get("sampling")
    if sampling is not None:
        arguments["sampling"] = dataclasses.replace(sampling, seed=sampling.seed % 2**32 - 2**31)
    return arguments


def chain(**options):
    return dk.accept_chain, cases.accept_case(
        seed=7, requests=4, drafts=3, vocab=130, scattered=True, padding=1, **options
    ).arguments()


def draft(candidates=None, **options):
    case = cases.draft_case(seed=7, requests=3, drafts=3, vocab=130, rank=4, scattered=True, padding=1, **options)
    return dk.draft_block, case.arguments() | dict(candidates=candidates)


def tree(method, **options):
    arguments = draft()[1]
    names = ("base_logits", "anchors", "anchor_positions", "head", "hidden", "sampling", "state_indices")
    return dk.draft_tree, {name: arguments[name] for name in names} | dict(method=method, num_nodes=5, **options)


def plan():
    case = cases.attention_case(seed=1, scattered=True)
    return dk.plan_attention, dict(layout=case.layout, kv=case.kv, query_heads=6, state_indices=case.state_indices)


WIDTHS = {
    "token": lambda: chain(),
    "block, sparse": lambda: chain(rule="block", proposal="sparse", adjust=cases.ADJUSTMENTS, filters=cases.FILTERS),
    "coupled": lambda: chain(rule="coupled", proposal="none", filters=("top_k",)),
    "accept tree": lambda: (dk.accept_tree, cases.accept_tree_case(7, 2, 4, 130, "iid", "recursive", scattered=True).arguments()),
    "draft": lambda: draft(filters=("top_p",), adjust=cases.ADJUSTMENTS),
    "draft on candidates": lambda: draft(candidates=9, adjust=cases.ADJUSTMENTS),
    "tree best first": lambda: tree("conditioned"),
    "tree of draws": lambda: tree("iid", branching=(2, 1)),
    "plan": plan,
}


@pytest.mark.parametrize("name", WIDTHS)
def test_integers_of_either_width(name):
    op, arguments = WIDTHS[name]()
    arguments = small_seeds(arguments)
    want = op(**arguments)
    narrow = {key: swapped(key, value) for key, value in arguments.items()}
    assert_same(op(**narrow), want)
    if isinstance(want, (dk.Acceptance, dk.DraftBlock)):
        names = [field.name for field in dataclasses.fields(want) if field.name in ("tokens", "next_token")]
        ids = {field: torch.full_like(getattr(want, field), -1, dtype=torch.int32) for field in names}
        out = op(**narrow, out=dataclasses.replace(copy.deepcopy(want), **ids))
        assert_same(dataclasses.replace(out, **{field: getattr(out, field).long() for field in names}), want)


def test_rows_beside_slots():
    """Anchors, positions and drafts by batch row, settings and proposals by slot: the drafts of a call all by slot."""
    op, arguments = draft()
    slots = arguments["state_indices"]
    want = op(**arguments)
    live = slots.clamp(min=0).long()
    anchors, positions = arguments["anchors"][live], arguments["anchor_positions"][live].int()
    by_slot = rows.AnchorsBySlot(len(arguments["anchors"]), "cpu")
    by_slot.write(anchors.flip(0), positions.flip(0), slots.flip(0).long())  # another batch, in another order
    anchors, positions = by_slot.write(anchors, positions, slots)
    block = op(**arguments | dict(anchors=anchors, anchor_positions=positions))
    assert_same(block, want)
    tokens = torch.full((len(slots), 3), 5, dtype=torch.int32)
    assert rows.rows_of(block.tokens, slots, out=tokens) is tokens
    assert torch.equal(tokens.long(), torch.where((slots >= 0)[:, None], want.tokens[live], -1))


def scaled(case, slot_of_row):
    """Target rows divided by the temperatures of their requests, powers of two: the same bits after scaling as in one step."""
    temperature = case.sampling.temperature[slot_of_row]
    return case.target_logits / torch.where(temperature > 0, temperature, 1.0)[:, None]


@pytest.mark.parametrize("rule, proposal", [("token", "dense"), ("block", "sparse"), ("coupled", "none"), ("recursive", "dense")])
def test_target_scaled(rule, proposal):
    """Equal to the op on rows that it scales itself, prepared too; greedy rows stay greedy, filters and mask act."""
    options = dict(temperatures=(0.5, 1.0, 2.0, 0.0), dtype=torch.float32)
    if rule == "recursive":
        case = cases.accept_tree_case(3, 4, 4, 130, "iid", rule, **options)
        op, reference = dk.accept_tree, reference_tree.accept_tree
    else:
        options |= dict(adjust=("mask",), filters=("top_p",) if rule == "token" else (), closeness=0.9)
        case = cases.accept_case(seed=3, requests=4, drafts=2, vocab=130, rule=rule, proposal=proposal, **options)
        op, reference = dk.accept_chain, reference_accept.accept_chain
    rows = case.target_logits.shape[0]
    owner = torch.searchsorted(case.layout.cu_num_logits[1:].contiguous(), torch.arange(rows), right=True)
    arguments = case.arguments()
    want = op(**arguments)
    arguments |= dict(target_logits=scaled(case, owner.clamp(max=len(case.sampling.temperature) - 1)), target_scaled=True)
    have = op(**arguments)
    assert_same(have, want)
    assert (have.num_accepted > 0).any()
    assert torch.equal(reference(**arguments).tokens, have.tokens)
    if rule == "coupled":
        assert set(case.sampling.temperature.tolist()) > {0.0}
        again = dk.prepare(op, **arguments)
        assert_same(again(sampling=dataclasses.replace(case.sampling, temperature=case.sampling.temperature.clone())), want)


def test_target_scaled_refuses_what_comes_before_temperature():
    _, arguments = chain(adjust=("bias",))
    with pytest.raises(ValueError, match="sampling.logit_bias: expected None with target_scaled"):
        dk.accept_chain(**arguments, target_scaled=True)


def of_probs(case, packed):
    """The case with its proposal as probabilities, [S, K, V] or packed by batch row in the dtype of the case."""
    temperature = case.sampling.temperature
    scale = torch.where(temperature > 0, temperature, 1.0)[:, None, None]
    probs = torch.softmax(case.proposal.logits.float() / scale, -1).to(case.target_logits.dtype)
    if not packed:
        return dataclasses.replace(case, proposal=dk.DenseProposal.of_probs(probs))
    lens = case.layout.draft_lens
    rows = torch.cat([probs[r, :length] for r, length in enumerate(lens.tolist())] or [probs[:0, 0]])
    cu = torch.cat([lens.new_zeros(1), lens.cumsum(0, dtype=torch.int32)])
    return dataclasses.replace(case, proposal=dk.DenseProposal.of_probs(rows, cu))


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("rule", ["token", "block"])
def test_probabilities(rule, packed):
    options = dict(closeness=0.8, dtype=torch.float32, vocab=90, rule=rule, temperatures=(0.7, 1.0, 0.0))
    case = of_probs(cases.accept_case(seed=6, requests=9, drafts=3, **options), packed)
    acceptance = check(case)
    assert 5 < acceptance.num_accepted.sum() < case.layout.draft_lens.sum()
    if packed:  # a case with slots; a start that names no row; nobody with a draft
        case.proposal.starts[3:5] = torch.tensor([10**9, -5])
        dk.accept_chain(**case.arguments())
        one = cases.accept_case(seed=6, requests=3, drafts=3, lengths=torch.zeros(3, dtype=torch.int32), **options)
        check(of_probs(one, packed))


def test_probabilities_by_slot_in_half_precision():
    case = cases.accept_case(seed=8, requests=5, drafts=3, vocab=1100, scattered=True, padding=1, dtype=torch.bfloat16)
    check(of_probs(case, False))


def test_probabilities_have_no_temperature_and_no_tree():
    probs = torch.full((2, 3, 4), 0.25)
    with pytest.raises(ValueError, match="DenseProposal.temperature: expected None for probabilities"):
        dk.DenseProposal(probs, temperature=torch.ones(2), probs=True)
    with pytest.raises(ValueError, match="DenseProposal.starts: expected None for logits"):
        dk.DenseProposal(probs[0], starts=torch.zeros(2, dtype=torch.int32))
    case = cases.accept_tree_case(3, 2, 4, 40, "iid", "recursive")
    shape = case.tree.proposal.logits.shape
    case = dataclasses.replace(case, tree=dataclasses.replace(case.tree, proposal=dk.DenseProposal.of_probs(torch.ones(shape))))
    with pytest.raises(NotImplementedError, match="accept_tree: proposal.probs"):
        dk.accept_tree(**case.arguments())
