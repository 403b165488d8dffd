"""The command line. Nothing here imports MLX or FastAPI before the command that needs them runs."""
