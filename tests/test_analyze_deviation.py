"""analyze_deviation.py: its statistics against their definitions, its figure, and bad input."""

import json
import os
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import safetensors.torch
import scipy.special
import scipy.stats
import torch
from helpers import (
    Malicious,
    damage_to,
    fuzz,
    input_error,
    odd_arrays,
    ok,
    one_line_error,
    run_cli,
    run_process,
    valid_or_refused,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

import analyze_deviation
import claims
import engine
import runs
import switch_distill


def random_points(n=400, classes=6, seed=0, spread=2.0):
    rng = np.random.default_rng(seed)
    teacher = rng.normal(0, spread, (n, classes))
    labels = rng.integers(0, classes, n)
    student = teacher + rng.normal(0, 1, teacher.shape)
    return dict(
        teacher=teacher, labels=labels, networks=dict(student=student, control=rng.normal(0, spread, (n, classes)))
    )


def plain_statistics(x, y, low, high):
    """The statistics of one sample by their definitions, with scipy and numpy."""
    fit, low_fit = scipy.stats.linregress(x, y), scipy.stats.linregress(x[low], y[low])
    gaps = dict(low_gap=np.mean(y[low] - x[low]), high_gap=np.mean(y[high] - x[high]))
    below = np.mean(y[low] < x[low])
    return dict(gaps, slope=fit.slope, intercept=fit.intercept, low_slope=low_fit.slope, low_below=below)


def quarters(x):
    return x <= np.quantile(x, 0.25), x >= np.quantile(x, 0.75)


# ---------------------------------------------------------------- statistics


def test_phi_is_exact_for_saturated_and_ordinary_logits():
    z = np.array([[800.0, 0, 0], [-900.0, 5, 1], [1.0, 2, 0.5], [60, 0, -3]])
    phi = analyze_deviation.phi_of_class(z, np.array([0, 0, 1, 0]))
    assert np.allclose(phi[:2], [800 - np.log(2), -900 - np.log(np.exp(5) + np.e)])
    p = scipy.special.softmax(z[2])[1]
    assert np.isclose(phi[2], np.log(p / (1 - p)))


def test_statistics_match_their_definitions():
    from sklearn.metrics import accuracy_score, log_loss

    point = random_points()
    got = {key: values[0] for key, values in analyze_deviation.replicates(point, 100).items()}
    for kind, classes in (("predicted", point["teacher"].argmax(1)), ("label", point["labels"])):
        x = analyze_deviation.phi_of_class(point["teacher"], classes)
        for name in ("student", "control"):
            y = analyze_deviation.phi_of_class(point["networks"][name], classes)
            for key, value in plain_statistics(x, y, *quarters(x)).items():
                assert np.isclose(got[kind, name, key], value), (kind, name, key)
        difference = got[kind, "student", "slope"] - got[kind, "control", "slope"]
        assert np.isclose(got[kind, "student-control", "slope"], difference)
    p, q = (scipy.special.softmax(z, 1) for z in (point["teacher"], point["networks"]["student"]))
    confidence, correct, ece = q.max(1), q.argmax(1) == point["labels"], 0.0
    for b in range(15):
        inside = (confidence >= b / 15) & (confidence < (b + 1) / 15)
        ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean()) if inside.any() else 0
    expected = dict(
        accuracy=accuracy_score(point["labels"], q.argmax(1)),
        agreement=accuracy_score(p.argmax(1), q.argmax(1)),
        nll=log_loss(point["labels"], q, labels=range(6)),
        kl=scipy.stats.entropy(p, q, axis=1).mean(),
        ece=ece,
    )
    assert {key: got["fidelity", "student", key] for key in expected} == pytest.approx(expected)


def test_weighted_bootstrap_equals_a_plain_bootstrap():
    point = random_points(200)
    point["teacher"] = point["teacher"] + 1e5  # a common offset changes no probability and must cost no digits
    got = analyze_deviation.replicates(point, 130, np.random.default_rng(7))  # more than one chunk of draws
    classes, rng = point["teacher"].argmax(1), np.random.default_rng(7)
    x, y = (analyze_deviation.phi_of_class(z, classes) for z in (point["teacher"], point["networks"]["student"]))
    low, high = quarters(x)
    for b in range(1, 131):
        draw = rng.integers(200, size=200)
        for key, value in plain_statistics(x[draw], y[draw], low[draw], high[draw]).items():
            assert np.isclose(got["predicted", "student", key][b], value), (b, key)


def test_a_copy_of_the_teacher_has_no_deviation():
    point = random_points()
    point["networks"] = dict(student=point["teacher"] + 5.0)  # shifting all logits changes no probability
    got = analyze_deviation.replicates(point, 100)
    found = {key: got["predicted", "student", key][0] for key in ("slope", "low_slope", "low_gap", "high_gap")}
    assert found == pytest.approx(dict(slope=1, low_slope=1, low_gap=0, high_gap=0), abs=1e-9)


def test_selection_alone_puts_an_independent_network_below_the_diagonal_and_the_control_shows_it():
    rng = np.random.default_rng(9)
    truth = rng.normal(0, 1.5, (4000, 8))
    teacher, student, control = (truth + rng.normal(0, 1, truth.shape) for _ in range(3))
    point = dict(teacher=teacher, labels=truth.argmax(1), networks=dict(student=student, control=control))
    tables = dict(test=analyze_deviation.measure([point], 500))
    table = tables["test"]["predicted"]
    assert table["student"]["low_below"]["low"] > 0.5 and table["student"]["low_gap"]["high"] < 0
    assert table["student-control"]["low_gap"]["low"] < 0 < table["student-control"]["low_gap"]["high"]
    rows = {row["claim"]: row for row in analyze_deviation.deviation_claims(tables)}
    below = "test: most of the teacher's hardest quarter lies below y = x"
    assert rows[below]["verdict"] == "holds" and not rows[below]["note"]
    lower = "test: on the hardest quarter the student falls lower than the one-hot control"
    assert rows[lower]["verdict"] == "unclear"
    del point["networks"]["control"]
    alone = analyze_deviation.deviation_claims({split: analyze_deviation.measure([point], 100) for split in tables})
    assert len(alone) == 3 and "selection alone" in alone[0]["note"]


def test_headlines_stand_beside_the_control():
    table = analyze_deviation.measure([random_points()], 100)
    tables = dict(train=table, test=table)
    found = analyze_deviation.deviation_claims(tables)
    marked = claims.headlines(found)
    assert [row["claim"].partition(":")[0] for row in marked] == ["train", "train", "train", "test"]
    control = table["predicted"]["control"]
    expected = [claims.cell(control["slope"], 1, 2), claims.cell(control["low_below"], 100, 1) + " %", "", ""]
    assert [row["control"] for row in marked] == expected
    assert marked[1]["shown"].endswith(" %") and {row["section"] for row in marked} == {"§3.1"}
    (row,) = claims.headlines(analyze_deviation.deviation_claims(tables, "language"))
    assert row["section"] == "language" and "slope of the student's fit exceeds 1" in row["claim"]
    none = analyze_deviation.deviation_claims(tables, None)
    assert not claims.headlines(none) and [row["claim"] for row in none] == [row["claim"] for row in found]


def test_every_draw_is_counted_for_the_progress_bar():
    counted = []
    analyze_deviation.measure([random_points(50), random_points(50)], 150, done=counted.append)
    assert sum(counted) == 300 and max(counted) < 150


# ---------------------------------------------------------------- figure


def test_figure_1a_from_runs_and_from_files_agree(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = dict(teacher="teacher", student="kd", control="onehot")
    names = {role: [tiny_runs / "runs" / f"{run}-s{seed}" for seed in (0, 1)] for role, run in folders.items()}
    words = [word for role in names for word in (f"--{role}", names[role][0])]
    output = ok(run_cli("analyze_deviation.py", *words, "--bootstrap", 200, "--out", "one", cwd=tmp_path))
    expected = ["claims.json", "claims.md", "deviation.json", "fig1a.pdf", "fig1a.png", "statistics.md"]
    assert sorted(file.name for file in Path("one").iterdir()) == expected
    assert "figure: one/fig1a.png" in output and "| train: slope of the student's fit exceeds 1 |" in output
    assert Image.open("one/fig1a.png").size[0] > 800

    monkeypatch.setattr(analyze_deviation, "plot", lambda *_: None)
    files = {role: f"{names[role][0]}/logits.npz" for role in names}
    np.save("s.npy", np.load(files["student"])["test_logits"])
    words = ["--teacher-logits", f"{files['teacher']}:test_logits", "--student-logits", "s.npy"]
    words += ["--control-logits", f"{files['control']}:test_logits", "--labels", f"{files['teacher']}:test_labels"]
    analyze_deviation.main([*words, "--bootstrap", "200", "--out", "files"])
    one, from_files = (runs.read_json(f"{name}/deviation.json") for name in ("one", "files"))
    assert from_files["tables"] == {"test": one["tables"]["test"]}

    words = [str(word) for role in names for word in (f"--{role}", *names[role])]
    analyze_deviation.main([*words, "--bootstrap", "200", "--out", "two"])
    two = runs.read_json("two/deviation.json")
    slope = two["tables"]["train"]["predicted"]["student"]["slope"]
    assert two["seeds"] == 2 and two["intervals"] == "95%, over points and 2 seeds, each with its own teacher"
    assert slope["value"] == pytest.approx(np.mean(slope["seeds"])) and slope["seeds"][0] != slope["seeds"][1]
    assert slope["seeds"][0] == pytest.approx(one["tables"]["train"]["predicted"]["student"]["slope"]["value"])


def save_points(point):
    """t.npy, s.npy and y.npy in the working folder; returns the flags that name them."""
    for name, array in dict(t=point["teacher"], s=point["networks"]["student"], y=point["labels"]).items():
        np.save(f"{name}.npy", array)
    return ["--teacher-logits", "t.npy", "--student-logits", "s.npy", "--labels", "y.npy"]


def test_a_backend_from_the_environment_does_not_matter(tmp_path, monkeypatch):
    """As a notebook leaves it to what it starts."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "module://matplotlib_inline.backend_inline")
    ok(run_process("analyze_deviation.py", *save_points(random_points(40)), "--bootstrap", 100, cwd=tmp_path))
    assert Path("results/fig1a/fig1a.png").exists()


def test_odd_names_reach_figures_and_tables(tmp_path, monkeypatch):
    """Bytes that are no UTF-8, line breaks and what matplotlib takes for a formula."""
    monkeypatch.chdir(tmp_path)
    odd, words = "\udcff\n$x^{ \\frac π | `", save_points(random_points(40))
    os.rename("t.npy", "t\udcff.npy")
    words[1] = "t\udcff.npy"
    words += ["--bootstrap", "100", "--title", odd, "--split", f"{odd}${odd}", "--out", "r\udcff"]
    ok(run_cli("analyze_deviation.py", *words, cwd=tmp_path))
    assert len(list(Path("r\udcff").iterdir())) == 6


# ---------------------------------------------------------------- bad input


def test_bad_logits_get_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    point = random_points(50)
    good, teacher, labels = [*save_points(point), "--out", "never"], point["teacher"], point["labels"]
    np.save("short.npy", teacher[:40])
    np.save("flat.npy", np.zeros((50, 6)))
    np.save("nan.npy", np.where(np.arange(50)[:, None] == 7, np.nan, teacher))
    np.save("wide.npy", np.zeros((50, 7)))
    np.save("giant.npy", teacher * 1e160)
    np.save("y9.npy", labels + 9)
    np.save("yf.npy", labels / 2)
    np.save("text.npy", np.array(["a"] * 50))
    Path("torn.npy").write_bytes(Path("t.npy").read_bytes()[:300])
    np.savez("both.npz", a=teacher, b=teacher)
    Path("pickled.npy").write_bytes(pickle.dumps([1, 2]))
    cases = [
        ("--student-logits", "nan.npy", "nan.npy has NaN or infinite values (first in row 7)"),
        ("--student-logits", "short.npy", "short.npy is [40, 6]"),
        ("--student-logits", "wide.npy", "wide.npy is [50, 7]"),
        ("--student-logits", "giant.npy", "no logits"),
        ("--labels", "y9.npy", "y9.npy is int64 [50]: it must hold 50 integers within 0..5"),
        ("--labels", "yf.npy", "yf.npy"),
        ("--teacher-logits", "text.npy", "text.npy"),
        ("--teacher-logits", "torn.npy", "torn.npy cannot be read"),
        ("--teacher-logits", "both.npz", "both.npz:NAME"),
        ("--teacher-logits", "both.npz:c", "both.npz holds a, b"),
        ("--teacher-logits", "absent.npy", "absent.npy does not exist"),
        ("--teacher-logits", "pickled.npy", "pickled.npy"),
        ("--teacher-logits", "flat.npy", "equally confident"),
        ("--control", "x", "give either"),
    ]
    for flag, value, message in cases:
        assert message in input_error(analyze_deviation, *good, flag, value)
    assert "needs --student-logits and --labels" in input_error(analyze_deviation, *good[:4])
    for words in ((), (*good, "--teacher", "x", "--student", "y")):
        assert "give either" in input_error(analyze_deviation, *words)
    assert not Path("never").exists()
    for flag, value, word in (("--out", "/proc/figure", "/proc/figure"), ("--bootstrap", "1", "--bootstrap")):
        one_line_error(run_cli("analyze_deviation.py", *good, flag, value, cwd=tmp_path), word)


def test_bad_run_folders_get_one_line(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher, student, other = (tiny_runs / "runs" / f"{name}-s0" for name in ("teacher", "kd", "onehot"))
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
        (["--student", tiny_runs / "runs" / "kd-s1"], "was not distilled from"),
        (["--student", other, "--control", student], "was not distilled from"),
        (["--student", student, "--control", tiny_runs / "runs" / "kd-s1"], "was distilled: the control is"),
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
    teachers, students = ([tiny_runs / "runs" / f"{name}-s{seed}" for seed in (0, 1)] for name in ("teacher", "kd"))
    swapped = [tiny_runs / "runs" / f"onehot-s{seed}" for seed in (1, 0)]
    words = ["--teacher", *teachers, "--student", *students, "--control", *swapped, "--out", "never"]
    assert "differ in seed" in input_error(analyze_deviation, *words)
    assert not Path("never").exists()


def test_malicious_arrays_never_run(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = np.array([Malicious()] * 60, dtype=object)
    np.save("objects.npy", evil, allow_pickle=True)
    Path("plain.npy").write_bytes(pickle.dumps(Malicious()))
    shutil.copy("plain.npy", "plain.npz")
    np.savez("objects.npz", **{name: evil for name in (*engine.LOGITS, "x")})
    for file in ("objects.npy", "plain.npy", "plain.npz", "objects.npz:x"):
        words = [word for flag in ("--teacher-logits", "--student-logits", "--labels") for word in (flag, file)]
        assert file.split(":")[0] in input_error(analyze_deviation, *words)
    shutil.copytree(tiny_runs / "runs" / "kd-s0", "kd")
    shutil.copy("objects.npz", "kd/logits.npz")
    teacher = tiny_runs / "runs" / "teacher-s0"
    assert "logits.npz" in input_error(analyze_deviation, "--teacher", teacher, "--student", "kd")
    assert not Path("ran").exists()


def test_fuzz_logits_of_other_shapes_and_types_are_refused_or_measured(tiny_runs, tmp_path):
    teacher, control, student = tiny_runs / "runs" / "teacher-s0", tiny_runs / "runs" / "onehot-s0", tmp_path / "kd"
    shutil.copytree(tiny_runs / "runs" / "kd-s0", student)
    good = runs.read_npz(student / "logits.npz", engine.LOGITS)
    n, m = len(good["train_labels"]), len(good["test_labels"])
    arrays = odd_arrays((n, 10), (m, 10), (m, 9), (n, 1), (7, 10), (m,), (n,), (m, 1))

    @fuzz(25)
    @given(st.dictionaries(st.sampled_from(engine.LOGITS), arrays, min_size=1, max_size=2))
    def check(changed):
        np.savez(student / "logits.npz", **{**good, **changed})
        points = valid_or_refused(lambda: analyze_deviation.points_from_runs([teacher], [student], [control]))
        rng = np.random.default_rng(0)
        valid_or_refused(lambda: switch_distill.accuracy_sums((student, teacher, control), 10, rng))
        for split in points or ():
            assert analyze_deviation.measure(points[split], 10)["fidelity"]["student"]["agreement"]["value"] <= 1
        paths = [str(tmp_path / f"{name}.npy") for name in changed]
        for path, array in zip(paths, changed.values(), strict=True):
            np.save(path, array)
        files = dict(teacher_logits=paths[0], student_logits=paths[-1], labels=paths[0])
        files = SimpleNamespace(split="s", control_logits=None, **files)
        valid_or_refused(lambda: analyze_deviation.points_from_files(files))

    check()


def test_fuzz_damaged_npy_files_are_refused_or_hold_logits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    point = random_points(40, 3)
    save_points(point)
    files = dict(teacher_logits="t.npy", student_logits="damaged.npy", labels="y.npy")
    files = SimpleNamespace(split="s", control_logits=None, **files)

    def check_one(content):  # no checksums: values may differ, shapes and finiteness may not
        Path("damaged.npy").write_bytes(content)
        points = valid_or_refused(lambda: analyze_deviation.points_from_files(files))
        if points:
            logits = points["s"][0]["networks"]["student"]
            assert logits.shape == point["teacher"].shape and np.isfinite(logits).all()

    good = Path("s.npy").read_bytes()
    check_one(good.replace(b"(40, 3), }    ", b"(4000000000, 3), }")[: len(good)])  # more than any memory
    fuzz(40)(given(damage_to(good))(check_one))()


def save_logits(folder, n=600, classes=5):
    """Files of logits of a teacher, a student like it, and the labels."""
    rng = np.random.default_rng(3)
    labels = rng.integers(0, classes, n)
    teacher = rng.normal(size=(n, classes)) + 3 * np.eye(classes)[labels]
    arrays = dict(T=teacher, S=teacher + 0.5 * rng.normal(size=teacher.shape), y=labels)
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    return arrays


FILES = ["--teacher-logits", "T.npy", "--student-logits", "S.npy", "--labels", "y.npy", "--bootstrap", 100]


def test_probabilities_for_logits_are_refused_with_the_conversion(tmp_path):
    arrays = save_logits(tmp_path)
    np.save(tmp_path / "S.npy", scipy.special.softmax(arrays["S"], 1).astype(np.float32))
    one_line_error(run_cli("analyze_deviation.py", *FILES, cwd=tmp_path), "S.npy has probabilities", "numpy.log(")
    assert not (tmp_path / "results").exists()
    rounded = np.round(100 * scipy.special.softmax(arrays["S"], 1), 2)
    for values in (rounded, rounded / 100, np.round(rounded / 100, 2)):
        with pytest.raises(runs.InputError, match="x has probabilities"):
            analyze_deviation.check_logits(values, "x")
    analyze_deviation.check_logits(arrays["S"] - arrays["S"].min(), "x")


def test_rows_in_another_order_stop_the_claims(tmp_path):
    arrays = save_logits(tmp_path)
    ok(run_cli("analyze_deviation.py", *FILES, "--out", "good", cwd=tmp_path))
    assert len(json.loads((tmp_path / "good/claims.json").read_text())) > 2
    np.save(tmp_path / "S.npy", np.roll(arrays["S"], 1, axis=0))
    output = ok(run_cli("analyze_deviation.py", *FILES, "--out", "rolled", cwd=tmp_path))
    (row,) = json.loads((tmp_path / "rolled/claims.json").read_text())
    assert "no claims: student agrees with the labels on" in output and row["verdict"] == "unclear"


def test_tensors_are_read_as_arrays(tmp_path):
    tensor = torch.arange(20.0).view(10, 2).to(torch.bfloat16)
    torch.save(tensor, tmp_path / "t.pt")
    torch.save({"a": tensor, "b": tensor}, tmp_path / "two.pth")
    safetensors.torch.save_file({"logits": tensor}, tmp_path / "t.safetensors")
    for name in ("t.pt", "t.safetensors"):
        assert np.array_equal(analyze_deviation.load_array(tmp_path / name), tensor.float().numpy())
    with pytest.raises(runs.InputError, match="two.pth cannot be read .*one tensor"):
        analyze_deviation.load_array(tmp_path / "two.pth")
