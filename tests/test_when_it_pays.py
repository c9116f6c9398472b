"""when_it_pays.py: teachers stopped on the way, their students, and what is measured of both."""

import itertools

import claims
import runs
import when_it_pays

import numpy as np
import pytest
import torch
from helpers import TINY, ok, one_line_error, refused, run_cli


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pays")
    flags = [*TINY, "--stop-at", 0.5, 1, "--bootstrap", 200]
    ok(run_cli("when_it_pays.py", *flags, "--seeds", 1, "--train-only", cwd=folder))
    assert len(list((folder / "runs").iterdir())) == 4 and not list((folder / "results" / "pays").iterdir())
    return folder, ok(run_cli("when_it_pays.py", *flags, "--seeds", 0, 1, cwd=folder))


def test_students_learn_from_states_of_one_teacher_run(finished):
    folder, _ = finished
    found = sorted(run.name for run in (folder / "runs").iterdir())
    wanted = itertools.product(("kd", "kd-of-0.5", "onehot", "teacher"), (0, 1))
    assert found == sorted(f"digits-resnet8-{name}-s{seed}" for name, seed in wanted)
    teacher = folder / "runs" / "digits-resnet8-teacher-s0"
    step = runs.read_metrics(teacher)[-1]["step"] // 2
    weights = [runs.load_checkpoint(teacher / name)["model"] for name in (f"snapshot-{step}.pt", "checkpoint.pt")]
    assert not torch.equal(weights[0]["fc.weight"], weights[1]["fc.weight"])
    for name, state in zip(("kd-of-0.5", "kd"), weights, strict=True):
        student = folder / "runs" / f"digits-resnet8-{name}-s0"
        assert runs.read_config(student)["facts"]["teacher_sha256"] == runs.weights_hash(state)
        assert runs.read_metrics(student)[-1]["epoch"] == 2  # in full length


def test_measures_are_those_of_the_runs(finished):
    folder, output = finished
    rows = runs.read_json(folder / "results" / "pays" / "pays.json")["rows"]
    assert [row["share"] for row in rows] == [0.5, 1]
    accuracies = {}
    for name in ("teacher", "kd", "onehot"):
        lines = [runs.read_metrics(folder / "runs" / f"digits-resnet8-{name}-s{seed}")[-1] for seed in (0, 1)]
        accuracies[name] = np.array([line["test_acc"] for line in lines])
    assert rows[1]["lead"]["seeds"] == pytest.approx(accuracies["kd"] - accuracies["teacher"])
    assert rows[1]["gain"]["value"] == pytest.approx((accuracies["kd"] - accuracies["onehot"]).mean())
    teachers = [folder / "runs" / f"digits-resnet8-teacher-s{seed}" for seed in (0, 1)]
    half = [runs.read_metrics(run)[0]["test_acc"] for run in teachers]  # its state at 0.5 is that after one epoch
    assert rows[0]["teacher_accuracy"]["seeds"] == pytest.approx(half)
    assert rows[1]["teacher_accuracy"]["seeds"] == pytest.approx(accuracies["teacher"])
    assert abs(np.array(half) - accuracies["teacher"]).min() > 0
    assert (folder / "results" / "pays" / "pays.png").exists() and "rises with the teacher's fit" in output
    found = runs.read_json(folder / "results" / "pays" / "claims.json")
    (row,) = claims.headlines(found)
    assert row["section"] == "title" and row["claim"].startswith("the student's lead over its own teacher")


def test_a_teacher_without_the_state_is_named(finished, monkeypatch):
    folder, _ = finished
    process = run_cli("when_it_pays.py", *TINY, "--seeds", 0, 1, "--stop-at", 0.34, 0.5, 0.95, 1, cwd=folder)
    one_line_error(process, "lacks its state at 0.34 of", "0.25 0.34 0.5")  # 0.95 rounds to the last step
    monkeypatch.chdir(folder)
    assert "--kd-weight: 0 is outside" in refused(when_it_pays, *TINY, "--kd-weight", 0)


def test_a_lead_that_rises_because_the_teacher_gets_worse_is_as_the_control():
    rng = np.random.default_rng(0)
    points = claims.resampled_sums((rng.random((400, 1)) < 0.8).astype(float), 200, rng)[:, 0] / 400

    def draws(teacher, student):
        found = {name: [points] for name in when_it_pays.MEASURES}
        found.update(lead=[points + student - teacher], control_lead=[points - teacher], gain=[0 * points + student])
        return found

    for student, verdict in ((0.0, "as the control"), (0.1, "holds")):
        found = when_it_pays.pays_claims(draws(0.8, 0.0), draws(0.7, student))
        assert found[0]["verdict"] == verdict and "points" in found[0]["control"]
        assert len(found) == 5
    assert len(when_it_pays.pays_claims(*[draws(0.7, 0.1)] * 2)) == 2  # one teacher alone
