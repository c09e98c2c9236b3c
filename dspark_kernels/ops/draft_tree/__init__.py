"""draft_tree and expand_tree."""
