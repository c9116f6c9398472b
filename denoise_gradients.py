"""Gradient denoising (paper §5): does the teacher make mini-batch gradients less noisy, where, and is it mere softness?

    python denoise_gradients.py                                          # noisy digits, ResNet-8, five seeds
    python denoise_gradients.py --teacher 'runs/t-s{seed}' --out runs/x  # teachers of your own; run folders runs/x-…
    python denoise_gradients.py --data cifar10 --subset 2000 --label-noise 0.3 --arch resnet20 --epochs 20 --points 256

The paper speaks of distillation as a denoiser of gradients without fixing an experiment; this script defines one. Each
seed has three students with the same start, order and views, one for each of LOSSES. At 0, 5, 25, 50 and 100% of the
steps the per-example gradients of all three losses are taken at the same parameters (see `measure`), and compared there
and along each loss's own run (see `compare`). Runs are trained when missing and used again when finished; with
--out they are those of the switch_distill.py of that --out, which then needs --snapshot-at 0.05 0.25 0.5.
"""

import argparse
import functools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.optimize import brentq
from torch.func import functional_call, grad, vmap
from tqdm import tqdm

import claims
import common
import engine
import runs
from analyze_deviation import check_logits, phi_of_class
from runs import InputError, number
from train_student import add_student_flags, train_student
from train_teacher import train_teacher

# T²·CE(q, softmax(z/T)), where q is the training label and T = 1; softmax(teacher/T); or, as the control for softness
# alone, the label smoothed until its entropy is the teacher's mean entropy at T.
LOSSES = ("onehot", "kd", "smooth")
STYLES = dict(
    onehot=dict(color=claims.COLOURS["onehot"], label="one-hot"),
    kd=dict(color=claims.COLOURS["kd"], label="KD"),
    smooth=dict(color=claims.COLOURS["smoothed"], label="smoothed labels"),
)
BATCH_SIZES = (16, 64, 256, 1024)
QUARTERS = ("hardest quarter", "second quarter", "third quarter", "easiest quarter")
UNRESOLVED = 10  # times the number of points: the largest noise scale that is told apart from infinity
FIXED = ("kd_weight", "ce_weight")  # flags of train_student.py that follow from the kind of run

# ---------------------------------------------------------------- losses and gradients


def soft_loss(logits, target, temperature):
    """T²·CE(target, softmax(logits/T)) over the last axis: cross-entropy at T = 1, else kd_loss up to a constant.

    logits, target [..., C]; returns [...]. The constant is T² times the target's entropy, which no gradient sees.
    """
    return -(temperature**2) * (target * F.log_softmax(logits / temperature, -1)).sum(-1)


def matched_smoothing(teacher_logits, temperature):
    """Label smoothing α whose targets (1−α)·one-hot + α/classes have the teacher's mean entropy at this temperature."""
    probabilities = F.softmax(teacher_logits / temperature, 1).double()
    entropy, classes = torch.special.entr(probabilities).sum(1).mean().item(), probabilities.shape[1]

    def excess(alpha):
        p = np.full(classes, alpha / classes)
        p[0] += 1 - alpha
        return stats.entropy(p) - entropy

    if entropy <= 0:
        return 0.0
    return 1.0 if excess(1.0) <= 0 else brentq(excess, 0.0, 1.0, xtol=1e-12)


def smoothed(labels, classes, smoothing):
    """Smoothed one-hot targets [N, classes] of labels [N]."""
    return (1 - smoothing) * F.one_hot(labels, classes).float() + smoothing / classes


def per_example_gradients(model, images, targets, temperature):
    """Gradient of `soft_loss` of every example: one [B, p] per parameter of the model, in its order.

    images [B, ...] float, targets [B, C]; the model must be in eval mode, or batch norm would mix the examples.
    """
    parameters = {name: value.detach() for name, value in model.named_parameters()}

    def loss(parameters, image, target):
        return soft_loss(functional_call(model, parameters, (image[None],))[0], target, temperature)

    gradients = vmap(grad(loss), (None, 0, 0))(parameters, images, targets)
    return [gradients[name].flatten(1) for name in parameters]


def mean_gradient(model, images, targets, temperature, chunk=1000):
    """Gradient [P] of the mean `soft_loss` over all examples, by ordinary backpropagation."""
    total = 0
    for k in range(0, len(images), chunk):
        loss = soft_loss(model(images[k : k + chunk]), targets[k : k + chunk], temperature).sum()
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
        some, start = slice(k, k + chunk), 0
        for g in per_example_gradients(model, images[some], targets[some], temperature):
            part = slice(start, start + g.shape[1])
            squares[some] += torch.linalg.vector_norm(g, dim=1) ** 2
            inner[some] += g @ mean[part]
            batches[:, part].addmm_(weights[:, some], g)
            start = part.stop
    return mean, squares, inner, batches


# ---------------------------------------------------------------- measuring one set of parameters


class Points(NamedTuple):
    """The images of which gradients are taken, un-augmented, and how they are drawn into batches."""

    images: torch.Tensor  # [N, C, H, W]
    held_out: tuple  # (images, targets) of the held-out images
    groups: dict  # {name: bool array [N]}
    weights: torch.Tensor  # [R, N], see `batch_weights`
    rows: dict  # {key: slice of R}
    step_size: int  # the batch size of training


def batch_weights(groups, step_size, count, generator):
    """weights [R, N], a row for each mini-batch, drawn with replacement as the noise scale supposes; {key: slice of R}.

    Keys: `count` batches of each of BATCH_SIZES and of step_size, and half as many batches of step_size of each group.
    """
    n = len(next(iter(groups.values())))
    draws = [(size, np.arange(n), size, count) for size in sorted({*BATCH_SIZES, step_size})]
    draws += [(name, np.flatnonzero(member), step_size, max(2, count // 2)) for name, member in groups.items()]
    parts, rows, start = [], {}, 0
    for key, members, size, batches in draws:
        chosen = torch.as_tensor(members)[torch.randint(len(members), (batches, size), generator=generator)]
        parts.append(torch.zeros(batches, n).scatter_add_(1, chosen, torch.ones(batches, size)) / size)
        rows[key] = slice(start, start + batches)
        start += batches
    return torch.cat(parts), rows


def noise_scale(mean_square, square_of_mean, n):
    """(tr Σ, ‖G‖², noise scale tr Σ/‖G‖²) from mean ‖g_i‖² and ‖mean g_i‖² of n examples.

    G and Σ are mean and covariance of g_i, estimated without bias (McCandlish et al. 2018, "An empirical model of
    large-batch training", A.1, with B = 1 and n). The scale is free of units, so T² or a learning rate cannot fake it.
    The estimate of ‖G‖² can be negative; the scale is then unresolved and counts as UNRESOLVED·n.
    """
    trace = (mean_square - square_of_mean) * n / (n - 1)
    signal = square_of_mean - trace / n
    return trace, signal, trace / max(signal, trace / (UNRESOLVED * n)) if trace > 0 else 0.0


def measure(model, points, losses):
    """Statistics of each loss at the model's parameters: {loss: {statistic: float}}, with "deviation" an array [N].

    losses: {name: (targets [N, C], temperature)}. The model is in eval mode.
    noise_scale: see there; "deviation" and "noise <group>" are the parts of points and groups, whose mean it is
    cos_held_out: cosine of mini-batch gradients with the full one-hot gradient on held-out images; mean over the
        batches of each size and group
    first_order: decrease of the held-out loss by a short step along a mini-batch gradient scaled to unit length, as a
        share of what steepest descent gains: the cosine for batches of the training's size
    """
    uphill, found = mean_gradient(model, *points.held_out, 1.0), {}
    for name, (targets, temperature) in losses.items():
        mean, squares, inner, batches = stream(model, points.images, targets, temperature, points.weights)
        square_of_mean = float(mean @ mean)
        trace, signal, scale = noise_scale(float(squares.mean()), square_of_mean, len(squares))
        deviation = (squares - 2 * inner + square_of_mean).clamp(min=0).cpu().numpy()
        deviation = deviation * (scale / max(deviation.mean(), 1e-30))
        one = dict(trace=trace, signal=signal, noise_scale=scale, deviation=deviation)
        for group, member in points.groups.items():
            one[f"noise {group}"] = float(deviation[member].mean())

        norms = batches.norm(dim=1).clamp(min=1e-30)
        cosines = batches @ uphill / norms / max(float(uphill.norm()), 1e-30)
        for key in (*BATCH_SIZES, *points.groups):
            one[f"cos_held_out {key}"] = float(cosines[points.rows[key]].mean())
        one["first_order"] = float(cosines[points.rows[points.step_size]].mean())
        found[name] = one
    return found


# ---------------------------------------------------------------- runs


def run_folder(what, args, seed):
    """Run folder of `what`, the teacher or one of LOSSES."""
    if what == "teacher" and args.teacher:
        return Path(args.teacher.replace("{seed}", str(seed)))
    return Path(f"{args.out or f'runs/{runs.default_name(args)}-denoise'}-{what}-s{seed}")


def train_smooth(run, args, seed, data, teacher, smoothing, snapshots):
    """Train the control for softness in the run folder `run`, unless it is finished already."""

    def loss_fn(student, images, labels, teacher_logits, ce_weight, kd_weight):
        logits = student(images).float()
        return soft_loss(logits, smoothed(labels, data.classes, smoothing), args.temperature).mean(), logits

    model = common.build_model(args.arch, data.classes, data.facts["image"], args.width, ("student", seed))
    # Teacher and temperature say how much the labels are smoothed.
    facts = dict(targets="labels smoothed to the teacher's entropy")
    facts["teacher_sha256"] = engine.weights_hash(teacher.state_dict())
    with runs.locked(run):
        if runs.start_run(run, args, "student", seed, data, model, **facts):
            engine.train_images(run, model, data, args, "student", seed, loss_fn, snapshots=snapshots)


def student_states(what, args, seed, data, teacher, smoothing):
    """{percent: state dict} of the student run `what`, from 0 to 100; trained now when it is missing."""
    run, kd, total = run_folder(what, args, seed), float(what == "kd"), common.total_steps(args, data)[1]
    steps = {percent: min(round(percent / 100 * total), total - 1) for percent in args.percents}
    kept = {*steps.values(), *common.snapshot_steps(args, data)}
    flags = common.only_flags(args, common.add_flags, add_student_flags, kd_weight=kd, ce_weight=1 - kd)
    if what == "smooth":
        train_smooth(run, flags, seed, data, teacher, smoothing, kept)
    else:
        tables = run.parent / "teacher-logits"
        source = engine.teacher_source(args, data, 1, 1, tables) if kd else None
        teacher = engine.TeacherLogits(teacher, data, args.precision, source, tables) if kd else None
        train_student(run, flags, seed, data, teacher, snapshots=kept)
    model = common.build_model(args.arch, data.classes, data.facts["image"], args.width, ("student", seed))
    states = {0: {name: value.clone() for name, value in model.state_dict().items()}}
    files = {percent: run / f"snapshot-{step}.pt" for percent, step in steps.items()} | {100: run / "checkpoint.pt"}
    for percent, file in files.items():
        if not file.exists():
            shares = " ".join(f"{percent / 100:g}" for percent in args.percents)
            fix = f"train that run again with --overwrite --snapshot-at {shares}, or give another --out"
            raise InputError(f"{file} does not exist: {fix}")
        with runs.reading(file, f"it does not fit {args.arch}: train that run again with --overwrite"):
            states[percent] = runs.load_checkpoint(file, data.device)["model"]
            model.load_state_dict(states[percent])
    return states


# ---------------------------------------------------------------- one seed


def kept_file(args, seed):
    return Path(args.results) / "seeds" / f"denoise-s{seed}.json"


def measure_seed(args, seed, data):
    """Train the runs of one seed where they are missing, and measure them, unless that is kept; see `measurements`."""
    folder = run_folder("teacher", args, seed)
    if not args.teacher:
        train_teacher(folder, args, seed, data)
    teacher = engine.load_teacher(folder, data)
    logits = engine.logits_of(teacher, data, data.x_train)
    smoothing = matched_smoothing(logits, args.temperature)
    states, weights = {}, [engine.weights_hash(teacher.state_dict())]
    for what in LOSSES:
        states[what] = student_states(what, args, seed, data, teacher, smoothing)
        weights += [engine.weights_hash(state) for state in states[what].values()]
    settings = {name: getattr(args, name) for name in ("arch", "width", "batch_size", "temperature")}
    settings |= dict(vars(common.only_flags(args, add_measuring_flags)), data=data.facts, weights=weights)
    settings["test_images"] = "drawn evenly over classes"

    compute = functools.partial(measurements, args, seed, data, states, logits, smoothing)
    return runs.kept_result(kept_file(args, seed), settings, compute)


def measurements(args, seed, data, states, logits, smoothing):
    """Plain numbers and lists: test accuracy of each run; table {run: {percent: {loss: {statistic: number}}}}; of each
    point the teacher's confidence x [N], the student–teacher gap [N] and `point_reductions`; in words, over what."""
    accuracy = {what: runs.last_metrics(run_folder(what, args, seed))["test_acc"] for what in ("teacher", *LOSSES)}
    chosen = torch.arange(len(data.y_train))
    if args.points and args.points < len(chosen):  # the same for every checkpoint and loss
        chosen = torch.randperm(len(chosen), generator=common.generator("points", seed))[: args.points].sort().values
    chosen = chosen.to(data.device)
    teacher = logits[chosen].cpu().numpy()
    predicted = teacher.argmax(1)
    x = phi_of_class(teacher, predicted)
    file = run_folder("kd", args, seed) / "logits.npz"
    student = check_logits(runs.read_npz(file, engine.LOGITS)["train_logits"], file, logits)
    gap = phi_of_class(student[chosen.cpu().numpy()], predicted) - x

    points = points_of(args, seed, data, chosen, x)
    labels, temperature = data.y_train[chosen], args.temperature
    losses = dict(
        onehot=(F.one_hot(labels, data.classes).float(), 1.0),
        kd=(F.softmax(logits / temperature, 1)[chosen], temperature),
        smooth=(smoothed(labels, data.classes, smoothing), temperature),
    )
    model = common.build_model(args.arch, data.classes, data.facts["image"], args.width).to(data.device)
    table = {what: {} for what in LOSSES}
    bar = tqdm(total=sum(map(len, states.values())), desc=f"gradients, seed {seed}", leave=False, disable=None)
    for what in LOSSES:
        here = {"smooth": losses["smooth"]} if what == "smooth" else losses
        for percent, state in states[what].items():
            bar.update()
            if percent == 0 and what != "onehot":  # the three runs start from the same parameters
                table[what]["0"] = table["onehot"]["0"]
                continue
            model.load_state_dict(state)
            table[what][f"{percent:g}"] = measure(model.eval(), points, here)
    bar.close()
    reductions = point_reductions(table)
    for by_percent in table.values():
        for found in by_percent.values():
            for one in found.values():
                one.pop("deviation", None)
    parameters = sum(value.numel() for value in model.parameters())
    what = f"exact gradients of all {parameters} parameters on {len(chosen)} of {len(data.y_train)} training images"
    found = dict(accuracy=accuracy, smoothing=smoothing, table=table, reductions=reductions, gradients=what)
    return dict(found, x=x.tolist(), gap=gap.tolist())


def points_of(args, seed, data, chosen, x):
    """The `Points` of the training images `chosen`, whose teacher confidence is x [N].

    Their groups are quarters of x, hardest is lowest as in Figure 1a, and, with label noise, clean and flipped labels.
    """
    quarter = (stats.rankdata(x, method="ordinal") - 1).astype(int) * 4 // len(x)
    groups = {name: quarter == k for k, name in enumerate(QUARTERS)}
    flipped = (data.y_train != data.y_clean)[chosen].cpu().numpy()
    if flipped.any():
        groups |= {"clean labels": ~flipped, "flipped labels": flipped}
    groups = {name: member for name, member in groups.items() if member.any()}
    step_size = min(args.batch_size, len(data.y_train))
    weights, rows = batch_weights(groups, step_size, args.batches, common.generator("denoise", seed))
    weights = weights.to(data.device)
    test_images, test_labels = common.some_test_images(data, args.held_out or len(data.y_test))
    held_out = data.normalise(test_images).contiguous(), F.one_hot(test_labels, data.classes).float()
    images = data.normalise(data.x_train[chosen]).contiguous()
    return Points(images, held_out, groups, weights, rows, step_size)


# ---------------------------------------------------------------- claims


def shared_checkpoints(table):
    """[{loss: statistics}] at the parameters where all losses were measured, the common start counted once."""
    return [at for run in ("onehot", "kd") for percent, at in table[run].items() if (run, percent) != ("kd", "0")]


def log_ratio(a, b):
    """log of the ratio of two noise scales, from the statistics of two losses."""
    return math.log(max(a["noise_scale"], 1e-12) / max(b["noise_scale"], 1e-12))


def compare(seed, other):
    """Comparisons of kd with the loss `other` in one seed; each is positive when kd is the less noisy.

    One alone misleads: far from its own minimum a loss has a large mean gradient, hence a low noise scale whatever its
    targets. So they are (i) at shared parameters, mean over the onehot and the kd run; (ii) every loss along its own
    run at the same share of steps; (iii) the decrease at the shared parameters.
    """
    table, shared = seed["table"], shared_checkpoints(seed["table"])
    own = [log_ratio(table[other][p][other], table["kd"][p]["kd"]) for p in table["kd"] if p != "0"]
    return {
        "i": np.mean([log_ratio(at[other], at["kd"]) for at in shared]),
        "ii": np.mean(own),
        "iii": np.mean([at["kd"]["first_order"] - at[other]["first_order"] for at in shared]),
    }


def point_reductions(table):
    """Each point's reduction of the noise scale from onehot to kd, relative to their sum: −1..1 in total.

    Two lists [N]: mean over the shared checkpoints, and with each loss along its own run.
    """

    def reduction(onehot, kd):
        return (onehot["deviation"] - kd["deviation"]) / max(onehot["noise_scale"] + kd["noise_scale"], 1e-12)

    shared = [reduction(at["onehot"], at["kd"]) for at in shared_checkpoints(table)]
    own = [reduction(table["onehot"][p]["onehot"], table["kd"][p]["kd"]) for p in table["kd"] if p != "0"]
    return dict(shared=np.mean(shared, 0).tolist(), own=np.mean(own, 0).tolist())


def compare_hardest(seed):
    """Comparisons on where the noise falls in one seed, as in `compare`; each is hardest − |rest|, the parts of the
    reduction on the hardest quarter of points and on the others: positive when more than half is on the hardest."""
    hardest = np.argsort(seed["x"], kind="stable")[: math.ceil(len(seed["x"]) / 4)]

    def hardest_minus_rest(values):
        values = np.array(values, np.float32)
        part = values[hardest].sum() / len(values)
        return part - abs(values.mean() - part)

    gains = []
    for group in QUARTERS:
        key, shared = f"cos_held_out {group}", shared_checkpoints(seed["table"])
        gains.append(np.mean([at["kd"][key] - at["onehot"][key] for at in shared]) / 4)
    i, ii = (hardest_minus_rest(seed["reductions"][key]) for key in ("shared", "own"))
    return dict(i=i, ii=ii, iii=gains[0] - abs(sum(gains[1:])))


def link(seed):
    """Spearman correlations of each point's reduction with the gap Y − X: plain, and with X held fixed."""
    r = np.corrcoef([stats.rankdata(values) for values in (seed["reductions"]["shared"], seed["gap"], seed["x"])])
    partial = (r[0, 1] - r[0, 2] * r[1, 2]) / math.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    return dict(plain=float(r[0, 1]), given_x=float(partial))


def denoise_claims(seeds):
    """Claims rows: the comparisons and their joint verdict for each claim, and the link to the student–teacher gap."""
    where = {
        "i": "shared parameters",
        "ii": "own runs at the same progress",
        "iii": "decrease of the clean held-out loss at shared parameters",
    }
    scales, decrease = "log ratio of noise scales, {} / KD", "decrease, share of steepest descent, KD minus {}"
    part = "part on the hardest quarter minus the size of the rest"
    gain = "gain in decrease of batches of the hardest quarter, minus the size of the others'"
    rows = []
    for text, other, name in (
        ("KD gradients are less noisy than one-hot gradients", "onehot", "one-hot"),
        ("most of the reduction is on hard points", None, None),
        ("the reduction is not explained by softness alone", "smooth", "smoothed"),
    ):
        values = [compare(seed, other) if other else compare_hardest(seed) for seed in seeds]
        notes = [note.format(name) for note in (scales, scales, decrease)]
        notes = notes if other else [part, part, f"{gain}, weighted by points"]
        parts = {}
        for key, note in zip(values[0], notes, strict=True):
            measured = claims.mean_interval([value[key] for value in values])
            parts[key] = claims.claim(f"{text}: ({key}) {where[key]}", "> 0", *measured, 0, note=note)
        rows += [claims.joint_claim(text, {key: row["verdict"] for key, row in parts.items()}), *parts.values()]
    rows[0] = claims.headline(rows[0], "§5")
    note = "Spearman correlation of noise reduction and gap Y − X, training points"
    for key, more in (("plain", ""), ("given_x", ", at the same teacher confidence X")):
        measured = claims.mean_interval([link(seed)[key] for seed in seeds])
        text = f"noise falls most where the student falls below its teacher{more}"
        rows.append(claims.claim(text, "< 0", *measured, 0, above=False, note=note))
    return rows


# ---------------------------------------------------------------- output


def bands(axis, seeds, xs, value_of, scale=np.asarray):
    """A band for each loss: scale(mean over seeds of value_of(table, loss, x)) at each of xs."""
    for loss in LOSSES:
        cells = []
        for x in xs:
            cell = claims.over_seeds([value_of(seed["table"], loss, x) for seed in seeds])
            cells.append({key: scale(value) for key, value in cell.items()})
        claims.band(axis, [float(x) for x in xs], cells, **STYLES[loss])


def curves(axes, seeds, batch_size):
    """Four axes: noise scale at shared parameters and along own runs, alignment, decrease; as in `compare`."""

    def noise(table, loss, percent, of=("onehot", "kd")):
        return np.mean([math.log(max(table[run][percent][loss]["noise_scale"], 1e-12)) for run in of])

    def own_noise(table, loss, percent):
        return noise(table, loss, percent, [loss])

    def cosine(table, loss, size):
        return np.mean([at[loss][f"cos_held_out {size}"] for at in shared_checkpoints(table)])

    def decrease(table, loss, percent):
        return np.mean([table[run][percent][loss]["first_order"] for run in ("onehot", "kd")])

    percents = list(seeds[0]["table"]["kd"])
    for axis, value_of, title in (
        (axes[0], noise, "(i) Noise at shared parameters"),
        (axes[1], own_noise, "(ii) Noise along each loss's own run"),
    ):
        bands(axis, seeds, percents, value_of, np.exp)
        axis.set(yscale="log", ylabel="noise scale tr(Σ)/‖G‖²", xlabel="training steps (%)", title=title)
    bands(axes[2], seeds, BATCH_SIZES, cosine)
    axes[2].set(xscale="log", xlabel="batch size", ylabel="cosine with held-out gradient")
    axes[2].set(title="(iii) Alignment, shared parameters")
    axes[2].set_xticks(BATCH_SIZES, BATCH_SIZES)
    axes[2].minorticks_off()
    bands(axes[3], seeds, percents, decrease)
    axes[3].axhline(0, color="black", lw=0.8)
    axes[3].set(xlabel="training steps (%)", ylabel="share of steepest descent")
    axes[3].set(title=f"(iii) Decrease, batches of {batch_size}")


def groups_panel(axis, seeds):
    """Noise of the points of each group relative to the one-hot noise scale, at shared parameters.

    Geometric means over checkpoints: late ones, whose noise scale is far larger, would drown the rest otherwise.
    """

    def relative(table, loss, group):
        logs = []
        for at in shared_checkpoints(table):
            share = at[loss][f"noise {group}"] / max(at["onehot"]["noise_scale"], 1e-12)
            logs.append(math.log(max(share, 1e-12)))
        return math.exp(np.mean(logs))

    found = claims.over_seeds([seed["table"]["onehot"]["0"]["kd"] for seed in seeds])
    groups = [key.removeprefix("noise ") for key in found if key.startswith("noise ")]
    for k, loss in enumerate(LOSSES):
        cells = [claims.over_seeds([relative(seed["table"], loss, group) for seed in seeds]) for group in groups]
        values, places = [cell["value"] for cell in cells], np.arange(len(groups)) + 0.27 * (k - 1)
        bars = [cell["value"] - cell["low"] if len(seeds) > 1 else 0 for cell in cells]
        axis.bar(places, values, 0.25, color=STYLES[loss]["color"])
        axis.errorbar(places, values, bars, fmt="none", color="black", lw=0.8, capsize=2 * (len(seeds) > 1))
        axis.plot(places, [cell["seeds"] for cell in cells], ".", ms=2, color="0.3")
    axis.set(ylabel="relative to one-hot on all points", title="Noise by group, shared parameters")
    axis.set_xticks(range(len(groups)), [group.split()[0] for group in groups], rotation=25)
    axis.set_xlabel("quarter by teacher confidence" + ", or label" * (len(groups) > len(QUARTERS)))


def gap_panel(figure, axis, seeds):
    """Each point's reduction against the student–teacher gap, coloured by teacher confidence."""
    gap, x = (np.concatenate([seed[key] for seed in seeds]) for key in ("gap", "x"))
    reductions = np.concatenate([seed["reductions"]["shared"] for seed in seeds])
    points = axis.scatter(gap, reductions, s=3, alpha=0.4, c=x, cmap="viridis", rasterized=True)
    figure.colorbar(points, ax=axis, label="teacher confidence X").solids.set_alpha(1)
    axis.axhline(0, color="black", lw=0.8)
    correlation = f"{np.mean([link(seed)['plain'] for seed in seeds]):.2f}".replace("-", "−")
    axis.set(xlabel="student–teacher gap Y − X", ylabel="noise reduction", title=f"Points, Spearman {correlation}")
    axis.set_yscale("symlog", linthresh=0.1)


def plot(seeds, args):
    """The figure: what `compare` compares, then where the noise falls."""
    figure, axes = claims.pyplot().subplots(2, 3, figsize=(9.5, 6.4))
    curves(axes.flat[:4], seeds, args.batch_size)
    groups_panel(axes[1, 1], seeds)
    gap_panel(figure, axes[1, 2], seeds)
    claims.legend_below(figure, axes[0, 0])
    over = f"{len(seeds)} seed{'s' * (len(seeds) > 1)}"
    figure.suptitle(f"Gradient noise, {args.data}, {args.arch}, {over}\n{seeds[0]['gradients']}")
    claims.save_figure(figure, args.results, "denoise")


# ---------------------------------------------------------------- command line


def add_measuring_flags(parser):
    """The flags that say what is measured. What is defined here is compared with what is kept of a seed."""
    add = parser.add_argument_group("measuring").add_argument
    share = number(float, 0, 100, open_low=True, open_high=True)
    add("--percents", type=share, nargs="+", default=[5.0, 25.0, 50.0], help="when to measure, besides 0 and 100")
    add("--points", type=number(int, 0), default=0, help="random training images with per-example gradients; 0 for all")
    add("--held-out", type=number(int, 0), default=2000, help="test images as held-out, 0 for all")
    add("--batches", type=number(int, 2, 1000), default=8, help="mini-batches of each size")


def main(argv=None):
    parser = runs.Parser(__doc__)
    common.add_flags(parser, "prefix of the run folders, as in switch_distill.py (default: runs/<data>-<arch>-denoise)")
    add_student_flags(parser)
    add_measuring_flags(parser)
    add = parser.add_argument_group("results").add_argument
    add("--results", default="results/denoise", metavar="FOLDER", help="folder for figure, statistics and claims")
    common.add_process_flags(parser)
    parser.set_defaults(seeds=[0, 1, 2, 3, 4], quiet=True)
    for action in parser._actions:
        if action.dest in FIXED:
            action.help = argparse.SUPPRESS

    args = engine.resolve(parser.parse_args(argv))
    runs.check_prefix(args)
    args.percents = sorted(set(args.percents))
    args.snapshot_at = sorted({*args.snapshot_at, *(percent / 100 for percent in args.percents)})
    for name in FIXED:
        if getattr(args, name) != parser.get_default(name):
            raise InputError(f"--{name.replace('_', '-')} follows from the kind of run here: leave it out")
    if 0 < args.points < 8:
        raise InputError(f"--points {args.points} is too few for quarters: use 8 or more, or 0 for all")
    data = common.data_from(args)
    if data.mapped:
        raise InputError("gradients are taken of images in memory, where these do not fit: give a smaller --image-size")
    common.check_model(args, data)
    seeds = engine.shard_of(args)
    teachers = sorted({run_folder("teacher", args, seed) for seed in seeds})
    given, made = (teachers, []) if args.teacher else ([], teachers)
    for run in given:
        engine.load_teacher(run, data)  # a wrong one fails before anything is discarded
    planned = [run_folder(what, args, seed) for seed in seeds for what in LOSSES]
    if args.overwrite:
        for seed in seeds:
            kept_file(args, seed).unlink(missing_ok=True)
    runs.discard_runs(args, planned + made, given)
    kept_file(args, 0).parent.mkdir(parents=True, exist_ok=True)

    engine.run_jobs(args)
    found = [measure_seed(args, seed, data) for seed in seeds]
    if engine.only_a_shard(args):
        return
    summary = dict(seeds=args.seeds, gradients=found[0]["gradients"], smoothing=[seed["smoothing"] for seed in found])
    summary["accuracy"] = claims.over_seeds([seed["accuracy"] for seed in found])
    summary["link"] = claims.over_seeds([link(seed) for seed in found])
    summary["tables"] = claims.over_seeds([seed["table"] for seed in found])
    runs.write_json(Path(args.results) / "denoise.json", summary)
    claims.save_claims(args.results, denoise_claims(found), f"Student's t over {len(found)} seeds")
    plot(found, args)


if __name__ == "__main__":
    runs.cli(main)
