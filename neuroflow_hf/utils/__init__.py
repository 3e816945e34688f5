"""Files written whole, long jobs, processes, provenance, tables."""
