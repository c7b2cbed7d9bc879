"""The files of the training guide's own scripts: read without executing them, and turned into ours."""
