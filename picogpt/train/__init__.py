"""Training: one loop for all models, its optimizers, its checkpoints."""
