"""DSpark drafters in Hugging Face transformers: `model.generate(..., custom_generate=DSpark.from_pretrained(directory, model))`.

| module | decides |
| --- | --- |
| dspark.py | what a user calls, and what is refused |
| rounds.py | the rounds of one call of generate, for all rows of the batch at once |
| target.py | how a causal language model of transformers is run, and which layers are seen |
| backbone.py, layers.py | what the drafter computes before its sequential head |
| cache.py | where keys and values stand, and which of them a row sees |
| settings.py | which logits processors become sampling settings of the ops, and which run on the logits first |
| stopping.py | when a row ends |
| lengths.py | how rows of unequal lengths go through functions that take a batch of one length |
| statistics.py | what is counted |

transformers is imported inside functions. Symbols: B rows of the batch, K drafts per round, n rows of a pass for each row of the
batch, V vocabulary, d hidden size, m chosen layers of the target, Hq/Hkv query and key-value heads, D head size.
"""

from .dspark import DSpark
from .statistics import Statistics

__all__ = ["DSpark", "Statistics"]
