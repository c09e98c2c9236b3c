"""Known-bad rules that other implementations shipped: they lose the target's distribution, and tests must detect each of them.

They have the signatures of what they stand in for: rules of reference/accept.py, lengths and sources of reference/enumeration.py.
"""

from __future__ import annotations

import torch

from dspark_kernels.types import Stream
from reference import accept
from reference.accept import Verdict
from reference.enumeration import CrowdSource, EnumeratingSource
from reference.tree import TreeVerdict

# ---- rules


def block_until_first_reject(target_probs, draft_probs, drafts, source, anchor_position):
    """The block rule, but the first test that fails ends the prefix: the correct one takes the longest prefix that passes."""
    length, prefix_prob, accepted = len(drafts), 1.0, 0
    for i, draft in enumerate(drafts, start=1):
        following = min(1.0, prefix_prob * float(target_probs[i - 1][draft] / draft_probs[i - 1][draft]))
        numerator, denominator = following, 1.0
        if i < length:
            numerator = float((following * target_probs[i] - draft_probs[i]).clamp(min=0).sum())
            denominator = numerator + 1.0 - following
        if denominator > 0 and not source.accepts(anchor_position + i, denominator, numerator):
            break
        prefix_prob, accepted = following, i
    position = anchor_position + accepted + 1
    if accepted == length:
        return Verdict(length, source.draw(position, target_probs[length]))
    residual = (prefix_prob * target_probs[accepted] - draft_probs[accepted]).clamp(min=0)
    weights = residual if float(residual.sum()) > 0 else target_probs[accepted]
    return Verdict(accepted, source.draw(position, weights))


def block_with_unverified_row(target_probs, draft_probs, drafts, source, anchor_position):
    """The block rule told that the draft behind the admitted ones is verified too, then cut back to the admitted ones."""
    verdict = accept.block_rule(target_probs, draft_probs, _one_more(drafts, draft_probs), source, anchor_position)
    if verdict.num_accepted <= len(drafts):
        return verdict
    return Verdict(len(drafts), source.draw(anchor_position + len(drafts) + 1, target_probs[len(drafts)]))


def _one_more(drafts, draft_probs):
    return drafts if len(drafts) == len(draft_probs) else [*drafts, int(draft_probs[len(drafts)].argmax())]


def bonus_at_index_of_the_block(target_probs, draft_probs, drafts, source, anchor_position):
    """The bonus drawn from row K, where a trimmed request has its last row at its own length."""
    verdict = accept.token_rule(target_probs, draft_probs, drafts, source, anchor_position)
    if verdict.num_accepted < len(drafts):
        return verdict
    return Verdict(len(drafts), source.draw(anchor_position + len(drafts) + 1, target_probs[-1]))


def bonus_one_row_early(target_probs, draft_probs, drafts, source, anchor_position):
    """The bonus drawn from the row that verified the last draft."""
    verdict = accept.token_rule(target_probs, draft_probs, drafts, source, anchor_position)
    if verdict.num_accepted < len(drafts):
        return verdict
    return Verdict(len(drafts), source.draw(anchor_position + len(drafts) + 1, target_probs[max(len(drafts) - 1, 0)]))


def correction_from_the_target(target_probs, draft_probs, drafts, source, anchor_position):
    """The token rule with corrections from the target's distribution: what was rejected is not taken out."""
    verdict = accept.token_rule(target_probs, draft_probs, drafts, _Discard(source), anchor_position)
    position = anchor_position + verdict.num_accepted + 1
    return Verdict(verdict.num_accepted, source.draw(position, target_probs[verdict.num_accepted]))


class _Discard:
    """A source whose draws are thrown away, so none is made."""

    def __init__(self, source):
        self.accepts = source.accepts

    def draw(self, position, weights):
        return 0


# ---- draft distributions


def tempered(draft, exponent: float):
    """The drafter's distribution at another temperature than the one its tokens are drawn at."""

    def distribution(context):
        probs = draft(context) ** exponent
        return probs / probs.sum()

    return distribution


def best_only(draft, count: int):
    """The drafter's distribution cut to its best tokens, where its tokens are drawn from all."""

    def distribution(context):
        probs = draft(context)
        kept = torch.zeros_like(probs)
        best = probs.topk(count).indices
        kept[best] = probs[best]
        return kept / kept.sum()

    return distribution


def rounded(draft):
    """Tokens drawn from bf16 logits, where the rule is told the distribution of the unrounded ones."""
    return lambda context: torch.softmax(draft(context).log().bfloat16().double(), 0)


def after_greedy(draft, prompt_length: int):
    """The distribution after the drafter's most probable token, where drafts are chained after the tokens that were drawn."""

    def distribution(context):
        if len(context) == prompt_length:
            return draft(context)
        return draft((*context[:-1], int(draft(context[:-1]).argmax())))

    return distribution


# ---- lengths


def global_maximum(steps_per_second):
    """The length that maximises expected tokens per second over all of this round's confidences; entry n = n + 1 rows."""

    def length(context, drafts, confidences, stale):
        survival, tokens, rates = 1.0, 1.0, [steps_per_second[0]]
        for confidence, speed in zip(confidences, steps_per_second[1:], strict=True):
            survival *= confidence
            tokens += survival
            rates.append(tokens * speed)
        return rates.index(max(rates))

    return length


def retrospective(confidence, threshold: float):
    """Cut before the first draft whose own value says that it will not survive: the confidence is read one token too late."""

    def length(context, drafts, confidences, stale):
        for k in range(len(drafts)):
            if confidence((*context, *drafts[: k + 1])) < threshold:
                return k
        return len(drafts)

    return length


# ---- noise


class NonStrict(EnumeratingSource):
    """u * denominator <= numerator: a u of 0 passes a draft of probability 0."""

    def below(self, u, denominator, numerator):
        return u * denominator <= numerator


class _PositionOnly:
    """Noise addressed without the anchor position: a position drafted again after a rejection meets its old noise."""

    def address(self, stream, position, node=0):
        stream, position, _ = super().address(stream, position, node)
        return stream, position, 0


class _DraftNoiseInCorrection:
    """Corrections drawn with the noise that drew the rejected draft."""

    def address(self, stream, position, node=0):
        return super().address(Stream.DRAFT if stream == Stream.CORRECT else stream, position, node)


class EnumeratingPositionOnly(_PositionOnly, EnumeratingSource):
    pass


class CrowdPositionOnly(_PositionOnly, CrowdSource):
    pass


class EnumeratingDraftNoise(_DraftNoiseInCorrection, EnumeratingSource):
    pass


class CrowdDraftNoise(_DraftNoiseInCorrection, CrowdSource):
    pass


# ---- trees


def traversal_divided_by_the_child(target_probs, draft_probs, tree, source, anchor_position):
    """The traversal rule with the rejected child's prefix probability in the normaliser, where the node's own belongs."""

    def visit(node, prefix_prob, path):
        remaining, numerator, denominator = target_probs[node], prefix_prob, 1.0
        for child in tree.children[node]:
            token, proposed = tree.tokens[child], draft_probs[child]
            child_prob = min(1.0, prefix_prob * float(remaining[token]) / float(proposed[token]))
            verdict = visit(child, child_prob, (*path, child))
            if verdict is not None:
                return verdict
            residual = (prefix_prob * remaining - proposed).clamp(min=0)
            numerator = float(residual.sum())
            denominator = numerator + 1.0 - child_prob
            remaining, prefix_prob = residual / max(numerator, 1e-300), min(1.0, numerator / denominator)
        position = anchor_position + len(path)
        if node > 0 and not source.accepts(position - 1, denominator, numerator, node=node):
            return None
        return TreeVerdict(path, source.draw(position, remaining if float(remaining.sum()) > 0 else target_probs[node], node=node))

    return visit(0, 1.0, (0,))


def recursive_without_residual(target_probs, draft_probs, tree, source, anchor_position):
    """Every sibling verified against the whole target distribution; what the elder ones were rejected for stays in it."""
    path = [0]
    while True:
        remaining = target_probs[path[-1]]
        for child in tree.children[path[-1]]:
            token = tree.tokens[child]
            if source.accepts(anchor_position + len(path), float(draft_probs[child][token]), float(remaining[token]), node=child):
                path.append(child)
                break
        else:
            for child in tree.children[path[-1]]:
                remaining = (remaining - draft_probs[child]).clamp(min=0)
            remaining = remaining if float(remaining.sum()) > 0 else target_probs[path[-1]]
            return TreeVerdict(tuple(path), source.draw(anchor_position + len(path), remaining, node=path[-1]))


class OneUniformForSiblings(EnumeratingSource):
    """Acceptance uniforms addressed by position alone, so that all children of a node share theirs."""

    def address(self, stream, position, node=0):
        return super().address(stream, position, 0 if stream == Stream.ACCEPT else node)
