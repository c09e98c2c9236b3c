"""DSpark: speculative decoding in `model.generate` of Hugging Face transformers, for any batch.

    dspark = DSpark.from_pretrained("dspark_qwen3_4b_block7", target=model)
    texts = model.generate(**inputs, max_new_tokens=256, custom_generate=dspark)

Source: DSpark, arXiv 2607.05147.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

import dspark_kernels as dk

from ...checkpoint import DrafterCheckpoint, load_drafter
from . import settings as sampling_settings
from .backbone import Backbone
from .rounds import Models, Prompt, Rounds, text_columns
from .statistics import Statistics
from .stopping import Stopping
from .target import Target

_RULES = ("token", "block", "coupled")
_MODES = ("greedy_search", "sample")
_CACHES = (None, "dynamic", "dynamic_full", "static")
_TAKEN = ("attention_mask", "position_ids", "use_cache", "logits_to_keep", "past_key_values", "cache", "cache_position")
# Columns of a pass over the prompt: its mask has as many rows, and as many columns as the prompt up to its end.
_CHUNK = 2048
# A drafter that fits its target has its first draft accepted in most rounds. After this many rounds a share below this one means that
# something is amiss.
_ROUNDS_TO_TELL, _COLLAPSED = 200, 0.01


class DSpark:
    """A drafter and its target, as `custom_generate` of `model.generate` takes them.

    What generate would emit token by token comes several tokens a round: greedy texts are the same up to ties within the error of the
    logits, sampled ones have the same distribution. A row's tokens depend on its own seed alone, not on the batch.

    statistics: of the last call, None before the first.
    """

    def __init__(self, checkpoint: DrafterCheckpoint, target, *, rule: str = "token", drafts: int | None = None):
        """checkpoint: of `dspark_kernels.checkpoint.load_drafter`; the rest as in `from_pretrained`."""
        if rule not in _RULES:
            raise ValueError(f"rule: expected one of {_RULES}, got {rule!r}")
        size = checkpoint.block_size
        if drafts is not None and (type(drafts) is not int or not 1 <= drafts <= size):
            reason = ", which has no row that predicts a later one" if type(drafts) is int and drafts > size else ""
            raise ValueError(f"drafts: expected 1 to {size}, the block size of the drafter{reason}, got {drafts!r}")
        own = Target(target, checkpoint.target_layer_ids)
        _check_pair(checkpoint, own)
        device, dtype = own.lm_head.device, own.lm_head.dtype
        self.statistics: Statistics | None = None
        self._backbone = Backbone(checkpoint, own.embedding, own.lm_head)
        ids = checkpoint.draft_to_target
        self._models = Models(
            own,
            self._backbone,
            _moved(checkpoint.head, device, dtype),
            drafts or size,
            rule,
            None if ids is None else ids.to(device),
        )
        self._row_rounds = self._first_accepted = 0
        self._warned = False

    @classmethod
    def from_pretrained(cls, directory, target, *, rule: str = "token", drafts: int | None = None) -> DSpark:
        """Read a DSpark or DFlash drafter, of the speculators library too, for a model.

        Args:
            directory: of the drafter, with config.json and model.safetensors; nothing is downloaded.
            target: a causal language model of transformers, attention eager or SDPA, with full or sliding-window layers.
            rule: of acceptance, "token", "block" or "coupled" (docs/proposals.md); all are lossless.
            drafts: drafts per round, at most and by default the drafter's block size.

        Raises:
            FileNotFoundError, ImportError: as `dspark_kernels.checkpoint.load_drafter`.
            ValueError: a directory that is no such drafter, a drafter of another target, a target that cannot be run.
        """
        return cls(load_drafter(directory), target, rule=rule, drafts=drafts)

    @torch.no_grad()
    def __call__(
        self,
        model,
        input_ids: Tensor,
        logits_processor=(),
        stopping_criteria=(),
        generation_config=None,
        seeds=None,
        token_streamer=None,
        **model_kwargs,
    ):
        """Called by `model.generate(..., custom_generate=self)`, which passes on these two of its own arguments:

        seeds: int64 [B], or an integer s for s, s + 1, ...; by default drawn from torch's generator, so that `torch.manual_seed`
            repeats a call.
        token_streamer: in place of `streamer`, which generate does not pass on. It gets the prompt and then every token; B = 1.

        Returns:
            int64 [B, longest text], padded behind each text; with return_dict_in_generate a GenerateDecoderOnlyOutput without a cache.

        Raises:
            ValueError: an option of generate that this does not do, by name.
        """
        real = _checked(self._models.target.model, model, input_ids, generation_config, model_kwargs)
        rows, device = input_ids.shape[0], input_ids.device
        if token_streamer is not None and rows != 1:
            raise ValueError(f"token_streamer: expected a batch of 1, got {rows}")
        stopping = Stopping.read(stopping_criteria, generation_config.max_length, device)
        columns = text_columns(stopping.max_length, self._models.drafts)
        settings = sampling_settings.read(logits_processor, bool(generation_config.do_sample), _seeds(seeds, rows, device), columns)
        chunk = generation_config.prefill_chunk_size or _CHUNK
        rounds = Rounds(
            self._models, Prompt(input_ids, real, chunk), settings, stopping, _is_static(generation_config, model_kwargs)
        )
        sent = input_ids.shape[1]
        if token_streamer is not None:
            token_streamer.put(input_ids.cpu())

        def stream():
            nonlocal sent
            if token_streamer is not None:
                for token in rounds.texts[0, sent : rounds.filled[0]].cpu():
                    token_streamer.put(token[None])
                sent = rounds.filled[0]

        rounds.run(stream)
        if token_streamer is not None:
            token_streamer.end()
        self._keep(rounds.statistics())
        longest = max(rounds.filled)
        beyond = torch.arange(longest, device=device) >= torch.tensor(rounds.filled, device=device)[:, None]
        texts = rounds.texts[:, :longest].masked_fill(beyond, _pad(generation_config))
        if not generation_config.return_dict_in_generate:
            return texts
        from transformers.generation import GenerateDecoderOnlyOutput

        return GenerateDecoderOnlyOutput(sequences=texts)

    def _keep(self, statistics: Statistics) -> None:
        """Keep a call's counts, and warn of what a user has to know."""
        self.statistics = statistics
        if statistics.flags & dk.Flag.NONFINITE_ROW:
            warnings.warn("dspark: the target gave a row without a finite logit: its text is no sample of the model", stacklevel=4)
        self._row_rounds += statistics.row_rounds
        self._first_accepted += statistics.accepted[0]
        share = self._first_accepted / max(1, self._row_rounds)
        if self._row_rounds >= _ROUNDS_TO_TELL and share < _COLLAPSED and not self._warned:
            self._warned = True
            warnings.warn(
                f"dspark: {share:.1%} of first drafts were accepted in {self._row_rounds} rounds: was the drafter trained for this "
                "target, and do block_size, mask_token_id, target_layer_ids and whether the anchor predicts say how it was?",
                stacklevel=4,
            )


def _check_pair(checkpoint: DrafterCheckpoint, target: Target) -> None:
    """Refuse what would run and have its drafts rejected."""
    config, name = checkpoint.config, type(target.model).__name__
    features = checkpoint.tensors["fc.weight"].shape[1]
    wanted = {
        "num_target_layers": (config.get("num_target_layers", target.num_layers), target.num_layers),
        "vocab_size": (config["vocab_size"], target.vocab),
        "columns of fc.weight": (features, len(checkpoint.target_layer_ids) * target.hidden),
    }
    for what, (own, theirs) in wanted.items():
        if own != theirs:
            raise ValueError(f"drafter: expected {what} {theirs}, as {name} has it, got {own}")
    if "embed_tokens.weight" not in checkpoint.tensors and target.embedding is None:
        raise ValueError(f"drafter: expected an embedding of its own, because that of {name} is more than a table")
    shared = [what for what in ("embed_tokens", "lm_head") if f"{what}.weight" not in checkpoint.tensors]
    if shared and config["hidden_size"] != target.hidden:
        used = " and ".join(shared)
        raise ValueError(f"drafter: expected hidden_size {target.hidden}, whose {used} it uses, got {config['hidden_size']}")


def _checked(target, model, input_ids: Tensor, config, model_kwargs: dict) -> Tensor:
    """Refuse a call that this cannot make as generate would; which columns of the prompt are no padding, bool [B, P]."""
    if model is not target:
        raise ValueError("custom_generate: expected the model that this DSpark was made for, got another")
    mode = config.get_generation_mode().value
    if mode not in _MODES:
        raise ValueError(f"generation_config: expected greedy search or sampling, got {mode}")
    for option in ("output_scores", "output_logits", "output_attentions", "output_hidden_states"):
        if config.return_dict_in_generate and getattr(config, option, False):
            raise ValueError(f"{option}: expected False, because a round has the rows of rejected drafts too")
    if config.cache_implementation not in _CACHES:
        raise ValueError(f"cache_implementation: expected one of {_CACHES}, got {config.cache_implementation!r}")
    surplus = sorted(name for name, value in model_kwargs.items() if name not in _TAKEN and value is not None)
    if surplus:
        raise ValueError(f"generate: expected input_ids and attention_mask alone, got {', '.join(surplus)} too")
    for name in ("past_key_values", "cache"):
        if model_kwargs.get(name) is not None and int(model_kwargs[name].get_seq_length()):
            raise ValueError(f"{name}: expected none, because the drafter has not seen its tokens, got a cache that is not empty")
    if input_ids.ndim != 2 or input_ids.shape[1] < 1:
        raise ValueError(f"input_ids: expected a prompt [B, P] of at least one token, got {list(input_ids.shape)}")
    mask = model_kwargs.get("attention_mask")
    real = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.bool()
    if real.shape != input_ids.shape or not bool(real[:, -1].all()) or bool((real[:, :-1] & ~real[:, 1:]).any()):
        raise ValueError("attention_mask: expected padding on the left alone, and a token in every row")
    positions = model_kwargs.get("position_ids")
    if positions is not None and bool((positions != real.cumsum(1) - 1)[real.expand_as(positions)].any()):
        raise ValueError("position_ids: expected to count each row's tokens from 0, got others")
    return real


def _is_static(config, model_kwargs: dict) -> bool:
    from transformers import StaticCache

    given = model_kwargs.get("cache") if model_kwargs.get("cache") is not None else model_kwargs.get("past_key_values")
    return config.cache_implementation == "static" or isinstance(given, StaticCache)


def _seeds(seeds, rows: int, device) -> Tensor:
    if seeds is None:
        return torch.randint(2**63 - 1, (rows,)).to(device)
    if isinstance(seeds, int):
        return torch.arange(rows, dtype=torch.int64, device=device) + seeds
    seeds = torch.as_tensor(seeds, dtype=torch.int64, device=device)
    if seeds.shape != (rows,):
        raise ValueError(f"seeds: expected an integer or {rows} of them, one for each row, got {list(seeds.shape)}")
    return seeds.contiguous()


def _pad(config) -> int:
    """What stands behind a text: generate's choice."""
    stop = config.eos_token_id[0] if isinstance(config.eos_token_id, (list, tuple)) else config.eos_token_id
    return next((int(token) for token in (config.pad_token_id, stop) if token is not None), 0)


def _moved(head: dk.MarkovHead | None, device, dtype) -> dk.MarkovHead | None:
    if head is None:
        return None
    return type(head)(**{name: None if tensor is None else tensor.to(device, dtype) for name, tensor in vars(head).items()})
