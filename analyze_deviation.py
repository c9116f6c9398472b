"""Figure 1a: where does a student deviate from its teacher? From run folders, or from anyone's logits (paper §3.1).

    python analyze_deviation.py --teacher runs/t-s0 --student runs/kd-s0 --control runs/onehot-s0
    python analyze_deviation.py --teacher-logits T.npy --student-logits S.npy --labels y.npy --out results/mine

Plots Y = φ(student probability) against X = φ(teacher probability) of the class that the teacher predicts, with
φ(u) = log(u/(1−u)). A student that copied its teacher would lie on y = x; the paper finds low-X points below it and a
fitted slope above 1. X is an argmax, hence too high by selection: on test points *any* independently trained network
falls below y = x at low X. So everything is reported beside a control, an independently seeded one-hot network in the
student's place, and the claim that counts is student against control.

Writes fig1a.png/.pdf, deviation.json (all statistics, also for the label's class), claims.json and claims.md into
--out. Several seeds: give the runs in the same order (one teacher may serve all). About 5 s for 1,800 points, 30 s for
60,000. Expected, digits with 30% label noise, 5 seeds: train slope 0.89 (0.85 to 0.93; control 0.81), so the claim fails there for
the predicted class; for the label's class it is 1.06 (1.04 to 1.08; control 0.80).
"""
import os
from pathlib import Path

import numpy as np
from scipy import stats
from scipy.special import log_softmax, logsumexp

import common

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
    x, y = x - x.mean(), y - x.mean()   # one common shift: it keeps squares small, and `intercept` is mended for it in `replicates`
    fit = [every, x, y, x * x, x * y]
    return np.stack(fit + [low * column for column in fit] + [below, high, high * gap], axis=1)


def deviation_statistics(s):
    """STATISTICS from weighted sums s [B, 13] of `deviation_columns`; each value is an array [B]."""
    def fit(n, x, y, xx, xy):
        slope = (n * xy - x * y) / (n * xx - x * x)
        return slope, (y - slope * x) / n
    with np.errstate(divide="ignore", invalid="ignore"):   # no spread in X, or an empty quarter, in a resample: NaN
        slope, intercept = fit(*s[:, :5].T)
        return dict(slope=slope, intercept=intercept, low_slope=fit(*s[:, 5:10].T)[0], low_below=s[:, 10] / s[:, 5],
                    low_gap=(s[:, 7] - s[:, 6]) / s[:, 5], high_gap=s[:, 12] / s[:, 11])


def fidelity_columns(teacher_logits, logits, labels):
    """Per-point columns [N, 5 + ECE_BINS] whose weighted sums give every entry of FIDELITY."""
    teacher, network = log_softmax(np.float64(teacher_logits), axis=1), log_softmax(np.float64(logits), axis=1)
    predicted = network.argmax(1)
    confidence = np.exp(network.max(1))
    correct = predicted == labels
    bins = np.minimum((confidence * ECE_BINS).astype(int), ECE_BINS - 1)
    columns = [np.ones(len(labels)), predicted == teacher.argmax(1), (np.exp(teacher) * (teacher - network)).sum(1), correct,
               -network[np.arange(len(labels)), labels]]
    return np.stack(columns + [(bins == b) * (confidence - correct) for b in range(ECE_BINS)], axis=1)


def fidelity_statistics(s):
    """FIDELITY from weighted sums s [B, 5 + ECE_BINS] of `fidelity_columns`; each value is an array [B]."""
    n = s[:, 0]
    return dict(agreement=s[:, 1] / n, kl=s[:, 2] / n, accuracy=s[:, 3] / n, nll=s[:, 4] / n, ece=np.abs(s[:, 5:]).sum(1) / n)


def resampled_sums(columns, resamples, rng, chunk=64):
    """Sums of columns [N, K] over the points themselves (row 0) and over `resamples` bootstrap draws of them."""
    n = len(columns)
    sums = [columns.sum(0, keepdims=True)]
    for start in range(0, resamples, chunk):
        rows = min(chunk, resamples - start)
        weights = np.stack([np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(rows)])
        sums.append(weights.astype(np.float64) @ columns)
    return np.concatenate(sums)


def replicates(point, resamples=1000, rng=None):
    """Every statistic of one seed and split, on the points and on bootstrap draws of them.

    point: dict with `teacher` logits [N, C], `labels` [N] and `networks`, a dict of name to logits [N, C].
    Returns {(kind, network, statistic): array [1 + resamples]}, kind predicted, label or fidelity; entry 0 is the
    statistic itself. All networks see the same draws, so their differences are paired.
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
    sums = resampled_sums(np.concatenate([columns for _, _, columns, _ in parts], axis=1), resamples, rng)
    out, start = {}, 0
    for kind, name, columns, statistics in parts:
        for key, values in statistics(sums[:, start:start + columns.shape[1]]).items():
            out[kind, name, key] = values
        start += columns.shape[1]
        if kind != "fidelity":   # columns were shifted by the mean of X
            out[kind, name, "intercept"] = out[kind, name, "intercept"] + means[kind] * (1 - out[kind, name, "slope"])
    if {"student", "control"} <= set(point["networks"]):
        for kind, name, key in [k for k in out if k[1] == "student"]:
            out[kind, "student-control", key] = out[kind, "student", key] - out[kind, "control", key]
    return out


def combine(seeds, rng=None, of=lambda mean: mean):
    """Mean over seeds and its 95% bootstrap interval, over points and, when there are several, over seeds.

    seeds: one array [1 + B, ...] of `replicates` per seed, in which replicate b is the same draw of points for every
    seed: the seeds share their points, so what is particular to these points does not average out over seeds. With
    several seeds each replicate also draws seeds with replacement (the crossed "pigeonhole" bootstrap of Owen 2007,
    which errs towards wide intervals). A bootstrap of S seeds is too narrow by √(S/(S−1)) and by Student's t against
    the normal (Hesterberg 2015, §5), so the distances of its ends from the value are stretched by both. `of` maps means over seeds
    [B, ...] to the statistic [B]. Returns dict(value, low, high, seeds), where seeds holds the statistic of each seed.
    """
    rng = rng or np.random.default_rng(0)
    values = np.stack([seed[0] for seed in seeds])
    draws, count, stretch = np.stack([seed[1:] for seed in seeds]), len(seeds), 1.0
    mean, resamples = draws[0], draws.shape[1]
    if count > 1:
        mean = draws[rng.integers(count, size=(count, resamples)), np.arange(resamples)].mean(0)
        stretch = stats.t.ppf(0.975, count - 1) / stats.norm.ppf(0.975) * np.sqrt(count / (count - 1))
    value, statistic = float(of(values.mean(0, keepdims=True))[0]), of(mean)
    # A statistic that a draw leaves undefined (a quarter without spread) makes the interval undefined, not narrower.
    low, high = np.quantile(statistic, [0.025, 0.975]) if np.isfinite(statistic).all() else (np.nan, np.nan)
    return dict(value=value, low=float(value + stretch * (low - value)), high=float(value + stretch * (high - value)), seeds=of(values).tolist())


def measure(points, resamples=1000, seed=0):
    """{kind: {network: {statistic: dict(value, low, high, seeds)}}} of one split over seeds; see `replicates`, `combine`."""
    per_seed = [replicates(point, resamples, np.random.default_rng(seed)) for point in points]
    table = {}
    for kind, network, key in per_seed[0]:
        values = combine([replicate[kind, network, key] for replicate in per_seed], np.random.default_rng([seed, len(points)]))
        table.setdefault(kind, {}).setdefault(network, {})[key] = values
    return table


# ---------------------------------------------------------------- input


def check_logits(logits, name, like=None):
    """Logits as float64 [N, C]; InputError when they are not a finite matrix, or not shaped like `like`."""
    logits = np.asarray(logits)
    if logits.ndim != 2 or logits.shape[1] < 2 or len(logits) < 8 or logits.dtype.kind not in "fiu":
        raise common.InputError(f"{name} is {logits.dtype} {list(logits.shape)}: logits must be numbers [N >= 8, C >= 2]")
    if like is not None and logits.shape != like.shape:
        raise common.InputError(f"{name} is {list(logits.shape)} but the teacher's logits are {list(like.shape)}: give the "
                                "same points in the same order, and the same classes")
    logits = logits.astype(np.float64)
    if not np.isfinite(logits).all():
        row = int(np.argwhere(~np.isfinite(logits))[0, 0])
        raise common.InputError(f"{name} has NaN or infinite values (first in row {row}): give finite logits, or log-probabilities clipped from below")
    if np.abs(logits).max() > 1e6:
        raise common.InputError(f"{name} has values up to {np.abs(logits).max():.2g}: these are no logits; check what was saved")
    return logits


def check_labels(labels, name, logits):
    """Labels as int64 [N]; InputError when they do not fit the logits."""
    labels = np.asarray(labels)
    if labels.shape != (len(logits),) or labels.dtype.kind not in "iu" or labels.min() < 0 or labels.max() >= logits.shape[1]:
        raise common.InputError(f"{name} is {labels.dtype} {list(labels.shape)}: it must hold {len(logits)} integers within 0..{logits.shape[1] - 1}")
    return labels.astype(np.int64)


def load_array(path):
    """An array from FILE.npy, from FILE.npz with a single array, or from FILE.npz:NAME."""
    path, _, key = str(path).partition(".npz:")
    file = path + ".npz" if key else path
    try:
        loaded = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise common.InputError(f"{file} does not exist: check the path") from None
    except Exception as error:   # numpy and zipfile raise many kinds on a damaged file
        raise common.InputError(f"{file} is not a readable .npy or .npz file ({common.first_line(error)}): save it again with numpy.save") from None
    if isinstance(loaded, np.ndarray):
        return loaded
    keys = [key] if key else loaded.files
    if len(keys) != 1 or keys[0] not in loaded.files:
        raise common.InputError(f"{file} holds {', '.join(loaded.files)}: name one as {file}:NAME")
    return common.read_npz(file, keys)[keys[0]]


def points_from_files(args):
    """One split of one seed from --teacher-logits and its companions."""
    if not args.student_logits or not args.labels:
        raise common.InputError("--teacher-logits needs --student-logits and --labels beside it")
    teacher = check_logits(load_array(args.teacher_logits), args.teacher_logits)
    networks = dict(student=check_logits(load_array(args.student_logits), args.student_logits, teacher))
    if args.control_logits:
        networks["control"] = check_logits(load_array(args.control_logits), args.control_logits, teacher)
    return {args.split: [dict(teacher=teacher, labels=check_labels(load_array(args.labels), args.labels, teacher), networks=networks)]}


def points_from_runs(teachers, students, controls=()):
    """{split: [one dict per seed, see `replicates`]} from run folders, train and test; one teacher may serve all seeds."""
    teachers = list(teachers) * len(students) if len(teachers) == 1 else teachers
    controls = list(controls) * len(students) if len(controls) == 1 else controls
    if len(teachers) != len(students) or controls and len(controls) != len(students):
        raise common.InputError(f"{len(teachers)} teachers, {len(students)} students and {len(controls)} controls cannot be "
                                "paired: give the same number of each, or one teacher for all")
    points = {"train": [], "test": []}
    for k, student in enumerate(students):
        runs = dict(teacher=teachers[k], student=student, **({"control": controls[k]} if controls else {}))
        for run in runs.values():
            common.finished_config(run)
        files = {name: Path(run) / "logits.npz" for name, run in runs.items()}
        arrays = {name: common.read_npz(file, common.LOGITS) for name, file in files.items()}
        for split in points:
            teacher = check_logits(arrays["teacher"][f"{split}_logits"], files["teacher"])
            labels = check_labels(arrays["teacher"][f"{split}_labels"], files["teacher"], teacher)
            networks = {name: check_logits(arrays[name][f"{split}_logits"], files[name], teacher) for name in runs if name != "teacher"}
            for name in networks:
                if not np.array_equal(check_labels(arrays[name][f"{split}_labels"], files[name], teacher), labels):
                    raise common.InputError(f"{runs[name]} and {runs['teacher']} have different {split} labels: train both on the same data")
            points[split].append(dict(teacher=teacher, labels=labels, networks=networks))
    return points


# ---------------------------------------------------------------- output


def deviation_claims(tables):
    """Claims rows from {split: `measure` table}."""
    rows = []
    for split, table in tables.items():
        student, control = table["predicted"]["student"], table["predicted"].get("student-control")
        note = "" if split != "test" or control else "no control given: selection alone can cause this"
        row = lambda text, expected, s, threshold, above=True, note="": rows.append(
            common.claim(f"{split}: {text}", expected, s["value"], s["low"], s["high"], threshold, above, note))
        row("slope of the student's fit exceeds 1", "> 1", student["slope"], 1, note=note)
        row("most of the teacher's hardest quarter lies below y = x", "> 0.5", student["low_below"], 0.5, note=note)
        label = table["label"]["student"]["slope"]
        row("slope of the student's fit exceeds 1 for the label's class", "> 1", label, 1, note="X and Y of the label instead of the predicted class")
        if control:
            row("on the hardest quarter the student falls lower than the one-hot control", "< 0", control["low_gap"], 0, above=False,
                note="mean Y − X, student minus control")
            row("the student's slope exceeds the control's", "> 0", control["slope"], 0, note="student minus control")
            if split == "test":
                row("the student is more accurate than the one-hot control", "> 0", table["fidelity"]["student-control"]["accuracy"], 0,
                    note="difference of accuracies")
    return rows


def statistics_markdown(tables):
    """All statistics as Markdown tables, one line per split, class and network."""
    text = ""
    for names, kinds in ((STATISTICS, ("predicted", "label")), (FIDELITY, ("fidelity",))):
        text += "| split | class | network | " + " | ".join(names) + " |\n" + "|---" * (len(names) + 3) + "|\n"
        for split, table in tables.items():
            for kind in kinds:
                for network in table[kind]:
                    if network != "student-control":
                        cells = (table[kind][network][key] for key in names)
                        text += f"| {split} | {kind} | {network} | " + " | ".join(map(common.cell, cells)) + " |\n"
        text += "\n"
    return text


def plot(points, tables, folder, title):
    """Figure 1a: log density of (X, Y) for every split (rows) and network (columns), with y = x and the mean fit."""
    plt = common.pyplot()
    networks = list(next(iter(points.values()))[0]["networks"])
    figure, axes = plt.subplots(len(points), len(networks), figsize=(4.6 * len(networks), 4.2 * len(points)), squeeze=False, layout="constrained")
    for row, split in enumerate(points):
        classes = [np.argmax(point["teacher"], 1) for point in points[split]]
        x = np.concatenate([phi_of_class(point["teacher"], c) for point, c in zip(points[split], classes)])
        ys = {name: np.concatenate([phi_of_class(point["networks"][name], c) for point, c in zip(points[split], classes)]) for name in networks}
        everything = np.concatenate([x, *ys.values()])
        low, high = np.quantile(everything, [0.001, 0.999]) + np.array([-0.5, 0.5])
        for axis, name in zip(axes[row], networks):
            axis.hexbin(x, ys[name], gridsize=60, bins="log", mincnt=1, extent=(low, high, low, high), cmap="viridis", linewidths=0.1)
            fit = tables[split]["predicted"][name]
            ends = np.array([low, high])
            axis.plot(ends, ends, "k--", lw=1, label="y = x")
            axis.plot(ends, fit["intercept"]["value"] + fit["slope"]["value"] * ends, color="crimson", lw=1.5, label=f"fit, slope {fit['slope']['value']:.2f}")
            axis.axvline(np.quantile(x, 0.25), color="grey", lw=0.8, ls=":", label="lowest quarter of X ends")
            axis.set(xlim=(low, high), ylim=(low, high), xlabel="X = φ(teacher probability)", ylabel=f"Y = φ({name} probability)",
                     title=f"{split}: {name}, {100 * fit['low_below']['value']:.0f}% of the low quarter below y = x")
            axis.title.set_fontsize(9)
            axis.legend(loc="upper left", fontsize=8)
    figure.suptitle(title)
    common.save_figure(figure, folder, "fig1a")


def main(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--teacher", nargs="+", help="run folders of the teachers, one per seed or one for all")
    add("--student", nargs="+", help="run folders of the students")
    add("--control", nargs="+", default=[], help="run folders of independently seeded one-hot networks")
    add("--teacher-logits", help="anyone's teacher logits [N, C]: .npy, .npz with one array, or FILE.npz:NAME (log-probabilities serve too)")
    add("--student-logits", help="the student's logits of the same points")
    add("--control-logits", help="a one-hot network's logits of the same points")
    add("--labels", help="true class of each point, integers [N]")
    add("--split", default="test", help="what to call the points given as files")
    add("--title", help="title of the figure")
    add("--bootstrap", type=common.number(int, 100, 1_000_000), default=2000, help="bootstrap draws behind each interval")
    add("--out", default="results/fig1a", help="folder for the figure, statistics and claims")
    args = parser.parse_args(argv)
    of_runs, of_files = (args.teacher, args.student, args.control), (args.teacher_logits, args.student_logits, args.control_logits, args.labels)
    if any(of_runs) == any(of_files) or not (args.teacher and args.student or args.teacher_logits):
        raise common.InputError("give either --teacher and --student run folders (and --control), or --teacher-logits, --student-logits and "
                                "--labels (and --control-logits)")

    folders = [os.path.realpath(run) for group in (args.teacher, args.student, args.control) for run in set(group or ())]
    if len(set(folders)) < len(folders):
        raise common.InputError("the same run folder is named as two of teacher, student and control: they must be different runs")
    points = points_from_files(args) if args.teacher_logits else points_from_runs(args.teacher, args.student, args.control)
    for split, seeds in points.items():
        for point in seeds:
            if np.ptp(phi_of_class(point["teacher"], np.argmax(point["teacher"], 1))) < 1e-9:
                raise common.InputError(f"the teacher is equally confident on all {split} points: there is no slope to fit; check its logits")
    tables = {split: measure(seeds, args.bootstrap) for split, seeds in points.items()}

    Path(args.out).mkdir(parents=True, exist_ok=True)
    seeds = len(next(iter(points.values())))
    over = common.scope(seeds, len({point["teacher"].tobytes() for point in next(iter(points.values()))}))
    common.write_json(Path(args.out) / "deviation.json", dict(seeds=seeds, intervals=f"95%, {over}", bootstrap=args.bootstrap, statistics=STATISTICS, fidelity=FIDELITY, tables=tables))
    print(statistics_markdown(tables))
    common.save_claims(args.out, deviation_claims(tables), over)
    plot(points, tables, args.out, args.title or f"Student–teacher deviations, {seeds} seed{'s' if seeds > 1 else ''}")


if __name__ == "__main__":
    common.cli(main)
