"""Training of diffusion bridges."""
