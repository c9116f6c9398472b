"""Gradient denoising (paper §5): does the teacher make mini-batch gradients less noisy, where, and is it mere softness?

    python denoise_gradients.py                                          # noisy digits, ResNet-8, five seeds
    python denoise_gradients.py --teacher 'runs/t-s{seed}' --out runs/x  # teachers of your own; run folders runs/x-…
    python denoise_gradients.py --data cifar10 --subset 2000 --label-noise 0.3 --arch resnet20 --epochs 20 --points 256

The paper speaks of distillation as a denoiser of gradients without fixing an experiment; this script defines one. Each
seed has three students with the same start, order and views, one for each of LOSSES. At 0, 5, 25, 50 and 100% of the
steps the per-example gradients of all three losses are taken at the same parameters (see `measure`), and compared there
and along each loss's own run (see `compare`). Runs are trained when missing and used again when finished; with
--out they are those of the switch_distill.py of that --out, which keeps the states that are needed by default.
"""

import math
from pathlib import Path
from typing import NamedTuple

import claims
import common
import deviation
import engine
import runs
from runs import InputError, number

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from torch.func import functional_call, grad, vmap
from tqdm import tqdm

# Each loss is T²·CE(q, softmax(z/T)). One-hot: q is the training label, and T = 1. KD: q is softmax(teacher/T).
# Smoothed labels, the control for softness alone: q is the label, smoothed until its entropy is the teacher's mean one.
LOSSES = dict(
    onehot=dict(color=claims.COLOURS["onehot"], label="one-hot"),
    kd=dict(color=claims.COLOURS["kd"], label="KD"),
    smooth=dict(color=claims.COLOURS["smoothed"], label="smoothed labels"),
)
QUARTERS = ("hardest quarter", "second quarter", "third quarter", "easiest quarter")
UNRESOLVED = 10  # times the number of points: the largest noise scale that is told apart from infinity

# ---------------------------------------------------------------- runs of one seed


def run_folders(args, seed):
    """{"teacher" or one of LOSSES: run folder}; a --teacher that is given lies elsewhere."""
    base = args.out or f"runs/{runs.default_name(args)}-denoise"
    return {what: Path(f"{base}-{what}-s{seed}") for what in ("teacher", *LOSSES)}


def train_seed(args, seed, data):
    """Train the teacher and the three students of one seed, unless they are finished already.

    Returns the teacher as `engine.TeacherLogits`, its logits [N, classes] of the un-augmented training images, and the
    label smoothing that has their mean entropy.
    """
    folders = run_folders(args, seed)
    trained = None
    if not args.teacher and not args.teacher_logits:
        trained = folders["teacher"]
        engine.train_teacher(trained, args, seed, data)
    teacher = engine.open_teacher(args, seed, data, trained)
    logits = teacher.logits.get("train_logits")
    if logits is None:
        logits = engine.logits_of(teacher.model, data, data.x_train)
    smoothing = common.matched_smoothing(logits, args.temperature)

    def smooth_loss(model, images, labels, teacher_logits, ce_weight, kd_weight, flags):
        logits = model(images).float()
        targets = common.smoothed(labels, data.classes, smoothing)
        return common.soft_loss(logits, targets, args.temperature).mean(), logits

    one_hot = common.one_hot_flags(args)
    kept = {*snapshots(args, data).values(), *common.snapshot_steps(args, data)}
    engine.train_student(folders["onehot"], one_hot, seed, data, common.one_hot_loss, snapshots=kept)
    engine.train_student(folders["kd"], args, seed, data, common.student_loss, teacher, snapshots=kept)
    # Teacher and temperature say how much the labels are smoothed.
    facts = dict(targets="labels smoothed to the teacher's entropy")
    facts.update(teacher_sha256=teacher.sha256, temperature=args.temperature)
    engine.train_student(folders["smooth"], one_hot, seed, data, smooth_loss, snapshots=kept, **facts)
    return teacher, logits, smoothing


def snapshots(args, data):
    """{percent: the step before which a student's state is measured}, for each of --percents."""
    _, total = common.total_steps(args, data)
    return {percent: min(round(percent / 100 * total), total - 1) for percent in args.percents}


def states_of(run, args, seed, data):
    """{percent: state dict} of a student's run, from its start (0) to its end (100)."""
    model = common.build_model(args.arch, data.classes, data.facts["image"], args.width, ("student", seed))
    states = {0: {name: value.clone() for name, value in model.state_dict().items()}}
    files = {percent: run / f"snapshot-{step}.pt" for percent, step in snapshots(args, data).items()}
    files[100] = run / "checkpoint.pt"
    for percent, file in files.items():
        if not file.exists():
            shares = " ".join(f"{percent / 100:g}" for percent in args.percents)
            fix = runs.train_again(run, flags=f" --snapshot-at {shares}")
            raise InputError(f"{file} does not exist: {fix}, or give another --out")
        with runs.reading(file, f"it does not fit {args.arch}: {runs.train_again(run)}"):
            states[percent] = runs.load_checkpoint(file, data.device)["model"]
            model.load_state_dict(states[percent])
    return states


# ---------------------------------------------------------------- gradients


def per_example_gradients(model, images, targets, temperature):
    """Gradient of `common.soft_loss` of every example: one [B, p] per parameter of the model, in its order.

    images [B, ...] float, targets [B, C]; the model must be in eval mode, or batch norm would mix the examples.
    """
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters, image, target):
        logits = functional_call(model, parameters, (image[None],))[0]
        return common.soft_loss(logits, target, temperature)

    gradients = vmap(grad(loss), (None, 0, 0))(parameters, images, targets)
    return [gradients[name].flatten(1) for name in parameters]


def mean_gradient(model, images, targets, temperature, chunk=1000):
    """Gradient [P] of the mean `common.soft_loss` over all examples, by ordinary backpropagation."""
    total = 0
    for part, target in zip(images.split(chunk), targets.split(chunk), strict=True):
        loss = common.soft_loss(model(part), target, temperature).sum()
        total = total + torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
    return total / len(images)


def stream(model, images, targets, temperature, weights, chunk=64):
    """What the statistics need of all per-example gradients, a chunk at a time, so that [N, P] is never held.

    weights [R, N]: each row makes one mini-batch gradient. Returns the mean [P], squares [N] = ‖g_i‖², inner [N] =
    g_i · mean, and batches [R, P] = weights @ g.
    """
    mean = mean_gradient(model, images, targets, temperature)
    chunk = max(1, min(chunk, 2**27 // len(mean)))  # at most half a GiB
    squares, inner = torch.zeros(2, len(images), device=mean.device)
    batches = torch.zeros(len(weights), len(mean), device=mean.device)
    for k in range(0, len(images), chunk):
        some = slice(k, k + chunk)
        start = 0
        for g in per_example_gradients(model, images[some], targets[some], temperature):
            part = slice(start, start + g.shape[1])
            squares[some] += torch.linalg.vector_norm(g, dim=1) ** 2
            inner[some] += g @ mean[part]
            batches[:, part].addmm_(weights[:, some], g)
            start = part.stop
    return mean, squares, inner, batches


# ---------------------------------------------------------------- measuring


class Points(NamedTuple):
    """The images of which gradients are taken, un-augmented, and how they are drawn into batches."""

    images: torch.Tensor  # [N, C, H, W]
    held_out: tuple  # (images, targets) of the held-out images
    quarter: np.ndarray  # [N] of QUARTERS
    weights: torch.Tensor  # [R, N], see `batch_weights`


def batch_weights(n, size, count, generator):
    """Weights [count, n] of mini-batches of a size, which are drawn with replacement as the noise scale supposes."""
    chosen = torch.randint(n, (count, size), generator=generator)
    return torch.zeros(count, n).scatter_add_(1, chosen, torch.ones(count, size)) / size


def some_test_images(data, count):
    """(uint8 images, labels) of `count` test images, or all, drawn evenly over classes: files may be sorted by them."""
    chosen = torch.as_tensor(common.balanced_subset(data.y_test.cpu().numpy(), count, data.facts["data_seed"]))
    chosen = chosen.to(data.device)
    return data.x_test[chosen], data.y_test[chosen]


def points_of(args, seed, data, chosen, x):
    """The `Points` of the training images `chosen`, whose teacher confidence is x [N]; the lowest x are the hardest."""
    quarter = (stats.rankdata(x, method="ordinal") - 1).astype(int) * len(QUARTERS) // len(x)
    size = min(args.batch_size, len(data.y_train))
    weights = batch_weights(len(x), size, args.batches, common.generator("denoise", seed))
    test_images, test_labels = some_test_images(data, args.held_out or len(data.y_test))
    held_out = data.normalise(test_images).contiguous(), F.one_hot(test_labels, data.classes).float()
    images = data.normalise(data.x_train[chosen]).contiguous()
    return Points(images, held_out, quarter, weights.to(data.device))


def noise_scale(mean_square, square_of_mean, n):
    """(tr Σ, ‖G‖², noise scale tr Σ/‖G‖²) from mean ‖g_i‖² and ‖mean g_i‖² of n examples.

    G and Σ are mean and covariance of g_i, estimated without bias (McCandlish et al. 2018, "An empirical model of
    large-batch training", A.1, with B = 1 and n). The scale is free of units, so T² or a learning rate cannot fake it.
    The estimate of ‖G‖² can be negative; the scale is then unresolved and counts as UNRESOLVED·n.
    """
    trace = (mean_square - square_of_mean) * n / (n - 1)
    signal = square_of_mean - trace / n
    if trace <= 0:
        return trace, signal, 0.0
    return trace, signal, trace / max(signal, trace / (UNRESOLVED * n))


def measure(model, points, losses):
    """Statistics of each loss at the model's parameters: {loss: {statistic: float}}, with "deviation" an array [N].

    losses: {name: (targets [N, C], temperature)}. The model is in eval mode.
    noise_scale: as the function of that name estimates it
    deviation: each point's part of it; the mean over points is the noise scale
    noise <quarter>: the mean of these parts over a quarter
    first_order: cosine of a mini-batch gradient with the full one-hot gradient on held-out images, mean over batches of
        the training's size. It is what a short step along the gradient takes off the held-out loss, as a share of what
        steepest descent takes off
    """
    uphill = mean_gradient(model, *points.held_out, 1.0)
    found = {}
    for loss, (targets, temperature) in losses.items():
        mean, squares, inner, batches = stream(model, points.images, targets, temperature, points.weights)
        square_of_mean = float(mean @ mean)
        trace, signal, scale = noise_scale(float(squares.mean()), square_of_mean, len(squares))
        deviations = (squares - 2 * inner + square_of_mean).clamp(min=0).cpu().numpy()
        deviations = deviations * (scale / max(deviations.mean(), 1e-30))
        one = dict(trace=trace, signal=signal, noise_scale=scale, deviation=deviations)
        for k, name in enumerate(QUARTERS):
            one[f"noise {name}"] = float(deviations[points.quarter == k].mean())

        cosines = batches @ uphill / batches.norm(dim=1).clamp(min=1e-30) / max(float(uphill.norm()), 1e-30)
        one["first_order"] = float(cosines.mean())
        found[loss] = one
    return found


def measure_seed(args, seed, data):
    """Train and measure what is missing of one seed: `measurements`, test accuracies, and what its teacher fits."""
    teacher, logits, smoothing = train_seed(args, seed, data)
    folders = run_folders(args, seed)
    states = {what: states_of(folders[what], args, seed, data) for what in LOSSES}
    settings = {name: getattr(args, name) for name in ("arch", "width", "batch_size", "temperature")}
    settings.update(vars(common.only_flags(args, add_measuring_flags)), data=data.facts)
    settings.update(weights=[teacher.sha256])
    for what in LOSSES:
        settings["weights"] += [runs.weights_hash(state) for state in states[what].values()]
    kept = args.results / "seeds" / f"denoise-s{seed}.json"
    if args.overwrite:
        kept.unlink(missing_ok=True)
    fit = (logits.argmax(1) == data.y_train).double().mean().item()
    given = (args, seed, data, states, logits, smoothing)
    accuracy = {}
    for what in LOSSES:
        arrays = runs.read_npz(folders[what] / "logits.npz", ("test_logits", "test_labels"))
        accuracy[what] = float((arrays["test_logits"].argmax(1) == arrays["test_labels"]).mean())
    return dict(runs.kept_result(kept, settings, measurements, *given), fit=fit, accuracy=accuracy)


def measurements(args, seed, data, states, logits, smoothing):
    """Plain numbers and lists of one seed.

    table: {run: {percent: {loss: {statistic: number}}}}; gradients: in words, over what. Of each point: the teacher's
    confidence x [N], the student–teacher gap [N], and reductions, the fall of its part of the noise scale from onehot
    to kd at shared parameters, relative to the sum of both scales [N].
    """
    chosen = torch.arange(len(data.y_train))
    if args.points and args.points < len(chosen):  # the same for every checkpoint and loss
        chosen = torch.randperm(len(chosen), generator=common.generator("points", seed))[: args.points].sort().values
    chosen = chosen.to(data.device)
    predicted = logits[chosen].argmax(1).cpu().numpy()
    x = deviation.phi_of_class(logits[chosen].cpu().numpy(), predicted)
    file = run_folders(args, seed)["kd"] / "logits.npz"
    student = runs.check_logits(runs.read_npz(file, runs.LOGITS)["train_logits"], file, logits)
    gap = deviation.phi_of_class(student[chosen.cpu().numpy()], predicted) - x

    points = points_of(args, seed, data, chosen, x)
    labels = data.y_train[chosen]
    temperature = args.temperature
    losses = dict(
        onehot=(F.one_hot(labels, data.classes).float(), 1.0),
        kd=(F.softmax(logits / temperature, 1)[chosen], temperature),
        smooth=(common.smoothed(labels, data.classes, smoothing), temperature),
    )
    model = common.build_model(args.arch, data.classes, data.facts["image"], args.width).to(data.device)
    table = {what: {} for what in LOSSES}
    reductions = []
    for what in LOSSES:
        here = {"smooth": losses["smooth"]} if what == "smooth" else losses
        bar = tqdm(states[what].items(), f"gradients along {what}, seed {seed}", leave=False, disable=None)
        for percent, state in bar:
            if percent == 0 and what != "onehot":  # the three runs start from the same parameters
                table[what]["0"] = table["onehot"]["0"]
                continue
            model.load_state_dict(state)
            found = measure(model.eval(), points, here)
            deviations = {loss: one.pop("deviation") for loss, one in found.items()}
            table[what][f"{percent:g}"] = found
            if what != "smooth":
                scales = found["onehot"]["noise_scale"] + found["kd"]["noise_scale"]
                reductions.append((deviations["onehot"] - deviations["kd"]) / max(scales, 1e-12))
    parameters = sum(value.numel() for value in model.parameters())
    what = f"exact gradients of all {parameters} parameters on {len(chosen)} of {len(data.y_train)} training images"
    of_points = dict(x=x.tolist(), gap=gap.tolist(), reductions=dict(shared=np.mean(reductions, 0).tolist()))
    return dict(of_points, smoothing=smoothing, table=table, gradients=what)


# ---------------------------------------------------------------- claims


def shared_checkpoints(table):
    """[{loss: statistics}] at the parameters where all losses were measured, the common start counted once."""
    later = [at for percent, at in table["kd"].items() if percent != "0"]
    return [*table["onehot"].values(), *later]


def log_ratio(a, b, statistic="noise_scale"):
    """log of the ratio of two noise scales, or of their parts, from the statistics of two losses."""
    return math.log(max(a[statistic], 1e-12) / max(b[statistic], 1e-12))


def compare(seed, loss, other):
    """Comparisons of two losses in one seed; each is positive when `loss` is less noisy than `other`.

    One alone misleads: far from its own minimum a loss has a large mean gradient, hence a low noise scale whatever its
    targets. So they are (i) at shared parameters, mean over the onehot and the kd run; (ii) every loss along its own
    run at the same share of steps; (iii) the decrease at the shared parameters.
    """
    table = seed["table"]
    shared = shared_checkpoints(table)
    own = [log_ratio(table[other][p][other], table[loss][p][loss]) for p in table[loss] if p != "0"]
    return {
        "i": np.mean([log_ratio(at[other], at[loss]) for at in shared]),
        "ii": np.mean(own),
        "iii": np.mean([at[loss]["first_order"] - at[other]["first_order"] for at in shared]),
    }


def fall_on_hard_points(seed, loss):
    """log(noise of one-hot / noise of `loss`) on the hardest quarter, minus the same on the easiest; shared parameters.

    0 where the noise falls by the same factor on all points.
    """
    falls = []
    for at in shared_checkpoints(seed["table"]):
        hard = log_ratio(at["onehot"], at[loss], f"noise {QUARTERS[0]}")
        easy = log_ratio(at["onehot"], at[loss], f"noise {QUARTERS[-1]}")
        falls.append(hard - easy)
    return np.mean(falls)


def link(seed):
    """Spearman correlations of each point's reduction with the gap Y − X: plain, and with X held fixed."""
    r = np.corrcoef([stats.rankdata(values) for values in (seed["reductions"]["shared"], seed["gap"], seed["x"])])
    with_gap, with_x = r[0, 1:]  # of the reduction
    gap_with_x = r[1, 2]
    partial = (with_gap - with_x * gap_with_x) / math.sqrt((1 - with_x**2) * (1 - gap_with_x**2))
    return dict(plain=float(with_gap), given_x=float(partial))


def denoise_claims(seeds):
    """Claims rows: `compare` with its joint verdict; where the noise falls; KD's accuracy; the link to the gap Y − X.

    The control of KD against one-hot is smoothed labels against one-hot: as soft, but knowing nothing of the teacher.
    """
    text = "KD gradients are less noisy than one-hot gradients"
    parts = []
    verdicts = {}
    of_controls = []
    pairs = (("kd", "onehot"), ("smooth", "onehot"), ("kd", "smooth"))
    kd, smooth, apart = (claims.over_seeds([compare(seed, *pair) for seed in seeds]) for pair in pairs)
    ratio = "log ratio of noise scales, one-hot / KD"
    share = "share of steepest descent, KD minus one-hot"
    for key, where, note in (
        ("i", "shared parameters", ratio),
        ("ii", "own runs at the same progress", ratio),
        ("iii", "decrease of the clean held-out loss at shared parameters", share),
    ):
        beside = dict(control=smooth[key], difference=apart[key])
        row = claims.claim(f"{text}: ({key}) {where}", "> 0", kd[key], 0, note, **beside)
        verdicts[key] = row["verdict"]
        of_controls.append(claims.verdict((smooth[key]["low"], smooth[key]["high"]), 0))
        note = note.replace("one-hot", "smoothed")
        of_softness = f"the reduction is not explained by softness alone: ({key}) {where}"
        parts += [row, claims.claim(of_softness, "> 0", apart[key], 0, note)]
    rows = [claims.headline(claims.joint_claim(text, verdicts, of_controls), "§5"), *parts]
    kd, smooth = (np.array([fall_on_hard_points(seed, loss) for seed in seeds]) for loss in ("kd", "smooth"))
    beside = dict(control=claims.over_seeds(smooth), difference=claims.over_seeds(kd - smooth))
    text = "the noise falls more on the hardest quarter than on the easiest (log ratios)"
    note = "noise of one-hot / KD"
    rows.append(claims.headline(claims.claim(text, "> 0", claims.over_seeds(kd), 0, note, **beside), "§5"))
    text = "KD is more accurate than labels as soft as its teacher"
    gains = claims.over_seeds([seed["accuracy"]["kd"] - seed["accuracy"]["smooth"] for seed in seeds])
    row = claims.claim(text, "> 0", gains, 0, "difference of test accuracies", unit="points")
    rows.append(claims.headline(row, "§3.2"))
    note = "Spearman correlation of noise reduction and gap Y − X, training points"
    for key, more in (("plain", ""), ("given_x", ", at the same teacher confidence X")):
        measured = claims.over_seeds([link(seed)[key] for seed in seeds])
        text = f"noise falls most where the student falls below its teacher{more}"
        rows.append(claims.claim(text, "< 0", measured, 0, note, above=False))
    return rows


# ---------------------------------------------------------------- output


def bands(axis, seeds, xs, value_of, scale=np.asarray):
    """A band for each loss: scale(mean over seeds of value_of(table, loss, x)) at each of xs."""
    for loss in LOSSES:
        cells = []
        for x in xs:
            cell = claims.over_seeds([value_of(seed["table"], loss, x) for seed in seeds])
            cells.append({key: scale(value) for key, value in cell.items()})
        claims.band(axis, [float(x) for x in xs], cells, **LOSSES[loss])


def curves(axes, seeds, batch_size):
    """Four axes: noise scale at shared parameters and along own runs, decrease, noise by quarter."""

    def noise(table, loss, percent, of=("onehot", "kd")):
        return np.mean([math.log(max(table[run][percent][loss]["noise_scale"], 1e-12)) for run in of])

    def own_noise(table, loss, percent):
        return noise(table, loss, percent, [loss])

    def decrease(table, loss, percent):
        return np.mean([table[run][percent][loss]["first_order"] for run in ("onehot", "kd")])

    def of_quarter(table, loss, k):  # in logs: late checkpoints, whose scale is far larger, would drown the rest
        pairs = [(at[loss][f"noise {QUARTERS[k]}"], at["onehot"]["noise_scale"]) for at in shared_checkpoints(table)]
        return np.mean([math.log(max(part, 1e-12) / max(whole, 1e-12)) for part, whole in pairs])

    percents = list(seeds[0]["table"]["kd"])
    bands(axes[0], seeds, percents, noise, np.exp)
    axes[0].set_title("(i) Noise at shared parameters")
    bands(axes[1], seeds, percents, own_noise, np.exp)
    axes[1].set_title("(ii) Noise along each loss's own run")
    for axis in axes[:2]:
        axis.set(yscale="log", ylabel="noise scale tr(Σ)/‖G‖²", xlabel="training steps (%)")
    bands(axes[2], seeds, percents, decrease)
    axes[2].axhline(0, color="black", lw=0.8)
    axes[2].set(xlabel="training steps (%)", ylabel="share of steepest descent")
    axes[2].set_title(f"(iii) Decrease, batches of {batch_size}")
    bands(axes[3], seeds, range(len(QUARTERS)), of_quarter, np.exp)
    axes[3].set(yscale="log", xlabel="quarter by teacher confidence", ylabel="relative to one-hot on all points")
    axes[3].set_title("Noise by quarter, shared parameters")
    axes[3].set_xticks(range(len(QUARTERS)), [name.split()[0] for name in QUARTERS])


def plot(seeds, args):
    """The figure: what `compare` compares; where the noise falls, by quarter and by point, over the gap Y − X."""
    places = [["shared", "own", "decrease"], ["quarters", "points", "points"]]
    figure, axes = claims.pyplot().subplot_mosaic(places, figsize=(9.5, 6.4))
    curves([axes[name] for name in ("shared", "own", "decrease", "quarters")], seeds, args.batch_size)
    claims.legend_below(figure, axes["shared"])

    axis = axes["points"]
    gap = np.concatenate([seed["gap"] for seed in seeds])
    x = np.concatenate([seed["x"] for seed in seeds])
    reductions = np.concatenate([seed["reductions"]["shared"] for seed in seeds])
    points = axis.scatter(gap, reductions, s=3, alpha=0.4, c=x, cmap="viridis", rasterized=True)
    figure.colorbar(points, ax=axis, label="teacher confidence X").solids.set_alpha(1)
    axis.axhline(0, color="black", lw=0.8)
    correlation = f"{np.mean([link(seed)['plain'] for seed in seeds]):.2f}".replace("-", "−")
    axis.set(xlabel="student–teacher gap Y − X", ylabel="noise reduction", title=f"Points, Spearman {correlation}")
    axis.set_yscale("symlog", linthresh=0.1)

    over = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    fit = runs.fit_note(np.mean([seed["fit"] for seed in seeds]))
    figure.suptitle(f"Gradient noise, {args.data}, {args.arch}, {over}\n{fit}\n{seeds[0]['gradients']}")
    claims.save_figure(figure, args.results, "denoise")


def add_measuring_flags(parser):
    """The flags that say what is measured. What is defined here is compared with what is kept of a seed."""
    add = parser.add_argument_group("measuring").add_argument
    share = number(float, 0, 100, open_low=True, open_high=True)
    add("--percents", type=share, nargs="+", default=[5.0, 25.0, 50.0], help="when to measure, besides 0 and 100")
    add("--points", type=number(int, 0), default=0, help="random training images with per-example gradients; 0 for all")
    add("--held-out", type=number(int, 0), default=2000, help="test images as held-out, 0 for all")
    add("--batches", type=number(int, 2, 1000), default=8, help="mini-batches of the training's size")


def main(argv=None):
    parser = runs.Parser(__doc__)
    common.add_flags(parser, "prefix of the run folders, as in switch_distill.py (default: runs/<data>-<arch>-denoise)")
    common.add_student_flags(parser)
    common.add_teacher_flags(parser)
    add_measuring_flags(parser)
    add = parser.add_argument_group("figure").add_argument
    results = "folder for figure, statistics and claims"
    add("--results", type=Path, default=Path("results/denoise"), metavar="FOLDER", help=results)
    add("--train-only", action="store_true", help="train and measure what is missing, and draw nothing")
    parser.set_defaults(seeds=[0, 1, 2, 3, 4], quiet=True)
    args = engine.resolve(parser.parse_args(argv))
    runs.source_of(measurements)  # noted now: the file may be edited while students are trained
    if (args.kd_weight, args.ce_weight) != (1, 0):
        raise InputError("the three losses are fixed here: leave --kd-weight and --ce-weight out")
    if 0 < args.points < 8:
        raise InputError(f"--points {args.points} is too few for quarters: use 8 or more, or 0 for all")
    args.percents = sorted(set(args.percents))
    args.snapshot_at = sorted({*args.snapshot_at, *(percent / 100 for percent in args.percents)})
    data = common.data_from(args)
    (args.results / "seeds").mkdir(parents=True, exist_ok=True)

    engine.check_folders([run_folders(args, seed) for seed in args.seeds], args, data)
    found = [measure_seed(args, seed, data) for seed in args.seeds]
    if args.train_only:
        return
    summary = dict(seeds=args.seeds, gradients=found[0]["gradients"], smoothing=[seed["smoothing"] for seed in found])
    summary["link"] = claims.over_seeds([link(seed) for seed in found])
    summary["tables"] = claims.over_seeds([seed["table"] for seed in found])
    runs.write_json(args.results / "denoise.json", summary)
    fit = runs.fit_note(np.mean([seed["fit"] for seed in found]))
    claims.save_claims(args.results, denoise_claims(found), f"{claims.seeds_scope(len(found))}; {fit}")
    plot(found, args)


if __name__ == "__main__":
    runs.cli(main)
