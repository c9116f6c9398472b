"""All of Figure 1a that more than one script needs (paper §3.1): φ, its statistics, claims and drawing.

Y = φ(student probability) against X = φ(teacher probability) of the class that the teacher predicts, with
φ(u) = log(u/(1−u)). A student that copied its teacher would lie on y = x; the paper finds low-X points below it and a
fitted slope above 1. Departure from the paper: X is an argmax, hence too high by selection, and on test points *any*
independently trained network falls below y = x at low X. So all is reported beside a control, an independently seeded
one-hot network in the student's place, and what the control shows too is no finding.
"""

from pathlib import Path

import claims
import runs
from runs import InputError

import numpy as np
from scipy.special import logsumexp
from tqdm import tqdm

STATISTICS = {
    "slope": "slope of the least-squares fit of Y on X",
    "intercept": "intercept of that fit",
    "low_below": "share of the quarter of points where X is lowest that lies below y = x",
    "low_gap": "mean Y − X in that quarter",
    "high_gap": "mean Y − X in the quarter where X is highest",
}
SHARES = ("low_below", "agreement", "accuracy")
FIDELITY = {
    "agreement": "share of points where the top-1 class is the teacher's",
    "accuracy": "share of points whose top-1 class is the label",
}
GRID = 50  # bins of X and of Y in fig1a.json

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
    """Per-point columns [N, 10] whose weighted sums give every entry of STATISTICS (see `deviation_statistics`)."""
    low, high = x <= np.quantile(x, 0.25), x >= np.quantile(x, 0.75)
    below = low & (y < x)
    gap = y - x
    every = np.ones_like(x)
    shift = x.mean()  # one for both: it keeps squares small, and `replicates` mends the intercept for it
    x = x - shift
    y = y - shift
    return np.stack([every, x, y, x * x, x * y, low, below, low * gap, high, high * gap], axis=1)


def deviation_statistics(sums):
    """STATISTICS from weighted sums [B, 10] of `deviation_columns`; each value is an array [B]."""
    n, x, y, xx, xy, low, below, low_gap, high, high_gap = sums.T
    with np.errstate(divide="ignore", invalid="ignore"):  # no spread in X, or an empty quarter, in a resample: NaN
        slope = (n * xy - x * y) / (n * xx - x * x)  # least squares
        found = dict(slope=slope, intercept=(y - slope * x) / n)
        return dict(found, low_below=below / low, low_gap=low_gap / low, high_gap=high_gap / high)


def fidelity_columns(teacher_logits, logits, labels):
    """Per-point columns [N, 3] whose weighted sums give every entry of FIDELITY."""
    predicted = logits.argmax(1)
    return np.stack([np.ones(len(labels)), predicted == teacher_logits.argmax(1), predicted == labels], axis=1)


def fidelity_statistics(s):
    """FIDELITY from weighted sums s [B, 3] of `fidelity_columns`; each value is an array [B]."""
    return dict(agreement=s[:, 1] / s[:, 0], accuracy=s[:, 2] / s[:, 0])


def replicates(point, resamples=1000):
    """Every statistic of one seed and split, on the points and on bootstrap draws of them.

    point: dict with `teacher` logits [N, C], `labels` [N] and `networks`, a dict of name to logits [N, C].
    Returns {(kind, network, statistic): array [1 + resamples]}, kind predicted, label or fidelity; entry 0 is the
    statistic itself. All networks see the same draws, so their differences are paired.
    """
    teacher, labels = point["teacher"], point["labels"]
    parts = []
    means = {}
    for kind, classes in (("predicted", np.argmax(teacher, 1)), ("label", labels)):
        x = phi_of_class(teacher, classes)
        means[kind] = x.mean()
        for name, logits in point["networks"].items():
            parts.append((kind, name, deviation_columns(x, phi_of_class(logits, classes)), deviation_statistics))
    for name, logits in dict(point["networks"], teacher=teacher).items():
        parts.append(("fidelity", name, fidelity_columns(teacher, logits, labels), fidelity_statistics))
    every = np.concatenate([columns for _, _, columns, _ in parts], axis=1)
    sums = claims.resampled_sums(every, resamples, np.random.default_rng(0))
    out = {}
    start = 0
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


def measure(points, resamples=1000, quiet=True):
    """{kind: {network: {statistic: `claims.combine` over seeds}}} of one split; points: of `replicates`, one a seed."""
    bar = tqdm(points, "bootstrap", unit="seed", leave=False, disable=quiet or None)
    per_seed = [replicates(point, resamples) for point in bar]
    table = {}
    for kind, network, key in per_seed[0]:
        found = claims.combine([of_seed[kind, network, key] for of_seed in per_seed])
        if key in SHARES:
            found = claims.within(found, -1.0 if network == "student-control" else 0.0)
        table.setdefault(kind, {}).setdefault(network, {})[key] = found
    return table


def points_from_runs(seeds):
    """{split: [one dict per seed, see `replicates`]}, train and test, of finished runs.

    seeds: {role: run folder} of each seed, roles teacher, student and control. Without a teacher its logits are those
    in the teacher.npz of the run folder `taught`, by default the student's, and there are the splits that it has.
    Without a control there is none. InputError when one is not finished, or when labels or shapes differ.
    """
    points = {"train": [], "test": []}
    for folders in seeds:
        files = {}
        for name in ("teacher", "student", "control"):
            if name in folders:
                runs.finished_config(folders[name])
                files[name] = Path(folders[name]) / "logits.npz"
        arrays = {name: runs.read_npz(file, runs.LOGITS) for name, file in files.items()}
        if "teacher" not in folders:
            taught = Path(folders.get("taught", folders["student"])) / "teacher.npz"
            files = dict(teacher=taught, **files)  # first, as below
            logits = runs.read_npz(taught, ["train_logits"], optional=["test_logits"])
            arrays["teacher"] = {**arrays["student"], "test_logits": None, **logits}  # the labels are the student's
        for split, found in points.items():
            if arrays["teacher"][f"{split}_logits"] is None:
                continue
            logits = {}
            labels = {}
            for name, file in files.items():  # the teacher's first
                logits[name] = runs.check_logits(arrays[name][f"{split}_logits"], file, logits.get("teacher"))
                labels[name] = runs.check_labels(arrays[name][f"{split}_labels"], file, logits[name])
                if not np.array_equal(labels[name], labels["teacher"]):
                    both = f"{file.parent} and {files['teacher'].parent}"
                    raise InputError(f"{both} have different {split} labels: train both on the same data")
            found.append(dict(teacher=logits.pop("teacher"), labels=labels["teacher"], networks=logits))
    return {split: found for split, found in points.items() if found}


# ---------------------------------------------------------------- output


def of_control(networks, statistic):
    """What `claims.claim` takes of the control, {} without one; networks: {network: {statistic: measured}}."""
    if "control" not in networks:
        return {}
    return dict(control=networks["control"][statistic], difference=networks["student-control"][statistic])


def below_claim(text, networks):
    """The claim `text`, that most of the hardest quarter lies below y = x; networks: see `of_control`."""
    beside = of_control(networks, "low_below")
    return claims.claim(text, "> 50%", networks["student"]["low_below"], 0.5, unit="%", **beside)


def deviation_claims(tables, section="§3.1"):
    """Claims rows from {split: `measure` table}; section: where their headlines stand, None for no headlines.

    Those of "language" are the slope alone. Without a control there is no verdict on X, an argmax: selection alone can
    cause what is seen. Student minus control alone is no claim: on training points a perfect copy of the teacher lies
    below the control too.
    """
    rows = []
    for split, table in tables.items():
        networks = table["predicted"]
        steep = f"{split}: slope of the student's fit exceeds 1"
        beside = of_control(networks, "slope")
        slope = claims.claim(steep, "> 1", networks["student"]["slope"], 1, **beside)
        below = below_claim(f"{split}: most of the teacher's hardest quarter lies below y = x", networks)
        if "control" not in networks:
            for row in (slope, below):
                row.update(verdict="unclear: no control", note="selection alone can cause this")
        if section:
            slope = claims.headline(slope, section)
        if section == "§3.1":
            below = claims.headline(below, section)
        rows += [slope, below]
        of_label = table["label"]
        note = "X and Y of the label instead of the predicted class"
        text = f"{steep} for the label's class"
        rows.append(claims.claim(text, "> 1", of_label["student"]["slope"], 1, note, **of_control(of_label, "slope")))
        if split == "test" and "control" in networks:
            text = f"{split}: the student is more accurate than the control"
            accuracy = table["fidelity"]["student-control"]["accuracy"]
            rows.append(claims.claim(text, "> 0", accuracy, 0, "difference of accuracies", unit="points"))
    return rows


def statistics_markdown(tables):
    """All statistics as two Markdown tables, one line per split, class and network."""
    text = ""
    for names, kinds in ((STATISTICS, ("predicted", "label")), (FIDELITY, ("fidelity",))):
        rows = []
        for split in tables:
            for kind in kinds:
                for network, measured in tables[split][kind].items():
                    if network != "student-control":
                        rows.append([split, kind, network, *(claims.cell(measured[key]) for key in names)])
        text += claims.markdown_table(["split", "class", "network", *names], rows) + "\n"
    return text


def ends_of(values):
    """Both ends of an axis for nearly all `values`, with a margin."""
    low, high = np.quantile(values, [0.001, 0.999])
    margin = 0.03 * (high - low)
    return np.array([low - margin, high + margin])


def plot_one(axis, x, y, x_ends, y_ends, fit):
    """Log density of (X, Y) with y = x and the mean `fit` over seeds."""
    axis.hexbin(x, y, gridsize=60, bins="log", mincnt=1, extent=(*x_ends, *y_ends), cmap="viridis", linewidths=0.1)
    slope, intercept = fit["slope"]["value"], fit["intercept"]["value"]
    axis.plot(x_ends, x_ends, "k--", lw=1, label="y = x")
    axis.plot(x_ends, intercept + slope * x_ends, color=claims.COLOURS["other"], lw=1.5, label="least-squares fit")
    axis.axvline(np.quantile(x, 0.25), color="0.4", lw=1, ls=":", label="end of the teacher's hardest quarter")
    axis.set(xlim=x_ends, ylim=y_ends, xlabel="X = φ(teacher probability)")


def plot(points, tables, folder, title):
    """Figure 1a, for every split (rows) and network (columns), the points of all seeds together."""
    kept = {split: {} for split in points}  # counts on a grid, a text for each row of Y, from low to high
    networks = list(next(iter(points.values()))[0]["networks"])
    shape = (len(points), len(networks))
    figure, axes = claims.pyplot().subplots(*shape, figsize=(4 * shape[1], 3.9 * shape[0] + 0.3), squeeze=False)
    for row, (split, seeds) in zip(axes, points.items(), strict=True):
        every = [dict(point["networks"], teacher=point["teacher"]) for point in seeds]
        phi = {}
        for name in ("teacher", *networks):
            phi[name] = np.concatenate([phi_of_class(logits[name], logits["teacher"].argmax(1)) for logits in every])
        x_ends = ends_of(phi["teacher"])
        y_ends = ends_of(np.concatenate(list(phi.values())))
        for axis, name in zip(row, networks, strict=True):
            fit = tables[split]["predicted"][name]
            plot_one(axis, phi["teacher"], phi[name], x_ends, y_ends, fit)
            grid, _, _ = np.histogram2d(phi[name], phi["teacher"], GRID, (y_ends, x_ends))
            counts = [" ".join(f"{count:.0f}" for count in of_y) for of_y in grid]
            line = [fit["slope"]["value"], fit["intercept"]["value"]]
            kept[split][name] = dict(extent=[*x_ends, *y_ends], fit=line, counts=counts)
            axis.set_ylabel(f"Y = φ({name} probability)")
            slope, below = claims.cell(fit["slope"], 1, 2), claims.cell(fit["low_below"], 100, 0)
            size = f"n = {len(phi[name]):,}"
            axis.set_title(f"{split}: {name}, slope {slope}, {size}\nhardest quarter: {below}% below y = x")
    claims.legend_below(figure, axes[0][0], columns=4 if len(networks) > 1 else 1)
    figure.suptitle(title)
    claims.save_figure(figure, folder, "fig1a")
    runs.write_json(folder / "fig1a.json", kept)


def report(points, out, title, resamples=2000, section="§3.1", why_not=None, quiet=False, full=True):
    """Measure `points`, {split: one dict per seed, see `replicates`}, and write figure, statistics and claims to `out`.

    section: see `deviation_claims`; why_not: why nothing is claimed; full: see `claims.save_claims`.
    """
    for split, seeds in points.items():
        for point in seeds:
            if np.ptp(phi_of_class(point["teacher"], point["teacher"].argmax(1))) < 1e-9:
                raise InputError(f"the teacher is equally confident on all {split} points: check its logits")
    out.mkdir(parents=True, exist_ok=True)
    tables = {split: measure(seeds, resamples, quiet) for split, seeds in points.items()}
    first = next(iter(points.values()))
    over = claims.scope(len(first), len({point["teacher"].tobytes() for point in first}))
    if "train" in tables:
        fit = runs.fit_note(tables["train"]["fidelity"]["teacher"]["accuracy"]["value"])
        over = f"{over}; {fit}"
        title = f"{title}\n{fit}"
    facts = dict(seeds=len(first), intervals=f"95%, {over}", bootstrap=resamples)
    runs.write_json(out / "deviation.json", dict(facts, statistics=STATISTICS, fidelity=FIDELITY, tables=tables))
    runs.write_text(out / "statistics.md", statistics_markdown(tables))
    rows = deviation_claims(tables, section)
    if why_not:
        rows = [claims.claim(why_not, "above chance", dict(value=np.nan, low=np.nan, high=np.nan), 0)]
    claims.save_claims(out, rows, over, full)
    print(f"statistics: {out / 'statistics.md'}")
    plot(points, tables, out, title)
