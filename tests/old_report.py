"""The report page, from run folders and results written by hand, and the paper's grid at tiny size."""
import base64
import html
import io
import itertools
import json
import os
import re
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import common
import paper
import report
from test_smoke import ok, one_line_error, run_cli, write_arrays

REPORT_FLAGS = dict(data="cifar100", subset=0, label_noise=0.0, data_seed=0, arch="resnet56", width=1.0, recipe="short", epochs=2, stop_epoch=None,
                    batch_size=512, lr=0.4, warmup=5, schedule="cosine", milestones=[], precision="fp32", out=None, seeds=[0, 1])


def report_run(folder, role="student", seed=0, accuracy=0.7, seconds=(1.5, 2.5), weights=None, switch=None, sha=None, **flags):
    """A finished run folder written by hand; weights makes a checkpoint of a single number."""
    flags = dict(REPORT_FLAGS, **({} if role == "teacher" else dict(kd_weight=1.0 if sha else 0.0, ce_weight=0.0 if sha else 1.0, temperature=4.0)), **flags)
    data = dict(name=flags["data"], classes=100, image=[32, 32, 3], n_train=50000, n_test=10, subset=flags["subset"],
                label_noise=flags["label_noise"], data_seed=0, sha256="d" * 64)
    facts = dict(**({"teacher_sha256": sha} if sha else {}), **({"switch": switch} if switch else {}))
    folder.mkdir(parents=True)
    versions = dict(python="3.11.1", torch="2.9.9", numpy="2", git_commit="a" * 40, hardware="Abacus 3000", threads=1)
    common.write_json(folder / "config.json", dict(role=role, seed=seed, arch=flags["arch"], flags=flags, data=data, facts=facts, parameters=1,
                                                   command=f"python train.py --out {folder.name}", versions=versions))
    common.write_metrics(folder, [dict(epoch=k + 1, step=10 * (k + 1), seconds=s, images_per_s=1.0, test_acc=accuracy) for k, s in enumerate(seconds)])
    (folder / "logits.npz").write_bytes(b"")
    if weights is not None:
        torch.save(dict(model=dict(w=torch.tensor([float(weights)]))), folder / "checkpoint.pt")
        return common.weights_hash(report.SimpleNamespace(state_dict=lambda: dict(w=torch.tensor([float(weights)]))))


def report_claim(text="train: slope of the student's fit exceeds 1", value=0.886, low=0.836, high=0.941, **more):
    return dict(common.claim(text, "> 1", value, low, high, 1, note="over points and 5 seeds"), **more)


def report_results(folder, claims=(), figure="fig1a", command=None):
    folder.mkdir(parents=True, exist_ok=True)
    common.write_json(folder / "claims.json", list(claims))
    from PIL.PngImagePlugin import PngInfo
    info = PngInfo()
    if command:
        info.add_text("Command", command)
    Image.new("RGB", (300, 150), "red").save(folder / f"{figure}.png", pnginfo=info)


def report_pages(folder):
    """(text of index.html with tags as newlines, its source, report.md) of the report on `folder`/runs and `folder`/results."""
    (folder / "results").mkdir(exist_ok=True)
    report.main(["--runs", str(folder / "runs"), "--results", str(folder / "results"), "--out", str(folder / "out")])
    source = (folder / "out" / "index.html").read_text()
    body = re.sub(r"</?span[^>]*>", "", source[source.index("<body>"):])
    return re.sub(r"\n\s*", "\n", html.unescape(re.sub(r"<[^>]*>", "\n", body))), source, (folder / "out" / "report.md").read_text()


def md_rows(page, start):
    return [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in page.splitlines() if line.startswith(f"| {start}")]


def test_report_shows_claims_paper_and_runs(tmp_path):
    claims = [report_claim(), report_claim("test: slope of the student's fit exceeds 1", 1.2, 1.1, 1.3), report_claim("one seed", 0.5, -np.inf, np.inf),
              report_claim("counted", 0, 0, 0), report_claim("several", 2, 2, 2, verdict="mixed")]
    report_results(tmp_path / "results" / "set" / "fig1a", claims, command="python analyze_deviation.py --title 'a <b>'")
    report_results(tmp_path / "results" / "twice", claims, figure="fig1b")   # the same claims again, and a figure of before commands were kept
    report_results(tmp_path / "results" / "words" / "tiny", [report_claim("test: slope of the student's fit exceeds 1", 0.9, 0.7, 1.3)])
    (tmp_path / "results" / "words" / "glue.json").write_text("{}")
    for seed, accuracy in ((0, 0.70), (1, 0.72)):
        sha = report_run(tmp_path / "runs" / f"t-s{seed}", "teacher", seed, accuracy, weights=seed)
        report_run(tmp_path / "runs" / f"kd-s{seed}", "student", seed, accuracy + 0.03, sha=sha)
    text, _, page = report_pages(tmp_path)

    assert "11 claims: holds 2, fails 4, unclear 3, mixed 2." in text.replace("✓ ", "")
    assert text.index("\nClaims\n") < text.index("\nFigures\n") < text.index("\nRuns\n") < text.index("\nHardware and time\n")
    row = md_rows(page, "train: slope of the student")[0]
    assert row == ["train: slope of the student's fit exceeds 1", "&gt; 1 (13 of 18 settings)", r"0.886 \[0.836, 0.941\]", "✗ fails"]
    assert "0.886 [0.836, 0.941]" in text and "✗ fails" in text and "✓ holds" in text and "? unclear" in text and "± mixed" in text
    assert md_rows(page, "one seed")[0][2] == "0.500, no interval" and md_rows(page, "counted")[0][2] == "0"
    assert "(7 of 12 settings)" in md_rows(page, "test: slope of the student")[-1][1]

    # Figures, in the paper's order, each with its command or what stands for it.
    assert text.index("\npython analyze_deviation.py --title 'a <b>'\n") < text.index("\nmake fig1b\n") < text.index("\nmake fig-glue\n")
    assert "    python analyze_deviation.py --title 'a <b>'\n" in page and "](../results/set/fig1a/fig1a.png)" in page

    # 95% interval of 70 and 72 with one degree of freedom: 71 ± 12.71.
    teacher, = md_rows(page, "teacher, ResNet-56")
    assert teacher[1:6] == ["short: 2 epochs, batch 512, lr 0.4", "2", r"71.00 \[58.29, 83.71\]", "72.52 (with another schedule)", "8 s"]
    student, = md_rows(page, "KD, T = 4, ResNet-56 → ResNet-56")
    assert student[3:] == [r"74.00 \[61.29, 86.71\]", "74.55 (with another schedule)", "8 s", "Abacus 3000, torch 2.9.9"]
    paper = {row[0]: row[1:] for row in md_rows(page, "")}
    assert paper["CIFAR-100, ResNet-56 self-distillation: test accuracy %, trained on labels → distilled"][0] == "72.52 → 74.55"
    assert paper["Noisy CIFAR-100, self-distillation: test accuracy %, trained on labels → distilled"] == ["69.8 → 72.7", "not run here"]
    assert paper["Image settings with a test slope above 1"] == ["18 of 18", "1 of 1 (interval wholly above 1: 1, wholly below: 0)"]
    assert paper["Image settings with a train slope above 1"] == ["13 of 18", "0 of 1 (interval wholly above 1: 0, wholly below: 1)"]
    assert paper["Language settings with a test slope above 1"] == ["7 of 12", "0 of 1 (interval wholly above 1: 0, wholly below: 0)"]
    assert paper["Abacus 3000"] == ["1", "torch 2.9.9, Python 3.11.1", "aaaaaaaaa", "training runs: 4", "16 s"]


@pytest.mark.parametrize("change, expected", [
    (dict(common.RECIPES["paper"], recipe="paper", milestones=[200, 300, 400]), "72.52"), (dict(label_noise=0.2), "69.8 (with another schedule)"),
    (dict(subset=1000), "–"), (dict(width=0.5), "–"), (dict(arch="resnet20"), "–"), (dict(data="cifar10"), "–"),
    (dict(common.RECIPES["paper"], recipe="paper", milestones=[200, 300, 400], stop_epoch=9), "72.52 (with another schedule)")])
def test_report_shows_the_papers_number_only_where_the_setting_matches(tmp_path, change, expected):
    report_run(tmp_path / "runs" / "o", **change)
    assert md_rows(report_pages(tmp_path)[2], "one-hot, ")[0][4] == expected


def test_report_pools_seeds_of_one_setting_and_of_one_kind_of_teacher(tmp_path):
    runs = tmp_path / "runs"
    for seed in (0, 1, 2):
        early = report_run(runs / f"t-2-epochs-s{seed}", "teacher", seed, weights=seed, stop_epoch=1)
        full = report_run(runs / f"t-s{seed}", "teacher", seed, weights=10 + seed, arch="resnet110")
        report_run(runs / f"kd-0.5-s{seed}", seed=seed, sha=full)
        report_run(runs / f"kd-early-s{seed}", seed=seed, sha=early)
        report_run(runs / "sub" / str(seed) / "kd", seed=seed, sha=full, lr=0.1 if seed == 2 else 0.4)
        report_run(runs / f"orphan-s{seed}", seed=seed, sha="f" * 64)
        report_run(runs / f"half-s{seed}", seed=seed, sha=full, switch=dict(direction="onehot2kd", step=10, window=0))
    page = report_pages(tmp_path)[2]
    seeds = {row[0].partition("(")[2]: (row[0].partition(" (")[0], row[2]) for row in md_rows(page, "") if len(row) == 7}
    prefix = report.md_text(runs.as_posix())
    kd = "KD, T = 4, ResNet-110 → ResNet-56"
    assert seeds[rf"{prefix}/kd-0.5-s\*)"] == (kd, "3") and seeds[rf"{prefix}/kd-early-s\*)"] == ("KD, T = 4, ResNet-56 → ResNet-56", "3")
    assert sorted(row[2] for row in md_rows(page, "KD") if "/sub/" in row[0]) == ["1", "2"]   # another learning rate is another setting
    assert seeds[rf"{prefix}/t-2-epochs-s\*)"] == ("teacher, ResNet-56", "3")
    assert seeds[rf"{prefix}/orphan-s\*)"][0] == "KD, T = 4, teacher not among these runs → ResNet-56"
    assert seeds[rf"{prefix}/half-s\*)"] == ("one-hot → KD at s = 0.5, ResNet-110 → ResNet-56", "3")
    assert all(row[3] == r"70.00 \[70.00, 70.00\]" for row in md_rows(page, "teacher, ")) and len(md_rows(page, "teacher, ")) == 2
    assert "teacher short: 2 epochs, batch 512, lr 0.4, stopped after 1" in page


def test_report_finds_the_teacher_of_texts_by_its_logits_and_counts_an_epoch_once(tmp_path):
    run = tmp_path / "runs" / "sentiment-tiny-teacher-s0"
    report_run(run, "teacher", arch="tiny")
    logits = np.arange(6, dtype=np.float32).reshape(3, 2)
    np.savez(run / "logits.npz", train_logits=logits)
    config = common.read_json(run / "config.json")
    common.write_json(run / "config.json", dict(config, facts=dict(tokens_sha256="0")))
    report_run(tmp_path / "runs" / "kd", sha=report.hashlib.sha256(logits.tobytes()).hexdigest(), arch="1x32", seconds=(100, 200))
    # A branch of that run, whose first epoch is the trunk's, and masked-language modelling, which has neither accuracy nor logits.
    report_run(tmp_path / "runs" / "half", sha="0" * 64, arch="1x32", seconds=(100, 90), switch=dict(direction="kd2onehot", step=10, window=3))
    report_run(tmp_path / "runs" / "mlm", "mlm", arch="tiny", seconds=(30, 30))
    (tmp_path / "runs" / "mlm" / "logits.npz").unlink()
    common.write_metrics(tmp_path / "runs" / "mlm", [dict(epoch=1, step=10, seconds=30), dict(epoch=2, step=20, seconds=30)])
    page = report_pages(tmp_path)[2]
    assert len(md_rows(page, "KD, T = 4, tiny → 1x32")) == 1 and len(md_rows(page, "KD → one-hot at s = 0.5 over 3 steps")) == 1
    assert md_rows(page, "KD → one-hot")[0][5] == "3 min" and len(md_rows(page, "teacher, tiny")) == 1
    assert md_rows(page, "Abacus 3000")[0][4:] == ["training runs: 4", "8 min"]   # 4 + 300 + 90 + 60 s


def test_report_leaves_out_what_is_damaged_and_says_so(tmp_path, capsys):
    runs, results = tmp_path / "runs", tmp_path / "results"
    for name in ("good", "torn-config", "discarded", "unfinished", "no-metrics", "no-config", "no-seconds", "odd-data", "mlm", "no-accuracy"):
        report_run(runs / name, "mlm" if name == "mlm" else "student")
    (runs / "torn-config" / "config.json").write_text('{"role": "stu')
    common.write_json(runs / "discarded" / "config.json", common.DISCARDED)
    (runs / "unfinished" / "logits.npz").unlink()
    (runs / "no-metrics" / "metrics.jsonl").unlink()
    (runs / "no-config" / "config.json").unlink()
    common.write_metrics(runs / "no-seconds", [dict(epoch=1, step=1, test_acc=0.5)])
    common.write_metrics(runs / "no-accuracy", [dict(epoch=1, step=1, seconds=1.0)])
    common.write_json(runs / "odd-data" / "config.json", dict(common.read_json(runs / "odd-data" / "config.json"), data=dict(name=3)))
    common.write_metrics(runs / "mlm", [dict(epoch=1, step=10, seconds=1.0)])
    for name in ("good", "torn-claims", "odd-claims", "torn-figure", "empty-figure"):
        report_results(results / name, [report_claim(f"claim of {name}")])
    (results / "torn-claims" / "claims.json").write_text("[")
    common.write_json(results / "odd-claims" / "claims.json", [dict(claim="half a claim")])
    content = (results / "torn-figure" / "fig1a.png").read_bytes()
    (results / "torn-figure" / "fig1a.png").write_bytes(content[:len(content) // 2])
    (results / "empty-figure" / "fig1a.png").write_bytes(b"")
    text, _, page = report_pages(tmp_path)
    damaged = {runs / name for name in os.listdir(runs)} - {runs / "good"} | {results / "torn-claims" / "claims.json", results / "odd-claims" / "claims.json",
                                                                             results / "torn-figure" / "fig1a.png", results / "empty-figure" / "fig1a.png"}
    listed = text[text.index("\n13 damaged or unfinished:\n"):]
    assert len(damaged) == 13 and all(str(path) in listed and report.md_text(path) in page for path in damaged)
    assert "unfinished is not finished (no logits.npz): continue it with: python train.py --out unfinished" in listed
    assert "1 runs and 3 figures; 13 damaged or unfinished left out" in capsys.readouterr().out
    assert "claim of good" in text and "claim of torn-figure" in text and len(md_rows(page, "one-hot, ResNet-56")) == 1


class StrictHtml(HTMLParser):
    """Checks that tags close in order, and collects the attributes of every tag."""
    def __init__(self, source):
        super().__init__()
        self.open, self.tags = [], []
        self.feed(source)
        assert not self.open

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "link", "img"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_report_is_one_file_and_escapes_what_it_shows(tmp_path):
    evil = '<script src="http://x/y.js"></script>|*_`[a](b) & "q"'
    report_run(tmp_path / "runs" / '<b>&"|-s0')
    report_results(tmp_path / "results" / "a <i>&'b", [report_claim(evil, note=evil, expected=evil, verdict=evil), report_claim("plain")], command=evil)
    text, source, page = report_pages(tmp_path)
    tags = StrictHtml(source).tags
    assert {tag for tag, _ in tags} <= set("html head meta link title style body header h1 p nav ul li a main h2 h3 div table thead tr th tbody td span small "
                                          "figure figcaption strong img pre code".split())
    assert all(attributes.get("src", "data:").startswith("data:") and attributes.get("href", "#").startswith(("#", "data:")) for _, attributes in tags)
    assert "url(" not in source and "@import" not in source
    anchors = {attributes["id"] for _, attributes in tags if "id" in attributes}
    assert {attributes["href"][1:] for tag, attributes in tags if tag == "a"} <= anchors
    image, = [attributes for tag, attributes in tags if tag == "img"]
    file = tmp_path / "results" / "a <i>&'b" / "fig1a.png"
    assert base64.b64decode(image["src"].removeprefix("data:image/png;base64,")) == file.read_bytes() and image["alt"] and image["width"] == "192"
    assert evil in text and '<b>&"|-s0' in text and "prefers-color-scheme: dark" in source

    # Markdown: no HTML, no column too many, and a link to the figure that a browser resolves.
    assert "<" not in re.sub(r"(?m)^    .*$", "", page)
    widths = [[len(re.split(r"(?<!\\)\|", line)) for line in block.splitlines()] for block in page.split("\n\n") if block.startswith("| ")]
    assert len(widths) == 4 and all(len(set(table)) == 1 for table in widths)
    from urllib.parse import unquote
    link = re.search(r"\]\((\S+fig1a\.png)\)", page).group(1)
    assert (tmp_path / "out" / unquote(link)).resolve() == file


def test_report_has_the_same_bytes_for_the_same_inputs(tmp_path):
    for name in ("b", "a", "c"):
        report_run(tmp_path / "runs" / name)
        report_results(tmp_path / "results" / name, [report_claim(name)])
    first = report_pages(tmp_path)
    shutil.copytree(tmp_path / "runs", tmp_path / "other")
    shutil.rmtree(tmp_path / "runs")
    for name in ("c", "a", "b"):   # in another order, and at another time
        shutil.copytree(tmp_path / "other" / name, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "config.json", (1, 1))
    assert report_pages(tmp_path) == first


def test_figures_record_the_command_that_made_them_and_the_report_shows_it(tmp_path, monkeypatch):
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    monkeypatch.setattr(sys, "argv", ["/where/ever/eigenspace.py", "--out", "a “b”", "--overwrite", "--level", "ntk"])
    figure = plt.figure(figsize=(2, 1))
    common.save_figure(figure, tmp_path, "ntk")
    plt.close(figure)
    assert report.read_figure(tmp_path / "ntk.png")["command"] == "python eigenspace.py --out 'a “b”' --level ntk"
    with Image.open(io.BytesIO((tmp_path / "ntk.png").read_bytes())) as image:
        assert image.size == (300, 150)


def test_report_of_nothing_is_one_line(tmp_path):
    one_line_error(run_cli("report.py", cwd=tmp_path), "nothing to report", "make reproduce", "--runs")
    one_line_error(run_cli("report.py", "--runs", "nowhere", cwd=tmp_path), "nowhere is not a folder")
    (tmp_path / "runs" / "r").mkdir(parents=True)
    (tmp_path / "runs" / "r" / "config.json").write_text("{")
    one_line_error(run_cli("report.py", cwd=tmp_path), "1 left out, the first: runs/r/config.json cannot be read")
    assert not (tmp_path / "results").exists()
    report_results(tmp_path / "elsewhere", [report_claim()])
    result = run_cli("report.py", "--results", "elsewhere", "--out", "a/b", cwd=tmp_path)
    assert result.returncode == 0 and (tmp_path / "a" / "b" / "index.html").exists() and "a/b/index.html" in result.stdout


# ---------------------------------------------------------------- the paper's grid


GRID = ["--recipe", "quick", "--seeds", 0, "--device", "cpu", "--data-dir", "d", '--extra=--epochs 2 --width 0.25 --subset 200 --batch-size 100']


def paper_args(*flags, monkeypatch):
    """The arguments as paper.py's main passes them on."""
    caught = []
    monkeypatch.setattr(paper, "dry_run", lambda args, entries: caught.append((args, entries)))
    paper.main(["--dry-run", "--device", "cpu", *map(str, flags)])
    return caught[0]


def files_below(folder):
    return {file: file.read_bytes() for file in Path(folder).rglob("*") if file.is_file()}


@pytest.fixture(scope="module")
def gridded(tmp_path_factory):
    """A folder in which one image entry of the grid has been trained and drawn at tiny size, on a made-up cifar10.npz."""
    folder = tmp_path_factory.mktemp("a grid")
    (folder / "d").mkdir()
    write_arrays(folder / "d" / "cifar10.npz", n=200, side=12, classes=10)
    text = ok(run_cli("paper.py", *GRID, "--only", "image/cifar10/resnet20-mobilenetv2", cwd=folder))
    assert text.count("$ python ") == 4 and "1 of 1 entries are done" in text
    return folder


def test_paper_grid_holds_what_the_paper_has(monkeypatch):
    args, entries = paper_args(monkeypatch=monkeypatch)
    names = [name for name, _ in entries]
    nets = ("resnet56", "resnet20", "mobilenetv2")
    assert {f"image/{data}/{t}-{s}" for data in ("cifar10", "cifar100", "cifar100-noisy", "tiny-imagenet") for t in nets for s in nets} <= set(names)
    assert {f"language/{task}/roberta-base-{s}" for task in ("cola", "sst-2", "mrpc", "rte", "qnli", "qqp", "mnli") for s in ("roberta-base", "distilroberta-base")} <= set(names)
    assert {name.partition("/")[0] for name in names} == set(paper.SECTIONS) and len(set(names)) == len(names)
    # A teacher and a control are trained by one command wherever they are needed.
    trained = [command for _, commands in entries for command in commands if command.words[0].startswith("train_")]
    makers = {(run.folder, command.words) for command in trained for run in command.runs}
    assert len(makers) == len({folder for folder, _ in makers}) == 4 * 3 * (3 + 3 + 9)
    noisy = {command.words for name, commands in entries if "noisy" in name for command in commands if command.words[0] != "analyze_deviation.py"}
    assert all("--label-noise" in words and "0.2" in words for words in noisy)
    some = [name for name, _ in paper_args("--only", "cifar10/", "switching/", monkeypatch=monkeypatch)[1]]
    assert some == [name for name in names if "cifar10/" in name or "switching/" in name] and len(some) == 11


@pytest.mark.parametrize("n", (2, 5, 40))
def test_paper_shards_share_no_run_and_leave_none_out(monkeypatch, n):
    flags = ["--seeds", 0, 3]
    args, entries = paper_args(*flags, monkeypatch=monkeypatch)
    shards = [paper.select(args, (i, n)) for i in range(n)]
    folders = [set(paper.unique_runs(shard)) for shard in shards]
    assert not any(a & b for a, b in itertools.combinations(folders, 2))
    assert set().union(*folders) == set(paper.unique_runs(entries))
    drawn = [name for shard in shards for name, commands in shard for command in commands if command.draws]
    assert sorted(drawn) == ["eigenspace/cifar10", "eigenspace/digits"]   # the one thing that shards draw
    for shard in shards:   # a command names no seed of another shard
        for _, commands in shard:
            for command in commands:
                seeds = command.words[command.words.index("--seeds") + 1:]
                assert {f"-s{seed}" for seed in itertools.takewhile(str.isdigit, seeds)} == {str(run.folder)[-3:] for run in command.runs} or not command.runs


def test_paper_trains_one_entry_as_planned_and_again_nothing(gridded, monkeypatch):
    monkeypatch.chdir(gridded)
    _, entries = paper_args(*GRID, "--only", "image/cifar10/resnet20-mobilenetv2", monkeypatch=monkeypatch)
    planned = paper.unique_runs(entries)
    assert set(planned) == {path for path in Path("runs").iterdir() if path.name != "teacher-logits"} and len(planned) == 3
    assert {paper.state(run) for _, run in planned.values()} == {("finished", 2)}
    out = Path("results/paper/image/cifar10/resnet20-mobilenetv2-quick")
    deviation = common.read_json(out / "deviation.json")
    assert deviation["seeds"] == 1 and "control" in deviation["tables"]["test"]["predicted"]
    before = files_below(".")
    again = ok(run_cli("paper.py", *GRID, "--only", "image/cifar10/resnet20-mobilenetv2", cwd=gridded))
    assert "$ python" not in again and "finished already" in again and files_below(".") == before
    # Another student of that teacher: teacher, views and control are shared, so only itself is trained.
    teacher = files_below("runs/cifar10-resnet20-quick-teacher-s0")
    shard = ok(run_cli("paper.py", *GRID, "--only", "image/cifar10/resnet20-resnet20", "--shard", "0/9", cwd=gridded))
    assert shard.count("$ python train_student.py") == 2 and shard.count("$ python") == 2   # the control, the student; no figure
    assert files_below("runs/cifar10-resnet20-quick-teacher-s0") == teacher
    assert len(list(Path("runs/teacher-logits").iterdir())) == 1   # one stream of views, one teacher: one set of tables
    assert not Path("results/paper/image/cifar10/resnet20-resnet20-quick").exists()


def test_paper_draws_again_when_a_run_is_newer(gridded, monkeypatch):
    monkeypatch.chdir(gridded)
    _, entries = paper_args(*GRID, "--only", "image/cifar10/resnet20-mobilenetv2", monkeypatch=monkeypatch)
    teacher, control, student, figure = entries[0][1]
    assert all(map(paper.up_to_date, entries[0][1]))
    logits = student.runs[0].folder / "logits.npz"
    later = (figure.draws / "paper.json").stat().st_mtime_ns + 10 ** 9
    os.utime(logits, ns=(later, later))
    assert paper.up_to_date(student) and not paper.up_to_date(figure)
    os.utime(teacher.runs[0].folder / "logits.npz", ns=(later + 1, later + 1))   # the teacher was trained again since
    assert not paper.up_to_date(student) and paper.up_to_date(control)
    for run in (logits, teacher.runs[0].folder / "logits.npz"):
        os.utime(run, ns=(later - 2 * 10 ** 9,) * 2)
    assert paper.up_to_date(figure) and not paper.up_to_date(figure._replace(words=(*figure.words, "--bootstrap", "100")))


def test_paper_dry_run_says_states_and_times_and_writes_nothing(gridded, tmp_path):
    kd, onehot, teacher = (tmp_path / "runs" / f"cifar10-{name}-s0" for name in ("resnet20-mobilenetv2-quick-kd", "mobilenetv2-quick-onehot", "resnet20-quick-teacher"))
    for run in (kd, onehot, teacher):
        shutil.copytree(gridded / "runs" / run.name, run)
    (kd / "logits.npz").unlink()
    (kd / "metrics.jsonl").write_text((kd / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    config = json.loads((onehot / "config.json").read_text())
    (onehot / "config.json").write_text(json.dumps(dict(config, flags=dict(config["flags"], lr=7.0))))
    before = files_below(tmp_path)
    text = ok(run_cli("paper.py", *GRID, "--only", "image/cifar10/resnet20-mobilenetv2", "image/cifar10/mobilenetv2-resnet20", "--dry-run", cwd=tmp_path))
    assert files_below(tmp_path) == before   # and without the data
    line = {part[0]: " ".join(part[1:]) for part in map(str.split, text.splitlines()) if part and part[0].startswith("runs/")}
    assert line[str(teacher.relative_to(tmp_path))] == "finished 0 s"
    assert line[str(kd.relative_to(tmp_path))].startswith("at epoch 1 of 2 ")
    assert line[str(onehot.relative_to(tmp_path))].startswith("other settings: lr 7.0 there, 0.1 here ")
    assert line["runs/cifar10-mobilenetv2-quick-teacher-s0"].startswith("not started ")
    assert len(line) == 6 and all(value.endswith((" s", " min", " h")) for value in line.values())
    assert "image         2 entries     6 runs, 1 finished" in text and "not drawn" in text


def test_paper_estimate_counts_steps_images_and_what_is_left(tmp_path, monkeypatch):
    args, entries = paper_args("--runs", tmp_path, "--seeds", 0, "--only", "switching/cifar100/", monkeypatch=monkeypatch)
    runs = {run.folder.name: run._replace(unit=lambda: 0.001) for _, run in paper.unique_runs(entries).values()}
    whole = 450 * 48 * 1024 * 0.001 * (1 + 10_000 / 50_000 / 3)   # the paper's recipe: 450 epochs of 48 batches of 1,024
    assert paper.seconds_left(runs["cifar100-resnet56-paper-teacher-s0"]) == pytest.approx(whole)
    assert paper.seconds_left(runs["cifar100-resnet56-paper-onehot2kd-0.75-s0"]) == pytest.approx(whole / 4)
    started = runs["cifar100-resnet56-paper-kd-s0"]
    started.folder.mkdir()
    common.write_json(started.folder / "config.json", dict(flags=started.flags, data={}, facts={}))
    common.write_metrics(started.folder, [dict(epoch=epoch) for epoch in range(1, 151)])
    assert paper.state(started) == ("at epoch 150 of 450", 150) and paper.seconds_left(started) == pytest.approx(whole * 2 / 3)
    assert paper.seconds_left(started._replace(unit=lambda: None)) is None
    assert paper.in_words([30.0, 30.0, None]) == "60 s left, and 1 not estimated"


def test_paper_goes_on_after_a_failed_entry_and_names_it(gridded):
    # The CIFAR-100 file is damaged; what CIFAR-10 has is finished. The teacher is not tried again for the second entry.
    (gridded / "d" / "cifar100.npz").write_bytes(b"torn")
    process = run_cli("paper.py", *GRID, "--only", "image/cifar100/resnet20-", "image/cifar10/resnet20-mobilenetv2", cwd=gridded)
    assert process.returncode == 1 and process.stdout.count("$ python") == 1, process.stdout + process.stderr
    assert "1 of 4 entries are done" in process.stdout
    failed = [line for line in process.stderr.splitlines() if " failed: " in line]
    assert len(failed) == 3 and all("cifar100.npz" in line and "make it again" in line for line in failed)


@pytest.mark.parametrize("flags, words", [
    (["--only", "imagenet-21k"], ["imagenet-21k", "--dry-run"]), (["--shard", "2/2"], ["2/2", "0 to n-1"]), (["--shard", "a"], ["--shard"]),
    (["--seeds", "1", "1"], ["twice"]), (["--extra=--arch mlp"], ["--arch", "grid"]), (["--extra=--epohcs 1"], ["--epohcs"]),
    (["--extra=--temperature 2"], ["--temperature"])])
def test_paper_refuses_bad_flags(tmp_path, flags, words):
    one_line_error(run_cli("paper.py", "--dry-run", *flags, cwd=tmp_path), *words)
    assert not list(tmp_path.iterdir())
