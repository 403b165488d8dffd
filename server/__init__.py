"""The HTTP server: one resident base model, adapters chosen per request. Imports adapters_core, never the reverse."""
