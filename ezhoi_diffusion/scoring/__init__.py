"""Bridges that act on EZ-HOI's score: they choose logits, and return the nearest features that have them."""
