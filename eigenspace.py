"""Section 4: does distillation exaggerate gradient descent's bias towards the top eigendirections? (Theorem 4.1)

    python eigenspace.py                                     # digits: least squares, linear probe, MLP, CNN; 5 seeds
    python eigenspace.py --archs cnn --seeds 7 --train-only  # one seed, kept in --out for a later command that draws

At equal progress along a top direction the self-distilled student has progressed less along a lower one than its
teacher. For least squares that is the theorem; for classifiers it is measured here. There the same two networks, still
at equal top progress, show the tie to section 3: which of them is more confident, and where.

Approximation: progress is that of the first layer's weights, in the eigenspace of its input (a CNN's patches).
Departures from the paper: plain SGD (no momentum, weight decay or augmentation), so that paths are smooth; images are
centred on the mean training image; models are half as wide; intervals are over seeds (initialisation, order; least
squares: targets) at one draw of the label noise.
"""

import functools
import itertools
import math
from pathlib import Path

import claims
import common
import engine
import runs
from deviation import phi_of_class
from runs import InputError, number

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

# ---------------------------------------------------------------- linear theory


def flow_filter(eigenvalues, t):
    """A(t) = 1 − exp(−tλ): share of β* fitted by gradient flow from zero after time t. Arrays broadcast."""
    return -np.expm1(-np.multiply(t, eigenvalues))


def gd_filter(eigenvalues, steps, lr):
    """1 − (1 − ηλ)^k: the same after k steps of gradient descent at the rate η, as long as ηλ < 1 (no overshoot)."""
    return -np.expm1(steps * np.log1p(-np.multiply(lr, eigenvalues)))  # exact also where 1 − ηλ rounds


def equal_progress(top, low, teacher_time, share):
    """Theorem 4.1: teacher and student where both have progressed equally along the eigenvalue `top`.

    The teacher stops at `teacher_time` T, and the student is trained on its predictions. Both are looked at where their
    progress along `top` is `share` in (0, 1) of the teacher's last, A_top(T). The student is there at time s, with
    A_top(s) = share; the teacher was there at t <= T. Returns their progress along `low`: A_low(t) of the teacher and
    A_low(s)·A_low(T) of the student. Theorem: for 0 < low < top the second is strictly smaller.
    Proof: with q = low/top, A_low = g(A_top), g(a) = 1 − (1−a)^q, and g(a)·g(b) < g(a·b) on (0, 1), as a·g'(a)/g(a)
    increases in a for q < 1. Gradient descent: the same with −log(1 − ηλ)/η for λ (no overshoot).
    """
    s = -np.log1p(-np.asarray(share)) / top
    t = -np.log1p(-share * flow_filter(top, teacher_time)) / top
    return flow_filter(low, t), flow_filter(low, s) * flow_filter(low, teacher_time)


# What the bias does. β* is random, and its energy λβ*² sums to 1. Over the directions it falls as 1/k² where the signal
# is in the top ones, and rises so where it is in the low ones. Teacher and student take the same number of steps.
DIRECTIONS = 30  # with λ_k = k^-1.5
POINTS = 100
STEPS = 60
RATE = 0.5
POWER_LAW = np.arange(1, DIRECTIONS + 1) ** -1.5
NOISES = (0.25, 0.5, 1.0, 2.0, 4.0)


def risk(shares, beta, noise):
    """Bias and variance, E‖X(β̂ − β*)‖²/n, of an estimator that keeps these shares [d] of least squares.

    X has POINTS rows and XᵀX/n = diag(POWER_LAW). beta [d] is β*. noise is one standard deviation or an array of them,
    and the result has its shape.
    """
    return (POWER_LAW * (1 - shares) ** 2 * beta**2).sum() + noise**2 / POINTS * (shares**2).sum()


def bias_variance(seed):
    """{signal in top or low directions: {teacher or student: [risk for each of NOISES]}}, for one draw of β*."""
    rng = np.random.default_rng([4, seed])
    shares = gd_filter(POWER_LAW, STEPS, RATE)
    found = {}
    for signal in ("top", "low"):
        energy = (rng.standard_normal(DIRECTIONS) / np.arange(1, DIRECTIONS + 1)) ** 2
        if signal == "low":
            energy = energy[::-1]
        beta = rng.choice([-1, 1], DIRECTIONS) * np.sqrt(energy / energy.sum() / POWER_LAW)
        kept = dict(teacher=shares, student=shares**2)
        found[signal] = {name: risk(part, beta, np.array(NOISES)).tolist() for name, part in kept.items()}
    return found


# ---------------------------------------------------------------- progress along eigendirections


def second_moment_eigenvectors(rows):
    """Eigenvalues [d], largest first, and eigenvectors [d, d] (columns) of rowsᵀrows/N; rows [N, d]; float64."""
    moment = sum(part.double().T @ part.double() for part in rows.split(65536)) / len(rows)
    values, vectors = torch.linalg.eigh(moment)
    return values.flip(0), vectors.flip(1)


def bucket_ends(count, buckets):
    """[(start, end), ...] of at most `buckets` runs of the ranks 0..count−1, evenly spaced in log rank, none empty."""
    if count < 2:
        raise InputError("the first layer's input has fewer than 2 directions with data: give data with more of them")
    ends = np.unique(np.round(np.geomspace(1, count + 1, buckets + 1)).astype(int) - 1)
    return list(itertools.pairwise(ends.tolist()))


def weight_progress(seen, vectors, buckets):
    """Progress per bucket, {network: [S, buckets]}, from {network: [first layer's weights after each of S steps]}.

    Progress in bucket b is ‖(W(t) − W(0))·V_b‖_F / ‖(W_teacher(end) − W_teacher(0))·V_b‖_F, V_b its eigenvectors
    (columns of `vectors` [d, d]). The normaliser is the same for teacher and student, so a ratio of progress is a ratio
    of components, as in the theorem. Departure: *changes* are projected, for the initialisation is no progress.
    """
    paths = {}
    for network, weights in seen.items():
        rows = []
        for weight in weights:
            squares = ((weight - weights[0]).flatten(1).double() @ vectors).square().sum(0)
            rows.append([math.sqrt(squares[start:end].sum()) for start, end in buckets])
        paths[network] = np.array(rows)
    whole = np.maximum(paths["teacher"][-1], 1e-300)
    return {network: path / whole for network, path in paths.items()}


def at_top(path, levels):
    """`path` [S, K] interpolated where its column 0 first reaches each level: [L, K], NaN where it never does."""
    rows = np.full((len(levels), path.shape[1]), np.nan)
    for row, level in zip(rows, levels, strict=True):
        reached = np.flatnonzero(path[:, 0] >= level)
        if len(reached):
            before = path[reached[0] - 1]  # there is one: paths begin at 0, levels lie above it
            after = path[reached[0]]
            share = (level - before[0]) / (after[0] - before[0])
            row[:] = before + share * (after - before)
    return rows


def confidence_gaps(logits, teacher_logits, finished):
    """Mean φ(network) − φ(teacher) on the quarters of points where the finished teacher is least and most sure.

    All logits [N, C]. As in Figure 1a, quarters and the class whose φ is taken are those of the finished teacher, which
    the student learns from. Those of the teacher on its way would select points by what is then subtracted, and
    regression to the mean would lift any network on the first quarter and lower it on the last.
    """
    classes = finished.argmax(1)
    sure = phi_of_class(finished, classes)
    gap = phi_of_class(logits, classes) - phi_of_class(teacher_logits, classes)
    low, high = np.quantile(sure, (0.25, 0.75))
    return gap[sure <= low].mean(), gap[sure >= high].mean()


def compare(path, logits, teacher_path, teacher_logits):
    """A network beside its teacher at equal progress in the top bucket: bias (section 4) and confidence (section 3).

    Paths [S, buckets] of progress and logits [S, N, C] are of the same steps. Both are interpolated to 20 evenly spaced
    levels of top progress that both networks reach, each where it is first reached. NaN where there is none. Returns
    levels: [20];
    ratios: [20], progress in the lower buckets over the teacher's, mean over the buckets;
    ratio: the same, but progress is averaged over levels first. Below 1 the bias is exaggerated, since the teacher's
        own path *is* early stopping;
    low, high: `confidence_gaps`, mean over the second half of the levels;
    gap: low − high.
    """
    buckets = path.shape[1]
    highest = min(path[:, 0].max(), teacher_path[:, 0].max())
    levels = np.linspace(0, highest, 21)[1:] if highest > 0 else np.full(20, np.nan)

    def at_levels(progress, outputs):
        rows = at_top(np.column_stack([progress, outputs.reshape(len(outputs), -1)]), levels)
        return rows[:, 1:buckets], rows[:, buckets:].reshape(-1, *outputs.shape[1:])

    lower, own = at_levels(path, logits)
    teacher_lower, teachers = at_levels(teacher_path, teacher_logits)
    gaps = np.array([confidence_gaps(*pair, teacher_logits[-1]) for pair in zip(own, teachers, strict=True)])
    low, high = gaps[len(levels) // 2 :].mean(0).tolist()
    with np.errstate(divide="ignore", invalid="ignore"):
        ratios = (lower / teacher_lower).mean(1)
        ratio = (lower.mean(0) / teacher_lower.mean(0)).mean()
    return dict(levels=levels.tolist(), ratios=ratios.tolist(), ratio=float(ratio), low=low, high=high, gap=low - high)


# ---------------------------------------------------------------- training

# At T = 1 the student's loss is the teacher's and only the targets differ, as in the theorem. The control is a network
# trained on smoothed labels: as soft as the teacher on average, but knowing nothing of it. Where student and control
# differ, the cause is not softness. The control often stops short of the teacher along the top directions; the two are
# compared as far as both go.


def observed_steps(steps):
    """About 40 log-spaced numbers of steps, from 0 to `steps`."""
    return sorted({0, *np.geomspace(1, steps, 40).round().astype(int).tolist()})


def descend(model, inputs, targets, recipe, order_key, observe):
    """Plain SGD on the mean cross-entropy with soft targets [N, C]; [observe(model)] after each of `observed_steps`.

    recipe: lr, steps, batch_size (0 takes all points each step); order_key seeds the order. InputError when the weights
    stop being finite.
    """
    n = len(inputs)
    lr = recipe["lr"]
    steps = recipe["steps"]
    batch = min(recipe["batch_size"] or n, n)
    per_epoch = n // batch
    parameters = list(model.parameters())
    seen = [observe(model)]
    observed = observed_steps(steps)
    for step in tqdm(range(steps), "training", unit="step", leave=False, disable=None):
        if step % per_epoch == 0:
            stream = common.generator("eigenspace order", order_key, step // per_epoch)
            order = torch.randperm(n, generator=stream).to(inputs.device)
        start = (step % per_epoch) * batch
        index = order[start : start + batch]
        loss = common.soft_loss(model(inputs[index]), targets[index], 1.0).mean()
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data.sub_(gradient, alpha=lr)
        if step + 1 in observed:
            if not all(torch.isfinite(parameter).all() for parameter in parameters):
                what = f"the weights became NaN or infinite within {step + 1} steps at learning rate {lr:.3g}"
                raise InputError(f"{what}: give a lower --lr")
            seen.append(observe(model))
    return seen


@torch.no_grad()
def evaluate(model, inputs):
    """Logits [N, C] in eval mode."""
    model.eval()
    logits = torch.cat([model(part) for part in inputs.split(1000)])
    model.train()
    return logits


def self_distil(build, images, labels, classes, seed, recipe, limit=5000):
    """Train teacher, student and smoothed control from one start in one order.

    build(key) -> model; labels [N]; recipe: as in `descend`. Returns {network: [first layer's weights]} and {network:
    logits [S, at most `limit`, classes]} of evenly spaced images, both after each observed step, and the teacher's
    accuracy on `labels`.
    """
    some = images[:: math.ceil(len(images) / limit)]
    key = ("teacher", seed)
    weights = {}
    logits = {}

    def observe(model):
        return first_layer(model).weight.detach().clone(), evaluate(model, some).cpu().numpy()

    def train(name, targets):
        model = build(key)
        weights[name], outputs = zip(*descend(model, images, targets, recipe, key, observe), strict=True)
        logits[name] = np.stack(outputs)
        return evaluate(model, images)

    at_end = train("teacher", common.smoothed(labels, classes, 0.0))
    train("student", F.softmax(at_end, 1))
    train("smoothed", common.smoothed(labels, classes, common.matched_smoothing(at_end, 1.0)))
    return weights, logits, (at_end.argmax(1) == labels).double().mean().item()


# ---------------------------------------------------------------- trained classifiers

# Learning rate in units of 1/λ1, the largest eigenvalue of the first layer's input, and steps of 250 images: smooth
# paths, and a digits teacher that has begun to fit the wrong labels. No ResNet: batch normalisation divides by the
# scale of the first layer's output, and so by most of what grows along the top directions.
CLASSIFIERS = {"linear": dict(lr=1.0, steps=400), "mlp": dict(lr=1.0, steps=800), "cnn": dict(lr=0.3, steps=400)}
NAMES = dict(linear="linear probe", mlp="MLP", cnn="CNN")
BUCKETS = 4  # at most, of eigendirections


def centred_images(data):
    """Training images [N, C, H, W] less their mean, so that second moments are covariances."""
    images = data.normalise(data.x_train)
    return images - images.mean(0)


def build_classifier(arch, data, width, key):
    """`common.build_model`, plus arch linear, on the data's device."""
    if arch != "linear":
        return common.build_model(arch, data.classes, data.facts["image"], width, ("eigenspace", key)).to(data.device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(common.stream_seed("init", "eigenspace", key))
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(data.facts["image"]), data.classes)).to(data.device)


def first_layer(model):
    """The first convolution or linear layer, whose weights tell the network's progress."""
    return next(module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear)))


def first_layer_inputs(layer, images, limit=200_000):
    """What the rows of the layer's weights are multiplied with: images [N, d], or patches [N·positions, d] of a CNN.

    At most `limit` patches, of evenly spaced images (they are for a covariance of a few dozen dimensions).
    """
    if isinstance(layer, nn.Linear):
        return images.flatten(1)
    window = (layer.kernel_size, layer.dilation, layer.padding, layer.stride)
    positions = F.unfold(images[:1], *window).shape[2]
    images = images[:: max(1, math.ceil(len(images) * positions / limit))]
    return F.unfold(images, *window).transpose(1, 2).flatten(0, 1)


def classifier_seed(data, arch, recipe, seed):
    """What is kept of one seed of one architecture, in the eigenspace of the first layer's input.

    Returns buckets, paths {network: [S, buckets]}, student and smoothed (what `compare` finds), and train_accuracy, the
    teacher's on the training labels.
    """
    images = centred_images(data)
    build = functools.partial(build_classifier, arch, data, recipe["width"])
    eigenvalues, vectors = second_moment_eigenvectors(first_layer_inputs(first_layer(build(0)), images))
    directions = int((eigenvalues > 1e-6 * eigenvalues[0]).sum())  # the others have no data
    buckets = bucket_ends(directions, recipe["buckets"])
    recipe = dict(recipe, lr=recipe["lr"] / float(eigenvalues[0]))
    weights, logits, fit = self_distil(build, images, data.y_train, data.classes, seed, recipe)
    paths = weight_progress(weights, vectors, buckets)
    found = dict(buckets=buckets, paths={network: path.tolist() for network, path in paths.items()}, train_accuracy=fit)
    for name in ("student", "smoothed"):
        found[name] = compare(paths[name], logits[name], paths["teacher"], logits["teacher"])
    return found


# ---------------------------------------------------------------- claims

BELOW = "the student's lower/top progress is below its teacher's at T = 1"
TIE = "at equal top progress the student's confidence minus its teacher's is lower on hard points than on easy ones"


def linear_claims(results):
    """Claims of least squares: where the bias helps, and where it hurts."""
    rows = []
    for signal, noise, expected in (("top", 4.0, "< 0"), ("low", 0.25, "> 0")):
        text = f"linear: log risk, student minus teacher, signal in {signal} directions, noise {noise:g}"
        ratios = [np.divide(result[signal]["student"], result[signal]["teacher"]) for result in results]
        measured = claims.over_seeds(np.log(ratios)[:, NOISES.index(noise)])
        rows.append(claims.claim(text, expected, measured, 0, above=expected == "> 0"))
    return rows


def beside_control(text, measure, threshold, seeds):
    """The claim that the student's `measure` is below the threshold, and the verdict on that claim of the control."""
    student, control = (np.array([seed[name][measure] for seed in seeds]) for name in ("student", "smoothed"))
    note = runs.fit_note(np.mean([seed["train_accuracy"] for seed in seeds]))
    if measure == "gap":
        low, high = (claims.over_seeds([seed["student"][end] for seed in seeds]) for end in ("low", "high"))
        note = f"φ(student) − φ(teacher): {claims.cell(low)} on hard minus {claims.cell(high)} on easy points; {note}"
    both = dict(control=claims.over_seeds(control), difference=claims.over_seeds(student - control))
    row = claims.claim(text, f"< {threshold}", claims.over_seeds(student), threshold, note, above=False, **both)
    return row, claims.verdict((both["control"]["low"], both["control"]["high"]), threshold, above=False)


def classifier_claims(data, results):
    """Rows of networks {arch: [result of each seed]} on the data of this name: each on its own, then all together.

    All networks hold where each does; the control of that row is how many of their controls do.
    """
    rows = []
    for joint, text, measure, threshold in (("all networks", BELOW, "ratio", 1), ("§4 ↔ §3", TIE, "gap", 0)):
        verdicts = {}
        of_controls = []
        for arch, seeds in results.items():
            network = NAMES[arch]
            row, of_control = beside_control(f"{data}, {network}: {text}", measure, threshold, seeds)
            verdicts[network] = row["verdict"]
            of_controls.append(of_control)
            rows.append(row)
        rows.append(claims.headline(claims.joint_claim(f"{joint}: {text}", verdicts, of_controls), "§4"))
    return rows


# ---------------------------------------------------------------- figures

BLACK, BLUE, GREEN = (claims.COLOURS[name] for name in ("teacher", "kd", "smoothed"))
COLOURS = dict(teacher=BLACK, student=BLUE, smoothed=GREEN)


def plot_linear(results, folder):
    """The theorem until the teacher stops at 3/λ1, and what the bias does to the risk."""
    figure, (paths, risks) = claims.pyplot().subplots(1, 2, figsize=(8, 3.6))
    share = np.linspace(0.001, 0.999, 300)
    stop = flow_filter(1, 3)
    for k in (1, 7):
        teacher, student = equal_progress(POWER_LAW[0], POWER_LAW[k], 3 / POWER_LAW[0], share)
        paths.plot(share * stop, teacher, color=BLACK, label="teacher" if k == 1 else None)
        paths.plot(share * stop, student, color=BLUE, label="student" if k == 1 else None)
        paths.text(stop, teacher[-1], f"λ{k + 1} = {POWER_LAW[k]:.2f} λ1   ", ha="right", va="center")
    paths.set(xlabel="progress along λ1", ylabel="progress along λk", title="Theorem 4.1, least squares")
    for signal, style in (("top", "-"), ("low", "--")):
        ratios = np.array([np.divide(result[signal]["student"], result[signal]["teacher"]) for result in results])
        risks.plot(NOISES, ratios.T, color=BLUE, lw=0.4, alpha=0.4)
        risks.plot(NOISES, ratios.mean(0), style, color=BLUE, label=f"signal in {signal} directions")
    risks.axhline(1, color=BLACK, lw=0.8)
    risks.set(xscale="log", xlabel="standard deviation of the noise", title="Excess risk, student over teacher")
    risks.set_xticks(NOISES, NOISES)
    risks.minorticks_off()
    for axis in (paths, risks):
        axis.legend()
    claims.save_figure(figure, folder, "linear")


def plot_network(paths, ratios, seeds):
    """Left: progress in the lowest bucket over that in the top one. Right: in all lower ones, over the teacher's.

    Seeds are thin, their mean is in front, on the right with its interval.
    """
    for network, color in COLOURS.items():
        progress = np.array([seed["paths"][network] for seed in seeds])
        paths.plot(progress[:, :, 0].T, progress[:, :, -1].T, color=color, lw=0.4, alpha=0.4)
        paths.plot(progress.mean(0)[:, 0], progress.mean(0)[:, -1], color=color)
        if network != "teacher":
            levels = np.mean([seed[network]["levels"] for seed in seeds], axis=0)
            curves = np.array([seed[network]["ratios"] for seed in seeds])
            mean, low, high = np.array([claims.mean_interval(values) for values in curves.T]).T
            ratios.plot(levels, curves.T, color=color, lw=0.4, alpha=0.4)
            ratios.plot(levels, mean, color=color)
            ratios.fill_between(levels, low, high, color=color, alpha=0.15, lw=0)
    names = [f"directions {start + 1}–{end}" for start, end in seeds[0]["buckets"]]
    paths.set(xlabel=f"progress, {names[0]}", ylabel=f"progress, {names[-1]}")
    ratios.axhline(1, color=BLACK, lw=0.8)
    ratios.set(xlabel="equal top progress", ylabel="ratio of lower progress")


def plot_tie(axis, results):
    """Bias against confidence: a point for each network and seed, the student's and its control's."""
    for network, color in COLOURS.items():
        axis.plot([], [], color=color, label=network)
    for marker, (arch, seeds) in zip(itertools.cycle("os^Dvp"), results.items(), strict=False):
        axis.plot([], [], marker, color="0.5", label=NAMES[arch])
        for network in ("student", "smoothed"):
            ratio, gap = ([seed[network][measure] for seed in seeds] for measure in ("ratio", "gap"))
            axis.plot(ratio, gap, marker, color=COLOURS[network], ms=5, alpha=0.8, mew=0)
    axis.axvline(1, color=BLACK, lw=0.8)
    axis.axhline(0, color=BLACK, lw=0.8)
    axis.margins(0.12, 0.15)
    corner = dict(transform=axis.transAxes, color="0.4", fontsize=8)
    axis.text(0.02, 0.01, "more bias to the top,\nmore extreme\nconfidence", **corner)
    axis.text(0.02, 0.99, "more bias to the top,\nless extreme\nconfidence", va="top", **corner)
    axis.text(0.98, 0.01, "less bias to the top,\nmore extreme\nconfidence", ha="right", **corner)
    axis.text(0.98, 0.99, "less bias to the top,\nless extreme\nconfidence", ha="right", va="top", **corner)
    axis.set(xlabel="lower progress over the teacher's", ylabel="φ − φ(teacher), its hardest quarter minus its easiest")
    axis.set_title("bias and confidence at equal top progress")


def plot_classifiers(results, folder, title):
    """A row for each network, and beside them the tie of all."""
    rows = [[f"paths {arch}", f"ratios {arch}", "tie"] for arch in results]
    size = (11, max(4, 2.4 * len(rows) + 0.8))
    figure, axes = claims.pyplot().subplot_mosaic(rows, figsize=size, width_ratios=(1, 1, 1.7))
    for arch, seeds in results.items():
        plot_network(axes[f"paths {arch}"], axes[f"ratios {arch}"], seeds)
        axes[f"paths {arch}"].set_title(NAMES[arch], loc="left", fontweight="bold")
    plot_tie(axes["tie"], results)
    claims.legend_below(figure, axes["tie"], 7)
    figure.suptitle(title)
    claims.save_figure(figure, folder, "classifiers")


def each_seed(args, name, settings, compute, *given):
    """[compute(*given, seed)], each kept in --out; from there when a command with the same settings has kept it."""
    results = []
    for seed in args.seeds:
        file = args.out / "seeds" / f"{name}-s{seed}.json"
        if args.overwrite:
            file.unlink(missing_ok=True)
        results.append(runs.kept_result(file, settings, compute, *given, seed))
    return results


def main(argv=None):
    parser = runs.Parser(__doc__)
    common.add_data_flags(parser)
    group = parser.add_argument_group("networks")
    add = group.add_argument
    add("--archs", nargs="+", choices=list(CLASSIFIERS), default=list(CLASSIFIERS), help="which ones")
    add("--width", type=number(float, 0, 64, open_low=True), default=0.5, help="multiplies the models' channels")
    add("--steps", type=number(int, 2), help="steps of each network (default: by architecture)")
    add("--lr", type=number(float, 0, 1e30, open_low=True), help="times 1/λ1 (default: by architecture)")
    add("--batch-size", type=number(int, 0), default=250, help="images per step, 0 for all")
    add("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2, 3, 4], help="what the intervals are over")
    add("--out", type=Path, default=Path("results/eigenspace"), help="folder; finished seeds in it are not repeated")
    add("--overwrite", action="store_true", help="repeat finished seeds")
    add("--train-only", action="store_true", help="compute the seeds that are missing and stop: nothing is drawn")
    common.add_device_flag(group)
    args = parser.parse_args(argv)
    args.device = engine.use_device(args.device)
    data = common.data_from(args)

    constants = dict(spectrum=POWER_LAW.tolist(), noises=list(NOISES))  # which no code of `bias_variance` holds
    linear = each_seed(args, "least-squares", constants, bias_variance)
    results = {}
    for arch in args.archs:
        preset = CLASSIFIERS[arch]
        recipe = dict(width=args.width, buckets=BUCKETS, batch_size=args.batch_size, data=data.facts)
        recipe.update(lr=args.lr or preset["lr"], steps=args.steps or preset["steps"])
        results[arch] = each_seed(args, f"network-{arch}", recipe, classifier_seed, data, arch, recipe)
    if args.train_only:
        return
    name = data.facts["name"]
    rows = linear_claims(linear) + classifier_claims(name, results)
    plot_linear(linear, args.out)
    title = f"First-layer weights in the eigenspace of their input, {name}, {len(args.seeds)} seed(s)"
    plot_classifiers(results, args.out, title)
    claims.save_claims(args.out, rows, claims.seeds_scope(len(args.seeds)))


if __name__ == "__main__":
    runs.cli(main)
