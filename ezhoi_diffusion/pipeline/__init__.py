"""Capture, train, test and compare in one command. A second run skips what is done and still valid."""
