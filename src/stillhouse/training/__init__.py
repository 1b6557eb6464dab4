"""The one training loop, on accelerate, with its schedules, optimiser, checkpoints and tracking."""
