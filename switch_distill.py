"""Figure 1b: switch from one-hot labels to distillation in the middle of training, and the reverse (paper §3.2).

    python switch_distill.py --seeds 0 1 2 3 4                           # digits, each seed with its own teacher
    python switch_distill.py --teacher runs/t --data cifar100 --arch resnet56 --recipe short --switch-at 0 0.5 1

s is the share of training before the switch: of one-hot → KD, s=0 is plain distillation and s=1 plain one-hot training.
Each seed trains these two trunks once, and a branch goes on from the state that its trunk had at s: on a CPU the same
run, bit for bit, as from scratch. Recovered share: (accuracy of the switched student − one-hot) / (KD − one-hot).

Writes fig1b (accuracy against s), fig1b_curves, switch.json, switch.md and claims into --results. Runs are those of
train_teacher.py and train_student.py, and finished ones are shared with them.
Departure from the paper: its switch is gradual over about 1,000 steps; here it is abrupt unless --window is given.
"""

from pathlib import Path

import numpy as np
from tqdm import tqdm

import analyze_deviation
import claims
import common
import engine
import runs
from analyze_deviation import claim_of
from runs import InputError, number
from train_student import add_student_flags, train_student
from train_teacher import train_teacher

SWITCHES = {"onehot2kd": ("onehot", "kd"), "kd2onehot": ("kd", "onehot")}
ARROWS = {"onehot2kd": "one-hot → KD", "kd2onehot": "KD → one-hot"}

# ---------------------------------------------------------------- runs


def switched_weights(before, after, switch_step, window=0):
    """weights_at(step) -> (ce_weight, kd_weight): `before`, then from switch_step on `after`.

    Between the two, over `window` steps, the weights move linearly.
    """

    def weights_at(step):
        share = min(1.0, max(0.0, (step - switch_step) / window)) if window else float(step >= switch_step)
        return tuple((1 - share) * b + share * a for b, a in zip(before, after, strict=True))

    return weights_at


def run_folders(base, options, seed, steps, total):
    """One seed's {(direction, s): run folder}, and its trunks {"onehot": run folder, "kd": run folder}.

    base: prefix of all names; options: with `direction` and `window`; steps: {s: step of the switch, of `total`}. The
    folders of s = 0 and s = 1 are the trunks.
    """
    trunks = {name: Path(f"{base}-{name}-s{seed}") for name in ("onehot", "kd")}
    window = f"-w{options.window}" if options.window else ""
    folders = {}
    for direction in options.direction:
        before, after = SWITCHES[direction]
        for s, step in steps.items():
            branch = Path(f"{base}-{direction}-{s:g}{window}-s{seed}")
            folders[direction, s] = {0: trunks[after], total: trunks[before]}.get(step, branch)
    return folders, trunks


def latest_snapshot(run, step):
    """The newest readable snapshot-<at>.pt of a run with at <= step, or None; a note says which are damaged."""
    files = [file for file in run.glob("snapshot-*.pt") if runs.RUN_FILE.fullmatch(file.name)]
    kept = {int(file.stem.removeprefix("snapshot-")): file for file in files}
    for at in sorted((at for at in kept if at <= step), reverse=True):
        try:
            runs.load_checkpoint(kept[at])
            return kept[at]
        except InputError:
            print(f"note: {kept[at]} is damaged and not used; the branch starts earlier")
    return None


def train_seed(base, args, seed, data, steps, teacher):
    """Train one seed's trunks and its branches, unless they are finished.

    steps: see `run_folders`; teacher: `engine.TeacherLogits`.
    """
    _, total = common.total_steps(args, data)
    folders, trunks = run_folders(base, args, seed, steps, total)
    weights = {"onehot": (1.0, 0.0), "kd": (args.ce_weight, args.kd_weight)}
    one_hot = common.only_flags(args, common.add_flags, add_student_flags, ce_weight=1.0, kd_weight=0.0)
    flags = {"onehot": one_hot, "kd": args}
    kept = {step for step in steps.values() if 0 < step < total} | common.snapshot_steps(args, data)

    train_student(trunks["onehot"], flags["onehot"], seed, data, snapshots=kept)
    train_student(trunks["kd"], flags["kd"], seed, data, teacher, snapshots=kept)
    for (direction, s), run in folders.items():
        if run not in trunks.values():
            before, after = SWITCHES[direction]
            weights_at = switched_weights(weights[before], weights[after], steps[s], args.window)
            # Without a state (the trunk was trained by another script, or with other switches) the branch is trained
            # from the start: slower, with the same result.
            start = latest_snapshot(trunks[before], steps[s])
            switch = dict(direction=direction, step=steps[s], window=args.window)
            train_student(run, flags[after], seed, data, teacher, weights_at, start_from=start, switch=switch)


# ---------------------------------------------------------------- measures


def accuracy_sums(folders, resamples, rng):
    """Test accuracies [1 + B, R] of the run `folders` [R] of one seed: on the test points, then on bootstrap draws."""
    correct, first = [], None
    for file in [run / "logits.npz" for run in folders]:
        arrays = runs.read_npz(file, ("test_logits", "test_labels"))
        logits = analyze_deviation.check_logits(arrays["test_logits"], file, first)
        first = logits if first is None else first
        correct.append(logits.argmax(1) == analyze_deviation.check_labels(arrays["test_labels"], file, logits))
    return claims.resampled_sums(np.stack(correct, axis=1).astype(float), resamples, rng) / len(first)


def recovered(per_seed):
    """Accuracy, gain and recovered share, paired, from each seed's `accuracy_sums` of (switched, onehot, kd).

    The share is None, with the reason beside it, when the gain is not above 0 with its whole interval.
    """
    accuracy, onehot, kd = np.moveaxis(np.stack(per_seed), -1, 0)  # each [S, 1 + B]
    gain, difference = claims.combine(kd - onehot), claims.combine(accuracy - onehot)
    row = dict(accuracy=claims.combine(accuracy), difference=difference, gain=gain)
    if gain["low"] <= 0:
        reason = "gain too small to divide" if gain["high"] >= 0 else "KD loses accuracy here"
        return dict(row, recovered=None, reason=reason)
    return dict(row, recovered=claims.ratio(accuracy - onehot, kd - onehot))


def switch_table(folders, trunks, teachers, seeds, resamples, quiet=False):
    """One row per (direction, s): accuracy, gain, recovered share, and the deviations of the switched student.

    folders, trunks: {seed: as `run_folders` returns}; teachers: {seed: run folder}; quiet: without a progress bar.
    """
    rows, deviations = [], {}
    onehots = [trunks[seed]["onehot"] for seed in seeds]
    for direction, s in tqdm(folders[seeds[0]], "measuring", leave=False, disable=quiet or None):
        students = tuple(folders[seed][direction, s] for seed in seeds)
        per_seed = []
        for seed, student in zip(seeds, students, strict=True):
            compared = (student, trunks[seed]["onehot"], trunks[seed]["kd"])
            per_seed.append(accuracy_sums(compared, resamples, np.random.default_rng(1)))
        row = dict(direction=direction, s=s, runs=[str(run) for run in students], **recovered(per_seed))
        if students not in deviations:  # the trunks stand in both directions
            points = analyze_deviation.points_from_runs([teachers[seed] for seed in seeds], students, onehots)
            measured = {split: analyze_deviation.measure(points[split], resamples) for split in points}
            deviations[students] = {split: measured[split]["predicted"] for split in points}
        rows.append(dict(row, deviation=deviations[students]))
    return rows


def table_markdown(rows):
    """The rows of `switch_table` as a Markdown table."""
    headers = ["direction", "s", "test accuracy %", "minus one-hot", "recovered share"]
    headers += ["train slope", "train low quarter below", "train low gap", "test low gap"]
    lines = []
    for row in rows:
        train, test = (row["deviation"][split]["student"] for split in ("train", "test"))
        share = claims.cell(row["recovered"], 1, 2) if row["recovered"] else row["reason"]
        accuracies = [claims.cell(row[key], 100, 2) for key in ("accuracy", "difference")]
        gaps = [train["slope"], train["low_below"], train["low_gap"], test["low_gap"]]
        lines.append([ARROWS[row["direction"]], f"{row['s']:g}", *accuracies, share, *map(claims.cell, gaps)])
    return claims.markdown_table(headers, lines)


def switch_claims(rows, section="§3.2"):
    """Claims rows: the gain, what switching at half time does to it, and whether late switching already deviates.

    section: where the headlines stand; None for no headlines.
    """
    gain = rows[0]["gain"]
    found = [claim_of("KD is more accurate than one-hot", "> 0", gain, 0, "difference of test accuracies")]
    texts = {
        "onehot2kd": ("switching to KD at half time recovers most of the gain", "> 0.5", True),
        "kd2onehot": ("reverse switching at half time loses most of the gain", "< 0.5", False),
    }
    for row in rows:
        text, expected, above = texts[row["direction"]]
        if row["s"] == 0.5 and row["recovered"]:
            found.append(claim_of(text, expected, row["recovered"], 0.5, "recovered share", above))
        elif row["s"] == 0.5:
            found.append(claim_of(text, "gain above 0", gain, np.nan, row["reason"]))
    if section:  # where no share is recovered, the gain stands in its place
        units = ["" if row["note"] == "recovered share" else "points" for row in found]
        found = [claims.headline(row, section, unit=unit) for row, unit in zip(found, units, strict=True)]
    switched = [row for row in rows if row["direction"] == "onehot2kd" and 0 < row["s"] < 1]
    if switched:
        late = max(switched, key=lambda row: row["s"])
        for split, networks in late["deviation"].items():
            text = f"{split}: switching to KD at s={late['s']:g} already lowers the student on the hardest quarter"
            gap = networks["student-control"]["low_gap"]
            found.append(claim_of(text, "< 0", gap, 0, "mean Y − X, switched student minus one-hot", above=False))
    return found


# ---------------------------------------------------------------- figures


def plot_switches(rows, folder, title):
    """Figure 1b: test accuracy against the share of training before the switch."""
    figure, axis = claims.pyplot().subplots(figsize=(5.6, 3.8))
    onehot = 100 * (rows[0]["accuracy"]["value"] - rows[0]["difference"]["value"])
    kd = onehot + 100 * rows[0]["gain"]["value"]
    axis.axhline(onehot, color=claims.COLOURS["onehot"], ls="--", lw=1.2, label="one-hot throughout")
    axis.axhline(kd, color=claims.COLOURS["kd"], ls="--", lw=1.2, label="KD throughout")
    for direction, color in (("onehot2kd", claims.COLOURS["other"]), ("kd2onehot", claims.COLOURS["more"])):
        chosen = sorted((row for row in rows if row["direction"] == direction), key=lambda row: row["s"])
        if chosen:
            xs, cells = [row["s"] for row in chosen], [row["accuracy"] for row in chosen]
            claims.band(axis, xs, cells, 100, color=color, label=ARROWS[direction])
    axis.set(xlabel="share of training before the switch", ylabel="test accuracy (%)", title=title)
    claims.legend_below(figure, axis)
    claims.save_figure(figure, folder, "fig1b")


def curves(folders):
    """Epochs [E] at which all of the run `folders` [S] were evaluated, and test accuracies in percent [S, E]."""
    found = []
    for run in folders:
        found.append({line["epoch"]: line["test_acc"] for line in runs.read_metrics(run) if "test_acc" in line})
    epochs = np.array(sorted(set.intersection(*map(set, found))))
    if not len(epochs):
        of = ", ".join(map(str, folders))
        raise InputError(f"{of}: metrics.jsonl has no epoch with a test_acc in all: train these again with --overwrite")
    return epochs, 100 * np.array([[curve[epoch] for epoch in epochs] for curve in found])


def plot_curves(folders, trunks, seeds, folder, title):
    """Test accuracy over training: the pure runs with their seeds, and the mean of every switch, its moment marked."""
    plt = claims.pyplot()
    directions = list(dict.fromkeys(direction for direction, _ in folders[seeds[0]]))
    shares = sorted({s for _, s in folders[seeds[0]] if 0 < s < 1})
    shades = dict(zip(shares, plt.get_cmap("magma")(np.linspace(0.15, 0.7, len(shares))), strict=True))
    size = (4.5 * max(len(directions), 1.3), 3.6)
    figure, axes = plt.subplots(1, len(directions), squeeze=False, sharey=True, figsize=size)
    for axis, direction in zip(axes[0], directions, strict=True):
        for trunk, label in (("onehot", "one-hot throughout"), ("kd", "KD throughout")):
            epochs, accuracy = curves([trunks[seed][trunk] for seed in seeds])
            style = dict(color=claims.COLOURS[trunk], zorder=1)
            axis.plot(epochs, accuracy.T, lw=0.5, alpha=0.4, **style)
            axis.plot(epochs, accuracy.mean(0), lw=1.8, label=label, **style)
        last = epochs[-1]
        for s in [s for s in shares if (direction, s) in folders[seeds[0]]]:
            epochs, accuracy = curves([folders[seed][direction, s] for seed in seeds])
            mean, after = accuracy.mean(0), epochs > s * last  # before its switch a branch is its trunk
            xs = np.concatenate([[s * last], epochs[after]])
            ys = np.concatenate([[np.interp(s * last, epochs, mean)], mean[after]])
            axis.plot(xs, ys, "v-", markevery=[0], ms=6, lw=1.4, color=shades[s], label=f"switched at s = {s:g}")
        axis.set(xlabel="epoch", title=ARROWS[direction])
    axes[0][0].set_ylabel("test accuracy (%)")
    drawn = np.concatenate([line.get_ydata() for axis in axes[0] for line in axis.lines])
    axes[0][0].set_ylim(bottom=max(0, np.quantile(drawn, 0.05) - 2))
    claims.legend_below(figure, axes[0][0], columns=3)
    figure.suptitle(title)
    claims.save_figure(figure, folder, "fig1b_curves")


def report(folders, trunks, teachers, seeds, results, title, args, section="§3.2"):
    """Measure all switches, see `switch_table`, and write table, claims and figures into the folder `results`.

    args: with bootstrap and quiet; section: see `switch_claims`, without it the claims are not printed.
    """
    results.mkdir(parents=True, exist_ok=True)
    over = claims.scope(len(seeds), len(set(teachers.values())))
    rows = switch_table(folders, trunks, teachers, seeds, args.bootstrap, args.quiet)
    runs.write_json(results / "switch.json", dict(intervals=f"95%, {over}", rows=rows))
    runs.write_text(results / "switch.md", f"Intervals: 95%, {over}.\n\n{table_markdown(rows)}")
    claims.save_claims(results, switch_claims(rows, section), over, full=section is not None)
    print(f"all measures: {results / 'switch.md'}")
    plot_switches(rows, results, f"{title}\n95% intervals {over}")
    plot_curves(folders, trunks, seeds, results, f"{title}, mean of {len(seeds)} seed{'s' * (len(seeds) > 1)}")


# ---------------------------------------------------------------- command line


def parse(argv):
    parser = runs.Parser(__doc__)
    prefix = "prefix of the run folders: <out>-teacher-s0, <out>-kd-s0, … (default: runs/<data>-<arch>)"
    common.add_flags(parser, out_help=prefix)
    add_student_flags(parser)
    common.add_process_flags(parser)
    add, every = parser.add_argument_group("switches and results").add_argument, list(SWITCHES)
    which = f"which switches to train, of {', '.join(every)} (default: both)"
    add("--direction", choices=every, nargs="+", default=every, metavar="WHICH", help=which)
    shares = "shares of training before the switch; 0 and 1 are the pure runs"
    default = [0, 0.25, 0.5, 0.75, 0.9, 1]
    add("--switch-at", type=number(float, 0, 1), nargs="+", default=default, metavar="S", help=shares)
    window = "steps over which the weights move linearly to the new loss (0: at once)"
    add("--window", type=number(int, 0), default=0, metavar="STEPS", help=window)
    draws = number(int, 100, 1_000_000)
    add("--bootstrap", type=draws, default=2000, metavar="N", help="bootstrap draws behind each interval")
    add("--results", default="results/fig1b", metavar="FOLDER", help="folder for figures, tables and claims")
    args = engine.resolve(parser.parse_args(argv))
    if not args.kd_weight:
        raise InputError("--kd-weight 0 leaves nothing to switch to: give it a weight above 0")
    runs.check_prefix(args)
    return args


def main(argv=None):
    args = parse(argv)
    data = common.data_from(args)
    _, total = common.total_steps(args, data)
    steps = {s: round(s * total) for s in sorted(set(args.switch_at))}
    base, results, seeds = args.out or f"runs/{runs.default_name(args)}", Path(args.results), engine.shard_of(args)
    results.mkdir(parents=True, exist_ok=True)

    common.check_model(args, data)  # what is wrong fails before anything is discarded
    pattern = args.teacher or f"{base}-teacher-s{{seed}}"
    teachers = {seed: Path(pattern.replace("{seed}", str(seed))) for seed in seeds}
    given = {run: engine.load_teacher(run, data) for run in sorted(set(teachers.values()))} if args.teacher else {}
    kd_trunks = len(seeds) / max(1, len(set(teachers.values())))  # of one teacher
    switched = sum(total - step for step in steps.values() if 0 < step < total) / total
    students = kd_trunks * (1 + switched * ("onehot2kd" in args.direction))
    tables = Path(base).parent / "teacher-logits"
    source = engine.teacher_source(args, data, students, kd_trunks, tables)
    both = {seed: run_folders(base, args, seed, steps, total) for seed in seeds}
    planned = [run for pair in both.values() for part in pair for run in part.values()]
    planned += [] if args.teacher else teachers.values()
    runs.discard_runs(args, planned, given)

    engine.run_jobs(args)
    teacher, several = None, len(set(teachers.values())) > 1
    for seed, run in teachers.items():
        if not args.teacher:
            train_teacher(run, args, seed, data)
        if several or not teacher:  # one at a time, for its table may fill the memory
            model = given.get(run) or engine.load_teacher(run, data)
            teacher = engine.TeacherLogits(model, data, args.precision, source, tables)
        train_seed(base, args, seed, data, steps, teacher)
    if engine.only_a_shard(args):
        return

    folders, trunks = ({seed: pair[k] for seed, pair in both.items()} for k in (0, 1))
    report(folders, trunks, teachers, seeds, results, f"{args.data}, {args.arch}", args)


if __name__ == "__main__":
    runs.cli(main)
