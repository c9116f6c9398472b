import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import common
import eigenspace

EIGENSPACE_TINY = ["--subset", "60", "--points", "30", "--seeds", "0", "--steps", "6", "--width", "0.1", "--batch-size", "20", "--archs", "linear", "cnn"]


def run_eigenspace(*arguments):
    command = [sys.executable, str(Path(eigenspace.__file__).resolve()), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True)


@settings(max_examples=300, deadline=None)
@given(st.floats(0.01, 100), st.floats(1e-4, 0.99), st.floats(0.01, 10), st.floats(0.01, 0.99))
def test_student_progresses_less_along_the_lower_eigenvalue_at_equal_progress(top, ratio, reach, share):
    teacher, student = eigenspace.equal_progress(top, top * ratio, reach / top, share)
    assert 0 < student < teacher < 1
    # both stand where the docstring says: invert their lower progress, compute the top one
    time_of = lambda progress, eigenvalue: -np.log1p(-progress) / eigenvalue
    at_top = share * eigenspace.flow_filter(top, reach / top)
    assert eigenspace.flow_filter(top, time_of(teacher, top * ratio)) == pytest.approx(at_top, rel=1e-6)
    own = student / eigenspace.flow_filter(top * ratio, reach / top)
    assert eigenspace.flow_filter(top, time_of(own, top * ratio)) == pytest.approx(share, rel=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-3, 1), min_size=2, max_size=6), st.floats(0.05, 0.99), st.integers(1, 200), st.integers(1, 200))
def test_student_progresses_less_in_whole_steps_of_gradient_descent(spectrum, rate, teacher_steps, student_steps):
    eigenvalues = np.sort(spectrum)[::-1]
    lr = rate / eigenvalues[0]
    student = eigenspace.gd_filter(eigenvalues, student_steps, lr) * eigenspace.gd_filter(eigenvalues, teacher_steps, lr)
    stops = np.array([eigenspace.gd_filter(eigenvalues, k, lr) for k in range(teacher_steps + 1)])
    for high, low in itertools.combinations(range(len(eigenvalues)), 2):
        if (1 - lr * eigenvalues[high]) ** min(teacher_steps, student_steps) < 1e-9:
            continue   # so near to 1 that float64 cannot tell which of the two is ahead
        ahead = stops[stops[:, high] >= student[high], low]   # every stop of the teacher that is at least as far along the top one
        assert len(ahead) and (ahead >= student[low] * (1 - 1e-12)).all()


def test_exaggeration_fails_where_gradient_descent_overshoots():
    rho = np.sqrt((np.sqrt(5) - 1) / 2)   # 1 − ηλ = −ρ solves (1 − ρ⁴)² = 1 − ρ²
    eigenvalues = np.array([1 + rho, 0.5])
    student, teacher = eigenspace.gd_filter(eigenvalues, 4, 1.0) ** 2, eigenspace.gd_filter(eigenvalues, 2, 1.0)
    assert student[0] == pytest.approx(teacher[0], abs=1e-12) and student[1] > teacher[1] + 0.1


def test_theorem_finds_no_violation_and_skips_equal_eigenvalues():
    cases, violations, ratio = eigenspace.theorem(np.array([2.0, 1.0, 1.0, 0.1]))
    assert (cases, violations) == (5 * 5 * 9, 0) and 0 < ratio < 1   # 6 pairs, one of them equal


@pytest.mark.parametrize("rate", [0.3, 0.95, 1.7])
@pytest.mark.parametrize("n", [15, 60])   # 15 points in 20 dimensions: 5 directions without data
def test_gradient_descent_matches_its_closed_form(rate, n):
    rng = np.random.default_rng(n)
    x, y = rng.standard_normal((n, 20)) * np.geomspace(1, 1e-3, 20), rng.standard_normal((n, 3))
    lr = rate / np.linalg.eigvalsh(x.T @ x / n)[-1]
    teacher, closed = eigenspace.gd_simulation(x, y, lr, 400), eigenspace.gd_solution(x, y, lr, 400)
    np.testing.assert_allclose(teacher, closed, rtol=0, atol=1e-9)
    np.testing.assert_allclose(eigenspace.gd_simulation(x, x @ teacher, lr, 400), eigenspace.gd_solution(x, x @ closed, lr, 400), rtol=0, atol=1e-9)
    moment, target = x.T @ x / n, np.linalg.pinv(x) @ y   # the filter of the docstring, I − (I − ηΣ)^k, in full matrices
    dense = (np.eye(20) - np.linalg.matrix_power(np.eye(20) - lr * moment, 400)) @ target
    np.testing.assert_allclose(teacher, dense, rtol=0, atol=1e-9)


def test_gd_filter_refuses_steps_that_diverge_and_keeps_tiny_eigenvalues():
    with pytest.raises(ValueError, match="0, 2"):
        eigenspace.gd_filter(np.array([3.0]), 5, 1.0)
    np.testing.assert_allclose(eigenspace.gd_filter(np.array([1e-18, 0.0]), 100, 0.5), [5e-17, 0], rtol=1e-12)


def test_excess_risk_matches_dense_matrices():
    rng = np.random.default_rng(0)
    eigenvalues, beta, n, noise = np.array([2.0, 0.5, 0.1]), rng.standard_normal(3), 12, 0.7
    x = eigenspace.fixed_design(rng, n, eigenvalues)
    np.testing.assert_allclose(x.T @ x / n, np.diag(eigenvalues), atol=1e-12)
    steps, lr = 9, 0.4
    # β̂ = M·y, with M the map that the plain loop applies to each unit vector
    hat = eigenspace.gd_simulation(x, np.eye(n), lr, steps)
    bias, variance = eigenspace.excess_risk(eigenspace.gd_filter(eigenvalues, steps, lr), eigenvalues, beta, noise, n)
    assert bias == pytest.approx(np.mean((x @ (hat @ x @ beta - beta)) ** 2), rel=1e-9)
    assert variance == pytest.approx(noise ** 2 * np.sum((x @ hat) ** 2) / n, rel=1e-9)


def test_bias_variance_helps_or_hurts_by_where_the_signal_lies():
    result = eigenspace.bias_variance(0, draws=200)
    risk = {signal: {name: np.sum(values, axis=1) for name, values in exact.items()} for signal, exact in result["exact"].items()}
    assert risk["top"]["student"][-1] < risk["top"]["teacher"][-1] and risk["low"]["student"][0] > risk["low"]["teacher"][0]
    for signal in ("top", "low"):
        for name in ("teacher", "student"):
            np.testing.assert_allclose(result["simulated"][signal][name], risk[signal][name], rtol=0.15)
        assert (risk[signal]["best early stop"] <= risk[signal]["teacher"] * (1 + 1e-9)).all()
        assert (risk[signal]["best student"] <= risk[signal]["student"] * 1.01).all()   # the best of a grid of times


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 4000), st.integers(2, 12))
def test_eigen_buckets_partition_the_directions(count, buckets):
    ends = eigenspace.bucket_ends(count, buckets)
    assert [direction for start, end in ends for direction in range(start, end)] == list(range(count)) and 1 <= len(ends) <= buckets
    assert all(end > start for start, end in ends)


def test_at_top_takes_the_first_crossing():
    path = np.array([[0.0, 0, 0], [0.4, 1, 10], [0.2, 2, 20], [0.8, 3, 30], [0.5, 4, 40]])
    np.testing.assert_allclose(eigenspace.at_top(path, [0.2, 0.4, 0.5, 0.8]), [[0.2, 0.5, 5], [0.4, 1, 10], [0.5, 2.5, 25], [0.8, 3, 30]])
    assert np.isnan(eigenspace.at_top(path, [0.9])).all()
    np.testing.assert_array_equal(eigenspace.at_top(path + 0.1, [0.05]), path[:1] + 0.1)   # there from the start


def test_compare_is_one_for_the_same_path_and_right_for_the_linear_theory():
    times, eigenvalues = np.linspace(0, 4, 4000)[:, None], np.array([1.0, 0.3, 0.1])
    with_accuracy = lambda progress: np.concatenate([progress, progress[:, :1]], axis=1)
    teacher = eigenspace.flow_filter(eigenvalues, times)
    paths = dict(teacher=with_accuracy(teacher), same=with_accuracy(teacher), student=with_accuracy(teacher * teacher[-1]))
    result = eigenspace.compare(paths, 3)
    np.testing.assert_allclose(result["ratio"]["same"], 1)
    top = np.array(result["levels"])
    assert top[-1] == pytest.approx(teacher[-1, 0] ** 2) and len(top) == 20
    for b in (1, 2):
        exact = eigenspace.equal_progress(1.0, eigenvalues[b], 4.0, top / teacher[-1, 0])
        np.testing.assert_allclose(np.array(result["curves"]["student"])[:, b - 1], exact[1] / exact[0], rtol=1e-3)
    assert result["mean"]["student"] < 1 and result["accuracy"]["student"] == pytest.approx(top[-1])


def test_first_layer_inputs_reproduce_the_layer():
    torch.manual_seed(0)
    images = torch.randn(5, 3, 8, 8)
    for model, layer in ((nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, stride=2)), 0), (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), 1)):
        rows = eigenspace.first_layer_inputs(model[layer], images)
        outputs = rows @ model[layer].weight.flatten(1).T + model[layer].bias
        expected = model(images)
        expected = expected.flatten(2).transpose(1, 2).flatten(0, 1) if expected.dim() == 4 else expected
        torch.testing.assert_close(outputs, expected)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    assert len(eigenspace.first_layer_inputs(conv, images, limit=130)) == 2 * 64   # images 0 and 3
    with pytest.raises(common.InputError, match="first layer"):
        eigenspace.first_layer(nn.Conv2d(4, 4, 3, groups=4))


def test_second_moment_eigenvectors_and_bucket_norms():
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)
    values, vectors = eigenspace.second_moment_eigenvectors(rows)
    moment = rows.double().T @ rows.double() / 50
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(moment @ vectors, vectors * values)
    weights = torch.randn(3, 6, dtype=torch.float64)
    norms = eigenspace.bucket_norms(weights @ vectors, [(0, 2), (2, 6)])
    assert np.sum(np.square(norms)) == pytest.approx(float(weights.square().sum()))
    assert norms[0] == pytest.approx(float((weights @ vectors[:, :2]).norm()))


def test_descend_is_plain_gradient_descent():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 4)), rng.standard_normal((30, 2))
    inputs, targets, model = torch.tensor(x), torch.tensor(y), nn.Linear(4, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    seen = eigenspace.descend(model, inputs, lambda outputs, index: (outputs - targets[index]).square().sum() / (2 * len(index)), 0.1, 25, 0,
                              "key", lambda model: model.weight.detach().clone().numpy().T)
    assert not seen[0].any()
    for k, weights in enumerate(seen):   # 25 steps are few enough that the first ten are all observed
        if k < 10:
            np.testing.assert_allclose(weights, eigenspace.gd_solution(x, y, 0.1, k), atol=1e-12)
    np.testing.assert_allclose(seen[-1], eigenspace.gd_solution(x, y, 0.1, 25), atol=1e-12)


def test_self_distillation_pairs_its_networks():
    images, labels = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    starts, orders = {}, {}

    def build(key):
        model = nn.Linear(5, 3)
        nn.init.normal_(model.weight, generator=common.generator("test", key))
        nn.init.zeros_(model.bias)
        return model

    observer = lambda model: lambda model: model.weight.detach().clone()
    models, seen = eigenspace.self_distil(build, images, labels, 0.1, 8, 10, 4.0, 0, observer)
    assert list(seen) == list(eigenspace.NETWORKS)
    first = {name: path[0] for name, path in seen.items()}
    assert all(torch.equal(first["teacher"], first[name]) for name in ("student", "control"))
    assert torch.equal(first["student fresh"], first["control fresh"]) and not torch.equal(first["student fresh"], first["teacher"])
    again = eigenspace.self_distil(build, images, labels, 0.1, 8, 10, 4.0, 0, observer, networks=("teacher", "student"))[1]
    assert torch.equal(again["student"][-1], seen["student"][-1])
    # by hand: the first step of the student is a step on the distillation loss, on the teacher's first batch
    order = torch.randperm(40, generator=common.generator("eigenspace order", ("teacher", 0), 0))[:10]
    student = build(("teacher", 0))
    common.kd_loss(student(images[order]), models["teacher"](images[order]).detach(), 4.0).backward()
    torch.testing.assert_close(seen["student"][1], first["student"] - 0.1 * student.weight.grad)
    student.zero_grad()
    F.cross_entropy(student(images[order]), labels[order]).backward()
    torch.testing.assert_close(seen["control"][1], first["control"] - 0.05 * student.weight.grad)


@pytest.mark.parametrize("arch", ["mlp", "resnet8"])
def test_empirical_ntk_matches_a_plain_loop(arch):
    model, images = common.build_model(arch, 3, (8, 8, 1), 0.1), torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    eigenspace.calibrate(model, images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernel = eigenspace.empirical_ntk(model, images, 3, chunk=3)
    model.eval()
    slow = torch.zeros(7, 7, dtype=torch.float64)
    for c in range(3):
        rows = [torch.cat([g.flatten() for g in torch.autograd.grad(model(image[None])[0, c], list(model.parameters()))]).double() for image in images]
        slow += torch.stack(rows) @ torch.stack(rows).T / 3
    torch.testing.assert_close(kernel, slow, rtol=1e-4, atol=1e-4 * float(slow.diagonal().mean()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calibrated_eval_mode_is_train_mode_on_the_same_points():
    model, images = common.build_model("resnet8", 4, (8, 8, 1), 0.2), torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    eigenspace.calibrate(model, images)
    with torch.no_grad():
        torch.testing.assert_close(eigenspace.evaluate(model, images), model.train()(images), rtol=0.01, atol=0.01)
    assert all(module.momentum == 0.1 for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_share_fitted_and_centring():
    generator = torch.Generator().manual_seed(0)
    target = eigenspace.centre(torch.randn(12, 4, generator=generator))
    assert float(target.sum(0).abs().max()) < 1e-12 and float(target.sum(1).abs().max()) < 1e-12
    vectors = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator))[0]
    buckets = [(0, 3), (3, 11)]
    assert eigenspace.share_fitted(target, target, vectors, buckets) == pytest.approx([1, 1])
    first = vectors[:, :3] @ vectors[:, :3].T @ target
    assert eigenspace.share_fitted(0.5 * first, target, vectors, buckets) == pytest.approx([0.5, 0])


def test_the_constructed_examples_help_and_hurt():
    many, few, signal = (eigenspace.example(name, 0, 4.0) for name in eigenspace.EXAMPLES)
    assert all(result["ratio"] < 1 for result in (many, few, signal))
    assert all(result["accuracy"]["student"] > result["accuracy"]["teacher"] for result in (many, few))
    assert signal["accuracy"]["student"] < signal["accuracy"]["teacher"]
    assert many["train_accuracy"] == 1 > few["train_accuracy"] and many["low_gap"] < -0.2 < few["low_gap"]


def test_eigenspace_runs_caches_and_refuses_other_settings(tmp_path):
    out = tmp_path / "out"
    done = run_eigenspace(*EIGENSPACE_TINY, "--out", out)
    assert done.returncode == 0, done.stderr
    claims = json.loads((out / "claims.json").read_text())
    assert {row["claim"].split(":")[0] for row in claims} >= {"linear", "digits, linear", "digits, cnn", "digits, NTK of resnet8, init", "digits, NTK of resnet8, end"}
    for level in ("linear", "classifiers", "ntk"):
        assert (out / f"{level}.png").stat().st_size > 10_000 and (out / f"{level}.pdf").exists() and (out / f"{level}.json").exists()
    kept = {path: path.read_bytes() for path in out.glob("seeds/*.json")}
    assert len(kept) == 4
    eigenspace.main([*EIGENSPACE_TINY, "--out", str(out), "--level", "classifiers"])   # the table still covers all levels
    assert json.loads((out / "claims.json").read_text()) == claims
    assert {path: path.read_bytes() for path in out.glob("seeds/*.json")} == kept
    refused = run_eigenspace(*EIGENSPACE_TINY, "--out", out, "--temperature", 2)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "temperature" in refused.stderr and "--overwrite" in refused.stderr
    assert {path: path.read_bytes() for path in out.glob("seeds/*.json")} == kept
    eigenspace.main([*EIGENSPACE_TINY, "--out", str(out), "--temperature", "2", "--overwrite", "--level", "classifiers", "--archs", "linear"])
    assert (out / "seeds/classifiers-linear-s0.json").read_bytes() != kept[out / "seeds/classifiers-linear-s0.json"]


@pytest.mark.parametrize("flags, message", [
    (["--memory-gb", "0.1"], "--memory-gb"),
    (["--level", "ntk", "--points", "2000"], "--points 2000"),
    (["--level", "classifiers", "--archs", "cnn", "--lr", "1e30"], "lower --lr"),
    (["--level", "classifiers", "--archs", "resnet9"], "unknown --arch"),
    (["--seeds", "1", "1"], "twice"),
])
def test_eigenspace_refuses_bad_input_before_it_writes(tmp_path, flags, message):
    with pytest.raises(common.InputError, match=message) as refusal:
        eigenspace.main([*EIGENSPACE_TINY, "--out", str(tmp_path / "out"), *flags])
    assert "\n" not in str(refusal.value) and not list(tmp_path.rglob("*.json"))


def test_ntk_memory_estimate_covers_the_measured_peak():
    code = ("import resource, sys; sys.path.insert(0, sys.argv[1]); import torch, common, eigenspace\n"
            "model, images = common.build_model('resnet8', 2, (8, 8, 1), 1.0), torch.randn(600, 1, 8, 8)\n"
            "eigenspace.empirical_ntk(model, images[:60], 1)\n"   # libraries and buffers are loaded
            "peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == 'darwin' else 1024)\n"
            "before = peak(); eigenspace.empirical_ntk(model, images, 1)\n"
            "print(peak() - before, eigenspace.ntk_bytes(600, sum(p.numel() for p in model.parameters())))")
    grown, estimate = map(int, subprocess.run([sys.executable, "-c", code, str(Path(eigenspace.__file__).parent)], capture_output=True, text=True,
                                              check=True).stdout.split())
    assert grown < estimate < 4 * grown + 2 ** 28


def test_a_kernel_that_does_not_fit_is_refused_with_the_size_needed():
    with pytest.raises(common.InputError, match=r"[\d,]+ parameters needs \d+\.\d GiB.*--memory-gb"):
        eigenspace.main(["--level", "ntk", "--points", "1297", "--width", "8"])
