"""Sizes that kernels, ops and launch configurations share: plain integers, one name for each number. No Triton here.

Kernels read them as constexprs from primitives/constants.py.
"""

VOCAB_BLOCK = 1024  # ids of which acceptance, static trees and candidates keep one maximum and one sum of exponentials
SUB_BLOCK = 64  # ids of which the draft block keeps them: fine enough to balance tiles over programs
TREE_SUB_BLOCK = 256  # ids of which best-first trees on whole distributions keep them
MAX_GROUP = 128  # ids of which filters keep the maximum: a program keeps the maxima of all groups of a row in registers
TREE_MAX_GROUP = 32  # ids of which best-first trees on whole distributions keep the maximum
FILTER_LIST = 1024  # elements that one step of a filter looks at; as many are kept in a list
MAP_COLUMNS = 4096  # of a draft vocabulary's map per work item that inverts it
NODE_FIELDS = 9  # int32 words per node of a tree that grows by the probability of paths
DOT_ROWS = 16  # rows of the smaller factor of a dot: requests or nodes that one tile of W2 or of a projection serves
ROW_VALUES, ROW_IDS = 8, 4  # fp32 and int32 statistics per row of logits that acceptance stores
NODE_VALUES, NODE_IDS = 6, 2  # and of its state per node of a tree
PLAN_COLUMNS = 10  # int32 words per item of an attention plan
