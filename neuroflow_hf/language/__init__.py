"""Phi-3 with similarity-gated bypass. These files travel with saved models."""
