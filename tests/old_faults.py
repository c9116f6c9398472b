"""Faults and bad input: killed commands, full disks, damaged files, random flags. `make soak` runs them at full size."""
import contextlib
import copy
import errno
import functools
import hashlib
import io
import itertools
import json
import multiprocessing
import os
import pickle
import random
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from torch.optim.optimizer import register_optimizer_step_pre_hook

import analyze_deviation
import benchmark
import common
import denoise_gradients
import eigenspace
import glue_distill
import switch_distill
import train_student
import train_teacher
from test_smoke import (HERE, LANGUAGE, TINY, _forked, copy_run, fake_cifar, fake_tiny_imagenet, hashes, ok, one_line_error, runs,  # noqa: F401
                        run_cli, save_pretrained, write_arrays, write_glue)


SOAK = "DISOBEY_SOAK" in os.environ   # make soak: twenty kills for each command, and thirty times the random input


def fuzz(examples):
    """Settings for random input: in `make test` the same examples every time, in `make soak` more, and new ones every time."""
    return settings(max_examples=examples * (30 if SOAK else 1), derandomize=not SOAK, database=None, deadline=None, print_blob=True,
                    suppress_health_check=list(HealthCheck))


def _faulty(script, args, cwd, out, err, seen_file, kind, at):
    """`_forked` with one fault. kind: step, SIGKILL before the at-th step of an optimiser; before, half, rename, after, SIGKILL while the
    at-th file is written: before it, when half of it is there, before its renaming, after it; full, no space from the at-th file on;
    limit, no file may exceed `at` bytes."""
    seen = dict(steps=0, writes=0)
    write_atomic, replace = common.write_atomic, os.replace

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def count_step(*_):
        seen["steps"] += 1
        if kind == "step" and seen["steps"] == at:
            kill()

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def faulty_write(path, write):
        seen["writes"] += 1
        if kind in ("step", "limit") or seen["writes"] != at:
            return write_atomic(path, write)

        def half(file):
            content = io.BytesIO()
            write(content)
            file.write(content.getvalue()[:len(content.getvalue()) // 2])
            file.flush()
            kill()
        if kind == "before":
            kill()
        if kind == "rename":
            os.replace = kill
        if kind == "after":
            os.replace = lambda *names: (replace(*names), kill())
        if kind == "full":
            os.fsync, seen["path"] = no_space, str(path)
        write_atomic(path, half if kind == "half" else write)

    register_optimizer_step_pre_hook(count_step)
    common.write_atomic = faulty_write
    if kind == "limit":
        import resource
        resource.setrlimit(resource.RLIMIT_FSIZE, (at, resource.RLIM_INFINITY))
    try:
        _forked(script, args, cwd, out, err)
    finally:
        seen_file.write_text(json.dumps(seen))


def run_with_fault(script, args, cwd, kind="none", at=0):
    """`run_cli` with a fault (see `_faulty`); `seen` counts the optimiser steps and the files written, if the process lived to tell."""
    cwd.mkdir(exist_ok=True)
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_smoke"])
    with tempfile.TemporaryDirectory() as folder:
        out, err, seen = (Path(folder) / name for name in ("out", "err", "seen"))
        process = context.Process(target=_faulty, args=(script, [str(arg) for arg in args], cwd, out, err, seen, kind, at))
        process.start()
        process.join()
        return SimpleNamespace(returncode=process.exitcode, stdout=out.read_text(), stderr=err.read_text(),
                               seen=json.loads(seen.read_text()) if seen.exists() else {})


def plain(value):
    """A value without measured times, tensors as bytes, so that == compares all of it."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items() if key not in ("seconds", "images_per_s", "tokens_per_s", "spent")}
    if isinstance(value, (list, tuple)):
        return [plain(part) for part in value]
    return (str(value.dtype), value.shape, value.numpy().tobytes()) if torch.is_tensor(value) else value


def content_of(file):
    if file.suffix == ".pt":
        return plain(common.load_checkpoint(file))
    if file.suffix in (".json", ".jsonl"):
        return plain([json.loads(part) for part in (file.read_text().splitlines() if file.suffix == ".jsonl" else [file.read_text()])])
    return None if file.name == "glue.md" else file.read_bytes()   # that one shows times


def same_tree(one, other):
    """Two folders hold the same files with the same content but for times: weights, states, metric lines, logits, tables, figures."""
    first, second = ({path.relative_to(folder): content_of(path) for path in folder.rglob("*") if path.is_file()} for folder in (one, other))
    assert first.keys() == second.keys()
    assert not [name for name in first if first[name] != second[name] or name.suffix == ".tmp"]


def fault_command(name, teacher):
    """Script and flags of a small command that is killed: 8 to 24 steps, 9 to 40 files."""
    distil = [*TINY, "--teacher", teacher, "--teacher-cache", "on"]
    return dict(teacher=("train_teacher.py", [*TINY, "--out", "runs/t"]),
                kd=("train_student.py", [*distil, "--snapshot-at", 0.5, "--out", "runs/kd"]),
                switch=("switch_distill.py", [*distil, "--switch-at", 0, 0.5, 1, "--bootstrap", 100]),
                glue=("glue_distill.py", [*LANGUAGE, "--student", "1x16", "--mode", "kd", "kd2onehot"]))[name]


@pytest.mark.parametrize("name", ["kd", "switch", "glue"] + ["teacher"] * SOAK)
def test_faults_a_command_killed_at_random_moments_ends_as_if_it_had_not_been(name, runs, tmp_path):
    script, flags = fault_command(name, runs / "runs" / "teacher-s0")
    whole = run_with_fault(script, flags, tmp_path / "whole")
    ok(whole)
    draw, kinds, left = random.Random(name), itertools.cycle(("half", "step", "full", "rename", "before", "after")), 20 if SOAK else 4
    for chain in itertools.count():
        folder, ended = tmp_path / f"killed {chain}", False
        while not ended:
            kind = next(kinds) if left else "none"
            most = whole.seen["steps" if kind == "step" else "writes"] // 3   # so that several kills fall into one command
            process = run_with_fault(script, flags, folder, kind, draw.randint(1, most))
            assert not any(word in process.stdout + process.stderr for word in ("damaged", "made again", "Traceback")), process.stdout + process.stderr
            ended = process.returncode == 0   # perhaps before the moment came
            left -= not ended
            if kind == "full" and not ended:
                one_line_error(process, f"{process.seen['path']} (", "space left")
            elif not ended:
                assert process.returncode == -signal.SIGKILL, process.stdout + process.stderr
        same_tree(tmp_path / "whole", folder)
        if not left:
            break


def test_faults_a_full_disk_leaves_the_last_good_checkpoint(runs, tmp_path):
    script, flags = "train_student.py", [*TINY, "--teacher", runs / "runs" / "teacher-s0", "--out", "runs/kd"]
    ok(run_with_fault(script, flags, tmp_path / "whole"))
    assert run_with_fault(script, flags, tmp_path / "cut", "step", 6).returncode == -signal.SIGKILL   # of 8: one epoch is saved
    checkpoint = tmp_path / "cut" / "runs" / "kd" / "checkpoint.pt"
    before = checkpoint.read_bytes()
    assert len(before) > 20_000
    one_line_error(run_with_fault(script, flags, tmp_path / "cut", "limit", 20_000), "runs/kd/checkpoint.pt (", "space left")   # the kernel's own error
    assert checkpoint.read_bytes() == before and common.load_checkpoint(checkpoint)["step"] == 4
    ok(run_with_fault(script, flags, tmp_path / "cut"))
    same_tree(tmp_path / "whole", tmp_path / "cut")


def test_faults_runs_side_by_side_save_and_end_when_their_command_is_killed(tmp_path):
    flags = [*TINY, "--epochs", 3000, "--subset", 64, "--seeds", 0, 1, "--together", "--eval-every", 3000, "--save-every", 3000, "--out", "t"]
    process = subprocess.Popen([sys.executable, str(HERE / "train_teacher.py"), *map(str, flags)], cwd=tmp_path, stdout=subprocess.PIPE, text=True,
                               env=dict(os.environ, OMP_NUM_THREADS="1"))
    while len(list(tmp_path.glob("t-s?/metrics.jsonl"))) < min(2, common.cores()):
        assert process.poll() is None
    process.kill()
    output, _ = process.communicate()   # until the last process that could write has ended
    saved = re.findall(r"t-s(\d): saved at step (\d+) of 3000", output)
    assert len(saved) == min(2, common.cores()) and not list(tmp_path.glob("t-s?/logits.npz")), output
    for seed, step in saved:
        assert common.load_checkpoint(tmp_path / f"t-s{seed}" / "checkpoint.pt")["step"] == int(step)


class Reached(BaseException):
    """The heavy work begins: all flags were accepted."""


def outcome(module, *argv):
    """("refused", its one line), ("finished", what it printed) or ("accepted", "") of a script in this process; all else fails."""
    argv = [str(arg) for arg in argv]
    streams, handler = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)], signal.getsignal(signal.SIGTERM)
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            common.cli(lambda: module.main(argv))
        code = 0
    except SystemExit as end:
        code = end.code
    except Reached:
        return "accepted", ""
    except Exception as error:
        raise AssertionError(f"{module.__name__} {argv}: {error!r}") from error
    finally:
        signal.signal(signal.SIGTERM, handler)
    printed, complaint = (stream.buffer.getvalue().decode() for stream in streams)
    if not code:
        return "finished", printed
    lines = complaint.splitlines()
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (module.__name__, argv, code, complaint)
    return "refused", lines[0]


def refused(module, *argv):
    """The one line with which a script refuses."""
    what, line = outcome(module, *argv)
    assert what == "refused", (module.__name__, argv, what, line)
    return line


def test_faults_unwritable_folders_get_one_line(runs, tmp_path, monkeypatch):
    """/dev/null and /proc refuse even an administrator."""
    monkeypatch.chdir(tmp_path)
    write_arrays("good.npz")
    Path("file").write_text("mine")
    Path("made/teacher-logits").parent.mkdir()
    Path("made/teacher-logits").write_text("mine")
    teacher, kd, onehot = (runs / "runs" / f"{name}-s0" for name in ("teacher", "kd", "onehot"))
    language = [*LANGUAGE, "--student", "1x16", "--mode", "kd"]
    cases = [(train_teacher, TINY, "--out"), (train_student, [*TINY, "--kd-weight", 0, "--ce-weight", 1], "--out"), (switch_distill, TINY, "--out"),
             (switch_distill, TINY, "--results"), (analyze_deviation, ["--teacher", teacher, "--student", kd, "--control", onehot, "--bootstrap", 100], "--out"),
             (eigenspace, [], "--out"), (denoise_gradients, TINY, "--out"), (denoise_gradients, TINY, "--runs"), (glue_distill, language, "--out"),
             (glue_distill, language, "--results"), (benchmark, [], "--out")]
    monkeypatch.setattr(benchmark, "ceilings", None)   # calling it would fail
    for module, flags, flag in cases:
        for place in ("/dev/null/x", "/proc/x", "file/x"):
            assert place in refused(module, *flags, flag, place)
    for name in ("cifar10", "cifar100", "tiny-imagenet"):
        for place in ("/dev/null/x", "/proc/x", "file"):
            assert place in refused(train_teacher, *TINY, "--data", name, "--data-dir", place)
    assert "made/teacher-logits" in refused(train_student, *TINY, "--teacher", teacher, "--teacher-cache", "on", "--out", "made/kd")
    assert Path("file").read_text() == Path("made/teacher-logits").read_text() == "mine"


def test_faults_a_dataset_that_cannot_be_kept_prepared_is_used_all_the_same(tmp_path, monkeypatch, capsys):
    from torchvision import datasets
    fake_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(os, "fsync", no_space)
    assert len(common.load_data("cifar10", tmp_path).x_train) == 60
    assert "could not keep the prepared" in capsys.readouterr().out and [file.name for file in tmp_path.iterdir()] == [datasets.CIFAR10.base_folder]


def test_faults_bad_input_discards_nothing_even_with_overwrite(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source = runs / "runs"
    for name in ("teacher", "kd", "onehot"):
        copy_run(source / f"{name}-s0", tmp_path / f"x-{name}-s0")
    write_arrays("other.npz", side=8, channels=1)
    before = {run: hashes(run) for run in tmp_path.glob("x-*")}
    over = [*TINY, "--overwrite", "--out"]
    assert "--batch-size 1" in refused(train_teacher, *over, "x-teacher-s0", "--batch-size", 1)
    assert "--subset 1" in refused(train_teacher, *over, "x-teacher-s0", "--subset", 1)
    assert "discard the teacher" in refused(train_student, *over, "./x-teacher-s0", "--teacher", "x-teacher-s0")
    assert "discard the teacher" in refused(switch_distill, *over, "x", "--teacher", "x-kd-s0")
    assert "was trained on data" in refused(switch_distill, *over, "x", "--teacher", source / "teacher-s0", "--data", "npz:other.npz", "--subset", 0)
    assert "was trained on data" in refused(denoise_gradients, *over, "o", "--teacher", source / "teacher-s0", "--label-noise", 0.1, "--seeds", 0,
                                            "--kd", "x-kd-s0", "--onehot", "x-onehot-s0")
    assert "other texts" in refused(glue_distill, *LANGUAGE, "--overwrite", "--out", "x", "--student", "1x16", "--teacher-run", source / "teacher-s0")
    monkeypatch.setattr(common, "free_memory", lambda device: 0)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=0))
    assert "--teacher-cache on" in refused(train_student, *over, "x-kd-s0", "--teacher", source / "teacher-s0", "--teacher-cache", "on")
    assert {run: hashes(run) for run in tmp_path.glob("x-*")} == before and not list(tmp_path.glob("x-*mlm*"))


# Command lines.

SCRIPTS = (train_teacher, train_student, switch_distill, analyze_deviation, eigenspace, denoise_gradients, glue_distill, benchmark)
NOT_NUMBERS = ("", "x", "1.5.2", "nan", "-inf", "1e400", "9" * 400, "9" * 5000, "1;2", "½", "0x10")
WORDS = ("", " ", "-", "{seed}", "{", "%s", "π/\u2028", "\udcff", "a\nb", "a" * 300, "x" * 5000, "run", "kd", "./run/", "file", "file/x", "loop", "empty", ".",
         "/dev/null/x", "/proc/x", "npz:", "npz:good.npz", "npz:file", "npz:.", "folder:", "folder:empty", "csv:", "csv:file", "csv:absent", "npz:loop", "t.npy",
         "good.npz:y_train", "run/logits.npz:test_logits", "cifar10", "torchvision:resnet18", "torchvision:", "resnet²", "mlp", "0x16", "9" * 50 + "x16", "1x48", "1x7",
         "sentiment", "tiny", "no/such/model", "no-such-model", "0", "-0.0", "1", "0.5", "3", "64", str(2 ** 63 - 1), "1e-320", "1e37", "auto", "on")


def actions_of(module):
    """The flags of a script, as its own parser defines them."""
    kept = []
    def capture(parser, argv=None):
        kept.extend(parser._actions)
        raise Reached
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(common.Parser, "parse_args", capture)
        with pytest.raises(Reached):
            module.main([])
    return [action for action in kept if action.dest != "help"]


@contextlib.contextmanager
def light_scripts(folder, runs):
    """In `folder`, with a few good and odd files, where every script stops with `Reached` instead of working long."""
    for name in ("teacher", "kd"):
        copy_run(runs / "runs" / f"{name}-s0", folder / name.replace("teacher", "run"))
    write_arrays(folder / "good.npz")
    np.save(folder / "t.npy", np.random.default_rng(0).normal(size=(60, 4)))
    (folder / "file").write_text("mine")
    (folder / "loop").symlink_to("loop")
    (folder / "empty").mkdir()
    build, sentiment, shared = common.build_model, glue_distill.sentiment, glue_distill.byte_level_bpe(None, glue_distill.sentiment(50, "train", 0).first, 400)
    bpe = glue_distill.byte_level_bpe

    def reached(*_, **__):
        raise Reached
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module, names in ((common, ("run_jobs", "train", "cifar_arrays", "tiny_imagenet_arrays")), (analyze_deviation, ("measure",)), (benchmark, ("ceilings",)),
                              (eigenspace, ("linear_level", "classifiers_level", "ntk_level")), (denoise_gradients, ("measure_seed",)), (glue_distill, ("pretrain", "hub_splits"))):
            for name in names:
                patch.setattr(module, name, reached)
        patch.setattr(common, "digits_arrays", functools.cache(common.digits_arrays))
        patch.setattr(common, "build_model", lambda arch, classes, image, width=1.0, *seed: build(
            arch, classes, image, width if arch.startswith("torchvision:") else min(width, 0.25), *seed))
        patch.setattr(glue_distill, "sentiment", lambda n, part, seed: sentiment(n // 40, part, seed))
        patch.setattr(glue_distill, "byte_level_bpe", lambda files=None, texts=(), vocab_size=0: bpe(files) if files else shared)
        yield


def files_below(folder):
    return {path: hashlib.sha256(path.read_bytes()).digest() for path in folder.rglob("*") if path.is_file()}


REQUIRED = {"train_student": ["--teacher", "run", *TINY], "switch_distill": TINY, "train_teacher": TINY, "denoise_gradients": TINY,
            "analyze_deviation": ["--teacher", "run", "--student", "kd"]}


@pytest.mark.parametrize("module", SCRIPTS)
def test_fuzz_every_flag_takes_its_kind_of_value_alone(module, runs, tmp_path):
    draw = random.Random(module.__name__)
    with light_scripts(tmp_path, runs):
        before, required = files_below(tmp_path), REQUIRED.get(module.__name__, [])
        for action in actions_of(module):
            flag = action.option_strings[0]
            if action.nargs == 0:
                assert flag in refused(module, *required, f"{flag}=1")
                continue
            if action.type or action.choices:   # a number, or one of a few words
                bad = NOT_NUMBERS if SOAK else draw.sample(NOT_NUMBERS, 4)
                for value in bad if action.type else (*bad, "π", "\udcff"):
                    assert flag in refused(module, *required, f"{flag}={value}"), (flag, value)
            for value in WORDS if SOAK else draw.sample(WORDS, 6):
                outcome(module, *required, f"{flag}={value}")
            if action.nargs is None:
                assert flag in refused(module, *required, flag)   # without its value
        assert files_below(tmp_path) == before


@pytest.mark.parametrize("module", SCRIPTS)
def test_fuzz_flags_that_meet_end_in_work_or_one_line(module, runs, tmp_path):
    actions = actions_of(module)
    number = st.one_of(st.integers(), st.floats(), st.sampled_from((0, 1, 2, 3, 10, 64, 0.5, 1e-320, 2 ** 63 - 1, 2 ** 63))).map(str)
    text = st.text(st.characters(exclude_characters="\0/", exclude_categories=("Cs",)), max_size=12).filter(lambda word: word != "..")

    @st.composite
    def words(draw):
        argv = []
        for action in draw(st.lists(st.sampled_from(actions), max_size=6)):
            values = number if action.type else st.sampled_from(action.choices) if action.choices else text | st.sampled_from(WORDS)
            if action.nargs == 0:
                argv.append(action.option_strings[0])
            elif action.nargs in ("+", "*"):
                argv += [action.option_strings[0], *draw(st.lists(values, max_size=3))]
            else:
                argv.append(f"{action.option_strings[0]}={draw(values)}")
        return argv

    with light_scripts(tmp_path, runs):
        before, backup = files_below(tmp_path), tmp_path.with_name(f"{tmp_path.name} backup")
        shutil.copytree(tmp_path, backup, symlinks=True)

        @fuzz(25)
        @given(words())
        def check(argv):
            what, _ = outcome(module, *REQUIRED.get(module.__name__, []), *argv)
            if what == "accepted" and "--overwrite" in argv:   # then it may discard what is named by --out
                now = files_below(tmp_path)
                for file in [file for file in before if now.get(file) != before[file]]:
                    shutil.copy(backup / file.relative_to(tmp_path), file)
            assert files_below(tmp_path) == before
        check()


@pytest.mark.parametrize("flags", [
    ["--lr", 1e38], ["--weight-decay", 1e38], ["--warmup", 1.9999999], ["--label-noise", 0.9999999], ["--width", 1e-320], ["--momentum", 0.9999999], ["--lr", 1e-320],
    ["--batch-size", 2 ** 63 - 1, "--save-every", 2 ** 63 - 1], ["--eval-every", 2 ** 63 - 1, "--data-seed", 2 ** 63 - 1], ["--seed", 2 ** 63 - 1, "--view-seed", 2 ** 63 - 1],
    ["--temperature", 1e6], ["--temperature", 1e-320], ["--kd-weight", 1e308], ["--ce-weight", 1e308], ["--subset", 2], ["--epochs", 2 ** 63 - 1, "--stop-epoch", 1]])
def test_fuzz_extreme_numbers_train_or_say_why(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny = [*TINY, "--subset", 64, *(flags if flags[0] in ("--label-noise", "--subset", "--width") or "--data-seed" in flags else [])]
    assert outcome(train_teacher, *tiny, "--out", "t")[0] == "finished"
    what, line = outcome(train_student, *TINY, "--subset", 64, *flags, "--teacher", "t", "--out", "s")
    assert what == "finished" and Path("s/logits.npz").exists() or what == "refused" and ("NaN" in line or "beyond" in line)
    if what == "refused":
        assert not Path("s/logits.npz").exists()
        assert not Path("s/checkpoint.pt").exists() or all(torch.isfinite(part.double()).all() for part in common.load_checkpoint("s/checkpoint.pt")["model"].values())


@pytest.mark.parametrize("flags", [["--lr", 1e38], ["--temperature", 1e-320], ["--temperature", 1e6, "--weight-decay", 1e38]])
def test_fuzz_extreme_numbers_train_texts_or_say_why(flags, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    what, line = outcome(glue_distill, *LANGUAGE, "--subset", 40, "--mlm-epochs", 0, "--student", "1x8", "--mode", "kd", *flags)
    assert what == "finished" or "NaN" in line
    for file in Path("runs").rglob("checkpoint.pt"):
        assert all(torch.isfinite(part.double()).all() for part in common.load_checkpoint(file)["model"].values())


# Files.


@st.composite
def damage_to(draw, content):
    """`content` (bytes) cut, with flipped bits, with zeros, with bytes too many, or with a part of it repeated."""
    anywhere = st.integers(0, 2 ** 32 - 1).map(lambda k: (k * 2_654_435_761 % 2 ** 32) * len(content) >> 32)   # hypothesis prefers small numbers
    place = anywhere | st.integers(0, min(len(content), 400) - 1) | st.integers(1, min(len(content), 400)).map(lambda k: len(content) - k)   # headers, directories
    at, to = sorted((draw(place), draw(place)))
    kind = draw(st.sampled_from(("bits", "bits", "zeros", "cut", "more", "again")))
    if kind == "bits":
        changed = bytearray(content)
        for k in draw(st.sets(place, min_size=1, max_size=3)):
            changed[k] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    return dict(cut=content[:at], zeros=content[:at] + bytes(to - at) + content[to:], more=content[:at] + draw(st.binary(min_size=1, max_size=9)) + content[at:],
                again=content[:to] + content[at:])[kind]


def valid_or_refused(read):
    """What `read()` gives, or None where it raises InputError with a message of one line; all else fails."""
    try:
        return read()
    except common.InputError as error:
        assert str(error).strip()


@pytest.mark.parametrize("kind", ["dataset", "checkpoint", "logits", "snapshot", "table"])
def test_fuzz_a_damaged_file_with_checksums_never_gives_other_numbers(kind, runs, tmp_path):
    run = tmp_path / "run"
    copy_run(runs / "runs" / "teacher-s0", run)
    write_arrays(tmp_path / "d.npz", n=40, side=12)
    data = common.load_data(f"npz:{tmp_path / 'd.npz'}")
    if kind == "dataset":
        file, read = tmp_path / "d.npz", lambda: common.load_data(f"npz:{file}").facts["sha256"]
    elif kind == "checkpoint":
        file, read = run / "checkpoint.pt", lambda: plain(common.load_checkpoint(file))
    elif kind == "logits":
        file, read = run / "logits.npz", lambda: {name: (array.dtype, array.shape, array.tobytes()) for name, array in common.read_npz(file, common.LOGITS).items()}
    elif kind == "snapshot":   # passed over
        file = (run / "checkpoint.pt").rename(run / "snapshot-4.pt")
        read = lambda: (found := switch_distill.latest_snapshot(run, 9)) and plain(common.load_checkpoint(found))
    else:   # made again
        model = common.build_model("cnn", data.classes, data.facts["image"], 0.1, 1).eval()
        views = common.epoch_stream(data, "student", 0, 0)[1]
        table = lambda: common.TeacherLogits(model, data, source="epochs").epoch_table(tmp_path / "tables", ("student", 0), 0, views).numpy().tobytes()
        table()
        (file,), read = (tmp_path / "tables").rglob("*.npz"), table
    good, expected = file.read_bytes(), read()

    @fuzz(30)
    @given(damage_to(good))
    def check(content):
        file.write_bytes(content)
        got = valid_or_refused(read)
        assert got == expected or got is None and kind != "table"
        assert file.read_bytes() in ((good, content) if kind == "table" else (content,))
    check()


def test_fuzz_a_header_that_asks_for_less_than_there_is_is_noticed(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(100_000))
    content = (tmp_path / "a.npz").read_bytes()
    assert content.count(b"(100000,)") == 1
    (tmp_path / "a.npz").write_bytes(content.replace(b"(100000,)", b"(10000 ,)"))
    with pytest.raises(common.InputError, match="checksum"):
        common.read_npz(tmp_path / "a.npz", ["x"])


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_fuzz_a_damaged_config_or_metrics_is_refused_or_read(name, runs, tmp_path):
    run, data = tmp_path / "run", common.load_data("digits", subset=300)
    copy_run(runs / "runs" / "teacher-s0", run)
    good = (run / name).read_bytes()
    other = (b"", b"null\n", b"[]\n", b"{}\n", b"[" * 99_999, b'{"a":' * 99_999, b"\xff\xfe\n", good.replace(b"0.25", b"1e999"), good.replace(b"0.25", b'"0.25"'),
             good.replace(b"resnet8", b"mlp"), good.replace(b'"epoch": 1', b'"epoch": 2'), good.replace(b"test_acc", b"test"), good * 2, b"9" * 5000,
             re.sub(b'"test_acc": [0-9.]+', b'"test_acc": NaN', good), re.sub(b'"data": {', b'"data": [{', good))

    @fuzz(15)
    @given(st.sampled_from(other) | damage_to(good))
    def check(content):
        (run / name).write_bytes(content)
        before = hashes(run)
        for read in (common.last_metrics, common.finished_config, functools.partial(common.load_teacher, data=data)):
            valid_or_refused(lambda: read(run))
        assert outcome(train_teacher, *TINY, "--out", run)[0] in ("finished", "refused") and hashes(run) == before
    check()


def parts_of(value, path=()):
    """Paths of everything within nested dicts and lists."""
    for key, part in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield (*path, key)
        yield from parts_of(part, (*path, key))


def test_fuzz_a_checkpoint_with_a_foreign_part_is_refused_or_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--subset", 128, "--out", "t"]
    assert run_with_fault("train_teacher.py", flags, tmp_path, "step", 4).returncode == -signal.SIGKILL   # of 4: one epoch is saved
    checkpoint = Path("t/checkpoint.pt")
    state = common.load_checkpoint(checkpoint)
    foreign = (None, "x", -1, 10 ** 9, True, 0.5, [], {}, [1, 2], torch.zeros(3), torch.zeros(()), torch.zeros(2, 2, dtype=torch.long), torch.full((3, 1, 3, 3), float("nan")))
    paths = list(parts_of(state))
    upper = [path for path in paths if len(path) < 3 or path[0] == "history"]

    @fuzz(25)
    @given(st.sampled_from(upper) | st.sampled_from(paths), st.integers(0, len(foreign) - 1))
    def check(path, which):
        changed = copy.deepcopy(state)
        parent = functools.reduce(lambda part, key: part[key], path[:-1], changed)
        parent[path[-1]] = foreign[which]
        common.write_atomic(checkpoint, lambda file: torch.save(changed, file))
        before = checkpoint.read_bytes()
        what, _ = outcome(train_teacher, *flags)
        assert what == "finished" or what == "refused" and checkpoint.read_bytes() == before
        Path("t/logits.npz").unlink(missing_ok=True)
    check()


DTYPES = ("u1", "i1", "i8", "u8", "f2", "f4", "f8", "g", "c8", "?", "m8[s]", "M8[D]", "U3", "S4", "V3", [("a", "f4")])


def odd_arrays(*shapes):
    """Arrays of any type in some of these shapes and others, holding 0, 1, 2, 0, … where the type has numbers."""
    def make(dtype, shape):
        array = np.zeros(shape, np.dtype(dtype))
        if array.dtype.kind in "iufcm":
            array.reshape(-1)[:] = np.arange(array.size) % 3
        return array
    return st.builds(make, st.sampled_from(("u1", "i8", "f4")) | st.sampled_from(DTYPES), st.sampled_from(shapes) | st.sampled_from(((), (0,), (7,), (2, 2, 2, 2, 2))))


def test_fuzz_datasets_of_other_shapes_and_types_are_refused_or_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = write_arrays("d.npz", n=24, side=8)
    images = odd_arrays((24, 8, 8, 3), (24, 8, 8, 1), (24, 8, 4, 3), (24, 0, 0, 3), (0, 8, 8, 3), (1, 8, 8, 3), (24, 8, 8), (24, 1, 1, 1), (24, 4, 4, 3))
    labels = odd_arrays((24,), (1,), (24, 1), (23,))

    @fuzz(30)
    @given(st.fixed_dictionaries({}, optional=dict(x_train=images, x_test=images, y_train=labels, y_test=labels)), st.sets(st.sampled_from(common.ARRAYS), max_size=1))
    def check(changed, left_out):
        np.savez("d.npz", **{key: array for key, array in {**good, **changed}.items() if key not in left_out})
        shutil.rmtree("t", ignore_errors=True)
        before = Path("d.npz").read_bytes()
        assert outcome(train_teacher, *TINY, "--subset", 0, "--epochs", 1, "--data", "npz:d.npz", "--out", "t")[0] in ("refused", "finished")
        assert Path("d.npz").read_bytes() == before
    check()


def test_fuzz_logits_of_other_shapes_and_types_are_refused_or_measured(runs, tmp_path):
    teacher, control, student = runs / "runs" / "teacher-s0", runs / "runs" / "onehot-s0", tmp_path / "kd"
    copy_run(runs / "runs" / "kd-s0", student)
    good = common.read_npz(student / "logits.npz", common.LOGITS)
    n_train, n_test = len(good["train_labels"]), len(good["test_labels"])
    logits, labels = odd_arrays((n_train, 10), (n_test, 10), (n_test, 9), (n_train, 1), (7, 10), (n_test,)), odd_arrays((n_train,), (n_test,), (n_test, 1), (7,))
    (tmp_path / "texts").mkdir()
    common.write_json(tmp_path / "texts" / "config.json", dict(flags={}, facts={}, data=dict(sha256="same")))
    texts = SimpleNamespace(facts=dict(sha256="same", name="t", n_train=n_train), classes=10)

    @fuzz(25)
    @given(st.dictionaries(st.sampled_from(common.LOGITS), logits | labels, min_size=1, max_size=2))
    def check(changed):
        for file in (student / "logits.npz", tmp_path / "texts" / "logits.npz"):
            np.savez(file, **{**good, **changed})
        points = valid_or_refused(lambda: analyze_deviation.points_from_runs([teacher], [student], [control]))
        valid_or_refused(lambda: switch_distill.accuracy_sums((student, teacher, control), 10, np.random.default_rng(0)))
        found = valid_or_refused(lambda: glue_distill.teacher_logits(tmp_path / "texts", texts))
        assert found is None or found[0].shape == (n_train, 10) and found[0].dtype == np.float32
        for split in points or ():
            assert analyze_deviation.measure(points[split], 10)["fidelity"]["student"]["agreement"]["value"] <= 1
        for name, array in changed.items():
            np.save(tmp_path / f"{name}.npy", array)
        files = SimpleNamespace(split="s", control_logits=None, **{key: str(tmp_path / f"{name}.npy") for key, name in zip(
            ("teacher_logits", "student_logits", "labels"), itertools.cycle(changed))})
        valid_or_refused(lambda: analyze_deviation.points_from_files(files))
    check()


def test_fuzz_damaged_npy_files_are_refused_or_hold_logits(tmp_path):
    point = np.random.default_rng(0).normal(size=(40, 3))
    np.save(tmp_path / "t.npy", point)
    np.save(tmp_path / "y.npy", np.arange(40) % 3)
    paths = {key: str(tmp_path / f"{name}.npy") for key, name in dict(teacher_logits="t", student_logits="s", labels="y").items()}
    good = (tmp_path / "t.npy").read_bytes()

    @fuzz(40)
    @given(damage_to(good))
    def check(content):   # no checksums: values may differ, shapes and finiteness may not
        (tmp_path / "s.npy").write_bytes(content)
        points = valid_or_refused(lambda: analyze_deviation.points_from_files(SimpleNamespace(split="s", control_logits=None, **paths)))
        if points:
            logits = points["s"][0]["networks"]["student"]
            assert logits.shape == point.shape and np.isfinite(logits).all()
    check()


@pytest.mark.parametrize("task", ["cola", "sst-2", "qqp", "mnli"])
def test_fuzz_damaged_tsv_files_are_refused_or_whole(task, tmp_path):
    file = next(write_glue(tmp_path, task).glob("train.tsv"))
    good = file.read_bytes()

    @fuzz(20)
    @given(damage_to(good) | st.binary(max_size=60) | st.text().map(str.encode))
    def check(content):
        file.write_bytes(content)
        data = valid_or_refused(lambda: glue_distill.load_task(task, tmp_path))
        for split in data.splits.values() if data else ():
            assert len(split.first) == len(split.labels) == len(split.second or split.first) and 0 <= split.labels.min() <= split.labels.max() < data.classes
    check()


def test_fuzz_csv_files_are_refused_or_whole(tmp_path):
    labels = st.sampled_from(("0", "1", "²", "٣", "02", "9" * 5000, "", "good")) | st.text(max_size=5)
    row = st.tuples(st.text(max_size=10), labels).map(lambda pair: '"{}",{}'.format(*pair))
    header = st.sampled_from(("text,label", "text,label", "label,text", "text", "", "text,text,label", "\ufefftext,label"))
    lines = st.tuples(header, st.lists(row | st.just("a,0") | st.just('b,"1"') | st.just('"'), max_size=80)).map(lambda parts: "\n".join([parts[0], *parts[1]]))

    @fuzz(40)
    @given(lines)
    def check(content):
        (tmp_path / "d.csv").write_bytes(content.encode())
        data = valid_or_refused(lambda: glue_distill.load_task(f"csv:{tmp_path / 'd.csv'}"))
        for split in data.splits.values() if data else ():
            assert len(split.first) == len(split.labels) and 0 <= split.labels.min() <= split.labels.max() < data.classes
    check()
    rows = [f"text {k},{'²' if k % 3 else '9' * 5000 if k % 2 else '10'}" for k in range(60)]
    (tmp_path / "d.csv").write_text("\n".join(["text,label", *rows]))
    assert glue_distill.load_task(f"csv:{tmp_path / 'd.csv'}").classes == 3   # of any length, and no digits that are no numbers


def test_fuzz_damaged_images_are_refused_or_loaded(tmp_path):
    draw, files = np.random.default_rng(0), []
    for part, name, ending in itertools.product(("train", "val"), ("a", "b"), ("png", "jpg", "bmp")):
        files.append(tmp_path / part / name / f"1.{ending}")
        files[-1].parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(files[-1])
    good = {file: file.read_bytes() for file in files}
    assert len(common.load_data(f"folder:{tmp_path}").x_train) == 6

    @fuzz(40)
    @given(st.sampled_from(files).flatmap(lambda file: st.tuples(st.just(file), damage_to(good[file]) | st.sampled_from(list(good.values())))), st.sampled_from((None, 8, 32)))
    def check(damage, size):
        file, content = damage
        file.write_bytes(content)
        data = valid_or_refused(lambda: common.load_data(f"folder:{tmp_path}", image_size=size))
        assert data is None or data.x_train.shape == (6, size or 9, size or 9, 3)
        assert file.read_bytes() == content
        file.write_bytes(good[file])
    check()


def test_fuzz_damaged_cifar_pickles_are_refused(tmp_path, monkeypatch):
    from torchvision import datasets
    fake_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    files = sorted((tmp_path / datasets.CIFAR10.base_folder).iterdir())
    good = {file: file.read_bytes() for file in files}

    @fuzz(10)
    @given(st.sampled_from(files).flatmap(lambda file: st.tuples(st.just(file), damage_to(good[file]))))
    def check(damage):
        file, content = damage
        file.write_bytes(content)
        data = valid_or_refused(lambda: common.load_data("cifar10", tmp_path))
        assert (data is None) == (content != good[file]) and file.read_bytes() == content
        file.write_bytes(good[file])
        (tmp_path / "cifar10.npz").unlink(missing_ok=True)
    check()


def test_fuzz_a_damaged_zip_of_tiny_imagenet_is_refused_or_unpacked_whole(tmp_path):
    fake_tiny_imagenet(tmp_path / "source" / "tiny-imagenet-200")
    data_dir, archive = tmp_path / "data", tmp_path / "data" / "tiny-imagenet-200.zip"
    data_dir.mkdir()
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted((tmp_path / "source").rglob("*")):
            file.write(path, path.relative_to(tmp_path / "source"))
    good = archive.read_bytes()
    expected = common.load_data("tiny-imagenet", data_dir).facts["sha256"]

    @fuzz(12)
    @given(damage_to(good))
    def check(content):
        shutil.rmtree(data_dir / "tiny-imagenet-200", ignore_errors=True)
        (data_dir / "tiny-imagenet.npz").unlink(missing_ok=True)
        archive.write_bytes(content)
        data = valid_or_refused(lambda: common.load_data("tiny-imagenet", data_dir))
        assert data is None or data.facts["sha256"] == expected
        assert archive.read_bytes() == content and not list(data_dir.glob(".*"))
    check()


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_fuzz_a_damaged_saved_model_is_refused_or_read(name, tmp_path):
    save_pretrained(tmp_path / "model", "roberta")
    data, file = glue_distill.load_task("sentiment", subset=40), tmp_path / "model" / name
    data.splits["test"] = data.splits["test"].take(np.arange(20))
    good, args = file.read_bytes(), SimpleNamespace(tokenizer=None, vocab_size=8000, max_length=32, device="cpu")

    def read():
        model = glue_distill.prepare(str(tmp_path / "model"), data, args)
        network = glue_distill.build_classifier(model, ("student", 0))
        return glue_distill.logits_of(network, model.tokens["test"])

    @fuzz(10)
    @given(damage_to(good))
    def check(content):
        file.write_bytes(content)
        logits = valid_or_refused(read)
        assert logits is None or logits.shape == (20, 2)
    check()


def test_fuzz_damaged_eigenspace_results_are_refused_or_the_same(tmp_path):
    data, args = common.load_data("digits", subset=20), SimpleNamespace(out=str(tmp_path), overwrite=False)
    result = dict(mean=dict(student=0.25, control=float("nan")), levels=[0.5, 1.0])
    keep = lambda: eigenspace.cached(args, "x", 0, data, lambda: result, ())
    assert keep() == result
    (tmp_path / "linear.json").write_text(json.dumps(dict(claims=[common.claim("slope", "> 1", 1.25, 1.0, 1.5, 1)])))
    reads = {tmp_path / "seeds" / "x-s0.json": lambda: repr(keep()), tmp_path / "linear.json": lambda: common.claims_markdown(eigenspace.kept_claims(tmp_path / "linear.json"))}
    good, expected = {file: file.read_bytes() for file in reads}, {file: read() for file, read in reads.items()}

    @fuzz(30)
    @given(st.sampled_from(list(reads)).flatmap(lambda file: st.tuples(st.just(file), damage_to(good[file]))))
    def check(damage):
        file, content = damage
        file.write_bytes(content)
        got = valid_or_refused(reads[file])
        assert file.read_bytes() == content and (got in (None, expected[file]) or file.name == "linear.json")
        file.write_bytes(good[file])
    check()


def test_fuzz_odd_names_reach_figures_and_tables(tmp_path, monkeypatch):
    """Bytes that are no UTF-8, line breaks and what matplotlib takes for a formula."""
    monkeypatch.chdir(tmp_path)
    odd, draw = "\udcff\n$x^{ \\frac π | `", np.random.default_rng(0)
    for name in "ts":
        np.save(f"{name}\udcff.npy", draw.normal(size=(40, 3)))
    np.save("y.npy", np.arange(40) % 3)
    files = ["--teacher-logits", "t\udcff.npy", "--student-logits", "s\udcff.npy", "--labels", "y.npy"]
    assert outcome(analyze_deviation, *files, "--bootstrap", 100, "--title", odd, "--split", f"{odd}${odd}", "--out", "r\udcff")[0] == "finished"
    assert len(list(Path("r\udcff").iterdir())) == 5
    write_arrays("d\udcff.npz", n=24, side=8)
    flags = [*TINY, "--subset", 0, "--data", "npz:d\udcff.npz"]
    assert [outcome(train_teacher, *flags, "--out", "t\udcff")[0] for _ in range(2)] == ["finished"] * 2
    assert outcome(train_student, *flags, "--teacher", "t\udcff", "--teacher-cache", "on")[0] == "finished"
    Path("r\udcff/claims.json").write_text('[{"claim": 1}]')
    with pytest.raises(common.InputError, match="not a table of claims"):
        common.show_results(".")


# Pickles that would run code.


class Malicious:
    """Unpickled, it makes a file in the working folder."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)


@pytest.mark.parametrize("form", ["zip", "legacy", "pickle", "code in a tensor's place"])
def test_faults_a_malicious_checkpoint_never_runs(form, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    state = common.load_checkpoint(runs / "runs" / "kd-s0" / "checkpoint.pt")
    state["model"]["fc.bias"] = Malicious()
    content = io.BytesIO()
    if form == "pickle":
        pickle.dump(dict(model=Malicious()), content)
    else:
        torch.save(state if form.startswith("code") else dict(model=Malicious()), content, _use_new_zipfile_serialization=form != "legacy")
    evil = lambda _: content.getvalue()
    copy_run(runs / "runs" / "teacher-s0", tmp_path / "teacher", checkpoint=evil)
    copy_run(runs / "runs" / "kd-s0", tmp_path / "unfinished", checkpoint=evil, logits=None)
    copy_run(runs / "runs" / "kd-s0", tmp_path / "trunk", snapshot=None)
    (tmp_path / "trunk" / "snapshot-4.pt").write_bytes(content.getvalue())
    student = [*TINY, "--teacher", runs / "runs" / "teacher-s0"]
    assert "damaged" in refused(train_student, *TINY, "--teacher", "teacher", "--out", "never")
    assert "damaged" in refused(switch_distill, *TINY, "--teacher", "teacher", "--out", "never", "--results", "r")
    assert "damaged" in refused(denoise_gradients, *TINY, "--teacher", "teacher", "--seeds", 0, "--runs", "never", "--out", "r")
    assert "damaged" in refused(train_student, *student, "--out", "unfinished") and (tmp_path / "unfinished" / "checkpoint.pt").read_bytes() == content.getvalue()
    assert switch_distill.latest_snapshot(tmp_path / "trunk", 9) is None
    with pytest.raises(common.InputError, match="damaged"):   # what texts resume from
        common.restore_state(Path("unfinished/checkpoint.pt"), torch.nn.Linear(1, 1), None, 1, 1, torch.device("cpu"))
    assert not Path("ran").exists() and not Path("never").exists()


def test_faults_malicious_arrays_never_run(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = np.array([Malicious()] * 60, dtype=object)
    np.save("objects.npy", evil, allow_pickle=True)
    Path("plain.npy").write_bytes(pickle.dumps(Malicious()))
    shutil.copy("plain.npy", "plain.npz")
    np.savez("objects.npz", **{name: evil for name in (*common.ARRAYS, *common.LOGITS)})
    for file in ("objects.npy", "plain.npy", "plain.npz", "objects.npz:x_train"):
        assert file.split(":")[0] in refused(analyze_deviation, "--teacher-logits", file, "--student-logits", file, "--labels", file)
    for file in ("objects.npy", "plain.npy", "plain.npz", "objects.npz"):
        assert file in refused(train_teacher, *TINY, "--data", f"npz:{file}")
    copy_run(runs / "runs" / "kd-s0", tmp_path / "kd", logits=lambda _: Path("objects.npz").read_bytes())
    assert "logits.npz" in refused(analyze_deviation, "--teacher", runs / "runs" / "teacher-s0", "--student", "kd")
    assert not Path("ran").exists()


def test_faults_a_malicious_cifar_pickle_or_saved_model_never_runs(tmp_path, monkeypatch):
    from torchvision import datasets
    monkeypatch.chdir(tmp_path)
    fake_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    for file in sorted((tmp_path / datasets.CIFAR10.base_folder).iterdir()):   # batches and the list of classes
        good = file.read_bytes()
        file.write_bytes(pickle.dumps(Malicious()))
        assert "damaged" in refused(train_teacher, *TINY, "--data", "cifar10", "--data-dir", ".")
        file.write_bytes(good)
    save_pretrained(tmp_path / "model", "roberta")
    (tmp_path / "model" / "model.safetensors").unlink()
    torch.save({"roberta.embeddings.word_embeddings.weight": Malicious()}, tmp_path / "model" / "pytorch_model.bin")
    assert "model cannot be loaded" in refused(glue_distill, *LANGUAGE, "--teacher", "model", "--mode", "onehot").replace("./model", "model")
    assert not Path("ran").exists()


def test_faults_an_image_of_another_format_than_its_name_is_refused(tmp_path):
    """PIL would recognise EPS by its content and start Ghostscript to decode it."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "image.eps")
    (tmp_path / "image.eps").rename(tmp_path / "image.png")
    with pytest.raises(common.InputError, match="not a readable image"):
        common.read_image(tmp_path / "image.png")
