"""Files written whole, provenance, processes."""
