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


def mean_interval(values, level=0.95):
    """(mean, low, high): Student's t interval of the mean of independent seeds; infinite ends for a single value."""
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), -math.inf, math.inf
    half = stats.t.ppf(0.5 + level / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def resampled_sums(columns, resamples, rng, chunk=64):
    """Sums of columns [N, K] over the points themselves (row 0) and over `resamples` bootstrap draws of them."""
    n = len(columns)
    sums = [columns.sum(0, keepdims=True)]
    for start in range(0, resamples, chunk):
        draws = [np.bincount(rng.integers(n, size=n), minlength=n) for _ in range(min(chunk, resamples - start))]
        sums.append(np.stack(draws).astype(np.float64) @ columns)
    return np.concatenate(sums)


def itself(mean):
    """The statistic that is the mean over seeds itself, for `combine`."""
    return mean


def combine(seeds, rng=None, of=itself):
    """Mean over seeds and its 95% bootstrap interval, over points and, when there are several, over seeds.

    seeds: one array [1 + B, ...] per seed: its statistic, then the same on B draws of points, the same draws for every
    seed: what is particular to these points does not average out over seeds. With several seeds each replicate also
    draws seeds with replacement (the crossed "pigeonhole" bootstrap of Owen 2007, which errs towards wide intervals). A
    bootstrap of S seeds is too narrow by √(S/(S−1)) and by Student's t against the normal (Hesterberg 2015, §5), so the
    distances of its ends from the value are stretched by both. `of` maps means over seeds [B, ...] to the statistic
    [B]. Returns dict(value, low, high, seeds), where seeds holds the statistic of each seed.
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
    low, high = (float(value + stretch * (end - value)) for end in (low, high))
    return dict(value=value, low=low, high=high, seeds=of(values).tolist())


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
