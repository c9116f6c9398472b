"""The pages: each patch of docs/fork.md applies to a copy and does what it says, briefly; links lead to files."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import HERE, TINY, forked, ok, one_line_error, run_forked

PATCHES = re.findall(r"```diff\n(.*?)```", (HERE / "docs/fork.md").read_text(encoding="utf-8"), re.DOTALL)
SHARED = ("runs", "common", "engine", "claims", "deviation")
# What is run in each copy, and what config.json must then say.
CASES = {
    "logit loss": (["train_student.py", "--teacher", "t", "--logit-weight", "0.5"], ("flags", "logit_weight", 0.5)),
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


@pytest.mark.parametrize("name, patch", list(zip(CASES, PATCHES, strict=True)), ids=list(CASES))
def test_a_patch_works_in_a_copy_of_one_script_and_the_shared_files(name, patch, tiny_runs, tmp_path):
    changed = [line for line in patch.splitlines() if re.match(r"[+-](?!\+\+ b|-- a)", line)]
    assert len(changed) <= 16 and patch.count("+++ b/") == 1
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
    one_line_error(run("--out", "kd"), "other settings", "logit_weight" if name == "logit loss" else "facts.loss")
    if name == "feature loss":
        one_line_error(run("--arch", "mlp", "--out", "never"), "needs `features` in both networks")
        assert not (tmp_path / "never").exists()


@pytest.mark.parametrize("page", [*HERE.glob("*.md"), *HERE.glob("docs/*.md")], ids=lambda page: page.name)
def test_what_a_page_links_to_is_there(page):
    targets = re.findall(r"\]\(([^)#]+)\)", page.read_text(encoding="utf-8"))
    assert [target for target in targets if ":" not in target and not (page.parent / target).exists()] == []
