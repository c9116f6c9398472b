"""Speed of training: the engine of this project against the way peer repositories train, in one table.

    python benchmark.py                                       # CPU: ResNet-8 and ResNet-20, small; CUDA: the paper's three models
    python benchmark.py --arch resnet20 --images 50000        # whole epochs of CIFAR's size

Ways: "peers": DataLoader with PIL transforms and 8 workers, fp32, batch 64, a teacher forward in every step, the loss read in every
step (what RepDistiller's training code does); "eager": images on the device, all crops by one gather, channels_last,
bf16 where the device has it; "fast" (CUDA): the step compiled and captured as one CUDA graph; "cache": teacher logits
looked up in a table made before; "together": several seeds side by side. All but the first are timed in the real
engine, by what it writes into metrics.jsonl. Time is that of whole epochs, the first left out (warm-up), median of the
rest; evaluation and checkpoints are outside. Images are random where speed does not depend on them: no download.

Two ceilings are measured in the same run: copy bandwidth of the memory, and the rate of bf16 matrix products. A row's
percentages hold the least time that the convolutions' own traffic (each input and output once in forward, twice in
backward) and arithmetic would take against the time measured. Writes benchmark.json, .md, .png and .pdf into --out.
Expected: see README; about 4 minutes on two CPU cores, 15 with --images 50000. The CUDA ways were never run by its authors.
"""
import functools
import multiprocessing
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

import common
from train_student import add_student_flags, train_student

TEMPERATURE = 4.0


def random_data(images, device, side=32, channels=3, classes=100):
    """Random training images of CIFAR's shape as `common.Data`, with 1,000 test images."""
    rng = np.random.RandomState(0)
    arrays = dict(x_train=rng.randint(0, 256, (images, side, side, channels)).astype(np.uint8), y_train=np.arange(images) % classes,
                  x_test=rng.randint(0, 256, (1000, side, side, channels)).astype(np.uint8), y_test=np.arange(1000) % classes)
    with tempfile.TemporaryDirectory() as folder:
        np.savez(Path(folder) / "random.npz", **arrays)
        return common.load_data(f"npz:{folder}/random.npz", device=device)


def peers(data, arch, kd, batch, workers, epochs, device):
    """Seconds of each epoch of plain PyTorch training, as peer repositories write it."""
    from torchvision import transforms
    from torchvision.transforms.functional import to_pil_image
    side, _, channels = data.facts["image"]
    steps = [transforms.RandomCrop(side, padding=data.pad)] + [transforms.RandomHorizontalFlip()] * data.flip
    steps += [transforms.ToTensor(), transforms.Normalize(data.mean.tolist(), data.std.tolist())]
    dataset = PILImages([to_pil_image(image) for image in data.x_train.cpu().numpy()], data.y_train.tolist(), transforms.Compose(steps))
    loader = torch.utils.data.DataLoader(dataset, batch, shuffle=True, num_workers=workers, drop_last=True, pin_memory=device == "cuda")
    model = common.build_model(arch, data.classes, data.facts["image"]).to(device)
    teacher = common.build_model(arch, data.classes, data.facts["image"], seed="teacher").to(device).eval()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9, weight_decay=5e-4)
    seconds = []
    for epoch in range(epochs + 1):
        started, hits, loss_sum = time.perf_counter(), 0, 0.0
        for step, (images, labels) in enumerate(loader):
            images, labels = images.to(device), labels.to(device)
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
            if epoch == 0 and step == 9:   # warm-up
                break
        if epoch:
            seconds.append((time.perf_counter() - started) * len(data.y_train) / (len(loader) * batch))
    return seconds


class PILImages(torch.utils.data.Dataset):
    """Images and labels as torchvision's CIFAR classes give them: PIL images through a transform, one at a time."""

    def __init__(self, images, labels, transform):
        self.images, self.labels, self.transform = images, labels, transform

    def __len__(self):
        return len(self.labels)

    def __getitem__(self, k):
        return self.transform(self.images[k]), self.labels[k]


def ours(data, arch, kd, batch, epochs, device, fast=False, cache=False, seeds=1):
    """[seeds, epochs] seconds of each epoch of training in the engine, read from metrics.jsonl."""
    with tempfile.TemporaryDirectory() as folder:
        parser = common.Parser("")
        common.add_flags(parser)
        add_student_flags(parser)
        name = "digits" if data.facts["name"] == "digits" else "npz:"   # for the choice of precision
        flags = [f"--data={name}", f"--arch={arch}", f"--batch-size={batch}", f"--epochs={epochs + 1}", f"--eval-every={epochs + 1}", f"--device={device}",
                 "--fast" if fast else "--no-fast", "--quiet", f"--kd-weight={int(kd)}", f"--ce-weight={1 - int(kd)}"]
        args = common.resolve(parser.parse_args(flags))
        args.together = seeds > 1
        teacher = None
        if kd:
            model = common.build_model(arch, data.classes, data.facts["image"], seed="teacher").to(device).to(memory_format=torch.channels_last).eval()
            teacher = common.TeacherLogits(model, data, args.precision, "live" if not cache else "views" if device == "cuda" else "epochs")
            for seed in range(seeds) if cache else ():
                for epoch in range(epochs + 1):
                    views = common.epoch_stream(data, "student", seed, epoch)[1].to(device)
                    teacher.epoch_table(Path(folder) / "teacher-logits", ("student", seed), epoch, views)
        runs = [Path(folder) / f"run-s{seed}" for seed in range(seeds)]
        common.run_jobs([functools.partial(train_student, run, args, seed, data, teacher) for seed, run in enumerate(runs)], device, args.together)
        return [[line["seconds"] for line in common.read_metrics(run)][1:] for run in runs]


# ---------------------------------------------------------------- ceilings


def timed(call, device, repeats=5):
    """Median seconds of a call, after a warm-up; CUDA events where there are any."""
    seconds = []
    for _ in range(repeats + 1):
        if device == "cuda":
            events = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
            events[0].record()
            call()
            events[1].record()
            torch.cuda.synchronize()
            seconds.append(events[0].elapsed_time(events[1]) / 1000)
        else:
            started = time.perf_counter()
            call()
            seconds.append(time.perf_counter() - started)
    return statistics.median(seconds[1:])


def ceilings(device):
    """(bytes/s of copying within the memory, reads and writes counted; FLOP/s of a bf16 matrix product)."""
    source = torch.ones(2 ** 28 if device == "cuda" else 2 ** 26, device=device)
    target = torch.empty_like(source)
    n = 8192 if device == "cuda" else 2048
    matrix = torch.ones(n, n, dtype=torch.bfloat16, device=device)
    return 2 * 4 * len(source) / timed(lambda: target.copy_(source), device), 2 * n ** 3 / timed(lambda: matrix @ matrix, device)


def costs(arch, data):
    """(FLOPs, elements read and written) of one image's forward pass: convolutions and linear layers alone."""
    model, elements = common.build_model(arch, data.classes, data.facts["image"]).eval(), 0

    def count(module, inputs, output):
        nonlocal elements
        elements += inputs[0].numel() + output.numel()
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            module.register_forward_hook(count)
    side, _, channels = data.facts["image"]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(torch.zeros(1, channels, side, side))
    return counter.get_total_flops(), elements


def peak_memory(device):
    """Peak bytes of the device, or of this process on Linux; None elsewhere."""
    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    try:
        return 1024 * int(next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM")).split()[1])
    except OSError:
        return None


# ---------------------------------------------------------------- table and chart


def ways(args):
    """{name: flags of `ours`, or None for the peers' way}."""
    cuda = args.device == "cuda"
    chosen = {"peers": None} | ({} if cuda else {"peers, no workers": None}) | {"eager": {}}
    chosen |= {"fast": dict(fast=True), "fast + cache": dict(fast=True, cache=True)} if cuda else {"cache": dict(cache=True)}
    return chosen | {f"{args.together} together": dict(fast=cuda, cache=True, seeds=args.together)}


def batch_size(args, arch, way):
    """Images per step of a way."""
    if way.startswith("peers"):
        return 64
    return args.batch_size or (64 if arch == "resnet8" else 512 if args.device == "cuda" else 128)


def run_way(args, arch, way, kd):
    """([seeds, epochs] seconds, peak bytes, training images) of one way of training."""
    device = args.device
    data = common.load_data("digits", device=device) if arch == "resnet8" else random_data(args.images, device)
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    flags = ways(args)[way]
    if flags is None:
        seconds = [peers(data, arch, kd, batch_size(args, arch, way), args.workers if way == "peers" else 0, args.epochs, device)]
    else:
        seconds = ours(data, arch, kd, batch_size(args, arch, way), args.epochs, device, **flags)
    return seconds, peak_memory(device), len(data.y_train)


def measure(args, arch, peak_bytes, peak_flops):
    """Print and return the rows of one architecture."""
    cuda, rows = args.device == "cuda", []
    flops, elements = costs(arch, common.load_data("digits") if arch == "resnet8" else random_data(128, "cpu"))
    for kd in (False, True):
        for way, flags in ways(args).items():
            if not kd and flags and flags.get("cache") and "seeds" not in flags:
                continue   # one-hot training has no teacher logits to look up
            if cuda:   # in this process, which keeps what is compiled
                seconds, memory, images = run_way(args, arch, way, kd)
            else:      # in a process of its own, for its peak of memory
                with ProcessPoolExecutor(1, multiprocessing.get_context("forkserver")) as pool:
                    seconds, memory, images = pool.submit(run_way, args, arch, way, kd).result()
            rate = sum(images / statistics.median(of_seed) for of_seed in seconds)   # images/s over all seeds
            half = flags is not None and (cuda or common.bf16_in_hardware() and arch != "resnet8")
            forwards = 3 + (kd and not (flags or {}).get("cache"))   # a backward pass costs two forward passes; a teacher is one more
            rows.append(dict(arch=arch, loss="KD" if kd else "one-hot", way=way, batch=batch_size(args, arch, way), images=images, images_per_s=rate,
                             epoch_s=images / rate, seconds=seconds, peak_memory=memory if cuda or len(seconds) == 1 else None,
                             share_of_bandwidth=rate * forwards * elements * (2 if half else 4) / peak_bytes, share_of_matmul=rate * forwards * flops / peak_flops))
            rows[-1]["speedup"] = rate / next(row["images_per_s"] for row in rows if row["way"] == "peers" and row["loss"] == rows[-1]["loss"])
            print(line(rows[-1]), flush=True)
    return rows


HEADER = "| model | loss | way | batch | images/s | s per epoch of {} | × peers | peak memory MB | % of copy bandwidth | % of bf16 matmul rate |\n|---|---|---|---|---|---|---|---|---|---|"


def line(row):
    """One row of the Markdown table."""
    memory = f"{row['peak_memory'] / 1e6:.0f}" if row["peak_memory"] else "–"
    return (f"| {row['arch']} | {row['loss']} | {row['way']} | {row['batch']} | {row['images_per_s']:.0f} | {row['epoch_s']:.2f} | {row['speedup']:.2f} | {memory} | "
            f"{100 * row['share_of_bandwidth']:.1f} | {100 * row['share_of_matmul']:.1f} |")


def plot(rows, folder, title):
    plt = common.pyplot()
    archs = list(dict.fromkeys(row["arch"] for row in rows))
    figure, axes = plt.subplots(1, len(archs), figsize=(5.2 * len(archs), 4), squeeze=False, layout="constrained")
    for axis, arch in zip(axes[0], archs):
        chosen = [row for row in rows if row["arch"] == arch][::-1]
        bars = axis.barh([f"{row['loss']}: {row['way']}" for row in chosen], [row["images_per_s"] for row in chosen],
                         color=["tab:orange" if row["loss"] == "KD" else "tab:blue" for row in chosen])
        axis.bar_label(bars, [f"{row['images_per_s']:,.0f}" for row in chosen], padding=3, fontsize=8)
        axis.margins(x=0.18)
        axis.set(xlabel="images/s", title=arch)
    figure.suptitle(title)
    common.save_figure(figure, folder, "benchmark")


def main(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--arch", choices=common.ARCHS, nargs="+", help="models; resnet8 runs on digits, the others on random 32×32 images (default: resnet56 resnet20 mobilenetv2 on CUDA, resnet8 resnet20 on a CPU)")
    add("--images", type=common.number(int, 128, 10_000_000), help="training images in each timed epoch (default: 50000 on CUDA, 5000 on a CPU); digits always have 1,297")
    add("--epochs", type=common.number(int, 1), help="timed epochs behind each median, after one of warm-up (default: 5 on CUDA, 2 on a CPU)")
    add("--batch-size", type=common.number(int, 2), help="of all ways but the peers' (default: 512 on CUDA, 128 on a CPU, 64 for digits)")
    add("--together", type=common.number(int, 2, 1000), help="seeds side by side (default: 4 on CUDA, the number of cores on a CPU)")
    add("--workers", type=common.number(int, 0, 1000), default=8, help="DataLoader workers of the peers' way; on a CPU, where they fight for the cores, it is timed without any too")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA where it is")
    add("--out", default="results/benchmark", help="folder for table, JSON and chart")
    args = parser.parse_args(argv)
    args.device = common.resolve_device(args.device)
    cuda = args.device == "cuda"
    for flag, value in dict(arch=["resnet56", "resnet20", "mobilenetv2"] if cuda else ["resnet8", "resnet20"], images=50000 if cuda else 5000, epochs=5 if cuda else 2,
                            together=4 if cuda else max(2, common.cores())).items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)

    versions = common.versions()
    title = f"{versions['hardware']}, {versions['threads']} threads, torch {versions['torch']}"
    bandwidth, matmul = ceilings(args.device)
    ceiling_text = f"{title}. Ceilings: copy {bandwidth / 1e9:.1f} GB/s, bf16 matmul {matmul / 1e12:.2f} TFLOP/s."
    print(ceiling_text)
    rows, tables = [], []
    for arch in args.arch:
        header = HEADER.format(1297 if arch == "resnet8" else args.images)
        print(header)
        new = measure(args, arch, bandwidth, matmul)
        tables.append("\n".join([header, *map(line, new)]))
        rows += new
    common.write_json(out / "benchmark.json", dict(versions=versions, copy_bytes_per_s=bandwidth, matmul_flops_per_s=matmul, rows=rows))
    common.write_text(out / "benchmark.md", "\n\n".join([ceiling_text, *tables]) + "\n")
    plot(rows, out, title)


if __name__ == "__main__":
    common.cli(main)
