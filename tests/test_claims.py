"""Intervals, verdicts, tables and files of figures: claims.py."""

import json
import math

import claims
import runs

import matplotlib.pyplot as plt
import numpy as np
import pytest
import scipy.stats


def test_seed_intervals_are_students_t():
    values = [0.7, 0.72, 0.69, 0.75, 0.71]
    mean, low, high = claims.mean_interval(values)
    assert (low, high) == pytest.approx(scipy.stats.t.interval(0.95, 4, np.mean(values), scipy.stats.sem(values)))
    assert mean == pytest.approx(np.mean(values)) and claims.mean_interval([0.5])[1:] == (-np.inf, np.inf)


def test_resampled_sums_are_those_of_plain_draws():
    columns = np.random.default_rng(0).normal(size=(30, 2))
    rng = np.random.default_rng(7)
    sums = claims.resampled_sums(columns, 70, np.random.default_rng(7))  # more than one chunk
    plain = [columns.sum(0)] + [columns[rng.integers(30, size=30)].sum(0) for _ in range(70)]
    assert np.allclose(sums, plain)


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("seed_noise, point_noise", [(0.3, 0.1), (0.01, 3.0), (0.1, 1.5)])
def test_intervals_cover_the_truth_in_a_crossed_design(count, seed_noise, point_noise):
    """Seeds that share their points: noise of the seeds, of the points, or of both dominates."""
    rng = np.random.default_rng(8)
    inside = 0
    n = 500
    for _ in range(400):
        seeds = seed_noise * rng.normal(size=(count, 1)) * (count > 1)
        values = seeds + point_noise * rng.normal(size=n) + rng.normal(size=(count, n))
        draws = rng.multinomial(n, np.full(n, 1 / n), size=100) / n
        interval = claims.combine(np.concatenate([values.mean(1, keepdims=True), values @ draws.T], axis=1))
        inside += interval["low"] <= 0 <= interval["high"]
    assert 368 <= inside <= 399  # 95% nominal: 380 of 400, standard deviation 4.4; a little wider is allowed


def test_the_interval_of_a_ratio_covers_the_truth_and_is_unbounded_where_it_must_be():
    rng = np.random.default_rng(3)
    inside = 0
    n = 300
    for _ in range(300):
        seeds = np.array([[0.5], [1.0]]) + 0.1 * rng.normal(size=(2, 5))
        values = seeds[:, :, None] + rng.normal(size=(2, 1, n)) + 0.5 * rng.normal(size=(2, 5, n))
        draws = rng.multinomial(n, np.full(n, 1 / n), size=100) / n
        top, bottom = np.concatenate([values.mean(2, keepdims=True), values @ draws.T], axis=2)
        interval = claims.ratio(top, bottom)
        inside += interval["low"] <= 0.5 <= interval["high"]
    assert 276 <= inside <= 299
    unsure = claims.ratio(top, bottom - 1)  # the denominator may be 0
    assert (unsure["low"], unsure["high"]) == (-np.inf, np.inf)
    one = claims.ratio(np.array([[0.5, 0.4, 0.6]]), np.array([[1.0, 1.0, 1.0]]))
    half = 1.96 * np.std([0.4, 0.6], ddof=1)
    assert (one["low"], one["high"]) == pytest.approx((0.5 - half, 0.5 + half))


def test_the_interval_of_an_accuracy_is_that_of_combine_within_what_is_possible():
    rng = np.random.default_rng(0)
    hits = rng.random((3, 400)) < rng.random(400)
    draws = [rng.integers(400, size=400) for _ in range(4000)]
    seeds = [np.array([of_seed.mean(), *(of_seed[draw].mean() for draw in draws)]) for of_seed in hits]
    expected, found = claims.combine(seeds), claims.accuracy(hits)
    assert all(abs(found[key] - expected[key]) < 0.002 for key in ("value", "low", "high"))
    one = claims.accuracy(hits[:1])  # points alone
    assert 0 < one["high"] - one["value"] < 0.06
    two = claims.accuracy([np.arange(400) < 200, np.arange(400) < 350])  # two seeds that differ: t is wide
    assert (two["low"], two["high"]) == (0, 1)


def test_an_undefined_statistic_has_an_undefined_interval_and_valid_json(tmp_path):
    interval = claims.combine([np.array([1.0, np.nan, 1.1])])
    assert np.isnan(interval["low"]) and claims.verdict((interval["low"], interval["high"]), 0) == "unclear"
    runs.write_json(tmp_path / "x.json", dict(interval, more=[float("inf"), 1.5]))
    found = json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: 1 / 0)
    assert found == dict(value=1.0, low=None, high=None, seeds=[1.0], more=[None, 1.5])
    assert claims.cell(found) == "1.000 (no interval)"


@pytest.mark.parametrize(
    "interval, above, expected",
    [
        ((1.1, 1.3), True, "holds"),
        ((0.8, 0.9), True, "fails"),
        ((0.9, 1.1), True, "unclear"),
        ((float("nan"), 2.0), True, "unclear"),
        ((0.8, 0.9), False, "holds"),
        ((1.1, 1.3), False, "fails"),
        ((0.9, 1.1), False, "unclear"),
    ],
)
def test_verdicts(interval, above, expected):
    assert claims.verdict(interval, 1.0, above) == expected


def around(value, half=0.1):
    return dict(value=value, low=value - half, high=value + half)


@pytest.mark.parametrize(
    "student, control, difference, expected",
    [
        (1.3, 1.35, -0.05, "as the control"),
        (1.3, 1.2, 0.05, "as the control"),
        (1.3, 1.15, 0.15, "holds"),
        (1.3, 1.05, 0.05, "holds"),  # the control is not clearly above 1 itself
        (1.05, 1.35, -0.3, "unclear"),
        (0.8, 0.7, 0.15, "fails"),
    ],
)
def test_a_claim_that_the_control_meets_too_needs_a_paired_difference(student, control, difference, expected):
    more = dict(control=around(control), difference=around(difference))
    assert claims.claim("a", "> 1", around(student), 1, **more)["verdict"] == expected
    more = dict(control=around(-control), difference=around(-difference))  # the same from below
    assert claims.claim("a", "< -1", around(-student), -1, above=False, **more)["verdict"] == expected


MEASURED = dict(value=1.2, low=1.1, high=1.3)


def rows_of(*texts):
    return [claims.claim(text, "> 1", MEASURED, 1, "a") for text in texts]


def test_headlines_are_shown_in_the_papers_order_in_one_unit_with_their_control(tmp_path, capsys):
    control = dict(value=0.5, low=0.25, high=math.inf)
    rows = [claims.headline(claims.claim("late", "> 1", MEASURED, 1, control=control), "§5"), *rows_of("another")]
    share = dict(value=0.5, low=0.4, high=0.6)
    rows.append(claims.headline(claims.claim("first", "> 1%", share, 0.01, unit="%", control=control), "§3.1"))
    claims.save_claims(tmp_path, rows, "one seed", full=False)
    shown = capsys.readouterr().out
    first = "| §3.1 | first | > 1% | 50.0 [40.0, 60.0] % | 50.0 [25.0, ?] % | holds |"
    assert shown.index(first) < shown.index("| §5 | late | > 1 | 1.20 [1.10, 1.30] | 0.50 [0.25, ?] | holds |")
    assert "another" not in shown and "(3 holds)" in shown
    assert runs.read_json(tmp_path / "claims.json")[1]["note"] == "a; one seed"


def test_a_long_table_is_printed_as_its_headlines_alone(tmp_path, capsys):
    rows = rows_of(*map(str, range(12)))
    for saved, full, printed in ((rows, True, True), (rows + rows[:1], True, False), (rows, False, False)):
        saved = [claims.headline(saved[0], "§4"), *saved[1:]]
        claims.save_claims(tmp_path, saved, full=full)
        output = capsys.readouterr().out
        assert ("| 11 |" in output) == printed and ("| §4 | 0 |" in output) != printed
        assert f"({len(saved)} holds)" in output and "| 11 |" in (tmp_path / "claims.md").read_text()


@pytest.mark.parametrize(
    "found, expected", [("holds holds", "holds"), ("fails fails", "fails"), ("holds fails", "mixed")]
)
def test_a_joint_claim_holds_when_all_agree(found, expected):
    row = claims.joint_claim("all", dict(zip("ab", found.split(), strict=True)))
    held = found.split().count("holds")
    assert row["verdict"] == expected and row["measured"] == held and row["shown"] == f"{held} of 2"
    assert f"(b) {found.split()[1]}" in row["note"]


def test_a_figure_shows_its_points_and_has_the_same_bytes_again(tmp_path):
    cells = [dict(value=0.5, low=0.4, high=0.6, seeds=[0.4, 0.6])]
    cells.append(dict(value=0.7, low=math.nan, high=math.nan, seeds=[0.7, 0.7]))
    for folder in (tmp_path / "one", tmp_path / "two"):
        folder.mkdir()
        figure, axis = claims.pyplot().subplots(figsize=(2, 1))
        claims.band(axis, [0, 1], cells, 100, label="x")
        drawn = [line.get_ydata() for line in axis.lines]  # the mean, then each seed
        assert np.allclose(drawn, [[50, 70], [40, 70], [60, 70]])
        axis.set_title("$x^{ \udcff")  # a name that a user gave: no formula, any bytes
        claims.save_figure(figure, folder, "f")
        assert not plt.get_fignums()  # closed
    for name in ("f.png", "f.pdf"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
