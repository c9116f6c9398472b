"""train_teacher.py and train_student.py through their command line: kills, full disks, signals, bad teachers."""

import io
import itertools
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import common
import engine
import runs
import train_student
import train_teacher

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from helpers import (
    HERE,
    SOAK,
    TIMES,
    TINY,
    copy_run,
    finished,
    hashes,
    ok,
    one_line_error,
    outcome,
    plain,
    refused,
    run_cli,
    run_process,
    run_with_fault,
    same_run,
    weights_and_metrics,
    write_arrays,
)
from torchvision.transforms.v2 import functional

# ---------------------------------------------------------------- what the two scripts hand to the engine


def caught_training(monkeypatch, *commands):
    """The arguments that `engine.train_images` gets from the commands (module, *flags), by the name of the run."""
    caught = {}

    def train_images(run, *args, **more):
        caught[run.name] = args

    with monkeypatch.context() as patch:
        patch.setattr(engine, "train_images", train_images)
        for module, *flags in commands:
            module.main([*TINY, *map(str, flags)])
    return caught


def test_the_loss_of_a_student_is_the_weighted_sum(tiny_runs, tmp_path, monkeypatch):
    weights = ["--kd-weight", 0.7, "--ce-weight", 0.2, "--temperature", 3]
    teacher = ["--teacher", tiny_runs / "runs" / "teacher-s0"]
    caught = caught_training(monkeypatch, [train_student, *teacher, *weights, "--out", tmp_path / "weighted"])
    _, _, args, _, _, loss_fn, weights_at, *_ = caught["weighted"]
    assert weights_at(0) == (0.2, 0.7) and loss_fn is common.student_loss and args.temperature == 3


def plain_run(role, weights, teacher=None):
    """Model, mean loss and accuracy of the last of two epochs, in plain PyTorch with torchvision's crops one by one."""
    data = common.load_data("digits", subset=300)
    model = common.build_model("resnet8", 10, (8, 8, 1), 0.25, (role, 0))
    optimizer = torch.optim.SGD(model.parameters(), 0.02, 0.8, weight_decay=0.01, nesterov=True)
    for epoch in range(2):
        losses = []
        hits = 0
        order, views = common.epoch_stream(data, role, 0, epoch)
        for k, index in enumerate(order[:256].split(64)):
            images = []
            for one in index.tolist():
                dy, dx = divmod(int(views[one]), 3)
                image = functional.pad(data.x_train[one].permute(2, 0, 1), [1] * 4)[:, dy : dy + 8, dx : dx + 8]
                images.append(functional.normalize(image / 255, data.mean.tolist(), data.std.tolist()))
            images = torch.stack(images)
            labels = data.y_train[index]
            optimizer.param_groups[0]["lr"] = 0.02 * 0.5 * (1 + np.cos(np.pi * (4 * epoch + k) / 8))
            logits = model(images)
            loss = weights[0] * F.cross_entropy(logits, labels)
            if teacher:
                with torch.no_grad():
                    soft = F.softmax(teacher(images) / 3, 1)
                loss = loss + weights[1] * 9 * (soft * (soft.log() - F.log_softmax(logits / 3, 1))).sum(1).mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            hits += (logits.argmax(1) == labels).sum().item()
    return model.eval(), np.mean(losses), hits / 256


def test_teacher_and_student_are_those_of_a_plain_loop(tmp_path):
    flags = [*TINY, "--warmup", 0, "--lr", 0.02, "--weight-decay", 0.01, "--momentum", 0.8]
    finished(train_teacher, *flags, "--out", tmp_path / "teacher")
    more = ["--teacher", tmp_path / "teacher", "--kd-weight", 0.7, "--ce-weight", 0.2, "--temperature", 3]
    finished(train_student, *flags, *more, "--out", tmp_path / "student")
    model = None
    for role, weights in (("teacher", (1.0, 0.0)), ("student", (0.2, 0.7))):
        model, loss, accuracy = plain_run(role, weights, model)
        line = runs.read_metrics(tmp_path / role)[-1]
        assert (line["train_loss"], line["train_acc"]) == pytest.approx((loss, accuracy), rel=1e-4)
        weights = runs.load_checkpoint(tmp_path / role / "checkpoint.pt")["model"]
        for name, value in model.state_dict().items():
            torch.testing.assert_close(weights[name], value, rtol=0, atol=5e-5)


def test_students_of_one_seed_are_paired_and_differ_from_the_teacher(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = tiny_runs / "runs"
    caught = caught_training(
        monkeypatch,
        [train_teacher, "--out", "teacher"],
        [train_student, "--teacher", folder / "teacher-s0", "--out", "kd"],
        [train_student, "--kd-weight", 0, "--ce-weight", 1, "--out", "onehot"],
    )
    keys = {}  # weights at the start, and the key of order and views
    for name, (model, _, _, role, seed, *_) in caught.items():
        keys[name] = (runs.weights_hash(model.state_dict()), role, seed)
    assert keys["kd"] == keys["onehot"]
    assert keys["kd"][0] != keys["teacher"][0] and keys["kd"][1:] != keys["teacher"][1:]
    facts = {name: runs.read_config(folder / f"{name}-s0")["facts"] for name in ("onehot", "kd")}
    assert facts["onehot"]["teacher_sha256"] is None
    assert facts["kd"]["teacher_sha256"] == runs.teacher_hash(folder / "teacher-s0")
    teacher, kd, onehot = (
        weights_and_metrics(folder / f"{name}-s0")[0]["fc.weight"] for name in ("teacher", "kd", "onehot")
    )
    assert not torch.equal(kd, onehot) and not torch.equal(teacher, onehot)


def test_one_control_serves_students_of_every_temperature_and_teacher(tiny_runs):
    run = tiny_runs / "runs" / "onehot-s0"
    before = hashes(run)
    flags = ["--kd-weight", 0, "--ce-weight", 1, "--temperature", 2, "--teacher", "another"]
    finished(train_student, *TINY, *flags, "--out", run)
    assert hashes(run) == before


def test_runs_are_reproducible_across_processes(tiny_runs, tmp_path):
    ok(run_process("train_teacher.py", *TINY, "--seed", 1, "--out", "again", cwd=tmp_path))
    assert same_run(tmp_path / "again", tiny_runs / "runs" / "teacher-s1")


def test_test_accuracy_is_taken_in_the_runs_precision_and_at_the_end_in_full(tmp_path, monkeypatch):
    logits_of = engine.logits_of
    seen = []

    def recorded(model, data, images, **more):
        seen.append((len(images), more.get("precision", "fp32")))
        return logits_of(model, data, images, **more)

    monkeypatch.setattr(engine, "logits_of", recorded)
    flags = ["--epochs", 3, "--eval-every", 2, "--precision", "bf16"]
    finished(train_teacher, *TINY, *flags, "--out", tmp_path / "t")
    assert seen == [(500, "bf16"), (500, "fp32"), (300, "fp32"), (500, "fp32")]
    lines = runs.read_metrics(tmp_path / "t")
    assert [line["epoch"] for line in lines if "test_acc" in line] == [2, 3]  # the last one always
    stored = runs.read_npz(tmp_path / "t" / "logits.npz")
    accuracy = (stored["test_logits"].argmax(1) == stored["test_labels"]).mean()
    assert abs(lines[2]["test_acc"] - accuracy) < 1e-9


DATA = os.environ.get("DISOBEY_TEST_DATA")


@pytest.mark.skipif(DATA is None, reason="DISOBEY_TEST_DATA does not name a folder with cifar10.npz")
def test_real_cifar10_trains_from_teacher_to_figure(tmp_path):
    size = ["--subset", 500, "--epochs", 2, "--width", 0.5, "--eval-every", 2, "--quiet"]
    flags = ["--data", "cifar10", "--data-dir", DATA, *size]
    ok(run_cli("train_teacher.py", *flags, "--out", "t", cwd=tmp_path))
    ok(run_cli("train_student.py", *flags, "--teacher", "t", "--out", "s", cwd=tmp_path))
    figure = ["--teacher", "t", "--student", "s", "--out", "r", "--bootstrap", 100]
    ok(run_cli("analyze_deviation.py", *figure, cwd=tmp_path))
    assert (tmp_path / "r" / "fig1a.png").exists()


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graphs_end_close_to_the_eager_run(tmp_path):
    flags = ["--epochs", 2, "--width", 0.25, "--subset", 300, "--quiet", "--precision", "fp32"]
    for name, more in (("eager", ["--no-fast"]), ("fast", [])):
        ok(run_cli("train_teacher.py", *flags, *more, "--out", name, cwd=tmp_path))
        ok(run_cli("train_student.py", *flags, *more, "--teacher", "eager", "--out", f"kd-{name}", cwd=tmp_path))
    for kind in ("", "kd-"):
        eager, fast = (weights_and_metrics(tmp_path / f"{kind}{name}")[0] for name in ("eager", "fast"))
        assert all(torch.allclose(eager[key].float(), fast[key].float(), atol=0.05) for key in eager), kind


# ---------------------------------------------------------------- killed commands and full disks


def content_of(file):
    if file.suffix == ".pt":
        return plain(runs.load_checkpoint(file), TIMES)
    if file.suffix == ".jsonl":
        return [plain(json.loads(line), TIMES) for line in file.read_text().splitlines()]
    if file.suffix == ".json":
        return plain(json.loads(file.read_text()), TIMES)
    return None if file.name == "glue.md" else file.read_bytes()  # that one shows times


def contents(folder):
    return {path.relative_to(folder): content_of(path) for path in folder.rglob("*") if path.is_file()}


def same_tree(one, other):
    """Two folders hold the same files with the same content but for times: weights, metrics, logits, figures."""
    first, second = contents(one), contents(other)
    assert first.keys() == second.keys()
    assert not [name for name in first if first[name] != second[name] or name.suffix == ".tmp"]


def check_kills(script, flags, tmp_path):
    """A command that is killed at random moments, several times, and begun again ends as if it had not been."""
    whole = run_with_fault(script, flags, tmp_path / "whole")
    ok(whole)
    draw = random.Random(f"{script} {len(flags)}")
    left = 20 if SOAK else 4
    kinds = itertools.cycle(("half", "step", "full", "rename", "before", "after"))
    for chain in itertools.count():
        folder = tmp_path / f"killed {chain}"
        ended = False
        while not ended:
            kind = next(kinds) if left else "none"
            most = whole.seen["steps" if kind == "step" else "writes"] // 3
            process = run_with_fault(script, flags, folder, kind, draw.randint(1, most))
            output = process.stdout + process.stderr
            assert not any(word in output for word in ("damaged", "made again", "Traceback")), output
            ended = process.returncode == 0  # perhaps before the moment came
            left -= not ended
            if kind == "full" and not ended:
                one_line_error(process, f"{process.seen['path']} (", "space left")
            elif not ended:
                assert process.returncode == -signal.SIGKILL, output
        same_tree(tmp_path / "whole", folder)
        if not left:
            break


TEXTS = ["--teacher", "1x16", "--student", "1x16", "--max-length", 32, "--quiet", "--subset", 160, "--epochs", 2]


@pytest.mark.parametrize("name", ["kd", "switch"] + ["teacher", "glue"] * SOAK)
def test_faults_a_command_killed_at_random_moments_ends_as_if_it_had_not_been(name, tiny_runs, tmp_path):
    distil = [*TINY, "--teacher", tiny_runs / "runs" / "teacher-s0"]
    table = ["--epochs", 10, "--batch-size", 300]  # more epochs than views: the teacher's logits are in a table
    script, flags = dict(
        teacher=("train_teacher.py", [*TINY, "--out", "runs/t"]),
        kd=("train_student.py", [*distil, *table, "--snapshot-at", 0.5, "--out", "runs/kd"]),
        switch=("switch_distill.py", [*distil, "--switch-at", 0, 0.5, 1, "--bootstrap", 100]),
        glue=("glue_distill.py", [*TEXTS, "--device", "cpu", "--bootstrap", 100]),
    )[name]
    check_kills(script, flags, tmp_path)


def test_faults_a_full_disk_leaves_the_last_good_checkpoint(tiny_runs, tmp_path):
    script = "train_student.py"
    flags = [*TINY, "--teacher", tiny_runs / "runs" / "teacher-s0", "--out", "runs/kd"]
    ok(run_with_fault(script, flags, tmp_path / "whole"))
    assert run_with_fault(script, flags, tmp_path / "cut", "step", 6).returncode == -signal.SIGKILL  # of 8
    checkpoint = tmp_path / "cut" / "runs" / "kd" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    assert len(before) > 20_000
    limited = run_with_fault(script, flags, tmp_path / "cut", "limit", 20_000)  # the kernel's own error
    one_line_error(limited, "runs/kd/checkpoint.pt (", "space left")
    assert checkpoint.read_bytes() == before and runs.load_checkpoint(checkpoint)["step"] == 5
    ok(run_with_fault(script, flags, tmp_path / "cut"))
    same_tree(tmp_path / "whole", tmp_path / "cut")


def test_ctrl_c_saves_and_prints_the_resume_command(tmp_path):
    flags = ["--epochs", "1000000", "--width", "0.25", "--device", "cpu", "--out", "t"]  # only the signal ends it
    command = [sys.executable, str(HERE / "train_teacher.py"), *flags, "--overwrite"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=tmp_path, **pipes)
    while not (tmp_path / "t" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors, errors
    told = output.splitlines()[-1]
    assert "continue with: python " in told and told.endswith(f"train_teacher.py {' '.join(flags)}")
    assert runs.load_checkpoint(tmp_path / "t" / "checkpoint.pt")["step"] > 0


# ---------------------------------------------------------------- bad teachers


def damaged_teachers(teacher, folder):
    """Write damaged copies of a teacher's run folder into `folder`; returns {its name: a word of what is said}."""

    def half(content):
        return content[: len(content) // 2]

    def tensor(content):
        file = io.BytesIO()
        torch.save(torch.ones(3), file)
        return file.getvalue()

    def flipped(content):
        state = torch.load(io.BytesIO(content))
        state["model"]["fc.weight"] *= -1
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    last = (teacher / "metrics.jsonl").read_bytes().splitlines()[-1]
    nan = last.replace(b'"test_acc": ' + str(json.loads(last)["test_acc"]).encode(), b'"test_acc": NaN')
    cases = [
        ("unfinished", dict(logits=None), "is not finished (no logits.npz): continue it with: python"),
        ("torn checkpoint", dict(checkpoint=half), "torn checkpoint/checkpoint.pt cannot be read"),
        ("empty checkpoint", dict(checkpoint=lambda content: b""), "empty checkpoint/checkpoint.pt cannot be read"),
        ("tensor checkpoint", dict(checkpoint=tensor), "it holds a Tensor, not a dictionary"),
        ("other weights", dict(checkpoint=flipped), "test accuracy here but recorded"),
        ("torn config", dict(config=half), "torn config/config.json cannot be read"),
        ("list config", dict(config=lambda content: b"[1, 2]"), "config.json is not that of a run"),
        ("other arch", dict(config=lambda content: content.replace(b"resnet8", b"resnet14")), "does not fit resnet14"),
        ("other width", dict(config=lambda content: content.replace(b"0.25", b'"x"')), "config.json cannot be read"),
        ("odd metrics", dict(metrics=lambda content: b"[]\n"), "odd metrics/metrics.jsonl cannot be read"),
        ("no metrics", dict(metrics=lambda content: b""), "no metrics/metrics.jsonl cannot be read"),
        ("recorded NaN", dict(metrics=lambda content: content.replace(last, nan)), "but recorded nan%"),
    ]
    for name, changed, _ in cases:
        copy_run(teacher, folder / name, **changed)
    (folder / "empty").mkdir()
    return {"absent": "not a run folder", "empty": "not a run folder", **{name: words for name, _, words in cases}}


def test_bad_teachers_get_one_line_and_no_run_folder(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = tiny_runs / "runs" / "teacher-s0"
    write_arrays("four.npz", side=8, channels=1)
    for name, words in damaged_teachers(teacher, tmp_path).items():
        line = refused(train_student, *TINY, "--out", "never", "--teacher", name)
        assert words in line, line
    cases = [
        (["--data", "npz:four.npz", "--subset", "0"], "with classes 10, the student's has 4"),
        (["--label-noise", "0.1"], "label_noise 0.3"),
        (["--subset", "100"], "subset 300"),
        (["--data-seed", "1"], "data_seed 0"),
        (["--kd-weight", "0"], "no loss"),
        (["--temperature", "0"], "--temperature"),
    ]
    for flags, words in cases:
        line = refused(train_student, *TINY, "--out", "never", "--teacher", teacher, *flags)
        assert words in line, line
    assert "give one of --teacher" in refused(train_student, *TINY, "--out", "never")
    assert not Path("never").exists()


# ---------------------------------------------------------------- nothing is lost


def test_a_torn_checkpoint_of_an_unfinished_run_is_not_lost(tiny_runs, tmp_path):
    teacher = tiny_runs / "runs" / "teacher-s0"
    copy_run(teacher, tmp_path / "t", logits=None, checkpoint=lambda content: content[:1000])
    before = hashes(tmp_path / "t")
    line = refused(train_teacher, *TINY, "--out", tmp_path / "t")
    command = runs.read_config(tmp_path / "t")["command"]
    assert "checkpoint.pt cannot be read" in line
    assert line.endswith(f": remove {tmp_path / 't'} and train it again with: {command}")
    assert hashes(tmp_path / "t") == before


def test_a_run_that_diverges_in_its_very_last_step_is_refused(tmp_path):
    """Which the last loss, older than the step, does not show."""
    flags = ["--epochs", 1, "--batch-size", 300, "--lr", 1e38, "--warmup", 0, "--snapshot-at"]
    line = refused(train_teacher, *TINY, *flags, "--out", tmp_path / "n")
    assert "NaN" in line and "--lr" in line
    assert sorted(hashes(tmp_path / "n")) == ["config.json"]


def test_bad_input_discards_nothing_even_with_overwrite(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("teacher", "kd"):
        copy_run(tiny_runs / "runs" / f"{name}-s0", Path(name))
    labels = torch.from_numpy(runs.read_npz("teacher/logits.npz")["train_labels"])
    torch.save(8 * F.one_hot(labels, 10), "kd/t.pt")  # logits of a perfect teacher
    before = {name: hashes(name) for name in ("teacher", "kd")}
    for words, module, *flags in [
        ("resnet9", train_teacher, "--out", "teacher", "--arch", "resnet9"),
        ("--subset", train_teacher, "--out", "teacher", "--subset", 1),
        ("--batch-size", train_teacher, "--out", "teacher", "--batch-size", 1),
        ("absent", train_student, "--out", "kd", "--teacher", "absent"),
        ("would discard kd, where this run's teacher lies", train_student, "--out", "./kd", "--teacher", "kd"),
        ("would discard kd, where", train_student, "--out", "kd", "--teacher-logits", "kd/t.pt"),
    ]:
        line = refused(module, *TINY, "--overwrite", *flags)
        assert words in line, line
    assert {name: hashes(name) for name in before} == before


EXTREME = [
    ["--lr", 1e38],
    ["--lr", 1e-320],
    ["--weight-decay", 1e38],
    ["--warmup", 1.9999999],
    ["--label-noise", 0.9999999],
    ["--width", 1e-320],
    ["--momentum", 0.9999999],
    ["--batch-size", 2**63 - 1],
    ["--eval-every", 2**63 - 1, "--data-seed", 2**63 - 1, "--seed", 2**63 - 1],
    ["--temperature", 1e6],
    ["--temperature", 1e-320],
    ["--kd-weight", 1e308],
    ["--subset", 2],
]


@pytest.mark.parametrize("flags", EXTREME)
def test_fuzz_extreme_numbers_train_or_say_why(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY, "--subset", 64]
    shared = flags if flags[0] in ("--label-noise", "--subset", "--width") or "--data-seed" in flags else []
    finished(train_teacher, *tiny, *shared, "--out", "t")
    what, line = outcome(train_student, *tiny, *flags, "--teacher", "t", "--out", "s")
    assert Path("s/logits.npz").exists() == (what == "finished")
    assert what == "finished" or "NaN" in line
    if Path("s/checkpoint.pt").exists():
        model = runs.load_checkpoint("s/checkpoint.pt")["model"]
        assert all(torch.isfinite(part.double()).all() for part in model.values())
