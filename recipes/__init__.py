"""Recipes of the checkpoints under `models/`: from packages to weights, one command each."""
