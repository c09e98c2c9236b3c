"""Drafters as their publishers' library writes them, read here: its forward pass against ours, number by number. Run by
run_publishers.sh.

Every directory has random weights, of a few thousand parameters. Of the library come the directory and the numbers that are compared:
hidden states of the block, logits of its head, logits after the sequential head, confidences. Ours are those of the reference and of
the backbone that `model.generate` uses.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import warnings
from pathlib import Path

import numpy as np
import torch
import transformers

from tests.checkpoints import of_modelopt, of_speculators, of_speculators_eagle3

# Of the largest number compared; fp32, where sums differ in their order.
BOUND = 2e-5

parser = argparse.ArgumentParser(description=__doc__)
parser.add_argument("--keep", type=Path, help="write the directories there")
parser.add_argument("--golden", type=Path, help="write the library's numbers of tests/directories.py's GOLDEN to this .npz instead")
parser.add_argument("--only", default="", help="cases whose name has this in it")


def run(arguments) -> bool:
    good, count = True, 0
    with tempfile.TemporaryDirectory() as temporary:
        root = arguments.keep or Path(temporary)
        if arguments.golden:
            np.savez_compressed(arguments.golden, **of_speculators.golden(root), **of_speculators_eagle3.golden(root))
            return True
        for name, compare in (*of_speculators.cases(), *of_speculators_eagle3.cases(), *of_modelopt.cases()):
            if arguments.only not in name:
                continue
            errors = compare(root / name.replace(" ", "_").replace(",", ""))
            holds = all(error <= BOUND for error in errors.values())
            good, count = good and holds, count + 1
            text = ", ".join(f"{what} {error:.1e}" for what, error in errors.items())
            print(f"{'equal ' if holds else 'OTHER '} {name}: {text}", flush=True)
    print(f"{count} directories; largest difference allowed {BOUND:.0e} of the largest number; all hold: {good}")
    return good and count > 0


if __name__ == "__main__":
    options = parser.parse_args()
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    print(
        f"speculators {of_speculators.VERSION}, nvidia-modelopt {of_modelopt.VERSION}, transformers {transformers.__version__}, torch {torch.__version__}"
    )
    with torch.no_grad():
        raise SystemExit(0 if run(options) else 1)
