"""Figure 1b: switch from one-hot labels to distillation in the middle of training, and the reverse (paper §3.2).

    python switch_distill.py --seeds 0 1 2 3 4                          # digits, each seed with its own teacher
    python switch_distill.py --teacher runs/t --data cifar100 --arch resnet56 --recipe short --switch-at 0 0.5 1
    python switch_distill.py --seeds 0 1 2 --teacher-epochs 10 20 30 40 # does the gain depend on how well the teacher fits?

s is the share of training before the switch, so for one-hot → KD s=0 is plain distillation and s=1 plain one-hot
training. Each seed trains these two trunks once and every branch continues from the state that its trunk had at s:
a branch costs (1−s) of a run and equals, bit for bit on a CPU, the same run trained from scratch.
The recovered share is (accuracy of the switched student − one-hot) / (KD − one-hot).

Writes fig1b (accuracy against s), fig1b_curves (accuracy over training), switch.json, switch.md and claims into
--results; with --teacher-epochs also fig1b_teachers. The run folders carry the same settings as those of
train_teacher.py and train_student.py, so finished ones are shared with them. Departure from the paper: its switch is
gradual over about 1,000 steps of a long schedule; here it is abrupt unless --window is given.
Expected, digits with 30% label noise, 5 seeds, about 2 minutes on a CPU: one-hot 89.8%, KD 93.8%; one-hot→KD at s=0.5
94.9% (recovers 1.29 of the gain, 0.90 to 2.48), KD→one-hot 88.5% (loses it: -0.31, -2.35 to 0.25). CIFAR-100, ResNet-56,
`--recipe short`, one seed, a prototype on one H100: one-hot 71.8, KD 73.5, one-hot→KD at s=0.5 73.5, KD→one-hot 72.7.
"""
import argparse
import functools
from pathlib import Path

import numpy as np

import analyze_deviation
import common
from train_student import add_student_flags, train_student
from train_teacher import train_teacher

SWITCHES = {"onehot2kd": ("onehot", "kd"), "kd2onehot": ("kd", "onehot")}
ARROWS = {"onehot2kd": "one-hot → KD", "kd2onehot": "KD → one-hot"}


def switched_weights(before, after, switch_step, window=0):
    """weights_at(step) -> (ce_weight, kd_weight): `before`, then from switch_step on `after`, linearly over `window` steps."""
    return functools.partial(_weights_at, before, after, switch_step, window)   # a partial can go to another process


def _weights_at(before, after, switch_step, window, step):
    share = min(1.0, max(0.0, (step - switch_step) / window)) if window else float(step >= switch_step)
    return tuple((1 - share) * b + share * a for b, a in zip(before, after))


def run_folders(base, options, seed, steps, total):
    """{(direction, s): run folder} and {"onehot": run folder, "kd": run folder} of one seed; s = 0 and s = 1 are the trunks."""
    trunks = {name: Path(f"{base}-{name}-s{seed}") for name in ("onehot", "kd")}
    window = f"-w{options.window}" if options.window else ""
    return {(direction, s): trunks[SWITCHES[direction][1 if step == 0 else 0]] if step in (0, total) else Path(f"{base}-{direction}-{s:g}{window}-s{seed}")
            for direction in options.direction for s, step in steps.items()}, trunks


def latest_snapshot(run, step):
    """The newest readable snapshot-<at>.pt of a run with at <= step, or None; a damaged one is passed over with a note."""
    kept = {int(file.stem.removeprefix("snapshot-")): file for file in run.glob("snapshot-*.pt") if common.RUN_FILE.fullmatch(file.name)}
    for at in sorted((at for at in kept if at <= step), reverse=True):
        try:
            common.load_checkpoint(kept[at])
            return kept[at]
        except common.InputError:
            print(f"note: {kept[at]} is damaged and not used; the branch starts earlier")
    return None


def train_seeds(base, args, options, data, teacher_runs, steps, given):
    """Train teachers, both trunks and every branch of all seeds, unless they are finished.

    base: prefix of the run folders; teacher_runs: {seed: run folder}, trained here unless they are `given` as {run folder:
    model}; steps: {s: step of the switch}. Returns what `run_folders` does, as two dicts over seeds.
    """
    per_epoch, total = common.total_steps(args, data)
    weights = {"onehot": (1.0, 0.0), "kd": (args.ce_weight, args.kd_weight)}
    both = {seed: run_folders(base, options, seed, steps, total) for seed in teacher_runs}
    folders, trunks = ({seed: pair[k] for seed, pair in both.items()} for k in (0, 1))
    kept = {step for step in steps.values() if 0 < step < total} | {round(share * total) for share in args.snapshot_at}

    def student(run, name, seed, teacher=None, **more):   # the same runs as train_student.py makes
        ce_weight, kd_weight = weights[name]
        flags = argparse.Namespace(**dict(vars(args), ce_weight=ce_weight, kd_weight=kd_weight))
        return functools.partial(train_student, run, flags, seed, data, teacher, **more)

    def branches(direction, teachers):
        before, after = SWITCHES[direction]
        for seed in folders:
            for s, step in steps.items():
                run = folders[seed][direction, s]
                if run not in trunks[seed].values():
                    # From the latest state of the trunk before the switch. Without one (the trunk was trained by another
                    # script, or with other switches) the branch is trained from the start: slower, with the same result.
                    yield student(run, after, seed, teachers[seed], weights_at=switched_weights(weights[before], weights[after], step, options.window),
                                  start_from=latest_snapshot(trunks[seed][before], step), switch=dict(direction=direction, step=step, window=options.window))

    if not teacher_runs:   # an empty shard
        return folders, trunks
    # First what needs no teacher; a one-hot trunk knows none.
    jobs = [] if given else [functools.partial(train_teacher, run, common.only_flags(args, common.add_flags), seed, data) for seed, run in teacher_runs.items()]
    jobs += [student(trunks[seed]["onehot"], "onehot", seed, snapshots=kept) for seed in teacher_runs]
    common.run_jobs(jobs, args.device, args.together)

    models = given or {run: common.load_teacher(run, data) for run in sorted(set(teacher_runs.values()))}
    epochs = total / per_epoch * len(teacher_runs) / len(models)   # of the KD trunks of one teacher
    switched = sum(total - step for step in steps.values() if 0 < step < total) / total if "onehot2kd" in options.direction else 0
    source = common.teacher_source(args.teacher_cache, data, args, epochs * (1 + switched), epochs if args.view_seed is None else total / per_epoch, next(iter(trunks.values()))["kd"])
    of_run = {run: common.TeacherLogits(model, data, args.precision, source) for run, model in models.items()}
    teachers = {seed: of_run[run] for seed, run in teacher_runs.items()}
    jobs = [student(trunks[seed]["kd"], "kd", seed, teachers[seed], snapshots=kept) for seed in teacher_runs]
    if "onehot2kd" in options.direction:
        jobs += branches("onehot2kd", teachers)
    common.run_jobs(jobs, args.device, args.together)
    if "kd2onehot" in options.direction:
        common.run_jobs(list(branches("kd2onehot", teachers)), args.device, args.together)
    return folders, trunks


# ---------------------------------------------------------------- measures


def accuracy_sums(runs, resamples, rng):
    """Test accuracies [1 + B, len(runs)] of several runs of one seed: on the test points, then on bootstrap draws of them."""
    correct, first = [], None
    for file in [run / "logits.npz" for run in runs]:
        arrays = common.read_npz(file, ("test_logits", "test_labels"))
        logits = analyze_deviation.check_logits(arrays["test_logits"], file, first)
        first = logits if first is None else first
        correct.append(logits.argmax(1) == analyze_deviation.check_labels(arrays["test_labels"], file, logits))
    correct = np.stack(correct, axis=1).astype(float)
    return analyze_deviation.resampled_sums(correct, resamples, rng) / len(correct)


def recovered(per_seed, rng):
    """Accuracy, gain and recovered share with paired intervals, from one `accuracy_sums` of (switched, onehot, kd) per seed.

    The share is None, with the reason beside it, when the gain is not above 0 with its whole interval.
    """
    gain = analyze_deviation.combine(per_seed, np.random.default_rng(rng), lambda m: m[:, 2] - m[:, 1])
    row = dict(accuracy=analyze_deviation.combine(per_seed, np.random.default_rng(rng), lambda m: m[:, 0]),
               difference=analyze_deviation.combine(per_seed, np.random.default_rng(rng), lambda m: m[:, 0] - m[:, 1]), gain=gain)
    if gain["low"] <= 0:
        return dict(row, recovered=None, reason="gain too small to divide" if gain["high"] >= 0 else "KD loses accuracy here")
    with np.errstate(divide="ignore", invalid="ignore"):   # a seed, or a rare draw, without any gain
        row["recovered"] = analyze_deviation.combine(per_seed, np.random.default_rng(rng), lambda m: (m[:, 0] - m[:, 1]) / (m[:, 2] - m[:, 1]))
    return row


def switch_table(folders, trunks, teachers, seeds, resamples):
    """One row per (direction, s): accuracy, gain, recovered share, and the deviations of the switched student.

    folders, trunks: {seed: as `train_seed` returns}; teachers: {seed: run folder}.
    """
    rows, measured = [], {}
    for direction, s in folders[seeds[0]]:
        runs = {seed: folders[seed][direction, s] for seed in seeds}
        per_seed = [accuracy_sums((runs[seed], trunks[seed]["onehot"], trunks[seed]["kd"]), resamples, np.random.default_rng(1)) for seed in seeds]
        row = dict(direction=direction, s=s, runs=[str(run) for run in runs.values()], **recovered(per_seed, 2))
        key = tuple(runs.values())
        if key not in measured:   # the pure runs stand in both directions
            points = analyze_deviation.points_from_runs([teachers[seed] for seed in seeds], list(key), [trunks[seed]["onehot"] for seed in seeds])
            measured[key] = {split: analyze_deviation.measure(points[split], resamples)["predicted"] for split in points}
        row["deviation"] = measured[key]
        rows.append(row)
    return rows


def table_markdown(rows):
    """The rows of `switch_table` as a Markdown table."""
    cell = common.cell
    text = ("| direction | s | test accuracy % | minus one-hot | recovered share | train slope | train low quarter below | train low gap | test low gap |\n"
            "|---|---|---|---|---|---|---|---|---|\n")
    for row in rows:
        train, test = (row["deviation"][split]["student"] for split in ("train", "test"))
        share = cell(row["recovered"], 1, 2) if row["recovered"] else row["reason"]
        text += (f"| {ARROWS[row['direction']]} | {row['s']:g} | {cell(row['accuracy'], 100, 2)} | {cell(row['difference'], 100, 2)} | {share} | "
                 f"{cell(train['slope'])} | {cell(train['low_below'])} | {cell(train['low_gap'])} | {cell(test['low_gap'])} |\n")
    return text


def switch_claims(rows):
    """Claims rows: the gain, what switching at half time does to it, and whether late switching already deviates."""
    claims, gain = [], rows[0]["gain"]
    claims.append(common.claim("KD is more accurate than one-hot", "> 0", gain["value"], gain["low"], gain["high"], 0, note="difference of test accuracies"))
    texts = {"onehot2kd": ("switching to KD at half time recovers most of the gain", "> 0.5", True),
             "kd2onehot": ("reverse switching at half time loses most of the gain", "< 0.5", False)}
    for row in rows:
        if row["s"] == 0.5 and row["recovered"]:
            text, expected, above = texts[row["direction"]]
            share = row["recovered"]
            claims.append(common.claim(text, expected, share["value"], share["low"], share["high"], 0.5, above, "recovered share"))
        elif row["s"] == 0.5:
            claims.append(common.claim(texts[row["direction"]][0], "gain above 0", gain["value"], gain["low"], gain["high"], np.nan, note=row["reason"]))
    late = max((row for row in rows if row["direction"] == "onehot2kd" and row["s"] < 1), key=lambda row: row["s"], default=None)
    if late and late["s"] > 0:
        for split in ("train", "test"):
            gap = late["deviation"][split]["student-control"]["low_gap"]
            claims.append(common.claim(f"{split}: switching to KD at s={late['s']:g} already lowers the student on the hardest quarter", "< 0", gap["value"],
                                       gap["low"], gap["high"], 0, above=False, note="mean Y − X, switched student minus one-hot"))
    return claims


def teacher_rows(base, args, options, data, seeds):
    """Gain and slope of distillation from teachers stopped after each of --teacher-epochs; trains what is missing."""
    rows = []
    for epochs in sorted(set(options.teacher_epochs)):
        early = "" if epochs == args.epochs else f"-e{epochs}"
        teachers, students, onehots = ([Path(f"{base}-{name}-s{seed}") for seed in seeds] for name in (f"teacher{early}", f"kd{early}", "onehot"))
        for seed, teacher, student in zip(seeds, teachers, students):
            flags = common.only_flags(args, common.add_flags)
            flags.stop_epoch = epochs if early else flags.stop_epoch
            common.run_jobs([functools.partial(train_teacher, teacher, flags, seed, data)], args.device)
            source = common.TeacherLogits(common.load_teacher(teacher, data), data, args.precision)
            common.run_jobs([functools.partial(train_student, student, args, seed, data, source)], args.device)
        draws = [accuracy_sums(runs, options.bootstrap, np.random.default_rng(1)) for seed, runs in zip(seeds, zip(students, onehots))]
        points = analyze_deviation.points_from_runs(teachers, students, onehots)
        row = dict(epochs=epochs, gain=analyze_deviation.combine(draws, np.random.default_rng(2), lambda m: m[:, 0] - m[:, 1]),
                   slope={split: analyze_deviation.measure(points[split], options.bootstrap)["predicted"]["student"]["slope"] for split in points})
        for split in points:
            row[f"teacher_{split}_accuracy"] = float(np.mean([(point["teacher"].argmax(1) == point["labels"]).mean() for point in points[split]]))
        rows.append(row)
    return rows


def teacher_markdown(rows):
    """The rows of `teacher_rows` as a Markdown table."""
    cell = common.cell
    text = "| teacher's epochs | its train accuracy % | its test accuracy % | KD minus one-hot, test points | train slope | test slope |\n|---|---|---|---|---|---|\n"
    for row in rows:
        text += (f"| {row['epochs']} | {100 * row['teacher_train_accuracy']:.2f} | {100 * row['teacher_test_accuracy']:.2f} | {cell(row['gain'], 100, 2)} | "
                 f"{cell(row['slope']['train'], 1, 3)} | {cell(row['slope']['test'], 1, 3)} |\n")
    return text


# ---------------------------------------------------------------- figures


def band(axis, xs, cells, scale=1.0, **style):
    """Values over xs with their intervals as a band."""
    line, = axis.plot(xs, [scale * c["value"] for c in cells], marker="o", ms=4, **style)
    axis.fill_between(xs, [scale * c["low"] for c in cells], [scale * c["high"] for c in cells], color=line.get_color(), alpha=0.2, lw=0)


def plot_switches(plt, rows, folder, title):
    figure, axis = plt.subplots(figsize=(6.4, 4.4), layout="constrained")
    for direction in dict.fromkeys(row["direction"] for row in rows):
        chosen = sorted((row for row in rows if row["direction"] == direction), key=lambda row: row["s"])
        band(axis, [row["s"] for row in chosen], [row["accuracy"] for row in chosen], 100, label=ARROWS[direction])
    onehot = rows[0]["accuracy"]["value"] - rows[0]["difference"]["value"]
    axis.axhline(100 * onehot, color="grey", ls="--", lw=1, label="one-hot throughout")
    axis.axhline(100 * (onehot + rows[0]["gain"]["value"]), color="grey", ls=":", lw=1, label="KD throughout")
    axis.set(xlabel="share of training before the switch", ylabel="test accuracy (%)", title=title)
    axis.legend()
    common.save_figure(figure, folder, "fig1b")


def plot_curves(plt, folders, trunks, seeds, folder, title):
    """Test accuracy over training, mean over seeds: the pure runs and every switch, its moment marked."""
    directions = list(dict.fromkeys(direction for direction, _ in folders[seeds[0]]))
    figure, axes = plt.subplots(1, len(directions), figsize=(6.2 * len(directions), 4.2), squeeze=False, sharey=True, layout="constrained")

    def curve(axis, runs, after=0, **style):
        curves = [{line["epoch"]: line["test_acc"] for line in common.read_metrics(run) if "test_acc" in line} for run in runs]
        epochs = np.array(sorted(set.intersection(*map(set, curves))))   # seeds may have been evaluated at other epochs
        if not len(epochs):
            raise common.InputError(f"{', '.join(map(str, runs))}: metrics.jsonl has no epoch with a test_acc in all: train these again with --overwrite")
        mean = 100 * np.mean([[of_run[epoch] for epoch in epochs] for of_run in curves], 0)
        shown = np.flatnonzero(epochs >= after)   # before its switch a branch is its trunk
        return axis.plot(epochs[max(0, shown[0] - 1):], mean[max(0, shown[0] - 1):], lw=1.2, **style)[0], epochs, mean
    for axis, direction in zip(axes[0], directions):
        curve(axis, [trunks[seed]["onehot"] for seed in seeds], color="black", label="one-hot")
        total_epochs = curve(axis, [trunks[seed]["kd"] for seed in seeds], color="grey", label="KD")[1][-1]
        for s in sorted(s for d, s in folders[seeds[0]] if d == direction and 0 < s < 1):
            moment = s * total_epochs
            line, epochs, mean = curve(axis, [folders[seed][direction, s] for seed in seeds], moment, label=f"{ARROWS[direction]} at s={s:g}")
            axis.plot(moment, np.interp(moment, epochs, mean), "v", color=line.get_color(), ms=8)
        axis.set(xlabel="epoch", ylabel="test accuracy (%)", title=ARROWS[direction])
        axis.legend(fontsize=8)
    low = np.quantile([y for axis in axes[0] for line in axis.lines for y in line.get_ydata()], 0.05)
    axes[0][0].set_ylim(bottom=max(0, low - 5))
    figure.suptitle(title)
    common.save_figure(figure, folder, "fig1b_curves")


def plot_teachers(plt, rows, folder, title):
    rows = sorted(rows, key=lambda row: row["teacher_train_accuracy"])
    xs = [100 * row["teacher_train_accuracy"] for row in rows]
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    band(axes[0], xs, [row["gain"] for row in rows], 100, color="tab:blue")
    axes[0].axhline(0, color="grey", lw=1, ls="--")
    axes[0].set(xlabel="teacher's train accuracy (%)", ylabel="test accuracy of KD minus one-hot (points)")
    for split in ("train", "test"):
        band(axes[1], xs, [row["slope"][split] for row in rows], label=split)
    axes[1].axhline(1, color="grey", lw=1, ls="--")
    axes[1].set(xlabel="teacher's train accuracy (%)", ylabel="slope of the deviation fit")
    axes[1].legend()
    figure.suptitle(title)
    common.save_figure(figure, folder, "fig1b_teachers")


def main(argv=None):
    parser = common.Parser(__doc__)
    common.add_flags(parser, out_help="prefix of the run folders: <out>-teacher-s0, <out>-kd-s0, … (default: runs/<data>-<arch>)")
    add_student_flags(parser)
    common.add_shard_flag(parser)
    add = parser.add_argument
    add("--direction", choices=tuple(SWITCHES), nargs="+", default=list(SWITCHES), help="which switches to train")
    add("--switch-at", type=common.number(float, 0, 1), nargs="+", default=[0, 0.25, 0.5, 0.75, 0.9, 1], help="shares of training before the switch; 0 and 1 are the pure runs")
    add("--window", type=common.number(int, 0), default=0, help="steps over which the weights move linearly to the new loss; 0 switches at once")
    add("--teacher-epochs", type=common.number(int, 1), nargs="+", default=[], help="also distil from teachers stopped after these epochs, and plot the gain against their fit")
    add("--bootstrap", type=common.number(int, 100, 1_000_000), default=2000, help="bootstrap draws behind each interval")
    add("--results", default="results/fig1b", help="folder for figures, tables and claims")
    options = common.resolve(parser.parse_args(argv))
    args = common.only_flags(options, common.add_flags, add_student_flags)
    if not args.kd_weight:
        raise common.InputError("--kd-weight 0 leaves nothing to switch to: give it a weight above 0")
    if options.teacher_epochs and args.teacher:
        raise common.InputError("--teacher-epochs trains its own teachers: leave out --teacher")
    if options.teacher_epochs and args.stop_epoch:
        raise common.InputError("--stop-epoch and --teacher-epochs both stop the teacher: leave one out")
    if "{seed}" in (args.out or ""):
        raise common.InputError("--out is a prefix here, to which the seed is appended: leave {seed} out of it")
    if max(options.teacher_epochs, default=0) > args.epochs:
        raise common.InputError(f"--teacher-epochs {max(options.teacher_epochs)} is beyond --epochs {args.epochs}: give at most {args.epochs}")

    data = common.data_from(args)
    _, total = common.total_steps(args, data)
    steps = {s: round(s * total) for s in sorted(set(options.switch_at))}
    base, results, seeds = args.out or f"runs/{common.default_name(args)}", Path(options.results), common.shard_of(options)
    results.mkdir(parents=True, exist_ok=True)

    common.check_model(args, data)   # a wrong one fails before anything is discarded
    teachers = {seed: Path(args.teacher.replace("{seed}", str(seed)) if args.teacher else f"{base}-teacher-s{seed}") for seed in seeds}
    given = {run: common.load_teacher(run, data) for run in sorted(set(teachers.values()))} if args.teacher else {}
    planned = [run for seed in seeds for part in run_folders(base, options, seed, steps, total) for run in part.values()]
    planned += [] if args.teacher else teachers.values()
    planned += [Path(f"{base}-{name}-e{epochs}-s{seed}") for seed in seeds for epochs in options.teacher_epochs for name in ("teacher", "kd")]
    common.discard_runs(args, planned, given)
    folders, trunks = train_seeds(base, args, options, data, teachers, steps, given)
    if seeds != args.seeds:
        print("this shard is trained; when all are, the same command without --shard makes the tables and figures")
        return

    over = common.scope(len(seeds), len(set(teachers.values())))
    rows = switch_table(folders, trunks, teachers, seeds, options.bootstrap)
    by_teacher = teacher_rows(base, args, options, data, seeds)
    common.write_json(results / "switch.json", dict(intervals=f"95%, {over}", rows=rows, teachers=by_teacher))
    text = f"Intervals: 95%, {over}.\n\n{table_markdown(rows)}"
    text += f"\n{teacher_markdown(by_teacher)}" if by_teacher else ""
    common.write_text(results / "switch.md", text)
    print(text)
    common.save_claims(results, switch_claims(rows), over)

    plt = common.pyplot()
    title = f"{args.data}, {args.arch}; intervals {over}"
    plot_switches(plt, rows, results, title)
    plot_curves(plt, folders, trunks, seeds, results, title)
    if by_teacher:
        plot_teachers(plt, by_teacher, results, title)


if __name__ == "__main__":
    common.cli(main)
