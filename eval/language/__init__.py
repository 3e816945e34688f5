"""Questions about the bypass and lossless generation."""
