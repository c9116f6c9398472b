"""Section 4: does distillation exaggerate gradient descent's bias towards the top eigendirections? (Theorem 4.1)

    python eigenspace.py                                            # all three levels, digits, 5 seeds
    python eigenspace.py --level ntk --points 1000 --width 1

The claim: at equal progress along a top direction the self-distilled student has progressed less along a lower one than
its teacher. Levels: least squares, where that is the theorem; classifiers, in the eigenspace of the first layer's
input; a ResNet's logits, in that of its empirical NTK. The student has its teacher's loss, so T = 1, and a control that
is as soft and not taught; --temperature adds the same pair at that T (see NETWORKS).

Departures from the paper: plain SGD (no momentum, weight decay or augmentation), so that paths are smooth; images are
centred on the mean training image; models are half as wide; test accuracies are of 1,000 test images; and
intervals are over seeds (initialisation, order; linear: targets, noise, examples) at one draw of the label noise.
"""

import functools
import itertools
import math
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import claims
import common
import engine
import runs
from denoise_gradients import matched_smoothing, smoothed, soft_loss
from runs import InputError, number

LEVELS = ("linear", "classifiers", "ntk")

# ---------------------------------------------------------------- linear theory


def flow_filter(eigenvalues, t):
    """A(t) = 1 − exp(−tλ): share of β* fitted by gradient flow from zero after time t. Arrays broadcast."""
    return -np.expm1(-np.multiply(t, eigenvalues))


def gd_filter(eigenvalues, steps, lr):
    """1 − (1 − ηλ)^k: the same after k steps of gradient descent at the rate η, as long as ηλ < 1 (no overshoot)."""
    return -np.expm1(steps * np.log1p(-np.multiply(lr, eigenvalues)))  # exact also where 1 − ηλ rounds


def equal_progress(top, low, teacher_time, share):
    """Theorem 4.1: teacher and student where both have progressed equally along the eigenvalue `top`.

    The teacher stops at `teacher_time` T; both stand at `share` in (0, 1) of what it then has along `top`: the student,
    trained on its predictions, at time s with A_top(s) = share, the teacher at t <= T. Returns (A_low(t),
    A_low(s)·A_low(T)), teacher and student along `low`. Theorem: for 0 < low < top the second is strictly smaller.
    Proof: with q = low/top, A_low = g(A_top), g(a) = 1 − (1−a)^q, and g(a)·g(b) < g(a·b) on (0, 1), as a·g'(a)/g(a)
    increases in a for q < 1. Gradient descent: the same with −log(1 − ηλ)/η for λ (no overshoot).
    """
    s = -np.log1p(-np.asarray(share)) / top
    t = -np.log1p(-share * flow_filter(top, teacher_time)) / top
    return flow_filter(low, t), flow_filter(low, s) * flow_filter(low, teacher_time)


# The bias-variance example: 30 directions λ_k = k^-1.5, 100 points. β* is random; its energy λβ*² falls (top) or rises
# (low) along the directions as 1/k², its sum is 1.
DIRECTIONS, POINTS, STEPS, RATE = 30, 100, 60, 0.5
POWER_LAW = np.arange(1, DIRECTIONS + 1) ** -1.5
NOISES = (0.25, 0.5, 1.0, 2.0, 4.0)


def risk(shares, beta, noise):
    """E‖X(β̂ − β*)‖²/n of an estimator that keeps these shares [..., d] of least squares: bias and variance.

    X has POINTS rows and XᵀX/n = diag(POWER_LAW); beta [d] is β*.
    """
    return (POWER_LAW * (1 - shares) ** 2 * beta**2).sum(-1) + noise**2 / POINTS * (shares**2).sum(-1)


def bias_variance(seed):
    """{signal in top or low directions: {estimator: [risk for each of NOISES]}}, a "best" one at its own best time."""
    rng = np.random.default_rng([4, seed])
    times = np.geomspace(0.1, 1e5, 1200)[:, None]
    teacher = gd_filter(POWER_LAW, STEPS, RATE)[None]
    estimators = {  # the shares that they keep [times, d]
        "teacher": teacher,
        "student": teacher**2,  # trained as long as the teacher
        "best early stop": gd_filter(POWER_LAW, np.minimum(times, STEPS), RATE),
        "best student": gd_filter(POWER_LAW, times, RATE) * teacher,
    }
    found = {}
    for signal, order in (("top", slice(None)), ("low", slice(None, None, -1))):
        energy = (rng.standard_normal(DIRECTIONS) / np.arange(1, DIRECTIONS + 1))[order] ** 2
        beta = rng.choice([-1, 1], DIRECTIONS) * np.sqrt(energy / energy.sum() / POWER_LAW)
        risks = found[signal] = {}
        for name, shares in estimators.items():
            risks[name] = [float(risk(shares, beta, noise).min()) for noise in NOISES]
    return found


# The constructed examples, two classes each: points, low directions and their variance (that of the top direction is
# 1), distance of the class means from 0 along the top direction and along all low ones (in their standard deviations),
# share of wrong training labels. In the first two wrong labels are fitted through the noise of low directions (in the
# second too few of them to fit all), so that less progress there helps; in the third they tell more than the top one.
EXAMPLES = {
    "noise in low directions": dict(n=200, low=400, variance=0.1, top=1.5, signal=0.0, wrong=0.2),
    "noise in few low directions": dict(n=200, low=60, variance=0.1, top=1.5, signal=0.0, wrong=0.2),
    "signal in low directions": dict(n=200, low=60, variance=0.01, top=0.4, signal=2.0, wrong=0.0),
}


def example(name, seed):
    """One of EXAMPLES, logistic regression from zero, its buckets the top direction and all others.

    The student is distilled at T = 1: it has its teacher's loss, as in the theorem.
    """
    n, low, variance, top, signal, wrong = EXAMPLES[name].values()
    rng = np.random.default_rng([5, seed, list(EXAMPLES).index(name)])
    spread = np.sqrt(np.array([1] + [variance] * low))
    mean = np.array([top] + [signal * math.sqrt(variance / low)] * low)

    def draw(count):
        y = rng.integers(2, size=count)
        x = rng.standard_normal((count, 1 + low)) * spread + (2 * y - 1)[:, None] * mean
        return torch.tensor(x), torch.tensor(y)

    def build(key):
        model = nn.Linear(1 + low, 2, bias=False).double()
        nn.init.zeros_(model.weight)
        return model

    (x, clean), test = draw(n), draw(5000)
    labels = torch.where(torch.tensor(rng.random(n) < wrong), 1 - clean, clean)
    eigenvalues, vectors = second_moment_eigenvectors(x)
    recipe = dict(lr=1 / float(eigenvalues[0]), steps=100, batch_size=0, temperature=1.0)
    names = ("teacher", "student", "smoothed")
    _, seen, fit = self_distil(build, (x, labels), test, 2, seed, first_weight, recipe, names)
    buckets = [(0, 1), (1, 1 + low)]
    return dict(buckets=buckets, paths=weight_progress(seen, vectors, buckets), train_accuracy=fit)


def linear_seed(seed):
    """Level 1, least squares from zero; its constructed examples show where the same bias helps and where it hurts."""
    return dict(exact=bias_variance(seed), examples={name: example(name, seed) for name in EXAMPLES})


# ---------------------------------------------------------------- eigen-buckets and matched progress


def second_moment_eigenvectors(rows):
    """Eigenvalues [d], largest first, and eigenvectors [d, d] (columns) of rowsᵀrows/N; rows [N, d]; float64.

    XᵀX/n is what gradient descent on a linear layer sees; `centred_images` makes it the covariance.
    """
    moment = sum(part.double().T @ part.double() for part in rows.split(65536)) / len(rows)
    values, vectors = torch.linalg.eigh(moment)
    return values.flip(0), vectors.flip(1)


def bucket_ends(count, buckets):
    """[(start, end), ...] of at most `buckets` runs of the ranks 0..count−1, evenly spaced in log rank, none empty."""
    if count < 2:
        raise InputError("the first layer's input has fewer than 2 directions with data: give data with more of them")
    ends = np.unique(np.round(np.geomspace(1, count + 1, buckets + 1)).astype(int) - 1)
    return list(zip(ends[:-1].tolist(), ends[1:].tolist(), strict=True))


def weight_progress(seen, vectors, buckets):
    """Progress per bucket and test accuracy, {network: rows [S, buckets + 1]}, from {network: [(weight, accuracy)]}.

    Progress in bucket b is ‖(W(t) − W(0))·V_b‖_F / ‖(W_teacher(end) − W_teacher(0))·V_b‖_F, V_b its eigenvectors
    (columns of `vectors` [d, d]). The normaliser is the same for teacher and student, so a ratio of progress is a ratio
    of components, as in the theorem. Departure: *changes* are projected, for the initialisation is no progress.
    """
    paths = {}
    for network, path in seen.items():
        rows = []
        for weight, accuracy in path:
            squares = ((weight - path[0][0]).flatten(1).double() @ vectors).square().sum(0)
            rows.append([*(math.sqrt(squares[start:end].sum()) for start, end in buckets), accuracy])
        paths[network] = np.array(rows)
    whole = np.append(np.maximum(paths["teacher"][-1, :-1], 1e-300), 1)
    return {network: (path / whole).tolist() for network, path in paths.items()}


def at_top(path, levels):
    """`path` [S, K] interpolated where its column 0 first reaches each level: [L, K], NaN where it never does."""
    rows = np.full((len(levels), path.shape[1]), np.nan)
    for row, level in zip(rows, levels, strict=True):
        reached = np.flatnonzero(path[:, 0] >= level)
        if len(reached):
            before, after = path[max(reached[0] - 1, 0)], path[reached[0]]
            share = (level - before[0]) / (after[0] - before[0]) if reached[0] else 0.0
            row[:] = before + share * (after - before)
    return rows


def compare(paths, *names):
    """Lower over top progress: progress in the lower buckets over the teacher's, at equal progress in the top one.

    paths: {network: [S, buckets + 1]}, progress per bucket and test accuracy. Lower progress is averaged over 20
    evenly spaced levels of the top bucket that the teacher and all of `names` reach (each at its first crossing), and
    divided by the teacher's average. Below 1: exaggeration; the teacher's own path *is* early stopping. Returns levels
    [L], and of each network curves [L, buckets − 1] (the ratio at each level), ratio (of averages), accuracy (at last).
    """
    paths = {name: np.array(paths[name]) for name in ("teacher", *names)}
    lowest, highest = max(path[0, 0] for path in paths.values()), min(path[:, 0].max() for path in paths.values())
    levels = np.linspace(lowest, highest, 21)[1:] if highest > lowest else np.full(20, np.nan)
    matched = {name: at_top(path, levels) for name, path in paths.items()}
    lower = {name: rows[:, 1:-1] for name, rows in matched.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        curves = {name: rows / lower["teacher"] for name, rows in lower.items()}
        ratio = {name: rows.mean(0) / lower["teacher"].mean(0) for name, rows in lower.items()}
    return dict(levels=levels, curves=curves, ratio=ratio, accuracy={name: matched[name][-1, -1] for name in matched})


# ---------------------------------------------------------------- training


class Network(NamedTuple):
    """How a network is trained: T²·CE(targets, softmax(logits/T)), plain cross-entropy at T = 1."""

    targets: str  # "labels"; "teacher": softmax(teacher/T); "smoothed": labels whose entropy is the teacher's mean at T
    hot: bool = False  # T is --temperature, not 1
    fresh: bool = False  # its own initialisation and order, not the teacher's


# At T = 1 the student's loss is the teacher's and only the targets differ, as in the theorem. The smoothed network is
# as soft as the teacher on average but knows nothing of it: by how much the student falls below it is not softness. It
# often stops short of the teacher along the top directions; the two are compared as far as both go. At a higher T the
# loss has another shape as well, for both alike. Fresh starts: what another initialisation does.
NETWORKS = {
    "teacher": Network("labels"),
    "student": Network("teacher"),
    "smoothed": Network("smoothed"),
    "student T": Network("teacher", hot=True),
    "smoothed T": Network("smoothed", hot=True),
    "student fresh": Network("teacher", fresh=True),
    "one-hot fresh": Network("labels", fresh=True),
}


def observed_steps(steps):
    """About 40 log-spaced numbers of steps, from 0 to `steps`."""
    return np.unique(np.round(np.geomspace(1, steps, 40)).astype(int).tolist() + [0]).tolist()


def descend(model, inputs, targets, temperature, recipe, order_key, observe):
    """Plain SGD on the mean `soft_loss`; returns [observe(model)] after each of `observed_steps`.

    recipe: lr, steps, batch_size (0 takes all points each step); order_key seeds the order. InputError when the weights
    stop being finite.
    """
    n, lr, steps = len(inputs), recipe["lr"], recipe["steps"]
    batch = min(recipe["batch_size"] or n, n)
    per_epoch, parameters, seen = n // batch, list(model.parameters()), [observe(model)]
    observed = observed_steps(steps)
    for step in tqdm(range(steps), "training", unit="step", leave=False, disable=None):
        if step % per_epoch == 0:
            stream = common.generator("eigenspace order", order_key, step // per_epoch)
            order = torch.randperm(n, generator=stream).to(inputs.device)
        index = order[step % per_epoch * batch :][:batch]
        loss = soft_loss(model(inputs[index]), targets[index], temperature).mean()
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters), strict=True):
            parameter.data.sub_(gradient, alpha=lr)
        if step + 1 in observed:
            if not all(torch.isfinite(parameter).all() for parameter in parameters):
                what = f"the weights became NaN or infinite within {step + 1} steps at learning rate {lr:.3g}"
                raise InputError(f"{what}: give a lower --lr")
            seen.append(observe(model))
    return seen


@torch.no_grad()
def evaluate(model, inputs, batch=1000):
    """Logits [N, C] in eval mode."""
    training = model.training
    model.eval()
    logits = torch.cat([model(part) for part in inputs.split(batch)])
    model.train(training)
    return logits


def accuracy_of(logits, labels):
    """Share of points whose top class is the label."""
    return (logits.argmax(1) == labels).double().mean().item()


def first_weight(model):
    """What `self_distil` observes for `weight_progress`."""
    return first_layer(model).weight.detach().clone()


def self_distil(build, train, test, classes, seed, observe, recipe, networks=NETWORKS):
    """Train the networks, teacher first: (teacher, {network: [(observe(model), test accuracy)]}, its train accuracy).

    build(key) -> model; train, test: (inputs, labels [N]); recipe: as in `descend`, and temperature. Networks of the
    same initialisation also have the same order.
    """
    teacher, teacher_logits, seen = None, None, {}

    def observed(model):
        return observe(model), accuracy_of(evaluate(model, test[0]), test[1])

    for name in networks:
        network = NETWORKS[name]
        key = ("fresh" if network.fresh else "teacher", seed)
        t = recipe["temperature"] if network.hot else 1.0
        if network.targets == "teacher":
            targets = F.softmax(teacher_logits / t, 1)
        else:
            smoothing = matched_smoothing(teacher_logits, t) if network.targets == "smoothed" else 0.0
            targets = smoothed(train[1], classes, smoothing)
        model = build(key)
        seen[name] = descend(model, train[0], targets, t, recipe, key, observed)
        if name == "teacher":
            teacher, teacher_logits = model, evaluate(model, train[0])
    return teacher, seen, accuracy_of(teacher_logits, train[1])


# ---------------------------------------------------------------- trained classifiers

# Learning rate in units of 1/λ1, the largest eigenvalue of the first layer's input, and steps of 250 images: smooth
# paths, and a digits teacher that has begun to fit the wrong labels.
CLASSIFIERS = {"linear": dict(lr=1.0, steps=400), "mlp": dict(lr=1.0, steps=800), "cnn": dict(lr=0.3, steps=400)}
NTK = dict(lr=0.1, steps=150)


def centred_images(data):
    """Training images and up to 1,000 test images [N, C, H, W], less the mean training image, each with labels [N]."""
    images, (test, test_labels) = data.normalise(data.x_train), common.some_test_images(data, 1000)
    return (images - images.mean(0), data.y_train), (data.normalise(test) - images.mean(0), test_labels)


def build_classifier(arch, data, width, key):
    """`common.build_model`, plus arch linear, on the data's device."""
    if arch != "linear":
        return common.build_model(arch, data.classes, data.facts["image"], width, ("eigenspace", key)).to(data.device)
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(common.stream_seed("init", "eigenspace", key))
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(data.facts["image"]), data.classes)).to(data.device)


def first_layer(model):
    """The first convolution or linear layer; InputError when it is grouped or there is none."""
    layer = next((module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))), None)
    if layer is None or getattr(layer, "groups", 1) != 1:
        raise InputError("the first layer must be a plain convolution or a linear layer: choose another --archs")
    return layer


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
    """Level 2, cross-entropy in the eigenspace of the first layer's input (CNN: its patches).

    Returns buckets, paths as `compare` takes them, and the teacher's accuracy on the training labels.
    """
    train, test = centred_images(data)
    build = functools.partial(build_classifier, arch, data, recipe["width"])
    eigenvalues, vectors = second_moment_eigenvectors(first_layer_inputs(first_layer(build(0)), train[0]))
    directions = int((eigenvalues > 1e-6 * eigenvalues[0]).sum())  # the others have no data
    buckets = bucket_ends(directions, recipe["buckets"])
    recipe = dict(recipe, lr=recipe["lr"] / float(eigenvalues[0]))
    _, seen, fit = self_distil(build, train, test, data.classes, seed, first_weight, recipe)
    return dict(buckets=buckets, paths=weight_progress(seen, vectors, buckets), train_accuracy=fit)


# ---------------------------------------------------------------- function space


def empirical_ntk(model, inputs, classes, chunk=50):
    """Class-averaged empirical NTK [n, n], float64: 1/C Σ_c ∇f_c(x)·∇f_c(x') over all parameters, BN in eval mode.

    The full kernel of n·C rows is about this one ⊗ I_C (exactly at infinite width, Jacot et al. 2018), and C² as large.
    """
    model.eval()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def logit(parameters, image, c):
        return torch.func.functional_call(model, (parameters, buffers), (image[None],))[0, c]

    gradients = torch.func.vmap(torch.func.grad(logit), (None, 0, None), chunk_size=chunk)
    kernel = torch.zeros(len(inputs), len(inputs), dtype=torch.float64, device=inputs.device)
    for c in tqdm(range(classes), "empirical NTK", unit="class", leave=False, disable=None):
        for part in gradients(parameters, inputs, c).values():
            kernel += part.flatten(1) @ part.flatten(1).T
    return kernel / classes


def centre(logits):
    """Logits [n, C] less their mean over classes (which softmax ignores) and then over points, float64."""
    logits = logits.double()
    logits = logits - logits.mean(1, keepdim=True)
    return logits - logits.mean(0)


def share_fitted(logits, target, vectors, buckets):
    """Progress in function space, for every bucket: ⟨U_bᵀF, U_bᵀG⟩/‖U_bᵀG‖², the share of the target that is fitted.

    F, the network's logits, and G, the teacher's final ones, [n, C]: in eval mode, centred over classes and points; U_b
    the bucket's eigenvectors, columns of `vectors` [n, n].
    """
    fitted, wanted = vectors.T @ logits, vectors.T @ target
    shares = []
    for start, end in buckets:
        energy = wanted[start:end].square().sum().clamp(min=1e-300)
        shares.append(float((fitted[start:end] * wanted[start:end]).sum() / energy))
    return shares


def ntk_seed(data, arch, recipe, seed):
    """Level 3, function space of a ResNet: {kernel: as `classifier_seed`}. The kernel's points are those trained on.

    Eigenvectors of the centred empirical NTK of the teacher at initialisation (kernel init) or at its end, the same for
    all networks. That of the end favours the teacher over any other network: there only differences from controls say
    something.
    """
    train, test = centred_images(data)
    images = train[0]

    def build(key):
        model = build_classifier(arch, data, recipe["width"], key)
        torch.optim.swa_utils.update_bn([images], model)  # so that eval mode means something before any training step
        return model

    def observe(model):
        return centre(evaluate(model, images))

    teacher, seen, fit = self_distil(build, train, test, data.classes, seed, observe, recipe)
    target, found = seen["teacher"][-1][0], {}
    buckets = bucket_ends(len(images) - 1, recipe["buckets"])  # centring makes the last eigenvalue 0
    for kernel, model in (("init", build(("teacher", seed))), ("end", teacher)):
        gram = empirical_ntk(model, images, data.classes)
        gram = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
        vectors = torch.linalg.eigh(gram)[1].flip(1)
        paths = {}
        for name, path in seen.items():
            paths[name] = [[*share_fitted(logits, target, vectors, buckets), accuracy] for logits, accuracy in path]
        found[kernel] = dict(buckets=buckets, paths=paths, train_accuracy=fit)
    return found


# ---------------------------------------------------------------- claims


def claim_over_seeds(text, expected, values, note=""):
    """The claim that the mean of `values`, one for each seed, is as expected: "< threshold" or "> threshold"."""
    sign, threshold = expected.split()
    return claims.claim(text, expected, *claims.mean_interval(values), float(threshold), sign == ">", note)


def linear_claims(results):
    """Claims of level 1: when the bias helps, and when it hurts."""
    rows, best = [], "each at its own best time"
    for first, second, signal, noise, expected, note in (
        ("student", "teacher", "top", 4.0, "< 0", ""),
        ("student", "teacher", "low", 0.25, "> 0", ""),
        ("best student", "best early stop", "top", 1.0, "< 0", best),
        ("best student", "best early stop", "top", 4.0, "< 0", best),
    ):
        text = f"linear: log risk, {first} minus {second}, signal in {signal} directions, noise {noise:g}"
        risks = np.array([[result["exact"][signal][name] for name in (first, second)] for result in results])
        log_ratios = -np.diff(np.log(risks[:, :, NOISES.index(noise)]))[:, 0]
        rows.append(claim_over_seeds(text, expected, log_ratios, note))
    for name, settings in EXAMPLES.items():
        helps = "> 0" if settings["wrong"] else "< 0"  # does the bias, on test points?
        rows += matched_claims(f"example, {name}", [result["examples"][name] for result in results], helps)
    return rows


BELOW = "the student's lower/top progress is below its teacher's at T = 1"


def matched_claims(prefix, seeds, helps="> 0", temperature=1.0):
    """Claims of an architecture, kernel or example, from its result for each seed; the first one says `BELOW`."""
    alone = [compare(seed["paths"], "student") for seed in seeds]
    ratios = np.array([found["ratio"]["student"] for found in alone])  # [seeds, buckets - 1]
    matched = "top-bucket progress matched up to {:.2f}"
    note = matched.format(np.mean([found["levels"][-1] for found in alone]))
    table = [(BELOW, "< 1", ratios.mean(1), note)]
    text = "lower over top progress, student"
    for against, *pair in (
        ("smoothed control", "student", "smoothed"),
        (f"smoothed control, both at T = {temperature:g}", "student T", "smoothed T"),
        ("one-hot network, both from a fresh start", "student fresh", "one-hot fresh"),
    ):
        if pair[0] in seeds[0]["paths"]:
            found = [compare(seed["paths"], *pair) for seed in seeds]
            student, control = np.array([[one["ratio"][name].mean() for name in pair] for one in found]).T
            reach = matched.format(np.mean([one["levels"][-1] for one in found]))
            note = f"{student.mean():.3f} and {control.mean():.3f} against teacher, {reach}"
            table.append((f"{text} minus {against}", "< 0", student - control, note))
    if ratios.shape[1] > 1:
        table.append((f"{text} against teacher, lowest bucket alone", "< 1", ratios[:, -1], ""))

    stopped = [found["accuracy"]["student"] - found["accuracy"]["teacher"] for found in alone]
    teacher, student = (np.array([seed["paths"][name][-1][-1] for seed in seeds]) for name in ("teacher", "student"))
    fits = f"on training labels {100 * np.mean([seed['train_accuracy'] for seed in seeds]):.1f}%"
    note = f"teacher {100 * teacher.mean():.1f}%, {fits}"
    table.append(("test accuracy at equal top progress, student minus teacher", helps, stopped, ""))
    table.append(("test accuracy at the end, student minus teacher", helps, student - teacher, note))
    return [claim_over_seeds(f"{prefix}: {text}", *row) for text, *row in table]


# ---------------------------------------------------------------- figures

NAMES = dict(linear="linear probe", mlp="MLP", cnn="CNN", init="NTK at initialisation", end="NTK at the teacher's end")
COLOURS = claims.COLOURS
STYLES = {
    "teacher": dict(color=COLOURS["teacher"]),
    "student": dict(color=COLOURS["kd"]),
    "smoothed": dict(color=COLOURS["smoothed"]),
    "student T": dict(color=COLOURS["kd"], ls="--"),
    "smoothed T": dict(color=COLOURS["smoothed"], ls="--"),
    "student fresh": dict(color=COLOURS["kd"], ls=":"),
    "one-hot fresh": dict(color=COLOURS["onehot"], ls=":"),
}


def plot_paths(axis, seeds, x, y, networks, scale=1, first=0):
    """Column y of the networks' paths over column x from observation `first` on: seeds thin, their mean in front."""
    for network in networks:
        paths = np.array([seed["paths"][network] for seed in seeds])[:, first:]
        axis.plot(paths[:, :, x].T, scale * paths[:, :, y].T, color=STYLES[network]["color"], lw=0.4, alpha=0.4)
        axis.plot(paths.mean(0)[:, x], scale * paths.mean(0)[:, y], **STYLES[network])


def plot_ratio(axis, seeds, networks):
    """Lower progress over the teacher's at each level of top progress, mean over lower buckets; bands over seeds."""
    for network in networks:
        found = [compare(seed["paths"], network) for seed in seeds]
        levels = np.mean([one["levels"] for one in found], axis=0)
        curves = np.array([one["curves"][network].mean(1) for one in found])
        mean, low, high = np.array([claims.mean_interval(values) for values in curves.T]).T
        axis.plot(levels, curves.T, color=STYLES[network]["color"], lw=0.4, alpha=0.4)
        axis.plot(levels, mean, **STYLES[network])
        axis.fill_between(levels, low, high, color=STYLES[network]["color"], alpha=0.15, lw=0)
    axis.axhline(1, color=COLOURS["teacher"], lw=0.8)
    axis.set(xlabel="equal top progress")


def plot_matched(results, folder, name, title, temperature):
    """Rows: architectures or kernels. Columns: paths in the lowest bucket; ratios at T = 1, at --temperature, fresh."""
    figure, axes = claims.pyplot().subplots(len(results), 4, figsize=(9.5, 2.2 * len(results) + 1.1), squeeze=False)
    columns = {
        "T = 1": ("student", "smoothed"),
        f"T = {temperature:g}": ("student T", "smoothed T"),
        "fresh starts, T = 1": ("student fresh", "one-hot fresh"),
    }
    for line, (what, seeds) in zip(axes, results.items(), strict=True):
        top, *_, low = (f"directions {start + 1}–{end}" for start, end in seeds[0]["buckets"])
        plot_paths(line[0], seeds, 0, -2, ("teacher", "student", "smoothed"))
        line[0].set(xlabel=f"progress, {top}", ylabel=f"{NAMES.get(what, what)}\nprogress, {low}")
        for axis, networks in zip(line[1:], columns.values(), strict=True):
            plot_ratio(axis, seeds, networks)
        line[1].set(ylabel="ratio of lower progress")
    for axis, column in zip(axes[0], ("lowest bucket, T = 1", *columns), strict=True):
        axis.set(title=column)
    for network, style in STYLES.items():
        axes[0, 0].plot([], [], label=network.replace(" T", f", T = {temperature:g}"), **style)
    claims.legend_below(figure, axes[0, 0])
    figure.suptitle(f"{title}\nratio: progress in the lower buckets over the teacher's at equal top progress")
    claims.save_figure(figure, folder, name)


def plot_linear(results, folder):
    """Level 1: the theorem until the teacher stops at 3/λ1; risk against noise; the constructed examples."""
    figure, axes = claims.pyplot().subplots(2, 3, figsize=(9.5, 6.2))
    share, stop = np.linspace(0.001, 0.999, 300), flow_filter(1, 3)
    for k in (1, 7):
        teacher, student = equal_progress(POWER_LAW[0], POWER_LAW[k], 3 / POWER_LAW[0], share)
        axes[0, 0].plot(share * stop, teacher, **STYLES["teacher"])
        axes[0, 0].plot(share * stop, student, **STYLES["student"])
        axes[0, 0].text(stop, teacher[-1], f"λ{k + 1} = {POWER_LAW[k]:.2f} λ1   ", ha="right", va="center")
    axes[0, 0].set(xlabel="progress along λ1", ylabel="progress along λk", title="Theorem 4.1, least squares")
    plot_risks(axes[0, 1:], results)
    for axis, name in zip(axes[1], EXAMPLES, strict=True):
        seeds = [result["examples"][name] for result in results]
        plot_paths(axis, seeds, 0, 2, ("teacher", "student", "smoothed"), scale=100, first=1)
        axis.set(xlabel="progress along the top direction", title=f"example: {name}")
    axes[1, 0].set(ylabel="test accuracy (%)")
    axes[0, 1].plot([], [], **STYLES["smoothed"], label="smoothed")
    claims.legend_below(figure, axes[0, 1])
    claims.save_figure(figure, folder, "linear")


def plot_risks(axes, results):
    """Excess risk against the noise."""
    ticks = dict(top=(0.03, 0.1, 0.3, 1), low=(0.7, 1, 1.5, 2))
    best = {"best early stop": dict(color=COLOURS["other"]), "best student": dict(color=COLOURS["more"], ls="--")}
    for axis, signal in zip(axes, ("top", "low"), strict=True):
        for name in results[0]["exact"][signal]:
            risks, style = np.array([result["exact"][signal][name] for result in results]), {**STYLES, **best}[name]
            axis.plot(NOISES, risks.T, color=style["color"], lw=0.4, alpha=0.4)
            axis.plot(NOISES, risks.mean(0), **style, label=name)
        axis.set(xscale="log", yscale="log", xlabel="standard deviation of the noise")
        axis.set_title(f"risk, signal in {signal} directions")
        axis.set_xticks(NOISES, NOISES)
        axis.set_yticks(ticks[signal], ticks[signal])
        axis.minorticks_off()
    axes[0].set(ylabel="excess risk")


# ---------------------------------------------------------------- files, flags


def seeds_of(level, data, args, seeds):
    """{network, or the linear level itself: [(file, what its result depends on, function) of each seed]}."""
    if level == "linear":
        constants = [DIRECTIONS, POINTS, STEPS, RATE, list(NOISES)]
        parts = {level: (linear_seed, dict(examples=EXAMPLES, constants=constants))}
    else:
        settings = {flag: getattr(args, flag) for flag in ("width", "buckets", "batch_size", "temperature")}
        settings |= dict(networks={name: list(network) for name, network in NETWORKS.items()}, data=data.facts)
        settings["test_images"] = "drawn evenly over classes"
        compute, archs = (ntk_seed, [args.ntk_arch]) if level == "ntk" else (classifier_seed, args.archs)
        parts = {}
        for arch in archs:
            preset = NTK if level == "ntk" else CLASSIFIERS.get(arch, CLASSIFIERS["cnn"])
            recipe = dict(settings, lr=args.lr or preset["lr"], steps=args.steps or preset["steps"])
            parts[f"{level}-{arch}"] = functools.partial(compute, data, arch, recipe), recipe
    files = {}
    for name, (compute, settings) in parts.items():
        stem = f"{args.out}/seeds/{name.replace(':', '-')}"
        files[name] = [(Path(f"{stem}-s{seed}.json"), settings, functools.partial(compute, seed)) for seed in seeds]
    return files


def results_of(level, seeds):
    """{row of the figure: [result of each seed]}: networks, kernels, or the linear level itself; from `seeds_of`."""
    results = {}
    for name, of_seeds in seeds.items():
        results[name.removeprefix("classifiers-")] = found = [runs.kept_result(*one) for one in of_seeds]
    if level == "ntk":
        return {kernel: [result[kernel] for result in found] for kernel in ("init", "end")}
    return results


def load_images(args, levels):
    """{level: its Data}, checked against the flags: what cannot work is refused before anything is computed or lost."""
    images = dict.fromkeys(levels)  # None for linear, whose examples are made here
    if "ntk" in levels:
        flags = common.only_flags(args, common.add_data_flags, common.add_device_flag, subset=args.points)
        try:
            data = images["ntk"] = common.data_from(flags)
        except InputError as error:
            raise InputError(str(error).replace("--subset", "--points").replace(", or 0 for all", "")) from None
        parameters = sum(p.numel() for p in build_classifier(args.ntk_arch, data, args.width, 0).parameters())
        # One class's Jacobian in float32, twice while put together and a half more; four n×n matrices in float64.
        needed, free = 10 * args.points * parameters + 32 * args.points**2, common.free_memory(data.device)
        if needed > free:
            what = f"the empirical NTK of {args.points} points and {parameters:,} parameters needs {needed / 2**30:.1f}"
            raise InputError(f"{what} GiB, {free / 2**30:.1f} are free: lower --points or --width")
    if "classifiers" in levels:
        images["classifiers"] = common.data_from(args)
        for arch in args.archs:
            first_layer(build_classifier(arch, images["classifiers"], args.width, 0))
    return images


def draw(level, results, data, args):
    """Write the level's figure, and its JSON with the claims; returns these, and {network: verdict of `BELOW`}."""
    verdicts = {}
    if level == "linear":
        rows = linear_claims(results[level])
        plot_linear(results[level], args.out)
    else:
        name, rows = data.facts["name"], []
        for what, of_seeds in results.items():
            network = f"{f'{args.ntk_arch}, ' * (level == 'ntk')}{NAMES.get(what, what)}"
            first, *others = matched_claims(f"{name}, {network}", of_seeds, temperature=args.temperature)
            if what == "linear":
                control = [compare(seed["paths"], "smoothed")["ratio"]["smoothed"].mean() for seed in of_seeds]
                first["note"] += "; control: the smoothed network"
                first = claims.headline(first, "§4", claims.over_seeds(control))
            elif what != "end":  # whose kernel favours the teacher, see `ntk_seed`
                verdicts[network] = first["verdict"]
            rows += [first, *others]
        title = f"First-layer weights in the eigenspace of their input, {name}"
        if level == "ntk":
            title = f"Logits of {args.ntk_arch} in the eigenspace of its empirical NTK, {name}, {args.points} points"
        seeds = f"{len(args.seeds)} seed{'s' * (len(args.seeds) > 1)}"
        plot_matched(results, args.out, level, f"{title}, {seeds}", args.temperature)
    kept = dict(data=data and data.facts, seeds=args.seeds, claims=rows, results=results)
    runs.write_json(Path(args.out) / f"{level}.json", kept)
    return rows, verdicts


def main(argv=None):
    parser = runs.Parser(__doc__)
    common.add_data_flags(parser)
    add = parser.add_argument_group("the three levels").add_argument
    add("--level", choices=(*LEVELS, "all"), default="all", help="what to measure and to list in claims.md")
    archs = f"classifiers: linear, {', '.join(common.ARCHS)} or torchvision:<name>"
    add("--archs", nargs="+", default=list(CLASSIFIERS), help=archs)
    add("--ntk-arch", default="resnet8", help="ntk: the network")
    add("--points", type=number(int, 20), default=500, help="ntk: training images, class-balanced")
    add("--width", type=number(float, 0, 64, open_low=True), default=0.5, help="multiplies the models' channels")
    add("--buckets", type=number(int, 2, 100), default=4, help="eigen-buckets")
    add("--steps", type=number(int, 2), help="steps of the teacher (default: by architecture)")
    add("--lr", type=number(float, 0, 1e30, open_low=True), help="classifiers: times 1/λ1 (default: by architecture)")
    add("--batch-size", type=number(int, 0), default=250, help="images per step, 0 for all")
    add("--temperature", type=number(float, 0, 1e6, open_low=True), default=4.0, help="of the networks not at T = 1")
    add("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2, 3, 4], help="what the intervals are over")
    add("--out", default="results/eigenspace", help="folder; finished seeds in it are not repeated")
    add("--overwrite", action="store_true", help="repeat finished seeds")
    common.add_process_flags(parser)
    common.add_device_flag(parser)
    args = parser.parse_args(argv)
    runs.check_seeds(args.seeds)
    args.device = engine.use_device(args.device)
    images = load_images(args, LEVELS if args.level == "all" else [args.level])
    seeds = engine.shard_of(args)
    parts = {level: seeds_of(level, data, args, seeds) for level, data in images.items()}
    Path(args.out).mkdir(parents=True, exist_ok=True)
    if args.overwrite:  # once: interrupted, the command without it then goes on
        for of_level in parts.values():
            for file, *_ in itertools.chain(*of_level.values()):
                file.unlink(missing_ok=True)

    engine.run_jobs(args)
    results = {level: results_of(level, of_level) for level, of_level in parts.items()}
    if args.shard[1] > 1:
        return  # a figure needs all seeds: without --shard the command finds what its shards have kept
    rows, verdicts = [], {}
    for level, data in images.items():
        of_level, of_networks = draw(level, results[level], data, args)
        rows, verdicts = rows + of_level, verdicts | of_networks
    if verdicts:
        rows.append(claims.headline(claims.joint_claim(f"all networks: {BELOW}", verdicts), "§4"))
    claims.save_claims(args.out, rows)


if __name__ == "__main__":
    runs.cli(main)
