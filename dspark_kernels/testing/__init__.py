"""Tools for tests of the kernels and of engines that use them: whether an acceptance function is lossless, and the interpreter.

from dspark_kernels.testing import check
print(check(my_acceptance, rule="token"))           # or: python -m dspark_kernels.testing my_module:my_acceptance
print(check(my_tree_acceptance, rule="recursive"))  # draft trees: suite.py says what the function takes
"""

from .suite import Report, Result, check

__all__ = ["Report", "Result", "check"]
