"""Drafting a tree: fixed shapes, and best first."""
