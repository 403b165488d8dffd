"""Private copies of versions, so that what was served can be served, rolled back to, fused, blended and saved
whatever becomes of the folder that it was read from."""
