"""The plugins that ship: capture, chain, diffusion, tuned, text_cache, and the baselines identity and mean_shift."""
