"""How the prompts in `eval/prompts/` were made."""
