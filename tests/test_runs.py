"""Run folders and files: what runs.py promises about them, and how it refuses what is damaged or in other hands."""

import errno
import fcntl
import json
import math
import os
import shlex
import signal
import sys
import threading
from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from helpers import (
    HERE,
    TINY,
    copy_run,
    damage_to,
    finished,
    forkserver,
    fuzz,
    hashes,
    ok,
    one_line_error,
    outcome,
    plain,
    refused,
    run_cli,
    valid_or_refused,
    write_arrays,
)
from hypothesis import given
from hypothesis import strategies as st

import common
import engine
import runs
import train_student
import train_teacher

# ---------------------------------------------------------------- errors and flags


def ending(main, capsys):
    """Exit code of `runs.cli(main)` and its lines on stderr."""
    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            runs.cli(main)
    finally:
        signal.signal(signal.SIGTERM, handler)
    return caught.value.code, capsys.readouterr().err.splitlines()


@pytest.fixture
def plain_streams(monkeypatch, capsys):
    """pytest's own streams have no `reconfigure`."""
    for stream in (sys.stdout, sys.stderr):
        monkeypatch.setattr(stream, "reconfigure", lambda **more: None, raising=False)


@pytest.mark.parametrize(
    "error, words",
    [
        (runs.InputError("two\n  lines"), "error: two lines"),
        (MemoryError(), "error: out of memory (MemoryError): lower --batch-size"),
        (torch.cuda.OutOfMemoryError("CUDA out of memory"), "error: out of memory (CUDA out of memory): lower"),
        (RuntimeError("DefaultCPUAllocator: can't allocate\nmore"), "error: out of memory (DefaultCPUAllocator: can't"),
        (OSError(errno.ENOSPC, "No space left on device", "a/b"), "error: No space left on device: a/b (check that"),
    ],
)
def test_what_a_user_can_mend_is_one_line_and_code_2(error, words, plain_streams, capsys):
    def main():
        raise error

    code, lines = ending(main, capsys)
    assert code == 2 and len(lines) == 1 and lines[0].startswith(words), lines


def test_a_bug_is_no_user_error(plain_streams):
    def main():
        raise RuntimeError("shapes do not fit")

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError, match="shapes"):
        runs.cli(main)
    signal.signal(signal.SIGTERM, handler)


def test_the_command_to_continue_with_keeps_the_scripts_folder(plain_streams, monkeypatch, capsys):
    script = "../a folder/train_teacher.py"
    monkeypatch.setattr(sys, "argv", [script, "--overwrite", "--out", "my runs/{seed}", "--seeds", "0", "1"])

    def main():
        raise KeyboardInterrupt

    handler = signal.getsignal(signal.SIGTERM)
    with pytest.raises(SystemExit) as caught:
        runs.cli(main)
    signal.signal(signal.SIGTERM, handler)
    line = capsys.readouterr().out.strip()
    assert caught.value.code == 130
    assert line == f"interrupted; continue with: python '{script}' --out 'my runs/{{seed}}' --seeds 0 1"
    words = shlex.split(line.partition(": ")[2])
    assert words == ["python", script, "--out", "my runs/{seed}", "--seeds", "0", "1"]


def test_a_config_holds_the_command_that_made_the_run(tiny_runs):
    words = shlex.split(runs.read_config(tiny_runs / "runs" / "teacher-s1")["command"])
    assert words == ["python", str(HERE / "train_teacher.py"), *TINY, "--seeds", "0", "1", "--out", "runs/teacher"]


@pytest.mark.parametrize(
    "kind, text, limits",
    [
        (int, "0", dict(low=1)),
        (int, str(2**63), dict(low=0)),
        (int, "1.5", dict(low=0)),
        (float, "nan", dict(low=0)),
        (float, "inf", dict(low=0)),
        (float, "1", dict(low=0, high=1, open_high=True)),
        (float, "0", dict(low=0, open_low=True)),
        (float, "1.1", dict(low=0, high=1)),
    ],
)
def test_numbers_outside_their_limits_are_refused(kind, text, limits):
    with pytest.raises((ValueError, runs.argparse.ArgumentTypeError)):
        runs.number(kind, **limits)(text)


def test_numbers_and_shards_within_their_limits():
    assert runs.number(int, 0)(str(2**63 - 1)) == 2**63 - 1 and runs.number(float, 0, 1)("1") == 1.0
    assert runs.shard("2/3") == (2, 3)
    for bad in ("2/2", "-1/2", "1/0"):
        with pytest.raises(runs.argparse.ArgumentTypeError):
            runs.shard(bad)


def test_reading_names_what_is_read_and_the_fix():
    for error in (ValueError("bad"), KeyError("x"), OSError("short"), RuntimeError("odd"), EOFError(), MemoryError()):
        with pytest.raises(runs.InputError, match=r"^the file cannot be read \(.+\): make it again$"):
            with runs.reading("the file", "make it again"):
                raise error
    with pytest.raises(runs.InputError, match="^absent.json does not exist: restore it"):
        runs.read_json("absent.json")
    with pytest.raises(KeyboardInterrupt), runs.reading("the file"):  # no fault of the file
        raise KeyboardInterrupt


# ---------------------------------------------------------------- files


def test_a_failed_write_keeps_the_old_file(tmp_path):
    runs.write_text(tmp_path / "f", "old")

    def half(file):
        file.write(b"ne")
        raise OSError("disk full")

    with pytest.raises(OSError):
        runs.write_atomic(tmp_path / "f", half)
    assert (tmp_path / "f").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_full_disk_names_the_file_also_through_torch(tmp_path, monkeypatch):
    def no_space(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError) as caught:
        runs.write_text(tmp_path / "f", "new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "f"))

    def torch_fails(file):
        try:
            no_space()
        except OSError:
            raise RuntimeError("PytorchStreamWriter failed") from None

    with pytest.raises(OSError) as caught:
        runs.write_atomic(tmp_path / "f", torch_fails)
    assert caught.value.filename == str(tmp_path / "f") and not list(tmp_path.iterdir())


def test_reports_hold_valid_json_and_text_of_any_bytes(tmp_path):
    runs.write_json(tmp_path / "a.json", dict(a=[math.nan, 1.5, (math.inf,)], b={3: "é"}))
    assert runs.read_json(tmp_path / "a.json") == dict(a=[None, 1.5, [None]], b={"3": "é"})
    runs.write_text(tmp_path / "t", "a\udcffé")
    assert (tmp_path / "t").read_text(encoding="utf-8") == "a?é"


def test_arrays_come_back_as_they_were_written(tmp_path):
    arrays = dict(a=np.arange(5), b=np.array(1.5, np.float32))
    runs.write_npz(tmp_path / "a.npz", arrays)
    assert runs.read_npz(tmp_path / "a.npz").keys() == arrays.keys()
    assert list(runs.read_npz(tmp_path / "a.npz", ["b"])) == ["b"] and os.listdir(tmp_path) == ["a.npz"]
    with pytest.raises(runs.InputError, match="lacks the arrays c: it must hold a, c"):
        runs.read_npz(tmp_path / "a.npz", ["a", "c"])


def test_a_kept_result_is_computed_once_and_for_the_same_settings_alone(tmp_path):
    path, result, calls = tmp_path / "seeds" / "x-s0.json", dict(a=[math.nan, 1.25], b="c"), []

    def compute():
        calls.append(1)
        return result

    for _ in range(2):
        assert repr(runs.kept_result(path, dict(lr=1), compute)) == repr(result)
    assert len(calls) == 1
    with pytest.raises(runs.InputError, match=r"other settings \(lr\).*--overwrite"):
        runs.kept_result(path, dict(lr=2), compute)
    kept = json.loads(path.read_text())
    path.write_text(json.dumps(dict(kept, result=dict(result, b="d"))))
    with pytest.raises(runs.InputError, match="has changed.*--overwrite"):
        runs.kept_result(path, dict(lr=1), compute)
    path.unlink()
    runs.kept_result(path, dict(lr=2), compute)
    assert len(calls) == 2 and runs.read_json(path)["settings"] == dict(lr=2)


def test_runs_need_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.versions()["git_commit"] is None and runs.versions()["torch"] == torch.__version__


# ---------------------------------------------------------------- damaged files


def reader_of(kind, tiny_runs, folder):
    """A file of that kind in `folder`, and read() -> all that it holds."""
    run = folder / "run"
    copy_run(tiny_runs / "runs" / "teacher-s0", run)
    if kind == "dataset":
        write_arrays(folder / "d.npz", n=40, side=12)
        return folder / "d.npz", lambda: common.load_data(f"npz:{folder / 'd.npz'}").facts["sha256"]
    if kind == "checkpoint":
        return run / "checkpoint.pt", lambda: plain(runs.load_checkpoint(run / "checkpoint.pt"))
    return run / "logits.npz", lambda: plain(runs.read_npz(run / "logits.npz", engine.LOGITS))


@pytest.mark.parametrize("kind", ["dataset", "checkpoint", "logits"])
def test_fuzz_a_damaged_file_with_checksums_never_gives_other_numbers(kind, tiny_runs, tmp_path):
    file, read = reader_of(kind, tiny_runs, tmp_path)
    good, expected = file.read_bytes(), read()

    @fuzz(30)
    @given(damage_to(good))
    def check(content):
        file.write_bytes(content)
        got = valid_or_refused(read)
        assert got is None or got == expected
        assert file.read_bytes() == content

    check()


def test_a_header_that_asks_for_less_than_there_is_is_noticed(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(100_000))
    content = (tmp_path / "a.npz").read_bytes()
    assert content.count(b"(100000,)") == 1
    (tmp_path / "a.npz").write_bytes(content.replace(b"(100000,)", b"(10000 ,)"))
    with pytest.raises(runs.InputError, match="checksum"):
        runs.read_npz(tmp_path / "a.npz", ["x"])


ODD_TEXTS = (b"", b"null\n", b"[]\n", b"{}\n", b"[" * 99_999, b'{"a":' * 99_999, b"\xff\xfe\n", b"9" * 5000)
REPLACED = (
    *((b"0.25", b"1e999"), (b"0.25", b'"0.25"'), (b"resnet8", b"mlp"), (b'"epoch": 1', b'"epoch": 2')),
    *((b"test_acc", b"test"), (b'"test_acc": 0', b'"test_acc": -0'), (b'"data": {', b'"data": [{')),
)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_fuzz_a_damaged_config_or_metrics_is_refused_or_read(name, tiny_runs, tmp_path):
    run, data = tmp_path / "run", common.load_data("digits", subset=300)
    copy_run(tiny_runs / "runs" / "teacher-s0", run)
    good = (run / name).read_bytes()
    others = [*ODD_TEXTS, good * 2, *(good.replace(*pair) for pair in REPLACED)]

    @fuzz(15)
    @given(st.sampled_from(others) | damage_to(good))
    def check(content):
        (run / name).write_bytes(content)
        before = hashes(run)
        valid_or_refused(lambda: runs.last_metrics(run))
        valid_or_refused(lambda: runs.finished_config(run))
        valid_or_refused(lambda: engine.load_teacher(run, data))
        assert outcome(train_teacher, *TINY, "--out", run)[0] in ("finished", "refused")
        assert hashes(run) == before

    check()


# ---------------------------------------------------------------- run folders


def flags_of(**changed):
    return SimpleNamespace(**dict(out=None, seeds=[0], data="digits", arch="resnet8") | changed)


def test_run_folders_are_named_by_out_and_seed():
    assert runs.run_folder(flags_of(), 3, "digits-resnet8-teacher") == Path("runs/digits-resnet8-teacher-s3")
    assert runs.run_folder(flags_of(out="a"), 0, "x") == Path("a")
    assert runs.run_folder(flags_of(out="a", seeds=[0, 1]), 1, "x") == Path("a-s1")
    assert runs.run_folder(flags_of(out="a/{seed}/b"), 7, "x") == Path("a/7/b")
    assert runs.default_name(flags_of()) == "digits-resnet8"
    torchvision = flags_of(data="npz:some/where/d.npz", arch="torchvision:resnet18")
    assert runs.default_name(torchvision) == "d-resnet18"


@pytest.mark.parametrize("name", ["teacher", "kd", "onehot"])
def test_a_run_folder_holds_what_was_trained(name, tiny_runs):
    run, data = tiny_runs / "runs" / f"{name}-s0", common.load_data("digits", subset=300)
    assert sorted(os.listdir(run)) == ["checkpoint.pt", "config.json", "logits.npz", "metrics.jsonl"]
    config = runs.read_config(run)
    assert config["flags"]["epochs"] == 2 and config["data"]["flipped"] > 0
    assert config["versions"]["torch"] == torch.__version__ and config["data"]["sha256"] == data.facts["sha256"]
    model = common.build_model("resnet8", 10, (8, 8, 1), 0.25)
    model.load_state_dict(runs.load_checkpoint(run / "checkpoint.pt")["model"])
    logits = runs.read_npz(run / "logits.npz", engine.LOGITS)
    assert logits["train_logits"].dtype == np.float32
    for split, images in (("train", data.x_train), ("test", data.x_test)):
        with torch.no_grad():
            assert np.allclose(logits[f"{split}_logits"], model.eval()(data.normalise(images)).numpy(), atol=1e-4)
    kept = dict(train_labels=data.y_train, train_clean_labels=data.y_clean, train_index=data.index)
    for key, tensor in dict(kept, test_labels=data.y_test).items():
        assert np.array_equal(logits[key], tensor.numpy())
    lines = runs.read_metrics(run)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[-1]["best_test_acc"] == max(line["test_acc"] for line in lines)
    assert lines[-1]["test_acc"] == pytest.approx((logits["test_logits"].argmax(1) == logits["test_labels"]).mean())


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(tiny_runs, monkeypatch):
    monkeypatch.chdir(tiny_runs)
    run, command = Path("runs/teacher-s0"), [*TINY, "--seed", 0, "--out", "runs/teacher-s0"]
    before = hashes(run)
    assert "is finished already" in finished(train_teacher, *command)
    # Where and how to run does not count.
    assert "is finished already" in finished(train_teacher, *command, "--eval-every", 1, "--data-dir", "x", "--no-fast")
    line = refused(train_teacher, *command, "--lr", 0.3, "--momentum", 0.5)
    assert "other settings (flags.lr: 0.1 there, 0.3 now; flags.momentum: 0.9 there, 0.5 now)" in line
    assert "--overwrite" in line
    line = refused(train_student, *command, "--teacher", "runs/teacher-s1")
    assert "other settings" in line and "role: 'teacher' there, 'student' now" in line
    line = refused(train_student, *TINY, "--out", "runs/kd-s0", "--teacher", "runs/teacher-s1")
    assert "other settings (facts.teacher_sha256: " in line
    assert hashes(run) == before


def test_overwrite_trains_again(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for extra in ([], ["--overwrite", "--lr", 0.05]):
        finished(train_teacher, *TINY, "--out", "t", *extra)
    assert runs.read_config("t")["flags"]["lr"] == 0.05 and runs.last_metrics("t")["lr"] < 0.05


def test_overwrite_discards_all_seeds_first_and_only_the_files_of_runs(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        copy_run(tiny_runs / "runs" / f"teacher-s{seed}", Path(f"t-s{seed}"))
    mine = [Path("t-s1", name) for name in ("notes.txt", ".draft.tmp", "snapshot-new.pt", "checkpoint.pt.old")]
    for file in mine:
        file.write_text("mine")
    # Seed 0 cannot be trained, so the command stops; what it says must go on without --overwrite.
    Path("t-s0/config.json").unlink()
    line = refused(train_teacher, *TINY, "--seeds", 0, 1, "--lr", 0.2, "--out", "t", "--overwrite")
    assert "t-s0 is not empty and not a run folder" in line
    assert Path("t-s0/checkpoint.pt").exists()  # a folder without config.json is not ours to empty
    assert runs.read_json("t-s1/config.json") == runs.DISCARDED and not Path("t-s1/checkpoint.pt").exists()
    finished(train_teacher, *TINY, "--seed", 1, "--lr", 0.2, "--out", "t-s1")
    assert runs.read_config("t-s1")["flags"]["lr"] == 0.2
    assert all(file.read_text() == "mine" for file in mine)


def test_a_discarded_run_is_not_finished_at_any_moment(tiny_runs, tmp_path, monkeypatch):
    copy_run(tiny_runs / "runs" / "teacher-s0", tmp_path / "t")
    unlink = Path.unlink

    def stop_after(path, **more):
        unlink(path, **more)
        if path.name == "logits.npz":
            raise KeyboardInterrupt

    monkeypatch.setattr(Path, "unlink", stop_after)
    with pytest.raises(KeyboardInterrupt):
        runs.discard_run(tmp_path / "t")
    monkeypatch.undo()
    assert runs.read_json(tmp_path / "t" / "config.json") == runs.DISCARDED
    assert not (tmp_path / "t" / "logits.npz").exists()
    finished(train_teacher, *TINY, "--seed", 1, "--out", tmp_path / "t")  # without --overwrite, with other settings
    assert runs.read_config(tmp_path / "t")["seed"] == 1


def test_leftovers_of_a_killed_write_are_removed_and_no_others(tiny_runs, tmp_path):
    copy_run(tiny_runs / "runs" / "teacher-s0", tmp_path / "t")
    for name in (".checkpoint.pt.tmp", ".logits.npz.tmp", ".draft.tmp"):
        (tmp_path / "t" / name).write_text("half")
    finished(train_teacher, *TINY, "--out", tmp_path / "t")
    assert [file.name for file in (tmp_path / "t").glob(".*")] == [".draft.tmp"]


def test_a_config_without_its_parts_is_refused(tiny_runs, tmp_path):
    copy_run(tiny_runs / "runs" / "teacher-s0", tmp_path / "t")
    for content in ("[]", "{}", '{"flags": {}, "data": 3, "facts": {}}'):
        (tmp_path / "t" / "config.json").write_text(content)
        before = hashes(tmp_path / "t")
        assert "config.json is not that of a run" in refused(train_teacher, *TINY, "--out", tmp_path / "t")
        assert hashes(tmp_path / "t") == before
    with pytest.raises(runs.InputError, match="absent is not a run folder"):
        runs.finished_config(tmp_path / "absent")


def test_places_that_cannot_be_written_get_one_line(tiny_runs, tmp_path, monkeypatch):
    """/dev/null and /proc refuse even an administrator."""
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("mine")
    Path("made").mkdir()
    Path("made/teacher-logits").write_text("mine")
    one_hot = [*TINY, "--kd-weight", 0, "--ce-weight", 1]
    for place in ("/dev/null/x", "/proc/x", "file/x"):
        assert place in refused(train_teacher, *TINY, "--out", place)
        assert place in refused(train_student, *one_hot, "--out", place)
    # Nine epochs of distillation would need the table of all views: here the one of each epoch's views is made.
    monkeypatch.setattr(common, "free_memory", lambda device: 0)
    teacher = ["--teacher", tiny_runs / "runs" / "teacher-s0", "--teacher-cache", "on"]
    assert "made/teacher-logits" in refused(train_student, *TINY, *teacher, "--out", "made/kd")
    assert Path("file").read_text() == Path("made/teacher-logits").read_text() == "mine"


# ---------------------------------------------------------------- processes

TORCHRUN = dict(RANK="1", WORLD_SIZE="2", LOCAL_RANK="1", MASTER_ADDR="localhost", MASTER_PORT="29500")


@pytest.fixture
def no_torchrun(monkeypatch):
    for name in TORCHRUN:
        monkeypatch.delenv(name, raising=False)


@pytest.mark.parametrize(
    "variables, expected",
    [
        ({}, (0, 1)),
        (dict(WORLD_SIZE="4"), (0, 1)),
        (dict(RANK="0"), (0, 1)),
        (dict(RANK="0", WORLD_SIZE="1"), (0, 1)),
        (TORCHRUN, (1, 2)),
    ],
)
def test_ranks_are_those_of_torchrun(variables, expected, no_torchrun, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert runs.ranks() == expected


@pytest.mark.parametrize(
    "variables, words",
    [
        (dict(RANK="0", WORLD_SIZE="2"), "LOCAL_RANK, MASTER_ADDR, MASTER_PORT"),
        ({key: value for key, value in TORCHRUN.items() if key != "MASTER_ADDR"}, "MASTER_ADDR"),
        (dict(TORCHRUN, RANK="first"), "not as torchrun does"),
        (dict(TORCHRUN, WORLD_SIZE=""), "not as torchrun does"),
    ],
)
def test_leftover_variables_of_torchrun_are_one_line(variables, words, no_torchrun, tmp_path, monkeypatch):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    line = refused(train_teacher, *TINY, "--out", tmp_path / "t")
    assert words in line and "use torchrun, or unset RANK" in line and not (tmp_path / "t").exists()


def hold(guard, path, go, held):
    """In another process: be inside guard(path) until `go`."""
    with guard(path):
        held.set()
        go.wait()


def test_a_run_folder_serves_one_process_at_a_time(tiny_runs, tmp_path):
    copy_run(tiny_runs / "runs" / "teacher-s0", tmp_path / "t", logits=None)  # unfinished
    before = hashes(tmp_path / "t")
    context = forkserver()
    go, held = context.Event(), context.Event()
    process = context.Process(target=hold, args=(runs.locked, tmp_path / "t", go, held))
    process.start()
    held.wait()
    refusal = run_cli("train_teacher.py", *TINY, "--out", "t", cwd=tmp_path)
    one_line_error(refusal, "being trained by another process", f"process {process.pid} on", "--out")
    assert "being trained by another" in refused(train_teacher, *TINY, "--out", tmp_path / "t", "--overwrite")
    assert {name: digest for name, digest in hashes(tmp_path / "t").items() if not name.startswith(".lock")} == before
    process.kill()  # it cannot remove its lock file: the next one is not kept out by that
    process.join()
    assert (tmp_path / "t" / ".lock").exists()
    ok(run_cli("train_teacher.py", *TINY, "--out", "t", cwd=tmp_path))
    assert sorted(os.listdir(tmp_path / "t")) == ["checkpoint.pt", "config.json", "logits.npz", "metrics.jsonl"]


def test_a_lock_leaves_no_empty_folder_and_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), runs.locked(tmp_path / "new"):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()  # nothing was written into it
    with runs.locked(tmp_path / "run"):
        (tmp_path / "run" / "file").write_text("")
        with pytest.raises(runs.InputError, match="being trained by another process"), runs.locked(tmp_path / "run"):
            pass
    assert os.listdir(tmp_path / "run") == ["file"]


def test_a_folder_where_nothing_can_be_locked_is_used_all_the_same(tmp_path, monkeypatch, capsys):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with runs.locked(tmp_path / "run"):
        (tmp_path / "run" / "file").write_text("")
    assert "run is not locked (No locks available): let no other process train there" in capsys.readouterr().out


def test_data_can_be_read_where_nothing_can_be_locked(tmp_path, monkeypatch):
    def no_locks(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with runs.one_at_a_time(tmp_path / "data"):
        pass


def test_one_at_a_time_waits_for_the_same_path_alone(tmp_path):
    inside, most, guard = [], [], threading.Lock()

    def enter(path):
        with runs.one_at_a_time(path):
            with guard:
                inside.append(path)
                most.append(len(inside))
            for _ in range(2000):  # others get their turn
                os.sched_yield()
            with guard:
                inside.remove(path)

    threads = [threading.Thread(target=enter, args=(tmp_path / "new" / "data",)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert most == [1] * 4
    with ExitStack() as stack:
        for name in "ab":
            stack.enter_context(runs.one_at_a_time(tmp_path / name))


def test_a_process_that_was_killed_inside_one_at_a_time_keeps_nobody_out(tmp_path):
    context = forkserver()
    go, held = context.Event(), context.Event()
    process = context.Process(target=hold, args=(runs.one_at_a_time, tmp_path / "data", go, held))
    process.start()
    held.wait()
    process.kill()
    process.join()
    with runs.one_at_a_time(tmp_path / "data"):
        pass
