"""switch_distill.py: its branches against the same runs from scratch, its measures, its report, and bad input."""

import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    TINY,
    Crash,
    Malicious,
    Reached,
    hashes,
    input_error,
    ok,
    one_line_error,
    run_cli,
    same_run,
    weights_and_metrics,
    write_arrays,
)

import claims
import common
import engine
import runs
import switch_distill
import train_student
import train_teacher

FOUR = [*TINY, "--epochs", "4"]
SWITCH = [*FOUR, "--switch-at", "0", "0.3", "0.5", "1", "--bootstrap", "100"]  # 16 steps; 0.3 is inside epoch 2
BRANCHES = [f"{direction}-{s}" for direction in switch_distill.SWITCHES for s in ("0.3", "0.5")]


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


def test_switched_weights_are_abrupt_or_linear_over_the_window():
    abrupt = switch_distill.switched_weights((1.0, 0.0), (0.0, 1.0), 10)
    assert [abrupt(step) for step in (0, 9, 10, 11)] == [(1, 0), (1, 0), (0, 1), (0, 1)]
    gradual = switch_distill.switched_weights((0.0, 2.0), (1.0, 0.0), 10, window=4)
    expected = {9: (0, 2), 10: (0, 2), 11: (0.25, 1.5), 13: (0.75, 0.5), 14: (1, 0), 99: (1, 0)}
    assert {step: gradual(step) for step in expected} == expected


def test_run_folders_are_the_trunks_at_both_ends():
    options = SimpleNamespace(direction=["onehot2kd", "kd2onehot"], window=7)
    folders, trunks = switch_distill.run_folders("runs/x", options, 3, {0: 0, 0.25: 4, 1: 16}, 16)
    assert trunks == {"onehot": Path("runs/x-onehot-s3"), "kd": Path("runs/x-kd-s3")}
    for direction, first, last in (("onehot2kd", "kd", "onehot"), ("kd2onehot", "onehot", "kd")):
        assert folders[direction, 0] == trunks[first] and folders[direction, 1] == trunks[last]
        assert folders[direction, 0.25] == Path(f"runs/x-{direction}-0.25-w7-s3")


def crash_in_every_branch(flags, monkeypatch):
    """Train as `flags` say, but with a crash in each branch once, and the same command again after it."""
    real, crashed = switch_distill.switched_weights, []

    def crashing(*switch):
        weights_at = real(*switch)

        def at(step):
            if step == 11 and switch not in crashed:  # inside the third epoch
                crashed.append(switch)
                raise Crash
            return weights_at(step)

        return at

    with monkeypatch.context() as patch:
        patch.setattr(switch_distill, "switched_weights", crashing)
        patch.setattr(engine, "SAVE_SECONDS", 0)  # a checkpoint after every step
        for _ in BRANCHES:
            with pytest.raises(Crash):
                call(switch_distill, *flags)
        call(switch_distill, *flags)
    assert len(crashed) == len(BRANCHES)


@pytest.mark.parametrize("window", [0, 5])
def test_a_branch_equals_the_same_run_from_scratch_also_across_a_resume(window, here, monkeypatch):
    call(train_teacher, *TINY, "--out", "t")
    flags = [*SWITCH, "--teacher", "t", "--window", window]
    call(switch_distill, *flags, "--out", "branched")
    # Trunks from train_student.py are accepted as they are; they keep no states, so the branches start from scratch.
    call(train_student, *FOUR, "--teacher", "t", "--out", "scratch-kd-s0")
    call(train_student, *FOUR, "--teacher", "t", "--kd-weight", 0, "--ce-weight", 1, "--out", "scratch-onehot-s0")
    trunks = {name: hashes(f"scratch-{name}-s0") for name in ("kd", "onehot")}
    call(switch_distill, *flags, "--out", "scratch")
    assert trunks == {name: hashes(f"scratch-{name}-s0") for name in trunks}
    crash_in_every_branch([*flags, "--out", "resumed"], monkeypatch)

    suffix = f"-w{window}" if window else ""
    names = ["kd", "onehot"] + [branch + suffix for branch in BRANCHES]
    for name in names:
        for way in ("scratch", "resumed"):
            assert same_run(f"branched-{name}-s0", f"{way}-{name}-s0"), (name, way)
    finals = [weights_and_metrics(f"branched-{name}-s0")[0]["fc.weight"] for name in names]
    assert not any(torch.equal(a, b) for k, a in enumerate(finals) for b in finals[:k])
    lines = weights_and_metrics(f"branched-onehot2kd-0.5{suffix}-s0")[1]
    assert [line["kd_weight"] for line in lines][:2] == [0, 0] and lines[-1]["kd_weight"] == 1
    config = runs.read_config(f"branched-kd2onehot-0.5{suffix}-s0")
    assert config["facts"]["switch"] == dict(direction="kd2onehot", step=8, window=window)
    assert (config["flags"]["ce_weight"], config["flags"]["kd_weight"]) == (1, 0)


def test_a_torn_state_is_passed_over_and_a_branch_starts_further_back(here, capsys):
    call(train_teacher, *TINY, "--out", "t")
    flags = [*SWITCH, "--teacher", "t", "--direction", "onehot2kd", "--out", "x"]
    call(switch_distill, *flags)
    trunk = Path("x-onehot-s0")
    assert switch_distill.latest_snapshot(trunk, 8).name == "snapshot-8.pt"
    assert switch_distill.latest_snapshot(trunk, 7).name == "snapshot-5.pt"
    assert switch_distill.latest_snapshot(trunk, 4) is None
    (trunk / "snapshot-8.pt").write_bytes((trunk / "snapshot-8.pt").read_bytes()[:200])
    Path("x-onehot2kd-0.5-s0").rename("kept")
    call(switch_distill, *flags)
    assert "snapshot-8.pt is damaged and not used" in capsys.readouterr().out
    assert same_run("x-onehot2kd-0.5-s0", "kept")


def test_shards_and_jobs_train_what_one_process_trains(here, monkeypatch, capsys):
    flags = [*TINY, "--seeds", 0, 1, "--switch-at", 0, 0.5, 1, "--direction", "onehot2kd", "--bootstrap", 100]
    for i in range(3):
        call(switch_distill, *flags, "--out", "shards", "--shard", f"{i}/3")
        output = capsys.readouterr().out
        assert ("no seed is left" in output) == (i == 2) and "this shard is trained" not in output  # with --quiet
        if not i:
            trained = {f"shards-{name}-s0" for name in ("teacher", "kd", "onehot", "onehot2kd-0.5")}
            assert {run.name for run in here.glob("shards-*")} == trained
    assert not list(here.rglob("claims.json"))
    before = {run: hashes(run) for run in here.glob("shards-*")}
    assert len(before) == 8
    call(switch_distill, *flags, "--out", "shards")
    assert capsys.readouterr().out.count("is finished already") == 8 and list(here.rglob("claims.json"))
    assert {run: hashes(run) for run in before} == before

    def run_jobs(args):  # with the processes of `engine.run_jobs` as calls
        if args.jobs > 1:
            assert not args.overwrite and runs.read_json("jobs-kd-s1/config.json") == runs.DISCARDED
            for i in range(2):
                call(switch_distill, *flags, "--out", "jobs", "--jobs", 1, "--shard", f"{i}/2")

    monkeypatch.setattr(engine, "run_jobs", run_jobs)
    shutil.copytree("shards-kd-s0", "jobs-kd-s1")
    call(switch_distill, *flags, "--out", "jobs", "--jobs", 2, "--overwrite")
    assert capsys.readouterr().out.count("is finished already") == 8
    assert all(same_run(run, run.name.replace("shards", "jobs")) for run in before)


def test_one_teacher_of_all_seeds_fills_one_table(here, monkeypatch):
    """And seeds with a teacher each keep the table of one at a time."""
    made, chosen, real = [], [], engine.teacher_source

    class Counted(engine.TeacherLogits):
        def __init__(self, *args):
            super().__init__(*args)
            made.append(args[3:])

    def source(args, data, students, streams, folder):
        chosen.append((students * args.epochs, streams * args.epochs))
        return real(args, data, students, streams, folder)

    def reached(*_):
        raise Reached

    monkeypatch.setattr(engine, "TeacherLogits", Counted)
    monkeypatch.setattr(engine, "teacher_source", source)
    monkeypatch.setattr(engine, "load_teacher", lambda run, data: torch.nn.Linear(1, 1))
    monkeypatch.setattr(switch_distill, "train_teacher", lambda *_: None)
    monkeypatch.setattr(switch_distill, "train_student", lambda *_, **__: None)
    monkeypatch.setattr(switch_distill, "switch_table", reached)
    flags = [*TINY, "--seeds", 0, 1, 2, "--switch-at", 0, 0.5, 0.75, 1, "--out", "folder/x"]
    for words, models, students, streams in (  # epochs of students of one teacher, and those that differ in views
        (["--teacher", "t"], 1, 6 * 1.75, 6),
        (["--teacher", "t{seed}"], 3, 2 * 1.75, 2),
        ([], 3, 2 * 1.75, 2),
        (["--direction", "kd2onehot"], 3, 2, 2),
    ):
        made.clear()
        with pytest.raises(Reached):
            call(switch_distill, *flags, *words)
        assert made == [("epochs" if streams < students else "live", Path("folder/teacher-logits"))] * models
        assert chosen.pop() == (students, streams)


# ---------------------------------------------------------------- measures


def test_switch_report_over_seeds_and_teachers(tmp_path):
    flags = [*SWITCH, "--seeds", 0, 1]
    output = ok(run_cli("switch_distill.py", *flags, cwd=tmp_path))
    folder, results = tmp_path / "runs", tmp_path / "results" / "fig1b"
    report = runs.read_json(results / "switch.json")
    assert "2 seeds, each with its own teacher" in report["intervals"]
    assert "switch.md" in output and "Intervals: 95%" in (results / "switch.md").read_text()
    rows = {(row["direction"], row["s"]): row for row in report["rows"]}
    assert len(rows) == 8

    def accuracy(name):
        found = [runs.last_metrics(folder / f"digits-resnet8-{name}-s{seed}")["test_acc"] for seed in (0, 1)]
        return np.mean(found)

    for direction, pure in (("onehot2kd", ("kd", "onehot")), ("kd2onehot", ("onehot", "kd"))):
        for s, name in ((0, pure[0]), (0.3, f"{direction}-0.3"), (1, pure[1])):
            measured = rows[direction, s]["accuracy"]
            assert measured["value"] == pytest.approx(accuracy(name))
            assert measured["low"] < accuracy(name) < measured["high"]
            assert rows[direction, s]["difference"]["value"] == pytest.approx(accuracy(name) - accuracy("onehot"))
    assert len(list(folder.glob("digits-*"))) == 2 * (3 + 4)
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
    row = switch_distill.recovered(sums_of(rng, 4, 0.7, 0.7, 0.7))
    assert row["recovered"] is None and row["reason"] == "gain too small to divide"
    row = switch_distill.recovered(sums_of(rng, 4, 0.8, 0.7, 0.75))
    assert row["recovered"] is None and row["reason"] == "KD loses accuracy here"


@pytest.mark.parametrize(
    "onehot2kd, kd2onehot, kd, verdicts",
    [
        (0.79, 0.72, 0.80, ["holds", "holds", "holds"]),
        (0.72, 0.79, 0.80, ["holds", "fails", "fails"]),
        (0.70, 0.70, 0.70, ["unclear", "unclear", "unclear"]),
    ],
)
def test_switch_claims_follow_the_recovered_share(onehot2kd, kd2onehot, kd, verdicts):
    rng, rows = np.random.default_rng(0), []
    below = {"student-control": {"low_gap": dict(value=-1, low=-2, high=-0.5)}}
    for direction, switched in (("onehot2kd", onehot2kd), ("kd2onehot", kd2onehot)):
        measured = switch_distill.recovered(sums_of(rng, 5, 0.70, kd, switched, 4000))
        rows.append(dict(measured, direction=direction, s=0.5, deviation=dict(train=below, test=below)))
    found = switch_distill.switch_claims(rows)
    assert [row["verdict"] for row in found] == verdicts + ["holds", "holds"]
    marked = claims.headlines(found)
    assert [row["verdict"] for row in marked] == verdicts and marked[0]["shown"].endswith(" points")
    assert not claims.headlines(switch_distill.switch_claims(rows, section=None))


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


def test_bad_switches_get_one_line(here):
    assert "--kd-weight 0" in input_error(switch_distill, *TINY, "--kd-weight", 0)
    assert "prefix" in input_error(switch_distill, *TINY, "--out", "q{seed}")
    assert "not a run folder" in input_error(switch_distill, *TINY, "--teacher", "absent")
    for words in (["--switch-at", 1.5], ["--direction", "sideways"], ["--window", -1]):
        with pytest.raises(SystemExit):
            call(switch_distill, *TINY, *words)
    for flag, value in (("--results", "/proc/r"), ("--results", "/dev/null/x"), ("--out", "/dev/null/x")):
        one_line_error(run_cli("switch_distill.py", *TINY, flag, value, cwd=here), value)
    assert not Path("runs").exists()


def test_bad_input_discards_nothing_even_with_overwrite(tiny_runs, here, monkeypatch):
    for name in ("teacher", "kd", "onehot"):
        shutil.copytree(tiny_runs / "runs" / f"{name}-s0", f"x-{name}-s0")
    write_arrays("other.npz", side=8, channels=1)
    before, over = {run: hashes(run) for run in here.glob("x-*")}, [*TINY, "--overwrite", "--out", "x"]
    teacher = ["--teacher", tiny_runs / "runs" / "teacher-s0"]
    assert "--batch-size" in input_error(switch_distill, *over, "--batch-size", 1)
    assert "would discard this command's teacher" in input_error(switch_distill, *over, "--teacher", "x-kd-s0")
    other = [*over, *teacher, "--data", "npz:other.npz", "--subset", 0]
    assert "was trained on data" in input_error(switch_distill, *other)
    monkeypatch.setattr(common, "free_memory", lambda device: 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    assert "--teacher-cache on" in input_error(switch_distill, *over, "--teacher-cache", "on")
    assert {run: hashes(run) for run in here.glob("x-*")} == before


def test_a_malicious_state_never_runs(tiny_runs, here):
    state = runs.load_checkpoint(tiny_runs / "runs" / "kd-s0" / "checkpoint.pt")
    state["model"]["fc.bias"] = Malicious()
    Path("trunk").mkdir()
    torch.save(state, "trunk/snapshot-4.pt")
    assert switch_distill.latest_snapshot(Path("trunk"), 9) is None
    shutil.copytree(tiny_runs / "runs" / "teacher-s0", "teacher")
    shutil.copy("trunk/snapshot-4.pt", "teacher/checkpoint.pt")
    assert "damaged" in input_error(switch_distill, *TINY, "--teacher", "teacher", "--out", "never")
    assert not Path("ran").exists() and not list(here.glob("never*"))
