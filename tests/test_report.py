"""The page of report.py and the published tables, from run folders and results written by hand."""

import base64
import io
import os
import shutil
import sys
from html.parser import HTMLParser
from pathlib import Path

import claims
import deviation
import report
import runs

import numpy as np
from helpers import finished, refused
from PIL import Image
from PIL.PngImagePlugin import PngInfo

FLAGS = dict(data="cifar100", subset=0, label_noise=0.0, data_seed=0, arch="resnet56", width=1.0, epochs=2)
FLAGS.update(batch_size=512, lr=0.4, precision="fp32", out=None, seeds=[0, 1])
VERSIONS = dict(python="3.11.1", torch="2.9.9", numpy="2", git_commit="a" * 40, hardware="Abacus 3000", threads=1)
SLOPE = "slope of the student's fit exceeds 1"


def write_run(folder, role="student", seed=0, accuracy=0.7, facts=None, **more):
    """A finished run folder written by hand: of a student with `facts` of its teacher, or of one without."""
    flags = FLAGS | more
    if role != "teacher":
        flags.update(kd_weight=1.0 if facts else 0.0, ce_weight=0.0 if facts else 1.0, temperature=4.0)
    data = dict(name=flags["data"], classes=100, image=[32, 32, 3], n_train=50000, n_test=10, subset=flags["subset"])
    data.update(label_noise=flags["label_noise"], data_seed=0, sha256="d" * 64)
    facts = dict(teacher_sha256="e" * 64, **facts) if facts else dict(teacher_sha256=None)
    folder.mkdir(parents=True)
    config = dict(role=role, seed=seed, arch=flags["arch"], flags=flags, data=data, facts=facts, parameters=1)
    config.update(command=f"python train.py --out {folder.name}", versions=VERSIONS)
    runs.write_json(folder / "config.json", config)
    runs.write_metrics(folder, [dict(epoch=k, step=10 * k, test_acc=accuracy, seconds=900.0 + seed) for k in (1, 2)])
    # Of two classes, the second is predicted for all points.
    logits = dict(test_logits=np.tile([0.0, 1.0], (1000, 1)), test_labels=np.arange(1000) < round(1000 * accuracy))
    runs.write_npz(folder / "logits.npz", logits)


def claim(text, value=0.886, low=0.836, high=0.941, **more):
    fields = dict(claim=text, expected="> 1", measured=value, low=low, high=high, note="over points and 5 seeds")
    verdict = "unclear" if value is None else claims.verdict((low, high), 1)
    shown = claims.in_unit(dict(value=value, low=low, high=high))
    return fields | dict(verdict=verdict, shown=shown, control="") | more


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
        self.source = source
        self.open = []
        self.tags = []
        self.text = ""
        self.rows = []
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
    fits = "over points and 5 seeds; the teacher fits 80.0% of its training labels: it does not interpolate them"
    rows = [claim(f"train: {SLOPE}"), claim(f"test: {SLOPE}", 1.2, 1.1, 1.3), claim("one seed", 0.5, -np.inf, np.inf)]
    rows += [claim("counted", 0, 0, 0, note="of 9; over points and 5 seeds"), claim("several", verdict="mixed")]
    late = claims.headline(claim("late", control="0.50 [0.40, 0.60]"), "language")
    early = claim("early", 0.5, 0.4, 0.6, note=f"difference; {fits}", shown="50.0 [40.0, 60.0] points")
    early = claims.headline(early, "§3.2")
    results = tmp_path / "results"
    write_results(results / "a_copy", [*rows, late], figure="fig1b", command="python switch_distill.py")
    write_results(results / "set" / "pays", figure="pays", command="python when_it_pays.py")
    write_results(results / "set" / "a", [early, claim("other", note=fits)], figure="linear")
    write_results(results / "set" / "fig1a", rows, command="python analyze_deviation.py --title 'a <b>'")
    write_results(results / "z", [claim("undefined", None, None, None, verdict="unclear")], "own", "python own.py")
    for seed, accuracy in ((0, 0.70), (1, 0.72)):
        write_run(tmp_path / "runs" / f"t-s{seed}", "teacher", seed, accuracy)
        write_run(tmp_path / "runs" / f"kd-s{seed}", "student", seed, accuracy + 0.03, dict(teacher=f"runs/t-s{seed}"))
    page = page_of(tmp_path)

    # The first table, and under each claim where it is from, of what its interval is, and what the teacher fits.
    first, second = page.rows[1:3]
    assert first[0] == f"§3.2 early\n{results / 'set' / 'a'} (; difference; ){fits}"
    assert first[1:] == ["> 1", "50.0 [40.0, 60.0] points", "–", "✗ fails"]
    assert second[0].startswith("language late") and second[2:4] == ["0.89 [0.84, 0.94]", "0.50 [0.40, 0.60]"]
    assert page.source.count(f'<span class="warned">{fits}') == 1
    for term in ("φ", "hardest quarter", "one-hot", "KD, T", "s"):  # what the words mean stands above it
        assert page.source.index(f"<b>{term}</b>") < page.source.index("early")
    # Folders of one setting stand together, in the paper's order; what is not known comes last.
    commands = "switch_distill.py own.py analyze_deviation.py when_it_pays.py".split() + ["not record its"]
    assert sorted(commands, key=page.text.index) == commands
    parts = [attributes["id"] for tag, attributes in page.tags if tag == "section" and attributes]
    assert parts == [f"part-{k}" for k in range(5)]
    assert [attributes["href"] for tag, attributes in page.tags if tag == "a"] == ["#part-4", "#part-0"]

    assert "All 5 claims: 1 holds, 2 fails, 1 unclear, 1 mixed" in page.text
    assert page.of(f"train: {SLOPE}")[0] == [f"train: {SLOPE}", "> 1", "0.89 [0.84, 0.94]", "✗ fails"]
    assert page.of(f"test: {SLOPE}")[0][3] == "✓ holds" and page.of("several")[0][3] == "± mixed"
    # What all notes of a table end with stands once, above it.
    assert page.of("counted")[0][0] == "counted (of 9)"

    # 95% interval of 70 and 72 with one degree of freedom: 71 ± 12.71.
    teacher, student = page.of("teacher, resnet56")[0], page.of("KD, T = 4, resnet56")[0]
    assert teacher[1:] == ["2 epochs, batch 512, lr 0.4, fp32", "2", "71.00 [57.99, 84.01]"]
    assert student[0].endswith("kd-s*, teacher runs/t-s*)") and student[3] == "74.00 [61.01, 86.99]"
    assert "Trained on Abacus 3000, python 3.11.1, torch 2.9.9, numpy 2." in page.text


def test_seeds_of_one_setting_and_one_kind_of_teacher_are_pooled(tmp_path):
    folder = tmp_path / "runs"
    for seed in (0, 1, 2):
        whole = dict(teacher=f"runs/t-0.5-s{seed}")
        write_run(folder / f"kd-0.5-s{seed}", seed=seed, facts=whole)
        write_run(folder / f"wide-s{seed}", seed=seed, facts=whole, width=2.0)
        write_run(folder / "sub" / str(seed) / "kd", seed=seed, facts=whole, lr=0.1 if seed == 2 else 0.4)
        weights = dict(teacher="own/net.pth", teacher_arch="torchvision:resnet18")
        write_run(folder / f"foreign-s{seed}", seed=seed, facts=weights)
        another = dict(whole, loss=["def dkd_loss(model, images):", "    return 0"])
        write_run(folder / f"other-s{seed}", seed=seed, facts=another)
        switch = dict(whole, switch=dict(direction="onehot2kd", step=10))
        write_run(folder / f"half-s{seed}", seed=seed, facts=switch)
        write_run(folder / f"onehot-s{seed}", seed=seed)
    page = page_of(tmp_path)
    rows = {row[0].partition(f"({folder}/")[2].rstrip(")"): row for row in page.rows if f"({folder}/" in row[0]}
    found = {name: (row[0].partition(" (")[0], row[2]) for name, row in rows.items() if "sub" not in name}
    assert found == {
        "kd-0.5-s*, teacher runs/t-0.5-s*": ("KD, T = 4, resnet56", "3"),
        "wide-s*, teacher runs/t-0.5-s*": ("KD, T = 4, resnet56 ×2", "3"),
        "foreign-s*, teacher own/net.pth (torchvision:resnet18": ("KD, T = 4, resnet56", "3"),
        "other-s*, teacher runs/t-0.5-s*": ("dkd_loss, T = 4, resnet56", "3"),
        "half-s*, teacher runs/t-0.5-s*": ("one-hot → KD at s = 0.5, resnet56", "3"),
        "onehot-s*": ("one-hot, resnet56", "3"),
    }
    # Another rate is another setting.
    assert sorted(row[2] for name, row in rows.items() if "sub" in name) == ["1", "2"]


def test_what_is_damaged_is_left_out_alone_and_the_page_says_so(tmp_path, capsys):
    folder, results = tmp_path / "runs", tmp_path / "results"
    for name in "good torn-config unfinished no-metrics odd-data no-test-logits".split():
        write_run(folder / name)
    (folder / "torn-config" / "config.json").write_text('{"role": "stu')
    (folder / "unfinished" / "logits.npz").unlink()
    (folder / "no-metrics" / "metrics.jsonl").unlink()
    runs.write_npz(folder / "no-test-logits" / "logits.npz", dict(train_logits=np.zeros((2, 2))))
    config = runs.read_json(folder / "odd-data" / "config.json")
    runs.write_json(folder / "odd-data" / "config.json", config | dict(data=dict(name=3)))
    tables = dict(good=[claim("a fine claim")], torn=None, half=[dict(claim="half")], empty=dict(a=1))
    tables.update(odd=[claim("a", verdict=["holds"])], headline=[dict(claim="a", section="§4", verdict="holds")])
    for name, rows in tables.items():
        write_results(results / name, rows or ())
        if name != "good":
            runs.write_json(results / name / "claims.json", rows)
    (results / "torn" / "claims.json").write_text("[")
    content = (results / "good" / "fig1a.png").read_bytes()
    for name, torn in (("half", content[: len(content) // 2]), ("empty", b"")):
        (results / name / "fig1a.png").write_bytes(torn)
    page = page_of(tmp_path)
    damaged = [path for path in (*folder.iterdir(), *results.rglob("claims.json")) if "good" not in path.parts]
    damaged += [results / name / "fig1a.png" for name in ("half", "empty")]
    listed = page.text[page.text.index("\n12 damaged or unfinished:\n") :]
    assert len(damaged) == 12 and all(str(path) in listed for path in damaged)
    assert "unfinished is not finished (no logits.npz): continue it with: python train.py --out unfinished" in listed
    assert "1 runs, 4 figures and 1 claims; 12 damaged or unf" in capsys.readouterr().out
    assert "a fine claim" in page.text and len(page.of("one-hot, resnet56")) == 1


def test_the_page_is_one_file_and_escapes_what_it_shows(tmp_path):
    evil = '<script src="http://x/y.js"></script>|*_`[a](b) {{ 1 }} & "q"'
    write_run(tmp_path / "runs" / '<b>&"|-s0', facts=dict(teacher=evil))
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
        assert not any(name.startswith("on") for name in attributes)
        assert attributes.get("src", "data:").startswith("data:")
        assert attributes.get("href", "#").startswith(("#", "data:"))
    assert "url(" not in page.source and "@import" not in page.source and "prefers-color-scheme: dark" in page.source
    (image,) = [attributes for tag, attributes in page.tags if tag == "img"]
    with Image.open(io.BytesIO(base64.b64decode(image["src"].partition("base64,")[2]))) as picture:
        assert picture.format == "WEBP" and picture.size == (300, 150)
    assert image["alt"] == '<b "q">' and page.text.count(evil) == 13 and '<b>&"|-s0' in page.text
    assert "?/config.json cannot be read" in page.text


def test_the_same_inputs_give_the_same_bytes(tmp_path):
    for name in ("b", "a", "c"):
        write_run(tmp_path / "runs" / name)
        write_results(tmp_path / "results" / name, [claim(name)])
    first = page_of(tmp_path).source
    (tmp_path / "runs").rename(tmp_path / "other")
    for name in ("c", "a", "b"):  # in another order, and at another time
        shutil.copytree(tmp_path / "other" / name, tmp_path / "runs" / name)
        os.utime(tmp_path / "runs" / name / "config.json", (1, 1))
    assert page_of(tmp_path).source == first


def test_figures_record_the_command_that_made_them(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["/where/ever/eigenspace.py", "--out", "a “b”", "--overwrite", "--seeds", "1"])
    claims.save_figure(claims.pyplot().figure(figsize=(12, 1)), tmp_path, "linear")
    figure = report.read_figure(tmp_path / "linear.png")
    assert figure.command.startswith("python ") and figure.command.endswith("eigenspace.py --out 'a “b”' --seeds 1")
    assert figure.caption.startswith("§4, least squares")


def test_a_report_of_nothing_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "nothing to report: run make reproduce first" in refused(report)
    assert "nowhere is not a folder" in refused(report, "--runs", "nowhere")
    assert "README.md must end in .json" in refused(report, "--keep", "README.md")
    write_results(tmp_path / "elsewhere", [claim("one")])
    assert "a/b/index.html" in finished(report, "--results", "elsewhere", "--out", "a/b")


def test_what_is_kept_is_what_readme_and_results_say(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    results = Path("results")
    kept = Path("docs/results")
    rng = np.random.default_rng(0)
    points = {}
    for split in ("train", "test"):  # of a teacher that fits 80%
        teacher = rng.normal(size=(200, 3)) * 3
        labels = (teacher.argmax(1) + (np.arange(200) >= 160)) % 3
        networks = dict(student=1.2 * teacher, control=0.5 * teacher + rng.normal(size=(200, 3)))
        points[split] = [dict(teacher=teacher, labels=labels, networks=networks)]
    deviation.report(points, results / "fig1a", "a title", 100, quiet=True)
    spoken = claims.headline(claim("spoken", control="0.50 [0.40, 0.60]"), "language")
    write_results(results / "glue", [claim("only in the JSON"), spoken], "own", command="python glue_distill.py")
    (results / "glue" / "torn.png").write_bytes(b"torn")
    half = dict(teacher="t", switch=dict(direction="onehot2kd", step=10))
    for name, facts in dict(onehot=None, kd=dict(teacher="t"), half=half).items():
        write_run(Path("runs") / f"{name}-s0", facts=facts)
    for name in ("rte", "sst-2", "digits"):
        printed = finished(report, "--keep", kept / f"{name}.json", "--title", f"task {name}")
        assert "left out: results/glue/torn.png cannot be read" in printed
        assert Image.open(kept / f"{name}.webp").width > 1000
    digits = runs.read_json(kept / "digits.json")
    assert {"python glue_distill.py", "python train.py --out kd-s0"} <= set(digits["commands"])
    assert "a" * 40 in digits["commits"] and digits["made"] == ["Abacus 3000, python 3.11.1, torch 2.9.9, numpy 2"]
    assert "only in the JSON" in str(digits["claims"]) and (kept / "digits.json").stat().st_size < 40_000
    digits["rows"][0]["fit"] = 0.95
    runs.write_json(kept / "digits.json", digits)
    (kept / "speed.md").write_text("| so fast |\n")

    marks = [
        (f"<!-- {name}: written by make docs -->", f"<!-- end of {name} -->") for name in ("headlines", "rows", "speed")
    ]
    Path("README.md").write_text("before\n" + "".join(f"{a}\nold table\n{b}\n" for a, b in marks) + "after\n")
    for _ in range(2):  # the second time changes nothing
        finished(report, "--docs", "docs")
        readme = Path("README.md").read_text()
        assert readme.startswith("before\n") and readme.endswith("\nafter\n") and "old table" not in readme
    parts = [readme.partition(first)[2].partition(last)[0].strip().splitlines() for first, last in marks]
    headlines, rows = [[line.strip("|").split("|") for line in part] for part in parts[:2]]
    assert headlines[0] == ["claim (its control)", "task digits", "task sst-2"]  # a column only for some settings
    assert headlines[2][1:] == ["95.0%; 1", "80.0%, does not interpolate; 1"]
    slope = [line for line in headlines if line[:2] == ["§3.1", f"train: {SLOPE}"]][0][2]
    assert slope.startswith("1.20 [1.20, 1.21] (0.") and "**holds**" in slope
    assert headlines[-1][:3] == ["language", "spoken", "0.89 [0.84, 0.94] (0.50), **fails**"]
    # A line for each setting on real data, in the paper's order: accuracies of teacher, control, student, half switch.
    assert [line[:3] for line in rows[2:]] == [[f"task {name}", "1", headlines[2][2][:-3]] for name in ("sst-2", "rte")]
    assert rows[2][3] == rows[2][5] == "80.0" and rows[2][6] == "70.0" and slope.startswith(rows[2][7])
    assert parts[2] == ["|so fast|"]
    text = Path("docs/results.md").read_text()
    whole = "0.89 [0.84, 0.94] (0.50 [0.40, 0.60]), **fails**"  # with the control's interval
    for part in (
        "\n".join(parts[1]),
        whole,
        "## task digits",
        "0.5 hours",
        "(results/rte.webp)",
        "(results/fig1a-rows.webp)",
    ):
        assert part in text, part
    assert text.index("## task digits") < text.index("## task sst-2") < text.index("## task rte")
    assert "only in the JSON" not in text
    with Image.open(kept / "fig1a-rows.webp") as picture:
        assert len(picture.convert("RGB").getcolors(1_000_000)) > 100
    (kept / "cola.json").write_text('{"title": "of an earlier version"}')
    assert "docs/results cannot be read" in refused(report, "--docs", "docs")
