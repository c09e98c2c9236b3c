"""Launch configurations of drafting a block."""
