"""What may be wrong with an environment, features, a bridge, and a host's command line; nothing here changes anything."""
