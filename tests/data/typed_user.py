"""A program of a user, for a checker of types: right, but for the lines marked `# wrong`."""

import torch
from torch import Tensor
from typing_extensions import assert_type

import dspark_kernels as dk


def step(logits: Tensor, target: Tensor, anchors: Tensor, positions: Tensor, head: dk.MarkovHead, table: dk.CostTable) -> Tensor:
    sampling = dk.SamplingTensors(torch.ones(2), torch.arange(2), filter_order="joint")
    block = dk.draft_block(logits, anchors, head, anchor_positions=positions, sampling=sampling, noise="draft")
    assert_type(block, dk.DraftBlock)
    assert_type(block.tokens, Tensor)
    layout = dk.schedule_prefixes(block, table, anchors=anchors, anchor_positions=positions, policy="causal")
    assert_type(layout, dk.VerifyLayout)
    acceptance = dk.accept_chain(target, layout, block.proposal, sampling=sampling, rule="block", logprobs="raw")
    assert_type(acceptance, dk.Acceptance)
    accept = dk.prepare(dk.accept_chain, target_logits=target, layout=layout, proposal=block.proposal, sampling=sampling)
    assert_type(accept(target_logits=target), dk.Acceptance)
    assert_type(dk.accept_phases(rule="token")[0] == "draw", bool)
    assert_type(dk.warmup(dk.draft_block, [dict(base_logits=logits)]), int)
    assert_type(layout.to("cpu"), dk.VerifyLayout)
    return acceptance.num_emitted


def mistakes(logits: Tensor, target: Tensor, anchors: Tensor, layout: dk.VerifyLayout, head: dk.MarkovHead) -> None:
    dk.draft_block(logits, anchors, head)  # wrong: no positions
    dk.draft_block(logits, anchors, head, anchor_positions=anchors, noise="gumbel")  # wrong: no such word
    dk.accept_chain(target, layout, rule="walk")  # wrong: a rule of trees
    dk.accept_tree(target, layout, rule="block")  # wrong: a rule of chains, and no tree
    dk.accept_chain(target, layout, logprobs="log")  # wrong: no such word
    dk.accept_chain(target.numpy(), layout)  # wrong: an array
    dk.SamplingTensors(torch.ones(2), torch.arange(2), filter_order="any")  # wrong: no such word
    dk.GatedMarkovHead(target, target)  # wrong: no weights of the gate
    dk.RnnMarkovHead(target, target, None, target, target)  # wrong: weights by position
    dk.Workspace(4, 7)  # wrong: no vocabulary
    dk.Workspace(4, 7, 32000, devise="cpu")  # wrong: a misspelt name
    print(dk.accept_chain(target, layout).tokenz)  # wrong: no such field
    print(dk.prepare(dk.accept_chain, target_logits=target).tokens)  # wrong: a function, not a result
