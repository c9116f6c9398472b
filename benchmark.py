"""Speed of training: this engine against the way peer repositories train, in images per second.

    python benchmark.py                                  # ResNet-20
    python benchmark.py --arch resnet56 mobilenetv2 --images 50000
    python benchmark.py --gpu-check                      # for an issue: one JSON with the CUDA tests' result too

The peers' way is that of RepDistiller: DataLoader with PIL transforms, fp32, batch 64, a teacher forward in every step
of distillation, the loss read in every step; a speedup is over its best number of workers. Ours are timed in the real
engine: "eager"; on CUDA "fast" (the step compiled, and one CUDA graph), as are those after it; for distillation "table"
(of teacher logits), as is that after it; "two processes" (two seeds side by side, each with half of the threads).

Whole epochs of random 32×32 images, the first left out as warm-up, median of the rest; evaluation and checkpoints are
outside. The whole run has them inside, and compilation: so short a run pays more for them than a real one. Writes
benchmark.json and benchmark.md into --out.
"""

import argparse
import functools
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
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
WORKERS = (0, 1, 2, 8)  # of the peers' DataLoader
PEERS_BATCH = 64


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
    cuda = device == "cuda"
    batch = batch if cuda else min(batch, 32)
    data = random_data(batch, device, side, classes, test_images=1)
    model = build(arch, data, "student", width)
    source = engine.TeacherLogits(build(teacher, data, "teacher").eval(), data, precision) if teacher else None
    optimizer = engine.sgd(model, argparse.Namespace(lr=0.01, momentum=0.9, weight_decay=5e-4, device=device), cuda)
    sums = torch.zeros(3, dtype=torch.float64, device=device)

    def loss_fn(model, images, labels, teacher_logits, ce_weight, kd_weight):
        logits = model(images).float()
        if teacher_logits is None:
            return F.cross_entropy(logits, labels), logits
        return common.kd_loss(logits, teacher_logits, TEMPERATURE), logits

    take_step = engine.optimiser_step(
        model, optimizer, engine.image_loss(model, data, loss_fn, source, precision), sums
    )
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

        steps = [transforms.RandomCrop(data.facts["image"][0], padding=data.pad), transforms.RandomHorizontalFlip()]
        steps += [transforms.ToTensor(), transforms.Normalize(data.mean.tolist(), data.std.tolist())]
        self.images = [to_pil_image(image) for image in data.x_train.cpu().numpy()]
        self.labels, self.transform = data.y_train.tolist(), transforms.Compose(steps)

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, k):
        return self.transform(self.images[k]), self.labels[k]


def peers(data, arch, kd, workers, epochs):
    """Images per second of each epoch, after one of warm-up, as peer repositories train."""
    networks = [common.build_model(arch, data.classes, data.facts["image"], seed=seed) for seed in (0, 1)]
    model, teacher = networks[0].to(data.device), networks[1].to(data.device).eval()
    options = dict(shuffle=True, num_workers=workers, drop_last=True, pin_memory=data.device.type == "cuda")
    loader = torch.utils.data.DataLoader(PILImages(data), PEERS_BATCH, **options)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    rates = []
    for _ in range(epochs + 1):
        started = time.perf_counter()
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
            _ = loss.item(), (logits.argmax(1) == labels).sum().item()  # read in every step, each waits for the device
        rates.append(len(loader) * PEERS_BATCH / (time.perf_counter() - started))
    return rates[1:]


# ---------------------------------------------------------------- ours


def student_flags(args, arch, kd, batch):
    """Flags of train_student.py for our ways."""
    parser = argparse.ArgumentParser()
    common.add_flags(parser)
    add_student_flags(parser)
    words = f"--quiet --data npz:random --arch {arch} --device {args.device} --epochs {args.epochs + 1}".split()
    words += f"--batch-size {min(args.images, batch)} --ce-weight {1 - kd} --kd-weight {int(kd)}".split()
    return engine.resolve(parser.parse_args(words))


def train_one(folder, images, flags, table, threads, seed):
    """Train one student in the run folder folder/s<seed>.

    Returns images per second of each epoch, after one of warm-up, and of the whole run.
    """
    torch.set_num_threads(threads)
    data = random_data(images, flags.device, test_images=images // 5)  # as many as CIFAR has
    run, teacher = Path(folder) / f"s{seed}", None
    if flags.kd_weight:
        model, kept = build(flags.arch, data, "teacher").eval(), "epochs" if table else "live"
        teacher = engine.TeacherLogits(model, data, flags.precision, kept, Path(folder) / "teacher-logits")
        for epoch in range(flags.epochs) if table else ():  # made before, as by another student of that teacher
            teacher.follow(("student", seed), epoch, common.epoch_stream(data, "student", seed, epoch)[1])
            teacher.ready()
    started = time.perf_counter()
    train_student(run, flags, seed, data, teacher)
    whole = common.total_steps(flags, data)[1] * flags.batch_size / (time.perf_counter() - started)
    return [line["images_per_s"] for line in runs.read_metrics(run)[1:]], whole


def ours(images, flags, table=False, processes=1):
    """What `train_one` returns, for each process."""
    with tempfile.TemporaryDirectory() as folder:
        job = (folder, images, flags, table, max(1, torch.get_num_threads() // processes))
        if processes == 1:
            return [train_one(*job, 0)]
        with ProcessPoolExecutor(processes, multiprocessing.get_context("forkserver")) as pool:
            return list(pool.map(functools.partial(train_one, *job), range(processes)))


def measure(args, arch, kd):
    """[dict]: the rows of one architecture and loss; `speedup` is over the best row of the peers."""
    data, loss, rows = random_data(args.images, args.device), "KD" if kd else "one-hot", []

    def add_row(way, batch, results):
        """results: what `train_one` returns, for each process; peers have no whole run."""
        rates, whole = zip(*results, strict=True)
        speed = sum(statistics.median(of_process) for of_process in rates)
        row = dict(arch=arch, loss=loss, way=way, batch=batch, images_per_s=speed, rates=list(rates))
        rows.append(dict(row, whole_run_images_per_s=sum(whole) if whole[0] else None))
        print(f"{arch}, {loss}, {way}, batch {batch}: {speed:.0f} images/s", flush=True)

    for workers in WORKERS:
        add_row(f"peers, {workers} workers", PEERS_BATCH, [(peers(data, arch, kd, workers, args.epochs), None)])
    best = max(row["images_per_s"] for row in rows)
    for batch in args.batch_size:
        flags = student_flags(args, arch, kd, batch)
        eager = argparse.Namespace(**vars(flags) | dict(fast=False))
        ways = [("eager", eager, {})]
        ways += [("fast", flags, {})] if flags.fast else []  # on CUDA
        ways += [("table", flags, dict(table=True))] if kd else []
        for way, chosen, more in [*ways, ("two processes", flags, dict(table=kd, processes=2))]:
            add_row(way, flags.batch_size, ours(args.images, chosen, **more))
    return [dict(row, speedup=row["images_per_s"] / best) for row in rows]


# ---------------------------------------------------------------- an issue's report


def cuda_facts():
    """Versions of CUDA and of the driver, and how the tests that need CUDA end."""
    from torch.utils import collect_env

    command = [sys.executable, "-m", "pytest", "-q", "tests", "-k", "cuda"]
    tests = subprocess.run(command, cwd=Path(__file__).resolve().parent, capture_output=True, text=True)
    print(tests.stdout)
    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    ending = dict(passed=tests.returncode == 0, output=(tests.stdout + tests.stderr)[-4000:].splitlines())
    return dict(cuda=torch.version.cuda, cudnn=torch.backends.cudnn.version(), driver=driver, tests=ending)


def main(argv=None):
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add("--arch", choices=common.ARCHS, nargs="+", help="networks (default: resnet20)")
    add("--images", type=number(int, 128, 10_000_000), help="random images (default: 50000 on CUDA, 5000 on a CPU)")
    add("--epochs", type=number(int, 1), default=2, help="timed epochs behind each median")
    add("--batch-size", type=number(int, 2), nargs="+", help="of ours (default: 512 on CUDA, 128 on a CPU)")
    common.add_device_flag(parser)
    add("--gpu-check", action="store_true", help="for an issue: CUDA tests, and ResNet-56 at batch 512 and 1024")
    add("--out", default="results/benchmark", help="folder for table and JSON")
    args = parser.parse_args(argv)
    args.device = engine.use_device(args.device)
    cuda = args.device == "cuda"
    if args.gpu_check and not cuda:
        raise runs.InputError("--gpu-check needs CUDA, which is not used here: run it where nvidia-smi shows a device")
    args.images = args.images or (50_000 if cuda else 5_000)
    args.arch = args.arch or ["resnet56" if args.gpu_check else "resnet20"]
    args.batch_size = args.batch_size or ([512, 1024] if args.gpu_check else [512 if cuda else 128])
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    versions = runs.versions() | (cuda_facts() if args.gpu_check else {})
    rows = [row for arch in args.arch for kd in (False, True) for row in measure(args, arch, kd)]
    lines = []
    for row in rows:
        words, whole = [row[key] for key in ("arch", "loss", "way", "batch")], row["whole_run_images_per_s"]
        lines.append([*words, f"{row['images_per_s']:.0f}", f"{row['speedup']:.2f}", f"{whole:.0f}" if whole else "–"])
    heads = ["model", "loss", "way", "batch", "images/s", "× best peers", "whole run images/s"]
    text = f"{versions['hardware']}, {versions['threads']} threads, torch {versions['torch']}\n\n"
    text += claims.markdown_table(heads, lines)
    print(text)
    name = "gpu-check" if args.gpu_check else "benchmark"
    runs.write_json(out / f"{name}.json", dict(versions=versions, rows=rows))
    runs.write_text(out / f"{name}.md", text)


if __name__ == "__main__":
    runs.cli(main)
