"""Readers of normalised task records, prompts and chat templates, collation and packing."""
