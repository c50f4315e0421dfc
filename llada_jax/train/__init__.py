"""Training: options, state, one step, the run, its checkpoints and its metrics."""
