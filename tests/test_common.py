"""Data, views, datasets, models, losses, learning rates and flags: what common.py promises, and what it refuses.

Here are also the tests of all scripts' flags and folders, and of malicious files for all readers.
"""

import dataclasses
import functools
import hashlib
import importlib
import itertools
import pickle
import random
import shutil
from argparse import Namespace
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import common
import denoise_gradients
import runs
import train_student
import train_teacher

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
    fuzz,
    odd_arrays,
    outcome,
    refused,
    valid_or_refused,
    write_arrays,
)
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torchvision import datasets
from torchvision.datasets import cifar, utils

# ---------------------------------------------------------------- models


PARAMETERS = dict(resnet8=75_290, resnet20=269_722, resnet32=464_154, resnet44=658_586, resnet56=853_018)
PARAMETERS.update(resnet110=1_727_962, mobilenetv2=2_296_922)


@pytest.mark.parametrize("arch", PARAMETERS)
def test_parameter_counts_are_the_published_ones(arch):
    # He et al. 2016, table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M for option A; MobileNet-v2 on CIFAR-10: 2.30M.
    model = common.build_model(arch, 10, (32, 32, 3))
    assert sum(p.numel() for p in model.parameters()) == PARAMETERS[arch]


def test_blocks_add_what_comes_in_subsampled_and_padded_with_zero_channels():
    x = torch.randn(2, 4, 8, 8)
    block = common.BasicBlock(4, 8, 2).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # what is left is the shortcut
    assert torch.equal(block(x), torch.nn.functional.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 2, 2)).relu())
    block = common.InvertedResidual(4, 4, 6, 1).eval()
    torch.nn.init.zeros_(block.layers[-1].weight)
    assert torch.equal(block(x), x)
    for arch, shape in (("resnet8", (64, 8, 8)), ("mobilenetv2", (1280, 4, 4))):
        assert common.build_model(arch, 10, (32, 32, 3)).features(torch.zeros(2, 3, 32, 32)).shape[1:] == shape


BUILT = [*itertools.product(("resnet14", "mobilenetv2", "mlp", "cnn"), ((8, 8, 1), (32, 32, 3)))]
BUILT += [("torchvision:resnet18", (32, 32, 3)), ("torchvision:shufflenet_v2_x0_5", (64, 64, 3))]


@pytest.mark.parametrize("arch, image", BUILT)
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


@pytest.mark.parametrize("side, channels, pad, flip", [(32, 3, 4, True), (8, 1, 1, False)])
def test_every_view_equals_a_plain_per_image_crop_and_flip(side, channels, pad, flip):
    import torchvision.transforms.v2.functional as T

    data = random_data(3, side, channels, pad, flip)
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
    for share, data in ((0.3, noisy), (0.6, more)):
        found = (data.y_train != data.y_clean).double().mean()
        assert abs(found - share) < 3 * (share * (1 - share) / 1297) ** 0.5
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
    images, labels = denoise_gradients.some_test_images(data, 100)
    assert images.shape == (100, 8, 8, 1) and (labels.bincount() >= 9).all()
    every = denoise_gradients.some_test_images(data, 2000)
    assert torch.equal(every[0], data.x_test) and torch.equal(every[1], data.y_test)


def test_subsets_are_class_balanced_nested_and_normalised_like_the_full_training_set():
    full, small, large = (common.load_data("digits", subset=n) for n in (0, 205, 400))
    counts = torch.bincount(small.y_clean, minlength=10)
    assert len(small.y_train) == 205 and counts.max() - counts.min() == 1
    assert set(small.index.tolist()) < set(large.index.tolist())
    x = full.normalise(full.x_train).double()
    assert abs(x.mean()) < 1e-5 and abs(x.std() - 1) < 1e-4
    assert torch.equal(full.mean, small.mean) and torch.equal(full.std, small.std)


# ---------------------------------------------------------------- arrays and their labels


def save_arrays(path, labels, test_labels, **more):
    """A random npz of these labels."""
    rng = np.random.default_rng(2)
    x_train, x_test = (rng.integers(0, 256, (len(y), 8, 8, 3), dtype=np.uint8) for y in (labels, test_labels))
    np.savez(path, **dict(dict(x_train=x_train, y_train=labels, x_test=x_test, y_test=test_labels), **more))
    return f"npz:{path}"


@pytest.mark.parametrize("labels", [[1, 2, 3], [0, 5, 10**10], [2, 1, 3]])
def test_labels_with_gaps_or_an_offset_are_numbered_and_that_is_said(labels, tmp_path, capsys):
    name = save_arrays(tmp_path / "d.npz", np.array(labels * 4), np.array(labels[::-1] * 2))
    data = common.load_data(name)
    plain = sorted(labels)
    assert data.classes == 3 and data.facts["class_names"] == [str(label) for label in plain]
    assert data.y_train.tolist() == [plain.index(label) for label in labels * 4]
    assert data.y_test.tolist() == [plain.index(label) for label in labels[::-1] * 2]
    assert f"the 3 labels within {plain[0]}..{plain[-1]} are numbered 0..2" in capsys.readouterr().out


def test_plain_labels_are_left_alone_and_wrong_ones_refused(tmp_path, capsys):
    y = np.arange(12) % 3
    data = common.load_data(save_arrays(tmp_path / "d.npz", y, np.arange(6) % 2))
    assert data.classes == 3 and data.facts["class_names"] == ["0", "1", "2"] and not capsys.readouterr().out
    unlabelled = np.where(np.arange(12) < 2, -1, y)  # a mark of images without a label, and no class
    for labels, message in [
        ((y, np.array([0, 7, 2, 9])), r"test labels \[7, 9\] are in no training image"),
        ((unlabelled, y), "2 labels of y_train are negative"),
        ((y, unlabelled), "2 labels of y_test are negative"),
    ]:
        with pytest.raises(runs.InputError, match=message):
            common.load_data(save_arrays(tmp_path / "d.npz", *labels))


def test_grey_images_need_no_axis_for_their_channel(tmp_path):
    arrays = write_arrays(tmp_path / "with.npz", channels=1)
    flat = {key: array[..., 0] if key.startswith("x") else array for key, array in arrays.items()}
    np.savez(tmp_path / "without.npz", **flat)
    with_axis, without = (common.load_data(f"npz:{tmp_path / name}.npz") for name in ("with", "without"))
    assert torch.equal(without.x_train, with_axis.x_train) and torch.equal(without.x_test, with_axis.x_test)
    assert without.facts["image"] == [16, 16, 1] and without.facts["sha256"] == with_axis.facts["sha256"]


def test_an_npz_may_name_its_classes(tmp_path):
    y = np.array([3, 5, 9] * 4)
    names = ["cat", "dog", "emu"]
    data = common.load_data(save_arrays(tmp_path / "d.npz", y, y, class_names=names))
    assert data.facts["class_names"] == names and data.y_train.tolist() == [0, 1, 2] * 4
    for bad, message in [
        (names[:2], r"class_names is <U3 \[2\]; it must be words \[3\]"),
        ("cat", r"class_names is <U3 \[\]; it must be words"),
        ([names] * 3, r"class_names is <U3 \[3, 3\]"),
        ([0.5, 1.0, 2.0], "class_names is float64"),
    ]:
        with pytest.raises(runs.InputError, match=message):
            common.load_data(save_arrays(tmp_path / "d.npz", y, y, class_names=bad))


def test_mean_and_deviation_are_of_each_channel_and_every_byte_is_in_the_hash(tmp_path):
    arrays = write_arrays(tmp_path / "d.npz", n=1100, side=4)  # more images than one part
    seen = set()
    arrays["x_train"][..., 1] //= 2
    for key in (None, *common.ARRAYS):
        if key:
            arrays[key].reshape(-1)[-1] ^= 1
        np.savez(tmp_path / "d.npz", **arrays)
        data = common.load_data(f"npz:{tmp_path / 'd.npz'}")
        plain = arrays["x_train"] / 255
        np.testing.assert_allclose(data.mean, plain.mean((0, 1, 2)), rtol=1e-5)
        np.testing.assert_allclose(data.std, plain.std((0, 1, 2)), rtol=1e-5)
        seen.add(data.facts["sha256"])
    assert len(seen) == 5


# ---------------------------------------------------------------- CIFAR and Tiny-ImageNet


def fake_cifar(root, dataset, monkeypatch):
    """Write the original python pickles with random images, and teach torchvision their checksums."""
    rng = np.random.default_rng(2)
    written = {}
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


@pytest.mark.parametrize("dataset", [datasets.CIFAR10, datasets.CIFAR100])
def test_cifar_loads_from_the_original_folder_or_a_prepared_npz(dataset, tmp_path, monkeypatch):
    name = dataset.__name__.lower()
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


def test_cifar_downloads_once_through_torchvision(tmp_path, monkeypatch):
    dataset = datasets.CIFAR10
    calls = []
    fake_cifar(tmp_path / "source", dataset, monkeypatch)

    def download(url, root, **checks):
        calls.append((url, checks["md5"]))
        shutil.copytree(tmp_path / "source", root, dirs_exist_ok=True)

    monkeypatch.setattr(cifar, "download_and_extract_archive", download)
    with ThreadPoolExecutor(3) as pool:  # a lock of a file keeps threads apart as it does processes
        found = list(pool.map(lambda _: common.load_data("cifar10", tmp_path / "data"), range(3)))
    assert [len(data.x_train) for data in found] == [60] * 3 and calls == [(dataset.url, dataset.tgz_md5)]
    monkeypatch.setattr(cifar, "download_and_extract_archive", None)
    with pytest.raises(runs.InputError, match="cifar10 cannot be read .*put cifar10.npz or the folder"):
        common.load_data("cifar10", tmp_path / "empty")


def fake_tiny_imagenet(root):
    rng = np.random.default_rng(3)
    names = ["n01443537", "n01629819"]

    def image(path, mode="RGB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).convert(mode).save(path)

    for name, k in itertools.product(names, range(3)):
        image(root / "train" / name / "images" / f"{k}.JPEG", "L" if k == 2 else "RGB")
    for k in range(4):
        image(root / "val" / "images" / f"val_{k}.JPEG")
    lines = [f"val_{k}.JPEG\t{names[k % 2]}\t0\t0\t62\t62\n" for k in range(4)]
    (root / "val" / "val_annotations.txt").write_text("".join(lines))


@pytest.mark.parametrize("layout", ["folder", "download"])
def test_tiny_imagenet_is_decoded_once_into_an_npz(layout, tmp_path, monkeypatch):
    folder = tmp_path / "data" / "tiny-imagenet-200"
    calls = []

    def download(url, root, unpacked, md5, **more):
        calls.append((url, md5))
        fake_tiny_imagenet(Path(unpacked) / folder.name)

    if layout == "folder":
        fake_tiny_imagenet(folder)
    monkeypatch.setattr(utils, "download_and_extract_archive", download)
    read = common.picture_array
    decoded = []
    monkeypatch.setattr(common, "picture_array", lambda *args: decoded.append(1) or read(*args))
    with ThreadPoolExecutor(3) as pool:
        data, *others = pool.map(lambda _: common.load_data("tiny-imagenet", folder.parent), range(3))
    assert len(decoded) == 1 and all(other.facts == data.facts for other in others)
    assert data.y_train.tolist() == [0, 0, 0, 1, 1, 1] and data.y_test.tolist() == [0, 1, 0, 1]
    assert data.facts["class_names"] == ["n01443537", "n01629819"]
    train, test = (Image.open(folder / file) for file in ("train/n01629819/images/1.JPEG", "val/images/val_2.JPEG"))
    assert np.array_equal(data.x_train[4], train) and np.array_equal(data.x_test[2], test)
    monkeypatch.setattr(common, "open_picture", None)  # from here on nothing can be decoded
    again = common.load_data("tiny-imagenet", folder.parent)
    assert again.facts == data.facts and torch.equal(again.x_train, data.x_train)
    assert len(calls) == (layout == "download")


def test_tiny_imagenet_with_val_sorted_into_class_folders(tmp_path):
    """Many copies are, for other programs; the table of classes is still there."""
    root = tmp_path / "tiny-imagenet-200"
    fake_tiny_imagenet(root)
    published = common.folder_arrays(root, tmp_path, 64)
    for line in (root / "val" / "val_annotations.txt").read_text().splitlines():
        name, label = line.split()[:2]
        (root / "val" / label).mkdir(exist_ok=True)
        (root / "val" / "images" / name).rename(root / "val" / label / name)
    (root / "val" / "images").rmdir()
    sorted_out = common.folder_arrays(root, tmp_path, 64)
    assert sorted_out["y_test"].tolist() == [0, 0, 1, 1]
    assert np.array_equal(sorted_out["x_test"], published["x_test"][[0, 2, 1, 3]])


def test_data_is_read_where_nothing_can_be_written_or_locked(tmp_path, monkeypatch):
    """Shared datasets often lie where a user cannot write."""
    fake_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    fake_tiny_imagenet(tmp_path / "tiny-imagenet-200")
    first = [common.load_data(name, tmp_path).facts for name in ("cifar10", "tiny-imagenet")]
    (tmp_path / "tiny-imagenet.npz").unlink()  # what is decoded is kept in it

    def read_only(path, *args, **more):
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("write_atomic", "FileLock"):
        monkeypatch.setattr(runs, name, read_only)
    assert [common.load_data(name, tmp_path).facts for name in ("cifar10", "tiny-imagenet")] == first
    assert not (tmp_path / "tiny-imagenet.npz").exists()


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


def test_folders_of_pictures_load_and_can_be_resized(tmp_path, capsys):
    # "cat-2" comes before "cat" among strings that hold the slash, and after it among names, as in ImageFolder.
    root = write_pictures(tmp_path / "images", ("cat", "cat-2", "dog"), size=(20, 24))
    data = common.load_data(f"folder:{root}", image_size=16)
    assert data.x_train.shape == (12, 16, 16, 3) and data.y_test.tolist() == [0, 0, 1, 1, 2, 2]
    assert data.facts["class_names"] == ["cat", "cat-2", "dog"]
    assert data.y_train.tolist() == datasets.ImageFolder(root / "train").targets
    assert f"{root}: 18 pictures are not square" in capsys.readouterr().out
    with Image.open(root / "train" / "dog" / "0.png") as picture:  # the short side, and the centre
        expected = np.array(picture.resize((19, 16), Image.Resampling.BILINEAR).crop((2, 0, 18, 16)))
    assert np.array_equal(data.x_train[8].numpy(), expected)
    with pytest.raises(runs.InputError, match="18 pictures cannot be used: .*0.png is 24×20, .*give --image-size"):
        common.load_data(f"folder:{root}")


def test_pictures_are_turned_as_their_tag_says(tmp_path):
    root = write_pictures(tmp_path / "images")
    path = root / "train" / "cat" / "0.png"
    pixels = np.array(Image.open(path))
    tag = Image.Exif()
    tag[0x0112] = 6  # the top of the scene is at the right: to be turned by 90° clockwise
    Image.fromarray(pixels).save(path, exif=tag)
    assert np.array_equal(common.load_data(f"folder:{root}").x_train[0].numpy(), np.rot90(pixels, -1))


def test_pictures_that_cannot_be_used_are_named_together_before_any_training(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    root = write_pictures(Path("images"), counts=dict(train=4, val=9))
    broken = [root / "val" / name / f"{k}.png" for name, k in itertools.product(("cat", "dog"), range(1, 7))]
    for path in broken:
        path.write_bytes(path.read_bytes()[:-200])
    command = [*TINY, "--subset", 0, "--data", "folder:images", "--out", "t"]
    line = refused(train_teacher, *command)
    assert "12 pictures cannot be used" in line and line.endswith("; and 2 more") and "replace or remove" in line
    assert [path for path in broken if str(path) in line] == broken[:10]
    for path in broken:
        path.unlink()
    (root / "train" / "cat" / "0.png").write_bytes(b"no picture")  # the one that would give the size
    # PIL would recognise EPS by its content and start Ghostscript to decode it.
    Image.fromarray(np.zeros((12, 12, 3), np.uint8)).save("image.eps")
    shutil.copy("image.eps", root / "train" / "cat" / "1.png")
    Image.fromarray(np.ones((12, 12), np.float32)).save(root / "val" / "dog" / "depth.tiff")
    line = refused(train_teacher, *command)
    assert "3 pictures cannot be used" in line and "val/dog/depth.tiff has float pixels" in line
    for name in ("0.png", "1.png"):
        assert f"train/cat/{name} cannot be read (cannot identify image file" in line
    assert not Path("t").exists()


def test_pictures_of_every_mode_become_rgb_of_8_bits(tmp_path):
    root = write_pictures(tmp_path / "images")
    levels = np.random.RandomState(0).randint(0, 256, (12, 12)).astype(np.uint8)
    for ending in ("png", "tiff"):
        path = root / "train" / "dog" / f"deep.{ending}"
        Image.fromarray(levels.astype(np.uint16) * 257).save(path)
        deep = common.load_data(f"folder:{root}").x_train[-1].numpy()
        assert np.array_equal(deep, np.stack([levels] * 3, 2)), ending
    fine = np.array([0, 128, 129, 385, 386, 65_406, 65_407, 65_535], np.uint16)
    Image.fromarray(np.resize(fine, (12, 12))).save(path)
    deep = common.load_data(f"folder:{root}").x_train[-1, ..., 0].numpy()
    assert np.array_equal(deep, np.resize([0, 0, 1, 1, 2, 254, 255, 255], (12, 12)))  # to the nearest of v/257
    for mode in ("L", "P", "RGBA", "1", "LA"):
        write_picture(root / "train" / "dog" / f"mode {mode}.png", 5, mode=mode)
    assert common.load_data(f"folder:{root}").x_train.shape == (15, 12, 12, 3)


def test_val_is_the_test_split_before_test_and_that_is_said(tmp_path, capsys):
    root = write_pictures(tmp_path / "images")
    val = common.load_data(f"folder:{root}")
    assert not capsys.readouterr().out
    write_pictures(root, counts=dict(test=3))
    both = common.load_data(f"folder:{root}")
    assert "val/ is the test split, test/ is not used" in capsys.readouterr().out and both.facts == val.facts
    shutil.rmtree(root / "val")
    assert len(common.load_data(f"folder:{root}").x_test) == 6 and not capsys.readouterr().out
    shutil.rmtree(root / "test" / "dog")
    assert common.load_data(f"folder:{root}").y_test.tolist() == [0] * 3
    assert "has no test picture of dog (1 classes)" in capsys.readouterr().out


def test_folders_that_are_no_datasets_are_refused(tmp_path):
    root = write_pictures(tmp_path / "images")
    write_picture(root / "val" / "cow" / "0.png")
    with pytest.raises(runs.InputError, match="has test pictures of cow: train/ has no such class"):
        common.load_data(f"folder:{root}")
    for split, absent in (("val", "test"), ("train", "train")):
        shutil.rmtree(root / split)
        with pytest.raises(runs.InputError, match=f"images/{absent} does not exist: give a folder with train/<class>/"):
            common.load_data(f"folder:{root}")
    root = write_pictures(tmp_path / "other")
    (root / "train" / "cow").mkdir()
    with pytest.raises(runs.InputError, match="other cannot be read .*no valid file for the classes cow"):
        common.load_data(f"folder:{root}")
    (root / "train" / "cow").rmdir()
    write_picture(root / "train" / ".ipynb_checkpoints" / "0.png")
    with pytest.raises(runs.InputError, match=".ipynb_checkpoints is no class of pictures: remove that folder"):
        common.load_data(f"folder:{root}")
    write_pictures(tmp_path / "single", ("cat",))
    with pytest.raises(runs.InputError, match="at least 2 classes"):
        common.load_data(f"folder:{tmp_path / 'single'}")


# ---------------------------------------------------------------- losses and learning rates


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


def test_student_loss_is_the_weighted_sum_and_one_hot_loss_its_first_term():
    rng = torch.Generator().manual_seed(0)
    args = Namespace(temperature=3.0)
    logits, teacher = torch.randn(2, 5, 10, generator=rng)
    labels = torch.arange(5)
    model = torch.nn.Identity()
    ce = -torch.log_softmax(logits.double(), 1)[torch.arange(5), labels].mean()
    kd = common.kd_loss(logits.double(), teacher.double(), 3.0)
    for ce_weight, kd_weight in ((0.2, 0.7), (torch.tensor(1.0), torch.tensor(0.0))):
        loss, returned = common.student_loss(model, logits, labels, teacher, ce_weight, kd_weight, args)
        assert torch.isclose(loss.double(), ce_weight * ce + kd_weight * kd) and torch.equal(returned, logits)
    args.temperature = None  # as in the flags of a one-hot control
    for loss_fn in (common.student_loss, common.one_hot_loss):
        loss, returned = loss_fn(model, logits, labels, None, 0.2, 0.0, args)
        assert torch.isclose(loss.double(), 0.2 * ce) and torch.equal(returned, logits)


def test_the_one_hot_control_has_flags_of_its_own():
    args = Namespace(ce_weight=0.0, kd_weight=2.0, lr=0.3)
    assert vars(common.one_hot_flags(args)) == dict(ce_weight=1, kd_weight=0, lr=0.3)
    assert vars(args) == dict(ce_weight=0, kd_weight=2, lr=0.3)


def schedule(*flags):
    """Arguments of a training script for CIFAR-100 with the paper's recipe and these flags."""
    parser = runs.Parser("")
    common.add_flags(parser)
    flags = ["--data", "cifar100", "--recipe", "paper", *map(str, flags)]
    return common.fill_recipe(parser.parse_args(flags))


def test_learning_rates_of_the_recipes():
    args = schedule()
    per_epoch = 48

    def rate(epoch):
        return common.learning_rate(round(epoch * per_epoch), args, per_epoch)

    assert rate(0) < 0.01 and abs(rate(7.5) - 0.5) < 0.01
    assert [rate(e) for e in (15, 199, 200, 300, 400, 449)] == pytest.approx([1, 1, 0.1, 0.01, 0.001, 0.001])
    short = schedule("--epochs", 45)
    assert short.milestones == pytest.approx([20, 30, 40]) and short.warmup == 1.5
    tiny = schedule("--data", "tiny-imagenet")
    assert (tiny.epochs, tiny.lr, tiny.milestones) == (200, 0.1, [75, 135])
    args = schedule("--recipe", "short")
    assert rate(23.75) == pytest.approx(0.2 * (1 + np.cos(np.pi / 4)), rel=1e-3)
    assert rate(5) == 0.4 and common.learning_rate(80 * per_epoch - 1, args, per_epoch) < 1e-4


def test_an_epoch_drops_its_last_batch_and_a_small_dataset_is_one_batch():
    data = random_data(100)
    assert common.total_steps(schedule("--batch-size", 30, "--epochs", 20), data) == (3, 60)
    assert common.total_steps(schedule("--batch-size", 1000, "--epochs", 20), data) == (1, 20)
    args = schedule("--batch-size", 30, "--epochs", 20, "--snapshot-at", 0, 0.5, 1)
    assert common.snapshot_steps(args, data) == {0, 30, 60}


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
    (folder / "file").write_text("")
    (folder / "notes").mkdir()
    (folder / "notes" / "thesis.txt").write_text("dear")


NO_FOLDERS = ("/proc/x", "/dev/null/x", "file")
BAD_FLAGS = [
    (["--arch", "resnet9"], "unknown architecture", "resnet20"),
    (["--arch", "torchvision:googlenet", "--width", "1"], "unknown architecture", "resnet18"),
    (["--arch", "torchvision:resnet18", "--width", "1"], "takes 3 channels"),
    (["--arch", "torchvision:resnet18"], "--width"),
    (["--arch", "torchvision:alexnet", "--data", "npz:good.npz", "--subset", "0", "--width", "1"], "does not fit"),
    (["--data", "imagenet"], "unknown --data", "npz:PATH"),
    (["--data", "npz:absent.npz"], "absent.npz", "does not exist"),
    (["--data", "npz:float.npz"], "float64", "uint8"),
    (["--data", "npz:short.npz"], "y_train", "60"),
    (["--data", "npz:keys.npz"], "lacks", "y_train"),
    (["--data", "npz:one.npz"], "at least 2 classes"),
    (["--data", "npz:sides.npz"], "[16, 16, 3]", "[8, 8, 3]"),
    (["--data", "npz:array.npy"], "single array"),
    (["--data", "folder:notes"], "notes/train does not exist", "train/<class>/"),
    (["--subset", "9999"], "--subset 9999", "1297"),
    (["--subset", "1"], "--subset 1", "use 2 to 1297"),
    (["--batch-size", "1"], "--batch-size", "[2, "),
    (["--label-noise", "1"], "--label-noise", "[0, 1)"),
    (["--epoch", "2"], "unrecognized arguments"),
    (["--warmup", "7"], "--warmup 7"),
    (["--seeds", "1", "1"], "twice"),
    (["--schedule", "step"], "--milestones"),
    (["--milestones", "1"], "--schedule step"),
    (["--image-size", "16"], "folder:PATH"),
    (["--out", "notes"], "not empty", "--out"),
]
for name, place in itertools.product(("cifar10", "tiny-imagenet"), NO_FOLDERS):
    BAD_FLAGS.append((["--data", name, "--data-dir", place], place))


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


# ---------------------------------------------------------------- all scripts: random flags, places

SCRIPTS = "train_teacher train_student switch_distill analyze_deviation when_it_pays eigenspace".split()
SCRIPTS += "denoise_gradients glue_distill benchmark report".split()
HEAVY = {
    "engine": ("train_images", "train"),
    "deviation": ("measure",),
    "benchmark": ("measure_images",),
    "eigenspace": ("bias_variance",),
    "report": ("keep", "write_docs"),
}
NOT_NUMBERS = ("", "x", "1.5.2", "nan", "-inf", "1e400", "9" * 400, "9" * 5000, "1;2", "½", "0x10")
WORDS = ["", " ", "a\nb", "π/\u2028", "\udcff", "a" * 300, "x" * 5000, "9" * 50 + "x16", str(2**63 - 1)]
WORDS += "- {seed} { %s run kd ./run/ file file/x loop empty . /dev/null/x /proc/x npz: npz:good.npz npz:file".split()
WORDS += "npz:. npz:loop folder: folder:empty folder:good.npz folder:file csv: csv:file csv:absent t.npy".split()
WORDS += "good.npz:y_train run/logits.npz:test_logits run/checkpoint.pt 1x48 1x7 sentiment no-such-model".split()
WORDS += "cifar10 digits torchvision:resnet18 torchvision: resnet² mlp 0 -0.0 1 0.5 3 64 1e-320 1e37 auto on".split()
REQUIRED = dict(
    train_student=["--teacher", "run", *TINY],
    train_teacher=TINY,
    switch_distill=TINY,
    when_it_pays=TINY,
    denoise_gradients=TINY,
    analyze_deviation=["--teacher", "run", "--student", "kd"],
    report=["--runs", "run", "--results", "empty"],
)


def actions_of(module):
    """The flags of a script, as its own parser defines them."""
    kept = []

    def capture(parser, argv=None):
        kept.extend(parser._actions)
        assert parser.format_help()  # a stray % in a text would end it
        raise Reached

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runs.Parser, "parse_args", capture)
        with pytest.raises(Reached):
            module.main([])
    return [action for action in kept if action.dest != "help"]


@pytest.fixture(params=SCRIPTS)
def script(request, tiny_runs, tmp_path, monkeypatch):
    """A script that stops with `Reached` instead of working long; in the working folder a few good and odd files."""
    name = request.param
    copy_run(tiny_runs / "runs" / "teacher-s0", tmp_path / "run")
    copy_run(tiny_runs / "runs" / "kd-s0", tmp_path / "kd")
    write_arrays(tmp_path / "good.npz")
    np.save(tmp_path / "t.npy", np.random.default_rng(0).normal(size=(60, 4)))
    (tmp_path / "file").write_text("mine")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path)
    script = importlib.import_module(name)

    def reached(*args, **more):
        raise Reached

    for module in ("engine", "deviation", name):
        for function in HEAVY.get(module, ()):
            monkeypatch.setattr(importlib.import_module(module), function, reached)
    build = common.build_model
    digits = common.DATASETS["digits"]

    def build_small(arch, classes, image, width=1.0, *seed):
        return build(arch, classes, image, width if arch.startswith("torchvision:") else min(width, 0.25), *seed)

    monkeypatch.setattr(common, "build_model", build_small)
    monkeypatch.setitem(common.DATASETS, "digits", digits._replace(load=functools.cache(digits.load)))
    for data in ("cifar10", "cifar100", "tiny-imagenet"):
        monkeypatch.setitem(common.DATASETS, data, common.DATASETS[data]._replace(load=reached))
    if name == "glue_distill":
        sentiment = script.sentiment
        tokenizer = script.byte_level_bpe(sentiment(50, "train", 0).columns()[0], 400)
        monkeypatch.setattr(script, "sentiment", lambda n, part, seed: sentiment(n // 40, part, seed))
        monkeypatch.setattr(script, "byte_level_bpe", lambda texts, size: tokenizer)
    return script


def files_but_locks(folder):
    """Content of all files but locks, which a reader of data may leave."""
    return {path: content for path, content in files_below(folder).items() if path.suffix != ".lock"}


def restore(folder, before, may_have_changed):
    """Files are those of `before`, but for new ones of accepted commands, which are removed, and changed ones if they
    may have: they are put back.
    """
    for path in set(files_but_locks(folder)) - set(before):
        assert path.name in ("config.json", "teacher.npz", "index.html"), path
        path.unlink()
    if may_have_changed:
        for path, content in before.items():
            if not path.exists() or path.read_bytes() != content:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
    assert files_but_locks(folder) == before


def test_fuzz_every_flag_takes_its_kind_of_value_alone(script, tmp_path):
    draw = random.Random(script.__name__)
    required = REQUIRED.get(script.__name__, [])
    before = files_but_locks(tmp_path)
    for action in actions_of(script):
        flag = action.option_strings[0]
        if action.nargs == 0:
            assert flag in refused(script, *required, f"{flag}=1")
            continue
        if action.type not in (None, Path) or action.choices:  # a number, or one of a few words
            bad = NOT_NUMBERS if SOAK else draw.sample(NOT_NUMBERS, 4)
            for value in bad if action.type else (*bad, "π", "\udcff"):
                assert flag in refused(script, *required, f"{flag}={value}"), (flag, value)
        for value in WORDS if SOAK else draw.sample(WORDS, 6):
            outcome(script, *required, f"{flag}={value}")
        if action.nargs is None:
            assert flag in refused(script, *required, flag)  # without its value
    restore(tmp_path, before, may_have_changed=False)


NUMBERS = st.one_of(st.integers(), st.floats(), st.sampled_from((0, 1, 2, 3, 10, 64, 0.5, 1e-320, 2**63 - 1, 2**63)))


@st.composite
def command_lines(draw, actions):
    """Up to six flags of a script with values of their kind or odd ones."""
    characters = st.characters(exclude_characters="\0/", exclude_categories=("Cs",))
    text = st.text(characters, max_size=12).filter(lambda word: word != "..") | st.sampled_from(WORDS)
    argv = []
    for action in draw(st.lists(st.sampled_from(actions), max_size=6)):
        values = text
        if action.type not in (None, Path):
            values = NUMBERS.map(str)
        elif action.choices:
            values = st.sampled_from(action.choices)
        if action.nargs == 0:
            argv.append(action.option_strings[0])
        elif action.nargs in ("+", "*"):
            argv += [action.option_strings[0], *draw(st.lists(values, max_size=3))]
        else:
            argv.append(f"{action.option_strings[0]}={draw(values)}")
    return argv


def test_fuzz_flags_that_meet_end_in_work_or_one_line(script, tmp_path):
    actions, before = actions_of(script), files_but_locks(tmp_path)

    @fuzz(25)
    @given(command_lines(actions))
    def check(argv):
        what, _ = outcome(script, *REQUIRED.get(script.__name__, []), *argv)
        # Only accepted flags may discard, and only what --overwrite names.
        restore(tmp_path, before, may_have_changed=what == "accepted" and "--overwrite" in argv)

    check()


def test_places_that_cannot_be_written_are_one_line_before_the_work(script, tmp_path):
    """/dev/null and /proc refuse even an administrator."""
    before = files_but_locks(tmp_path)
    required = REQUIRED.get(script.__name__, [])
    flags = {action.option_strings[0] for action in actions_of(script)} & {"--out", "--results"}
    for flag, place in itertools.product(flags, ("/dev/null/x", "/proc/x", "file/x")):
        assert place in refused(script, *required, f"{flag}={place}")
    assert flags and files_but_locks(tmp_path) == before


def test_names_of_odd_bytes_train(tmp_path, monkeypatch):
    """Bytes that are no UTF-8."""
    monkeypatch.chdir(tmp_path)
    write_arrays("d\udcff.npz", n=24, side=8)
    flags = [*(word for word in TINY if word != "--quiet"), "--subset", 0, "--data", "npz:d\udcff.npz"]
    assert "is finished already" not in finished(train_teacher, *flags, "--out", "t\udcff")
    assert "is finished already" in finished(train_teacher, *flags, "--out", "t\udcff")
    finished(train_student, *flags, "--teacher", "t\udcff")


# ---------------------------------------------------------------- damaged and malicious data


def test_fuzz_datasets_of_other_shapes_and_types_are_refused_or_trained_on(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    good = write_arrays("d.npz", n=24, side=8)
    sides = ((8, 8, 3), (8, 8, 1), (8, 4, 3), (0, 0, 3), (1, 1, 1), (4, 4, 3))
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


def test_fuzz_damaged_pictures_are_refused_or_loaded(tmp_path):
    draw = np.random.default_rng(0)
    good = {}
    root = tmp_path / "images"
    for part, name, ending in itertools.product(("train", "val"), ("a", "b"), ("png", "jpg", "bmp")):
        file = root / part / name / f"1.{ending}"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(draw.integers(0, 256, (9, 9, 3), dtype=np.uint8)).save(file)
        good[file] = file.read_bytes()
    files = st.sampled_from(sorted(good))
    one_damaged = files.flatmap(lambda file: st.tuples(st.just(file), damage_to(good[file])))
    others = st.tuples(files, st.sampled_from(sorted(good.values())))

    @fuzz(40)
    @given(one_damaged | others, st.sampled_from((None, 8, 32)))
    def check(damage, size):
        file, content = damage
        file.write_bytes(content)
        data = valid_or_refused(lambda: common.load_data(f"folder:{root}", image_size=size))
        assert data is None or data.x_train.shape == (6, size or 9, size or 9, 3)
        assert file.read_bytes() == content
        file.write_bytes(good[file])

    assert len(common.load_data(f"folder:{root}").x_train) == 6
    check()


def test_malicious_files_never_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    evil = np.array([Malicious()] * 60, dtype=object)
    np.save("objects.npy", evil, allow_pickle=True)
    np.savez("objects.npz", **{name: evil for name in common.ARRAYS})
    for file in ("plain.npy", "plain.npz", "plain.pt"):
        Path(file).write_bytes(pickle.dumps(dict(model=Malicious())))
    state = common.build_model("resnet8", 10, [8, 8, 1]).state_dict()
    state["fc.bias"] = Malicious()
    torch.save(Malicious(), "whole.pt")
    torch.save(dict(model=state), "hidden.pt")
    torch.save(dict(model=state), "legacy.pt", _use_new_zipfile_serialization=False)
    readers = [(runs.read_npz, "objects.npz"), (runs.read_npz, "plain.npz")]
    readers += [(runs.read_array, file) for file in ("objects.npy", "objects.npz:x_train", "plain.npy", "plain.npz")]
    for file in ("plain.pt", "whole.pt", "hidden.pt", "legacy.pt"):
        readers += [(runs.read_array, file), (runs.load_checkpoint, file)]
        weights = ["--teacher", file, "--teacher-arch", "resnet8", "--out", "never"]
        assert f"{file} cannot be read" in refused(train_student, *TINY, *weights)
    for read, file in readers:
        with pytest.raises(runs.InputError, match=f"{file.partition(':')[0]} cannot be read"):
            read(file)
    fake_cifar(tmp_path, datasets.CIFAR10, monkeypatch)
    for file in sorted((tmp_path / datasets.CIFAR10.base_folder).iterdir()):  # batches and the list of classes
        good = file.read_bytes()
        file.write_bytes(pickle.dumps(Malicious()))
        assert "it is damaged" in refused(train_teacher, *TINY, "--data", "cifar10", "--data-dir", ".")
        file.write_bytes(good)
    assert not Path("ran").exists()
