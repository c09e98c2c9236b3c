"""The rules on chains that are known to be wrong, under the name that documents print: chain/known_wrong.py has them."""

from .chain.known_wrong import *  # noqa: F403
