"""The drafters that the decoding loop runs side by side, behind one protocol.

| drafter | drafts come from | passes per round |
| --- | --- | --- |
| Autoregressive | nowhere: plain decoding | 0 |
| DraftModel | a small separate language model (arXiv 2211.17192, 2302.01318) | K |
| Eagle3 | a layer over tokens and the target's layers, chained (EAGLE-3, arXiv 2503.01840) | K |
| MTP | a multi-token-prediction module, chained (DeepSeek-V3, arXiv 2412.19437) | K |
| Block | a block backbone, positions independent (arXiv 1811.03115, 2602.06036) | 1 |
| DSpark | a block backbone, a sequential head, a confidence head (arXiv 2607.05147) | 1 |

The protocol is `protocol.Drafter`.
"""

from .autoregressive import Autoregressive
from .block import Block
from .draft_model import DraftModel
from .dspark import DSpark
from .eagle3 import Eagle3
from .mtp import MTP
from .protocol import Anchors, Committed, Drafter, TreeShape, join, step

__all__ = [
    "Anchors", "Autoregressive", "Block", "Committed", "DSpark", "DraftModel", "Drafter", "Eagle3", "MTP", "TreeShape", "join", "step",
]  # fmt: skip
