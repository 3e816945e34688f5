"""Token drift: how a bypass changes the generated text. Metrics, decoding, runs over many prompts, tables."""
