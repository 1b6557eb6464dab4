"""Quantised distillation: what a 4-bit student recovers of its full-precision teacher, on-policy and off-policy."""
