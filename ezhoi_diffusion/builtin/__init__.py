"""The plugins that ship: capture and diffusion, and the controls identity and mean_shift."""
