"""The bridge and its mathematics: knows embeddings, and neither a host nor a plugin."""
