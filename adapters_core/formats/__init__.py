"""Adapters as folders: what the files say, in whichever format, and how they are written."""
