"""What adapters that replace an engine's functions share: the fallback, one line of log per event, signatures, scratch memory.

An adapter takes the place of a function of an engine under three rules. It never raises into the engine; where it cannot serve a
call, the engine's own function does; and the log says so once.
"""

from __future__ import annotations

import importlib
import inspect
import logging
import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from ..workspace import Workspace


class Refused(NotImplementedError):
    """A call that an adapter leaves to the engine. The text says what it met."""


class Reporter:
    """Writes each event once to the log of an engine, so that its handlers show it."""

    def __init__(self, engine: str):
        self._logger = logging.getLogger(f"{engine}.dspark_kernels")
        self._said: set[str] = set()

    def info(self, text: str) -> None:
        self._once(logging.INFO, text)

    def warning(self, text: str) -> None:
        self._once(logging.WARNING, text)

    def error(self, text: str, *, trace: bool = False) -> None:
        self._once(logging.ERROR, text, trace)

    def _once(self, level: int, text: str, trace: bool = False) -> None:
        if text not in self._said:
            self._said.add(text)
            self._logger.log(level, "dspark_kernels: %s", text, exc_info=trace)


class Part:
    """One function of an engine that an adapter serves, until it fails.

    `part(ours, own)` returns what `ours()` returns. Where that raises `Refused`, the log says why, and `own()` answers. Any other
    exception is a fault of the adapter: the log has its trace, and from then on `own()` answers every call.
    """

    def __init__(self, name: str, reporter: Reporter):
        self.name, self._reporter, self.failed = name, reporter, False

    def __call__(self, ours: Callable, own: Callable):
        if self.failed:
            return own()
        try:
            return ours()
        except Refused as refusal:
            self._reporter.warning(f"{self.name}: the engine's own path is used where there is {refusal}")
        except Exception as fault:
            self.failed = True
            kind = f"{type(fault).__name__}: {fault}"
            self._reporter.error(f"{self.name}: failed ({kind}); the engine's own path is used from now on", trace=True)
        return own()


def refuse_if(condition: bool, what: str) -> None:
    """Raise `Refused` with `what`, if the condition holds."""
    if condition:
        raise Refused(what)


def parameters(function: Callable) -> tuple[str, ...]:
    """Names of a function's parameters in order, of the function itself where it is decorated."""
    return tuple(inspect.signature(inspect.unwrap(function)).parameters)


def wanted_parts(variable: str, parts: Sequence[str], default: Sequence[str]) -> tuple[str, ...]:
    """The parts of an adapter that an environment variable names, separated by commas: "all", "off", or some of `parts`.

    Raises ValueError for a part that does not exist.
    """
    text = os.environ.get(variable, "").strip().lower()
    if not text:
        return tuple(default)
    if text in ("off", "0"):
        return ()
    names = tuple(parts) if text == "all" else tuple(name.strip() for name in text.split(","))
    for name in names:
        if name not in parts:
            raise ValueError(f"{variable}: expected {', '.join(parts)}, all or off, got {name!r}")
    return names


class Scratch:
    """A workspace per device, stream and sizes, as large as the largest batch so far."""

    def __init__(self):
        self._workspaces: dict[tuple, Workspace] = {}

    def __call__(self, requests: int, drafts: int, vocab_size: int, device: torch.device, rank: int = 0) -> Workspace | None:
        """None while a CUDA graph is captured: what the graph allocates belongs to it alone."""
        stream = None
        if device.type == "cuda":
            if torch.cuda.is_current_stream_capturing():
                return None
            stream = torch.cuda.current_stream(device).cuda_stream
        key = (device, stream, drafts, vocab_size, rank)
        kept = self._workspaces.get(key)
        if kept is None or kept.max_requests < requests:
            room = 1 << (requests - 1).bit_length()
            kept = self._workspaces[key] = Workspace(room, drafts, vocab_size, device, markov_rank=rank)
        return kept


def columns_of_both(target_logits: Tensor, draft_logits: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Views over the columns that both have: engines pad the two vocabularies to unlike widths, and never fill the padding."""
    if draft_logits is None:
        return target_logits, None
    width = min(target_logits.shape[-1], draft_logits.shape[-1])
    return target_logits[:, :width], draft_logits[..., :width]


def module(name: str):
    """An engine's module, imported when the engine asks for the adapter. Raises ImportError."""
    return importlib.import_module(name)


def resolve(place: str):
    """What "module:name.name" names, None where there is no such name. The module is imported."""
    file, _, names = place.partition(":")
    found = module(file)
    for name in names.split("."):
        found = getattr(found, name, None)
    return found


def unlike(signatures: dict[str, tuple[str, ...]]) -> str | None:
    """The first place ("module:name") whose function has other parameters than given; None where all are alike."""
    for place, names in signatures.items():
        function = resolve(place)
        if function is None or parameters(function) != names:
            return place
    return None


def replace(owner, name: str, make: Callable[[Callable], Callable]) -> None:
    """Put `make(own)` in the place of owner's function `name`, once, however often it is asked for."""
    own = getattr(owner, name)
    if not hasattr(own, "_dspark_kernels_own"):
        ours = make(own)
        ours._dspark_kernels_own = own
        setattr(owner, name, ours)
