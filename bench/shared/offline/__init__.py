"""Launches of the ops captured, and compiled for GPUs that are not there.

Kernels that are imported after this package are compiled, not interpreted.
"""

import os

os.environ.pop("TRITON_INTERPRET", None)
