"""Everything about a live run. No other part of the package touches EZ-HOI's objects."""
