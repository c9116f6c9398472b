"""Run folders and all else on disk: one-line errors, atomic files, locks, one reader for each kind of file.

A run lives in runs/<name>/: config.json (flags, data, versions), metrics.jsonl (a line for each epoch), checkpoint.pt
and logits.npz, which is written last and so says that the run is finished. To change an experiment, leave this alone.
"""

import argparse
import ast
import functools
import hashlib
import inspect
import io
import itertools
import json
import math
import os
import pickle
import platform
import re
import shlex
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path, PosixPath, PurePosixPath

try:  # the seconds in which every command starts, for scripts import this file before any library
    import numpy as np
    import torch
    from filelock import FileLock, Timeout
except KeyboardInterrupt:
    print("interrupted before anything was done")
    raise SystemExit(130) from None

# ---------------------------------------------------------------- errors


class InputError(Exception):
    """Something the user gave is wrong. The message is one line that names the fix; `cli` turns it into exit code 2."""


def cli(main):
    """Run a script's `main()`: wrong input, a failed write or too little memory becomes one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        with suppress(AttributeError):  # a notebook's streams
            stream.reconfigure(errors="replace")  # a terminal without Unicode must not end a run
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # outside of training, which saves first
    try:
        main()
    except InputError as error:
        _exit_with(error)
    except (MemoryError, RuntimeError) as error:
        memory = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
        if not memory and "DefaultCPUAllocator" not in str(error):  # a CPU's failed allocation has no kind of its own
            raise
        _exit_with(f"out of memory ({first_line(error)}): lower --batch-size, the model's size or the number of points")
    except OSError as error:
        where = f"{error.strerror or error}: {error.filename or 'no file named'}"
        _exit_with(f"{where} (check that the folder exists, is writable and has space left)")
    except KeyboardInterrupt:
        exit_interrupted()


def first_line(error):
    """The first line of an exception's message, or its kind when it has none, for use inside a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _exit_with(message):
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    raise SystemExit(2)


@contextmanager
def reading(what, fix="restore it or make it again", run=None):
    """Turn whatever a library raises while it reads `what` into our one line, with the `fix`.

    run: the folder in which it lies; where that is a run's, its own command is the fix.
    """
    try:
        yield
    except (InputError, torch.cuda.OutOfMemoryError):  # `cli` tells the second one
        raise
    except Exception as error:  # numpy, zip, pickle, PIL, json, a hub: each raises kinds of its own on damaged files
        if isinstance(error, PermissionError):
            fix = "check its permissions"
        elif run is not None:
            fix = train_again(run, fix)
        if isinstance(error, FileNotFoundError) and error.filename:  # torchvision's names none
            raise InputError(f"{error.filename} does not exist: {fix}") from None
        raise InputError(f"{what} cannot be read ({first_line(error)}): {fix}") from None


@contextmanager
def interruptible():
    """A list that SIGINT and SIGTERM append to, instead of ending the process, so that a run can save first."""
    stop = []

    def remember(signum, frame):
        stop.append(signum)

    handlers = {signum: signal.signal(signum, remember) for signum in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for signum, handler in handlers.items():
            signal.signal(signum, handler)


def exit_interrupted():
    """Say how to continue what was interrupted and saved, and exit 130."""
    if "--overwrite" in sys.argv:
        print("note: runs that --overwrite has not reached are kept: the next line is without it")
    print(f"interrupted; continue with: {command_line()}")
    raise SystemExit(130)


def command_line():
    """This command, as it is typed; without --overwrite, which would discard what the command left."""
    return shlex.join(["python", sys.argv[0], *(word for word in sys.argv[1:] if word != "--overwrite")])


# ---------------------------------------------------------------- flags


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds each flag's default, unless its help says so itself (where the default depends on other flags)."""

    def _get_help_string(self, action):
        values = action.default if isinstance(action.default, (list, tuple)) else [action.default]
        shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)
        if "default" in action.help or shown in ("", "None", "False", argparse.SUPPRESS):  # not given, or a switch
            return action.help
        return f"{action.help} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """argparse that answers a bad flag with one line and exit code 2."""

    defaults = {}  # {flag: default}: what a run that is older than a new flag was trained with

    def __init__(self, docstring):
        layout = functools.partial(_Help, max_help_position=30)
        super().__init__(description=docstring, usage="%(prog)s [flags]", formatter_class=layout, allow_abbrev=False)

    def parse_args(self, argv=None):
        Parser.defaults = {action.dest: action.default for action in self._actions}
        args = super().parse_args(argv)
        seeds = vars(args).get("seeds", [])
        if len(set(seeds)) < len(seeds):
            self.error(f"--seeds {' '.join(map(str, seeds))} names a seed twice: name each once")
        return args

    def error(self, message):
        _exit_with(f"{message} (see {self.prog} --help)")


def number(kind, low, high=None, open_high=False, open_low=False):
    """An argparse type: a finite `kind` (int or float; an int has 64 bits) in low..high, ends excluded where open."""
    if high is None:
        high = 2**63 if kind is int else math.inf
        open_high = True
    ends = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"

    def parse(text):
        value = kind(text)
        at_open_end = open_low and value == low or open_high and value == high
        if at_open_end or not low <= value <= high:  # written so that NaN is refused
            raise argparse.ArgumentTypeError(f"{text} is outside {ends}")
        return value

    parse.__name__ = kind.__name__
    return parse


# ---------------------------------------------------------------- files


def write_atomic(path, content):
    """Write bytes so that a reader, or a kill at any moment, leaves the old file or the new. OSError names `path`."""
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")  # one writer at a time: run folders are locked
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path, text):
    """Write `text` atomically as UTF-8 (what cannot be, from a flag of other bytes, as question marks)."""
    write_atomic(path, text.encode(errors="replace"))


def write_json(path, value):
    """Write `value` atomically as indented JSON; numbers that are not finite become null."""
    finite = json.loads(json.dumps(value), parse_constant=lambda name: None)  # it is called for NaN and ±Infinity
    write_text(path, json.dumps(finite, indent=1) + "\n")


def write_npz(path, arrays):
    """Write a dict of arrays atomically as .npz."""
    file = io.BytesIO()
    np.savez(file, **arrays)
    write_atomic(path, file.getvalue())


def read_json(path):
    """The value in a JSON file; InputError when it is missing or not JSON."""
    with reading(path):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_npz(path, keys=None, optional=()):
    """{key: array} of an .npz: `keys` (None: all it has) and those of `optional` it has; InputError if it lacks one."""
    folder = Path(path).parent if Path(path).exists() else None  # a typo must not advise to remove a run
    with reading(path, "check the path, or make it again", folder):
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise InputError(f"{path} holds a single array: it must be an .npz with {', '.join(keys or ['arrays'])}")
        with file:
            keys = file.files if keys is None else keys
            missing = [key for key in keys if key not in file.files]
            if missing:
                there = ", ".join(file.files)
                raise InputError(f"{path} lacks the arrays {', '.join(missing)}, it holds {there}: check the path")
            if file.zip.testzip():  # numpy compares no checksum where a damaged header asks for less than there is
                raise ValueError("a checksum does not fit")
            return {key: np.asarray(file[key]) for key in file.files if key in keys or key in optional}


def load_tensors(file, device="cpu"):
    """What torch.save or safetensors wrote; no code in it is run. Within `reading`, which says what cannot be read."""
    if str(file).endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(file)
    if isinstance(file, (str, Path)) and zipfile.is_zipfile(file):
        names = zipfile.ZipFile(file).namelist()
        if any(name.endswith("/constants.pkl") for name in names):
            raise ValueError("it is a TorchScript archive, a program")
    # What people save beside their weights, none of which runs code: numbers of NumPy, flags, paths.
    scalar = np._core.multiarray.scalar
    harmless = [scalar, np.dtype, argparse.Namespace, PosixPath, PurePosixPath]
    harmless.append((scalar, "numpy.core.multiarray.scalar"))  # as NumPy 1 calls it
    harmless += [type(np.dtype(kind)) for kind in "?bBhHiIqQefd"]
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError:  # torch's own advice here is to load it with its code
        raise ValueError("it is damaged, or holds more than tensors and numbers, which is never loaded") from None


def load_checkpoint(path, device="cpu"):
    """The dict in a checkpoint file, tensors only (no code of it is run); InputError when it is torn or has changed."""
    with reading(path, "train that run again", Path(path).parent):
        content = Path(path).read_bytes()
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            if archive.testzip():  # torch.load does not compare the checksums that torch.save writes
                raise ValueError("a checksum does not fit")
        state = load_tensors(io.BytesIO(content), device)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, not a dictionary")
        return state


def read_metrics(run):
    """All lines of a run's metrics.jsonl as dicts; InputError when one is missing or not what a run writes."""
    path = Path(run) / "metrics.jsonl"
    with reading(path, "train that run again", run):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        if not lines:
            raise ValueError("it is empty")
        for epoch, line in enumerate(lines, 1):
            if line.get("epoch") != epoch or not all(isinstance(value, (int, float)) for value in line.values()):
                raise ValueError("its lines of metrics are not those of a run")
        return lines


def write_metrics(run, history):
    """Write all of a run's metrics, a JSON line per epoch; the whole file, so that no line is lost, doubled or torn."""
    write_text(Path(run) / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))


def kept_result(path, settings, compute, *given):
    """`compute(*given)`, plain numbers and lists, kept in the JSON file `path`.

    InputError when what is kept there is damaged, or of other settings or code.
    """

    def digest(result):
        return hashlib.sha256(json.dumps(result).encode()).hexdigest()

    path = Path(path)
    settings = dict(settings, code=source_of(compute))
    if path.exists():
        with reading(path, "remove it, it is made again"):
            kept = read_json(path)
            if kept.get("sha256") != digest(kept.get("result")):
                raise ValueError("it is not a finished seed, or has changed")
            different = sorted(key for key in settings if kept["settings"].get(key) != settings[key])
        if different:
            fix = "choose another folder for results, or remove it"
            raise InputError(f"{path} was made with other settings ({', '.join(different)}): {fix}")
        return kept["result"]
    path.parent.mkdir(parents=True, exist_ok=True)  # an unwritable place is told before the work
    started = time.perf_counter()
    result = json.loads(json.dumps(compute(*given)))
    seconds = time.perf_counter() - started
    kept = dict(settings=settings, seconds=seconds, versions=versions(), result=result, sha256=digest(result))
    write_text(path, json.dumps(kept))  # plain json: unlike a report, it must give NaN back as NaN
    print(f"{path.stem}: {seconds:.1f} s")
    return result


def versions():
    """Versions of what the numbers depend on, the device's name and the git commit (None outside a checkout)."""
    here = Path(__file__).resolve().parent
    hardware = platform.processor() or platform.machine()
    with suppress(OSError, TypeError):  # where Linux tells the CPU's model
        hardware = re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    if torch.cuda.is_available():
        hardware = torch.cuda.get_device_name()
    commit = ""
    with suppress(OSError):  # no git here
        words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        alone = dict(os.environ, GIT_CEILING_DIRECTORIES=str(here.parent))  # not that of a folder above
        commit = subprocess.run(words, cwd=here, capture_output=True, text=True, env=alone).stdout.strip()
    found = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    return dict(found, git_commit=commit or None, hardware=hardware, threads=torch.get_num_threads())


# ---------------------------------------------------------------- logits and labels

LOGITS = ("train_logits", "train_labels", "train_clean_labels", "train_index", "test_logits", "test_labels")


def read_array(path):
    """An array [N] or [N, C] from FILE.npy, .npz, .pt, .pth, .safetensors or .csv; FILE:NAME is one of several."""
    file = str(path)
    name = None
    of_several = re.fullmatch(r"(.+\.(?:npz|pt|pth|safetensors)):(.+)", file)
    if of_several:
        file, name = of_several.groups()
    with reading(file, "give what numpy.save, numpy.savez or torch.save wrote, or a .csv of numbers"):
        if file.endswith(".csv"):
            return _csv_array(file)
        if file.endswith(".npz"):
            arrays = read_npz(file, [name] if name else None)
        elif file.endswith((".pt", ".pth", ".safetensors")):
            found = load_tensors(file)
            if torch.is_tensor(found):
                found = {"": found}
            arrays = {key: value for key, value in found.items() if torch.is_tensor(value)}
        else:
            # Mapped, for a damaged header may ask for more than any memory.
            return np.load(file, mmap_mode="r", allow_pickle=False)
    names = [name] if name else list(arrays)
    if len(names) != 1 or names[0] not in arrays:
        raise InputError(f"{file} holds {', '.join(map(str, arrays)) or 'no arrays'}: name one as {file}:NAME")
    array = arrays[names[0]]
    if not torch.is_tensor(array):
        return array
    with reading(file, "save it as a dense tensor of numbers"):
        if array.is_floating_point() and array.dtype != torch.float64:  # numpy has no bfloat16, nor float8
            array = array.float()
        return array.detach().numpy()


def _csv_array(file):
    """Numbers or words [N] or [N, C] of a .csv, whose first line may be a header; within `reading`."""
    cells = np.loadtxt(file, str, delimiter=",", comments=None, ndmin=2, encoding="utf-8-sig")
    if cells.shape[1] > 1 and cells[0, 0] == "":
        raise ValueError("its first column is an index, as pandas writes it: save it with index=False")
    if cells.shape[1] > 1 and cells[0].tolist() == [str(k) for k in range(cells.shape[1])]:
        cells = cells[1:]  # the header of pandas for columns without names
    try:
        cells = cells.astype(float)
    except ValueError:  # line 0 is a header, or all are words
        with suppress(ValueError):
            cells = cells[1:].astype(float)
    if cells.dtype == float and np.isfinite(cells).all() and np.array_equal(cells, cells.round()):
        cells = cells.astype(np.int64)
    return cells[:, 0] if cells.shape[1] == 1 else cells


def check_logits(logits, name, like=None):
    """Logits as float64 [N, C]; InputError when they are not a finite matrix, or not shaped like `like`."""
    logits = np.asarray(logits)
    if logits.ndim != 2 or logits.shape[1] < 2 or len(logits) < 8 or logits.dtype.kind not in "fiu":
        raise InputError(f"{name} is {logits.dtype} {list(logits.shape)}: logits must be numbers [N >= 8, C >= 2]")
    if like is not None and logits.shape != like.shape:
        what = f"{name} is {list(logits.shape)} but the teacher's logits are {list(like.shape)}"
        raise InputError(f"{what}: give the same points in the same order, and the same classes")
    logits = logits.astype(np.float64)
    if not np.isfinite(logits).all():
        row = np.argwhere(~np.isfinite(logits))[0, 0]
        raise InputError(f"{name} has NaN or infinite values (first in row {row}): give finite ones, or clip them")
    largest = np.abs(logits).max()
    if largest > 1e6:
        raise InputError(f"{name} has values up to {largest:.2g}: these are no logits; check what was saved")
    sums = logits.sum(1)
    slack = 0.005 * logits.shape[1]  # of probabilities rounded to two decimals
    for whole in (1, 100):
        if logits.min() >= 0 and np.abs(sums - whole).max() < 1e-3 * whole + slack:
            fix = "give their logarithms: numpy.log(numpy.clip(p, 1e-12, None)), p from 0 to 1"
            raise InputError(f"{name} has probabilities, rows that sum to {whole}: {fix}")
    return logits


def check_labels(labels, name, logits):
    """Labels as int64 [N], words numbered in sorted order; InputError when they do not fit the logits."""
    labels = np.asarray(labels)
    n, classes = logits.shape
    with reading(name, "give whole numbers, or words as text"):
        if labels.dtype.kind in "US" and np.char.isdecimal(labels.astype("U")).all():
            labels = labels.astype(np.int64)  # whole numbers as text: sorted as words, 10 would come before 2
    if labels.dtype.kind in "US":
        words, labels = np.unique(labels, return_inverse=True)
        if len(words) != classes:  # with one missing, which number is whose cannot be known
            raise InputError(f"{name} has {len(words)} different words for {classes} classes: give their numbers")
        shown = [f"{word} = {k}" for k, word in enumerate(words.tolist())]
        if len(words) > 4:
            shown[4:] = ["…"]
        print(f"{name}: its {len(words)} labels are numbered in sorted order ({', '.join(shown)})")
    fits = labels.shape == (n,) and labels.dtype.kind in "iu"
    if not fits or labels.min() < 0 or labels.max() >= classes:
        there = f"{labels.dtype} {list(labels.shape)}"
        raise InputError(f"{name} is {there}: it must hold {n} integers within 0..{classes - 1}, or words")
    return labels.astype(np.int64)


def agreement(predicted, other, classes):
    """(share of points [N] on which both agree, the share expected by chance, whether the first is clearly larger)."""
    # Files whose rows are in different orders can be read and drawn: only an agreement at chance betrays them.
    shares = [np.bincount(values, minlength=classes) / len(values) for values in (predicted, other)]
    chance = float(shares[0] @ shares[1])
    agreed = float((predicted == other).mean())
    return agreed, chance, agreed > chance + 2 * math.sqrt(chance * (1 - chance) / len(predicted))


def fit_note(fit):
    """What to say of a teacher that fits this share of its training labels, noisy ones included."""
    text = f"the teacher fits {100 * fit:.1f}% of its training labels"
    if fit < 0.9:
        text += " and does not interpolate them, as the paper's claims suppose"
    return text


def weights_hash(state):
    """sha256 of a model's state dict: of all its parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def teacher_hash(run):
    """What students know a teacher's run by: the hash of its weights, or for text of its training logits."""
    if "tokens_sha256" in read_config(run)["facts"]:
        arrays = read_npz(Path(run) / "logits.npz", ["train_logits"])
        return hashlib.sha256(arrays["train_logits"].tobytes()).hexdigest()
    return weights_hash(load_checkpoint(Path(run) / "checkpoint.pt")["model"])


# ---------------------------------------------------------------- run folders

# Flags that say where and how to run, not what: a run may be continued with other values of them. A teacher is compared
# by its weights, not by its name.
NOT_COMPARED = "out overwrite quiet device data_dir eval_every seeds snapshot_at fast".split()
NOT_COMPARED += ["facts.teacher", "facts.teacher_test_acc", "facts.teacher_train_acc"]
RUN_FILE = re.compile(r"config\.json|metrics\.jsonl|(checkpoint|snapshot-\d+)\.pt|(logits|teacher)\.npz")


def run_folder(args, seed, default):
    """The run folder of one seed: --out with {seed} in it filled in, or for several seeds with -s<seed> appended."""
    out = args.out or f"runs/{default}-s{{seed}}"
    if "{seed}" not in out and len(args.seeds) > 1:
        out += "-s{seed}"
    return Path(out.replace("{seed}", str(seed)))


def default_name(args):
    """The first part of a run's name, from the flags: data and architecture."""
    return f"{Path(args.data.partition(':')[2] or args.data).stem}-{args.arch.removeprefix('torchvision:')}"


@contextmanager
def locked(run):
    """Have the run folder `run` alone while it is trained; InputError when another process has it."""
    run.mkdir(parents=True, exist_ok=True)
    path = run / ".lock"  # the system drops the lock with its process, however that ends: a file left hinders nobody
    # Seconds: a look at a finished run takes a part of one. A soft lock would outlive a process that is killed.
    lock = FileLock(path, timeout=2, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        raise InputError(f"{run} is being trained by another process: wait for it, or choose another --out") from None
    except OSError as error:
        print(f"note: {run} is not locked ({error.strerror}): let no other process train there")
    try:
        yield
    finally:
        with suppress(OSError):  # before the release, or it would be another process's; Windows keeps what is open
            path.unlink()
        lock.release()
        if not any(run.iterdir()):  # refused before anything was written
            run.rmdir()


@contextmanager
def one_at_a_time(path):
    """Wait until no other process is inside for the same `path` (what is downloaded or prepared there)."""
    path = Path(path)
    with ExitStack() as stack:
        with suppress(OSError):  # where nothing can be written or locked, what is there can still be read
            path.parent.mkdir(parents=True, exist_ok=True)
            stack.enter_context(FileLock(path.with_name(f".{path.name}.lock"), fallback_to_soft=False))
        yield


def start_run(run, args, role, seed, data, model, **facts):
    """Make or check a run folder before training, within `locked(run)`. True when there is something to train.

    A finished run of the same settings prints so and returns False, an unfinished one is continued; one of other
    settings is an InputError. --overwrite starts afresh, unless the folder holds a run of another role, which may be
    the teacher of this one. `facts` go into config.json and are compared like the flags.
    """
    compared = dict(role=role, seed=seed, flags=flags_of(args, data), data=data.facts, facts=facts)
    path = run / "config.json"
    if not path.exists():
        others = [file.name for file in run.iterdir() if not file.name.startswith(".")]  # no lock, nor half a file
        discardable = args.overwrite and all(map(RUN_FILE.fullmatch, others))  # a run that lost its config.json
        if others and not discardable:
            fix = "choose another --out; if it was a run, --overwrite trains it again"
            raise InputError(f"{run} is not empty and has no config.json: {fix}")
    teacher = facts.get("teacher")
    if args.overwrite and teacher and Path(teacher).resolve().is_relative_to(run.resolve()):
        raise InputError(f"--overwrite would discard {run}, where this run's teacher lies: choose another --out")
    if args.overwrite or not path.exists():
        discard(run, role)
        parameters = sum(p.numel() for p in model.parameters())
        made = dict(arch=args.arch, parameters=parameters, command=command_line(), versions=versions())
        write_json(path, dict(compared, **made))
        return True
    refuse_other(run, compared)
    finished = (run / "logits.npz").exists()
    if finished and not args.quiet:
        print(f"{run} is finished already; --overwrite would train it again")
    return not finished


def check_planned(run, args, role, seed, data):
    """InputError, before hours of training, when the folder `run` already holds a run of other flags `args` or data."""
    if (Path(run) / "config.json").exists() and not args.overwrite:
        refuse_other(run, dict(role=role, seed=seed, flags=flags_of(args, data), data=data.facts))


def flags_of(args, data):
    """The flags of a run as config.json gives them back, with the label noise that they come to."""
    return json.loads(json.dumps(dict(vars(args), label_noise=data.facts["label_noise"])))


def refuse_other(run, compared):
    """InputError when config.json of the run folder `run` differs in one of the parts that are `compared`."""
    before = read_config(run)
    for key in compared["flags"]:  # one that is newer than the run has its default
        before["flags"].setdefault(key, Parser.defaults.get(key))
    pairs = _differences({key: before.get(key) for key in compared}, compared)
    differing = [text for key, text in pairs if key.removeprefix("flags.") not in NOT_COMPARED]
    if differing:
        fix = "choose another --out, or discard it with --overwrite"
        raise InputError(f"{run} holds a run with other settings ({'; '.join(differing)}): {fix}")


def _differences(before, after, prefix=""):
    """(dotted key, what was and what is) of every entry in which two nested dicts differ; of lists the first one."""
    for key in sorted(set(before) | set(after)):
        was, now = before.get(key), after.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{prefix}{key}.")
        elif was != now:
            if isinstance(was, list) and isinstance(now, list):
                was, now = next(pair for pair in itertools.zip_longest(was, now) if pair[0] != pair[1])
            yield prefix + key, f"{prefix}{key}: {was!r} there, {now!r} now"


def source_of(function):
    """The lines of a function and of what it uses of its own file, without comments; None where there is no source.

    For the loss in config.json, and the code of a kept result: functions at any depth, numbers and words with a name.
    """
    if not inspect.isfunction(function):
        return None
    functions = [inspect.unwrap(function)]
    values = {}
    for user in functions:  # the list grows
        for name in _names_in(user.__code__):
            used = inspect.unwrap(user.__globals__.get(name))
            if isinstance(used, (int, float, str)):
                values[name] = f"{name} = {used!r}"
            elif inspect.isfunction(used) and used.__module__ == user.__module__ and used not in functions:
                functions.append(used)
    lines = _source_of(tuple(user.__code__ for user in functions))
    return lines and [*lines, *values.values()]


def _names_in(code):
    """The names, of globals and attributes, in a code object and in the functions inside of it."""
    yield from code.co_names
    for inside in filter(inspect.iscode, code.co_consts):
        yield from _names_in(inside)


# As it was when it was first asked for: the file may be edited while this runs. By code, which is the same each time
# that a function inside of another one is made.
@functools.cache
def _source_of(parts):
    lines = []
    for part in parts:
        try:
            tree = ast.parse(textwrap.dedent(inspect.getsource(part)))
        except (OSError, SyntaxError):
            return None
        definition = tree.body[0]  # of a lambda an assignment
        if isinstance(definition, ast.FunctionDef) and ast.get_docstring(definition) and len(definition.body) > 1:
            del definition.body[0]
        lines += ast.unparse(tree).splitlines()
    return lines


def discard(run, role):
    """Empty a run folder of the files of its run but config.json, no others; InputError for a run of another role."""
    there = role
    with suppress(InputError):  # a damaged one can be started afresh
        there = read_config(run).get("role")
    if there != role:
        raise InputError(f"--overwrite would discard {run}, which holds a {there}: choose another --out")
    # First goes what says "finished". What is interrupted here still has its old config.json, and is asked again.
    for file in sorted(run.iterdir(), key=lambda file: file.name != "logits.npz"):
        if RUN_FILE.fullmatch(file.name) and file.name != "config.json":
            file.unlink()


def read_config(run):
    """config.json of a run folder as a dict; InputError when it is not what `start_run` writes."""
    config = read_json(Path(run) / "config.json")
    keys = ("flags", "data", "facts")
    if not isinstance(config, dict) or not all(isinstance(config.get(key), dict) for key in keys):
        raise InputError(f"{run}/config.json is not that of a run: restore it, or train again with --overwrite")
    return config


def train_again(run, otherwise="train that run again", flags=""):
    """What mends a file of the run folder `run`, for a message: its command with more `flags`, where it is known."""
    # Without the folder rather than with --overwrite, which would train all seeds of the command again.
    with suppress(InputError, KeyError):
        return f"remove {run} and train it again with: {read_config(run)['command']}{flags}"
    return otherwise


def finished_config(run):
    """config.json of a finished run; InputError when the folder is missing, not a run, or not finished."""
    run = Path(run)
    if not (run / "config.json").is_file():
        raise InputError(f"{run} is not a run folder (no config.json): give one that train_teacher.py wrote")
    config = read_config(run)
    if not (run / "logits.npz").exists():
        raise InputError(f"{run} is not finished (no logits.npz): continue it with: {config.get('command', '?')}")
    return config
