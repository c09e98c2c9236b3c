"""plan_attention and tree_attention: a step's work table, and the attention over it."""
