"""Gradient denoising: gradients by hand, unbiased estimates, the control, claims, and the script as it is run."""

import json
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import TINY, files_below, hashes, ok, run_cli, same_run
from torch import nn

import claims
import common
import denoise_gradients
import train_student
import train_teacher
from denoise_gradients import Points
from runs import InputError

# ---------------------------------------------------------------- losses and gradients


def setup(n=24, classes=10, width=0.25):
    """A small ResNet-8 in eval mode with lived-in batch norm, images, soft targets."""
    model = common.build_model("resnet8", classes, (8, 8, 1), width, "denoise test")
    random = torch.Generator().manual_seed(0)
    images = torch.randn(n, 1, 8, 8, generator=random)
    model.train()(images)
    targets = torch.softmax(torch.randn(n, classes, generator=random), 1)
    return model.eval(), images, targets


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_loss_has_the_gradient_of_kd_and_of_cross_entropy(temperature):
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    teacher, labels = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    loss = denoise_gradients.soft_loss(logits, F.softmax(teacher / temperature, 1), temperature).mean()
    kd_loss = common.kd_loss(logits, teacher, temperature)
    torch.testing.assert_close(torch.autograd.grad(loss, logits), torch.autograd.grad(kd_loss, logits))
    one_hot = denoise_gradients.soft_loss(logits, F.one_hot(labels, 5).double(), 1.0)
    torch.testing.assert_close(one_hot, F.cross_entropy(logits, labels, reduction="none"))


def test_per_example_gradients_of_a_linear_softmax_model_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    images, target, T = torch.randn(5, 1, 2, 2), torch.softmax(torch.randn(5, 3), 1), 2.5
    weight, bias = denoise_gradients.per_example_gradients(model, images, target, T)
    error = T * (torch.softmax(model(images) / T, 1) - target).detach()  # d/dz of T²·CE(q, softmax(z/T))
    torch.testing.assert_close(weight.view(5, 3, 4), error[:, :, None] * images.view(5, 1, 4))
    torch.testing.assert_close(bias, error)


def test_stream_equals_one_example_at_a_time():
    model, images, targets = setup()
    rows = []
    for k in range(24):
        loss = denoise_gradients.soft_loss(model(images[k : k + 1]), targets[k : k + 1], 3.0).sum()
        rows.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
    plain, weights = torch.stack(rows), torch.rand(3, 24)
    found = denoise_gradients.stream(model, images, targets, 3.0, weights, chunk=7)
    wanted = plain.mean(0), plain.square().sum(1), plain @ plain.mean(0), weights @ plain
    for ours, theirs in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4 * float(theirs.abs().max()))


def test_groups_are_quarters_and_labels_and_none_is_empty():
    data = common.load_data("digits", label_noise=0.95, subset=100)
    args = SimpleNamespace(batch_size=16, batches=2, held_out=50)
    flipped = torch.nonzero(data.y_train != data.y_clean)[:8, 0]  # by chance no clean one
    points = denoise_gradients.points_of(args, 0, data, flipped, np.arange(8.0))
    assert list(points.groups) == [*denoise_gradients.QUARTERS, "flipped labels"]
    assert points.groups["hardest quarter"].tolist() == [True] * 2 + [False] * 6 and len(points.held_out[0]) == 50


def test_smoothing_matches_the_entropy():
    labels = torch.tensor([2, 0])
    for alpha in (0.001, 0.3, 0.9):
        targets = denoise_gradients.smoothed(labels, 10, alpha)
        assert targets.argmax(1).tolist() == [2, 0] and targets.sum(1).tolist() == pytest.approx([1, 1])
        # logits whose softmax at T = 2 these targets are
        assert denoise_gradients.matched_smoothing(2 * targets.log(), 2.0) == pytest.approx(alpha, rel=1e-4)
    assert denoise_gradients.matched_smoothing(torch.zeros(2, 10), 1.0) == pytest.approx(1.0, abs=1e-6)
    assert denoise_gradients.matched_smoothing(1e4 * F.one_hot(labels, 10), 1.0) == 0.0


# ---------------------------------------------------------------- measuring


def test_noise_scale_is_unbiased_and_agrees_with_brute_force():
    random = np.random.default_rng(0)
    mean, sigma, n = np.array([1.0, 0, 0, 0]), np.array([2.0, 1, 1, 0.5]), 8
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
    brute_trace, brute_signal = (small - big) / (1 / 2 - 1 / 32), (32 * big - 2 * small) / 30
    scale = denoise_gradients.noise_scale((points**2).sum(1).mean(), (points.mean(0) ** 2).sum(), 4000)[2]
    assert scale == pytest.approx(brute_trace / brute_signal, rel=0.05)
    assert denoise_gradients.noise_scale(5.0, 0.0, 10)[2] == denoise_gradients.UNRESOLVED * 10


def test_batches_are_means_over_their_own_points():
    groups = {"few": np.arange(50) < 5, "rest": np.arange(50) >= 5}
    weights, rows = denoise_gradients.batch_weights(groups, 32, 6, torch.Generator().manual_seed(0))
    assert set(rows) == {*denoise_gradients.BATCH_SIZES, 32, "few", "rest"}
    assert sum(len(weights[row]) for row in rows.values()) == len(weights)
    torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
    for key, row in rows.items():
        if key in groups:
            assert not weights[row][:, ~groups[key]].any()
        else:
            counts = weights[row] * key
            torch.testing.assert_close(counts, counts.round())


def test_measure_against_the_whole_gradient_matrix():
    model, images, targets = setup(n=40)
    one_hot = F.one_hot(torch.arange(40) % 10, 10).float()
    groups = {"first": np.arange(40) < 10, "others": np.arange(40) >= 10}
    weights, rows = denoise_gradients.batch_weights(groups, 16, 4, torch.Generator().manual_seed(1))
    held_out = images[:20] + 0.1, one_hot[:20]
    points = Points(images, held_out, groups, weights, rows, 16)
    result = denoise_gradients.measure(model, points, {"kd": (targets, 2.0)})["kd"]
    g = torch.cat(denoise_gradients.per_example_gradients(model, images, targets, 2.0), 1).double()
    G, spread = g.mean(0), (g - g.mean(0)).square().sum(1)
    assert result["trace"] == pytest.approx(float(spread.sum() / 39), rel=1e-3)
    assert result["noise_scale"] == pytest.approx(result["trace"] / float(G @ G - spread.sum() / 39 / 40), rel=1e-2)
    share = result["deviation"] / result["deviation"].sum()
    np.testing.assert_allclose(share, (spread / spread.sum()).numpy(), rtol=1e-2)
    parts = 0.25 * result["noise first"] + 0.75 * result["noise others"]
    assert parts == pytest.approx(result["noise_scale"], rel=1e-4)
    h = denoise_gradients.mean_gradient(model, *held_out, 1.0)
    steps = F.normalize(weights[rows[16]] @ g.float(), dim=1)
    assert result["first_order"] == pytest.approx(float((steps @ h / h.norm()).mean()), abs=1e-4)
    # which is what a short step really gives
    start, labels = model(held_out[0]), held_out[1].argmax(1)
    torch.nn.utils.vector_to_parameters(
        torch.nn.utils.parameters_to_vector(model.parameters()) - 1e-2 * steps[0], model.parameters()
    )
    fall = F.cross_entropy(start, labels) - F.cross_entropy(model(held_out[0]), labels)
    assert fall.item() == pytest.approx(1e-2 * float(steps[0] @ h), rel=0.1, abs=1e-4)


# ---------------------------------------------------------------- claims


def seed_of(noise):
    """What is kept of a seed: noise {loss: [8]} at every checkpoint, all else equal; points 0, 1 are the hardest."""
    statistics = {}
    for loss, values in noise.items():
        values = np.array(values, float)
        statistics[loss] = dict(noise_scale=values.mean(), deviation=values, first_order=0.1)
        statistics[loss] |= {f"cos_held_out {group}": 0.2 for group in denoise_gradients.QUARTERS}
    table = {run: {percent: statistics for percent in ("0", "100")} for run in denoise_gradients.LOSSES}
    reductions = denoise_gradients.point_reductions(table)
    return dict(table=table, x=np.arange(8.0), gap=np.arange(8.0), reductions=reductions)


def test_claims_tell_where_the_reduction_is():
    seed = seed_of(dict(onehot=[10, 10, 2, 2, 2, 2, 2, 2], kd=[1, 1, 2, 2, 2, 2, 2, 1.5], smooth=[1] * 8))
    assert denoise_gradients.compare(seed, "onehot")["i"] > 0 > denoise_gradients.compare(seed, "smooth")["ii"]
    assert denoise_gradients.compare(seed, "onehot")["iii"] == 0
    assert denoise_gradients.compare_hardest(seed)["i"] > 0
    everywhere = seed_of(dict(onehot=[3] * 8, kd=[1] * 8, smooth=[1] * 8))
    increase = seed_of(dict(onehot=[3, 3, 1, 1, 1, 1, 1, 1], kd=[1, 1, 3, 3, 3, 3, 3, 3], smooth=[1] * 8))
    assert denoise_gradients.compare_hardest(everywhere)["ii"] < 0
    assert denoise_gradients.compare_hardest(increase)["i"] < 0


# ---------------------------------------------------------------- the script

SHARED = ["--width", "0.25", "--subset", "200", "--epochs", "2", "--device", "cpu", "--quiet"]
DENOISE = [*SHARED, "--batches", "2"]
FLAGS = [*DENOISE, "--percents", "25", "50", "--points", "80", "--held-out", "100"]
FIGURE = {"denoise.png", "denoise.pdf", "denoise.json", "claims.json", "claims.md"}


def names_below(folder):
    return {file.name for file in folder.iterdir()}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A folder in which the script has run for seeds 0 and 1, one process each."""
    folder = tmp_path_factory.mktemp("denoise")
    ok(run_cli("denoise_gradients.py", *FLAGS, "--seeds", 0, 1, "--jobs", 2, cwd=folder))
    return folder


def test_figure_statistics_and_claims(finished):
    out = finished / "results/denoise"
    assert names_below(out) == {*FIGURE, "seeds"}
    assert names_below(out / "seeds") == {"denoise-s0.json", "denoise-s1.json"}
    result = json.loads((out / "denoise.json").read_text())
    assert "80 of 200 training images" in result["gradients"]
    assert result["accuracy"].keys() == {"teacher", "onehot", "kd", "smooth"}
    assert result["tables"].keys() == {"onehot", "kd", "smooth"}
    assert result["tables"]["kd"].keys() == {"0", "25", "50", "100"}
    table = json.loads((out / "claims.json").read_text())
    assert len(table) == 14 and {row["verdict"] for row in table} <= {"holds", "fails", "unclear", "mixed"}
    (headline,) = claims.headlines(table)
    assert headline["section"] == "§5" and headline["shown"].endswith(" of 3")


def test_second_call_only_draws_and_other_settings_are_refused(finished, monkeypatch, capsys):
    monkeypatch.chdir(finished)
    out = finished / "results/denoise"
    # The picture holds the command.
    before = {path: content for path, content in files_below(out).items() if path.suffix != ".png"}
    monkeypatch.setattr(denoise_gradients, "measure", None)  # calling it would fail
    denoise_gradients.main([*FLAGS, "--seeds", "0", "1"])
    assert capsys.readouterr().out.count("is finished already") == 8
    assert before.items() <= files_below(out).items()
    with pytest.raises(InputError, match=r"denoise-s0.json was made with other settings \(batches\)"):
        denoise_gradients.main([*FLAGS, "--seeds", "0", "1", "--batches", "3"])


def test_runs_are_those_of_the_training_scripts(finished, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    train_teacher.main([*SHARED, "--seeds", "1", "--out", "teacher"])
    train_student.main([*SHARED, "--seeds", "1", "--teacher", "teacher", "--out", "kd"])
    assert same_run(finished / "runs/digits-resnet8-denoise-teacher-s1", "teacher")
    assert same_run(finished / "runs/digits-resnet8-denoise-kd-s1", "kd")
    # A run without the snapshots is named, with the way out.
    train_student.main([*SHARED, "--seeds", "1", "--kd-weight", "0", "--ce-weight", "1", "--out", "x-onehot-s1"])
    with pytest.raises(InputError, match="x-onehot-s1/snapshot-.* does not exist: .* --snapshot-at 0.25 0.5"):
        denoise_gradients.main([*FLAGS, "--seeds", "1", "--teacher", "teacher", "--out", "x"])


def test_shard_draws_nothing_and_overwrite_starts_afresh(finished, tmp_path, monkeypatch):
    shutil.copytree(finished, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    out, seeds = tmp_path / "new", ["--seeds", "0", "1", "--results", "new"]
    denoise_gradients.main([*FLAGS, *seeds, "--shard", "1/2"])
    assert names_below(out) == {"seeds"} and names_below(out / "seeds") == {"denoise-s1.json"}
    kept = json.loads((out / "seeds/denoise-s1.json").read_text())
    again = json.loads((tmp_path / "results/denoise/seeds/denoise-s1.json").read_text())
    assert kept["result"] == again["result"]
    # What is kept, and the runs of this seed, are made again, those of the other seed are not touched.
    (out / "seeds/denoise-s1.json").write_text("damaged")
    other = hashes(tmp_path / "runs/digits-resnet8-denoise-kd-s0")
    (tmp_path / "runs/digits-resnet8-denoise-kd-s1/metrics.jsonl").write_text("damaged")
    denoise_gradients.main([*FLAGS, *seeds, "--shard", "1/2", "--overwrite"])
    assert json.loads((out / "seeds/denoise-s1.json").read_text())["result"] == again["result"]
    assert hashes(tmp_path / "runs/digits-resnet8-denoise-kd-s0") == other


def test_state_of_another_model_is_named(finished, tmp_path, monkeypatch):
    shutil.copytree(finished / "runs", tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    torch.save({"model": {}}, next((tmp_path / "runs/digits-resnet8-denoise-kd-s0").glob("snapshot-*.pt")))
    with pytest.raises(InputError, match="snapshot-.*does not fit resnet8"):
        denoise_gradients.main([*FLAGS, "--seeds", "0"])


def test_flag_of_a_fork_reaches_all_runs(tmp_path, monkeypatch):
    def with_more(parser, add_student_flags=train_student.add_student_flags):
        add_student_flags(parser)
        parser.add_argument("--logit-weight", type=float, default=0.0)

    monkeypatch.chdir(tmp_path)
    for module in (train_student, denoise_gradients):
        monkeypatch.setattr(module, "add_student_flags", with_more)
    monkeypatch.setattr(denoise_gradients, "measurements", lambda *_: {})
    monkeypatch.setattr(denoise_gradients, "denoise_claims", lambda *_: [])
    denoise_gradients.main([*DENOISE, "--seeds", "0", "1", "--shard", "0/2", "--logit-weight", "0.5"])
    for what in denoise_gradients.LOSSES:
        config = json.loads((tmp_path / f"runs/digits-resnet8-denoise-{what}-s0/config.json").read_text())
        weights = [config["flags"][name] for name in ("logit_weight", "kd_weight", "ce_weight")]
        assert weights == [0.5, what == "kd", what != "kd"]


# ---------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--points", "5"], "too few"),
        (["--kd-weight", "0.5"], "--kd-weight follows from the kind of run"),
        (["--out", "x-s{seed}"], "--out is a prefix here"),
        (["--teacher", "nowhere"], "nowhere is not a run folder"),
    ],
)
def test_bad_input_is_one_clear_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        denoise_gradients.main([*DENOISE, *flags])
    assert not names_below(tmp_path)


def test_bad_input_discards_nothing_even_with_overwrite(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("kd", "onehot"):
        shutil.copytree(tiny_runs / "runs" / f"{name}-s0", f"x-{name}-s0")
    before = files_below(tmp_path)
    given = ["--teacher", str(tiny_runs / "runs/teacher-s0"), "--out", "x", "--seeds", "0"]
    with pytest.raises(InputError, match="was trained on data"):
        denoise_gradients.main([*TINY, *given, "--overwrite", "--label-noise", "0.1"])
    with pytest.raises(InputError, match="would discard this command's teacher"):
        denoise_gradients.main([*TINY, "--teacher", "x-kd-s0", "--out", "x", "--seeds", "0", "--overwrite"])
    assert files_below(tmp_path) == before


@pytest.mark.parametrize("flag", ["--out", "--results"])
def test_place_that_cannot_be_written_is_named(tmp_path, monkeypatch, flag):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("mine")
    with pytest.raises(OSError) as error:
        denoise_gradients.main([*DENOISE, flag, "file/x"])
    assert "file/x" in str(error.value) and (tmp_path / "file").read_text() == "mine"
