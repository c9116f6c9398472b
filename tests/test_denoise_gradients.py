"""Gradient denoising: gradients by hand, unbiased estimates, claims, and the script as it is run."""

import json
import shutil
from types import SimpleNamespace

import claims
import common
import denoise_gradients
import deviation
import runs
from denoise_gradients import Points
from runs import InputError

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import files_below, ok, refused, run_cli, same_run
from torch import nn

# ---------------------------------------------------------------- gradients


def setup(n=24, classes=10, width=0.25):
    """A small ResNet-8 in eval mode with lived-in batch norm, images, soft targets."""
    model = common.build_model("resnet8", classes, (8, 8, 1), width, "denoise test")
    random = torch.Generator().manual_seed(0)
    images = torch.randn(n, 1, 8, 8, generator=random)
    model.train()(images)
    targets = torch.softmax(torch.randn(n, classes, generator=random), 1)
    return model.eval(), images, targets


def test_per_example_gradients_of_a_linear_softmax_model_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    images = torch.randn(5, 1, 2, 2)
    target = torch.softmax(torch.randn(5, 3), 1)
    T = 2.5
    weight, bias = denoise_gradients.per_example_gradients(model, images, target, T)
    error = T * (torch.softmax(model(images) / T, 1) - target).detach()  # d/dz of T²·CE(q, softmax(z/T))
    torch.testing.assert_close(weight.view(5, 3, 4), error[:, :, None] * images.view(5, 1, 4))
    torch.testing.assert_close(bias, error)


def test_stream_equals_one_example_at_a_time():
    model, images, targets = setup()
    rows = []
    for k in range(24):
        loss = common.soft_loss(model(images[k : k + 1]), targets[k : k + 1], 3.0).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    plain = torch.stack(rows)
    weights = torch.rand(3, 24)
    found = denoise_gradients.stream(model, images, targets, 3.0, weights, chunk=7)
    wanted = plain.mean(0), plain.square().sum(1), plain @ plain.mean(0), weights @ plain
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


# ---------------------------------------------------------------- measuring


def test_noise_scale_is_unbiased_and_agrees_with_brute_force():
    random = np.random.default_rng(0)
    mean = np.array([1.0, 0, 0, 0])
    sigma = np.array([2.0, 1, 1, 0.5])
    n = 8
    g = mean + sigma * random.normal(size=(20000, n, 4))
    square_of_mean = (g.mean(1) ** 2).sum(-1)
    pairs = zip((g**2).sum(-1).mean(1), square_of_mean, strict=True)
    trace, signal = np.mean([denoise_gradients.noise_scale(a, b, n)[:2] for a, b in pairs], axis=0)
    assert trace == pytest.approx((sigma**2).sum(), rel=0.02)
    assert signal == pytest.approx(1.0, abs=0.05) and square_of_mean.mean() > 1.7  # the plain ‖mean‖² is far off
    # Brute force: E‖batch mean‖² = ‖G‖² + tr(Σ)/B at two batch sizes gives both unknowns.
    points = mean + sigma * random.normal(size=(4000, 4))

    def square_of_batch_mean(size):
        return np.mean([(points[random.integers(4000, size=size)].mean(0) ** 2).sum() for _ in range(20000)])

    small, big = square_of_batch_mean(2), square_of_batch_mean(32)
    brute_trace = (small - big) / (1 / 2 - 1 / 32)
    brute_signal = (32 * big - 2 * small) / 30
    scale = denoise_gradients.noise_scale((points**2).sum(1).mean(), (points.mean(0) ** 2).sum(), 4000)[2]
    assert scale == pytest.approx(brute_trace / brute_signal, rel=0.05)
    assert denoise_gradients.noise_scale(5.0, 0.0, 10)[2] == denoise_gradients.UNRESOLVED * 10


def test_batches_are_means_over_drawn_points():
    weights = denoise_gradients.batch_weights(50, 32, 6, torch.Generator().manual_seed(0))
    torch.testing.assert_close(weights.sum(1), torch.ones(6))
    torch.testing.assert_close(weights * 32, (weights * 32).round())


def test_measure_against_the_whole_gradient_matrix():
    model, images, targets = setup(n=40)
    one_hot = F.one_hot(torch.arange(40) % 10, 10).float()
    quarter = np.arange(40) // 10
    weights = denoise_gradients.batch_weights(40, 16, 4, torch.Generator().manual_seed(1))
    held_out = images[:20] + 0.1, one_hot[:20]
    points = Points(images, held_out, quarter, weights)
    result = denoise_gradients.measure(model, points, {"kd": (targets, 2.0)})["kd"]
    g = torch.cat(denoise_gradients.per_example_gradients(model, images, targets, 2.0), 1).double()
    G = g.mean(0)
    spread = (g - g.mean(0)).square().sum(1)
    assert result["trace"] == pytest.approx(float(spread.sum() / 39), rel=1e-3)
    assert result["noise_scale"] == pytest.approx(result["trace"] / float(G @ G - spread.sum() / 39 / 40), rel=1e-2)
    share = result["deviation"] / result["deviation"].sum()
    np.testing.assert_allclose(share, (spread / spread.sum()).numpy(), rtol=1e-2)
    parts = [result[f"noise {name}"] for name in denoise_gradients.QUARTERS]
    assert np.mean(parts) == pytest.approx(result["noise_scale"], rel=1e-4)
    assert parts[0] == pytest.approx(result["deviation"][:10].mean(), rel=1e-4)
    h = denoise_gradients.mean_gradient(model, *held_out, 1.0)
    steps = F.normalize(weights @ g.float(), dim=1)
    assert result["first_order"] == pytest.approx(float((steps @ h / h.norm()).mean()), abs=1e-4)
    # which is what a short step really gives
    start = model(held_out[0])
    labels = held_out[1].argmax(1)
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(model.parameters()) - 1e-2 * steps[0], model.parameters()
    )
    fall = F.cross_entropy(start, labels) - F.cross_entropy(model(held_out[0]), labels)
    assert fall.item() == pytest.approx(1e-2 * float(steps[0] @ h), rel=0.1, abs=1e-4)


# ---------------------------------------------------------------- claims


def seed_of(scales, reductions):
    """What is kept of a seed: noise scales {loss: number} at every checkpoint, all else equal; reductions of points.

    On the hardest quarter one-hot has three times its noise on the others, another loss twice.
    """
    statistics = {loss: dict(noise_scale=scale, first_order=0.1) for loss, scale in scales.items()}
    for loss, of_loss in statistics.items():
        hard = 3 if loss == "onehot" else 2
        parts = zip(denoise_gradients.QUARTERS, (hard, 1, 1, 1), strict=True)
        of_loss.update({f"noise {name}": of_loss["noise_scale"] * part for name, part in parts})
    table = {run: {percent: statistics for percent in ("0", "100")} for run in denoise_gradients.LOSSES}
    x = [0, 1, 2, 3, 5, 4, 7, 6]
    accuracy = dict(onehot=0.7, kd=0.8, smooth=0.75)
    return dict(table=table, x=x, gap=list(range(8)), reductions=dict(shared=reductions), accuracy=accuracy)


def test_comparisons_are_positive_where_kd_is_less_noisy():
    seed = seed_of(dict(onehot=10.0, kd=2.0, smooth=1.0), [0.0] * 8)
    with_onehot, with_smooth = (denoise_gradients.compare(seed, "kd", other) for other in ("onehot", "smooth"))
    assert with_onehot["i"] == with_onehot["ii"] == pytest.approx(np.log(5)) and with_onehot["iii"] == 0
    assert with_smooth["i"] == with_smooth["ii"] == pytest.approx(-np.log(2))


@pytest.mark.parametrize("smooth, verdict, held", [(9.9, "holds", "0 of 3"), (2.0, "as the control", "2 of 3")])
def test_what_smoothed_labels_do_too_is_as_the_control(smooth, verdict, held):
    scales = [dict(onehot=10.0 + k / 10, kd=2.0 + k / 100, smooth=smooth + k % 2 / 5) for k in range(5)]
    found = denoise_gradients.denoise_claims([seed_of(of_seed, [0.0] * 7 + [1.0]) for of_seed in scales])
    assert found[1]["verdict"] == found[3]["verdict"] == verdict and found[0]["control"] == held
    (hard,) = [row for row in found if "hardest quarter" in row["claim"]]
    assert hard["verdict"] == "as the control" and hard["section"] == "§5"  # by the same factor, whatever its scale
    assert hard["measured"] == pytest.approx(np.log(1.5))
    (gain,) = [row for row in found if "more accurate" in row["claim"]]
    assert gain["measured"] == pytest.approx(0.05) and gain["verdict"] == "holds" and gain["section"] == "§3.2"


def test_link_is_a_rank_correlation_with_the_confidence_taken_out():
    falling = denoise_gradients.link(seed_of(dict(kd=1.0), [8.0, 7, 6, 5, 4, 3, 2, -9]))
    assert falling["plain"] == pytest.approx(-1)
    random = np.random.default_rng(0)
    x = random.normal(size=4000)
    gap = x + random.normal(size=4000)
    reduction = -x + random.normal(size=4000)  # linked to the gap by x alone
    found = denoise_gradients.link(dict(x=x, gap=gap, reductions=dict(shared=reduction)))
    assert found["plain"] < -0.4 and abs(found["given_x"]) < 0.05


# ---------------------------------------------------------------- the script

SHARED = ["--width", "0.25", "--subset", "200", "--epochs", "2", "--device", "cpu", "--quiet"]
DENOISE = [*SHARED, "--batches", "2"]
FLAGS = [*DENOISE, "--percents", "25", "50", "--points", "80", "--held-out", "100"]
FIGURE = {"denoise.png", "denoise.pdf", "denoise.json", "claims.json", "claims.md"}


def names_below(folder):
    return {file.name for file in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the script has run for seeds 0 and 1: first the runs of 0 alone, then all."""
    folder = tmp_path_factory.mktemp("denoise")
    ok(run_cli("denoise_gradients.py", *FLAGS, "--seeds", 0, "--train-only", cwd=folder))
    assert names_below(folder / "results/denoise") == {"seeds"}
    assert names_below(folder / "results/denoise/seeds") == {"denoise-s0.json"}
    ok(run_cli("denoise_gradients.py", *FLAGS, "--seeds", 0, 1, cwd=folder))
    return folder


def test_figure_statistics_and_claims(finished):
    out = finished / "results/denoise"
    assert names_below(out) == {*FIGURE, "seeds"}
    assert names_below(out / "seeds") == {"denoise-s0.json", "denoise-s1.json"}
    result = json.loads((out / "denoise.json").read_text())
    assert "80 of 200 training images" in result["gradients"]
    assert result["tables"].keys() == {"onehot", "kd", "smooth"}
    assert result["tables"]["kd"].keys() == {"0", "25", "50", "100"}
    table = json.loads((out / "claims.json").read_text())
    assert len(table) == 11
    gain, headline, on_hard_points = claims.headlines(table)
    ends = {}
    for run in (finished / "runs").glob("*-s?"):
        ends[run.name] = runs.read_metrics(run)[-1]["test_acc"]
    of_seeds = [ends[f"digits-resnet8-denoise-kd-s{k}"] - ends[f"digits-resnet8-denoise-smooth-s{k}"] for k in (0, 1)]
    assert gain["section"] == "§3.2" and gain["measured"] == pytest.approx(np.mean(of_seeds))
    assert headline["section"] == on_hard_points["section"] == "§5"
    assert headline["shown"].endswith(" of 3") and headline["control"].endswith(" of 3")
    assert "hardest quarter" in on_hard_points["claim"] and on_hard_points["control"]


def test_points_and_reductions_are_those_of_the_runs(finished):
    kept = json.loads((finished / "results/denoise/seeds/denoise-s0.json").read_text())["result"]
    files = [finished / f"runs/digits-resnet8-denoise-{what}-s0/logits.npz" for what in ("teacher", "kd")]
    teacher, student = (runs.read_npz(file)["train_logits"] for file in files)
    x, y = (deviation.phi_of_class(logits, teacher.argmax(1)) for logits in (teacher, student))
    chosen = [int(abs(x - value).argmin()) for value in kept["x"]]
    assert len(set(chosen)) == 80 and np.allclose(x[chosen], kept["x"], atol=1e-4)
    assert np.allclose((y - x)[chosen], kept["gap"], atol=1e-3)
    falls = []
    for at in denoise_gradients.shared_checkpoints(kept["table"]):
        one_hot, kd = at["onehot"]["noise_scale"], at["kd"]["noise_scale"]
        falls.append((one_hot - kd) / (one_hot + kd))
    assert np.mean(kept["reductions"]["shared"]) == pytest.approx(np.mean(falls), abs=1e-4)


def test_the_hardest_quarter_has_the_lowest_confidence():
    data = common.load_data("digits", subset=40)
    x = np.random.default_rng(0).normal(size=40)
    args = SimpleNamespace(batch_size=8, batches=2, held_out=10)
    points = denoise_gradients.points_of(args, 0, data, torch.arange(40), x)
    parts = [x[points.quarter == k] for k in range(4)]
    assert [len(part) for part in parts] == [10] * 4
    assert all(low.max() < high.min() for low, high in zip(parts, parts[1:], strict=False))


def test_second_call_only_draws_and_other_settings_are_refused(finished, monkeypatch):
    monkeypatch.chdir(finished)
    # The picture holds the command.
    before = {path: content for path, content in files_below(finished).items() if path.suffix != ".png"}
    denoise_gradients.main([*FLAGS, "--seeds", "0", "1"])
    assert before.items() <= files_below(finished).items()  # also the seconds that each seed took
    with pytest.raises(InputError, match=r"denoise-s0.json was made with other settings \(batches\)"):
        denoise_gradients.main([*FLAGS, "--seeds", "0", "1", "--batches", "3"])


def test_smoothed_labels_are_learned_as_softly_as_the_teacher_at_this_temperature(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "runs", "runs")
    config = runs.read_config("runs/digits-resnet8-denoise-smooth-s0")
    teacher = runs.load_checkpoint("runs/digits-resnet8-denoise-teacher-s0/checkpoint.pt")["model"]
    assert config["facts"]["teacher_sha256"] == runs.weights_hash(teacher) and config["facts"]["temperature"] == 4
    rows = [json.loads((finished / f"results/denoise/seeds/denoise-s{seed}.json").read_text()) for seed in (0, 1)]
    for seed, kept in enumerate(rows):
        logits = runs.read_npz(f"runs/digits-resnet8-denoise-teacher-s{seed}/logits.npz")["train_logits"]
        wanted = torch.special.entr(F.softmax(torch.from_numpy(logits) / 4, 1)).sum(1).mean().item()
        target = common.smoothed(torch.tensor([3]), 10, kept["result"]["smoothing"])
        assert torch.special.entr(target).sum().item() == pytest.approx(wanted, rel=1e-4)
    message = refused(denoise_gradients, *FLAGS, "--temperature", 2)
    assert "holds a run with other settings" in message


def test_teachers_from_elsewhere(finished, tmp_path, monkeypatch):
    """A run folder gives the same runs, bit for bit; logits alone are enough, since gradients need no teacher."""
    monkeypatch.chdir(tmp_path)
    given = finished / "runs/digits-resnet8-denoise-teacher-s1"
    flags = [*FLAGS, "--seeds", "1", "--train-only"]
    denoise_gradients.main([*flags, "--teacher", str(given), "--out", "run/x", "--results", "run"])
    assert not (tmp_path / "run/x-teacher-s1").exists()
    for what in denoise_gradients.LOSSES:
        assert same_run(finished / f"runs/digits-resnet8-denoise-{what}-s1", f"run/x-{what}-s1")

    labels = torch.from_numpy(runs.read_npz(given / "logits.npz")["train_labels"])
    np.save("logits.npy", 4 * common.smoothed(labels, 10, 0.3).log())  # softmax at T = 4: labels smoothed by 0.3
    denoise_gradients.main([*flags, "--teacher-logits", "logits.npy", "--out", "logits/x", "--results", "logits"])
    by_run, by_logits = (runs.read_json(f"{name}/seeds/denoise-s1.json")["result"] for name in ("run", "logits"))
    assert by_logits["smoothing"] == pytest.approx(0.3, rel=1e-4)
    by_run, by_logits = (found["table"]["onehot"]["0"] for found in (by_run, by_logits))
    for name in ("trace", "signal", "noise_scale", "first_order"):
        assert by_run["onehot"][name] == by_logits["onehot"][name]
        # Here the teacher's targets are the smoothed labels.
        assert by_logits["kd"][name] == pytest.approx(by_logits["smooth"][name], rel=1e-3, abs=1e-4)
        assert by_logits["kd"][name] != by_run["kd"][name]


def test_runs_and_states_that_do_not_fit_are_named(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished / "runs", "runs")
    lost = tmp_path / "runs/digits-resnet8-denoise-onehot-s0"
    for file in lost.glob("snapshot-*.pt"):
        file.unlink()
    with pytest.raises(InputError, match="onehot-s0/snapshot-.* does not exist: .* --snapshot-at 0.25 0.5"):
        denoise_gradients.main([*FLAGS, "--seeds", "0", "--results", "new"])
    shutil.copytree(finished / "runs" / lost.name, lost, dirs_exist_ok=True)
    for file in (tmp_path / "runs/digits-resnet8-denoise-kd-s0").glob("snapshot-*.pt"):
        torch.save({"model": {}}, file)
    with pytest.raises(InputError, match="snapshot-.*does not fit resnet8"):
        denoise_gradients.main([*FLAGS, "--seeds", "0", "--results", "new"])
    # Afresh, with what is kept of the seed.
    (tmp_path / "new/seeds/denoise-s0.json").write_text("damaged")
    denoise_gradients.main([*FLAGS, "--seeds", "0", "--results", "new", "--overwrite"])
    assert same_run(finished / "runs/digits-resnet8-denoise-kd-s0", "runs/digits-resnet8-denoise-kd-s0")


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--points", 5], "too few"),
        (["--kd-weight", 0.5], "leave --kd-weight and --ce-weight out"),
        (["--teacher", "nowhere"], "nowhere is not a run folder"),
        (["--teacher", "a", "--teacher-logits", "b"], "give one of --teacher"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(denoise_gradients, *DENOISE, *flags)
    assert not (tmp_path / "runs").exists()
