"""Prompts to LoRA weights: a generator of adapters, trained by weights, by behaviour, or by both."""
