"""The diffusion bridge: recipes, schedule, denoisers, samplers, and the bridge itself."""
