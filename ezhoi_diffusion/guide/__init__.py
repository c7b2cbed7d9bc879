"""The training guide's files, read without running them, and its module DiffusionBridgeHOI."""
