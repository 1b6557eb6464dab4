"""The one training loop, on accelerate, and what it stands on: schedules, optimiser, checkpoints, tracking."""
