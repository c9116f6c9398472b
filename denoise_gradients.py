"""Gradient denoising (paper §5): does the teacher make a mini-batch gradient less noisy, where, and is it mere softness?

    python denoise_gradients.py                                          # noisy digits, ResNet-8, five seeds
    python denoise_gradients.py --teacher 'runs/teacher-s{seed}'         # a teacher that train_teacher.py made
    python denoise_gradients.py --data cifar10 --subset 2000 --label-noise 0.3 --arch resnet20 --epochs 20 --points 256 --seeds 0 1 2

The paper speaks of distillation as a denoiser of gradients without fixing an experiment; this script defines one. The
idea: teacher probabilities average over labels where a one-hot label is one draw, so their gradients vary less (Menon et
al. 2021, "A statistical perspective on distillation"; Safaryan et al. 2023, "Knowledge distillation performs partial
variance reduction"). Three losses, all T²·CE(q, softmax(z/T)), each a student run of the same seed (same start, order, views):
  onehot  q = the training label, T = 1
  kd      q = softmax(teacher/T); its gradient is that of T²·KL(teacher_T ‖ student_T)
  smooth  the control: q = the label smoothed until its entropy is the teacher's mean entropy at T, same T: softness alone
At 0, 5, 25, 50 and 100% of the steps, per-example gradients g_i of all three at the SAME parameters and points
(torch.func, batch norm in eval mode, un-augmented training images, fp32, exact unless --max-parameters or --points says less):
  noise scale   tr(Σ)/‖G‖², G and Σ mean and covariance of g_i, with the unbiased estimators of McCandlish et al. 2018
                ("An empirical model of large-batch training", appendix A.1). Free of scale, so T² or a learning rate cannot
                fake it. N points do not resolve a value above 10·N: it counts as 10·N.
  alignment     cosine of mini-batch gradients with the full one-hot gradient on the training images with CLEAN labels, and on
                held-out (test) images. Batches are drawn with replacement, as independent as the noise scale supposes.
  decrease      of the clean held-out loss by a step along a mini-batch gradient scaled to unit length, as a share of what
                steepest descent on that loss gains: in the limit of short steps (`first_order`), and truly taken (`decrease`)
                with the length that is best for steepest descent, the same for every loss. (A step of lr · ‖g‖ would not do:
                with batch norm in eval mode it overshoots whatever its direction.) Mean and standard deviation over batches.
One comparison alone misleads: far from its own minimum a loss has a large mean gradient, hence a low noise scale whatever
its targets. So each claim is held against three: (i) shared parameters, mean over the onehot and the kd run; (ii) every
loss along its own run at the same share of steps; (iii) the decrease at the shared parameters, for short and for real steps.
It "holds" or "fails" when all do; else it is "mixed".

Writes denoise.png/.pdf, denoise.json (everything, with 95% t intervals over seeds), claims.json and claims.md into --out.
Runs are trained when missing and used again when finished; a onehot or kd run is what train_student.py makes with the
same flags and --snapshot-at 0.05 0.25 0.5, so the runs of switch_distill.py serve as well.

Expected on digits, five seeds: "KD gradients are less noisy" is mixed: log ratio of noise scales 2.0 [1.8, 2.1] at shared
parameters and 1.6 [0.9, 2.4] along own runs, short steps gain 0.11 [0.03, 0.19], but real steps 0.09 [-0.06, 0.23]. "Mostly on
hard points" is unclear: very nearly half of the reduction. "Not softness alone" is mixed: smoothing reaches KD's noise scale at
shared parameters (log ratio 0.02 [-0.28, 0.33]) but not its decrease. On points with flipped labels a one-hot batch has a cosine
of -0.01 with the held-out gradient, a smoothed one 0.03, a KD batch 0.39. Time: 30 to 40 s of one busy core a seed for the
measuring, half of it with --points 512, beside 25 s to train its runs.
"""
import argparse
import functools
import math
import os
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from scipy import stats
from scipy.optimize import brentq
from torch.func import functional_call, grad, vmap

import common
from analyze_deviation import check_logits, phi_of_class
from train_student import train_student
from train_teacher import train_teacher

BATCH_SIZES = (16, 64, 256, 1024)
LOSSES = ("onehot", "kd", "smooth")
QUARTERS = ("hardest quarter", "second quarter", "third quarter", "easiest quarter")
UNRESOLVED = 10   # times the number of points: the largest noise scale that is told apart from infinity

# ---------------------------------------------------------------- gradients


def soft_loss(logits, target, temperature):
    """T²·CE(target, softmax(logits/T)) over the last axis: cross-entropy at T = 1, else kd_loss up to a constant.

    logits, target [..., C]; returns [...]. The constant is T² times the target's entropy, which no gradient sees.
    """
    return -temperature ** 2 * (target * F.log_softmax(logits / temperature, -1)).sum(-1)


def smoothing_of_entropy(entropy, classes):
    """Label smoothing α in 0..1 whose targets (1−α)·one-hot + α/classes have this entropy (nats)."""
    def excess(alpha):
        p = np.full(classes, alpha / classes)
        p[0] += 1 - alpha
        return stats.entropy(p) - entropy
    return 1.0 if excess(1.0) <= 0 else 0.0 if entropy <= 0 else brentq(excess, 0.0, 1.0, xtol=1e-12)


def measured_parameters(model, limit=0):
    """Names of the parameters to differentiate: all, or with a limit the last tensors that hold at most that many."""
    chosen, count = [], 0
    for name, value in reversed(list(model.named_parameters())):
        count += value.numel()
        if limit and count > limit and chosen:
            break
        chosen.insert(0, name)
    return chosen


def _split(model, names):
    """(parameters to differentiate, everything else) of a model, as dicts of detached tensors."""
    state = {name: value.detach() for name, value in [*model.named_parameters(), *model.named_buffers()]}
    return {name: state.pop(name) for name in names}, state


def per_example_gradients(model, names, images, targets, temperature):
    """Gradient of `soft_loss` of every example: one [B, p] per parameter of `names`, in that order.

    images [B, ...] float, targets [B, C]; the model must be in eval mode, or batch norm would mix the examples.
    """
    free, fixed = _split(model, names)

    def loss(free, image, target):
        return soft_loss(functional_call(model, {**fixed, **free}, (image[None],))[0], target, temperature)

    gradients = vmap(grad(loss), (None, 0, 0))(free, images, targets)
    return [gradients[name].flatten(1) for name in names]


def mean_gradient(model, names, images, targets, temperature, chunk=1000):
    """Gradient [P] of the mean `soft_loss` over all examples, by ordinary backpropagation."""
    free, fixed = _split(model, names)
    free = {name: value.clone().requires_grad_() for name, value in free.items()}
    total = 0
    for k in range(0, len(images), chunk):
        loss = soft_loss(functional_call(model, {**fixed, **free}, (images[k:k + chunk],)), targets[k:k + chunk], temperature).sum()
        total = total + torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(free.values()))])
    return total / len(images)


@torch.no_grad()
def moved_loss(model, names, move, images, labels, chunk=1000):
    """Mean cross-entropy on images, labels with the parameters `names` moved by the vector `move` [P]."""
    free, fixed = _split(model, names)
    parts = move.split([value.numel() for value in free.values()])
    free = {name: value + part.view_as(value) for (name, value), part in zip(free.items(), parts)}
    logits = torch.cat([functional_call(model, {**fixed, **free}, (images[k:k + chunk],)) for k in range(0, len(images), chunk)])
    return F.cross_entropy(logits, labels).item()


def stream(model, names, images, targets, temperature, weights, chunk=64):
    """What the statistics need of all per-example gradients, a chunk at a time, so that [N, P] is never held.

    weights [R, N]: each row makes one mini-batch gradient. Returns the mean [P], squares [N] = ‖g_i‖², inner [N] = g_i · mean,
    and batches [R, P] = weights @ g.
    """
    mean = mean_gradient(model, names, images, targets, temperature)
    chunk = max(1, min(chunk, 2 ** 27 // len(mean)))   # at most half a GiB
    squares, inner = torch.zeros(2, len(images), device=mean.device)
    batches = torch.zeros(len(weights), len(mean), device=mean.device)
    for k in range(0, len(images), chunk):
        some, start = slice(k, k + chunk), 0
        for g in per_example_gradients(model, names, images[some], targets[some], temperature):
            part = slice(start, start := start + g.shape[1])
            squares[some] += torch.linalg.vector_norm(g, dim=1) ** 2
            inner[some] += g @ mean[part]
            batches[:, part].addmm_(weights[:, some], g)
    return mean, squares, inner, batches


def noise_scale(mean_square, square_of_mean, n):
    """(tr Σ, ‖G‖², noise scale) from mean ‖g_i‖² and ‖mean g_i‖² of n examples (McCandlish et al. 2018, A.1, with B = 1 and n).

    Both estimates are unbiased, so that of ‖G‖² can be negative; the scale is then unresolved and counts as UNRESOLVED·n.
    """
    trace = (mean_square - square_of_mean) * n / (n - 1)
    signal = square_of_mean - trace / n
    return trace, signal, trace / max(signal, trace / (UNRESOLVED * n)) if trace > 0 else 0.0


# ---------------------------------------------------------------- measuring one set of parameters


def batch_weights(groups, step_size, count, generator):
    """{key: weights [batches, N]}, one row per mini-batch drawn with replacement.

    Keys: `count` batches of each of BATCH_SIZES and of step_size (the training batch), and half as many batches of
    step_size of each group. groups: {name: bool array [N]}.
    """
    n = len(next(iter(groups.values())))
    draws = [(size, np.arange(n), size, count) for size in sorted({*BATCH_SIZES, step_size})]
    draws += [(name, np.flatnonzero(member), step_size, max(2, count // 2)) for name, member in groups.items()]
    rows = {}
    for key, members, size, batches in draws:
        chosen = torch.as_tensor(members)[torch.randint(len(members), (batches, size), generator=generator)]
        rows[key] = torch.zeros(batches, n).scatter_add_(1, chosen, torch.ones(batches, size)) / size
    return rows


def measure(model, names, images, held_out, clean, losses, groups, rows, step_size, moves=True):
    """Statistics of each loss at the model's parameters: {loss: {statistic: float}, with "deviation" an array [N]}.

    images [N, ...] of the points; held_out, clean: (images, targets) of the held-out images, and of all training images with
    clean labels; losses {name: (targets [N, C], temperature)}; rows from `batch_weights`, for batches of step_size among others.
    moves=False leaves out "decrease", which takes a forward pass over the held-out images for each batch.
    """
    references = [mean_gradient(model, names, *clean, 1.0), mean_gradient(model, names, *held_out, 1.0)]
    clean_norm, held_norm = (float(reference.norm()) for reference in references)
    weights = torch.cat(list(rows.values())).to(images.device)
    n, labels, out = len(images), held_out[1].argmax(1), {}
    start = moved_loss(model, names, torch.zeros_like(references[0]), held_out[0], labels)
    downhill = -references[1] / max(held_norm, 1e-30)
    length, best = best_step(lambda size: start - moved_loss(model, names, size * downhill, held_out[0], labels), held_norm, start)
    for name, (targets, temperature) in losses.items():
        mean, squares, inner, batches = stream(model, names, images, targets, temperature, weights)
        square_of_mean = float(mean @ mean)
        trace, signal, scale = noise_scale(float(squares.mean()), square_of_mean, n)
        # Each point's part of the noise scale: their mean is the noise scale, so quarters and groups add up to it.
        deviation = (squares - 2 * inner + square_of_mean).clamp(min=0).cpu().numpy()
        deviation = deviation * (scale / max(deviation.mean(), 1e-30))
        norms = batches.norm(dim=1).clamp(min=1e-30)
        along = batches @ torch.stack(references, 1) / norms[:, None]
        per_row = dict(cos_clean=along[:, 0] / max(clean_norm, 1e-30), cos_held_out=along[:, 1] / max(held_norm, 1e-30))
        take = lambda values, key: dict(zip(rows, values.split([len(part) for part in rows.values()])))[key]

        result = dict(trace=trace, signal=signal, noise_scale=scale, mean_norm=math.sqrt(square_of_mean), held_out_norm=held_norm,
                      held_out_loss=start, deviation=deviation)
        for statistic, values in per_row.items():
            for size in BATCH_SIZES:
                result[f"{statistic} {size}"] = float(take(values, size).mean())
                result[f"{statistic} {size} sd"] = float(take(values, size).std())
            for group in groups:
                result[f"{statistic} {group}"] = float(take(values, group).mean())
        for group, member in groups.items():
            result[f"noise {group}"] = float(deviation[member].mean())
        first = take(per_row["cos_held_out"], step_size)   # the limit of `decrease` for short steps is this cosine
        result.update({"first_order": float(first.mean()), "first_order sd": float(first.std())})
        if moves:
            directions = take(batches, step_size) / take(norms, step_size)[:, None]
            falls = [start - moved_loss(model, names, -length * direction, held_out[0], labels) for direction in directions]
            falls = np.array(falls) / best
            result.update({"decrease": float(falls.mean()), "decrease sd": float(falls.std(ddof=1)), "step_length": length, "best_decrease": best})
        out[name] = result
    return out


def best_step(fall, slope, loss, halvings=10):
    """(length, fall) of the step that gains most: fall(length) on a grid of halvings.

    The grid starts where a straight line of this slope would bring the loss to zero. It always finds a gain, be it tiny,
    unless the slope is zero; then the fall is counted as 1e-30, for it divides.
    """
    lengths = [loss / max(slope, 1e-30) / 2 ** k for k in range(halvings)]
    falls = [fall(length) for length in lengths]
    best = int(np.argmax(falls))
    return lengths[best], max(falls[best], 1e-30)


# ---------------------------------------------------------------- runs


def teacher_run(args, seed, data, epochs):
    """Run folder of a teacher trained for `epochs`, as train_teacher.py --epochs does; trained now when it is missing."""
    scale = epochs / args.epochs
    flags = common.only_flags(args, common.add_flags)
    flags.epochs, flags.warmup, flags.milestones = epochs, args.warmup * scale, [milestone * scale for milestone in args.milestones]
    run = teacher_folder(args, seed, epochs)
    common.run_jobs([functools.partial(train_teacher, run, flags, seed, data)], args.device)
    return run


def teacher_folder(args, seed, epochs):
    """Run folder of a teacher that this script trains."""
    return Path(args.runs) / f"{common.default_name(args)}-{'teacher' if epochs == args.epochs else f'teacher-{epochs}-epochs'}-s{seed}"


def student_folder(what, args, seed):
    """Run folder of the student run `what` (one of LOSSES)."""
    given = getattr(args, what)
    return Path(given.replace("{seed}", str(seed)) if given else Path(args.runs) / f"{common.default_name(args)}-denoise-{what}-s{seed}")


def student_run(what, args, seed, data, teacher, smoothing):
    """(run folder, {percent: state dict, None at the start}) of the student run `what` (one of LOSSES), trained now when missing."""
    kd = float(what == "kd")
    flags = argparse.Namespace(**vars(common.only_flags(args, common.add_flags)), teacher=args.teacher, kd_weight=kd, ce_weight=1 - kd,
                               temperature=args.temperature, snapshot_at=[])
    run = student_folder(what, args, seed)
    total = common.total_steps(args, data)[1]
    steps = {percent: min(round(total * percent / 100), total - 1) for percent in args.percents}
    if what == "smooth":
        model = common.build_model(args.arch, data.classes, data.facts["image"], args.width, ("student", seed))

        def loss_fn(logits, labels, teacher_logits, ce_weight, kd_weight):
            return soft_loss(logits, smoothed(labels, data.classes, smoothing), args.temperature).mean()

        with common.locked(run):
            if common.start_run(run, flags, "student", seed, data, model, teacher_sha256=common.weights_hash(teacher),
                                targets="labels smoothed to the teacher's entropy"):   # the teacher and T say how much
                common.train(run, model, data, flags, "student", seed, loss_fn, lambda step: (1.0, 0.0), snapshots=set(steps.values()))
    else:
        source = common.TeacherLogits(teacher, data, args.precision) if kd else None
        common.run_jobs([functools.partial(train_student, run, flags, seed, data, source, snapshots=set(steps.values()))], args.device)
    files = {percent: run / f"snapshot-{step}.pt" for percent, step in steps.items()}
    missing = [file.name for file in files.values() if not file.exists()]
    if missing:
        raise common.InputError(f"{run} is finished but lacks {', '.join(missing)}: give another folder by --{what}, or train it again "
                                f"with --overwrite (train_student.py: and --snapshot-at {' '.join(f'{p / 100:g}' for p in args.percents)})")
    files[100] = run / "checkpoint.pt"
    probe, states = common.build_model(args.arch, data.classes, data.facts["image"], args.width), {0: None}
    for percent, file in files.items():
        states[percent] = common.load_checkpoint(file, data.device).get("model")
        try:
            probe.load_state_dict(states[percent])
        except (RuntimeError, TypeError, AttributeError) as error:
            raise common.InputError(f"{file} does not fit {args.arch} ({common.first_line(error)}): train that run again with --overwrite") from None
    return run, states


def smoothed(labels, classes, smoothing):
    """Smoothed one-hot targets [N, classes] of labels [N]."""
    return (1 - smoothing) * F.one_hot(labels, classes).float() + smoothing / classes


def measure_seed(args, seed, data):
    """One seed: its runs, and `measure` at all their checkpoints. Returns a dict; see the keys at its end."""
    runs = {"teacher": args.teacher.replace("{seed}", str(seed)) if args.teacher else teacher_run(args, seed, data, args.epochs)}
    for epochs in args.teacher_epochs:
        runs[f"teacher of {epochs} epochs"] = teacher_run(args, seed, data, epochs)
    teachers = {name: common.load_teacher(run, data) for name, run in runs.items()}
    all_logits = {name: common.logits_of(teacher, data, data.x_train) for name, teacher in teachers.items()}

    def softened(name, temperature):
        return F.softmax(all_logits[name] / temperature, 1)

    def matched_smoothing(temperature):
        entropy = torch.special.entr(softened("teacher", temperature).double()).sum(1).mean().item()
        return smoothing_of_entropy(entropy, data.classes)

    T, smoothing = args.temperature, {t: matched_smoothing(t) for t in {args.temperature, *args.temperatures}}
    states = {}
    for what in LOSSES:
        runs[what], states[what] = student_run(what, args, seed, data, teachers["teacher"], smoothing[T])

    # The points: all training images, or a random share of them, the same for every checkpoint and loss.
    chosen = torch.arange(len(data.y_train))
    if args.points and args.points < len(chosen):
        chosen = torch.randperm(len(chosen), generator=common.generator("points", seed))[:args.points].sort().values
    chosen = chosen.to(data.device)
    one_hot = lambda labels: F.one_hot(labels, data.classes).float()
    images = data.normalise(data.x_train).contiguous()
    test = slice(0, args.held_out or None)
    held_out = data.normalise(data.x_test[test]).contiguous(), one_hot(data.y_test[test])
    losses = {"onehot": (one_hot(data.y_train)[chosen], 1.0), "kd": (softened("teacher", T)[chosen], T),
              "smooth": (smoothed(data.y_train[chosen], data.classes, smoothing[T]), T)}
    variants = {}
    for t in args.temperatures:
        if t != T:
            variants[f"kd T={t:g}"] = (softened("teacher", t)[chosen], t)
            variants[f"smooth T={t:g}"] = (smoothed(data.y_train[chosen], data.classes, smoothing[t]), t)
    for name in list(teachers)[1:]:
        variants[f"kd, {name}"] = (softened(name, T)[chosen], T)

    teacher_logits = all_logits["teacher"][chosen].cpu().numpy()
    predicted = teacher_logits.argmax(1)
    x = phi_of_class(teacher_logits, predicted)
    quarter = (stats.rankdata(x, method="ordinal") - 1).astype(int) * 4 // len(x)   # hardness as in Figure 1a: lowest X
    groups = {name: quarter == k for k, name in enumerate(QUARTERS)}
    flipped = (data.y_train != data.y_clean)[chosen].cpu().numpy()
    if flipped.any():
        groups.update({"clean labels": ~flipped, "flipped labels": flipped})
    step_size = min(args.batch_size, len(data.y_train))
    rows = batch_weights(groups, step_size, args.batches, common.generator("denoise", seed))
    whole = {size: part for size, part in rows.items() if size not in groups}

    table = {}
    model = common.build_model(args.arch, data.classes, data.facts["image"], args.width, ("student", seed)).to(data.device)
    names = measured_parameters(model, args.max_parameters)
    for what in LOSSES:
        for percent, state in states[what].items():
            if percent == 0 and what != "onehot":   # the three runs start from the same parameters
                table[what, 0] = table["onehot", 0]
                continue
            if state is not None:
                model.load_state_dict(state)
            model.eval()
            here = {"smooth": losses["smooth"]} if what == "smooth" else losses
            common_arguments = model, names, images[chosen], held_out, (images, one_hot(data.y_clean))
            table[what, percent] = measure(*common_arguments, here, groups, rows, step_size, moves=what != "smooth")
            if percent == args.variants_at and what != "smooth":
                table[what, percent].update(measure(*common_arguments, variants, {}, whole, step_size, moves=False))

    file = runs["kd"] / "logits.npz"
    student = check_logits(common.read_npz(file, common.LOGITS)["train_logits"], file, all_logits["teacher"])[chosen.cpu().numpy()]
    return dict(table=table, x=x, gap=phi_of_class(student, predicted) - x, n=len(chosen), all_points=len(data.y_train), parameters=sum(
        dict(model.named_parameters())[name].numel() for name in names), all_parameters=sum(p.numel() for p in model.parameters()),
        smoothing=smoothing, accuracy={name: common.last_metrics(run)["test_acc"] for name, run in runs.items()})


# ---------------------------------------------------------------- claims


def shared_checkpoints(table):
    """The (run, percent) at which all losses were measured, the common start counted once."""
    return [key for key in table if key[0] != "smooth" and key != ("kd", 0)]


def log_ratio(a, b):
    """log of the ratio of two noise scales, from the statistics of two losses."""
    return math.log(max(a["noise_scale"], 1e-12) / max(b["noise_scale"], 1e-12))


def compare(seed, other):
    """The three comparisons of kd with the loss `other` in one seed; each is positive when kd is the less noisy."""
    table = seed["table"]
    return dict(i=np.mean([log_ratio(table[key][other], table[key]["kd"]) for key in shared_checkpoints(table)]),
                ii=np.mean([log_ratio(table[other, p][other], table["kd", p]["kd"]) for what, p in table if what == "kd" and p]),
                iii=np.mean([table[key]["kd"]["first_order"] - table[key][other]["first_order"] for key in shared_checkpoints(table)]),
                **{"iii, real steps": np.mean([table[key]["kd"]["decrease"] - table[key][other]["decrease"] for key in shared_checkpoints(table)])})


def reductions(onehot, kd):
    """Each point's reduction of the noise scale, [N], from the statistics of both losses, relative to their sum: -1..1 in total."""
    return (onehot["deviation"] - kd["deviation"]) / max(onehot["noise_scale"] + kd["noise_scale"], 1e-12)


def compare_hardest(seed):
    """The three comparisons on where the noise falls, in one seed; each is hardest − |rest|, the parts of the reduction that lie on
    the hardest quarter of points and on the others: positive when there is a reduction and more than half of it is on the hardest."""
    table = seed["table"]

    def hardest_minus_rest(values):
        hardest = np.argsort(seed["x"], kind="stable")[:math.ceil(len(values) / 4)]
        part = values[hardest].sum() / len(values)
        return part - abs(values.mean() - part)

    gain = lambda key, group: table[key]["kd"][f"cos_held_out {group}"] - table[key]["onehot"][f"cos_held_out {group}"]
    gains = [np.mean([gain(key, group) for key in shared_checkpoints(table)]) / 4 for group in QUARTERS]
    return dict(i=hardest_minus_rest(shared_reduction(seed)),
                ii=hardest_minus_rest(np.mean([reductions(table["onehot", p]["onehot"], table["kd", p]["kd"])
                                               for what, p in table if what == "kd" and p], 0)),
                iii=gains[0] - abs(sum(gains[1:])))


def shared_reduction(seed):
    """Each point's reduction [N], mean over the shared checkpoints."""
    return np.mean([reductions(seed["table"][key]["onehot"], seed["table"][key]["kd"]) for key in shared_checkpoints(seed["table"])], 0)


def link(seed):
    """Spearman correlations of each point's reduction with the student–teacher gap Y − X: plain, and with X held fixed."""
    ranks = np.stack([stats.rankdata(values) for values in (shared_reduction(seed), seed["gap"], seed["x"])])
    r = np.corrcoef(ranks)
    partial = (r[0, 1] - r[0, 2] * r[1, 2]) / math.sqrt((1 - r[0, 2] ** 2) * (1 - r[1, 2] ** 2))
    return dict(plain=float(r[0, 1]), given_x=float(partial))


def joint_claim(text, verdicts):
    """The row of a claim that counts only when all its comparisons agree: their common verdict, else "mixed"."""
    held = list(verdicts.values()).count("holds")
    row = common.claim(text, f"all {len(verdicts)} comparisons hold", held, held, held, len(verdicts) - 0.5,
                       note="; ".join(f"({key}) {verdict}" for key, verdict in verdicts.items()) + ". Measured: how many hold, without interval")
    return dict(row, verdict=next(iter(verdicts.values())) if len(set(verdicts.values())) == 1 else "mixed")


def denoise_claims(seeds):
    """Claims rows: three comparisons and their verdict for each claim, and the link to the student–teacher gap."""
    measures = {
        "KD gradients are less noisy than one-hot gradients": ([compare(seed, "onehot") for seed in seeds], (
            *["log ratio of noise scales, one-hot / KD"] * 2, *["decrease, share of steepest descent, KD minus one-hot"] * 2)),
        "most of the reduction is on hard points": ([compare_hardest(seed) for seed in seeds], (
            *["part on the hardest quarter minus the size of the rest"] * 2,
            "gain in first-order decrease of batches of the hardest quarter, minus the size of the others', weighted by points")),
        "the reduction is not explained by softness alone": ([compare(seed, "smooth") for seed in seeds], (
            *["log ratio of noise scales, smoothed / KD"] * 2, *["decrease, share of steepest descent, KD minus smoothed"] * 2)),
    }
    where = {"i": "shared parameters", "ii": "own runs at the same progress",
             "iii": "decrease of the clean held-out loss at shared parameters, short steps", "iii, real steps": "the same with real steps"}
    rows = []
    for text, (values, notes) in measures.items():
        parts = [common.claim(f"{text}: ({key}) {where[key]}", "> 0", *common.mean_interval([value[key] for value in values]), 0, note=note)
                 for key, note in zip(values[0], notes)]
        rows += [joint_claim(text, {key: part["verdict"] for key, part in zip(values[0], parts)}), *parts]
    links = [link(seed) for seed in seeds]
    for key, text in (("plain", ""), ("given_x", ", at the same teacher confidence X")):
        rows.append(common.claim(f"noise falls most where the student falls below its teacher{text}", "< 0",
                                 *common.mean_interval([value[key] for value in links]), 0, above=False,
                                 note="Spearman correlation of noise reduction and gap Y − X, training points"))
    return rows


# ---------------------------------------------------------------- output


def tables_of(seeds):
    """{run: {percent: {loss: {statistic: dict(value, low, high, seeds)}}}} over seeds."""
    tables = {}
    for (what, percent), losses in seeds[0]["table"].items():
        for loss, statistics in losses.items():
            entry = tables.setdefault(what, {}).setdefault(f"{percent:g}", {}).setdefault(loss, {})
            for key in statistics:
                if key != "deviation":
                    entry[key] = over_seeds([seed["table"][what, percent][loss][key] for seed in seeds])
    return tables


def over_seeds(values):
    return dict(zip(("value", "low", "high"), common.mean_interval(values)), seeds=[float(value) for value in values])


def averaged(seeds, loss, statistic, keys=None):
    """(mean, low, high) over seeds of a statistic's mean over the shared checkpoints, or over `keys`."""
    return common.mean_interval([np.mean([seed["table"][key][loss][statistic] for key in keys or shared_checkpoints(seed["table"])])
                                 for seed in seeds])


def noise_markdown(seeds):
    """Noise scale, alignment and decrease of every loss at every checkpoint, as a Markdown table of means over seeds."""
    text = "| run | progress | loss | noise scale | cosine with clean | with held-out | decrease ± sd of a batch |\n" + "|---" * 7 + "|\n"
    for (what, percent), losses in seeds[0]["table"].items():
        if percent == 0 and what != "onehot":
            continue
        for loss, statistics in losses.items():
            mean = {key: np.mean([seed["table"][what, percent][loss][key] for seed in seeds]) for key in statistics if key != "deviation"}
            fall = f"{mean['decrease']:.3f} ± {mean['decrease sd']:.3f}" if "decrease" in mean else "–"
            text += (f"| {what} | {percent:g}% | {loss} | {mean['noise_scale']:.1f} | {mean['cos_clean 64']:.3f} | "
                     f"{mean['cos_held_out 64']:.3f} | {fall} |\n")
    return text


def plot(seeds, args, folder):
    """One figure: noise scale over training, alignment against batch size, quarters, variants and the link to the gap."""
    plt = common.pyplot()
    colours, labels = dict(onehot="tab:red", kd="tab:blue", smooth="tab:grey"), dict(onehot="one-hot", kd="KD", smooth="smoothed labels")
    table = seeds[0]["table"]
    figure, axes = plt.subplots(3, 3, figsize=(15, 12), layout="constrained")

    def band(axis, x, values, loss):
        value, low, high = np.array(values).T
        axis.plot(x, value, "o-", color=colours[loss], label=labels[loss], ms=4)
        if len(seeds) > 1:
            axis.fill_between(x, low, high, color=colours[loss], alpha=0.15)

    percents = sorted({percent for what, percent in table if what == "kd"})
    for axis, (title, run_of) in zip(axes[0], (("at the one-hot run's parameters", lambda loss: "onehot"),
                                               ("at the KD run's parameters", lambda loss: "kd"), ("each loss along its own run", lambda loss: loss))):
        for loss in LOSSES:
            logs = [common.mean_interval([math.log(max(seed["table"][run_of(loss), p][loss]["noise_scale"], 1e-12)) for seed in seeds])
                    for p in percents]
            band(axis, percents, np.exp(logs), loss)
        axis.set(yscale="log", xlabel="share of training steps, %", ylabel="noise scale tr(Σ)/‖G‖²", title=f"Noise scale {title}")
    for axis, (statistic, name) in zip(axes[1], (("cos_clean", "clean training labels"), ("cos_held_out", "held-out images"))):
        for loss in LOSSES:
            band(axis, BATCH_SIZES, [averaged(seeds, loss, f"{statistic} {size}") for size in BATCH_SIZES], loss)
        axis.set(xscale="log", xticks=BATCH_SIZES, xticklabels=BATCH_SIZES, xlabel="batch size", ylabel="cosine with the reference gradient",
                 title=f"Alignment with the gradient on {name}")
        axis.minorticks_off()
    for loss in LOSSES:
        keys = lambda p: [(what, p) for what in ("onehot", "kd")]
        band(axes[1, 2], percents, [averaged(seeds, loss, "decrease", keys(p)) for p in percents], loss)
    axes[1, 2].axhline(0, color="black", lw=0.6)
    axes[1, 2].set(xlabel="share of training steps, %", ylabel="share of steepest descent",
                   title=f"Decrease of the clean held-out loss, batches of {args.batch_size}")

    groups = [key.removeprefix("noise ") for key in table["onehot", 0]["kd"] if key.startswith("noise ")]
    for k, loss in enumerate(LOSSES):
        # Geometric mean over checkpoints: late ones, whose noise scale is far larger, would drown the rest otherwise.
        share = lambda seed, key, group: seed["table"][key][loss][f"noise {group}"] / max(seed["table"][key]["onehot"]["noise_scale"], 1e-12)
        values = [common.mean_interval([np.exp(np.mean([math.log(max(share(seed, key, group), 1e-12)) for key in shared_checkpoints(table)]))
                                        for seed in seeds]) for group in groups]
        value, low, high = np.array(values).T
        error = np.where(np.isfinite(low), value - low, 0)
        axes[2, 0].bar(np.arange(len(groups)) + 0.27 * (k - 1), value, 0.25, yerr=error, color=colours[loss],
                       label=labels[loss], capsize=2 * (len(seeds) > 1))
    axes[2, 0].set(xticks=range(len(groups)), ylabel="noise relative to one-hot over all points",
                   title="Noise by teacher hardness and label, shared parameters")
    axes[2, 0].set_xticklabels([group.replace(" ", "\n") for group in groups], fontsize=8)

    at = [key for key in (("onehot", args.variants_at), ("kd", args.variants_at)) if key in table]
    names = [loss for loss in table[at[0]]]
    ratio = lambda seed, loss: np.mean([log_ratio(seed["table"][key]["onehot"], seed["table"][key][loss]) for key in at])
    value, low, high = np.array([common.mean_interval([ratio(seed, loss) for seed in seeds]) for loss in names]).T
    axes[2, 1].barh(range(len(names)), value, xerr=np.where(np.isfinite(low), value - low, 0), capsize=2 * (len(seeds) > 1),
                    color=["tab:red" if name == "onehot" else "tab:grey" if name.startswith("smooth") else "tab:blue" for name in names])
    accuracy = {name: np.mean([seed["accuracy"][name] for seed in seeds]) for name in seeds[0]["accuracy"]}
    full = lambda name: f"{name} T={args.temperature:g}" if name in ("kd", "smooth") else name
    shown = [full(name).replace(", ", "\n") + (f" ({100 * accuracy[name[4:]]:.0f}%)" if name[4:] in accuracy else "") for name in names]
    axes[2, 1].set(yticks=range(len(names)), xlabel="log ratio of noise scales, one-hot / this loss",
                   title=f"Temperatures and teachers (accuracy) at {args.variants_at:g}% of the steps")
    axes[2, 1].set_yticklabels(shown, fontsize=8)
    axes[2, 1].invert_yaxis()

    gap, reduction = np.concatenate([seed["gap"] for seed in seeds]), np.concatenate([shared_reduction(seed) for seed in seeds])
    axes[2, 2].scatter(gap, reduction, s=3, alpha=0.3, c=np.concatenate([seed["x"] for seed in seeds]), cmap="viridis", rasterized=True)
    axes[2, 2].axhline(0, color="black", lw=0.6)
    axes[2, 2].set(xlabel="student–teacher gap Y − X", ylabel="noise reduction of the point", 
                   title=f"Reduction against gap, Spearman {np.mean([link(seed)['plain'] for seed in seeds]):.2f} (colour: X)")
    axes[2, 2].set_yscale("symlog", linthresh=0.1)
    for axis in [*axes[0], *axes[1], axes[2, 0]]:
        axis.legend(fontsize=8)
    for axis in axes.flat:
        axis.title.set_fontsize(10)
    figure.suptitle(f"Gradient noise of one-hot, distilled and smoothed losses: {args.data}, {args.arch}, {len(seeds)} seeds; {approximation(seeds[0])}")
    common.save_figure(figure, folder, "denoise")


def approximation(seed):
    """In words, over what the gradients were taken."""
    if seed["parameters"] == seed["all_parameters"]:
        return f"exact gradients of all {seed['parameters']} parameters on {seed['n']} of {seed['all_points']} training images"
    return (f"approximation: gradients of only the last {seed['parameters']} of {seed['all_parameters']} parameters, "
            f"on {seed['n']} of {seed['all_points']} training images")


def main(argv=None):
    parser = common.Parser(__doc__)
    common.add_flags(parser, out_help="folder for the figure, statistics and claims (default: results/denoise)")
    add = parser.add_argument
    add("--runs", default="runs", help="folder in which run folders are looked for and made")
    add("--teacher", help="run folder of a finished teacher; {seed} in it stands for the seed (default: trained when missing)")
    for what in LOSSES:
        add(f"--{what}", help=f"run folder of the {what} student, made by this script; {{seed}} stands for the seed (default: in --runs, trained when missing)")
    add("--temperature", type=common.number(float, 0, 1e6, open_low=True), default=4.0, help="softens both teacher and student")
    add("--temperatures", type=common.number(float, 0, 1e6, open_low=True), nargs="*", default=[1, 2, 8], help="further temperatures, measured at --variants-at")
    add("--teacher-epochs", type=common.number(int, 1), nargs="*", help="further teachers, trained for so many epochs, measured at --variants-at (default: 4%% and 25%% of --epochs)")
    add("--percents", type=common.number(float, 0, 100, True, True), nargs="+", default=[5, 25, 50], help="shares of the steps at which to measure, besides 0 and 100")
    add("--variants-at", type=common.number(float, 0, 100), default=25, help="one of those, where further temperatures and teachers are measured")
    add("--points", type=common.number(int, 0), default=0, help="random training images with per-example gradients; 0 for all")
    add("--held-out", type=common.number(int, 0), default=2000, help="the first so many test images as held-out data; 0 for all")
    add("--batches", type=common.number(int, 2, 1000), default=8, help="mini-batches of each size")
    add("--max-parameters", type=common.number(int, 0), default=0, help="only the last parameter tensors that hold at most that many: an approximation for large nets; 0 for all")
    parser.set_defaults(seeds=[0, 1, 2, 3, 4], quiet=True, out="results/denoise")
    args = common.resolve(parser.parse_args(argv))
    if args.teacher_epochs is None:
        args.teacher_epochs = sorted({max(1, round(args.epochs * share)) for share in (0.04, 0.25)} - {args.epochs})
    if args.variants_at not in (0, 100, *args.percents):
        raise common.InputError(f"--variants-at {args.variants_at:g} is not measured: use 0, 100 or one of --percents "
                                f"{' '.join(f'{p:g}' for p in args.percents)}")
    if 0 < args.points < 8:
        raise common.InputError(f"--points {args.points} is too few for quarters: use 8 or more, or 0 for all")
    if args.stop_epoch:
        raise common.InputError("--stop-epoch does not go with teachers of several lengths: leave it out, and give --epochs")
    if max(args.teacher_epochs, default=0) >= args.epochs:
        raise common.InputError(f"--teacher-epochs {max(args.teacher_epochs)} must be less than --epochs {args.epochs}")
    data = common.data_from(args)
    if data.streams:
        raise common.InputError("the gradients are taken of images in memory: give --loader device, with a smaller --image-size or --subset if they do not fit")
    common.check_model(args, data)   # a wrong one fails before anything is discarded
    teachers = [Path(args.teacher.replace("{seed}", str(seed))) for seed in args.seeds] if args.teacher else []
    for run in sorted(set(teachers)):
        common.load_teacher(run, data)
    planned = [student_folder(what, args, seed) for seed in args.seeds for what in LOSSES]
    places, given = ({os.path.realpath(run) for run in group} for group in (planned, teachers))
    if len(places) < len(planned) or places & given:
        raise common.InputError("two runs share a folder: give --teacher, --onehot, --kd and --smooth different ones, with {seed} in each for several seeds")
    own = args.teacher_epochs + ([] if args.teacher else [args.epochs])
    common.discard_runs(args, planned + [teacher_folder(args, seed, epochs) for seed in args.seeds for epochs in own])
    Path(args.out).mkdir(parents=True, exist_ok=True)

    seeds = [measure_seed(args, seed, data) for seed in args.seeds]
    print(noise_markdown(seeds))
    accuracy = {name: over_seeds([seed["accuracy"][name] for seed in seeds]) for name in seeds[0]["accuracy"]}
    links = {key: over_seeds([link(seed)[key] for seed in seeds]) for key in ("plain", "given_x")}
    common.write_json(Path(args.out) / "denoise.json", dict(
        seeds=args.seeds, gradients=approximation(seeds[0]), accuracy=accuracy,
        smoothing=[seed["smoothing"] for seed in seeds], link=links, tables=tables_of(seeds)))
    common.save_claims(args.out, denoise_claims(seeds), f"Student's t over {len(seeds)} seeds")
    plot(seeds, args, args.out)


if __name__ == "__main__":
    common.cli(main)
