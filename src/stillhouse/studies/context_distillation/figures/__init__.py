"""The study's figures, one module each: a step program that reads metrics files and imports no torch."""
