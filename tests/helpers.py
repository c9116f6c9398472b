"""What tests share: running a script as a user does, one-line errors, small data, comparing run folders."""

import hashlib
import json
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import torch

import runs

HERE = Path(__file__).resolve().parent.parent
TINY = ["--epochs", "2", "--width", "0.25", "--subset", "300", "--quiet", "--device", "cpu"]
TIMES = ("seconds", "images_per_s", "tokens_per_s")


def forked(script, args, cwd, out, err):
    """In a forked process: run a script with its output in the files `out` and `err`."""
    os.chdir(cwd)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = [str(HERE / script), *args]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_cli(script, *args, cwd):
    """Run a script as a user does; returns its exit code and output. The process is forked from one that has torch
    loaded already, which saves the two seconds that importing it takes."""
    os.environ["OMP_NUM_THREADS"] = "1"  # several run at once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch._dynamo", "sklearn.datasets", "scipy.stats", "matplotlib.pyplot"])
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = context.Process(target=forked, args=(script, [str(arg) for arg in args], cwd, out, err))
        process.start()
        process.join()
        return SimpleNamespace(returncode=process.exitcode, stdout=out.read_text(), stderr=err.read_text())


def run_process(script, *args, cwd):
    """The same in a process of its own, from nothing."""
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


def write_arrays(path, n=60, side=16, classes=4, channels=3):
    """A random dataset as .npz; returns its arrays."""
    rng = np.random.default_rng(1)
    arrays = {f"x_{s}": rng.integers(0, 256, (n, side, side, channels), dtype=np.uint8) for s in ("train", "test")}
    arrays.update({f"y_{s}": np.arange(n) % classes for s in ("train", "test")})
    np.savez(path, **arrays)
    return arrays
