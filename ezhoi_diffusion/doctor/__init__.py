"""Checks of an environment, features, a bridge and EZ-HOI's flags. They change nothing."""
