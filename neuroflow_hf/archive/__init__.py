"""Embeddings of many videos as a Parquet dataset, and the search for moments in it."""
