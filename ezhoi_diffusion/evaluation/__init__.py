"""Average precision, comparison of variants, and tuning, from stored features. Imports nothing of EZ-HOI."""
