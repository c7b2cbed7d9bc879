"""Training a bridge: an own, resumable loop over accelerate. Knows neither a host nor a plugin."""
