"""The HTTP server: one resident base, adapters chosen per request. Imports adapters_core; never reversed."""
