"""Questions about streams."""
