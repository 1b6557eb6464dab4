"""Stillhouse: reproducible language-model distillation studies, from data sets and models to figures."""
