"""Whether a system's output is the target's own: the same text when greedy, equally likely text when sampled.

Greedy: identical to plain decoding up to a step whose two best logits are closer than twice the error of such logits, measured
against fp64. Sampled, two tests of the likelihood ln p(token) under the target, each within LIMIT standard errors:
    against its own distribution:   sum over tokens of ln p(x) - E ln p has mean 0 where x ~ p (a martingale: its variance is the
                             sum of squares)
    against plain decoding:  d_i = mean ln p of prompt i minus that of plain decoding; mean d
The first does not need plain decoding's noise and sees smaller differences. The second needs at least FEWEST_PROMPTS prompts.
Source of the definitions: docs/randomness.md, "Equality".
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

from reference.loop import Generation
from reference.model import Rows, Target

LIMIT = 4.0  # standard errors; exceeded at random once in some thousand rows of 16 prompts
# A standard error from a few prompts is itself too uncertain for a verdict: with three, one row in seventeen is beyond 4 of them.
FEWEST_PROMPTS = 8


class Verdict(NamedTuple):
    passed: bool
    text: str


def _last_logits(target: Target, token_ids: Sequence[int]) -> torch.Tensor:
    """Logits after a text, fp64 [V], from one pass over it."""
    rows = Rows.of([(0, 0, len(token_ids))], target.device)
    output = target.forward(torch.tensor(token_ids, device=target.device), rows, target.new_cache(1))
    return target.logits(output.hidden[-1:])[0].double()


def greedy(generations: Sequence[Generation], plain: Sequence[Generation], target: Target, exact: Target) -> Verdict:
    """Texts against those of plain decoding; `exact` is the target in fp64, which decides where they differ."""
    ties, wrong = 0, []
    for index, (have, want) in enumerate(zip(generations, plain, strict=True)):
        if have.output_ids == want.output_ids:
            continue
        at = next((i for i, (a, b) in enumerate(zip(have.output_ids, want.output_ids, strict=False)) if a != b), None)
        if at is None:
            wrong.append(f"prompt {index} has another length")
            continue
        wanted, computed = _last_logits(exact, want.output_ids[:at]), _last_logits(target, want.output_ids[:at])
        error = (wanted - computed).abs().max().item()
        gap = (wanted.max() - wanted[have.output_ids[at]]).item()
        if gap <= 2 * error:
            ties += 1
        else:
            wrong.append(f"prompt {index} differs at token {at}: {gap:.2g} below the best logit, error {error:.2g}")
    if wrong:
        return Verdict(False, f"{len(wrong)} of {len(plain)} texts differ from plain decoding; {wrong[0]}")
    same = len(plain) - ties
    return Verdict(True, f"{same} of {len(plain)} texts identical to plain decoding, {ties} part at a tie of rounding")


def sampled(generations: Sequence[Generation], plain: Sequence[Generation]) -> Verdict:
    """Likelihood under the target, against its own distribution and against plain decoding."""
    excess = [have - want for g in generations for have, want in zip(g.logprobs, g.expected_logprobs, strict=True)]
    means = [sum(g.logprobs) / len(g.logprobs) for g in generations]
    differences = [mean - sum(g.logprobs) / len(g.logprobs) for mean, g in zip(means, plain, strict=True)]
    own, own_error = sum(excess) / len(excess), math.sqrt(sum(e * e for e in excess)) / len(excess)
    text = f"{sum(means) / len(means):.3f} nats per token, {own:+.3f} ±{own_error:.3f} from its own distribution"
    passed = abs(own) <= LIMIT * own_error
    count = len(differences)
    if count > 1:
        mean = sum(differences) / count
        error = math.sqrt(sum((d - mean) ** 2 for d in differences) / (count - 1) / count)
        text += f", {mean:+.3f} ±{error:.3f} from plain decoding"
        passed &= count < FEWEST_PROMPTS or abs(mean) <= LIMIT * error
    return Verdict(passed, f"{text} (limit {LIMIT:.0f} errors)")
