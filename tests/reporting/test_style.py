"""The figures' style: the same bytes whenever remade, and readable without seeing red and green apart."""

from __future__ import annotations

import hashlib
import itertools
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import matplotlib.colors
import matplotlib.lines
import numpy as np
import pytest

from stillhouse.reporting.style import (
    KNOWN_CONDITIONS,
    PALETTE,
    SPARE_MARKERS,
    condition_style,
    error_bars,
    figure,
    save_figure,
)

DRAW = """
import sys
from pathlib import Path
from types import SimpleNamespace
from stillhouse.reporting.style import condition_style, error_bars, figure, save_figure

with figure(4, 3) as drawing:
    axes = drawing.subplots()
    for shift, name in enumerate(["baseline", "online_v1", "mine"]):
        style = condition_style(name)
        points = [SimpleNamespace(value=y + shift, low=y + shift - 0.5, high=y + shift + 1) for y in range(4)]
        axes.errorbar(range(4), [p.value for p in points], error_bars(points), color=style.colour,
                      marker=style.marker, label=name)
    axes.set(title="Accuracy, $n=64$", xlabel="step")
    axes.legend()
    save_figure(drawing, Path(sys.argv[1]))
"""


def draw(folder: Path, hash_seed: str, user_style: str = "") -> dict[str, str]:
    """Draw one figure in a process of its own and return the digests of its files."""
    folder.mkdir()
    (folder / "matplotlibrc").write_text(user_style)
    environment = os.environ | {"PYTHONHASHSEED": hash_seed, "MATPLOTLIBRC": str(folder)}
    subprocess.run([sys.executable, "-c", DRAW, str(folder / "curve.png")], env=environment, check=True)
    files = {path.name: path for path in folder.iterdir() if path.name != "matplotlibrc"}
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(files.items())}


def test_a_figure_remade_in_another_process_under_another_users_style_has_the_same_bytes(tmp_path):
    first = draw(tmp_path / "first", "1")
    second = draw(tmp_path / "second", "2", "font.size: 30\nsavefig.dpi: 50\nsvg.fonttype: none\n")
    assert list(first) == ["curve.png", "curve.svg"]
    assert first == second


def test_a_figure_saved_twice_has_the_same_bytes_and_names_no_date(tmp_path):
    with figure(3, 2) as drawing:
        drawing.subplots().plot([1, 2], [3, 4])
    contents = []
    for name in ("one", "two"):
        save_figure(drawing, tmp_path / f"{name}.png")
        contents.append([(tmp_path / f"{name}{suffix}").read_bytes() for suffix in (".png", ".svg")])
    assert contents[0] == contents[1]
    assert b"<dc:date>" not in contents[0][1] and b"matplotlib.org" not in contents[0][1]
    assert b"Software" not in contents[0][0]


def test_a_figure_that_cannot_be_rendered_leaves_the_old_files(tmp_path):
    (tmp_path / "curve.png").write_text("old")
    with figure(3, 2) as drawing:
        drawing.subplots().set_title("$\\no such macro$")
    with pytest.raises(ValueError):
        save_figure(drawing, tmp_path / "curve.png")
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]


def test_the_style_does_not_leak_into_the_callers_matplotlib():
    before = dict(matplotlib.rcParams)
    with figure(3, 2):
        pass
    assert dict(matplotlib.rcParams) == before


def test_every_known_condition_has_a_colour_and_marker_of_its_own():
    assert len(set(KNOWN_CONDITIONS.values())) == len(KNOWN_CONDITIONS)
    markers = {style.marker for style in KNOWN_CONDITIONS.values()} | set(SPARE_MARKERS)
    assert markers <= set(matplotlib.lines.Line2D.markers)


def test_conditions_shown_by_default_differ_in_colour_and_in_marker():
    names = ["base_zero_shot", "base_few_shot", "baseline", "online_v1", "shuffled_answers", "kl_t1"]
    styles = [condition_style(name) for name in names]
    assert len({style.colour for style in styles}) == len({style.marker for style in styles}) == len(names)


def test_an_unknown_condition_has_one_style_for_ever_and_never_that_of_a_known_one():
    assert condition_style("mine") == condition_style("mine")
    styles = {condition_style(f"mine {number}") for number in range(300)}
    assert not styles & set(KNOWN_CONDITIONS.values())
    assert len(styles) == len(PALETTE) * len(SPARE_MARKERS)


def seen_with_deuteranopia(colour: str) -> np.ndarray:
    """The colour in CIELAB as seen without green cones (Machado, Oliveira and Fernandes 2009, severity 1)."""
    rgb = np.array(matplotlib.colors.to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    deuteranopia = [
        [0.367322, 0.860646, -0.227968],
        [0.280085, 0.672501, 0.047413],
        [-0.011820, 0.042940, 0.968881],
    ]
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(np.clip(np.array(to_xyz) @ np.array(deuteranopia) @ linear, 0, 1) / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_no_two_colours_look_alike_without_green_cones():
    distances = {
        pair: float(np.linalg.norm(seen_with_deuteranopia(pair[0]) - seen_with_deuteranopia(pair[1])))
        for pair in itertools.combinations(PALETTE, 2)
    }
    closest = min(distances, key=distances.__getitem__)
    # 2.3 is a just noticeable difference (Mahy et al. 1994).
    assert distances[closest] > 10, f"{closest} are only {distances[closest]:.1f} apart"


def test_error_bars_are_lengths_below_and_above_and_never_negative():
    estimates = [
        SimpleNamespace(value=0.5, low=0.25, high=1.0),
        SimpleNamespace(value=0.0, low=1e-17, high=0.25),
    ]
    np.testing.assert_array_equal(error_bars(estimates), [[0.25, 0.0], [0.5, 0.25]])
    assert error_bars([]).shape == (2, 0)
