"""Makes confidences honest: measures how honest they are, fits one temperature per draft position, keeps that up to date.

    survival of draft k = product over i <= k of sigmoid(logit_i / T_i);   T_k = argmin over a grid of ECE(survival_k)
    ECE = sum over bins of (share of samples in the bin) * |mean predicted - mean observed|

Symbols: N rounds, K draft positions, R requests in the batch, S request slots of the engine; T the temperatures of
sequential temperature scaling (STS); ECE the expected calibration error over equal-width bins of [0, 1].

Host side, plain torch, fp64, on whatever device the tensors are; everything here may wait for the device but
`OnlineCalibration.update`. The reference is reference/calibration.py.

Sources: STS: "DSpark: Confidence-Scheduled Speculative Decoding with Semi-Autoregressive Generation", arXiv 2607.05147;
ECE, temperature scaling and reliability diagrams: Guo et al., "On Calibration of Modern Neural Networks", arXiv
1706.04599.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from .checks import INT_DTYPES, LOGIT_DTYPES, check_device, check_int, check_optional, check_tensor, check_type

__all__ = [
    "STS_GRID",
    "OnlineCalibration",
    "Reliability",
    "auc",
    "brier",
    "expected_calibration_error",
    "fit_sts",
    "plot_reliability",
    "reliability",
    "survival",
]

# 1/16 to 16 in 192 equal ratios, from 1 (change nothing) outwards: the first of equally good ones is the one to take.
STS_GRID = (1.0, *(2.0 ** (sign * i / 24) for i in range(1, 97) for sign in (-1, 1)))
# Errors this close are equal. The order of summation moves an error by about 1e-14 at a million rounds; where that chose
# among equally good temperatures (mirrored logits in one bin: all of them), the fit would depend on the order of rounds.
_EQUAL = 1e-12
# Rounds per step of the search. 193 temperatures x 4096 rounds x 8 bytes is 6 MB a temporary, whatever N; two CPU cores
# take 10.4 ns per temperature and round at 4096, 11.0 at 2048, 12.4 at 8192.
_ROUNDS_AT_ONCE = 4096
_SCORE_DTYPES = (*LOGIT_DTYPES, torch.float64)
_SUFFIXES = (".png", ".svg")
# Lengths without a common divisor, so that 35 curves differ in black and white.
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")
_LINES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)))
_HATCHES = ("", "////", "....", "xxxx", "\\\\\\\\", "++++", "oooo")


def _samples(probs: Tensor, outcomes: Tensor) -> tuple[Tensor, Tensor]:
    """Both as fp64 [N], checked."""
    check_tensor("probs", probs)
    check_tensor("outcomes", outcomes, shape=tuple(probs.shape), device=probs.device)
    if probs.numel() == 0:
        raise ValueError("probs: expected at least one sample, got none")
    probs, outcomes = probs.detach().double().reshape(-1), outcomes.detach().double().reshape(-1)
    if not bool(((0 <= probs) & (probs <= 1)).all()):
        raise ValueError("probs: expected probabilities in [0, 1], got values outside or NaN")
    if not bool(((outcomes == 0) | (outcomes == 1)).all()):
        raise ValueError("outcomes: expected only 0 and 1, got other values")
    return probs, outcomes


def _bins_of(probs: Tensor, bins: int) -> Tensor:
    """Index of the equal-width bin, closed below; 1 belongs to the last bin."""
    return (probs * bins).long().clamp_(max=bins - 1)


def _sum_by(index: Tensor, values: Tensor, size: int) -> Tensor:
    return torch.zeros(size, dtype=torch.float64, device=values.device).index_add_(0, index, values)


def expected_calibration_error(probs: Tensor, outcomes: Tensor, bins: int = 20) -> float:
    """Mean distance between predicted and observed, over `bins` equal-width bins weighted by their samples.

    probs: numbers in [0, 1]; outcomes: 0/1 or bool; any shape, the same for both. Raises TypeError or ValueError that
    names the argument, for no samples too. Source: arXiv 1706.04599.
    """
    check_int("bins", bins, low=1)
    probs, outcomes = _samples(probs, outcomes)
    # share * |mean - mean| = |sum of differences| / N, which needs no division by the count of an empty bin.
    return float(_sum_by(_bins_of(probs, bins), probs - outcomes, bins).abs().sum()) / probs.numel()


def auc(probs: Tensor, outcomes: Tensor, bins: int = 1000) -> float:
    """Probability that a survivor had a higher probability than a non-survivor, ties counted half; NaN without both kinds.

    From histograms: probabilities in the same of `bins` equal-width bins count as tied. Arguments and errors as in
    `expected_calibration_error`.
    """
    check_int("bins", bins, low=1)
    probs, outcomes = _samples(probs, outcomes)
    index = _bins_of(probs, bins)
    survivors, others = _sum_by(index, outcomes, bins), _sum_by(index, 1 - outcomes, bins)
    beaten = others.cumsum(0) - others / 2
    return float(survivors @ beaten / (survivors.sum() * others.sum()))


def brier(probs: Tensor, outcomes: Tensor) -> float:
    """Mean squared difference between probability and outcome. Arguments and errors as in `expected_calibration_error`."""
    probs, outcomes = _samples(probs, outcomes)
    return float((probs - outcomes).square().mean())


def survival(logits: Tensor, temperatures: Tensor | None = None) -> Tensor:
    """Probability that draft k and every draft before it survive: cumulative product of sigmoid(logit / T), fp64 [..., K].

    logits: raw confidence logits [..., K], any float dtype; temperatures: float [K], None = 1. Raises TypeError or
    ValueError that names the argument, for temperatures that are not finite and positive too. Source: arXiv 2607.05147.
    """
    check_tensor("logits", logits, dtype=_SCORE_DTYPES)
    if logits.dim() == 0:
        raise ValueError("logits: expected shape [..., K], got []")
    scores = logits.detach().double()
    if temperatures is not None:
        check_tensor("temperatures", temperatures, dtype=_SCORE_DTYPES, shape=(logits.shape[-1],), device=logits.device)
        if not bool((temperatures.isfinite() & (temperatures > 0)).all()):
            raise ValueError(f"temperatures: expected finite, positive numbers, got {temperatures.tolist()}")
        scores = scores / temperatures.detach().double()
    return scores.sigmoid().cumprod(-1)


@dataclasses.dataclass(frozen=True, eq=False)
class Reliability:
    """What a reliability diagram shows, on the host.

    edges: fp64 [bins+1]; predicted (mean probability) and survived (share of outcomes 1): fp64 [bins], NaN in an empty
    bin; counts: int64 [bins].
    """

    edges: Tensor
    predicted: Tensor
    survived: Tensor
    counts: Tensor


def reliability(probs: Tensor, outcomes: Tensor, bins: int = 20) -> Reliability:
    """Predicted against observed by bin. Arguments and errors as in `expected_calibration_error`."""
    check_int("bins", bins, low=1)
    probs, outcomes = _samples(probs, outcomes)
    index = _bins_of(probs, bins)
    counts = torch.bincount(index, minlength=bins)
    return Reliability(
        torch.arange(bins + 1, dtype=torch.float64) / bins,
        (_sum_by(index, probs, bins) / counts).cpu(),
        (_sum_by(index, outcomes, bins) / counts).cpu(),
        counts.cpu(),
    )


def plot_reliability(curves: Mapping[str, tuple[Tensor, Tensor]], path: str | os.PathLike[str], bins: int = 20) -> None:
    """Write a reliability diagram, PNG or SVG by the suffix of `path`.

    curves: label -> (probs, outcomes), as in `expected_calibration_error`. Above: share survived against mean predicted,
    one point per bin that has samples, and the diagonal of perfect honesty; the legend gives each ECE. Below: samples
    per bin. Markers, line styles and hatches tell the curves apart without colour.

    Raises TypeError or ValueError that names the argument, ImportError without matplotlib (the extra `plots`).
    """
    check_type("curves", curves, Mapping)
    if not curves:
        raise ValueError("curves: expected at least one (probs, outcomes), got none")
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"path: expected a name that ends in {' or '.join(_SUFFIXES)}, got {path.name!r}")
    tables = {label: reliability(*pair, bins) for label, pair in curves.items()}
    errors = {label: expected_calibration_error(*pair, bins) for label, pair in curves.items()}
    try:
        import matplotlib
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        raise ImportError("plotting needs matplotlib: pip install dspark_kernels[plots]") from None
    # A fixed salt and no date: the same data gives the same file. A Figure of its own leaves pyplot's state alone.
    with matplotlib.rc_context({"svg.hashsalt": "dspark_kernels", "hatch.linewidth": 0.6}):
        figure = Figure(figsize=(5.5, 6.5), layout="constrained")
        above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
        above.plot([0, 1], [0, 1], color="0.6", linewidth=1, zorder=1)
        width = 0.9 / bins / len(tables)
        for i, (label, table) in enumerate(tables.items()):
            full = table.counts > 0
            (line,) = above.plot(
                table.predicted[full].tolist(),
                table.survived[full].tolist(),
                marker=_MARKERS[i % len(_MARKERS)],
                linestyle=_LINES[i % len(_LINES)],
                markersize=5,
                clip_on=False,  # points at 0 and 1 are whole
                label=f"{label} (ECE {100 * errors[label]:.2f} %)",
            )
            left = (table.edges[:-1] + 0.05 / bins + i * width).tolist()
            below.bar(
                left,
                table.counts.tolist(),
                width,
                align="edge",
                facecolor=line.get_color(),
                edgecolor="black",
                linewidth=0.4,
                hatch=_HATCHES[i % len(_HATCHES)],
            )
        above.set(xlim=(0, 1), ylim=(0, 1), ylabel="share survived")
        above.grid(color="0.9")
        above.legend(handlelength=4)
        below.set(xlabel="predicted survival", ylabel="samples")
        below.yaxis.set_major_locator(MaxNLocator(4, integer=True))
        metadata = {"Date": None} if path.suffix.lower() == ".svg" else None
        figure.savefig(path, dpi=150, metadata=metadata)


def fit_sts(logits: Tensor, survived: Tensor, *, bins: int = 20, observed: Tensor | None = None) -> Tensor:
    """Sequential temperature scaling: one temperature per draft position, fp32 [K] on the device of `logits`.

    From left to right, position k takes the temperature of STS_GRID whose cumulative product of sigmoid(logit / T) has
    the least ECE over `bins` bins, earlier positions fixed. Among equal errors: the temperature nearest to 1 in ratio,
    then the smaller.

    Args:
        logits: [N, K] raw confidence logits (`DraftBlock.confidence_logits`), any float dtype, infinities allowed.
        survived: [N, K] 0/1 or bool, 1 where draft k was accepted together with every draft before it.
        observed: [N, K] bool, True where draft k was verified (k <= draft_len), a prefix of each round. None = all.

    Position k is fitted on the rounds that verified draft k, whatever became of them there. A round cut short tells
    nothing about the drafts behind the cut, and what `logits` and `survived` hold there is not looked at. It is
    tempting to keep one kind of short round: where an earlier draft was rejected, the later ones "did not survive"
    either, verified or not. But of the rounds cut at the same place, those accepted as far as the cut can't be kept,
    because their later drafts have no outcome. Only failures would be added, and every later position would look worse
    than it is, the more so the more rounds are short. Dropping both is fair as long as the cut depends on nothing but
    the round's own confidences and on other requests, which holds for the lossless schedules. It does mean that the
    temperatures fit the rounds that get verified: a position the scheduler never admits is never learned and keeps 1.

    Raises TypeError or ValueError that names the argument: wrong shapes or dtypes, no rounds, NaN among the observed
    logits, `survived` that is not 0/1 or rises along a round, `observed` that is not a prefix. Source: arXiv 2607.05147.
    """
    check_tensor("logits", logits, dtype=_SCORE_DTYPES, shape=("N", "K"))
    shape, device = tuple(logits.shape), logits.device
    check_tensor("survived", survived, shape=shape, device=device)
    check_optional("observed", observed, dtype=torch.bool, shape=shape, device=device)
    check_int("bins", bins, low=1)
    if logits.numel() == 0:
        raise ValueError(f"logits: expected at least one round and one draft, got {list(logits.shape)}")
    if observed is None:
        observed = torch.ones_like(logits, dtype=torch.bool)
    elif bool((observed[:, 1:] & ~observed[:, :-1]).any()):
        raise ValueError("observed: expected the verified drafts to be a prefix of each round, got others")
    if bool((logits.isnan() & observed).any()):
        raise ValueError("logits: expected numbers, got NaN")
    scores = logits.detach().double()
    outcomes = survived.detach().double().masked_fill(~observed, 0)
    if not bool(((outcomes == 0) | (outcomes == 1)).all()) or bool((outcomes[:, 1:] > outcomes[:, :-1]).any()):
        raise ValueError("survived: expected 0/1 that never rises along a round (prefix survival), got other values")

    grid = torch.tensor(STS_GRID, dtype=torch.float64, device=logits.device)
    earlier = torch.ones_like(scores[:, 0])
    temperatures = []
    for k in range(scores.shape[1]):
        # Rounds that end before k are out for all later positions too.
        seen = observed[:, k]
        if not bool(seen.all()):
            scores, outcomes, observed, earlier = scores[seen], outcomes[seen], observed[seen], earlier[seen]
        if not len(scores):
            temperatures += [1.0] * (logits.shape[1] - k)
            break
        errors = _grid_errors(earlier, scores[:, k], outcomes[:, k], grid, bins).tolist()
        least = min(errors) + _EQUAL
        best = next(i for i, error in enumerate(errors) if error <= least)
        temperatures.append(STS_GRID[best])
        earlier = earlier * torch.sigmoid(scores[:, k] / STS_GRID[best])
    return torch.tensor(temperatures, dtype=torch.float32, device=logits.device)


def _grid_errors(earlier: Tensor, scores: Tensor, outcomes: Tensor, grid: Tensor, bins: int) -> Tensor:
    """ECE of earlier * sigmoid(scores / T) for each T of the grid. earlier, scores, outcomes fp64 [N]; grid [T] -> [T]."""
    gaps = torch.zeros(len(grid) * bins, dtype=torch.float64, device=grid.device)
    first_bin = (torch.arange(len(grid), device=grid.device) * bins)[:, None]
    for start in range(0, len(scores), _ROUNDS_AT_ONCE):
        part = slice(start, start + _ROUNDS_AT_ONCE)
        probs = torch.sigmoid_(scores[part] / grid[:, None]).mul_(earlier[part])  # [T, rounds]
        cells = _bins_of(probs, bins).add_(first_bin)
        gaps.index_add_(0, cells.view(-1), probs.sub_(outcomes[part]).view(-1))
    return gaps.view(-1, bins).abs().sum(1) / len(scores)


class OnlineCalibration:
    """Sequential temperature scaling from the rounds an engine serves, in bounded memory.

    A ring of the last `window` rounds lies on the device: raw confidence logits, drafts verified, drafts accepted.
    `update` adds a step's rounds without waiting for the device and may be captured in a CUDA graph. `fit`, now and
    then, fits temperatures to the ring, and `apply` puts them where the confidence head reads them. Older rounds are
    overwritten, so the fit follows a drift of the traffic within `window` rounds.

        online = OnlineCalibration(drafts=7)
        online.update(block.confidence_logits, layout.draft_lens, acceptance.num_accepted)  # every step
        online.fit()                                                                        # every few thousand rounds
        online.apply(head.sts_temperatures)

    Raw logits are kept, so rounds drafted under older temperatures stay valid. Use it from one stream, or order the
    streams yourself. Where several ranks schedule, fit on one and send the result: ranks whose temperatures differ
    verify different lengths.

    Args:
        drafts: K. window: rounds kept. device: where the ring lies; None = the current CUDA device, or the CPU where there is none.
        temperatures: fp32 [K] that positions keep until they are fitted (those of the checkpoint), None = 1.
    """

    def __init__(
        self, drafts: int, window: int = 4096, device: torch.device | str | None = None, temperatures: Tensor | None = None
    ) -> None:
        self.drafts = check_int("drafts", drafts, low=1)
        self.window = check_int("window", window, low=1)
        check_optional("temperatures", temperatures, dtype=torch.float32, shape=(drafts,))
        device = check_device("device", device)
        # Row `window` takes what must not be recorded, so that every step writes the same number of rows.
        self._logits = torch.zeros(window + 1, drafts, device=device)
        self.device = self._logits.device
        self._lengths = torch.zeros(window + 1, 2, dtype=torch.int32, device=device)  # verified, accepted
        self._recorded = torch.zeros(1, dtype=torch.int64, device=device)  # rounds ever recorded
        self._positions = torch.arange(drafts, dtype=torch.int32, device=device)
        self._temperatures = torch.ones(drafts, device=device)
        if temperatures is not None:
            self._temperatures.copy_(temperatures.detach())

    @property
    def bytes(self) -> int:
        """Device memory held, whatever was recorded: about window * (4 K + 8)."""
        held = (self._logits, self._lengths, self._recorded, self._positions, self._temperatures)
        return sum(x.numel() * x.element_size() for x in held)

    @property
    def temperatures(self) -> Tensor:
        """A copy of what `apply` writes: fp32 [K] on the device of the ring."""
        return self._temperatures.clone()

    @torch.no_grad()
    def update(
        self, confidence_logits: Tensor, draft_lens: Tensor, num_accepted: Tensor, state_indices: Tensor | None = None
    ) -> None:
        """Record the rounds of one step. Never waits for the device, and changes no shape by what the tensors hold.

        Args:
            confidence_logits: fp32 [S, K] (R without `state_indices`), `DraftBlock.confidence_logits`: raw.
            draft_lens: int32 or int64 [R], drafts verified (`VerifyLayout.draft_lens`).
            num_accepted: int32 or int64 [R] (`Acceptance.num_accepted`).
            state_indices: int32 or int64 [R], request slot of each row, -1 = padding row.

        Nothing is recorded for padding rows, for slots outside [0, S), for requests that verified no draft, and for
        rounds with a NaN among their verified logits, which would make the window useless. Lengths above K count as K,
        accepted drafts beyond the verified ones as verified. Of more than `window` rounds the last ones stay.

        Raises TypeError or ValueError that names the argument.
        """
        device = self.device
        requests = check_tensor("draft_lens", draft_lens, dtype=INT_DTYPES, shape=("R",), device=device).shape[0]
        check_tensor("num_accepted", num_accepted, dtype=INT_DTYPES, shape=(requests,), device=device)
        check_optional("state_indices", state_indices, dtype=INT_DTYPES, shape=(requests,), device=device)
        slots = requests if state_indices is None else "S"
        check_tensor("confidence_logits", confidence_logits, dtype=torch.float32, shape=(slots, self.drafts), device=device)
        if requests == 0:
            return
        slots = confidence_logits.shape[0]
        if slots == 0:
            raise ValueError(f"confidence_logits: expected at least one slot for {requests} requests, got none")

        verified = draft_lens.int()
        accepted = num_accepted.int().minimum(verified)
        keep = verified > 0
        if state_indices is not None:
            keep &= (state_indices >= 0) & (state_indices < slots)
            confidence_logits = confidence_logits.index_select(0, state_indices.clamp(0, slots - 1))
        keep &= ~(confidence_logits.isnan() & (self._positions < verified[:, None])).any(1)
        order = keep.cumsum(0)  # 1, 2, ... at the rows that are kept
        total = order[-1:]
        # Two rows of one step must not meet in one place: index_copy_ would mix them.
        keep &= order > total - self.window
        row = ((self._recorded + order - 1) % self.window).masked_fill(~keep, self.window)
        self._logits.index_copy_(0, row, confidence_logits)
        self._lengths.index_copy_(0, row, torch.stack((verified, accepted), 1))
        self._recorded += total

    def rounds(self) -> tuple[Tensor, Tensor, Tensor]:
        """The rounds in the window, oldest first, copied to the host: logits fp32, survived bool, observed bool, [N, K]
        each, as `fit_sts` takes them. Waits for the device."""
        recorded = int(self._recorded)
        count = min(recorded, self.window)
        oldest = recorded - count
        order = (torch.arange(count) + oldest) % self.window
        logits, lengths = self._logits.cpu()[order], self._lengths.cpu()[order]
        positions = torch.arange(self.drafts)
        return logits, positions < lengths[:, 1:], positions < lengths[:, :1]

    def fit(self, *, bins: int = 20, min_rounds: int = 512) -> Tensor:
        """Fit temperatures to the window and keep them for `apply`: fp32 [K] on the device of the ring.

        Positions that at least `min_rounds` rounds of the window verified get what `fit_sts` gives; the others keep
        what they had (the last fit, before that the `temperatures` given to the constructor). A few rounds give a bad
        fit: on held-out rounds the ECE of fits to 256, 512, 1024 and 4096 rounds was 3.0, 2.2, 1.5 and 1.0 % (mean of
        100 positions, 7 % before). Works on the host, where sums have one order, so the same rounds always give the
        same temperatures. Waits for the device.

        Raises TypeError or ValueError that names the argument.
        """
        check_int("bins", bins, low=1)
        check_int("min_rounds", min_rounds, low=1, high=self.window)
        logits, survived, observed = self.rounds()
        # Rounds are verified from the left, so the positions with enough of them come first.
        enough = int((observed.sum(0) >= min_rounds).sum())
        if enough:
            fitted = fit_sts(logits[:, :enough], survived[:, :enough], bins=bins, observed=observed[:, :enough])
            self._temperatures[:enough].copy_(fitted)
        return self.temperatures

    @torch.no_grad()
    def apply(self, sts_temperatures: Tensor) -> None:
        """Copy the temperatures into `sts_temperatures`, fp32 [K] (`ConfidenceHead.sts_temperatures`), in place.

        The tensor stays the same, so captured graphs see the new values from their next replay on. Raises TypeError or
        ValueError that names the argument.
        """
        check_tensor("sts_temperatures", sts_temperatures, dtype=torch.float32, shape=(self.drafts,))
        sts_temperatures.copy_(self._temperatures)
