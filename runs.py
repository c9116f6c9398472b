"""Run folders and all else on disk: one-line errors, atomic files, locks, one reader for each kind of file.

A run lives in runs/<name>/: config.json (flags, data, versions), metrics.jsonl (a line for each epoch), checkpoint.pt
and logits.npz, which is written last and so says that the run is finished. To change an experiment, leave this alone.
"""

import argparse
import hashlib
import io
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
import time
import zipfile
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import numpy as np
import torch
from filelock import FileLock, Timeout

# ---------------------------------------------------------------- errors


class InputError(Exception):
    """Something the user gave is wrong. The message is one line that names the fix; `cli` turns it into exit code 2."""


def cli(main):
    """Run a script's `main()`: wrong input, a failed write or too little memory becomes one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal without Unicode must not end a run
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # outside of training, which saves first
    try:
        main()
    except InputError as error:
        sys.exit(_complain(error))
    except (MemoryError, RuntimeError) as error:
        memory = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError))
        if not memory and "DefaultCPUAllocator" not in str(error):  # a CPU's failed allocation has no kind of its own
            raise
        sys.exit(_complain(f"out of memory ({first_line(error)}): lower --batch-size, --subset or the model's size"))
    except OSError as error:
        where = f"{error.strerror or error}: {error.filename or 'no file named'}"
        sys.exit(_complain(f"{where} (check that the folder exists, is writable and has space left)"))
    except KeyboardInterrupt:
        exit_interrupted()


def first_line(error):
    """The first line of an exception's message, or its kind when it has none, for use inside a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _complain(message):
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


@contextmanager
def reading(what, fix="restore it or make it again"):
    """Turn whatever a library raises while it reads `what` into our one line, with the `fix`."""
    try:
        yield
    except InputError:
        raise
    except FileNotFoundError as error:
        raise InputError(f"{error.filename or what} does not exist: {fix}") from None
    except Exception as error:  # numpy, zip, pickle, PIL, json, a hub: each raises kinds of its own on damaged files
        raise InputError(f"{what} cannot be read ({first_line(error)}): {fix}") from None


@contextmanager
def interruptible():
    """A list that SIGINT and SIGTERM append to, instead of ending the process, so that a run can save first."""
    stop = []
    numbers = (signal.SIGINT, signal.SIGTERM)
    handlers = {number: signal.signal(number, lambda number, frame: stop.append(number)) for number in numbers}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def exit_interrupted():
    """Say how to continue what was interrupted and saved, and exit 130."""
    print(f"interrupted; continue with: {command_line()}")
    raise SystemExit(130)


def command_line():
    """This command, as it is typed; without --overwrite, which would discard what the command left."""
    return shlex.join(["python", sys.argv[0], *(word for word in sys.argv[1:] if word != "--overwrite")])


def print_next(args, script, *more):
    """Print the command that follows this one: `script` with the same flags but those of the run, and `more`."""
    if args.quiet or args.shard != (0, 1):
        return
    words, before = [], ""
    for word in sys.argv[1:]:
        if "--out" not in (before, word.partition("=")[0]) and word != "--overwrite":
            words.append(word)
        before = word
    print("next:", shlex.join(["python", script, *words, *more]))


# ---------------------------------------------------------------- flags


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds each flag's default, unless its help says so itself (where the default depends on other flags)."""

    def __init__(self, prog):
        super().__init__(prog, max_help_position=30)

    def _get_help_string(self, action):
        default = action.default if isinstance(action.default, (list, tuple)) else [action.default]
        if default in ([], [None]) or any(isinstance(value, bool) for value in default):
            return action.help  # not given, or a switch
        if "default" in action.help or action.default is argparse.SUPPRESS:
            return action.help
        shown = " ".join(f"{value:g}" if isinstance(value, float) else str(value) for value in default)
        return f"{action.help} (default: {shown})"


class Parser(argparse.ArgumentParser):
    """argparse that answers a bad flag with one line and exit code 2."""

    def __init__(self, docstring):
        super().__init__(description=docstring, usage="%(prog)s [flags]", formatter_class=_Help, allow_abbrev=False)

    def error(self, message):
        raise SystemExit(_complain(f"{message} (see {self.prog} --help)"))


def number(kind, low, high=None, open_high=False, open_low=False):
    """An argparse type: a finite `kind` (int or float; an int has 64 bits) in low..high, ends excluded where open."""
    if high is None:
        high, open_high = 2**63 if kind is int else math.inf, True
    ends = f"{'(' if open_low else '['}{low}, {high}{')' if open_high else ']'}"

    def parse(text):
        value = kind(text)
        if not low <= value <= high or open_low and value == low or open_high and value == high:
            raise argparse.ArgumentTypeError(f"{text} is outside {ends}")
        return value

    parse.__name__ = kind.__name__
    return parse


def shard(text):
    """argparse type of --shard: "i/n" as (i, n), 0 <= i < n."""
    i, n = map(int, text.split("/"))
    if not 0 <= i < n:
        raise argparse.ArgumentTypeError(f"{text} must be i/n with i from 0 to n-1")
    return i, n


def check_seeds(seeds):
    """InputError when a seed is named twice."""
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {' '.join(map(str, seeds))} names a seed twice: name each once")


def check_prefix(args):
    """InputError when the --out of a script that makes several runs of each seed names the seed."""
    if "{seed}" in (args.out or ""):
        raise InputError("--out is a prefix here, to which the seed is appended: leave {seed} out of it")


# ---------------------------------------------------------------- files


def write_atomic(path, write):
    """Call `write(file)` on a temporary binary file beside `path`, then rename it over `path`. OSError names `path`.

    A reader, or a run killed at any moment, sees the old file or the new one, never a torn one. One writer at a time:
    run folders are locked, and so are tables of teacher logits.
    """
    path = Path(path)
    temporary = path.with_name(f".{path.name}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # On a full disk torch.save raises a RuntimeError after the write's OSError, and neither names the file.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def write_text(path, text):
    """Write `text` atomically as UTF-8 (what cannot be, from a flag of other bytes, as question marks)."""
    write_atomic(path, lambda file: file.write(text.encode(errors="replace")))


def _finite(part):
    """`part` with numbers that are not finite as None."""
    if isinstance(part, dict):
        return {str(key): _finite(item) for key, item in part.items()}
    if isinstance(part, (list, tuple)):
        return [_finite(item) for item in part]
    return None if isinstance(part, float) and not math.isfinite(part) else part


def write_json(path, value):
    """Write `value` atomically as indented JSON; numbers that are not finite become null."""
    write_text(path, json.dumps(_finite(value), indent=1, allow_nan=False) + "\n")


def write_npz(path, arrays):
    """Write a dict of arrays atomically as .npz."""
    write_atomic(path, lambda file: np.savez(file, **arrays))


def read_json(path):
    """The value in a JSON file; InputError when it is missing or not JSON."""
    with reading(path):
        return json.loads(Path(path).read_text(encoding="utf-8"))


def read_npz(path, keys=None):
    """The arrays `keys` (None: all) of an .npz as a dict; InputError when it is missing, torn or lacks one."""
    with reading(path, "check the path, or make it again"):
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise InputError(f"{path} holds a single array: it must be an .npz with {', '.join(keys or ['arrays'])}")
        with file:
            keys = file.files if keys is None else keys
            missing = [key for key in keys if key not in file.files]
            if missing:
                raise InputError(f"{path} lacks the arrays {', '.join(missing)}: it must hold {', '.join(keys)}")
            if file.zip.testzip():  # numpy compares no checksum where a damaged header asks for less than there is
                raise ValueError("a checksum does not fit")
            arrays = {key: file[key] for key in keys}
        if not all(isinstance(array, np.ndarray) for array in arrays.values()):
            raise ValueError("it holds other things than arrays")
        return arrays


def load_tensors(file, device="cpu"):
    """What torch.save or safetensors wrote; no code in it is run. Within `reading`, which says what cannot be read."""
    if str(file).endswith(".safetensors"):
        from safetensors.torch import load_file

        return load_file(file)
    try:
        return torch.load(file, map_location=device, weights_only=True)
    except pickle.UnpicklingError:  # torch's own advice here is to load it with its code
        raise ValueError("it is damaged, or holds more than tensors and numbers, which is never loaded") from None


def load_checkpoint(path, device="cpu"):
    """The dict in a checkpoint file, tensors only (no code of it is run); InputError when it is torn or has changed."""
    with reading(path, "train that run again with --overwrite"):
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
    with reading(path, "train that run again with --overwrite"):
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        check_metrics(lines)
        if not lines:
            raise ValueError("it is empty")
        return lines


def check_metrics(lines):
    """Raise an error, within `reading`, unless `lines` are dicts of numbers for the epochs 1, 2, …"""
    for epoch, line in enumerate(lines, 1):
        if line.get("epoch") != epoch or not all(isinstance(value, (int, float)) for value in line.values()):
            raise ValueError("its lines of metrics are not those of a run")


def last_metrics(run):
    """The last line of a finished run's metrics.jsonl as a dict, with its test_acc; InputError when it has none."""
    last = read_metrics(run)[-1]
    if not isinstance(last.get("test_acc"), float):
        raise InputError(f"{run}/metrics.jsonl ends without a test_acc: train that run again with --overwrite")
    return last


def write_metrics(run, history):
    """Write all of a run's metrics, a JSON line per epoch; the whole file, so that no line is lost, doubled or torn."""
    write_text(Path(run) / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))


def kept_result(path, settings, compute):
    """`compute()`, a dict of plain numbers and lists, as kept in the JSON file `path` together with its `settings`.

    InputError when the file was made with other settings, or has changed since.
    """

    def digest(result):
        return hashlib.sha256(json.dumps(result).encode()).hexdigest()

    path = Path(path)
    if path.exists():
        with reading(path, "remove it, or discard all with --overwrite"):
            kept = read_json(path)
            if kept.get("sha256") != digest(kept.get("result")):
                raise ValueError("it is not a finished seed, or has changed")
            different = sorted(key for key in settings if kept["settings"].get(key) != settings[key])
        if different:
            fix = "choose another folder for results, or discard all with --overwrite"
            raise InputError(f"{path} was made with other settings ({', '.join(different)}): {fix}")
        return kept["result"]
    started = time.perf_counter()
    result = json.loads(json.dumps(compute()))
    seconds = time.perf_counter() - started
    path.parent.mkdir(parents=True, exist_ok=True)
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
    commit = ""
    with suppress(OSError):  # no git here
        words = ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"]
        alone = dict(os.environ, GIT_CEILING_DIRECTORIES=str(here.parent))  # not that of a folder above
        commit = subprocess.run(words, cwd=here, capture_output=True, text=True, env=alone).stdout.strip()
    found = dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__)
    hardware = torch.cuda.get_device_name() if torch.cuda.is_available() else hardware
    return dict(found, git_commit=commit or None, hardware=hardware, threads=torch.get_num_threads())


# ---------------------------------------------------------------- run folders

# Flags that say where and how to run, not what: a run may be continued with other values of them.
NOT_COMPARED = "out overwrite quiet device data_dir eval_every seeds teacher snapshot_at fast teacher_cache".split()
NOT_COMPARED += ["tensorboard", "facts.teacher_test_acc", "facts.teacher_train_acc"]
RUN_FILE = re.compile(
    r"config\.json|metrics\.jsonl|(checkpoint|snapshot-\d+)\.pt|(logits|teacher)\.npz|events\.out\.tf.+"
)
DISCARDED = {"discarded": True}  # config.json of a folder that --overwrite emptied and training has not reached yet


def run_pattern(args, default):
    """The run folders of all seeds, with {seed} for the seed: --out, for several seeds with -s{seed} appended."""
    out = args.out or f"runs/{default}-s{{seed}}"
    return out if "{seed}" in out or len(args.seeds) == 1 else f"{out}-s{{seed}}"


def run_folder(args, seed, default):
    """The run folder of one seed."""
    return Path(run_pattern(args, default).replace("{seed}", str(seed)))


def default_name(args):
    """The first part of a run's name, from the flags: data and architecture."""
    return f"{Path(args.data.partition(':')[2] or args.data).stem}-{args.arch.removeprefix('torchvision:')}"


def ranks():
    """(rank, world size) of this process under torchrun; (0, 1) otherwise. InputError for half of its variables."""
    if "RANK" not in os.environ or os.environ.get("WORLD_SIZE", "1") == "1":
        return 0, 1
    needed = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in needed if name not in os.environ]
    if missing or not all(os.environ[name].isdecimal() for name in needed[:3]):
        what = ", ".join(missing) or "not as torchrun does"
        raise InputError(f"RANK is set, but {what}: use torchrun, or unset RANK")
    return int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])


def from_first_rank(decide):
    """What `decide()` returns or raises in the first process of torchrun, in all of them; the others do not call it."""
    rank, world = ranks()
    if world == 1:
        return decide()
    answer = [None, None]
    if not rank:
        try:
            answer[0] = decide()
        except (InputError, OSError) as error:
            answer[1] = error
    torch.distributed.broadcast_object_list(answer)
    if answer[1]:
        raise answer[1] if not rank else SystemExit(2)
    return answer[0]


@contextmanager
def locked(run):
    """Have the run folder `run` alone while it is trained; InputError when another process has it.

    The system drops the lock with the process that holds it, however that ends: a file left behind hinders nobody.
    """
    if ranks()[0]:  # of several ranks the first one writes
        yield
        return
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    path, holder = run / ".lock", run / ".lock-holder"
    lock = FileLock(path, timeout=2)  # seconds: a look at a finished run takes a part of one
    try:
        lock.acquire()
        holder.write_text(f"process {os.getpid()} on {platform.node()}")
    except Timeout:
        who = holder.read_text() if holder.exists() else "just started"
        advice = "wait for it, or choose another --out"
        raise InputError(f"{run} is being trained by another process ({who}): {advice}") from None
    except OSError as error:
        print(f"note: {run} is not locked ({error.strerror}): let no other process train there")
    try:
        yield
    finally:
        for file in (holder, path):  # before the release, or another process's would go
            with suppress(OSError):  # Windows keeps what is open
                file.unlink()
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
            stack.enter_context(FileLock(path.with_name(f".{path.name}.lock")))
        yield


def start_run(run, args, role, seed, data, model, **facts):
    """Make or check a run folder before training, within `locked(run)`. True when there is something to train.

    A finished run of the same settings prints so and returns False, an unfinished one is continued; one of other
    settings is an InputError unless --overwrite was given. `facts` go into config.json and are compared like the flags.
    """
    return from_first_rank(lambda: _start_run(Path(run), args, role, seed, data, model, facts))


def _start_run(run, args, role, seed, data, model, facts):
    flags = json.loads(json.dumps(dict(vars(args), label_noise=data.facts["label_noise"])))
    config = dict(role=role, seed=seed, arch=args.arch, flags=flags, data=data.facts, facts=facts)
    config |= dict(parameters=sum(p.numel() for p in model.parameters()), command=command_line(), versions=versions())
    run.mkdir(parents=True, exist_ok=True)
    for leftover in run.glob(".*.tmp"):  # of a run that was killed while it wrote
        if RUN_FILE.fullmatch(leftover.stem[1:]):
            leftover.unlink()
    path = run / "config.json"
    if not path.exists() and any(not file.name.startswith(".lock") for file in run.iterdir()):
        raise InputError(f"{run} is not empty and not a run folder: choose another --out")
    if args.overwrite or not path.exists() or read_json(path) == DISCARDED:
        discard_run(run)
        write_json(path, config)
        return True
    before, keys = read_config(run), ("role", "seed", "flags", "data", "facts")
    pairs = _differences({key: before.get(key) for key in keys}, {key: config[key] for key in keys})
    differing = {key: text for key, text in pairs if key.removeprefix("flags.") not in NOT_COMPARED}
    stop, now = before["flags"].get("stop_epoch"), flags.get("stop_epoch")
    if differing.keys() == {"flags.stop_epoch"} and isinstance(stop, int) and (not now or now > stop):
        # It goes on: the schedule hangs on --epochs alone.
        (run / "logits.npz").unlink(missing_ok=True)
        write_json(path, config)
        return True
    if differing:
        shown = "; ".join([*differing.values()][:4])
        fix = "choose another --out, or discard it with --overwrite"
        raise InputError(f"{run} holds a run with other settings ({shown}): {fix}")
    finished = (run / "logits.npz").exists()
    if finished:
        print(f"{run} is finished already; --overwrite would train it again")
    return not finished


def _differences(before, after, prefix=""):
    """(dotted key, what was and what is) of every entry in which two nested dicts differ, plain entries first."""
    for key in sorted(set(before) | set(after), key=lambda key: (isinstance(after.get(key), dict), key)):
        was, now = before.get(key), after.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{prefix}{key}.")
        elif was != now:
            yield prefix + key, f"{prefix}{key}: {was!r} there, {now!r} now"


def discard_run(run):
    """Empty a run folder of the files of its run, and no others."""
    write_json(Path(run) / "config.json", DISCARDED)
    for file in sorted(Path(run).iterdir(), key=lambda file: file.name != "logits.npz"):  # first what says "finished"
        if RUN_FILE.fullmatch(file.name) and file.name != "config.json":
            file.unlink()


def discard_runs(args, folders, teachers=()):
    """With --overwrite, discard all run `folders` now, and clear the flag: interrupted, the command without it goes on.

    InputError when one of them is the run folder of one of the `teachers` that the command itself reads.
    """
    if not args.overwrite:  # after all input has been checked
        return
    places = {os.path.realpath(run) for run in folders}
    for teacher in teachers:
        if os.path.realpath(teacher) in places:
            raise InputError(f"--overwrite would discard this command's teacher {teacher}: choose another --out")
    for run in folders:
        if (Path(run) / "config.json").exists() and not ranks()[0]:
            with locked(run):
                discard_run(run)
    args.overwrite = False


def read_config(run):
    """config.json of a run folder as a dict; InputError when it is not what `start_run` writes."""
    config = read_json(Path(run) / "config.json")
    keys = ("flags", "data", "facts")
    if not isinstance(config, dict) or not all(isinstance(config.get(key), dict) for key in keys):
        raise InputError(f"{run}/config.json is not that of a run: restore it, or train again with --overwrite")
    return config


def finished_config(run):
    """config.json of a finished run; InputError when the folder is missing, not a run, or not finished."""
    run = Path(run)
    if not (run / "config.json").is_file():
        raise InputError(f"{run} is not a run folder (no config.json): give one that train_teacher.py wrote")
    config = read_config(run)
    if not (run / "logits.npz").exists():
        command = config.get("command", "its training command")
        raise InputError(f"{run} is not finished (no logits.npz): continue it with: {command}")
    return config
