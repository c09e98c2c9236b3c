"""draft_block: whole vocabulary, candidates, and both in shards."""
