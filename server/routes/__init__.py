"""The routes: one module for each family of endpoints, each with a `router` that app.py includes."""
