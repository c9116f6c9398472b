import json
import math

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F

import common
import denoise_gradients
import train_student
import train_teacher


def denoise_setup(n=24, classes=10, width=0.25):
    """A small ResNet-8 in eval mode with lived-in batch norm, images, soft targets."""
    model = common.build_model("resnet8", classes, (8, 8, 1), width, "denoise test")
    random = torch.Generator().manual_seed(0)
    images = torch.randn(n, 1, 8, 8, generator=random)
    model.train()(images)
    targets = torch.softmax(torch.randn(n, classes, generator=random), 1)
    return model.eval(), images, targets


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_denoise_loss_has_the_gradient_of_kd_and_of_cross_entropy(temperature):
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    teacher, labels = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    ours = torch.autograd.grad(denoise_gradients.soft_loss(logits, F.softmax(teacher / temperature, 1), temperature).mean(), logits)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(common.kd_loss(logits, teacher, temperature), logits)[0])
    one_hot = denoise_gradients.soft_loss(logits, F.one_hot(labels, 5).double(), 1.0)
    torch.testing.assert_close(one_hot, F.cross_entropy(logits, labels, reduction="none"))


def test_denoise_per_example_gradients_of_a_linear_softmax_model_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    images, target, T = torch.randn(5, 1, 2, 2), torch.softmax(torch.randn(5, 3), 1), 2.5
    weight, bias = denoise_gradients.per_example_gradients(model, ["1.weight", "1.bias"], images, target, T)
    error = T * (torch.softmax(model(images) / T, 1) - target).detach()   # d/dz of T²·CE(q, softmax(z/T))
    torch.testing.assert_close(weight.view(5, 3, 4), error[:, :, None] * images.view(5, 1, 4))
    torch.testing.assert_close(bias, error)


def test_denoise_stream_equals_one_example_at_a_time():
    model, images, targets = denoise_setup()
    names = denoise_gradients.measured_parameters(model)
    parameters = dict(model.named_parameters())
    plain = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(
        denoise_gradients.soft_loss(model(images[k:k + 1]), targets[k:k + 1], 3.0).sum(), [parameters[name] for name in names])]) for k in range(24)])
    weights = torch.rand(3, 24)
    mean, squares, inner, batches = denoise_gradients.stream(model, names, images, targets, 3.0, weights, chunk=7)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    close(mean, plain.mean(0))
    close(squares, plain.square().sum(1))
    close(inner, plain @ plain.mean(0))
    close(batches, weights @ plain)


def test_denoise_last_parameters_are_the_tail_of_the_full_gradient():
    model, images, targets = denoise_setup()
    every = denoise_gradients.measured_parameters(model)
    assert every == [name for name, _ in model.named_parameters()]
    last = denoise_gradients.measured_parameters(model, 200)
    assert last == every[-len(last):] and "fc.bias" in last and sum(dict(model.named_parameters())[name].numel() for name in last) <= 200
    full, tail = (denoise_gradients.mean_gradient(model, names, images, targets, 1.0) for names in (every, last))
    torch.testing.assert_close(tail, full[-len(tail):])


def test_denoise_noise_scale_is_unbiased_and_agrees_with_brute_force():
    random = np.random.default_rng(0)
    mean, sigma, n = np.array([1.0, 0, 0, 0]), np.array([2.0, 1, 1, 0.5]), 8
    g = mean + sigma * random.normal(size=(20000, n, 4))
    square_of_mean = (g.mean(1) ** 2).sum(-1)
    trace, signal = np.mean([denoise_gradients.noise_scale(a, b, n)[:2] for a, b in zip((g ** 2).sum(-1).mean(1), square_of_mean)], axis=0)
    assert trace == pytest.approx((sigma ** 2).sum(), rel=0.02)
    assert signal == pytest.approx(1.0, abs=0.05) and square_of_mean.mean() > 1.7   # the plain ‖mean‖² is far off
    # Brute force: E‖batch mean‖² = ‖G‖² + tr(Σ)/B at two batch sizes gives both unknowns.
    points = mean + sigma * random.normal(size=(4000, 4))
    small, big = (np.mean([(points[random.integers(4000, size=B)].mean(0) ** 2).sum() for _ in range(20000)]) for B in (2, 32))
    brute_trace, brute_signal = (small - big) / (1 / 2 - 1 / 32), (32 * big - 2 * small) / 30
    scale = denoise_gradients.noise_scale((points ** 2).sum(1).mean(), (points.mean(0) ** 2).sum(), 4000)[2]
    assert scale == pytest.approx(brute_trace / brute_signal, rel=0.05)
    assert denoise_gradients.noise_scale(5.0, 0.0, 10)[2] == denoise_gradients.UNRESOLVED * 10


def test_denoise_smoothing_matches_the_entropy():
    for entropy in (0.01, 0.8, 2.2):
        targets = denoise_gradients.smoothed(torch.tensor([2, 0]), 10, denoise_gradients.smoothing_of_entropy(entropy, 10))
        assert torch.special.entr(targets).sum(1).tolist() == pytest.approx([entropy] * 2, rel=1e-4)
        assert targets.argmax(1).tolist() == [2, 0] and targets.sum(1).tolist() == pytest.approx([1, 1])
    assert denoise_gradients.smoothing_of_entropy(math.log(10), 10) == pytest.approx(1.0, abs=1e-6)
    assert denoise_gradients.smoothing_of_entropy(0.0, 10) == 0.0


def test_denoise_batches_are_means_over_their_own_points():
    groups = {"few": np.arange(50) < 5, "rest": np.arange(50) >= 5}
    rows = denoise_gradients.batch_weights(groups, 32, 6, torch.Generator().manual_seed(0))
    assert set(rows) == {*denoise_gradients.BATCH_SIZES, 32, "few", "rest"}
    for key, weights in rows.items():
        torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
        if key in groups:
            assert not weights[:, ~groups[key]].any()
        else:
            counts = weights * key
            torch.testing.assert_close(counts, counts.round())


def test_denoise_measure_against_the_whole_gradient_matrix():
    model, images, targets = denoise_setup(n=40)
    names, one_hot = denoise_gradients.measured_parameters(model), F.one_hot(torch.arange(40) % 10, 10).float()
    groups = {"first": np.arange(40) < 10, "others": np.arange(40) >= 10}
    rows = denoise_gradients.batch_weights(groups, 16, 4, torch.Generator().manual_seed(1))
    held_out = images[:20] + 0.1, one_hot[:20]
    result = denoise_gradients.measure(model, names, images, held_out, (images, one_hot), {"kd": (targets, 2.0)}, groups, rows, 16)["kd"]
    g = torch.cat(denoise_gradients.per_example_gradients(model, names, images, targets, 2.0), 1).double()
    G, spread = g.mean(0), (g - g.mean(0)).square().sum(1)
    assert result["trace"] == pytest.approx(float(spread.sum() / 39), rel=1e-3)
    assert result["noise_scale"] == pytest.approx(result["trace"] / float(G @ G - spread.sum() / 39 / 40), rel=1e-2)
    np.testing.assert_allclose(result["deviation"] / result["deviation"].sum(), (spread / spread.sum()).numpy(), rtol=1e-2)
    assert 0.25 * result["noise first"] + 0.75 * result["noise others"] == pytest.approx(result["noise_scale"], rel=1e-4)
    h = denoise_gradients.mean_gradient(model, names, *held_out, 1.0)
    steps = F.normalize(rows[16] @ g.float(), dim=1)
    assert result["first_order"] == pytest.approx(float((steps @ h / h.norm()).mean()), abs=1e-4)
    # The first-order decrease is what a short step really gives; the real steps are as long as the best one along −h.
    labels, length = held_out[1].argmax(1), result["step_length"]
    fall = lambda move: result["held_out_loss"] - denoise_gradients.moved_loss(model, names, move, held_out[0], labels)
    assert fall(-1e-2 * steps[0]) == pytest.approx(1e-2 * float(steps[0] @ h), rel=0.1, abs=1e-4)
    best = fall(-length * h / h.norm())
    assert best == pytest.approx(result["best_decrease"], rel=1e-3) and best > 0
    assert result["decrease"] == pytest.approx(np.mean([fall(-length * step) for step in steps]) / best, rel=1e-2)


def test_denoise_best_step_finds_the_minimum_of_a_parabola():
    length, fall = denoise_gradients.best_step(lambda x: 2 * x - x * x, slope=2, loss=8)   # best at 1, reached by halving 4
    assert (length, fall) == (1, 1)


def denoise_seed(noise):
    """One seed's table: noise {loss: array [8]} at every checkpoint, the same decreases for all losses; points 0, 1 the hardest."""
    entry = lambda values: dict(noise_scale=values.mean(), deviation=values, first_order=0.1, decrease=0.1,
                                **{f"cos_held_out {group}": 0.2 for group in denoise_gradients.QUARTERS})
    table = {(run, percent): {loss: entry(np.array(values, float)) for loss, values in noise.items()}
             for run in denoise_gradients.LOSSES for percent in (0, 100)}
    return dict(table=table, x=np.arange(8.0), gap=np.arange(8.0))


def test_denoise_claims_tell_where_the_reduction_is_and_agree_or_are_mixed():
    seed = denoise_seed(dict(onehot=[10, 10, 2, 2, 2, 2, 2, 2], kd=[1, 1, 2, 2, 2, 2, 2, 1.5], smooth=[1, 1, 1, 1, 1, 1, 1, 1]))
    assert denoise_gradients.compare(seed, "onehot")["i"] > 0 > denoise_gradients.compare(seed, "smooth")["ii"]
    assert denoise_gradients.compare(seed, "onehot")["iii"] == 0
    assert denoise_gradients.compare_hardest(seed)["i"] > 0
    everywhere = denoise_seed(dict(onehot=[3] * 8, kd=[1] * 8, smooth=[1] * 8))
    increase = denoise_seed(dict(onehot=[3, 3, 1, 1, 1, 1, 1, 1], kd=[1, 1, 3, 3, 3, 3, 3, 3], smooth=[1] * 8))
    assert denoise_gradients.compare_hardest(everywhere)["ii"] < 0 and denoise_gradients.compare_hardest(increase)["i"] < 0
    joint = lambda *verdicts: denoise_gradients.joint_claim("x", dict(zip(("i", "ii", "iii"), verdicts)))["verdict"]
    assert joint("holds", "holds", "holds") == "holds" and joint("fails", "fails", "fails") == "fails"
    assert joint("holds", "holds", "unclear") == "mixed" and joint("holds", "fails", "holds") == "mixed"


DENOISE = ["--width", "0.25", "--subset", "200", "--epochs", "2", "--batches", "2", "--temperatures", "1", "--quiet"]


def test_denoise_cli_writes_reuses_and_shares_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*DENOISE, "--seeds", "0", "1", "--percents", "25", "50", "--points", "80", "--held-out", "100"]
    denoise_gradients.main(flags)
    out = tmp_path / "results/denoise"
    assert {file.name for file in out.iterdir()} == {"denoise.png", "denoise.pdf", "denoise.json", "claims.json", "claims.md"}
    first = (out / "denoise.json").read_bytes()
    result = json.loads(first)
    assert "80 of 200 training images" in result["gradients"] and result["accuracy"].keys() == {"teacher", "teacher of 1 epochs", "onehot", "kd", "smooth"}
    assert result["tables"].keys() == {"onehot", "kd", "smooth"} and result["tables"]["kd"].keys() == {"0", "25", "50", "100"}
    claims = json.loads((out / "claims.json").read_text())
    assert len(claims) == 16 and {row["verdict"] for row in claims} <= {"holds", "fails", "unclear", "mixed"}

    # A second call trains nothing and measures the same.
    capsys.readouterr()
    denoise_gradients.main(flags)
    assert capsys.readouterr().out.count("is finished already") == 10 and (out / "denoise.json").read_bytes() == first

    # The runs are those of train_teacher.py and train_student.py, bit for bit.
    shared = ["--width", "0.25", "--subset", "200", "--epochs", "2", "--quiet", "--seeds", "1"]
    train_teacher.main([*shared, "--out", "teacher"])
    train_student.main([*shared, "--teacher", "teacher", "--out", "kd"])
    for ours, theirs in (("teacher", "teacher"), ("denoise-kd", "kd")):
        a, b = (common.load_checkpoint(tmp_path / run / "checkpoint.pt")["model"] for run in (f"runs/digits-resnet8-{ours}-s1", theirs))
        assert all(torch.equal(a[key], b[key]) for key in a)

    # A run without the snapshots is named, with the way out.
    with pytest.raises(common.InputError, match="lacks the snapshots.*--kd"):
        denoise_gradients.main([*flags, "--seeds", "1", "--teacher", "teacher", "--kd", "kd"])


@pytest.mark.parametrize("flags, message", [
    (["--variants-at", "33"], "--variants-at 33 is not measured"),
    (["--points", "5"], "too few"),
    (["--teacher", "nowhere"], "nowhere is not a run folder"),
])
def test_denoise_bad_input_is_one_clear_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.InputError, match=message):
        denoise_gradients.main([*DENOISE, *flags])
