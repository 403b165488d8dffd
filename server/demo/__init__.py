"""The demo: a real small chat model out of an installed package, and the adapters that were trained on it."""
