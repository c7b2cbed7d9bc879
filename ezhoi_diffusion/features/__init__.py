"""Captured features: batches, stores, statistics, labels and EZ-HOI's score."""
