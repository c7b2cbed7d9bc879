"""A miniature EZ-HOI and its small world: for the demo, the study of bridges, and tests."""
