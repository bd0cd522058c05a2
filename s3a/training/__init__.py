"""Training on Accelerate: recipes, the run that a recipe builds, the trainer, evaluation, checkpoints."""
