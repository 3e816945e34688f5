"""Checkpoints of other forms as the package's own."""
