"""The sizes of published checkpoints: V = 151936, r = 256, heads of 64 to 256. Little in the interpreter, batches on a GPU."""

import pytest
import torch

import dspark_kernels as dk
from reference import cases
from reference.schedule import schedule_prefixes
from tests.ops.accept_checks import check as check_accept
from tests.ops.attention_checks import chain_as_tree, check as check_attention, run as run_attention, take_requests
from tests.ops.draft_checks import check as check_draft
from tests.ops.fields import assert_same, to_device
from tests.ops.schedule_cases import POLICIES, arguments as schedule_arguments

VOCAB = 151936


def _draft(requests, drafts, sampled, device, seed=70):
    case = cases.draft_case(
        seed=seed, requests=requests, drafts=drafts, vocab=VOCAB, rank=256, hidden_size=2560, dtype=torch.bfloat16, sampled=sampled
    )
    check_draft(to_device(case, device))


def _accept(requests, drafts, proposal, device, seed=71):
    case = cases.accept_case(
        seed=seed, requests=requests, drafts=drafts, vocab=VOCAB, proposal=proposal, closeness=0.9, sharpness=2.0,
        lengths=None if requests > 1 else torch.tensor([drafts]),
    )  # fmt: skip
    check_accept(to_device(case, device))


@pytest.mark.slow
def test_draft_block_in_the_interpreter(device):
    _draft(1, 2, True, device)


@pytest.mark.slow
@pytest.mark.parametrize("proposal", ["dense", "one_hot"])
def test_accept_chain_in_the_interpreter(device, proposal):
    _accept(1, 2, proposal, device)


@pytest.mark.gpu
@pytest.mark.parametrize("requests", [1, 3, 13, 32, 64])
@pytest.mark.parametrize("sampled", [True, False])
def test_draft_block_on_a_gpu(device, requests, sampled):
    _draft(requests, 7, sampled, device)


@pytest.mark.gpu
@pytest.mark.parametrize("requests", [1, 13, 64])
@pytest.mark.parametrize(
    "options",
    [
        dict(kind="gated"),
        dict(kind="rnn"),
        dict(w2_dtype=torch.int8),
        dict(w2_dtype=torch.float8_e4m3fn),
        dict(rank=1000),
        dict(vocab=32000, target_vocab=VOCAB),
        dict(filters=cases.FILTERS),
        dict(adjust=cases.ADJUSTMENTS),
        dict(kind="rnn", adjust=cases.ADJUSTMENTS, filters=cases.FILTERS, vocab=32000, target_vocab=VOCAB),
    ],
    ids=str,
)
def test_heads_and_settings_of_a_draft_block_on_a_gpu(device, requests, options):
    sizes = dict(requests=requests, drafts=3, vocab=VOCAB, rank=256, hidden_size=2560, dtype=torch.bfloat16) | options
    check_draft(to_device(cases.draft_case(seed=70, **sizes), device))


@pytest.mark.gpu
@pytest.mark.parametrize("requests", [1, 3, 13, 32, 64])
@pytest.mark.parametrize("proposal", ["dense", "one_hot"])
def test_accept_chain_on_a_gpu(device, requests, proposal):
    _accept(requests, 7, proposal, device)


@pytest.mark.gpu
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("requests, drafts", [(1, 7), (13, 1), (256, 7), (256, 8), (700, 13), (1024, 16)])
def test_schedule_prefixes_on_a_gpu(device, policy, requests, drafts):
    given = schedule_arguments(7, requests, drafts, policy, kind="jagged", coarse=requests % 2 == 0, missing=True)
    given["cost"] = dk.CostTable(2e-3 + 1e-7 * torch.arange(20000.0), torch.full((1025,), 1e-4))
    have = dk.schedule_prefixes(**{name: to_device(value, device) for name, value in given.items()})
    assert_same(to_device(have, "cpu"), schedule_prefixes(**given))


def _attention(device, rows, contexts, **options):
    sizes = dict(query_heads=32, kv_heads=8, head_dim=128, page_size=16, dtype=torch.bfloat16) | options
    check_attention(to_device(cases.attention_case(seed=72, rows=rows, contexts=contexts, **sizes), device))


@pytest.mark.slow
def test_tree_attention_in_the_interpreter(device):
    _attention(device, (8,), (2048,), kv_heads=2, query_heads=8)


@pytest.mark.gpu
@pytest.mark.parametrize("mask", ["chain", "full", "tree"])
@pytest.mark.parametrize(
    "options",
    [
        dict(),
        dict(query_heads=64, page_size=1),
        dict(head_dim=256, kv_heads=4, query_heads=8, window=1024, softcap=50.0),
        dict(head_dim=64, query_heads=64, window=128, sinks=True, page_size=64),
        dict(head_dim=80, query_heads=40, scattered=True),
        dict(cached=True, page_size=128, scattered=True),
        dict(dtype=torch.float16),
        dict(dtype=torch.float32),
        dict(cache_dtype=torch.float8_e4m3fn),
        dict(cache_dtype=torch.float8_e4m3fn, cached=True),
        dict(max_drafts=7),
    ],
    ids=str,
)
def test_tree_attention_on_a_gpu(device, mask, options):
    _attention(device, (8, 1, 0, 8, 3), (4100, 129, 70, 0, 900), mask=mask, **options)


@pytest.mark.gpu
@pytest.mark.parametrize("requests, context", [(1, 131072), (3, 32768), (64, 2048)])
def test_long_contexts_on_a_gpu(device, requests, context):
    for rows in (1, 8):
        _attention(device, (rows,) * requests, (context,) * requests, kv_heads=2, query_heads=8)


@pytest.mark.gpu
def test_prompts_beside_drafts_on_a_gpu(device):
    _attention(device, (8, 700, 1), (1000, 300, 5000))
    _attention(device, (8, 700, 64), (1000, 300, 5000), mask="tree", window=400)


@pytest.mark.gpu
def test_a_chain_given_as_tree_has_the_same_bits_on_a_gpu(device):
    for options in (dict(), dict(window=100), dict(batch_invariant=True)):
        invariant = dict(batch_invariant=options.pop("batch_invariant", False))
        case = cases.attention_case(
            seed=73, rows=(64, 8, 1), contexts=(0, 3000, 900), query_heads=8, head_dim=128, dtype=torch.bfloat16, **options
        )
        have = run_attention(to_device(chain_as_tree(case), device), **invariant)
        assert all(torch.equal(a, b) for a, b in zip(have, run_attention(to_device(case, device), **invariant), strict=True))


@pytest.mark.gpu
def test_batch_invariance_on_a_gpu(device):
    case = cases.attention_case(
        seed=74, rows=(8, 1, 0, 30), contexts=(9000, 33, 5, 2000), query_heads=8, head_dim=128, dtype=torch.bfloat16
    )
    whole = dk.tree_attention(**to_device(case, device).arguments(), batch_invariant=True)
    for requests, padding in (([0], 0), ([3, 0], 70), ([3, 1, 0], 0)):
        part, index = take_requests(case, requests, padding)
        have = dk.tree_attention(**to_device(part, device).arguments(), batch_invariant=True)
        assert torch.equal(have[: len(index)], whole[index])
