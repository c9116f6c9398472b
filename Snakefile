# All figures as one graph of jobs: networks are trained seed by seed, then each figure is drawn of all its seeds.
#
#   snakemake --cores 2                     # as `make reproduce`, but for its page
#   snakemake fig1a fig1b --cores 2 --config data=cifar100 arch=resnet56 recipe=short seeds="0 1 2"
#   snakemake -n paper                      # lists what is missing of the paper's grid
#   snakemake results/paper/cifar10-resnet56/fig1a/claims.json --cores 4        # one figure of it
#
# With the same command an interrupted run goes on from its checkpoint, and a finished one is not trained again.
# Snakemake deletes a job's declared outputs before it repeats the job: so these are marks and drawn claims alone.
import os
import re
import sys
from shlex import quote

# ---------------------------------------------------------------- settings: --config NAME=VALUE

SETTINGS = {
    "data": "digits",
    "arch": "resnet8",
    "recipe": "",  # else quick; of the paper's grid: paper
    "seeds": "",  # else those of the tables below
    "data_dir": "data",
    "flags": "",  # more flags of all that trains on images
    "task": "sentiment",
    "glue_flags": "--student tiny",  # without the smaller student, for time
    "threads": "2",  # of a job; of digits 1
}
unknown = ", ".join(set(config) - set(SETTINGS))
if unknown:
    sys.exit(f"error: there is no setting {unknown}: use {', '.join(SETTINGS)}")
SETTINGS.update((name, str(value)) for name, value in config.items())
DATA = f"--data {quote(SETTINGS['data'])}"
DATA_DIR = f"--data-dir {quote(SETTINGS['data_dir'])}"
RECIPE = SETTINGS["recipe"] or "quick"
PAPER = SETTINGS["recipe"] or "paper"  # the grid's recipe, and its folder in runs/ and results/
NAME = re.sub(r"[^\w.+-]", "-", f"{SETTINGS['data']}-{SETTINGS['arch']}-{RECIPE}")
TASK = re.sub(r"[^\w.+-]", "-", SETTINGS["task"])

# ---------------------------------------------------------------- from tables to commands

SCRIPTS = {"fig1b": "switch_distill.py", "pays": "when_it_pays.py", "denoise": "denoise_gradients.py"}
KEPT = "--snapshot-at 0.05 0.1 0.25 0.5 0.75 0.9"  # the states from which these figures go on

NETWORKS = {}  # {name: flags}
RUNS = {}  # {run folder without its seed: (command, runs of the same seed that it needs)}
TRAINED = {}  # {folder of a figure: (command that trains for it, runs of the same seed that it needs)}
DRAWN = {}  # {file of a figure: (command that draws it, marks of all that it needs)}


def seeds_or(default):
    """The numbers of --config seeds, else of `default`."""
    return [int(seed) for seed in (SETTINGS["seeds"] or default).split()]


def add_network(name, flags, seeds, figures):
    """A teacher, its one-hot control and its student: runs/<name>-teacher-s0, -onehot-s0 and -kd-s0.

    figures: {figure: more flags}, in results/<name>/<figure>. Their scripts share these runs, and train only their own.
    """
    NETWORKS[name] = f"{flags} {KEPT if set(figures) & set(SCRIPTS) else ''} {DATA_DIR} --quiet {SETTINGS['flags']}"
    RUNS[f"runs/{name}-teacher"] = (f"train_teacher.py {NETWORKS[name]}", [])
    RUNS[f"runs/{name}-onehot"] = (f"train_student.py {NETWORKS[name]} --kd-weight 0 --ce-weight 1", [])
    add_student(name, name, name)
    for figure, more in figures.items():
        if figure == "fig1a":
            add_fig1a(name, name, name, seeds)
        else:
            folder = f"results/{name}/{figure}"
            command = f"{SCRIPTS[figure]} {NETWORKS[name]} {more} --out runs/{name} --results {folder}"
            add_figure(folder, command, seeds, [f"runs/{name}-{what}" for what in ("teacher", "onehot", "kd")])


def add_student(name, teacher, control):
    """runs/<name>-kd-s0: a student of one network, of the same kind as another, its control."""
    run = f"runs/{teacher}-teacher"
    RUNS[f"runs/{name}-kd"] = (f"train_student.py {NETWORKS[control]} --teacher {run}-s{{seed}}", [run])


def add_fig1a(name, teacher, control, seeds):
    """§3.1: Figure 1a of a student, its teacher and its control."""
    seeds = seeds_or(seeds)
    runs = {"teacher": f"{teacher}-teacher", "student": f"{name}-kd", "control": f"{control}-onehot"}
    command = f"analyze_deviation.py --title {quote(f'{name}, {len(seeds)} seed(s)')} --out results/{name}/fig1a"
    marks = []
    for flag, run in runs.items():
        folders = [f"runs/{run}-s{seed}" for seed in seeds]
        command += f" --{flag} {' '.join(folders)}"
        marks += [f"{folder}/.finished" for folder in folders]
    DRAWN[f"results/{name}/fig1a/claims.json"] = (command, marks)


def add_figure(folder, command, seeds, needed=(), file="claims.json"):
    """A figure whose script trains by itself, once the runs `needed` of the same seed are finished."""
    seeds = seeds_or(seeds)
    TRAINED[folder] = (command, needed)
    marks = [f"{folder}/.trained-s{seed}" for seed in seeds]
    DRAWN[f"{folder}/{file}"] = (f"{command} --seeds {' '.join(map(str, seeds))}", marks)


def add_text(name, folder, flags, seeds):
    folders = f"--out runs/{name} --results {folder}"
    add_figure(folder, f"glue_distill.py {flags} {DATA_DIR} --quiet {folders}", seeds, file="glue.json")


def add_eigenspace(name, data, seeds):
    folder = f"results/{name}/eigenspace"
    add_figure(folder, f"eigenspace.py {data} {DATA_DIR} --out {folder}", seeds)


# ---------------------------------------------------------------- the figures of `make reproduce`, on any data

# Fewer moments and points than the scripts take, for time.
figures = {"fig1a": "", "fig1b": "--switch-at 0 0.5 0.9 1", "pays": "--stop-at 0.1 1", "denoise": "--points 512"}
add_network(NAME, f"{DATA} --arch {SETTINGS['arch']} --recipe {RECIPE}", "0 1 2 3 4", figures)
add_eigenspace(NAME, DATA, "0 1 2 3 4")
add_text(TASK, f"results/glue-{TASK}", f"--task {quote(SETTINGS['task'])} {SETTINGS['glue_flags']}", "0 1 2")

# When does it pay? The same for whole teachers in other settings of digits: how far they fit decides what is seen.
VARIANTS = {
    "noise0.3-epochs50": "--label-noise 0.3 --epochs 50",
    "noise0.3-epochs100": "--label-noise 0.3 --epochs 100",
    "noise0.3-epochs150": "--label-noise 0.3 --epochs 150",
    "noise0.3-epochs150-width2": "--label-noise 0.3 --epochs 150 --width 2",
    "noise0.1-epochs150": "--label-noise 0.1 --epochs 150",
    "noise0-epochs200-subset200": "--label-noise 0 --epochs 200 --subset 200",
}
for name, flags in VARIANTS.items():
    add_network(f"variants/{name}", f"--data digits {flags}", "0 1 2 3 4", {"pays": "--stop-at 1"})

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
    "resnet56": (f"{CIFAR100} --arch resnet56 --epochs 50", "0", {"fig1a": ""}),
    "resnet20": (f"{CIFAR100} --arch resnet20 --epochs 50", "0", {}),
    "mobilenetv2": (f"{CIFAR100} --arch mobilenetv2 --epochs 50 --width 0.5", "0", {}),
}
for name, (flags, seeds, figures) in ROWS.items():
    add_network(f"rows/{name}", flags, seeds, figures)
for student in ("resnet20", "mobilenetv2"):
    add_student(f"rows/resnet56-{student}", "rows/resnet56", f"rows/{student}")
    add_fig1a(f"rows/resnet56-{student}", "rows/resnet56", f"rows/{student}", "0")

# All texts, with a pretrained encoder. Epochs: the shortest of 3, 5, 10, 20 after which the teacher fits 90%.
TEXT_ROWS = {"sst-2": (3, "0"), "cola": (3, "0 1 2"), "mrpc": (3, "0 1 2"), "rte": (3, "0 1 2")}
ENCODER = quote(f"{SETTINGS['data_dir']}/minilm")
for task, (epochs, seeds) in TEXT_ROWS.items():
    flags = f"--task {task} --teacher {ENCODER} --student {ENCODER} --epochs {epochs} --precision bf16"
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
    teacher = f"{PAPER}/{data}-resnet56"
    for arch, figures in (("resnet56", of_resnet56), ("resnet20", of_resnet20), ("mobilenetv2", {})):
        add_network(f"{PAPER}/{data}-{arch}", f"{flags} --arch {arch} --recipe {PAPER}", "0 1 2", figures)
    for arch in ("resnet20", "mobilenetv2"):
        add_student(f"{teacher}-{arch}", teacher, f"{PAPER}/{data}-{arch}")
        add_fig1a(f"{teacher}-{arch}", teacher, f"{PAPER}/{data}-{arch}", "0 1 2")
# §3.1, language. Departures: texts are cut at 128 tokens; the paper's RoBERTa-medium and -small are not public, and
# DistilRoBERTa and a model from scratch stand for them. Assumption: these pairs.
for task in "mnli imdb qqp ag_news cola sst-2 mrpc rte qnli".split():
    flags = f"--task {task} --teacher roberta-base --student roberta-base distilroberta/distilroberta-base small"
    add_text(f"{PAPER}/{task}", f"results/{PAPER}/{task}", flags, "0 1 2")
# §4.
add_eigenspace(f"{PAPER}/cifar10", "--data cifar10 --subset 1000", "0 1 2")

# ---------------------------------------------------------------- targets

TARGETS = {  # {target: what the names of its figures' files begin with}
    "reproduce": (f"results/{NAME}/", f"results/glue-{TASK}/"),
    "fig1a": f"results/{NAME}/fig1a/",  # §3.1
    "fig1b": f"results/{NAME}/fig1b/",  # §3.2
    "fig-pays": f"results/{NAME}/pays/",  # the title's question
    "fig-eigenspace": f"results/{NAME}/eigenspace/",  # §4
    "fig-denoise": f"results/{NAME}/denoise/",  # §5
    "fig-glue": f"results/glue-{TASK}/",  # §3.1, language
    "variants": "results/variants/",
    "cpu": "results/rows/",
    "paper": f"results/{PAPER}/",
}
for row in {file.split("/")[2] for file in DRAWN if file.startswith("results/rows/")}:
    TARGETS[row] = f"results/rows/{row}/"
for target, beginning in TARGETS.items():
    rule:
        name: target
        input: [file for file in DRAWN if file.startswith(beginning)]

# ---------------------------------------------------------------- jobs

# The scripts beside this file, with the Python that runs it.
SCRIPT_DIR = os.path.relpath(workflow.basedir) + "/"
PYTHON = quote(sys.executable) + " " + quote(SCRIPT_DIR).removeprefix("./")


def finished(runs, seed):
    """The marks of run folders: links to their logits, which are written last, and gone or newer with them."""
    return [f"{run}-s{seed}/.finished" for run in runs]


def threads_of(command):
    """Small networks gain nothing from more threads than one, and one rounds alike on every machine."""
    small = "digits" in command or "sentiment" in command
    return 1 if small else int(SETTINGS["threads"])


wildcard_constraints:
    run="|".join(map(re.escape, RUNS)),
    folder="|".join(map(re.escape, TRAINED)),
    file="|".join(map(re.escape, DRAWN)),
    seed="[0-9]+",


rule run:
    input: lambda w: finished(RUNS[w.run][1], w.seed)
    output: "{run}-s{seed}/.finished"
    params: command=lambda w: RUNS[w.run][0]
    threads: lambda w: threads_of(RUNS[w.run][0])
    shell:
        PYTHON + "{params.command} --seeds {wildcards.seed} --out {wildcards.run}-s{wildcards.seed}"
        " && ln -sfn logits.npz {output}"


rule train:
    input: lambda w: finished(TRAINED[w.folder][1], w.seed)
    output: "{folder}/.trained-s{seed}"
    params: command=lambda w: TRAINED[w.folder][0]
    threads: lambda w: threads_of(TRAINED[w.folder][0])
    shell: PYTHON + "{params.command} --seeds {wildcards.seed} --train-only && date > {output}"


rule draw:
    input: lambda w: DRAWN[w.file][1]
    output: "{file}"
    params: command=lambda w: DRAWN[w.file][0]
    threads: lambda w: threads_of(DRAWN[w.file][0])
    shell: PYTHON + "{params.command}"
