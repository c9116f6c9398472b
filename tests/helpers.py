"""What tests share: running a script, with faults too, what it answers, small and damaged data, comparing run folders.

Forked processes import this file before the script: it should import little itself.
"""

import contextlib
import errno
import hashlib
import io
import json
import multiprocessing
import os
import runpy
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import engine
import runs

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from torch.optim.optimizer import register_optimizer_step_pre_hook

HERE = Path(__file__).resolve().parent.parent
TINY = ["--epochs", "2", "--width", "0.25", "--subset", "300", "--quiet", "--device", "cpu"]
TIMES = ("seconds", "images_per_s", "tokens_per_s", "spent")
SOAK = "DISOBEY_SOAK" in os.environ  # make soak: twenty kills for each command, and thirty times the random input

# ---------------------------------------------------------------- scripts in processes of their own


def forked(script, args, cwd, out, err):
    """In a forked process: run a script with its output in the files `out` and `err`."""
    os.chdir(cwd)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = [str(HERE / script), *args]
    runpy.run_path(sys.argv[0], run_name="__main__")


def forkserver():
    """Processes of this context are forked from one that has torch loaded already, which saves two seconds each."""
    context = multiprocessing.get_context("forkserver")
    modules = ["torch._dynamo", "sklearn.datasets", "scipy.stats", "matplotlib.pyplot", "hypothesis"]
    context.set_forkserver_preload(modules)
    return context


def run_forked(function, script, args, cwd, *more):
    """Exit code and output of `function(script, args, cwd, out, err, *more)` in a forked process; see `forked`."""
    os.environ["OMP_NUM_THREADS"] = "1"  # several run at once
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        words = [str(arg) for arg in args]
        process = forkserver().Process(target=function, args=(script, words, cwd, out, err, *more))
        process.start()
        process.join()
        return SimpleNamespace(returncode=process.exitcode, stdout=out.read_text(), stderr=err.read_text())


def run_cli(script, *args, cwd):
    """Run a script as a user does, but in a forked process; returns its exit code and output."""
    return run_forked(forked, script, args, cwd)


def run_process(script, *args, cwd):
    """The same in a process that starts from nothing."""
    command = [sys.executable, str(HERE / script), *map(str, args)]
    environment = dict(os.environ, OMP_NUM_THREADS="1")
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment)


def ok(process):
    """Its output; the process must have ended well."""
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def one_line_error(process, *words):
    """The process ended with exit code 2 and exactly one line on stderr that holds all words."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), (
        process.stdout + process.stderr
    )
    for word in words:
        assert word in lines[0], lines[0]


def faulty(script, args, cwd, out, err, seen_file, kind, at):
    """`forked` with one fault, and a checkpoint after every step.

    kind: step, SIGKILL before the at-th step of an optimiser; before, half, rename, after, SIGKILL while the at-th file
    is written: before it, when half of it is there, before its renaming, after it; full, no space from the at-th file
    on; limit, no file may exceed `at` bytes.
    """
    seen = dict(steps=0, writes=0)
    write_atomic, replace = runs.write_atomic, os.replace

    def kill(*_):
        os.kill(os.getpid(), signal.SIGKILL)

    def replace_and_kill(*names):
        replace(*names)
        kill()

    def no_space(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def count_step(*_):
        seen["steps"] += 1
        if kind == "step" and seen["steps"] == at:
            kill()

    def faulty_write(path, content):
        seen["writes"] += 1
        if kind in ("step", "limit") or seen["writes"] != at:
            return write_atomic(path, content)
        if kind == "before":
            kill()
        if kind == "half":
            Path(path).with_name(f".{Path(path).name}.tmp").write_bytes(content[: len(content) // 2])
            kill()
        if kind == "rename":
            os.replace = kill
        if kind == "after":
            os.replace = replace_and_kill
        if kind == "full":
            os.fsync = no_space
            seen["path"] = str(path)
        write_atomic(path, content)

    register_optimizer_step_pre_hook(count_step)
    runs.write_atomic = faulty_write
    engine.SAVE_SECONDS = 0
    if kind == "limit":
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (at, resource.RLIM_INFINITY))
    try:
        forked(script, args, cwd, out, err)
    finally:
        seen_file.write_text(json.dumps(seen))


def run_with_fault(script, args, cwd, kind="none", at=0):
    """`run_cli` with a fault (see `faulty`); `seen` counts its steps and files, if the process lived to tell."""
    cwd.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        seen = Path(folder) / "seen"
        process = run_forked(faulty, script, args, cwd, seen, kind, at)
        process.seen = json.loads(seen.read_text()) if seen.exists() else {}
        return process


# ---------------------------------------------------------------- scripts in this process


class Reached(BaseException):
    """The heavy work begins: all flags were accepted."""


class Crash(BaseException):
    """Ends training at once, as a kill does."""


def outcome(module, *argv):
    """("refused", its line), ("finished", its output) or ("accepted", "") of a script run here; all else fails."""
    argv = [str(arg) for arg in argv]
    streams = [io.TextIOWrapper(io.BytesIO(), "utf-8", write_through=True) for _ in range(2)]
    handler = signal.getsignal(signal.SIGTERM)
    code = 0
    try:
        with contextlib.redirect_stdout(streams[0]), contextlib.redirect_stderr(streams[1]):
            runs.cli(lambda: module.main(argv))
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
    lines = [line for line in complaint.splitlines() if line]
    assert code == 2 and len(lines) == 1 and lines[0].startswith("error: "), (module.__name__, argv, code, complaint)
    return "refused", lines[0]


def refused(module, *argv):
    """The one line with which a script refuses."""
    what, line = outcome(module, *argv)
    assert what == "refused", (module.__name__, argv, what, line)
    return line


def finished(module, *argv):
    """What a script that ends well prints."""
    what, output = outcome(module, *argv)
    assert what == "finished", (module.__name__, argv, what, output)
    return output


def input_error(module, *argv):
    """The message of the InputError that a script raises, in one line."""
    try:
        module.main([str(arg) for arg in argv])
    except runs.InputError as error:
        return " ".join(str(error).split())
    raise AssertionError(f"{module.__name__} {argv}: not refused")


def valid_or_refused(read):
    """What `read()` gives, or None where it raises InputError with a message; all else fails."""
    try:
        return read()
    except runs.InputError as error:
        assert str(error).strip()


# ---------------------------------------------------------------- run folders and data


def copy_run(source, target, **changed):
    """A copy of a run folder; changed maps a file name to a function of its bytes, or to None to leave it out."""
    target.mkdir()
    for file in source.iterdir():
        change = changed.get(file.name.split(".")[0], bytes)
        if change is not None:
            (target / file.name).write_bytes(change(file.read_bytes()))


def files_below(folder, pattern="**/*"):
    """Content of the files below a folder."""
    return {path: path.read_bytes() for path in Path(folder).glob(pattern) if path.is_file()}


def hashes(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(folder).iterdir()}


def without_times(lines):
    return [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def weights_and_metrics(run):
    """State dict of a run's checkpoint, and its metrics without times."""
    lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    return runs.load_checkpoint(Path(run) / "checkpoint.pt")["model"], without_times(lines)


def same_run(one, other):
    """Whether two run folders hold the same weights and metrics, bit for bit."""
    (weights, metrics), (other_weights, other_metrics) = weights_and_metrics(one), weights_and_metrics(other)
    same = all(torch.equal(weights[key], other_weights[key]) for key in weights)
    return same and weights.keys() == other_weights.keys() and metrics == other_metrics


def plain(value, left_out=()):
    """A value with its tensors and arrays as bytes, so that == compares all of it but the keys in `left_out`."""
    if isinstance(value, dict):
        return {key: plain(part, left_out) for key, part in value.items() if key not in left_out}
    if isinstance(value, (list, tuple)):
        return [plain(part, left_out) for part in value]
    if torch.is_tensor(value):
        value = value.numpy()
    return (str(value.dtype), value.shape, value.tobytes()) if isinstance(value, np.ndarray) else value


def write_arrays(path, n=60, side=16, classes=4, channels=3):
    """A random dataset as .npz; returns its arrays."""
    rng = np.random.default_rng(1)
    arrays = {f"x_{s}": rng.integers(0, 256, (n, side, side, channels), dtype=np.uint8) for s in ("train", "test")}
    arrays.update({f"y_{s}": np.arange(n) % classes for s in ("train", "test")})
    np.savez(path, **arrays)
    return arrays


def save_pretrained(folder, family, names=None, positions=42):
    """A tiny saved model of a family with its tokenizer, as a user has it on disk; names: of a classifier's classes."""
    import glue_distill

    import transformers
    from tokenizers import BertWordPieceTokenizer

    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32)
    shape["max_position_embeddings"] = positions
    words = glue_distill.sentiment(200, "train", 0).columns()[0] + [f'he said twice " or {k}' for k in range(30)]
    torch.manual_seed(5)
    if family == "roberta":
        tokenizer = glue_distill.byte_level_bpe(words, 400)
        shape["type_vocab_size"] = 1
    else:
        pieces = BertWordPieceTokenizer()
        pieces.train_from_iterator(words, vocab_size=400, show_progress=False)
        folder.mkdir(parents=True)
        pieces.save_model(str(folder))
        tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
    config = transformers.AutoConfig.for_model(family, vocab_size=len(tokenizer), **shape)
    kind = transformers.AutoModelForMaskedLM
    if names:
        kind = transformers.AutoModelForSequenceClassification
        config.id2label = dict(enumerate(names))
        config.label2id = {name: k for k, name in enumerate(names)}
    model = kind.from_config(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


# ---------------------------------------------------------------- random, damaged and malicious input

DTYPES = [*"u1 i1 i4 i8 u8 f2 f4 f8 g c8 ? m8[s] M8[D] U3 S4 V3".split(), [("a", "f4")]]


def fuzz(examples):
    """Settings for random input: the same examples every time, or with DISOBEY_SOAK 30 times as many new ones."""
    return settings(
        max_examples=examples * (30 if SOAK else 1),
        derandomize=not SOAK,
        database=None,
        deadline=None,
        print_blob=True,
        suppress_health_check=list(HealthCheck),
    )


@st.composite
def damage_to(draw, content):
    """`content` (bytes) cut, with flipped bits, with zeros, with bytes too many, or with a part of it repeated."""
    # Spread over the whole file: hypothesis prefers small numbers. Headers and directories get more.
    anywhere = st.integers(0, 2**32 - 1).map(lambda k: (k * 2_654_435_761 % 2**32) * len(content) >> 32)
    ends = min(len(content), 400)
    place = anywhere | st.integers(0, ends - 1) | st.integers(1, ends).map(lambda k: len(content) - k)
    at, to = sorted((draw(place), draw(place)))
    kind = draw(st.sampled_from(("bits", "bits", "zeros", "cut", "more", "again")))
    if kind == "bits":
        changed = bytearray(content)
        for k in draw(st.sets(place, min_size=1, max_size=3)):
            changed[k] ^= 1 << draw(st.integers(0, 7))
        return bytes(changed)
    if kind == "more":
        return content[:at] + draw(st.binary(min_size=1, max_size=9)) + content[at:]
    return dict(
        cut=content[:at], zeros=content[:at] + bytes(to - at) + content[to:], again=content[:to] + content[at:]
    )[kind]


def odd_arrays(*shapes):
    """Arrays of any type in some of these shapes and others, holding 0, 1, 2, 0, … where the type has numbers."""

    def make(dtype, shape):
        array = np.zeros(shape, np.dtype(dtype))
        if array.dtype.kind in "iufcm":
            array.reshape(-1)[:] = np.arange(array.size) % 3
        return array

    types = st.sampled_from(("u1", "i8", "f4")) | st.sampled_from(DTYPES)
    return st.builds(make, types, st.sampled_from(shapes) | st.sampled_from(((), (0,), (7,), (2, 2, 2, 2, 2))))


class Malicious:
    """Unpickled, it makes a file in the working folder."""

    def __reduce__(self):
        return Path.touch, (Path("ran"),)
