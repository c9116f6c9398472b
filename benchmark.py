"""Speed of training: this engine against the way peer repositories train, in images per second.

    python benchmark.py --arch resnet56 mobilenetv2 --images 50000

The peers' way is that of RepDistiller: DataLoader with PIL transforms, fp32, batch 64, a teacher forward in every step
of distillation, the loss read in every step. A speedup is over its best number of workers. Ours, in the real engine:
    eager          neither compiled nor captured
    fast           the step compiled, and one CUDA graph; on CUDA alone, where the next two are fast too
    table          for distillation: teacher logits looked up, as in a run of more epochs than an image has views
    two processes  two seeds side by side, each with half of the threads

Whole epochs of random 32×32 images, the first left out as warm-up, median of the rest; evaluation and checkpoints are
outside. Writes benchmark.json and benchmark.md into --out.
"""

import functools
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import claims
import common
import engine
import runs
from runs import number

import numpy as np
import torch
import torch.nn.functional as F

TEMPERATURE = 4.0
WORKERS = (0, 1, 2, 8)  # of the peers' DataLoader
PEERS_BATCH = 64


def random_data(images, device):
    """Random training images [images, 32, 32, 3], and a fifth as many test images, as `common.Data`."""
    x = np.random.RandomState(0).randint(0, 256, (images + images // 5, 32, 32, 3), dtype=np.uint8)
    y = np.arange(len(x)) % 100
    with tempfile.TemporaryDirectory() as folder:
        np.savez(f"{folder}/random.npz", x_train=x[:images], y_train=y[:images], x_test=x[images:], y_test=y[images:])
        return common.load_data(f"npz:{folder}/random.npz", device=device)


# ---------------------------------------------------------------- the peers' way


def transformed(transform, pairs):
    """A batch of (PIL image, label), each image through the transform on its own, as torchvision's datasets do it."""
    return torch.utils.data.default_collate([(transform(image), label) for image, label in pairs])


def peers(data, arch, kd, workers, epochs):
    """Images per second of each epoch, after one of warm-up, as peer repositories train."""
    from torchvision import transforms

    networks = [common.build_model(arch, data.classes, data.facts["image"], seed=seed) for seed in (0, 1)]
    model, teacher = networks[0].to(data.device), networks[1].to(data.device).eval()
    steps = [transforms.RandomCrop(data.facts["image"][0], padding=data.pad), transforms.RandomHorizontalFlip()]
    steps += [transforms.ToTensor(), transforms.Normalize(data.mean.tolist(), data.std.tolist())]
    pictures = map(transforms.ToPILImage(), data.x_train.cpu().numpy())
    pairs = list(zip(pictures, data.y_train.tolist(), strict=True))
    options = dict(shuffle=True, num_workers=workers, drop_last=True, pin_memory=data.device.type == "cuda")
    options["collate_fn"] = functools.partial(transformed, transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(pairs, PEERS_BATCH, **options)
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


def student_flags(args, arch, kd, batch, *more):
    """Flags of train_student.py for our ways; more: words of its command line."""
    parser = runs.Parser(__doc__)
    common.add_flags(parser)
    common.add_student_flags(parser)
    words = f"--quiet --data npz:random --arch {arch} --device {args.device} --epochs {args.epochs + 1}".split()
    words += ["--batch-size", str(min(args.images, batch)), *more]
    if not kd:
        words += ["--ce-weight", "1", "--kd-weight", "0"]
    return engine.resolve(parser.parse_args(words))


def train_one(flags, images, table, threads, seed):
    """Images per second of each epoch of one student, after one of warm-up; table: teacher logits are looked up."""
    torch.set_num_threads(threads)
    engine.use_device(flags.device)  # its settings are those of a process
    data = random_data(images, flags.device)
    teacher = None
    if table:
        teacher = engine.TeacherLogits(None, data, plain=torch.randn(images, data.classes, device=data.device))
    elif flags.kd_weight:
        model = common.build_model(flags.arch, data.classes, data.facts["image"], seed="teacher").to(data.device)
        model = model.to(memory_format=torch.channels_last).eval()
        teacher = engine.TeacherLogits(model, data, flags.precision)
    with tempfile.TemporaryDirectory() as folder:
        run = Path(folder) / "run"
        engine.train_student(run, flags, seed, data, common.student_loss, teacher)
        return [line["images_per_s"] for line in runs.read_metrics(run)[1:]]


def ours(flags, images, table=False, processes=1):
    """What `train_one` returns, for each process."""
    one = functools.partial(train_one, flags, images, table, max(1, torch.get_num_threads() // processes))
    if processes == 1:
        return [one(0)]
    with ProcessPoolExecutor(processes, multiprocessing.get_context("forkserver")) as pool:
        return list(pool.map(one, range(processes)))


def measure(args, arch, kd):
    """[dict]: the rows of one architecture and loss; `speedup` is over the best row of the peers."""
    data = random_data(args.images, args.device)
    loss = "KD" if kd else "one-hot"
    rows = []

    def add_row(way, batch, rates):
        """rates: of each epoch of each process."""
        speed = sum(statistics.median(of_process) for of_process in rates)
        rows.append(dict(arch=arch, loss=loss, way=way, batch=batch, images_per_s=speed, rates=rates))
        print(f"{arch}, {loss}, {way}, batch {batch}: {speed:.0f} images/s", flush=True)

    for workers in WORKERS:
        add_row(f"peers, {workers} workers", PEERS_BATCH, [peers(data, arch, kd, workers, args.epochs)])
    best = max(row["images_per_s"] for row in rows)
    for batch in args.batch_size:
        flags = student_flags(args, arch, kd, batch)
        eager = student_flags(args, arch, kd, batch, "--no-fast")
        add_row("eager", eager.batch_size, ours(eager, args.images))
        if flags.fast:  # on CUDA
            add_row("fast", flags.batch_size, ours(flags, args.images))
        if kd:
            add_row("table", flags.batch_size, ours(flags, args.images, table=True))
        add_row("two processes", flags.batch_size, ours(flags, args.images, processes=2))
    return [dict(row, speedup=row["images_per_s"] / best) for row in rows]


def main(argv=None):
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add("--arch", choices=common.ARCHS, nargs="+", default=["resnet20"], help="networks")
    add("--images", type=number(int, 128, 10_000_000), help="random images (default: 50000 on CUDA, 5000 on a CPU)")
    add("--epochs", type=number(int, 1), default=2, help="timed epochs behind each median")
    add("--batch-size", type=number(int, 2), nargs="+", help="of ours (default: 512 on CUDA, 128 on a CPU)")
    common.add_device_flag(parser)
    add("--out", type=Path, default=Path("results/benchmark"), help="folder for table and JSON")
    args = parser.parse_args(argv)
    args.device = engine.use_device(args.device)
    cuda = args.device == "cuda"
    args.images = args.images or (50_000 if cuda else 5_000)
    args.batch_size = args.batch_size or [512 if cuda else 128]
    args.out.mkdir(parents=True, exist_ok=True)
    versions = runs.versions()
    rows, lines = [], []
    for arch in args.arch:
        rows += measure(args, arch, kd=False) + measure(args, arch, kd=True)
    for row in rows:
        words = [row[key] for key in ("arch", "loss", "way", "batch")]
        lines.append([*words, f"{row['images_per_s']:.0f}", f"{row['speedup']:.2f}"])
    text = f"{versions['hardware']}, {versions['threads']} threads, torch {versions['torch']}\n\n"
    text += claims.markdown_table(["model", "loss", "way", "batch", "images/s", "× best peers"], lines)
    print(text)
    runs.write_json(args.out / "benchmark.json", dict(versions=versions, rows=rows))
    runs.write_text(args.out / "benchmark.md", text)


if __name__ == "__main__":
    runs.cli(main)
