"""Under every run: one training loop for images and text, exact resume, teacher logits, CUDA graphs, processes.

`train` is the loop; its optimiser, batches, step and evaluation are arguments. `train_images` puts it together for the
networks of common.py. To change a loss, a model or a dataset you need not read this file.
"""

import contextlib
import hashlib
import math
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import claims
import common
import runs
from runs import InputError

SAVE_SECONDS = 60  # a killed run loses at most that much; one that is interrupted saves first
# Images of a forward without a step: more leave a CPU's cache, and take up to twice the time.
FORWARD_BATCH = dict(cpu=128, cuda=1000)
LOGITS = ("train_logits", "train_labels", "train_clean_labels", "train_index", "test_logits", "test_labels")

# ---------------------------------------------------------------- device and processes


def resolve(args, distributed=False):
    """Fill in what the flags left to the recipe and to the machine; returns args. distributed: see `use_device`."""
    common.fill_recipe(args)
    args.device = use_device(args.device, distributed)
    if args.precision == "auto":
        # Small images (digits) are faster in fp32, and their numbers stay the same on every CPU.
        half = (args.device == "cuda" or bf16_in_hardware()) and not common.dataset_of(args.data).fp32
        args.precision = "bf16" if half else "fp32"
    if args.fast is None:
        args.fast = args.device == "cuda"  # measured on a CPU: compiling gains nothing over channels_last and bf16
    return args


def use_device(device, distributed=False):
    """cpu or cuda for a --device flag, with the settings of PyTorch that all runs on it share.

    Under torchrun it joins the processes, or refuses where the script is not `distributed`.
    """
    rank, world = runs.ranks()
    if world > 1 and not distributed:
        raise InputError("torchrun is for train_teacher.py and train_student.py alone: start this script without it")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is visible; use --device cpu")
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = False  # fp32 means fp32: φ of a confident point needs all of its bits
        torch.backends.cudnn.benchmark = True  # every batch has the same shape
    if world > 1 and not torch.distributed.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        if rank:
            sys.stdout = open(os.devnull, "w")  # the first process speaks for all
    return device


def bf16_in_hardware():
    """Whether this CPU multiplies bf16 itself (AVX512-BF16 or AMX). Emulated, bf16 is slower than fp32."""
    checks = (getattr(torch.cpu, f"_is_{name}_supported", None) for name in ("avx512_bf16", "amx_tile"))
    return any(check() for check in checks if check)


def shard_of(args):
    """The seeds of this --shard."""
    first, every = args.shard
    if not args.seeds[first::every]:
        print(f"shard {first}/{every}: no seed is left for it")
    return args.seeds[first::every]


def only_a_shard(args):
    """Whether this command has some of the seeds alone, so that it draws nothing; says how to go on then."""
    if args.shard != (0, 1) and not args.quiet:
        print("this shard is trained; when all are, the same command without --shard makes the tables and figures")
    return args.shard != (0, 1)


def run_jobs(args):
    """With --jobs N, train this shard's seeds in N processes side by side. Afterwards they are finished.

    Such a process is this command with a --shard of its own, every N-th of the seeds, and cores/N threads. SIGINT and
    SIGTERM reach all of them: each saves, and this one exits 130.
    """
    first, every = args.shard
    jobs = min(args.jobs, len(args.seeds[first::every]))
    if jobs < 2:
        return
    if runs.ranks()[1] > 1:
        raise InputError("--jobs trains seeds in processes of their own: leave it out under torchrun")
    # Without --overwrite, which was done, once for all.
    words = [sys.executable, *(word for word in sys.argv if word != "--overwrite"), "--jobs", "1"]
    words += ["--quiet"] * ("quiet" in args)
    threads = {"OMP_NUM_THREADS": str(max(1, common.cores() // jobs))} | os.environ
    shards = [f"{first + k * every}/{jobs * every}" for k in range(jobs)]
    sys.stdout.flush()
    told = False
    with runs.interruptible() as stop:
        processes = [subprocess.Popen([*words, "--shard", shard], env=threads) for shard in shards]
        while any(process.poll() is None for process in processes):
            time.sleep(0.1)
            if stop and not told:  # once: a second signal would meet a process that is saving
                told = True
                for process in processes:
                    process.terminate()
    codes = [process.returncode for process in processes]
    if stop or 130 in codes:
        runs.exit_interrupted()
    if 2 in codes:  # that process has said why
        raise SystemExit(2)
    if any(codes):
        code = f"code {max(codes, key=abs)} (killed, perhaps for lack of memory)"
        raise InputError(f"one of the --jobs ended with {code}: the same command goes on from what is finished")


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
    """Write logits.npz, the arrays LOGITS of un-augmented images; last, for it says that the run is finished."""
    train, test = (logits_of(model, data, images) for images in (data.x_train, data.x_test))
    values = (train, data.y_train, data.y_clean, data.index, test, data.y_test)
    arrays = {name: value.cpu().numpy() for name, value in zip(LOGITS, values, strict=True)}
    runs.write_npz(run / "logits.npz", arrays)


def load_teacher(run, data, step=None):
    """The trained model of a finished run, in eval mode on data's device, checked against `data`.

    step: as the run was before that step, from its snapshot; None: at its end. InputError when its classes, data,
    subset or label noise differ from `data`, or when its test accuracy here is not what the run recorded (other
    weights, or another normalisation).
    """
    config = runs.finished_config(run)
    for key in ("classes", "image", "subset", "label_noise", "data_seed", "n_test", "sha256"):
        there, here = config["data"].get(key), data.facts[key]
        if there != here:
            fix = "give both the same --data, --subset, --label-noise and --data-seed"
            raise InputError(f"teacher {run} was trained on data with {key} {there}, the student's has {here}: {fix}")
    with runs.reading(f"{run}/config.json", "restore it, or train again with --overwrite"):
        arch, width = config["arch"], config["flags"]["width"]
        model = common.build_model(arch, data.classes, data.facts["image"], width)
    model = model.to(data.device)
    lines = runs.read_metrics(run)
    last_step = lines[-1].get("step", 0)
    stopped = step is not None and step < last_step
    path = Path(run) / (f"snapshot-{step}.pt" if stopped else "checkpoint.pt")
    if stopped and not path.exists():
        fix = f"train that run again with --overwrite --snapshot-at {step / last_step:g}"
        raise InputError(f"{path} does not exist: {fix}")
    with runs.reading(path, f"it does not fit {arch}: train that run again with --overwrite"):
        model.load_state_dict(runs.load_checkpoint(path, data.device)["model"])
    model = model.to(memory_format=torch.channels_last).eval()
    by_step = {line.get("step"): line.get("test_acc") for line in lines}
    recorded = by_step.get(step) if stopped else runs.last_metrics(run)["test_acc"]
    measured = (logits_of(model, data, data.x_test).argmax(1) == data.y_test).double().mean().item()
    # Float noise between devices flips a few points, bf16 some more: only a run's end is evaluated in full precision.
    # Written so that a recorded NaN is refused too.
    tolerance = max(0.005 if stopped else 0.002, 2 / len(data.y_test)) + 1e-9
    if recorded is not None and not abs(measured - recorded) <= tolerance:
        what = f"teacher {run} has {100 * measured:.2f}% test accuracy here but recorded {100 * recorded:.2f}%"
        raise InputError(f"{what}: its checkpoint or the data has changed; train it again")
    return model


def teacher_fit(run):
    """`claims.fit_note` of a finished run: how much of its training labels it fits, and what that means."""
    arrays = runs.read_npz(Path(run) / "logits.npz", ("train_logits", "train_labels"))
    return claims.fit_note((arrays["train_logits"].argmax(1) == arrays["train_labels"]).mean())


class TeacherFromElsewhere(nn.Module):
    """A classifier that was trained on images of another normalisation or size, for batches of `data`.

    mean, std: what it was trained with, 1 or C numbers in 0..1 units (None: those of `data`); size: the side that
    images are resized to, on the device (None: as they are).
    """

    def __init__(self, model, data, mean=None, std=None, size=None):
        super().__init__()
        self.model, self.size = model, size
        # x = (pixels − data.mean) / data.std is wanted as (pixels − mean) / std = scale·x + shift.
        own_mean, own_std = data.mean.cpu(), data.std.cpu()
        mean, std = (torch.tensor(mean).float(), torch.tensor(std).float()) if mean else (own_mean, own_std)
        self.register_buffer("scale", (own_std / std).view(1, -1, 1, 1))
        self.register_buffer("shift", ((own_mean - mean) / std).view(1, -1, 1, 1))

    def forward(self, images):
        images = images * self.scale + self.shift
        if self.size and images.shape[-1] != self.size:
            images = F.interpolate(images, size=(self.size, self.size), mode="bilinear", antialias=True)
        return self.model(images)


def read_state(file):
    """{name: tensor} of a file of weights: a state dict or a checkpoint that holds one. No code in it is run."""
    with runs.reading(file, "give a state dict, as torch.save(model.state_dict(), FILE) writes it"):
        state = runs.load_tensors(file)
        for key in ("state_dict", "model_state_dict", "model", "net"):
            state = state[key] if isinstance(state, dict) and isinstance(state.get(key), dict) else state
        if not isinstance(state, dict) or not state or not all(map(torch.is_tensor, state.values())):
            raise ValueError("it holds no state dict")
    return {re.sub(r"^((module|_orig_mod)\.)+", "", name): value for name, value in state.items()}


def load_weights(file, arch, data, mean=None, std=None, size=None):
    """A teacher from a file of weights, in eval mode on data's device: `TeacherFromElsewhere`.

    arch: one of common.ARCHS, or torchvision:<name>, which gets images of its own size unless `size` is given.
    InputError when file, architecture and classes do not fit together.
    """
    side, _, channels = data.facts["image"]
    for flag, values in (("--teacher-mean", mean), ("--teacher-std", std)):
        if values and len(values) not in (1, channels):
            raise InputError(f"{flag} has {len(values)} numbers: give 1, or {channels}, one for each channel")
    if bool(mean) != bool(std):
        raise InputError("--teacher-mean and --teacher-std belong together: give both, or neither")
    if arch.startswith("torchvision:") and not size:
        size = common.torchvision_size(arch.removeprefix("torchvision:"))
    model = common.build_model(arch, data.classes, [size or side, size or side, channels])
    state, wanted, wrong = read_state(file), model.state_dict(), []
    for name in sorted(state.keys() | wanted.keys()):
        there, here = (list(part[name].shape) if name in part else "missing" for part in (state, wanted))
        if there != here and not (there == "missing" and "num_batches_tracked" in name):  # which old files lack
            wrong.append(f"{name} is {there} there and {here} here")
    if wrong:
        more = f"; and {len(wrong) - 3} more" if len(wrong) > 3 else ""
        fix = f"check --teacher-arch and the number of classes ({data.classes} here)"
        raise InputError(f"{file} does not fit {arch} ({'; '.join(wrong[:3])}{more}): {fix}")
    model.load_state_dict(state, strict=False)
    teacher = TeacherFromElsewhere(model, data, mean, std, size)
    return teacher.to(data.device).to(memory_format=torch.channels_last).eval()


def check_above_chance(name, logits, labels, fix):
    """Accuracy of logits [N, C] from elsewhere; InputError when they are not finite, or no better than chance."""
    if not torch.isfinite(logits).all():
        raise InputError(f"{name} gives NaN or infinite logits: {fix}")
    predicted = logits.argmax(1).cpu().numpy()
    accuracy, chance, above = claims.agreement(predicted, labels.cpu().numpy(), logits.shape[1])
    if not above:
        found = f"{100 * accuracy:.1f}%, chance {100 * chance:.1f}%"
        raise InputError(f"{name} is no better than chance here ({found}): {fix}")
    return accuracy


# ---------------------------------------------------------------- teacher logits


class TeacherLogits:
    """The teacher_logits [B, C] of training batches: from a teacher forward in every step, or looked up in a table.

    source "live": a forward in every step. "views": one table [N · n_views, C] of every view of every image, made when
    it is first needed and kept in memory. "epochs": a table [N, C] of each epoch's views, kept in files below `folder`
    for all runs and processes whose images have the same views. A teacher in eval mode treats each image alone, so all
    three give the same logits, up to the rounding of convolutions over batches of other sizes. plain: logits [N, C] of
    the un-augmented images, given where there is no model; then every view has those of its plain image.
    """

    def __init__(self, model, data, precision="fp32", source="live", folder="runs/teacher-logits", plain=None):
        self.data, self.precision, self.folder = data, precision, Path(folder)
        self.model = self.forward_model = model
        self.source, self.table = (source, None) if plain is None else ("plain", plain)
        self.sha256 = weights_hash(dict(logits=plain) if model is None else model.state_dict())
        self.wanted, self.held, self.passes = None, None, 0
        self.facts, self.logits = {}, {}  # of a teacher from elsewhere: for a student's config.json and teacher.npz

    def follow(self, stream, epoch, views):
        """Name the epoch whose views [N] the next batches have. stream: the key of its views, (role, seed)."""
        self.wanted = (stream, epoch, views)

    def ready(self):
        """Have the table of the epoch that is followed. Its memory stays the same: a CUDA graph reads it."""
        if self.source == "views" and self.table is None:
            print(f"teacher logits: from a table of all {self.data.n_views} views")
            self.table, self.passes = self._all_views(), self.data.n_views
        if self.source == "epochs" and self.held != self.wanted[:2]:
            if self.table is None:
                print("teacher logits: from a table of each epoch's views")
            table = self._epoch(*self.wanted)
            self.table = table if self.table is None else self.table.copy_(table)
            self.held = self.wanted[:2]

    def __call__(self, images, index, view):
        """float32 logits [B, C] of `images`, the training images `index` [B] in the views `view` [B]."""
        if self.source == "live":
            return self._forward(images).float()
        # Of mapped images index is on the CPU, view where the table is.
        rows = index.to(view.device)
        return self.table[rows * self.data.n_views + view if self.source == "views" else rows].float()

    @torch.no_grad()
    def _forward(self, images):
        """Logits in the precision that the model gives them: float32, or bfloat16 under autocast."""
        with autocast(images.device.type, self.precision):
            return self.forward_model(images)

    def _fill(self, index, views):
        """Logits [len(index), C] of images `index` in `views`, in batches."""
        batch = FORWARD_BATCH[self.data.device.type]
        parts = zip(index.split(batch), views.split(batch), strict=True)
        return torch.cat([self._forward(self.data.batch(*part)) for part in parts])

    def _all_views(self):
        every = torch.arange(self.data.n_views, device=self.data.device)
        images, table = torch.arange(len(self.data.y_train), device=self.data.device), None
        for index in images.split(max(1, 5000 // len(every))):
            part = self._fill(index.repeat_interleave(len(every)), every.repeat(len(index)))
            if table is None:
                table = part.new_empty(len(images) * len(every), part.shape[1])
            table[index[0] * len(every) : (index[-1] + 1) * len(every)] = part
        return table

    def _epoch(self, stream, epoch, views):
        size = getattr(self.model, "size", None)  # which the weights do not tell
        key = (self.sha256, size, self.data.facts["sha256"], self.precision, self.data.n_views, stream)
        file = self.folder / f"{common.stream_seed(*key):016x}" / f"epoch-{epoch + 1:04d}.npz"
        with runs.one_at_a_time(file):
            if file.exists():
                try:
                    return self._read(file)
                except InputError as error:
                    print(f"note: {error}; it is made again")
            self.passes += 1
            table = self._fill(torch.arange(len(views), device=self.data.device), views.to(self.data.device))
            # numpy knows no bfloat16: its bits go as int16, under the name of the true type.
            bits = table.cpu().view(torch.int16) if table.dtype == torch.bfloat16 else table.cpu()
            runs.write_npz(file, {str(table.dtype).removeprefix("torch."): bits.numpy()})
            return table

    def _read(self, file):
        with runs.reading(file):
            ((name, bits),) = runs.read_npz(file).items()
            table = torch.from_numpy(bits).view(getattr(torch, name))
            if table.shape != (len(self.data.y_train), self.data.classes):
                raise InputError(f"{file} has the shape {list(table.shape)}")
            return table.to(self.data.device)


def autocast(device_type, precision):
    # No cast cache: in a captured graph it would hand a later step the weights of an earlier one.
    return torch.autocast(device_type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False)


def weights_hash(state):
    """sha256 of a model's state dict: of all its parameters and buffers."""
    digest = hashlib.sha256()
    for name, value in state.items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def teacher_hash(file):
    """What students know their teacher by: the hash of its weights, or for text of its training logits."""
    if file.suffix == ".npz":
        return hashlib.sha256(runs.read_npz(file, ("train_logits",))["train_logits"].tobytes()).hexdigest()
    return weights_hash(runs.load_checkpoint(file)["model"])


def teacher_source(args, data, students, streams, folder):
    """Choose where teacher logits come from (see `TeacherLogits`).

    students: how many students of one teacher this process trains, a branch as its share of a run; streams: those of
    them that differ in their views. Counted in passes of the teacher over the training set, a student costs its epochs
    and a table of all views n_views. It may take half of the free memory, and tables of epochs half of the free disk.
    """
    epochs = args.stop_epoch or args.epochs
    students, streams = students * epochs, streams * epochs
    world = runs.ranks()[1]
    if args.teacher_cache == "on" and world > 1:
        raise InputError("--teacher-cache on: each process of torchrun would fill a whole table; use auto or off")
    per_view = len(data.y_train) * data.classes * (2 if args.precision == "bf16" else 4)
    passes = {} if args.teacher_cache == "on" else {"live": students}
    if args.teacher_cache != "off" and world == 1:
        disk = next(parent for parent in Path(folder).absolute().parents if parent.exists())
        if streams * per_view < shutil.disk_usage(disk).free / 2:
            passes["epochs"] = streams
        if data.n_views * per_view < common.free_memory(data.device) / 2:
            passes["views"] = data.n_views
    if not passes:
        size = f"tables of {data.n_views * per_view / 1e9:.1f} GB"
        raise InputError(f"--teacher-cache on: {size} fit neither into memory nor on the disk: use auto or off")
    return min(passes, key=passes.get)


# ---------------------------------------------------------------- state


def save_state(path, model, optimizer, **progress):
    """Write all that `restore_state` needs to go on exactly: weights, optimiser, random states, and `progress`."""
    state = dict(progress, model=model.state_dict(), optimizer=optimizer.state_dict(), rng=torch.get_rng_state())
    if next(model.parameters()).is_cuda:
        state["cuda_rng"] = torch.cuda.get_rng_state()  # of this device alone: another machine may have fewer
    runs.write_atomic(path, lambda file: torch.save(state, file))


def restore_state(source, model, optimizer, per_epoch, total, device):
    """Load what `save_state` wrote; returns (step, history, spent, sums). InputError when it does not fit the run."""
    with runs.reading(source, "it does not fit this run: discard it with --overwrite"):
        state = runs.load_checkpoint(source, device)
        model.load_state_dict(state["model"])
        groups = optimizer.state_dict()["param_groups"]  # these are of the flags
        optimizer.load_state_dict(dict(state["optimizer"], param_groups=groups))
        step, history = state["step"], state["history"]
        runs.check_metrics(history)
        if not isinstance(step, int) or not 0 <= step <= total or len(history) != step // per_epoch:
            raise ValueError(f"step {step} of {total} with {len(history)} epochs of metrics")
        if not runs.ranks()[0]:  # it is the first rank's
            torch.set_rng_state(state["rng"].cpu())
            if device.type == "cuda" and "cuda_rng" in state:
                torch.cuda.set_rng_state(state["cuda_rng"].cpu())
        return step, history, float(state["spent"]), state["sums"].reshape(3).double()


# ---------------------------------------------------------------- the loop


def train(run, args, model, optimizer, steps, batches, take_step, sums, lr_at, weights_at, evaluate, **more):
    """The training loop: `model` in the run folder `run`, from its checkpoint if it has one, to its end.

    steps: (in an epoch, in all); batches(epoch) -> list of that many batches; take_step(batch, ce_weight, kd_weight):
    one optimiser step that adds the loss times n, the hits and n to `sums` [3]; lr_at(step); weights_at(step) ->
    (ce_weight, kd_weight); evaluate(epoch, at_end) -> {name: number} for the epoch's line. more, see `_Run`: snapshots,
    steps before which the state is kept as snapshot-<step>.pt; start_from, a checkpoint to begin with when the folder
    has none; amount, (unit, how many an epoch). SIGINT or SIGTERM saves and exits 130; on a CPU the continued run ends
    in the same weights, bit for bit.
    """
    state = _Run(run, args, model, optimizer, steps, sums, **more)
    per_epoch, total = steps
    bar = tqdm(total=total, initial=state.step, desc=run.name, unit="step", disable=state.silent or None)
    # Processes of torchrun would stop in different steps: a signal ends them as they are, the last checkpoint counts.
    with bar, runs.interruptible() if state.world == 1 else contextlib.nullcontext([]) as stop:
        for epoch in range(state.step // per_epoch, total // per_epoch):
            todo = batches(epoch)[state.step % per_epoch :]
            model.train()
            state.started = time.perf_counter()
            for batch in todo:
                lr = lr_at(state.step)
                set_learning_rate(optimizer, lr)
                if state.step in state.snapshots:  # with this step's rate, also where the run was continued just here
                    state.save(run / f"snapshot-{state.step}.pt")
                ce_weight, kd_weight = weights_at(state.step)
                take_step(batch, ce_weight, kd_weight)
                state.step += 1
                bar.update()
                if state.step % per_epoch and (stop or state.is_old()):
                    state.save(state.checkpoint)
                if stop:
                    break
            if state.step % per_epoch == 0:
                line = state.line(lr=lr, ce_weight=ce_weight, kd_weight=kd_weight)
                state.end_epoch(line | evaluate(epoch + 1, state.step == total), bar)
                if stop or state.is_old() or state.step == total:
                    state.save(state.checkpoint)
            if stop:
                print(f"{run}: saved at step {state.step} of {total}")
                runs.exit_interrupted()
    state.finish()


def set_learning_rate(optimizer, lr):
    """In place where the rate lies in a device tensor, which a CUDA graph reads."""
    for group in optimizer.param_groups:
        group["lr"] = group["lr"].fill_(lr) if torch.is_tensor(group["lr"]) else lr


class _Run:
    """What a run has to remember and to write; the loop above tells it when."""

    def __init__(self, run, args, model, optimizer, steps, sums, snapshots=(), start_from=None, amount=None):
        self.run, self.args, self.model, self.optimizer, self.sums = run, args, model, optimizer, sums
        (self.per_epoch, self.total), self.snapshots, self.amount = steps, snapshots, amount
        self.rank, self.world = runs.ranks()
        self.silent = args.quiet or self.rank > 0
        self.checkpoint = run / "checkpoint.pt"
        self.step, self.history, self.spent, self.started = 0, [], 0.0, time.perf_counter()
        source = self.checkpoint if self.checkpoint.exists() else start_from
        if source is not None:
            self.step, self.history, self.spent, kept = restore_state(source, model, optimizer, *steps, sums.device)
            sums.copy_(kept) if not self.rank else sums.zero_()
            if source == self.checkpoint and self.step < self.total and not self.silent:
                print(f"{run}: continuing at step {self.step} of {self.total}")
        self.saved, self.curves = time.monotonic(), None
        if vars(args).get("tensorboard") and not self.rank:
            with runs.reading("--tensorboard", "pip install tensorboard, or leave it out"):
                from torch.utils.tensorboard import SummaryWriter

                self.curves = SummaryWriter(run)

    def over_ranks(self):
        """`sums` of the global batches."""
        everyone = self.sums.clone()
        if self.world > 1:
            torch.distributed.all_reduce(everyone)
        return everyone

    def check_finite(self, line=()):
        # Weights and outputs too: the loss of a step is older than what the step did to them.
        values = torch.stack([self.over_ranks()[0], *(p.detach().double().sum() for p in self.model.parameters())])
        if not torch.isfinite(values).all() or not all(map(math.isfinite, dict(line).values())):
            fix = f"lower --lr (now {self.args.lr:g}) or lengthen --warmup, and discard this run with --overwrite"
            what = f"the loss or the weights became NaN or infinite by step {self.step} of {self.run}"
            raise InputError(f"{what}: {fix} (its last good checkpoint is kept)")

    def is_old(self):
        """Whether the checkpoint is older than SAVE_SECONDS; for torchrun, whose clocks differ, after every epoch."""
        if self.world > 1:
            return self.step % self.per_epoch == 0
        return time.monotonic() - self.saved > SAVE_SECONDS

    def save(self, path):
        self.check_finite()
        sums = self.over_ranks()
        if not self.rank:
            spent = self.spent + time.perf_counter() - self.started
            save_state(path, self.model, self.optimizer, step=self.step, history=self.history, sums=sums, spent=spent)
        self.saved = time.monotonic()

    def line(self, **known):
        """The epoch's line of metrics.jsonl, but for what `evaluate` adds."""
        loss, hits, seen = self.over_ranks().tolist()  # waits for the device, so that the time is its own
        seconds = self.spent + time.perf_counter() - self.started
        unit, amount = self.amount or ("images", seen)
        known |= dict(train_loss=loss / seen, train_acc=hits / seen, seconds=round(seconds, 3))
        known[f"{unit}_per_s"] = round(amount / seconds, 1)
        return dict(epoch=self.step // self.per_epoch, step=self.step, **known)

    def end_epoch(self, line, bar):
        self.check_finite(line)
        if "test_acc" in line:
            before = [past["test_acc"] for past in self.history if "test_acc" in past]
            line["best_test_acc"] = max([line["test_acc"], *before])
        self.history.append(line)
        self.sums.zero_()
        self.spent, self.started = 0.0, time.perf_counter()
        if not self.rank:
            runs.write_metrics(self.run, self.history)
        if self.curves:
            for name, value in line.items():
                self.curves.add_scalar(name, value, line["epoch"])
            self.curves.flush()
        if not self.silent:
            shown = {name: value for name, value in line.items() if name not in ("step", "ce_weight", "kd_weight")}
            bar.write("  ".join(f"{name} {value:.4g}" for name, value in shown.items()))

    def finish(self):
        if not self.rank:
            runs.write_metrics(self.run, self.history)
        last, seconds = self.history[-1], sum(line["seconds"] for line in self.history)
        test = f"test {100 * last['test_acc']:.2f}%, " if "test_acc" in last else ""
        print(f"{self.run}: {test}train {100 * last['train_acc']:.2f}%, {seconds:.0f} s")


# ---------------------------------------------------------------- steps


def optimiser_step(model, optimizer, loss_of, sums, clip=None):
    """take_step(batch, ce_weight, kd_weight) for `train`. loss_of(the same) -> (scalar loss, hits, how many there are).

    clip: largest norm of the gradient. Nothing here waits for the device.
    """
    loss_sum, hit_sum, count = sums.unbind()

    def take_step(batch, ce_weight, kd_weight):
        loss, hits, n = loss_of(batch, ce_weight, kd_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        if clip:
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

    def capture(distils):
        weights = (ce_weight, kd_weight if distils else 0.0)
        # Warm-up steps compile and allocate; what they changed is put back.
        before = [value.clone() for value in (*model.state_dict().values(), sums)]
        momentum = [buffer.clone() for buffer in momentum_buffers(optimizer)]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                take_step(static, *weights)
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            take_step(static, *weights)
        with torch.no_grad():
            for value, old in zip((*model.state_dict().values(), sums), before, strict=True):
                value.copy_(old)
            for k, buffer in enumerate(momentum_buffers(optimizer)):
                buffer.copy_(momentum[k]) if momentum else buffer.zero_()
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


def momentum_buffers(optimizer):
    found = [state.get("momentum_buffer") for state in optimizer.state.values()]
    return [buffer for buffer in found if buffer is not None]


# ---------------------------------------------------------------- images


def evaluations(epochs, images, test_images):
    """How often a run evaluates its test images after its first epoch: 20 times, or as often as 4% of its time allow.

    An evaluated image takes a third of the time of a trained one. Five times at least, for the curves.
    """
    return max(5, min(20, round(0.04 * 3 * epochs * images / test_images)))


def evaluated(epoch, args, data):
    """Whether the test images are evaluated after that epoch (from 1): the first, the last, and evenly between."""
    if args.eval_every:
        return epoch % args.eval_every == 0
    times = evaluations(args.epochs, len(data.y_train), len(data.y_test))
    return epoch in (1, args.epochs) or epoch * times // args.epochs > (epoch - 1) * times // args.epochs


def image_loss(network, data, loss_fn, teacher, precision):
    """loss_of(batch, ce_weight, kd_weight) of `optimiser_step` for batches (index [B], view [B]) of `data`."""

    def loss_of(batch, ce_weight, kd_weight):
        index, view = batch
        images, labels = data.batch(index, view), data.y_train[index]
        distils = torch.is_tensor(kd_weight) or kd_weight > 0
        teacher_logits = teacher(images, index, view) if distils else None
        with autocast(images.device.type, precision):
            loss, logits = loss_fn(network, images, labels, teacher_logits, ce_weight, kd_weight)
        return loss, (logits.detach().argmax(1) == labels).sum(), len(index)

    return loss_of


def one_hot(step):
    """The weights_at of one-hot training throughout."""
    return 1.0, 0.0


def sgd(model, args, graphs=False):
    """Nesterov SGD with the flags of a run; graphs: with the learning rate in a device tensor, for `captured_step`."""
    lr = torch.tensor(args.lr, device=args.device) if graphs else args.lr
    more = dict(weight_decay=args.weight_decay, nesterov=args.momentum > 0, fused=True)
    return torch.optim.SGD(model.parameters(), lr, args.momentum, **more)


def train_images(run, model, data, args, role, seed, loss_fn, weights_at=one_hot, teacher=None, **more):
    """Train `model` in the run folder `run` and leave its logits.npz there.

    loss_fn(model, images, labels, teacher_logits, ce_weight, kd_weight) -> (scalar loss, logits [B, C]), where
    teacher_logits is None whenever kd_weight is 0, and the weights may be tensors; weights_at(step) -> (ce_weight,
    kd_weight); teacher: `TeacherLogits`, or None for runs without distillation. more: snapshots, start_from of `train`.
    """
    steps = per_epoch, _ = common.total_steps(args, data)
    batch, device, (rank, world) = min(args.batch_size, len(data.y_train)), torch.device(args.device), runs.ranks()
    share = batch // world  # images of each step for this process; gradients are averaged over all
    graphs = args.fast and device.type == "cuda" and world == 1 and not data.mapped
    model = model.to(device).to(memory_format=torch.channels_last)
    network = model
    if world > 1:
        devices = [torch.cuda.current_device()] if device.type == "cuda" else None
        network = nn.parallel.DistributedDataParallel(model, devices)
    if args.fast:
        network = torch.compile(network)
        if teacher and teacher.model:
            teacher.forward_model = torch.compile(teacher.model)
    optimizer = sgd(model, args, graphs)
    torch.manual_seed(common.stream_seed("dropout", role, seed, *[rank] * (rank > 0)))  # drawn from by dropout alone
    sums = torch.zeros(3, dtype=torch.float64, device=device)

    def batches(epoch):
        order, views = common.epoch_stream(data, role, seed, epoch)
        if teacher:
            teacher.follow((role, seed), epoch, views)
        if not data.mapped:
            order, views = order.to(device), views.to(device)
        starts = range(rank * share, per_epoch * batch, batch)
        return [(index, views[index].to(device)) for index in (order[start : start + share] for start in starts)]

    take_step = optimiser_step(model, optimizer, image_loss(network, data, loss_fn, teacher, args.precision), sums)
    if graphs:
        take_step = captured_step(take_step, model, optimizer, batch, sums)

    def step(batch, ce_weight, kd_weight):
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

    def lr_at(step):
        return common.learning_rate(step, args, per_epoch)

    train(run, args, model, optimizer, steps, batches, step, sums, lr_at, weights_at, evaluate, **more)
    if teacher and teacher.source in ("views", "epochs"):
        print(f"teacher logits: {teacher.passes} passes of the teacher so far, all else was read from tables")
    if not rank:
        save_logits(run, model, data)
