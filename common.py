"""What a fork changes: the table of datasets, augmented views, models, the distillation loss, recipes and flags.

Read it top to bottom. Nothing happens at import time; every script calls these functions from its own `main()`. Shapes
are written [N, C] and so on; images are uint8 NHWC at rest and float NCHW (channels_last in memory) in a batch.
"""

import argparse
import hashlib
import io
import itertools
import json
import math
import os
import re
import shutil
import zipfile
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

import runs
from runs import InputError, number

# ---------------------------------------------------------------- random streams


def stream_seed(*key):
    """A 63-bit seed from any printable key, the same on every machine. Streams of different keys are independent."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def generator(*key):
    """A CPU torch.Generator seeded by `stream_seed(*key)`."""
    return torch.Generator().manual_seed(stream_seed(*key))


def epoch_stream(data, role, seed, epoch):
    """Order [N] of the training images and view [N] of every image in one epoch, on the CPU.

    Both depend on their key alone, so a run can be continued, or a view recomputed, without replaying what came before.
    """
    n = len(data.y_train)
    order = torch.randperm(n, generator=generator("order", role, seed, epoch))
    return order, torch.randint(data.n_views, (n,), generator=generator("views", role, seed, epoch))


# ---------------------------------------------------------------- datasets

ARRAYS = ("x_train", "y_train", "x_test", "y_test")


def digits_arrays(path, data_dir, image_size):
    """scikit-learn's bundled handwritten digits: 1,797 real 8×8 images, grey 0..16 scaled to 0..255; 1,297 train."""
    from sklearn.datasets import load_digits

    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    images = np.round(bunch.images * 255 / 16).astype(np.uint8)[order, :, :, None]
    labels = bunch.target.astype(np.int64)[order]
    return dict(zip(ARRAYS, (images[:1297], labels[:1297], images[1297:], labels[1297:]), strict=True))


def npz_arrays(path, data_dir, image_size):
    """The four `ARRAYS` of an .npz, images uint8 NHWC."""
    return runs.read_npz(path, ARRAYS)


def cifar_arrays(name, data_dir, image_size):
    """CIFAR-10/100: the original python folder in data_dir if it is there, else a download."""
    from torchvision import datasets

    dataset = dict(cifar10=datasets.CIFAR10, cifar100=datasets.CIFAR100)[name]
    with runs.one_at_a_time(data_dir / dataset.base_folder):
        if not (data_dir / dataset.base_folder).is_dir():
            with runs.reading(name, f"put {name}.npz or the folder {dataset.base_folder} into {data_dir}"):
                dataset(data_dir, download=True)
    with runs.reading(data_dir / dataset.base_folder, "it is damaged: remove it to download it again"):
        train, test = dataset(data_dir, train=True), dataset(data_dir, train=False)
    values = (train.data, np.array(train.targets), test.data, np.array(test.targets))
    return dict(zip(ARRAYS, values, strict=True), class_names=train.classes)


def tiny_imagenet_arrays(name, data_dir, image_size):
    """Tiny-ImageNet from its original folder or zip in data_dir, else downloaded; 64×64, val is the test split."""
    from torchvision.datasets.utils import download_url

    folder, archive = data_dir / "tiny-imagenet-200", data_dir / "tiny-imagenet-200.zip"
    with runs.one_at_a_time(archive):
        if not folder.is_dir() and not archive.exists():
            with runs.reading(name, f"put {archive.name}, or the folder {folder.name}, into {data_dir}"):
                partial = archive.with_name(archive.name + ".part")
                partial.unlink(missing_ok=True)
                download_url("http://cs231n.stanford.edu/tiny-imagenet-200.zip", data_dir, partial.name)
                zipfile.ZipFile(partial).close()  # a download that was cut has no directory at its end
                os.replace(partial, archive)
    return folder_arrays(folder if folder.is_dir() else archive, data_dir, 64)


class Dataset(NamedTuple):
    """All that is known by a dataset's name, for `DATASETS`. load(path, data_dir, image_size) -> dict of `ARRAYS`."""

    load: Callable
    pad: int = 4  # pixels of random shift in each direction
    flip: bool = True  # whether half of the views are mirrored
    label_noise: float = 0.0  # unless --label-noise is given
    fp32: bool = False  # too small to gain from bf16
    paper_recipe: str = "paper"
    takes_path: bool = False  # named as NAME:PATH
    size: tuple = ()  # training images, test images, side and classes, for estimates of time without the data


def folder_arrays(path, data_dir, image_size):
    """A folder or zip of pictures, train/<class>/… and val/ or test/, prepared once as memory-mapped arrays beside it.

    Pictures are turned as their EXIF tag says, resized to image_size along the short side and cropped to the centre;
    without image_size all must be square and of one size. Labels number the class folders of train/ in sorted order.
    """
    root = Path(path)
    names, read = picture_files(root)
    with runs.reading(root, "give a folder, or a zip, with train/<class>/ and val/<class>/ (or test/<class>/)"):
        train, test = split_pictures(root, names, read)
    classes = sorted({label for _, label in train})
    unknown = sorted({label for _, label in test} - set(classes))
    if unknown:
        raise InputError(f"{root} has test pictures of {', '.join(unknown[:5])}: train/ has no such class")
    side = image_size or open_picture(read(train[0][0]), root / train[0][0]).height
    listing = hashlib.sha256(json.dumps([train, test, side, [names.get(file) for file, _ in train + test]]).encode())
    beside = root.parent if os.access(root.parent, os.W_OK) else data_dir
    folder = beside / f"{root.stem}-{side}px-{listing.hexdigest()[:12]}"
    with runs.one_at_a_time(folder):
        if not folder.is_dir():
            prepare_pictures(root, folder, dict(train=train, test=test), read, side, bool(image_size))
    arrays = dict(class_names=classes)
    with runs.reading(folder, "remove that folder, it is made again"):
        for split, files in (("train", train), ("test", test)):
            arrays[f"x_{split}"] = np.load(folder / f"x_{split}.npy", mmap_mode="c")
            arrays[f"y_{split}"] = np.searchsorted(classes, [label for _, label in files])
        facts = runs.read_json(folder / "facts.json")
        if len(facts["sha256"]) != 64 or np.array([facts["mean"], facts["std"]], float).shape != (2, 3):
            raise ValueError("facts.json has other entries")
    return dict(arrays, facts=facts)


def picture_files(root):
    """({path below root: [bytes, time or checksum]}, read(path) -> content) of the visible files of a folder or zip."""
    hidden, start = re.compile(r"(^|/)(\.|__MACOSX/)"), ""
    if root.is_dir():
        found = [Path(folder, file) for folder, _, files in os.walk(root, followlinks=True) for file in files]
        names = [name for name in (file.relative_to(root).as_posix() for file in found) if not hidden.search(name)]
        states = {name: (root / name).stat() for name in names}
        known = {name: [state.st_size, state.st_mtime_ns] for name, state in states.items()}
    else:
        with runs.reading(root, "give a folder or a zip of pictures"):
            archive = zipfile.ZipFile(root)
            files = [info for info in archive.infolist() if not info.is_dir() and not hidden.search(info.filename)]
        start = os.path.commonprefix([info.filename.partition("/")[0] + "/" for info in files])  # one folder around all
        start = start if start.endswith("/") and start not in ("train/", "val/", "test/") else ""
        known = {info.filename.removeprefix(start): [info.file_size, info.CRC] for info in files}

    def read(name):
        with runs.reading(root / name, "replace or remove it"):
            return (root / name).read_bytes() if root.is_dir() else archive.read(start + name)

    # In the order of torchvision's ImageFolder, for a folder and for a zip of it.
    return dict(sorted(known.items(), key=lambda item: item[0].split("/"))), read


def split_pictures(root, names, read):
    """[(path, class)] of the training and of the test pictures: of val/ where there is one, else of test/."""
    ending = re.compile(r".+\.(jpe?g|png|bmp|webp|ppm|pgm|tiff?)", re.IGNORECASE)
    pictures = {"train": [], "val": [], "test": []}
    for name in names:
        parts = name.split("/")
        if parts[0] in pictures and len(parts) > 2 and ending.fullmatch(name):
            pictures[parts[0]].append((name, parts[1]))
    test = "val" if pictures["val"] else "test"
    if pictures["val"] and pictures["test"]:
        print(f"{root}: val/ is the test split, test/ is not used")
    if test == "val" and "val/val_annotations.txt" in names and {label for _, label in pictures["val"]} == {"images"}:
        # Tiny-ImageNet as published: all in one folder, with a table of file names and classes.
        lines = read("val/val_annotations.txt").decode().splitlines()
        pictures["val"] = [(f"val/images/{line.split()[0]}", line.split()[1]) for line in lines]
    for split in ("train", test):
        if not pictures[split]:
            raise InputError(f"{root} has no pictures in {split}/<class>/: give train/<class>/ and val/<class>/")
    return pictures["train"], pictures[test]


def prepare_pictures(root, folder, splits, read, side, resize):
    """Read every picture once into folder/x_<split>.npy; InputError names the first ten unusable ones."""
    from PIL import ImageOps

    unfinished, problems, cropped = folder.with_name(f".{folder.name}.tmp"), [], []
    shutil.rmtree(unfinished, ignore_errors=True)
    unfinished.mkdir(parents=True)

    def prepare(images, k, name):
        try:
            image = open_picture(read(name), root / name)
            if not resize and image.size != (side, side):
                size = f"{image.width}×{image.height}, not {side}×{side}"
                raise InputError(f"{root / name} is {size}: give --image-size to resize")
        except InputError as error:
            problems.append(str(error))
            return
        images[k] = np.array(ImageOps.fit(image, (side, side)))
        if image.width != image.height:
            cropped.append(name)

    total = sum(map(len, splits.values()))
    # PIL decodes outside of the interpreter's lock. In parts, so that an interrupt need not wait for all pictures.
    with ThreadPoolExecutor(cores()) as pool, tqdm(desc="reading pictures", total=total, disable=None) as bar:
        for split, files in splits.items():
            shape = (len(files), side, side, 3)
            images = np.lib.format.open_memmap(unfinished / f"x_{split}.npy", "w+", np.uint8, shape)
            for start in range(0, len(files), 1000):
                names = [name for name, _ in files[start : start + 1000]]
                list(pool.map(prepare, itertools.repeat(images), itertools.count(start), names))
                bar.update(len(names))
            images.flush()
    if problems:
        shutil.rmtree(unfinished)
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError(f"{len(problems)} pictures cannot be used: {'; '.join(sorted(problems)[:10])}{more}")
    if cropped:
        print(f"{root}: {len(cropped)} pictures are not square: resized along the short side, and the centre cropped")
    facts = image_facts(*(np.load(unfinished / f"x_{split}.npy", mmap_mode="r") for split in splits))
    runs.write_json(unfinished / "facts.json", facts)
    os.replace(unfinished, folder)
    print(f"{root}: its pictures are kept as arrays in {folder}")


def open_picture(content, name):
    """An RGB image of 8 bits from a picture's bytes, turned as its EXIF tag says; InputError names a bad one."""
    from PIL import Image, ImageOps

    with runs.reading(name, "replace or remove it"):
        # By content, a file of any name could be another format; decoding EPS would start a program.
        formats = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP")
        image = ImageOps.exif_transpose(Image.open(io.BytesIO(content), formats=formats))
        if image.mode == "F":
            raise InputError(f"{name} has float pixels, whose scale is unknown: save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits; PIL's own conversion would clip them at 255
            image = Image.fromarray((np.asarray(image) / 257 + 0.5).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


DATASETS = {
    "digits": Dataset(digits_arrays, pad=1, flip=False, label_noise=0.3, fp32=True, size=(1297, 500, 8, 10)),
    "cifar10": Dataset(cifar_arrays, size=(50_000, 10_000, 32, 10)),
    "cifar100": Dataset(cifar_arrays, size=(50_000, 10_000, 32, 100)),
    "tiny-imagenet": Dataset(tiny_imagenet_arrays, paper_recipe="paper tiny-imagenet", size=(100_000, 10_000, 64, 200)),
    "npz": Dataset(npz_arrays, takes_path=True),
    "folder": Dataset(folder_arrays, takes_path=True),  # also a zip
}
DATA_HELP = ", ".join(f"{name}:PATH" if row.takes_path else name for name, row in DATASETS.items())


def dataset_of(name):
    """The row of DATASETS for a --data; InputError for an unknown one."""
    kind, _, path = name.partition(":")
    row = DATASETS.get(kind)
    if row is None or row.takes_path != bool(path):
        raise InputError(f"unknown --data {name!r}: use {DATA_HELP}")
    return row


def image_facts(x_train, x_test):
    """Hash of all images, and mean and standard deviation [C] of the training images in 0..1 units, as lists."""
    digest, histogram = hashlib.sha256(), 0
    for images in (x_train, x_test):
        for k in range(0, len(images), 1024):  # in parts: they may be a map of a file larger than the memory
            part = np.ascontiguousarray(images[k : k + 1024])
            digest.update(part.data)
            if images is x_train:
                channels = range(part.shape[3])
                histogram = histogram + np.stack([np.bincount(part[..., c].ravel(), minlength=256) for c in channels])
    levels = np.arange(256) / 255
    mean = np.array([(h * levels).sum() / h.sum() for h in histogram])
    std = [np.sqrt((h * (levels - m) ** 2).sum() / h.sum()) for h, m in zip(histogram, mean, strict=True)]
    return dict(sha256=digest.hexdigest(), mean=mean.tolist(), std=np.maximum(std, 1e-6).tolist())


def check_arrays(arrays, source):
    """The same dict with labels as int64 0..C−1 and `class_names`; InputError names what is wrong.

    Classes are those of the training labels: gaps are closed, and the original numbers kept as names.
    """
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3) or x.shape[1] != x.shape[2] or not x.size:
            raise InputError(f"{source}: x_{split} is {x.dtype} {list(x.shape)}; it must be uint8 [N, H, H, 1 or 3]")
        if y.shape != (len(x),) or y.dtype.kind not in "iu":
            raise InputError(f"{source}: y_{split} is {y.dtype} {list(y.shape)}; it must be whole numbers [{len(x)}]")
    classes = np.unique(arrays["y_train"])
    unseen = np.setdiff1d(arrays["y_test"], classes)
    if len(unseen):
        raise InputError(f"{source}: test labels {unseen[:5].tolist()} are in no training image: remove those images")
    if len(classes) < 2:
        raise InputError(f"{source}: all training labels are {classes[0]}; there must be at least 2 classes")
    last = len(classes) - 1
    if not np.array_equal(classes, np.arange(last + 1)):
        print(f"{source}: the {last + 1} labels within {classes[0]}..{classes[-1]} are numbered 0..{last}")
    train, test = (list(arrays[key].shape[1:]) for key in ("x_train", "x_test"))
    if train != test:
        raise InputError(f"{source}: train images are {train} but test images {test}: give both the same shape")
    names = arrays.get("class_names") or [str(c) for c in classes.tolist()]
    labels = {key: np.searchsorted(classes, arrays[key]).astype(np.int64) for key in ("y_train", "y_test")}
    return dict(arrays, **labels, class_names=names)


@dataclass
class Data:
    """One dataset on one device, with the label noise and the subset of one run.

    x_train [N, H, W, C] and x_test uint8, on the device, or on the CPU as maps of files where they do not fit there;
    y_train int64 with label noise, y_clean without; index [N] the position of each training image in the full training
    set; mean, std [C] of the full training set in 0..1 units; pad and flip as in `Dataset`; facts for config.json.
    """

    x_train: torch.Tensor
    y_train: torch.Tensor
    y_clean: torch.Tensor
    index: torch.Tensor
    x_test: torch.Tensor
    y_test: torch.Tensor
    mean: torch.Tensor
    std: torch.Tensor
    classes: int
    pad: int
    flip: bool
    facts: dict
    mapped: bool = False

    def __post_init__(self):
        self.device = self.y_train.device
        self.padded = None if self.mapped else self.pad_black(self.x_train)
        self.side, self.shifts = self.x_train.shape[1], 2 * self.pad + 1
        self.padded_side = self.side + 2 * self.pad
        ramp = torch.arange(self.side, device=self.device)
        straight = ramp.view(-1, 1) * self.padded_side + ramp
        self.crops = torch.stack([straight, straight.flip(1)]).flatten(1)  # pixels of a crop, from its corner on
        self.n_views = self.shifts**2 * (2 if self.flip else 1)

    def pad_black(self, images):
        """With black before normalisation, which is what torchvision's RandomCrop(padding=p) does."""
        return F.pad(images, (0, 0, self.pad, self.pad, self.pad, self.pad))

    def batch(self, index, view):
        """Augmented float batch [B, C, H, W] of training images `index` [B] in the views `view` [B].

        The view that crops at row dy, column dx (0 .. 2·pad) is dy·shifts + dx; with flips twice that, + 1 if mirrored.
        """
        padded = self.padded
        if self.mapped:
            padded = self.pad_black(self.x_train[index.cpu()].to(self.device))
            index = torch.arange(len(index), device=self.device)
        flip, shift = (view % 2, view // 2) if self.flip else (torch.zeros_like(view), view)
        corner = (index * self.padded_side + shift // self.shifts) * self.padded_side + shift % self.shifts
        pixels = padded.flatten(0, 2).index_select(0, (corner.view(-1, 1) + self.crops[flip]).flatten())
        return self.normalise(pixels.view(len(index), self.side, self.side, padded.shape[-1]))

    def normalise(self, images):
        """uint8 [B, H, W, C] to normalised float [B, C, H, W] on the device, channels_last in memory."""
        return ((images.to(self.device).float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)


def load_data(name, data_dir="data", subset=0, label_noise=None, data_seed=0, image_size=None, device="cpu"):
    """Load a dataset onto `device` as `Data`: its prepared data_dir/NAME.npz first, else as DATASETS says.

    subset: that many training images, class-balanced, 0 for all. label_noise P: each training label is replaced with
    probability P by a uniformly drawn other class; the draw depends on data_seed and on the position in the full
    training set alone, so every run, subset and architecture sees the same noise; None: that of DATASETS.
    Errors: InputError for an unknown name, unreadable files, bad arrays, or a subset larger than the data.
    """
    row, path, data_dir = dataset_of(name), name.partition(":")[2] or name, Path(data_dir)
    prepared = data_dir / f"{name}.npz"
    if not row.takes_path and prepared.exists():
        arrays = check_arrays(npz_arrays(prepared, data_dir, image_size), prepared)
    else:
        arrays = check_arrays(row.load(path, data_dir, image_size), path)
    x_train, y_clean, x_test, y_test = (arrays[key] for key in ARRAYS)
    classes, n = len(arrays["class_names"]), len(x_train)
    label_noise = row.label_noise if label_noise is None else label_noise
    if subset > n:
        raise InputError(
            f"--subset {subset} is beyond the {n} training images of {name}: use at most {n}, or 0 for all"
        )
    facts = arrays.get("facts") or image_facts(x_train, x_test)

    noise = np.random.RandomState(stream_seed("label noise", data_seed) % 2**32)  # RandomState never changes
    flipped = noise.random_sample(n) < label_noise
    y_train = np.where(flipped, (y_clean + noise.randint(1, classes, n)) % classes, y_clean)
    index = np.arange(n)
    if subset:
        index = balanced_subset(y_clean, subset, data_seed)
        x_train, y_train, y_clean = x_train[index], y_train[index], y_clean[index]

    digest = hashlib.sha256(facts["sha256"].encode())
    for array in (index, y_train, y_clean, y_test):
        digest.update(np.ascontiguousarray(array).data)
    described = dict(name=name, classes=classes, image=list(x_train.shape[1:]), n_train=len(x_train))
    described |= dict(n_test=len(x_test), subset=subset, label_noise=label_noise)
    described |= dict(flipped=int((y_train != y_clean).sum()), data_seed=data_seed)
    described |= dict(sha256=digest.hexdigest(), class_names=arrays["class_names"])
    # On the device the training images lie twice, once with their border.
    needed = 3 * (x_train.nbytes + x_test.nbytes)
    mapped = isinstance(x_train, np.memmap) and needed > free_memory(torch.device(device)) / 2

    def tensor(array, where=device):
        return torch.as_tensor(np.ascontiguousarray(array) if where == device else array).to(where)

    images = [tensor(x, "cpu" if mapped else device) for x in (x_train, x_test)]
    mean, std = (tensor(np.array(facts[key])).float() for key in ("mean", "std"))
    labels = [tensor(array) for array in (y_train, y_clean, index)]
    return Data(images[0], *labels, images[1], tensor(y_test), mean, std, classes, row.pad, row.flip, described, mapped)


def balanced_subset(labels, count, data_seed):
    """Sorted positions of the first `count` images of a seeded shuffle, round-robin over classes: they are nested."""
    shuffle = np.random.RandomState(stream_seed("subset", data_seed) % 2**32).permutation(len(labels))
    rank = np.empty(len(labels), int)
    for c in range(labels.max() + 1):
        members = shuffle[labels[shuffle] == c]
        rank[members] = np.arange(len(members))
    return np.sort(shuffle[np.argsort(rank[shuffle], kind="stable")[:count]])


def some_test_images(data, count):
    """(uint8 images, labels) of `count` test images, or all, drawn evenly over classes: files may be sorted by them."""
    chosen = torch.as_tensor(balanced_subset(data.y_test.cpu().numpy(), count, data.facts["data_seed"]))
    return data.x_test[chosen.to(data.x_test.device)], data.y_test[chosen.to(data.device)]


def free_memory(device):
    """Bytes of memory that are free on a device; on a CPU what the system counts as available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):  # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# ---------------------------------------------------------------- models

RESNETS = tuple(f"resnet{depth}" for depth in (8, 14, 20, 32, 44, 56, 110))
ARCHS = (*RESNETS, "mobilenetv2", "mlp", "cnn")


def conv_norm(channels_in, channels_out, size=3, stride=1, groups=1):
    """A convolution that keeps the side (over stride), and its batch normalisation."""
    conv = nn.Conv2d(channels_in, channels_out, size, stride, size // 2, groups=groups, bias=False)
    return conv, nn.BatchNorm2d(channels_out)


class BasicBlock(nn.Module):
    def __init__(self, channels_in, channels_out, stride):
        super().__init__()
        self.conv1, self.bn1 = conv_norm(channels_in, channels_out, stride=stride)
        self.conv2, self.bn2 = conv_norm(channels_out, channels_out)
        self.stride, self.extra = stride, channels_out - channels_in

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:  # option A: subsample and pad with zero channels, no parameters
            # Not x[:, :, ::2, ::2]: its gradient is not channels_last, and slows down all before it.
            x = F.avg_pool2d(x, 1, self.stride)
            x = F.pad(x, (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(out + x)


class ResNet(nn.Module):
    """CIFAR ResNet of depth 6n+2 with option-A shortcuts (He et al. 2016, §4.2); 16·width channels at first."""

    def __init__(self, depth, classes, in_channels=3, width=1.0):
        super().__init__()
        channels = max(1, round(16 * width))
        layers, before = [*conv_norm(in_channels, channels), nn.ReLU()], channels
        for stage in range(3):
            for block in range((depth - 2) // 6):
                after = channels * 2**stage
                layers.append(BasicBlock(before, after, 2 if stage and not block else 1))
                before = after
        self.features, self.fc = nn.Sequential(*layers), nn.Linear(before, classes)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, channels_in, channels_out, expansion, stride):
        super().__init__()
        hidden = expansion * channels_in
        layers = [*conv_norm(channels_in, hidden, 1), nn.ReLU()]
        layers += [*conv_norm(hidden, hidden, 3, stride, groups=hidden), nn.ReLU()]
        self.layers = nn.Sequential(*layers, *conv_norm(hidden, channels_out, 1))
        self.residual = stride == 1
        widens = self.residual and channels_in != channels_out
        self.shortcut = nn.Sequential(*(conv_norm(channels_in, channels_out, 1) if widens else ()))

    def forward(self, x):
        return self.layers(x) + self.shortcut(x) if self.residual else self.layers(x)


class MobileNetV2(nn.Module):
    """MobileNet-v2 (Sandler et al. 2018) with the strides usual on CIFAR: the first two reductions are left out.

    The 2.30M-parameter form for 10 classes, with a 1×1 shortcut where only the channels change and no dropout.
    """

    BLOCKS = ((1, 16, 1, 1), (6, 24, 2, 1), (6, 32, 3, 2), (6, 64, 4, 2), (6, 96, 3, 1), (6, 160, 3, 2), (6, 320, 1, 1))

    def __init__(self, classes, in_channels=3, width=1.0):
        super().__init__()
        before = max(1, round(32 * width))
        layers = [*conv_norm(in_channels, before), nn.ReLU()]
        for expansion, channels, repeats, stride in self.BLOCKS:
            for block in range(repeats):
                after = max(1, round(channels * width))
                layers.append(InvertedResidual(before, after, expansion, stride if not block else 1))
                before = after
        last = round(1280 * max(1.0, width))
        layers += [*conv_norm(before, last, 1), nn.ReLU()]
        self.features, self.fc = nn.Sequential(*layers), nn.Linear(last, classes)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def mlp(image, classes, hidden):
    side, _, channels = image
    layers = [nn.Flatten(), nn.Linear(side * side * channels, hidden), nn.ReLU(), nn.Linear(hidden, hidden), nn.ReLU()]
    return nn.Sequential(*layers, nn.Linear(hidden, classes))


def cnn(channels, classes, hidden):
    """No batch normalisation: the plain network of the eigenspace and gradient analyses."""
    layers = []
    for before, after in ((channels, hidden), (hidden, 2 * hidden)):
        layers += [nn.Conv2d(before, after, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    layers += [nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, nn.Linear(2 * hidden, classes))


def torchvision_model(name, classes, channels):
    from torchvision import models

    known = models.list_models(module=models)
    if name not in known:
        raise InputError(f"unknown --arch torchvision:{name}: use one of {', '.join(known)}")
    if channels != 3:
        raise InputError(f"--arch torchvision:{name} takes 3 channels, the data has {channels}: use {', '.join(ARCHS)}")
    extra = dict(aux_logits=False, init_weights=True) if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=classes, **extra)


def torchvision_size(name):
    """The side of the images that a network of torchvision was made for."""
    from torchvision import models

    with runs.reading(f"torchvision:{name}", "use a classifier that torchvision has weights for, or give a size"):
        return models.get_model_weights(name).DEFAULT.transforms().crop_size[0]


def build_model(arch, classes, image, width=1.0, seed=0):
    """A freshly initialised classifier: float images [B, C, H, W] to logits [B, classes].

    arch: one of ARCHS or torchvision:<name>; image: (H, W, C) of the data; width multiplies the channels (hidden
    units); seed: any key of `stream_seed`. The global random state is left alone. InputError when the architecture
    is unknown or does not fit the images.
    """
    side, _, channels = image
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed("init", seed))  # the CPU's alone
        if arch.startswith("torchvision:"):
            if width != 1:
                raise InputError(f"--width does not apply to {arch}: leave it out")
            model = torchvision_model(arch.removeprefix("torchvision:"), classes, channels)
        elif arch in ARCHS and arch.startswith("resnet"):
            model = ResNet(int(arch[6:]), classes, channels, width)
        elif arch == "mobilenetv2":
            model = MobileNetV2(classes, channels, width)
        elif arch == "mlp":
            model = mlp(image, classes, max(1, round(256 * width)))
        elif arch == "cnn":
            model = cnn(channels, classes, max(1, round(32 * width)))
        else:
            raise InputError(f"unknown --arch {arch!r}: use {', '.join(ARCHS)} or torchvision:<name>")
        if not arch.startswith("torchvision:"):
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, channels, side, side))
    except (RuntimeError, ValueError, AssertionError) as error:
        what = f"--arch {arch} does not fit {side}×{side}×{channels} images ({runs.first_line(error)})"
        raise InputError(f"{what}: choose another architecture or larger images") from None
    return model.train()


def check_model(args, data):
    """InputError when --arch does not fit the data or the batches, for a script to call before it discards anything."""
    model = build_model(args.arch, data.classes, data.facts["image"], args.width)
    batch, world = min(args.batch_size, len(data.y_train)), runs.ranks()[1]
    if batch % world:
        raise InputError(f"a batch of {batch} images does not split over {world} processes: give another --batch-size")
    normalises = any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules())
    if batch // world == 1 and normalises:
        what = f"--batch-size (or --subset) {batch} leaves {args.arch} one image to normalise over"
        raise InputError(f"{what}: use at least {2 * world}")


# ---------------------------------------------------------------- loss


def kd_loss(student_logits, teacher_logits, temperature):
    """T²·KL(teacher_T ‖ student_T), mean over the batch (Hinton et al. 2015, §2). Logits [B, C]; returns a scalar."""
    teacher = F.log_softmax(teacher_logits / temperature, 1)
    student = F.log_softmax(student_logits / temperature, 1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


# ---------------------------------------------------------------- recipes

# The paper's claims are about teachers that interpolate their training labels. The rule for a schedule, fixed before
# any run: the shortest of 50, 100, 150, 200 … epochs after which the teacher fits at least 90% of its training labels,
# noisy ones included (mean of 5 seeds); nothing else is looked at. Small subsets trained until they are fitted are the
# custom of papers on training dynamics (Cohen et al. 2021: 5,000 CIFAR-10 images, until 99% train accuracy).
# quick: digits on a CPU, by that rule. short: an hour-scale GPU recipe. paper: the published one as best known.
RECIPES = {
    "quick": dict(epochs=100, batch_size=64, lr=0.1, warmup=6, schedule="cosine", milestones=()),
    "short": dict(epochs=80, batch_size=512, lr=0.4, warmup=5, schedule="cosine", milestones=()),
    "paper": dict(epochs=450, batch_size=1024, lr=1.0, warmup=15, schedule="step", milestones=(200, 300, 400)),
    "paper tiny-imagenet": dict(epochs=200, batch_size=1024, lr=0.1, warmup=5, schedule="step", milestones=(75, 135)),
}
SCHEDULES = ("cosine", "step")


def learning_rate(step, args, per_epoch):
    """Learning rate of a step (counted from 0): linear warm-up, then cosine to zero or ×0.1 at the milestones."""
    epoch = step / per_epoch
    if epoch < args.warmup:
        return args.lr * (step + 1) / (args.warmup * per_epoch + 1)
    if args.schedule == "step":
        return args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.milestones)
    return args.lr * 0.5 * (1 + math.cos(math.pi * (epoch - args.warmup) / (args.epochs - args.warmup)))


def total_steps(args, data):
    """(steps per epoch, steps of the whole run); an epoch drops its last, incomplete batch."""
    per_epoch = len(data.y_train) // min(args.batch_size, len(data.y_train))
    return per_epoch, per_epoch * (args.stop_epoch or args.epochs)


def snapshot_steps(args, data):
    """The steps of --snapshot-at."""
    return {round(share * total_steps(args, data)[1]) for share in args.snapshot_at}


# ---------------------------------------------------------------- flags

OUT_HELP = "run folder; {seed} in it is the seed, else -s<seed> is appended to several (default: runs/<what>-s<seed>)"


def add_data_flags(parser):
    """The flags that say which images."""
    add = parser.add_argument_group("data").add_argument
    add("--data", default="digits", help=f"{DATA_HELP} (a folder or zip of pictures)")
    add("--data-dir", default="data", help="where datasets lie, and downloads go")
    add("--subset", type=number(int, 0), default=0, help="train on that many images, class-balanced; 0 for all")
    noise = "share of training labels replaced by another class (default: 0.3 for digits, else 0)"
    add("--label-noise", type=number(float, 0, 1, open_high=True), help=noise)
    add("--data-seed", type=number(int, 0), default=0, help="seed of the subset and of the label noise")
    add("--image-size", type=number(int, 8, 4096), help="resize the pictures of folder:PATH to this side")


def add_flags(parser, out_help=OUT_HELP):
    """The flags of data, model, recipe and run. What a run depends on is what is defined here, and is compared."""
    add_data_flags(parser)
    add = parser.add_argument_group("model and training").add_argument
    add("--arch", default="resnet8", help=f"{', '.join(ARCHS)} or torchvision:<name>")
    add("--width", type=number(float, 0, 64, open_low=True), default=1.0, help="multiplies the model's channels")
    add("--recipe", choices=("quick", "short", "paper"), default="quick", help="preset of the six flags below")
    add("--epochs", type=number(int, 1), help="passes over the training set; warm-up and milestones scale along")
    add("--batch-size", type=number(int, 1), help="images per step; an epoch's last, incomplete batch is dropped")
    add("--lr", type=number(float, 0, 1e38, open_low=True), help="peak learning rate")
    add("--warmup", type=number(float, 0), help="epochs of linear warm-up")
    add("--schedule", choices=SCHEDULES, help="after warm-up: cosine to zero, or ×0.1 at each milestone")
    add("--milestones", type=number(float, 0), nargs="*", metavar="EPOCH", help="epochs of ×0.1 of the step schedule")
    add("--stop-epoch", type=number(int, 1), help="stop after that epoch of the schedule; a later or no stop goes on")
    add("--momentum", type=number(float, 0, 1, open_high=True), default=0.9, help="Nesterov momentum")
    add("--weight-decay", type=number(float, 0, 1e38), default=5e-4, help="on all parameters")
    kept = "shares of training at which to keep the state, for the scripts that go on from there"
    add("--snapshot-at", type=number(float, 0, 1), nargs="*", metavar="SHARE", default=[], help=kept)
    precision = "auto: bf16 autocast on CUDA and on CPUs with bf16 arithmetic (not for digits), else fp32"
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=precision)
    group = parser.add_argument_group("run")
    add = group.add_argument
    seeds = ("--seeds", "--seed")
    add(*seeds, type=number(int, 0), nargs="+", default=[0], metavar="SEED", help="one run for each")
    add("--out", help=out_help)
    add("--overwrite", action="store_true", help="discard what is in the run folder and start afresh")
    add("--eval-every", type=number(int, 1), help="epochs between test evaluations (default: 20 in a run, or fewer)")
    add("--quiet", action="store_true", help="one line per run instead of one per epoch")
    add("--tensorboard", action="store_true", help="write the curves for TensorBoard too, into the run folder")
    add_device_flag(group)
    fast = "compile the model and, on CUDA, run each step as one CUDA graph (default: on CUDA)"
    add("--fast", action=argparse.BooleanOptionalAction, help=fast)


def add_device_flag(group):
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where it is")


def add_process_flags(parser):
    """--jobs and --shard, for the scripts that train a run for each seed."""
    add = parser.add_argument_group("processes").add_argument
    add("--jobs", type=number(int, 1, 1000), default=1, help="processes side by side that share the seeds")
    shard = "i/n: train every n-th seed alone, from the i-th on (from 0), one of n machines (default: all)"
    add("--shard", type=runs.shard, default=(0, 1), help=shard)


def only_flags(args, *adders, **changed):
    """The flags that `adders` (such as `add_flags`) define, and no others, some `changed`: what a run depends on."""
    parser = argparse.ArgumentParser()
    for adder in adders:
        adder(parser)
    return argparse.Namespace(**{name: getattr(args, name) for name in vars(parser.parse_args([]))} | changed)


def fill_recipe(args):
    """Fill in what the flags left to the recipe, and refuse what does not fit together; returns args."""
    row = dataset_of(args.data)
    preset = RECIPES[row.paper_recipe if args.recipe == "paper" else args.recipe]
    if args.milestones and (args.schedule or preset["schedule"]) != "step":  # given ones: a recipe's are not in yet
        raise InputError("--milestones belong to --schedule step: give both, or neither")
    scale = (args.epochs or preset["epochs"]) / preset["epochs"]
    scaled = dict(preset, warmup=preset["warmup"] * scale, milestones=[m * scale for m in preset["milestones"]])
    for flag, value in scaled.items():
        if getattr(args, flag) is None:
            setattr(args, flag, value)
    if args.schedule == "step" and not args.milestones:
        raise InputError("--schedule step needs --milestones, the epochs at which the learning rate drops")
    if args.warmup >= args.epochs:
        raise InputError(f"--warmup {args.warmup:g} must be less than --epochs {args.epochs}")
    if args.stop_epoch and args.stop_epoch > args.epochs:
        raise InputError(f"--stop-epoch {args.stop_epoch} is beyond --epochs {args.epochs}: give at most {args.epochs}")
    runs.check_seeds(args.seeds)
    return args


def data_from(args):
    """`load_data` with the flags of `add_data_flags`."""
    if args.image_size and not args.data.startswith("folder:"):
        raise InputError(f"--image-size resizes the images of folder:PATH, not of {args.data}: leave it out")
    noise = args.label_noise
    return load_data(args.data, args.data_dir, args.subset, noise, args.data_seed, args.image_size, args.device)
