"""Tests for acceptance functions (are they lossless?), and Triton's interpreter made exact enough to test kernels in.

from dspark_kernels.testing import check
print(check(my_acceptance, rule="token"))           # or: python -m dspark_kernels.testing my_module:my_acceptance
print(check(my_tree_acceptance, rule="recursive"))  # draft trees: see suite.py
"""

from .suite import Report, Result, check

__all__ = ["Report", "Result", "check"]
