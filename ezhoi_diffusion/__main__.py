"""`python -m ezhoi_diffusion` is `ezhoi-diffusion`, for `accelerate launch -m` and `torchrun -m`."""

import sys

from ezhoi_diffusion.cli import main

if __name__ == "__main__":
    sys.exit(main())
