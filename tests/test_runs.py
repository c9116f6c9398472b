"""Run folders and files: what runs.py promises about them, and how it refuses what is damaged or in other hands."""

import errno
import fcntl
import functools
import importlib
import json
import math
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import common
import engine
import runs
import train_student
import train_teacher

import numpy as np
import pytest
import safetensors.torch
import scipy.special
import torch
from helpers import (
    HERE,
    TINY,
    Crash,
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

# ---------------------------------------------------------------- errors and flags


def ending(error, capsys):
    """What `runs.cli` makes of a main() that raises `error`: exit code, lines on stdout and lines on stderr."""

    def main():
        raise error

    handler = signal.getsignal(signal.SIGTERM)
    try:
        with pytest.raises(SystemExit) as caught:
            runs.cli(main)
    finally:
        signal.signal(signal.SIGTERM, handler)
    printed = capsys.readouterr()
    return caught.value.code, printed.out.splitlines(), printed.err.splitlines()


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
def test_what_a_user_can_mend_is_one_line_and_code_2(error, words, capsys):
    code, _, lines = ending(error, capsys)
    assert code == 2 and len(lines) == 1 and lines[0].startswith(words), lines


def test_no_run_is_blamed_for_what_is_not_in_its_files(tiny_runs):
    """Whose advice would be to remove it."""
    run = tiny_runs / "runs" / "kd-s0"
    with pytest.raises(torch.cuda.OutOfMemoryError), runs.reading("checkpoint.pt", run=run):
        raise torch.cuda.OutOfMemoryError
    with pytest.raises(runs.InputError, match="check its permissions"), runs.reading("checkpoint.pt", run=run):
        raise PermissionError(errno.EACCES, "Permission denied")


def test_a_bug_is_no_user_error(capsys):
    with pytest.raises(RuntimeError, match="shapes"):
        ending(RuntimeError("shapes do not fit"), capsys)


def test_the_command_to_continue_with_keeps_the_scripts_folder(monkeypatch, capsys):
    script = "../a folder/train_teacher.py"
    monkeypatch.setattr(sys, "argv", [script, "--overwrite", "--out", "my runs/{seed}", "--seeds", "0", "1"])
    code, lines, _ = ending(KeyboardInterrupt(), capsys)
    assert code == 130
    assert len(lines) == 2 and lines[0].startswith("note: runs that --overwrite has not reached are kept")
    assert lines[1] == f"interrupted; continue with: python '{script}' --out 'my runs/{{seed}}' --seeds 0 1"


def test_an_interruption_while_libraries_are_imported_leaves_one_line(tmp_path):
    (tmp_path / "torch.py").write_text("raise KeyboardInterrupt")  # in place of the library, before any of our code
    environment = dict(os.environ, PYTHONPATH=str(tmp_path))
    for script in ("train_teacher.py", "glue_distill.py", "eigenspace.py", "report.py"):
        command = [sys.executable, str(HERE / script), "--help"]
        process = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert process.returncode == 130 and process.stderr == "", script
        assert process.stdout == "interrupted before anything was done\n"


def test_numbers_outside_their_limits_are_refused():
    assert runs.number(int, 0)(str(2**63 - 1)) == 2**63 - 1 and runs.number(float, 0, 1)("1") == 1.0
    share = runs.number(float, 0, 1, open_high=True)
    count = runs.number(int, 1)
    above = runs.number(float, 0, open_low=True)
    for parse, texts in ((share, "nan inf -1 1.1 1"), (count, f"0 1.5 {2**63}"), (above, "0 inf")):
        for text in texts.split():
            with pytest.raises((ValueError, runs.argparse.ArgumentTypeError)):
                parse(text)


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


@pytest.mark.parametrize("fails", ["fsync", "replace"])
def test_a_full_disk_names_the_file_and_keeps_the_old_one(fails, tmp_path, monkeypatch):
    def no_space(*args):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    runs.write_text(tmp_path / "f", "old")
    monkeypatch.setattr(os, fails, no_space)
    with pytest.raises(OSError) as caught:
        runs.write_atomic(tmp_path / "f", b"new")
    assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(tmp_path / "f"))
    assert (tmp_path / "f").read_text() == "old" and os.listdir(tmp_path) == ["f"]


def test_reports_hold_valid_json_and_text_of_any_bytes(tmp_path):
    runs.write_json(tmp_path / "a.json", dict(a=[math.nan, 1.5, (math.inf,)], b={3: "é"}))
    assert runs.read_json(tmp_path / "a.json") == dict(a=[None, 1.5, [None]], b={"3": "é"})
    runs.write_text(tmp_path / "t", "a\udcffé")
    assert (tmp_path / "t").read_text(encoding="utf-8") == "a?é"


def test_arrays_come_back_as_they_were_written(tmp_path):
    arrays = dict(a=np.arange(5), b=np.array(1.5, np.float32))
    runs.write_npz(tmp_path / "a.npz", arrays)
    assert plain(runs.read_npz(tmp_path / "a.npz")) == plain(arrays) and os.listdir(tmp_path) == ["a.npz"]
    assert list(runs.read_npz(tmp_path / "a.npz", ["b"])) == ["b"]
    assert set(runs.read_npz(tmp_path / "a.npz", ["b"], optional=["a", "c"])) == {"a", "b"}
    with pytest.raises(runs.InputError, match="lacks the arrays c, it holds a, b: check the path"):
        runs.read_npz(tmp_path / "a.npz", ["a", "c"])


def test_a_kept_result_is_computed_once_and_for_the_same_settings_alone(tmp_path):
    path = tmp_path / "seeds" / "x-s0.json"
    result = dict(a=[math.nan, 1.25], b="c")
    calls = []

    def compute():
        calls.append(1)
        return result

    for _ in range(2):
        assert repr(runs.kept_result(path, dict(lr=1), compute)) == repr(result)
    assert len(calls) == 1
    with pytest.raises(runs.InputError, match=r"other settings \(lr\).*choose another folder for results, or remove"):
        runs.kept_result(path, dict(lr=2), compute)
    kept = json.loads(path.read_text())
    for damage in (dict(kept, result=dict(result, b="d")), [], {}):
        path.write_text(json.dumps(damage))
        with pytest.raises(runs.InputError, match="x-s0.json cannot be read.*remove it, it is made again"):
            runs.kept_result(path, dict(lr=1), compute)
    path.unlink()
    runs.kept_result(path, dict(lr=2), compute)
    assert len(calls) == 2 and runs.read_json(path)["settings"]["lr"] == 2
    with pytest.raises(runs.InputError, match=r"other settings \(code\)"):
        runs.kept_result(path, dict(lr=2), lambda: result)


def test_runs_need_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert runs.versions()["git_commit"] is None and runs.versions()["torch"] == torch.__version__


# ---------------------------------------------------------------- arrays, logits and labels of others


def test_an_array_is_read_from_every_kind_of_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    array = np.arange(20.0).reshape(10, 2)
    tensor = torch.from_numpy(array).to(torch.bfloat16)
    np.save("t.npy", array)
    np.savez("one.npz", array)
    np.savez("both.npz", a=array, b=array + 1)
    np.savez("beside.npz", a=array, names=np.array([{}]))
    torch.save(tensor, "t.pt")
    other = torch.ones(2).to(torch.float8_e4m3fn)
    torch.save(dict(logits=tensor, labels=tensor + 1, other=other, epoch=3), "both.pth")
    torch.save(dict(epoch=3), "none.pt")
    torch.save(tensor.to_sparse(), "sparse.pt")
    torch.save(torch.tensor([1 / 3], dtype=torch.float64), "exact.pt")
    torch.save(dict(logits=tensor, best=np.float64(3)), "numpy2.pt")
    with zipfile.ZipFile("numpy2.pt") as new, zipfile.ZipFile("numpy1.pt", "w") as old:
        for entry in new.namelist():
            old.writestr(entry, new.read(entry).replace(b"numpy._core.multiarray", b"numpy.core.multiarray"))
    safetensors.torch.save_file(dict(logits=tensor), "t.safetensors")
    np.savetxt("t.csv", array, delimiter=",")
    np.savetxt("header.csv", array, delimiter=",", header="cat,dog", comments="")
    Path("torn.npy").write_bytes(Path("t.npy").read_bytes()[:100])
    np.savetxt("pandas.csv", array, delimiter=",", header="0,1", comments="")
    Path("ragged.csv").write_text("1,2\n3\n")
    Path("index.csv").write_text(",0,1\n0,0.5,1.5\n")
    for name in "t.npy one.npz both.npz:a t.pt both.pth:logits t.safetensors t.csv header.csv pandas.csv".split():
        assert np.array_equal(runs.read_array(Path(name)), array), name
    for name in ("beside.npz:a", "numpy1.pt", "numpy2.pt"):
        assert np.array_equal(runs.read_array(name), array), name
    assert runs.read_array("exact.pt") == np.array([1 / 3])  # as of an .npy
    for name in ("both.npz:b", "both.pth:labels"):
        assert np.array_equal(runs.read_array(name), array + 1), name
    for name, message in {
        "both.npz": "both.npz holds a, b: name one as both.npz:NAME",
        "both.npz:c": "both.npz lacks the arrays c, it holds a, b",
        "both.pth": "both.pth holds logits, labels, other: name one as",
        "none.pt": "none.pt holds no arrays",
        "sparse.pt": "sparse.pt cannot be read",
        "torn.npy": "torn.npy cannot be read",
        "ragged.csv": "ragged.csv cannot be read",
        "index.csv": "its first column is an index, as pandas writes it",
        "absent.npy": "absent.npy does not exist",
        "absent.npz:a": "absent.npz does not exist",
    }.items():
        with pytest.raises(runs.InputError, match=message):
            runs.read_array(name)


LOGITS = np.random.default_rng(0).normal(0, 2, (50, 6))
LABELS = LOGITS.argmax(1)


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda z: z[:40], r"x is \[40, 6\] but the teacher's logits are \[50, 6\]"),
        (lambda z: z[0], r"x is float64 \[6\]: logits must be numbers"),
        (lambda z: z[:, :1], "must be numbers"),
        (lambda z: z[:7], "must be numbers"),
        (lambda z: z.astype("U3"), "must be numbers"),
        (lambda z: np.where(np.arange(50)[:, None] == 7, np.nan, z), r"NaN or infinite values \(first in row 7\)"),
        (lambda z: z * 1e160, "these are no logits"),
        (lambda z: scipy.special.softmax(z, 1).astype(np.float32), r"x has probabilities.*numpy.log\("),
        (lambda z: np.round(100 * scipy.special.softmax(z, 1), 2), "x has probabilities, rows that sum to 100"),
        (lambda z: np.round(scipy.special.softmax(z, 1), 2), "x has probabilities, rows that sum to 1:"),
    ],
)
def test_what_are_no_logits_is_refused(change, message):
    with pytest.raises(runs.InputError, match=message):
        runs.check_logits(change(LOGITS), "x", LOGITS)


def test_logits_and_labels_come_back_in_full_precision(tmp_path, capsys):
    for good in (LOGITS, LOGITS - LOGITS.min(), np.log(scipy.special.softmax(LOGITS, 1)), (4 * LOGITS).astype(int)):
        found = runs.check_logits(good, "x", LOGITS)
        assert found.dtype == np.float64 and np.array_equal(found, good)
    np.savetxt(tmp_path / "y.csv", LABELS, "%d")
    for good in (LABELS.astype(np.uint8), runs.read_array(tmp_path / "y.csv")):
        found = runs.check_labels(good, "y", LOGITS)
        assert found.dtype == np.int64 and np.array_equal(found, LABELS)
    assert np.array_equal(runs.check_labels(LABELS.astype(str), "y", LOGITS), LABELS)
    twelve = np.arange(24) % 12  # sorted as words, 10 would come before 2
    assert np.array_equal(runs.check_labels(twelve.astype(str), "y", np.zeros((24, 12))), twelve)
    with pytest.raises(runs.InputError, match="y has 5 different words for 6 classes: give their numbers"):
        runs.check_labels(np.array(["cat", "cat", "dog", "emu", "fox", "gnu"])[LABELS], "y", LOGITS)
    for bad in (LABELS[:-1], LABELS[:, None], LABELS + 1, LABELS - 1, LABELS / 1, np.arange(50).astype(str)):
        with pytest.raises(runs.InputError, match=r"y is .*: it must hold 50 integers within 0\.\.5"):
            runs.check_labels(bad, "y", LOGITS)
    with pytest.raises(runs.InputError, match="y cannot be read"):
        runs.check_labels(np.array(["é".encode("latin-1")] * 50), "y", LOGITS)
    capsys.readouterr()
    words = np.array(["cat", "dog", "emu", "fox", "gnu", "yak"])[LABELS]
    assert np.array_equal(runs.check_labels(words, "y", LOGITS), LABELS)
    assert "y: its 6 labels are numbered in sorted order (cat = 0, dog = 1, " in capsys.readouterr().out


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
    if kind == "logits":
        return run / "logits.npz", lambda: plain(runs.read_npz(run / "logits.npz", runs.LOGITS))
    file = folder / f"t.{kind}"
    tensor = torch.from_numpy(LOGITS)
    save = dict(npy=lambda: np.save(file, LOGITS), pt=lambda: torch.save(tensor, file))
    save["safetensors"] = lambda: safetensors.torch.save_file(dict(logits=tensor), file)
    save[kind]()
    return file, lambda: np.array(runs.check_logits(runs.read_array(file), "t"))


@pytest.mark.parametrize("kind", ["dataset", "checkpoint", "logits", "npy", "pt", "safetensors"])
def test_fuzz_a_damaged_file_is_refused_or_read(kind, tiny_runs, tmp_path):
    file, read = reader_of(kind, tiny_runs, tmp_path)
    good = file.read_bytes()
    expected = read()

    def check(content):
        file.write_bytes(content)
        got = valid_or_refused(read)
        if isinstance(got, np.ndarray):  # no checksums: values may differ, finiteness may not
            assert got.dtype == np.float64 and len(got) >= 8
        else:  # a checksum: never other numbers
            assert got is None or got == expected
        assert file.read_bytes() == content

    fuzz(30)(given(damage_to(good))(check))()
    if kind == "npy":
        check(good.replace(b"(50, 6), }     ", b"(400000000, 6), }")[: len(good)])  # more than any memory


def test_a_header_that_asks_for_less_than_there_is_is_noticed(tmp_path):
    np.savez(tmp_path / "a.npz", x=np.arange(100_000))
    content = (tmp_path / "a.npz").read_bytes()
    assert content.count(b"(100000,)") == 1
    (tmp_path / "a.npz").write_bytes(content.replace(b"(100000,)", b"(10000 ,)"))
    with pytest.raises(runs.InputError, match="checksum"):
        runs.read_npz(tmp_path / "a.npz", ["x"])


ODD_TEXTS = (b"", b"null\n", b"[]\n", b"{}\n", b"[" * 99_999, b'{"a":' * 99_999, b"\xff\xfe\n", b"9" * 5000)
ODD_TEXTS += (b'{"flags": {}, "data": 3, "facts": {}}',)
REPLACED = (
    *((b"0.25", b"1e999"), (b"0.25", b'"0.25"'), (b"resnet8", b"mlp"), (b'"epoch": 1', b'"epoch": 2')),
    *((b"test_acc", b"test"), (b'"test_acc": 0', b'"test_acc": -0'), (b'"data": {', b'"data": [{')),
)


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl"])
def test_fuzz_a_damaged_config_or_metrics_is_refused_or_read(name, tiny_runs, tmp_path):
    run = tmp_path / "run"
    data = common.load_data("digits", subset=300)
    copy_run(tiny_runs / "runs" / "teacher-s0", run)
    good = (run / name).read_bytes()
    others = [*ODD_TEXTS, good * 2, *(good.replace(*pair) for pair in REPLACED)]

    @fuzz(15)
    @given(st.sampled_from(others) | damage_to(good))
    def check(content):
        (run / name).write_bytes(content)
        before = hashes(run)
        valid_or_refused(lambda: runs.read_metrics(run))
        valid_or_refused(lambda: runs.finished_config(run))
        valid_or_refused(lambda: engine.load_teacher(run, data))
        assert outcome(train_teacher, *TINY, "--out", run)[0] in ("finished", "refused")
        assert hashes(run) == before

    check()


# ---------------------------------------------------------------- run folders


def test_run_folders_are_named_by_out_and_seed():
    def args(**changed):
        return SimpleNamespace(**dict(dict(out=None, seeds=[0], data="digits", arch="resnet8"), **changed))

    assert runs.run_folder(args(), 3, "digits-resnet8-teacher") == Path("runs/digits-resnet8-teacher-s3")
    assert runs.run_folder(args(out="a"), 0, "x") == Path("a")
    assert runs.run_folder(args(out="a", seeds=[0, 1]), 1, "x") == Path("a-s1")
    assert runs.run_folder(args(out="a/{seed}/b"), 7, "x") == Path("a/7/b")
    assert runs.default_name(args()) == "digits-resnet8"
    assert runs.default_name(args(data="npz:some/where/d.npz", arch="torchvision:resnet18")) == "d-resnet18"


RUN = ["checkpoint.pt", "config.json", "logits.npz", "metrics.jsonl"]


def files_in(run):
    """The names in a run folder but for snapshots."""
    return sorted(name for name in os.listdir(run) if not re.fullmatch(r"snapshot-[0-9]+\.pt", name))


@pytest.mark.parametrize("name", ["teacher", "kd", "onehot"])
def test_a_run_folder_holds_what_was_trained(name, tiny_runs):
    run = tiny_runs / "runs" / f"{name}-s0"
    data = common.load_data("digits", subset=300)
    assert files_in(run) == RUN
    config = runs.read_config(run)
    assert config["flags"]["epochs"] == 2 and config["data"]["flipped"] > 0
    assert config["versions"]["torch"] == torch.__version__ and config["data"]["sha256"] == data.facts["sha256"]
    if name == "teacher":
        words = [str(HERE / "train_teacher.py"), *TINY, "--seeds", "0", "1", "--out", "runs/teacher"]
        assert shlex.split(config["command"]) == ["python", *words]
    model = common.build_model("resnet8", 10, (8, 8, 1), 0.25)
    model.load_state_dict(runs.load_checkpoint(run / "checkpoint.pt")["model"])
    logits = runs.read_npz(run / "logits.npz", runs.LOGITS)
    assert logits["train_logits"].dtype == np.float32
    for split, images in (("train", data.x_train), ("test", data.x_test)):
        with torch.no_grad():
            assert np.allclose(logits[f"{split}_logits"], model.eval()(data.normalise(images)).numpy(), atol=1e-4)
    kept = dict(train_labels=data.y_train, train_clean_labels=data.y_clean, train_index=data.index)
    for key, tensor in dict(kept, test_labels=data.y_test).items():
        assert np.array_equal(logits[key], tensor.numpy())
    lines = runs.read_metrics(run)
    assert [line["epoch"] for line in lines] == [1, 2]
    assert lines[-1]["test_acc"] == pytest.approx((logits["test_logits"].argmax(1) == logits["test_labels"]).mean())


LOUD = [word for word in TINY if word != "--quiet"]


def other_loss(model, images, labels, teacher_logits, ce_weight, kd_weight, args):
    loss, logits = common.student_loss(model, images, labels, teacher_logits, ce_weight, kd_weight, args)
    return 2 * loss, logits


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(tiny_runs, monkeypatch):
    monkeypatch.chdir(tiny_runs)
    run = Path("runs/teacher-s0")
    command = [*LOUD, "--seed", 0, "--out", "runs/teacher-s0"]
    before = hashes(run)
    assert "is finished already" in finished(train_teacher, *command)
    assert not finished(train_teacher, *command, "--quiet")
    # Where and how to run does not count.
    assert "is finished already" in finished(train_teacher, *command, "--eval-every", 1, "--data-dir", "x", "--no-fast")
    line = refused(train_teacher, *command, "--lr", 0.3, "--momentum", 0.5)
    assert "other settings (flags.lr: 0.1 there, 0.3 now; flags.momentum: 0.9 there, 0.5 now)" in line
    assert "--overwrite" in line
    line = refused(train_student, *command, "--teacher", "runs/teacher-s1")
    assert "other settings" in line and "role: 'teacher' there, 'student' now" in line
    student = [*LOUD, "--out", "runs/kd-s0", "--teacher", "runs/teacher-s{seed}"]
    assert "other settings (facts.teacher_sha256: " in refused(train_student, *student, "--teacher", "runs/teacher-s1")
    assert "is finished already" in finished(train_student, *student)
    monkeypatch.setattr(common, "student_loss", other_loss)
    assert "facts.loss: " in refused(train_student, *student)
    assert hashes(run) == before


def test_a_run_that_is_older_than_a_flag_has_its_default(tiny_runs, tmp_path):
    def as_it_was(content):
        config = json.loads(content)
        del config["flags"]["weight_decay"]
        return json.dumps(config).encode()

    copy_run(tiny_runs / "runs" / "kd-s0", tmp_path / "kd", config=as_it_was)
    command = [*LOUD, "--teacher", tiny_runs / "runs" / "teacher-s0", "--out", tmp_path / "kd"]
    assert "kd is finished already" in finished(train_student, *command)
    assert "flags.weight_decay: 0.0005 there, 0.1 now" in refused(train_student, *command, "--weight-decay", 0.1)


def test_the_source_of_a_loss_is_its_code_and_what_it_calls(tmp_path, monkeypatch):
    """As it was when it was first asked for, also of a function that is made anew for each seed."""

    def loss(x):
        """What it is."""
        return np.abs(x)  # why

    assert runs.source_of(loss) == ["def loss(x):", "    return np.abs(x)"]
    of_seed = "\n\ndef of_seed():\n    def loss(x):\n        return x\n\n    return loss\n"
    Path(tmp_path, "edited.py").write_text(f"def loss(x):\n    return x\n{of_seed}")
    monkeypatch.syspath_prepend(tmp_path)
    edited = importlib.import_module("edited")
    before = runs.source_of(edited.loss)
    assert runs.source_of(edited.of_seed()) == before
    Path(tmp_path, "edited.py").write_text(f"# while it runs\n\n\ndef loss(x):\n    return 2 * x\n{of_seed}")
    assert runs.source_of(edited.loss) == before and runs.source_of(edited.of_seed()) == before
    assert runs.source_of(functools.wraps(loss)(lambda x: loss(x))) == runs.source_of(loss)  # as decorators do
    text = "\n".join(runs.source_of(common.student_loss))
    assert "def student_loss" in text and "def kd_loss" in text


def test_the_source_of_a_loss_changes_with_all_that_it_uses_of_its_file(tmp_path, monkeypatch):
    text = "BETA = 8.0\n\n\ndef part(x):\n    return x\n\n\ndef helper(x):\n    return part(x)\n\n\n"
    text += "def loss(x):\n    def inner(y):\n        return BETA * helper(y)\n\n    return inner(x)\n"
    monkeypatch.syspath_prepend(tmp_path)
    changes = [("8.0", "8.0"), ("8.0", "1.0"), ("    return x\n", "    return -x\n"), ("BETA *", "BETA +")]
    seen = set()
    for k, change in enumerate(changes):
        Path(tmp_path, f"fork{k}.py").write_text(text.replace(*change))
        seen.add(tuple(runs.source_of(importlib.import_module(f"fork{k}").loss)))
    assert len(seen) == 4


def test_overwrite_starts_one_folder_afresh_and_removes_only_the_files_of_runs(tiny_runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for seed in (0, 1):
        copy_run(tiny_runs / "runs" / f"teacher-s{seed}", Path(f"t-s{seed}"))
    mine = [Path("t-s1", name) for name in ("notes.txt", ".draft.tmp", "snapshot-new.pt", "checkpoint.pt.old")]
    for file in mine:
        file.write_text("mine")
    for name in ("snapshot-999.pt", "teacher.npz", ".logits.npz.tmp"):
        Path("t-s1", name).write_text("of the old run")
    before = hashes("t-s1")
    Path("t-s0/config.json").rename("t-s0/lost.json")  # so the folder is not ours to empty
    command = [*TINY, "--lr", 0.2, "--out"]
    line = refused(train_teacher, *command, "t", "--seeds", 0, 1, "--overwrite")
    assert "t-s0 is not empty and has no config.json" in line and Path("t-s0/checkpoint.pt").exists()
    assert hashes("t-s1") == before  # it was not reached
    Path("t-s0/lost.json").unlink()
    assert "--overwrite trains it again" in refused(train_teacher, *command, "t-s0")
    Path("t-s1/config.json").write_text("{damaged")
    finished(train_teacher, *command, "t", "--seeds", 0, 1, "--overwrite")
    for seed in (0, 1):
        assert runs.read_config(f"t-s{seed}")["flags"]["lr"] == 0.2
    assert all(file.read_text() == "mine" for file in mine)
    assert files_in("t-s0") == RUN and files_in("t-s1") == sorted([*RUN, *(file.name for file in mine)])
    assert not Path("t-s1/snapshot-999.pt").exists()


def test_overwrite_refuses_a_run_of_another_role(tiny_runs, tmp_path):
    copy_run(tiny_runs / "runs" / "teacher-s1", tmp_path / "t")
    before = hashes(tmp_path / "t")
    teacher = tiny_runs / "runs" / "teacher-s0"
    line = refused(train_student, *TINY, "--teacher", teacher, "--out", tmp_path / "t", "--overwrite")
    assert "would discard" in line and "holds a teacher" in line and "--out" in line
    assert hashes(tmp_path / "t") == before
    copy_run(tiny_runs / "runs" / "kd-s0", tmp_path / "kd")  # a student may teach, but not what takes its place
    before = hashes(tmp_path / "kd")
    taught = ["--teacher", tmp_path / "kd", "--out", tmp_path / "kd"]
    assert "would discard" in refused(train_student, *TINY, *taught, "--overwrite")
    assert hashes(tmp_path / "kd") == before


def test_a_run_that_is_being_discarded_is_not_finished_at_any_moment(tiny_runs, tmp_path, monkeypatch):
    copy_run(tiny_runs / "runs" / "teacher-s0", tmp_path / "t")
    unlink = Path.unlink
    command = [*TINY, "--lr", 0.2, "--out", tmp_path / "t"]

    def stop_after(path, **more):
        unlink(path, **more)
        if path.name == "logits.npz":
            raise Crash

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", stop_after)
        with pytest.raises(Crash):
            outcome(train_teacher, *command, "--overwrite")
    assert (tmp_path / "t" / "checkpoint.pt").exists() and "other settings" in refused(train_teacher, *command)
    finished(train_teacher, *command, "--overwrite")
    assert runs.read_config(tmp_path / "t")["flags"]["lr"] == 0.2


# ---------------------------------------------------------------- processes


def hold(guard, path, held):
    """In another process: be inside guard(path) until killed."""
    with guard(path):
        held.set()
        threading.Event().wait()


def holding(guard, path):
    """A process that is inside guard(path)."""
    held = forkserver().Event()
    process = forkserver().Process(target=hold, args=(guard, path, held), daemon=True)
    process.start()
    held.wait()
    return process


def test_one_process_at_a_time_and_a_killed_one_keeps_nobody_out(tiny_runs, tmp_path):
    run = tmp_path / "t"
    copy_run(tiny_runs / "runs" / "teacher-s0", run, logits=None)  # unfinished
    before = hashes(run)
    processes = [holding(runs.locked, run), holding(runs.one_at_a_time, tmp_path / "data")]
    refusal = run_cli("train_teacher.py", *TINY, "--out", "t", cwd=tmp_path)
    one_line_error(refusal, "t is being trained by another process", "--out")
    assert "being trained by another" in refused(train_teacher, *TINY, "--out", run, "--overwrite")
    assert {name: digest for name, digest in hashes(run).items() if name != ".lock"} == before
    for process in processes:
        process.kill()  # it cannot remove its lock file
        process.join()
    assert (run / ".lock").exists()
    with runs.one_at_a_time(tmp_path / "data"):
        ok(run_cli("train_teacher.py", *TINY, "--out", "t", cwd=tmp_path))
    assert files_in(run) == RUN


def test_a_lock_leaves_no_empty_folder_and_no_file(tmp_path):
    with pytest.raises(ZeroDivisionError), runs.locked(tmp_path / "new"):
        raise ZeroDivisionError
    assert not (tmp_path / "new").exists()  # nothing was written into it
    with runs.locked(tmp_path / "run"):
        (tmp_path / "run" / "file").write_text("")
        with pytest.raises(runs.InputError, match="being trained by another process"), runs.locked(tmp_path / "run"):
            pass
    assert os.listdir(tmp_path / "run") == ["file"]


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS])
def test_a_folder_where_nothing_can_be_locked_is_used_all_the_same(number, tmp_path, monkeypatch, capsys):
    def no_locks(file, how):
        raise OSError(number, "No locks available")

    monkeypatch.setattr(fcntl, "flock", no_locks)
    with runs.locked(tmp_path / "run"):
        (tmp_path / "run" / "file").write_text("")
    assert "run is not locked (No locks available): let no other process train there" in capsys.readouterr().out
    with runs.one_at_a_time(tmp_path / "data"):
        (tmp_path / "data").mkdir()
    assert sorted(path.name for path in tmp_path.glob("[!.]*")) == ["data", "run"]


def test_one_at_a_time_waits_for_the_same_path_alone(tmp_path):
    inside, most = [], []

    def enter(_):
        with runs.one_at_a_time(tmp_path / "new" / "data"):
            inside.append(1)
            most.append(len(inside))
            for _ in range(2000):  # others get their turn
                os.sched_yield()
            inside.pop()

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(enter, range(4)))
    assert most == [1] * 4
    with runs.one_at_a_time(tmp_path / "a"), runs.one_at_a_time(tmp_path / "b"):
        pass
