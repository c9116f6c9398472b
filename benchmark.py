"""Speed of training: this engine against the way peer repositories train, in images per second.

    python benchmark.py                                  # CPU: ResNet-8 and ResNet-20, small; CUDA: the paper's three
    python benchmark.py --arch resnet20 --images 50000   # whole epochs of CIFAR's size

The peers' way is that of RepDistiller's training code: DataLoader with PIL transforms, fp32, batch 64, a teacher
forward in every step of distillation, the loss read in every step. On a CPU, where workers compete with training for
the cores, it is timed with several numbers of them; a speedup is over the best of these rows. Ours are timed in the
real engine: "eager", "fast" (CUDA: the step compiled, and one CUDA graph), "table" (teacher logits looked up instead of
computed), "two processes" (CPU: two seeds side by side, each with half of the cores, as --jobs 2 does).

Whole epochs, the first left out as warm-up, median of the rest; evaluation and checkpoints are outside. ResNet-8 runs
on digits, other networks on random images of 32×32. Writes benchmark.json, .md, .png and .pdf into --out.
"""

import argparse
import functools
import multiprocessing
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import claims
import common
import engine
import runs
from runs import number
from train_student import add_student_flags, train_student

TEMPERATURE = 4.0
WORKERS = (0, 1, 2, 8)  # of the peers' DataLoader; on CUDA the last alone


def random_data(images, device, side=32, classes=100, test_images=1000):
    """Random training images [images, side, side, 3] as `common.Data`."""
    rng = np.random.RandomState(0)
    arrays = {}
    for split, count in (("train", images), ("test", test_images)):
        arrays[f"x_{split}"] = rng.randint(0, 256, (count, side, side, 3), dtype=np.uint8)
        arrays[f"y_{split}"] = np.arange(count) % min(classes, images)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/random.npz", **arrays)
        return common.load_data(f"npz:{folder}/random.npz", device=device)


def build(arch, data, seed, width=1.0):
    model = common.build_model(arch, data.classes, data.facts["image"], width, seed)
    return model.to(data.device).to(memory_format=torch.channels_last)


# ---------------------------------------------------------------- one step, for estimates


@functools.cache
def seconds_per_image(arch, teacher, side, classes, batch, precision, device, width=1.0, steps=5):
    """Seconds that a training step of the engine takes here for each of its images; the median of a few steps.

    teacher: the architecture of a teacher whose forward is part of the step, or None. On a CPU, where an image takes
    about the same time in any batch, of at most 32 images. On CUDA the step is one graph, but not compiled, since that
    would take a minute for each network.
    """
    batch = batch if device == "cuda" else min(batch, 32)
    data = random_data(batch, device, side, classes, test_images=1)
    model, cuda = build(arch, data, "student", width), device == "cuda"
    source = engine.TeacherLogits(build(teacher, data, "teacher").eval(), data, precision) if teacher else None
    lr = torch.tensor(0.01, device=device) if cuda else 0.01
    optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=5e-4, nesterov=True, fused=cuda)
    sums = torch.zeros(3, dtype=torch.float64, device=device)

    def loss_fn(model, images, labels, teacher_logits, ce_weight, kd_weight):
        logits = model(images).float()
        if teacher_logits is None:
            return F.cross_entropy(logits, labels), logits
        return common.kd_loss(logits, teacher_logits, TEMPERATURE), logits

    loss_of = engine.image_loss(model, data, loss_fn, source, precision)
    take_step = engine.optimiser_step(model, optimizer, loss_of, sums)
    if cuda:
        take_step = engine.captured_step(take_step, model, optimizer, batch, sums)
    every = torch.arange(batch, device=device)
    seconds = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        take_step((every, torch.zeros_like(every)), 0.0 if teacher else 1.0, 1.0 if teacher else 0.0)
        sums.sum().item()  # waits for the device
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:]) / batch


# ---------------------------------------------------------------- the peers' way


class PILImages(torch.utils.data.Dataset):
    """The training images as torchvision's CIFAR classes give them: PIL images through a transform, one at a time."""

    def __init__(self, data):
        from torchvision import transforms
        from torchvision.transforms.functional import to_pil_image

        steps = [transforms.RandomCrop(data.facts["image"][0], padding=data.pad)]
        steps += [transforms.RandomHorizontalFlip()] * data.flip
        steps += [transforms.ToTensor(), transforms.Normalize(data.mean.tolist(), data.std.tolist())]
        self.images = [to_pil_image(image) for image in data.x_train.cpu().numpy()]
        self.labels, self.transform = data.y_train.tolist(), transforms.Compose(steps)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, k):
        return self.transform(self.images[k]), self.labels[k]


def peers(data, arch, kd, workers, epochs):
    """Seconds of each epoch, after one of warm-up, as peer repositories train."""
    model, teacher = (common.build_model(arch, data.classes, data.facts["image"], seed=seed) for seed in (0, 1))
    model, teacher = model.to(data.device), teacher.to(data.device).eval()
    pinned = data.device.type == "cuda"
    options = dict(shuffle=True, num_workers=workers, drop_last=True, pin_memory=pinned)
    loader = torch.utils.data.DataLoader(PILImages(data), 64, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    seconds = []
    for _ in range(epochs + 1):
        started, hits, loss_sum = time.perf_counter(), 0, 0.0
        for images, labels in loader:
            images, labels = images.to(data.device), labels.to(data.device)
            logits = model(images)
            if kd:
                with torch.no_grad():
                    teacher_logits = teacher(images)
                loss = common.kd_loss(logits, teacher_logits, TEMPERATURE)
            else:
                loss = F.cross_entropy(logits, labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            loss_sum += loss.item()
            hits += (logits.argmax(1) == labels).sum().item()
        seconds.append(time.perf_counter() - started)
    return seconds[1:]


# ---------------------------------------------------------------- ours


def train_one(folder, args, arch, kd, fast, table, seed, threads=0):
    """Train one student in the run folder folder/s<seed>, whose metrics.jsonl has the times."""
    if threads:
        torch.set_num_threads(threads)
    parser, data = argparse.ArgumentParser(), data_for(args, arch)
    common.add_flags(parser)
    add_student_flags(parser)
    flags = parser.parse_args(["--quiet", "--arch", arch, "--device", args.device])
    flags.data = "digits" if arch == "resnet8" else "npz:random"  # it decides the precision
    flags.batch_size, flags.epochs, flags.fast = batch_size(args, arch), args.epochs + 1, fast
    flags.ce_weight, flags.kd_weight = 1.0 - kd, float(kd)
    engine.resolve(flags)
    teacher = None
    if kd:
        kept = "live" if not table else "views" if args.device == "cuda" else "epochs"
        model = build(arch, data, "teacher").eval()
        teacher = engine.TeacherLogits(model, data, flags.precision, kept, Path(folder) / "teacher-logits")
        for epoch in range(args.epochs + 1) if table else ():  # made before, as by another student of that teacher
            teacher.follow(("student", seed), epoch, common.epoch_stream(data, "student", seed, epoch)[1])
            teacher.ready()
    train_student(Path(folder) / f"s{seed}", flags, seed, data, teacher)


def ours(args, arch, kd, fast=False, table=False, processes=1):
    """Seconds of each epoch, after one of warm-up, for each process."""
    with tempfile.TemporaryDirectory() as folder:
        job = (folder, args, arch, kd, fast, table)
        if processes == 1:
            train_one(*job, seed=0)
        else:
            threads, context = max(1, common.cores() // processes), multiprocessing.get_context("forkserver")
            jobs = [context.Process(target=train_one, args=(*job, seed, threads)) for seed in range(processes)]
            for process in jobs:
                process.start()
            for process in jobs:
                process.join()
        histories = [runs.read_metrics(f"{folder}/s{seed}") for seed in range(processes)]
        return [[line["seconds"] for line in history[1:]] for history in histories]


# ---------------------------------------------------------------- table and chart


def data_for(args, arch):
    if arch == "resnet8":
        return common.load_data("digits", device=args.device)
    return random_data(args.images, args.device)


def batch_size(args, arch):
    """Images per step of our ways."""
    return 64 if arch == "resnet8" else min(args.images, 512 if args.device == "cuda" else 128)


def our_ways(device, kd):
    """{name: flags of `ours`}."""
    if device == "cuda":
        return {"eager": {}, "fast": dict(fast=True)} | ({"fast, table": dict(fast=True, table=True)} if kd else {})
    if not kd:
        return {"eager": {}, "two processes": dict(processes=2)}
    return {"eager": {}, "table": dict(table=True), "two processes, table": dict(table=True, processes=2)}


def measure(args, arch, kd):
    """[dict]: the rows of one architecture and loss; `speedup` is over the best row of the peers."""
    data, rows = data_for(args, arch), []
    images = len(data.y_train)

    def add_row(way, batch, seconds):
        """seconds: of each epoch, for each process."""
        seen = images // batch * batch
        rate = sum(seen / statistics.median(of_process) for of_process in seconds)
        row = dict(arch=arch, loss="KD" if kd else "one-hot", way=way, batch=batch, images_per_s=rate)
        rows.append(row | dict(s_per_epoch=seen / rate, seconds=seconds))
        print(f"{arch}, {row['loss']}, {way}: {rate:.0f} images/s", flush=True)

    for workers in WORKERS[-1:] if args.device == "cuda" else WORKERS:
        add_row(f"peers, {workers} workers", 64, [peers(data, arch, kd, workers, args.epochs)])
    best = max(row["images_per_s"] for row in rows)
    for way, flags in our_ways(args.device, kd).items():
        add_row(way, batch_size(args, arch), ours(args, arch, kd, **flags))
    return [dict(row, speedup=row["images_per_s"] / best) for row in rows]


def plot(rows, folder, title):
    plt = claims.pyplot()
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    figure, axes = plt.subplots(1, len(archs), figsize=(5.6 * len(archs), 4), squeeze=False, layout="constrained")
    for axis, arch in zip(axes[0], archs, strict=True):
        chosen = [row for row in rows if row["arch"] == arch][::-1]
        names, rates = [f"{row['loss']}: {row['way']}" for row in chosen], [row["images_per_s"] for row in chosen]
        bars = axis.barh(names, rates, color=["tab:orange" if row["loss"] == "KD" else "tab:blue" for row in chosen])
        axis.bar_label(bars, [f"{rate:,.0f}" for rate in rates], padding=3, fontsize=8)
        axis.margins(x=0.18)
        axis.set(xlabel="images/s", title=arch)
    figure.suptitle(title)
    claims.save_figure(figure, folder, "benchmark")


def main(argv=None):
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    archs = "networks (default: resnet56 resnet20 mobilenetv2 on CUDA, resnet8 resnet20 on a CPU)"
    add("--arch", choices=common.ARCHS, nargs="+", help=archs)
    images = "random training images (default: 50000 on CUDA, 5000 on a CPU); resnet8 has the 1,297 of digits"
    add("--images", type=number(int, 128, 10_000_000), help=images)
    add("--epochs", type=number(int, 1), help="timed epochs behind each median (default: 5 on CUDA, 2 on a CPU)")
    common.add_device_flag(parser)
    add("--out", default="results/benchmark", help="folder for table, JSON and chart")
    args = parser.parse_args(argv)
    args.device = engine.use_device(args.device)
    cuda = args.device == "cuda"
    args.arch = args.arch or (["resnet56", "resnet20", "mobilenetv2"] if cuda else ["resnet8", "resnet20"])
    args.images = args.images or (50_000 if cuda else 5_000)
    args.epochs = args.epochs or (5 if cuda else 2)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    versions = runs.versions()
    title = f"{versions['hardware']}, {versions['threads']} threads, torch {versions['torch']}"
    rows = [row for arch in args.arch for kd in (False, True) for row in measure(args, arch, kd)]
    headers = ["model", "loss", "way", "batch", "images/s", "s per epoch", "× best peers"]
    cells = []
    for row in rows:
        numbers = f"{row['images_per_s']:.0f}", f"{row['s_per_epoch']:.2f}", f"{row['speedup']:.2f}"
        cells.append([row["arch"], row["loss"], row["way"], row["batch"], *numbers])
    text = f"{title}\n\n{claims.markdown_table(headers, cells)}"
    print(text)
    runs.write_json(out / "benchmark.json", dict(versions=versions, rows=rows))
    runs.write_text(out / "benchmark.md", text)
    plot(rows, out, title)


if __name__ == "__main__":
    runs.cli(main)
