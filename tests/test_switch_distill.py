"""switch_distill.py: its branches against the same runs from scratch, its measures, its figure, and bad input."""

import shutil
from pathlib import Path

import claims
import denoise_gradients
import engine
import runs
import switch_distill
import train_student
import train_teacher
import when_it_pays

import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    Crash,
    hashes,
    input_error,
    ok,
    refused,
    run_cli,
    same_run,
    weights_and_metrics,
    write_arrays,
)

FOUR = [*TINY, "--epochs", "4", "--snapshot-at"]  # no states but those of the switches
SWITCH = [*FOUR, "--switch-at", "0", "0.3", "0.5", "1", "--bootstrap", "100"]  # 16 steps; 0.3 is inside epoch 2
NAMES = ["kd", "onehot", "onehot2kd-0.3", "onehot2kd-0.5", "kd2onehot-0.3", "kd2onehot-0.5"]


def call(script, *words):
    script.main([str(word) for word in words])


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder, and no time for figures."""
    monkeypatch.chdir(tmp_path)
    for name in ("plot_switches", "plot_curves"):
        monkeypatch.setattr(switch_distill, name, lambda *_: None)
    return tmp_path


# ---------------------------------------------------------------- runs


def crash_in_every_branch(flags, monkeypatch):
    """Train as `flags` say, but with a crash in each branch once, and the same command again after it."""
    real = engine.train_student
    crashed = []

    def train_student(run, *args, weights_at=None, **more):
        def crashing(step):
            if step == 11 and run not in crashed:  # inside the third epoch
                crashed.append(run)
                raise Crash
            return weights_at(step)

        real(run, *args, weights_at=crashing if weights_at else None, **more)

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_student", train_student)
        patch.setattr(engine, "SAVE_SECONDS", 0)  # a checkpoint after every step
        for _ in NAMES[2:]:
            with pytest.raises(Crash):
                call(switch_distill, *flags)
        call(switch_distill, *flags)
    assert len(crashed) == len(NAMES[2:])


def test_a_branch_equals_the_same_run_from_scratch_also_across_a_resume(here, monkeypatch):
    call(train_teacher, *TINY, "--out", "t")
    flags = [*SWITCH, "--teacher", "t", "--train-only"]
    call(switch_distill, *flags, "--out", "branched")
    # Trunks from train_student.py are accepted as they are; they keep no states, so the branches start from scratch.
    call(train_student, *FOUR, "--teacher", "t", "--out", "scratch-kd-s0")
    call(train_student, *FOUR, "--teacher", "t", "--kd-weight", 0, "--ce-weight", 1, "--out", "scratch-onehot-s0")
    trunks = {name: hashes(f"scratch-{name}-s0") for name in ("kd", "onehot")}
    assert not list(here.glob("scratch-*/snapshot*"))
    call(switch_distill, *flags, "--out", "scratch")
    assert trunks == {name: hashes(f"scratch-{name}-s0") for name in trunks}
    crash_in_every_branch([*flags, "--out", "resumed"], monkeypatch)

    for name in NAMES:
        for way in ("scratch", "resumed"):
            assert same_run(f"branched-{name}-s0", f"{way}-{name}-s0"), (name, way)
    finals = [weights_and_metrics(f"branched-{name}-s0")[0]["fc.weight"] for name in NAMES]
    for k, final in enumerate(finals):
        assert not any(torch.equal(final, other) for other in finals[:k])
    # The line of an epoch has the weights of its last step: the switches come before the steps 5 and 8.
    for name, kd_weights in (("onehot2kd-0.5", [0, 0, 1, 1]), ("kd2onehot-0.3", [1, 0, 0, 0])):
        lines = weights_and_metrics(f"branched-{name}-s0")[1]
        assert [line["kd_weight"] for line in lines] == kd_weights
        assert [line["ce_weight"] for line in lines] == [1 - weight for weight in kd_weights]
    config = runs.read_config("branched-kd2onehot-0.5-s0")
    assert config["facts"]["switch"] == dict(direction="kd2onehot", step=8)
    assert (config["flags"]["ce_weight"], config["flags"]["kd_weight"]) == (1, 0)


def test_a_branch_starts_at_the_latest_state_and_a_torn_one_is_refused(here):
    call(train_teacher, *TINY, "--out", "t")
    flags = [*SWITCH, "--teacher", "t", "--direction", "onehot2kd", "--out", "x", "--train-only"]
    call(switch_distill, *flags)
    trunk = Path("x-onehot-s0")
    assert switch_distill.latest_snapshot(trunk, 8).name == "snapshot-8.pt"
    assert switch_distill.latest_snapshot(trunk, 7).name == "snapshot-5.pt"
    assert switch_distill.latest_snapshot(trunk, 4) is None
    (trunk / "snapshot-8.pt").write_bytes((trunk / "snapshot-8.pt").read_bytes()[:200])
    Path("x-onehot2kd-0.5-s0").rename("kept")
    line = input_error(switch_distill, *flags)
    assert "x-onehot-s0/snapshot-8.pt cannot be read" in line and "remove x-onehot-s0 and train it again" in line
    (trunk / "snapshot-8.pt").unlink()
    call(switch_distill, *flags)
    assert same_run("x-onehot2kd-0.5-s0", "kept")


@pytest.mark.parametrize("splits", [["train", "test"], ["train"]])
def test_teachers_from_elsewhere_serve_the_whole_figure(splits, here):
    """Weights, and logits, which are of training points alone; no run folder has a teacher that is drawn."""
    call(train_teacher, *TINY, "--epochs", 8, "--width", 1, "--out", "t")
    torch.save(runs.load_checkpoint("t/checkpoint.pt")["model"], "t.pth")
    teacher = ["--teacher-logits", "t/logits.npz:train_logits"]
    if "test" in splits:
        teacher = ["--teacher", "t.pth", "--teacher-arch", "resnet8"]
    call(switch_distill, *SWITCH, *teacher, "--seeds", 0, 1, "--out", "x")
    assert sorted(run.name for run in here.glob("x-*-s1")) == sorted(f"x-{name}-s1" for name in NAMES)
    found = runs.read_json("results/fig1b/switch.json")
    assert "one teacher for all" in found["intervals"] and len(found["rows"]) == 8
    assert all(list(row["deviation"]) == splits for row in found["rows"])


# ---------------------------------------------------------------- measures


def test_seeds_are_trained_one_by_one_and_drawn_together(tmp_path):
    """As the workflow does: --train-only draws nothing, and the call that draws trains nothing."""
    folder = tmp_path / "runs"
    results = tmp_path / "results" / "fig1b"
    for seed in (0, 1):
        ok(run_cli("switch_distill.py", *SWITCH, "--seeds", seed, "--train-only", cwd=tmp_path))
        assert len(list(folder.glob("digits-*"))) == (seed + 1) * (3 + 4)
    before = {run: hashes(run) for run in folder.glob("*")}
    assert not results.exists()
    output = ok(run_cli("switch_distill.py", *SWITCH, "--seeds", 0, 1, cwd=tmp_path))
    assert {run: hashes(run) for run in folder.glob("*")} == before
    report = runs.read_json(results / "switch.json")
    assert "each with its own teacher" in report["intervals"]
    assert "switch.md" in output and "Intervals: 95%" in (results / "switch.md").read_text()
    rows = {(row["direction"], row["s"]): row for row in report["rows"]}
    assert len(rows) == 8

    def accuracy(name):
        found = [runs.read_metrics(folder / f"digits-resnet8-{name}-s{seed}")[-1]["test_acc"] for seed in (0, 1)]
        return np.mean(found)

    for direction, pure in (("onehot2kd", ("kd", "onehot")), ("kd2onehot", ("onehot", "kd"))):
        for s, name in ((0, pure[0]), (0.3, f"{direction}-0.3"), (1, pure[1])):
            measured = rows[direction, s]["accuracy"]
            assert measured["value"] == pytest.approx(accuracy(name))
            assert rows[direction, s]["difference"]["value"] == pytest.approx(accuracy(name) - accuracy("onehot"))
    for ending in ("png", "pdf"):
        assert {f.stem for f in results.glob(f"*.{ending}")} == {"fig1b", "fig1b_curves"}
    assert "KD is more accurate than one-hot" in (results / "claims.md").read_text()


def sums_of(rng, seeds, onehot, kd, switched, n=2000):
    """What accuracy_sums returns for students of known accuracy that err on nested sets of points."""
    out = []
    for _ in range(seeds):
        luck = rng.random(n)[:, None]
        correct = (luck < np.array([switched, onehot, kd])).astype(float)
        out.append(claims.resampled_sums(correct, 300, rng) / n)
    return out


def test_recovered_share_of_known_accuracies():
    rng = np.random.default_rng(0)
    row = switch_distill.recovered(sums_of(rng, 4, onehot=0.70, kd=0.80, switched=0.775))
    share = row["recovered"]
    assert share["low"] < 0.75 < share["high"] and share["high"] - share["low"] < 0.3
    assert row["accuracy"]["value"] == pytest.approx(0.775, abs=0.02)
    assert row["gain"]["value"] == pytest.approx(0.1, abs=0.02)
    for kd, reason in ((0.8, "gain too small to divide"), (0.7, "KD loses accuracy here")):
        row = switch_distill.recovered(sums_of(rng, 4, 0.8, kd, 0.75))
        assert row["recovered"] is None and row["reason"] == reason


@pytest.mark.parametrize(
    "onehot2kd, kd2onehot, kd, verdicts",
    [
        (0.79, 0.72, 0.80, ["holds", "holds", "holds"]),
        (0.72, 0.79, 0.80, ["holds", "fails", "fails"]),
        (0.70, 0.70, 0.70, ["unclear", "unclear", "unclear"]),
    ],
)
def test_switch_claims_follow_the_recovered_share(onehot2kd, kd2onehot, kd, verdicts):
    rng = np.random.default_rng(0)
    rows = []
    below = {
        "student": dict(low_below=dict(value=0.7, low=0.6, high=0.8)),
        "control": dict(low_below=dict(value=0.4, low=0.3, high=0.5)),
        "student-control": dict(low_below=dict(value=0.3, low=0.1, high=0.5)),
    }
    for direction, switched in (("onehot2kd", onehot2kd), ("kd2onehot", kd2onehot)):
        measured = switch_distill.recovered(sums_of(rng, 5, 0.70, kd, switched, 4000))
        rows.append(dict(measured, direction=direction, s=0.5, deviation=dict(train=below, test=below)))
    found = switch_distill.switch_claims(rows)
    assert [row["verdict"] for row in found] == verdicts + ["holds", "holds"]
    marked = claims.headlines(found)
    assert [row["verdict"] for row in marked] == verdicts and marked[0]["shown"].endswith(" points")


def test_curves_are_of_the_epochs_that_all_runs_have(tmp_path):
    for name, accuracies in (("a", {1: 0.5, 2: None, 3: 0.7}), ("b", {1: 0.7, 2: 0.1, 3: 0.9}), ("c", {1: None})):
        (tmp_path / name).mkdir()
        lines = [dict(epoch=epoch, **{"test_acc": value} if value else {}) for epoch, value in accuracies.items()]
        runs.write_metrics(tmp_path / name, lines)
    epochs, accuracy = switch_distill.curves([tmp_path / "a", tmp_path / "b"])
    assert epochs.tolist() == [1, 3] and accuracy == pytest.approx(np.array([[50, 70], [70, 90]]))
    with pytest.raises(runs.InputError, match="no epoch with a test_acc in all"):
        switch_distill.curves([tmp_path / "a", tmp_path / "c"])


# ---------------------------------------------------------------- bad input


def test_bad_switches_get_one_line_and_discard_nothing(tiny_runs, here):
    for name in ("teacher", "kd", "onehot"):
        shutil.copytree(tiny_runs / "runs" / f"{name}-s0", f"x-{name}-s0")
    write_arrays("other.npz", side=8, channels=1)
    before = {run: hashes(run) for run in here.glob("x-*")}
    over = [*TINY, "--overwrite", "--out", "x"]
    teacher = ["--teacher", tiny_runs / "runs" / "teacher-s0"]
    assert "--kd-weight: 0 is outside" in refused(switch_distill, *over, "--kd-weight", 0)
    assert "not a run folder" in input_error(switch_distill, *over, "--teacher", "absent")
    other = [*over, *teacher, "--data", "npz:other.npz", "--subset", 0]
    assert "was trained on data" in input_error(switch_distill, *other)
    with pytest.raises(SystemExit):
        call(switch_distill, *over, "--direction", "sideways")
    assert {run: hashes(run) for run in here.glob("x-*")} == before and not Path("runs").exists()


@pytest.mark.parametrize("module", [switch_distill, when_it_pays, denoise_gradients, train_student])
def test_all_run_folders_are_compared_before_the_first_training(module, tiny_runs, here):
    shutil.copytree(tiny_runs / "runs" / "onehot-s1", "x-onehot-s1")
    out = "x"
    flags = []
    if module is train_student:
        out = "x-onehot-s{seed}"
        flags = ["--kd-weight", 0, "--ce-weight", 1]
    line = refused(module, *TINY, *flags, "--seeds", 0, 1, "--out", out, "--epochs", 3)
    assert "x-onehot-s1 holds a run with other settings (flags.epochs: 2 there, 3 now" in line
    assert [path.name for path in here.glob("x*")] == ["x-onehot-s1"]
