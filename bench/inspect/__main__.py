"""What a checkpoint directory contains, which ops of the package a decoder with it calls and with what, and the target it expects.

Knows DSpark drafters (Qwen3 and Gemma 4 layers), DFlash drafters, EAGLE-3 drafters (described, not run here) and language models.
Only config.json and the headers of the weight files are read.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from bench.shared import command


def parser() -> command.Parser:
    p = command.Parser("bench.inspect", __doc__)
    p.add_argument("directory", metavar="DIR", help="with config.json and model.safetensors, or its index and shards")
    p.add_argument("--json", action="store_true", help="print the same as JSON")
    return p


def main(argv: Sequence[str] | None = None) -> int:
    """0: described; 2: a directory that is missing, broken or unknown; 130: stopped."""
    return command.run(parser, None, "bench.inspect.examine", argv)


if __name__ == "__main__":
    sys.exit(main())
