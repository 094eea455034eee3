"""Training: data, the loop, optimizers, resumable runs."""
