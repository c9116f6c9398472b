"""Section 4: does distillation exaggerate gradient descent's bias towards the top eigendirections? (Theorem 4.1, figures of §4)

    python eigenspace.py                                            # all three levels, digits, 5 seeds
    python eigenspace.py --level ntk --points 1000 --width 1
    python eigenspace.py --data cifar10 --subset 1000 --seeds 0 1 2 --out results/eigenspace-cifar10

Gradient descent fits directions with large eigenvalues first. The claim: at equal progress along a top direction the
self-distilled student has progressed *less* along a lower one than its teacher. Three levels:

linear       Least squares from zero. Teacher filter A(t) = I − exp(−tΣ) (discrete: I − (I − ηΣ)^k), student A(s)·A(T)·β*
             where T is the time at which the teacher stopped. Theorem 4.1 on every pair of eigenvalues of a power law and of
             the data; gradient descent on the data against the closed form; bias and variance of teacher, student,
             early stopping and ridge; three constructed examples, tied to §3, where the same bias helps and where it hurts.
classifiers  Cross-entropy: linear probe, MLP and CNN. The first layer's inputs (CNN: its patches) give the covariance XᵀX/n
             and its eigenvectors, grouped into buckets whose ends are evenly spaced in the logarithm of the rank.
             Progress of a network in bucket b: ‖(W(t) − W(0))·V_b‖_F / ‖(W_teacher(end) − W_teacher(0))·V_b‖_F.
ntk          Function space of a ResNet: eigenvectors U_b of the centred, class-averaged empirical NTK of the training points,
             of the teacher at initialisation and at its end (the same kernel for all networks). Progress:
             ⟨U_bᵀF(t), U_bᵀG⟩ / ‖U_bᵀG‖², the share of the target fitted: F the network's eval-mode logits, G the
             teacher's final ones, both centred over classes and points.

The normaliser is the same for teacher and student, so a ratio of progress is a ratio of components, as in the theorem.
"Lower over top progress" of levels 2 and 3: lower-bucket progress averaged over 20 evenly spaced levels of the top bucket
that all networks of the seed reach (each at its first crossing), over the teacher's average, then the mean over the lower
buckets. Below 1: exaggeration. Students have the teacher's initialisation and order, or fresh ones. The teacher's own path
*is* early stopping (ratio 1 by construction), so a same-initialisation student below 1 does what early stopping does not. The
control is a one-hot network with half the learning rate and twice the steps, same or fresh likewise: what it shows comes
of the step size, or of another initialisation, and not of distillation. (The kernel at the teacher's end favours the teacher
over any fresh network: there only the difference from the fresh control says something.)

Departures from the paper: plain SGD (no momentum, weight decay or augmentation; batches of 250), so that paths are smooth;
images are centred on the mean training image; weight *changes* are projected, for the initialisation is no progress; models
are half as wide; intervals are over seeds (initialisation and order; linear: targets, noise and examples) at one draw of
the label noise; test accuracies are of the first 1,000 test images.

Writes linear, classifiers, ntk as .png/.pdf/.json, claims.json, claims.md, and seeds/*.json, which a second run reuses.
Takes 2¼ minutes on one core. Expected on digits with 30% label noise, 5 seeds: no pair contradicts the theorem. Lower over top
progress 0.91 ± 0.03 (linear), 0.82 ± 0.05 (MLP), 0.97 ± 0.12 (CNN: unclear), 0.83 ± 0.11 and 0.72 ± 0.07 (NTK at
initialisation and at the end). It does not pay there: test accuracy at the end is the teacher's within the interval, and at
equal top progress no better than the early-stopped one-hot network's, 7 points worse for the ResNet. In the least-squares
example the best student is not better than the best early stop. In the constructed examples accuracy moves by +1.6 points
(noise in low directions; slope of φ 1.13), +3.6 (too few of them to fit it; slope 0.92) and −2.0 (signal there).
"""
import functools
import hashlib
import json
import math
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

import analyze_deviation
import common

# ---------------------------------------------------------------- linear theory


def flow_filter(eigenvalues, t):
    """A(t) = 1 − exp(−tλ): share of β* fitted by gradient flow from zero after time t. Arrays broadcast."""
    return -np.expm1(-np.multiply(t, eigenvalues))


def gd_filter(eigenvalues, steps, lr):
    """1 − (1 − ηλ)^k: the same after `steps` steps of gradient descent. ValueError unless 0 <= ηλ < 2 (it diverges)."""
    rate = np.multiply(lr, eigenvalues)
    if np.any(rate >= 2) or np.any(rate < 0):
        raise ValueError(f"lr·eigenvalue reaches {np.max(rate):.3g} (least {np.min(rate):.3g}): gradient descent needs it within [0, 2)")
    small = -np.expm1(steps * np.log1p(-np.minimum(rate, 0.5)))   # exact also where (1 − rate) rounds
    return np.where(rate <= 0.5, small, 1 - (1 - rate) ** steps)


def equal_progress(top, low, teacher_time, share):
    """Theorem 4.1: teacher and student where both have progressed equally along the eigenvalue `top`.

    The teacher stops at `teacher_time` T; the student, trained on its predictions, has covered `share` in (0, 1) of what
    can be had along `top`, so both stand at share·A_top(T): the student at time s with A_top(s) = share, the teacher at t <= T.
    Returns (A_low(t), A_low(s)·A_low(T)), teacher and student along `low`. The theorem: for 0 < low < top and finite T
    the second is strictly smaller. Proof: with q = low/top, A_low = g(A_top), g(a) = 1 − (1−a)^q, and
    g(a)·g(b) < g(a·b) on (0, 1), as a·g'(a)/g(a) increases in a for q < 1. For gradient descent the same holds with the
    eigenvalues −log(1 − ηλ)/η, as long as ηλ < 1; beyond that steps overshoot, and it can fail.
    """
    s = -np.log1p(-np.asarray(share)) / top
    t = -np.log1p(-share * flow_filter(top, teacher_time)) / top
    return flow_filter(low, t), flow_filter(low, s) * flow_filter(low, teacher_time)


def gd_solution(x, y, lr, steps):
    """β [d, ...] after `steps` of gradient descent on ‖xβ − y‖²/(2n) from zero, in closed form. x [n, d], y [n, ...], float64."""
    eigenvalues, vectors = np.linalg.eigh(x.T @ x / len(x))
    eigenvalues = np.maximum(eigenvalues, 0)
    positive = np.maximum(eigenvalues, 1e-300)
    divided = np.where(eigenvalues > 1e-300, gd_filter(eigenvalues, steps, lr) / positive, lr * steps)   # limit for λ → 0
    projected = vectors.T @ (x.T @ y) / len(x)
    return vectors @ (divided.reshape(-1, *[1] * (projected.ndim - 1)) * projected)


def gd_simulation(x, y, lr, steps):
    """The same by the plain loop."""
    beta = np.zeros((x.shape[1], *y.shape[1:]))
    for _ in range(steps):
        beta -= lr * (x.T @ (x @ beta - y)) / len(x)
    return beta


def excess_risk(shares, eigenvalues, beta, noise, n):
    """(bias², variance) of the estimator that keeps the shares f [..., d]: Σ λ(1−f)²β*² and σ²/n·Σ f².

    Fixed design with XᵀX/n = diag(eigenvalues), y = Xβ* + ε, ε of standard deviation `noise`; risk E‖X(β̂−β*)‖²/n.
    """
    return (eigenvalues * (1 - shares) ** 2 * beta ** 2).sum(-1), noise ** 2 / n * (shares ** 2).sum(-1)


def fixed_design(rng, n, eigenvalues):
    """x [n, d] with xᵀx/n = diag(eigenvalues) exactly, otherwise random."""
    return np.linalg.qr(rng.standard_normal((n, len(eigenvalues))))[0] * np.sqrt(n * eigenvalues)


# The bias-variance example: 30 directions λ_k = k^-1.5, 100 points. β* is random; its energy λβ*² falls (top) or rises (low)
# along the directions as 1/k², its sum is 1.
DIRECTIONS, POINTS, STEPS, RATE = 30, 100, 60, 0.5
NOISES = (0.25, 0.5, 1.0, 2.0, 4.0)
ESTIMATORS = ("teacher", "student", "best early stop", "best student", "best ridge")


def bias_variance(seed, draws=400):
    """{signal: {estimator: [[bias², variance], ...] per noise}} exact, and {..: simulated risk} of teacher and student, by the loop."""
    rng = np.random.default_rng([4, seed])
    eigenvalues = np.arange(1, DIRECTIONS + 1) ** -1.5
    times = np.geomspace(0.1, 1e5, 1200)[:, None]
    teacher = gd_filter(eigenvalues, STEPS, RATE)
    student = teacher ** 2   # trained as long as the teacher
    families = {"best early stop": gd_filter(eigenvalues, np.minimum(times, STEPS), RATE),
                "best student": gd_filter(eigenvalues, times, RATE) * teacher, "best ridge": eigenvalues / (eigenvalues + 1 / times)}
    x = fixed_design(rng, POINTS, eigenvalues)
    exact, simulated = {}, {}
    for signal, order in (("top", slice(None)), ("low", slice(None, None, -1))):
        energy = (rng.standard_normal(DIRECTIONS) / np.arange(1, DIRECTIONS + 1))[order] ** 2
        beta = rng.choice([-1, 1], DIRECTIONS) * np.sqrt(energy / energy.sum() / eigenvalues)
        exact[signal], simulated[signal] = {name: [] for name in ESTIMATORS}, {"teacher": [], "student": []}
        for noise in NOISES:
            for name, shares in (("teacher", teacher), ("student", student)):
                exact[signal][name].append([float(part) for part in excess_risk(shares, eigenvalues, beta, noise, POINTS)])
            for name, shares in families.items():
                parts = np.stack(excess_risk(shares, eigenvalues, beta, noise, POINTS), axis=1)
                exact[signal][name].append(parts[parts.sum(1).argmin()].tolist())
            y = (x @ beta)[:, None] + noise * rng.standard_normal((POINTS, draws))
            fitted = gd_simulation(x, y, RATE, STEPS)
            for name, estimate in (("teacher", fitted), ("student", gd_simulation(x, x @ fitted, RATE, STEPS))):
                simulated[signal][name].append(float(((x @ (estimate - beta[:, None])) ** 2).mean(0).mean()))
    return dict(exact=exact, simulated=simulated)


def theorem(eigenvalues):
    """Theorem 4.1 over all pairs of distinct eigenvalues, 5 teacher times and 9 shares: (cases, violations, largest ratio student/teacher)."""
    high, low = (eigenvalues[k] for k in np.triu_indices(len(eigenvalues), 1))
    distinct = high > low * (1 + 1e-6)
    high, low = high[distinct][:, None, None], low[distinct][:, None, None]
    teacher, student = equal_progress(high, low, np.array([0.1, 0.5, 1, 3, 10])[:, None] / high, np.linspace(0.1, 0.9, 9))
    return int(teacher.size), int((student >= teacher).sum()), float((student / teacher).max())


# The constructed examples, two classes each: points, low directions and their variance (the top direction has variance 1 within
# a class), distance of the class means from 0 along the top direction and along all low ones (in their standard deviations),
# share of wrong training labels. In the first the teacher fits the wrong labels through the noise of the low directions: its
# least confident points are those, and a student that progresses less there falls below it. In the second there are too few
# low directions to fit them all. In the third the top direction tells little and the low ones much.
EXAMPLES = {
    "noise in low directions": dict(n=200, low=400, variance=0.1, top=1.5, signal=0.0, wrong=0.2),
    "noise in few low directions": dict(n=200, low=60, variance=0.1, top=1.5, signal=0.0, wrong=0.2),
    "signal in low directions": dict(n=200, low=60, variance=0.01, top=0.4, signal=2.0, wrong=0.0),
}


def example(name, seed, temperature, steps=100):
    """One of EXAMPLES, logistic regression from zero: what the same bias does to confidence (§3) and to accuracy.

    Returns paths [S, 3] of teacher and student (progress along the top direction and along the others, test accuracy), ratio
    (the student's lower progress over the teacher's at equal top progress), accuracy of teacher, student and the one-hot
    network `stopped` at the student's top progress, and `analyze_deviation` statistics of the training points.
    """
    n, low, variance, top, signal, wrong = EXAMPLES[name].values()
    rng = np.random.default_rng([5, seed, list(EXAMPLES).index(name)])

    def draw(count):
        y = rng.integers(2, size=count)
        x = rng.standard_normal((count, 1 + low)) * np.sqrt(np.array([1] + [variance] * low))
        return torch.tensor(x + (2 * y - 1)[:, None] * np.array([top] + [signal * math.sqrt(variance / low)] * low)), torch.tensor(y)

    (x, clean), (x_test, y_test) = draw(n), draw(5000)
    labels = torch.where(torch.tensor(rng.random(n) < wrong), 1 - clean, clean)
    eigenvalues, vectors = second_moment_eigenvectors(x)

    def build(key):
        model = nn.Linear(1 + low, 2, bias=False).double()
        nn.init.zeros_(model.weight)
        return model

    observer = lambda model: lambda model: [*bucket_norms(model.weight @ vectors, [(0, 1), (1, 1 + low)]), accuracy_of(model, x_test, y_test)]
    models, paths = self_distil(build, x, labels, 1 / float(eigenvalues[0]), steps, 0, temperature, seed, observer, networks=("teacher", "student"))
    paths = {network: progress_of(path, paths["teacher"], 2) for network, path in paths.items()}
    chosen = evaluate(models["teacher"], x).argmax(1).numpy()
    phi = [analyze_deviation.phi_of_class(evaluate(models[network], x).numpy(), chosen) for network in ("teacher", "student")]
    statistics = analyze_deviation.deviation_statistics(analyze_deviation.deviation_columns(*phi).sum(0, keepdims=True))
    level = min(paths["student"][:, 0].max(), 1.0)
    stopped = at_top(paths["teacher"], [level])[0]
    return dict(paths={network: path.tolist() for network, path in paths.items()}, phi=[values.tolist() for values in phi],
                ratio=float(at_top(paths["student"], [level])[0, 1] / stopped[1]), slope=float(statistics["slope"][0]),
                low_gap=float(statistics["low_gap"][0]), train_accuracy=accuracy_of(models["teacher"], x, labels),
                accuracy=dict(teacher=float(paths["teacher"][-1, 2]), student=float(paths["student"][-1, 2]), stopped=float(stopped[2])))


def linear_level(data, args):
    """Level 1, one dictionary per seed."""
    x = data.normalise(data.x_train[:2000]).flatten(1).double().cpu().numpy()
    x = (x - x.mean(0))[:, x.std(0) > 1e-6]
    if x.shape[1] > 300:   # keep the loop quick on large images: their leading 300 principal components
        x = x @ np.linalg.eigh(x.T @ x)[1][:, -300:]
    eigenvalues = np.sort(np.linalg.eigvalsh(x.T @ x / len(x)))[::-1]
    y = F.one_hot(data.y_train[:2000], data.classes).double().cpu().numpy()
    power = np.arange(1, DIRECTIONS + 1) ** -1.5

    def one(seed):
        weights = np.random.default_rng([3, seed]).random(len(x))[:, None]   # other targets for every seed
        lr, steps = 0.9 / eigenvalues[0], 200
        teacher, closed = gd_simulation(x, y * weights, lr, steps), gd_solution(x, y * weights, lr, steps)
        student, closed_student = gd_simulation(x, x @ teacher, lr, steps), gd_solution(x, x @ closed, lr, steps)
        return dict(gd_error=float(max(np.abs(teacher - closed).max(), np.abs(student - closed_student).max())), **bias_variance(seed),
                    examples={name: example(name, seed, args.temperature) for name in EXAMPLES})

    results = [cached(args, "linear", seed, data, lambda: one(seed), ("temperature",)) for seed in args.seeds]
    spectra = {"power law": power, data.facts["name"]: eigenvalues[eigenvalues > 1e-9 * eigenvalues[0]][:100]}
    return results, spectra


def linear_claims(results, spectra):
    """Claims of level 1."""
    rows = []
    for name, eigenvalues in spectra.items():
        cases, violations, ratio = theorem(eigenvalues)
        rows.append(common.claim(f"linear, {name}: pairs and times that contradict Theorem 4.1", "0", violations, violations, violations, 0.5,
                                 above=False, note=f"of {cases}; largest ratio student/teacher {ratio:.6f}"))
    digits = -math.log10(max(1e-17, *(result["gd_error"] for result in results)))
    rows.append(common.claim("linear: −log10 of the largest difference of a weight, simulation against closed form", "> 9",
                             digits, digits, digits, 9))
    row = lambda text, expected, values, threshold, above=True, note="": rows.append(
        common.claim(text, expected, *common.mean_interval(values), threshold, above, note))
    total = lambda result, signal, name, noise: sum(result["exact"][signal][name][NOISES.index(noise)])
    log_ratio = lambda signal, first, second, noise: [math.log(total(r, signal, first, noise) / total(r, signal, second, noise)) for r in results]
    row("linear: largest relative error of the bias-variance formulas against simulation", "< 0.1",
        [max(abs(simulated / total(result, signal, name, noise) - 1) for signal in result["simulated"] for name in ("teacher", "student")
             for noise, simulated in zip(NOISES, result["simulated"][signal][name])) for result in results], 0.1, above=False, note="400 draws")
    row("linear: log risk, student minus teacher, signal in top directions, noise 4", "< 0",
        log_ratio("top", "student", "teacher", 4.0), 0, above=False)
    row("linear: log risk, student minus teacher, signal in low directions, noise 0.25", "> 0", log_ratio("low", "student", "teacher", 0.25), 0)
    for noise in (1.0, 4.0):
        row(f"linear: log risk, best student minus best early stop, signal in top directions, noise {noise:g}", "< 0",
            log_ratio("top", "best student", "best early stop", noise), 0, above=False, note="each at its own best time")
    for name, setting in EXAMPLES.items():
        pick = lambda key: [result["examples"][name][key] for result in results]
        helps = setting["wrong"] > 0
        row(f"example, {name}: lower over top progress, student against teacher", "< 1", pick("ratio"), 1, above=False)
        row(f"example, {name}: mean Y − X of the teacher's least confident quarter", "< 0", pick("low_gap"), 0, above=False,
            note=f"teacher fits {100 * np.mean(pick('train_accuracy')):.1f}% of the training labels")
        row(f"example, {name}: slope of φ(student) on φ(teacher)", "> 1", pick("slope"), 1)
        for other, text in (("teacher", "teacher"), ("stopped", "one-hot stopped at its top progress")):
            row(f"example, {name}: test accuracy, student minus {text}", "> 0" if helps else "< 0",
                [accuracy["student"] - accuracy[other] for accuracy in pick("accuracy")], 0, above=helps)
    return rows


# ---------------------------------------------------------------- eigen-buckets and matched progress


def second_moment_eigenvectors(rows):
    """Eigenvalues [d], largest first, and eigenvectors [d, d] (columns) of rowsᵀrows/N; rows [N, d]; float64.

    XᵀX/n is what gradient descent on a linear layer sees, and what the theorem is about; `centred_images` makes it the covariance.
    """
    moment = sum(part.double().T @ part.double() for part in rows.split(65536)) / len(rows)
    values, vectors = torch.linalg.eigh(moment)
    return values.flip(0), vectors.flip(1)


def bucket_ends(count, buckets):
    """[(start, end), ...] of at most `buckets` runs of the ranks 0..count−1, ends evenly spaced in log rank, none empty."""
    if count < 2:
        raise common.InputError("the first layer's input has fewer than 2 directions with data: there is nothing to compare")
    ends = np.unique(np.round(np.geomspace(1, count + 1, buckets + 1)).astype(int) - 1)
    return list(zip(ends[:-1].tolist(), ends[1:].tolist()))


def bucket_norms(projected, buckets):
    """Frobenius norm of the columns start..end of `projected` [h, d] for every bucket."""
    squares = projected.detach().square().sum(0)
    return [math.sqrt(squares[start:end].sum()) for start, end in buckets]


def progress_of(path, teacher_path, buckets):
    """`path` [S, K] with its first `buckets` columns divided by the teacher's last row."""
    path, last = np.array(path), np.array(teacher_path)[-1]
    path[:, :buckets] /= np.maximum(last[:buckets], 1e-300)
    return path


def at_top(path, levels):
    """`path` [S, K] interpolated where its column 0 first reaches each level: [L, K], NaN where it never does."""
    rows = []
    for level in levels:
        reached = np.flatnonzero(path[:, 0] >= level)
        k = reached[0] if len(reached) else None
        if k is None or k == 0:
            rows.append(np.full(path.shape[1], np.nan) if k is None else path[0])
            continue
        weight = (level - path[k - 1, 0]) / (path[k, 0] - path[k - 1, 0])
        rows.append(path[k - 1] + weight * (path[k] - path[k - 1]))
    return np.stack(rows)


def compare(paths, buckets, points=20):
    """Ratios at matched top-bucket progress.

    paths: {network: [S, buckets + 1]}, progress per bucket and test accuracy. Returns dict(levels [L], curves {network:
    [L, buckets − 1]} of the ratio to the teacher at each level, ratio {network: [buckets − 1]} of the averages over
    levels, mean {network: its mean over the lower buckets}, accuracy {network: at the last level}).
    """
    lowest, highest = max(path[0, 0] for path in paths.values()), min(path[:, 0].max() for path in paths.values())
    levels = np.linspace(lowest, highest, points + 1)[1:] if highest > lowest else np.full(points, np.nan)
    matched = {name: at_top(path, levels) for name, path in paths.items()}
    lower = {name: values[:, 1:buckets] for name, values in matched.items()}
    with np.errstate(divide="ignore", invalid="ignore"):
        ratio = {name: values.mean(0) / lower["teacher"].mean(0) for name, values in lower.items()}
        curves = {name: (values / lower["teacher"]).tolist() for name, values in lower.items()}
    return dict(levels=levels.tolist(), curves=curves, ratio={name: value.tolist() for name, value in ratio.items()},
                mean={name: float(value.mean()) for name, value in ratio.items()},
                accuracy={name: float(values[-1, buckets]) for name, values in matched.items()})


# ---------------------------------------------------------------- training

# name: (distilled, fresh initialisation and order, how many times smaller the steps are)
NETWORKS = {"teacher": (False, False, 1), "student": (True, False, 1), "student fresh": (True, True, 1),
            "control": (False, False, 2), "control fresh": (False, True, 2)}


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
            order = torch.randperm(n, generator=common.generator("eigenspace order", order_key, step // per_epoch)).to(inputs.device)
        index = order[step % per_epoch * batch:][:batch]
        loss = loss_of(model(inputs[index]), index)
        for parameter, gradient in zip(parameters, torch.autograd.grad(loss, parameters)):
            parameter.data.sub_(gradient, alpha=lr)
        if step + 1 in observed:
            if not all(torch.isfinite(parameter).all() for parameter in parameters):
                raise common.InputError(f"the weights became NaN or infinite within {step + 1} steps at learning rate {lr:.3g}: give a lower --lr")
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


def self_distil(build, inputs, labels, lr, steps, batch, temperature, seed, observer, networks=NETWORKS):
    """Train a teacher on `labels` [N], and students on its logits; returns ({network: model}, {network: observations}).

    build(key) -> model; observer(model) -> observe, called at initialisation. See NETWORKS; students and controls that
    start afresh share initialisation and order, so that they are paired.
    """
    models, paths, teacher_logits = {}, {}, None
    for name in networks:
        distilled, fresh, slower = NETWORKS[name]
        key = ("fresh" if fresh else "teacher", seed)
        model = models[name] = build(key)

        def loss_of(logits, index):
            if distilled:
                return common.kd_loss(logits, teacher_logits[index], temperature)
            return F.cross_entropy(logits, labels[index])

        paths[name] = descend(model, inputs, loss_of, lr / slower, steps * slower, batch, key, observer(model))
        if name == "teacher":
            teacher_logits = evaluate(model, inputs)
    return models, paths


TRAINING = ("width", "buckets", "batch_size", "temperature")   # the flags that levels 2 and 3 share


def cached(args, name, seed, data, compute, flags, **settings):
    """`compute()` as kept in --out/seeds/<name>-s<seed>.json; InputError when that was made with other settings."""
    settings.update({flag: getattr(args, flag) for flag in flags}, data=data.facts)
    digest = lambda result: hashlib.sha256(json.dumps(result).encode()).hexdigest()
    path = Path(args.out) / "seeds" / f"{name}-s{seed}.json"
    if path.exists() and not args.overwrite:
        kept = common.read_json(path)
        if not (isinstance(kept, dict) and isinstance(kept.get("settings"), dict) and isinstance(kept.get("result"), dict) and kept["result"]
                and kept.get("sha256", digest(kept["result"])) == digest(kept["result"])):
            raise common.InputError(f"{path} is not a finished seed, or has changed: remove it, or discard all with --overwrite")
        if kept.get("settings") != settings:
            different = sorted(key for key in settings if kept.get("settings", {}).get(key) != settings[key])
            raise common.InputError(f"{path} was made with other settings ({', '.join(different)}): choose another --out, "
                                    "or discard it with --overwrite")
        return kept["result"]
    started = time.perf_counter()
    result = compute()
    path.parent.mkdir(parents=True, exist_ok=True)
    # Plain json: unlike a report, it must give NaN (a level that a path never reaches) back as NaN.
    common.write_text(path, json.dumps(dict(settings=settings, seconds=time.perf_counter() - started, versions=common.versions(), result=result,
                                            sha256=digest(result))))
    print(f"{name}, seed {seed}: {time.perf_counter() - started:.1f} s")
    return result


# ---------------------------------------------------------------- trained classifiers

# Learning rate in units of 1/λ1, the largest eigenvalue of the first layer's input, and steps of 250 images: smooth paths, and a
# digits teacher that has begun to fit the wrong labels.
CLASSIFIERS = {"linear": dict(lr=1.0, steps=400), "mlp": dict(lr=1.0, steps=800), "cnn": dict(lr=0.3, steps=400)}


def centred_images(data):
    """Training images and up to 1,000 test images [N, C, H, W], less the mean training image: XᵀX/n is then their covariance."""
    images, test = data.normalise(data.x_train), data.normalise(data.x_test[:1000])
    return images - images.mean(0), test - images.mean(0)


def build_classifier(arch, data, width, key):
    """`common.build_model`, plus arch linear, on the data's device."""
    if arch != "linear":
        return common.build_model(arch, data.classes, data.facts["image"], width, ("eigenspace", key)).to(data.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(common.stream_seed("init", "eigenspace", key))
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(data.facts["image"]), data.classes)).to(data.device)


def first_layer(model):
    """The first convolution or linear layer; InputError when it is grouped or there is none."""
    layer = next((module for module in model.modules() if isinstance(module, (nn.Conv2d, nn.Linear))), None)
    if layer is None or getattr(layer, "groups", 1) != 1:
        raise common.InputError("the first layer must be a plain convolution or a linear layer: choose another --archs")
    return layer


def first_layer_inputs(layer, images, limit=200_000):
    """What the rows of the layer's weights are multiplied with: images [N, d], or the patches [N·positions, d] of a convolution.

    At most `limit` patches, of evenly spaced images (they are for a covariance of a few dozen dimensions).
    """
    if isinstance(layer, nn.Linear):
        return images.flatten(1)
    positions = F.unfold(images[:1], layer.kernel_size, layer.dilation, layer.padding, layer.stride).shape[2]
    images = images[::max(1, math.ceil(len(images) * positions / limit))]
    return F.unfold(images, layer.kernel_size, layer.dilation, layer.padding, layer.stride).transpose(1, 2).flatten(0, 1)


def classifiers_level(data, args):
    """Level 2: {arch: [one dictionary per seed]}; paths {network: [S, buckets + 1]} hold progress (see the top) and test accuracy."""
    images, test = centred_images(data)
    labels, test_labels = data.y_train, data.y_test[:len(test)]

    @functools.cache
    def eigenspace(arch):   # the same for all seeds; not computed when every seed is finished
        return second_moment_eigenvectors(first_layer_inputs(first_layer(build_classifier(arch, data, args.width, 0)), images))

    def one(arch, seed, lr, steps):
        build = lambda key: build_classifier(arch, data, args.width, key)
        eigenvalues, vectors = eigenspace(arch)
        buckets = bucket_ends(int((eigenvalues > 1e-6 * eigenvalues[0]).sum()), args.buckets)   # the others have no data

        def observer(model):
            layer = first_layer(model)
            start = layer.weight.detach().clone()
            change = lambda: (layer.weight.detach() - start).flatten(1).double() @ vectors
            return lambda model: [*bucket_norms(change(), buckets), accuracy_of(model, test, test_labels)]

        models, paths = self_distil(build, images, labels, lr / float(eigenvalues[0]), steps, args.batch_size, args.temperature, seed, observer)
        paths = {name: progress_of(path, paths["teacher"], len(buckets)) for name, path in paths.items()}
        return dict(compare(paths, len(buckets)), buckets=buckets, steps=steps, paths={name: path.tolist() for name, path in paths.items()},
                    train_accuracy=accuracy_of(models["teacher"], images, labels))

    results = {}
    for arch in args.archs:
        preset = CLASSIFIERS.get(arch, CLASSIFIERS["cnn"])
        recipe = dict(lr=args.lr or preset["lr"], steps=args.steps or preset["steps"])
        results[arch] = [cached(args, f"classifiers-{arch.replace(':', '-')}", seed, data, lambda: one(arch, seed, **recipe), TRAINING, **recipe)
                         for seed in args.seeds]
    return results


# ---------------------------------------------------------------- function space

NTK = dict(lr=0.1, steps=150)


def ntk_bytes(points, parameters):
    """Memory of `empirical_ntk`, bytes: one class's Jacobian in float32, twice while put together and a quarter more (measured
    overhead), four n×n matrices in float64, and 256 MiB for the activations of a chunk."""
    return 10 * points * parameters + 32 * points ** 2 + 2 ** 28


def empirical_ntk(model, inputs, classes, chunk=50):
    """Class-averaged empirical NTK [n, n], float64: 1/C Σ_c ∇f_c(x)·∇f_c(x'), gradients over all parameters, BN in eval mode.

    The full kernel of n·C rows is about this one ⊗ I_C (exactly so at infinite width, Jacot et al. 2018) and takes C² as much memory.
    """
    training = model.training
    model.eval()
    parameters = {name: value.detach() for name, value in model.named_parameters()}
    buffers = dict(model.named_buffers())
    kernel = torch.zeros(len(inputs), len(inputs), dtype=torch.float64, device=inputs.device)
    for c in range(classes):
        logit = lambda parameters, image: torch.func.functional_call(model, (parameters, buffers), (image[None],))[0, c]
        jacobian = torch.func.vmap(torch.func.grad(logit), (None, 0), chunk_size=chunk)(parameters, inputs)
        for part in jacobian.values():
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
    """⟨U_bᵀF, U_bᵀG⟩/‖U_bᵀG‖² for every bucket: F, G [n, C] centred, vectors [n, n]."""
    fitted, wanted = vectors.T @ logits, vectors.T @ target
    return [float((fitted[start:end] * wanted[start:end]).sum() / wanted[start:end].square().sum().clamp(min=1e-300)) for start, end in buckets]


def check_ntk_memory(data, args):
    """InputError, before anything is trained, when the kernel would need more than --memory-gb."""
    parameters = sum(p.numel() for p in build_classifier(args.ntk_arch, data, args.width, 0).parameters())
    needed = ntk_bytes(args.points, parameters) / 2 ** 30
    if needed > args.memory_gb:
        raise common.InputError(f"the empirical NTK of {args.points} points and {parameters:,} parameters needs {needed:.1f} GiB: "
                                f"lower --points or --width, or allow it with --memory-gb {math.ceil(needed)}")


def ntk_level(data, args):
    """Level 3: {kernel: [one dictionary per seed]}, kernel init or end. `data` holds the kernel's points and is what is trained on."""
    images, test = centred_images(data)
    labels, test_labels = data.y_train, data.y_test[:len(test)]
    recipe = dict(lr=args.lr or NTK["lr"], steps=args.steps or NTK["steps"])

    def one(seed):
        build = lambda key: calibrate(build_classifier(args.ntk_arch, data, args.width, key), images)
        observer = lambda model: lambda model: (centre(evaluate(model, images)), accuracy_of(model, test, test_labels))
        models, seen = self_distil(build, images, labels, recipe["lr"], recipe["steps"], args.batch_size, args.temperature, seed, observer)
        target, out = seen["teacher"][-1][0], {}
        for kernel, model in (("init", build(("teacher", seed))), ("end", models["teacher"])):
            gram = empirical_ntk(model, images, data.classes)
            eigenvalues, vectors = torch.linalg.eigh(gram - gram.mean(0) - gram.mean(1, keepdim=True) + gram.mean())
            eigenvalues, vectors = eigenvalues.flip(0), vectors.flip(1)
            buckets = bucket_ends(len(images) - 1, args.buckets)   # centring makes the last eigenvalue 0
            paths = {name: np.array([[*share_fitted(logits, target, vectors, buckets), accuracy] for logits, accuracy in path])
                     for name, path in seen.items()}
            share = lambda values: [float(values[start:end].sum() / values.sum()) for start, end in buckets]
            out[kernel] = dict(compare(paths, len(buckets)), buckets=buckets, steps=recipe["steps"],
                               paths={name: path.tolist() for name, path in paths.items()}, trace=share(eigenvalues),
                               target_energy=share((vectors.T @ target).square().sum(1)),
                               train_accuracy=accuracy_of(models["teacher"], images, labels))
        return out

    results = [cached(args, f"ntk-{args.ntk_arch.replace(':', '-')}", seed, data, lambda: one(seed), (*TRAINING, "ntk_arch", "points"), **recipe)
               for seed in args.seeds]
    return {kernel: [result[kernel] for result in results] for kernel in ("init", "end")}


# ---------------------------------------------------------------- output


def matched_claims(results, prefix):
    """Claims of levels 2 and 3 from {what: [`compare` per seed]}."""
    rows = []
    for what, seeds in results.items():
        mean = lambda name: [seed["mean"][name] for seed in seeds]
        less = lambda first, second: [a - b for a, b in zip(mean(first), mean(second))]
        row = lambda text, expected, values, threshold, above=False, note="": rows.append(
            common.claim(f"{prefix}, {what}: {text}", expected, *common.mean_interval(values), threshold, above, note))
        note = f"top-bucket progress matched up to {np.mean([seed['levels'][-1] for seed in seeds]):.2f}"
        row("lower over top progress, student against teacher, same initialisation", "< 1", mean("student"), 1, note=note)
        row("the same, fresh initialisation", "< 1", mean("student fresh"), 1)
        row("student minus one-hot control at half the learning rate, same initialisation", "< 0", less("student", "control"), 0)
        row("student minus one-hot control, both the same fresh initialisation", "< 0", less("student fresh", "control fresh"), 0,
            note=f"control against teacher {np.mean(mean('control fresh')):.3f}")
        row("lowest bucket alone, student against teacher, same initialisation", "< 1", [seed["ratio"]["student"][-1] for seed in seeds], 1)
        row("test accuracy, student minus one-hot stopped at the same top-bucket progress", "> 0",
            [seed["accuracy"]["student"] - seed["accuracy"]["teacher"] for seed in seeds], 0, above=True, note="same initialisation")
        final = lambda name: np.array([seed["paths"][name][-1][-1] for seed in seeds])
        row("test accuracy, student minus teacher, both at the end", "> 0", final("student") - final("teacher"), 0, above=True,
            note=f"teacher {100 * final('teacher').mean():.1f}%, on training labels {100 * np.mean([seed['train_accuracy'] for seed in seeds]):.1f}%")
    return rows


COLOURS = {"teacher": "black", "student": "crimson", "student fresh": "darkorange", "control": "steelblue", "control fresh": "teal"}


def plot_matched(results, folder, name, title, ylabel):
    """Rows: architectures or kernels. Columns: progress over training, (top, lower) planes of all seeds, ratio at matched top progress."""
    plt = common.pyplot()
    columns = max(len(seeds[0]["buckets"]) for seeds in results.values()) + 1
    figure, axes = plt.subplots(len(results), columns, figsize=(3.2 * columns, 3 * len(results)), squeeze=False, layout="constrained")
    for line, (what, seeds) in zip(axes, results.items()):
        names = [f"directions {start + 1}–{end}" for start, end in seeds[0]["buckets"]]
        style = lambda network: dict(color=COLOURS[network], ls="--" if "control" in network else "-")
        for b, label in enumerate(names):
            for network, dashes in (("teacher", "-"), ("student", "--")):
                line[0].plot(observed_steps(seeds[0]["steps"]), np.mean([np.array(seed["paths"][network])[:, b] for seed in seeds], axis=0),
                             color=f"C{b}", ls=dashes, label=label if network == "teacher" else None)
        line[0].set(xscale="symlog", xlabel="step", ylabel=ylabel, title=f"{what}: teacher (line), student (dashed)")
        line[0].title.set_fontsize(9)
        for b, axis in enumerate(line[1:-1], start=1):
            if b >= len(names):
                axis.set_axis_off()
                continue
            for k, seed in enumerate(seeds):
                for network, path in seed["paths"].items():
                    axis.plot(*np.array(path)[:, [0, b]].T, **style(network), lw=0.8, alpha=0.8, label=None if k else network)
            axis.set(xlabel=names[0], ylabel=names[b])
        for network in list(seeds[0]["curves"])[1:]:
            curves = np.array([np.mean(seed["curves"][network], axis=1) for seed in seeds])
            intervals = np.array([common.mean_interval(values) for values in curves.T])
            levels = np.mean([seed["levels"] for seed in seeds], axis=0)
            line[-1].plot(levels, intervals[:, 0], **style(network))
            if len(seeds) > 1:
                line[-1].fill_between(levels, intervals[:, 1], intervals[:, 2], color=COLOURS[network], alpha=0.2, lw=0)
        line[-1].axhline(1, color="black", lw=0.8)
        line[-1].set(xlabel="matched top-bucket progress", ylabel="lower-bucket progress\nover the teacher's")
        for axis in line[:2]:
            axis.legend(fontsize=6)
    figure.suptitle(title)
    common.save_figure(figure, folder, name)


def plot_linear(results, spectra, folder):
    """Level 1: the theorem in the (top, lower) plane, filters, risk against noise, and two of the constructed examples."""
    plt = common.pyplot()
    figure, axes = plt.subplots(3, 3, figsize=(13, 11), layout="constrained")
    share = np.linspace(0.001, 0.999, 300)
    for axis, (name, values) in zip(axes[0], spectra.items()):
        for k, colour in zip((1, len(values) // 4, len(values) // 2), ("C0", "C1", "C2")):
            teacher, student = equal_progress(values[0], values[k], 3 / values[0], share)
            axis.plot(share * flow_filter(1, 3), teacher, color=colour, label=f"λ{k + 1}/λ1 = {values[k] / values[0]:.3f}")
            axis.plot(share * flow_filter(1, 3), student, color=colour, ls="--")
        axis.set(xlabel="progress along λ1", ylabel="progress along the lower eigenvalue", title=f"{name}: teacher (line), student (dashed)")
    power = spectra["power law"]
    kept = gd_filter(power, STEPS, RATE)
    stop = np.log1p(-kept[4] ** 2) / np.log1p(-RATE * power[4])
    for label, shares, colour in (("teacher", kept, "black"), ("student", kept ** 2, "crimson"),
                                  ("one-hot stopped at the student's progress along λ5", gd_filter(power, stop, RATE), "C0"),
                                  ("ridge at the same", power / (power + power[4] * (1 / kept[4] ** 2 - 1)), "C2")):
        axes[0, 2].plot(power, shares, color=colour, label=label)
    axes[0, 2].set(xscale="log", xlabel="eigenvalue", ylabel="share of β* kept", title=f"power law: filters after {STEPS} steps")

    average = lambda part, signal, name: np.mean([result[part][signal][name] for result in results], axis=0)
    for axis, signal in zip(axes[1], ("top", "low")):
        for name, colour in zip(ESTIMATORS, ("black", "crimson", "C0", "darkorange", "C2")):
            axis.plot(NOISES, average("exact", signal, name).sum(1), color=colour, label=name)
        for name, colour in (("teacher", "black"), ("student", "crimson")):
            axis.plot(NOISES, average("simulated", signal, name), "o", color=colour, label=f"{name}, simulated")
        axis.set(ylabel="excess risk", title=f"signal in {signal} directions")
    for name, colour in (("teacher", "black"), ("student", "crimson")):
        for part, style in ((0, ":"), (1, "-")):
            axes[1, 2].plot(NOISES, average("exact", "top", name)[:, part], color=colour, ls=style, label=f"{name}, {('bias²', 'variance')[part]}")
    axes[1, 2].set(title="signal in top directions")
    for axis in axes[1]:
        axis.set(xscale="log", yscale="log", xlabel="standard deviation of the noise")
        axis.set_xticks(NOISES, [f"{noise:g}" for noise in NOISES])
        axis.minorticks_off()

    first, _, last = EXAMPLES
    for axis, name in ((axes[2, 0], first), (axes[2, 1], last)):
        for k, result in enumerate(results):
            for network, path in result["examples"][name]["paths"].items():
                axis.plot(*np.array(path)[1:, [0, 2]].T, color=COLOURS[network], lw=0.8, label=None if k else network)
        axis.set(xlabel="progress along the top direction", ylabel="test accuracy", title=f"example: {name}")
    x, y = results[0]["examples"][first]["phi"]
    axes[2, 2].scatter(x, y, s=6, color="crimson")
    axes[2, 2].plot([0, max(x)], [0, max(x)], "k--", lw=1, label="y = x")
    axes[2, 2].set(xlabel="X = φ(teacher probability)", ylabel="Y = φ(student probability)", title=f"{first}: training points")
    for axis in axes.flat:
        axis.legend(fontsize=7)
    common.save_figure(figure, folder, "linear")


def kept_claims(path):
    """The claims in a level's JSON, none where it is missing; InputError when it is not one."""
    claims = common.read_json(path) if path.exists() else {"claims": []}
    return common.checked_claims(claims.get("claims") if isinstance(claims, dict) else None, path)


def main(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--level", choices=("linear", "classifiers", "ntk", "all"), default="all", help="which of the three levels")
    add("--data", default="digits", help="digits, cifar10, cifar100, tiny-imagenet, npz:PATH or folder:PATH")
    add("--data-dir", default="data", help="where prepared or original datasets lie, and downloads go")
    add("--subset", type=common.number(int, 0), default=0, help="classifiers: train on that many images, class-balanced; 0 for all")
    add("--label-noise", type=common.number(float, 0, 1, open_high=True), help="share of training labels replaced by another class (default: 0.3 for digits, else 0)")
    add("--data-seed", type=common.number(int, 0), default=0, help="seed of the subset and of the label noise")
    add("--image-size", type=common.number(int, 8, 4096), help="resize the images of folder:PATH to this side")
    add("--archs", nargs="+", default=list(CLASSIFIERS), help=f"classifiers: linear, {', '.join(common.ARCHS)} or torchvision:<name>")
    add("--ntk-arch", default="resnet8", help="ntk: the network")
    add("--points", type=common.number(int, 20), default=500, help="ntk: training images, class-balanced, that make the kernel and are trained on")
    add("--memory-gb", type=common.number(float, 0, open_low=True), default=8.0, help="ntk: refuse kernels that need more GiB than that")
    add("--width", type=common.number(float, 0, 64, open_low=True), default=0.5, help="multiplies the channels of the models")
    add("--buckets", type=common.number(int, 2, 100), default=4, help="eigen-buckets")
    add("--steps", type=common.number(int, 2), help="steps of the teacher (default: CLASSIFIERS and NTK in the source)")
    add("--lr", type=common.number(float, 0, 1e30, open_low=True), help="learning rate; classifiers: in units of 1/λ1 of the first layer's input")
    add("--batch-size", type=common.number(int, 0), default=250, help="images per step, 0 for all")
    add("--temperature", type=common.number(float, 0, 1e6, open_low=True), default=4.0, help="softens teacher and student in the distillation loss")
    add("--seeds", type=common.number(int, 0), nargs="+", default=[0, 1, 2, 3, 4], help="seeds")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA where it is")
    add("--out", default="results/eigenspace", help="folder for figures, results and claims; finished seeds in it are not repeated")
    add("--overwrite", action="store_true", help="repeat finished seeds")
    args = parser.parse_args(argv)
    common.check_seeds(args.seeds)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise common.InputError("--device cuda: no CUDA device is visible; use --device cpu")
    args.device = "cuda" if args.device != "cpu" and torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False   # the small eigenvalues need the bits
    started = time.perf_counter()
    levels = ("linear", "classifiers", "ntk") if args.level == "all" else (args.level,)
    load = lambda count: common.load_data(args.data, args.data_dir, count, args.label_noise, args.data_seed, args.image_size, args.device)
    points_data = None
    if "ntk" in levels:   # first, since it may refuse: nothing is to be trained before that
        try:
            points_data = load(args.points)
        except common.InputError as error:
            raise common.InputError(str(error).replace("--subset", "--points").replace(", or 0 for all", "")) from None
        check_ntk_memory(points_data, args)
    data = load(args.subset) if levels != ("ntk",) else points_data
    Path(args.out).mkdir(parents=True, exist_ok=True)
    for level in ("linear", "classifiers", "ntk"):
        kept_claims(Path(args.out) / f"{level}.json")   # a damaged one is named before the work
    name, seeds = data.facts["name"], f"{len(args.seeds)} seed{'s' if len(args.seeds) > 1 else ''}"

    for level in levels:
        if level == "linear":
            results, spectra = linear_level(data, args)
            rows = linear_claims(results, spectra)
            plot_linear(results, spectra, args.out)
        elif level == "classifiers":
            results = classifiers_level(data, args)
            rows = matched_claims(results, name)
            plot_matched(results, args.out, level, f"First-layer weights in the eigenspace of their input, {name}, {seeds}", "progress")
        else:
            results = ntk_level(points_data, args)
            rows = matched_claims(results, f"{name}, NTK of {args.ntk_arch}")
            title = f"Logits in the eigenspace of the empirical NTK, {name}, {args.points} points, {seeds}"
            plot_matched(results, args.out, level, title, "share fitted")
        facts = (points_data if level == "ntk" else data).facts
        common.write_json(Path(args.out) / f"{level}.json", dict(data=facts, seeds=args.seeds, claims=rows, results=results))

    # The table covers every level in --out, also those of an earlier command.
    common.save_claims(args.out, [row for level in ("linear", "classifiers", "ntk") for row in kept_claims(Path(args.out) / f"{level}.json")])
    print(f"{time.perf_counter() - started:.0f} s")


if __name__ == "__main__":
    common.cli(main)
