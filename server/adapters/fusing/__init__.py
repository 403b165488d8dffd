"""Fusing adapters into the resident base, and out of it, and saving fused models: begin with `fuser`."""
