"""Five studies, furnished alike; no study imports another."""
