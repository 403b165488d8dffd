"""Whether mixed adapters are exact on this model and this device, and what they cost. Knows no server."""
