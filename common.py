"""What the scripts share: run folders, data, models, losses, the training engine, intervals and claims.

Read it top to bottom, in that order. Nothing happens at import time, nothing is registered anywhere; every script
calls these functions from its own `main()`. Shapes are written [N, C] and so on; images are uint8 NHWC at rest and
float NCHW (channels_last in memory) in a batch; times are seconds; accuracies are percent in printed text, shares
in files.
"""
import argparse
import ctypes
import functools
import glob
import hashlib
import io
import json
import math
import multiprocessing
import os
import pickle
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from multiprocessing.connection import wait as wait_for_any
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
from tqdm import tqdm

try:
    import fcntl
except ImportError:   # Windows
    fcntl = None

# ---------------------------------------------------------------- errors, atomic files


class InputError(Exception):
    """Something the user gave is wrong. The message is one line that names the fix; `cli` turns it into exit code 2."""


def cli(main):
    """Run a script's `main()`: wrong input, a file that cannot be written or too little memory becomes one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")   # a terminal without Unicode must not end a run
    signal.signal(signal.SIGTERM, signal.default_int_handler)   # outside of training, which saves first
    try:
        main()
    except InputError as error:
        sys.exit(_complain(error))
    except (MemoryError, RuntimeError) as error:
        # On a CPU torch has no kind of its own for a failed allocation.
        if not isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) and "DefaultCPUAllocator" not in str(error):
            raise
        sys.exit(_complain(f"out of memory ({first_line(error)}): lower --batch-size, --subset or the size of the model"))
    except OSError as error:
        sys.exit(_complain(f"{error.strerror or error}: {error.filename or 'no file named'} "
                           "(check that the folder exists, is writable and has space left)"))
    except KeyboardInterrupt:
        exit_interrupted()


def first_line(error):
    """The first line of an exception's message, or its kind when it has none, for use inside a message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0][:160]


def _complain(message):
    print(f"error: {' '.join(str(message).split())}", file=sys.stderr)
    return 2


def write_atomic(path, write):
    """Call `write(file)` on a temporary binary file beside `path`, then rename it over `path`.

    A reader, or a run killed at any moment, sees the old file or the new one, never a torn one. The temporary files of
    processes that were killed while they wrote the same path are removed. OSError names `path`.
    """
    path = Path(path)
    host = platform.node().partition(".")[0]
    for leftover in path.parent.glob(f".{glob.escape(path.name)}.{glob.escape(host)}-*.tmp"):
        if not _alive(leftover.stem.rpartition("-")[2]):
            leftover.unlink(missing_ok=True)
    temporary = path.with_name(f".{path.name}.{host}-{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:
        # On a full disk torch.save raises a RuntimeError of its own after the write's OSError, and neither names the file.
        cause = error if isinstance(error, OSError) else error.__context__
        if not isinstance(cause, OSError) or cause.errno is None:
            raise
        raise OSError(cause.errno, cause.strerror, str(path)) from None
    finally:
        with suppress(OSError):
            temporary.unlink()


def _alive(pid):
    """Whether a process of that number may be running on this machine."""
    if os.name != "posix":   # where os.kill would end it
        return True
    try:
        os.kill(int(pid), 0)
    except (ValueError, OverflowError, ProcessLookupError):
        return False
    except OSError:   # another user's
        pass
    return True


def write_text(path, text):
    """Write `text` (str) to `path` atomically, as UTF-8 (what cannot be, from a flag of other bytes, as question marks)."""
    write_atomic(path, lambda file: file.write(text.encode(errors="replace")))


def write_json(path, value):
    """Write `value` to `path` atomically as indented JSON; numbers that are not finite become null."""
    def finite(part):
        if isinstance(part, dict):
            return {str(key): finite(item) for key, item in part.items()}
        if isinstance(part, (list, tuple)):
            return [finite(item) for item in part]
        return None if isinstance(part, float) and not math.isfinite(part) else part
    write_text(path, json.dumps(finite(value), indent=1, allow_nan=False) + "\n")


def read_json(path):
    """The value in a JSON file; InputError when it is missing or not JSON."""
    try:
        return json.loads(Path(path).read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} cannot be read as JSON ({error}): restore it, or make the run again") from None


def read_npz(path, keys):
    """The arrays `keys` (all of them for None) of an .npz as a dict; InputError when the file is missing, torn or lacks one."""
    try:
        file = np.load(path, allow_pickle=False)
        if isinstance(file, np.ndarray):
            raise InputError(f"{path} holds a single array: it must be an .npz with {', '.join(keys or ['arrays'])}")
        with file:
            keys = file.files if keys is None else keys
            missing = [key for key in keys if key not in file.files]
            if missing:
                raise InputError(f"{path} lacks the arrays {', '.join(missing)}: it must hold {', '.join(keys)}")
            if file.zip.testzip():   # numpy compares no checksum where a damaged header asks for less than there is
                raise ValueError("a checksum does not fit")
            arrays = {key: file[key] for key in keys}
            if not all(isinstance(array, np.ndarray) for array in arrays.values()):
                raise ValueError("it holds other things than arrays")
            return arrays
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: check the path") from None
    except InputError:
        raise
    except Exception as error:   # numpy, zipfile and zlib each raise their own kinds on a damaged file
        raise InputError(f"{path} is not a readable .npz file ({first_line(error)}): make it again") from None


def stream_seed(*key):
    """A 63-bit seed from any printable key, the same on every machine. Streams of different keys are independent."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "little") >> 1


def generator(*key):
    """A CPU torch.Generator seeded by `stream_seed(*key)`."""
    return torch.Generator().manual_seed(stream_seed(*key))


# ---------------------------------------------------------------- data

DATASETS = ("digits", "cifar10", "cifar100", "tiny-imagenet")
ARRAYS = ("x_train", "y_train", "x_test", "y_test")
TINY_IMAGENET_URL = "http://cs231n.stanford.edu/tiny-imagenet-200.zip"


@dataclass
class Data:
    """One dataset on one device, with the label noise and the subset of one run.

    x_train [N, H, W, C] and x_test uint8; y_train int64 with label noise, y_clean without; index [N] the position of
    each training image in the full training set; mean, std [C] of the full training set in 0..1 units; pad pixels of
    random shift in each direction; flip whether half of the views are mirrored; facts for config.json. Where the images
    do not fit on the device, x_train and x_test are `ImageFiles` instead.
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
        self.padded = None if self.streams else self.pad_black(self.x_train)
        self.ramp = torch.arange(self.x_train.shape[1], device=self.device)

    @property
    def device(self):
        return self.y_train.device

    @property
    def streams(self):
        return isinstance(self.x_train, ImageFiles)

    def pad_black(self, images):
        """With black before normalisation, which is what torchvision's RandomCrop(padding=p) does."""
        return F.pad(images, (0, 0, self.pad, self.pad, self.pad, self.pad))

    @property
    def shifts(self):
        return 2 * self.pad + 1

    @property
    def n_views(self):
        return self.shifts ** 2 * (2 if self.flip else 1)

    def view_id(self, dy, dx, flip=0):
        """Number of the view that crops at row dy, column dx (0 .. 2·pad) and mirrors where flip is 1."""
        view = dy * self.shifts + dx
        return view * 2 + flip if self.flip else view

    def batch(self, index, view, images=None):
        """Augmented float batch [B, C, H, W] of training images `index` [B] in the views `view` [B] (see view_id).

        images: uint8 [B, H, W, C] of these images, where they have been read from files already.
        """
        if self.streams:
            images = self.x_train[index] if images is None else images
            padded, index = self.pad_black(images.to(self.device, non_blocking=True)), torch.arange(len(index), device=self.device)
        else:
            padded = self.padded
        flip = (view % 2).bool() if self.flip else torch.zeros_like(view, dtype=torch.bool)
        shift = view // 2 if self.flip else view
        dy, dx = (shift // self.shifts).view(-1, 1, 1), (shift % self.shifts).view(-1, 1, 1)
        rows = dy + self.ramp.view(1, -1, 1)
        cols = dx + torch.where(flip.view(-1, 1, 1), self.ramp.flip(0).view(1, 1, -1), self.ramp.view(1, 1, -1))
        return self.normalise(padded[index.view(-1, 1, 1), rows, cols])

    def normalise(self, images):
        """uint8 [B, H, W, C] to normalised float [B, C, H, W] on the device, channels_last in memory."""
        return ((images.to(self.device).float() / 255 - self.mean) / self.std).permute(0, 3, 1, 2)

    def loader(self, indices):
        """uint8 batches of the training images in each of `indices`, in that order, read ahead by worker processes."""
        workers = min(8, max(1, cores() - 1))
        return torch.utils.data.DataLoader(self.x_train, batch_sampler=[index.tolist() for index in indices], num_workers=workers, pin_memory=self.device.type == "cuda")


class ImageFiles(torch.utils.data.Dataset):
    """uint8 images [N, side, side, 3] in files, read when they are asked for; looks like an array of them."""

    dtype, ndim = np.dtype(np.uint8), 4

    def __init__(self, files, side):
        self.files, self.side = list(files), side

    @property
    def shape(self):
        return len(self.files), self.side, self.side, 3

    @property
    def size(self):
        return math.prod(self.shape)

    def __len__(self):
        return len(self.files)

    def __getitem__(self, chosen):
        """One image [side, side, 3] for an int; a batch [B, side, side, 3] for a slice or a tensor of indices."""
        if isinstance(chosen, int):
            return torch.from_numpy(read_image(self.files[chosen], self.side))
        with ThreadPoolExecutor(cores()) as pool:   # PIL decodes outside of the interpreter's lock
            return torch.stack(list(pool.map(self.__getitem__, torch.arange(len(self))[chosen].tolist())))

    def subset(self, index):
        return ImageFiles([self.files[k] for k in index], self.side)

    def listing(self):
        """Bytes that stand for the content: names and sizes of all files (reading them all would take hours)."""
        return "\n".join(f"{'/'.join(Path(file).parts[-2:])} {os.path.getsize(file)}" for file in self.files).encode()


def load_data(name, data_dir="data", subset=0, label_noise=None, data_seed=0, image_size=None, device="cpu", loader="device"):
    """Load a dataset onto `device` as `Data`.

    name: digits, cifar10, cifar100, tiny-imagenet, npz:PATH (the four arrays of `ARRAYS`) or folder:PATH
    (PATH/train/<class>/*, PATH/val or PATH/test). subset: that many training images, class-balanced, 0 for all.
    label_noise P: each training label is replaced with probability P by a uniformly drawn other class; the draw
    depends on data_seed and on the position in the full training set alone, so every run, subset and architecture
    sees the same noise. None means 0.3 for digits (which are too easy to tell losses apart) and 0 elsewhere.
    loader: device, or for folder:PATH also stream (images stay in their files) or auto (stream what does not fit).
    Errors: InputError for an unknown name, unreadable files, bad arrays, or a subset larger than the data.
    """
    if loader == "stream" and not name.startswith("folder:"):
        raise InputError(f"--loader stream reads folder:PATH only, and {name} fits into memory: leave it out")
    arrays = load_arrays(name, Path(data_dir), image_size, loader, torch.device(device))
    x_train, y_clean, x_test, y_test = (arrays[key] for key in ARRAYS)
    classes = int(max(y_clean.max(), y_test.max())) + 1
    label_noise = (0.3 if name == "digits" else 0.0) if label_noise is None else label_noise
    if subset > len(x_train):
        raise InputError(f"--subset {subset} is larger than the {len(x_train)} training images of {name}: "
                         f"use at most {len(x_train)}, or 0 for all")

    # Statistics of the full training set, so that a subset is normalised like the whole (0..1 units).
    streams, channels = isinstance(x_train, ImageFiles), range(x_train.shape[3])
    seen = x_train[::max(1, len(x_train) // 4096)].numpy() if streams else x_train   # a sample of files, evenly spaced
    histogram = sum(np.stack([np.bincount(part[..., c].ravel(), minlength=256) for c in channels])
                    for part in np.array_split(seen, max(1, len(seen) // 256)))   # in parts: bincount copies to int64
    levels = np.arange(256) / 255
    mean = np.array([(h * levels).sum() / h.sum() for h in histogram])
    std = np.array([np.sqrt((h * (levels - m) ** 2).sum() / h.sum()) for h, m in zip(histogram, mean)])

    noise = np.random.RandomState(stream_seed("label noise", data_seed) % 2 ** 32)   # RandomState never changes
    flipped = noise.random_sample(len(y_clean)) < label_noise
    shift = noise.randint(1, classes, len(y_clean)) if classes > 1 else np.zeros(len(y_clean), int)
    y_train = np.where(flipped, (y_clean + shift) % classes, y_clean)

    index = np.arange(len(x_train))
    if subset:
        # First images of a seeded shuffle, round-robin over classes: balanced, and a smaller subset is part of a larger.
        shuffle = np.random.RandomState(stream_seed("subset", data_seed) % 2 ** 32).permutation(len(x_train))
        rank = np.empty(len(x_train), int)
        for c in range(classes):
            members = shuffle[y_clean[shuffle] == c]
            rank[members] = np.arange(len(members))
        index = np.sort(shuffle[np.argsort(rank[shuffle], kind="stable")[:subset]])

    x_train, y_train, y_clean = x_train.subset(index) if streams else x_train[index], y_train[index], y_clean[index]
    digest = hashlib.sha256()
    for array in (x_train, y_train, y_clean, x_test, y_test):
        digest.update(array.listing() if isinstance(array, ImageFiles) else np.ascontiguousarray(array).data)
    facts = dict(name=name, classes=classes, image=list(x_train.shape[1:]), n_train=len(x_train), n_test=len(x_test),
                 subset=subset, label_noise=label_noise, flipped=int((y_train != y_clean).sum()), data_seed=data_seed,
                 sha256=digest.hexdigest())
    tensor = lambda array: array if isinstance(array, ImageFiles) else torch.as_tensor(np.ascontiguousarray(array)).to(device)
    return Data(tensor(x_train), tensor(y_train), tensor(y_clean), tensor(index), tensor(x_test), tensor(y_test),
                mean=tensor(mean).float(), std=tensor(np.maximum(std, 1e-6)).float(), classes=classes,
                pad=1 if name == "digits" else 4, flip=name != "digits", facts=facts)


def load_arrays(name, data_dir, image_size=None, loader="device", device=torch.device("cpu")):
    """The four arrays of a dataset (see `load_data`): prepared file first, then the original layout, then download."""
    if name == "digits":
        return digits_arrays()
    if name.startswith("npz:"):
        return check_arrays(read_npz(name[4:], ARRAYS), name[4:])
    if name.startswith("folder:"):
        root = Path(name[7:])
        test = next((root / part for part in ("val", "test") if (root / part).is_dir()), root / "val")
        (files, labels, names), (test_files, test_labels, test_names) = image_files(root / "train"), image_files(test)
        if test_names != names:
            raise InputError(f"{test} has other class folders than {root / 'train'}: give both the same")
        side = image_size or read_image(files[0]).shape[0]
        # On the device the training images lie twice, once with their border.
        stream = loader == "stream" or loader == "auto" and 3 * 3 * side ** 2 * (len(files) + len(test_files)) > free_memory(device) / 2
        if loader == "auto" and stream:
            print(f"{root}: {len(files)} images are streamed from their files; --loader device would load them all")
        read = functools.partial(ImageFiles, side=side) if stream else functools.partial(read_images, image_size=image_size)
        return check_arrays(dict(zip(ARRAYS, (read(files), labels, read(test_files), test_labels))), root)
    if name not in DATASETS:
        raise InputError(f"unknown --data {name!r}: use {', '.join(DATASETS)}, npz:PATH or folder:PATH")
    prepared = data_dir / f"{name}.npz"
    if prepared.exists():
        return check_arrays(read_npz(prepared, ARRAYS), prepared)
    arrays = check_arrays((tiny_imagenet_arrays if name == "tiny-imagenet" else cifar_arrays)(name, data_dir), name)
    try:
        write_atomic(prepared, lambda file: np.savez(file, **arrays))
    except OSError as error:
        print(f"note: could not keep the prepared {prepared} ({error.strerror}); it is prepared again next time")
    return arrays


def check_arrays(arrays, source):
    """The same dict with labels as int64, after checking shapes, types and ranges; InputError names what is wrong."""
    for split in ("train", "test"):
        x, y = arrays[f"x_{split}"], arrays[f"y_{split}"]
        if x.dtype != np.uint8 or x.ndim != 4 or x.shape[3] not in (1, 3) or x.shape[1] != x.shape[2] or not x.size:
            raise InputError(f"{source}: x_{split} is {x.dtype} {list(x.shape)}; it must be uint8 [N, H, H, 1 or 3]")
        if y.ndim != 1 or len(y) != len(x) or y.dtype.kind not in "iu" or y.min() < 0 or y.max() >= max(1000, len(x)):
            raise InputError(f"{source}: y_{split} is {y.dtype} {list(y.shape)}; it must hold one class number, 0 and up without "
                             f"large gaps, for each of the {len(x)} images")
        arrays[f"y_{split}"] = y.astype(np.int64)
    if max(arrays["y_train"].max(), arrays["y_test"].max()) < 1:
        raise InputError(f"{source}: all labels are 0; there must be at least 2 classes")
    if arrays["x_train"].shape[1:] != arrays["x_test"].shape[1:]:
        raise InputError(f"{source}: train images are {list(arrays['x_train'].shape[1:])} but test images "
                         f"{list(arrays['x_test'].shape[1:])}: give both the same shape")
    return arrays


def digits_arrays():
    """scikit-learn's bundled handwritten digits: 1,797 real 8×8 images, grey 0..16 scaled to 0..255; 1,297 train."""
    from sklearn.datasets import load_digits
    bunch = load_digits()
    order = np.random.RandomState(0).permutation(len(bunch.target))
    images = np.round(bunch.images * 255 / 16).astype(np.uint8)[order, :, :, None]
    labels = bunch.target.astype(np.int64)[order]
    return dict(zip(ARRAYS, (images[:1297], labels[:1297], images[1297:], labels[1297:])))


def cifar_arrays(name, data_dir):
    """CIFAR-10/100 through torchvision: the original python folder in data_dir if it is there, else a download."""
    from torchvision import datasets
    dataset = dict(cifar10=datasets.CIFAR10, cifar100=datasets.CIFAR100)[name]
    if not (data_dir / dataset.base_folder).is_dir():
        try:
            dataset(data_dir, download=True)
        except Exception as error:   # urllib, ssl, http, tar: whatever went wrong, the fix is the same
            raise InputError(f"{name} could not be downloaded ({error}): put {name}.npz or the folder "
                             f"{dataset.base_folder} into {data_dir}") from None
    try:
        train, test = dataset(data_dir, train=True), dataset(data_dir, train=False)
    except Exception as error:
        raise InputError(f"{data_dir / dataset.base_folder} is damaged ({error}): remove it to download it again") from None
    return dict(zip(ARRAYS, (train.data, np.array(train.targets), test.data, np.array(test.targets))))


def tiny_imagenet_arrays(name, data_dir):
    """Tiny-ImageNet from its original folder or zip in data_dir, else downloaded; 64×64, val is the test split."""
    from torchvision.datasets.utils import download_url
    root, archive = data_dir / "tiny-imagenet-200", data_dir / "tiny-imagenet-200.zip"
    if not root.is_dir():
        try:
            if not archive.exists():
                partial = archive.with_name(archive.name + ".part")
                partial.unlink(missing_ok=True)
                download_url(TINY_IMAGENET_URL, data_dir, partial.name)
                zipfile.ZipFile(partial).close()   # a download that was cut has no directory at its end
                os.replace(partial, archive)
            with zipfile.ZipFile(archive) as file, tempfile.TemporaryDirectory(dir=data_dir, prefix=".tiny-imagenet") as unpacked:
                for member in tqdm(file.namelist(), desc="unpacking", disable=None):
                    file.extract(member, unpacked)
                os.replace(Path(unpacked) / "tiny-imagenet-200", root)
        except Exception as error:
            raise InputError(f"tiny-imagenet could not be fetched or unpacked ({first_line(error)}): put a whole tiny-imagenet-200.zip or "
                             f"the folder tiny-imagenet-200 into {data_dir}") from None
    files, y_train, names = image_files(root / "train")
    try:
        lines = [line.split("\t")[:2] for line in (root / "val" / "val_annotations.txt").read_text().splitlines()]
        labels = np.array([names.index(wnid) for _, wnid in lines])
    except (OSError, ValueError) as error:
        raise InputError(f"{root}/val/val_annotations.txt cannot be read ({error}): unpack the archive again") from None
    return dict(zip(ARRAYS, (read_images(files, 64), y_train, read_images([root / "val/images" / file for file, _ in lines], 64), labels)))


def image_files(root):
    """Files and labels of root/<class>/**, and the class names."""
    from torchvision.datasets import ImageFolder
    try:
        folder = ImageFolder(root)
    except (OSError, RuntimeError) as error:
        raise InputError(f"{root} is not a folder of class folders with images: {first_line(error)}") from None
    files, labels = zip(*folder.samples)
    return files, np.array(labels), folder.classes


def read_image(file, side=None):
    """uint8 [H, W, 3] of an image file; `side` resizes the short side and crops the centre."""
    from PIL import Image, ImageOps
    try:
        # By content, a file of any name could be another format; decoding EPS would start a program.
        with Image.open(file, formats=("PNG", "JPEG", "PPM", "BMP", "TIFF", "WEBP")) as image:
            image = image.convert("RGB")
    except Exception as error:   # PIL raises many kinds on a damaged file
        raise InputError(f"{file} is not a readable image ({first_line(error)}): replace or remove it") from None
    return np.array(ImageOps.fit(image, (side, side)) if side else image)


def read_images(files, image_size=None):
    """uint8 [N, H, H, 3] of image files (see `read_image`); without image_size their sizes must agree."""
    images = None
    for k, file in enumerate(tqdm(files, desc="reading images", disable=None)):
        pixels = read_image(file, image_size)
        images = np.empty((len(files), *pixels.shape), np.uint8) if images is None else images
        if pixels.shape != images.shape[1:]:
            raise InputError(f"{file} is {pixels.shape[:2]}, the others {images.shape[1:3]}: give --image-size to resize")
        images[k] = pixels
    return images


# ---------------------------------------------------------------- models

RESNET_DEPTHS = (8, 14, 20, 32, 44, 56, 110)
ARCHS = tuple(f"resnet{depth}" for depth in RESNET_DEPTHS) + ("mobilenetv2", "mlp", "cnn")


def conv3x3(channels_in, channels_out, stride=1, groups=1):
    return nn.Conv2d(channels_in, channels_out, 3, stride, 1, groups=groups, bias=False)


class BasicBlock(nn.Module):
    def __init__(self, channels_in, channels_out, stride):
        super().__init__()
        self.conv1, self.bn1 = conv3x3(channels_in, channels_out, stride), nn.BatchNorm2d(channels_out)
        self.conv2, self.bn2 = conv3x3(channels_out, channels_out), nn.BatchNorm2d(channels_out)
        self.stride, self.extra = stride, channels_out - channels_in

    def forward(self, x):
        out = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if self.extra:   # option A: subsample and pad with zero channels, no parameters
            x = F.pad(x[:, :, ::self.stride, ::self.stride], (0, 0, 0, 0, self.extra // 2, self.extra - self.extra // 2))
        return F.relu(out + x)


class ResNet(nn.Module):
    """CIFAR ResNet of depth 6n+2 with option-A shortcuts (He et al. 2016, §4.2); 16·width channels in the first stage."""

    def __init__(self, depth, classes, in_channels=3, width=1.0):
        super().__init__()
        channels = max(1, round(16 * width))
        layers = [conv3x3(in_channels, channels), nn.BatchNorm2d(channels), nn.ReLU()]
        before = channels
        for stage in range(3):
            for block in range((depth - 2) // 6):
                after = channels * 2 ** stage
                layers.append(BasicBlock(before, after, 2 if stage and not block else 1))
                before = after
        self.features, self.fc = nn.Sequential(*layers), nn.Linear(before, classes)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


class InvertedResidual(nn.Module):
    def __init__(self, channels_in, channels_out, expansion, stride):
        super().__init__()
        hidden = expansion * channels_in
        self.layers = nn.Sequential(
            nn.Conv2d(channels_in, hidden, 1, bias=False), nn.BatchNorm2d(hidden), nn.ReLU(),
            conv3x3(hidden, hidden, stride, groups=hidden), nn.BatchNorm2d(hidden), nn.ReLU(),
            nn.Conv2d(hidden, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out))
        self.residual = stride == 1
        self.shortcut = nn.Sequential()
        if self.residual and channels_in != channels_out:
            self.shortcut = nn.Sequential(nn.Conv2d(channels_in, channels_out, 1, bias=False), nn.BatchNorm2d(channels_out))

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
        layers = [conv3x3(in_channels, before), nn.BatchNorm2d(before), nn.ReLU()]
        for expansion, channels, repeats, stride in self.BLOCKS:
            for block in range(repeats):
                after = max(1, round(channels * width))
                layers.append(InvertedResidual(before, after, expansion, stride if not block else 1))
                before = after
        last = round(1280 * max(1.0, width))
        layers += [nn.Conv2d(before, last, 1, bias=False), nn.BatchNorm2d(last), nn.ReLU()]
        self.features, self.fc = nn.Sequential(*layers), nn.Linear(last, classes)

    def forward(self, x):
        return self.fc(self.features(x).mean((2, 3)))


def build_model(arch, classes, image, width=1.0, seed=0):
    """A freshly initialised classifier: float images [B, C, H, W] to logits [B, classes].

    arch: one of ARCHS or torchvision:<name>; image: (H, W, C) of the data; width multiplies the channels (hidden
    units); seed: any key of `stream_seed`. The global random state is left alone. InputError when the architecture
    is unknown or does not fit the images.
    """
    side, _, channels = image
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(stream_seed("init", seed))   # the CPU's alone
        if arch.startswith("torchvision:"):
            if width != 1:
                raise InputError(f"--width does not apply to {arch}: leave it out")
            model = torchvision_model(arch.removeprefix("torchvision:"), classes, channels)
        elif arch in ARCHS and arch.startswith("resnet"):
            model = ResNet(int(arch[6:]), classes, channels, width)
        elif arch == "mobilenetv2":
            model = MobileNetV2(classes, channels, width)
        elif arch == "mlp":
            hidden = max(1, round(256 * width))
            model = nn.Sequential(nn.Flatten(), nn.Linear(side * side * channels, hidden), nn.ReLU(),
                                  nn.Linear(hidden, hidden), nn.ReLU(), nn.Linear(hidden, classes))
        elif arch == "cnn":   # no batch normalisation: the plain network of the eigenspace and gradient analyses
            hidden = max(1, round(32 * width))
            model = nn.Sequential(nn.Conv2d(channels, hidden, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Conv2d(hidden, 2 * hidden, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
                                  nn.Conv2d(2 * hidden, 2 * hidden, 3, padding=1), nn.ReLU(),
                                  nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * hidden, classes))
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
        raise InputError(f"--arch {arch} does not fit images of {side}×{side}×{channels} "
                         f"({first_line(error)}): choose another architecture or larger images") from None
    return model.train()


def check_model(args, data):
    """InputError when --arch does not fit the data or the batches, for a script to call before it discards anything."""
    model = build_model(args.arch, data.classes, data.facts["image"], args.width)
    if min(args.batch_size, len(data.y_train)) == 1 and any(isinstance(module, nn.modules.batchnorm._BatchNorm) for module in model.modules()):
        raise InputError(f"--batch-size 1 or --subset 1 leaves {args.arch} nothing to normalise over: use at least 2")


def torchvision_model(name, classes, channels):
    from torchvision import models
    known = models.list_models(module=models)
    if name not in known:
        raise InputError(f"unknown --arch torchvision:{name}: use one of {', '.join(known)}")
    if channels != 3:
        raise InputError(f"--arch torchvision:{name} takes 3-channel images, the data has {channels}: use one of {', '.join(ARCHS)}")
    extra = dict(aux_logits=False, init_weights=True) if name in ("googlenet", "inception_v3") else {}
    return models.get_model(name, weights=None, num_classes=classes, **extra)


# ---------------------------------------------------------------- loss


def kd_loss(student_logits, teacher_logits, temperature):
    """T²·KL(teacher_T ‖ student_T), mean over the batch (Hinton et al. 2015, §2). Logits [B, C]; returns a scalar."""
    teacher = F.log_softmax(teacher_logits / temperature, 1)
    student = F.log_softmax(student_logits / temperature, 1)
    return temperature ** 2 * F.kl_div(student, teacher, log_target=True, reduction="batchmean")


# ---------------------------------------------------------------- flags

# quick: seconds for digits on a CPU; its 50 epochs are where the digits teacher reaches the 88% aimed at. short: an hour-scale GPU recipe. paper: the published image recipe as best known.
RECIPES = {
    "quick": dict(epochs=50, batch_size=64, lr=0.1, warmup=3, schedule="cosine", milestones=()),
    "short": dict(epochs=80, batch_size=512, lr=0.4, warmup=5, schedule="cosine", milestones=()),
    "paper": dict(epochs=450, batch_size=1024, lr=1.0, warmup=15, schedule="step", milestones=(200, 300, 400)),
    "paper tiny-imagenet": dict(epochs=200, batch_size=1024, lr=0.1, warmup=5, schedule="step", milestones=(75, 135)),
}


class Parser(argparse.ArgumentParser):
    """argparse that answers a bad flag with one line and exit code 2."""

    def __init__(self, docstring):
        super().__init__(description=docstring, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False)

    def error(self, message):
        raise SystemExit(_complain(f"{message} (see {self.prog} --help)"))


def number(kind, low=None, high=None, open_high=False, open_low=False):
    """An argparse type: a finite `kind` (int or float; an int of 64 bits) within low..high, its ends excluded where open."""
    limit = "2^63" if kind is int else "inf"

    def parse(text):
        value = kind(text)
        if not abs(value) < (2 ** 63 if kind is int else math.inf) or (low is not None and (value < low or open_low and value == low)) or (
                high is not None and (value > high or open_high and value == high)):
            ends = f"{'(' if open_low else '['}{f'-{limit}' if low is None else low}, {limit if high is None else high}{')' if open_high or high is None else ']'}"
            raise argparse.ArgumentTypeError(f"{text} is outside {ends}")
        return value
    parse.__name__ = kind.__name__
    return parse


OUT_HELP = "run folder; {seed} in it stands for the seed, else -s<seed> is appended when there are several (default: runs/<what>-s<seed>)"


def add_flags(parser, out_help=OUT_HELP):
    """The flags that every training script has: data, model, recipe, run."""
    add = parser.add_argument
    add("--data", default="digits", help="digits, cifar10, cifar100, tiny-imagenet, npz:PATH or folder:PATH")
    add("--data-dir", default="data", help="where prepared or original datasets lie, and downloads go")
    add("--subset", type=number(int, 0), default=0, help="train on that many images, class-balanced; 0 for all")
    add("--label-noise", type=number(float, 0, 1, open_high=True), help="share of training labels replaced by another class (default: 0.3 for digits, else 0)")
    add("--data-seed", type=number(int, 0), default=0, help="seed of the subset and of the label noise")
    add("--image-size", type=number(int, 8, 4096), help="resize the images of folder:PATH to this side")
    add("--loader", choices=("auto", "device", "stream"), default="auto", help="images of folder:PATH all on the device, or read from their files as they are needed (auto: by memory)")
    add("--arch", default="resnet8", help=f"{', '.join(ARCHS)} or torchvision:<name>")
    add("--width", type=number(float, 0, 64, open_low=True), default=1.0, help="multiplies the channels of the model")
    add("--recipe", choices=("quick", "short", "paper"), default="quick", help="preset of the eight flags below")
    add("--epochs", type=number(int, 1), help="passes over the training set; warm-up and milestones scale along unless given")
    add("--stop-epoch", type=number(int, 1), help="stop after that epoch of the schedule (early stopping)")
    add("--batch-size", type=number(int, 1), help="images per step; the last, incomplete batch of an epoch is dropped")
    add("--lr", type=number(float, 0, 1e38, open_low=True), help="peak learning rate")
    add("--warmup", type=number(float, 0), help="epochs of linear warm-up")
    add("--schedule", choices=("cosine", "step"), help="after warm-up: cosine to zero, or ×0.1 at each milestone")
    add("--milestones", type=number(float, 0), nargs="*", help="epochs at which the step schedule multiplies by 0.1")
    add("--momentum", type=number(float, 0, 1, open_high=True), default=0.9, help="Nesterov momentum")
    add("--weight-decay", type=number(float, 0, 1e38), default=5e-4, help="L2 weight decay on all parameters")
    add("--view-seed", type=number(int, 0), help="seed of the augmentation alone: runs that share it see the same views, so that cached teacher logits serve all of them (default: the seed)")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 autocast on CUDA and on CPUs with bf16 arithmetic (not for digits), else fp32")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA where it is")
    add("--fast", action=argparse.BooleanOptionalAction, help="compile the model and, on CUDA, run each step as one CUDA graph (default: on CUDA)")
    add("--together", action="store_true", help="train runs side by side: on a CPU one single-threaded process per core, on CUDA a stream for each")
    add("--seeds", "--seed", type=number(int, 0), nargs="+", default=[0], help="one run for each seed")
    add("--out", help=out_help)
    add("--overwrite", action="store_true", help="discard what is in the run folder and start afresh")
    add("--eval-every", type=number(int, 1), default=1, help="epochs between test evaluations")
    add("--save-every", type=number(int, 1), default=1, help="epochs between checkpoints")
    add("--quiet", action="store_true", help="one line per run instead of one per epoch")


def shard(text):
    """argparse type of --shard: "i/n" as (i, n), 0 <= i < n."""
    i, n = map(int, text.split("/"))
    if not 0 <= i < n:
        raise argparse.ArgumentTypeError(f"{text} must be i/n with i from 0 to n-1")
    return i, n


def add_shard_flag(parser):
    """--shard, for the scripts that train a run for each seed."""
    parser.add_argument("--shard", type=shard, default=(0, 1), help="i/n: train only every n-th seed, beginning with the i-th (from 0), as one of n jobs that know nothing of each other")


def shard_of(args):
    """The seeds of this shard."""
    seeds = args.seeds[args.shard[0]::args.shard[1]]
    if not seeds:
        print(f"shard {args.shard[0]}/{args.shard[1]}: no seed is left for it")
    return seeds


def check_seeds(seeds):
    """InputError when a seed is named twice."""
    if len(set(seeds)) < len(seeds):
        raise InputError(f"--seeds {' '.join(map(str, seeds))} names a seed twice: name each once")


def resolve(args, distributed=False):
    """Fill in what the flags left to the recipe and the machine; returns args. distributed: as for `resolve_device`."""
    recipe = args.recipe
    if recipe == "paper" and args.data == "tiny-imagenet":
        recipe = "paper tiny-imagenet"
    preset = RECIPES[recipe]
    scale = (args.epochs or preset["epochs"]) / preset["epochs"]
    for flag, value in preset.items():
        if getattr(args, flag) is None:
            if flag == "warmup":
                value *= scale
            if flag == "milestones":
                value = [milestone * scale for milestone in value]
            setattr(args, flag, value)
    if args.schedule == "step" and not args.milestones:
        raise InputError("--schedule step needs --milestones, the epochs at which the learning rate drops")
    if args.schedule == "cosine" and args.milestones and not preset["milestones"]:
        raise InputError("--milestones belong to --schedule step: give both, or neither")
    if args.image_size and not args.data.startswith("folder:"):
        raise InputError(f"--image-size resizes the images of folder:PATH, not of {args.data}: leave it out")
    if args.warmup >= args.epochs:
        raise InputError(f"--warmup {args.warmup:g} must be less than --epochs {args.epochs}")
    if args.stop_epoch and args.stop_epoch > args.epochs:
        raise InputError(f"--stop-epoch {args.stop_epoch} is beyond --epochs {args.epochs}: give at most {args.epochs}")
    check_seeds(args.seeds)
    args.device = resolve_device(args.device, distributed)
    if args.batch_size % ranks()[1]:
        raise InputError(f"--batch-size {args.batch_size} does not split over {ranks()[1]} processes: give a multiple")
    if args.precision == "auto":
        # The 8×8 digits are faster in fp32, and their numbers stay the same on every CPU.
        args.precision = "bf16" if args.device == "cuda" or bf16_in_hardware() and args.data != "digits" else "fp32"
    if args.fast is None:
        args.fast = args.device == "cuda"   # measured on a CPU: compiling gains nothing over channels_last and bf16
    return args


def ranks():
    """(rank, world size) of this process under torchrun; (0, 1) otherwise."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1)) if "RANK" in os.environ else 1


def resolve_device(device, distributed=False):
    """cpu or cuda for a --device flag, with the settings of PyTorch that all runs on it share.

    Under torchrun it joins the processes, or refuses where the script is not `distributed`.
    """
    rank, world = ranks()
    if world > 1 and not distributed:
        raise InputError("torchrun shares one run among processes, which train_teacher.py and train_student.py can: start this script without it")
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    elif device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: no CUDA device is visible; use --device cpu")
    if device == "cuda":
        torch.backends.cudnn.allow_tf32 = False   # fp32 means fp32: φ of a confident point needs all of its bits
        torch.backends.cudnn.benchmark = True     # every batch has the same shape
    else:
        keep_freed_memory()
    if world > 1 and not torch.distributed.is_initialized():
        if device == "cuda":
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group("nccl" if device == "cuda" else "gloo")
        if rank:
            sys.stdout = open(os.devnull, "w")   # the first process speaks for all
    return device


def from_first_rank(decide):
    """What `decide()` returns or raises in the first process of torchrun, in all of them; the others do not call it."""
    rank, world = ranks()
    if world == 1:
        return decide()
    answer = [None, None]
    if not rank:
        try:
            answer[0] = decide()
        except (InputError, OSError) as error:
            answer[1] = error
    torch.distributed.broadcast_object_list(answer)
    if answer[1]:
        raise answer[1] if not rank else SystemExit(2)
    return answer[0]


def bf16_in_hardware():
    """Whether this CPU multiplies bf16 itself (AVX512-BF16 or AMX). Emulated, bf16 is slower than fp32."""
    return any(getattr(torch.cpu, f"_is_{feature}_supported", lambda: False)() for feature in ("avx512_bf16", "amx_tile"))


def keep_freed_memory():
    """Let glibc keep the memory that a step frees for the next step, instead of returning it to the system each time:
    7 to 10% more images/s on a CPU. Without effect under other C libraries."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    if mallopt:
        trim_threshold, mmap_threshold = -1, -3   # numbers of malloc.h
        mallopt(trim_threshold, 2 ** 31 - 1)
        mallopt(mmap_threshold, 2 ** 31 - 1) or mallopt(mmap_threshold, 32 * 2 ** 20)   # the second is all that older glibc accepts


def only_flags(args, *adders):
    """The flags that `adders` (such as `add_flags`) define, and no others: what a run of that kind depends on."""
    parser = argparse.ArgumentParser()
    for adder in adders:
        adder(parser)
    return argparse.Namespace(**{name: getattr(args, name) for name in vars(parser.parse_args([]))})


def data_from(args):
    """`load_data` with the flags of `add_flags`."""
    return load_data(args.data, args.data_dir, args.subset, args.label_noise, args.data_seed, args.image_size, args.device, args.loader)


# ---------------------------------------------------------------- run folders

# Flags that say where and how to run, not what: a run may be continued with other values of them.
NOT_COMPARED = ("out", "overwrite", "quiet", "device", "data_dir", "save_every", "eval_every", "seeds", "teacher", "snapshot_at",
                "fast", "together", "teacher_cache", "loader")


def run_folder(args, seed, default):
    """The run folder of one seed: --out with its {seed} filled in or -s<seed> appended, else runs/<default>-s<seed>."""
    if args.out is None:
        return Path("runs") / f"{default}-s{seed}"
    if "{seed}" in args.out or len(args.seeds) == 1:
        return Path(args.out.replace("{seed}", str(seed)))
    return Path(f"{args.out}-s{seed}")


def default_name(args):
    """The first part of a run's name, from the flags: data and architecture."""
    return f"{Path(args.data.partition(':')[2] or args.data).stem}-{args.arch.removeprefix('torchvision:')}"


def weights_hash(model):
    """sha256 of all parameters and buffers of a model."""
    digest = hashlib.sha256()
    for name, value in model.state_dict().items():
        digest.update(name.encode() + value.detach().cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def cpu_name():
    """The CPU's model name where Linux tells it, else its kind."""
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor() or platform.machine()


def versions():
    """Versions of what the numbers depend on, the device's name and the git commit (None outside a checkout)."""
    here = Path(__file__).resolve().parent
    def git(*words):
        try:
            return subprocess.run(["git", *words], cwd=here, capture_output=True, text=True).stdout.strip()
        except OSError:   # no git here
            return ""
    commit = git("rev-parse", "HEAD") if git("rev-parse", "--show-toplevel") == str(here) else ""
    if commit and git("status", "--porcelain", "--untracked-files=no"):
        commit += " with changes"
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
    return dict(python=platform.python_version(), torch=torch.__version__, numpy=np.__version__,
                git_commit=commit or None, hardware=device, threads=torch.get_num_threads())


@contextmanager
def locked(run):
    """Have the run folder `run` alone while it is trained; InputError when another process has it.

    The system drops the lock with the process that holds it, however that ends, so a file left behind is in nobody's way.
    """
    if fcntl is None or ranks()[0]:   # Windows has no flock; of several ranks the first one writes
        yield
        return
    run = Path(run)
    run.mkdir(parents=True, exist_ok=True)
    path = run / ".lock"
    while True:
        file = open(path, "a+")
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            holder = file.read().strip() or "just started"
            file.close()
            raise InputError(f"{run} is being trained by another process ({holder}): wait for it, or choose another --out") from None
        except OSError as error:
            print(f"note: {run} is not locked ({error.strerror}): let no other process train there")
        try:
            if os.path.samestat(os.fstat(file.fileno()), path.stat()):
                break
        except FileNotFoundError:
            pass
        file.close()   # the one before removed it between our open and our lock
    try:
        file.truncate(0)
        file.write(f"process {os.getpid()} on {platform.node()}")
        file.flush()
        yield
    finally:
        path.unlink(missing_ok=True)
        file.close()
        if not any(run.iterdir()):   # refused before anything was written
            run.rmdir()


def command_line():
    """This command, as it is typed; without --overwrite, which would discard what the command left."""
    return shlex.join(["python", Path(sys.argv[0]).name, *(a for a in sys.argv[1:] if a != "--overwrite")])


def start_run(run, args, role, seed, data, model, **facts):
    """Make or check a run folder before training. Returns True when there is something to train.

    A finished run of the same settings prints so and returns False; a run folder of other settings is an InputError
    unless --overwrite was given; an unfinished run of the same settings is continued. `facts` go into config.json and are compared like the flags.
    Call it within `locked(run)`.
    """
    return from_first_rank(functools.partial(_start_run, run, args, role, seed, data, model, facts))


def _start_run(run, args, role, seed, data, model, facts):
    flags = json.loads(json.dumps(dict(vars(args), label_noise=data.facts["label_noise"])))
    config = dict(role=role, seed=seed, arch=args.arch, flags=flags, data=data.facts, facts=facts,
                  parameters=sum(p.numel() for p in model.parameters()),
                  command=command_line(), versions=versions())
    run.mkdir(parents=True, exist_ok=True)
    for leftover in run.glob(".*.tmp"):   # of a run that was killed while it wrote
        if RUN_FILE.fullmatch(leftover.name[1:].rsplit(".", 2)[0]):
            leftover.unlink()
    if not (run / "config.json").exists() and any(file.name != ".lock" for file in run.iterdir()):
        raise InputError(f"{run} is not empty and not a run folder: choose another --out")
    if (run / "config.json").exists() and not args.overwrite and read_json(run / "config.json") != DISCARDED:
        before, compared = read_config(run), ("role", "seed", "flags", "data", "facts")
        differing = [f"{key}: {was!r} there, {now!r} now" for key, was, now in
                     _differences({key: before.get(key) for key in compared}, {key: config[key] for key in compared})
                     if key.removeprefix("flags.") not in NOT_COMPARED]
        if differing:
            raise InputError(f"{run} holds a run with other settings ({'; '.join(differing[:4])}): "
                             "choose another --out, or discard it with --overwrite")
        if (run / "logits.npz").exists():
            print(f"{run} is finished already; --overwrite would train it again")
            return False
        return True
    discard_run(run)
    write_json(run / "config.json", config)
    return True


RUN_FILE = re.compile(r"config\.json|metrics\.jsonl|checkpoint\.pt|logits\.npz|snapshot-\d+\.pt")


DISCARDED = {"discarded": True}   # config.json of a run folder that --overwrite has emptied and training has not reached yet


def discard_run(run):
    """Empty a run folder of the files of its run, and no others."""
    write_json(Path(run) / "config.json", DISCARDED)
    for file in sorted(Path(run).iterdir(), key=lambda file: file.name != "logits.npz"):   # first what says "finished"
        if RUN_FILE.fullmatch(file.name) and file.name != "config.json":
            file.unlink()


def discard_runs(args, runs, teachers=()):
    """With --overwrite, discard all of `runs` now: interrupted, the command without --overwrite then goes on.

    InputError when one of them is the run folder of one of the `teachers` that the command itself reads.
    """
    if args.overwrite:   # after all input has been checked
        places = {os.path.realpath(run) for run in runs}
        for teacher in teachers:
            if os.path.realpath(teacher) in places:
                raise InputError(f"--overwrite would discard the teacher {teacher} of this command: choose another --out")
        for run in runs:
            if (Path(run) / "config.json").exists() and not ranks()[0]:
                with locked(run):
                    discard_run(run)
        args.overwrite = False


def _differences(before, after, prefix=""):
    for key in sorted(set(before) | set(after), key=lambda key: (isinstance(after.get(key), dict), key)):
        was, now = before.get(key), after.get(key)
        if isinstance(was, dict) and isinstance(now, dict):
            yield from _differences(was, now, f"{prefix}{key}.")
        elif was != now:
            yield prefix + key, was, now


def read_config(run):
    """config.json of a run folder as a dict; InputError when it is not what `start_run` writes."""
    config = read_json(Path(run) / "config.json")
    if not isinstance(config, dict) or not all(isinstance(config.get(key), dict) for key in ("flags", "data", "facts")):
        raise InputError(f"{run}/config.json is not that of a run: restore it, or make the run again with --overwrite")
    return config


def finished_config(run):
    """config.json of a finished run; InputError when the folder is missing, not a run, or not finished."""
    run = Path(run)
    if not (run / "config.json").is_file():
        raise InputError(f"{run} is not a run folder (no config.json): give a folder that train_teacher.py or train_student.py wrote")
    config = read_config(run)
    if not (run / "logits.npz").exists():
        raise InputError(f"{run} is not finished (no logits.npz): continue it with: {config.get('command', 'its training command')}")
    return config


def load_checkpoint(path, device="cpu"):
    """The dict in a checkpoint file, tensors only (no code of it is run); InputError when it is torn or has changed."""
    try:
        with zipfile.ZipFile(path) as archive:
            if archive.testzip():   # torch.load does not compare the checksums that torch.save writes
                raise ValueError("a checksum does not fit")
        state = torch.load(path, map_location=device, weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, not a dictionary")
        return state
    except FileNotFoundError:
        raise InputError(f"{path} does not exist: train that run again") from None
    except pickle.UnpicklingError:   # torch's own advice here is to load it with its code
        raise InputError(f"{path} is damaged, or holds more than tensors and numbers, which is never loaded: train that run again with --overwrite") from None
    except Exception as error:   # zip, pickle and torch each raise their own kinds on a damaged file
        raise InputError(f"{path} is damaged ({first_line(error)}): train that run again with --overwrite") from None


def read_metrics(run):
    """All lines of a run's metrics.jsonl as dicts; InputError when one of them is missing or not what a run writes."""
    try:
        lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{run}/metrics.jsonl cannot be read ({first_line(error)}): train that run again with --overwrite") from None
    if not lines or not all(isinstance(line, dict) and line.get("epoch") == k and all(isinstance(value, (int, float)) for value in line.values())
                            for k, line in enumerate(lines, 1)):
        raise InputError(f"{run}/metrics.jsonl is not that of a run: train that run again with --overwrite")
    return lines


def last_metrics(run):
    """The last line of a finished run's metrics.jsonl as a dict, with its test_acc; InputError when it has none."""
    last = read_metrics(run)[-1]
    if not isinstance(last.get("test_acc"), float):
        raise InputError(f"{run}/metrics.jsonl ends without a test_acc: train that run again with --overwrite")
    return last


def load_teacher(run, data):
    """The trained model of a finished run, in eval mode on data's device, checked against `data`.

    InputError when its classes, data, subset or label noise differ from `data`, or when its test accuracy here is
    not what the run recorded (other weights, or another normalisation).
    """
    config = finished_config(run)
    for key in ("classes", "image", "subset", "label_noise", "data_seed", "n_test", "sha256"):
        if config["data"].get(key) != data.facts[key]:
            raise InputError(f"teacher {run} was trained on data with {key} {config['data'].get(key)}, the student's has "
                             f"{data.facts[key]}: give both the same --data, --subset, --label-noise and --data-seed")
    width = config["flags"].get("width", 1.0)
    if not isinstance(width, (int, float)) or not 0 < width <= 64:
        raise InputError(f"{run}/config.json has the width {width!r}: restore it, or train that run again with --overwrite")
    model = build_model(str(config.get("arch")), data.classes, data.facts["image"], width).to(data.device)
    try:
        model.load_state_dict(load_checkpoint(Path(run) / "checkpoint.pt", data.device)["model"])
    except (RuntimeError, KeyError, TypeError, IndexError, AttributeError) as error:
        raise InputError(f"{run}/checkpoint.pt does not fit {config['arch']} ({first_line(error)}): train it again") from None
    model = model.to(memory_format=torch.channels_last).eval()
    recorded = last_metrics(run)["test_acc"]
    measured = (logits_of(model, data, data.x_test).argmax(1) == data.y_test).double().mean().item()
    if not abs(measured - recorded) <= max(0.002, 2 / len(data.y_test)) + 1e-9:   # also where it recorded NaN; float noise between devices flips a few points
        raise InputError(f"teacher {run} has {100 * measured:.2f}% test accuracy here but recorded {100 * recorded:.2f}%: "
                         "its checkpoint or the data has changed; train it again")
    return model


# ---------------------------------------------------------------- training engine


def epoch_stream(data, role, seed, epoch, view_seed=None):
    """Order [N] of the training images and view [N] of every image in one epoch, on the CPU.

    Both depend on their key alone, so a run can be continued, or a view recomputed, without replaying what came
    before. view_seed gives several runs the same views, each in its own order.
    """
    n = len(data.y_train)
    order = torch.randperm(n, generator=generator("order", role, seed, epoch))
    views = torch.randint(data.n_views, (n,), generator=generator("views", role, seed if view_seed is None else view_seed, epoch))
    return order, views


def learning_rate(step, args, per_epoch):
    """Learning rate of a step (counted from 0): linear warm-up, then cosine to zero or ×0.1 at the milestones."""
    epoch = step / per_epoch
    if epoch < args.warmup:
        return args.lr * (step + 1) / (args.warmup * per_epoch + 1)
    if args.schedule == "step":
        return args.lr * 0.1 ** sum(epoch >= milestone for milestone in args.milestones)
    return args.lr * 0.5 * (1 + math.cos(math.pi * (epoch - args.warmup) / (args.epochs - args.warmup)))


@torch.no_grad()
def logits_of(model, data, images, batch=1000):
    """float32 logits [N, classes] of un-augmented uint8 images, in eval mode and full precision."""
    training = model.training
    model.eval()
    logits = torch.cat([model(data.normalise(images[k:k + batch])).float() for k in range(0, len(images), batch)])
    model.train(training)
    return logits


def total_steps(args, data):
    """(steps per epoch, steps of the whole run); an epoch drops its last, incomplete batch."""
    per_epoch = len(data.y_train) // min(args.batch_size, len(data.y_train))
    return per_epoch, per_epoch * (args.stop_epoch or args.epochs)


def save_state(path, model, optimizer, **progress):
    """Write all that `restore_state` needs to go on exactly: weights, optimiser, random states, and `progress`."""
    state = dict(progress, model=model.state_dict(), optimizer=optimizer.state_dict(), rng=torch.get_rng_state(),
                 cuda_rng=torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])
    write_atomic(path, lambda file: torch.save(state, file))


def restore_state(source, model, optimizer, per_epoch, total, device):
    """Load what `save_state` wrote; returns (step, history, spent, loss_sum, correct). InputError when it does not fit the run."""
    state = load_checkpoint(source, device)
    try:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(dict(state["optimizer"], param_groups=optimizer.state_dict()["param_groups"]))   # these are of the flags
        step, history = state["step"], state["history"]
        if not (isinstance(step, int) and 0 <= step <= total and isinstance(history, list) and [line["epoch"] for line in history] == list(range(1, step // per_epoch + 1))
                and all(isinstance(value, (int, float)) for line in history for value in line.values())):
            raise ValueError(f"step {step} of {total} with {len(history)} epochs of metrics")
        for parameter, kept in optimizer.state.items():   # load_state_dict takes any shape
            for name, value in kept.items():
                if not (name == "momentum_buffer" and value is None) and (value.numel() != 1 if name == "step" else value.shape != parameter.shape):
                    raise ValueError("the optimiser's state has other shapes than the weights")
        torch.set_rng_state(state["rng"].cpu())
        if device.type == "cuda" and state["cuda_rng"]:
            torch.cuda.set_rng_state_all([rng.cpu() for rng in state["cuda_rng"]])
        return step, history, float(state["spent"]), state["loss_sum"].reshape(()).double(), state["correct"].reshape(()).long()
    except (KeyError, IndexError, AttributeError, RuntimeError, ValueError, TypeError) as error:
        raise InputError(f"{source} does not fit this run ({first_line(error)}): discard it with --overwrite") from None


@contextmanager
def interruptible():
    """A list that SIGINT and SIGTERM append to, instead of ending the process, so that a run can save first."""
    stop = []
    handlers = {number: signal.signal(number, lambda number, frame: stop.append(number)) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)


def exit_interrupted():
    """Say how to continue what was interrupted and saved, and exit 130."""
    print(f"interrupted; continue with: {command_line()}")
    raise SystemExit(130)


def write_metrics(run, history):
    """Write all of a run's metrics, one JSON line per epoch; the whole file, so that no line is lost, doubled or torn."""
    write_text(run / "metrics.jsonl", "".join(json.dumps(line) + "\n" for line in history))


class TeacherLogits:
    """The teacher_logits [B, C] of training batches: from a teacher forward in every step, or looked up in a table.

    source "live": a forward in every step. "views": one table [N · n_views, C] of every view of every image, made when it
    is first needed and kept in memory. "epochs": a table [N, C] for each epoch of a stream of views (see `epoch_stream`),
    kept in a file for all runs that follow the same stream. A teacher in eval mode treats each image alone, so all three
    give the same logits, up to the rounding of convolutions over batches of other sizes; tables keep the model's precision.
    """

    def __init__(self, model, data, precision="fp32", source="live"):
        self.model, self.data, self.precision, self.source = model, data, precision, source
        self.sha256, self.table = weights_hash(model), None

    @torch.no_grad()
    def forward(self, images, model=None):
        """Logits of a batch in the precision that the model gives them: float32, or bfloat16 under autocast."""
        with torch.autocast(images.device.type, torch.bfloat16, enabled=self.precision == "bf16", cache_enabled=False):
            return (self.model if model is None else model)(images)

    def fill(self, index, views):
        """Logits [len(index), C] of images `index` in `views`, in batches."""
        return torch.cat([self.forward(self.data.batch(*part)) for part in zip(index.split(500), views.split(500))])

    def epoch_table(self, folder, stream, epoch, views):
        """The table for one epoch, or None for a live teacher. views [N]: the view of every image under the key `stream`."""
        n, device = len(views), views.device
        if self.source == "views" and self.table is None:
            every = torch.arange(self.data.n_views, device=device)
            for index in torch.arange(n, device=device).split(max(1, 5000 // len(every))):
                part = self.fill(index.repeat_interleave(len(every)), every.repeat(len(index)))
                if self.table is None:
                    self.table = part.new_empty(n * len(every), part.shape[1])
                self.table[index[0] * len(every):(index[-1] + 1) * len(every)] = part
        if self.source != "epochs":
            return self.table
        key = stream_seed(self.sha256, self.data.facts["sha256"], self.precision, self.data.n_views, stream)
        file = Path(folder) / f"{key:016x}" / f"epoch-{epoch + 1:04d}.npz"
        try:
            (name, table), = read_npz(file, None).items()
            table = torch.from_numpy(table).view(getattr(torch, name))
            if table.shape != (n, self.data.classes):
                raise InputError(f"{file} has the shape {list(table.shape)}")
            return table.to(device)
        except (InputError, ValueError, AttributeError, TypeError, RuntimeError) as error:
            if file.exists():
                print(f"note: {first_line(error)}; it is made again")
        table = self.fill(torch.arange(n, device=device), views)
        file.parent.mkdir(parents=True, exist_ok=True)
        # numpy knows no bfloat16: its bits go as int16, under the name of the true type.
        bits = table.cpu().view(torch.int16) if table.dtype == torch.bfloat16 else table.cpu()
        write_atomic(file, lambda out: np.savez(out, **{str(table.dtype).removeprefix("torch."): bits.numpy()}))
        return table

    def __call__(self, images, index, view, table, model=None):
        """float32 logits [B, C] of `images`, the training images `index` [B] in the views `view` [B]; `table` from `epoch_table`."""
        if table is None:
            return self.forward(images, model).float()
        return table[index * self.data.n_views + view if self.source == "views" else index].float()


def teacher_source(choice, data, args, students, streams, run):
    """Choose where teacher logits come from, print the choice and return it: see `TeacherLogits`.

    choice: --teacher-cache. students: epochs of distillation over all students of one teacher that this command trains;
    streams: those of them that differ in their views. Counted in passes of the teacher over the training set, a table of
    all views costs n_views. It may take half of the free memory, and tables of epochs half of the free disk.
    """
    per_view = len(data.y_train) * data.classes * (2 if args.precision == "bf16" else 4)
    folder = next(parent for parent in Path(run).absolute().parents if parent.exists())
    passes = {"live": students}
    if choice != "off" and students and ranks()[1] == 1:   # each process of torchrun would fill a whole table
        if streams * per_view < shutil.disk_usage(folder).free / 2:
            passes["epochs"] = streams
        if data.n_views * per_view < free_memory(data.device) / 2:
            passes["views"] = data.n_views
        if choice == "on":
            del passes["live"]
    if not passes:
        raise InputError(f"--teacher-cache on: tables of {data.n_views * per_view / 1e9:.1f} GB fit neither into memory nor on the disk: use auto or off")
    source = min(passes, key=passes.get)
    what = dict(live="teacher forward in every step", epochs="a table of each epoch's views", views=f"a table of all {data.n_views} views")[source]
    if students:
        print(f"teacher logits: {what} ({passes[source]:g} passes of the teacher for {students:g} epochs of students)")
    return source


def free_memory(device):
    """Bytes of memory that are free on a device; on a CPU what the system counts as available."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+)", Path("/proc/meminfo").read_text())[1])
    except (OSError, TypeError):   # not Linux
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2


def training_step(model, optimizer, data, loss_fn, teacher, precision, sums, fast=False):
    """step(index, view, ce_weight, kd_weight, table, images=None): one optimiser step; the loss and the hits are added to `sums`.

    The readable reference of the fast paths. teacher: `TeacherLogits`; table: what its `epoch_table` gave, or False for
    a step without the teacher; images: the uint8 batch where it comes from files. Nothing here waits for the device.
    """
    compiled = torch.compile(model) if fast else model
    compiled_teacher = torch.compile(teacher.model) if fast and teacher else None

    def step(index, view, ce_weight, kd_weight, table, images=None):
        images, labels = data.batch(index, view, images), data.y_train[index]
        # No cast cache: in a captured graph it would hand a later step the weights of an earlier one.
        with torch.autocast(images.device.type, torch.bfloat16, enabled=precision == "bf16", cache_enabled=False):
            logits = compiled(images)
        logits = logits.float()
        teacher_logits = None if table is False else teacher(images, index, view, table, compiled_teacher)
        loss = loss_fn(logits, labels, teacher_logits, ce_weight, kd_weight)
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
        sums[0].add_(loss.detach())
        sums[1].add_((logits.detach().argmax(1) == labels).sum())
    return step


def captured_step(step, model, optimizer, batch, sums):
    """`step` as CUDA graphs, one with and one without the teacher: a step is then one launch instead of a thousand.

    Indices, views and loss weights lie in device tensors that are filled before each replay, and the learning rate of
    the optimizer must be a device tensor, so schedules, switches and epochs need no new capture.
    """
    device = sums[0].device
    index, view = (torch.zeros(batch, dtype=torch.long, device=device) for _ in range(2))
    weights, graphs, held = torch.zeros(2, device=device), {}, []

    def capture(table):
        # Warm-up steps compile and allocate, on a side stream as CUDA demands; what they changed is put back.
        before = [value.clone() for value in (*model.state_dict().values(), *sums)]
        momentum = [state["momentum_buffer"].clone() for state in optimizer.state.values() if state.get("momentum_buffer") is not None]
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                step(index, view, weights[0], weights[1], table)
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            step(index, view, weights[0], weights[1], table)
        with torch.no_grad():
            for value, old in zip((*model.state_dict().values(), *sums), before):
                value.copy_(old)
            buffers = [state["momentum_buffer"] for state in optimizer.state.values() if state.get("momentum_buffer") is not None]
            for k, buffer in enumerate(buffers):
                buffer.copy_(momentum[k]) if momentum else buffer.zero_()
        return graph

    def replay(new_index, new_view, ce_weight, kd_weight, table):
        kind = "no teacher" if table is False else "teacher"
        if torch.is_tensor(table):   # it may be another one in each epoch, but the graph reads from the memory of the first
            if held and held[-1] is not table:
                held[0].copy_(table)
            held[:] = [held[0] if held else table, table]
            table = held[0]
        index.copy_(new_index)
        view.copy_(new_view)
        weights[0].fill_(ce_weight)
        weights[1].fill_(kd_weight)
        if kind not in graphs:
            graphs[kind] = capture(table)
        graphs[kind].replay()
    return replay


class Interrupted(Exception):
    """Thrown into a `training` generator to make it save and end."""


def run_jobs(jobs, device="cpu", together=False):
    """Train several runs to their ends. jobs: callables without arguments, each giving a generator such as `training`.

    together: on a CPU each job in a process of its own with one thread, as many at a time as there are cores (jobs must
    then be picklable: partials of top-level functions); on CUDA all in this process, a step each in turn, each on a
    stream of its own, so that small steps fill the device together. The runs share nothing, so each ends as it would
    alone. A SIGINT or SIGTERM lets each save, and exits 130.
    """
    if together and device == "cpu" and len(jobs) > 1:
        return _run_in_processes(jobs)
    for group in [jobs] if together else [[job] for job in jobs]:
        if device == "cuda":
            torch.cuda.synchronize()   # the data came by another stream
        active = [(job(), torch.cuda.Stream() if device == "cuda" and len(group) > 1 else None) for job in group]
        # Processes of torchrun would stop in different steps: a signal ends them as they are, and the last checkpoint counts.
        with interruptible() if ranks()[1] == 1 else nullcontext([]) as stop:
            while active:
                stopping = bool(stop)
                for pair in list(active):
                    generator, stream = pair
                    with torch.cuda.stream(stream) if stream else nullcontext():
                        try:
                            generator.throw(Interrupted()) if stopping else next(generator)
                        except (StopIteration, Interrupted):
                            active.remove(pair)
        if stop:
            exit_interrupted()


def _job_process(pickled):
    """One job in a process of its own, as the script itself would run it; it saves and ends when the script is killed."""
    script = multiprocessing.parent_process()
    threading.Thread(target=lambda: (script.join(), os.kill(os.getpid(), signal.SIGTERM)), daemon=True).start()
    torch.set_num_threads(1)
    keep_freed_memory()
    cli(lambda: run_jobs([torch.load(io.BytesIO(pickled), weights_only=False)]))   # bytes of the parent, not of a file


def _run_in_processes(jobs):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["common"])   # torch is imported once for all of them
    waiting, active, codes = list(jobs), [], []
    sys.stdout.flush()
    with interruptible() as stop:
        while active or waiting and not stop and not any(codes):
            while waiting and len(active) < cores() and not stop and not any(codes):
                pickled = io.BytesIO()   # torch's own pickling would put the data into /dev/shm, which is small in containers
                torch.save(waiting.pop(0), pickled)
                active.append(context.Process(target=_job_process, args=(pickled.getvalue(),)))
                active[-1].start()
            wait_for_any([process.sentinel for process in active], timeout=0.5)
            for process in active:
                if stop and process.is_alive():
                    process.terminate()   # SIGTERM: it saves and ends
            codes += [process.exitcode for process in active if not process.is_alive()]
            active = [process for process in active if process.is_alive()]
    if stop or 130 in codes:
        exit_interrupted()
    if 2 in codes:   # that process has said why
        raise SystemExit(2)
    if any(codes):
        raise InputError(f"the process of a run ended with code {max(codes, key=abs)} (killed, perhaps for lack of memory): "
                         "the same command goes on from what is finished")


def cores():
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def train(*run, **options):
    """Train one run to its end; the arguments are those of `training`."""
    run_jobs([functools.partial(training, *run, **options)])


def training(run, model, data, args, role, seed, loss_fn, weights_at, teacher=None, snapshots=(), start_from=None):
    """Generator that trains `model` in the run folder `run`, from its checkpoint if it has one, yielding before each step.

    It leaves checkpoint.pt, metrics.jsonl and logits.npz there; drive it with `run_jobs`. `Interrupted` thrown into it
    saves first; on a CPU the continued run ends in the same weights, bit for bit.
    loss_fn(logits, labels, teacher_logits, ce_weight, kd_weight) -> scalar, where teacher_logits is None whenever
    kd_weight is 0, and the weights may be tensors; weights_at(step) -> (ce_weight, kd_weight); teacher: `TeacherLogits`,
    or None for runs without distillation. snapshots: steps before which the state is also kept as snapshot-<step>.pt.
    start_from: a checkpoint to begin with when the run folder has none.
    """
    per_epoch, total = total_steps(args, data)
    batch = min(args.batch_size, len(data.y_train))
    device, (rank, world) = torch.device(args.device), ranks()
    if batch % world:
        raise InputError(f"a batch of {batch} images does not split over {world} processes: give a --batch-size that does")
    share = batch // world   # images of each step for this process; gradients are averaged over all
    graphs = args.fast and device.type == "cuda" and world == 1 and not data.streams
    model = model.to(device).to(memory_format=torch.channels_last)
    parallel = nn.parallel.DistributedDataParallel(model, [torch.cuda.current_device()] if device.type == "cuda" else None) if world > 1 else model
    lr_tensor = torch.tensor(args.lr, device=device) if graphs else None
    optimizer = torch.optim.SGD(model.parameters(), lr_tensor if graphs else args.lr, args.momentum, weight_decay=args.weight_decay,
                                nesterov=args.momentum > 0, fused=device.type == "cuda")
    torch.manual_seed(stream_seed("dropout", role, seed, *[rank] * (rank > 0)))   # only models with dropout draw from it
    step, history, spent = 0, [], 0.0
    sums = torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.long, device=device)   # loss, hits

    def over_ranks():
        """`sums` of the global batches: the loss is a mean over a batch, hits are counted."""
        if world == 1:
            return sums
        loss_sum, hits = sums[0] / world, sums[1].clone()
        for value in (loss_sum, hits):
            torch.distributed.all_reduce(value)
        return loss_sum, hits

    def save(path):
        loss_sum, hits = over_ranks()
        if not rank:
            save_state(path, model, optimizer, step=step, history=history, loss_sum=loss_sum, correct=hits, spent=spent + time.perf_counter() - started)

    def check_finite(test=None):
        # Weights and outputs too: the loss of a step is older than what the step did to them.
        numbers = [over_ranks()[0], *(p.detach().double().sum() for p in model.parameters()), *([] if test is None else [test.double().sum()])]
        if not torch.isfinite(torch.stack(numbers)).all():
            raise InputError(f"the loss or the weights became NaN or infinite in epoch {epoch + 1} of {run}: lower --lr (now {args.lr:g}) "
                             "or lengthen --warmup, and discard this run with --overwrite (its last good checkpoint is kept)")

    checkpoint = run / "checkpoint.pt"
    source = checkpoint if checkpoint.exists() else start_from
    if source is not None:
        step, history, spent, loss_sum, correct = restore_state(source, model, optimizer, per_epoch, total, device)
        if not rank:
            sums[0].copy_(loss_sum * world)
            sums[1].copy_(correct)
        if source == checkpoint and not args.quiet:
            print(f"{run}: continuing at step {step} of {total}")

    take_step = training_step(parallel, optimizer, data, loss_fn, teacher, args.precision, sums, args.fast)
    if graphs:
        take_step = captured_step(take_step, model, optimizer, batch, sums)
    with tqdm(total=total, initial=step, desc=run.name, unit="step", disable=True if args.quiet or args.together or rank else None) as bar:
        for epoch in range(step // per_epoch, total // per_epoch):
            order, views = (t.to(device) for t in epoch_stream(data, role, seed, epoch, args.view_seed))
            model.train()
            table, started = False, time.perf_counter()
            mine = [order[first + rank * share:first + (rank + 1) * share] for first in range(step % per_epoch * batch, per_epoch * batch, batch)]
            from_files = iter(data.loader(mine)) if data.streams else None
            for index in mine:
                try:
                    yield
                except Interrupted:
                    check_finite()
                    save(checkpoint)
                    print(f"{run}: saved at step {step} of {total}")
                    raise
                lr = learning_rate(step, args, per_epoch)
                for group in optimizer.param_groups:
                    group["lr"] = lr_tensor.fill_(lr) if graphs else lr
                if step in snapshots:   # with this step's learning rate, also where the run was continued just here
                    save(run / f"snapshot-{step}.pt")
                ce_weight, kd_weight = weights_at(step)
                if kd_weight and table is False:
                    stream = (role, seed if args.view_seed is None else args.view_seed)
                    table = teacher.epoch_table(run.parent / "teacher-logits", stream, epoch, views)
                more = dict(images=next(from_files)) if data.streams else {}
                take_step(index, views[index], ce_weight, kd_weight, table if kd_weight else False, **more)
                step += 1
                bar.update()
            if device.type == "cuda":
                torch.cuda.current_stream().synchronize()   # once per epoch, so that the time is the device's
            seconds = spent + time.perf_counter() - started
            test = logits_of(model, data, data.x_test) if (epoch + 1) % args.eval_every == 0 or step == total else None
            check_finite(test)
            loss_sum, hits = over_ranks()
            line = dict(epoch=epoch + 1, step=step, lr=lr, ce_weight=ce_weight, kd_weight=kd_weight,
                        train_loss=loss_sum.item() / per_epoch, train_acc=hits.item() / (per_epoch * batch),
                        seconds=round(seconds, 3), images_per_s=round(per_epoch * batch / seconds, 1))
            if test is not None:
                line["test_loss"] = F.cross_entropy(test, data.y_test).item()
                line["test_acc"] = (test.argmax(1) == data.y_test).double().mean().item()
                line["best_test_acc"] = max([line["test_acc"]] + [past["test_acc"] for past in history if "test_acc" in past])
            history.append(line)
            for value in sums:
                value.zero_()
            spent, started = 0.0, time.perf_counter()
            if not rank:
                write_metrics(run, history)
            if not args.quiet:
                bar.write(_epoch_line(line, args.epochs))
            if step == total or (epoch + 1) % args.save_every == 0:
                save(checkpoint)
    if not rank:
        write_metrics(run, history)
        save_logits(run, model, data)
    print(f"{run}: test {100 * history[-1]['test_acc']:.2f}% (best {100 * history[-1]['best_test_acc']:.2f}%), "
          f"train {100 * history[-1]['train_acc']:.2f}%, {sum(line['seconds'] for line in history):.0f} s, "
          f"{np.median([line['images_per_s'] for line in history]):.0f} images/s")


def _epoch_line(line, epochs):
    test = f"  test {line['test_loss']:.3f} {100 * line['test_acc']:5.2f}%" if "test_acc" in line else ""
    return (f"epoch {line['epoch']:3d}/{epochs}  lr {line['lr']:.4f}  train {line['train_loss']:.3f} {100 * line['train_acc']:5.2f}%{test}"
            f"  {line['seconds']:.1f} s  {line['images_per_s']:.0f} images/s")


LOGITS = ("train_logits", "train_labels", "train_clean_labels", "train_index", "test_logits", "test_labels")


def save_logits(run, model, data):
    """Write logits.npz: float32 logits of the un-augmented train and test images, labels, clean labels, indices.

    It is written last, so its presence says that the run is finished.
    """
    values = (logits_of(model, data, data.x_train), data.y_train, data.y_clean, data.index, logits_of(model, data, data.x_test), data.y_test)
    arrays = {name: value.cpu().numpy() for name, value in zip(LOGITS, values)}
    write_atomic(run / "logits.npz", lambda file: np.savez(file, **arrays))


# ---------------------------------------------------------------- intervals and claims


def mean_interval(values, level=0.95):
    """(mean, low, high): Student's t interval of the mean of independent seeds; infinite ends for a single value."""
    from scipy import stats
    values = np.asarray(values, float)
    if len(values) < 2:
        return float(values.mean()), -math.inf, math.inf
    half = stats.t.ppf(0.5 + level / 2, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
    return float(values.mean()), float(values.mean() - half), float(values.mean() + half)


def verdict(interval, threshold, above=True):
    """holds when the whole interval (low, high) lies above (below) the threshold, fails when on the other side, else unclear."""
    low, high = interval if above else (-interval[1], -interval[0])
    threshold = threshold if above else -threshold
    return "holds" if low > threshold else "fails" if high < threshold else "unclear"


def cell(measured, scale=1.0, digits=3):
    """`value [low, high]` of a dict with these keys, as text."""
    value, low, high = (_decimal(measured[key], scale, digits) for key in ("value", "low", "high"))
    return f"{value} [{low}, {high}]"


def _decimal(number, scale=1.0, digits=3):
    """A number as text, ? where it is undefined: NaN, infinite, or null from a JSON file (one seed has no interval over
    seeds, and a resample may leave a statistic undefined)."""
    return f"{scale * number:.{digits}f}" if number is not None and math.isfinite(number) else "?"


def claim(text, expected, value, low, high, threshold, above=True, note=""):
    """One row of a claims table. `value` with its 95% interval low..high is held against `threshold`."""
    return dict(claim=text, expected=expected, measured=value, low=low, high=high, verdict=verdict((low, high), threshold, above), note=note)


def claims_markdown(rows):
    """The claims as a Markdown table."""
    text = "| claim | expected | measured | 95% interval | verdict | note |\n|---|---|---|---|---|---|\n"
    for row in rows:
        value, low, high = (_decimal(row[key]) for key in ("measured", "low", "high"))
        text += f"| {row['claim']} | {row['expected']} | {value} | {low} to {high} | {row['verdict']} | {row['note']} |\n"
    return text


def checked_claims(rows, file):
    """`rows` as read from `file`; InputError when they are not those of a claims table."""
    try:
        if isinstance(rows, list) and all(isinstance(row, dict) for row in rows):
            claims_markdown(rows)
            return rows
    except (KeyError, TypeError, ValueError, OverflowError):
        pass
    raise InputError(f"{file} is not a table of claims: remove it, or make that figure again")


def scope(seeds, teachers=1):
    """What an interval covers, for the reader of a table: points alone, or points and seeds, and how many teachers."""
    if seeds == 1:
        return "over points only: one seed"
    return f"over points and {seeds} seeds, " + ("one teacher for all" if teachers == 1 else "each with its own teacher")


def save_claims(folder, rows, over=""):
    """Write claims.json and claims.md into `folder` and print the table; `over` says what the intervals cover."""
    rows = [dict(row, note="; ".join(filter(None, (row["note"], over)))) for row in rows]
    write_json(Path(folder) / "claims.json", rows)
    write_text(Path(folder) / "claims.md", claims_markdown(rows))
    print(claims_markdown(rows))


def show_results(folder):
    """Print every claims table below `folder` as one, and the paths of the figures."""
    rows = []
    for file in sorted(Path(folder).rglob("claims.json")):
        rows += [dict(row, claim=f"{file.parent.relative_to(folder)}: {row['claim']}") for row in checked_claims(read_json(file), file)]
    print(claims_markdown(rows))
    for figure in sorted(Path(folder).rglob("*.png")):
        print(f"figure: {figure}")


def pyplot():
    """matplotlib.pyplot without a window; imported where it is drawn, since that takes a second."""
    import matplotlib
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt
    return plt


def save_figure(figure, folder, name):
    """Write a matplotlib figure as PNG and PDF into `folder`, atomically, print the path and close it. The PNG records this command."""
    for text in (*figure.texts, *(axis.title for axis in figure.axes)):   # they hold names that a user gave: no formulas, any bytes
        text.set_text(text.get_text().encode(errors="replace").decode())
        text.set_parse_math(False)
    for ending in ("pdf", "png"):
        # No date in the file: the same run folders and command give the same bytes.
        metadata = dict(CreationDate=None) if ending == "pdf" else dict(Command=command_line())
        write_atomic(Path(folder) / f"{name}.{ending}", lambda file: figure.savefig(file, format=ending, dpi=150, metadata=metadata))
    pyplot().close(figure)
    print(f"figure: {Path(folder) / name}.png")
