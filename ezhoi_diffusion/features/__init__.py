"""Captured features: what one image gives, how a data set of them is stored, what their statistics are."""
