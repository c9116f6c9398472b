"""What every figure ends with: intervals, claims with their verdicts, Markdown tables, and files of figures.

Intervals are 95%. Text shows accuracies in percent, files hold them as shares.
"""

import io
import math
import os
import textwrap
from collections import Counter
from pathlib import Path

import runs

import numpy as np
from scipy.special import stdtrit  # Student's t; scipy.stats takes a second to import

# ---------------------------------------------------------------- intervals


def seed_term(values):
    """Squared half width of Student's 95% interval of the mean of `values` [S, …], one for each seed; 0 for one."""
    count = len(values)
    if count < 2:
        return 0.0 * np.asarray(values[0])
    return stdtrit(count - 1, 0.975) ** 2 * np.var(values, axis=0, ddof=1) / count


def mean_interval(values):
    """(mean, low, high) over seeds alone, on given points; infinite ends for a single value."""
    values = np.asarray(values, float)
    half = math.sqrt(seed_term(values)) if len(values) > 1 else math.inf
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def over_seeds(values):
    """dict(value, low, high, seeds) of one number per seed; of one nested dict per seed, the dict of these."""
    if isinstance(values[0], dict):
        # Some seed may lack a key: its points may happen to have no flipped label.
        keys = [key for key in values[0] if all(key in value for value in values)]
        return {key: over_seeds([value[key] for value in values]) for key in keys}
    value, low, high = mean_interval(values)
    return dict(value=value, low=low, high=high, seeds=[float(value) for value in values])


def accuracy(hits):
    """What `combine` gives for accuracies: hits [S, N], whether each seed's network is right on each test point."""
    hits = np.stack(hits).astype(float)
    # The bootstrap standard error of a mean over points, in closed form.
    half = math.sqrt(seed_term(hits.mean(1)) + 1.96**2 * hits.mean(0).var() / hits.shape[1])
    return within(dict(value=float(hits.mean()), low=float(hits.mean()) - half, high=float(hits.mean()) + half))


def within(measured, lowest=0.0, highest=1.0):
    """dict(value, low, high, …) with the ends of its interval cut at what is possible, by default for a share."""
    return dict(measured, low=max(measured["low"], lowest), high=min(measured["high"], highest))


def resampled_sums(columns, resamples, rng, chunk=64):
    """Sums of columns [N, K] over the points themselves (row 0) and over `resamples` bootstrap draws of them."""
    n = len(columns)
    sums = [columns.sum(0, keepdims=True)]
    for start in range(0, resamples, chunk):
        draws = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(min(chunk, resamples - start))]
        sums.append(np.stack(draws).astype(np.float64) @ columns)
    return np.concatenate(sums)


def combine(seeds):
    """Mean over seeds of a statistic and its 95% interval, over points and, when there are several, over seeds.

    seeds: one array [1 + B] per seed: its statistic, then the same on B bootstrap draws of points, the same draws for
    every seed, since seeds share their points. Half width² = (t_{S−1}·s/√S)² + (1.96·SE)²: s the standard deviation
    over seeds, SE the bootstrap standard error of the mean over seeds. One seed: points alone. Returns dict(value, low,
    high, seeds), where seeds holds the statistic of each seed.
    """
    seeds = np.stack(seeds)
    values = seeds[:, 0]
    draws = seeds[:, 1:].mean(0)
    # A statistic that a draw leaves undefined (a quarter without spread) makes the interval undefined, not narrower.
    half = math.sqrt(seed_term(values) + 1.96**2 * draws.var(ddof=1)) if np.isfinite(draws).all() else math.nan
    value = float(values.mean())
    return dict(value=value, low=value - half, high=value + half, seeds=values.tolist())


def ratio(numerators, denominators):
    """The same for mean(numerator)/mean(denominator), by Fieller's method (1954) with the two terms of `combine`.

    Both as `combine` takes them. The interval holds every r for which numerator − r·denominator is compatible with 0, a
    quadratic in r; it is unbounded (infinite ends) where the denominator itself is compatible with 0.
    """
    pair = np.stack([np.stack(numerators), np.stack(denominators)])  # [2, S, 1 + B]
    values = pair[:, :, 0]
    draws = pair[:, :, 1:].mean(1)
    count = values.shape[1]
    covariance = 1.96**2 * np.cov(draws)
    if count > 1:
        covariance = covariance + stdtrit(count - 1, 0.975) ** 2 * np.cov(values) / count
    top, bottom = values.mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):  # a seed without any gain
        found = dict(value=float(top / bottom), low=-math.inf, high=math.inf, seeds=(values[0] / values[1]).tolist())
    a = bottom**2 - covariance[1, 1]
    b = top * bottom - covariance[0, 1]
    c = top**2 - covariance[0, 0]
    if a > 0:  # the r with a·r² − 2·b·r + c <= 0
        root = math.sqrt(max(b**2 - a * c, 0.0))
        found.update(low=float((b - root) / a), high=float((b + root) / a))
    return found


def counted(seeds):
    """How many seeds, in words."""
    return "2 seeds (two: wide intervals)" if seeds == 2 else f"{seeds} seeds"


def seeds_scope(seeds):
    """What an interval over seeds alone covers, for the reader of a table."""
    if seeds == 1:
        return "one seed: no intervals"
    return f"Student's t over {counted(seeds)}"


def scope(seeds, teachers=1):
    """What an interval covers, for the reader of a table: points alone, or points and seeds, and how many teachers."""
    if seeds == 1:
        return "over points only: one seed"
    whose = f"{teachers} teachers"
    if teachers == 1:
        whose = "one teacher for all"
    elif teachers == seeds:
        whose = "each with its own teacher"
    return f"over points and {counted(seeds)}, {whose}"


# ---------------------------------------------------------------- claims

SECTIONS = ("§3.1", "§3.2", "title", "§4", "§5", "language")  # of the paper, in the order of the headlines
VERDICTS = ("holds", "as the control", "fails", "unclear", "unclear: no control", "mixed")


def verdict(interval, threshold, above=True):
    """holds when the whole (low, high) is above (below) the threshold, fails when it is beyond it, else unclear."""
    low, high = interval
    if not above:
        low, high, threshold = -high, -low, -threshold
    if low > threshold:
        return "holds"
    if high < threshold:
        return "fails"
    return "unclear"


def claim(text, expected, measured, threshold, note="", above=True, unit="", control=None, difference=None):
    """One row of a claims table: the 95% interval of `measured`, dict(value, low, high), is held against `threshold`.

    unit: "%" for a share, "points" for a difference of shares, both shown times 100. control, difference: the same
    statistic of the control, and of measured minus control, paired. Where the control meets the claim too, and the
    difference is not clearly on the paper's side of 0, the claim does not tell the two apart: the verdict is "as the
    control".
    """
    value, low, high = (measured[key] for key in ("value", "low", "high"))
    judged = verdict((low, high), threshold, above)
    if judged == "holds" and difference:
        control_meets = verdict((control["low"], control["high"]), threshold, above) == "holds"
        apart = verdict((difference["low"], difference["high"]), 0, above) == "holds"
        if control_meets and not apart:
            judged = "as the control"
    row = dict(claim=text, expected=expected, measured=value, low=low, high=high, verdict=judged, note=note)
    return dict(row, shown=in_unit(measured, unit), control=in_unit(control, unit) if control else "")


def joint_claim(text, verdicts, of_controls=()):
    """The row of a claim with the common verdict of all its comparisons, {comparison: verdict}, else "mixed".

    of_controls: the verdicts on the same comparisons of their controls.
    """
    held = list(verdicts.values()).count("holds")
    note = "; ".join(f"({key}) {found}" for key, found in verdicts.items())
    note += ". Measured: how many hold, without interval"
    row = claim(text, f"all {len(verdicts)} comparisons hold", dict(value=held, low=held, high=held), 0, note)
    row["verdict"] = "mixed"
    if len(set(verdicts.values())) == 1:
        row["verdict"] = next(iter(verdicts.values()))
    if of_controls:
        row["control"] = f"{of_controls.count('holds')} of {len(of_controls)}"
    return dict(row, shown=f"{held} of {len(verdicts)}")


def headline(row, section):
    """`row` of `claim`, marked as one of the few that the paper is known for; section: one of SECTIONS."""
    return dict(row, section=section)


def headlines(rows):
    """Those of `rows` that `headline` marked, in the paper's order."""
    found = [row for row in rows if "section" in row]
    return sorted(found, key=lambda row: SECTIONS.index(row["section"]))


def save_claims(folder, rows, over="", full=True):
    """Write claims.json and claims.md into `folder` and print the table, of a long one the headlines alone.

    over: what the intervals cover, added to every note; full: False prints the headlines alone, if there are any.
    """
    rows = [dict(row, note="; ".join(filter(None, (row["note"], over)))) for row in rows]
    runs.write_json(Path(folder) / "claims.json", rows)
    runs.write_text(Path(folder) / "claims.md", claims_markdown(rows))
    if full and len(rows) <= 12:
        print(claims_markdown(rows))
    elif headlines(rows):
        print(headlines_markdown(headlines(rows)))
    print(f"claims: {Path(folder) / 'claims.md'} ({verdicts_in_words(rows)})")


def verdicts_in_words(rows):
    """How many rows there are of each verdict."""
    found = Counter(row["verdict"] for row in rows)
    return ", ".join(f"{found[verdict]} {verdict}" for verdict in VERDICTS if found[verdict])


# ---------------------------------------------------------------- tables


def decimal(number, scale=1.0, digits=3):
    """A number as text, ? where it is undefined: NaN, infinite, or null from a JSON file (one seed has no interval over
    seeds, and a resample may leave a statistic undefined)."""
    if number is None or not math.isfinite(number):
        return "?"
    return f"{round(float(scale * number), digits) + 0.0:.{digits}f}"  # + 0.0: no -0.00


def cell(measured, scale=1.0, digits=3):
    """`value [low, high]` of a dict with these keys, as text."""
    value, low, high = (decimal(measured[key], scale, digits) for key in ("value", "low", "high"))
    if low == high == "?":  # of one seed, or of a ratio to what may be 0
        return f"{value} (no interval)"
    return f"{value} [{low}, {high}]"


def in_unit(measured, unit=""):
    """`cell` of a dict(value, low, high) in a unit of `claim`."""
    if unit:
        return f"{cell(measured, 100, 1)} {unit}"
    return cell(measured, 1, 2)


def markdown_table(headers, rows):
    """A Markdown table of cells, which are shown as str() shows them."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(str(value) for value in line)} |\n" for line in lines)


def claims_markdown(rows, names=("claim", "expected", "shown", "control", "verdict", "note")):
    """Rows of `claim` as a Markdown table."""
    headers = [{"shown": "here [95% interval]", "section": "paper"}.get(name, name) for name in names]
    return markdown_table(headers, [[row[name] for name in names] for row in rows])


def headlines_markdown(rows):
    """Rows of `headline` as a Markdown table."""
    return claims_markdown(rows, ("section", "claim", "expected", "shown", "control", "verdict"))


# ---------------------------------------------------------------- figures

# Okabe and Ito (2008): told apart by colour-blind readers too. One colour for one kind of network in every figure.
COLOURS = dict(teacher="#000000", onehot="#E69F00", kd="#0072B2", smoothed="#009E73", other="#D55E00", more="#CC79A7")


def pyplot():
    """matplotlib.pyplot in one style, without a window; imported where it is drawn, since that takes a second."""
    os.environ["MPLBACKEND"] = "Agg"  # whatever a notebook or a desktop has set there
    import matplotlib.pyplot as plt

    colours = [COLOURS[name] for name in COLOURS if name != "teacher"]
    plt.rc("font", size=9)
    plt.rc("axes", titlesize=9, grid=True, axisbelow=True, prop_cycle=plt.cycler(color=colours))
    plt.rc("axes.spines", top=False, right=False)
    plt.rc("grid", color="0.92")
    plt.rc("legend", fontsize=8, frameon=False)
    plt.rc("figure.constrained_layout", use=True)
    plt.rc("pdf", fonttype=42)
    return plt


def band(axis, xs, cells, scale=1.0, **style):
    """Values over xs with their intervals as a band, seeds as thin lines behind; cells: dicts(value, low, high, …)."""
    (line,) = axis.plot(xs, [scale * c["value"] for c in cells], marker="o", ms=4, **style)
    low, high = ([scale * c[end] for c in cells] for end in ("low", "high"))
    axis.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, lw=0)
    if len(xs) == 1:  # a band of one point cannot be seen
        axis.vlines(xs, low, high, color=line.get_color(), alpha=0.5)
    if all("seeds" in c for c in cells):
        each = scale * np.array([c["seeds"] for c in cells])
        axis.plot(xs, each, color=line.get_color(), lw=0.5, alpha=0.5, zorder=1)


def legend_below(figure, axis, columns=4):
    """One legend for the whole figure, of the labels of `axis`, below it and off the data."""
    figure.legend(*axis.get_legend_handles_labels(), loc="outside lower center", ncols=columns)


def save_figure(figure, folder, name):
    """Write a matplotlib figure as PDF and as PNG, which records this command, into `folder`, and close it."""
    for text in (*figure.texts, *(axis.title for axis in figure.axes)):
        # They hold names that a user gave: no formulas, any bytes, any length.
        shown = text.get_text().encode(errors="replace").decode()
        columns = int(13 * figure.get_figwidth())  # 13 letters an inch
        text.set_text("\n".join(textwrap.fill(line, columns) for line in shown.splitlines()))
        text.set_parse_math(False)
    command = runs.command_line().encode(errors="replace").decode()
    # No file holds a date: the same run folders and command give the same bytes.
    for ending, metadata in (("pdf", dict(CreationDate=None)), ("png", dict(Command=command))):
        path = Path(folder) / f"{name}.{ending}"
        file = io.BytesIO()
        figure.savefig(file, format=ending, dpi=150, metadata=metadata)
        runs.write_atomic(path, file.getvalue())
    pyplot().close(figure)
    print(f"figure: {Path(folder) / name}.png (python report.py shows all on one page)")
