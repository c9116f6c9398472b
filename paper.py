"""The paper's whole grid as one list: every setting of §3 to §5, the commands that make it, and what is missing.

    python paper.py --dry-run                               # every run, its state, and the time that it takes here
    python paper.py --recipe short --only image/cifar100/   # a part, by the names that --dry-run prints
    python paper.py --shard 0/4                             # a quarter of the training, without figures
    python paper.py --recipe cpu                            # a grid of its own, for two cores

The grid stands below, to be edited there. A run folder is trained once, for all entries. Interrupted, the same command
goes on; an entry that fails is named at the end (exit code 1). A figure is drawn again when one of its runs is newer.
Shards need the same flags and one --runs folder: all runs of a dataset (or task) and a seed belong to one of them. Let
one fetch the data first; when all are done, the command without --shard draws. --dry-run needs no data and writes
nothing: it times a few steps of each network on random images. Its authors have not run the paper's whole grid.
"""

import argparse
import functools
import io
import json
import shlex
import subprocess
import sys
from collections import Counter
from datetime import timedelta
from pathlib import Path
from typing import NamedTuple

import benchmark
import common
import engine
import runs

# ---------------------------------------------------------------- the grid

# §3.1, images. To add a dataset or network: a line here, or a line in `grid` for pairs of its own.
IMAGES = {
    "cifar10": "--data cifar10",
    "cifar100": "--data cifar100",
    "cifar100-noisy": "--data cifar100 --label-noise 0.2",
    "tiny-imagenet": "--data tiny-imagenet",
    # A folder, or a link to one, with train/<class>/ and val/<class>/. Assumption: the usual 90 epochs (Goyal et al.
    # 2017), with batch and warm-up of the recipe. Departure: shifted and mirrored views of one centre crop instead of
    # crops of random size.
    "imagenet": "--data folder:{data_dir}/imagenet --image-size 224 --epochs 90 --lr 0.4 --schedule step "
    "--milestones 30 60 80 --weight-decay 1e-4",
}
# (teacher, student): self-distillation and every cross pair. Assumption: the paper reports 18 image settings; which
# cross pairs are among them could not be checked.
NETWORKS = ("resnet56", "resnet20", "mobilenetv2")
PAIRS = [(teacher, student) for teacher in NETWORKS for student in NETWORKS]
IMAGENET = [(f"torchvision:resnet{one}", f"torchvision:resnet{two}") for one, two in ((50, 50), (50, 18), (18, 18))]

# §3.1, language: the tasks of the published version, then those of the ICLR version and QNLI. Departure: texts are cut
# at 128 tokens, IMDB's too, unless --glue-extra="--max-length 512".
TASKS = ("mnli", "imdb", "qqp", "ag_news", "cola", "sst-2", "mrpc", "rte", "qnli")
# Departure: the paper's RoBERTa-medium and -small are the authors' own and not public. DistilRoBERTa stands for medium;
# a model from scratch, pretrained on the task's own sentences alone, stands for small. Assumption: these pairs.
MEDIUM, SMALL = "distilroberta/distilroberta-base", "small"
LANGUAGE_PAIRS = [("roberta-base", student) for student in ("roberta-base", MEDIUM, SMALL)]

# §3.2: (dataset, network), switched both ways at these shares of training. Assumption: these two datasets.
SWITCHING = [("cifar100", "resnet56"), ("tiny-imagenet", "resnet56")]
SWITCH_AT = (0.25, 0.5, 0.75, 0.9)

# §4: all levels of eigenspace.py.
EIGENSPACE = {"digits": "--data digits", "cifar10": "--data cifar10 --subset 1000"}

# §5, on random points: per-example gradients of all of CIFAR would take hours at each checkpoint.
DENOISING = [("cifar100", "resnet20"), ("cifar100-noisy", "resnet20")]
DENOISE_AT, DENOISE_POINTS = (0.05, 0.25, 0.5), 512

# --recipe cpu: epochs of each dataset, the shortest of 50, 100, 150, 200 … epochs after which the teacher fits at least
# 90% of its training labels, noisy ones included; nothing else is looked at. CIFAR-10 in 50 epochs fits 98%,
# noisy CIFAR-100 in 100 epochs 86%.
CPU = {"cifar100": 100, "cifar100-noisy": 150, "cifar10": 50, "tiny-imagenet": 100}


def grid(args):
    """[Entry]: all of the above, in the paper's order."""
    args.seeds = args.seeds or [0, 1, 2]
    found = [image(args, data, *pair) for data in IMAGES for pair in (IMAGENET if data == "imagenet" else PAIRS)]
    found += [language(args, task, *pair) for task in TASKS for pair in LANGUAGE_PAIRS]
    found += [switching(args, *setting) for setting in SWITCHING]
    found += [eigenspace(args, name) for name in EIGENSPACE]
    return found + [denoising(args, *setting) for setting in DENOISING]


def cpu_grid(args):
    """[Entry]: --recipe cpu, in this order, with two seeds or one unless --seeds says others.

    Departures from the paper: 10,000 images (of Tiny-ImageNet all, of the classes that its prepared copy holds),
    learning rate and schedule of the quick recipe, and a RoBERTa of 4 layers from scratch.
    """
    one, two = (argparse.Namespace(**vars(args) | dict(seeds=args.seeds or seeds)) for seeds in ([0], [0, 1]))
    return [
        switching(two, "cifar100", "resnet20"),
        switching(two, "cifar100-noisy", "resnet20"),
        image(one, "cifar100", "resnet56", "resnet20"),
        image(one, "cifar100", "resnet56", "mobilenetv2"),
        switching(two, "cifar10", "resnet20"),
        language(two, "sst-2", "4x256", "4x256"),
        switching(one, "tiny-imagenet", "resnet20"),
    ]


# ---------------------------------------------------------------- from the grid to commands


class Run(NamedTuple):
    """A run folder, and what its time depends on."""

    folder: Path
    what: str  # teacher, onehot, kd, onehot2kd-0.5, …
    seed: int
    flags: argparse.Namespace | None = None  # as in its config.json; None for text, whose time is not estimated
    teacher: str | None = None  # its teacher's architecture
    share: float = 1.0  # of the epochs: a branch of another run trains the last ones alone


# What trains nothing that the commands before have not: a shard leaves it out.
DRAWING = ("analyze_deviation.py", "when_it_pays.py")


class Entry(NamedTuple):
    """One setting of the paper. Entries share run folders only where the second part of their names is the same."""

    name: str
    seeds: list
    commands: list  # of words; all but DRAWING train
    runs: list
    results: list  # folders in which the commands leave claims.json


def short(name):
    """A network's name within the name of a folder."""
    return name.rpartition(":")[2].rpartition("/")[2]


def base(args, data, teacher, student=None):
    """What the names of run folders begin with; the Makefile's are the same."""
    name = "-".join([data, *dict.fromkeys([short(teacher), short(student or teacher)])])
    return f"{args.runs}/cpu-{name}" if args.recipe == "cpu" else f"{args.runs}/{name}-{args.recipe}"


def seeded(args, prefix, what, *more):
    """[Run]: <prefix>-<what>-s<seed> of every seed."""
    return [Run(Path(f"{prefix}-{what}-s{seed}"), what, seed, *more) for seed in args.seeds]


def make_entry(args, name, commands, found, *figures):
    """The Entry with the claims of `figures`, folders below that of its results."""
    return Entry(name, args.seeds, commands, found, [Path(args.results, name, figure) for figure in figures])


def shared_words(args):
    return ["--data-dir", args.data_dir, "--device", args.device, "--seeds", *map(str, args.seeds)]


def image_words(args, data, arch):
    """The flags that all commands of a dataset and network share."""
    words = [word.format(data_dir=args.data_dir) for word in IMAGES[data].split()] + ["--arch", arch, "--recipe"]
    if args.recipe == "cpu":
        words += ["quick", "--epochs", str(CPU[data]), "--batch-size", "128"]
        words += [] if data == "tiny-imagenet" else ["--subset", "10000"]
    else:
        words += [args.recipe]
    return [*words, *args.extra, "--quiet", *shared_words(args)]


def three(args, data, teacher, student):
    """The commands that train a teacher, the one-hot control and the student, and the run folders of each."""
    of_teacher = base(args, data, teacher)
    # States that switching and denoising, which are of self-distillation, go on from.
    shares = SWITCH_AT * ((data, student) in SWITCHING) + DENOISE_AT * ((data, student) in DENOISING)
    kept = ["--snapshot-at", *map(str, shares)] if shares and args.recipe != "cpu" else []
    one_hot = ["--kd-weight", "0", "--ce-weight", "1", *kept]
    distilled = ["--teacher", f"{of_teacher}-teacher-s{{seed}}", *(kept if teacher == student else [])]
    parser = runs.Parser(None)
    common.add_flags(parser)
    commands, found = [], []
    for what, prefix, arch, more in (
        ("teacher", of_teacher, teacher, []),
        ("onehot", base(args, data, student), student, one_hot),
        ("kd", base(args, data, teacher, student), student, distilled),
    ):
        script = "train_teacher.py" if what == "teacher" else "train_student.py"
        words = image_words(args, data, arch)
        commands.append([script, *words, *more, "--out", f"{prefix}-{what}-s{{seed}}"])
        flags = engine.resolve(parser.parse_args(words))
        if flags.label_noise is None:
            flags.label_noise = common.dataset_of(flags.data).label_noise
        found += seeded(args, prefix, what, flags, teacher if what == "kd" else None)
    return commands, found


def deviation(args, name, pair, found):
    """The command that draws Figure 1a of the run folders `found`."""
    title = f"{name.split('/')[1]}, {' → '.join(pair)}, {args.recipe} recipe, {len(args.seeds)} seed(s)"
    words = ["analyze_deviation.py", "--title", title, "--out", f"{args.results}/{name}/fig1a"]
    for flag, what in (("--teacher", "teacher"), ("--control", "onehot"), ("--student", "kd")):
        words += [flag, *(str(run.folder) for run in found if run.what == what)]
    return words


def image(args, data, teacher, student):
    name = f"image/{data}/{short(teacher)}-{short(student)}"
    commands, found = three(args, data, teacher, student)
    return make_entry(args, name, [*commands, deviation(args, name, (teacher, student), found)], found, "fig1a")


def switching(args, data, arch):
    """Figure 1b of self-distillation; of the cpu recipe one switch, with Figure 1a and the lead over the teacher."""
    cpu, prefix, (_, found) = args.recipe == "cpu", base(args, data, arch), three(args, data, arch, arch)
    name = f"{'image' if cpu else 'switching'}/{data}/{short(arch)}"
    directions, shares = (["onehot2kd"], [0.5]) if cpu else (["onehot2kd", "kd2onehot"], SWITCH_AT)
    words = ["switch_distill.py", *image_words(args, data, arch), "--direction", *directions, "--switch-at", "0"]
    words += [*map(str, shares), "1", "--out", prefix, "--results", f"{args.results}/{name}/fig1b"]
    branches = []
    for direction in directions:
        teacher = arch if direction == "onehot2kd" else None  # of the branch
        for share in shares:
            branches += seeded(args, prefix, f"{direction}-{share:g}", found[0].flags, teacher, 1 - share)
    if not cpu:
        return make_entry(args, name, [words], found + branches, "fig1b")
    drawing = deviation(args, name, (arch, arch), found)
    pays = ["when_it_pays.py", *image_words(args, data, arch), "--stop-at", "1", "--out", prefix]
    pays += ["--results", f"{args.results}/{name}/pays"]
    return make_entry(args, name, [[*words, "--jobs", "2"], drawing, pays], found + branches, "fig1a", "fig1b", "pays")


def language(args, task, teacher, student):
    one, two, cpu = short(teacher), short(student), args.recipe == "cpu"
    name, prefix = f"language/{task}/{one}-{two}", f"{args.runs}/{'cpu-' if cpu else ''}{task}"
    words = ["glue_distill.py", "--task", task, "--teacher", teacher, "--student", student, "--mode", "onehot", "kd"]
    words += ["onehot2kd", "--jobs", "2"] if cpu else []
    words += [*args.glue_extra, "--quiet", *shared_words(args), "--out", prefix, "--results", f"{args.results}/{name}"]
    found = seeded(args, f"{prefix}-{one}", "teacher") + seeded(args, f"{prefix}-{two}", "onehot")
    found += seeded(args, f"{prefix}-{one}-{two}", "kd")
    if not cpu:
        return make_entry(args, name, [words], found, two)
    found += seeded(args, f"{prefix}-{one}-{two}", "onehot2kd-0.5")
    return make_entry(args, name, [words], found, two, f"{two}/switch")


def eigenspace(args, data):
    name = f"eigenspace/{data}"
    words = [*EIGENSPACE[data].split(), *shared_words(args), "--out", f"{args.results}/{name}"]
    return make_entry(args, name, [["eigenspace.py", *words]], [], "")


def denoising(args, data, arch):
    name, prefix = f"denoising/{data}/{short(arch)}", base(args, data, arch)
    commands, found = three(args, data, arch, arch)
    found += seeded(args, prefix, "smooth", found[0].flags)
    words = ["denoise_gradients.py", *image_words(args, data, arch), "--points", str(DENOISE_POINTS), "--percents"]
    words += [*(f"{100 * share:g}" for share in DENOISE_AT), "--out", prefix, "--results", f"{args.results}/{name}"]
    return make_entry(args, name, [*commands, words], found, "")


def part_of(shard, entries):
    """The entries of --shard i/n, one for each seed that it has of them, without what is drawn of all seeds."""
    first, every = shard
    units = dict.fromkeys((entry.name.split("/")[1], seed) for entry in entries for seed in entry.seeds)
    found = []
    for data, seed in list(units)[first::every]:
        for entry in entries:
            if entry.name.split("/")[1] == data and seed in entry.seeds:
                # The scripts take a shard to draw nothing, so 0/1 is none.
                words = ["--shard", f"{entry.seeds.index(seed)}/{max(2, len(entry.seeds))}"]
                commands = [[*command, *words] for command in entry.commands if command[0] not in DRAWING]
                mine = [run for run in entry.runs if run.seed == seed]
                found.append(Entry(f"{entry.name}, seed {seed}", [seed], commands, mine, []))
    return found


# ---------------------------------------------------------------- states and times


def state(run):
    """(what the run folder holds, in words; epochs done), from its config.json and metrics.jsonl alone."""
    config, metrics = run.folder / "config.json", run.folder / "metrics.jsonl"
    try:
        if not config.exists() or runs.read_json(config) == runs.DISCARDED:
            return "not started", 0
        there = runs.read_config(run.folder)["flags"]
        here = json.loads(json.dumps(vars(run.flags))) if run.flags else {}
        differing = [key for key in here if key not in runs.NOT_COMPARED and there.get(key) != here[key]]
        if differing:
            return f"other settings ({', '.join(differing)})", 0
        if (run.folder / "logits.npz").exists():
            return "finished", there["epochs"]
        done = runs.read_metrics(run.folder)[-1]["epoch"] if metrics.exists() else 0
        return f"at epoch {done} of {there['epochs']}", done
    except (runs.InputError, KeyError):
        return "damaged", 0


def is_done(entry):
    """Whether nothing is left to do: all runs finished and, where it draws, no claims older than any of them."""
    drawn = [folder / "claims.json" for folder in entry.results]
    if any(state(run)[0] != "finished" for run in entry.runs) or not all(file.exists() for file in drawn):
        return False
    trained = [(run.folder / "logits.npz").stat().st_mtime_ns for run in entry.runs]
    if not drawn or not trained:
        return bool(drawn or trained)  # a script with neither decides itself
    return min(file.stat().st_mtime_ns for file in drawn) >= max(trained)


def sizes_of(run):
    """(training images, test images, side, classes) of a run's dataset, or () where only the data itself tells."""
    return common.dataset_of(run.flags.data).size if run.flags else ()


def seconds_left(run):
    """Estimated seconds of training that are left of a run, or None. An evaluated image counts as a third of a step."""
    text, done = state(run)
    if text == "finished":
        return 0.0
    if not sizes_of(run):
        return None
    flags, (images, test_images, side, classes) = run.flags, sizes_of(run)
    images, planned = flags.subset or images, flags.stop_epoch or flags.epochs
    batch = min(flags.batch_size, images)
    network = (flags.arch, run.teacher, side, classes, batch, flags.precision, flags.device, flags.width)
    left = min(planned * run.share, planned - done) / planned  # of the run
    trained = left * planned * (images // batch * batch)
    evaluated = left * engine.evaluations(flags.epochs, images, test_images) * test_images
    return benchmark.seconds_per_image(*network) * (trained + evaluated / 3)


def checkpoint_bytes(run):
    """Of float32 weights and momentum, for an image run whose network the data's name tells; else 0."""
    if not sizes_of(run):
        return 0
    _, _, side, classes = sizes_of(run)
    return 8 * parameters_of(run.flags.arch, classes, side, run.flags.width)


@functools.cache
def parameters_of(arch, classes, side, width):
    return sum(p.numel() for p in common.build_model(arch, classes, (side, side, 3), width).parameters())


def in_words(seconds):
    return "not estimated" if seconds is None else str(timedelta(seconds=round(seconds)))


def dry_run(entries):
    """Print every run once, under the first entry that needs it, with its state and estimated time; then totals."""
    left, units = {}, Counter()  # seconds of each run folder, and of all that --shard keeps together
    finished, disk = 0, 0
    for entry in entries:
        print(entry.name)
        for run in entry.runs:
            if run.folder not in left:
                text, seconds = state(run)[0], seconds_left(run)
                print(f"  {str(run.folder):72}  {text:18}  {in_words(seconds)}", flush=True)
                left[run.folder] = seconds
                finished += text == "finished"
                disk += checkpoint_bytes(run)
                units[entry.name.split("/")[1], run.seed] += seconds or 0.0
        for folder in entry.results:
            print(f"  {str(folder):72}  {'drawn' if is_done(entry) else 'not drawn'}")
    known, times = [seconds for seconds in left.values() if seconds is not None], list(units.values())
    print(f"{len(entries)} entries, {len(left)} runs, {finished} finished; {in_words(sum(known))} left")
    print("Times: one run after the other on this device;", end=" ")
    print(f"{len(left) - len(known)} runs and all measuring not estimated")
    for count in (1, 8, 64):
        longest = max(sum(times[i::count]) for i in range(count))
        print(f"{count} device(s), --shard i/{count}: {in_words(longest)}")
    print(f"disk: {disk / 1e9:.1f} GB of last checkpoints of image runs")


# ---------------------------------------------------------------- running


def execute(words):
    """Run a script to its end. Returns None, or why it failed. A signal is passed on: the script saves, both exit."""
    print("$", shlex.join(["python", *words]), flush=True)
    command, last = [sys.executable, str(Path(__file__).resolve().parent / words[0]), *words[1:]], ""
    with subprocess.Popen(command, stderr=subprocess.PIPE) as process:
        try:
            # Lines may end in \r: a progress bar's.
            for line in io.TextIOWrapper(process.stderr, errors="replace", newline=""):
                print(line, end="", file=sys.stderr, flush=True)
                last = line.strip() or last
            code = process.wait()
        except KeyboardInterrupt:  # SIGTERM is one too
            process.terminate()
            process.wait()
            raise
    if code == 130:
        raise KeyboardInterrupt
    if code < 0:
        return f"{words[0]} was killed by signal {-code}, perhaps for lack of memory"
    return (last.removeprefix("error: ") or f"{words[0]} ended with code {code}") if code else None


def more_flags(text):
    """argparse type of more flags in one string."""
    words = shlex.split(text)
    taken = "data label-noise arch task teacher student mode out results recipe seeds seed data-dir device jobs".split()
    taken += "overwrite shard snapshot-at switch-at direction".split()
    wrong = {word.partition("=")[0] for word in words} & {f"--{name}" for name in taken}
    if wrong:
        raise argparse.ArgumentTypeError(f"{min(wrong)} is for paper.py or its grid to set: leave it out here")
    return words


def main(argv=None):
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="print every run, its state and its estimated time here, and stop")
    add("--recipe", choices=("paper", "short", "quick", "cpu"), default="paper", help="of images; cpu: for two cores")
    add("--seeds", type=runs.number(int, 0), nargs="+", help="of every entry (default: 0 1 2; cpu: as its grid says)")
    add("--only", nargs="+", help="only entries whose names contain one of these, such as switching/ or /resnet56-")
    add("--shard", type=runs.shard, help="i/n: train the i-th (from 0) of n parts that share no run folder")
    add("--data-dir", default="data", help="where prepared or original datasets lie, and downloads go")
    add("--runs", default="runs", help="folder of the run folders")
    add("--results", help="folder for figures, tables and claims (default: results/<recipe>)")
    common.add_device_flag(parser)
    add("--extra", type=more_flags, default=[], help='flags of all image runs, as --extra="--epochs 1 --subset 200"')
    add("--glue-extra", type=more_flags, default=[], help="more flags for glue_distill.py, likewise")
    args = parser.parse_args(argv)
    runs.check_seeds(args.seeds or [])
    args.results = args.results or f"results/{args.recipe}"
    entries = cpu_grid(args) if args.recipe == "cpu" else grid(args)
    entries = [entry for entry in entries if not args.only or any(part in entry.name for part in args.only)]
    if not entries:
        raise runs.InputError(f"no entry's name contains {' or '.join(args.only)}: --dry-run prints them")
    if args.shard:
        entries = part_of(args.shard, entries)
    if args.dry_run:
        return dry_run(entries)

    outcomes, failed = {}, {}  # of commands: None, or why it failed; of entries: why
    for entry in entries:
        done = is_done(entry)
        print(f"{entry.name}{': done already' if done else ''}", flush=True)
        for words in [] if done else map(tuple, entry.commands):
            if words not in outcomes:  # entries share commands
                outcomes[words] = execute(words)
            if outcomes[words]:
                failed[entry.name] = outcomes[words]
                break
    print(f"{len(entries) - len(failed)} of {len(entries)} entries are done")
    for name, why in failed.items():
        print(f"{name} failed: {why}", file=sys.stderr)
    if failed:
        raise SystemExit(1)


if __name__ == "__main__":
    runs.cli(main)
