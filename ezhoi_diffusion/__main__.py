"""`python -m ezhoi_diffusion` is `ezhoi-diffusion`, for `accelerate launch -m` and `torchrun -m`."""

from ezhoi_diffusion.cli import command

if __name__ == "__main__":
    command()
