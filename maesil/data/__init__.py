"""From stores to batches: who is trained on, which crops a step sees, threads that read them."""
