"""The pages: each patch of docs/fork.md applies to a copy and does what it says, briefly; links lead to files."""

import json
import re
import shutil
import subprocess
import sys

import pytest
from helpers import HERE, TINY, run_cli

PATCHES = re.findall(r"```diff\n(.*?)```", (HERE / "docs/fork.md").read_text(encoding="utf-8"), re.DOTALL)
# What is run in each copy, and what config.json of the last run must then say.
CASES = {
    "logit loss": (["train_student.py", "--teacher", "t", "--logit-weight", "0.5"], ("flags", "logit_weight", 0.5)),
    "feature loss": (["train_student.py", "--teacher", "t"], ("flags", "kd_weight", 1.0)),
    "dataset": (["train_teacher.py", "--data", "bars"], ("data", "classes", 8)),
    "model": (["train_teacher.py", "--arch", "linear", "--width", "1"], ("flags", "arch", "linear")),
    "schedule": (["train_teacher.py", "--schedule", "linear"], ("flags", "schedule", "linear")),
}


def test_there_is_a_patch_for_each_case():
    assert len(PATCHES) == len(CASES)


@pytest.mark.parametrize("name, patch", list(zip(CASES, PATCHES, strict=True)), ids=list(CASES))
def test_a_patch_works(name, patch, tiny_runs, tmp_path):
    changed = [line for line in patch.splitlines() if re.match(r"[+-](?!\+\+ b|-- a)", line)]
    assert len(changed) <= 12 and patch.count("+++ b/") == 1
    for file in HERE.glob("*.py"):
        shutil.copy(file, tmp_path)
    subprocess.run(["git", "apply", "-"], input=patch, text=True, cwd=tmp_path, check=True)
    shutil.copytree(tiny_runs / "runs" / "teacher-s0", tmp_path / "t")
    (script, *flags), (part, key, value) = CASES[name]
    command = [sys.executable, str(tmp_path / script), *TINY, *flags, "--out", "r"]
    process = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert process.returncode == 0, process.stdout + process.stderr
    config = json.loads((tmp_path / "r" / "config.json").read_text())
    assert config[part][key] == value
    if "loss" in name:  # the student is another one than without the patch
        plain = run_cli("train_student.py", *TINY, "--teacher", "t", "--out", "plain", cwd=tmp_path)
        assert plain.returncode == 0, plain.stderr
        losses = [(tmp_path / run / "metrics.jsonl").read_text().splitlines()[-1] for run in ("r", "plain")]
        assert json.loads(losses[0])["train_loss"] > json.loads(losses[1])["train_loss"]


@pytest.mark.parametrize("page", ["README.md", "docs/results.md", "docs/fork.md"])
def test_what_a_page_links_to_is_there(page):
    targets = re.findall(r"\]\(([^)#]+)\)", (HERE / page).read_text(encoding="utf-8"))
    files = [(HERE / page).parent / target for target in targets if ":" not in target]
    assert [file for file in files if not file.exists()] == []
