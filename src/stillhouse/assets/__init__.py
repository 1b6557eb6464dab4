"""Models and data sets: fetched from a hub, a package index or a path, pinned, verified and normalised."""
