"""What a bypass changes in a text: metrics, decoding, a run over many prompts, tables."""
