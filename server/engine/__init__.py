"""Generation: one thread that owns the model and the batch, and the asynchronous face that talks to it."""
