"""The distributions that drafts were drawn from, as acceptance takes them: types of `types`, on a page of their own.

Symbols: as in types.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from .checks import INT_DTYPES, LOGIT_DTYPES, Checked, check_tensor

_FLOAT = torch.float32


@dataclasses.dataclass(frozen=True, eq=False)
class OneHotProposal(Checked):
    """The drafts were chosen deterministically (greedy, n-gram, ...): the draft itself has probability 1."""

    def _check(self) -> None:
        pass


@dataclasses.dataclass(frozen=True, eq=False)
class DenseProposal(Checked):
    """The distribution that the drafts were drawn from, as stored logits over the vocabulary, or as probabilities (`of_probs`).

    logits            bf16, fp16 or fp32 [S, K, V or Vd], before temperature, -inf outside the support left by filters
    lse               fp32 [S, K], ln sum exp(logits / temperature), or None
    temperature       fp32 [S]; None = the sampling temperature; 0 = one-hot on the largest logit
    draft_to_target   int64 [Vd] or None: the target's id of each column, each at most once, in any order; -1 = none
    probs             whether `logits` holds probabilities, after temperature; then the three fields above are None
    starts            int32 or int64 [S] or None: with probs, logits is packed [num_tokens, V], and draft k of a slot is its row
                      starts[slot] + k - 1
    """

    logits: Tensor
    lse: Tensor | None = None
    temperature: Tensor | None = None
    draft_to_target: Tensor | None = None
    probs: bool = False
    starts: Tensor | None = None

    @classmethod
    def of_probs(cls, probs: Tensor, cu_drafts: Tensor | None = None) -> DenseProposal:
        """A proposal from probabilities, which acceptance of chains reads where they are: nothing is copied, and no log is taken.

            probs       bf16, fp16 or fp32 [S, K, V], or packed [num_tokens, V] with cu_drafts; after the draft's temperature and
                        filters. Rows sum to 1 and are not normalised again; what is below 0 or NaN counts as 0
            cu_drafts   int32 or int64 [S + 1]: first row of each slot's drafts, then the end. An engine that packs by batch row
                        calls without state_indices, so that slots are batch rows

        The temperature of `SamplingTensors` still says which requests are greedy.
        """
        if cu_drafts is None:
            return cls(probs, probs=True)
        starts = check_tensor("cu_drafts", cu_drafts, dtype=INT_DTYPES, shape=("S+1",))
        return cls(probs, probs=True, starts=starts[:-1])

    def _check(self) -> None:
        packed = self.starts is not None
        logits = self._tensor(
            "logits", dtype=LOGIT_DTYPES, shape=("num_tokens", "V") if packed else ("S", "K", "V"), last_contiguous=True
        )
        if self.probs or packed:
            for field in ("lse", "temperature", "draft_to_target"):
                if getattr(self, field) is not None:
                    raise ValueError(f"{self._name(field)}: expected None for probabilities, got a tensor")
            if not self.probs:
                raise ValueError(f"{self._name('starts')}: expected None for logits, which are not packed, got a tensor")
            self._optional("starts", dtype=INT_DTYPES, shape=("S",), device=logits.device, contiguous=True)
            return
        slots, drafts, width = logits.shape
        self._optional("lse", dtype=_FLOAT, shape=(slots, drafts), device=logits.device, last_contiguous=True)
        self._optional("temperature", dtype=_FLOAT, shape=(slots,), device=logits.device, contiguous=True)
        self._optional("draft_to_target", dtype=torch.int64, shape=(width,), device=logits.device, contiguous=True)


@dataclasses.dataclass(frozen=True, eq=False)
class SparseProposal(Checked):
    """The distribution that the drafts were drawn from, on C candidates per position.

        ids           int64 or int32 [S, K, C], in any order
        logits        bf16, fp16 or fp32 [S, K, C], before temperature
        lse           fp32 [S, K] or None; acceptance does not read it
        temperature   fp32 [S]; None = the sampling temperature; 0 = one-hot on the largest logit

    The probabilities of entries with the same id add up. Entries outside the vocabulary (-1 = unused) stay in the normalisation;
    give an unused entry the logit -inf.
    """

    ids: Tensor
    logits: Tensor
    lse: Tensor | None = None
    temperature: Tensor | None = None

    def _check(self) -> None:
        ids = self._tensor("ids", dtype=INT_DTYPES, shape=("S", "K", "C"), last_contiguous=True)
        self._tensor("logits", dtype=LOGIT_DTYPES, shape=tuple(ids.shape), device=ids.device, last_contiguous=True)
        self._optional("lse", dtype=_FLOAT, shape=tuple(ids.shape[:2]), device=ids.device, last_contiguous=True)
        self._optional("temperature", dtype=_FLOAT, shape=(ids.shape[0],), device=ids.device, contiguous=True)


Proposal = OneHotProposal | DenseProposal | SparseProposal
