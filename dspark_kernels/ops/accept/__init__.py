"""accept_chain, accept_tree, and acceptance in vocabulary shards."""
