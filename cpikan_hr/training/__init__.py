"""Backends, the loop and its checkpoints. Knows nothing of physics or file formats."""
