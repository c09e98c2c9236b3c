"""Launch configurations: which GPU this is, and one frozen configuration per kernel chosen from it."""
