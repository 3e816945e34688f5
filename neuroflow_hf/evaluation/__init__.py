"""Streams and baselines behind one interface, compared at equal cost."""
