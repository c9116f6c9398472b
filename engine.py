"""Under every run: one training loop for images and text, exact resume, teachers and their logits, CUDA graphs.

`train` is the loop; its optimiser, batches, step and evaluation are arguments. `train_images` puts it together for the
networks of common.py. To change a loss, a model or a dataset you need not read this file.
"""

import io
import itertools
import math
import time
from pathlib import Path

import common
import runs
from runs import InputError

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

SAVE_SECONDS = 60  # a killed run loses at most that much; one that is interrupted saves first
# Images of a forward without a step: more leave a CPU's cache, and take up to twice the time.
FORWARD_BATCH = dict(cpu=128, cuda=1000)
NOT_SHOWN = ("step", "ce_weight", "kd_weight")  # of an epoch's line, on the screen
TABLE_BYTES = 2**32  # of a table of teacher logits: a fixed limit, so that a continued run chooses alike

# ---------------------------------------------------------------- device


def resolve(args):
    """Fill in what the flags left to the recipe and to the machine; returns args."""
    common.fill_recipe(args)
    for flag in ("arch", "mean", "std", "size"):  # of scripts that have these flags
        if getattr(args, f"teacher_{flag}", None) and not (args.teacher and args.teacher_arch):
            raise InputError(f"--teacher-{flag} is of a file of weights: give --teacher FILE and --teacher-arch too")
    use_machine(args, embedded=common.dataset_of(args.data).fp32)
    if args.fast is None:
        args.fast = args.device == "cuda"  # measured on a CPU: compiling gains nothing over channels_last and bf16
    return args


def use_machine(args, embedded):
    """Fill in --device and --precision: fp32 for embedded data, whose numbers stay the same on every CPU.

    Notes the losses, too, before the first run: the file may be edited while a command runs.
    """
    for loss in (common.one_hot_loss, common.student_loss):
        runs.source_of(loss)
    args.device = use_device(args.device)
    if args.precision == "auto":
        half = not embedded and (args.device == "cuda" or bf16_in_hardware())
        args.precision = "bf16" if half else "fp32"


def use_device(device):
    """cpu or cuda for a --device flag, with the settings of PyTorch that all runs on it share."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is visible; use --device cpu")
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: φ of a confident point needs all of its bits
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
    return device


def bf16_in_hardware():
    """Whether this CPU multiplies bf16 itself (AVX512-BF16 or AMX). Emulated, bf16 is slower than fp32."""
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(check() for check in checks if check)


# ---------------------------------------------------------------- measuring a model


@torch.no_grad()
def logits_of(model, data, images, precision="fp32"):
    """float32 logits [N, classes] of un-augmented uint8 images, in eval mode, computed in `precision`."""
    training = model.training
    model.eval()
    batch = FORWARD_BATCH[data.device.type]
    with autocast(data.device.type, precision):
        parts = [model(data.normalise(part)).float() for part in images.split(batch)]
    model.train(training)
    return torch.cat(parts)


def save_logits(run, model, data):
    """Write logits.npz, the arrays runs.LOGITS of un-augmented images; last, for it says that the run is finished."""
    train, test = (logits_of(model, data, images) for images in (data.x_train, data.x_test))
    values = (train, data.y_train, data.y_clean, data.index, test, data.y_test)
    arrays = {name: value.cpu().numpy() for name, value in zip(runs.LOGITS, values, strict=True)}
    runs.write_npz(run / "logits.npz", arrays)


def autocast(device_type, precision):
    # No cast cache: in a captured graph it would hand a later step the weights of an earlier one.
    return torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


# ---------------------------------------------------------------- teachers


def load_teacher(run, data, step=None):
    """The trained model of a finished run, in eval mode on data's device, at its end or as it was before a `step`.

    InputError when it was trained on other data than `data`, or when its test accuracy here is not what the run
    recorded (other weights, or another normalisation).
    """
    config = runs.finished_config(run)
    for key in ("classes", "image", "subset", "label_noise", "data_seed", "n_test", "sha256"):
        there, here = config["data"].get(key), data.facts[key]
        if there != here:
            fix = "give both the same --data, --subset, --label-noise and --data-seed"
            raise InputError(f"teacher {run} was trained on data with {key} {there}, the student's has {here}: {fix}")
    with runs.reading(f"{run}/config.json", "train that run again", run):
        arch, width = config["arch"], config["flags"]["width"]
        model = common.build_model(arch, data.classes, data.facts["image"], width)
    model = model.to(data.device)
    lines = runs.read_metrics(run)
    stopped = step is not None and step < lines[-1].get("step", 0)
    path = Path(run) / (f"snapshot-{step}.pt" if stopped else "checkpoint.pt")
    with runs.reading(path, f"it does not fit {arch}: {runs.train_again(run)}"):
        model.load_state_dict(runs.load_checkpoint(path, data.device)["model"])
    model = model.to(memory_format=torch.channels_last).eval()
    recorded = lines[-1].get("test_acc", math.nan)
    if stopped:  # None where that epoch was not evaluated
        recorded = {line.get("step"): line.get("test_acc") for line in lines}.get(step)
    measured = (logits_of(model, data, data.x_test).argmax(1) == data.y_test).double().mean().item()
    # Float noise between devices flips a few points, bf16 some more: only a run's end is evaluated in full precision.
    # Written so that a recorded NaN is refused too.
    tolerance = max(0.005 if stopped else 0.002, 2 / len(data.y_test)) + 1e-9
    if recorded is not None and not abs(measured - recorded) <= tolerance:
        what = f"teacher {run} has {100 * measured:.2f}% test accuracy here but recorded {100 * recorded:.2f}%"
        raise InputError(f"{what}: its checkpoint or the data has changed; {runs.train_again(run)}")
    return model


class TeacherFromElsewhere(nn.Module):
    """For batches of `data`, a classifier that was trained on images of another normalisation or size.

    mean, std: 1 or C numbers in 0..1 units (None: those of `data`); size: of the images' sides (None: as they are).
    """

    def __init__(self, model, data, mean=None, std=None, size=None):
        super().__init__()
        self.model = model
        self.size = size
        # x = (pixels − data.mean) / data.std is wanted as (pixels − mean) / std = scale·x + shift.
        own_mean, own_std = data.mean.cpu(), data.std.cpu()
        mean = torch.tensor(mean).float() if mean else own_mean
        std = torch.tensor(std).float() if std else own_std
        self.register_buffer("scale", (own_std / std).view(1, -1, 1, 1))
        self.register_buffer("shift", ((own_mean - mean) / std).view(1, -1, 1, 1))

    def forward(self, images):
        images = images * self.scale + self.shift
        if self.size and images.shape[-1] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        return self.model(images)


def read_state(file, wanted):
    """{name: tensor} of a file of weights: a state dict or a checkpoint that holds one. No code in it is run.

    A prefix under which all the names `wanted` are found is taken off; InputError when there are two.
    """
    with runs.reading(file, "give a state dict, as torch.save(model.state_dict(), FILE) writes it"):
        state = runs.load_tensors(file)
        for key in ("state_dict", "model_state_dict", "model", "net"):
            if isinstance(state, dict) and isinstance(state.get(key), dict):
                state = state[key]
        entries = state.items() if isinstance(state, dict) else ()
        if not entries or not all(isinstance(name, str) and torch.is_tensor(value) for name, value in entries):
            raise ValueError("it holds no state dict")
    names = [name for name in wanted if "num_batches_tracked" not in name]  # which old files lack
    ends = [name.removesuffix(names[0]) for name in state if f".{name}".endswith(f".{names[0]}")]
    prefixes = [prefix for prefix in ends if all(prefix + name in state for name in names)]
    if len(prefixes) > 1:
        found = " and ".join(repr(prefix) for prefix in prefixes)
        raise InputError(f"{file} holds the network more than once, under {found}: save the one that is meant alone")
    if prefixes and prefixes[0]:
        print(f"{file}: the weights under {prefixes[0]!r} are taken")
        state = {name.removeprefix(prefixes[0]): state[name] for name in state if name.startswith(prefixes[0])}
    return state


def load_weights(file, arch, data, mean=None, std=None, size=None):
    """A teacher from a file of weights, in eval mode on data's device: `TeacherFromElsewhere`.

    arch: one of common.ARCHS, or torchvision:<name>, which gets images of the mean, standard deviation and size of its
    own weights; mean, std and size say otherwise. InputError when file, architecture and classes do not fit together.
    """
    side, _, channels = data.facts["image"]
    for flag, values in (("--teacher-mean", mean), ("--teacher-std", std)):
        if values and len(values) not in (1, channels):
            raise InputError(f"{flag} has {len(values)} numbers: give 1, or {channels}, one for each channel")
    if bool(mean) != bool(std):
        raise InputError("--teacher-mean and --teacher-std belong together: give both, or neither")
    if arch.startswith("torchvision:") and not (mean and size):
        preset = common.torchvision_preprocessing(arch.removeprefix("torchvision:"))
        if not mean:
            mean, std = preset[:2]
        size = size or preset[2]
    model = common.build_model(arch, data.classes, [size or side, size or side, channels])
    try:
        model.load_state_dict(read_state(file, model.state_dict()))
    except RuntimeError as error:  # its first line names the class alone
        what = "; ".join(line.strip()[:120] for line in str(error).splitlines()[1:4])
        fix = f"check --teacher-arch and the number of classes ({data.classes} here)"
        raise InputError(f"{file} does not fit {arch} ({what}): {fix}") from None
    teacher = TeacherFromElsewhere(model, data, mean, std, size)
    shown = f"{size or side}×{size or side}"
    if size and size != side:
        shown += " by bilinear interpolation with antialias"
    means = " ".join(f"{number:.4g}" for number in mean or data.mean)
    stds = " ".join(f"{number:.4g}" for number in std or data.std)
    print(f"{file}: {arch} on images of mean {means}, std {stds}, size {shown}")
    return teacher.to(data.device).to(memory_format=torch.channels_last).eval()


def open_teacher(args, seed, data, trained=None):
    """`TeacherLogits` of one seed: of the flags of `common.add_teacher_flags`, else of the run folder `trained`.

    Prints what the teacher fits. InputError when it does not fit the data. A model of your own is to be loaded here.
    """
    if bool(args.teacher) + bool(args.teacher_logits) + bool(trained) != 1:
        raise InputError("give one of --teacher (a run folder, or weights) and --teacher-logits")
    name = str(trained)
    if not trained:
        name = (args.teacher or args.teacher_logits).replace("{seed}", str(seed))
    if args.teacher_logits or args.teacher_arch:
        return teacher_from_elsewhere(name, args, data)
    if Path(name).is_file():
        raise InputError(f"{name} is a file: give --teacher-arch too, what network its weights are of")
    teacher = TeacherLogits(load_teacher(name, data), data, args.precision, args.epochs, name)
    kept = runs.read_npz(Path(name) / "logits.npz", ("train_logits", "train_labels"))
    print(f"{name}: {runs.fit_note((kept['train_logits'].argmax(1) == kept['train_labels']).mean())}")
    return teacher


def teacher_from_elsewhere(name, args, data):
    """`TeacherLogits` of weights of --teacher-arch, or of logits [N, C]; InputError if it is no better than chance."""
    if args.teacher_arch:
        model = load_weights(name, args.teacher_arch, data, args.teacher_mean, args.teacher_std, args.teacher_size)
        teacher = TeacherLogits(model, data, args.precision, args.epochs, name)
        images = dict(train_logits=data.x_train, test_logits=data.x_test)
        teacher.logits = {key: logits_of(model, data, part) for key, part in images.items()}
        facts = {flag: getattr(args, flag) for flag in ("teacher_arch", "teacher_mean", "teacher_std")}
        teacher.facts.update(facts, teacher_size=model.size)
        fix = "check --teacher-arch, --teacher-mean, --teacher-std, --teacher-size and the order of its classes"
    else:
        logits = runs.check_logits(runs.read_array(name), name)
        if logits.shape != (len(data.y_train), data.classes):
            here = f"{len(data.y_train)} training images and {data.classes} classes here"
            raise InputError(f"{name} is {list(logits.shape)}: it must have the {here}, in their order")
        plain = torch.from_numpy(logits).float().to(data.device)
        teacher = TeacherLogits(None, data, name=name, plain=plain)
        teacher.logits = dict(train_logits=plain)
        teacher.facts.update(teacher_views="every view has the teacher logits of the un-augmented image")
        fix = "give the rows in the order of the un-augmented images"
    labels = dict(train=data.y_train.cpu().numpy(), test=data.y_test.cpu().numpy())
    for key, logits in teacher.logits.items():
        split = key.removesuffix("_logits")
        if not torch.isfinite(logits).all():
            raise InputError(f"{name} gives NaN or infinite logits: {fix}")
        accuracy, chance, above = runs.agreement(logits.argmax(1).cpu().numpy(), labels[split], data.classes)
        if not above:
            found = f"{100 * accuracy:.1f}% of the {split} labels, chance {100 * chance:.1f}%"
            raise InputError(f"{name} is no better than chance here ({found}): {fix}")
        teacher.facts[f"teacher_{split}_acc"] = accuracy
    print(f"{name}: {runs.fit_note(teacher.facts['teacher_train_acc'])}")
    return teacher


class TeacherLogits:
    """The teacher_logits [B, C] of training batches: from a teacher forward in every step, or from a table.

    The table [N, n_views, C], of every view of every image, is made when it is first needed, where a run of `epochs`
    would take more passes of the teacher than there are views, and where it takes at most TABLE_BYTES. It holds the
    logits of a forward, up to the rounding of convolutions over batches of other sizes.
    plain: in place of a model, logits [N, C] of the un-augmented images, which serve for every view. name and facts
    tell config.json which teacher it is. logits: those of a teacher from elsewhere.
    """

    def __init__(self, model, data, precision="fp32", epochs=0, name="", plain=None):
        self.model = self.forward_model = model
        self.data = data
        self.precision = precision
        self.name = str(name)
        self.table = None if plain is None else plain[:, None]  # [N, views, C]; of plain logits one for all views
        bytes_each = 2 if precision == "bf16" else 4
        size = len(data.y_train) * data.n_views * data.classes * bytes_each
        self.all_views = plain is None and epochs > data.n_views and size <= TABLE_BYTES
        self.sha256 = runs.weights_hash(dict(logits=plain) if model is None else model.state_dict())
        self.facts = dict(teacher=self.name, teacher_sha256=self.sha256)
        self.logits = {}

    def __call__(self, images, index, view):
        """float32 logits [B, C] of `images`, the training images `index` [B] in the views `view` [B]."""
        if self.table is None:
            return self._forward(images).float()
        return self.table[index, view % self.table.shape[1]].float()

    @torch.no_grad()
    def _forward(self, images):
        """Logits in the precision that the model gives them: float32, or bfloat16 under autocast."""
        with autocast(images.device.type, self.precision):
            return self.forward_model(images)

    def ready(self):
        """Fill the table, where there is to be one: before the first step that needs it, outside of a CUDA graph."""
        if not self.all_views or self.table is not None:
            return
        data = self.data
        views = data.n_views
        rows = torch.arange(len(data.y_train) * views, device=data.device)
        table = None
        for chunk in rows.split(max(1, 5000 // views) * views):  # of whole images
            batches = chunk.split(FORWARD_BATCH[data.device.type])
            part = torch.cat([self._forward(data.batch(row // views, row % views)) for row in batches])
            if table is None:
                table = part.new_empty(len(rows), part.shape[1])
            table[chunk] = part
        self.table = table.view(len(data.y_train), views, -1)


# ---------------------------------------------------------------- the loop


def save_state(path, model, optimizer, **progress):
    """Write all that `restore_state` needs to go on exactly: weights, optimiser, random states, and `progress`."""
    state = dict(progress, model=model.state_dict(), optimizer=optimizer.state_dict(), rng=torch.get_rng_state())
    if next(model.parameters()).is_cuda:
        state["cuda_rng"] = torch.cuda.get_rng_state()  # of this device alone: another machine may have fewer
    file = io.BytesIO()
    torch.save(state, file)
    runs.write_atomic(path, file.getvalue())


def restore_state(source, model, optimizer, per_epoch, total, device):
    """Load what `save_state` wrote; returns (step, history, spent, sums). InputError when it does not fit the run."""
    with runs.reading(source, "it does not fit this run: discard it with --overwrite"):
        state = runs.load_checkpoint(source, device)
        model.load_state_dict(state["model"])
        groups = optimizer.state_dict()["param_groups"]  # these are of the flags
        optimizer.load_state_dict(dict(state["optimizer"], param_groups=groups))
        step, history = state["step"], state["history"]
        if not isinstance(step, int) or not 0 <= step <= total or len(history) != step // per_epoch:
            raise ValueError(f"step {step} of {total} with {len(history)} epochs of metrics")
        torch.set_rng_state(state["rng"].cpu())
        if device.type == "cuda" and "cuda_rng" in state:
            torch.cuda.set_rng_state(state["cuda_rng"].cpu())
        return step, history, float(state["spent"]), state["sums"].reshape(3).double()


def train(
    run, args, model, optimizer, per_epoch, batches, take_step, sums, rates, evaluate, keep=(), start=None, amount=None
):
    """The training loop: `model` in the run folder `run`, from its checkpoint if it has one, to its end.

    per_epoch: steps in each of args.epochs; batches(epoch) -> list of that many; take_step(batch, ce_weight,
    kd_weight): one optimiser step that adds the loss times n, the hits and n to `sums` [3]; rates(step) -> (lr,
    ce_weight, kd_weight); evaluate(epoch, at_end) -> {name: number} for the epoch's line; keep: steps before which the
    state is kept as snapshot-<step>.pt; start: a checkpoint to begin with when the folder has none; amount: (unit, how
    many an epoch), by default images. SIGINT or SIGTERM saves and exits 130; on a CPU the continued run ends in the
    same weights, bit for bit.
    """
    total = per_epoch * args.epochs
    checkpoint = run / "checkpoint.pt"
    step = 0
    history = []
    spent = 0.0
    source = checkpoint if checkpoint.exists() else start
    if source is not None:
        step, history, spent, counted = restore_state(source, model, optimizer, per_epoch, total, sums.device)
        sums.copy_(counted)
        if source == checkpoint and step < total and not args.quiet:
            print(f"{run}: continuing at step {step} of {total}")
    saved = time.monotonic()

    def save(path):
        check_finite(run, args, step, model, sums)
        seconds = spent + time.perf_counter() - started
        save_state(path, model, optimizer, step=step, history=history, sums=sums, spent=seconds)

    bar = tqdm(total=total, initial=step, desc=run.name, unit="step", disable=args.quiet or None)
    with bar, runs.interruptible() as stop:
        for epoch in range(step // per_epoch, args.epochs):
            todo = batches(epoch)[step % per_epoch :]
            model.train()
            started = time.perf_counter()
            for batch in todo:
                lr, ce_weight, kd_weight = rates(step)
                set_learning_rate(optimizer, lr)
                if step in keep:  # with this step's rate, also where the run was continued just here
                    save(run / f"snapshot-{step}.pt")
                take_step(batch, ce_weight, kd_weight)
                step += 1
                bar.update()
                if step % per_epoch and (stop or time.monotonic() - saved > SAVE_SECONDS):
                    save(checkpoint)
                    saved = time.monotonic()
                if stop:
                    break
            if step % per_epoch == 0:
                line = dict(epoch=epoch + 1, step=step, lr=lr, ce_weight=ce_weight, kd_weight=kd_weight)
                line.update(progress(sums, spent, started, amount))
                line.update(evaluate(epoch + 1, step == total))
                check_finite(run, args, step, model, sums, line)
                history.append(line)
                runs.write_metrics(run, history)
                if not args.quiet:
                    bar.write("  ".join(f"{key} {line[key]:.4g}" for key in line if key not in NOT_SHOWN))
                sums.zero_()
                spent, started = 0.0, time.perf_counter()
                if stop or time.monotonic() - saved > SAVE_SECONDS or step == total:
                    save(checkpoint)
                    saved = time.monotonic()
            if stop:
                print(f"{run}: saved at step {step} of {total}")
                runs.exit_interrupted()
    runs.write_metrics(run, history)
    last = history[-1]
    seconds = sum(line["seconds"] for line in history)
    test = f"test {100 * last['test_acc']:.2f}%, " if "test_acc" in last else ""
    print(f"{run}: {test}train {100 * last['train_acc']:.2f}%, {seconds:.0f} s")


def progress(sums, spent, started, amount):
    """What an epoch's line says of its training; amount: see `train`."""
    loss, hits, seen = sums.tolist()  # waits for the device, so that the time is its own
    seconds = spent + time.perf_counter() - started
    unit, count = amount or ("images", seen)
    means = dict(train_loss=loss / seen, train_acc=hits / seen, seconds=round(seconds, 3))
    return {**means, f"{unit}_per_s": round(count / seconds, 1)}


def set_learning_rate(optimizer, lr):
    """In place where the rate lies in a device tensor, which a CUDA graph reads."""
    for group in optimizer.param_groups:
        if torch.is_tensor(group["lr"]):
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def check_finite(run, args, step, model, sums, line=None):
    """InputError when the loss, the weights or a number of the epoch's `line` is NaN or infinite."""
    # Weights and outputs too: the loss of a step is older than what the step did to them.
    values = torch.stack([sums[0], *(p.detach().double().sum() for p in model.parameters())])
    if not torch.isfinite(values).all() or not all(map(math.isfinite, (line or {}).values())):
        fix = f"lower --lr (now {args.lr:g}) or lengthen --warmup, and discard this run with --overwrite"
        what = f"the loss or the weights became NaN or infinite by step {step} of {run}"
        raise InputError(f"{what}: {fix} (its last good checkpoint is kept)")


# ---------------------------------------------------------------- steps


def optimiser_step(model, optimizer, loss_of, sums, clip=None):
    """take_step(batch, ce_weight, kd_weight) for `train`. loss_of(the same) -> (scalar loss, hits, how many)."""
    loss_sum, hit_sum, count = sums.unbind()

    def take_step(batch, ce_weight, kd_weight):  # nothing in it waits for the device
        loss, hits, n = loss_of(batch, ce_weight, kd_weight)
        optimizer.zero_grad()
        loss.backward()
        if clip:  # the largest norm of the gradient
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        loss_sum.add_(loss.detach(), alpha=n)
        hit_sum.add_(hits)
        count.add_(n)

    return take_step


def captured_step(take_step, model, optimizer, batch_size, sums):
    """`take_step` as CUDA graphs, with and without the teacher: a step is then one launch instead of a thousand.

    Batches (index, view) and loss weights lie in device tensors that are filled before each replay, and the learning
    rate of the optimizer must be a device tensor, so schedules, switches and epochs need no new capture.
    """
    static = [torch.zeros(batch_size, dtype=torch.long, device=sums.device) for _ in range(2)]
    ce_weight, kd_weight = torch.zeros(2, device=sums.device).unbind()
    graphs = {}
    # A stream of its own for warm-up and capture: cuBLAS keeps a workspace for each stream, and on torch's one default
    # capture stream a graph that is destroyed would free it under the others (pytorch#193402).
    stream = torch.cuda.Stream()

    def changed():  # by a step; before the first one there are no momentum buffers
        momentum = [state.get("momentum_buffer") for state in optimizer.state.values()]
        return [*model.state_dict().values(), sums, *(buffer for buffer in momentum if buffer is not None)]

    def capture(distils):
        weights = (ce_weight, kd_weight if distils else 0.0)
        before = [value.clone() for value in changed()]
        # Warm-up steps compile and allocate; what they changed is put back.
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                take_step(static, *weights)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            take_step(static, *weights)
        with torch.no_grad():
            for value, old in itertools.zip_longest(changed(), before):
                if old is None:  # momentum that began in the warm-up
                    value.zero_()
                else:
                    value.copy_(old)
        return graph

    def replay(batch, new_ce_weight, new_kd_weight):
        distils = bool(new_kd_weight)
        for buffer, new in zip(static, batch, strict=True):
            buffer.copy_(new)
        ce_weight.fill_(new_ce_weight)
        kd_weight.fill_(new_kd_weight)
        if distils not in graphs:
            graphs[distils] = capture(distils)
        graphs[distils].replay()

    return replay


# ---------------------------------------------------------------- images


def evaluated(epoch, args, data):
    """Whether the test images are evaluated after that epoch (from 1).

    By --eval-every, else after the first, the last, and evenly between.
    """
    if args.eval_every:
        return epoch % args.eval_every == 0
    # 20 times in a run, or as often as 4% of its time allow: an evaluated image takes a third of a trained one's. Five
    # times at least, for the curves.
    affordable = round(0.04 * 3 * args.epochs * len(data.y_train) / len(data.y_test))
    times = max(5, min(20, affordable))
    part = epoch * times // args.epochs
    part_before = (epoch - 1) * times // args.epochs
    return epoch == 1 or part > part_before


def image_loss(network, data, loss_fn, teacher, args):
    """loss_of(batch, ce_weight, kd_weight) of `optimiser_step` for batches (index [B], view [B]) of `data`."""

    def loss_of(batch, ce_weight, kd_weight):
        index, view = batch
        images, labels = data.batch(index, view), data.y_train[index]
        distils = torch.is_tensor(kd_weight) or kd_weight > 0  # a tensor in a CUDA graph that distils
        teacher_logits = teacher(images, index, view) if distils else None
        with autocast(images.device.type, args.precision):
            loss, logits = loss_fn(network, images, labels, teacher_logits, ce_weight, kd_weight, args)
        return loss, (logits.detach().argmax(1) == labels).sum(), len(index)

    return loss_of


def one_hot(step):
    """The weights_at of one-hot training throughout."""
    return 1.0, 0.0


def train_images(
    run, model, data, args, role, seed, loss_fn, weights_at=one_hot, teacher=None, snapshots=(), start=None
):
    """Train `model` in the run folder `run` and leave its logits.npz there.

    loss_fn(model, images, labels, teacher_logits, ce_weight, kd_weight, args) -> (scalar loss, logits [B, C]), where
    teacher_logits is None whenever kd_weight is 0, and the weights may be tensors; weights_at(step) -> (ce_weight,
    kd_weight); teacher: `TeacherLogits`, or None without distillation; snapshots, start: `keep` and `start` of `train`.
    """
    per_epoch, _ = common.total_steps(args, data)
    batch = min(args.batch_size, len(data.y_train))
    device = torch.device(args.device)
    model = model.to(device).to(memory_format=torch.channels_last)
    network = model
    lr = args.lr
    graphs = args.fast and device.type == "cuda"
    if graphs:
        lr = torch.tensor(args.lr, device=device)  # which the captured step reads
    if args.fast:
        network = torch.compile(model)
        if teacher and teacher.model:
            teacher.forward_model = torch.compile(teacher.model)
    more = dict(weight_decay=args.weight_decay, nesterov=args.momentum > 0, fused=True)
    optimizer = torch.optim.SGD(model.parameters(), lr, args.momentum, **more)
    torch.manual_seed(common.stream_seed("dropout", role, seed))  # drawn from by dropout alone
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    take_step = optimiser_step(model, optimizer, image_loss(network, data, loss_fn, teacher, args), sums)
    if graphs:
        take_step = captured_step(take_step, model, optimizer, batch, sums)

    def batches(epoch):
        order, views = (part.to(device) for part in common.epoch_stream(data, role, seed, epoch))
        return [(index, views[index]) for index in order[: per_epoch * batch].split(batch)]

    def step_with_teacher(batch, ce_weight, kd_weight):
        if kd_weight:
            teacher.ready()  # outside of the graph
        take_step(batch, ce_weight, kd_weight)

    def evaluate(epoch, at_end):
        if not at_end and not evaluated(epoch, args, data):
            return {}
        precision = "fp32" if at_end else args.precision  # what it ends with is quoted, and compared by load_teacher
        logits = logits_of(model, data, data.x_test, precision=precision)
        accuracy = (logits.argmax(1) == data.y_test).double().mean().item()
        return dict(test_loss=F.cross_entropy(logits, data.y_test).item(), test_acc=accuracy)

    def rates(step):
        return common.learning_rate(step, args, per_epoch), *weights_at(step)

    train(run, args, model, optimizer, per_epoch, batches, step_with_teacher, sums, rates, evaluate, snapshots, start)
    save_logits(run, model, data)


def check_folders(networks, args, data):
    """InputError, before hours of training, when a run folder that will be trained holds a run of other flags or data.

    networks: for each of args.seeds its folders {"teacher", "onehot" (the control), "kd" or "student": run folder}; a
    given teacher is not trained. What a run's teacher and loss are is compared when its turn comes.
    """
    given = vars(args).get("teacher") or vars(args).get("teacher_logits")
    for seed, folders in zip(args.seeds, networks, strict=True):
        if "teacher" in folders and not given:
            runs.check_planned(folders["teacher"], common.only_flags(args, common.add_flags), "teacher", seed, data)
        for name in ("onehot", "kd", "student"):
            if name in folders:
                flags = common.only_flags(args, common.add_flags, common.add_student_flags)
                if name == "onehot":
                    flags = common.one_hot_flags(flags)
                if not flags.kd_weight:
                    flags.temperature = None  # one control serves all temperatures
                runs.check_planned(folders[name], flags, "student", seed, data)


def train_teacher(run, args, seed, data):
    """Train a teacher on one-hot labels in the folder `run`, unless it is finished; args: all flags of a script."""
    args = common.only_flags(args, common.add_flags)
    loss_fn = common.one_hot_loss
    model = common.build_model(args.arch, data.classes, data.facts["image"], args.width, ("teacher", seed))
    with runs.locked(run):
        if runs.start_run(run, args, "teacher", seed, data, model, loss=runs.source_of(loss_fn)):
            kept = common.snapshot_steps(args, data)
            train_images(run, model, data, args, "teacher", seed, loss_fn, snapshots=kept)


def train_student(run, args, seed, data, loss_fn, teacher=None, weights_at=None, snapshots=(), start=None, **facts):
    """Train one student in the run folder `run`, unless it is finished already.

    args: all flags of a script; weights_at: by default the two flags throughout; facts go into config.json and are
    compared; all else: see `train_images`. Students of one seed share initialisation, order and views with each other,
    but not with a teacher of that seed.
    """
    args = common.only_flags(args, common.add_flags, common.add_student_flags)
    if not teacher and not args.kd_weight:
        args.temperature = None  # no distillation term: one control serves all temperatures
    known = dict(teacher_sha256=None, loss=runs.source_of(loss_fn))
    if teacher:
        known.update(teacher.facts)
    known.update(facts)

    def flags_throughout(step):
        return args.ce_weight, args.kd_weight

    weights_at = weights_at or flags_throughout
    model = common.build_model(args.arch, data.classes, data.facts["image"], args.width, ("student", seed))
    with runs.locked(run):
        if runs.start_run(run, args, "student", seed, data, model, **known):
            if teacher and teacher.logits:  # for Figure 1a, which finds no run folder of this teacher
                runs.write_npz(run / "teacher.npz", {key: value.cpu().numpy() for key, value in teacher.logits.items()})
            train_images(run, model, data, args, "student", seed, loss_fn, weights_at, teacher, snapshots, start)
