"""train_teacher.py and train_student.py through their command line: kills, full disks, signals, processes, teachers."""

import argparse
import contextlib
import io
import itertools
import json
import os
import pickle
import random
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from helpers import (
    HERE,
    SOAK,
    TIMES,
    TINY,
    Malicious,
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

import analyze_deviation
import common
import engine
import runs
import train_student
import train_teacher

ONE_THREAD = dict(os.environ, OMP_NUM_THREADS="1")

# ---------------------------------------------------------------- what the two scripts hand to the engine


def catch_training(monkeypatch, caught):
    """Instead of training, keep the arguments of `engine.train_images` by the name of the run."""

    def train_images(run, *args, **more):
        caught[run.name] = args

    monkeypatch.setattr(engine, "train_images", train_images)


def test_student_loss_is_the_weighted_sum(tiny_runs, tmp_path, monkeypatch):
    """The loss that train_student.py hands to the engine is ce_weight·CE + kd_weight·T²·KL."""
    caught = {}
    catch_training(monkeypatch, caught)
    weights = ["--kd-weight", 0.7, "--ce-weight", 0.2, "--temperature", 3]
    flags = [*TINY, "--teacher", tiny_runs / "runs" / "teacher-s0", *weights, "--out", tmp_path / "weighted"]
    train_student.main([str(flag) for flag in flags])
    _, _, _, _, _, loss_fn, weights_at = caught["weighted"]
    assert weights_at(0) == (0.2, 0.7)
    student, logits, teacher, labels = torch.nn.Identity(), torch.randn(5, 10), torch.randn(5, 10), torch.arange(5)
    loss, returned = loss_fn(student, logits, labels, teacher, 0.2, 0.7)
    expected = 0.2 * F.cross_entropy(logits, labels) + 0.7 * common.kd_loss(logits, teacher, 3.0)
    assert torch.isclose(loss, expected) and torch.equal(returned, logits)
    loss, _ = loss_fn(student, logits, labels, None, 0.2, 0.0)
    assert torch.isclose(loss, 0.2 * F.cross_entropy(logits, labels))


def test_students_of_one_seed_are_paired_and_differ_from_the_teacher(tiny_runs, tmp_path, monkeypatch):
    caught = {}
    monkeypatch.chdir(tmp_path)
    folder = tiny_runs / "runs"
    with monkeypatch.context() as patch:
        catch_training(patch, caught)
        train_teacher.main([*TINY, "--out", "teacher"])
        train_student.main([*TINY, "--teacher", str(folder / "teacher-s0"), "--out", "kd"])
        train_student.main([*TINY, "--kd-weight", "0", "--ce-weight", "1", "--out", "onehot"])
    keys = {}  # weights at the start, and the key of order and views
    for name, (model, _, _, role, seed, *_) in caught.items():
        keys[name] = (engine.weights_hash(model.state_dict()), role, seed)
    assert keys["kd"] == keys["onehot"]
    assert keys["kd"][0] != keys["teacher"][0] and keys["kd"][1:] != keys["teacher"][1:]
    facts = {name: runs.read_config(folder / f"{name}-s0")["facts"] for name in ("onehot", "kd")}
    assert facts["onehot"]["teacher_sha256"] is None and facts["kd"]["teacher_sha256"]
    teacher, kd, onehot = (
        weights_and_metrics(folder / f"{name}-s0")[0]["fc.weight"] for name in ("teacher", "kd", "onehot")
    )
    assert not torch.equal(kd, onehot) and not torch.equal(teacher, onehot)


def test_one_control_serves_students_of_every_temperature(tiny_runs):
    run = tiny_runs / "runs" / "onehot-s0"
    before = hashes(run)
    flags = ["--kd-weight", 0, "--ce-weight", 1, "--temperature", 2]
    assert "is finished already" in finished(train_student, *TINY, *flags, "--out", run)
    assert hashes(run) == before


def test_runs_are_reproducible_across_processes(tiny_runs, tmp_path):
    ok(run_process("train_teacher.py", *TINY, "--seed", 1, "--out", "again", cwd=tmp_path))
    assert same_run(tmp_path / "again", tiny_runs / "runs" / "teacher-s1")


DATA = os.environ.get("DISOBEY_TEST_DATA")


@pytest.mark.skipif(DATA is None, reason="DISOBEY_TEST_DATA does not name a folder with cifar10.npz")
def test_real_cifar10_trains_from_teacher_to_figure(tmp_path):
    size = ["--subset", 500, "--epochs", 2, "--width", 0.5, "--eval-every", 2, "--quiet"]
    flags = ["--data", "cifar10", "--data-dir", DATA, *size]
    ok(run_cli("train_teacher.py", *flags, "--out", "t", cwd=tmp_path))
    ok(run_cli("train_student.py", *flags, "--teacher", "t", "--out", "s", cwd=tmp_path))
    figure = ["--teacher", "t", "--student", "s", "--out", "r", "--bootstrap", 100]
    ok(run_cli("analyze_deviation.py", *figure, cwd=tmp_path))
    assert runs.last_metrics(tmp_path / "t")["test_acc"] > 0.12 and (tmp_path / "r" / "fig1a.png").exists()


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
    draw, left = random.Random(f"{script} {len(flags)}"), 20 if SOAK else 4
    kinds = itertools.cycle(("half", "step", "full", "rename", "before", "after"))
    for chain in itertools.count():
        folder, ended = tmp_path / f"killed {chain}", False
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


LANGUAGE = ["--teacher", "1x16", "--student", "1x16", "--mode", "kd", "kd2onehot", "--max-length", 32, "--quiet"]
SMALL = ["--subset", 160, "--epochs", 2, "--mlm-epochs", 1, "--device", "cpu", "--bootstrap", 100]


@pytest.mark.parametrize("name", ["kd", "switch"] + ["teacher", "glue"] * SOAK)
def test_faults_a_command_killed_at_random_moments_ends_as_if_it_had_not_been(name, tiny_runs, tmp_path):
    distil = [*TINY, "--teacher", tiny_runs / "runs" / "teacher-s0", "--teacher-cache", "on"]
    script, flags = dict(
        teacher=("train_teacher.py", [*TINY, "--out", "runs/t"]),
        kd=("train_student.py", [*distil, "--snapshot-at", 0.5, "--out", "runs/kd"]),
        switch=("switch_distill.py", [*distil, "--switch-at", 0, 0.5, 1, "--bootstrap", 100]),
        glue=("glue_distill.py", [*LANGUAGE, *SMALL]),
    )[name]
    check_kills(script, flags, tmp_path)


def test_faults_a_full_disk_leaves_the_last_good_checkpoint(tiny_runs, tmp_path):
    script, flags = "train_student.py", [*TINY, "--teacher", tiny_runs / "runs" / "teacher-s0", "--out", "runs/kd"]
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
    flags = ["--epochs", "1000000", "--width", "0.25", "--out", "t", "--overwrite"]  # only the signal ends it
    command = [sys.executable, str(HERE / "train_teacher.py"), *flags]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, **pipes)
    while not (tmp_path / "t" / "metrics.jsonl").exists():
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, errors = process.communicate()
    assert process.returncode == 130 and "Traceback" not in errors, errors
    told = output.splitlines()[-1]
    assert told.endswith(
        "continue with: python train_teacher.py --epochs 1000000 --width 0.25 --out t"
    ) or told.endswith(f"continue with: python {HERE / 'train_teacher.py'} --epochs 1000000 --width 0.25 --out t")
    assert runs.load_checkpoint(tmp_path / "t" / "checkpoint.pt")["step"] > 0


# ---------------------------------------------------------------- several runs, several processes


def test_shards_train_every_seed_once(tmp_path, monkeypatch):
    """As jobs of a Slurm array do, without knowing of each other."""
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--subset", 64, "--out", "t", "--seeds"]
    for i, names in enumerate((["t-s0", "t-s2"], ["t-s0", "t-s1", "t-s2"])):
        finished(train_teacher, *flags, 0, 1, 2, "--shard", f"{i}/2")
        assert sorted(run.name for run in tmp_path.glob("t*")) == names
    assert "no seed is left" in finished(train_teacher, *flags, 0, "--shard", "1/2")
    for bad in ("2/2", "-1/2", "1", "a/b", "1/0"):
        assert "--shard" in refused(train_teacher, *flags, 0, "--shard", bad)


def test_jobs_give_the_same_runs_as_one_process_and_an_error_in_one_is_one_line(tiny_runs, tmp_path):
    for seed, source in enumerate((0, 1, 1)):
        (tmp_path / f"teacher-s{seed}").symlink_to(tiny_runs / "runs" / f"teacher-s{source}")
    (tmp_path / "kd-s2").mkdir()
    (tmp_path / "kd-s2" / "notes.txt").write_text("mine")
    flags = [*TINY, "--seeds", 0, 1, 2, "--jobs", 2, "--teacher", "teacher-s{seed}", "--out", "kd"]
    one_line_error(run_cli("train_student.py", *flags, cwd=tmp_path), "kd-s2 is not empty and not a run folder")
    assert hashes(tmp_path / "kd-s2").keys() == {"notes.txt"}
    for seed in (0, 1):
        one, other = tiny_runs / "runs" / f"kd-s{seed}", tmp_path / f"kd-s{seed}"
        assert same_run(one, other) and hashes(one)["logits.npz"] == hashes(other)["logits.npz"]


def test_jobs_save_on_sigterm_and_the_same_runs_go_on(tmp_path):
    flags = [*TINY, "--epochs", "80", "--subset", "64", "--eval-every", "80"]  # one step in each epoch
    seeds = ["--seeds", "0", "1", "2", "--out", str(tmp_path / "t")]
    command = [sys.executable, str(HERE / "train_teacher.py"), *flags, *seeds, "--jobs", "2", "--overwrite"]
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command, cwd=tmp_path, env=ONE_THREAD, **pipes)
    while len(list(tmp_path.glob("t-s[01]/metrics.jsonl"))) < 2:  # seed 2 follows seed 0 in its process
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == 130 and not errors, output + errors
    told = output.splitlines()[-1]
    assert "interrupted; continue with: python" in told and told.endswith("--jobs 2")
    assert all(runs.load_checkpoint(run / "checkpoint.pt")["step"] > 0 for run in tmp_path.glob("t-s[01]"))
    finished(train_teacher, *flags, *seeds)
    finished(train_teacher, *flags, "--out", tmp_path / "alone")
    assert same_run(tmp_path / "t-s0", tmp_path / "alone") and (tmp_path / "t-s2" / "logits.npz").exists()


BOTH = """
import sys

import torch

import runs
import train_student
import train_teacher


def main():
    flags = sys.argv[1:]
    train_teacher.main([*flags, "--out", "two"])
    torch.distributed.barrier()  # as between two commands: the first process writes the logits alone
    train_student.main([*flags, "--teacher", "two", "--out", "kd-two"])
    train_teacher.main([*flags, "--out", "two"])  # finished: all processes have to agree on that
    train_teacher.main([*flags, "--out", "two", "--lr", "0.3"])


runs.cli(main)
"""


def test_torchrun_gives_the_same_result_as_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = ["--epochs", "3", "--width", "0.5", "--subset", "300", "--batch-size", "64"]
    flags = ["--arch", "cnn", *size, "--quiet", "--device", "cpu"]  # no batch normalisation
    Path("both.py").write_text(BOTH)
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = dict(ONE_THREAD, PYTHONPATH=str(HERE))
    process = subprocess.run([*torchrun, "both.py", *flags], capture_output=True, text=True, env=environment)
    output, errors = process.stdout, process.stderr
    # The first process speaks and writes for both, also of what is wrong.
    assert output.count("two: test") == 2 and output.count("two is finished already") == 1, output + errors
    assert process.returncode and errors.count("error: two holds a run with other settings") == 1, errors
    finished(train_teacher, *flags, "--out", "one")
    finished(train_student, *flags, "--teacher", "one", "--out", "kd-one")
    for name in ("", "kd-"):
        (one, lines), (two, other_lines) = (weights_and_metrics(f"{name}{count}") for count in ("one", "two"))
        assert all(torch.allclose(one[key], two[key], atol=1e-5) for key in one)
        assert [line["train_acc"] for line in lines] == [line["train_acc"] for line in other_lines]
        losses = [line["train_loss"] for line in other_lines]
        assert [line["train_loss"] for line in lines] == pytest.approx(losses, rel=1e-4)  # sums in another order


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_jobs_and_graphs_end_close_to_the_eager_run(tmp_path):
    size = ["--epochs", 2, "--width", 0.25, "--subset", 300, "--quiet"]
    flags = [*size, "--precision", "fp32", "--seeds", 0, 1]
    for name, more in (("eager", ["--no-fast"]), ("fast", []), ("jobs", ["--jobs", 2])):
        ok(run_cli("train_teacher.py", *flags, *more, "--out", name, cwd=tmp_path))
    for seed in (0, 1):
        eager, fast, jobs = (weights_and_metrics(tmp_path / f"{name}-s{seed}")[0] for name in ("eager", "fast", "jobs"))
        for key in eager:
            assert torch.allclose(eager[key], fast[key], atol=1e-3)
            assert torch.allclose(eager[key], jobs[key], atol=1e-3)


# ---------------------------------------------------------------- teacher logits


def test_students_end_the_same_with_and_without_a_table(tiny_runs, tmp_path, monkeypatch):
    """--teacher-cache changes the speed and nothing else, and a table serves processes after the one that made it."""
    monkeypatch.chdir(tmp_path)
    teacher = tiny_runs / "runs" / "teacher-s0"
    flags = [*TINY, "--teacher", teacher]
    assert "a table of each epoch's views" in ok(
        run_cli("train_student.py", *flags, "--teacher-cache", "on", "--out", "table", cwd=tmp_path)
    )
    tables = {file: file.stat().st_ino for file in Path("teacher-logits").rglob("*.npz")}  # a new file has a new inode
    assert len(tables) == 2
    # In this process, where no table can be made.
    monkeypatch.setattr(engine.TeacherLogits, "_fill", None)
    finished(train_student, *flags, "--teacher-cache", "on", "--out", "read")
    assert same_run("table", "read") and {file: file.stat().st_ino for file in tables} == tables
    assert "a table" not in finished(train_student, *flags, "--teacher-cache", "off", "--out", "live")
    (table, lines), (live, live_lines) = weights_and_metrics("table"), weights_and_metrics("live")
    assert all(torch.allclose(table[key].float(), live[key].float(), atol=1e-5) for key in table)
    assert [line["test_acc"] for line in lines] == [line["test_acc"] for line in live_lines]


def test_the_table_of_all_views_is_taken_from_nine_epochs_on_digits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    size = [*TINY, "--subset", 100]
    finished(train_teacher, *size, "--out", "t")
    flags = [*size, "--epochs", 12, "--teacher", "t", "--out"]
    assert "a table of all 9 views" in finished(train_student, *flags, "views")
    finished(train_student, *flags, "live", "--teacher-cache", "off")
    views, live = weights_and_metrics("views")[0], weights_and_metrics("live")[0]
    assert all(torch.allclose(views[key].float(), live[key].float(), atol=1e-4) for key in views)


def half(content):
    return content[: len(content) // 2]


def damaged_teachers(teacher, folder):
    """(copies of a run folder that cannot teach, words of the one line that says why)."""
    copy_run(teacher, folder / "unfinished", logits=None)
    copy_run(teacher, folder / "torn checkpoint", checkpoint=half)
    copy_run(teacher, folder / "empty checkpoint", checkpoint=lambda content: b"")
    copy_run(teacher, folder / "tensor checkpoint")
    torch.save(torch.zeros(3), folder / "tensor checkpoint" / "checkpoint.pt")
    copy_run(teacher, folder / "torn config", config=half)
    copy_run(teacher, folder / "list config", config=lambda content: b"[1, 2]")
    copy_run(teacher, folder / "odd metrics", metrics=lambda content: b"[]\n")
    copy_run(teacher, folder / "no metrics", metrics=lambda content: b"")
    copy_run(teacher, folder / "other arch", config=lambda content: content.replace(b"resnet8", b"resnet14"))
    copy_run(teacher, folder / "other width", config=lambda content: content.replace(b'"width": 0.25', b'"width": "x"'))
    copy_run(teacher, folder / "recorded NaN")
    lines = runs.read_metrics(teacher)
    runs.write_metrics(folder / "recorded NaN", [*lines[:-1], dict(lines[-1], test_acc=float("nan"))])
    copy_run(teacher, folder / "other weights")
    state = runs.load_checkpoint(teacher / "checkpoint.pt")
    state["model"]["fc.weight"] = -state["model"]["fc.weight"]
    torch.save(state, folder / "other weights" / "checkpoint.pt")
    (folder / "empty").mkdir()
    return [
        ("absent", "not a run folder"),
        ("empty", "not a run folder"),
        ("unfinished", "not finished", "train_teacher.py"),
        ("torn checkpoint", "cannot be read", "checkpoint.pt"),
        ("empty checkpoint", "checkpoint.pt"),
        ("tensor checkpoint", "checkpoint.pt"),
        ("torn config", "config.json"),
        ("list config", "config.json"),
        ("odd metrics", "metrics.jsonl"),
        ("no metrics", "metrics.jsonl"),
        ("other arch", "other arch/checkpoint.pt cannot be read", "state_dict for ResNet"),
        ("other width", "other width/config.json cannot be read"),
        ("recorded NaN", "test accuracy here but recorded"),
        ("other weights", "test accuracy here but recorded"),
    ]


def test_bad_teachers_get_one_line_and_no_run_folder(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = tiny_runs / "runs" / "teacher-s0"
    write_arrays("four.npz", side=8, channels=1)
    for name, *words in damaged_teachers(teacher, tmp_path):
        line = refused(train_student, *TINY, "--out", "never", "--teacher", name)
        assert all(word in line for word in words), line
    cases = [
        (["--data", "npz:four.npz", "--subset", "0"], "classes 10", "has 4"),
        (["--label-noise", "0.1"], "label_noise 0.3"),
        (["--subset", "100"], "subset 300"),
        (["--data-seed", "1"], "data_seed 0"),
        (["--kd-weight", "0"], "no loss"),
        (["--stop-epoch", "9"], "beyond --epochs 2"),
        (["--temperature", "0"], "--temperature"),
    ]
    for flags, *words in cases:
        line = refused(train_student, *TINY, "--out", "never", "--teacher", teacher, *flags)
        assert all(word in line for word in words), line
    assert "give one of --teacher" in refused(train_student, *TINY, "--out", "never")
    assert not Path("never").exists()


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "code in a tensor's place"])
def test_faults_a_malicious_checkpoint_never_runs(form, tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, content = tiny_runs / "runs", io.BytesIO()
    state = dict(model=Malicious())
    if form.startswith("code"):
        state = runs.load_checkpoint(source / "kd-s0" / "checkpoint.pt")
        state["model"]["fc.bias"] = Malicious()
    if form == "pickle":
        pickle.dump(state, content)
    else:
        torch.save(state, content, _use_new_zipfile_serialization=form != "legacy")
    evil = content.getvalue()
    copy_run(source / "teacher-s0", tmp_path / "teacher", checkpoint=lambda _: evil)
    copy_run(source / "kd-s0", tmp_path / "unfinished", checkpoint=lambda _: evil, logits=None)
    assert "cannot be read" in refused(train_student, *TINY, "--teacher", "teacher", "--out", "never")
    student = [*TINY, "--teacher", source / "teacher-s0"]
    assert "cannot be read" in refused(train_student, *student, "--out", "unfinished")
    assert Path("unfinished/checkpoint.pt").read_bytes() == evil
    assert not Path("ran").exists() and not Path("never").exists()


# ---------------------------------------------------------------- nothing is lost


def test_a_torn_checkpoint_of_an_unfinished_run_is_not_lost(tiny_runs, tmp_path):
    teacher = tiny_runs / "runs" / "teacher-s0"
    copy_run(teacher, tmp_path / "t", logits=None, checkpoint=lambda content: content[:1000])
    before = hashes(tmp_path / "t")
    line = refused(train_teacher, *TINY, "--out", tmp_path / "t")
    assert "checkpoint.pt cannot be read" in line and "--overwrite" in line
    assert hashes(tmp_path / "t") == before


def test_a_run_that_diverges_in_its_very_last_step_is_refused(tmp_path):
    """Which the last loss, older than the step, does not show."""
    flags = ["--epochs", 1, "--batch-size", 300, "--lr", 1e38, "--warmup", 0]
    line = refused(train_teacher, *TINY, *flags, "--out", tmp_path / "n")
    assert "NaN" in line and "--lr" in line
    assert sorted(hashes(tmp_path / "n")) == ["config.json"]


def test_bad_input_discards_nothing_even_with_overwrite(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    teacher = tiny_runs / "runs" / "teacher-s0"
    copy_run(teacher, Path("x-teacher"))
    copy_run(tiny_runs / "runs" / "kd-s0", Path("x-kd"))
    before = {run: hashes(run) for run in tmp_path.glob("x-*")}
    over = [*TINY, "--overwrite", "--out"]
    assert "--batch-size" in refused(train_teacher, *over, "x-teacher", "--batch-size", 1)
    assert "--subset" in refused(train_teacher, *over, "x-teacher", "--subset", 1)
    assert "resnet9" in refused(train_teacher, *over, "x-teacher", "--arch", "resnet9")
    assert "absent" in refused(train_student, *over, "x-kd", "--teacher", "absent")
    assert "discard this command's teacher" in refused(train_student, *over, "./x-teacher", "--teacher", "x-teacher")
    monkeypatch.setattr(common, "free_memory", lambda device: 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    assert "--teacher-cache on" in refused(train_student, *over, "x-kd", "--teacher", teacher, "--teacher-cache", "on")
    assert {run: hashes(run) for run in tmp_path.glob("x-*")} == before


EXTREME = [
    ["--lr", 1e38],
    ["--weight-decay", 1e38],
    ["--warmup", 1.9999999],
    ["--label-noise", 0.9999999],
    ["--width", 1e-320],
    ["--momentum", 0.9999999],
    ["--lr", 1e-320],
    ["--batch-size", 2**63 - 1],
    ["--eval-every", 2**63 - 1, "--data-seed", 2**63 - 1],
    ["--seed", 2**63 - 1],
    ["--temperature", 1e6],
    ["--temperature", 1e-320],
    ["--kd-weight", 1e308],
    ["--ce-weight", 1e308],
    ["--subset", 2],
    ["--epochs", 2**63 - 1, "--stop-epoch", 1],
]


@pytest.mark.parametrize("flags", EXTREME)
def test_fuzz_extreme_numbers_train_or_say_why(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY, "--subset", 64]
    shared = flags if flags[0] in ("--label-noise", "--subset", "--width") or "--data-seed" in flags else []
    finished(train_teacher, *tiny, *shared, "--out", "t")
    what, line = outcome(train_student, *tiny, *flags, "--teacher", "t", "--out", "s")
    assert Path("s/logits.npz").exists() == (what == "finished")
    assert what == "finished" or "NaN" in line or "beyond" in line
    if Path("s/checkpoint.pt").exists():
        model = runs.load_checkpoint("s/checkpoint.pt")["model"]
        assert all(torch.isfinite(part.double()).all() for part in model.values())


# ---------------------------------------------------------------- several processes, simulated


@pytest.fixture
def two_ranks(monkeypatch):
    """As in the first of two processes of torchrun, but for the process group."""
    for name, value in dict(RANK=0, WORLD_SIZE=2, LOCAL_RANK=0, MASTER_ADDR="localhost", MASTER_PORT=1).items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend: None)


def test_batches_that_do_not_split_over_processes_are_refused(two_ranks):
    assert "does not split over 2 processes" in refused(train_teacher, *TINY, "--batch-size", 63)
    # Half of a batch of two, and half of what a subset of two leaves, is one image: nothing to normalise over.
    for flag in ("--batch-size", "--subset"):
        assert "one image to normalise over: use at least 4" in refused(train_teacher, *TINY, flag, 2)
    data = common.load_data("digits", subset=300)
    common.check_model(SimpleNamespace(arch="cnn", width=0.25, batch_size=2), data)  # it normalises over nothing


def test_torchrun_is_refused_where_a_run_is_not_shared(two_ranks, tiny_runs, tmp_path):
    with pytest.raises(runs.InputError, match="start this script without it"):
        engine.use_device("cpu")
    flags = [*TINY, "--teacher", tiny_runs / "runs" / "teacher-s0", "--teacher-cache", "on"]
    assert "would fill a whole table; use auto or off" in refused(train_student, *flags, "--out", tmp_path / "never")
    assert not (tmp_path / "never").exists()


class Process:
    """A process that has ended as `codes` says, with its command: for `run_jobs`, instead of subprocess.Popen."""

    codes, started = [], []

    def __init__(self, words, env):
        self.returncode, self.code = None, Process.codes[len(Process.started)]
        Process.started.append(words)

    def poll(self):
        self.returncode = self.code
        return self.code


ENDINGS = [
    ([0, 0], None, ""),
    ([0, -9], runs.InputError, "ended with code -9"),
    ([2, 0], SystemExit, "2"),
    ([0, 130], SystemExit, "130"),
]


@pytest.mark.parametrize("codes, ending, words", ENDINGS)
def test_jobs_share_the_seeds_of_a_shard_and_end_as_their_processes_do(codes, ending, words, monkeypatch, capsys):
    monkeypatch.setattr(subprocess, "Popen", Process)
    monkeypatch.setattr(sys, "argv", ["train.py", "--overwrite", "--seeds", "all", "--jobs", "2"])
    Process.codes, Process.started = codes, []
    args = argparse.Namespace(seeds=list(range(10)), shard=(1, 3), jobs=2, quiet=False)
    with pytest.raises(ending, match=words) if ending else contextlib.nullcontext():
        engine.run_jobs(args)
    shared = [sys.executable, "train.py", "--seeds", "all", "--jobs", "2", "--jobs", "1", "--quiet", "--shard"]
    assert Process.started == [[*shared, "1/6"], [*shared, "4/6"]]
    shares = [args.seeds[first::every] for first, every in (runs.shard(words[-1]) for words in Process.started)]
    assert sorted(sum(shares, [])) == args.seeds[1::3]
    assert not capsys.readouterr().err  # each says itself what is wrong
    engine.run_jobs(argparse.Namespace(seeds=[3], shard=(0, 1), jobs=2))  # one alone is trained in this process
    assert len(Process.started) == 2


class Saving:
    """A process that takes a while to save after SIGTERM: for `run_jobs`, instead of subprocess.Popen."""

    def __init__(self, words, env):
        self.returncode, self.signals, self.polls = None, 0, 0

    def terminate(self):
        self.signals += 1

    def poll(self):
        self.polls += self.signals > 0
        if self.polls > 5:
            self.returncode = 130
        return self.returncode


def test_jobs_get_one_signal_each(monkeypatch):
    """A second one would meet a process that is ending, and leave a traceback."""
    started = []

    def start(words, env):
        started.append(Saving(words, env))
        return started[-1]

    def signal_me(seconds):
        if started and not started[0].signals:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(subprocess, "Popen", start)
    monkeypatch.setattr(time, "sleep", signal_me)
    with pytest.raises(SystemExit, match="130"):
        engine.run_jobs(argparse.Namespace(seeds=[0, 1, 2], shard=(0, 1), jobs=2))
    assert [process.signals for process in started] == [1, 1]


# ---------------------------------------------------------------- what a run prints and shows


def test_test_accuracy_is_taken_in_the_runs_precision_and_at_the_end_in_full(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    logits_of, seen = engine.logits_of, []

    def recorded(model, data, images, **more):
        seen.append((len(images), more.get("precision", "fp32")))
        return logits_of(model, data, images, **more)

    monkeypatch.setattr(engine, "logits_of", recorded)
    finished(train_teacher, *TINY, "--epochs", 3, "--precision", "bf16", "--out", "t")
    assert seen == [(500, "bf16"), (500, "bf16"), (500, "fp32"), (300, "fp32"), (500, "fp32")]
    stored = runs.read_npz("t/logits.npz")
    accuracy = (stored["test_logits"].argmax(1) == stored["test_labels"]).mean()
    assert abs(runs.last_metrics("t")["test_acc"] - accuracy) < 1e-9


def test_each_step_of_figure_1a_prints_the_next(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [word for word in TINY if word != "--quiet"]
    modules = {"train_teacher.py": train_teacher, "train_student.py": train_student}
    modules["analyze_deviation.py"] = analyze_deviation

    def follow(script, *words):
        """Run a command; the commands that it prints."""
        monkeypatch.setattr(sys, "argv", [script, *map(str, words)])
        lines = finished(modules[script], *words).splitlines()
        return [shlex.split(line)[2:] for line in lines if line.startswith(("next: ", "then: "))]

    ((script, *words),) = follow("train_teacher.py", *flags, "--seeds", "1")
    (control, *more), (figure, *files) = follow(script, *words)
    follow(control, *more)
    follow(figure, *files, "--bootstrap", "100")
    assert (tmp_path / "results/fig1a/fig1a.png").exists()
    assert not follow("train_teacher.py", *TINY, "--out", "quiet")


def test_curves_for_tensorboard_hold_what_metrics_hold(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert "pip install tensorboard" in refused(train_teacher, *TINY, "--tensorboard", "--out", "t")
    seen = {}

    class SummaryWriter:
        def __init__(self, folder):
            self.folder = folder

        def add_scalar(self, name, value, epoch):
            seen[str(self.folder), name, epoch] = value

        def flush(self):
            pass

    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    finished(train_teacher, *TINY, "--tensorboard", "--out", "t")
    for line in runs.read_metrics("t"):
        assert all(seen["t", name, line["epoch"]] == value for name, value in line.items())


def test_passes_of_the_teacher_are_told_and_tables_shared(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--teacher", tiny_runs / "runs/teacher-s0", "--teacher-cache", "on"]
    monkeypatch.setattr(common, "free_memory", lambda device: 0)  # no room for all views: tables of epochs
    assert "2 passes of the teacher" in finished(train_student, *flags, "--out", "a/kd")
    assert "0 passes of the teacher" in finished(train_student, *flags, "--temperature", 2, "--out", "a/other")
