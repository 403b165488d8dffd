"""What the server writes when it is asked to: model folders and adapter folders, whole or not at all."""
