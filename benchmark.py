"""Speed of training: this engine against the way peer repositories train, in images (or sentences) per second.

    python benchmark.py --arch resnet56 mobilenetv2 --images 50000
    python benchmark.py --encoder FOLDER     # and glue_distill.py, against transformers' Trainer

The peers' way is that of RepDistiller: DataLoader with PIL transforms, fp32, batch 64, a teacher forward in every step
of distillation, the loss read in every step. A speedup is over its best number of workers. Ours, in the real engine:
    eager          neither compiled nor captured
    fast           the step compiled, and one CUDA graph; on CUDA alone, where the next two are fast too
    table          for distillation: teacher logits looked up, as in a run of more epochs than an image has views
    two processes  two seeds side by side, each with half of the threads

Whole epochs, of random 32×32 images or of sentences of SST-2, the first left out as warm-up, median of the rest;
evaluation, checkpoints and tokenisation are outside. Writes benchmark.json and benchmark.md into --out.
"""

import csv
import functools
import multiprocessing
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from importlib import metadata
from pathlib import Path

import claims
import common
import engine
import runs
from runs import InputError, number

import numpy as np
import torch
import torch.nn.functional as F

TEMPERATURE = 4.0
WORKERS = (0, 1, 2, 8)  # of the peers' DataLoader
PEERS_BATCH = 64
SENTENCES = 2000
TEXT_BATCH = 32
TRAINERS = {  # the peers' ways with text: settings of transformers' TrainingArguments (version 5)
    "Trainer, fp32": {},
    "Trainer, bf16": dict(bf16=True),
    "Trainer, bf16, by length": dict(bf16=True, train_sampling_strategy="group_by_length"),
}


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

    torch.backends.cudnn.allow_tf32 = True  # PyTorch's default
    networks = [common.build_model(arch, data.classes, data.facts["image"], seed=seed) for seed in (0, 1)]
    model = networks[0].to(data.device)
    teacher = networks[1].to(data.device).eval()
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


def student_flags(args, arch, kd, *more):
    """Flags of train_student.py for our ways; more: words of its command line."""
    parser = runs.Parser(__doc__)
    common.add_flags(parser)
    common.add_student_flags(parser)
    words = f"--quiet --data npz:random --arch {arch} --device {args.device} --epochs {args.epochs + 1}".split()
    words += ["--batch-size", str(min(args.images, args.batch_size)), *more]
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


# ---------------------------------------------------------------- text


def trainer_rates(args, sentences, settings):
    """Sentences per second of each epoch, after one of warm-up, of transformers' Trainer on [(sentence, label)]."""
    import transformers

    transformers.utils.logging.set_verbosity_error()  # it warns of the new head
    with runs.reading(args.encoder, "give a saved text encoder, a folder or a hub id"):
        tokenizer = transformers.AutoTokenizer.from_pretrained(args.encoder)
        model = transformers.AutoModelForSequenceClassification.from_pretrained(args.encoder)
    rows = [dict(tokenizer(text, truncation=True, max_length=128), labels=label) for text, label in sentences]
    quiet = dict(report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True)
    once = dict(num_train_epochs=1, per_device_train_batch_size=TEXT_BATCH, learning_rate=2e-5)
    rates = []
    with tempfile.TemporaryDirectory() as folder:
        with runs.reading("transformers' Trainer", "pip install accelerate 'transformers>=5'"):
            flags = transformers.TrainingArguments(folder, use_cpu=args.device == "cpu", **once, **quiet, **settings)
        padding = transformers.DataCollatorWithPadding(tokenizer)
        trainer = transformers.Trainer(model, flags, train_dataset=rows, data_collator=padding)
        for _ in range(args.epochs + 1):
            started = time.perf_counter()
            trainer.train()
            rates.append(len(rows) / (time.perf_counter() - started))
    return rates[1:]


def script_rates(args, sentences):
    """The same of glue_distill.py, {one-hot or KD: rates}."""
    with tempfile.TemporaryDirectory() as folder:
        for name, rows in (("train", sentences), ("test", sentences[:100])):
            with open(f"{folder}/{name}.csv", "w", newline="", encoding="utf-8") as file:
                csv.writer(file).writerows([("text", "label"), *rows])
        words = ["--task", f"csv:{folder}", "--teacher", args.encoder, "--student", args.encoder]
        words += ["--epochs", str(args.epochs + 1), "--batch-size", str(TEXT_BATCH), "--device", args.device]
        words += ["--out", f"{folder}/run", "--train-only", "--quiet"]
        script = Path(__file__).with_name("glue_distill.py")
        done = subprocess.run([sys.executable, script, *words], capture_output=True, text=True)
        if done.returncode:
            raise InputError(f"glue_distill.py: {done.stderr.strip()}")
        name = Path(args.encoder).name
        folders = {"one-hot": f"{folder}/run-{name}-onehot-s0", "KD": f"{folder}/run-{name}-{name}-kd-s0"}
        rates = {}
        for loss, run in folders.items():
            rates[loss] = [len(sentences) / line["seconds"] for line in runs.read_metrics(run)[1:]]
        return rates


def read_sentences(path, count):
    """The first [(sentence, label 0 or 1)] of SST-2's train.tsv, at most `count`."""
    with runs.reading(path, "give SST-2's train.tsv as --sentences"):
        lines = Path(path).read_text(encoding="utf-8").split("\n")[1 : count + 1]
        pairs = [line.split("\t") for line in lines if line]
        return [(text, int(label)) for text, label in pairs]


# ---------------------------------------------------------------- rows


def timed(model, loss, way, batch, rates):
    """A row of the table; rates: items per second of each epoch of each process."""
    speed = sum(statistics.median(of_process) for of_process in rates)
    print(f"{model}, {loss}, {way}, batch {batch}: {speed:.0f} per second", flush=True)
    return dict(model=model, loss=loss, way=way, batch=batch, per_second=speed, rates=rates)


def beside_best(rows, n_peers):
    """These rows with `speedup`, which is over the best of the first `n_peers` of them."""
    best = max(row["per_second"] for row in rows[:n_peers])
    return [dict(row, speedup=row["per_second"] / best) for row in rows]


def measure_images(args, arch, kd):
    """The rows of one architecture and loss."""
    data = random_data(args.images, args.device)
    loss = "KD" if kd else "one-hot"
    rows = []
    for workers in WORKERS:
        rates = peers(data, arch, kd, workers, args.epochs)
        rows.append(timed(arch, loss, f"peers, {workers} workers", PEERS_BATCH, [rates]))
    flags = student_flags(args, arch, kd)
    eager = student_flags(args, arch, kd, "--no-fast")
    rows.append(timed(arch, loss, "eager", eager.batch_size, ours(eager, args.images)))
    if flags.fast:  # on CUDA
        rows.append(timed(arch, loss, "fast", flags.batch_size, ours(flags, args.images)))
    if kd:
        rows.append(timed(arch, loss, "table", flags.batch_size, ours(flags, args.images, table=True)))
    rows.append(timed(arch, loss, "two processes", flags.batch_size, ours(flags, args.images, processes=2)))
    return beside_best(rows, len(WORKERS))


def measure_text(args, sentences):
    """The rows of one encoder. The Trainer does not distil, and so KD is held against its one-hot training."""
    name = Path(args.encoder).name
    rows = []
    for way, settings in TRAINERS.items():
        rates = trainer_rates(args, sentences, settings)
        rows.append(timed(name, "one-hot", way, TEXT_BATCH, [rates]))
    for loss, rates in script_rates(args, sentences).items():
        way = "glue_distill.py" if loss == "one-hot" else "glue_distill.py (peer: one-hot)"
        rows.append(timed(name, loss, way, TEXT_BATCH, [rates]))
    return beside_best(rows, len(TRAINERS))


def main(argv=None):
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add("--arch", choices=common.ARCHS, nargs="+", default=["resnet20"], help="networks")
    add("--images", type=number(int, 128, 10_000_000), help="random images (default: 50000 on CUDA, 5000 on a CPU)")
    add("--epochs", type=number(int, 1), default=2, help="timed epochs behind each median")
    add("--batch-size", type=number(int, 2), help="of ours (default: 512 on CUDA, 128 on a CPU)")
    add("--encoder", metavar="MODEL", help="a text encoder, folder or hub id, to time glue_distill.py too")
    add("--sentences", metavar="FILE", default="data/glue/SST-2/train.tsv", help="for it: SST-2's train.tsv")
    common.add_device_flag(parser)
    add("--out", type=Path, default=Path("results/benchmark"), help="folder for table and JSON")
    args = parser.parse_args(argv)
    args.device = engine.use_device(args.device)
    cuda = args.device == "cuda"
    args.images = args.images or (50_000 if cuda else 5_000)
    args.batch_size = args.batch_size or (512 if cuda else 128)
    args.out.mkdir(parents=True, exist_ok=True)
    versions = runs.versions()
    made = [versions["hardware"], f"{versions['threads']} threads", f"torch {versions['torch']}"]
    rows = []
    if args.encoder:  # first, for a library may be missing
        versions["transformers"] = metadata.version("transformers")
        made.append(f"transformers {versions['transformers']}")
        rows += measure_text(args, read_sentences(args.sentences, SENTENCES))
    for arch in args.arch:
        rows += measure_images(args, arch, kd=False) + measure_images(args, arch, kd=True)
    lines = []
    for row in rows:
        if "workers" in row["way"] and row["speedup"] < 1:  # of the peers' numbers of workers the best alone is shown
            continue
        words = [row[key] for key in ("model", "loss", "way", "batch")]
        lines.append([*words, f"{row['per_second']:.0f}", f"{row['speedup']:.2f}"])
    headers = ["model", "loss", "way", "batch", "images or sentences/s", "× best peer"]
    text = f"{', '.join(made)}\n\n{claims.markdown_table(headers, lines)}"
    print(text)
    runs.write_json(args.out / "benchmark.json", dict(versions=versions, rows=rows))
    runs.write_text(args.out / "benchmark.md", text)


if __name__ == "__main__":
    runs.cli(main)
