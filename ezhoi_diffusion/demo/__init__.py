"""A miniature EZ-HOI on handwritten digits: for the demo, and for tests."""
