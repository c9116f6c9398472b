"""Snakefile: what its jobs run and in which order, and one figure at tiny size: trained, mended, refused, killed."""

import importlib
import os
import re
import shlex
import shutil
import subprocess
import sys
import time
from collections import defaultdict
from types import SimpleNamespace

import common
import glue_distill
import runs

import psutil
import pytest
from helpers import HERE, SOAK, Reached, files_below, ok, outcome, same_run

TINY = ["fig1a", "--config", "seeds=0", "flags=--epochs 2 --width 0.25 --subset 300 --device cpu"]


def start(folder, *flags, scripts=HERE):
    """A snakemake that works in `folder` with the Snakefile and the scripts in another one."""
    folder.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "snakemake", "--snakefile", scripts / "Snakefile", "--nolock", "--cores", "2"]
    command += [*flags, "--rerun-incomplete", "--rerun-triggers", "mtime", "params"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}
    pipe = subprocess.PIPE
    return subprocess.Popen(command, cwd=folder, env=environment, stdout=pipe, stderr=pipe, text=True)


def snakemake(folder, *flags, **more):
    process = start(folder, *flags, **more)
    process.stdout, process.stderr = process.communicate()
    return process


def jobs_of(folder, *flags, **more):
    """The jobs of a dry run, each with its rule, input and output files, script and the words after that."""
    jobs = []
    for text in re.split(r"\n(?=rule )", ok(snakemake(folder, *flags, "--dry-run", "--printshellcmds", **more)))[1:]:
        command = re.search(r"^Shell command: (.*)", text, re.M)[1].partition(" && ")[0]
        if command == "None":  # a target
            continue
        job = SimpleNamespace(rule=re.match(r"rule (\w+)", text)[1])
        job.input, job.output = (re.findall(rf"^    {key}: (.*)", text, re.M) for key in ("input", "output"))
        _, job.script, *job.words = shlex.split(command)
        job.script = os.path.basename(job.script)
        jobs.append(job)
    return jobs


@pytest.fixture(scope="module")
def jobs(tmp_path_factory):
    return jobs_of(tmp_path_factory.mktemp("dry"), "reproduce", "cpu", "paper")


def test_the_grid_has_the_rows_of_the_paper(jobs):
    made = set()
    for job in jobs:
        made.update(", ".join(job.output).split(", "))
    for run in ("cifar10-resnet56-teacher", "cifar100-resnet20-onehot", "tiny-imagenet-resnet56-mobilenetv2-kd"):
        assert {f"runs/paper/{run}-s{seed}/.finished" for seed in (0, 1, 2)} <= made, run
    figures = ("cifar100-noisy-resnet20/denoise", "cifar10/eigenspace", "tiny-imagenet-resnet56/fig1b")
    assert {f"results/paper/{figure}/claims.json" for figure in figures} <= made
    assert "results/paper/rte/glue.json" in made


def test_scripts_take_the_commands(jobs, monkeypatch, tmp_path):
    def reached(*_, **__):
        raise Reached

    monkeypatch.chdir(tmp_path)
    for module, name in ((common, "load_data"), (glue_distill, "load_task"), (runs, "finished_config")):
        monkeypatch.setattr(module, name, reached)
    config = ["data=npz:my data/x.npz", "data_dir=a b", "seeds=3", "flags=--width 0.5"]
    own = jobs_of(tmp_path, "fig1b", "fig-eigenspace", "--config", *config)
    assert len(own) == 5 and all("npz:my data/x.npz" in job.words for job in own)
    commands = {(job.script, *job.words) for job in (*jobs, *own)}
    assert len({script for script, *_ in commands}) == 7
    for script, *words in sorted(commands):
        module = importlib.import_module(script.removesuffix(".py"))
        assert outcome(module, *words) == ("accepted", ""), (script, words)


def test_jobs_need_the_files_of_their_data(tmp_path):
    for name in ("x.npz", "x.csv"):
        (tmp_path / name).write_text("")
    own = jobs_of(tmp_path, "reproduce", "--config", "data=npz:x.npz", "task=csv:x.csv", "seeds=3")
    assert all("glue" not in job.script or "x.csv" in job.input[0] for job in own)
    assert all("x.npz" in job.input[0] for job in own if job.rule == "network" or "eigenspace" in job.script)


def test_no_two_jobs_train_a_run_at_the_same_time(jobs):
    made_by = {}
    for job in jobs:
        made_by.update(dict.fromkeys(job.output[0].split(", "), job))

    def before(job):
        for file in ", ".join(job.input).split(", ") if job.input else []:
            yield made_by[file]
            yield from before(made_by[file])

    trained = defaultdict(list)  # {run: jobs that train it unless it is finished}
    for job in jobs:
        for seed in "".join(re.findall(r"--seeds ([\d ]+)", " ".join(job.words))).split():
            kinds = [f"-{job.script}-s{seed}"]  # what a script trains for itself
            if job.script == "train_student.py":
                kinds = [""]
            if job.script in ("switch_distill.py", "when_it_pays.py", "denoise_gradients.py"):
                kinds += [f"-{what}-s{seed}" for what in ("teacher", "onehot", "kd")]
            for kind in kinds:
                trained[job.words[job.words.index("--out") + 1] + kind].append(job)
    for run, several in trained.items():
        first = [job for job in several if all(job is other or job in before(other) for other in several)]
        assert len(first) == 1, (run, several)
    assert sum(len(several) > 3 for several in trained.values()) >= 15  # of digits: the job itself and three figures


def test_a_figure_is_trained_mended_and_refused(tmp_path):
    assert "error: there is no setting sedes" in snakemake(tmp_path, "--config", "sedes=1").stderr
    assert "error: --overwrite would train" in snakemake(tmp_path, "--config", "flags=--overwrite").stderr
    ok(snakemake(tmp_path, *TINY))
    assert (tmp_path / "results" / "digits-resnet8-quick" / "fig1a" / "fig1a.png").exists()
    before = {path: content for path, content in files_below(tmp_path / "runs").items() if path.name[0] != "."}
    # Logits that are lost are written again from the checkpoint. They are the same, so the figure is not drawn again.
    logits = tmp_path / "runs" / "digits-resnet8-quick-kd-s0" / "logits.npz"
    logits.unlink()
    ok(snakemake(tmp_path, f"{logits.parent.relative_to(tmp_path)}/.finished", *TINY[1:]))
    assert logits.exists() and all(path.read_bytes() == before[path] for path in before if path != logits)
    assert not jobs_of(tmp_path, *TINY)
    # With an edited loss all is run again, for the scripts to refuse what the old one trained.
    fork = tmp_path / "fork"
    fork.mkdir()
    for file in (*HERE.glob("*.py"), HERE / "Snakefile"):
        shutil.copy(file, fork)
    assert not jobs_of(tmp_path, *TINY, scripts=fork)
    source = (fork / "common.py").read_text()
    (fork / "common.py").write_text(source.replace("return temperature**2 *", "return temperature *"))
    assert jobs_of(tmp_path, *TINY, scripts=fork)
    # Other flags: refused, and nothing of the finished runs is lost.
    before[logits] = logits.read_bytes()
    process = snakemake(tmp_path, *TINY[:-1], TINY[-1].replace("--epochs 2", "--epochs 3"), "--cores", "1")
    assert process.returncode == 1 and "other settings" in process.stderr
    assert len(before) >= 12 and all(path.read_bytes() == content for path, content in before.items())


@pytest.mark.skipif(not SOAK, reason="make soak")
def test_faults_cost_no_finished_run(tmp_path):
    flags = [*TINY[:-1], TINY[-1].replace("--epochs 2", "--epochs 30")]
    ok(snakemake(tmp_path / "whole", *flags))
    done = {}
    for k in range(5):
        process = start(tmp_path / "killed", *flags)
        time.sleep(7 + 2 * k)  # whenever: what follows must hold
        family = psutil.Process(process.pid).children(recursive=True)
        victim = family[-1] if family and k % 2 else process  # a job, or snakemake, which leaves its jobs to end alone
        victim.kill()
        process.communicate()
        psutil.wait_procs(family)
        assert all(file.stat().st_mtime_ns == then for file, then in done.items())
        finished = [file.with_name("checkpoint.pt") for file in (tmp_path / "killed").glob("runs/*/logits.npz")]
        done = {file: file.stat().st_mtime_ns for file in finished}
    ok(snakemake(tmp_path / "killed", *flags))
    assert all(file.stat().st_mtime_ns == then for file, then in done.items())
    for run in (tmp_path / "whole" / "runs").iterdir():
        assert same_run(run, tmp_path / "killed" / "runs" / run.name)
