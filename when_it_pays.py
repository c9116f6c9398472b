"""When does it pay to disobey? Students of one teacher, stopped on its way to fitting its labels (the paper's title).

    python when_it_pays.py --seeds 0 1 2 3 4
    python when_it_pays.py --label-noise 0.1 --epochs 150 --stop-at 1     # one line: another setting, the whole teacher

The paper's claims are about teachers that interpolate their training labels. Here the teachers are states of one
teacher run, after the shares --stop-at of its training, and their students train in full length. Over the teacher's
train accuracy: the student's lead over its own teacher; its gain over the one-hot control, which is another question
(under label noise a teacher stopped early is itself the better network); and how the student deviates, slope and mean
Y − X on the teacher's hardest quarter, the latter minus the control's.

Run folders are those of switch_distill.py; a teacher that lacks a state is to be trained again with --snapshot-at.
Writes pays.png/.pdf, pays.json, pays.md and claims into --results.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

import analyze_deviation
import claims
import common
import engine
import runs
from runs import InputError, number
from train_student import add_student_flags, train_student
from train_teacher import train_teacher

# (split, kind, network, statistic) of `analyze_deviation.replicates`
MEASURES = {
    "fit": ("train", "fidelity", "teacher", "accuracy"),
    "teacher_accuracy": ("test", "fidelity", "teacher", "accuracy"),
    "onehot_accuracy": ("test", "fidelity", "control", "accuracy"),
    "student_accuracy": ("test", "fidelity", "student", "accuracy"),
    "lead": ("test", "fidelity", "student-teacher", "accuracy"),
    "gain": ("test", "fidelity", "student-control", "accuracy"),
    "slope": ("train", "predicted", "student", "slope"),
    "control_slope": ("train", "predicted", "control", "slope"),
    "low_below": ("train", "predicted", "student", "low_below"),
    "control_low_below": ("train", "predicted", "control", "low_below"),
    "low_gap": ("train", "predicted", "student-control", "low_gap"),
}
PERCENT = [name for name, key in MEASURES.items() if key[-1] in ("accuracy", "low_below")]


def student_folder(base, share, seed):
    """The student of the teacher stopped at `share`; that of the whole teacher is switch_distill.py's."""
    return Path(f"{base}-kd-s{seed}" if share == 1 else f"{base}-kd-of-{share:g}-s{seed}")


def train_seed(base, args, seed, data, shares, **kept):
    """Train teacher, one-hot control and the student of each stopped teacher; returns of each what `points_of` takes.

    kept: source and folder of the teacher logits, see `engine.TeacherLogits`.
    """
    teacher_run, control = Path(f"{base}-teacher-s{seed}"), Path(f"{base}-onehot-s{seed}")
    train_teacher(teacher_run, args, seed, data)
    _, total = common.total_steps(args, data)
    stopped = {step: f"{share:g}" for share, step in shares.items() if step < total}
    lost = [share for step, share in stopped.items() if not (teacher_run / f"snapshot-{step}.pt").exists()]
    if lost:
        fix = f"train that run again with --overwrite --snapshot-at {' '.join(stopped.values())}"
        raise InputError(f"{teacher_run} lacks its states at {' '.join(lost)} of its training: {fix}")
    kept_at = common.snapshot_steps(args, data)  # for other figures
    one_hot = common.only_flags(args, common.add_flags, add_student_flags, ce_weight=1.0, kd_weight=0.0)
    train_student(control, one_hot, seed, data, snapshots=kept_at)
    found = []
    for share, step in shares.items():
        model = engine.load_teacher(teacher_run, data, step)
        student = student_folder(base, share, seed)
        teacher = engine.TeacherLogits(model, data, args.precision, **kept)
        train_student(student, args, seed, data, teacher, snapshots=kept_at if step == total else ())
        found.append((model, student, control))
    return found


def points_of(data, teacher, student, control):
    """{split: point of `analyze_deviation.replicates`} of a teacher model and the runs of its student and control."""
    folders = dict(student=student, control=control)
    arrays = {name: runs.read_npz(run / "logits.npz", engine.LOGITS) for name, run in folders.items()}
    points = {}
    for split, images in (("train", data.x_train), ("test", data.x_test)):
        logits = engine.logits_of(teacher, data, images).double().cpu().numpy()
        networks = {name: kept[f"{split}_logits"].astype(np.float64) for name, kept in arrays.items()}
        points[split] = dict(teacher=logits, labels=arrays["student"][f"{split}_labels"], networks=networks)
    return points


def measure(seeds, resamples):
    """{name of MEASURES: value with its interval} for one share, from each seed's `points_of`."""
    per_seed = []
    for points in seeds:
        found = {split: analyze_deviation.replicates(point, resamples) for split, point in points.items()}
        accuracy = {name: found["test"]["fidelity", name, "accuracy"] for name in ("student", "teacher")}
        found["test"]["fidelity", "student-teacher", "accuracy"] = accuracy["student"] - accuracy["teacher"]
        per_seed.append(found)
    table = {}
    for name, (split, *key) in MEASURES.items():
        table[name] = claims.combine([found[split][tuple(key)] for found in per_seed])
    return table


def pays_claims(rows):
    """Claims rows: what rises with the teacher's fit, and what the student of the last teacher gains."""
    found, last = [], rows[-1]
    rising = {"lead": "the student's lead over its own teacher", "slope": "the student's train slope"}
    rising["gain"] = "the gain over one-hot (of which the paper says nothing)"
    for name, text in rising.items() if len(rows) > 1 else ():
        seeds = [np.array(row[name]["seeds"]) for row in (rows[0], last)]
        note = "last teacher minus first, over seeds"
        value = claims.mean_interval(seeds[1] - seeds[0])
        row = claims.claim(f"{text} rises with the teacher's fit", "> 0", *value, 0, note=note)
        found.append(claims.headline(row, "title", unit="points") if name == "lead" else row)
    for name, text in (("lead", "its own teacher"), ("gain", "the one-hot control")):
        fit = f"teacher fits {100 * last['fit']['value']:.1f}% of its labels"
        text = f"the last teacher's student beats {text}"
        found.append(analyze_deviation.claim_of(text, "> 0", last[name], 0, fit))
    return found


def pays_markdown(rows):
    """A line for each stopped teacher: MEASURES, in percent where they are shares."""
    lines = []
    for row in rows:
        cells = [claims.cell(row[name], *((100, 1) if name in PERCENT else (1, 2))) for name in MEASURES]
        lines.append([f"{row['share']:g}", *cells])
    names = [name.replace("_", " ") + (" %" if name in PERCENT else "") for name in MEASURES]
    return claims.markdown_table(["stopped at", *names], lines)


def plot(rows, folder, title):
    """Over the teacher's train accuracy: the student's lead and gain, slopes, and the gap on the hardest quarter."""
    figure, axes = claims.pyplot().subplots(1, 3, figsize=(9.5, 3.9))
    fit = [100 * row["fit"]["value"] for row in rows]

    def draw(axis, name, network, label, scale=1.0):
        claims.band(axis, fit, [row[name] for row in rows], scale, color=claims.COLOURS[network], label=label)

    draw(axes[0], "lead", "teacher", "student minus its own teacher", 100)
    draw(axes[0], "gain", "onehot", "student minus one-hot control", 100)
    axes[0].set(ylabel="difference of test accuracies (points)", title="Lead and gain, test")
    draw(axes[1], "slope", "kd", "KD student")
    draw(axes[1], "control_slope", "onehot", "one-hot control")
    axes[1].set(ylabel="slope of φ(network) on φ(teacher)", title="Slope of the fit, train")
    draw(axes[2], "low_gap", "onehot", "student minus one-hot control")
    axes[2].set(ylabel="mean Y − X, student minus control", title="Teacher's hardest quarter, train")
    for axis, level in zip(axes, (0, 1, 0), strict=True):
        axis.axhline(level, color="grey", lw=1, ls="--")
        axis.set(xlabel="teacher's train accuracy (%)")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
    figure.suptitle(title)
    claims.save_figure(figure, folder, "pays")


def main(argv=None):
    parser = runs.Parser(__doc__)
    common.add_flags(parser, "prefix of the run folders, as in switch_distill.py (default: runs/<data>-<arch>)")
    add_student_flags(parser)
    common.add_process_flags(parser)
    add = parser.add_argument_group("stopped teachers and results").add_argument
    at = "shares of training after which the teacher is stopped"
    share, default = number(float, 0, 1, open_low=True), [0.1, 0.2, 0.4, 0.7, 1]
    add("--stop-at", type=share, nargs="+", default=default, metavar="S", help=at)
    draws = number(int, 100, 1_000_000)
    add("--bootstrap", type=draws, default=2000, metavar="N", help="bootstrap draws behind each interval")
    add("--results", default="results/pays", metavar="FOLDER", help="folder for figure, tables and claims")
    args = engine.resolve(parser.parse_args(argv))
    runs.check_prefix(args)
    if args.teacher or not args.kd_weight:
        fix = "leave out --teacher, and give --kd-weight above 0"
        raise InputError(f"this script trains its own teachers and distils from them: {fix}")
    data = common.data_from(args)
    common.check_model(args, data)  # a wrong one fails before anything is discarded
    base, results = args.out or f"runs/{runs.default_name(args)}", Path(args.results)
    results.mkdir(parents=True, exist_ok=True)
    _, total = common.total_steps(args, data)
    tables = Path(base).parent / "teacher-logits"
    source = engine.teacher_source(args, data, 1, 1, tables)  # each teacher has one student
    shares = {share: round(share * total) for share in sorted(set(args.stop_at))}
    args.snapshot_at = sorted({*args.snapshot_at, *(share for share in shares if share < 1)})
    seeds = engine.shard_of(args)
    students = [student_folder(base, share, seed) for seed in seeds for share in shares]
    shared = [Path(f"{base}-{name}-s{seed}") for seed in seeds for name in ("teacher", "onehot")]
    runs.discard_runs(args, students + shared)
    engine.run_jobs(args)
    trained = [train_seed(base, args, seed, data, shares, source=source, folder=tables) for seed in seeds]
    if engine.only_a_shard(args):
        return

    rows = []
    for k, share in enumerate(tqdm(shares, "measuring", leave=False, disable=args.quiet or None)):
        points = [points_of(data, *of_seed[k]) for of_seed in trained]
        rows.append(dict(share=share, **measure(points, args.bootstrap)))
    over = claims.scope(len(seeds), len(seeds))
    runs.write_json(results / "pays.json", dict(intervals=f"95%, {over}", rows=rows))
    runs.write_text(results / "pays.md", pays_markdown(rows))
    claims.save_claims(results, pays_claims(rows), over)
    print(f"all measures: {results / 'pays.md'}")
    which = "teachers stopped on the way" if len(rows) > 1 else "one teacher"
    plot(rows, results, f"{args.data}, {args.arch}, {which}; 95% intervals {over}")


if __name__ == "__main__":
    runs.cli(main)
