"""The shared models of the configuration and how its layers are merged; imports no torch."""
