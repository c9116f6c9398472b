"""The pages: each patch of docs/fork.md applies to a copy and does what it says, briefly; links lead to files."""

import importlib.util
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from helpers import HERE, TINY, forked, ok, one_line_error, run_forked

PAGE = (HERE / "docs/fork.md").read_text(encoding="utf-8")
PATCHES = re.findall(r"adds (\d+) lines to one file.*?```diff\n(.*?)```", PAGE, re.DOTALL)
SHARED = ("runs", "common", "engine", "claims", "deviation")
# What is run in each copy, and what config.json must then say.
CASES = {
    "decoupled loss": (["train_student.py", "--teacher", "t", "--nckd-weight", "2"], ("flags", "nckd_weight", 2.0)),
    "feature loss": (["train_student.py", "--teacher", "t"], ("flags", "kd_weight", 1.0)),
    "dataset": (["train_teacher.py", "--data", "bars"], ("data", "classes", 8)),
    "model": (["train_teacher.py", "--arch", "linear", "--width", "1"], ("flags", "arch", "linear")),
    "schedule": (["train_teacher.py", "--schedule", "linear"], ("flags", "schedule", "linear")),
}


def forked_copy(script, args, cwd, out, err):
    """`forked`, where the folder `cwd` takes the place of the project's."""
    for module in SHARED:
        sys.modules.pop(module, None)
    sys.path[:] = [str(cwd), *(place for place in sys.path if Path(place).resolve() != HERE)]
    forked(script, args, cwd, out, err)


@pytest.mark.parametrize("name, page", list(zip(CASES, PATCHES, strict=True)), ids=list(CASES))
def test_a_patch_works_in_a_copy_of_one_script_and_the_shared_files(name, page, tiny_runs, tmp_path):
    added, patch = page
    lines = [line for line in patch.splitlines() if re.match(r"\+(?!\+\+ b)", line)]
    assert len(lines) == int(added) <= 18 and patch.count("+++ b/") == 1
    (script, *flags), (part, key, value) = CASES[name]
    for file in (script, *(f"{module}.py" for module in SHARED)):
        shutil.copy(HERE / file, tmp_path)
    subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=tmp_path, check=True)
    shutil.copytree(tiny_runs / "runs" / "teacher-s0", tmp_path / "t")

    def run(*more):
        return run_forked(forked_copy, tmp_path / script, [*TINY, *flags, *more], tmp_path)

    ok(run("--out", "r"))
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config[part][key] == value
    if "loss" not in name:
        return
    # The student is another one than without the patch, whose run it does not take for its own.
    old = tiny_runs / "runs" / "kd-s0"
    losses = [(run / "metrics.jsonl").read_text().splitlines()[-1] for run in (tmp_path / "r", old)]
    assert json.loads(losses[0])["train_loss"] > json.loads(losses[1])["train_loss"]
    shutil.copytree(old, tmp_path / "kd")
    one_line_error(run("--out", "kd"), "other settings", "nckd_weight" if name == "decoupled loss" else "facts.loss")
    if name == "feature loss":
        one_line_error(run("--arch", "mlp", "--out", "never"), "needs `features` in both networks")
        assert not (tmp_path / "never").exists()


def test_the_decoupled_loss_is_that_of_its_paper(tmp_path):
    """Zhao et al. 2022: equation 7; and equation 6, by which KD is TCKD + (1 − p_t)·NCKD, p_t the teacher's."""
    shutil.copy(HERE / "common.py", tmp_path / "forked.py")
    patch = PATCHES[0][1].replace("common.py", "forked.py")
    subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=tmp_path, check=True)
    spec = importlib.util.spec_from_file_location("forked", tmp_path / "forked.py")
    forked_common = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(forked_common)
    rng = np.random.default_rng(0)
    temperature = 2.0
    weight = 3.0
    student, teacher = rng.normal(0, 3, (2, 6, 5))
    labels = np.array([0, 1, 2, 3, 4, 4])

    expected = []
    for z_student, z_teacher, label in zip(student, teacher, labels, strict=True):
        p, q = (np.exp(z / temperature) / np.exp(z / temperature).sum() for z in (z_teacher, z_student))
        tckd = p[label] * np.log(p[label] / q[label]) + (1 - p[label]) * np.log((1 - p[label]) / (1 - q[label]))
        p_others, q_others = (np.delete(x, label) / (1 - x[label]) for x in (p, q))
        nckd = (p_others * np.log(p_others / q_others)).sum()
        assert (p * np.log(p / q)).sum() == pytest.approx(tckd + (1 - p[label]) * nckd)
        expected.append(temperature**2 * (tckd + weight * nckd))
    given = (*map(torch.tensor, (student, teacher, labels)), temperature, weight)
    assert forked_common.decoupled_kd_loss(*given).item() == pytest.approx(np.mean(expected))


@pytest.mark.parametrize("page", [*HERE.glob("*.md"), *HERE.glob("docs/*.md")], ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if ":" not in target and not (page.parent / target).exists()] == []
