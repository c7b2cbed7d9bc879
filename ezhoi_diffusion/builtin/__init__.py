"""The plugins that ship: capture, diffusion and auto, the controls identity and mean_shift, and text_cache."""
