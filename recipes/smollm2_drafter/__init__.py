"""What a drafter of SmolLM2 is trained on."""
