"""PEFT's folders: fields, tensor names, the matching of targets, places in MLX models."""
