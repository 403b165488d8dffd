"""Other projects' clients against a real server; scripts/test-clients runs them, in their own environment."""
