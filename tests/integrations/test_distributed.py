"""integrations.distributed: ranks as real processes over gloo, and calls, memory and errors in a group of one."""

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist

import dspark_kernels as dk
from dspark_kernels.integrations import distributed
from dspark_kernels.integrations.distributed import VocabularyShards
from reference import cases
from tests.integrations import ranks
from tests.integrations.allocations import Asked
from tests.ops import shards as loops
from tests.ops.accept_checks import check as check_acceptance
from tests.ops.draft_checks import arguments_of, candidate_arguments_of, check as check_block
from tests.ops.fields import assert_same

ROOT = Path(__file__).resolve().parents[2]


# --- processes --------------------------------------------------------------------------------------------------------


def test_ranks(tmp_path):
    """One test for all that needs the processes, so that pytest-xdist starts them once."""
    pytest.importorskip("triton")
    environment = os.environ | {"GLOO_SOCKET_IFNAME": "lo", "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "tests.integrations.ranks", str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert done.stdout.splitlines()[-1:] == ["[0, 0, 0, 1]"], done.stderr  # the last one dies on purpose
    results = [torch.load(tmp_path / f"rank{rank}.pt", weights_only=False) for rank in range(ranks.RANKS)]
    for calls, members in ((ranks.OF_FOUR, range(ranks.RANKS)), *zip(ranks.OF_TWO, ranks.PAIRS, strict=True)):
        for name, call in calls.items():
            check = check_drafts if isinstance(call, ranks.Draft) else check_acceptances
            check(call, call.case(), [results[rank][name] for rank in members])
    told = "width: expected the same number on every rank, got [20, 21]"
    assert [result["differing"] for result in results] == [told] * ranks.RANKS
    for waiting, gone in ((0, ranks.LATE), (2, ranks.DEAD)):
        assert "failing" not in results[gone]
        seconds, text = results[waiting]["failing"]
        assert text.split(":")[0] in ("RuntimeError", "DistBackendError", "DistNetworkError"), text
        assert seconds < ranks.TIMEOUT + 8, text
        assert (seconds >= ranks.TIMEOUT) == (gone == ranks.LATE), "a dead rank is noticed at once, a late one is waited for"


def check_drafts(call, case, found):
    """found: (block, state of an rnn head) of each rank."""
    blocks, states = zip(*found, strict=True)
    sparse = isinstance(blocks[0].proposal, dk.SparseProposal)
    for block in blocks:  # of a dense proposal every rank has columns of its own
        proposal = block.proposal if sparse else dataclasses.replace(block.proposal, logits=blocks[0].proposal.logits)
        assert_same(dataclasses.replace(block, proposal=proposal), blocks[0], "ranks disagree")
    if sparse:
        arguments = candidate_arguments_of(case, **call.options)
        assert_same(blocks[0], dk.draft_block(**arguments, keep_logits=True))
        assert all(torch.equal(state, arguments["head_state"]) for state in states)
        return
    joined = loops.joined(blocks, case.base_logits.shape[2])
    if call.exact:
        assert_same(joined, dk.draft_block(**arguments_of(case), keep_logits=True))
    else:
        check_block(case, joined, states[0])


def check_acceptances(call, case, found):
    """found: (result, anchors and positions) of each rank."""
    advanced = ranks.anchors_of(case)
    whole = dk.accept_chain(**case.arguments(), **advanced)
    for result, moved in found:
        assert_same(result, found[0][0], "ranks disagree")
        assert torch.equal(moved["anchors"], result.next_token)
        assert not call.exact or torch.equal(moved["anchor_positions"], advanced["anchor_positions"])
    if call.exact:
        assert_same(found[0][0], whole)
    else:
        check_acceptance(case, found[0][0])


# --- a group of one ---------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def alone():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_later_call_allocates_nothing_and_keeps_its_addresses(alone):
    draft = cases.draft_case(seed=5, requests=2, drafts=2, vocab=100, kind="rnn", scattered=False)
    accept = cases.accept_case(seed=6, requests=2, drafts=2, vocab=100, dtype=torch.float32)
    shards = VocabularyShards(100, 2, 2, device="cpu", markov_rank=16)
    arguments = loops.of(draft.arguments(), "head_state", "vocab_size")
    rows = dict(sampling=accept.sampling, rule=accept.rule)

    def calls(block=None, acceptance=None):
        block = shards.draft_block(**arguments, out=block)
        return block, shards.accept_chain(accept.target_logits, accept.layout, accept.proposal, **rows, out=acceptance)

    block, acceptance = calls()
    wanted = [dataclasses.replace(block, tokens=block.tokens.clone()), acceptance.tokens.clone()]
    addresses = [memory.data_ptr() for gather in shards._gathers for memory in gather._memories]
    with Asked() as mode:
        again = calls(block, acceptance)
    assert again[0] is block and again[1] is acceptance and mode.found == []
    assert addresses == [memory.data_ptr() for gather in shards._gathers for memory in gather._memories]
    assert torch.equal(block.tokens, wanted[0].tokens) and torch.equal(acceptance.tokens, wanted[1])
    with Asked() as mode:
        calls()
    assert mode.found, "the mode sees no allocation at all"


def test_memory_of_a_smaller_call_is_kept(alone):
    """A graph that was captured with it still writes there; the parts of both sizes are right."""
    shards = VocabularyShards(300, 4, 2, device="cpu")
    blocks = {}
    for requests in (1, 4, 1):
        case = cases.draft_case(seed=3, requests=4, drafts=2, vocab=300, confidence=None)
        sampling = dataclasses.replace(case.sampling, **{
            name: getattr(case.sampling, name)[:requests] for name in ("temperature", "seed")
        })  # fmt: skip
        base, anchors, positions = (given[:requests] for given in (case.base_logits, case.anchors, case.anchor_positions))
        blocks[requests] = shards.draft_block(base, anchors, case.head, anchor_positions=positions, sampling=sampling)
        if requests == 1:
            small = shards._gathers[0]._memories[1].data_ptr()
    assert shards._gathers[0]._memories[1].data_ptr() == small and len(shards._gathers[0]._memories) == 3
    want = dk.draft_block(case.base_logits, case.anchors, case.head, anchor_positions=case.anchor_positions, sampling=case.sampling)
    assert torch.equal(blocks[4].tokens, want.tokens) and torch.equal(blocks[1].tokens, want.tokens[:1])


def test_gathered_parts_of_all_phases_are_there_in_the_end(alone, monkeypatch):
    """Of eight ranks, all of which have the part of this one."""
    seen, finish = [], []

    def gather(gathered, part, group):
        gathered.copy_(part.repeat(8))
        seen.append(gathered.clone())

    monkeypatch.setattr(dist, "get_world_size", lambda group: 8)
    monkeypatch.setattr(VocabularyShards, "_check_ranks", lambda self, **numbers: None)
    monkeypatch.setattr(distributed, "_all_gather", gather)
    monkeypatch.setattr(distributed.accept_shards, "accept_finish", lambda *_, gathered, **named: finish.extend(gathered))
    case = cases.accept_case(requests=2, drafts=2, vocab=40, dtype=torch.float32, rule="block")
    shards = VocabularyShards(40, 2, 2, width=5, device="cpu")
    own = dataclasses.replace(case.proposal, logits=shards.shard_of(case.proposal.logits))
    shards.accept_chain(shards.shard_of(case.target_logits), case.layout, own, sampling=case.sampling, rule="block")
    assert len(finish) == 3 and all(torch.equal(have.flatten(), want) for have, want in zip(finish, seen, strict=True))


def test_a_block_wider_than_the_call(alone):
    """Drafts after the first two go to their columns, the first two stay."""
    case = cases.draft_case(seed=4, requests=2, drafts=2, vocab=90, first_draft=2, confidence=None)
    shards = VocabularyShards(90, 2, 4, device="cpu")
    arguments = loops.of(case.arguments(), "vocab_size", "head_state")
    out = dk.draft_block(torch.zeros(2, 4, 90), case.anchors, anchor_positions=case.anchor_positions, sampling=case.sampling)
    first = out.tokens[:, :2].clone()
    assert shards.draft_block(**arguments, out=out) is out
    assert torch.equal(out.tokens, torch.cat([first, dk.draft_block(**arguments_of(case)).tokens], 1))


@pytest.mark.parametrize("candidates", [None, 7])
def test_options_of_drafting_arrive(alone, candidates):
    """Each of them changes the block, and the group of one gives that of the whole op."""
    case = cases.draft_case(
        seed=11, requests=3, drafts=2, vocab=90, scattered=True, padding=1, target_vocab=200, adjust=("bias",), noise="coupled",
        first_draft=1, confidence="plain", kind="rnn",
    )  # fmt: skip
    shards = VocabularyShards(90, 3, 2, device="cpu", markov_rank=16)
    arguments = [loops.of(arguments_of(case), "vocab_size") | dict(candidates=candidates) for _ in range(2)]
    assert_same(shards.draft_block(**arguments[0]), dk.draft_block(**arguments[1]))
    assert torch.equal(arguments[0]["head_state"], arguments[1]["head_state"])


@pytest.mark.parametrize("proposal, rule", [("dense", "block"), ("one_hot", "token"), ("dense", "coupled")])
def test_options_of_acceptance_arrive(alone, proposal, rule):
    case = cases.accept_case(
        seed=2,
        requests=3,
        drafts=2,
        vocab=60,
        dtype=torch.float32,
        scattered=True,
        proposal=proposal,
        rule=rule,
        temperatures=(0.2, 4.0),
    )
    shards = VocabularyShards(60, 3, 2, device="cpu")
    arguments = loops.of(case.arguments(), "logprobs", "synthetic_rates") | dict(target_scaled=True)
    want = dk.accept_chain(**arguments)
    assert_same(shards.accept_chain(**arguments), want)
    assert rule != "block" or not torch.equal(want.tokens, dk.accept_chain(**arguments | dict(target_scaled=False)).tokens)


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_the_gather_of_older_torch(alone, monkeypatch):
    monkeypatch.delattr(dist, "all_gather_single", raising=False)
    gathered = torch.zeros(4, dtype=torch.int64)
    distributed._all_gather(gathered, torch.arange(4), None)
    assert gathered.tolist() == [0, 1, 2, 3]


def test_shards_of_what_is_whole(alone, monkeypatch):
    """The cut of three ranks, each in turn: rows of a head with scales, columns, and a rank beyond the vocabulary."""
    head = cases.draft_case(vocab=33, rank=4, w2_dtype=torch.int8).head
    columns = torch.randn(2, 33)
    monkeypatch.setattr(dist, "get_world_size", lambda group: 4)
    monkeypatch.setattr(VocabularyShards, "_check_ranks", lambda self, **numbers: None)
    for rank in range(4):
        monkeypatch.setattr(dist, "get_rank", lambda group, rank=rank: rank)
        shards = VocabularyShards(33, 1, 1, width=11, device="cpu")
        assert (shards.rank, shards.ranks, shards.start, shards.held) == (rank, 4, 11 * rank, 11 if rank < 3 else 0)
        own, part = shards.shard_of_head(head), shards.shard_of(columns)
        assert own.w1 is head.w1 and own.w2.shape == (11, 4) and own.w2_scale.shape == (11,) and part.shape == (2, 11)
        ids = slice(11 * rank, 11 * rank + 11)
        whole = (head.w2[ids], head.w2_scale[ids], columns[:, ids]) if rank < 3 else (0, 0, 0)
        for have, want in zip((own.w2, own.w2_scale, part), whole, strict=True):
            assert (have == want).all()


@pytest.mark.parametrize(
    "change, error, message",
    [
        (dict(vocab_size=0), ValueError, "vocab_size: expected >= 1, got 0"),
        (dict(width=19), ValueError, "vocab_size: expected at most 1 shards x 19 columns, got 20"),
        (dict(max_drafts=1.0), TypeError, "max_drafts: expected an int, got float"),
        (dict(device="nowhere"), ValueError, "device: expected a device that torch has here"),
        (dict(group=dist.GroupMember.NON_GROUP_MEMBER), ValueError, "group: expected one that this process is in"),
    ],
)
def test_bad_arguments_are_named(alone, change, error, message):
    with pytest.raises(error) as caught:
        VocabularyShards(**dict(vocab_size=20, max_requests=1, max_drafts=1, device="cpu") | change)
    assert str(caught.value).startswith(message)


def test_tensors_of_another_cut_are_named(alone):
    shards = VocabularyShards(20, 1, 1, device="cpu")
    zero, base = torch.zeros(1, dtype=torch.int64), torch.zeros(1, 1, 20)
    layout = dk.VerifyLayout.of_rows(torch.tensor([0, 1]), zero, zero, 1)
    for call, message in (
        (lambda: shards.draft_block(torch.zeros(1, 1, 19), zero, anchor_positions=zero), "base_logits: expected shape [R, K, 20]"),
        (lambda: shards.draft_block(torch.zeros(1, 0, 20), zero, anchor_positions=zero), "base_logits: expected K >= 1"),
        (lambda: shards.draft_block(base, zero, anchor_positions=zero, candidates=0), "candidates: expected >= 1, got 0"),
        (lambda: shards.accept_chain(torch.zeros(1, 19), layout), "target_logits: expected shape [L, 20]"),
        (lambda: shards.shard_of(torch.zeros(19)), "whole: expected 20 entries along dimension -1, got 19"),
    ):
        with pytest.raises(ValueError) as caught:
            call()
        assert str(caught.value).startswith(message)


def test_without_a_process_group(monkeypatch):
    monkeypatch.setattr(dist, "is_initialized", lambda: False)
    with pytest.raises(RuntimeError, match="VocabularyShards: torch.distributed is not initialised"):
        VocabularyShards(20, 1, 1, device="cpu")
