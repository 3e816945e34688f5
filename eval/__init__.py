"""Evaluation scripts: one question a script."""
