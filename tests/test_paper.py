"""paper.py: what the grid holds, what of it is done, shards, and one entry trained at tiny size."""

import importlib
import itertools
import json
import os
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
from helpers import files_below, run_cli, write_arrays

import benchmark
import denoise_gradients
import glue_distill
import paper
import runs
import switch_distill

TINY = ["--recipe", "quick", "--seeds", 0, "--device", "cpu", "--data-dir", "d"]
TINY += ["--extra=--epochs 2 --width 0.25 --subset 200 --batch-size 100"]
ENTRY = ["--only", "image/cifar10/resnet20-mobilenetv2"]


def entries_of(*flags):
    """The entries that paper.py would work on with these flags."""
    caught = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "dry_run", caught.extend)
        paper.main(["--dry-run", "--device", "cpu", *map(str, flags)])
    return caught


def folders_of(entries):
    return {run.folder for entry in entries for run in entry.runs}


def train(*flags):
    """Run paper.py here, its scripts forked. Returns the commands that it ran."""
    commands = []

    def forked(words):
        commands.append(words)
        process = run_cli(*words, cwd=Path.cwd())
        return process.stderr if process.returncode else None

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(paper, "execute", forked)
        paper.main([str(flag) for flag in flags])
    return commands


@pytest.fixture(scope="module")
def gridded(tmp_path_factory):
    """A folder in which one image entry has been trained and drawn at tiny size, on a made-up cifar10.npz."""
    folder = tmp_path_factory.mktemp("a grid")
    (folder / "d").mkdir()
    write_arrays(folder / "d" / "cifar10.npz", n=200, side=12, classes=10)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        assert len(train(*TINY, *ENTRY)) == 4
    return folder


# ---------------------------------------------------------------- the grid


def test_grid_holds_what_the_paper_has():
    entries = entries_of()
    names = [entry.name for entry in entries]
    nets = ("resnet56", "resnet20", "mobilenetv2")
    data = ("cifar10", "cifar100", "cifar100-noisy", "tiny-imagenet")
    assert {f"image/{d}/{t}-{s}" for d in data for t in nets for s in nets} <= set(names)
    of_imagenet = ("resnet50-resnet50", "resnet50-resnet18", "resnet18-resnet18")
    assert {f"image/imagenet/{pair}" for pair in of_imagenet} <= set(names)
    tasks = ("mnli", "imdb", "qqp", "ag_news", "cola", "sst-2", "mrpc", "rte", "qnli")
    students = ("roberta-base", "distilroberta-base", "small")
    assert {f"language/{task}/roberta-base-{s}" for task in tasks for s in students} <= set(names)
    assert set(tasks) <= set(glue_distill.TASKS)
    sections = {"image", "language", "switching", "eigenspace", "denoising"}
    assert {name.partition("/")[0] for name in names} == sections and len(set(names)) == len(names)
    # A teacher and a control are trained by one command wherever they are needed.
    trained = {
        tuple(w) for entry in entries for w in entry.commands if w[0] in ("train_teacher.py", "train_student.py")
    }
    assert len(trained) == len({words[words.index("--out") + 1] for words in trained}) == 4 * (3 + 3 + 9) + (2 + 2 + 3)
    noisy = [words for entry in entries if "noisy" in entry.name for words in entry.commands]
    assert all("0.2" in words for words in noisy if words[0] != "analyze_deviation.py")
    some = [entry.name for entry in entries_of("--only", "cifar10/", "switching/")]
    assert some == [name for name in names if "cifar10/" in name or "switching/" in name] and len(some) == 11


def test_run_folders_are_those_of_the_scripts():
    args = SimpleNamespace(direction=list(switch_distill.SWITCHES), window=0)
    (switching,) = entries_of("--seeds", 3, "--only", "switching/cifar100/")
    words, total = switching.commands[-1], 1000
    given = words[words.index("--switch-at") + 1 : words.index("--out")]
    steps = {float(share): round(float(share) * total) for share in given}
    folders, trunks = switch_distill.run_folders("runs/cifar100-resnet56-paper", args, 3, steps, total)
    teacher = Path("runs/cifar100-resnet56-paper-teacher-s3")
    assert folders_of([switching]) == {*folders.values(), *trunks.values(), teacher}

    (denoising,) = entries_of("--seeds", 3, "--only", "denoising/cifar100-noisy/")
    whats = ("teacher", "onehot", "kd", "smooth")
    assert folders_of([denoising]) == {Path(f"runs/cifar100-noisy-resnet20-paper-{what}-s3") for what in whats}
    words = denoising.commands[-1]
    args.teacher, args.out = None, words[words.index("--out") + 1]
    assert folders_of([denoising]) == {denoise_gradients.run_folder(what, args, 3) for what in whats}

    (language,) = entries_of("--seeds", 3, "--only", "language/cola/roberta-base-distil")
    networks = ("roberta-base", "distilroberta/distilroberta-base")
    flags = SimpleNamespace(teacher=networks[0], student=networks[1:], mode=["onehot", "kd"], window=0, mlm_epochs=0)
    flags.teacher_run, models = None, dict.fromkeys(networks, SimpleNamespace(scratch=False))
    folders = glue_distill.run_folders(flags, "runs/cola", 3, models)
    assert folders_of([language]) == {run for what, run in folders.items() if not what.endswith(" mlm")}

    of_cpu = entries_of("--recipe", "cpu", "--seeds", 3, "--only", "cifar100/resnet20", "sst-2")
    args.direction, flags.teacher, flags.student = ["onehot2kd"], "4x256", ["4x256"]
    folders, trunks = switch_distill.run_folders("runs/cpu-cifar100-resnet20", args, 3, {0: 0, 0.5: 5, 1: 10}, 10)
    teacher = Path("runs/cpu-cifar100-resnet20-teacher-s3")
    assert folders_of(of_cpu[:1]) == {*folders.values(), *trunks.values(), teacher}
    flags.mode, flags.switch_at = ["onehot", "kd", "onehot2kd"], [0.5]
    assert folders_of(of_cpu[1:]) == set(glue_distill.run_folders(flags, "runs/cpu-sst-2", 3, {}).values())


def test_scripts_take_the_commands_of_the_grid(monkeypatch):
    class Parsed(Exception):
        pass

    parse_args = runs.Parser.parse_args

    def parse(parser, argv=None):
        parse_args(parser, argv)
        raise Parsed

    several = ["--only", "/cifar100", "imagenet/", "cola", "digits", "--seeds", "0", "3"]
    entries = entries_of(*several) + entries_of(*several, "--shard", "0/2")
    entries += entries_of("--recipe", "cpu") + entries_of("--recipe", "cpu", "--shard", "0/2")
    monkeypatch.setattr(runs.Parser, "parse_args", parse)
    commands = {tuple(words) for entry in entries for words in entry.commands}
    assert len({words[0] for words in commands}) == 8
    for words in commands:
        with pytest.raises(Parsed):
            importlib.import_module(words[0].removesuffix(".py")).main(words[1:])


def test_imagenet_is_read_from_the_data_folder():
    (entry,) = entries_of("--data-dir", "my data", "--seeds", 0, "--only", "imagenet/resnet50-resnet18")
    assert [words[0] for words in entry.commands[:3]] == ["train_teacher.py", "train_student.py", "train_student.py"]
    for words, arch in zip(entry.commands, ("resnet50", "resnet18", "resnet18"), strict=False):
        flags = {words[k]: words[k + 1] for k in range(1, len(words) - 1)}
        assert (flags["--data"], flags["--arch"]) == ("folder:my data/imagenet", f"torchvision:{arch}")
        assert flags["--image-size"] == "224" and flags["--recipe"] == "paper"
    assert {run.flags.epochs for run in entry.runs} == {90} and {run.flags.batch_size for run in entry.runs} == {1024}


def test_the_cpu_recipe_lists_its_entries_in_order(capsys):
    entries = entries_of("--recipe", "cpu")
    names = ["cifar100/resnet20", "cifar100-noisy/resnet20", "cifar100/resnet56-resnet20"]
    names = [f"image/{name}" for name in (*names, "cifar100/resnet56-mobilenetv2", "cifar10/resnet20")]
    assert [e.name for e in entries] == [*names, "language/sst-2/4x256-4x256", "image/tiny-imagenet/resnet20"]
    assert [len(entry.seeds) for entry in entries] == [2, 2, 1, 1, 2, 2, 1]
    by_name = {entry.name.partition("/")[2]: entry for entry in entries}
    commands = {name: [" ".join(words) for words in entry.commands] for name, entry in by_name.items()}

    for name in ("cifar100", "cifar100-noisy", "cifar10", "tiny-imagenet"):
        train, draw, _ = commands[f"{name}/resnet20"]
        assert train.startswith(f"switch_distill.py --data {name.removesuffix('-noisy')} ")
        assert "--direction onehot2kd --switch-at 0 0.5 1 " in train and train.endswith(" --jobs 2")
        assert f"--out runs/cpu-{name}-resnet20 --results results/cpu/image/{name}/resnet20/fig1b " in train
        assert f"--out results/cpu/image/{name}/resnet20/fig1a " in draw and draw.startswith("analyze_deviation.py ")
        assert f"--teacher runs/cpu-{name}-resnet20-teacher-s0 " in draw
        assert ("--label-noise 0.2 " in train) == (name == "cifar100-noisy")
        flags = by_name[f"{name}/resnet20"].runs[0].flags
        assert (flags.subset, flags.batch_size) == (0 if name == "tiny-imagenet" else 10_000, 128)
        assert (flags.recipe, flags.epochs) == ("quick", paper.CPU[name])
    teacher, control, kd, draw = commands["cifar100/resnet56-mobilenetv2"]
    assert teacher.startswith("train_teacher.py") and "--arch resnet56 " in teacher
    assert "--kd-weight 0 --ce-weight 1 " in control and "--arch mobilenetv2 " in control
    assert "--teacher runs/cpu-cifar100-resnet56-teacher-s{seed} " in kd and "/resnet56-mobilenetv2/fig1a " in draw
    (text,) = commands["sst-2/4x256-4x256"]
    assert text.startswith("glue_distill.py --task sst-2 --teacher 4x256 --student 4x256 --mode onehot kd onehot2kd ")
    # The one-hot control of the first entry serves the pair with another teacher too.
    shared = folders_of([by_name["cifar100/resnet20"]]) & folders_of([by_name["cifar100/resnet56-resnet20"]])
    assert shared == {Path("runs/cpu-cifar100-resnet20-onehot-s0")}
    assert [e.name for e in entries_of("--recipe", "cpu", "--only", "image/cifar100/resnet20")] == names[:1]
    assert {tuple(entry.seeds) for entry in entries_of("--recipe", "cpu", "--seeds", 7)} == {(7,)}

    paper.main(["--recipe", "cpu", "--device", "cpu", "--dry-run", "--only", "sst-2"])
    assert "results/cpu/language/sst-2/4x256-4x256/4x256/switch" in capsys.readouterr().out


@pytest.mark.parametrize("n", (2, 5, 40))
def test_shards_share_no_run_and_leave_none_out(n):
    whole = entries_of("--seeds", 0, 3)
    shards = [entries_of("--seeds", 0, 3, "--shard", f"{i}/{n}") for i in range(n)]
    folders = [folders_of(shard) for shard in shards]
    assert not any(one & other for one, other in itertools.combinations(folders, 2))
    assert set().union(*folders) == folders_of(whole)
    for entry in itertools.chain(*shards):
        for words in entry.commands:  # each trains the one seed whose runs the entry has, and draws nothing
            assert words[-2:] == ["--shard", f"{[0, 3].index(int(entry.name[-1]))}/2"] and "analyze" not in words[0]
        assert {str(run.folder)[-3:] for run in entry.runs} <= {f"-s{entry.name[-1]}"} and not entry.results
    of_cpu = [entries_of("--recipe", "cpu", "--shard", f"{i}/{n}") for i in range(n)]  # entries of one seed and of two
    folders = [folders_of(shard) for shard in of_cpu]
    assert not any(one & other for one, other in itertools.combinations(folders, 2))
    assert set().union(*folders) == folders_of(entries_of("--recipe", "cpu"))


# ---------------------------------------------------------------- training and states


def test_an_entry_is_trained_as_planned_and_again_nothing(gridded, monkeypatch, capsys):
    monkeypatch.chdir(gridded)
    (entry,) = entries_of(*TINY, *ENTRY)
    assert {path for path in Path("runs").iterdir()} == folders_of([entry]) and len(entry.runs) == 3
    assert {paper.state(run) for run in entry.runs} == {("finished", 2)} and paper.is_done(entry)
    deviation = runs.read_json("results/quick/image/cifar10/resnet20-mobilenetv2/fig1a/deviation.json")
    assert deviation["seeds"] == 1 and "control" in deviation["tables"]["test"]["predicted"]
    before = files_below(".")
    assert train(*TINY, *ENTRY) == [] and files_below(".") == before
    assert "done already" in capsys.readouterr().out
    # Another student of that teacher, in a shard: only itself and its control are trained, and nothing is drawn.
    teacher = files_below("runs/cifar10-resnet20-quick-teacher-s0")
    commands = train(*TINY, "--only", "image/cifar10/resnet20-resnet20", "--shard", "0/9")
    assert [words[0] for words in commands] == ["train_teacher.py", "train_student.py", "train_student.py"]
    assert files_below("runs/cifar10-resnet20-quick-teacher-s0") == teacher and len(list(Path("runs").iterdir())) == 5
    assert not Path("results/quick/image/cifar10/resnet20-resnet20").exists()


def test_a_figure_is_drawn_again_when_a_run_is_newer(gridded, monkeypatch):
    monkeypatch.chdir(gridded)
    (entry,) = entries_of(*TINY, *ENTRY)
    logits, claims = entry.runs[-1].folder / "logits.npz", entry.results[0] / "claims.json"
    for later, done in ((10**9, False), (-(10**9), True)):
        time = claims.stat().st_mtime_ns + later
        os.utime(logits, ns=(time, time))
        assert paper.is_done(entry) == done
    assert not paper.is_done(entry._replace(results=[*entry.results, Path("results/other")]))


def test_dry_run_says_states_and_times_and_writes_nothing(gridded, tmp_path, monkeypatch, capsys):
    names = ("resnet20-mobilenetv2-quick-kd", "mobilenetv2-quick-onehot", "resnet20-quick-teacher")
    kd, onehot, teacher = (tmp_path / "runs" / f"cifar10-{name}-s0" for name in names)
    for run in (kd, onehot, teacher):
        shutil.copytree(gridded / "runs" / run.name, run)
    (kd / "logits.npz").unlink()
    (kd / "metrics.jsonl").write_text((kd / "metrics.jsonl").read_text().splitlines()[0] + "\n")
    config = json.loads((onehot / "config.json").read_text())
    (onehot / "config.json").write_text(json.dumps(dict(config, flags=dict(config["flags"], lr=7.0))))
    (tmp_path / "runs" / "cifar10-resnet20-quick-onehot-s0").mkdir()
    (tmp_path / "runs" / "cifar10-resnet20-quick-onehot-s0" / "config.json").write_text("{")
    before = files_below(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(benchmark, "seconds_per_image", lambda *network: 0.1)
    only = ["image/cifar10/resnet20-mobilenetv2", "image/cifar10/mobilenetv2-resnet20"]
    paper.main([str(flag) for flag in (*TINY, "--dry-run", "--only", *only)])
    assert files_below(tmp_path) == before  # and without the data
    text = capsys.readouterr().out
    line = {part[0]: " ".join(part[1:]) for part in map(str.split, text.splitlines()) if part and "runs/" in part[0]}
    assert line[str(teacher.relative_to(tmp_path))] == "finished 0:00:00"
    assert line[str(kd.relative_to(tmp_path))].startswith("at epoch 1 of 2 0:")
    assert line[str(onehot.relative_to(tmp_path))].startswith("other settings (lr) ")
    assert line["runs/cifar10-mobilenetv2-quick-teacher-s0"].startswith("not started ")
    assert line["runs/cifar10-resnet20-quick-onehot-s0"].startswith("damaged ") and len(line) == 6
    assert "2 entries, 6 runs, 1 finished" in text and "not drawn" in text


def test_estimate_counts_steps_images_and_what_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "seconds_per_image", lambda *network: 0.001)
    (entry,) = entries_of("--runs", tmp_path, "--seeds", 0, "--only", "switching/cifar100/")
    found = {run.folder.name.removeprefix("cifar100-resnet56-paper-"): run for run in entry.runs}
    # The paper's recipe: 450 epochs of 48 batches of 1,024; 20 evaluations of 10,000 images, each a third of a step.
    whole = 0.001 * (450 * 48 * 1024 + 20 * 10_000 / 3)
    assert paper.seconds_left(found["teacher-s0"]) == pytest.approx(whole)
    assert paper.seconds_left(found["onehot2kd-0.75-s0"]) == pytest.approx(whole / 4)
    started = found["kd-s0"]
    started.folder.mkdir()
    flags = json.loads(json.dumps(vars(started.flags)))
    runs.write_json(started.folder / "config.json", dict(flags=flags, data={}, facts={}))
    runs.write_metrics(started.folder, [dict(epoch=epoch) for epoch in range(1, 151)])
    assert paper.state(started) == ("at epoch 150 of 450", 150)
    assert paper.seconds_left(started) == pytest.approx(whole * 2 / 3)
    assert paper.seconds_left(started._replace(flags=None)) is None and paper.in_words(None) == "not estimated"


# ---------------------------------------------------------------- failures and signals


def test_goes_on_after_a_failed_entry_and_names_it(gridded):
    # The CIFAR-100 file is damaged; what CIFAR-10 has is finished. The teacher is not tried again for other entries.
    (gridded / "d" / "cifar100.npz").write_bytes(b"torn")
    process = run_cli("paper.py", *TINY, "--only", "image/cifar100/resnet20-", ENTRY[1], cwd=gridded)
    assert process.returncode == 1 and process.stdout.count("$ python") == 1, process.stdout + process.stderr
    assert "1 of 4 entries are done" in process.stdout
    failed = [line for line in process.stderr.splitlines() if " failed: " in line]
    assert len(failed) == 3 and all("cifar100.npz" in line and "make it again" in line for line in failed)


def test_a_script_that_fails_is_told_and_a_signal_passed_on(tmp_path, capfd):
    script = tmp_path / "script.py"
    script.write_text("import sys; sys.exit(int(sys.argv[1]))")
    assert paper.execute([str(script), "0"]) is None and paper.execute([str(script), "3"]).endswith("with code 3")
    with pytest.raises(KeyboardInterrupt):
        paper.execute([str(script), "130"])
    script.write_text("import sys; sys.exit('error: no space left')")
    assert paper.execute([str(script)]) == "no space left" and "error: no space left" in capfd.readouterr().err
    script.write_text("import os; os.kill(os.getpid(), 9)")
    assert "killed by signal 9" in paper.execute([str(script)])
    saved = tmp_path / "saved"
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    script.write_text(
        "import os, signal, sys, time\n"
        f"signal.signal(signal.SIGTERM, lambda *_: (open({str(saved)!r}, 'w').close(), sys.exit(130)))\n"
        "os.kill(os.getppid(), signal.SIGINT)\n"
        "time.sleep(60)\n"
    )
    with pytest.raises(KeyboardInterrupt):
        paper.execute([str(script)])
    assert saved.exists()


@pytest.mark.parametrize(
    "flags, words",
    [
        (["--only", "imagenet-21k"], ["imagenet-21k", "--dry-run"]),
        (["--shard", "2/2"], ["2/2", "0 to n-1"]),
        (["--shard", "a"], ["--shard"]),
        (["--seeds", "1", "1"], ["twice"]),
        (["--extra=--arch mlp"], ["--arch", "grid"]),
        (["--extra=--epohcs 1"], ["--epohcs"]),
        (["--extra=--temperature 2"], ["--temperature"]),
    ],
)
def test_bad_flags_are_refused(tmp_path, monkeypatch, capsys, flags, words):
    monkeypatch.chdir(tmp_path)
    with pytest.raises((SystemExit, runs.InputError)) as caught:
        paper.main(["--dry-run", *flags])
    message = capsys.readouterr().err or str(caught.value)
    assert len(message.splitlines()) == 1 and all(word in message for word in words), message
    assert not list(tmp_path.iterdir())
