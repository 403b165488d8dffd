"""Brings versions into memory: new ones, those that left it, those that calls ask for, what requests name."""
