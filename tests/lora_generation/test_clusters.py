"""Silhouettes and maps from inner products equal those from the vectors themselves."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.decomposition import PCA
from sklearn.metrics import silhouette_samples

from stillhouse.studies.lora_generation.clusters import principal_coordinates, silhouettes

LABELS = ["a", "a", "a", "b", "b", "c", "c", "c", "d"]


def vectors() -> np.ndarray:
    random = np.random.default_rng(0)
    centres = {label: random.normal(size=6) for label in "abcd"}
    return np.stack([centres[label] + 0.4 * random.normal(size=6) for label in LABELS])


def test_silhouettes_are_those_of_scikit_learn() -> None:
    points = vectors()
    expected = silhouette_samples(points, LABELS, metric="cosine")
    assert silhouettes(points @ points.T, LABELS) == pytest.approx(expected)


def test_the_map_shows_the_first_principal_components() -> None:
    points = vectors()
    found, expected = principal_coordinates(points @ points.T), PCA(2).fit_transform(points)
    assert np.abs(found) == pytest.approx(np.abs(expected))
    assert all(axis[np.abs(axis).argmax()] > 0 for axis in found.T)


def test_one_cluster_has_no_silhouette() -> None:
    with pytest.raises(ValueError, match="two clusters"):
        silhouettes(np.eye(3), ["a", "a", "a"])
