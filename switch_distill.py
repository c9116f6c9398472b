"""Figure 1b: switch from one-hot labels to distillation in the middle of training, and the reverse (paper §3.2).

    python switch_distill.py --seeds 0 1 2 3 4                           # digits, each seed with its own teacher
    python switch_distill.py --teacher runs/t --data cifar100 --arch resnet56 --recipe short --switch-at 0 0.5 1

s is the share of training before the switch: of one-hot → KD, s=0 is plain distillation and s=1 plain one-hot training.
Each seed trains these two trunks once, and a branch goes on from the state that its trunk had at s: on a CPU the same
run, bit for bit, as from scratch. Recovered gain: (accuracy of the switched student − one-hot) / (KD − one-hot); 1 is
that of distillation throughout.

Writes fig1b (accuracy against s), fig1b_curves, switch.json, switch.md and claims into --results. Runs are those of
train_teacher.py and train_student.py, and finished ones are shared with them.
Departure from the paper: its switch is gradual over about 1,000 steps; here it is abrupt.
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

SWITCHES = {"onehot2kd": ("onehot", "kd"), "kd2onehot": ("kd", "onehot")}
ARROWS = {"onehot2kd": "one-hot → KD", "kd2onehot": "KD → one-hot"}

# ---------------------------------------------------------------- runs


def run_folders(base, args, seed):
    """One seed's run folders by name: teacher, the trunks onehot and kd, and each branch (direction, s).

    s = 0 and s = 1 are the trunks themselves. base: prefix of all names; args: the flags --direction and --switch-at.
    """
    folders = {name: Path(f"{base}-{name}-s{seed}") for name in ("teacher", "onehot", "kd")}
    for direction in args.direction:
        before, after = SWITCHES[direction]
        for s in args.switch_at:
            if s == 0:
                folders[direction, s] = folders[after]
            elif s == 1:
                folders[direction, s] = folders[before]
            else:
                folders[direction, s] = Path(f"{base}-{direction}-{s:g}-s{seed}")
    return folders


def latest_snapshot(run, step):
    """The newest snapshot-<at>.pt of a run with at <= step, or None."""
    files = [file for file in run.glob("snapshot-*.pt") if runs.RUN_FILE.fullmatch(file.name)]
    kept = {int(file.stem.removeprefix("snapshot-")): file for file in files}
    before = [at for at in kept if at <= step]
    if not before:
        return None
    return kept[max(before)]


def switching(before, after, switch_step):
    """The weights_at of a run whose loss weights are those of the flags `before`, and of `after` from a step on."""

    def weights_at(step):
        now = before if step < switch_step else after
        return now.ce_weight, now.kd_weight

    return weights_at


def train_seed(base, args, seed, data):
    """Train one seed's teacher, unless one is given, its trunks and its branches, unless they are finished.

    Returns their `run_folders`; without "teacher" where it came from a file of weights or logits.
    """
    folders = run_folders(base, args, seed)
    if args.teacher or args.teacher_logits:
        teacher = engine.open_teacher(args, seed, data)
        del folders["teacher"]
        if not teacher.logits:  # a run folder; one from a file of weights or logits has none
            folders["teacher"] = Path(teacher.name)
    else:
        engine.train_teacher(folders["teacher"], args, seed, data)
        teacher = engine.open_teacher(args, seed, data, trained=folders["teacher"])
    flags = {"onehot": common.one_hot_flags(args), "kd": args}
    _, total = common.total_steps(args, data)
    switches = {s: round(s * total) for s in args.switch_at if 0 < s < 1}
    kept = common.snapshot_steps(args, data) | set(switches.values())

    engine.train_student(folders["onehot"], flags["onehot"], seed, data, common.one_hot_loss, snapshots=kept)
    engine.train_student(folders["kd"], flags["kd"], seed, data, common.student_loss, teacher, snapshots=kept)
    for direction in args.direction:
        before, after = SWITCHES[direction]
        for s, switch_step in switches.items():
            weights_at = switching(flags[before], flags[after], switch_step)
            # Without a state (the trunk was trained by another script, or with other switches) the branch is trained
            # from the start: slower, with the same result.
            start = latest_snapshot(folders[before], switch_step)
            switch = dict(direction=direction, step=switch_step)
            more = dict(weights_at=weights_at, start=start, switch=switch)
            engine.train_student(folders[direction, s], flags[after], seed, data, common.student_loss, teacher, **more)
    return folders


# ---------------------------------------------------------------- measures


def accuracy_sums(folders, resamples):
    """Test accuracies [1 + B, R] of the run `folders` [R] of one seed: on the test points, then on bootstrap draws."""
    correct = []
    first = None
    for run in folders:
        file = run / "logits.npz"
        arrays = runs.read_npz(file, ("test_logits", "test_labels"))
        logits = runs.check_logits(arrays["test_logits"], file, first)
        if first is None:
            first = logits
        correct.append(logits.argmax(1) == runs.check_labels(arrays["test_labels"], file, logits))
    hits = np.stack(correct, axis=1).astype(float)
    return claims.resampled_sums(hits, resamples, np.random.default_rng(1)) / len(hits)


def recovered(per_seed):
    """Accuracy, gain and recovered gain, paired, from each seed's `accuracy_sums` of (switched, onehot, kd).

    The recovered gain is None, with the reason beside it, where the gain's interval is not wholly above 0.
    """
    stacked = np.stack(per_seed)  # [S, 1 + B, 3]
    accuracy, onehot, kd = stacked[..., 0], stacked[..., 1], stacked[..., 2]
    gain, difference = claims.combine(kd - onehot), claims.combine(accuracy - onehot)
    row = dict(accuracy=claims.within(claims.combine(accuracy)), difference=difference, gain=gain)
    if gain["low"] > 0:
        return dict(row, recovered=claims.ratio(accuracy - onehot, kd - onehot))
    reason = "gain too small to divide" if gain["high"] >= 0 else "KD loses accuracy here"
    return dict(row, recovered=None, reason=reason)


def switch_table(folders, args):
    """A row for each (direction, s): accuracy, gain, recovered gain, deviations; folders: each seed's `train_seed`."""
    rows = []
    measured = {}
    switches = [name for name in folders[0] if isinstance(name, tuple)]
    for direction, s in tqdm(switches, "measuring", leave=False, disable=args.quiet or None):
        students = tuple(of_seed[direction, s] for of_seed in folders)
        per_seed = []
        roles = []
        for student, of_seed in zip(students, folders, strict=True):
            compared = (student, of_seed["onehot"], of_seed["kd"])
            per_seed.append(accuracy_sums(compared, args.bootstrap))
            roles.append(dict(student=student, control=of_seed["onehot"], taught=of_seed["kd"]))
            if "teacher" in of_seed:
                roles[-1]["teacher"] = of_seed["teacher"]
        row = dict(direction=direction, s=s, runs=[str(run) for run in students], **recovered(per_seed))
        if students not in measured:  # the trunks stand in both directions
            points = deviation.points_from_runs(roles)
            measured[students] = {split: deviation.measure(points[split], args.bootstrap) for split in points}
        tables = measured[students]
        row["deviation"] = {split: table["predicted"] for split, table in tables.items()}
        row["fit"] = tables["train"]["fidelity"]["teacher"]["accuracy"]["value"]
        rows.append(row)
    return rows


def table_markdown(rows):
    """The rows of `switch_table` as a Markdown table."""
    headers = ["direction", "s", "test accuracy %", "minus one-hot", "recovered gain"]
    headers += ["train slope", "train hardest quarter below", "train hardest gap", "test hardest gap"]
    lines = []
    for row in rows:
        train = row["deviation"]["train"]["student"]
        share = claims.cell(row["recovered"], 1, 2) if row["recovered"] else row["reason"]
        accuracies = [claims.cell(row[key], 100, 2) for key in ("accuracy", "difference")]
        gaps = [claims.cell(train[key]) for key in ("slope", "low_below", "low_gap")]
        test = row["deviation"].get("test")  # None where logits of training images alone were given
        gaps.append(claims.cell(test["student"]["low_gap"]) if test else "–")
        lines.append([ARROWS[row["direction"]], f"{row['s']:g}", *accuracies, share, *gaps])
    return claims.markdown_table(headers, lines)


def switch_claims(rows):
    """Claims rows: the gain, what switching at half time does to it, and whether late switching already deviates."""
    gain = rows[0]["gain"]
    note = "difference of test accuracies"
    found = [claims.claim("KD is more accurate than one-hot", "> 0", gain, 0, note, unit="points")]
    texts = {
        "onehot2kd": ("switching to KD at half time recovers most of the gain", "> 0.5", True),
        "kd2onehot": ("reverse switching at half time loses most of the gain", "< 0.5", False),
    }
    for row in rows:
        text, expected, above = texts[row["direction"]]
        if row["s"] == 0.5 and row["recovered"]:
            found.append(claims.claim(text, expected, row["recovered"], 0.5, "recovered gain", above))
        elif row["s"] == 0.5:  # the gain stands in its place
            found.append(claims.claim(text, "gain above 0", gain, np.nan, row["reason"], unit="points"))
    found = [claims.headline(row, "§3.2") for row in found]
    switched = [row for row in rows if row["direction"] == "onehot2kd" and 0 < row["s"] < 1]
    if switched:
        late = switched[-1]
        for split, networks in late["deviation"].items():
            text = f"{split}: after a switch to KD at s={late['s']:g} most of the hardest quarter lies below y = x"
            found.append(deviation.below_claim(text, networks))
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
        accuracies = {row["s"]: row["accuracy"] for row in rows if row["direction"] == direction}
        if accuracies:
            claims.band(axis, list(accuracies), accuracies.values(), 100, color=color, label=ARROWS[direction])
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


def plot_curves(folders, args, title):
    """Test accuracy over training: pure runs with their seeds; the mean of a switch from the next evaluated epoch."""
    plt = claims.pyplot()
    directions = args.direction
    shares = [s for s in args.switch_at if 0 < s < 1]
    shades = dict(zip(shares, plt.get_cmap("magma")(np.linspace(0.15, 0.7, len(shares))), strict=True))
    size = (4.5 * max(len(directions), 1.3), 3.6)
    figure, axes = plt.subplots(1, len(directions), squeeze=False, sharey=True, figsize=size)
    for axis, direction in zip(axes[0], directions, strict=True):
        for trunk, label in (("onehot", "one-hot throughout"), ("kd", "KD throughout")):
            epochs, accuracy = curves([of_seed[trunk] for of_seed in folders])
            style = dict(color=claims.COLOURS[trunk], zorder=1)
            axis.plot(epochs, accuracy.T, lw=0.5, alpha=0.4, **style)
            axis.plot(epochs, accuracy.mean(0), lw=1.8, label=label, **style)
        last = epochs[-1]
        for s in shares:
            epochs, accuracy = curves([of_seed[direction, s] for of_seed in folders])
            mean = accuracy.mean(0)
            after = epochs >= s * last  # before its switch a branch is its trunk
            style = dict(markevery=[0], ms=6, lw=1.4, color=shades[s])
            axis.plot(epochs[after], mean[after], "v-", label=f"switched at s = {s:g}", **style)
        axis.set(xlabel="epoch", title=ARROWS[direction])
    axes[0][0].set_ylabel("test accuracy (%)")
    lines = sum((axis.get_lines() for axis in axes[0]), [])
    drawn = np.concatenate([line.get_ydata() for line in lines])
    axes[0][0].set_ylim(bottom=max(0, np.quantile(drawn, 0.05) - 2))
    claims.legend_below(figure, axes[0][0], columns=3)
    figure.suptitle(title)
    claims.save_figure(figure, args.results, "fig1b_curves")


def main(argv=None):
    parser = runs.Parser(__doc__)
    common.add_flags(parser, "prefix of the run folders: <out>-teacher-s0, … (default: runs/<data>-<arch>)")
    common.add_teacher_flags(parser)
    common.add_student_flags(parser, distils=True)
    common.add_figure_flags(parser, "results/fig1b")
    add = parser.add_argument_group("switches").add_argument
    every = list(SWITCHES)
    which = f"which switches to train, of {', '.join(every)} (default: both)"
    add("--direction", choices=every, nargs="+", default=every, metavar="WHICH", help=which)
    shares = "shares of training before the switch; 0 and 1 are the pure runs"
    default = [0, 0.25, 0.5, 0.75, 0.9, 1]
    add("--switch-at", type=number(float, 0, 1), nargs="+", default=default, metavar="S", help=shares)
    args = engine.resolve(parser.parse_args(argv))
    args.switch_at = sorted(set(args.switch_at))
    args.direction = list(dict.fromkeys(args.direction))
    data = common.data_from(args)
    if not args.train_only:
        args.results.mkdir(parents=True, exist_ok=True)
    base = args.out or f"runs/{runs.default_name(args)}"
    engine.check_folders([run_folders(base, args, seed) for seed in args.seeds], args, data)
    folders = [train_seed(base, args, seed, data) for seed in args.seeds]
    if args.train_only:
        return
    rows = switch_table(folders, args)
    teachers = {runs.read_config(of_seed["kd"])["facts"]["teacher_sha256"] for of_seed in folders}
    over = f"{claims.scope(len(folders), len(teachers))}; {runs.fit_note(rows[0]['fit'])}"
    runs.write_json(args.results / "switch.json", dict(intervals=f"95%, {over}", rows=rows))
    runs.write_text(args.results / "switch.md", f"Intervals: 95%, {over}.\n\n{table_markdown(rows)}")
    claims.save_claims(args.results, switch_claims(rows), over)
    print(f"all measures: {args.results / 'switch.md'}")
    title = f"{args.data}, {args.arch}"
    plot_switches(rows, args.results, f"{title}\n95% intervals {over}")
    plot_curves(folders, args, f"{title}, mean of {len(folders)} seed{'s' * (len(folders) > 1)}")


if __name__ == "__main__":
    runs.cli(main)
