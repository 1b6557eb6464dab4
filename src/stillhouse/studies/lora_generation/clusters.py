"""Whether adapters lie together by task: silhouettes and a map in two dimensions, from inner products alone.

Delta activations and flattened weights go through the same functions; of weights only the inner products fit in
memory beside each other. Numpy only.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]


def silhouettes(gram: Floats, labels: Sequence[str]) -> Floats:
    """The silhouette of each vector (Rousseeuw 1987) under cosine distance, from inner products [n, n].

    (b - a) / max(a, b), with a the mean distance to its own cluster and b that to the nearest other one; 0 for a
    vector that is alone in its cluster. Raises `ValueError` for fewer than two clusters.
    """
    names = np.array(labels)
    clusters = sorted(set(labels))
    if len(clusters) < 2:
        raise ValueError("silhouettes need two clusters or more")
    norms = np.sqrt(np.diag(gram))
    distances = 1 - gram / np.maximum(np.outer(norms, norms), 1e-30)
    np.fill_diagonal(distances, 0.0)
    sums = np.stack([distances[:, names == cluster].sum(axis=1) for cluster in clusters], axis=1)
    sizes = np.array([(names == cluster).sum() for cluster in clusters])
    own = np.array([clusters.index(name) for name in labels])
    rows = np.arange(len(names))
    inner = sums[rows, own] / np.maximum(sizes[own] - 1, 1)
    means = sums / sizes
    means[rows, own] = np.inf
    outer = means.min(axis=1)
    larger = np.maximum(inner, outer)
    values = np.divide(outer - inner, larger, out=np.zeros_like(larger), where=larger > 0)
    return np.where(sizes[own] > 1, values, 0.0)


def principal_coordinates(gram: Floats) -> Floats:
    """The first two principal components [n, 2] of the vectors with these inner products.

    Equal to those of the centred vectors (classical scaling, Torgerson 1952); each axis is signed so that its largest
    entry is positive.
    """
    centred = gram - gram.mean(axis=0, keepdims=True) - gram.mean(axis=1, keepdims=True) + gram.mean()
    values, vectors = np.linalg.eigh(centred)
    axes = vectors[:, ::-1][:, :2] * np.sqrt(np.maximum(values[::-1][:2], 0.0))
    signs = np.sign(axes[np.abs(axes).argmax(axis=0), range(axes.shape[1])])
    return axes * np.where(signs == 0, 1.0, signs)
