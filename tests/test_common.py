"""Data, views, datasets, models, loss, learning rates and flags: what common.py promises, and what it refuses."""

import contextlib
import dataclasses
import functools
import hashlib
import http.server
import itertools
import json
import os
import pickle
import random
import shutil
import signal
import tarfile
import threading
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from helpers import (
    SOAK,
    TINY,
    Malicious,
    Reached,
    copy_run,
    damage_to,
    files_below,
    finished,
    forkserver,
    fuzz,
    hashes,
    odd_arrays,
    ok,
    one_line_error,
    outcome,
    refused,
    run_cli,
    valid_or_refused,
    write_arrays,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets

import analyze_deviation
import benchmark
import common
import denoise_gradients
import eigenspace
import engine
import glue_distill
import runs
import switch_distill
import train_student
import train_teacher

os.environ["HF_HUB_OFFLINE"] = "1"  # before transformers: else an absent model is asked for over the network

# ---------------------------------------------------------------- models


@pytest.mark.parametrize(
    "arch, classes, expected",
    [
        ("resnet8", 10, 75_290),
        ("resnet20", 10, 269_722),
        ("resnet32", 10, 464_154),
        ("resnet44", 10, 658_586),
        ("resnet56", 10, 853_018),
        ("resnet110", 10, 1_727_962),
        ("mobilenetv2", 10, 2_296_922),
    ],
)
def test_parameter_counts_are_the_published_ones(arch, classes, expected):
    # He et al. 2016, table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M for option A; MobileNet-v2 on CIFAR-10: 2.30M.
    assert sum(p.numel() for p in common.build_model(arch, classes, (32, 32, 3)).parameters()) == expected


@pytest.mark.parametrize(
    "arch, image",
    [
        *itertools.product(("resnet14", "mobilenetv2", "mlp", "cnn"), ((8, 8, 1), (32, 32, 3))),
        ("torchvision:resnet18", (32, 32, 3)),
        ("torchvision:googlenet", (64, 64, 3)),
    ],
)
def test_models_map_images_to_logits_and_depend_on_the_seed_alone(arch, image):
    side, _, channels = image
    before = torch.get_rng_state()
    width = 1.0 if arch.startswith("torchvision:") else 0.5
    one, same, other = (common.build_model(arch, 7, image, width, seed).eval() for seed in (1, 1, 2))
    assert torch.equal(before, torch.get_rng_state())
    x = torch.randn(2, channels, side, side, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        assert one(x).shape == (2, 7) and torch.equal(one(x), same(x)) and not torch.equal(one(x), other(x))


def test_width_scales_channels():
    assert common.build_model("resnet8", 10, (8, 8, 1), 2.0).features[0].out_channels == 32


# ---------------------------------------------------------------- views


def random_data(n=40, side=32, channels=3, pad=4, flip=True, classes=5):
    rng = np.random.default_rng(0)
    images = torch.tensor(rng.integers(0, 256, (n, side, side, channels)), dtype=torch.uint8)
    labels = torch.tensor(rng.integers(0, classes, n))
    mean, std = torch.tensor([0.2, 0.5, 0.7][:channels]), torch.tensor([0.3, 0.2, 0.1][:channels])
    facts = dict(image=[side, side, channels], classes=classes)
    return common.Data(images, labels, labels, torch.arange(n), images, labels, mean, std, classes, pad, flip, facts)


@pytest.mark.parametrize("mapped", [False, True])
@pytest.mark.parametrize("side, channels, pad, flip", [(32, 3, 4, True), (8, 1, 1, False)])
def test_every_view_equals_a_plain_per_image_crop_and_flip(side, channels, pad, flip, mapped):
    import torchvision.transforms.v2.functional as T

    data = random_data(3, side, channels, pad, flip)
    data.mapped = mapped  # then a batch pads what it gathers
    assert data.n_views == (162 if flip else 9)
    seen = set()
    for dy, dx, mirrored in itertools.product(range(2 * pad + 1), range(2 * pad + 1), (0, 1) if flip else (0,)):
        view = dy * data.shifts + dx
        view = 2 * view + mirrored if flip else view
        seen.add(view)
        got = data.batch(torch.tensor([0, 1, 2]), torch.full((3,), view))
        for k in range(3):
            plain = T.pad(data.x_train[k].permute(2, 0, 1), [pad] * 4)[:, dy : dy + side, dx : dx + side]
            plain = T.horizontal_flip(plain) if mirrored else plain
            plain = T.normalize(T.to_dtype(plain, torch.float32, scale=True), data.mean.tolist(), data.std.tolist())
            assert torch.allclose(got[k], plain, atol=1e-6)
    assert seen == set(range(data.n_views))
    centre = data.batch(torch.arange(3), torch.full((3,), (pad * data.shifts + pad) * (2 if flip else 1)))
    assert torch.equal(centre, data.normalise(data.x_train))
    assert centre.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_mixes_images_and_views_independently():
    data = random_data()
    index, view = torch.tensor([7, 3, 7, 20]), torch.tensor([0, 161, 80, 81])
    together = data.batch(index, view)
    for k in range(4):
        assert torch.equal(together[k : k + 1], data.batch(index[k : k + 1], view[k : k + 1]))
    data.mapped = True
    assert torch.equal(together, data.batch(index, view))


def test_epoch_streams_are_permutations_fixed_by_their_key():
    data = random_data(1000)
    order, views = common.epoch_stream(data, "student", 3, 5)
    assert sorted(order.tolist()) == list(range(1000))
    assert 0 <= views.min() and views.max() < data.n_views and len(views.unique()) > 140
    again = common.epoch_stream(data, "student", 3, 5)
    assert torch.equal(order, again[0]) and torch.equal(views, again[1])
    for other in (("teacher", 3, 5), ("student", 4, 5), ("student", 3, 6)):
        other_order, other_views = common.epoch_stream(data, *other)
        assert not torch.equal(order, other_order) and not torch.equal(views, other_views)


# ---------------------------------------------------------------- label noise, subsets, normalisation


def test_label_noise_is_symmetric_fixed_by_the_data_seed_and_leaves_clean_labels():
    clean, noisy, more = (common.load_data("digits", label_noise=p) for p in (0.0, 0.3, 0.6))
    assert torch.equal(clean.y_train, clean.y_clean) and torch.equal(noisy.y_clean, clean.y_train)
    assert torch.equal(noisy.y_test, clean.y_test)
    flipped = noisy.y_train != noisy.y_clean
    assert abs(flipped.double().mean() - 0.3) < 3 * (0.3 * 0.7 / 1297) ** 0.5
    assert noisy.facts["flipped"] == flipped.sum()
    assert (flipped <= (more.y_train != more.y_clean)).all()
    offsets = torch.bincount((more.y_train - more.y_clean)[more.y_train != more.y_clean] % 10, minlength=10)
    assert offsets[0] == 0 and scipy.stats.chisquare(offsets[1:].numpy()).pvalue > 0.001
    small = common.load_data("digits", label_noise=0.3, subset=200)
    assert torch.equal(small.y_train, noisy.y_train[small.index])
    assert torch.equal(small.x_train, noisy.x_train[small.index])
    assert not torch.equal(noisy.y_train, common.load_data("digits", label_noise=0.3, data_seed=1).y_train)
    assert common.load_data("digits").facts["label_noise"] == 0.3
    # Everything that training sees is in the hash.
    assert len({data.facts["sha256"] for data in (clean, noisy, more, small)}) == 4


def test_some_test_images_are_of_all_classes_though_the_files_are_sorted_by_them():
    data = common.load_data("digits")
    order = data.y_test.argsort()
    data = dataclasses.replace(data, x_test=data.x_test[order], y_test=data.y_test[order])
    images, labels = common.some_test_images(data, 100)
    assert images.shape == (100, 8, 8, 1) and (labels.bincount() >= 9).all()
    every = common.some_test_images(data, 2000)
    assert torch.equal(every[0], data.x_test) and torch.equal(every[1], data.y_test)


def test_subsets_are_class_balanced_and_nested():
    small, large = (common.load_data("digits", subset=n) for n in (205, 400))
    counts = torch.bincount(small.y_clean, minlength=10)
    assert len(small.y_train) == 205 and counts.max() - counts.min() == 1
    assert set(small.index.tolist()) < set(large.index.tolist())


def test_normalisation_uses_the_statistics_of_the_full_training_set():
    full, small = common.load_data("digits"), common.load_data("digits", subset=50)
    x = full.normalise(full.x_train).double()
    assert abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-4
    assert torch.equal(full.mean, small.mean) and torch.equal(full.std, small.std)


# ---------------------------------------------------------------- arrays and their labels


def save_arrays(path, labels, test_labels, side=8):
    """A random npz of these labels."""
    rng = np.random.default_rng(2)
    images = [rng.integers(0, 256, (len(y), side, side, 3), dtype=np.uint8) for y in (labels, test_labels)]
    np.savez(path, x_train=images[0], y_train=labels, x_test=images[1], y_test=test_labels)
    return f"npz:{path}"


@pytest.mark.parametrize("labels", [[1, 2, 3], [-1, 0, 1], [0, 5, 10**10], [2, 1, 3]])
def test_labels_with_gaps_or_an_offset_are_numbered_and_that_is_said(labels, tmp_path, capsys):
    name = save_arrays(tmp_path / "d.npz", np.array(labels * 4), np.array(labels[::-1] * 2))
    data, plain = common.load_data(name), sorted(labels)
    assert data.classes == 3 and data.facts["class_names"] == [str(label) for label in plain]
    assert data.y_train.tolist() == [plain.index(label) for label in labels * 4]
    assert data.y_test.tolist() == [plain.index(label) for label in labels[::-1] * 2]
    assert f"the 3 labels within {plain[0]}..{plain[-1]} are numbered 0..2" in capsys.readouterr().out


def test_plain_labels_are_left_alone_and_nothing_is_said(tmp_path, capsys):
    data = common.load_data(save_arrays(tmp_path / "d.npz", np.arange(12) % 3, np.arange(6) % 2))
    assert data.classes == 3 and data.facts["class_names"] == ["0", "1", "2"] and not capsys.readouterr().out


def test_test_labels_that_no_training_image_has_are_refused(tmp_path):
    name = save_arrays(tmp_path / "d.npz", np.arange(12) % 3, np.array([0, 7, 2, 9]))
    with pytest.raises(runs.InputError, match=r"test labels \[7, 9\] are in no training image"):
        common.load_data(name)


def test_many_classes_with_few_test_images_are_accepted(tmp_path):
    rng = np.random.default_rng(0)
    name = save_arrays(tmp_path / "d.npz", np.arange(2400) // 2, np.append(rng.integers(0, 1200, 599), 1199))
    data = common.load_data(name, subset=1200)
    assert data.classes == 1200 and sorted(data.y_clean.tolist()) == list(range(1200)) and len(data.y_test) == 600


# ---------------------------------------------------------------- CIFAR and Tiny-ImageNet


def fake_cifar(root, dataset, monkeypatch):
    """Write the original python pickles with random images, and teach torchvision their checksums."""
    rng, written = np.random.default_rng(2), {}
    folder = root / dataset.base_folder
    folder.mkdir(parents=True)

    def put(name, content):
        (folder / name).write_bytes(pickle.dumps(content))
        return hashlib.md5((folder / name).read_bytes()).hexdigest()

    fine = "fine_labels" if "100" in dataset.__name__ else "labels"
    for attribute in ("train_list", "test_list"):
        files = []
        for name, _ in getattr(dataset, attribute):
            images = rng.integers(0, 256, (12, 3072), dtype=np.uint8)
            written[name] = {"data": images, fine: (np.arange(12) % 10).tolist()}
            files.append([name, put(name, written[name])])
        monkeypatch.setattr(dataset, attribute, files)
    names = [f"class {c}" for c in range(10)]
    meta = dict(dataset.meta, md5=put(dataset.meta["filename"], {dataset.meta["key"]: names}))
    monkeypatch.setattr(dataset, "meta", meta)
    return written


def cifar_class(name):
    from torchvision import datasets

    return dict(cifar10=datasets.CIFAR10, cifar100=datasets.CIFAR100)[name]


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_loads_from_the_original_folder_or_a_prepared_npz(name, tmp_path, monkeypatch):
    dataset = cifar_class(name)
    written = fake_cifar(tmp_path, dataset, monkeypatch)
    data = common.load_data(name, tmp_path)
    first = written[dataset.train_list[0][0]]
    assert np.array_equal(data.x_train[0].permute(2, 0, 1).flatten().numpy(), first["data"][0])
    assert len(data.x_train) == 12 * len(dataset.train_list) and data.x_train.shape[1:] == (32, 32, 3)
    assert data.facts["class_names"] == [f"class {c}" for c in range(10)]
    arrays = (data.x_train, data.y_train, data.x_test, data.y_test)
    np.savez(tmp_path / f"{name}.npz", **dict(zip(common.ARRAYS, arrays, strict=True)))
    shutil.rmtree(tmp_path / dataset.base_folder)
    assert common.load_data(name, tmp_path).facts["sha256"] == data.facts["sha256"]


@pytest.fixture
def served(tmp_path):
    """A folder, and the address on this machine under which a web server offers it."""

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass

    (tmp_path / "served").mkdir()
    handler = functools.partial(Handler, directory=tmp_path / "served")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_cifar_downloads_once_through_torchvision(tmp_path, monkeypatch, served):
    from torchvision.datasets import cifar

    dataset, download, calls = cifar.CIFAR10, cifar.download_and_extract_archive, []
    fake_cifar(tmp_path / "source", dataset, monkeypatch)
    folder, address = served
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / dataset.base_folder, dataset.base_folder)

    def counted(url, *args, **more):
        calls.append(url)
        download(url, *args, **more)

    monkeypatch.setattr(cifar, "download_and_extract_archive", counted)
    monkeypatch.setattr(dataset, "url", f"{address}/{archive.name}")
    monkeypatch.setattr(dataset, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    with ThreadPoolExecutor(3) as pool:  # a lock of a file keeps threads apart as it does processes
        found = list(pool.map(lambda _: common.load_data("cifar10", tmp_path / "data"), range(3)))
    assert [len(data.x_train) for data in found] == [60] * 3 and calls == [dataset.url]
    monkeypatch.setattr(dataset, "url", f"{address}/absent.tar.gz")
    with pytest.raises(runs.InputError, match="cifar10 cannot be read .*put cifar10.npz or the folder"):
        common.load_data("cifar10", tmp_path / "empty")


def fake_tiny_imagenet(root):
    rng, names = np.random.default_rng(3), ["n01443537", "n01629819"]

    def image(path, mode="RGB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).convert(mode).save(path)

    for name, k in itertools.product(names, range(3)):
        image(root / "train" / name / "images" / f"{name}_{k}.JPEG", "L" if k == 2 else "RGB")
    for k in range(4):
        image(root / "val" / "images" / f"val_{k}.JPEG")
    lines = [f"val_{k}.JPEG\t{names[k % 2]}\t0\t0\t62\t62\n" for k in range(4)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))


def zipped(folder, archive, inside="", reverse=False):
    """A zip of all files below `folder`, each under the path `inside`."""
    with zipfile.ZipFile(archive, "w") as file:
        for path in sorted(folder.rglob("*"), reverse=reverse):
            file.write(path, Path(inside, path.relative_to(folder)))
    return archive


@pytest.mark.parametrize("layout", ["folder", "zip", "download"])
def test_tiny_imagenet_loads_from_folder_zip_and_download(layout, tmp_path, monkeypatch, served):
    from torchvision.datasets import utils

    source, data_dir = tmp_path / "source", tmp_path / "data"
    data_dir.mkdir()
    fake_tiny_imagenet((data_dir if layout == "folder" else source) / "tiny-imagenet-200")
    folder, address = served
    if layout != "folder":
        zipped(source, (data_dir if layout == "zip" else folder) / "tiny-imagenet-200.zip")
    download, calls = utils.download_url, []

    def from_here(url, *args):
        calls.append(url)
        download(f"{address}/{url.rpartition('/')[2]}", *args)

    monkeypatch.setattr(utils, "download_url", from_here)
    data = common.load_data("tiny-imagenet", data_dir)
    assert data.x_train.shape == (6, 64, 64, 3) and data.y_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.x_test.shape == (4, 64, 64, 3) and data.y_test.tolist() == [0, 1, 0, 1]
    assert data.facts["class_names"] == ["n01443537", "n01629819"]
    assert len(list(data_dir.glob("tiny-imagenet-200-64px-*"))) == 1
    shutil.rmtree(folder)
    assert common.load_data("tiny-imagenet", data_dir).facts == data.facts
    assert len(calls) == (layout == "download")


def test_a_download_that_is_no_zip_is_refused_and_not_kept(tmp_path, monkeypatch):
    from torchvision.datasets import utils

    def cut_off(url, folder, name):
        Path(folder, name).write_bytes(b"PK\x03\x04 and no more")

    monkeypatch.setattr(utils, "download_url", cut_off)
    with pytest.raises(runs.InputError, match="tiny-imagenet cannot be read .*put tiny-imagenet-200.zip"):
        common.load_data("tiny-imagenet", tmp_path)
    assert not (tmp_path / "tiny-imagenet-200.zip").exists()


def test_tiny_imagenet_with_val_sorted_into_class_folders(tmp_path):
    """Many copies are, for other programs; the table of classes is still there."""
    root = tmp_path / "tiny-imagenet-200"
    fake_tiny_imagenet(root)
    published = common.load_data("tiny-imagenet", tmp_path)
    for line in (root / "val" / "val_annotations.txt").read_text().splitlines():
        name, label = line.split()[:2]
        (root / "val" / label).mkdir(exist_ok=True)
        (root / "val" / "images" / name).rename(root / "val" / label / name)
    sorted_out = common.load_data("tiny-imagenet", tmp_path)
    assert sorted_out.y_test.tolist() == [0, 0, 1, 1]
    assert torch.equal(sorted_out.x_test, published.x_test[[0, 2, 1, 3]])
    assert torch.equal(sorted_out.x_train, published.x_train)


def test_tiny_imagenet_whose_table_names_an_absent_picture_is_refused(tmp_path):
    fake_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    (tmp_path / "tiny-imagenet-200" / "val" / "images" / "val_2.JPEG").unlink()
    with pytest.raises(runs.InputError, match="val_2.JPEG"):
        common.load_data("tiny-imagenet", tmp_path)


# ---------------------------------------------------------------- folders of pictures


def write_picture(path, seed=0, size=(12, 12), mode="RGB"):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.RandomState(seed).randint(0, 256, (*size, 3)).astype(np.uint8)
    Image.fromarray(pixels).convert(mode).save(path)


def write_pictures(root, classes=("cat", "dog"), counts=None, size=(12, 12)):
    """root/<split>/<class>/<k>.png, `counts` of each class: by default 4 in train/ and 2 in val/."""
    for split, count in (counts or dict(train=4, val=2)).items():
        for c, k in itertools.product(range(len(classes)), range(count)):
            write_picture(root / split / classes[c] / f"{k}.png", 100 * c + 10 * len(split) + k, size)
    return root


def prepared(folder):
    """The prepared arrays beside data in `folder`."""
    return sorted(path.name for path in folder.glob("[!.]*px-*"))


def test_folders_of_pictures_load_and_can_be_resized(tmp_path, capsys):
    root = write_pictures(tmp_path / "images", size=(20, 24))
    data = common.load_data(f"folder:{root}", image_size=16)
    assert data.x_train.shape == (8, 16, 16, 3) and data.y_train.tolist() == [0] * 4 + [1] * 4
    assert data.y_test.tolist() == [0, 0, 1, 1] and data.facts["class_names"] == ["cat", "dog"]
    assert f"{root}: 12 pictures are not square" in capsys.readouterr().out
    with Image.open(root / "train" / "dog" / "0.png") as picture:  # the short side, and the centre
        expected = np.array(picture.resize((16, 16), Image.Resampling.BICUBIC, box=(2, 0, 22, 20)))
    assert np.array_equal(data.x_train[4].numpy(), expected)
    with pytest.raises(runs.InputError, match="12 pictures cannot be used: .*0.png is 24×20, .*give --image-size"):
        common.load_data(f"folder:{root}")
    assert len(prepared(tmp_path)) == 1


def test_pictures_are_turned_as_their_tag_says(tmp_path):
    root = write_pictures(tmp_path / "images")
    path = root / "train" / "cat" / "0.png"
    pixels = np.array(Image.open(path))
    tag = Image.Exif()
    tag[0x0112] = 6  # the top of the scene is at the right: to be turned by 90° clockwise
    Image.fromarray(pixels).save(path, exif=tag)
    assert np.array_equal(common.load_data(f"folder:{root}").x_train[0].numpy(), np.rot90(pixels, -1))


@pytest.mark.parametrize("inside", ["", "images", "other name"])
def test_a_zip_gives_the_same_as_the_folder(inside, tmp_path):
    # "cat-2" comes before "cat" among strings that hold the slash, and after it among names, as in ImageFolder.
    root = write_pictures(tmp_path / "images", ("cat", "cat-2", "dog"))
    (tmp_path / "zip").mkdir()
    archive = zipped(root, tmp_path / "zip" / "images.zip", inside, reverse=True)
    data, unpacked = (common.load_data(f"folder:{path}", subset=9, label_noise=0.2) for path in (archive, root))
    for name in ("x_train", "y_train", "index", "x_test", "y_test", "mean", "std"):
        assert torch.equal(getattr(data, name), getattr(unpacked, name)), name
    assert dict(data.facts, name=0) == dict(unpacked.facts, name=0)
    whole = common.load_data(f"folder:{root}")
    assert whole.y_train.tolist() == datasets.ImageFolder(root / "train").targets


def test_an_entry_of_a_zip_without_a_name_is_one_line(tmp_path):
    nameless = zipfile.ZipInfo("x")
    nameless.filename = ""  # as in a damaged directory
    with zipfile.ZipFile(tmp_path / "p.zip", "w") as archive:
        archive.writestr(nameless, b"")
    with pytest.raises(runs.InputError, match=r"p\.zip cannot be read"):
        common.load_data(f"folder:{tmp_path / 'p.zip'}")


def test_a_zip_that_a_mac_made_is_read(tmp_path):
    root = write_pictures(tmp_path / "images")
    write_picture(tmp_path / "zip" / "__MACOSX" / "images" / "train" / "cat" / "._0.png")
    shutil.copytree(root, tmp_path / "zip" / "images")
    (tmp_path / "zip" / ".DS_Store").write_text("")
    archive = zipped(tmp_path / "zip", tmp_path / "images.zip")
    assert torch.equal(common.load_data(f"folder:{archive}").x_train, common.load_data(f"folder:{root}").x_train)


def test_pictures_are_prepared_once_for_all_that_want_them(tmp_path, monkeypatch):
    root, prepare, calls = write_pictures(tmp_path / "images"), common.prepare_pictures, []
    monkeypatch.setattr(common, "prepare_pictures", lambda *args: calls.append(args) or prepare(*args))
    with ThreadPoolExecutor(3) as pool:  # a lock of a file keeps threads apart as it does processes
        found = list(pool.map(lambda _: common.load_data(f"folder:{root}"), range(3)))
    assert len(calls) == 1 and len({data.facts["sha256"] for data in found}) == 1
    common.load_data(f"folder:{root}", subset=4, label_noise=0.5)
    assert len(calls) == 1
    assert common.load_data(f"folder:{root}", image_size=8).x_train.shape == (8, 8, 8, 3) and len(calls) == 2


def test_processes_that_find_no_data_prepare_it_once(tmp_path):
    write_pictures(tmp_path / "images")
    flags = [*TINY, "--subset", 0, "--epochs", 1, "--batch-size", 4, "--data", "folder:images", "--out"]
    with ThreadPoolExecutor(2) as pool:
        both = list(pool.map(lambda out: run_cli("train_teacher.py", *flags, out, cwd=tmp_path), ("a", "b")))
    assert all(ok(process) for process in both)
    assert sum("kept as arrays" in process.stdout for process in both) == 1
    assert hashes(tmp_path / "a")["logits.npz"] == hashes(tmp_path / "b")["logits.npz"]


def test_prepared_data_needs_no_lock_and_no_writing(tmp_path, monkeypatch):
    """Shared datasets often lie where a user cannot write."""
    root = write_pictures(tmp_path / "images")
    fake_cifar(tmp_path, cifar_class("cifar10"), monkeypatch)
    fake_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    names = (f"folder:{root}", "cifar10", "tiny-imagenet")
    first = [common.load_data(name, tmp_path).facts for name in names]

    def read_only(path, mode="r"):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(runs, "open", read_only, raising=False)  # what locks, or writes
    assert [common.load_data(name, tmp_path).facts for name in names] == first


def test_a_folder_beside_which_nothing_can_be_written_is_prepared_in_the_data_dir(tmp_path, monkeypatch):
    root = write_pictures(tmp_path / "shared" / "images")
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    data = common.load_data(f"folder:{root}", tmp_path / "data")
    assert len(prepared(tmp_path / "data")) == 1 and os.listdir(tmp_path / "shared") == ["images"]
    assert common.load_data(f"folder:{root}", tmp_path / "data").facts == data.facts


def test_a_changed_listing_prepares_anew(tmp_path):
    root = write_pictures(tmp_path / "images")
    first = common.load_data(f"folder:{root}")
    write_picture(root / "train" / "dog" / "9.png", 99)
    more = common.load_data(f"folder:{root}")
    assert len(more.x_train) == 9 and torch.equal(more.x_train[:8], first.x_train) and len(prepared(tmp_path)) == 2
    (root / "train" / "dog" / "9.png").rename(root / "train" / "cat" / "9.png")
    assert common.load_data(f"folder:{root}").y_train.tolist() == [0] * 5 + [1] * 4
    (root / "train" / "cat" / "9.png").unlink()
    assert common.load_data(f"folder:{root}").facts == first.facts and len(prepared(tmp_path)) == 3


def test_a_picture_replaced_by_another_of_as_many_bytes_is_noticed(tmp_path):
    root = write_pictures(tmp_path / "images")
    path = root / "train" / "dog" / "9.bmp"
    write_picture(path, 1)
    first, size = common.load_data(f"folder:{root}"), path.stat().st_size
    write_picture(path, 2)
    os.utime(path, (1, 1))  # as after a copy that keeps times
    assert path.stat().st_size == size
    assert not torch.equal(common.load_data(f"folder:{root}").x_train, first.x_train)


def kill_at_picture(root, at):
    """Be killed while the at-th picture is read."""
    read, seen = common.open_picture, itertools.count(1)

    def read_or_die(*args, **more):
        if next(seen) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return read(*args, **more)

    common.open_picture = read_or_die
    common.load_data(f"folder:{root}", image_size=8)


def test_a_preparation_that_was_killed_leaves_nothing_that_counts(tmp_path):
    root = write_pictures(tmp_path / "images")
    process = forkserver().Process(target=kill_at_picture, args=(root, 7))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL and not prepared(tmp_path)
    assert len(list(tmp_path.glob(".*px-*.tmp"))) == 1
    data = common.load_data(f"folder:{root}", image_size=8)
    assert len(prepared(tmp_path)) == 1 and not list(tmp_path.glob(".*px-*.tmp"))
    shutil.copytree(root, tmp_path / "elsewhere" / "images")
    other = common.load_data(f"folder:{tmp_path / 'elsewhere' / 'images'}", image_size=8)
    assert other.facts["sha256"] == data.facts["sha256"]


def test_a_disk_that_fills_up_while_pictures_are_prepared_is_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pictures(Path("images"))

    def no_space(*args):
        raise OSError(28, "No space left on device", "images-12px/x_train.npy")

    with monkeypatch.context() as patch:
        patch.setattr(np.lib.format, "open_memmap", no_space)
        line = refused(train_teacher, *TINY, "--subset", 0, "--data", "folder:images", "--out", "t")
    assert "No space left on device: images-12px/x_train.npy" in line
    assert not prepared(tmp_path) and not Path("t").exists()
    assert len(common.load_data("folder:images").x_train) == 8


def test_all_broken_pictures_are_named_together_before_any_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write_pictures(Path("images"), counts=dict(train=4, val=9))
    broken = [root / "val" / name / f"{k}.png" for name in ("cat", "dog") for k in range(1, 7)]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-200])
    line = refused(train_teacher, *TINY, "--subset", 0, "--data", "folder:images", "--out", "t")
    assert "12 pictures cannot be used" in line and line.endswith("; and 2 more") and "replace or remove" in line
    assert [path for path in broken if str(path) in line] == broken[:10]
    assert not Path("t").exists() and not prepared(tmp_path)
    (root / "train" / "cat" / "0.png").write_bytes(b"no picture")  # the one that would give the size
    line = refused(train_teacher, *TINY, "--subset", 0, "--data", "folder:images", "--out", "t")
    assert "train/cat/0.png" in line
    for path in [*broken, root / "train" / "cat" / "0.png"]:
        path.unlink()
    assert len(common.load_data("folder:images").x_test) == 6


def test_pictures_of_16_bits_are_scaled_to_8(tmp_path):
    root = write_pictures(tmp_path / "images")
    levels = np.random.RandomState(0).randint(0, 256, (12, 12)).astype(np.uint8)
    for ending in ("png", "tiff"):
        path = root / "train" / "dog" / f"deep.{ending}"
        Image.fromarray(levels.astype(np.uint16) * 257).save(path)
        deep = common.load_data(f"folder:{root}").x_train[-1].numpy()
        assert np.array_equal(deep, np.stack([levels] * 3, 2)), ending
        path.unlink()
    path = root / "train" / "dog" / "deep.png"
    fine = np.array([0, 128, 129, 385, 386, 65_406, 65_407, 65_535], np.uint16)
    Image.fromarray(np.resize(fine, (12, 12))).save(path)
    deep = common.load_data(f"folder:{root}").x_train[-1, ..., 0].numpy()
    assert np.array_equal(deep, np.resize([0, 0, 1, 1, 2, 254, 255, 255], (12, 12)))  # to the nearest of v/257


def test_grey_palette_and_transparent_pictures_become_rgb(tmp_path):
    root = write_pictures(tmp_path / "images")
    for mode in ("L", "P", "RGBA", "1", "LA"):
        write_picture(root / "train" / "dog" / f"mode {mode}.png", 5, mode=mode)
    assert common.load_data(f"folder:{root}").x_train.shape == (13, 12, 12, 3)


def test_a_picture_of_floats_is_refused_by_name(tmp_path):
    root = write_pictures(tmp_path / "images")
    Image.fromarray(np.ones((12, 12), np.float32)).save(root / "val" / "dog" / "depth.tiff")
    with pytest.raises(runs.InputError, match="1 pictures cannot be used: .*val/dog/depth.tiff has float pixels"):
        common.load_data(f"folder:{root}")


def test_a_picture_of_another_format_than_its_name_is_refused(tmp_path, monkeypatch):
    """PIL would recognise EPS by its content and start Ghostscript to decode it."""
    root = write_pictures(tmp_path / "images")
    path = root / "train" / "cat" / "1.png"
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save(tmp_path / "image.eps")
    shutil.copy(tmp_path / "image.eps", path)
    with pytest.raises(runs.InputError, match="train/cat/1.png cannot be read"):
        common.load_data(f"folder:{root}")


def test_hidden_entries_are_skipped_at_any_depth(tmp_path):
    root = write_pictures(tmp_path / ".cache" / "images")  # above the data they do not count
    plain = common.load_data(f"folder:{root}")
    for place in (
        "train/.ipynb_checkpoints/x.png",
        "train/cat/.ipynb_checkpoints/x.png",
        "val/.ipynb_checkpoints/x.png",
        "train/dog/._0.png",
        "train/__MACOSX/x.png",
        ".git/train/x.png",
    ):
        write_picture(root / place, 3)
    (root / "train" / ".DS_Store").write_text("")
    (root / "train" / "dog" / "notes.txt").write_text("no picture")
    assert common.load_data(f"folder:{root}").facts == plain.facts
    archive = zipped(root, tmp_path / "images.zip")
    assert common.load_data(f"folder:{archive}").facts["sha256"] == plain.facts["sha256"]


def test_val_is_the_test_split_before_test_and_that_is_said(tmp_path, capsys):
    root = write_pictures(tmp_path / "images")
    val = common.load_data(f"folder:{root}")
    assert "test split" not in capsys.readouterr().out
    write_pictures(root, counts=dict(test=3))
    both = common.load_data(f"folder:{root}")
    assert "val/ is the test split, test/ is not used" in capsys.readouterr().out and both.facts == val.facts
    shutil.rmtree(root / "val")
    assert len(common.load_data(f"folder:{root}").x_test) == 6 and "test split" not in capsys.readouterr().out


def test_folders_that_are_no_datasets_are_refused(tmp_path):
    root = write_pictures(tmp_path / "images")
    write_picture(root / "val" / "cow" / "0.png")
    with pytest.raises(runs.InputError, match="has test pictures of cow: train/ has no such class"):
        common.load_data(f"folder:{root}")
    for split in ("val", "train"):
        shutil.rmtree(root / split)
        with pytest.raises(runs.InputError, match="has no pictures in (test|train)/<class>/"):
            common.load_data(f"folder:{root}")
    write_pictures(tmp_path / "single", ("cat",))
    with pytest.raises(runs.InputError, match="at least 2 classes"):
        common.load_data(f"folder:{tmp_path / 'single'}")
    with pytest.raises(runs.InputError, match="absent does not exist"):
        common.load_data(f"folder:{tmp_path / 'absent'}")
    (tmp_path / "file.zip").write_text("")
    with pytest.raises(runs.InputError, match="file.zip cannot be read .*give a folder or a zip"):
        common.load_data(f"folder:{tmp_path / 'file.zip'}")


def test_batches_from_the_map_equal_those_in_memory(tmp_path, monkeypatch):
    root = write_pictures(tmp_path / "images", counts=dict(train=10, val=3))
    memory = common.load_data(f"folder:{root}", label_noise=0.2)
    monkeypatch.setattr(common, "free_memory", lambda device: 1000)
    mapped = common.load_data(f"folder:{root}", label_noise=0.2)
    assert mapped.mapped and not memory.mapped and mapped.facts == memory.facts
    for epoch in range(3):
        order, views = common.epoch_stream(memory, "student", 0, epoch)
        assert torch.equal(memory.batch(order, views[order]), mapped.batch(order, views[order]))
    for split in ("x_train", "x_test"):
        assert torch.equal(memory.normalise(getattr(memory, split)), mapped.normalise(getattr(mapped, split)))
    assert torch.equal(memory.y_train, mapped.y_train) and torch.equal(memory.mean, mapped.mean)


def test_training_from_the_map_gives_the_same_bits(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pictures(Path("images"), counts=dict(train=10, val=3), size=(14, 12))
    flags = [*TINY, "--subset", 0, "--data", "folder:images", "--image-size", 12, "--batch-size", 8]
    flags += ["--label-noise", 0.1, "--precision", "fp32", "--out"]
    load, mapped = common.load_data, []
    monkeypatch.setattr(common, "load_data", lambda *args: mapped.append(load(*args)) or mapped[-1])
    for way in ("memory", "map"):
        if way == "map":
            monkeypatch.setattr(common, "free_memory", lambda device: 1000)
        finished(train_teacher, *flags, f"t-{way}")
        student = [*flags, f"kd-{way}", "--teacher", f"t-{way}", "--teacher-cache"]
        finished(train_student, *student, "off" if way == "memory" else "on")
    assert [data.mapped for data in mapped] == [False, False, True, True]
    for name in ("t", "kd"):
        one, other = (runs.read_npz(f"{name}-{way}/logits.npz", engine.LOGITS) for way in ("memory", "map"))
        same = [np.array_equal(one[key], other[key]) for key in one if "logits" not in key]
        assert all(same)
        for key in ("train_logits", "test_logits"):
            # The student's table is filled in other batches than the live teacher's: rounding differs.
            assert np.array_equal(one[key], other[key]) if name == "t" else np.allclose(one[key], other[key], atol=1e-3)


# ---------------------------------------------------------------- loss and learning rates


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_loss_and_its_gradient_match_the_float64_formula(temperature):
    rng = np.random.default_rng(5)
    student, teacher = rng.normal(0, 4, (2, 6, 10))
    p, q = (scipy.special.softmax(z / temperature, 1) for z in (teacher, student))
    logits = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    loss = common.kd_loss(logits, torch.tensor(teacher, dtype=torch.float32), temperature)
    loss.backward()
    assert np.isclose(loss.item(), temperature**2 * scipy.stats.entropy(p, q, axis=1).mean(), rtol=1e-5)
    assert np.allclose(logits.grad.numpy(), temperature * (q - p) / 6, atol=1e-6)


def schedule(*flags):
    """Arguments of a training script for CIFAR-100 with the paper's recipe and these flags."""
    parser = runs.Parser("")
    common.add_flags(parser)
    flags = ["--data", "cifar100", "--recipe", "paper", *map(str, flags)]
    return common.fill_recipe(parser.parse_args(flags))


def test_learning_rates_of_the_recipes():
    args, per_epoch = schedule(), 48

    def rate(epoch):
        return common.learning_rate(round(epoch * per_epoch), args, per_epoch)

    assert rate(0) < 0.01 and abs(rate(7.5) - 0.5) < 0.01
    assert [rate(e) for e in (15, 199, 200, 300, 400, 449)] == pytest.approx([1, 1, 0.1, 0.01, 0.001, 0.001])
    short = schedule("--epochs", 45)
    assert short.milestones == pytest.approx([20, 30, 40]) and short.warmup == 1.5
    tiny = schedule("--data", "tiny-imagenet")
    assert (tiny.epochs, tiny.lr, tiny.milestones) == (200, 0.1, [75, 135])
    args = schedule("--recipe", "short")
    assert rate(5) == 0.4 and common.learning_rate(80 * per_epoch - 1, args, per_epoch) < 1e-4


def test_an_epoch_drops_its_last_batch_and_a_small_dataset_is_one_batch():
    data = random_data(100)
    assert common.total_steps(schedule("--batch-size", 30, "--epochs", 20), data) == (3, 60)
    assert common.total_steps(schedule("--batch-size", 30, "--epochs", 20, "--stop-epoch", 2), data) == (3, 6)
    assert common.total_steps(schedule("--batch-size", 1000, "--epochs", 20), data) == (1, 20)


# ---------------------------------------------------------------- bad flags and data


def bad_arrays(folder):
    """Files in `folder` that are no datasets."""
    arrays = write_arrays(folder / "good.npz")
    np.savez(folder / "float.npz", **dict(arrays, x_train=arrays["x_train"] / 255))
    np.savez(folder / "short.npz", **dict(arrays, y_train=arrays["y_train"][:-1]))
    np.savez(folder / "keys.npz", x_train=arrays["x_train"])
    np.savez(folder / "one.npz", **dict(arrays, y_train=arrays["y_train"] * 0, y_test=arrays["y_test"] * 0))
    np.savez(folder / "sides.npz", **dict(arrays, x_test=arrays["x_test"][:, :8, :8]))
    np.save(folder / "array.npy", arrays["x_train"])
    (folder / "torn.npz").write_bytes((folder / "good.npz").read_bytes()[:500])
    (folder / "file").write_text("")
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.txt").write_text("dear")


NO_FOLDERS = ("/proc/x", "/dev/null/x", "file")
BAD_FLAGS = [
    (["--arch", "resnet9"], "unknown --arch", "resnet20"),
    (["--arch", "torchvision:resnet19", "--width", "1"], "unknown --arch", "resnet18"),
    (["--arch", "torchvision:resnet18", "--width", "1"], "takes 3 channels"),
    (["--arch", "torchvision:resnet18"], "--width"),
    (["--arch", "torchvision:alexnet", "--data", "npz:good.npz", "--subset", "0", "--width", "1"], "does not fit"),
    (["--data", "imagenet"], "unknown --data", "npz:PATH"),
    (["--data", "npz:"], "unknown --data", "npz:PATH"),
    (["--data", "digits:x"], "unknown --data", "npz:PATH"),
    (["--data", "npz:absent.npz"], "absent.npz", "does not exist"),
    (["--data", "npz:float.npz"], "float64", "uint8"),
    (["--data", "npz:short.npz"], "y_train", "60"),
    (["--data", "npz:keys.npz"], "lacks", "y_train"),
    (["--data", "npz:torn.npz"], "torn.npz", "cannot be read"),
    (["--data", "npz:one.npz"], "at least 2 classes"),
    (["--data", "npz:sides.npz"], "[16, 16, 3]", "[8, 8, 3]"),
    (["--data", "npz:array.npy"], "single array"),
    (["--batch-size", "1"], "--batch-size", "resnet8", "at least 2"),
    (["--subset", "1"], "--subset", "resnet8", "at least 2"),
    (["--data", "folder:notes"], "notes has no pictures in train/<class>/"),
    (["--subset", "9999"], "--subset 9999", "1297"),
    (["--label-noise", "1"], "--label-noise", "[0, 1)"),
    (["--label-noise", "nan"], "--label-noise"),
    (["--epochs", "0"], "--epochs"),
    (["--stop-epoch", "9"], "beyond --epochs 2"),
    (["--lr", "fast"], "--lr", "invalid"),
    (["--recipe", "slow"], "--recipe", "quick"),
    (["--epoch", "2"], "unrecognized arguments"),
    (["--warmup", "7"], "--warmup 7"),
    (["--seeds", "1", "1"], "twice"),
    (["--schedule", "step"], "--milestones"),
    (["--milestones", "1"], "--schedule step"),
    (["--recipe", "paper", "--schedule", "cosine", "--milestones", "1"], "--schedule step"),
    (["--image-size", "16"], "folder:PATH"),
    (["--out", "file/run"], "file/run"),
    (["--out", "/proc/run"], "/proc/run", "writable"),
    (["--out", "/dev/null/x"], "/dev/null/x"),
    (["--out", "notes"], "not empty", "--out"),
    *((["--data", name, "--data-dir", place], place) for name in ("cifar10", "tiny-imagenet") for place in NO_FOLDERS),
]


def test_bad_flags_and_data_get_one_line(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bad_arrays(tmp_path)
    for flags, *words in BAD_FLAGS:
        line = refused(train_teacher, *TINY, "--out", "never", *flags)
        assert all(word in line for word in words), line
    if not torch.cuda.is_available():
        assert "no CUDA device" in refused(train_teacher, *TINY, "--out", "never", "--device", "cuda")
    assert not Path("never").exists() and Path("notes/thesis.txt").read_text() == "dear"
    assert not Path("file").read_text()


def test_a_bad_flag_is_one_line_for_a_user_too(tmp_path):
    one_line_error(run_cli("train_teacher.py", *TINY, "--lr", "fast", cwd=tmp_path), "--lr", "train_teacher.py --help")
    one_line_error(run_cli("train_teacher.py", *TINY, "--data", "npz:absent.npz", cwd=tmp_path), "does not exist")
    assert not os.listdir(tmp_path)


def test_damaged_facts_of_prepared_pictures_are_refused(tmp_path):
    root = write_pictures(tmp_path / "images")
    common.load_data(f"folder:{root}")
    (facts,) = tmp_path.glob("images-*/facts.json")
    for content in ("[1]", "{}", '{"sha256": 1, "mean": [0, 0, 0], "std": [1, 1, 1]}', '{"sha256"'):
        facts.write_text(content)
        with pytest.raises(runs.InputError, match="images-12px-"):
            common.load_data(f"folder:{root}")


# ---------------------------------------------------------------- random flags

SCRIPTS = (
    *(train_teacher, train_student, switch_distill, analyze_deviation, eigenspace, denoise_gradients, glue_distill),
    benchmark,
)
HEAVY = {
    engine: ("train_images",),
    analyze_deviation: ("measure",),
    benchmark: ("measure",),
    eigenspace: ("results_of",),
    denoise_gradients: ("measure_seed",),
    glue_distill: ("train_seed", "hub"),
}
NOT_NUMBERS = ("", "x", "1.5.2", "nan", "-inf", "1e400", "9" * 400, "9" * 5000, "1;2", "½", "0x10")
WORDS = (
    *("", " ", "-", "{seed}", "{", "%s", "π/\u2028", "\udcff", "a\nb", "a" * 300, "x" * 5000, "run", "kd", "./run/"),
    *("file", "file/x", "loop", "empty", ".", "/dev/null/x", "/proc/x", "npz:", "npz:good.npz", "npz:file", "npz:."),
    *("folder:", "folder:empty", "folder:good.npz", "folder:file", "folder:loop", "csv:file", "npz:loop", "t.npy"),
    *("csv:", "csv:absent", "good.npz:y_train", "run/logits.npz:test_logits", "1x48", "1x7", "sentiment", "tiny"),
    *(
        "no/such/model",
        "no-such-model",
        "cifar10",
        "digits",
        "torchvision:resnet18",
        "torchvision:",
        "resnet²",
        "mlp",
        "0x16",
        "9" * 50 + "x16",
    ),
    *("0", "-0.0", "1", "0.5", "3", "64", str(2**63 - 1), "1e-320", "1e37", "auto", "on", "0/2", "1/1"),
)
REQUIRED = dict(
    train_student=["--teacher", "run", *TINY],
    train_teacher=TINY,
    switch_distill=TINY,
    denoise_gradients=TINY,
    analyze_deviation=["--teacher", "run", "--student", "kd"],
)


def actions_of(module):
    """The flags of a script, as its own parser defines them."""
    kept = []

    def capture(parser, argv=None):
        kept.extend(parser._actions)
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Parser, "parse_args", capture)
        with pytest.raises(Reached):
            module.main([])
    return [action for action in kept if action.dest != "help"]


@contextlib.contextmanager
def light_scripts(folder, tiny_runs):
    """In `folder`, with a few good and odd files, where a script stops with `Reached` instead of working long."""
    copy_run(tiny_runs / "runs" / "teacher-s0", folder / "run")
    copy_run(tiny_runs / "runs" / "kd-s0", folder / "kd")
    write_arrays(folder / "good.npz")
    np.save(folder / "t.npy", np.random.default_rng(0).normal(size=(60, 4)))
    (folder / "file").write_text("mine")
    (folder / "loop").symlink_to("loop")
    (folder / "empty").mkdir()
    build, sentiment = common.build_model, glue_distill.sentiment
    tokenizer = glue_distill.byte_level_bpe(sentiment(50, "train", 0).first, 400)

    def reached(*args, **more):
        raise Reached

    def build_small(arch, classes, image, width=1.0, *seed):
        return build(arch, classes, image, width if arch.startswith("torchvision:") else min(width, 0.25), *seed)

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        for module, names in HEAVY.items():
            for name in names:
                patch.setattr(module, name, reached)
        patch.setattr(engine, "run_jobs", lambda args: reached() if args.jobs > 1 else None)
        digits = common.DATASETS["digits"]
        patch.setitem(common.DATASETS, "digits", digits._replace(load=functools.cache(digits.load)))
        for name in ("cifar10", "cifar100", "tiny-imagenet"):
            patch.setitem(common.DATASETS, name, common.DATASETS[name]._replace(load=reached))
        patch.setattr(common, "build_model", build_small)
        patch.setattr(glue_distill, "sentiment", lambda n, part, seed: sentiment(n // 40, part, seed))
        patch.setattr(glue_distill, "byte_level_bpe", lambda texts, size: tokenizer)
        yield


def files_but_locks(folder):
    """Content of all files but locks, which a reader of data may leave."""
    return {path: content for path, content in files_below(folder).items() if path.suffix != ".lock"}


def discard_what_started(folder, before):
    """Remove what commands that reached training began: config.json in folders that were not there."""
    for path in set(files_but_locks(folder)) - set(before):
        assert path.name == "config.json", path
        path.unlink()


def restore(folder, before, may_have_changed):
    """Files are those of `before`, but for the config.json of new runs; changed ones are put back where allowed."""
    discard_what_started(folder, before)
    if may_have_changed:
        for path, content in before.items():
            if not path.exists() or path.read_bytes() != content:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
    assert files_but_locks(folder) == before


@pytest.mark.parametrize("module", SCRIPTS)
def test_fuzz_every_flag_takes_its_kind_of_value_alone(module, tiny_runs, tmp_path):
    draw = random.Random(module.__name__)
    with light_scripts(tmp_path, tiny_runs):
        before, required = files_but_locks(tmp_path), REQUIRED.get(module.__name__, [])
        for action in actions_of(module):
            flag = action.option_strings[0]
            if action.nargs == 0:
                assert flag in refused(module, *required, f"{flag}=1")
                continue
            if action.type or action.choices:  # a number, or one of a few words
                bad = NOT_NUMBERS if SOAK else draw.sample(NOT_NUMBERS, 4)
                for value in bad if action.type else (*bad, "π", "\udcff"):
                    assert flag in refused(module, *required, f"{flag}={value}"), (flag, value)
            for value in WORDS if SOAK else draw.sample(WORDS, 6):
                outcome(module, *required, f"{flag}={value}")
            if action.nargs is None:
                assert flag in refused(module, *required, flag)  # without its value
        restore(tmp_path, before, may_have_changed=False)


def number_text():
    odd = (0, 1, 2, 3, 10, 64, 0.5, 1e-320, 2**63 - 1, 2**63)
    return st.one_of(st.integers(), st.floats(), st.sampled_from(odd)).map(str)


@st.composite
def command_lines(draw, actions):
    """Up to six flags of a script with values of their kind or odd ones."""
    characters = st.characters(exclude_characters="\0/", exclude_categories=("Cs",))
    text = st.text(characters, max_size=12).filter(lambda word: word != "..") | st.sampled_from(WORDS)
    argv = []
    for action in draw(st.lists(st.sampled_from(actions), max_size=6)):
        values = text
        if action.type:
            values = number_text()
        elif action.choices:
            values = st.sampled_from(action.choices)
        if action.nargs == 0:
            argv.append(action.option_strings[0])
        elif action.nargs in ("+", "*"):
            argv += [action.option_strings[0], *draw(st.lists(values, max_size=3))]
        else:
            argv.append(f"{action.option_strings[0]}={draw(values)}")
    return argv


@pytest.mark.parametrize("module", SCRIPTS)
def test_fuzz_flags_that_meet_end_in_work_or_one_line(module, tiny_runs, tmp_path):
    actions = actions_of(module)
    with light_scripts(tmp_path, tiny_runs):
        before = files_but_locks(tmp_path)

        @fuzz(25)
        @given(command_lines(actions))
        def check(argv):
            what, _ = outcome(module, *REQUIRED.get(module.__name__, []), *argv)
            # Only accepted flags may discard, and only what --overwrite names.
            restore(tmp_path, before, may_have_changed=what == "accepted" and "--overwrite" in argv)

        check()


def test_names_of_odd_bytes_train(tmp_path, monkeypatch):
    """Bytes that are no UTF-8."""
    monkeypatch.chdir(tmp_path)
    write_arrays("d\udcff.npz", n=24, side=8)
    flags = [*TINY, "--subset", 0, "--data", "npz:d\udcff.npz"]
    assert "is finished already" not in finished(train_teacher, *flags, "--out", "t\udcff")
    assert "is finished already" in finished(train_teacher, *flags, "--out", "t\udcff")
    finished(train_student, *flags, "--teacher", "t\udcff", "--teacher-cache", "on")


# ---------------------------------------------------------------- damaged and malicious data


def test_fuzz_datasets_of_other_shapes_and_types_are_refused_or_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good, sides = (
        write_arrays("d.npz", n=24, side=8),
        ((8, 8, 3), (8, 8, 1), (8, 4, 3), (0, 0, 3), (1, 1, 1), (4, 4, 3)),
    )
    images = odd_arrays(*((24, *side) for side in sides), (0, 8, 8, 3), (1, 8, 8, 3), (24, 8, 8))
    labels = odd_arrays((24,), (1,), (24, 1), (23,))
    changes = st.fixed_dictionaries({}, optional=dict(x_train=images, x_test=images, y_train=labels, y_test=labels))
    flags = [*TINY, "--subset", 0, "--epochs", 1, "--data", "npz:d.npz", "--out", "t"]

    @fuzz(30)
    @given(changes, st.sets(st.sampled_from(common.ARRAYS), max_size=1))
    def check(changed, left_out):
        arrays = {**good, **changed}
        np.savez("d.npz", **{key: array for key, array in arrays.items() if key not in left_out})
        shutil.rmtree("t", ignore_errors=True)
        before = Path("d.npz").read_bytes()
        assert outcome(train_teacher, *flags)[0] in ("refused", "finished")
        assert Path("d.npz").read_bytes() == before

    check()


def damage_to_one_of(good):
    """(file, damaged content) of one of the files in `good`, which maps them to their bytes."""
    return st.sampled_from(sorted(good)).flatmap(lambda file: st.tuples(st.just(file), damage_to(good[file])))


def forget_prepared(folder):
    for name in prepared(folder):
        shutil.rmtree(folder / name)


def test_fuzz_damaged_pictures_are_refused_or_loaded(tmp_path):
    draw, good, root = np.random.default_rng(0), {}, tmp_path / "images"
    for part, name, ending in itertools.product(("train", "val"), ("a", "b"), ("png", "jpg", "bmp")):
        file = root / part / name / f"1.{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(file)
        good[file] = file.read_bytes()
    others = st.tuples(st.sampled_from(sorted(good)), st.sampled_from(sorted(good.values())))

    @fuzz(40)
    @given(damage_to_one_of(good) | others, st.sampled_from((None, 8, 32)))
    def check(damage, size):
        file, content = damage
        file.write_bytes(content)
        data = valid_or_refused(lambda: common.load_data(f"folder:{root}", image_size=size))
        assert data is None or data.x_train.shape == (6, size or 9, size or 9, 3)
        assert file.read_bytes() == content and bool(prepared(tmp_path)) == bool(data)
        file.write_bytes(good[file])
        forget_prepared(tmp_path)

    assert len(common.load_data(f"folder:{root}").x_train) == 6
    forget_prepared(tmp_path)
    check()


def test_fuzz_damaged_prepared_pictures_are_refused_or_read(tmp_path):
    root = write_pictures(tmp_path / "images")
    data = common.load_data(f"folder:{root}")
    (folder,) = tmp_path.glob("images-*")
    good = {file: file.read_bytes() for file in folder.iterdir()}

    @fuzz(25)
    @given(damage_to_one_of(good))
    def check(damage):
        file, content = damage
        file.write_bytes(content)
        got = valid_or_refused(lambda: common.load_data(f"folder:{root}"))
        assert got is None or got.x_train.shape == data.x_train.shape
        assert file.read_bytes() == content
        file.write_bytes(good[file])

    check()


def test_fuzz_damaged_cifar_pickles_are_refused(tmp_path, monkeypatch):
    dataset = cifar_class("cifar10")
    fake_cifar(tmp_path, dataset, monkeypatch)
    good = {file: file.read_bytes() for file in (tmp_path / dataset.base_folder).iterdir()}

    @fuzz(10)
    @given(damage_to_one_of(good))
    def check(damage):
        file, content = damage
        file.write_bytes(content)
        data = valid_or_refused(lambda: common.load_data("cifar10", tmp_path))
        assert (data is None) == (content != good[file]) and file.read_bytes() == content
        file.write_bytes(good[file])

    check()


def test_fuzz_a_damaged_zip_of_tiny_imagenet_is_refused_or_read(tmp_path):
    fake_tiny_imagenet(tmp_path / "source" / "tiny-imagenet-200")
    (tmp_path / "data").mkdir()
    archive = zipped(tmp_path / "source", tmp_path / "data" / "tiny-imagenet-200.zip")
    good, expected = archive.read_bytes(), common.load_data("tiny-imagenet", tmp_path / "data")
    numbers = (len(expected.x_train), len(expected.x_test))

    @fuzz(25)
    @given(damage_to(good))
    def check(content):
        forget_prepared(tmp_path / "data")
        archive.write_bytes(content)
        data = valid_or_refused(lambda: common.load_data("tiny-imagenet", tmp_path / "data"))
        # A directory has no checksum: a name in it that ends otherwise hides a picture, which the counts show.
        whole = data is None or (len(data.x_train), len(data.x_test)) == numbers
        assert not whole or data is None or data.facts["sha256"] == expected.facts["sha256"]
        assert archive.read_bytes() == content

    check()


def test_malicious_arrays_and_pickles_of_cifar_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = np.array([Malicious()] * 60, dtype=object)
    np.save("objects.npy", evil, allow_pickle=True)
    Path("plain.npy").write_bytes(pickle.dumps(Malicious()))
    shutil.copy("plain.npy", "plain.npz")
    np.savez("objects.npz", **{name: evil for name in common.ARRAYS})
    for file in ("objects.npy", "plain.npy", "plain.npz", "objects.npz"):
        assert file in refused(train_teacher, *TINY, "--data", f"npz:{file}")
    dataset = cifar_class("cifar10")
    fake_cifar(tmp_path, dataset, monkeypatch)
    for file in sorted((tmp_path / dataset.base_folder).iterdir()):  # batches and the list of classes
        good = file.read_bytes()
        file.write_bytes(pickle.dumps(Malicious()))
        assert "it is damaged" in refused(train_teacher, *TINY, "--data", "cifar10", "--data-dir", ".")
        file.write_bytes(good)
    assert not Path("ran").exists()


def test_config_of_a_run_names_the_classes(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_pictures(Path("images"))
    finished(train_teacher, *TINY, "--subset", 0, "--epochs", 1, "--data", "folder:images", "--out", "t")
    assert json.loads(Path("t/config.json").read_text())["data"]["class_names"] == ["cat", "dog"]
