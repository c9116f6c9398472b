"""The paper's whole grid as one list: every setting of §3 to §5, the runs that each needs, and what they share.

    python paper.py --dry-run                               # every run, its state, and the time that it takes on this device
    python paper.py --recipe short --only image/cifar100/   # a part, by the names that --dry-run prints
    python paper.py --shard 0/4                             # a quarter of the training (in a job array: --shard $SLURM_ARRAY_TASK_ID/4)
    python paper.py                                         # all that is missing, and the figures

The grid stands below; edit it there. Each entry is a few commands of the other scripts, and a run folder is trained once: one
teacher serves all of its students, one one-hot control all students of its architecture, data and seed. Students of one teacher
and seed see the same views and look its logits up in the same tables (RUNS/teacher-logits; delete them when the grid is done).
Interrupted, the same command goes on. An entry that fails is named at the end, the others go on, and the exit code is 1. A figure
is drawn again when its runs or its command have changed; for another reason, delete its folder.

Shards need no coordinator, only the same --seeds and one --runs folder: all runs of a dataset (or task) and a seed belong to one
shard. Let one of them fetch the data first. Figures need all seeds, so shards only train (but eigenspace.py, which has no runs).

--dry-run needs no data and writes nothing. It times 20 training steps on random images (tokens) for each network still to be
trained. Its estimate is the median step, with a teacher forward in every step of distillation (a table of teacher logits saves up to a
quarter), plus a third of a step for as many test images; loading, checkpoints, measuring and drawing come on top. Expected: the
scripts' own docstrings have the numbers. The whole grid (351 runs with three seeds) has not been run by its authors.
"""
import argparse
import functools
import json
import math
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F

import benchmark
import common
import denoise_gradients
import switch_distill
from train_student import add_student_flags

# ---------------------------------------------------------------- the grid

# §3.1, images. name: flags, training images, test images, side, classes
DATASETS = {
    "cifar10": ("--data cifar10", 50_000, 10_000, 32, 10),
    "cifar100": ("--data cifar100", 50_000, 10_000, 32, 100),
    "cifar100-noisy": ("--data cifar100 --label-noise 0.2", 50_000, 10_000, 32, 100),
    "tiny-imagenet": ("--data tiny-imagenet", 100_000, 10_000, 64, 200),
}

# Teacher, student, on every dataset: self-distillation, then every cross pair. Assumption: the paper reports 18 image settings;
# which cross pairs are among them could not be checked, so all 4 · 9 stand here.
PAIRS = (
    ("resnet56", "resnet56"), ("resnet20", "resnet20"), ("mobilenetv2", "mobilenetv2"),
    ("resnet56", "resnet20"), ("resnet56", "mobilenetv2"), ("mobilenetv2", "resnet20"),
    ("mobilenetv2", "resnet56"), ("resnet20", "resnet56"), ("resnet20", "mobilenetv2"),
)

# §3.1, language. GLUE task: training texts, dev texts, about how many tokens a text has under RoBERTa's BPE (for estimates alone)
TASKS = {
    "cola": (8_551, 1_043, 12), "sst-2": (67_349, 872, 13), "mrpc": (3_668, 408, 54), "rte": (2_490, 277, 68),
    "qnli": (104_743, 5_463, 50), "qqp": (363_846, 40_430, 30), "mnli": (392_702, 9_815, 40),
}

# Departure: the paper's RoBERTa-medium and -small are the authors' own and not public; DistilRoBERTa stands for the smaller student.
# The sizes of glue_distill.py that start from random weights may be named too.
LANGUAGE_PAIRS = (("roberta-base", "roberta-base"), ("roberta-base", "distilroberta/distilroberta-base"))
LAYERS = {"roberta-base": 12, "distilroberta/distilroberta-base": 6}   # for estimates alone

# §3.2: switching both ways, with self-distillation. Assumption: these two datasets; any of the above may be added.
SWITCHING = (("cifar100", "resnet56"), ("tiny-imagenet", "resnet56"))
SWITCH_AT = (0, 0.25, 0.5, 0.75, 0.9, 1)

# §4: all levels of eigenspace.py. name: its flags
EIGENSPACE = {"digits": "--data digits", "cifar10": "--data cifar10 --subset 1000"}

# §5, with self-distillation, on random points: per-example gradients of all of CIFAR would take hours at each checkpoint.
DENOISING = (("cifar100", "resnet20"), ("cifar100-noisy", "resnet20"))
DENOISE_AT = (0.05, 0.25, 0.5)
DENOISE_POINTS = 512

SECTIONS = ("image", "language", "switching", "eigenspace", "denoising")


def units(seeds):
    """[(dataset or task, seed)]: what a shard takes as a whole, for runs share teachers and controls only within one of these."""
    return [(group, seed) for group in (*DATASETS, *TASKS) for seed in seeds] + [(f"eigenspace/{name}", None) for name in EIGENSPACE]


# ---------------------------------------------------------------- from the grid to commands


class Run(NamedTuple):
    """One run folder."""
    folder: Path
    flags: dict            # what its config.json must say
    epochs: int            # of its schedule
    per_epoch: int         # steps
    test: float            # test images over training images
    unit: Any              # unit() -> seconds of training here for one image or token, or None
    units: int             # of these in a step
    teacher: Path = None   # its teacher's run folder
    share: float = 1.0     # of the epochs that it takes itself: the last ones, when it branches off another run


class Command(NamedTuple):
    """One call of a script. {scrap} in its words is a folder that is thrown away: some scripts do not train without drawing."""
    words: tuple
    runs: tuple          # all run folders that it makes or reads
    draws: Path = None   # where its results go; None when it only trains


def expand(args, shard=None):
    """[(entry name, [Command])] of the whole grid, or of shard (i, n) without what needs all seeds. Reads and writes no run."""
    found, mine = [], [unit for k, unit in enumerate(units(args.seeds)) if shard is None or k % shard[1] == shard[0]]
    for group in dict.fromkeys(group for group, _ in mine):
        seeds = [seed for of, seed in mine if of == group]
        if group in DATASETS or group in TASKS:
            found += (image_entries if group in DATASETS else language_entries)(args, group, seeds, shard is None)
        else:
            out = Path(args.results) / group
            found.append((group, [Command(("eigenspace.py", *EIGENSPACE[out.name].split(), "--data-dir", args.data_dir, "--device", args.device,
                                           "--seeds", *map(str, args.seeds), "--out", str(out)), (), out)]))
    return sorted(found, key=lambda entry: SECTIONS.index(entry[0].partition("/")[0]))


@functools.lru_cache(maxsize=None)
def settings(words, script="train_student.py"):
    """The flags that train_student.py or train_teacher.py makes of `words`, as config.json will have them; not to be changed."""
    parser = common.Parser(None)
    common.add_flags(parser)
    if script == "train_student.py":
        add_student_flags(parser)
    found = common.resolve(parser.parse_args(words))
    found.label_noise = found.label_noise or 0.0
    if vars(found).get("kd_weight") == 0:
        found.temperature = None   # one-hot students have none
    return found


def image_entries(args, name, seeds, draw):
    """Entries of one dataset: distillation, switching and denoising, with common teachers, controls and self-distilled students."""
    flags, n, n_test, side, classes = DATASETS[name]
    words = (*args.extra, *flags.split(), "--data-dir", args.data_dir, "--recipe", args.recipe, "--device", args.device)
    per_seed = ("--quiet", "--seeds", *map(str, seeds))

    def base(t, s):   # of run folders; the first form is that of the Makefile
        return f"{args.runs}/{name}-{s if t == s else f'{t}-{s}'}-{args.recipe}"

    def run(folder, flags, t=None, seed=None, epochs=None, share=1.0):
        images = flags.subset or n
        per_epoch, total = common.total_steps(flags, SimpleNamespace(y_train=range(images)))
        size = min(flags.batch_size, images)
        step = functools.partial(image_seconds, flags.arch, t, flags.width, side, classes, size, flags.precision, flags.device, flags.fast)
        compared = {key: value for key, value in json.loads(json.dumps(vars(flags))).items() if key not in common.NOT_COMPARED}
        return Run(folder, dict(arch=flags.arch) if epochs else compared, epochs or total // per_epoch, per_epoch, n_test / images, step, size,
                   Path(f"{base(t, t)}-teacher-s{seed}") if t else None, share)

    def train(what, s, t=None, *more):
        script, out = f"train_{'teacher' if what == 'teacher' else 'student'}.py", f"{base(t or s, s)}-{what}-s"
        # States of the trunks, for switching and denoising to go on from.
        kept = {at for at in SWITCH_AT if 0 < at < 1 and (name, s) in SWITCHING} | {at for at in DENOISE_AT if (name, s) in DENOISING}
        if kept and (what == "onehot" or t == s):
            more += ("--snapshot-at", *map(str, sorted(kept)))
        given = (*words, "--arch", s, *more, *per_seed)
        return Command((script, *given, "--out", out + "{seed}"), tuple(run(Path(f"{out}{seed}"), settings(given, script), t, seed) for seed in seeds))

    def three(t, s):
        """The commands that train a teacher, the one-hot control and the student."""
        flags, above = settings((*words, "--arch", s)), Path(args.runs).absolute()
        # A table of teacher logits pays off from the second student on; they are kept where they are a small part of the free disk.
        free = shutil.disk_usage(next(folder for folder in (above, *above.parents) if folder.exists())).free
        cache = "on" if 4 * classes * (flags.subset or n) * flags.epochs < free / 20 else "auto"
        return [train("teacher", t), train("onehot", s, None, "--kd-weight", "0", "--ce-weight", "1"),
                train("kd", s, t, "--teacher", f"{base(t, t)}-teacher-s{{seed}}", "--teacher-cache", cache)]

    def finish(entry, commands, last, flag, in_shard, runs=()):
        """The entry with its last command, which draws into its `flag`; in a shard nowhere, as fast as the flags `in_shard` make it."""
        out = Path(args.results) / f"{entry}-{args.recipe}"
        last += (flag, str(out)) if draw else (flag, "{scrap}", *in_shard)
        return entry, commands + [Command(last, sum((command.runs for command in commands), ()) + tuple(runs), out if draw else None)]

    for t, s in PAIRS:
        entry, commands = f"image/{name}/{t}-{s}", three(t, s)
        groups = [(flag, *(str(run.folder) for run in command.runs)) for flag, command in zip(("--teacher", "--control", "--student"), commands)]
        analysis = ("analyze_deviation.py", "--title", f"{name}, {t} → {s}, {args.recipe} recipe, {len(seeds)} seed(s)")
        yield finish(entry, commands, sum(groups, analysis), "--out", ()) if draw else (entry, commands)

    for arch in [arch for of, arch in SWITCHING if of == name]:
        commands, branches = three(arch, arch), []
        total = commands[0].runs[0].epochs * commands[0].runs[0].per_epoch
        steps, options = {at: round(at * total) for at in SWITCH_AT}, SimpleNamespace(direction=list(switch_distill.SWITCHES), window=0)
        for seed in seeds:
            for (direction, at), folder in switch_distill.run_folders(base(arch, arch), options, seed, steps, total)[0].items():
                if steps[at] not in (0, total):
                    kd = direction == "onehot2kd"
                    flags = settings((*words, "--arch", arch))   # with the weights of the second part
                    flags = argparse.Namespace(**dict(vars(flags), kd_weight=float(kd), ce_weight=float(not kd)))
                    branches.append(run(folder, flags, arch if kd else None, seed, share=1 - at))
        yield finish(f"switching/{name}/{arch}", commands, ("switch_distill.py", *words, "--arch", arch, *per_seed, "--switch-at", *map(str, SWITCH_AT),
                                                            "--out", base(arch, arch)), "--results", ("--bootstrap", "100"), branches)

    for arch in [arch for of, arch in DENOISING if of == name]:
        own, place = [], argparse.Namespace(**vars(settings((*words, "--arch", arch))))
        place.runs, place.smooth = f"{base(arch, arch)}-denoise", None   # its own: that script's names do not tell the label noise
        for seed in seeds:
            own.append(run(denoise_gradients.student_folder("smooth", place, seed), place, epochs=place.epochs))
            own += [run(denoise_gradients.teacher_folder(place, seed, epochs), place, epochs=epochs)
                    for epochs in sorted({max(1, round(place.epochs * part)) for part in (0.04, 0.25)} - {place.epochs})]
        given = sum(((f"--{what}", f"{base(arch, arch)}-{what}-s{{seed}}") for what in ("teacher", "onehot", "kd")), ())
        yield finish(f"denoising/{name}/{arch}", three(arch, arch), ("denoise_gradients.py", *words, "--arch", arch, *per_seed, *given, "--runs", place.runs,
                     "--percents", *(f"{100 * at:g}" for at in DENOISE_AT), "--points", str(DENOISE_POINTS)), "--out", ("--points", "8", "--batches", "2"), own)


def language_entries(args, task, seeds, draw):
    """Entries of one GLUE task; glue_distill.py trains and draws, and its pairs share the teacher and the controls."""
    n, n_dev, tokens = TASKS[task]
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    for flag, default in (("--epochs", 3), ("--batch-size", 32), ("--subset", 0)):
        parser.add_argument(flag, type=int, default=default)
    given, device = parser.parse_known_args(args.glue_extra)[0], common.resolve_device(args.device)
    for t, s in LANGUAGE_PAIRS:
        one, two, runs, texts = Path(t).name, Path(s).name, [], given.subset or n
        for seed in seeds:
            for what, arch in ((f"{one}-teacher", t), (f"{two}-onehot", s), (f"{one}-{two}-kd", s)):   # as glue_distill.py names them
                runs.append(Run(Path(f"{args.runs}/{task}-{what}-s{seed}"), dict(vars(given), task=task, arch=arch), given.epochs, math.ceil(texts / given.batch_size),
                                n_dev / texts, functools.partial(token_seconds, LAYERS.get(arch), device), given.batch_size * tokens,
                                Path(f"{args.runs}/{task}-{one}-teacher-s{seed}") if what.endswith("-kd") else None))
        entry = f"language/{task}/{one}-{two}"
        out = Path(args.results) / entry
        yield entry, [Command(("glue_distill.py", *args.glue_extra, "--task", task, "--data-dir", args.data_dir, "--device", args.device, "--teacher", t, "--student", s,
                               "--mode", "onehot", "kd", "--quiet", "--seeds", *map(str, seeds), "--out", f"{args.runs}/{task}",
                               *(("--results", str(out)) if draw else ("--results", "{scrap}", "--bootstrap", "100"))), tuple(runs), out if draw else None)]


def select(args, shard):
    """The entries of the grid, or of one shard, whose names hold one of --only."""
    return [entry for entry in expand(args, shard) if not args.only or any(part in entry[0] for part in args.only)]


def unique_runs(entries):
    """{run folder: (section, Run)}: every run once, under the first entry that needs it."""
    found = {}
    for name, run in [(name, run) for name, commands in entries for command in commands for run in command.runs]:
        found.setdefault(run.folder, (name.partition("/")[0], run))
    return found


# ---------------------------------------------------------------- states


def state(run):
    """(what the run folder holds, in words; epochs done), from its config.json and metrics.jsonl alone."""
    try:
        if not (run.folder / "config.json").exists() or common.read_json(run.folder / "config.json") == common.DISCARDED:
            return "not started", 0
        flags = common.read_config(run.folder)["flags"]
        differing = [f"{key} {flags.get(key)!r} there, {value!r} here" for key, value in run.flags.items() if flags.get(key) != value]
        if differing:
            return f"other settings: {'; '.join(differing[:2])}", 0
        if (run.folder / "logits.npz").exists():
            return "finished", run.epochs
        done = common.read_metrics(run.folder)[-1]["epoch"] if (run.folder / "metrics.jsonl").exists() else 0
        return f"at epoch {done} of {run.epochs}", done
    except common.InputError as error:
        return f"damaged: {common.first_line(error)}", 0


def up_to_date(command):
    """Whether nothing is left to do: all runs finished, none older than its teacher, and the results of this very command newer."""
    def age(folder):
        return (folder / "logits.npz").stat().st_mtime_ns if (folder / "logits.npz").exists() else math.inf
    if any(state(run)[0] != "finished" or run.teacher and age(run.teacher) > age(run.folder) for run in command.runs):
        return False   # in doubt the script decides
    record = command.draws and command.draws / "paper.json"
    return not record or record.exists() and common.read_json(record) == {"command": list(command.words)} and (
        record.stat().st_mtime_ns >= max((age(run.folder) for run in command.runs), default=0))


# ---------------------------------------------------------------- calibration

STEPS = 20
CPU_BATCH = 32   # a CPU takes about the same time for an image in any batch; 20 steps of ResNet-56 at 1,024 would take many minutes


@functools.lru_cache(maxsize=None)
def image_seconds(arch, teacher_arch, width, side, classes, batch, precision, device, fast):
    """Seconds that a step of `common.training` takes for each of its (random) images, with a forward of the teacher where there is one.

    With --fast on CUDA the step is one CUDA graph, but not compiled: that saves time, and takes a minute for each network.
    """
    size = batch if device == "cuda" else min(batch, CPU_BATCH)
    data = benchmark.random_data(size, device, side, classes=classes)
    model, *teacher = [common.build_model(name, classes, (side, side, 3), width).to(device).to(memory_format=torch.channels_last)
                       for name in (arch, teacher_arch) if name]
    source = common.TeacherLogits(teacher[0].eval(), data, precision) if teacher else None
    graph = fast and device == "cuda"
    optimizer = torch.optim.SGD(model.parameters(), torch.tensor(0.01, device=device) if graph else 0.01, 0.9, weight_decay=5e-4, nesterov=True, fused=device == "cuda")
    sums = torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.long, device=device)

    def loss_fn(logits, labels, teacher_logits, ce_weight, kd_weight):
        return F.cross_entropy(logits, labels) if teacher_logits is None else common.kd_loss(logits, teacher_logits, 4.0)

    step = common.training_step(model, optimizer, data, loss_fn, source, precision, sums)
    step = common.captured_step(step, model, optimizer, size, sums) if graph else step
    return benchmark.timed(lambda: step(data.index, torch.zeros_like(data.index), 1.0, 0.0, None if teacher else False), device, STEPS) / size


@functools.lru_cache(maxsize=None)
def token_seconds(layers, device):
    """Seconds of training per token of a RoBERTa of base width, from random weights; None without transformers, or layers."""
    try:
        from transformers import RobertaConfig, RobertaForSequenceClassification
    except ImportError:
        layers = None
    if layers is None:
        return None
    network = RobertaForSequenceClassification(RobertaConfig(vocab_size=50_265, num_hidden_layers=layers, max_position_embeddings=514, type_vocab_size=1)).to(device).train()
    optimizer = torch.optim.AdamW(network.parameters(), 2e-5, fused=True)
    ids = torch.randint(5, 50_265, (32, 64) if device == "cuda" else (8, 32), generator=torch.Generator().manual_seed(0)).to(device)

    def step():
        with torch.autocast(device, torch.bfloat16, enabled=device == "cuda"):   # as glue_distill.py chooses
            logits = network(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
        F.cross_entropy(logits.float(), torch.zeros_like(ids[:, 0])).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    return benchmark.timed(step, device, STEPS) / ids.numel()


# ---------------------------------------------------------------- dry run


def seconds_left(run):
    """Estimated seconds of what is left of a run, or None."""
    epochs = min(run.epochs * run.share, run.epochs - state(run)[1])
    unit = run.unit() if epochs else 0.0
    return None if unit is None else epochs * run.per_epoch * run.units * unit * (1 + run.test / 3)


def in_words(seconds):
    """A time for the eye; a list of times as their sum, and how many of them are unknown (None)."""
    if isinstance(seconds, list):
        known = [value for value in seconds if value is not None]
        return f"{in_words(sum(known))} left" + (f", and {len(seconds) - len(known)} not estimated" if len(known) < len(seconds) else "")
    for unit, size, most in (("s", 1, 90), ("min", 60, 90), ("h", 3600, 48), ("d", 86400, math.inf)):
        if seconds is not None and seconds < most * size:
            return f"{seconds / size:.{int(unit in 'hd')}f} {unit}"
    return "not estimated"


def dry_run(args, entries):
    """Print every run with its state and estimated time, then totals."""
    first, states, left = unique_runs(entries), {}, {}
    width = max((len(str(folder)) for folder in first), default=0)
    for name, commands in entries:
        print(name)
        for run in [run for command in commands for run in command.runs if run.folder not in states]:
            if run.folder not in states:
                states[run.folder], left[run.folder] = state(run)[0], seconds_left(run)
                print(f"  {str(run.folder):{width}}  {states[run.folder]:18}  {in_words(left[run.folder])}", flush=True)
        for command in [command for command in commands if command.draws]:
            print(f"  {str(command.draws):{width}}  {'drawn' if up_to_date(command) else 'not drawn'}")
    print()
    for section in (*dict.fromkeys(name.partition("/")[0] for name, _ in entries), "all"):
        folders = [folder for folder, (of, _) in first.items() if section in (of, "all")]
        count, finished = sum(section in (name.partition("/")[0], "all") for name, _ in entries), sum(states[folder] == "finished" for folder in folders)
        print(f"{section:10}  {count:3} entries  {len(folders):4} runs, {finished} finished, {in_words([left[folder] for folder in folders])}")
    for k in range(args.shard[1] if args.shard else 0):
        runs = [run for _, run in unique_runs(select(args, (k, args.shard[1]))).values()]
        print(f"shard {k}/{args.shard[1]}  {len(runs)} runs, {in_words([seconds_left(run) for run in runs])}")
    cuda = common.resolve_device(args.device) == "cuda"
    print(f"Times: one run after the other on {torch.cuda.get_device_name() if cuda else f'this CPU with {torch.get_num_threads()} thread(s)'}, from {STEPS} steps of each network"
          + ("" if cuda else f", in batches of at most {CPU_BATCH}, scaled by the image") + "; eigenspace.py and the measuring of denoise_gradients.py are not estimated.")


# ---------------------------------------------------------------- running


def execute(command):
    """Run a command to its end. Returns None, or the line that says why it failed. Interrupted, the script saves first."""
    script, *words = command.words
    scrapped = "{scrap}" in command.words   # then its tables, of some of the seeds alone, are not shown either
    print("$", shlex.join(["python", *command.words]), *["(for its runs alone, which report to their metrics.jsonl)"] * scrapped, flush=True)
    stopped, last = [], ""
    with tempfile.TemporaryDirectory() as scrap:
        process = subprocess.Popen([sys.executable, str(Path(__file__).resolve().parent / script), *(word.replace("{scrap}", scrap) for word in words)],
                                   stdout=subprocess.DEVNULL if scrapped else None, stderr=subprocess.PIPE, text=True, errors="replace")

        def stop(number, frame):
            stopped.append(number)
            if number == signal.SIGTERM:   # a terminal sends its SIGINT to both
                process.terminate()
        handlers = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            for line in filter(str.strip, process.stderr):
                print(line, end="", file=sys.stderr, flush=True)
                last = line.strip() if line.startswith("error: ") or not last.startswith("error: ") else last
            code = process.wait()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
    if stopped or code == 130:
        common.exit_interrupted()
    if code:
        return f"{script} was killed by signal {-code}, perhaps for lack of memory" if code < 0 else last or f"{script} ended with code {code}"
    if command.draws:
        common.write_json(command.draws / "paper.json", dict(command=command.words))


def extra(text):
    """argparse type of more flags in one string."""
    words = shlex.split(text)
    taken = "data label-noise arch task teacher student mode out results recipe seeds seed data-dir device".split()
    if wrong := {word.partition("=")[0] for word in words} & {f"--{name}" for name in taken}:
        raise argparse.ArgumentTypeError(f"{min(wrong)} is set by the grid of paper.py: edit it there, or use the flag of paper.py")
    return tuple(words)


def main(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="print every run, its state and its estimated time on this device, and stop")
    add("--recipe", choices=("paper", "short", "quick"), default="paper", help="recipe of the image runs; language has one of its own")
    add("--seeds", "--seed", type=common.number(int, 0), nargs="+", default=[0, 1, 2], help="every entry is trained once for each seed")
    add("--only", nargs="+", default=[], help="only entries whose names contain one of these, such as switching/ or /cifar100/resnet56-")
    add("--shard", type=common.shard, help="i/n: train the i-th (from 0) of n parts that share no run folder, and draw nothing")
    add("--data-dir", default="data", help="where prepared or original datasets lie, and downloads go")
    add("--runs", default="runs", help="folder of the run folders")
    add("--results", default="results/paper", help="folder for figures, tables and claims")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA where it is")
    add("--extra", type=extra, default=(), help='more flags for all image runs, of train_teacher.py: --extra="--epochs 1 --subset 200"')
    add("--glue-extra", type=extra, default=(), help="more flags for glue_distill.py, likewise")
    args = parser.parse_args(argv)
    common.check_seeds(args.seeds)
    if not select(args, None):
        raise common.InputError(f"no entry's name contains {' or '.join(args.only)}: --dry-run prints them; they start with {'/, '.join(SECTIONS)}/")
    entries = select(args, args.shard)
    if args.dry_run:
        return dry_run(args, entries)

    outcomes, failed = {}, {}   # of commands: None or what went wrong; of entries
    for name, commands in entries:
        print(f"{name}{': finished already' if all(map(up_to_date, commands)) else ''}", flush=True)
        for command in commands:
            if command.words not in outcomes:   # entries share commands
                outcomes[command.words] = None if up_to_date(command) else execute(command)
            if outcomes[command.words]:
                failed[name] = outcomes[command.words].removeprefix("error: ")
                break
    print(f"{len(entries) - len(failed)} of {len(entries)} entries are done" +
          ("; a shard draws nothing: when all are done, the same command without --shard does" if args.shard else ""))
    for name, why in failed.items():
        print(f"{name} failed: {why}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    common.cli(main)
