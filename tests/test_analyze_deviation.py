"""analyze_deviation.py: Figure 1a from run folders and from files of logits, and bad input."""

import os
import shutil
from pathlib import Path

import analyze_deviation
import deviation
import runs

import numpy as np
import pytest
import scipy.special
from helpers import finished, input_error, ok, refused, run_cli, run_process
from PIL import Image


def names_of(tiny_runs):
    """The tiny run folders of both seeds by their flags."""
    folders = {"--teacher": "teacher", "--student": "kd", "--control": "onehot"}
    return {flag: [tiny_runs / "runs" / f"{run}-s{seed}" for seed in (0, 1)] for flag, run in folders.items()}


def words_of(names):
    """A command line of these {flag: run folders}."""
    words = []
    for flag, folders in names.items():
        words += [flag, *folders]
    return words


def test_figure_1a_from_runs_and_from_files_agree(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = names_of(tiny_runs)
    words = words_of({flag: folders[:1] for flag, folders in names.items()})
    output = ok(run_cli("analyze_deviation.py", *words, "--bootstrap", 200, "--out", "one", cwd=tmp_path))
    expected = "claims.json claims.md deviation.json fig1a.json fig1a.pdf fig1a.png statistics.md"
    assert sorted(file.name for file in Path("one").iterdir()) == expected.split()
    assert "figure: one/fig1a.png" in output and "| train: slope of the student's fit exceeds 1 |" in output
    assert Image.open("one/fig1a.png").size[0] > 800

    monkeypatch.setattr(deviation, "plot", lambda *_: None)
    teacher, student, control = (f"{names[flag][0]}/logits.npz" for flag in names)
    np.save("s.npy", np.load(student)["test_logits"])
    words = ["--teacher-logits", f"{teacher}:test_logits", "--student-logits", "s.npy"]
    words += ["--control-logits", f"{control}:test_logits", "--labels", f"{teacher}:test_labels"]
    finished(analyze_deviation, *words, "--bootstrap", 200, "--out", "files")
    one, from_files = (runs.read_json(f"{name}/deviation.json") for name in ("one", "files"))
    assert from_files["tables"] == {"test": one["tables"]["test"]}

    words = words_of(names)
    finished(analyze_deviation, *words, "--bootstrap", 200, "--out", "two")
    two = runs.read_json("two/deviation.json")
    slope = two["tables"]["train"]["predicted"]["student"]["slope"]
    assert two["seeds"] == 2 and "each with its own teacher" in two["intervals"]
    assert slope["value"] == pytest.approx(np.mean(slope["seeds"])) and slope["seeds"][0] != slope["seeds"][1]
    assert slope["seeds"][0] == pytest.approx(one["tables"]["train"]["predicted"]["student"]["slope"]["value"])


@pytest.fixture
def files(tmp_path, monkeypatch):
    """Flags that name files of logits of a teacher, a student like it and the labels, in the working folder."""
    monkeypatch.chdir(tmp_path)
    rng = np.random.default_rng(3)
    labels = rng.integers(0, 6, 60)
    teacher = rng.normal(size=(60, 6)) + 3 * np.eye(6)[labels]
    for name, array in dict(t=teacher, s=teacher + 0.5 * rng.normal(size=teacher.shape), y=labels).items():
        np.save(f"{name}.npy", array)
    return ["--teacher-logits", "t.npy", "--student-logits", "s.npy", "--labels", "y.npy", "--bootstrap", 100]


def test_a_backend_from_the_environment_does_not_matter(files, tmp_path, monkeypatch):
    """As a notebook leaves it to what it starts."""
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    ok(run_process("analyze_deviation.py", *files, cwd=tmp_path))
    assert Path("results/fig1a/fig1a.png").exists()


def test_odd_names_reach_figures_and_tables(files, tmp_path):
    """Bytes that are no UTF-8, line breaks and what matplotlib takes for a formula."""
    odd = "\udcff\n$x^{ \\frac π | `"
    os.rename("t.npy", "t\udcff.npy")
    words = ["--teacher-logits", "t\udcff.npy", "--title", odd, "--split", f"{odd}${odd}", "--out", "r\udcff"]
    ok(run_cli("analyze_deviation.py", *files, *words, cwd=tmp_path))
    assert len(list(Path("r\udcff").iterdir())) == 7


def test_rows_in_another_order_stop_the_claims(files):
    finished(analyze_deviation, *files, "--out", "good")
    assert len(runs.read_json("good/claims.json")) > 2
    np.save("s.npy", np.roll(np.load("s.npy"), 1, axis=0))
    output = finished(analyze_deviation, *files, "--out", "rolled")
    (row,) = runs.read_json("rolled/claims.json")
    assert "no claims: student agrees with the labels on" in output and row["verdict"] == "unclear"


def test_bad_logits_get_one_line(files):
    """What `runs.read_array`, `check_logits` and `check_labels` refuse is tested with them."""
    student = np.load("s.npy")
    np.save("short.npy", student[:40])
    np.save("flat.npy", np.zeros((60, 6)))
    np.save("p.npy", scipy.special.softmax(student, 1))
    cases = [
        ("--student-logits", "short.npy", "short.npy is [40, 6]"),
        ("--student-logits", "p.npy", "p.npy has probabilities"),
        ("--student-logits", "./t.npy", "given twice"),
        ("--control-logits", "s.npy", "given twice"),
        ("--labels", "t.npy", "t.npy is float64 [60, 6]: it must hold 60 integers"),
        ("--teacher-logits", "absent.npy", "absent.npy does not exist"),
        ("--teacher-logits", "flat.npy", "equally confident"),
        ("--control", "x", "give either"),
    ]
    for flag, value, message in cases:
        assert message in input_error(analyze_deviation, *files, "--out", "never", flag, value)
    assert "--teacher-logits, --student-logits and --labels are needed together" in input_error(
        analyze_deviation, *files[:4]
    )
    assert "give either" in input_error(analyze_deviation)
    assert not Path("never").exists()


def test_bad_run_folders_get_one_line(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = names_of(tiny_runs)
    teacher, student, other = (names[flag][0] for flag in names)
    second = names["--student"][1]
    for name in ("torn", "unfinished", "relabelled"):
        shutil.copytree(student, name)
    shutil.copytree(other, "wide")
    config = runs.read_config("wide")
    runs.write_json("wide/config.json", dict(config, seed=5, flags=dict(config["flags"], width=2.0)))
    Path("unfinished/logits.npz").unlink()
    Path("torn/logits.npz").write_bytes(Path("torn/logits.npz").read_bytes()[:2000])
    arrays = runs.read_npz("relabelled/logits.npz")
    np.savez("relabelled/logits.npz", **dict(arrays, test_labels=(arrays["test_labels"] + 1) % 10))
    cases = [
        (["--student", teacher], "different runs"),
        (["--student", student, student], "is named twice"),
        (["--student", second], "was not distilled from"),
        (["--student", other, "--control", student], "was not distilled from"),
        (["--student", student, "--control", second], "was distilled: the control is a one-hot network"),
        (["--student", student, "--control", "wide"], "differ in width: the control is the student's network"),
        (["--student", student, "--control", "unfinished/../" + os.path.relpath(student)], "different runs"),
        (["--student", "absent"], "absent is not a run folder"),
        (["--student", "torn"], "torn/logits.npz cannot be read"),
        (["--student", "unfinished"], "unfinished is not finished"),
        (["--student", "relabelled"], "have different test labels"),
        (["--student", student, other, "torn", "--control", "unfinished", "relabelled"], "cannot be paired"),
    ]
    for words, message in cases:
        assert message in input_error(analyze_deviation, "--teacher", teacher, *words, "--out", "never")
    names["--control"].reverse()
    words = words_of(names)
    assert "differ in seed" in input_error(analyze_deviation, *words, "--out", "never")
    assert not Path("never").exists()


def test_students_of_other_settings_or_of_one_seed_are_not_pooled(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = names_of(tiny_runs)
    teacher, student = names["--teacher"][0], names["--student"][0]
    for name, seed, flag, switch in (("warm", 1, 2.0, None), ("twin", 0, 4.0, None), ("late", 1, 4.0, dict(step=4))):
        shutil.copytree(student, name)
        config = runs.read_config(name)
        config["flags"]["temperature"] = flag
        config["facts"]["switch"] = switch
        runs.write_json(f"{name}/config.json", dict(config, seed=seed))
    refusals = dict(
        warm="warm differ in temperature: several students", twin="have the same seed", late="differ in loss"
    )
    for name, message in refusals.items():
        assert message in refused(analyze_deviation, "--teacher", teacher, "--student", student, name, "--out", "never")
    shutil.copytree(names["--control"][0], "slow")
    config = runs.read_config("slow")
    data = dict(config["data"], sha256="other")
    runs.write_json("slow/config.json", dict(config, flags=dict(config["flags"], lr=1e-5), data=data))
    line = refused(analyze_deviation, "--teacher", teacher, "--student", student, "--control", "slow", "--out", "never")
    assert "differ in lr, data: the control is the student's network and recipe" in line


def test_one_teacher_and_one_control_serve_several_seeds(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(deviation, "plot", lambda *_: None)
    names = names_of(tiny_runs)
    shutil.copytree(names["--student"][0], "second")  # of the same teacher
    runs.write_json("second/config.json", dict(runs.read_config("second"), seed=1))
    words = ["--teacher", names["--teacher"][0], "--student", names["--student"][0], "second"]
    finished(analyze_deviation, *words, "--control", names["--control"][0], "--bootstrap", 100, "--out", "r")
    assert runs.read_json("r/deviation.json")["seeds"] == 2


def test_agreement_by_chance_is_told_apart():
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 4, 1000)
    agreed, chance, above = runs.agreement(np.where(rng.random(1000) < 0.3, labels, 0), labels, 4)
    assert agreed == pytest.approx(0.475, abs=0.05) and chance == pytest.approx(0.25, abs=0.02) and above
    assert not runs.agreement(rng.integers(0, 4, 1000), labels, 4)[2]
