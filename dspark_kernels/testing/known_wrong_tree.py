"""The rules on draft trees that are known to be wrong, under the name that documents print: tree/known_wrong.py has them."""

from .tree.known_wrong import *  # noqa: F403
