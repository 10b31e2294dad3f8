"""The student trainer: a plain loop with exact resume, checkpoints and logs."""
