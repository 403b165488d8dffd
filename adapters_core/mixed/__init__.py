"""Rows with different adapters in one forward: who computes with what, where factors lie, the products."""
