"""How fast the studies' work is, beside its naive form and the tools that people would pick; see README.md here."""
