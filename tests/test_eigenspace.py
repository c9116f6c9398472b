"""eigenspace.py: the theory against plain loops, networks at equal top progress, their training, the command."""

import itertools
import json
import warnings

import claims
import common
import eigenspace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import files_below, finished, fuzz, ok, one_line_error, refused, run_cli
from hypothesis import given
from hypothesis import strategies as st

TINY = "--subset 60 --steps 6 --width 0.1 --batch-size 20 --device cpu --seeds 0 --archs linear cnn".split()

# ---------------------------------------------------------------- linear theory


@fuzz(300)
@given(st.floats(0.01, 100), st.floats(1e-4, 0.99), st.floats(0.01, 10), st.floats(0.01, 0.99))
def test_student_progresses_less_along_the_lower_eigenvalue_at_equal_progress(top, ratio, reach, share):
    teacher, student = eigenspace.equal_progress(top, top * ratio, reach / top, share)
    assert 0 < student < teacher < 1

    def at_top(progress):  # both stand where the docstring says: invert their lower progress, compute the top one
        return eigenspace.flow_filter(top, -np.log1p(-progress) / (top * ratio))

    assert at_top(teacher) == pytest.approx(share * eigenspace.flow_filter(top, reach / top), rel=1e-6)
    assert at_top(student / eigenspace.flow_filter(top * ratio, reach / top)) == pytest.approx(share, rel=1e-6)


@fuzz(200)
@given(
    st.lists(st.floats(1e-3, 1), min_size=2, max_size=6),
    st.floats(0.05, 0.99),
    st.integers(1, 200),
    st.integers(1, 200),
)
def test_student_progresses_less_in_whole_steps_of_gradient_descent(spectrum, rate, teacher_steps, student_steps):
    eigenvalues = np.sort(spectrum)[::-1]
    lr = rate / eigenvalues[0]
    stops = np.array([eigenspace.gd_filter(eigenvalues, k, lr) for k in range(teacher_steps + 1)])
    student = eigenspace.gd_filter(eigenvalues, student_steps, lr) * stops[-1]
    for high, low in itertools.combinations(range(len(eigenvalues)), 2):
        if (1 - lr * eigenvalues[high]) ** min(teacher_steps, student_steps) < 1e-9:
            continue  # so near to 1 that float64 cannot tell which of the two is ahead
        ahead = stops[stops[:, high] >= student[high], low]  # the teacher's stops at least as far along the top one
        assert len(ahead) and (ahead >= student[low] * (1 - 1e-12)).all()


def test_exaggeration_fails_where_gradient_descent_overshoots():
    rho = np.sqrt((np.sqrt(5) - 1) / 2)  # 1 − ηλ = −ρ solves (1 − ρ⁴)² = 1 − ρ²
    eigenvalues = np.array([1 + rho, 0.5])
    student = (1 - (1 - eigenvalues) ** 4) ** 2
    teacher = 1 - (1 - eigenvalues) ** 2
    assert student[0] == pytest.approx(teacher[0], abs=1e-12) and student[1] > teacher[1] + 0.1


def test_theorem_holds_for_all_pairs_of_two_spectra():
    x = eigenspace.centred_images(common.load_data("digits")).flatten(1)
    digits = eigenspace.second_moment_eigenvectors(x)[0].numpy()
    cases = 0
    for eigenvalues in (eigenspace.POWER_LAW, digits[digits > 1e-9 * digits[0]]):
        high, low = (eigenvalues[k] for k in np.triu_indices(len(eigenvalues), 1))
        distinct = high > low * (1 + 1e-6)
        high, low = high[distinct][:, None, None], low[distinct][:, None, None]
        times = np.array([0.1, 0.5, 1, 3, 10])[:, None] / high
        teacher, student = eigenspace.equal_progress(high, low, times, np.linspace(0.1, 0.9, 9))
        assert (student < teacher).all()
        cases += teacher.size
    assert cases == 99_225


def gd_simulation(x, y, lr, steps):
    """β [d, K] after `steps` of gradient descent on ‖xβ − y‖²/(2n) from zero, by the plain loop; x [n, d], y [n, K]."""
    beta = np.zeros((x.shape[1], y.shape[1]))
    for _ in range(steps):
        beta -= lr * (x.T @ (x @ beta - y)) / len(x)
    return beta


@pytest.mark.parametrize("rate", [0.3, 0.95, 1.7])
@pytest.mark.parametrize("n", [15, 60])  # 15 points in 20 dimensions: 5 directions without data
def test_gradient_descent_matches_its_closed_form(rate, n):
    rng = np.random.default_rng(n)
    x = rng.standard_normal((n, 20)) * np.geomspace(1, 1e-3, 20)
    y = rng.standard_normal((n, 3))
    eigenvalues, vectors = np.linalg.eigh(x.T @ x / n)
    lr = rate / eigenvalues[-1]
    shares = np.eye(20) - np.linalg.matrix_power(np.eye(20) - lr * x.T @ x / n, 400)
    teacher = gd_simulation(x, y, lr, 400)
    student = gd_simulation(x, x @ teacher, lr, 400)
    np.testing.assert_allclose(teacher, shares @ np.linalg.pinv(x) @ y, rtol=0, atol=1e-9)
    np.testing.assert_allclose(student, shares @ teacher, rtol=0, atol=1e-9)
    if rate < 1:
        diagonal = eigenspace.gd_filter(np.maximum(eigenvalues, 0), 400, lr)
        np.testing.assert_allclose(vectors @ np.diag(diagonal) @ vectors.T, shares, rtol=0, atol=1e-9)


def test_gd_filter_keeps_tiny_eigenvalues():
    np.testing.assert_allclose(eigenspace.gd_filter(np.array([1e-18, 0.0]), 100, 0.5), [5e-17, 0], rtol=1e-12)


def test_risk_is_that_of_simulated_gradient_descent():
    rng = np.random.default_rng(0)
    shape = (eigenspace.POINTS, eigenspace.DIRECTIONS)
    x = np.linalg.qr(rng.standard_normal(shape))[0] * np.sqrt(eigenspace.POINTS * eigenspace.POWER_LAW)
    beta = rng.standard_normal(shape[1])
    shares = eigenspace.gd_filter(eigenspace.POWER_LAW, 60, 0.5)
    for noise in eigenspace.NOISES:
        y = (x @ beta)[:, None] + noise * rng.standard_normal((len(x), 200))
        teacher = gd_simulation(x, y, 0.5, 60)
        student = gd_simulation(x, x @ teacher, 0.5, 60)
        for kept, estimate in ((shares, teacher), (shares**2, student)):
            simulated = ((x @ (estimate - beta[:, None])) ** 2).mean()
            assert simulated == pytest.approx(eigenspace.risk(kept, beta, noise), rel=0.05)


def test_bias_variance_helps_or_hurts_by_where_the_signal_lies():
    found = eigenspace.bias_variance(0)
    top, low = ({name: np.array(risks) for name, risks in found[signal].items()} for signal in ("top", "low"))
    assert top["student"][-1] < top["teacher"][-1] and low["student"][0] > low["teacher"][0]


def test_distilling_lowers_the_risk_where_the_signal_is_on_top_and_raises_it_elsewhere():
    rows = eigenspace.linear_claims([eigenspace.bias_variance(seed) for seed in range(5)])
    assert [(row["expected"], row["verdict"]) for row in rows] == [("< 0", "holds"), ("> 0", "holds")]


# ---------------------------------------------------------------- progress and confidence


@fuzz(100)
@given(st.integers(2, 4000), st.integers(2, 12))
def test_eigen_buckets_partition_the_directions(count, buckets):
    ends = eigenspace.bucket_ends(count, buckets)
    assert np.array_equal(np.concatenate([range(*pair) for pair in ends]), range(count))
    assert 1 <= len(ends) <= buckets and all(end > start for start, end in ends)


def test_at_top_takes_the_first_crossing():
    path = np.array([[0.0, 0, 0], [0.4, 1, 10], [0.2, 2, 20], [0.8, 3, 30], [0.5, 4, 40]])
    expected = [[0.2, 0.5, 5], [0.4, 1, 10], [0.5, 2.5, 25], [0.8, 3, 30]]
    np.testing.assert_allclose(eigenspace.at_top(path, [0.2, 0.4, 0.5, 0.8]), expected)
    assert np.isnan(eigenspace.at_top(path, [0.9])).all()


def test_compare_is_one_for_the_same_path_and_right_for_the_linear_theory():
    times = np.linspace(0, 4, 4000)[:, None]
    eigenvalues = np.array([1.0, 0.3, 0.1])
    logits = np.zeros((4000, 4, 2))
    teacher = eigenspace.flow_filter(eigenvalues, times)
    student = teacher * teacher[-1]
    same = eigenspace.compare(teacher, logits, teacher, logits)
    assert same["ratio"] == pytest.approx(1) and same["gap"] == 0
    for b in (1, 2):
        found = eigenspace.compare(student[:, [0, b]], logits, teacher[:, [0, b]], logits)
        top = np.array(found["levels"])
        assert top[-1] == pytest.approx(teacher[-1, 0] ** 2) and len(top) == 20
        exact = eigenspace.equal_progress(1.0, eigenvalues[b], 4.0, top / teacher[-1, 0])
        np.testing.assert_allclose(found["ratios"], exact[1] / exact[0], rtol=1e-3)
        assert found["ratio"] == pytest.approx(exact[1].mean() / exact[0].mean(), rel=1e-3) and found["ratio"] < 1
    both = eigenspace.compare(student, logits, teacher, logits)  # the mean over the lower buckets
    assert both["ratios"][-1] == pytest.approx(np.mean(student[-1, 1:] / eigenspace.at_top(teacher, top[-1:])[0, 1:]))
    short = eigenspace.compare(teacher[:1000], logits[:1000], teacher, logits)
    assert short["levels"][-1] == teacher[999, 0] < top[-1]


def on_the_way(progress, log_odds, shift=0.0):
    """(path [S, 2], logits [S, N, 2]) of a network whose log-odds [N] grow with its progress [S], plus a shift."""
    logits = np.zeros((len(progress), len(log_odds), 2))
    logits[:, :, 0] = progress[:, None] * log_odds + shift
    return np.stack([progress, progress], axis=1), logits


def test_low_minus_high_of_a_student_by_hand():
    log_odds = np.random.default_rng(0).permutation(np.arange(1, 41)) / 10.0
    teacher = on_the_way(np.linspace(0, 1, 41), log_odds)
    found = eigenspace.compare(*on_the_way(np.linspace(0, 1, 23) ** 2, 1.2 * log_odds), *teacher)
    # Over levels 0.55, 0.6, …, 1, whose mean is 0.775, the quarters of 10 points each have the log-odds 0.1 … 1 and
    # 3.1 … 4: the student's excess is 0.2 of their means.
    low, high = 0.2 * 0.775 * 0.55, 0.2 * 0.775 * 3.55
    assert (found["low"], found["high"], found["gap"]) == pytest.approx((low, high, low - high))
    assert found["gap"] == pytest.approx(-0.465)

    # The sign of the log-odds names the class that the teacher predicts, whose φ counts.
    mirrored = on_the_way(np.linspace(0, 1, 41), -log_odds)
    assert eigenspace.compare(*on_the_way(np.linspace(0, 1, 23), -1.2 * log_odds), *mirrored)["gap"] < -0.46
    shifted = eigenspace.compare(*on_the_way(np.linspace(0, 1, 41), log_odds, -0.5), *teacher)
    assert (shifted["low"], shifted["high"]) == pytest.approx((-0.5, -0.5)) and shifted["gap"] == pytest.approx(0)
    short = eigenspace.compare(*on_the_way(np.linspace(0, 0.5, 41), 1.2 * log_odds), *teacher)  # levels up to 0.5
    assert short["gap"] == pytest.approx(-0.465 / 2)
    # A last step along other directions alone, after which the hard points are the easy ones: quarters are the end's.
    last = on_the_way(np.ones(1), 4.1 - log_odds)
    turned = [np.concatenate(parts) for parts in zip(teacher, last, strict=True)]
    student = on_the_way(np.linspace(0, 1, 41), 1.2 * log_odds)
    assert eigenspace.compare(*student, *turned)["gap"] == pytest.approx(0.465)


def test_networks_that_share_no_level_have_no_measure():
    teacher = on_the_way(np.linspace(0, 1, 5), np.arange(8.0))
    still = on_the_way(np.zeros(5), np.arange(8.0))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        found = eigenspace.compare(*still, *teacher)
    assert np.isnan(
        [*found["levels"], *found["ratios"], found["ratio"], found["low"], found["high"], found["gap"]]
    ).all()


def test_first_layer_inputs_reproduce_the_layer():
    torch.manual_seed(0)
    images = torch.randn(5, 3, 8, 8)
    conv = nn.Conv2d(3, 4, 3, padding=1, stride=2)
    linear = nn.Linear(192, 4)
    expected = conv(images).flatten(2).transpose(1, 2).flatten(0, 1), linear(images.flatten(1))
    for layer, outputs in zip((conv, linear), expected, strict=True):
        rows = eigenspace.first_layer_inputs(layer, images)
        torch.testing.assert_close(rows @ layer.weight.flatten(1).T + layer.bias, outputs)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    assert len(eigenspace.first_layer_inputs(conv, images, limit=130)) == 2 * 64  # images 0 and 3


def test_second_moment_eigenvectors_and_progress_of_weights():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 6, generator=generator) * torch.arange(1, 7)
    values, vectors = eigenspace.second_moment_eigenvectors(rows)
    moment = rows.double().T @ rows.double() / 50
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(moment @ vectors, vectors * values)
    start, end, other = torch.randn(3, 3, 6, dtype=torch.float64, generator=generator)
    paths = eigenspace.weight_progress(
        dict(teacher=[start, end], student=[end, end + other]), vectors, [(0, 2), (2, 6)]
    )
    np.testing.assert_allclose(paths["teacher"], [[0, 0], [1, 1]])
    norms = [((other @ part).norm() / ((end - start) @ part).norm()).item() for part in vectors.split((2, 4), 1)]
    np.testing.assert_allclose(paths["student"], [[0, 0], norms])
    np.testing.assert_allclose((other @ vectors).square().sum(), other.square().sum())  # nothing lies outside of them


# ---------------------------------------------------------------- training


def random_linear(key):
    model = nn.Linear(5, 3)
    nn.init.normal_(model.weight, generator=common.generator("test", key))
    nn.init.zeros_(model.bias)
    return model


def weight_of(model):
    return model.weight.detach().clone()


RECIPE = dict(lr=0.1, steps=0, batch_size=0)


def test_descend_is_plain_gradient_descent():
    images = torch.randn(30, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(30) % 3
    targets = F.one_hot(labels, 3).float()
    by_hand = random_linear(0)
    seen = eigenspace.descend(random_linear(0), images, targets, RECIPE | dict(steps=25), "key", weight_of)
    steps = eigenspace.observed_steps(25)
    assert len(seen) == len(steps) and steps[:10] == list(range(10)) and steps[-1] == 25
    found = dict(zip(steps, seen, strict=True))
    for step in range(26):
        if step in found:
            torch.testing.assert_close(found[step], weight_of(by_hand))
        by_hand.zero_grad()
        F.cross_entropy(by_hand(images), labels).backward()
        with torch.no_grad():
            for parameter in by_hand.parameters():
                parameter -= 0.1 * parameter.grad


def test_self_distillation_by_hand():
    images = torch.randn(40, 5, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(40) % 3
    recipe = RECIPE | dict(steps=8, batch_size=10)
    weights, logits, fit = eigenspace.self_distil(random_linear, images, labels, 3, 0, recipe)
    last = torch.tensor(logits["teacher"][-1])
    assert fit == pytest.approx((last.argmax(1) == labels).double().mean().item())

    # Each network's first step is one on its own loss, from the same start on the same batch, all at T = 1.
    order = torch.randperm(40, generator=common.generator("eigenspace order", ("teacher", 0), 0))[:10]
    model = random_linear(("teacher", 0))
    alpha = common.matched_smoothing(last, 1.0)
    losses = dict(
        teacher=F.cross_entropy(model(images[order]), labels[order]),
        student=common.kd_loss(model(images[order]), last[order], 1.0),
        smoothed=F.cross_entropy(model(images[order]), labels[order], label_smoothing=alpha),
    )
    for name, loss in losses.items():
        assert torch.equal(weights[name][0], model.weight) and logits[name].shape == (len(weights[name]), 40, 3)
        np.testing.assert_allclose(logits[name][0], images @ weights[name][0].T, atol=1e-6)  # its bias starts at 0
        (gradient,) = torch.autograd.grad(loss, [model.weight], retain_graph=True)
        torch.testing.assert_close(weights[name][1], model.weight - 0.1 * gradient)
    some = eigenspace.self_distil(random_linear, images, labels, 3, 0, recipe, limit=15)[1]
    np.testing.assert_allclose(some["student"], logits["student"][:, ::3], atol=1e-6)


def test_the_control_is_as_soft_as_the_teacher():
    logits = 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0))
    labels = torch.arange(50) % 4
    control = common.smoothed(labels, 4, common.matched_smoothing(logits, 1.0))
    both = F.softmax(logits, 1).double(), control.double()
    entropies = [torch.special.entr(targets).sum(1).mean().item() for targets in both]
    assert entropies[0] == pytest.approx(entropies[1], rel=1e-4)


# ---------------------------------------------------------------- claims and the command


def seed_result(ratio, gap, control_ratio, control_gap):
    student = dict(ratio=ratio, gap=gap, low=gap, high=0.0)
    control = dict(ratio=control_ratio, gap=control_gap)
    return dict(student=student, smoothed=control, train_accuracy=0.9)


def test_claims_of_networks_and_of_all_of_them():
    clear, other = [], []
    for noise in (-0.01, 0.0, 0.01):
        clear.append(seed_result(0.9 + noise, -0.3 + noise, 1.2 - noise, 0.1 - noise))
        other.append(seed_result(0.8 + noise, 0.4 + noise, 0.7 - noise, 0.1 - noise))
    rows = eigenspace.classifier_claims("digits", dict(mlp=clear, linear=other))
    mlp, probe, bias, mlp_gap, probe_gap, tie = (row["verdict"] for row in rows)
    assert (mlp, probe, bias) == ("holds", "as the control", "mixed")
    assert (mlp_gap, probe_gap, tie) == ("holds", "fails", "mixed")
    bias, tie = claims.headlines(rows)
    assert rows[1]["claim"].startswith("digits, linear probe: ") and rows[1]["control"].startswith("0.70 [")
    assert (bias["shown"], bias["control"]) == ("1 of 2", "1 of 2")
    assert tie["claim"].startswith("§4 ↔ §3: ") and (tie["shown"], tie["control"]) == ("1 of 2", "0 of 2")


def test_eigenspace_runs_keeps_its_seeds_and_refuses_other_settings(tmp_path):
    out = tmp_path / "out"
    flags = [*TINY, "--out", out]
    ok(run_cli("eigenspace.py", *flags, cwd=tmp_path))
    table = json.loads((out / "claims.json").read_text())
    prefixes = {"linear", "digits, linear probe", "digits, CNN", "all networks", "§4 ↔ §3"}
    assert {row["claim"].split(":")[0] for row in table} == prefixes and len(claims.headlines(table)) == 2
    for name in ("linear", "classifiers"):
        assert (out / f"{name}.png").stat().st_size > 10_000 and (out / f"{name}.pdf").exists()
    kept = files_below(out, "seeds/*.json")
    assert len(kept) == 3 and all(len(content) < 20_000 for content in kept.values())
    finished(eigenspace, *flags)
    assert json.loads((out / "claims.json").read_text()) == table and files_below(out, "seeds/*.json") == kept

    one_line_error(run_cli("eigenspace.py", *flags, "--steps", 7, cwd=tmp_path), "steps", "network-linear-s0.json")
    finished(eigenspace, *flags, "--steps", 7, "--overwrite", "--archs", "linear", "--train-only")
    assert json.loads((out / "seeds/network-linear-s0.json").read_text())["settings"]["steps"] == 7
    assert (out / "seeds/network-cnn-s0.json").read_bytes() == kept[out / "seeds/network-cnn-s0.json"]


def test_seeds_on_their_own_are_those_of_one_command_and_drawn_once(tmp_path):
    flags = [*TINY, "--archs", "linear", "--seeds"]
    whole = tmp_path / "whole"
    parts = tmp_path / "parts"
    finished(eigenspace, *flags, 0, 1, "--out", whole)
    for seed in (0, 1):
        finished(eigenspace, *flags, seed, "--out", parts, "--train-only")
    assert {path.name for path in parts.iterdir()} == {"seeds"}
    before = files_below(parts)
    for file, content in before.items():
        assert json.loads(content)["result"] == json.loads((whole / "seeds" / file.name).read_text())["result"]
    finished(eigenspace, *flags, 0, 1, "--out", parts)
    assert before.items() <= files_below(parts).items()
    assert (parts / "claims.json").read_bytes() == (whole / "claims.json").read_bytes()


def test_bad_input_is_refused_before_a_network_is_kept(tmp_path):
    for flags, message in (
        ("--archs cnn --lr 1e30", "lower --lr"),
        ("--archs linear resnet8 --overwrite", "--archs"),
        ("--seeds 1 1", "twice"),
        ("--subset 5000", "--subset"),
    ):
        assert message in refused(eigenspace, *TINY, "--out", tmp_path / "out", *flags.split())
    assert not list(tmp_path.rglob("network-*"))
