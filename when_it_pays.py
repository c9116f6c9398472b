"""When does it pay to disobey? Students of one teacher, stopped on its way to fitting its labels (the paper's title).

    python when_it_pays.py --seeds 0 1 2 3 4
    python when_it_pays.py --label-noise 0.1 --epochs 150 --stop-at 1     # one line: another setting, the whole teacher

The paper's claims are about teachers that interpolate their training labels. Here the teachers are states of one
teacher run, after the shares --stop-at of its training, and their students train in full length. Over the teacher's
train accuracy: the student's lead over that teacher, and the one-hot control's, for any network's lead rises where the
teacher gets worse (under label noise one stopped early is the better network); and how both deviate from it: the slope,
and the share of the teacher's hardest quarter that lies below y = x.

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
    "control_lead": ("test", "fidelity", "control-teacher", "accuracy"),
    "gain": ("test", "fidelity", "student-control", "accuracy"),
    "slope": ("train", "predicted", "student", "slope"),
    "control_slope": ("train", "predicted", "control", "slope"),
    "slope_gap": ("train", "predicted", "student-control", "slope"),
    "low_below": ("train", "predicted", "student", "low_below"),
    "control_low_below": ("train", "predicted", "control", "low_below"),
}
PERCENT = [name for name, key in MEASURES.items() if key[-1] in deviation.SHARES]
DIFFERENCES = ("lead", "control_lead", "gain")  # of accuracies


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


def draws_of(seeds, resamples):
    """{name of MEASURES: [array [1 + B] of each seed, as `claims.combine` takes them]}, from each seed's `points_of`.

    The bootstrap draws are the same for every teacher, so that differences between two of them are paired.
    """
    draws = {name: [] for name in MEASURES}
    for points in seeds:
        found = {split: deviation.replicates(point, resamples) for split, point in points.items()}
        test = found["test"]
        for name in ("student", "control"):
            lead = test["fidelity", name, "accuracy"] - test["fidelity", "teacher", "accuracy"]
            test["fidelity", f"{name}-teacher", "accuracy"] = lead
        for name, (split, *key) in MEASURES.items():
            draws[name].append(found[split][tuple(key)])
    return draws


def measured(draws):
    """{name of MEASURES: value with its interval} of one teacher's `draws_of`."""
    row = {name: claims.combine(of_seeds) for name, of_seeds in draws.items()}
    for name in PERCENT:
        row[name] = claims.within(row[name], -1.0 if name in DIFFERENCES else 0.0)
    return row


def pays_claims(first, last):
    """Claims rows: what rises with the teacher's fit, and what the student of the last teacher gains.

    first, last: `draws_of` the first and the last teacher.
    """
    found = []
    if first is not last:
        rise = {name: claims.combine(np.subtract(last[name], first[name])) for name in MEASURES}
        fits = [100 * claims.combine(draws["fit"])["value"] for draws in (last, first)]
        note = f"last teacher minus first, which fit {fits[0]:.1f}% and {fits[1]:.1f}%"
        text = "the student's lead over its own teacher rises with the teacher's fit"
        beside = dict(control=rise["control_lead"], difference=rise["gain"])
        row = claims.claim(text, "> 0", rise["lead"], 0, note, unit="points", **beside)
        found.append(claims.headline(row, "title"))
        text = "the student's train slope rises with the teacher's fit"
        beside = dict(control=rise["control_slope"], difference=rise["slope_gap"])
        found.append(claims.claim(text, "> 0", rise["slope"], 0, note, **beside))
        text = "the gain over one-hot (of which the paper says nothing) rises with the teacher's fit"
        found.append(claims.claim(text, "> 0", rise["gain"], 0, note, unit="points"))
    note = "difference of test accuracies"
    at_end = {name: claims.combine(last[name]) for name in DIFFERENCES}
    text = "the last teacher's student beats its own teacher"
    beside = dict(control=at_end["control_lead"], difference=at_end["gain"])
    found.append(claims.claim(text, "> 0", at_end["lead"], 0, note, unit="points", **beside))
    text = "the last teacher's student beats the one-hot control"
    found.append(claims.claim(text, "> 0", at_end["gain"], 0, note, unit="points"))
    return found


def pays_markdown(rows):
    """A line for each of MEASURES, a column for each stopped teacher."""
    lines = []
    for name in MEASURES:
        unit = "%" if name in PERCENT else ""
        if name in DIFFERENCES:
            unit = "points"
        lines.append([name.replace("_", " "), *(claims.in_unit(row[name], unit) for row in rows)])
    return claims.markdown_table(["stopped at", *(f"{row['share']:g}" for row in rows)], lines)


def plot(rows, folder, title):
    """Over the teacher's train accuracy: leads over the teacher, slopes, and what lies below y = x."""
    figure, axes = claims.pyplot().subplots(1, 3, figsize=(9.5, 3.9))
    fit = [100 * row["fit"]["value"] for row in rows]

    def draw(axis, name, network, label, scale=1.0):
        claims.band(axis, fit, [row[name] for row in rows], scale, color=claims.COLOURS[network], label=label)

    draw(axes[0], "lead", "kd", "KD student", 100)
    draw(axes[0], "control_lead", "onehot", "one-hot control", 100)
    axes[0].set(ylabel="network minus teacher (points)", title="Lead in test accuracy")
    draw(axes[1], "slope", "kd", "KD student")
    draw(axes[1], "control_slope", "onehot", "one-hot control")
    axes[1].set(ylabel="slope of φ(network) on φ(teacher)", title="Slope of the fit, train")
    draw(axes[2], "low_below", "kd", "KD student", 100)
    draw(axes[2], "control_low_below", "onehot", "one-hot control", 100)
    axes[2].set(ylabel="share below y = x (%)", title="Teacher's hardest quarter, train")
    for axis, level in zip(axes, (0, 1, 50), strict=True):
        axis.axhline(level, color="grey", lw=1, ls="--")
        axis.set(xlabel="teacher's train accuracy (%)")
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.17))
    figure.suptitle(title)
    claims.save_figure(figure, folder, "pays")


def main(argv=None):
    parser = runs.Parser(__doc__)
    common.add_flags(parser, "prefix of the run folders, as in switch_distill.py (default: runs/<data>-<arch>)")
    common.add_student_flags(parser, distils=True)
    common.add_figure_flags(parser, "results/pays")
    at = "shares of training after which the teacher is stopped"
    share = number(float, 0, 1, open_low=True)
    default = [0.1, 0.25, 0.5, 0.75, 1]
    parser.add_argument("--stop-at", type=share, nargs="+", default=default, metavar="S", help=at)
    args = engine.resolve(parser.parse_args(argv))
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

    draws = []
    for k in tqdm(range(len(shares)), "measuring", leave=False, disable=args.quiet or None):
        draws.append(draws_of([points_of(data, *of_seed[k]) for of_seed in trained], args.bootstrap))
    rows = [dict(share=share, **measured(found)) for share, found in zip(shares, draws, strict=True)]
    over = claims.scope(len(trained), len(trained))
    runs.write_json(args.results / "pays.json", dict(intervals=f"95%, {over}", rows=rows))
    runs.write_text(args.results / "pays.md", pays_markdown(rows))
    fit = runs.fit_note(rows[-1]["fit"]["value"])
    claims.save_claims(args.results, pays_claims(draws[0], draws[-1]), f"{over}; {fit}")
    print(f"all measures: {args.results / 'pays.md'}")
    which = "teachers stopped on the way" if len(rows) > 1 else "one teacher"
    plot(rows, args.results, f"{args.data}, {args.arch}, {which}\n95% intervals {over}")


if __name__ == "__main__":
    runs.cli(main)
