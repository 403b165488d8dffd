"""Several adapters and weights become one."""
