"""Where results are: bench/results, a file per kind of measurement and GPU."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "bench" / "results"


def result_file(kind: str, gpu: str) -> Path:
    """bench/results/<kind>-<gpu>.csv with the GPU's name in small letters and dashes."""
    return RESULTS / f"{kind}-{re.sub(r'[^a-z0-9]+', '-', gpu.lower()).strip('-')}.csv"
