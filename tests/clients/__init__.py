"""Other projects' clients against a real server; run by scripts/test-clients, in an environment of their own."""
