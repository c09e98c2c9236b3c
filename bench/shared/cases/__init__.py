"""One call of a public op each, with its inputs, its cost counted by hand, and its check against the reference."""
