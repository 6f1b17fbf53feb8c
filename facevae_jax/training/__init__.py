"""Training: state, step, loop, sharding, checkpoints and telemetry."""
