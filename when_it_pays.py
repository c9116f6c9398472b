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

import claims
import common
import deviation
import engine
import runs
from runs import InputError, number

import numpy as np
from tqdm import tqdm

# (split, kind, network, statistic) of `deviation.replicates`
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
PERCENT = [name for name, key in MEASURES.items() if key[-1] in deviation.SHARES]


def run_folders(base, shares, seed):
    """{"teacher", "onehot" (the control) or a share of `shares`: run folder}, of one seed."""
    folders = {name: Path(f"{base}-{name}-s{seed}") for name in ("teacher", "onehot")}
    for share in shares:
        folders[share] = Path(f"{base}-kd-of-{share:g}-s{seed}")
        if share == 1:
            folders[share] = Path(f"{base}-kd-s{seed}")
    return folders


def train_seed(folders, args, seed, data, shares):
    """Train the teacher, the one-hot control, and a student of the teacher as it was at each of `shares`.

    folders: its `run_folders`; shares: {share of training: step}. Returns for each of them what `points_of` takes.
    """
    teacher_run, control = folders["teacher"], folders["onehot"]
    engine.train_teacher(teacher_run, args, seed, data)
    _, total = common.total_steps(args, data)
    wanted = " ".join(f"{share:g}" for share in args.snapshot_at)
    for share, step in shares.items():
        if step < total and not (teacher_run / f"snapshot-{step}.pt").exists():
            fix = runs.train_again(teacher_run, flags=f" --snapshot-at {wanted}")
            raise InputError(f"{teacher_run} lacks its state at {share:g} of its training: {fix}")
    kept = common.snapshot_steps(args, data)  # of the runs that switch_distill.py goes on from
    engine.train_student(control, common.one_hot_flags(args), seed, data, common.one_hot_loss, snapshots=kept)
    found = []
    for share, step in shares.items():
        snapshots = kept if share == 1 else ()
        model = engine.load_teacher(teacher_run, data, step)
        teacher = engine.TeacherLogits(model, data, args.precision, args.epochs, teacher_run)
        engine.train_student(folders[share], args, seed, data, common.student_loss, teacher, snapshots=snapshots)
        found.append((model, folders[share], control))
    return found


def points_of(data, teacher, student, control):
    """{split: point of `deviation.replicates`} of a teacher model and the runs of its student and control."""
    folders = dict(student=student, control=control)
    arrays = {name: runs.read_npz(run / "logits.npz", runs.LOGITS) for name, run in folders.items()}
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
        found = {split: deviation.replicates(point, resamples) for split, point in points.items()}
        accuracy = {name: found["test"]["fidelity", name, "accuracy"] for name in ("student", "teacher")}
        found["test"]["fidelity", "student-teacher", "accuracy"] = accuracy["student"] - accuracy["teacher"]
        per_seed.append(found)
    table = {}
    for name, (split, *key) in MEASURES.items():
        table[name] = claims.combine([found[split][tuple(key)] for found in per_seed])
        if name in PERCENT:
            table[name] = claims.within(table[name], -1.0 if name in ("lead", "gain") else 0.0)
    return table


def pays_claims(rows):
    """Claims rows: what rises with the teacher's fit, and what the student of the last teacher gains."""
    found = []
    last = rows[-1]
    rising = {
        "lead": "the student's lead over its own teacher",
        "slope": "the student's train slope",
        "gain": "the gain over one-hot (of which the paper says nothing)",
    }
    if len(rows) > 1:
        for name, text in rising.items():
            gain = claims.over_seeds(np.array(last[name]["seeds"]) - np.array(rows[0][name]["seeds"]))
            unit = "" if name == "slope" else "points"
            note = "last teacher minus first, over seeds"
            row = claims.claim(f"{text} rises with the teacher's fit", "> 0", gain, 0, note, unit=unit)
            if name == "lead":
                row = claims.headline(row, "title")
            found.append(row)
    for name, text in (("lead", "its own teacher"), ("gain", "the one-hot control")):
        text = f"the last teacher's student beats {text}"
        found.append(claims.claim(text, "> 0", last[name], 0, "difference of test accuracies", unit="points"))
    return found


def pays_markdown(rows):
    """A line for each stopped teacher: MEASURES, in percent where they are shares."""
    header = ["stopped at"]
    for name in MEASURES:
        header.append(name.replace("_", " "))
        if name in PERCENT:
            header[-1] += " %"
    lines = []
    for row in rows:
        lines.append([f"{row['share']:g}"])
        for name in MEASURES:
            text = claims.cell(row[name], 100, 1) if name in PERCENT else claims.cell(row[name], 1, 2)
            lines[-1].append(text)
    return claims.markdown_table(header, lines)


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
    common.add_student_flags(parser)
    common.add_figure_flags(parser, "results/pays")
    at = "shares of training after which the teacher is stopped"
    share = number(float, 0, 1, open_low=True)
    default = [0.1, 0.25, 0.5, 0.75, 1]
    parser.add_argument("--stop-at", type=share, nargs="+", default=default, metavar="S", help=at)
    args = engine.resolve(parser.parse_args(argv))
    if not args.kd_weight:
        raise InputError("--kd-weight 0 leaves nothing to learn from a teacher: give it a weight above 0")
    data = common.data_from(args)
    args.results.mkdir(parents=True, exist_ok=True)
    _, total = common.total_steps(args, data)
    shares = {share: round(share * total) for share in sorted(set(args.stop_at))}
    args.snapshot_at = sorted({*args.snapshot_at, *(share for share in shares if share < 1)})
    base = args.out or f"runs/{runs.default_name(args)}"
    networks = [run_folders(base, shares, seed) for seed in args.seeds]
    engine.check_folders(networks, args, data)
    for share in shares:
        engine.check_folders([dict(student=folders[share]) for folders in networks], args, data)
    trained = []
    for seed, folders in zip(args.seeds, networks, strict=True):
        trained.append(train_seed(folders, args, seed, data, shares))
    if args.train_only:
        return

    rows = []
    for k, share in enumerate(tqdm(shares, "measuring", leave=False, disable=args.quiet or None)):
        points = [points_of(data, *of_seed[k]) for of_seed in trained]
        rows.append(dict(share=share, **measure(points, args.bootstrap)))
    over = claims.scope(len(trained), len(trained))
    runs.write_json(args.results / "pays.json", dict(intervals=f"95%, {over}", rows=rows))
    runs.write_text(args.results / "pays.md", pays_markdown(rows))
    claims.save_claims(args.results, pays_claims(rows), f"{over}; {runs.fit_note(rows[-1]['fit']['value'])}")
    print(f"all measures: {args.results / 'pays.md'}")
    which = "teachers stopped on the way" if len(rows) > 1 else "one teacher"
    plot(rows, args.results, f"{args.data}, {args.arch}, {which}; 95% intervals {over}")


if __name__ == "__main__":
    runs.cli(main)
