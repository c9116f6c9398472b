"""Fixtures of all tests. Scripts are imported from the folder above, as they are run."""

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

# Before torch and numpy: tests run side by side, and one thread rounds alike everywhere.
os.environ["OMP_NUM_THREADS"] = "1"
# Before transformers: else an absent model is asked for over the network.
os.environ["HF_HUB_OFFLINE"] = "1"

for folder in (Path(__file__).parent, Path(__file__).parent.parent):
    sys.path.insert(0, str(folder))

import torch  # noqa: E402
from helpers import TINY, ok, run_cli  # noqa: E402


@pytest.fixture(autouse=True)
def _seeded():
    torch.manual_seed(0)  # else what ran before decides a test's random tensors


@pytest.fixture(scope="session")
def tiny_runs(tmp_path_factory):
    """A folder with tiny finished runs: runs/teacher-s0, teacher-s1, kd-s0, kd-s1, onehot-s0, onehot-s1."""
    folder = tmp_path_factory.mktemp("a folder with spaces")
    common = [*TINY, "--seeds", 0, 1]
    ok(run_cli("train_teacher.py", *common, "--out", "runs/teacher", cwd=folder))

    def train(student):
        name, *flags = student
        teacher = ("--teacher", "runs/teacher-s{seed}")
        return run_cli("train_student.py", *common, *teacher, "--out", f"runs/{name}", *flags, cwd=folder)

    with ThreadPoolExecutor(2) as pool:
        for process in pool.map(train, [("kd",), ("onehot", "--kd-weight", 0, "--ce-weight", 1)]):
            ok(process)
    return folder
