"""Everything that knows EZ-HOI; nothing outside this folder does."""
