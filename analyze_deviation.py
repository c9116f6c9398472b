"""Figure 1a: where does a student deviate from its teacher? From run folders, or from anyone's logits (paper §3.1).

    python analyze_deviation.py --teacher runs/t-s0 --student runs/kd-s0 --control runs/onehot-s0
    python analyze_deviation.py --teacher-logits T.npy --student-logits S.npy --labels y.npy --out results/mine

Plots Y = φ(student probability) against X = φ(teacher probability) of the class that the teacher predicts, with
φ(u) = log(u/(1−u)). A student that copied its teacher would lie on y = x; the paper finds low-X points below it and a
fitted slope above 1. Departure from the paper: X is an argmax, hence too high by selection, and on test points *any*
independently trained network falls below y = x at low X. So all is reported beside a control, an independently seeded
one-hot network in the student's place, and the claim that counts is student against control.

Several seeds: give the runs in the same order (one teacher may serve all). Writes fig1a.png/.pdf, deviation.json and
statistics.md (all statistics, also for the label's class), claims.json and claims.md into --out.
"""

import os
from pathlib import Path

import numpy as np
import torch
from scipy.special import log_softmax, logsumexp
from tqdm import tqdm

import claims
import engine
import runs
from runs import InputError, number

STATISTICS = {
    "slope": "slope of the least-squares fit of Y on X",
    "intercept": "intercept of that fit",
    "low_slope": "slope within the quarter of points where X is lowest",
    "low_below": "share of that quarter below y = x",
    "low_gap": "mean Y − X in that quarter",
    "high_gap": "mean Y − X in the quarter where X is highest",
}
FIDELITY = {
    "agreement": "share of points where the top-1 class is the teacher's",
    "kl": "mean KL(teacher ‖ network) at temperature 1, nats",
    "accuracy": "share of points whose top-1 class is the label",
    "nll": "mean negative log-likelihood of the label, nats",
    "ece": "expected calibration error, 15 equal bins of confidence (Guo et al. 2017)",
}
ECE_BINS = 15

# ---------------------------------------------------------------- statistics


def phi_of_class(logits, classes):
    """φ(p) = log(p/(1−p)) of one class of each point, float64 [N], from logits [N, C] and class numbers [N].

    Computed as z_c − log Σ_{j≠c} exp z_j: p itself would round to 1 for confident points, and φ(1) is infinite.
    """
    rest = np.array(logits, np.float64)
    rows = np.arange(len(rest))
    own = rest[rows, classes].copy()
    rest[rows, classes] = -np.inf
    return own - logsumexp(rest, axis=1)


def deviation_columns(x, y):
    """Per-point columns [N, 13] whose weighted sums give every entry of STATISTICS (see `deviation_statistics`)."""
    low, high = x <= np.quantile(x, 0.25), x >= np.quantile(x, 0.75)
    below, gap, every = low & (y < x), y - x, np.ones_like(x)
    x, y = x - x.mean(), y - x.mean()  # one shift for both keeps squares small; `replicates` mends the intercept for it
    fit = [every, x, y, x * x, x * y]
    return np.stack(fit + [low * column for column in fit] + [below, high, high * gap], axis=1)


def least_squares(n, x, y, xx, xy):
    """(slope, intercept) of y on x from sums over points."""
    slope = (n * xy - x * y) / (n * xx - x * x)
    return slope, (y - slope * x) / n


def deviation_statistics(s):
    """STATISTICS from weighted sums s [B, 13] of `deviation_columns`; each value is an array [B]."""
    with np.errstate(divide="ignore", invalid="ignore"):  # no spread in X, or an empty quarter, in a resample: NaN
        slope, intercept = least_squares(*s[:, :5].T)
        low = dict(low_slope=least_squares(*s[:, 5:10].T)[0], low_below=s[:, 10] / s[:, 5])
        gaps = dict(low_gap=(s[:, 7] - s[:, 6]) / s[:, 5], high_gap=s[:, 12] / s[:, 11])
        return dict(slope=slope, intercept=intercept, **low, **gaps)


def fidelity_columns(teacher_logits, logits, labels):
    """Per-point columns [N, 5 + ECE_BINS] whose weighted sums give every entry of FIDELITY."""
    teacher, network = log_softmax(np.float64(teacher_logits), axis=1), log_softmax(np.float64(logits), axis=1)
    predicted = network.argmax(1)
    confidence = np.exp(network.max(1))
    correct = predicted == labels
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    columns = [
        np.ones(len(labels)),
        predicted == teacher.argmax(1),
        (np.exp(teacher) * (teacher - network)).sum(1),
        correct,
        -network[np.arange(len(labels)), labels],
    ]
    return np.stack(columns + [(bins == b) * (confidence - correct) for b in range(ECE_BINS)], axis=1)


def fidelity_statistics(s):
    """FIDELITY from weighted sums s [B, 5 + ECE_BINS] of `fidelity_columns`; each value is an array [B]."""
    n = s[:, 0]
    means = dict(agreement=s[:, 1] / n, kl=s[:, 2] / n, accuracy=s[:, 3] / n, nll=s[:, 4] / n)
    return dict(means, ece=np.abs(s[:, 5:]).sum(1) / n)


def replicates(point, resamples=1000, rng=None, done=None):
    """Every statistic of one seed and split, on the points and on bootstrap draws of them.

    point: dict with `teacher` logits [N, C], `labels` [N] and `networks`, a dict of name to logits [N, C].
    Returns {(kind, network, statistic): array [1 + resamples]}, kind predicted, label or fidelity; entry 0 is the
    statistic itself. All networks see the same draws, so their differences are paired. done: see
    `claims.resampled_sums`.
    """
    rng = rng or np.random.default_rng(0)
    teacher, labels = point["teacher"], point["labels"]
    parts, means = [], {}
    for kind, classes in (("predicted", np.argmax(teacher, 1)), ("label", labels)):
        x = phi_of_class(teacher, classes)
        means[kind] = x.mean()
        for name, logits in point["networks"].items():
            parts.append((kind, name, deviation_columns(x, phi_of_class(logits, classes)), deviation_statistics))
    for name, logits in dict(point["networks"], teacher=teacher).items():
        parts.append(("fidelity", name, fidelity_columns(teacher, logits, labels), fidelity_statistics))
    every = np.concatenate([columns for _, _, columns, _ in parts], axis=1)
    sums = claims.resampled_sums(every, resamples, rng, done=done)
    out, start = {}, 0
    for kind, name, columns, statistics in parts:
        for key, values in statistics(sums[:, start : start + columns.shape[1]]).items():
            out[kind, name, key] = values
        start += columns.shape[1]
        if kind != "fidelity":  # columns were shifted by the mean of X
            out[kind, name, "intercept"] = out[kind, name, "intercept"] + means[kind] * (1 - out[kind, name, "slope"])
    if {"student", "control"} <= set(point["networks"]):
        for kind, _, key in [found for found in out if found[1] == "student"]:
            out[kind, "student-control", key] = out[kind, "student", key] - out[kind, "control", key]
    return out


def measure(points, resamples=1000, done=None):
    """{kind: {network: {statistic: dict(value, low, high, seeds)}}} of one split over seeds.

    points: one dict for each seed; see `replicates` for these and `claims.combine` for the values.
    """
    per_seed = [replicates(point, resamples, done=done) for point in points]
    table = {}
    for kind, network, key in per_seed[0]:
        draws = [found[kind, network, key] for found in per_seed]
        table.setdefault(kind, {}).setdefault(network, {})[key] = claims.combine(draws)
    return table


# ---------------------------------------------------------------- input


def check_logits(logits, name, like=None):
    """Logits as float64 [N, C]; InputError when they are not a finite matrix, or not shaped like `like`."""
    logits = np.asarray(logits)
    if logits.ndim != 2 or logits.shape[1] < 2 or len(logits) < 8 or logits.dtype.kind not in "fiu":
        raise InputError(f"{name} is {logits.dtype} {list(logits.shape)}: logits must be numbers [N >= 8, C >= 2]")
    if like is not None and logits.shape != like.shape:
        what = f"{name} is {list(logits.shape)} but the teacher's logits are {list(like.shape)}"
        raise InputError(f"{what}: give the same points in the same order, and the same classes")
    logits = logits.astype(np.float64)
    if not np.isfinite(logits).all():
        row = np.argwhere(~np.isfinite(logits))[0, 0]
        raise InputError(
            f"{name} has NaN or infinite values (first in row {row}): give finite logits, clipped if need be"
        )
    if np.abs(logits).max() > 1e6:
        raise InputError(
            f"{name} has values up to {np.abs(logits).max():.2g}: these are no logits; check what was saved"
        )
    sums, decimals = logits.sum(1), 2
    while decimals < 6 and np.abs(logits - logits.round(decimals)).max() > 1e-6:
        decimals += 1
    rounding = 0.5 * 10.0**-decimals * logits.shape[1]  # of all that a row sums up
    if logits.min() >= 0 and any(np.abs(sums - whole).max() < 1e-3 * whole + rounding for whole in (1, 100)):
        fix = "give their logarithms: numpy.log(numpy.clip(p, 1e-12, None)), p from 0 to 1"
        raise InputError(f"{name} has probabilities, rows that sum to {sums.mean():.0f}: {fix}")
    return logits


def check_labels(labels, name, logits):
    """Labels as int64 [N]; InputError when they do not fit the logits."""
    labels, (n, classes) = np.asarray(labels), logits.shape
    fits = labels.shape == (n,) and labels.dtype.kind in "iu"
    if not fits or labels.min() < 0 or labels.max() >= classes:
        there = f"{labels.dtype} {list(labels.shape)}"
        raise InputError(f"{name} is {there}: it must hold {n} integers within 0..{classes - 1}")
    return labels.astype(np.int64)


def load_array(path):
    """An array from FILE.npy, FILE.npz with a single array or FILE.npz:NAME; a tensor from .pt, .pth, .safetensors."""
    if Path(path).suffix in (".pt", ".pth", ".safetensors"):
        with runs.reading(path, "save the tensor itself, with torch.save or safetensors"):
            found = runs.load_tensors(path)
            tensors = list(found.values()) if isinstance(found, dict) else [found]
            if len(tensors) != 1 or not torch.is_tensor(tensors[0]):
                raise ValueError("it holds other things than one tensor")
            tensor = tensors[0].float() if tensors[0].is_floating_point() else tensors[0]  # numpy has no bfloat16
            return tensor.numpy()
    file, colon, key = str(path).partition(".npz:")
    file += ".npz" if colon else ""
    with runs.reading(file, "give a file that numpy.save or numpy.savez wrote"):
        # Mapped, for a damaged header may ask for more than any memory.
        loaded = np.load(file, mmap_mode="r", allow_pickle=False)
    if isinstance(loaded, np.ndarray):
        return loaded
    keys = [key] if key else loaded.files
    if len(keys) != 1 or keys[0] not in loaded.files:
        raise InputError(f"{file} holds {', '.join(loaded.files)}: name one as {file}:NAME")
    return runs.read_npz(file, keys)[keys[0]]


def at_chance(point):
    """Why nothing can be claimed of a point of `replicates`, or None: networks no better than chance."""
    predicted = {name: logits.argmax(1) for name, logits in (("teacher", point["teacher"]), *point["networks"].items())}
    pairs = [(name, "the labels", point["labels"]) for name in predicted]
    pairs += [(name, "the teacher", predicted["teacher"]) for name in point["networks"]]
    for name, whom, other in pairs:
        agreed, chance, above = claims.agreement(predicted[name], other, point["teacher"].shape[1])
        if not above:
            what = f"{name} agrees with {whom} on {100 * agreed:.0f}% of the points, {100 * chance:.0f}% is chance"
            return f"no claims: {what}; are the rows of all files in the same order?"
    return None


def points_from_files(args):
    """One split of one seed from --teacher-logits and its companions."""
    if not args.student_logits or not args.labels:
        raise InputError("--teacher-logits needs --student-logits and --labels beside it")
    teacher = check_logits(load_array(args.teacher_logits), args.teacher_logits)
    networks = dict(student=check_logits(load_array(args.student_logits), args.student_logits, teacher))
    if args.control_logits:
        networks["control"] = check_logits(load_array(args.control_logits), args.control_logits, teacher)
    labels = check_labels(load_array(args.labels), args.labels, teacher)
    return {args.split: [dict(teacher=teacher, labels=labels, networks=networks)]}


def paired(teachers, students, controls=()):
    """[{role: run folder}] of each seed; one teacher, or one control, may serve all."""
    teachers, controls = (list(given) * (len(students) if len(given) == 1 else 1) for given in (teachers, controls))
    if len(teachers) != len(students) or controls and len(controls) != len(students):
        counts = f"{len(teachers)} teachers, {len(students)} students and {len(controls)} controls"
        raise InputError(f"{counts} cannot be paired: give the same number of each, or one teacher for all")
    roles = dict(teacher=teachers, student=students) | (dict(control=controls) if controls else {})
    return [dict(zip(roles, folders, strict=True)) for folders in zip(*roles.values(), strict=True)]


def check_roles(folders, same_seeds):
    """InputError when a run folder of {role: folder}, which a user named, was not trained for its role.

    same_seeds: whether student and control must be of the same seed.
    """
    configs = {role: runs.finished_config(run) for role, run in folders.items()}
    is_text = "tokens_sha256" in configs["teacher"]["facts"]
    teacher = engine.teacher_hash(Path(folders["teacher"]) / ("logits.npz" if is_text else "checkpoint.pt"))
    student, control = configs["student"], configs.get("control")
    if student["facts"].get("teacher_sha256") != teacher:
        fix = "name teachers and students of the same seeds in the same order"
        raise InputError(f"{folders['student']} was not distilled from {folders['teacher']}: {fix}")
    if not control:
        return
    if control["facts"].get("teacher_sha256"):
        raise InputError(f"{folders['control']} was distilled: the control is a one-hot network")
    differing = [key for key in ("arch", "width", "epochs") if student["flags"].get(key) != control["flags"].get(key)]
    differing += ["seed"] if same_seeds and student.get("seed") != control.get("seed") else []
    if differing:
        fix = "the control is the student's network and recipe, of the same seed"
        raise InputError(f"{folders['control']} and {folders['student']} differ in {', '.join(differing)}: {fix}")


def points_from_runs(teachers, students, controls=()):
    """{split: [one dict per seed, see `replicates`]} from run folders `paired`, train and test."""
    points = {"train": [], "test": []}
    for folders in paired(teachers, students, controls):
        for run in folders.values():
            runs.finished_config(run)
        files = {name: Path(run) / "logits.npz" for name, run in folders.items()}
        arrays = {name: runs.read_npz(file, engine.LOGITS) for name, file in files.items()}
        for split, seeds in points.items():
            logits, labels = {}, {}
            for name, file in files.items():  # the teacher's first
                logits[name] = check_logits(arrays[name][f"{split}_logits"], file, logits.get("teacher"))
                labels[name] = check_labels(arrays[name][f"{split}_labels"], file, logits[name])
                if not np.array_equal(labels[name], labels["teacher"]):
                    both = f"{folders[name]} and {folders['teacher']}"
                    raise InputError(f"{both} have different {split} labels: train both on the same data")
            seeds.append(dict(teacher=logits.pop("teacher"), labels=labels["teacher"], networks=logits))
    return points


# ---------------------------------------------------------------- output


def claim_of(text, expected, measured, threshold, note="", above=True):
    """`claims.claim` about a value that `claims.combine` measured."""
    ends = (measured[key] for key in ("value", "low", "high"))
    return claims.claim(text, expected, *ends, threshold, above, note)


def deviation_claims(tables, section="§3.1"):
    """Claims rows from {split: `measure` table}; section: where their headlines stand, None for no headlines.

    Those of "language" are the slope alone.
    """
    rows = []
    for split, table in tables.items():
        student, control = table["predicted"]["student"], table["predicted"].get("control", {})
        alone = "no control given: selection alone can cause this" if split == "test" and not control else ""
        steep = f"{split}: slope of the student's fit exceeds 1"
        slope = claim_of(steep, "> 1", student["slope"], 1, alone)
        below = f"{split}: most of the teacher's hardest quarter lies below y = x"
        below = claim_of(below, "> 50%", student["low_below"], 0.5, alone)
        if section and split == "train":
            slope = claims.headline(slope, section, control.get("slope"))
        if section == "§3.1" and split == "train":
            below = claims.headline(below, section, control.get("low_below"), "%")
        of_label = "X and Y of the label instead of the predicted class"
        label_slope = table["label"]["student"]["slope"]
        rows += [slope, below, claim_of(f"{steep} for the label's class", "> 1", label_slope, 1, of_label)]
        if not control:
            continue
        minus_control = table["predicted"]["student-control"]
        text = f"{split}: on the hardest quarter the student falls lower than the one-hot control"
        note = "mean Y − X, student minus control"
        lower = claim_of(text, "< 0", minus_control["low_gap"], 0, note, above=False)
        rows.append(claims.headline(lower, section) if section == "§3.1" else lower)
        text = f"{split}: the student's slope exceeds the control's"
        rows.append(claim_of(text, "> 0", minus_control["slope"], 0, "student minus control"))
        if split == "test":
            text = f"{split}: the student is more accurate than the one-hot control"
            accuracy = table["fidelity"]["student-control"]["accuracy"]
            rows.append(claim_of(text, "> 0", accuracy, 0, "difference of accuracies"))
    return rows


def statistics_markdown(tables):
    """All statistics as two Markdown tables, one line per split, class and network."""
    text = ""
    for names, kinds in ((STATISTICS, ("predicted", "label")), (FIDELITY, ("fidelity",))):
        rows = []
        for split, kind in ((split, kind) for split in tables for kind in kinds):
            for network, measured in tables[split][kind].items():
                if network != "student-control":
                    rows.append([split, kind, network, *(claims.cell(measured[key]) for key in names)])
        text += claims.markdown_table(["split", "class", "network", *names], rows) + "\n"
    return text


def plot_one(axis, x, y, x_ends, y_ends, fit):
    """Log density of (X, Y) with y = x and the mean `fit` over seeds."""
    axis.hexbin(x, y, gridsize=60, bins="log", mincnt=1, extent=(*x_ends, *y_ends), cmap="viridis", linewidths=0.1)
    slope, intercept = fit["slope"]["value"], fit["intercept"]["value"]
    axis.plot(x_ends, x_ends, "k--", lw=1, label="y = x")
    axis.plot(x_ends, intercept + slope * x_ends, color=claims.COLOURS["other"], lw=1.5, label="least-squares fit")
    axis.axvline(np.quantile(x, 0.25), color="0.4", lw=1, ls=":", label="end of the teacher's lowest quarter")
    axis.set(xlim=x_ends, ylim=y_ends, xlabel="X = φ(teacher probability)")


def plot(points, tables, folder, title):
    """Figure 1a, for every split (rows) and network (columns), the points of all seeds together."""
    networks = list(next(iter(points.values()))[0]["networks"])
    grid = (len(points), len(networks))
    figure, axes = claims.pyplot().subplots(*grid, figsize=(4 * grid[1], 3.9 * grid[0] + 0.3), squeeze=False)
    for row, (split, seeds) in zip(axes, points.items(), strict=True):
        every = [dict(point["networks"], teacher=point["teacher"]) for point in seeds]
        phi = {}
        for name in ("teacher", *networks):
            phi[name] = np.concatenate([phi_of_class(logits[name], logits["teacher"].argmax(1)) for logits in every])
        pairs = (phi["teacher"], np.concatenate(list(phi.values())))
        x_ends, y_ends = (np.quantile(values, [0.001, 0.999]) + np.array([-0.5, 0.5]) for values in pairs)
        for axis, name in zip(row, networks, strict=True):
            fit = tables[split]["predicted"][name]
            plot_one(axis, phi["teacher"], phi[name], x_ends, y_ends, fit)
            axis.set_ylabel(f"Y = φ({name} probability)")
            slope, below = claims.cell(fit["slope"], 1, 2), claims.cell(fit["low_below"], 100, 0)
            size = f"n = {len(phi[name]):,}"
            axis.set_title(f"{split}: {name}, slope {slope}, {size}\nlowest quarter: {below} % below y = x")
    claims.legend_below(figure, axes[0][0])
    figure.suptitle(title)
    claims.save_figure(figure, folder, "fig1a")


def report(points, out, title, resamples=2000, section="§3.1", why_not=None, quiet=False, full=True):
    """Measure `points`, {split: one dict per seed, see `replicates`}, and write figure, statistics and claims to `out`.

    section: see `deviation_claims`; why_not: the reason for which nothing is claimed; quiet: without a progress bar;
    full: see `claims.save_claims`.
    """
    for split, seeds in points.items():
        for teacher in [point["teacher"] for point in seeds]:
            if np.ptp(phi_of_class(teacher, np.argmax(teacher, 1))) < 1e-9:
                raise InputError(f"the teacher is equally confident on all {split} points: check its logits")
    out.mkdir(parents=True, exist_ok=True)
    total = resamples * sum(len(seeds) for seeds in points.values())
    with tqdm(total=total, desc="bootstrap", unit="draw", leave=False, disable=quiet or None) as bar:
        tables = {split: measure(seeds, resamples, done=bar.update) for split, seeds in points.items()}
    first = next(iter(points.values()))
    over = claims.scope(len(first), len({point["teacher"].tobytes() for point in first}))
    facts = dict(seeds=len(first), intervals=f"95%, {over}", bootstrap=resamples)
    runs.write_json(out / "deviation.json", dict(facts, statistics=STATISTICS, fidelity=FIDELITY, tables=tables))
    runs.write_text(out / "statistics.md", statistics_markdown(tables))
    nothing = [claims.claim(why_not, "above chance", np.nan, np.nan, np.nan, 0)]
    claims.save_claims(out, nothing if why_not else deviation_claims(tables, section), over, full)
    if section and "train" in tables:
        print(claims.fit_note(tables["train"]["fidelity"]["teacher"]["accuracy"]["value"]))
    print(f"statistics: {out / 'statistics.md'}")
    plot(points, tables, out, title)


def main(argv=None):
    parser = runs.Parser(__doc__)
    add = parser.add_argument_group("run folders, several for several seeds").add_argument
    add("--teacher", nargs="+", metavar="RUN", help="teachers, one per seed or one for all")
    add("--student", nargs="+", metavar="RUN", help="students")
    add("--control", nargs="+", metavar="RUN", default=[], help="independently seeded one-hot networks")
    forms = ".npy, .npz, FILE.npz:NAME, .pt or .safetensors (log-probabilities serve too)"
    add = parser.add_argument_group("or files of anyone's logits").add_argument
    add("--teacher-logits", metavar="FILE", help=f"the teacher's [N, C]: {forms}")
    add("--student-logits", metavar="FILE", help="the student's of the same points")
    add("--control-logits", metavar="FILE", help="a one-hot network's of the same points")
    add("--labels", metavar="FILE", help="true class of each point, integers [N]")
    add("--split", default="test", help="what to call these points")
    add = parser.add_argument_group("output").add_argument
    add("--title", help="title of the figure")
    draws = number(int, 100, 1_000_000)
    add("--bootstrap", type=draws, default=2000, metavar="N", help="bootstrap draws behind each interval")
    add("--out", metavar="FOLDER", default="results/fig1a", help="folder for figure, statistics and claims")
    args = parser.parse_args(argv)
    of_runs = (args.teacher, args.student, args.control)
    of_files = (args.teacher_logits, args.student_logits, args.control_logits, args.labels)
    if any(of_runs) == any(of_files) or not (args.teacher and args.student or args.teacher_logits):
        by_files = "--teacher-logits, --student-logits and --labels (and --control-logits)"
        raise InputError(f"give either --teacher and --student run folders (and --control), or {by_files}")
    # Teachers alone may serve several seeds.
    folders = [os.path.realpath(run) for run in (*set(args.teacher or ()), *(args.student or ()), *args.control)]
    if len(set(folders)) < len(folders):
        raise InputError("a run folder is named twice: teachers, students and controls are different runs")
    for seed in paired(*of_runs) if args.teacher else ():
        check_roles(seed, same_seeds=len(args.control) > 1)
    points = points_from_files(args) if args.teacher_logits else points_from_runs(*of_runs)
    first = next(iter(points.values()))
    title = args.title or f"Student–teacher deviations, {len(first)} seed{'s' if len(first) > 1 else ''}"
    why_not = at_chance(first[0]) if args.teacher_logits else None  # run folders have been compared by their labels
    report(points, Path(args.out), title, args.bootstrap, why_not=why_not)


if __name__ == "__main__":
    runs.cli(main)
