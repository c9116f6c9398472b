"""eigenspace.py: the theory against plain loops, progress and its comparison, training, the NTK, seeds and shards."""

import itertools
import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import damaged, files_below, ok, one_line_error, run_cli, valid_or_refused
from hypothesis import given, settings
from hypothesis import strategies as st

import claims
import common
import eigenspace
import runs
from denoise_gradients import matched_smoothing, smoothed

TINY = "--subset 60 --points 30 --seeds 0 --steps 6 --width 0.1 --batch-size 20 --device cpu --archs linear cnn".split()
CHEAP = ["--level", "classifiers", "--archs", "linear", "--seeds", "0", "1", "2"]

# ---------------------------------------------------------------- linear theory


@settings(max_examples=300, deadline=None)
@given(st.floats(0.01, 100), st.floats(1e-4, 0.99), st.floats(0.01, 10), st.floats(0.01, 0.99))
def test_student_progresses_less_along_the_lower_eigenvalue_at_equal_progress(top, ratio, reach, share):
    teacher, student = eigenspace.equal_progress(top, top * ratio, reach / top, share)
    assert 0 < student < teacher < 1

    def at_top(progress):  # both stand where the docstring says: invert their lower progress, compute the top one
        return eigenspace.flow_filter(top, -np.log1p(-progress) / (top * ratio))

    assert at_top(teacher) == pytest.approx(share * eigenspace.flow_filter(top, reach / top), rel=1e-6)
    assert at_top(student / eigenspace.flow_filter(top * ratio, reach / top)) == pytest.approx(share, rel=1e-6)


@settings(max_examples=200, deadline=None)
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
    student, teacher = (1 - (1 - eigenvalues) ** 4) ** 2, 1 - (1 - eigenvalues) ** 2
    assert student[0] == pytest.approx(teacher[0], abs=1e-12) and student[1] > teacher[1] + 0.1


def test_theorem_holds_for_all_pairs_of_two_spectra():
    x = eigenspace.centred_images(common.load_data("digits"))[0][0].flatten(1)
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
    x, y = rng.standard_normal((n, 20)) * np.geomspace(1, 1e-3, 20), rng.standard_normal((n, 3))
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
    rng, shape = np.random.default_rng(0), (eigenspace.POINTS, eigenspace.DIRECTIONS)
    x = np.linalg.qr(rng.standard_normal(shape))[0] * np.sqrt(eigenspace.POINTS * eigenspace.POWER_LAW)
    beta, shares = rng.standard_normal(shape[1]), eigenspace.gd_filter(eigenspace.POWER_LAW, 60, 0.5)
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
    for risk in (top, low):
        assert (risk["best early stop"] <= risk["teacher"] * (1 + 1e-9)).all()
        assert (risk["best student"] <= risk["student"] * 1.01).all()  # the best of a grid of times


def test_the_constructed_examples_help_and_hurt():
    many, few, signal = (eigenspace.example(name, 0) for name in eigenspace.EXAMPLES)

    def gain(result):
        return result["paths"]["student"][-1][-1] - result["paths"]["teacher"][-1][-1]

    for result in (many, few, signal):
        found = eigenspace.compare(result["paths"], "student", "smoothed")
        assert found["ratio"]["student"][0] < 1 < found["ratio"]["smoothed"][0]
    assert gain(many) > 0 and gain(few) > 0 > gain(signal)
    assert many["train_accuracy"] == 1 > few["train_accuracy"]


# ---------------------------------------------------------------- progress


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 4000), st.integers(2, 12))
def test_eigen_buckets_partition_the_directions(count, buckets):
    ends = eigenspace.bucket_ends(count, buckets)
    assert [direction for start, end in ends for direction in range(start, end)] == list(range(count))
    assert 1 <= len(ends) <= buckets and all(end > start for start, end in ends)


def test_at_top_takes_the_first_crossing():
    path = np.array([[0.0, 0, 0], [0.4, 1, 10], [0.2, 2, 20], [0.8, 3, 30], [0.5, 4, 40]])
    expected = [[0.2, 0.5, 5], [0.4, 1, 10], [0.5, 2.5, 25], [0.8, 3, 30]]
    np.testing.assert_allclose(eigenspace.at_top(path, [0.2, 0.4, 0.5, 0.8]), expected)
    assert np.isnan(eigenspace.at_top(path, [0.9])).all()
    np.testing.assert_array_equal(eigenspace.at_top(path + 0.1, [0.05]), path[:1] + 0.1)  # there from the start


def test_compare_is_one_for_the_same_path_and_right_for_the_linear_theory():
    times, eigenvalues = np.linspace(0, 4, 4000)[:, None], np.array([1.0, 0.3, 0.1])
    teacher = eigenspace.flow_filter(eigenvalues, times)
    progress = dict(teacher=teacher, same=teacher, student=teacher * teacher[-1])
    paths = {name: np.concatenate([path, path[:, :1]], axis=1) for name, path in progress.items()}  # with "accuracy"
    result = eigenspace.compare(paths, "same", "student")
    np.testing.assert_allclose(result["ratio"]["same"], 1)
    top = result["levels"]
    assert top[-1] == pytest.approx(teacher[-1, 0] ** 2) and len(top) == 20
    for b in (1, 2):
        exact = eigenspace.equal_progress(1.0, eigenvalues[b], 4.0, top / teacher[-1, 0])
        np.testing.assert_allclose(result["curves"]["student"][:, b - 1], exact[1] / exact[0], rtol=1e-3)
    assert (result["ratio"]["student"] < 1).all() and result["accuracy"]["student"] == pytest.approx(top[-1])
    # a network that gets less far shortens its own comparison and no other
    paths["short"] = paths["same"][:1000]
    alone, pair = eigenspace.compare(paths, "student"), eigenspace.compare(paths, "student", "short")
    np.testing.assert_array_equal(alone["levels"], top)
    assert pair["levels"][-1] == paths["short"][-1, 0] < top[-1]


def test_first_layer_inputs_reproduce_the_layer():
    torch.manual_seed(0)
    images = torch.randn(5, 3, 8, 8)
    conv, linear = nn.Conv2d(3, 4, 3, padding=1, stride=2), nn.Linear(192, 4)
    expected = conv(images).flatten(2).transpose(1, 2).flatten(0, 1), linear(images.flatten(1))
    for layer, outputs in zip((conv, linear), expected, strict=True):
        rows = eigenspace.first_layer_inputs(layer, images)
        torch.testing.assert_close(rows @ layer.weight.flatten(1).T + layer.bias, outputs)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    assert len(eigenspace.first_layer_inputs(conv, images, limit=130)) == 2 * 64  # images 0 and 3
    with pytest.raises(runs.InputError, match="first layer"):
        eigenspace.first_layer(nn.Conv2d(4, 4, 3, groups=4))


def test_second_moment_eigenvectors_and_progress_of_weights():
    generator = torch.Generator().manual_seed(0)
    rows = torch.randn(50, 6, generator=generator) * torch.arange(1, 7)
    values, vectors = eigenspace.second_moment_eigenvectors(rows)
    moment = rows.double().T @ rows.double() / 50
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(moment @ vectors, vectors * values)
    start, end, other = torch.randn(3, 3, 6, dtype=torch.float64, generator=generator)
    seen = dict(teacher=[(start, 0.1), (end, 0.7)], student=[(end, 0.1), (end + other, 0.5)])
    paths = eigenspace.weight_progress(seen, vectors, [(0, 2), (2, 6)])
    np.testing.assert_allclose(paths["teacher"], [[0, 0, 0.1], [1, 1, 0.7]])
    norms = [((other @ part).norm() / ((end - start) @ part).norm()).item() for part in vectors.split((2, 4), 1)]
    np.testing.assert_allclose(paths["student"], [[0, 0, 0.1], [*norms, 0.5]])
    np.testing.assert_allclose((other @ vectors).square().sum(), other.square().sum())  # nothing lies outside of them


# ---------------------------------------------------------------- training


def random_linear(key):
    model = nn.Linear(5, 3)
    nn.init.normal_(model.weight, generator=common.generator("test", key))
    nn.init.zeros_(model.bias)
    return model


def weight_of(model):
    return model.weight.detach().clone()


RECIPE = dict(lr=0.1, steps=0, batch_size=0, temperature=4.0)


def test_descend_is_plain_gradient_descent():
    images, labels = torch.randn(30, 5, generator=torch.Generator().manual_seed(0)), torch.arange(30) % 3
    targets, by_hand = F.one_hot(labels, 3).float(), random_linear(0)
    seen = eigenspace.descend(random_linear(0), images, targets, 1.0, RECIPE | dict(steps=25), "key", weight_of)
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


def test_self_distillation_pairs_its_networks():
    images, labels = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    test = images[:8] + 1, labels[:8]
    training = (random_linear, (images, labels), test, 3, 0, weight_of, RECIPE | dict(steps=8, batch_size=10))
    teacher, observed, fit = eigenspace.self_distil(*training)
    seen = {name: [weight for weight, _ in path] for name, path in observed.items()}
    accuracy = (teacher(test[0]).argmax(1) == test[1]).double().mean().item()
    assert observed["teacher"][-1][1] == pytest.approx(accuracy)
    assert list(seen) == list(eigenspace.NETWORKS) == list(eigenspace.STYLES)
    first = {name: path[0] for name, path in seen.items()}
    for name, network in eigenspace.NETWORKS.items():
        assert torch.equal(first[name], first["student fresh" if network.fresh else "teacher"])
    assert not torch.equal(first["student fresh"], first["teacher"])
    again = eigenspace.self_distil(*training, networks=("teacher", "student"))[1]
    assert torch.equal(again["student"][-1][0], seen["student"][-1])

    # by hand: the first step of each is a step on its own loss, on the teacher's first batch
    logits = teacher(images).detach()
    assert fit == pytest.approx((logits.argmax(1) == labels).double().mean().item())
    for key, distilled, smooth, temperature in (
        ("teacher", "student", "smoothed", 1.0),
        ("teacher", "student T", "smoothed T", 4.0),
        ("fresh", "student fresh", None, 1.0),
    ):
        order = torch.randperm(40, generator=common.generator("eigenspace order", (key, 0), 0))[:10]
        model, alpha = random_linear((key, 0)), matched_smoothing(logits, temperature)
        losses = {distilled: common.kd_loss(model(images[order]), logits[order], temperature)}
        if smooth:
            mild = model(images[order]) / temperature
            loss = temperature**2 * F.cross_entropy(mild, labels[order], label_smoothing=alpha)
            losses[smooth] = loss
        losses["one-hot fresh" if key == "fresh" else "teacher"] = F.cross_entropy(model(images[order]), labels[order])
        for name, loss in losses.items():
            (gradient,) = torch.autograd.grad(loss, [model.weight], retain_graph=True)
            torch.testing.assert_close(seen[name][1], first[name] - 0.1 * gradient)


def test_the_control_is_as_soft_as_the_teacher_at_each_temperature():
    logits, labels = 3 * torch.randn(50, 4, generator=torch.Generator().manual_seed(0)), torch.arange(50) % 4
    for temperature in (1.0, 4.0):
        soft = F.softmax(logits / temperature, 1)
        control = smoothed(labels, 4, matched_smoothing(logits, temperature))
        entropies = [torch.special.entr(targets.double()).sum(1).mean().item() for targets in (soft, control)]
        assert entropies[0] == pytest.approx(entropies[1], rel=1e-4)


# ---------------------------------------------------------------- function space


@pytest.mark.parametrize("arch", ["mlp", "resnet8"])
def test_empirical_ntk_matches_a_plain_loop(arch):
    images = torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    model = common.build_model(arch, 3, (8, 8, 1), 0.1)
    torch.optim.swa_utils.update_bn([images], model)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernel = eigenspace.empirical_ntk(model, images, 3, chunk=3)
    slow, parameters = torch.zeros(7, 7, dtype=torch.float64), list(model.parameters())
    for c in range(3):
        gradients = [torch.autograd.grad(model(image[None])[0, c], parameters) for image in images]
        rows = torch.stack([torch.cat([part.flatten() for part in gradient]) for gradient in gradients]).double()
        slow += rows @ rows.T / 3
    torch.testing.assert_close(kernel, slow, rtol=1e-4, atol=1e-4 * float(slow.diagonal().mean()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_share_fitted_and_centring():
    generator = torch.Generator().manual_seed(0)
    target = eigenspace.centre(torch.randn(12, 4, generator=generator))
    assert float(target.sum(0).abs().max()) < 1e-12 and float(target.sum(1).abs().max()) < 1e-12
    vectors = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator))[0]
    buckets = [(0, 3), (3, 11)]
    assert eigenspace.share_fitted(target, target, vectors, buckets) == pytest.approx([1, 1])
    first = vectors[:, :3] @ vectors[:, :3].T @ target
    assert eigenspace.share_fitted(0.5 * first, target, vectors, buckets) == pytest.approx([0.5, 0])


# ---------------------------------------------------------------- the command


def results_in(folder):
    """What is kept of the seeds, without times."""
    return {path.name: json.loads(text)["result"] for path, text in files_below(folder, "seeds/*.json").items()}


def test_eigenspace_runs_keeps_its_seeds_and_refuses_other_settings(tmp_path):
    out, flags = tmp_path / "out", [*TINY, "--out", str(tmp_path / "out")]
    ok(run_cli("eigenspace.py", *flags, cwd=tmp_path))
    table = json.loads((out / "claims.json").read_text())
    prefixes = {
        "linear",
        "digits, linear probe",
        "digits, CNN",
        "digits, resnet8, NTK at initialisation",
        "digits, resnet8, NTK at the teacher's end",
    }
    assert {row["claim"].split(":")[0] for row in table} >= prefixes
    probe, networks = claims.headlines(table)
    assert probe["claim"].startswith("digits, linear probe: ") and probe["control"] and probe["section"] == "§4"
    assert networks["shown"].endswith(" of 2") and "NTK at initialisation" in networks["note"]
    for level in ("linear", "classifiers", "ntk"):
        assert (out / f"{level}.png").stat().st_size > 10_000
        assert (out / f"{level}.pdf").exists() and (out / f"{level}.json").exists()
    kept = files_below(out, "seeds/*.json")
    assert len(kept) == 4
    eigenspace.main(flags)
    assert json.loads((out / "claims.json").read_text()) == table and files_below(out, "seeds/*.json") == kept
    refusal = run_cli("eigenspace.py", *flags, "--temperature", 2, cwd=tmp_path)
    one_line_error(refusal, "temperature", "--overwrite")
    assert files_below(out, "seeds/*.json") == kept
    seed = out / "seeds/linear-s0.json"
    for text in ("[]", '{"settings": 3}', '{"settings": {}, "result": {}}', "{"):
        seed.write_text(text)
        with pytest.raises(runs.InputError, match="linear-s0.json"):
            eigenspace.main([*flags, "--level", "linear"])
    seed.write_bytes(kept[seed])
    eigenspace.main([*flags, "--temperature", "2", "--overwrite", "--level", "classifiers", "--archs", "linear"])
    changed = [path.name for path, content in files_below(out, "seeds/*.json").items() if content != kept[path]]
    assert changed == ["classifiers-linear-s0.json"]


def test_jobs_and_shards_keep_the_same_results_and_draw_once(tmp_path):
    flags = [*TINY, *CHEAP, "--out"]
    whole, jobs, shards = (str(tmp_path / name) for name in ("whole", "jobs", "shards"))
    eigenspace.main([*flags, whole])
    expected = results_in(whole)
    assert len(expected) == 3
    for i in (0, 1):
        eigenspace.main([*flags, shards, "--shard", f"{i}/2"])
        assert len(results_in(shards)) == 2 + i
        assert not list(Path(shards).glob("classifiers*")) and not (Path(shards) / "claims.json").exists()
    before = files_below(shards, "seeds/*.json")
    eigenspace.main([*flags, shards])
    assert files_below(shards, "seeds/*.json") == before

    # With --jobs and --overwrite what is kept is discarded once, and every seed computed once.
    eigenspace.main([*flags, jobs, "--temperature", "2", "--shard", "0/2"])
    lines = ok(run_cli("eigenspace.py", *flags, jobs, "--jobs", 3, "--overwrite", cwd=tmp_path)).splitlines()
    computed = sorted(line.partition(":")[0] for line in lines if line.startswith("classifiers-linear"))
    assert computed == [f"classifiers-linear-s{seed}" for seed in range(3)]
    for folder in (jobs, shards):
        assert results_in(folder) == expected
        assert (Path(folder) / "claims.json").read_bytes() == (Path(whole) / "claims.json").read_bytes()


def test_overwrite_of_a_shard_leaves_the_seeds_of_the_others(tmp_path):
    flags = [*TINY, *CHEAP, "--out", str(tmp_path)]
    eigenspace.main([*flags, "--shard", "0/2"])
    before = files_below(tmp_path, "seeds/*.json")
    eigenspace.main([*flags, "--shard", "1/2", "--overwrite"])
    assert before.items() <= files_below(tmp_path, "seeds/*.json").items()


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--width", "64"], r"[\d,]+ parameters needs \d+\.\d GiB, 1\.0 are free: lower --points or --width"),
        (["--level", "ntk", "--points", "2000"], "--points 2000"),
        (["--level", "classifiers", "--archs", "cnn", "--lr", "1e30"], "lower --lr"),
        (["--level", "classifiers", "--archs", "resnet9"], "unknown --arch"),
        (["--seeds", "1", "1"], "twice"),
    ],
)
def test_eigenspace_refuses_bad_input_before_it_writes(tmp_path, monkeypatch, flags, message):
    monkeypatch.setattr(common, "free_memory", lambda device: 2**30)
    with pytest.raises(runs.InputError, match=message) as refusal:
        eigenspace.main([*TINY, "--out", str(tmp_path / "out"), *flags])
    assert "\n" not in str(refusal.value) and not list(tmp_path.rglob("*.json"))


def test_a_wrong_architecture_fails_before_overwrite_discards_anything(tmp_path):
    flags = [*TINY, "--level", "classifiers", "--out", str(tmp_path)]
    eigenspace.main([*flags, "--archs", "linear"])
    before = files_below(tmp_path, "**/*.json")
    with pytest.raises(runs.InputError, match="unknown --arch"):
        eigenspace.main([*flags, "--archs", "linear", "resnet9", "--overwrite"])
    assert files_below(tmp_path, "**/*.json") == before


def test_damaged_results_are_refused_or_the_same(tmp_path):
    result, draw = dict(mean=dict(student=0.25, control=float("nan")), levels=[0.5, 1.0]), random.Random(0)
    seed = tmp_path / "x-s0.json"
    runs.kept_result(seed, dict(lr=1), result.copy)
    good = seed.read_bytes()

    def read():
        assert repr(runs.kept_result(seed, dict(lr=1), None)) == repr(result)

    for _ in range(100):
        seed.write_bytes(damaged(good, draw))
        before = files_below(tmp_path, "*.json")
        valid_or_refused(read)
        assert files_below(tmp_path, "*.json") == before
