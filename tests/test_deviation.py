"""deviation.py: φ, its statistics and fidelity against their definitions, and what is claimed of them."""

import shutil

import claims
import deviation
import runs
import switch_distill

import numpy as np
import pytest
import scipy.special
import scipy.stats
from helpers import fuzz, odd_arrays, valid_or_refused
from hypothesis import given
from hypothesis import strategies as st


def random_points(n=400, classes=6, seed=0, spread=2.0):
    rng = np.random.default_rng(seed)
    teacher = rng.normal(0, spread, (n, classes))
    labels = rng.integers(0, classes, n)
    networks = dict(student=teacher + rng.normal(0, 1, teacher.shape), control=rng.normal(0, spread, (n, classes)))
    return dict(teacher=teacher, labels=labels, networks=networks)


def plain_statistics(x, y, low, high):
    """The statistics of one sample by their definitions, with scipy and numpy."""
    fit = scipy.stats.linregress(x, y)
    gaps = dict(low_gap=np.mean(y[low] - x[low]), high_gap=np.mean(y[high] - x[high]))
    below = np.mean(y[low] < x[low])
    return dict(gaps, slope=fit.slope, intercept=fit.intercept, low_below=below)


def quarters(x):
    return x <= np.quantile(x, 0.25), x >= np.quantile(x, 0.75)


# ---------------------------------------------------------------- statistics


def test_phi_is_exact_for_saturated_and_ordinary_logits():
    z = np.array([[800.0, 0, 0], [-900.0, 5, 1], [1.0, 2, 0.5], [60, 0, -3]])
    phi = deviation.phi_of_class(z, np.array([0, 0, 1, 0]))
    assert np.allclose(phi[:2], [800 - np.log(2), -900 - np.log(np.exp(5) + np.e)])
    p = scipy.special.softmax(z[2])[1]
    assert np.isclose(phi[2], np.log(p / (1 - p)))


def test_statistics_match_their_definitions():
    point = random_points()
    teacher, labels, networks = point["teacher"], point["labels"], point["networks"]
    got = {key: values[0] for key, values in deviation.replicates(point, 100).items()}
    for kind, classes in (("predicted", teacher.argmax(1)), ("label", labels)):
        x = deviation.phi_of_class(teacher, classes)
        for name in ("student", "control"):
            y = deviation.phi_of_class(networks[name], classes)
            for key, value in plain_statistics(x, y, *quarters(x)).items():
                assert np.isclose(got[kind, name, key], value), (kind, name, key)
        difference = got[kind, "student", "slope"] - got[kind, "control", "slope"]
        assert np.isclose(got[kind, "student-control", "slope"], difference)
    for name, logits in dict(networks, teacher=teacher).items():
        assert got["fidelity", name, "accuracy"] == pytest.approx((logits.argmax(1) == labels).mean())
        assert got["fidelity", name, "agreement"] == pytest.approx((logits.argmax(1) == teacher.argmax(1)).mean())


def test_weighted_bootstrap_equals_a_plain_bootstrap():
    point = random_points(200)
    point["teacher"] = point["teacher"] + 1e5  # a common offset changes no probability and must cost no digits
    got = deviation.replicates(point, 130)  # more than one chunk of draws
    classes = point["teacher"].argmax(1)
    rng = np.random.default_rng(0)
    x, y = (deviation.phi_of_class(z, classes) for z in (point["teacher"], point["networks"]["student"]))
    low, high = quarters(x)
    for b in range(1, 131):
        draw = rng.integers(200, size=200)
        for key, value in plain_statistics(x[draw], y[draw], low[draw], high[draw]).items():
            assert np.isclose(got["predicted", "student", key][b], value), (b, key)


def test_a_copy_of_the_teacher_has_no_deviation():
    point = random_points()
    point["networks"] = dict(student=point["teacher"] + 5.0)  # shifting all logits changes no probability
    got = deviation.replicates(point, 100)
    found = {key: got["predicted", "student", key][0] for key in ("slope", "low_gap", "high_gap")}
    assert found == pytest.approx(dict(slope=1, low_gap=0, high_gap=0), abs=1e-9)


def test_nothing_is_claimed_of_a_perfect_copy_although_it_lies_below_a_control():
    rng = np.random.default_rng(3)
    teacher = rng.normal(0, 2, (2000, 5))
    control = teacher + rng.normal(1, 1, teacher.shape) * (teacher.max(1) < 3)[:, None] * np.eye(5)[teacher.argmax(1)]
    point = dict(teacher=teacher, labels=teacher.argmax(1), networks=dict(student=teacher.copy(), control=control))
    table = deviation.measure([point], 200)
    assert table["predicted"]["student-control"]["low_gap"]["high"] < 0
    for row in deviation.deviation_claims(dict(train=table, test=table)):
        assert row["verdict"] != "holds" or "accurate" in row["claim"], row["claim"]


# ---------------------------------------------------------------- claims


def test_selection_alone_puts_an_independent_network_below_the_diagonal_and_the_control_shows_it():
    rng = np.random.default_rng(9)
    truth = rng.normal(0, 1.5, (4000, 8))
    teacher, student, control = (truth + rng.normal(0, 1, truth.shape) for _ in range(3))
    point = dict(teacher=teacher, labels=truth.argmax(1), networks=dict(student=student, control=control))
    tables = dict(test=deviation.measure([point], 500))
    table = tables["test"]["predicted"]
    assert table["student"]["low_below"]["low"] > 0.5 and table["student"]["low_gap"]["high"] < 0
    assert table["student-control"]["low_gap"]["low"] < 0 < table["student-control"]["low_gap"]["high"]
    verdicts = {row["claim"]: row["verdict"] for row in deviation.deviation_claims(tables)}
    assert verdicts["test: most of the teacher's hardest quarter lies below y = x"] == "as the control"
    del point["networks"]["control"]
    for split in ("test", "train", "val"):
        alone = deviation.deviation_claims({split: deviation.measure([point], 100)})
        assert [row["verdict"] for row in alone[:2]] == ["unclear: no control"] * 2 and len(alone) == 3
        assert all("selection alone" in row["note"] for row in alone[:2])


def test_headlines_stand_beside_the_control():
    table = deviation.measure([random_points()], 100)
    tables = dict(train=table, test=table)
    found = deviation.deviation_claims(tables)
    marked = claims.headlines(found)
    assert [row["claim"].partition(":")[0] for row in marked] == ["train", "train", "test", "test"]
    control = table["predicted"]["control"]
    expected = [claims.cell(control["slope"], 1, 2), claims.cell(control["low_below"], 100, 1) + " %"]
    assert [row["control"] for row in marked] == 2 * expected
    assert marked[1]["shown"].endswith(" %") and {row["section"] for row in marked} == {"§3.1"}
    for row, split in zip(claims.headlines(deviation.deviation_claims(tables, "language")), tables, strict=True):
        assert row["section"] == "language" and row["claim"] == f"{split}: slope of the student's fit exceeds 1"
    none = deviation.deviation_claims(tables, None)
    assert not claims.headlines(none) and [row["claim"] for row in none] == [row["claim"] for row in found]


def test_the_kept_counts_of_figure_1a_are_rows_of_y_over_x(tmp_path):
    teacher = np.random.default_rng(0).normal(0, 2, (400, 3))
    point = dict(teacher=teacher, labels=teacher.argmax(1), networks=dict(student=np.zeros((400, 3))))  # one Y for all
    deviation.report(dict(train=[point]), tmp_path, "a title", 100)
    kept = runs.read_json(tmp_path / "fig1a.json")["train"]["student"]["counts"]
    counts = np.array([row.split() for row in kept], int)
    assert counts.sum() >= 396 and counts.any(1).sum() == 1 and counts.any(0).sum() > 10


# ---------------------------------------------------------------- runs


def test_fuzz_logits_of_other_shapes_and_types_are_refused_or_measured(tiny_runs, tmp_path):
    teacher = tiny_runs / "runs" / "teacher-s0"
    control = tiny_runs / "runs" / "onehot-s0"
    student = tmp_path / "kd"
    shutil.copytree(tiny_runs / "runs" / "kd-s0", student)
    good = runs.read_npz(student / "logits.npz", runs.LOGITS)
    n, m = len(good["train_labels"]), len(good["test_labels"])
    arrays = odd_arrays((n, 10), (m, 10), (m, 9), (n, 1), (7, 10), (m,), (n,), (m, 1))
    roles = dict(teacher=teacher, student=student, control=control)

    @fuzz(25)
    @given(st.dictionaries(st.sampled_from(runs.LOGITS), arrays, min_size=1, max_size=2))
    def check(changed):
        np.savez(student / "logits.npz", **{**good, **changed})
        points = valid_or_refused(lambda: deviation.points_from_runs([roles]))
        valid_or_refused(lambda: switch_distill.accuracy_sums((student, teacher, control), 10))
        for split in points or ():
            assert deviation.measure(points[split], 10)["fidelity"]["student"]["agreement"]["value"] <= 1

    check()
