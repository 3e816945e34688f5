"""The embedded Phi-3: texts, tokenizer, training, held-out prompts."""
