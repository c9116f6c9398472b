"""What a fork changes: the table of datasets, augmented views, models, the losses, recipes and flags.

Read it top to bottom. Nothing happens at import time; every script calls these functions from its own `main()`. Shapes
are written [N, C] and so on; images are uint8 NHWC at rest and float NCHW (channels_last in memory) in a batch.
"""

import argparse
import contextlib
import hashlib
import math
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import runs
from runs import InputError, number

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from scipy import special
from tqdm import tqdm

# ---------------------------------------------------------------- random streams


def stream_seed(*key):
    """A 63-bit seed from any printable key, the same on every machine. Streams of different keys are independent."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def generator(*key):
    """A CPU torch.Generator seeded by `stream_seed(*key)`."""
    return torch.Generator().manual_seed(stream_seed(*key))


def epoch_stream(data, role, seed, epoch):
    """Order [N] of the training images and view [N] of every image in one epoch, on the CPU."""
    # Both depend on their key alone: a run is continued, and a view recomputed, without replaying what came before.
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
    """The four `ARRAYS` of an .npz, images uint8 NHWC or NHW; class_names [C] where it has them."""
    return runs.read_npz(path, ARRAYS, optional=["class_names"])


def cifar_arrays(name, data_dir, image_size):
    """CIFAR-10/100: the original python folder in data_dir if it is there, else a download."""
    from torchvision import datasets

    dataset = dict(cifar10=datasets.CIFAR10, cifar100=datasets.CIFAR100)[name]
    folder = data_dir / dataset.base_folder
    with runs.one_at_a_time(folder):
        if not folder.is_dir():
            with runs.reading(name, f"put {name}.npz or the folder {folder.name} into {data_dir}"):
                dataset(data_dir, download=True)
    with runs.reading(folder, "it is damaged: remove it to download it again"):
        train = dataset(data_dir, train=True)
        test = dataset(data_dir, train=False)
    values = (train.data, np.array(train.targets), test.data, np.array(test.targets))
    return dict(zip(ARRAYS, values, strict=True), class_names=train.classes)


def tiny_imagenet_arrays(name, data_dir, image_size):
    """Tiny-ImageNet, val as test split, of its folder in data_dir or downloaded; decoded once, into an .npz there."""
    from torchvision.datasets.utils import download_and_extract_archive

    folder = data_dir / "tiny-imagenet-200"
    kept = data_dir / f"{name}.npz"
    with runs.one_at_a_time(folder):
        if kept.exists():  # another process made it meanwhile
            return npz_arrays(kept, data_dir, image_size)
        if not folder.is_dir():
            with runs.reading(name, f"put the folder {folder.name} into {data_dir}"):
                url = f"http://cs231n.stanford.edu/{folder.name}.zip"
                unpacked = data_dir / "tiny-imagenet.part"
                # With its checksum: a download that was cut is made again.
                md5 = "90528d7ca1a48142e341f4ef8d21d0de"
                download_and_extract_archive(url, data_dir, unpacked, md5=md5, remove_finished=True)
                os.replace(unpacked / folder.name, folder)  # whole or not at all
        arrays = folder_arrays(folder, data_dir, 64)
        with contextlib.suppress(OSError):  # where nothing can be written it is decoded every time
            runs.write_npz(kept, arrays)
            print(f"{folder}: its pictures are kept as arrays in {kept}")
    return arrays


class Dataset(NamedTuple):
    """All that is known by a dataset's name, for `DATASETS`. load(path, data_dir, image_size) -> dict of `ARRAYS`."""

    load: Callable
    pad: int = 4  # pixels of random shift in each direction
    flip: bool = True  # whether half of the views are mirrored
    label_noise: float = 0.0  # unless --label-noise is given
    fp32: bool = False  # too small to gain from bf16
    paper_recipe: str = "paper"
    takes_path: bool = False  # named as NAME:PATH


def folder_arrays(path, data_dir, image_size):
    """A folder of pictures, train/<class>/… and val/ or test/, read into memory in the order of ImageFolder.

    Pictures are turned as their EXIF tag says, resized to image_size along the short side and cropped to the centre;
    without image_size all must be square and of one size. Labels number the class folders of train/ in sorted order.
    """
    from torchvision.datasets import ImageFolder

    root = Path(path)
    with runs.reading(root, "give a folder with train/<class>/ and val/<class>/ (or test/<class>/)"):
        train = ImageFolder(root / "train")
        listing = root / "val" / "val_annotations.txt"
        # Tiny-ImageNet as published: all in one folder, with a table of file names and classes. Many copies are sorted
        # into class folders since.
        if listing.exists() and next((root / "val" / "images").glob("*"), None):
            rows = [line.split()[:2] for line in listing.read_text().splitlines()]
            test = [(str(root / "val" / "images" / file), label) for file, label in rows]
        else:
            split = "val" if (root / "val").is_dir() else "test"
            found = ImageFolder(root / split)
            test = [(file, found.classes[k]) for file, k in found.samples]
            if split == "val" and (root / "test").is_dir():
                print(f"{root}: val/ is the test split, test/ is not used")
    hidden = [label for label in train.classes if label.startswith(".")]
    if hidden:
        raise InputError(f"{root / 'train' / hidden[0]} is no class of pictures: remove that folder")
    unknown = sorted({label for _, label in test} - set(train.classes))
    if unknown:
        raise InputError(f"{root} has test pictures of {', '.join(unknown[:5])}: train/ has no such class")
    unseen = sorted(set(train.classes) - {label for _, label in test})
    if unseen:
        print(f"note: {root} has no test picture of {', '.join(unseen[:5])} ({len(unseen)} classes)")
    y_test = np.array([train.class_to_idx[label] for _, label in test])
    files = [file for file, _ in (*train.samples, *test)]
    images = picture_array(files, root, image_size)
    n = len(train)
    values = (images[:n], np.array(train.targets), images[n:], y_test)
    return dict(zip(ARRAYS, values, strict=True), class_names=train.classes)


def picture_array(files, root, image_size):
    """uint8 [N, side, side, 3] of picture files; InputError names the first ten unusable ones."""
    from torchvision.transforms.functional import center_crop, resize

    side = image_size
    images = []
    problems = []
    cropped = 0
    for file in tqdm(files, "reading pictures", disable=None):
        try:
            image = open_picture(file)
            side = side or image.height
            if not image_size and image.size != (side, side):
                raise InputError(f"{file} is {image.width}×{image.height}, not {side}×{side}: give --image-size")
        except InputError as error:
            problems.append(str(error))
            continue
        cropped += image.width != image.height
        if min(image.size) != side:
            image = resize(image, side)  # bilinear with antialias, the short side
        images.append(np.array(center_crop(image, side)))
    if problems:
        more = f"; and {len(problems) - 10} more" if len(problems) > 10 else ""
        raise InputError(f"{len(problems)} pictures cannot be used: {'; '.join(problems[:10])}{more}")
    if cropped:
        print(f"{root}: {cropped} pictures are not square: resized along the short side, and the centre cropped")
    return np.stack(images)


def open_picture(file):
    """An RGB image of 8 bits from a picture file, turned as its EXIF tag says; InputError names a bad one."""
    from PIL import Image, ImageOps

    with runs.reading(file, "replace or remove it"):
        # By content, a file of any name could be another format; decoding EPS would start a program.
        formats = ("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP")
        image = ImageOps.exif_transpose(Image.open(file, formats=formats))
        if image.mode == "F":
            raise InputError(f"{file} has float pixels, whose scale is unknown: save it with 8 or 16 bits")
        if image.mode.startswith("I"):  # 16 bits; PIL's own conversion would clip them at 255
            image = Image.fromarray((np.asarray(image) / 257 + 0.5).clip(0, 255).astype(np.uint8))
        return image.convert("RGB")


DATASETS = {
    "digits": Dataset(digits_arrays, pad=1, flip=False, label_noise=0.3, fp32=True),
    "cifar10": Dataset(cifar_arrays),
    "cifar100": Dataset(cifar_arrays),
    "tiny-imagenet": Dataset(tiny_imagenet_arrays, paper_recipe="paper tiny-imagenet"),
    "npz": Dataset(npz_arrays, takes_path=True),
    "folder": Dataset(folder_arrays, takes_path=True),
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
    digest = hashlib.sha256(np.ascontiguousarray(x_train).data)
    digest.update(np.ascontiguousarray(x_test).data)
    levels = np.arange(256) / 255
    mean = []
    std = []
    parts = np.array_split(x_train, 1 + len(x_train) // 1000)  # for bincount makes 8 bytes of each pixel
    for c in range(x_train.shape[3]):
        counts = sum(np.bincount(part[..., c].ravel(), minlength=256) for part in parts)
        mean.append((counts * levels).sum() / counts.sum())
        variance = (counts * (levels - mean[c]) ** 2).sum() / counts.sum()
        std.append(max(np.sqrt(variance), 1e-6))
    return dict(sha256=digest.hexdigest(), mean=mean, std=std)


def check_arrays(arrays, source):
    """The same dict with labels as int64 0..C−1, gaps closed, and `class_names`; InputError names what is wrong."""
    arrays = dict(arrays)
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.ndim == 3:  # grey, without an axis for its channel
            x = x[..., None]
            arrays[f"x_{split}"] = x
        fits = x.dtype == np.uint8 and x.ndim == 4 and x.size and x.shape[1] == x.shape[2] and x.shape[3] in (1, 3)
        if not fits:
            raise InputError(f"{source}: x_{split} is {x.dtype} {list(x.shape)}; it must be uint8 [N, H, H, 1 or 3]")
        if y.shape != (len(x),) or y.dtype.kind not in "iu":
            raise InputError(f"{source}: y_{split} is {y.dtype} {list(y.shape)}; it must be whole numbers [{len(x)}]")
        if (y < 0).any():
            raise InputError(f"{source}: {(y < 0).sum()} labels of y_{split} are negative: remove those images")
    classes = np.unique(arrays["y_train"])
    unseen = np.setdiff1d(arrays["y_test"], classes)
    if len(unseen):
        raise InputError(f"{source}: test labels {unseen[:5].tolist()} are in no training image: remove those images")
    if len(classes) < 2:
        raise InputError(f"{source}: all training labels are {classes[0]}; there must be at least 2 classes")
    n = len(classes)
    if not np.array_equal(classes, np.arange(n)):
        print(f"{source}: the {n} labels within {classes[0]}..{classes[-1]} are numbered 0..{n - 1}")
    train = list(arrays["x_train"].shape[1:])
    test = list(arrays["x_test"].shape[1:])
    if train != test:
        raise InputError(f"{source}: train images are {train} but test images {test}: give both the same shape")
    names = np.asarray(arrays.get("class_names", classes))
    if names.shape != (n,) or names.dtype.kind not in "Uiu":
        raise InputError(f"{source}: class_names is {names.dtype} {list(names.shape)}; it must be words [{n}]")
    labels = {key: np.searchsorted(classes, arrays[key]).astype(np.int64) for key in ("y_train", "y_test")}
    return dict(arrays, **labels, class_names=[str(name) for name in names])


@dataclass
class Data:
    """One dataset on one device, with the label noise and the subset of one run.

    x_train [N, H, W, C] and x_test uint8; y_train int64 with label noise, y_clean without; index [N] the position of
    each training image in the full training set; mean, std [C] of the full training set in 0..1 units; pad and flip as
    in `Dataset`; facts for config.json.
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

    def __post_init__(self):
        self.device = self.y_train.device
        # Black before normalisation, which is what torchvision's RandomCrop(padding=p) does.
        self.padded = F.pad(self.x_train, (0, 0, self.pad, self.pad, self.pad, self.pad))
        self.side = self.x_train.shape[1]
        self.shifts = 2 * self.pad + 1
        self.padded_side = self.side + 2 * self.pad
        ramp = torch.arange(self.side, device=self.device)
        straight = ramp.view(-1, 1) * self.padded_side + ramp
        self.crops = torch.stack([straight, straight.flip(1)]).flatten(1)  # pixels of a crop, from its corner on
        self.n_views = self.shifts**2 * (2 if self.flip else 1)

    def batch(self, index, view):
        """Augmented float batch [B, C, H, W] of training images `index` [B] in the views `view` [B].

        The view that crops at row dy, column dx (0 .. 2·pad) is dy·shifts + dx; with flips twice that, + 1 if mirrored.
        """
        flip = torch.zeros_like(view)
        shift = view
        if self.flip:
            flip = view % 2
            shift = view // 2
        corner = (index * self.padded_side + shift // self.shifts) * self.padded_side + shift % self.shifts
        pixels = self.padded.flatten(0, 2).index_select(0, (corner.view(-1, 1) + self.crops[flip]).flatten())
        return self.normalise(pixels.view(len(index), self.side, self.side, self.padded.shape[-1]))

    def normalise(self, images):
        """uint8 [B, H, W, C] to normalised float [B, C, H, W] on the device, channels_last in memory."""
        return ((images.float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)


def load_data(name, data_dir="data", subset=0, label_noise=None, data_seed=0, image_size=None, device="cpu"):
    """Load a dataset onto `device` as `Data`: its prepared data_dir/NAME.npz first, else as DATASETS says.

    subset: that many training images, class-balanced, 0 for all. label_noise P: each training label is replaced with
    probability P by a uniformly drawn other class; the draw depends on data_seed and on the position in the full
    training set alone, so every run, subset and architecture sees the same noise; None: that of DATASETS.
    Errors: InputError for an unknown name, unreadable files, bad arrays, or a subset larger than the data.
    """
    row = dataset_of(name)
    data_dir = Path(data_dir)
    path = name.partition(":")[2] or name
    prepared = data_dir / f"{name}.npz"
    if not row.takes_path and prepared.exists():
        arrays = check_arrays(npz_arrays(prepared, data_dir, image_size), prepared)
    else:
        arrays = check_arrays(row.load(path, data_dir, image_size), path)
    x_train, y_clean, x_test, y_test = (arrays[key] for key in ARRAYS)
    classes = len(arrays["class_names"])
    n = len(x_train)
    label_noise = row.label_noise if label_noise is None else label_noise
    if subset > n or subset == 1:  # batch normalisation needs two
        raise InputError(f"--subset {subset} of the {n} training images of {name}: use 2 to {n}, or 0 for all")
    facts = image_facts(x_train, x_test)

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
    described.update(n_test=len(x_test), subset=subset, label_noise=label_noise)
    described.update(flipped=int((y_train != y_clean).sum()), data_seed=data_seed)
    described.update(sha256=digest.hexdigest(), class_names=arrays["class_names"])

    def tensor(array):
        return torch.as_tensor(np.ascontiguousarray(array)).to(device)

    train = [tensor(array) for array in (x_train, y_train, y_clean, index)]
    mean, std = (tensor(np.array(facts[key])).float() for key in ("mean", "std"))
    return Data(*train, tensor(x_test), tensor(y_test), mean, std, classes, row.pad, row.flip, described)


def balanced_subset(labels, count, data_seed):
    """Sorted positions of the first `count` images of a seeded shuffle, round-robin over classes: they are nested."""
    shuffle = np.random.RandomState(stream_seed("subset", data_seed) % 2**32).permutation(len(labels))
    rank = np.empty(len(labels), int)
    for c in range(labels.max() + 1):
        members = shuffle[labels[shuffle] == c]
        rank[members] = np.arange(len(members))
    return np.sort(shuffle[np.argsort(rank[shuffle], kind="stable")[:count]])


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
        self.stride = stride
        self.extra = channels_out - channels_in

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
        layers = [*conv_norm(in_channels, channels), nn.ReLU()]
        before = channels
        for stage in range(3):
            for block in range((depth - 2) // 6):
                after = channels * 2**stage
                layers.append(BasicBlock(before, after, 2 if stage and not block else 1))
                before = after
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(before, classes)

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
        self.shortcut = nn.Sequential()
        if self.residual and channels_in != channels_out:  # there the form for CIFAR has a 1×1 shortcut
            self.shortcut = nn.Sequential(*conv_norm(channels_in, channels_out, 1))

    def forward(self, x):
        return self.layers(x) + self.shortcut(x) if self.residual else self.layers(x)


class MobileNetV2(nn.Module):
    """MobileNet-v2 (Sandler et al. 2018) as usual on CIFAR: no dropout, nor the first two reductions; 2.30M weights."""

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
        self.features = nn.Sequential(*layers)
        self.fc = nn.Linear(last, classes)

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

    # GoogLeNet and Inception give several outputs and normalise anew; MNASNet's weights need more than a state dict.
    unlike = ("googlenet", "inception", "mnasnet")
    known = [arch for arch in models.list_models(module=models) if not arch.startswith(unlike)]
    if name not in known:
        raise InputError(f"unknown architecture torchvision:{name}: use one of {', '.join(known)}")
    if channels != 3:
        raise InputError(f"torchvision:{name} takes 3 channels, the data has {channels}: use {', '.join(ARCHS)}")
    return models.get_model(name, weights=None, num_classes=classes)


def torchvision_preprocessing(name):
    """(mean [3], std [3], side) of the images that torchvision's own weights of a network were trained on."""
    from torchvision import models

    with runs.reading(f"torchvision:{name}", "use a classifier that torchvision has weights for, or give a size"):
        preset = models.get_model_weights(name).DEFAULT.transforms()
        return preset.mean, preset.std, preset.crop_size[0]


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
        elif arch in RESNETS:
            model = ResNet(int(arch.removeprefix("resnet")), classes, channels, width)
        elif arch == "mobilenetv2":
            model = MobileNetV2(classes, channels, width)
        elif arch == "mlp":
            model = mlp(image, classes, max(1, round(256 * width)))
        elif arch == "cnn":
            model = cnn(channels, classes, max(1, round(32 * width)))
        else:
            raise InputError(f"unknown architecture {arch!r}: use {', '.join(ARCHS)} or torchvision:<name>")
        if not arch.startswith("torchvision:"):
            for module in model.modules():
                if isinstance(module, nn.Conv2d):
                    nn.init.kaiming_normal_(module.weight, nonlinearity="relu")
    try:
        with torch.no_grad():
            model.eval()(torch.zeros(1, channels, side, side))
    except (RuntimeError, ValueError, AssertionError) as error:
        what = f"{arch} does not fit {side}×{side}×{channels} images ({runs.first_line(error)})"
        raise InputError(f"{what}: choose another architecture or larger images") from None
    return model.train()


# ---------------------------------------------------------------- losses


def kd_loss(student_logits, teacher_logits, temperature):
    """T²·KL(teacher_T ‖ student_T), mean over the batch (Hinton et al. 2015, §2). Logits [B, C]; returns a scalar."""
    teacher = F.log_softmax(teacher_logits / temperature, 1)
    student = F.log_softmax(student_logits / temperature, 1)
    return temperature**2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


def one_hot_loss(model, images, labels, teacher_logits, ce_weight, kd_weight, args):
    """The loss of teachers and of one-hot controls, ce_weight·CE; arguments and result as those of `student_loss`."""
    logits = model(images).float()
    return ce_weight * F.cross_entropy(logits, labels), logits


def student_loss(model, images, labels, teacher_logits, ce_weight, kd_weight, args):
    """The loss of students: ce_weight·CE + kd_weight·T²·KL(teacher_T ‖ student_T), and the model's logits.

    images [B, C, H, W], or the inputs of a text model; labels [B]; teacher_logits [B, classes], or None in steps whose
    kd_weight is 0; the weights are numbers or scalar tensors; args the flags. Returns (scalar, logits [B, classes]).
    """
    logits = model(images).float()
    loss = ce_weight * F.cross_entropy(logits, labels)
    if teacher_logits is not None:
        loss = loss + kd_weight * kd_loss(logits, teacher_logits, args.temperature)
    return loss, logits


def soft_loss(logits, target, temperature):
    """T²·CE(target, softmax(logits/T)), [..., C] to [...]: KD but for a constant, T² times the target's entropy."""
    return -(temperature**2) * (target * F.log_softmax(logits / temperature, -1)).sum(-1)


def matched_smoothing(teacher_logits, temperature):
    """Label smoothing α whose targets (1−α)·one-hot + α/classes have the teacher's mean entropy at this temperature."""
    from scipy.optimize import brentq  # takes a part of a second to import

    probabilities = F.softmax(teacher_logits / temperature, 1).double()
    entropy = torch.special.entr(probabilities).sum(1).mean().item()
    classes = probabilities.shape[1]

    def excess(alpha):
        p = np.full(classes, alpha / classes)
        p[0] += 1 - alpha
        return special.entr(p / p.sum()).sum() - entropy

    if entropy <= 0:
        return 0.0
    if excess(1.0) <= 0:  # a teacher as uniform as smoothing can make it
        return 1.0
    return brentq(excess, 0.0, 1.0, xtol=1e-12)


def smoothed(labels, classes, smoothing):
    """Smoothed one-hot targets [N, classes] of labels [N]."""
    return (1 - smoothing) * F.one_hot(labels, classes).float() + smoothing / classes


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
    return per_epoch, per_epoch * args.epochs


def snapshot_steps(args, data):
    """The steps of --snapshot-at."""
    _, total = total_steps(args, data)
    return {round(share * total) for share in args.snapshot_at}


# ---------------------------------------------------------------- flags

KEPT = (0.05, 0.1, 0.25, 0.5, 0.75, 0.9)  # shares of training from which the figures' scripts go on
OUT_HELP = "run folder; {seed} in it is the seed, else -s<seed> is appended to several (default: runs/<what>-s<seed>)"


def add_data_flags(parser):
    """The flags that say which images."""
    add = parser.add_argument_group("data").add_argument
    add("--data", default="digits", help=f"{DATA_HELP} (a folder of pictures)")
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
    add("--batch-size", type=number(int, 2), help="images per step; an epoch's last, incomplete batch is dropped")
    add("--lr", type=number(float, 0, 1e38, open_low=True), help="peak learning rate")
    add("--warmup", type=number(float, 0), help="epochs of linear warm-up")
    add("--schedule", choices=SCHEDULES, help="after warm-up: cosine to zero, or ×0.1 at each milestone")
    add("--milestones", type=number(float, 0), nargs="*", metavar="EPOCH", help="epochs of ×0.1 of the step schedule")
    add("--momentum", type=number(float, 0, 1, open_high=True), default=0.9, help="Nesterov momentum")
    add("--weight-decay", type=number(float, 0, 1e38), default=5e-4, help="on all parameters")
    kept = "shares of training at which to keep the state, for the scripts that go on from there"
    add("--snapshot-at", type=number(float, 0, 1), nargs="*", metavar="SHARE", default=KEPT, help=kept)
    precision = "auto: bf16 autocast on CUDA and on CPUs with bf16 arithmetic (not for digits), else fp32"
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=precision)
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--seeds", "--seed", type=number(int, 0), nargs="+", default=[0], metavar="SEED", help="one run for each")
    add("--out", help=out_help)
    add("--overwrite", action="store_true", help="discard what is in the run folders and start afresh")
    add("--eval-every", type=number(int, 1), help="epochs between test evaluations (default: 20 in a run, or fewer)")
    add("--quiet", action="store_true", help="one line per run instead of one per epoch")
    add_device_flag(group)
    fast = "compile the model and, on CUDA, run each step as one CUDA graph (default: on CUDA)"
    add("--fast", action=argparse.BooleanOptionalAction, help=fast)


def add_device_flag(group):
    group.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto: CUDA where it is")


def add_student_flags(parser, distils=False):
    """The flags of distillation, which go into config.json beside `add_flags`; distils: --kd-weight 0 is refused."""
    add = parser.add_argument_group("distillation").add_argument
    add("--kd-weight", type=number(float, 0, open_low=distils), default=1.0, help="weight of the distillation term")
    add("--ce-weight", type=number(float, 0), default=0.0, help="weight of the one-hot term")
    add("--temperature", type=number(float, 0, 1e6, open_low=True), default=4.0, help="softens both in the KD term")


def add_teacher_flags(parser):
    """The flags that say which teacher; config.json says among its facts what it is."""
    add = parser.add_argument_group("teacher").add_argument
    add("--teacher", help="run folder of a finished teacher, or a file of weights; {seed} in it stands for the seed")
    weights = f"what network a file of weights (.pth, .safetensors) is of: {', '.join(ARCHS)} or torchvision:<name>"
    add("--teacher-arch", help=weights)
    unit = "of the images it was trained on, in 0..1 units: 1 number, or 1 for each channel"
    unit += " (default: those of --data; for torchvision:<name> those of its own weights)"
    add("--teacher-mean", type=number(float, 0, 1), nargs="+", help=f"mean {unit}")
    add("--teacher-std", type=number(float, 0, 1, open_low=True), nargs="+", help=f"standard deviation {unit}")
    size = "resize the images to this side for it (default: for torchvision:<name> the size it was made for)"
    add("--teacher-size", type=number(int, 8, 4096), help=size)
    add("--teacher-logits", help="its logits [N, C] of the un-augmented training images, in their order")


def add_figure_flags(parser, results):
    """The flags of a script that trains what its figure needs and draws it into the folder `results`."""
    add = parser.add_argument_group("figure").add_argument
    draws = number(int, 100, 1_000_000)
    add("--bootstrap", type=draws, default=2000, metavar="N", help="bootstrap draws behind each interval")
    add("--results", type=Path, default=Path(results), metavar="FOLDER", help="folder for figures, tables and claims")
    add("--train-only", action="store_true", help="train what is missing and draw nothing")


def only_flags(args, *adders):
    """The flags that `adders` (such as `add_flags`) define, and no others: what a run depends on."""
    parser = argparse.ArgumentParser()
    for adder in adders:
        adder(parser)
    return argparse.Namespace(**{name: getattr(args, name) for name in vars(parser.parse_args([]))})


def one_hot_flags(args):
    """A copy of `args` for the one-hot control."""
    return argparse.Namespace(**dict(vars(args), ce_weight=1.0, kd_weight=0.0))


def fill_recipe(args):
    """Fill in what the flags left to the recipe, and refuse what does not fit together; returns args."""
    row = dataset_of(args.data)
    preset = RECIPES[row.paper_recipe if args.recipe == "paper" else args.recipe]
    if args.milestones and (args.schedule or preset["schedule"]) != "step":  # as given: the recipe's own come below
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
    return args


def data_from(args):
    """`load_data` with the flags of `add_data_flags`."""
    if args.image_size and not args.data.startswith("folder:"):
        raise InputError(f"--image-size resizes the images of folder:PATH, not of {args.data}: leave it out")
    noise = args.label_noise
    return load_data(args.data, args.data_dir, args.subset, noise, args.data_seed, args.image_size, args.device)
