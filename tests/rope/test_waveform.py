"""The attention waveform, checked against a plain transcription of its formula."""

import cmath

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from abcli.rope.frequencies import RopeParameters, angular_frequencies
from abcli.rope.waveform import envelope, peaks, summarise, troughs, value_at_zero, waveform, waveforms

# Both ways to compute a wave agree with the transcription to this, at waves of up to some 64.
TOLERANCE = 1e-9
YARN = RopeParameters(64, False, 0.25, None, 1.0, original_context=2048)

frequencies_lists = st.lists(st.floats(1e-6, 1.0), min_size=1, max_size=16).map(np.array)
# Few different values, so that equal neighbours are common.
curves = st.lists(st.integers(0, 4), max_size=60).map(lambda numbers: np.array(numbers, np.float64))


def transcription(frequencies, distance):
    """A(D) as the formula is written: j counts from 1, S_j sums the first j pairs."""
    half = len(frequencies)
    total = 0.0
    for j in range(1, half + 1):
        total += abs(sum(cmath.exp(1j * distance * float(frequencies[i])) for i in range(j)))
    return total / half


@pytest.mark.parametrize(
    ("parameters", "base"),
    [
        (RopeParameters(64, False), 1e5),
        (RopeParameters(128, True), 1e4),
        (RopeParameters(2, False), 1e4),
        (RopeParameters(16, False, factors=(1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)), 5e5),
        (YARN, 1e6),
    ],
)
def test_both_ways_agree_with_the_transcription(parameters, base):
    frequencies = angular_frequencies(parameters, base)
    distances = np.array([0, 1, 2, 5, 63, 64, 255, 256, 257, 4095, 16383, 16384, 16385, 32767])
    expected = [transcription(frequencies, int(distance)) for distance in distances]
    assert waveform(frequencies, distances) == pytest.approx(expected, abs=TOLERANCE)
    table = waveforms(frequencies[None], 32768)
    assert table.shape == (1, 32768)
    assert table[0, distances] == pytest.approx(expected, abs=TOLERANCE)


def test_many_bases_agree_with_one_base_at_every_distance():
    parameters = RopeParameters(64, False)
    frequencies = np.array([angular_frequencies(parameters, base) for base in (5e4, 1e5, 2.5e5)])
    table = waveforms(frequencies, 20_001, threads=2)
    for row, wave in zip(frequencies, table, strict=True):
        assert np.abs(wave - waveform(row, np.arange(20_001))).max() < TOLERANCE


def test_the_number_of_threads_does_not_matter():
    frequencies = np.array([angular_frequencies(RopeParameters(32, False), base) for base in (1e4, 2e4)])
    assert np.array_equal(waveforms(frequencies, 17_000, threads=1), waveforms(frequencies, 17_000, threads=3))


@given(frequencies_lists, st.integers(0, 100_000))
def test_a_wave_is_highest_at_zero_and_even(frequencies, distance):
    zero, there, back = waveform(frequencies, np.array([0, distance, -distance]))
    assert zero == pytest.approx(value_at_zero(len(frequencies)))
    assert 0 <= there <= zero + TOLERANCE
    assert there == pytest.approx(back)


def test_linear_scaling_stretches_the_wave():
    plain = angular_frequencies(RopeParameters(64, False), 1e4)
    scaled = angular_frequencies(RopeParameters(64, False, frequency_scale=0.5), 1e4)
    assert waveform(scaled, np.arange(0, 4000, 2)) == pytest.approx(waveform(plain, np.arange(2000)))


@given(st.lists(frequencies_lists.filter(lambda row: len(row) >= 4).map(lambda row: row[:4]), min_size=1, max_size=5))
def test_the_envelope_is_one_of_the_waves_and_below_none(rows):
    waves = waveforms(np.array(rows), 50)
    above = envelope(waves)
    assert (above >= waves).all()
    assert (above == waves).any(axis=0).all()


def plain_peaks(wave, radius):
    """Positions above all earlier values within the radius and not below any later one."""
    return [
        i
        for i in range(1, len(wave) - 1)
        if all(wave[i] > other for other in wave[max(0, i - radius) : i])
        and all(wave[i] >= other for other in wave[i + 1 : i + 1 + radius])
    ]


@given(curves, st.integers(1, 20))
def test_peaks_and_troughs_are_the_extremes_of_their_neighbourhood(wave, radius):
    assert peaks(wave, radius).tolist() == plain_peaks(wave, radius)
    assert troughs(wave, radius).tolist() == plain_peaks(-wave, radius)


def test_summary():
    wave = np.array([9.0, 3, 5, 2, 4, 4, 1, 6])
    summary = summarise(wave, radius=1)
    assert (summary.peaks, summary.troughs) == ((2, 4), (1, 3, 6))
    assert (summary.lowest, summary.lowest_at) == (1.0, 6)
    assert summary.mean == pytest.approx(34 / 8)
