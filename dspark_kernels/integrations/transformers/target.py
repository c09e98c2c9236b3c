"""A causal language model of transformers as rounds use it: rows at given positions in, logits and chosen layers' outputs out.

The model gets finished masks, one for each kind of its layers, so that rows of a batch may have lengths of their own, also with
sliding windows. What a layer returns is seen by hooks: the last of transformers' own `hidden_states` has the final norm in it.
"""

from __future__ import annotations

import contextlib
import inspect
from typing import NamedTuple

import torch
from torch import Tensor

from .cache import PositionCache, causal_mask

FULL, SLIDING = "full_attention", "sliding_attention"
_ATTENTION = ("eager", "sdpa")
_CHECK_ERROR = 0.05  # of the largest logit: a wrong mask, position or column is off by far more, the roundings of bf16 by less


class Output(NamedTuple):
    """What a pass gives for its rows."""

    logits: Tensor  # [B, keep, V], of the last rows
    features: Tensor  # [B, n, m * d], the chosen layers' outputs side by side


class Target:
    """A model and the layers whose outputs are wanted: -1 = the embedding, i = output of decoder layer i.

    Raises ValueError for a model that this cannot run as it runs itself: an encoder, layers that keep a state which cannot forget
    drafts, attention other than eager and SDPA, and any whose logits come out differently on a few tokens.
    """

    def __init__(self, model, feature_layers: tuple[int, ...]):
        self.model, self._features = model, feature_layers
        self._config = model.config.get_text_config(decoder=True)
        self._name = type(model).__name__
        if getattr(model.config, "is_encoder_decoder", False) or getattr(model, "_is_stateful", False):
            raise ValueError(f"target: expected a decoder of attention layers alone, got {self._name}")
        decoder = model.get_decoder()
        self._layers = getattr(decoder, "layers", getattr(decoder, "h", None))  # h: in GPT-2 and its kin
        if not isinstance(self._layers, torch.nn.ModuleList):
            raise ValueError(f"target: expected a decoder with a list of layers, got {self._name} without one")
        attention = self._config._attn_implementation
        if attention not in _ATTENTION:
            raise ValueError(f"target: expected attn_implementation eager or sdpa, which take a mask per row, got {attention!r}")
        self._kinds = _kinds_of(self._config)
        if not self._kinds <= {FULL, SLIDING}:
            raise ValueError(f"target: expected full or sliding attention, which can forget drafts, got {sorted(self._kinds)}")
        if not all(-1 <= layer < len(self._layers) for layer in feature_layers):
            raise ValueError(f"target_layer_ids: expected -1 to {len(self._layers) - 1} for {self._name}, got {feature_layers}")
        self.lm_head: Tensor | None = getattr(model.get_output_embeddings(), "weight", None)
        if self.lm_head is None or not self.lm_head.is_floating_point() or self.lm_head.dtype.itemsize < 2:
            found = "without one" if self.lm_head is None else f"with one in {self.lm_head.dtype}"
            raise ValueError(
                f"target: expected an output head in floats of at least 16 bits, in which the drafter computes, got {self._name} {found}"
            )
        self.vocab, self.hidden = self.lm_head.shape
        taken = inspect.signature(model.forward).parameters
        self._cache_name = "cache" if "cache" in taken else "past_key_values"  # in transformers 5.24, and in 5.10
        self._takes_count = "logits_to_keep" in taken
        self._seen: dict[int, Tensor] = {}
        self._check()

    @property
    def num_layers(self) -> int:
        return len(self._layers)

    @property
    def embedding(self) -> Tensor | None:
        """[V, d]; None where the class does more than look it up."""
        module = self.model.get_input_embeddings()
        return module.weight if type(module) is torch.nn.Embedding else None

    @contextlib.contextmanager
    def watched(self):
        """Within this, passes see the chosen layers."""
        handles = []
        for index in set(self._features):
            if index == -1:
                handles.append(self._layers[0].register_forward_pre_hook(self._see_embedding, with_kwargs=True))
            else:
                see = lambda module, inputs, output, index=index: self._see(index, output)  # noqa: E731
                handles.append(self._layers[index].register_forward_hook(see))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()
            self._seen.clear()

    def start(self, length: int, last_position: int) -> None:
        """Forget everything. length: columns of the cache. last_position: of any token that is emitted; rows past it stand there."""
        self.cache, self._last_position = PositionCache(length), last_position

    def forward(self, token_ids: Tensor, positions: Tensor, width: int, keep: int, real: Tensor | None = None) -> Output:
        """One pass, within `watched`.

        Args:
            token_ids, positions: int64 [B, n]. real: bool [B, n], false for padding; None = none.
            width: columns up to the last row. keep: rows at the end whose logits are wanted.
        """
        self.cache.place(self.cache.columns(positions, real), width)
        output = self.model(
            input_ids=token_ids,
            attention_mask=self._masks(positions, width),
            position_ids=positions.clamp(max=self._last_position),  # a learned embedding may have no more
            use_cache=True,
            **{self._cache_name: self.cache},
            **({"logits_to_keep": keep} if self._takes_count else {}),
        )
        features = torch.cat([self._seen[layer].to(self.lm_head.device) for layer in self._features], -1)
        return Output(output.logits[:, -keep:], features)

    def _masks(self, positions: Tensor, width: int):
        windows = {FULL: None, SLIDING: getattr(self._config, "sliding_window", None)}
        masks = {kind: causal_mask(positions, width, windows[kind], self.model.dtype) for kind in self._kinds}
        # Models that have both kinds take one mask of each; the others take the one.
        return masks if len(masks) > 1 else masks.popitem()[1]

    def _see_embedding(self, module, inputs, named):
        self._seen[-1] = inputs[0] if inputs else named["hidden_states"]

    def _see(self, index: int, output):
        self._seen[index] = output if isinstance(output, Tensor) else output[0]

    @torch.no_grad()
    def _check(self) -> None:
        """Two rows of unequal length in two passes, against each row alone without a cache."""
        device, pad = self.lm_head.device, 2
        token_ids = torch.arange(12, device=device).view(2, 6) % self.vocab
        positions = torch.arange(6, device=device) - torch.tensor([[0], [pad]], device=device)
        real, positions = positions >= 0, positions.clamp(min=0)
        self.start(8, 7)
        with self.watched():
            try:
                self.forward(token_ids[:, :4], positions[:, :4], 4, 1, real[:, :4])
                logits = self.forward(token_ids[:, 4:], positions[:, 4:], 6, 2).logits
            except (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
                raise ValueError(f"target: {self._name} does not run over this cache and these masks: {error!r}") from error
        for row, start in ((0, 0), (1, pad)):
            alone = self.model(input_ids=token_ids[row : row + 1, start:], use_cache=False).logits[0, -2:]
            if not (logits[row] - alone).abs().max() <= _CHECK_ERROR * alone.abs().max():
                raise ValueError(f"target: expected {self._name} to give the logits that it gives without a cache, got others")


def _kinds_of(config) -> set[str]:
    kinds = getattr(config, "layer_types", None)
    if kinds:
        return set(kinds)
    # Of classes without kinds, those that read a window read it in every layer.
    used = getattr(config, "sliding_window", None) is not None and getattr(config, "use_sliding_window", True)
    return {SLIDING if used else FULL}
