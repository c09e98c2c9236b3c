"""Sequential and confidence heads, step by step, in fp64.

    vanilla: B = W1[x] W2^T
    gated:   g = sigmoid(G [h; W1[x]] + b),  B = (g * W1[x]) W2^T
    rnn:     (gate, candidate, output) = chunks of J [s; W1[x]; h] + b,  s' = sig(gate) s + (1 - sig(gate)) tanh(candidate),
             B = tanh(output) W2^T,  s_0 = 0
    confidence: c = sigmoid((w . [h; W1[x]] + b) / T)

Symbols: x = the previous token (the anchor at first), h = the position's hidden state, s = state. Source: DSpark, arXiv 2607.05147.
"""

from __future__ import annotations

import torch
from torch import Tensor

from dspark_kernels.types import ConfidenceHead, GatedMarkovHead, MarkovHead, RnnMarkovHead


def embed(head: MarkovHead | None, token: int) -> Tensor | None:
    """W1[token] in fp64 [r]; zeros for a token that W1 does not know; None without a head."""
    if head is None:
        return None
    if not 0 <= token < head.w1.shape[0]:
        return torch.zeros(head.rank, dtype=torch.float64, device=head.w1.device)
    return head.w1[token].double()


def output_weights(head: MarkovHead | None) -> Tensor | None:
    """W2 in fp64 [V, r], with its scales applied."""
    if head is None:
        return None
    return head.w2.double() if head.w2_scale is None else head.w2.double() * head.w2_scale.double()[:, None]


class Transition:
    """The transition bias along one request's block. w2: `output_weights(head)`, which the requests of a batch share.

    state: of an rnn, fp64 [r], after the last bias; pass it to continue an earlier call.
    """

    def __init__(self, head: MarkovHead | None, w2: Tensor | None, state: Tensor | None = None):
        self.head, self._w2, self.state = head, w2, state
        if head is not None and state is None:
            self.state = torch.zeros(head.rank, dtype=torch.float64, device=head.w1.device)

    def bias(self, token: int, hidden: Tensor | None) -> Tensor | float:
        """Bias of the next position, fp64 [V], after `token`; advances the recurrent state."""
        if self.head is None:
            return 0.0
        latent = embed(self.head, token)
        if isinstance(self.head, GatedMarkovHead):
            features = torch.cat([hidden.double(), latent])
            latent = torch.sigmoid(self.head.gate_weight.double() @ features + self.head.gate_bias.double()) * latent
        elif isinstance(self.head, RnnMarkovHead):
            features = torch.cat([self.state, latent, hidden.double()])
            joint = self.head.joint_weight.double() @ features + self.head.joint_bias.double()
            gate, candidate, output = joint.chunk(3)
            gate = torch.sigmoid(gate)
            self.state = gate * self.state + (1 - gate) * torch.tanh(candidate)
            latent = torch.tanh(output)
        return self._w2 @ latent


def confidence_logit(head: ConfidenceHead, hidden: Tensor, latent: Tensor | None) -> float:
    """w . [h; W1[x]] + b, fp64, before calibration; a weight of [H] does not read the token."""
    features = hidden.double()
    if head.weight.shape[0] > features.shape[0]:
        features = torch.cat([features, latent])
    logit = head.weight.double() @ features
    return float(logit if head.bias is None else logit + head.bias.double()[0])
