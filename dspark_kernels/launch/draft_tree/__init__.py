"""Launch configurations of drafting a tree."""
