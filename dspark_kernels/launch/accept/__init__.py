"""Launch configurations of acceptance."""
