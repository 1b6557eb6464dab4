"""Stub (to be overwritten)."""
