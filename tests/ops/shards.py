"""Vocabulary shards on one machine: ranks are a loop, a gather is torch.stack, columns of no id hold what must not matter."""

import dataclasses

import torch

import dspark_kernels as dk
from dspark_kernels.ops.draft import candidate_shards, shards as draft_shards
from dspark_kernels.ops.shards import check_shard
from tests.ops.fields import SENTINEL, assert_same, poisoned


def cut(tensor, shards, width, dim=-1):
    """Shards of `width` ids along `dim`; columns beyond the vocabulary are NaN."""
    tensor = tensor.movedim(dim, -1)
    shape = (*tensor.shape[:-1], shards * width - tensor.shape[-1])
    padding = torch.full(shape, float("nan") if tensor.is_floating_point() else 77).to(tensor.dtype)
    whole = torch.cat([tensor, padding], -1)
    return [whole[..., i * width : (i + 1) * width].movedim(-1, dim).contiguous() for i in range(shards)]


def cuts(vocab, shards, width):
    """Arguments of each rank that say what it has."""
    return [dict(vocab_start=i * width, vocab_shards=shards, vocab_size=vocab) for i in range(shards)]


def draft_ranks(case, shards, width):
    """What each rank has: (its logits, its head, other arguments). What is by id of the head's vocabulary is cut, the rest not."""
    vocab = case.base_logits.shape[2]
    tables = [None] * shards
    if case.draft_to_target is not None:
        tables = cut(case.draft_to_target, shards, width)
    ranks = []
    for i, where in enumerate(cuts(vocab, shards, width)):
        head = case.head
        if head is not None:
            scale = head.w2_scale if head.w2_scale is None else cut(head.w2_scale, shards, width)[i]
            head = dataclasses.replace(head, w2=cut(head.w2, shards, width, dim=0)[i], w2_scale=scale)
        state = None if case.head_state is None else case.head_state.clone()
        names = ("sampling", "hidden", "confidence", "first_draft", "state_indices")
        own = {name: getattr(case, name) for name in names} | where
        own |= dict(draft_to_target=tables[i], noise=case.noise, head_state=state, anchor_positions=case.anchor_positions)
        ranks.append((cut(case.base_logits, shards, width)[i], head, own))
    return ranks


def of(arguments, *dropped):
    return {name: value for name, value in arguments.items() if name not in dropped}


def draft(case, shards, width, workspace=None, lse=True, poison=False):
    """The blocks of all ranks. poison: parts of a position are made a second time over poisoned memory.

    Returns the ranks' states of an rnn head, too."""
    drafts = case.base_logits.shape[1]
    ranks = draft_ranks(case, shards, width)
    blocks = [None] * shards
    for k in range(drafts):
        parts = []
        for i, (base, head, own) in enumerate(ranks):
            before = None if own["head_state"] is None else own["head_state"].clone()
            call = dict(position=k, keep_logits=True, workspace=workspace) | own
            part, blocks[i] = dk.draft_block_partial(base, case.anchors, head, block=blocks[i], **call)
            if not lse and k == 0:
                blocks[i] = dataclasses.replace(blocks[i], proposal=dataclasses.replace(blocks[i].proposal, lse=None))
                part, _ = dk.draft_block_partial(base, case.anchors, head, block=blocks[i], **call | dict(head_state=before))
            if poison:
                call |= dict(head_state=before)
                again, _ = dk.draft_block_partial(base, case.anchors, head, block=blocks[i], out=poisoned(part), **call)
                shard = check_shard(width, own["vocab_start"], shards, own["vocab_size"])
                part = rewritten(again, part, draft_shards.fields_of(base.shape[0], shard, lse and case.sampling is not None))
            parts.append(part)
        gathered = torch.stack(parts)
        for block, (_, head, own) in zip(blocks, ranks, strict=True):
            arguments = of(own, "draft_to_target", "noise", "head_state", "anchor_positions") | dict(position=k)
            assert dk.draft_block_finish(gathered, block, case.anchors, head, **arguments) is block
    return blocks, [own["head_state"] for _, _, own in ranks]


def rewritten(again, part, fields):
    """A part made over poisoned memory: every region is that of `part` (what rounds one up to 16 bytes is nobody's)."""
    for name in fields.names:
        have, want = (fields.view(tensor, name)[: fields.count(name)].view(torch.uint8) for tensor in (again, part))
        assert torch.equal(have, want), name
    return again


def draft_candidates(case, shards, width, candidates, whole=False, poison=False, workspace=None):
    """`draft` on candidates, with one gather. whole: every rank has all of W2. Returns the ranks' states, too, and the parts."""
    ranks, parts, blocks = draft_ranks(case, shards, width), [], []
    for base, head, own in ranks:
        call = of(own, "hidden", "head_state") | dict(keep_logits=True, candidates=candidates, workspace=workspace)
        head = case.head if whole else head
        part, block = dk.draft_block_partial(base, case.anchors, head, **call)
        if poison:
            fields = candidate_shards.part_fields(base, head, candidates, own["draft_to_target"])
            part = rewritten(dk.draft_block_partial(base, case.anchors, head, out=poisoned(part), **call)[0], part, fields)
        parts.append(part)
        blocks.append(block)
    gathered = torch.stack(parts)
    for block, (base, head, own) in zip(blocks, ranks, strict=True):
        call = own | dict(base_logits=base, candidates=candidates, workspace=workspace)
        assert dk.draft_block_finish(gathered, block, case.anchors, case.head if whole else head, **call) is block
    return blocks, [own["head_state"] for _, _, own in ranks], parts


def joined(blocks, vocab):
    """The block of the whole vocabulary: the first rank's, with the columns of all."""
    first = blocks[0].proposal
    logits = torch.cat([block.proposal.logits for block in blocks], -1)[..., :vocab].contiguous()
    ids = first.draft_to_target
    if ids is not None:
        ids = torch.cat([block.proposal.draft_to_target for block in blocks])[:vocab].contiguous()
    return dataclasses.replace(blocks[0], proposal=dataclasses.replace(first, logits=logits, draft_to_target=ids))


def accept(case, shards, width, workspace=None, poison=False, **advanced):
    """What the first and the last rank's finish return. advanced: anchors, anchor_positions, copied
    for each rank and returned beside."""
    arguments = {name: getattr(case, name) for name in ("sampling", "rule", "state_indices")}
    logits, layout, proposal = case.target_logits, case.layout, case.proposal
    proposals = [proposal] * shards
    if isinstance(proposal, dk.DenseProposal):
        proposals = [dataclasses.replace(proposal, logits=part) for part in cut(proposal.logits, shards, width)]
    ranks = list(zip(cut(logits, shards, width), proposals, cuts(logits.shape[1], shards, width), strict=True))
    gathered = ()
    for phase in dk.accept_phases(proposal, sampling=arguments["sampling"], rule=arguments["rule"]):
        parts = []
        for own, proposal_part, where in ranks:
            call = dict(phase=phase, gathered=gathered, workspace=workspace) | arguments | where
            part = dk.accept_partial(own, layout, proposal_part, **call)
            if poison:
                again = dk.accept_partial(own, layout, proposal_part, out=torch.full_like(part, SENTINEL), **call)
                assert again.shape == part.shape
                part = again
            parts.append(part)
        gathered += (torch.stack(parts),)
    results = []
    for own, proposal_part, where in ranks[:1] + ranks[-1:] if shards > 1 else ranks:  # all the same kernel on the same bytes
        moved = {name: tensor.clone() for name, tensor in advanced.items()}
        result = dk.accept_finish(own, layout, proposal_part, gathered=gathered, **arguments, **where, **moved)
        if poison:
            out = poisoned(result)
            assert dk.accept_finish(own, layout, proposal_part, gathered=gathered, out=out, **arguments, **where) is out
            assert_same(out, result)
        results.append((result, moved) if advanced else result)
    return results
