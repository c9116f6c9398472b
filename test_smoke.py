"""Every script once, through its command line, at tiny size: it runs, and the files that it promises say something.

    make smoke          or          python -m pytest -q test_smoke.py

The scripts share one folder in which they run in the order of README, each with what the ones before left there.
"""

import html
import itertools
import json
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parent / "tests"))

from helpers import TINY, ok, run_cli, run_process  # noqa: E402

VERDICTS = {"holds", "as the control", "fails", "unclear", "mixed"}
CLAIMS = ["claims.json", "claims.md"]


class Folder:
    """The shared working folder."""

    def __init__(self, path):
        self.path = path

    def run(self, script, *flags):
        """What a script prints; it must end well."""
        return ok(run_cli(script, *flags, cwd=self.path))

    def json(self, name):
        return json.loads((self.path / name).read_text())

    def files(self, name):
        return sorted(file.name for file in (self.path / name).iterdir() if file.is_file())

    def check_claims(self, folder, *words):
        """The claims of a figure have numbers and verdicts, among them one whose text holds `words`."""
        rows = self.json(f"{folder}/claims.json")
        table = (self.path / folder / "claims.md").read_text()
        assert rows and {row["verdict"] for row in rows} <= VERDICTS
        assert all(row["claim"] in table for row in rows)
        # So few steps leave some undefined, which are null.
        assert sum(row["measured"] is not None for row in rows) > len(rows) / 2
        assert any(all(word in row["claim"] for word in words) for row in rows), table

    def check_figure(self, name):
        """A figure lies there as PNG and PDF, and is not empty."""
        png, pdf = ((self.path / f"{name}.{ending}").read_bytes() for ending in ("png", "pdf"))
        assert png.startswith(b"\x89PNG") and pdf.startswith(b"%PDF") and min(len(png), len(pdf)) > 8_000


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return Folder(tmp_path_factory.mktemp("smoke"))


# ---------------------------------------------------------------- one fixture for each script, in order


@pytest.fixture(scope="session")
def teacher(folder):
    folder.run("train_teacher.py", *TINY, "--out", "runs/tiny-teacher-s{seed}")
    return "runs/tiny-teacher-s0"


@pytest.fixture(scope="session")
def students(folder, teacher):
    """The distilled student and its one-hot control."""
    folder.run("train_student.py", *TINY, "--teacher", teacher, "--out", "runs/tiny-kd-s{seed}")
    one_hot = ["--kd-weight", 0, "--ce-weight", 1]
    folder.run("train_student.py", *TINY, *one_hot, "--out", "runs/tiny-onehot-s{seed}")
    return "runs/tiny-kd-s0", "runs/tiny-onehot-s0"


@pytest.fixture(scope="session")
def deviation(folder, teacher, students):
    kd, onehot = students
    flags = ["--teacher", teacher, "--student", kd, "--control", onehot, "--bootstrap", 100]
    return folder.run("analyze_deviation.py", *flags, "--out", "results/tiny/fig1a")


@pytest.fixture(scope="session")
def switched(folder, students):
    flags = ["--switch-at", 0, 0.5, 1, "--bootstrap", 100, "--out", "runs/tiny"]
    return folder.run("switch_distill.py", *TINY, *flags, "--results", "results/tiny/fig1b")


@pytest.fixture(scope="session")
def pays(folder, teacher):
    size = [*TINY, "--seeds", 0, 1, "--stop-at", 0.5, 1, "--bootstrap", 100]
    return folder.run("when_it_pays.py", *size, "--results", "results/tiny/pays")


@pytest.fixture(scope="session")
def eigenspace(folder):
    size = ["--subset", 60, "--seeds", 0, 1, "--steps", 6, "--width", 0.1, "--batch-size", 20, "--device", "cpu"]
    return folder.run("eigenspace.py", *size, "--archs", "linear", "--out", "results/tiny/eigenspace")


@pytest.fixture(scope="session")
def denoised(folder, students):
    size = ["--seeds", 0, "--batches", 2, "--points", 80, "--held-out", 100]
    return folder.run("denoise_gradients.py", *TINY, *size, "--out", "runs/tiny", "--results", "results/tiny/denoise")


@pytest.fixture(scope="session")
def language(folder):
    size = ["--subset", 160, "--epochs", 2, "--max-length", 32, "--quiet", "--bootstrap", 100]
    models = ["--teacher", "1x16", "--student", "1x8"]
    return folder.run("glue_distill.py", *models, *size, "--device", "cpu")


@pytest.fixture(scope="session")
def benchmark(folder):
    size = ["--arch", "mlp", "--images", 128, "--epochs", 1, "--device", "cpu"]
    # From nothing, not forked: it starts processes itself.
    return ok(run_process("benchmark.py", *size, "--out", "results/benchmark", cwd=folder.path))


@pytest.fixture(scope="session")
def page(folder, deviation, switched, pays, eigenspace, denoised, language):
    folder.run("report.py")
    return (folder.path / "results" / "index.html").read_text()


# ---------------------------------------------------------------- what each has left


@pytest.mark.parametrize("name", ["teacher", "kd", "onehot"])
def test_training_leaves_a_run_folder(name, folder, teacher, students):
    run = f"runs/tiny-{name}-s0"
    assert {"checkpoint.pt", "config.json", "logits.npz", "metrics.jsonl"} <= set(folder.files(run))
    config = folder.json(f"{run}/config.json")
    assert config["role"] == ("teacher" if name == "teacher" else "student") and config["flags"]["epochs"] == 2
    assert bool(config["facts"].get("teacher_sha256")) == (name == "kd")
    lines = [json.loads(line) for line in (folder.path / run / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == [1, 2] and 0 < lines[-1]["test_acc"] < 1
    with np.load(folder.path / run / "logits.npz") as arrays:
        assert arrays["train_logits"].shape == (300, 10) and arrays["test_logits"].shape == (500, 10)
        accuracy = (arrays["test_logits"].argmax(1) == arrays["test_labels"]).mean()
    assert accuracy == pytest.approx(lines[-1]["test_acc"])


def test_figure_1a(folder, deviation):
    assert folder.files("results/tiny/fig1a") == sorted(
        ["deviation.json", "fig1a.json", "fig1a.pdf", "fig1a.png", "statistics.md", *CLAIMS]
    )
    folder.check_figure("results/tiny/fig1a/fig1a")
    folder.check_claims("results/tiny/fig1a", "slope")
    tables = folder.json("results/tiny/fig1a/deviation.json")["tables"]
    assert np.isfinite(tables["test"]["predicted"]["student"]["slope"]["value"])


def test_figure_1b(folder, switched):
    assert {"switch.json", "switch.md", *CLAIMS} <= set(folder.files("results/tiny/fig1b"))
    folder.check_figure("results/tiny/fig1b/fig1b")
    folder.check_figure("results/tiny/fig1b/fig1b_curves")
    folder.check_claims("results/tiny/fig1b", "KD")
    rows = folder.json("results/tiny/fig1b/switch.json")["rows"]
    drawn = itertools.product(("onehot2kd", "kd2onehot"), (0, 0.5, 1))
    assert {(row["direction"], row["s"]) for row in rows} == set(drawn)
    assert "runs/tiny-kd-s0: test" not in switched  # the trunks are those of train_student.py, not trained again
    assert "runs/tiny-onehot2kd-0.5-s0: test" in switched


def test_when_it_pays(folder, pays):
    assert "rises with the teacher's fit" in pays
    folder.check_figure("results/tiny/pays/pays")
    folder.check_claims("results/tiny/pays", "lead")


def test_eigenspace(folder, eigenspace):
    for name in ("linear", "classifiers"):
        folder.check_figure(f"results/tiny/eigenspace/{name}")
    folder.check_claims("results/tiny/eigenspace", "top progress")
    folder.check_claims("results/tiny/eigenspace", "lower/top")
    assert len(folder.files("results/tiny/eigenspace/seeds")) == 4  # least squares and the probe, of both seeds


def test_denoise(folder, denoised):
    assert folder.files("results/tiny/denoise") == sorted(["denoise.json", "denoise.pdf", "denoise.png", *CLAIMS])
    folder.check_figure("results/tiny/denoise/denoise")
    folder.check_claims("results/tiny/denoise", "KD")
    assert set(folder.json("results/tiny/denoise/denoise.json")["tables"]) == {"onehot", "kd", "smooth"}
    assert len(folder.files("results/tiny/denoise/seeds")) == 1
    assert (
        denoised.count(": test") == 1 and "runs/tiny-smooth-s0: test" in denoised
    )  # the others are those of train_*.py


def test_language(folder, language):
    results = "results/glue-sentiment"
    assert {"glue.json", "glue.md", *CLAIMS} <= set(folder.files(results))
    folder.check_figure(f"{results}/1x8/fig1a")
    for place in (results, f"{results}/1x8"):
        folder.check_claims(place)
    rows = folder.json(f"{results}/glue.json")["rows"]
    assert {"teacher", "1x8 onehot", "1x8 kd"} <= {row["network"] for row in rows}
    assert {"config.json", "logits.npz"} <= set(folder.files("runs/sentiment-1x16-teacher-s0"))


def test_benchmark(folder, benchmark):
    assert folder.files("results/benchmark") == ["benchmark.json", "benchmark.md"]
    rows = folder.json("results/benchmark/benchmark.json")["rows"]
    assert {row["loss"] for row in rows} == {"one-hot", "KD"} and all(row["per_second"] > 0 for row in rows)
    table = (folder.path / "results" / "benchmark" / "benchmark.md").read_text()
    shown = [row for row in rows if "workers" not in row["way"] or row["speedup"] == 1]
    assert table.strip() in benchmark and table.count("\n| mlp") == len(shown)


def test_report_shows_all_of_it(folder, page):
    for part in ("tiny/fig1a", "tiny/fig1b", "tiny/eigenspace", "tiny/denoise", "tiny/pays", "glue-sentiment/1x8"):
        assert f">results/{part}</h2>" in page, part  # the heading of its figures
    for script in ("analyze_deviation", "switch_distill", "eigenspace", "denoise_gradients", "glue_distill"):
        assert f"{script}.py" in page, script  # the command that made them
    assert page.count("<figure>") == len(list((folder.path / "results").rglob("*.png")))
    for claim in folder.json("results/tiny/fig1b/claims.json"):
        assert html.escape(claim["claim"]) in page
    assert "<script" not in page
