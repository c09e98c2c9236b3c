"""Drafting a block: whole vocabulary, candidates, and both in shards."""
