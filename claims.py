"""What every figure ends with: intervals, claims with their verdicts, Markdown tables, and files of figures.

Intervals are 95%. Text shows accuracies in percent, files hold them as shares.
"""

import math
import os
from pathlib import Path

import numpy as np
from scipy import stats

import runs

# ---------------------------------------------------------------- intervals


def seed_term(values):
    """Squared half width of Student's 95% interval of the mean of `values` [S, …], one for each seed; 0 for one."""
    count = len(values)
    if count < 2:
        return 0.0 * np.asarray(values[0])
    return stats.t.ppf(0.975, count - 1) ** 2 * np.var(values, axis=0, ddof=1) / count


def mean_interval(values):
    """(mean, low, high) of independent seeds that have no points in common; infinite ends for a single value."""
    values = np.asarray(values, float)
    half = math.sqrt(seed_term(values)) if len(values) > 1 else math.inf
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


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
    values, draws = seeds[:, 0], seeds[:, 1:].mean(0)
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
    values, draws, count = pair[:, :, 0], pair[:, :, 1:].mean(1), pair.shape[1]
    covariance = 1.96**2 * np.cov(draws)
    if count > 1:
        covariance = covariance + stats.t.ppf(0.975, count - 1) ** 2 * np.cov(values) / count
    top, bottom = values.mean(1)
    with np.errstate(divide="ignore", invalid="ignore"):  # a seed without any gain
        found = dict(value=float(top / bottom), low=-math.inf, high=math.inf, seeds=(values[0] / values[1]).tolist())
    a, b, c = bottom**2 - covariance[1, 1], top * bottom - covariance[0, 1], top**2 - covariance[0, 0]
    if a > 0:
        root = math.sqrt(max(b**2 - a * c, 0.0))
        found |= dict(low=float((b - root) / a), high=float((b + root) / a))
    return found


def fit_note(fit):
    """What to say of a teacher that fits this share of its training labels, noisy ones included."""
    text = f"the teacher fits {100 * fit:.1f}% of its training labels"
    if fit >= 0.9:
        return text
    return (
        f"{text}: it does not interpolate them, the regime of the paper's claims (when_it_pays.py shows what to expect)"
    )


def scope(seeds, teachers=1):
    """What an interval covers, for the reader of a table: points alone, or points and seeds, and how many teachers."""
    if seeds == 1:
        return "over points only: one seed"
    whose = {1: "one teacher for all", seeds: "each with its own teacher"}.get(teachers, f"{teachers} teachers")
    return f"over points and {seeds} seeds, {whose}"


# ---------------------------------------------------------------- claims


def verdict(interval, threshold, above=True):
    """holds when the whole (low, high) is above (below) the threshold, fails when it is beyond it, else unclear."""
    low, high = interval if above else (-interval[1], -interval[0])
    threshold = threshold if above else -threshold
    return "holds" if low > threshold else "fails" if high < threshold else "unclear"


def claim(text, expected, value, low, high, threshold, above=True, note=""):
    """One row of a claims table. `value` with its 95% interval low..high is held against `threshold`."""
    judged = verdict((low, high), threshold, above)
    return dict(claim=text, expected=expected, measured=value, low=low, high=high, verdict=judged, note=note)


def checked_claims(rows, file):
    """`rows` as read from `file`; InputError when they are not those of a claims table."""
    with runs.reading(file, "remove it, or make that figure again"):
        if not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
            raise ValueError("it is not a table of claims")
        claims_markdown(rows)
        return rows


def save_claims(folder, rows, over=""):
    """Write claims.json and claims.md into `folder` and print the table; `over` says what the intervals cover."""
    rows = [dict(row, note="; ".join(filter(None, (row["note"], over)))) for row in rows]
    runs.write_json(Path(folder) / "claims.json", rows)
    runs.write_text(Path(folder) / "claims.md", claims_markdown(rows))
    print(claims_markdown(rows))


def show_results(folder):
    """Print every claims table below `folder` as one, and the paths of the figures."""
    rows = []
    for file in sorted(Path(folder).rglob("claims.json")):
        for row in checked_claims(runs.read_json(file), file):
            rows.append(dict(row, claim=f"{file.parent.relative_to(folder)}: {row['claim']}"))
    print(claims_markdown(rows))
    for figure in sorted(Path(folder).rglob("*.png")):
        print(f"figure: {figure}")


# ---------------------------------------------------------------- tables


def decimal(number, scale=1.0, digits=3):
    """A number as text, ? where it is undefined: NaN, infinite, or null from a JSON file (one seed has no interval over
    seeds, and a resample may leave a statistic undefined)."""
    return f"{scale * number:.{digits}f}" if number is not None and math.isfinite(number) else "?"


def cell(measured, scale=1.0, digits=3):
    """`value [low, high]` of a dict with these keys, as text."""
    value, low, high = (decimal(measured[key], scale, digits) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def markdown_table(headers, rows):
    """A Markdown table of cells, which are shown as str() shows them."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "".join(f"| {' | '.join(str(value) for value in line)} |\n" for line in lines)


def claims_markdown(rows):
    """Rows of `claim` as a Markdown table."""
    lines = []
    for row in rows:
        value, low, high = (decimal(row[key]) for key in ("measured", "low", "high"))
        lines.append([row["claim"], row["expected"], value, f"{low} to {high}", row["verdict"], row["note"]])
    return markdown_table(["claim", "expected", "measured", "95% interval", "verdict", "note"], lines)


# ---------------------------------------------------------------- figures


def pyplot():
    """matplotlib.pyplot without a window; imported where it is drawn, since that takes a second."""
    os.environ["MPLBACKEND"] = "Agg"  # whatever a notebook or a desktop has set there
    import matplotlib.pyplot as plt

    return plt


def band(axis, xs, cells, scale=1.0, **style):
    """Values over xs with their intervals as a band; cells: dicts with value, low and high."""
    (line,) = axis.plot(xs, [scale * c["value"] for c in cells], marker="o", ms=4, **style)
    low, high = ([scale * c[end] for c in cells] for end in ("low", "high"))
    axis.fill_between(xs, low, high, color=line.get_color(), alpha=0.2, lw=0)


def save_figure(figure, folder, name):
    """Write a matplotlib figure as PNG and PDF into `folder`, atomically, print the path and close it.

    The PNG records this command; no file holds a date, so the same run folders and command give the same bytes.
    """
    for text in (*figure.texts, *(axis.title for axis in figure.axes)):
        # They hold names that a user gave: no formulas, any bytes.
        text.set_text(text.get_text().encode(errors="replace").decode())
        text.set_parse_math(False)
    command = runs.command_line().encode(errors="replace").decode()
    for ending, metadata in (("pdf", dict(CreationDate=None)), ("png", dict(Command=command))):
        path = Path(folder) / f"{name}.{ending}"
        options = dict(format=ending, dpi=150, metadata=metadata)
        runs.write_atomic(path, lambda file, options=options: figure.savefig(file, **options))
    pyplot().close(figure)
    print(f"figure: {Path(folder) / name}.png")
