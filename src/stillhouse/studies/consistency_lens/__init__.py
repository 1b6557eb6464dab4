"""Consistency lens: a residual-stream activation put into words, and the words turned back into an activation."""
