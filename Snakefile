# All figures as one graph of jobs: networks are trained seed by seed, then each figure is drawn of all its seeds.
#
#   snakemake --cores 2                     # as `make reproduce`, but for its page
#   snakemake fig1a fig1b --cores 2 --config data=cifar100 arch=resnet56 recipe=short seeds="0 1 2"
#   snakemake -n paper                      # lists what is missing of the paper's grid
#   snakemake results/paper/cifar10-resnet56/fig1a/claims.json --cores 4        # one figure of it
#
# With the same command an interrupted run goes on from its checkpoint, and a finished one is not trained again.
# Snakemake deletes a job's declared outputs before it repeats the job: so these are marks and claims.json alone, and no file
# of a run.
import ast
import hashlib
import os
import re
import sys
from pathlib import Path
from shlex import quote

# ---------------------------------------------------------------- settings: --config NAME=VALUE

SETTINGS = {
    "data": "digits",
    "arch": "resnet8",
    "recipe": "",  # else quick; of the paper's grid: paper
    "seeds": "",  # else those of the tables below
    "data_dir": "data",
    "flags": "",  # more flags of teachers and students on images
    "task": "sentiment",
    "glue_flags": "--student tiny",  # without the smaller student, for time
}
unknown = ", ".join(set(config) - set(SETTINGS))
if unknown:
    sys.exit(f"error: there is no setting {unknown}: use {', '.join(SETTINGS)}")
SETTINGS.update((name, "" if value is None else str(value)) for name, value in config.items())
if "--overwrite" in f"{SETTINGS['flags']} {SETTINGS['glue_flags']}".split():
    sys.exit("error: --overwrite would train shared runs again in each job: remove their folders in runs/ instead")
SEEDS = SETTINGS["seeds"].split()
DATA = f"--data {quote(SETTINGS['data'])}"
DATA_DIR = f"--data-dir {quote(SETTINGS['data_dir'])}"
RECIPE = SETTINGS["recipe"] or "quick"
PAPER = SETTINGS["recipe"] or "paper"  # the grid's recipe, and its folder in runs/ and results/
NAME = re.sub(r"[^\w.+-]", "-", f"{SETTINGS['data']}-{SETTINGS['arch']}-{RECIPE}")
TASK = re.sub(r"[^\w.+-]", "-", SETTINGS["task"])
# For these too jobs are repeated when they change: common.py but for its comments, and files of data. The scripts then
# refuse runs of another loss or data, and look at the others.
CODE = ast.unparse(ast.parse(Path(workflow.basedir, "common.py").read_text(encoding="utf-8")))
CODE = hashlib.sha256(CODE.encode()).hexdigest()
PATHS = [SETTINGS[name].partition(":")[2] for name in ("data", "task")]


def data_files(command):
    """The files of data that a command reads."""
    return [path for path in PATHS if os.path.isfile(path) and f":{path}" in command]


# ---------------------------------------------------------------- from tables to jobs

SCRIPTS = {"fig1b": "switch_distill.py", "pays": "when_it_pays.py", "denoise": "denoise_gradients.py"}
NETWORK = ("teacher", "onehot", "kd")  # the runs of a network, which are one job
FLAGS = {}  # {network: flags of its runs}
JOBS = {}  # {file: (command that makes it, files that it needs)}, of all but networks


def mark(run, seed):
    """A link to a run's logits.npz, made when the run is finished; without the logits it counts as missing."""
    return f"runs/{run}-s{seed}/.finished"


def add_network(name, flags, seeds, figures):
    """A teacher, its one-hot control and its student: runs/<name>-teacher-s0, -onehot-s0 and -kd-s0.

    figures: {figure: more flags}, in results/<name>/<figure>. Their scripts share these runs, and train only their own.
    Without figures it is the control alone, beside the student of another network's teacher.
    """
    FLAGS[name] = f"{flags} {DATA_DIR} --quiet {SETTINGS['flags']}"
    if not figures:
        add_run(f"{name}-onehot", f"{FLAGS[name]} --kd-weight 0 --ce-weight 1", seeds)
    for figure, more in figures.items():
        folder = f"results/{name}/{figure}"
        if figure == "fig1a":
            add_fig1a(name, name, name, seeds)
        else:
            command = f"{SCRIPTS[figure]} {FLAGS[name]} {more} --out runs/{name} --results {folder}"
            add_figure(folder, command, seeds, [f"{name}-{run}" for run in NETWORK])


def add_run(run, flags, seeds, needed=()):
    """One student or control, runs/<run>-s0, once the runs `needed` of the same seed are finished."""
    for seed in SEEDS or seeds.split():
        made = mark(run, seed)
        command = f"train_student.py {flags} --seeds {seed} --out runs/{run}-s{seed} && ln -sfn logits.npz {made}"
        JOBS[made] = (command, [mark(other, seed) for other in needed])


def add_resnet56(prefix, flags, seeds, figures, of_resnet20, of_mobilenet=""):
    """§3.1, images: ResNet-56 with its student and figures, and its students ResNet-20 and MobileNet-v2."""
    teacher = f"{prefix}resnet56"
    add_network(teacher, f"{flags} --arch resnet56", seeds, figures)
    add_network(f"{prefix}resnet20", f"{flags} --arch resnet20", seeds, of_resnet20)
    add_network(f"{prefix}mobilenetv2", f"{flags} --arch mobilenetv2 {of_mobilenet}", seeds, {})
    for arch in ("resnet20", "mobilenetv2"):
        student = f"{FLAGS[prefix + arch]} --teacher runs/{teacher}-teacher-s{{seed}}"
        add_run(f"{teacher}-{arch}-kd", student, seeds, [f"{teacher}-teacher"])
        add_fig1a(f"{teacher}-{arch}", teacher, prefix + arch, seeds)


def add_fig1a(name, teacher, control, seeds):
    """§3.1: Figure 1a of a student, its teacher and its control."""
    seeds = SEEDS or seeds.split()
    command = f"analyze_deviation.py --title {quote(f'{name}, {len(seeds)} seed(s)')} --out results/{name}/fig1a"
    needed = []
    for flag, run in (("teacher", f"{teacher}-teacher"), ("student", f"{name}-kd"), ("control", f"{control}-onehot")):
        command += f" --{flag} {' '.join(f'runs/{run}-s{seed}' for seed in seeds)}"
        needed += [mark(run, seed) for seed in seeds]
    JOBS[f"results/{name}/fig1a/claims.json"] = (command, needed)


def add_figure(folder, command, seeds, needed=(), file="claims.json"):
    """A figure whose script trains by itself, seed by seed, once the runs `needed` of the same seed are finished."""
    seeds = SEEDS or seeds.split()
    files = data_files(command)
    trained = []
    for seed in seeds:
        trained.append(f"{folder}/.trained-s{seed}")
        training = f"{command} --seeds {seed} --train-only && date > {trained[-1]}"
        JOBS[trained[-1]] = (training, files + [mark(run, seed) for run in needed])
    JOBS[f"{folder}/{file}"] = (f"{command} --seeds {' '.join(seeds)}", trained)


def add_text(name, folder, flags, seeds):
    command = f"glue_distill.py {flags} {DATA_DIR} --quiet --out runs/{name} --results {folder}"
    add_figure(folder, command, seeds, file="glue.json")


# ---------------------------------------------------------------- the figures of `make reproduce`, on any data

# Fewer moments and points than the scripts take, for time.
figures = {"fig1a": "", "fig1b": "--switch-at 0 0.5 0.9 1", "pays": "--stop-at 0.1 1", "denoise": "--points 512"}
add_network(NAME, f"{DATA} --arch {SETTINGS['arch']} --recipe {RECIPE}", "0 1 2 3 4", figures)
folder = f"results/{NAME}/eigenspace"
add_figure(folder, f"eigenspace.py {DATA} {DATA_DIR} --out {folder}", "0 1 2 3 4")
add_text(TASK, f"results/glue-{TASK}", f"--task {quote(SETTINGS['task'])} {SETTINGS['glue_flags']}", "0 1 2")

# ---------------------------------------------------------------- the paper's rows on 10,000 real images

# Hours each on two cores. Epochs: the shortest of 50, 100, 150 … after which the teacher fits 90% of its labels.
# Departure: MobileNet-v2 has half its width.
CIFAR100 = "--data cifar100 --subset 10000"
HALF = {"fig1a": "", "fig1b": "--direction onehot2kd --switch-at 0 0.5 1"}
ROWS = {
    "cifar10": ("--data cifar10 --subset 10000 --arch resnet20 --epochs 50 --batch-size 128", "0 1", HALF),
    "cifar100": (f"{CIFAR100} --arch resnet20 --epochs 100 --batch-size 128", "0 1", HALF),
    "cifar100-noisy": (f"{CIFAR100} --arch resnet20 --epochs 150 --label-noise 0.2", "0 1", HALF),
    "tiny-imagenet": ("--data tiny-imagenet --subset 10000 --arch resnet20 --epochs 50", "0", HALF),
}
for name, (flags, seeds, figures) in ROWS.items():
    add_network(f"rows/{name}", flags, seeds, figures)
add_resnet56("rows/", f"{CIFAR100} --epochs 50", "0", {"fig1a": ""}, {}, "--width 0.5")

# All texts, with a pretrained encoder. Epochs: the shortest of 3, 5, 10, 20 after which the teacher fits 90%.
TEXT_ROWS = {"sst-2": (3, "0"), "cola": (20, "0 1 2"), "mrpc": (10, "0 1 2"), "rte": (20, "0 1 2")}
ENCODER = f"{SETTINGS['data_dir']}/minilm"
if not os.path.isdir(ENCODER):
    ENCODER = "sentence-transformers/all-MiniLM-L6-v2"  # the same, from the hub
for task, (epochs, seeds) in TEXT_ROWS.items():
    flags = f"--task {task} --teacher {quote(ENCODER)} --student {quote(ENCODER)} --epochs {epochs} --precision bf16"
    add_text(f"rows/{task}", f"results/rows/{task}", flags, seeds)

# ---------------------------------------------------------------- the paper's grid, or the same with another recipe

# §3.1, images: ResNet-56 and its three students. Assumption: the paper reports 18 settings; which other pairs are among
# them could not be checked.
DEVIATION = {"fig1a": ""}
# §3.2: the loss is switched both ways. Assumption: on these two datasets.
SWITCH = {"fig1a": "", "fig1b": "--switch-at 0 0.25 0.5 0.75 0.9 1"}
# §5, on random points: per-example gradients of all of CIFAR would take hours at each checkpoint.
DENOISE = {"denoise": "--points 512"}
for data, flags, of_resnet56, of_resnet20 in (
    ("cifar10", "--data cifar10", DEVIATION, {}),
    ("cifar100", "--data cifar100", SWITCH, DENOISE),
    ("cifar100-noisy", "--data cifar100 --label-noise 0.2", DEVIATION, DENOISE),
    ("tiny-imagenet", "--data tiny-imagenet", SWITCH, {}),
):
    add_resnet56(f"{PAPER}/{data}-", f"{flags} --recipe {PAPER}", "0 1 2", of_resnet56, of_resnet20)
# §3.1, language. Departures: texts are cut at 128 tokens; the paper's RoBERTa-medium and -small are not public, and
# DistilRoBERTa and a model from scratch stand for them. Assumption: these pairs.
for task in "mnli imdb qqp ag_news cola sst-2 mrpc rte qnli".split():
    flags = f"--task {task} --teacher roberta-base --student roberta-base distilroberta/distilroberta-base small"
    add_text(f"{PAPER}/{task}", f"results/{PAPER}/{task}", flags, "0 1 2")
# §4.
folder = f"results/{PAPER}/cifar10/eigenspace"
add_figure(folder, f"eigenspace.py --data cifar10 --subset 1000 {DATA_DIR} --out {folder}", "0 1 2")

# ---------------------------------------------------------------- targets and rules

TARGETS = {  # {target: what the names of its figures' files begin with}
    "reproduce": (f"results/{NAME}/", f"results/glue-{TASK}/"),
    "fig1a": f"results/{NAME}/fig1a/",  # §3.1
    "fig1b": f"results/{NAME}/fig1b/",  # §3.2
    "fig-pays": f"results/{NAME}/pays/",  # the title's question
    "fig-eigenspace": f"results/{NAME}/eigenspace/",  # §4
    "fig-denoise": f"results/{NAME}/denoise/",  # §5
    "fig-glue": f"results/glue-{TASK}/",  # §3.1, language
    "cpu": "results/rows/",
    "paper": f"results/{PAPER}/",
}
for row in {file.split("/")[2] for file in JOBS if file.startswith("results/rows/")}:
    TARGETS[row] = f"results/rows/{row}/"
for target, beginning in TARGETS.items():
    rule:
        name: target
        input: [file for file in JOBS if file.startswith(beginning)]

# The scripts beside this file, with the Python that runs it.
PYTHON = quote(sys.executable) + " " + quote(os.path.relpath(workflow.basedir) + "/").removeprefix("./")


def threads_of(command):
    """Small networks gain nothing from more threads than one, and one rounds alike on every machine."""
    return 1 if "digits" in command or "sentiment" in command else 2  # else --set-threads job=4 network=4


ruleorder: job > network
wildcard_constraints:
    network="|".join(map(re.escape, FLAGS)),
    file="|".join(map(re.escape, JOBS)),
    seed="[0-9]+",


rule network:
    input: lambda w: data_files(FLAGS[w.network])
    output: [mark(f"{{network}}-{run}", "{seed}") for run in NETWORK]
    params: flags=lambda w: FLAGS[w.network], code=CODE
    threads: lambda w: threads_of(FLAGS[w.network])
    shell:
        PYTHON + "switch_distill.py {params.flags} --switch-at 0 1 --train-only --seeds {wildcards.seed}"
        " --out runs/{wildcards.network} && for mark in {output}; do ln -sfn logits.npz $mark; done"


rule job:
    input: lambda w: JOBS[w.file][1]
    output: "{file}"
    params: command=lambda w: JOBS[w.file][0], code=CODE
    threads: lambda w: threads_of(JOBS[w.file][0])
    shell: PYTHON + "{params.command}"
