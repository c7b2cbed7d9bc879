"""Benchmark: cost of a bridge on this machine and fidelity of few evaluations, next to the guide's system."""
