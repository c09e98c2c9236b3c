"""A draft block against reference/draft.py, every output: what the tests of draft_block share."""

import dataclasses

import torch

import dspark_kernels as dk
from reference import draft as reference, heads, logits as reference_logits
from reference.equality import assert_equal_or_tied
from tests.ops.errors import ULP, excess_error


def rows_of(case):
    """(batch row, slot) of every request that is not padding."""
    if case.state_indices is None:
        return [(r, r) for r in range(case.base_logits.shape[0])]
    return [(r, int(s)) for r, s in enumerate(case.state_indices) if s >= 0]


def arguments_of(case):
    """The case's arguments; an rnn's state is a copy, since a call moves it on."""
    arguments = case.arguments()
    if case.head_state is not None:
        arguments["head_state"] = case.head_state.clone()
    return arguments


def candidate_arguments_of(case, candidates, successors=0, seed=0):
    """Arguments of a call; the bigram table has unused entries, ids beyond the vocabulary, and repeats."""
    arguments = arguments_of(case) | dict(candidates=candidates)
    if successors:
        vocab, tokens = case.base_logits.shape[2], 1 + int(case.anchors.max())
        tokens = tokens if case.head is None else case.head.w1.shape[0]
        g = torch.Generator().manual_seed(seed)
        table = torch.randint(-1, vocab + 3, (max(1, tokens - 2), successors), generator=g)
        table[:, -1] = table[:, 0]
        arguments["bigrams"] = table.to(torch.int32)
    return arguments


def assert_lse(actual, logits, what):
    """ln sum exp within the roundings that lead to it.

    Relative to the largest of |logit| and |lse|: 2 in log2(e) / T, 1 in its product with a logit, 1 in adding the maximum back, 2
    in the way from base 2 to base e. The sum of exponentials adds less than 2 units near 1.
    """
    exact = logits.logsumexp(-1)
    largest = logits[logits.isfinite()].abs().max().item() if logits.isfinite().any() else 0.0
    finite = exact.isfinite()
    assert torch.equal(actual.double()[~finite], exact[~finite]), what
    bound = 2.0**-24 * (6 * max(largest, exact[finite].abs().max().item() if finite.any() else 0.0) + 2)
    error = (actual.double() - exact)[finite].abs().max().item() if finite.any() else 0.0
    assert error <= bound, f"{what}: error {error:.3g} exceeds {bound:.3g}"


def product_type(head):
    """What latents are rounded to: W1's type where W2 has the same or is quantised, else fp32."""
    return head.w1.dtype if head.w2.dtype in (head.w1.dtype, torch.int8, torch.float8_e4m3fn) else torch.float32


def eager_latents(head, embedded, hidden, state):
    """Eager PyTorch in fp32: (latents [K, r] rounded as documented, state after them)."""
    if isinstance(head, dk.GatedMarkovHead):
        gate = torch.cat([hidden.float(), embedded], -1) @ head.gate_weight.float().T + head.gate_bias.float()
        return (torch.sigmoid(gate) * embedded).to(product_type(head)).float(), state
    if not isinstance(head, dk.RnnMarkovHead):
        return embedded, state
    latents = []
    for e, h in zip(embedded, hidden.float(), strict=True):
        gate, candidate, output = (head.joint_weight.float() @ torch.cat([state, e, h]) + head.joint_bias.float()).chunk(3)
        state = torch.sigmoid(gate) * state + (1 - torch.sigmoid(gate)) * torch.tanh(candidate)
        latents.append(torch.tanh(output))
    return torch.stack(latents).to(product_type(head)).float(), state


def summed_for_state(case, r, previous):
    """The largest sum of |weight x input| + |bias| behind a value of the rnn's state: sigmoid and tanh do not raise its error.

    A state that tanh made is at most 1, one that was handed over at most its largest value.
    """
    rank = case.head.rank
    carried = max(1.0, case.head_state.abs().max().item())
    embedded = torch.stack([heads.embed(case.head, x) for x in previous]).abs()
    inputs = torch.cat([torch.full((len(previous), rank), carried), embedded, case.hidden[r].float().abs()], -1)
    weights, bias = case.head.joint_weight[: 2 * rank].float().abs(), case.head.joint_bias[: 2 * rank].float().abs()
    return (inputs.float() @ weights.T + bias).max().item()


def logits_of(case, r, slot, previous):
    """(exact, eager) logits [K, V] of request r after these tokens, and its (exact, eager) state after the block."""
    vocab = case.base_logits.shape[2] if case.vocab_size is None else case.vocab_size
    exact, eager = case.base_logits[r, :, :vocab].double(), case.base_logits[r, :, :vocab].float()
    head, states = case.head, (None, None)
    if head is not None:
        carried = torch.zeros(head.rank)
        if case.head_state is not None and case.first_draft:
            carried = case.head_state[slot]
        hidden = [None] * len(previous) if case.hidden is None else case.hidden[r]
        transition = heads.Transition(head, heads.output_weights(head)[:vocab], carried.double())
        exact = exact + torch.stack([transition.bias(x, h) for x, h in zip(previous, hidden, strict=True)])
        embedded = torch.stack([heads.embed(head, x) for x in previous]).float()
        latents, state = eager_latents(head, embedded, hidden, carried)
        bias = latents @ head.w2[:vocab].float().T
        eager = eager + (bias if head.w2_scale is None else bias * head.w2_scale[:vocab])
        states = transition.state, state
    unused = None
    if case.draft_to_target is not None:
        unused = (case.draft_to_target < 0) | (case.draft_to_target >= reference_logits.target_ids(head, case.sampling))
    if case.sampling is not None:
        exact, eager = (adjusted(case, logits, slot, previous, unused) for logits in (exact, eager))
    if unused is not None:
        exact, eager = exact.masked_fill(unused, -torch.inf), eager.masked_fill(unused, -torch.inf)
    return exact, eager, states


def adjusted(case, logits, slot, previous, unused):
    """Penalties, bias and mask of a request, row by row, in the precision of `logits`."""
    sampling = case.sampling
    if sampling.token_bitmask is not None:
        sampling = dataclasses.replace(sampling, token_bitmask=sampling.token_bitmask[slot])
    rows = [
        reference_logits.adjusted(row, sampling, slot, k, previous[1 : k + 1], case.draft_to_target, unused)
        for k, row in enumerate(logits)
    ]
    return torch.stack(rows)


def filters_of(case):
    names = ("top_k", "top_p", "min_p")
    return [] if case.sampling is None else [name for name in names if getattr(case.sampling, name) is not None]


def unfiltered(case, block):
    """The rows [R, K, V] that the filters of a call were given: the same drafts once more, one position a call, without filters.

    A call of one position follows the draft before it, whichever filters chose that one, and has the same bits as a whole block.
    """
    slots, drafts = case.anchors.shape[0], case.base_logits.shape[1]
    batch, width = case.base_logits.shape[0], case.first_draft + drafts
    vocab, device, dtype = block.proposal.logits.shape[2], case.base_logits.device, case.base_logits.dtype
    arguments = arguments_of(case) | dict(confidence=None)
    sampling = dataclasses.replace(case.sampling, top_k=None, top_p=None, min_p=None)
    out = dk.DraftBlock(
        tokens=torch.full((slots, max(2, width)), -1, device=device),
        proposal=dk.DenseProposal(
            torch.zeros(slots, max(2, width), vocab, dtype=dtype, device=device), draft_to_target=case.draft_to_target
        ),
        flags=torch.zeros(batch, dtype=torch.int32, device=device),
    )
    rows = torch.zeros(batch, drafts, vocab, dtype=dtype, device=device)
    for k in range(drafts):
        now = sampling
        if now.token_bitmask is not None:
            now = dataclasses.replace(now, token_bitmask=now.token_bitmask[:, k : k + 1].contiguous())
        arguments |= dict(
            base_logits=case.base_logits[:, k : k + 1],
            hidden=None if case.hidden is None else case.hidden[:, k : k + 1],
            anchors=case.anchors if k == 0 else block.tokens[:, k - 1].clone(),
            sampling=now,
            first_draft=case.first_draft + k,
        )
        dk.draft_block(**arguments, out=out)
        out.tokens[:, case.first_draft + k] = block.tokens[:, k]
        for r, slot in rows_of(case):
            rows[r, k] = out.proposal.logits[slot, case.first_draft + k]
    return rows


def support(logits):
    return (logits > -torch.inf).tolist()


def check(case, block=None, state=None, exempt=True):
    """A draft block against the reference, every output. block, state: of a call that was made, else it is made here."""
    arguments = arguments_of(case)
    if block is None:
        block, state = dk.draft_block(**arguments, keep_logits=True), arguments["head_state"]
    rows = rows_of(case)
    batch, drafts = case.base_logits.shape[:2]
    filtered = bool(filters_of(case))
    kept = torch.zeros(batch, drafts, block.proposal.logits.shape[2], dtype=case.base_logits.dtype)
    kept = kept.to(case.base_logits.device)
    for r, slot in rows:
        kept[r] = block.proposal.logits[slot]
    stored = unfiltered(case, block) if filtered else kept

    def outcome(block, logits, r, slot):
        found = block.tokens[slot].tolist(), int(block.flags[r])
        return (*found, support(logits)) if filtered else found

    def run(decisions):
        want = reference.draft_block(**arguments_of(case), keep_logits=True, stored_logits=stored, decisions=decisions)
        return {r: outcome(want, want.proposal.logits[slot], r, slot) for r, slot in rows}

    assert_equal_or_tied(run, {r: outcome(block, kept[r], r, slot) for r, slot in rows}, exempt=exempt)
    inside = kept > -torch.inf
    assert torch.equal(kept[inside], stored[inside])
    padding = set(range(batch)) - {r for r, _ in rows}
    assert all(int(block.flags[r]) == 0 for r in padding)

    # The logits, given the drafts that came out: the reference in fp64, eager PyTorch as the error to beat.
    for r, slot in rows:
        previous = [int(case.anchors[slot]), *block.tokens[slot].tolist()][:drafts]
        exact, eager, states = logits_of(case, r, slot, previous)
        excess_error(stored[r], eager.to(stored.dtype), exact, f"logits of request {r}")
        if state is not None:
            excess_error(state[slot], states[1], states[0], f"state of request {r}", summed_for_state(case, r, previous))
        if case.sampling is not None:
            temperature = float(case.sampling.temperature[slot])
            scale = 1.0 / temperature if temperature > 0 else 1.0
            logits = kept[r].double() * scale
            assert_lse(block.proposal.lse[slot], logits, f"lse of request {r}")
        if case.confidence is not None:
            check_confidence(case, block, r, slot, previous)
    if state is not None:
        unused = sorted(set(range(len(state))) - {slot for _, slot in rows})
        assert torch.equal(state[unused], case.head_state[unused])
    return block


def check_confidence(case, block, r, slot, previous):
    drafts = case.base_logits.shape[1]
    features = [case.hidden[r].double()]
    if case.confidence.weight.shape[0] > case.hidden.shape[2]:
        features.append(torch.stack([heads.embed(case.head, x) for x in previous]))
    features = torch.cat(features, -1)
    bias = 0.0 if case.confidence.bias is None else case.confidence.bias.double()
    exact = features @ case.confidence.weight.double() + bias
    # One number per position: eager's own error may happen to be 0, so the bound is an ulp of what is summed.
    magnitude = (features.abs() @ case.confidence.weight.double().abs()).max().item()
    error = (block.confidence_logits[slot].double() - exact).abs().max().item()
    assert error <= ULP * max(1.0, magnitude), f"confidence logits of request {r}: error {error:.3g}"
    temperatures = 1.0
    if case.confidence.sts_temperatures is not None:
        temperatures = case.confidence.sts_temperatures[case.first_draft : case.first_draft + drafts].double()
    calibrated = torch.sigmoid(exact / temperatures)
    assert torch.allclose(block.confidence[slot].double(), calibrated, rtol=0, atol=1e-5)
