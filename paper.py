"""The paper's whole grid as one list: every setting of §3 to §5, the commands that make it, and what is missing.

    python paper.py --dry-run                               # every run, its state, and the time that it takes here
    python paper.py --recipe short --only image/cifar100/   # a part, by the names that --dry-run prints
    python paper.py --shard 0/4                             # a quarter of the training, without figures
    python paper.py                                         # all that is missing, and the figures

The grid stands below, to be edited there. A run folder is trained once: entries share teachers, controls and students.
Interrupted, the same command goes on; an entry that fails is named at the end (exit code 1). A figure is drawn again
when one of its runs is newer. Shards need only the same flags and one --runs folder: all runs of a dataset (or task)
and a seed belong to one of them. Let one shard fetch the data first; when all are done, the command without --shard
draws. --dry-run needs no data and writes nothing: it times a few steps of each network on random images.
The whole grid has not been run by its authors.
"""

import argparse
import functools
import io
import json
import shlex
import subprocess
import sys
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
}
# (teacher, student): self-distillation and every cross pair. Assumption: the paper reports 18 image settings; which
# cross pairs are among them could not be checked.
NETWORKS = ("resnet56", "resnet20", "mobilenetv2")
PAIRS = [(teacher, student) for teacher in NETWORKS for student in NETWORKS]

# §3.1, language. Departure: the paper's RoBERTa-medium and -small are the authors' own and not public; DistilRoBERTa
# stands for the smaller student.
TASKS = ("cola", "sst-2", "mrpc", "rte", "qnli", "qqp", "mnli")
LANGUAGE_PAIRS = [("roberta-base", "roberta-base"), ("roberta-base", "distilroberta/distilroberta-base")]

# §3.2: (dataset, network), switched both ways at these shares of training. Assumption: these two datasets.
SWITCHING = [("cifar100", "resnet56"), ("tiny-imagenet", "resnet56")]
SWITCH_AT = (0.25, 0.5, 0.75, 0.9)

# §4: all levels of eigenspace.py.
EIGENSPACE = {"digits": "--data digits", "cifar10": "--data cifar10 --subset 1000"}

# §5, on random points: per-example gradients of all of CIFAR would take hours at each checkpoint.
DENOISING = [("cifar100", "resnet20"), ("cifar100-noisy", "resnet20")]
DENOISE_AT, DENOISE_POINTS = (0.05, 0.25, 0.5), 512


def grid(args):
    """[Entry]: all of the above, in the paper's order."""
    found = [image(args, data, *pair) for data in IMAGES for pair in PAIRS]
    found += [language(args, task, *pair) for task in TASKS for pair in LANGUAGE_PAIRS]
    found += [switching(args, *setting) for setting in SWITCHING]
    found += [eigenspace(args, name) for name in EIGENSPACE]
    return found + [denoising(args, *setting) for setting in DENOISING]


# ---------------------------------------------------------------- from the grid to commands


class Run(NamedTuple):
    """A run folder, and what its time depends on."""

    folder: Path
    seed: int
    flags: argparse.Namespace | None = None  # as in its config.json; None for text, whose time is not estimated
    teacher: str | None = None  # its teacher's architecture
    share: float = 1.0  # of the epochs: a branch of another run trains the last ones alone


class Entry(NamedTuple):
    """One setting of the paper. Entries of other groups share no run folder."""

    name: str
    group: str
    commands: list  # of words; all but analyze_deviation.py train
    runs: list
    results: Path | None  # where the last command draws


def short(name):
    """A network's name within the name of a folder."""
    return name.rpartition(":")[2].rpartition("/")[2]


def base(args, data, teacher, student=None):
    """What the names of run folders begin with; the Makefile's are the same."""
    networks = dict.fromkeys([short(teacher), short(student or teacher)])
    return f"{args.runs}/{data}-{'-'.join(networks)}-{args.recipe}"


def shared_words(args):
    return ["--data-dir", args.data_dir, "--device", args.device, "--seeds", *map(str, args.seeds)]


def image_words(args, data, arch):
    """The flags that all commands of a dataset and network share."""
    return [*args.extra, *IMAGES[data].split(), "--arch", arch, "--recipe", args.recipe, "--quiet", *shared_words(args)]


@functools.cache
def settings(words):
    """The flags that train_teacher.py makes of `words`."""
    parser = runs.Parser(None)
    common.add_flags(parser)
    flags = engine.resolve(parser.parse_args(words))
    if flags.label_noise is None:
        flags.label_noise = common.dataset_of(flags.data).label_noise
    return flags


def three(args, data, teacher, student):
    """The commands that train a teacher, the one-hot control and the student, and the run folders of each."""
    of_teacher = f"{base(args, data, teacher)}-teacher-s{{seed}}"
    # States that switching and denoising, which are of self-distillation, go on from.
    shares = SWITCH_AT * ((data, student) in SWITCHING) + DENOISE_AT * ((data, student) in DENOISING)
    kept = ["--snapshot-at", *map(str, shares)] if shares else []
    one_hot = ["--kd-weight", "0", "--ce-weight", "1", *kept]
    distilled = ["--teacher", of_teacher, *(kept if teacher == student else [])]
    commands, found = [], []
    for script, arch, more, above, name in (
        ("train_teacher.py", teacher, [], None, of_teacher),
        ("train_student.py", student, one_hot, None, f"{base(args, data, student)}-onehot-s{{seed}}"),
        ("train_student.py", student, distilled, teacher, f"{base(args, data, teacher, student)}-kd-s{{seed}}"),
    ):
        words = image_words(args, data, arch)
        commands.append([script, *words, *more, "--out", name])
        flags = settings(tuple(words))
        found += [Run(Path(name.replace("{seed}", str(seed))), seed, flags, above) for seed in args.seeds]
    return commands, found


def image(args, data, teacher, student):
    entry = f"image/{data}/{short(teacher)}-{short(student)}"
    commands, found = three(args, data, teacher, student)
    results, count = Path(args.results) / f"{entry}-{args.recipe}", len(args.seeds)
    title = f"{data}, {teacher} → {student}, {args.recipe} recipe, {count} seed(s)"
    drawing = ["analyze_deviation.py", "--title", title, "--out", str(results)]
    for k, flag in enumerate(("--teacher", "--control", "--student")):
        drawing += [flag, *(str(run.folder) for run in found[k * count : (k + 1) * count])]
    return Entry(entry, data, [*commands, drawing], found, results)


def language(args, task, teacher, student):
    one, two, prefix = short(teacher), short(student), f"{args.runs}/{task}"
    entry = f"language/{task}/{one}-{two}"
    words = ["glue_distill.py", *args.glue_extra, "--task", task, "--teacher", teacher, "--student", student]
    words += ["--mode", "onehot", "kd", "--quiet", *shared_words(args), "--out", prefix]
    names = (f"{one}-teacher", f"{two}-onehot", f"{one}-{two}-kd")
    found = [Run(Path(f"{prefix}-{name}-s{seed}"), seed) for name in names for seed in args.seeds]
    results = Path(args.results) / entry
    return Entry(entry, task, [[*words, "--results", str(results)]], found, results)


def switching(args, data, arch):
    entry, prefix = f"switching/{data}/{short(arch)}", base(args, data, arch)
    commands, found = three(args, data, arch, arch)
    for seed in args.seeds:
        for share in SWITCH_AT:
            for direction, teacher in (("onehot2kd", arch), ("kd2onehot", None)):
                folder = Path(f"{prefix}-{direction}-{share:g}-s{seed}")
                found.append(Run(folder, seed, found[0].flags, teacher, 1 - share))
    results = Path(args.results) / f"{entry}-{args.recipe}"
    words = ["switch_distill.py", *image_words(args, data, arch)]
    words += ["--switch-at", "0", *map(str, SWITCH_AT), "1", "--out", prefix, "--results", str(results)]
    return Entry(entry, data, [*commands, words], found, results)


def eigenspace(args, name):
    entry = f"eigenspace/{name}"
    results = Path(args.results) / entry
    words = ["eigenspace.py", *EIGENSPACE[name].split(), *shared_words(args), "--out", str(results)]
    return Entry(entry, entry, [words], [], results)


def denoising(args, data, arch):
    entry, prefix = f"denoising/{data}/{short(arch)}", base(args, data, arch)
    commands, found = three(args, data, arch, arch)
    found += [Run(Path(f"{prefix}-smooth-s{seed}"), seed, found[0].flags) for seed in args.seeds]
    results = Path(args.results) / f"{entry}-{args.recipe}"
    words = ["denoise_gradients.py", *image_words(args, data, arch), "--points", str(DENOISE_POINTS)]
    words += ["--percents", *(f"{100 * share:g}" for share in DENOISE_AT), "--out", str(results)]
    for what in ("teacher", "onehot", "kd", "smooth"):
        words += [f"--{what}", f"{prefix}-{what}-s{{seed}}"]
    return Entry(entry, data, [*commands, words], found, results)


def part_of(args, entries):
    """The entries of --shard i/n, one for each seed that it has of them, without what is drawn of all seeds."""
    first, every = args.shard
    count, found = len(args.seeds), []
    units = [(group, k) for group in dict.fromkeys(entry.group for entry in entries) for k in range(count)]
    for group, k in units[first::every]:
        for entry in entries:
            if entry.group == group:
                shard = ["--shard", f"{k}/{max(2, count)}"]  # the scripts take a shard to draw nothing, so 0/1 is none
                commands = [[*words, *shard] for words in entry.commands if words[0] != "analyze_deviation.py"]
                mine = [run for run in entry.runs if run.seed == args.seeds[k]]
                found.append(Entry(f"{entry.name}, seed {args.seeds[k]}", group, commands, mine, None))
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
    """Whether nothing is left to do: all runs finished and, where it draws, the claims not older than any of them."""
    if any(state(run)[0] != "finished" for run in entry.runs):
        return False
    if entry.results is None:
        return bool(entry.runs)  # a script without run folders decides itself
    drawn = [file.stat().st_mtime_ns for file in entry.results.rglob("claims.json")]
    trained = [(run.folder / "logits.npz").stat().st_mtime_ns for run in entry.runs]
    return bool(drawn) and min(drawn) >= max(trained, default=0)


def seconds_left(run):
    """Estimated seconds of training that are left of a run, or None. An evaluated image counts as a third of a step."""
    text, done = state(run)
    if text == "finished":
        return 0.0
    flags, size = run.flags, common.dataset_of(run.flags.data).size if run.flags else ()
    if not size:
        return None
    images, test_images, side, classes = size
    images, planned = flags.subset or images, flags.stop_epoch or flags.epochs
    batch = min(flags.batch_size, images)
    network = (flags.arch, run.teacher, side, classes, batch, flags.precision, flags.device, flags.width)
    left = min(planned * run.share, planned - done) / planned  # of the run
    trained, evaluated = left * planned * (images // batch * batch), left * engine.EVALUATIONS * test_images
    return benchmark.seconds_per_image(*network) * (trained + evaluated / 3)


def in_words(seconds):
    return "not estimated" if seconds is None else str(timedelta(seconds=round(seconds)))


def dry_run(entries):
    """Print every run once, under the first entry that needs it, with its state and estimated time; then totals."""
    states, left = {}, {}
    for entry in entries:
        print(entry.name)
        for run in entry.runs:
            if run.folder not in states:
                states[run.folder], left[run.folder] = state(run)[0], seconds_left(run)
                print(f"  {str(run.folder):72}  {states[run.folder]:18}  {in_words(left[run.folder])}", flush=True)
        if entry.results:
            print(f"  {str(entry.results):72}  {'drawn' if is_done(entry) else 'not drawn'}")
    known = [seconds for seconds in left.values() if seconds is not None]
    finished = sum(text == "finished" for text in states.values())
    print(f"{len(entries)} entries, {len(states)} runs, {finished} finished; {in_words(sum(known))} left")
    print(
        f"Times: one run after the other on this device; {len(left) - len(known)} runs and all measuring not estimated"
    )


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
    taken = "data label-noise arch task teacher student mode out results recipe seeds seed data-dir device".split()
    wrong = {word.partition("=")[0] for word in words} & {f"--{name}" for name in taken}
    if wrong:
        raise argparse.ArgumentTypeError(f"{min(wrong)} is set by the grid of paper.py: edit it there")
    return words


def main(argv=None):
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add("--dry-run", action="store_true", help="print every run, its state and its estimated time here, and stop")
    recipe = "recipe of the image runs; language has one of its own"
    add("--recipe", choices=("paper", "short", "quick"), default="paper", help=recipe)
    add("--seeds", type=runs.number(int, 0), nargs="+", default=[0, 1, 2], help="every entry is trained for each")
    only = "only entries whose names contain one of these, such as switching/ or /cifar100/resnet56-"
    add("--only", nargs="+", default=[], help=only)
    add("--shard", type=runs.shard, help="i/n: train the i-th (from 0) of n parts that share no run folder")
    add("--data-dir", default="data", help="where prepared or original datasets lie, and downloads go")
    add("--runs", default="runs", help="folder of the run folders")
    add("--results", default="results/paper", help="folder for figures, tables and claims")
    common.add_device_flag(parser)
    extra = 'more flags for all image runs, of train_teacher.py: --extra="--epochs 1 --subset 200"'
    add("--extra", type=more_flags, default=[], help=extra)
    add("--glue-extra", type=more_flags, default=[], help="more flags for glue_distill.py, likewise")
    args = parser.parse_args(argv)
    runs.check_seeds(args.seeds)
    entries = [entry for entry in grid(args) if not args.only or any(part in entry.name for part in args.only)]
    if not entries:
        raise runs.InputError(f"no entry's name contains {' or '.join(args.only)}: --dry-run prints them")
    if args.shard:
        entries = part_of(args, entries)
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
