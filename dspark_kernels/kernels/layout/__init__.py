"""Which rows the target computes: how many drafts of each request are verified, and where their rows stand."""
