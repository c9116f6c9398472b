"""Section 4: does distillation exaggerate gradient descent's bias towards the top eigendirections? (Theorem 4.1)

    python eigenspace.py                                            # all three levels, digits, 5 seeds
    python eigenspace.py --level ntk --points 1000 --width 1
    python eigenspace.py --data cifar10 --subset 1000 --seeds 0 1 2 --jobs 3 --out results/eigenspace-cifar10

The claim: at equal progress along a top direction the self-distilled student has progressed less along a lower one than
its teacher. Levels: least squares, where that is the theorem; classifiers, in the eigenspace of the first layer's
input; a ResNet's logits, in that of its empirical NTK. Writes linear, classifiers, ntk as .png/.pdf/.json, claims.json,
claims.md, and seeds/*.json, which a second run reuses.

Departures from the paper: plain SGD (no momentum, weight decay or augmentation), so that paths are smooth; images are
centred on the mean training image; models are half as wide; test accuracies are of the first 1,000 test images; and
intervals are over seeds (initialisation, order; linear: targets, noise, examples) at one draw of the label noise.
"""

import functools
import math
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import analyze_deviation
import claims
import common
import engine
import runs
from runs import InputError, number

LEVELS = ("linear", "classifiers", "ntk")

# ---------------------------------------------------------------- linear theory


def flow_filter(eigenvalues, t):
    """A(t) = 1 − exp(−tλ): share of β* fitted by gradient flow from zero after time t. Arrays broadcast."""
    return -np.expm1(-np.multiply(t, eigenvalues))


def gd_filter(eigenvalues, steps, lr):
    """1 − (1 − ηλ)^k: the same after `steps` steps of gradient descent. ValueError unless 0 <= ηλ < 2 (it diverges)."""
    rate = np.multiply(lr, eigenvalues)
    if np.any(rate >= 2) or np.any(rate < 0):
        reached = f"lr·eigenvalue reaches {np.max(rate):.3g} (least {np.min(rate):.3g})"
        raise ValueError(f"{reached}: gradient descent needs it within [0, 2)")
    small = -np.expm1(steps * np.log1p(-np.minimum(rate, 0.5)))  # exact also where (1 − rate) rounds
    return np.where(rate <= 0.5, small, 1 - (1 - rate) ** steps)


def equal_progress(top, low, teacher_time, share):
    """Theorem 4.1: teacher and student where both have progressed equally along the eigenvalue `top`.

    The teacher stops at `teacher_time` T; the student, trained on its predictions, has covered `share` in (0, 1) of
    what can be had along `top`: both stand at share·A_top(T), the student at time s with A_top(s) = share, the teacher
    at t <= T. Returns (A_low(t), A_low(s)·A_low(T)), teacher and student along `low`. The theorem: for 0 < low < top
    and finite T the second is strictly smaller. Proof: with q = low/top, A_low = g(A_top), g(a) = 1 − (1−a)^q, and
    g(a)·g(b) < g(a·b) on (0, 1), as a·g'(a)/g(a) increases in a for q < 1. For gradient descent the same holds with the
    eigenvalues −log(1 − ηλ)/η, as long as ηλ < 1; beyond that steps overshoot, and it can fail.
    """
    s = -np.log1p(-np.asarray(share)) / top
    t = -np.log1p(-share * flow_filter(top, teacher_time)) / top
    return flow_filter(low, t), flow_filter(low, s) * flow_filter(low, teacher_time)


def theorem(eigenvalues):
    """Theorem 4.1 for all pairs, 5 teacher times and 9 shares: (cases, violations, largest ratio student/teacher)."""
    high, low = (eigenvalues[k] for k in np.triu_indices(len(eigenvalues), 1))
    distinct = high > low * (1 + 1e-6)
    high, low = high[distinct][:, None, None], low[distinct][:, None, None]
    times = np.array([0.1, 0.5, 1, 3, 10])[:, None] / high
    teacher, student = equal_progress(high, low, times, np.linspace(0.1, 0.9, 9))
    return int(teacher.size), int((student >= teacher).sum()), float((student / teacher).max())


def gd_solution(x, y, lr, steps):
    """β [d, K] after `steps` of gradient descent on ‖xβ − y‖²/(2n) from zero, in closed form; x [n, d], y [n, K]."""
    eigenvalues, vectors = np.linalg.eigh(x.T @ x / len(x))
    eigenvalues = np.maximum(eigenvalues, 0)
    divided = gd_filter(eigenvalues, steps, lr) / np.maximum(eigenvalues, 1e-300)
    divided = np.where(eigenvalues > 1e-300, divided, lr * steps)  # its limit for λ → 0
    return vectors @ (divided[:, None] * (vectors.T @ (x.T @ y) / len(x)))


def gd_simulation(x, y, lr, steps):
    """The same by the plain loop."""
    beta = np.zeros((x.shape[1], y.shape[1]))
    for _ in range(steps):
        beta -= lr * (x.T @ (x @ beta - y)) / len(x)
    return beta


def excess_risk(shares, eigenvalues, beta, noise, n):
    """(bias², variance) of the estimator that keeps the shares f [..., d]: Σ λ(1−f)²β*² and σ²/n·Σ f².

    Fixed design with XᵀX/n = diag(eigenvalues), y = Xβ* + ε, ε of standard deviation `noise`; risk E‖X(β̂−β*)‖²/n.
    """
    return (eigenvalues * (1 - shares) ** 2 * beta**2).sum(-1), noise**2 / n * (shares**2).sum(-1)


def fixed_design(rng, n, eigenvalues):
    """x [n, d] with xᵀx/n = diag(eigenvalues) exactly, otherwise random."""
    return np.linalg.qr(rng.standard_normal((n, len(eigenvalues))))[0] * np.sqrt(n * eigenvalues)


# The bias-variance example: 30 directions λ_k = k^-1.5, 100 points. β* is random; its energy λβ*² falls (top) or rises
# (low) along the directions as 1/k², its sum is 1.
DIRECTIONS, POINTS, STEPS, RATE = 30, 100, 60, 0.5
POWER_LAW = np.arange(1, DIRECTIONS + 1) ** -1.5
NOISES = (0.25, 0.5, 1.0, 2.0, 4.0)


def bias_variance(seed, draws=400):
    """Risk of five estimators for NOISES, with the signal in top or in low directions: dict(exact, simulated).

    exact: {signal: {estimator: [[bias², variance] per noise]}}, by the formulas, a "best" one at its own best time or
    penalty. simulated: {signal: {teacher, student: [risk per noise]}}, means over `draws` of the noise, by the loop.
    """
    rng = np.random.default_rng([4, seed])
    times = np.geomspace(0.1, 1e5, 1200)[:, None]
    teacher = gd_filter(POWER_LAW, STEPS, RATE)[None]
    families = {  # shares [times, d]
        "teacher": teacher,
        "student": teacher**2,  # trained as long as the teacher
        "best early stop": gd_filter(POWER_LAW, np.minimum(times, STEPS), RATE),
        "best student": gd_filter(POWER_LAW, times, RATE) * teacher,
        "best ridge": POWER_LAW / (POWER_LAW + 1 / times),
    }
    x = fixed_design(rng, POINTS, POWER_LAW)
    exact, simulated = {}, {}
    for signal, order in (("top", slice(None)), ("low", slice(None, None, -1))):
        energy = (rng.standard_normal(DIRECTIONS) / np.arange(1, DIRECTIONS + 1))[order] ** 2
        beta = rng.choice([-1, 1], DIRECTIONS) * np.sqrt(energy / energy.sum() / POWER_LAW)
        exact[signal], simulated[signal] = {name: [] for name in families}, {"teacher": [], "student": []}
        for noise in NOISES:
            for name, shares in families.items():
                parts = np.stack(excess_risk(shares, POWER_LAW, beta, noise, POINTS), axis=1)
                exact[signal][name].append(parts[parts.sum(1).argmin()].tolist())
            y = (x @ beta)[:, None] + noise * rng.standard_normal((POINTS, draws))
            fitted = gd_simulation(x, y, RATE, STEPS)
            for name, estimate in (("teacher", fitted), ("student", gd_simulation(x, x @ fitted, RATE, STEPS))):
                simulated[signal][name].append(float(((x @ (estimate - beta[:, None])) ** 2).mean(0).mean()))
    return dict(exact=exact, simulated=simulated)


# The constructed examples, two classes each: points, low directions and their variance (that of the top direction is
# 1), distance of the class means from 0 along the top direction and along all low ones (in their standard deviations),
# share of wrong training labels. In the first the teacher fits wrong labels through the noise of low directions: its
# least confident points are those, and a student that progresses less there falls below it. In the second there are too
# few low directions to fit them all. In the third the low directions tell more than the top one.
EXAMPLES = {
    "noise in low directions": dict(n=200, low=400, variance=0.1, top=1.5, signal=0.0, wrong=0.2),
    "noise in few low directions": dict(n=200, low=60, variance=0.1, top=1.5, signal=0.0, wrong=0.2),
    "signal in low directions": dict(n=200, low=60, variance=0.01, top=0.4, signal=2.0, wrong=0.0),
}


def example(name, seed, temperature, steps=100):
    """One of EXAMPLES, logistic regression from zero: what the same bias does to confidence (§3) and to accuracy.

    Returns paths [S, 3] of teacher and student (progress along the top direction and along the others, test accuracy),
    ratio (the student's lower progress over the teacher's at equal top progress), accuracy of teacher, student and the
    one-hot network `stopped` at the student's top progress, and `analyze_deviation` statistics of the training points.
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
    recipe = dict(lr=1 / float(eigenvalues[0]), steps=steps, batch=0, temperature=temperature)
    observe = functools.partial(weight_and_accuracy, *test)
    models, seen = self_distil(build, x, labels, seed, observe, **recipe, networks=("teacher", "student"))
    paths = weight_progress(seen, vectors, [(0, 1), (1, 1 + low)])

    logits = [evaluate(models[network], x).numpy() for network in ("teacher", "student")]
    phi = [analyze_deviation.phi_of_class(values, logits[0].argmax(1)) for values in logits]
    statistics = analyze_deviation.deviation_statistics(analyze_deviation.deviation_columns(*phi).sum(0, keepdims=True))
    level = [min(paths["student"][:, 0].max(), 1.0)]
    stopped, reached = at_top(paths["teacher"], level)[0], at_top(paths["student"], level)[0]
    accuracy = {network: float(path[-1, 2]) for network, path in paths.items()}
    return dict(
        paths={network: path.tolist() for network, path in paths.items()},
        phi=[values.tolist() for values in phi],
        ratio=float(reached[1] / stopped[1]),
        slope=float(statistics["slope"][0]),
        low_gap=float(statistics["low_gap"][0]),
        train_accuracy=accuracy_of(models["teacher"], x, labels),
        accuracy=accuracy | dict(stopped=float(stopped[2])),
    )


def linear_level(data, args, seeds):
    """Level 1, least squares from zero: one dictionary per seed.

    Teacher filter A(t) = I − exp(−tΣ) (discrete: I − (I − ηΣ)^k), student A(s)·A(T)·β*, where T is the time at which
    the teacher stopped. gd_error: gradient descent on the data against this closed form. Then bias and variance, and
    the constructed examples, tied to §3, where the same bias helps or hurts.
    """

    @functools.cache
    def problem():  # the same for all seeds; not computed when every seed is finished
        x = data.normalise(data.x_train[:2000]).flatten(1).double().cpu().numpy()
        x = (x - x.mean(0))[:, x.std(0) > 1e-6]
        if x.shape[1] > 300:  # keep the loop quick on large images: their leading 300 principal components
            x = x @ np.linalg.eigh(x.T @ x)[1][:, -300:]
        return x, np.sort(np.linalg.eigvalsh(x.T @ x / len(x)))[::-1]

    y = F.one_hot(data.y_train[:2000], data.classes).double().cpu().numpy()

    def one(seed):
        x, eigenvalues = problem()
        targets = y * np.random.default_rng([3, seed]).random(len(x))[:, None]  # others for every seed
        lr, steps = 0.9 / eigenvalues[0], 200
        teacher, closed = gd_simulation(x, targets, lr, steps), gd_solution(x, targets, lr, steps)
        student, closed_student = gd_simulation(x, x @ teacher, lr, steps), gd_solution(x, x @ closed, lr, steps)
        return dict(
            gd_error=float(max(np.abs(teacher - closed).max(), np.abs(student - closed_student).max())),
            spectrum=eigenvalues[eigenvalues > 1e-9 * eigenvalues[0]][:100].tolist(),
            **bias_variance(seed),
            examples={name: example(name, seed, args.temperature) for name in EXAMPLES},
        )

    return over_seeds(args, seeds, "linear", data, one, temperature=args.temperature)


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
    """Progress per bucket and test accuracy, {network: [S, buckets + 1]}, from {network: [(weight, accuracy), ...]}.

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
    return {network: path / whole for network, path in paths.items()}


def at_top(path, levels):
    """`path` [S, K] interpolated where its column 0 first reaches each level: [L, K], NaN where it never does."""
    rows = []
    for level in levels:
        reached = np.flatnonzero(path[:, 0] >= level)
        if not len(reached):
            rows.append(np.full(path.shape[1], np.nan))
        elif reached[0] == 0:
            rows.append(path[0])
        else:
            before, after = path[reached[0] - 1], path[reached[0]]
            rows.append(before + (level - before[0]) / (after[0] - before[0]) * (after - before))
    return np.stack(rows)


def compare(paths, buckets, count=20):
    """Lower over top progress: progress in the lower buckets over the teacher's, at equal progress in the top one.

    paths: {network: [S, buckets + 1]}, progress per bucket and test accuracy. Lower progress is averaged over `count`
    evenly spaced levels of the top bucket that all networks reach (each at its first crossing), and divided by the
    teacher's average. Below 1: exaggeration. The teacher's own path *is* early stopping (1 by construction), so a
    same-initialisation student below 1 does what early stopping does not. Returns the arguments as lists, levels [L],
    curves {network: [L, buckets − 1]} of the ratio at each level, ratio {network: [buckets − 1]} of the averages, mean
    {network: its mean over the lower buckets}, accuracy {network: at the last level}.
    """
    lowest, highest = max(path[0, 0] for path in paths.values()), min(path[:, 0].max() for path in paths.values())
    levels = np.linspace(lowest, highest, count + 1)[1:] if highest > lowest else np.full(count, np.nan)
    found = dict(buckets=buckets, levels=levels.tolist(), curves={}, ratio={}, mean={}, accuracy={}, paths={})
    teacher = at_top(paths["teacher"], levels)[:, 1:-1]
    for name, path in paths.items():
        matched = at_top(path, levels)
        with np.errstate(divide="ignore", invalid="ignore"):
            ratio = matched[:, 1:-1].mean(0) / teacher.mean(0)
            found["curves"][name] = (matched[:, 1:-1] / teacher).tolist()
        found["ratio"][name], found["mean"][name] = ratio.tolist(), float(ratio.mean())
        found["accuracy"][name], found["paths"][name] = float(matched[-1, -1]), path.tolist()
    return found


# ---------------------------------------------------------------- training

# name: (distilled, fresh initialisation and order, how many times smaller the steps are). Students have the teacher's
# initialisation and order, or fresh ones. The control is a one-hot network with half the learning rate and twice the
# steps: what it shows comes of the step size, or of another initialisation, and not of distillation.
NETWORKS = {
    "teacher": (False, False, 1),
    "student": (True, False, 1),
    "student fresh": (True, True, 1),
    "control": (False, False, 2),
    "control fresh": (False, True, 2),
}


def observed_steps(steps):
    """About 40 log-spaced numbers of steps, from 0 to `steps`."""
    return np.unique(np.round(np.geomspace(1, steps, 40)).astype(int).tolist() + [0]).tolist()


def descend(model, inputs, loss_of, lr, steps, batch, order_key, observe):
    """Plain SGD on `model`; returns [observe(model)] after each of `observed_steps(steps)`.

    loss_of(logits, index) -> scalar; batch 0 takes all points each step; order_key seeds the order. InputError when the
    weights stop being finite.
    """
    n = len(inputs)
    batch = min(batch or n, n)
    per_epoch, parameters, seen = n // batch, list(model.parameters()), [observe(model)]
    observed = observed_steps(steps)
    for step in range(steps):
        if step % per_epoch == 0:
            stream = common.generator("eigenspace order", order_key, step // per_epoch)
            order = torch.randperm(n, generator=stream).to(inputs.device)
        index = order[step % per_epoch * batch :][:batch]
        loss = loss_of(model(inputs[index]), index)
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


def accuracy_of(model, inputs, labels):
    """Share of points whose top class is the label."""
    return (evaluate(model, inputs).argmax(1) == labels).double().mean().item()


def weight_and_accuracy(inputs, labels, model):
    """What `descend` observes for `weight_progress`: the first layer's weight, and the accuracy on these points."""
    return first_layer(model).weight.detach().clone(), accuracy_of(model, inputs, labels)


def self_distil(build, inputs, labels, seed, observe, lr, steps, batch, temperature, networks=NETWORKS):
    """Train a teacher on `labels` [N], and students on its logits; returns ({network: model}, {network: observations}).

    build(key) -> model; observe(model) as in `descend`. See NETWORKS; students and controls that start afresh share
    initialisation and order, so that they are paired.
    """
    models, seen, teacher_logits = {}, {}, None

    def one_hot(logits, index):
        return F.cross_entropy(logits, labels[index])

    def distillation(logits, index):
        return common.kd_loss(logits, teacher_logits[index], temperature)

    for name in networks:
        distilled, fresh, slower = NETWORKS[name]
        loss_of = distillation if distilled else one_hot
        key = ("fresh" if fresh else "teacher", seed)
        model = models[name] = build(key)
        seen[name] = descend(model, inputs, loss_of, lr / slower, steps * slower, batch, key, observe)
        if name == "teacher":
            teacher_logits = evaluate(model, inputs)
    return models, seen


# ---------------------------------------------------------------- trained classifiers

# Learning rate in units of 1/λ1, the largest eigenvalue of the first layer's input, and steps of 250 images: smooth
# paths, and a digits teacher that has begun to fit the wrong labels.
CLASSIFIERS = {"linear": dict(lr=1.0, steps=400), "mlp": dict(lr=1.0, steps=800), "cnn": dict(lr=0.3, steps=400)}


def recipe_of(args, preset):
    """All flags that levels 2 and 3 depend on, lr and steps from the preset unless given."""
    flags = {flag: getattr(args, flag) for flag in ("width", "buckets", "batch_size", "temperature")}
    return dict(flags, lr=args.lr or preset["lr"], steps=args.steps or preset["steps"])


def centred_images(data):
    """Training images and up to 1,000 test images [N, C, H, W], less the mean training image, and the test labels."""
    images, test = data.normalise(data.x_train), data.normalise(data.x_test[:1000])
    return images - images.mean(0), test - images.mean(0), data.y_test[: len(test)]


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


def classifiers_level(data, args, seeds):
    """Level 2, cross-entropy in the eigenspace of the first layer's input: {arch: [`compare` per seed]}.

    The first layer's inputs (CNN: its patches) give the covariance XᵀX/n and its eigenvectors, grouped into buckets.
    """
    images, test, test_labels = centred_images(data)
    observe = functools.partial(weight_and_accuracy, test, test_labels)

    @functools.cache
    def eigenspace(arch):  # the same for all seeds; not computed when every seed is finished
        layer = first_layer(build_classifier(arch, data, args.width, 0))
        eigenvalues, vectors = second_moment_eigenvectors(first_layer_inputs(layer, images))
        directions = int((eigenvalues > 1e-6 * eigenvalues[0]).sum())  # the others have no data
        return float(eigenvalues[0]), vectors, bucket_ends(directions, args.buckets)

    def one(arch, recipe, seed):
        largest, vectors, buckets = eigenspace(arch)
        lr, steps = recipe["lr"] / largest, recipe["steps"]
        build = functools.partial(build_classifier, arch, data, args.width)
        training = (lr, steps, args.batch_size, args.temperature)
        models, seen = self_distil(build, images, data.y_train, seed, observe, *training)
        paths = weight_progress(seen, vectors, buckets)
        train_accuracy = accuracy_of(models["teacher"], images, data.y_train)
        return dict(compare(paths, buckets), steps=steps, train_accuracy=train_accuracy)

    results = {}
    for arch in args.archs:
        recipe = recipe_of(args, CLASSIFIERS.get(arch, CLASSIFIERS["cnn"]))
        compute = functools.partial(one, arch, recipe)
        results[arch] = over_seeds(args, seeds, f"classifiers-{arch}", data, compute, **recipe)
    return results


# ---------------------------------------------------------------- function space

NTK = dict(lr=0.1, steps=150)


def ntk_bytes(points, parameters):
    """Bytes that `empirical_ntk` needs: one class's Jacobian in float32, twice while put together and a quarter more
    (measured), four n×n matrices in float64, and 256 MiB for the activations of a chunk."""
    return 10 * points * parameters + 32 * points**2 + 2**28


def empirical_ntk(model, inputs, classes, chunk=50):
    """Class-averaged empirical NTK [n, n], float64: 1/C Σ_c ∇f_c(x)·∇f_c(x') over all parameters, BN in eval mode.

    The full kernel of n·C rows is about this one ⊗ I_C (exactly at infinite width, Jacot et al. 2018), and C² as large.
    """
    training = model.training
    model.eval()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    buffers = dict(model.named_buffers())

    def logit(parameters, image, c):
        return torch.func.functional_call(model, (parameters, buffers), (image[None],))[0, c]

    gradients = torch.func.vmap(torch.func.grad(logit), (None, 0, None), chunk_size=chunk)
    kernel = torch.zeros(len(inputs), len(inputs), dtype=torch.float64, device=inputs.device)
    for c in range(classes):
        for part in gradients(parameters, inputs, c).values():
            kernel += part.flatten(1) @ part.flatten(1).T
    model.train(training)
    return kernel / classes


def calibrate(model, inputs):
    """The model with BN running statistics of `inputs`, so that eval mode means something before any training step."""
    torch.optim.swa_utils.update_bn([inputs], model)
    return model


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


def ntk_level(data, args, seeds):
    """Level 3, function space of a ResNet: {kernel: [`compare` per seed]}. The kernel's points are those trained on.

    Eigenvectors of the centred empirical NTK of the teacher at initialisation (kernel init) or at its end, the same for
    all networks. That of the end favours the teacher over any fresh network: there only the difference from the fresh
    control says something.
    """
    images, test, test_labels = centred_images(data)
    recipe = recipe_of(args, NTK)
    training = (recipe["lr"], recipe["steps"], args.batch_size, args.temperature)

    def build(key):
        return calibrate(build_classifier(args.ntk_arch, data, args.width, key), images)

    def observe(model):
        return centre(evaluate(model, images)), accuracy_of(model, test, test_labels)

    def one(seed):
        models, seen = self_distil(build, images, data.y_train, seed, observe, *training)
        target, found = seen["teacher"][-1][0], {}
        train_accuracy = accuracy_of(models["teacher"], images, data.y_train)
        buckets = bucket_ends(len(images) - 1, args.buckets)  # centring makes the last eigenvalue 0
        for kernel, model in (("init", build(("teacher", seed))), ("end", models["teacher"])):
            gram = empirical_ntk(model, images, data.classes)
            gram = gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean()
            vectors = torch.linalg.eigh(gram)[1].flip(1)
            paths = {}
            for name, path in seen.items():
                rows = [[*share_fitted(logits, target, vectors, buckets), accuracy] for logits, accuracy in path]
                paths[name] = np.array(rows)
            found[kernel] = dict(compare(paths, buckets), steps=recipe["steps"], train_accuracy=train_accuracy)
        return found

    results = over_seeds(args, seeds, f"ntk-{args.ntk_arch}", data, one, **recipe)
    return {kernel: [result[kernel] for result in results] for kernel in ("init", "end")}


# ---------------------------------------------------------------- claims


def claim_over_seeds(text, expected, values, note=""):
    """The claim that the mean of `values`, one for each seed, is as expected: "< threshold" or "> threshold"."""
    sign, threshold = expected.split()
    return claims.claim(text, expected, *claims.mean_interval(values), float(threshold), sign == ">", note)


def linear_claims(results, spectra):
    """Claims of level 1; spectra: {name: eigenvalues}, for which the theorem is checked."""
    rows = []
    for name, eigenvalues in spectra.items():
        cases, violations, ratio = theorem(eigenvalues)
        text = f"linear, {name}: pairs and times that contradict Theorem 4.1"
        note = f"of {cases}; largest ratio student/teacher {ratio:.6f}"
        rows.append(claims.claim(text, "0", *[violations] * 3, 0.5, above=False, note=note))
    text = "linear: −log10 of the largest difference of a weight, simulation against closed form"
    digits = -math.log10(max(1e-17, *(result["gd_error"] for result in results)))
    rows.append(claims.claim(text, "> 9", *[digits] * 3, 9))

    def risk(result, signal, name):
        return np.sum(result["exact"][signal][name], axis=1)

    def log_ratio(signal, first, second, noise):
        k = NOISES.index(noise)
        return [math.log(risk(r, signal, first)[k] / risk(r, signal, second)[k]) for r in results]

    def largest_error(result):
        pairs = [(signal, name) for signal in ("top", "low") for name in ("teacher", "student")]
        return max(np.abs(result["simulated"][s][name] / risk(result, s, name) - 1).max() for s, name in pairs)

    text = "linear: largest relative error of the bias-variance formulas against simulation"
    rows.append(claim_over_seeds(text, "< 0.1", [largest_error(result) for result in results], "400 draws"))
    for signal, noise, expected in (("top", 4.0, "< 0"), ("low", 0.25, "> 0")):
        text = f"linear: log risk, student minus teacher, signal in {signal} directions, noise {noise:g}"
        rows.append(claim_over_seeds(text, expected, log_ratio(signal, "student", "teacher", noise)))
    for noise in (1.0, 4.0):
        text = f"linear: log risk, best student minus best early stop, signal in top directions, noise {noise:g}"
        values = log_ratio("top", "best student", "best early stop", noise)
        rows.append(claim_over_seeds(text, "< 0", values, "each at its own best time"))
    for name in EXAMPLES:
        rows += example_claims(name, [result["examples"][name] for result in results])
    return rows


def example_claims(name, seeds):
    """Claims of one of EXAMPLES, from its result for each seed."""
    helps = "> 0" if EXAMPLES[name]["wrong"] else "< 0"  # does the bias, on test points?
    found = {key: [seed[key] for seed in seeds] for key in ("ratio", "low_gap", "slope", "train_accuracy")}
    fits = f"teacher fits {100 * np.mean(found['train_accuracy']):.1f}% of the training labels"
    table = [
        ("lower over top progress, student against teacher", "< 1", found["ratio"], ""),
        ("mean Y − X of the teacher's least confident quarter", "< 0", found["low_gap"], fits),
        ("slope of φ(student) on φ(teacher)", "> 1", found["slope"], ""),
    ]
    for other, whom in (("teacher", "teacher"), ("stopped", "one-hot stopped at its top progress")):
        gain = [seed["accuracy"]["student"] - seed["accuracy"][other] for seed in seeds]
        table.append((f"test accuracy, student minus {whom}", helps, gain, ""))
    return [claim_over_seeds(f"example, {name}: {text}", *row) for text, *row in table]


def matched_claims(prefix, seeds):
    """Claims of levels 2 and 3 for one architecture or kernel, from its result (see `compare`) for each seed."""
    mean = {name: np.array([seed["mean"][name] for seed in seeds]) for name in NETWORKS}
    final = {name: np.array([seed["paths"][name][-1][-1] for seed in seeds]) for name in NETWORKS}
    lowest = [seed["ratio"]["student"][-1] for seed in seeds]
    gain = [seed["accuracy"]["student"] - seed["accuracy"]["teacher"] for seed in seeds]
    less, less_fresh = mean["student"] - mean["control"], mean["student fresh"] - mean["control fresh"]
    matched = f"top-bucket progress matched up to {np.mean([seed['levels'][-1] for seed in seeds]):.2f}"
    control = f"control against teacher {np.mean(mean['control fresh']):.3f}"
    fits = f"on training labels {100 * np.mean([seed['train_accuracy'] for seed in seeds]):.1f}%"
    teacher = f"teacher {100 * final['teacher'].mean():.1f}%, {fits}"
    same = "same initialisation"
    table = (
        (f"lower over top progress, student against teacher, {same}", "< 1", mean["student"], matched),
        ("the same, fresh initialisation", "< 1", mean["student fresh"], ""),
        (f"student minus one-hot control at half the learning rate, {same}", "< 0", less, ""),
        ("student minus one-hot control, both the same fresh initialisation", "< 0", less_fresh, control),
        (f"lowest bucket alone, student against teacher, {same}", "< 1", lowest, ""),
        ("test accuracy, student minus one-hot stopped at the same top-bucket progress", "> 0", gain, same),
        ("test accuracy, student minus teacher, both at the end", "> 0", final["student"] - final["teacher"], teacher),
    )
    return [claim_over_seeds(f"{prefix}: {text}", *row) for text, *row in table]


# ---------------------------------------------------------------- figures

COLOURS = dict(zip(NETWORKS, ("black", "crimson", "darkorange", "steelblue", "teal"), strict=True))


def plot_matched(results, folder, name, title, ylabel):
    """Rows: architectures or kernels. Columns: progress over training, (top, lower) planes of all seeds, ratio."""
    columns = max(len(seeds[0]["buckets"]) for seeds in results.values()) + 1
    size = (3.2 * columns, 3 * len(results))
    figure, axes = claims.pyplot().subplots(len(results), columns, figsize=size, squeeze=False, layout="constrained")
    styles = {network: dict(color=COLOURS[network], ls="--" if "control" in network else "-") for network in NETWORKS}
    for line, (what, seeds) in zip(axes, results.items(), strict=True):
        names = [f"directions {start + 1}–{end}" for start, end in seeds[0]["buckets"]]
        paths = {network: np.array([seed["paths"][network] for seed in seeds]) for network in NETWORKS}  # [seeds, S, K]
        steps = observed_steps(seeds[0]["steps"])
        for b, label in enumerate(names):
            line[0].plot(steps, paths["teacher"].mean(0)[:, b], color=f"C{b}", label=label)
            line[0].plot(steps, paths["student"].mean(0)[:, b], color=f"C{b}", ls="--")
        line[0].set(xscale="symlog", xlabel="step", ylabel=ylabel)
        line[0].set_title(f"{what}: teacher (line), student (dashed)", fontsize=9)
        for b, axis in enumerate(line[1 : len(names)], start=1):
            for network, values in paths.items():
                drawn = axis.plot(values[:, :, 0].T, values[:, :, b].T, **styles[network], lw=0.8, alpha=0.8)
                drawn[0].set_label(network)
            axis.set(xlabel=names[0], ylabel=names[b])
        for axis in line[len(names) : -1]:  # another row has more buckets
            axis.set_axis_off()
        levels = np.mean([seed["levels"] for seed in seeds], axis=0)
        for network in list(NETWORKS)[1:]:
            curves = np.array([np.mean(seed["curves"][network], axis=1) for seed in seeds])
            mean, low, high = np.array([claims.mean_interval(values) for values in curves.T]).T
            line[-1].plot(levels, mean, **styles[network])
            if len(seeds) > 1:
                line[-1].fill_between(levels, low, high, color=COLOURS[network], alpha=0.2, lw=0)
        line[-1].axhline(1, color="black", lw=0.8)
        line[-1].set(xlabel="matched top-bucket progress", ylabel="lower-bucket progress\nover the teacher's")
        for axis in line[:2]:
            axis.legend(fontsize=6)
    figure.suptitle(title)
    claims.save_figure(figure, folder, name)


def plot_linear(results, spectra, folder):
    """Level 1. Rows: the theorem and filters; risk against noise; two of the constructed examples."""
    figure, axes = claims.pyplot().subplots(3, 3, figsize=(13, 11), layout="constrained")
    plot_theorem(axes[0], spectra)
    plot_risks(axes[1], results)
    plot_examples(axes[2], results)
    for axis in axes.flat:
        axis.legend(fontsize=7)
    claims.save_figure(figure, folder, "linear")


def plot_theorem(axes, spectra):
    share = np.linspace(0.001, 0.999, 300)
    for axis, (name, values) in zip(axes[:2], spectra.items(), strict=True):
        for colour, k in enumerate((1, len(values) // 4, len(values) // 2)):
            teacher, student = equal_progress(values[0], values[k], 3 / values[0], share)
            label = f"λ{k + 1}/λ1 = {values[k] / values[0]:.3f}"
            axis.plot(share * flow_filter(1, 3), teacher, color=f"C{colour}", label=label)
            axis.plot(share * flow_filter(1, 3), student, color=f"C{colour}", ls="--")
        axis.set(xlabel="progress along λ1", ylabel="progress along the lower eigenvalue")
        axis.set_title(f"{name}: teacher (line), student (dashed)")
    teacher = gd_filter(POWER_LAW, STEPS, RATE)
    stop = np.log1p(-(teacher[4] ** 2)) / np.log1p(-RATE * POWER_LAW[4])  # at the student's progress along λ5
    ridge = POWER_LAW / (POWER_LAW + POWER_LAW[4] * (1 / teacher[4] ** 2 - 1))
    axes[2].plot(POWER_LAW, teacher, color="black", label="teacher")
    axes[2].plot(POWER_LAW, teacher**2, color="crimson", label="student")
    label = "one-hot stopped at the student's progress along λ5"
    axes[2].plot(POWER_LAW, gd_filter(POWER_LAW, stop, RATE), color="C0", label=label)
    axes[2].plot(POWER_LAW, ridge, color="C2", label="ridge at the same")
    axes[2].set(xscale="log", xlabel="eigenvalue", ylabel="share of β* kept")
    axes[2].set_title(f"power law: filters after {STEPS} steps")


def plot_risks(axes, results):
    networks = {network: COLOURS[network] for network in ("teacher", "student")}
    estimators = {"best early stop": "C0", "best student": "darkorange", "best ridge": "C2"}

    def average(part, signal, name):
        return np.mean([result[part][signal][name] for result in results], axis=0)

    for axis, signal in zip(axes[:2], ("top", "low"), strict=True):
        for name, colour in (networks | estimators).items():
            axis.plot(NOISES, average("exact", signal, name).sum(1), color=colour, label=name)
        for name, colour in networks.items():
            axis.plot(NOISES, average("simulated", signal, name), "o", color=colour, label=f"{name}, simulated")
        axis.set(ylabel="excess risk", title=f"signal in {signal} directions")
    for name, colour in networks.items():
        bias, variance = average("exact", "top", name).T
        axes[2].plot(NOISES, bias, color=colour, ls=":", label=f"{name}, bias²")
        axes[2].plot(NOISES, variance, color=colour, label=f"{name}, variance")
    axes[2].set_title("signal in top directions")
    for axis in axes:
        axis.set(xscale="log", yscale="log", xlabel="standard deviation of the noise")
        axis.set_xticks(NOISES, [f"{noise:g}" for noise in NOISES])
        axis.minorticks_off()


def plot_examples(axes, results):
    first, _, last = EXAMPLES
    for axis, name in zip(axes[:2], (first, last), strict=True):
        for network in ("teacher", "student"):
            paths = np.array([result["examples"][name]["paths"][network] for result in results])[:, 1:]
            axis.plot(paths[:, :, 0].T, paths[:, :, 2].T, color=COLOURS[network], lw=0.8)[0].set_label(network)
        axis.set(xlabel="progress along the top direction", ylabel="test accuracy", title=f"example: {name}")
    x, y = results[0]["examples"][first]["phi"]
    axes[2].scatter(x, y, s=6, color="crimson")
    axes[2].plot([0, max(x)], [0, max(x)], "k--", lw=1, label="y = x")
    axes[2].set(xlabel="X = φ(teacher probability)", ylabel="Y = φ(student probability)")
    axes[2].set_title(f"{first}: training points")


# ---------------------------------------------------------------- files, flags


def seed_files(args, name, seeds):
    """{seed: file of its result}."""
    return {seed: Path(args.out) / "seeds" / f"{name.replace(':', '-')}-s{seed}.json" for seed in seeds}


def over_seeds(args, seeds, name, data, compute, **settings):
    """[compute(seed)] of the seeds, each kept in seeds/<name>-s<seed>.json with the `settings` that it depends on."""
    settings["data"] = data.facts
    files = seed_files(args, name, seeds)
    return [runs.kept_result(files[seed], settings, functools.partial(compute, seed)) for seed in seeds]


def discard_seeds(args, levels, seeds):
    """Remove what is kept of these seeds, once: interrupted, the command without --overwrite then goes on."""
    names = dict(linear=["linear"], classifiers=[f"classifiers-{arch}" for arch in args.archs])
    names["ntk"] = [f"ntk-{args.ntk_arch}"]
    for level in levels:
        for name in names[level]:
            for file in seed_files(args, name, seeds).values():
                file.unlink(missing_ok=True)


def kept_claims(path):
    """The claims in a level's JSON, none where it is missing; InputError when it is not one."""
    kept = runs.read_json(path) if path.exists() else {"claims": []}
    return claims.checked_claims(kept.get("claims") if isinstance(kept, dict) else None, path)


def load_images(args, levels):
    """{level: its Data}, checked against the flags: what cannot work is refused before anything is computed or lost."""
    images = {}
    if "ntk" in levels:
        flags = common.only_flags(args, common.add_data_flags, common.add_device_flag, subset=args.points)
        try:
            images["ntk"] = common.data_from(flags)
        except InputError as error:
            raise InputError(str(error).replace("--subset", "--points").replace(", or 0 for all", "")) from None
        model = build_classifier(args.ntk_arch, images["ntk"], args.width, 0)
        parameters = sum(p.numel() for p in model.parameters())
        needed = ntk_bytes(args.points, parameters) / 2**30
        if needed > args.memory_gb:
            what = f"the empirical NTK of {args.points} points and {parameters:,} parameters needs {needed:.1f} GiB"
            raise InputError(f"{what}: lower --points or --width, or allow it with --memory-gb {math.ceil(needed)}")
    if levels != ("ntk",):
        images["linear"] = images["classifiers"] = common.data_from(args)
    if "classifiers" in levels:
        for arch in args.archs:
            first_layer(build_classifier(arch, images["classifiers"], args.width, 0))
    return images


def draw(level, results, data, args):
    """Write the level's figure, and its JSON with the claims."""
    name, seeds = data.facts["name"], f"{len(args.seeds)} seed{'s' if len(args.seeds) > 1 else ''}"
    if level == "linear":
        spectra = {"power law": POWER_LAW, name: np.array(results[0]["spectrum"])}
        rows = linear_claims(results, spectra)
        plot_linear(results, spectra, args.out)
    else:
        prefix, ylabel, title = name, "progress", f"First-layer weights in the eigenspace of their input, {name}"
        if level == "ntk":
            prefix, ylabel = f"{name}, NTK of {args.ntk_arch}", "share fitted"
            title = f"Logits in the eigenspace of the empirical NTK, {name}, {args.points} points"
        rows = [row for what, of_seeds in results.items() for row in matched_claims(f"{prefix}, {what}", of_seeds)]
        plot_matched(results, args.out, level, f"{title}, {seeds}", ylabel)
    kept = dict(data=data.facts, seeds=args.seeds, claims=rows, results=results)
    runs.write_json(Path(args.out) / f"{level}.json", kept)


def main(argv=None):
    parser = runs.Parser(__doc__)
    common.add_data_flags(parser)
    add = parser.add_argument_group("eigenspace").add_argument
    add("--level", choices=(*LEVELS, "all"), default="all", help="which of the three levels")
    archs = f"classifiers: linear, {', '.join(common.ARCHS)} or torchvision:<name>"
    add("--archs", nargs="+", default=list(CLASSIFIERS), help=archs)
    add("--ntk-arch", default="resnet8", help="ntk: the network")
    add(
        "--points", type=number(int, 20), default=500, help="ntk: training images, class-balanced, that make the kernel"
    )
    add("--memory-gb", type=number(float, 0, open_low=True), default=8.0, help="ntk: refuse larger kernels, in GiB")
    add("--width", type=number(float, 0, 64, open_low=True), default=0.5, help="multiplies the channels of the models")
    add("--buckets", type=number(int, 2, 100), default=4, help="eigen-buckets")
    add("--steps", type=number(int, 2), help="steps of the teacher (default: CLASSIFIERS and NTK in the source)")
    add("--lr", type=number(float, 0, 1e30, open_low=True), help="learning rate; classifiers: in units of 1/λ1")
    add("--batch-size", type=number(int, 0), default=250, help="images per step, 0 for all")
    add("--temperature", type=number(float, 0, 1e6, open_low=True), default=4.0, help="of the distillation loss")
    add("--seeds", type=number(int, 0), nargs="+", default=[0, 1, 2, 3, 4], help="what the intervals are over")
    add("--out", default="results/eigenspace", help="folder; finished seeds in it are not repeated")
    add("--overwrite", action="store_true", help="repeat finished seeds")
    common.add_process_flags(parser)
    common.add_device_flag(parser)
    args = parser.parse_args(argv)
    runs.check_seeds(args.seeds)
    args.device = engine.use_device(args.device)
    levels = LEVELS if args.level == "all" else (args.level,)
    images = load_images(args, levels)
    Path(args.out).mkdir(parents=True, exist_ok=True)
    tables = [Path(args.out) / f"{level}.json" for level in LEVELS]
    for table in tables:
        kept_claims(table)  # a damaged one is named before the work
    seeds = engine.shard_of(args)
    if args.overwrite:
        discard_seeds(args, levels, seeds)

    engine.run_jobs(args)
    measure = dict(linear=linear_level, classifiers=classifiers_level, ntk=ntk_level)
    results = {level: measure[level](images[level], args, seeds) for level in levels}
    if args.shard[1] > 1:
        return  # a figure needs all seeds: without --shard the command finds what its shards have kept
    for level in levels:
        draw(level, results[level], images[level], args)
    # The table covers every level in --out, also those of an earlier command.
    claims.save_claims(args.out, [row for table in tables for row in kept_claims(table)])


if __name__ == "__main__":
    runs.cli(main)
