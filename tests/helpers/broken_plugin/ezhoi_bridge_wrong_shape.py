"""A bridge that loads well, and then loses a dimension."""

from ezhoi_diffusion import BridgePlugin

plugin = BridgePlugin("wrong_shape", lambda folder: lambda adapter_feat: adapter_feat[:, 1:])
