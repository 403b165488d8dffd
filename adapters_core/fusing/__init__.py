"""Adapters merged into the base: forms of merged layers, sums, measured errors, the way back."""
