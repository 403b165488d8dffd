"""The adapters' life cycle: names, versions, pins, loading, unloading, swapping, fusing. Knows no HTTP."""
