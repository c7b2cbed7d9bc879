"""The plugins that ship: capture, chain, diffusion, tuned, text_cache, bridges that act on the score, and the baselines."""
