"""Figures' style, tables and the results page: they read metrics files only and import no torch."""
