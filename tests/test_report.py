"""The page of report.py, from run folders and results written by hand."""

import base64
import hashlib
import io
import os
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import finished, one_line_error, run_cli
from PIL import Image
from PIL.PngImagePlugin import PngInfo

import claims
import engine
import report
import runs

FLAGS = dict(data="cifar100", subset=0, label_noise=0.0, data_seed=0, arch="resnet56", width=1.0, recipe="short")
FLAGS |= dict(epochs=2, stop_epoch=None, batch_size=512, lr=0.4, warmup=5, schedule="cosine", milestones=[])
FLAGS |= dict(precision="fp32", out=None, seeds=[0, 1])
VERSIONS = dict(python="3.11.1", torch="2.9.9", numpy="2", git_commit="a" * 40, hardware="Abacus 3000", threads=1)
SLOPE = "slope of the student's fit exceeds 1"


def write_run(folder, role="student", seed=0, accuracy=0.7, weights=None, switch=None, sha=None, **more):
    """A finished run folder written by hand; weights makes a checkpoint of a single number, and returns its hash."""
    flags = FLAGS | more
    if role != "teacher":
        flags |= dict(kd_weight=1.0 if sha else 0.0, ce_weight=0.0 if sha else 1.0, temperature=4.0)
    data = dict(name=flags["data"], classes=100, image=[32, 32, 3], n_train=50000, n_test=10, subset=flags["subset"])
    data |= dict(label_noise=flags["label_noise"], data_seed=0, sha256="d" * 64)
    facts = dict(teacher_sha256=sha) | (dict(switch=switch) if switch else {})
    folder.mkdir(parents=True)
    config = dict(role=role, seed=seed, arch=flags["arch"], flags=flags, data=data, facts=facts, parameters=1)
    config |= dict(command=f"python train.py --out {folder.name}", versions=VERSIONS)
    runs.write_json(folder / "config.json", config)
    lines = [dict(epoch=k, step=10 * k, test_acc=accuracy) for k in (1, 2)]
    runs.write_metrics(folder, lines)
    # Of two classes, the second is predicted for all points.
    logits = dict(test_logits=np.tile([0.0, 1.0], (1000, 1)), test_labels=np.arange(1000) < round(1000 * accuracy))
    runs.write_npz(folder / "logits.npz", logits)
    if weights is not None:
        state = dict(w=torch.tensor([float(weights)]))
        torch.save(dict(model=state), folder / "checkpoint.pt")
        return engine.weights_hash(state)


def claim(text, value=0.886, low=0.836, high=0.941, **more):
    fields = dict(claim=text, expected="> 1", measured=value, low=low, high=high, note="over points and 5 seeds")
    verdict = "unclear" if value is None else claims.verdict((low, high), 1)
    return fields | dict(verdict=verdict) | more


def write_results(folder, rows=(), figure="fig1a", command=None):
    folder.mkdir(parents=True, exist_ok=True)
    runs.write_json(folder / "claims.json", list(rows))
    info = PngInfo()
    if command:
        info.add_text("Command", command)
    Image.new("RGB", (300, 150), "red").save(folder / f"{figure}.png", pnginfo=info)


class Page(HTMLParser):
    """A page, checked for tags that close in order: its tags with attributes, its text, and rows of cells as text."""

    def __init__(self, source):
        super().__init__()
        self.source, self.open, self.tags, self.text, self.rows = source, [], [], "", []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        elif tag in ("th", "td"):
            self.rows[-1].append("")

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if "style" in self.open:
            return
        self.text += data
        if "th" in self.open or "td" in self.open:
            self.rows[-1][-1] += f" ({data})" if self.open[-1] == "small" else data

    def of(self, start):
        return [row for row in self.rows if row[0].startswith(start)]


def page_of(folder):
    """The page about `folder`/runs and `folder`/results."""
    (folder / "results").mkdir(exist_ok=True)
    report.main([f"--{name}={folder / name}" for name in ("runs", "results")] + ["--out", str(folder / "out")])
    return Page((folder / "out" / "index.html").read_text())


def test_headlines_come_first_then_figures_claims_and_runs(tmp_path):
    rows = [claim(f"train: {SLOPE}"), claim(f"test: {SLOPE}", 1.2, 1.1, 1.3), claim("one seed", 0.5, -np.inf, np.inf)]
    rows += [
        claim("counted", 0, 0, 0, note="of 9; over points and 5 seeds"),
        claim("several", 2, 2, 2, verdict="mixed"),
    ]
    late = claims.headline(claim("late"), "language", dict(value=0.5, low=0.4, high=0.6))
    early = claims.headline(claim("early", 0.5, 0.4, 0.6), "§3.2", unit="points")
    results = tmp_path / "results"
    write_results(results / "a_copy", [*rows, late], figure="fig1b", command="python switch_distill.py")
    write_results(results / "set" / "pays", figure="pays", command="python when_it_pays.py")
    write_results(results / "set" / "a", [early], figure="ntk")
    write_results(results / "set" / "fig1a", rows, command="python analyze_deviation.py --title 'a <b>'")
    write_results(results / "z", [claim("undefined", None, None, None, verdict="unclear")], "own", "python own.py")
    for seed, accuracy in ((0, 0.70), (1, 0.72)):
        sha = write_run(tmp_path / "runs" / f"t-s{seed}", "teacher", seed, accuracy, weights=seed)
        write_run(tmp_path / "runs" / f"kd-s{seed}", "student", seed, accuracy + 0.03, sha=sha)
    page = page_of(tmp_path)

    # The first table; each row has a thumbnail that leads to its folder's figure.
    assert page.rows[1][0] == f"§3.2 early ({results / 'set' / 'a'})" and page.rows[2][0].startswith("language late")
    assert page.rows[1][1:5] == ["> 1", "50.0 [40.0, 60.0] points", "–", "✗ fails"]
    assert page.rows[2][2:4] == ["0.89 [0.84, 0.94]", "0.50 [0.40, 0.60]"]
    anchors = [attributes["id"] for tag, attributes in page.tags if tag == "figure"]
    assert anchors == [f"figure-{k}" for k in (1, 2, 3, 4, 5)]
    # Folders of one setting stand together, in the paper's order; what is not known comes last.
    commands = (
        "switch_distill.py",
        "own.py",
        "analyze_deviation.py --title 'a <b>'",
        "when_it_pays.py",
        "not record its",
    )
    places = [page.text.index(words) for words in commands]
    assert places == sorted(places)
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == ["#figure-5", "#figure-1"]

    assert "All 5 claims: 1 holds, 2 fails, 1 unclear, 1 mixed" in page.text
    assert page.of(f"train: {SLOPE}")[0] == [f"train: {SLOPE}", "> 1", "0.886 [0.836, 0.941]", "✗ fails"]
    assert page.of(f"test: {SLOPE}")[0][3] == "✓ holds" and page.of("several")[0][3] == "± mixed"
    assert page.of("one seed")[0][2:] == ["0.500, no interval", "? unclear"] and page.of("undefined")[0][2] == "?"
    # What all notes of a table end with stands once, above it.
    assert page.of("counted")[0][::2] == ["counted (of 9)", "0"] and page.text.count("over points and 5 seeds") == 4

    # 95% interval of 70 and 72 with one degree of freedom: 71 ± 12.71.
    teacher, student = page.of("teacher, resnet56")[0], page.of("KD, T = 4, resnet56 → resnet56")[0]
    assert teacher[1:3] == student[1:3] == ["2 epochs, batch 512, lr 0.4, fp32", "2"]
    assert teacher[3:] == ["71.00 [57.99, 84.01]", "72.52"]
    assert student[3:] == ["74.00 [61.01, 86.99]", "74.55"]
    assert "Trained on Abacus 3000, torch 2.9.9." in page.text


@pytest.mark.parametrize(
    "change, expected",
    [
        (dict(), "72.52"),
        (dict(label_noise=0.2), "69.8"),
        (dict(subset=1000), "–"),
        (dict(width=0.5), "–"),
        (dict(arch="resnet20"), "–"),
        (dict(data="cifar10"), "–"),
    ],
)
def test_the_papers_number_stands_only_where_the_setting_matches(tmp_path, change, expected):
    write_run(tmp_path / "runs" / "o", **change)
    assert page_of(tmp_path).of("one-hot, ")[0][4] == expected


def test_seeds_of_one_setting_and_one_kind_of_teacher_are_pooled(tmp_path):
    folder = tmp_path / "runs"
    for seed in (0, 1, 2):
        early = write_run(folder / f"t-2-epochs-s{seed}", "teacher", seed, weights=seed, stop_epoch=1)
        own = write_run(folder / f"own-s{seed}", "teacher", seed, weights=10 + seed)
        full = write_run(folder / f"t-s{seed}", "teacher", seed, weights=20 + seed, arch="resnet110")
        state = dict(w=torch.tensor([30.0 + seed]))
        torch.save(dict(model=state), folder / f"t-s{seed}" / "snapshot-5.pt")
        write_run(folder / f"kd-own-s{seed}", seed=seed, sha=own)
        write_run(folder / f"kd-0.5-s{seed}", seed=seed, sha=full)
        write_run(folder / f"kd-early-s{seed}", seed=seed, sha=early)
        write_run(folder / f"kd-snapshot-s{seed}", seed=seed, sha=engine.weights_hash(state))
        write_run(folder / "sub" / str(seed) / "kd", seed=seed, sha=full, lr=0.1 if seed == 2 else 0.4)
        write_run(folder / f"orphan-s{seed}", seed=seed, sha="f" * 64)
        write_run(folder / f"half-s{seed}", seed=seed, sha=full, switch=dict(direction="onehot2kd", step=10, window=0))
    page = page_of(tmp_path)
    rows = {row[0].partition(f"({folder}/")[2].rstrip(")"): row for row in page.rows if row[4:]}
    found = {name: (row[0].partition(" (")[0], row[2]) for name, row in rows.items()}
    assert found["kd-0.5-s*"] == ("KD, T = 4, resnet110 → resnet56", "3")
    assert found["kd-early-s*"] == ("KD, T = 4, resnet56 stopped on the way → resnet56", "3")
    assert found["kd-snapshot-s*"] == ("KD, T = 4, resnet110 stopped on the way → resnet56", "3")
    assert found["t-2-epochs-s*"] == ("teacher, resnet56", "3") and found["t-s*"] == ("teacher, resnet110", "3")
    assert found["orphan-s*"] == ("KD, T = 4, teacher not among these runs → resnet56", "3")
    assert found["half-s*"] == ("one-hot → KD at s = 0.5, resnet110 → resnet56", "3")
    assert sorted(row[2] for row in page.of("KD") if "/sub/" in row[0]) == ["1", "2"]  # another rate is another setting
    assert rows["t-2-epochs-s*"][1].endswith(", stopped after 1")
    # Self-distillation from a whole teacher alone has the paper's number.
    papers = {name: rows[f"kd-{name}-s*"][4] for name in ("own", "early", "0.5", "snapshot")}
    assert papers == {"own": "74.55", "early": "–", "0.5": "–", "snapshot": "–"}


def test_the_teacher_of_texts_is_found_by_its_logits(tmp_path):
    folder = tmp_path / "runs"
    write_run(folder / "t-s0", "teacher", arch="tiny")
    logits = np.arange(6, dtype=np.float32).reshape(3, 2)
    arrays = runs.read_npz(folder / "t-s0" / "logits.npz")
    runs.write_npz(folder / "t-s0" / "logits.npz", dict(arrays, train_logits=logits))
    config = runs.read_json(folder / "t-s0" / "config.json")
    runs.write_json(folder / "t-s0" / "config.json", config | dict(facts=dict(tokens_sha256="0")))
    write_run(folder / "kd", sha=hashlib.sha256(logits.tobytes()).hexdigest(), arch="1x32")
    # And a branch of that run, and pretraining, which has neither accuracy nor logits.
    switch = dict(direction="kd2onehot", step=10, window=3)
    write_run(folder / "half", sha="0" * 64, arch="1x32", switch=switch)
    write_run(folder / "mlm", "mlm", arch="tiny")
    (folder / "mlm" / "logits.npz").unlink()
    runs.write_metrics(folder / "mlm", [dict(epoch=k, step=10 * k) for k in (1, 2)])
    page = page_of(tmp_path)
    assert len(page.of("KD, T = 4, tiny → 1x32")) == len(page.of("teacher, tiny")) == 1
    assert len(page.of("KD → one-hot at s = 0.5 over 3 steps")) == 1
    assert "Left out" not in page.text


def test_what_is_damaged_is_left_out_alone_and_the_page_says_so(tmp_path, capsys):
    folder, results = tmp_path / "runs", tmp_path / "results"
    for name in "good torn-config discarded unfinished no-metrics odd-data no-test-logits".split():
        write_run(folder / name)
    (folder / "torn-config" / "config.json").write_text('{"role": "stu')
    runs.write_json(folder / "discarded" / "config.json", runs.DISCARDED)
    (folder / "unfinished" / "logits.npz").unlink()
    (folder / "no-metrics" / "metrics.jsonl").unlink()
    runs.write_npz(folder / "no-test-logits" / "logits.npz", dict(train_logits=np.zeros((2, 2))))
    config = runs.read_json(folder / "odd-data" / "config.json")
    runs.write_json(folder / "odd-data" / "config.json", config | dict(data=dict(name=3)))
    for name in ("good", "torn-claims", "odd-claims", "other-claims", "odd-headline", "torn-figure", "empty-figure"):
        write_results(results / name, [claim(f"claim of {name}")])
    (results / "torn-claims" / "claims.json").write_text("[")
    runs.write_json(results / "odd-claims" / "claims.json", [dict(claim="half a claim")])
    runs.write_json(results / "other-claims" / "claims.json", [claim("a", verdict=["holds"])])
    runs.write_json(results / "odd-headline" / "claims.json", [claim("a", section="§9")])
    content = (results / "torn-figure" / "fig1a.png").read_bytes()
    (results / "torn-figure" / "fig1a.png").write_bytes(content[: len(content) // 2])
    (results / "empty-figure" / "fig1a.png").write_bytes(b"")
    page = page_of(tmp_path)
    damaged = {folder / name for name in os.listdir(folder)} - {folder / "good"}
    damaged |= {
        results / name / "claims.json" for name in ("torn-claims", "odd-claims", "other-claims", "odd-headline")
    }
    damaged |= {results / f"{kind}-figure" / "fig1a.png" for kind in ("torn", "empty")}
    listed = page.text[page.text.index("\n12 damaged or unfinished:\n") :]
    assert len(damaged) == 12 and all(str(path) in listed for path in damaged)
    assert "unfinished is not finished (no logits.npz): continue it with: python train.py --out unfinished" in listed
    assert "1 runs and 5 figures; 12 damaged or unfinished left out" in capsys.readouterr().out
    assert "claim of good" in page.text and "claim of torn-figure" in page.text
    assert len(page.of("one-hot, resnet56")) == 1


def test_a_damaged_teacher_is_nobodys_and_the_page_says_so(tmp_path):
    sha = write_run(tmp_path / "runs" / "t", "teacher", weights=1)
    write_run(tmp_path / "runs" / "kd", sha=sha)
    (tmp_path / "runs" / "t" / "checkpoint.pt").write_bytes(b"torn")
    page = page_of(tmp_path)
    assert len(page.of("teacher, resnet56")) == len(page.of("KD, T = 4, teacher not among these runs → resnet56")) == 1
    assert "t/checkpoint.pt cannot be read" in page.text


def test_the_page_is_one_file_and_escapes_what_it_shows(tmp_path):
    evil = '<script src="http://x/y.js"></script>|*_`[a](b) {{ 1 }} & "q"'
    write_run(tmp_path / "runs" / '<b>&"|-s0')
    row = claim(evil, note=evil, expected=evil, verdict=evil)
    rows = [dict(claims.headline(row, "title"), shown=evil, control=evil), claim("plain")]
    write_results(tmp_path / "results" / "a <i>&'b", rows, figure='<b "q">', command=evil)
    (tmp_path / "runs" / os.fsdecode(b"\xff")).mkdir()  # a file's name need not be Unicode
    (tmp_path / "runs" / os.fsdecode(b"\xff") / "config.json").write_text("<i>")
    page = page_of(tmp_path)
    known = "html head meta link title style body header h1 p a main section h2 table thead tr th tbody td small b "
    known += "figure div img figcaption pre code details summary ul li"
    assert {tag for tag, _ in page.tags} == set(known.split())
    for _, attributes in page.tags:
        assert not any(name.startswith("on") for name in attributes) and attributes.get("src", "data:").startswith(
            "data:"
        )
        assert attributes.get("href", "#").startswith(("#", "data:"))
    assert "url(" not in page.source and "@import" not in page.source and "prefers-color-scheme: dark" in page.source
    anchors = [attributes["id"] for _, attributes in page.tags if "id" in attributes]
    linked = {attributes["href"][1:] for tag, attributes in page.tags if tag == "a"}
    assert linked <= set(anchors) and len(anchors) == len(set(anchors))
    thumbnail, image = [attributes for tag, attributes in page.tags if tag == "img"]
    assert len(thumbnail["src"]) < len(image["src"])
    with Image.open(io.BytesIO(base64.b64decode(image["src"].partition("base64,")[2]))) as picture:
        assert picture.format == "WEBP" and picture.size == (300, 150)
    assert image["alt"] == '<b "q">' and page.text.count(evil) == 10 and '<b>&"|-s0' in page.text
    assert "?/config.json cannot be read" in page.text


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    for name in ("b", "a", "c"):
        write_run(tmp_path / "runs" / name)
        write_results(tmp_path / "results" / name, [claim(name)])
    first = page_of(tmp_path).source
    shutil.copytree(tmp_path / "runs", tmp_path / "other")
    shutil.rmtree(tmp_path / "runs")
    for name in ("c", "a", "b"):  # in another order, and at another time
        shutil.copytree(tmp_path / "other" / name, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "config.json", (1, 1))
    assert page_of(tmp_path).source == first


def test_figures_record_the_command_that_made_them(tmp_path, monkeypatch):
    words = ["/where/ever/eigenspace.py", "--out", "a “b”", "--overwrite", "--level", "ntk"]
    monkeypatch.setattr(sys, "argv", words)
    claims.save_figure(claims.pyplot().figure(figsize=(12, 1)), tmp_path, "ntk")
    figure = report.read_figure(tmp_path / "ntk.png")
    assert figure.command.startswith("python ")
    assert figure.command.endswith("eigenspace.py --out 'a “b”' --level ntk")
    assert figure.caption.startswith("§4, empirical NTK")


def test_a_report_of_nothing_is_one_line(tmp_path, monkeypatch, capsys):
    one_line_error(run_cli("report.py", cwd=tmp_path), "nothing to report", "make reproduce", "--runs")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(runs.InputError, match="nowhere is not a folder"):
        report.main(["--runs", "nowhere"])
    with pytest.raises(runs.InputError, match="README.md must end in .json"):
        report.main(["--keep", "README.md"])
    write_results(tmp_path / "elsewhere", [claim("one")])
    report.main(["--results", "elsewhere", "--out", "a/b"])
    assert "a/b/index.html" in capsys.readouterr().out and (tmp_path / "a" / "b" / "index.html").exists()


def test_what_is_kept_is_what_readme_and_results_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    slope = claims.headline(claim(f"train: {SLOPE}"), "§3.1", dict(value=0.5, low=0.4, high=0.6))
    spoken = claims.headline(claim(f"train: {SLOPE}", 0.7, 0.6, 0.8), "language")
    write_results(tmp_path / "results" / "digits" / "fig1a", [slope, claim("only in the full table")])
    write_results(tmp_path / "results" / "glue" / "tiny", [spoken])
    write_results(tmp_path / "results" / "more" / "digits" / "fig1a", [claim("of a folder of the same name")])
    (tmp_path / "results" / "digits" / "fig1a" / "statistics.md").write_text("| statistics |\n")
    for seed in (0, 1):
        write_run(tmp_path / "runs" / f"t-s{seed}", seed=seed)
        lines = [dict(epoch=k, step=k, test_acc=0.7, seconds=900.0 + seed) for k in (1, 2)]
        runs.write_metrics(tmp_path / "runs" / f"t-s{seed}", lines)
    (tmp_path / "results" / "digits" / "fig1b.png").write_bytes(b"torn")
    printed = finished(report, "--keep", "docs/results/digits.json", "--title", "noisy digits")
    assert "left out: results/digits/fig1b.png cannot be read" in printed
    assert Image.open("docs/results/digits.webp").width == 1000
    kept = runs.read_json("docs/results/digits.json")
    runs.write_json("docs/results/other.json", dict(kept, title="other"))
    one_seed = {data: [dict(row, seeds=1) for row in rows] for data, rows in kept["runs"].items()}
    runs.write_json("docs/results/single.json", dict(kept, title="single", runs=one_seed))  # not for README
    Path("README.md").write_text(f"before\n{report.MARKS[0]}\nold table\n{report.MARKS[1]}\nafter\n")
    for _ in range(2):  # the second time changes nothing
        finished(report, "--docs", "docs")
        readme = Path("README.md").read_text()
        assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old table" not in readme
        here = "0.89 [0.84, 0.94] (0.50 [0.40, 0.60]), **fails**"
        assert f"| §3.1 | train: {SLOPE} | {here} | {here} |" in readme
        assert f"| language | train: {SLOPE} | 0.70 [0.60, 0.80], **fails** |" in readme
    text = Path("docs/results.md").read_text()
    for part in (
        "## noisy digits",
        "1.0 hours",
        "70.00 [",
        "only in the full table",
        "of a folder of the same name",
        "| statistics |",
        "(results/digits.webp)",
    ):
        assert part in text, part
    assert text.index("## noisy digits") < text.index("## other") < text.index("## single")
