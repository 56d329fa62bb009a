"""Figures as files, and the plot in block characters."""

import io
import re
from itertools import pairwise
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from abcli.ui.plots import WavePlot, wave_image
from abcli.ui.terminal_plot import MIN_WIDTH, column_minima, floor_plot

Image = pytest.importorskip("PIL.Image")

curves = st.integers(1, 300).flatmap(lambda n: arrays(np.float64, (2, n), elements=st.floats(0, 1)))


def wave_plot(length=2000, others=2):
    """A falling wave and others below and above it."""
    distances = np.arange(length)
    native = np.exp(-distances / 1000) * (1.2 + np.cos(distances / 7)) / 2.2
    waves = np.array([native * (0.7 + 0.2 * k) for k in range(others)]).reshape(others, length)
    labels = tuple(f"{k + 2}" for k in range(others))
    return WavePlot("Some model", labels, waves, native, np.vstack((native, waves)).max(axis=0))


def test_a_png_is_small_and_has_its_curves():
    data = wave_image(wave_plot(), "png")
    assert len(data) < 150_000
    with Image.open(io.BytesIO(data)) as image:
        assert image.size == (1000, 700)
        colours = {colour for _, colour in image.convert("RGB").getcolors(1_000_000)}
    # The envelope's orange survives the palette.
    assert min(abs(r - 0xE6) + abs(g - 0x61) + abs(b) for r, g, b in colours) < 12


def test_an_svg_is_xml_without_a_date_and_names_what_it_shows(monkeypatch):
    import matplotlib as mpl

    # Text as text, so that it can be read back.
    monkeypatch.setitem(mpl.rcParams, "svg.fonttype", "none")
    data = wave_image(wave_plot(), "svg")
    texts = ["".join(element.itertext()) for element in ET.fromstring(data).iter("{http://www.w3.org/2000/svg}text")]
    assert {"Some model", "2", "3", "1 (native base)", "envelope of all", "distance D (tokens)"} <= set(texts)
    assert b"<dc:date>" not in data


@pytest.mark.parametrize(("length", "others"), [(2, 0), (3, 1), (50, 15), (2000, 0)])
@pytest.mark.parametrize("image_format", ["png", "svg"])
def test_short_contexts_and_few_or_many_buckets_can_be_drawn(length, others, image_format):
    assert wave_image(wave_plot(length, others), image_format)


@given(curves, st.integers(0, 200), st.integers(1, 6), st.booleans())
def test_a_terminal_plot_fits_its_width_and_height(pair, width, quarter, unicode):
    lower, upper = pair.min(axis=0), pair.max(axis=0)
    lines = floor_plot(lower, upper, width, 4 * quarter, unicode=unicode)
    assert len(lines) == 4 * quarter + 2
    # A single distance still has a 0 and an end on its axis.
    assert max(map(len, lines)) <= max(width, MIN_WIDTH)
    assert all(line.isascii() for line in lines) or unicode


def test_a_terminal_plot_shows_the_lowest_values_and_what_is_gained():
    lower = np.repeat([0.2, 0.1, 0.0], 40)
    lower[50] = 0.05
    upper = np.repeat([0.2, 0.2, 0.2], 40)
    lines = floor_plot(lower, upper, 127, height=4)
    assert [line[:6].strip() for line in lines[:5]] == ["20%", "15%", "10%", "5%", "0%"]
    columns = list(zip(*(line[7:].ljust(120) for line in lines[:4]), strict=True))
    assert columns[0] == ("█", "█", "█", "█")
    assert columns[45] == ("░", "░", "█", "█")
    assert columns[50] == ("░", "░", "░", "█")
    assert columns[100] == ("░", "░", "░", "░")
    assert re.fullmatch(r" +0 +60 +119", lines[-1])


@given(curves, st.integers(0, 200), st.booleans())
def test_a_logarithmic_plot_fits_whatever_it_shows(pair, width, unicode):
    lines = floor_plot(pair.min(axis=0), pair.max(axis=0), width, first=1, logarithmic=True, unicode=unicode)
    assert len(lines) == 14
    assert max(map(len, lines)) <= max(width, MIN_WIDTH)


def test_a_logarithmic_plot_shows_powers_of_ten():
    lower = np.repeat([1e-1, 1e-2, 1e-3, 1e-4], 30)
    lines = floor_plot(lower, lower, 127, height=12, first=1, logarithmic=True)
    assert [line[:6].strip() for line in (*lines[:12:3], lines[12])] == ["1e-01", "2e-02", "3e-03", "6e-04", "1e-04"]
    heights = [sum(line[7:].ljust(120)[at] == "█" for line in lines[:12]) for at in (0, 30, 60, 90)]
    assert heights == [12, 8, 4, 0]
    assert re.fullmatch(r" +1 +61 +120", lines[-1])


@given(curves, st.integers(1, 50))
def test_column_minima_are_those_of_equal_parts(pair, columns):
    curve = pair[0]
    columns = min(columns, len(curve))
    minima = column_minima(curve, columns)
    edges = [k * len(curve) // columns for k in range(columns + 1)]
    assert minima.tolist() == [curve[a:b].min() for a, b in pairwise(edges)]
