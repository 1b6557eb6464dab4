"""Models: loading, LoRA, precision, and the forward passes that evaluation and teachers share."""
