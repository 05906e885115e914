"""A run's folder: lock, checkpoints, metrics, resuming, signals, pictures."""
