import itertools
import json
import os
import shutil
from pathlib import Path

import pytest

import common
import paper
from test_smoke import ok, one_line_error, run_cli, write_arrays


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
