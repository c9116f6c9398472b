"""Behaviour of every script at tiny size, through the real command line where a user would use it.

    make test          or          python -m pytest -q test_smoke.py

No test depends on time or on the network. With DISOBEY_TEST_DATA naming a folder that holds cifar10.npz, real CIFAR-10
is trained on as well.
"""
import functools
import hashlib
import http.server
import itertools
import json
import math
import multiprocessing
import os
import pickle
import re
import runpy
import shutil
import signal
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
import torch.nn as nn
import torch.nn.functional as F
from PIL import Image
from hypothesis import given, settings
from hypothesis import strategies as st

import analyze_deviation
import common
import denoise_gradients
import eigenspace
import glue_distill
import switch_distill
import train_student
import train_teacher

HERE = Path(__file__).parent
TINY = ["--epochs", "2", "--width", "0.25", "--subset", "300", "--quiet", "--device", "cpu"]


def _forked(script, args, cwd, out, err):
    os.chdir(cwd)
    for path, descriptor in ((out, 1), (err, 2)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.argv = [str(HERE / script), *args]
    runpy.run_path(sys.argv[0], run_name="__main__")


def run_cli(script, *args, cwd):
    """Run a script as a user does; returns its exit code and output. The process is forked from one that has torch
    loaded already, which saves the two seconds that importing it takes."""
    os.environ["OMP_NUM_THREADS"] = "1"   # several run at once
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["test_smoke"])
    with tempfile.TemporaryDirectory() as folder:
        out, err = Path(folder) / "out", Path(folder) / "err"
        process = context.Process(target=_forked, args=(script, [str(arg) for arg in args], cwd, out, err))
        process.start()
        process.join()
        return SimpleNamespace(returncode=process.exitcode, stdout=out.read_text(), stderr=err.read_text())


def run_process(script, *args, cwd):
    """The same in a process of its own, from nothing."""
    return subprocess.run([sys.executable, str(HERE / script), *map(str, args)], cwd=cwd, capture_output=True, text=True,
                          env=dict(os.environ, OMP_NUM_THREADS="1"))


def ok(process):
    assert process.returncode == 0, process.stdout + process.stderr
    return process.stdout


def one_line_error(process, *words):
    """The process ended with exit code 2 and exactly one line on stderr that holds all words."""
    lines = process.stderr.strip().splitlines()
    assert process.returncode == 2 and len(lines) == 1 and lines[0].startswith("error: "), process.stdout + process.stderr
    for word in words:
        assert word in lines[0], lines[0]


def hashes(folder):
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in Path(folder).iterdir()}


def without_times(lines):
    return [{key: value for key, value in line.items() if key not in ("seconds", "images_per_s")} for line in lines]


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A folder with tiny finished runs: teacher-s0, teacher-s1, kd-s0, kd-s1, onehot-s0, onehot-s1."""
    folder = tmp_path_factory.mktemp("a folder with spaces")
    seeds = ["--seeds", 0, 1]
    ok(run_cli("train_teacher.py", *TINY, *seeds, "--out", "runs/teacher", cwd=folder))
    students = [("kd",), ("onehot", "--kd-weight", 0, "--ce-weight", 1)]
    with ThreadPoolExecutor(2) as pool:
        for process in pool.map(lambda s: run_cli("train_student.py", *TINY, *seeds, "--teacher", "runs/teacher-s{seed}",
                                                  "--out", f"runs/{s[0]}", *s[1:], cwd=folder), students):
            ok(process)
    return folder


# ---------------------------------------------------------------- models


@pytest.mark.parametrize("arch, classes, expected", [
    ("resnet8", 10, 75_290), ("resnet20", 10, 269_722), ("resnet32", 10, 464_154), ("resnet44", 10, 658_586),
    ("resnet56", 10, 853_018), ("resnet110", 10, 1_727_962), ("mobilenetv2", 10, 2_296_922)])
def test_parameter_counts_are_the_published_ones(arch, classes, expected):
    # He et al. 2016, table 6: 0.27M, 0.46M, 0.66M, 0.85M, 1.7M for option A; MobileNet-v2 on CIFAR-10: 2.30M.
    assert sum(p.numel() for p in common.build_model(arch, classes, (32, 32, 3)).parameters()) == expected


@pytest.mark.parametrize("arch, image", [(a, i) for a in ("resnet14", "mobilenetv2", "mlp", "cnn") for i in ((8, 8, 1), (32, 32, 3))]
                         + [("torchvision:resnet18", (32, 32, 3)), ("torchvision:googlenet", (64, 64, 3))])
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


# ---------------------------------------------------------------- data


def random_data(n=40, side=32, channels=3, pad=4, flip=True, classes=5):
    rng = np.random.default_rng(0)
    images = torch.tensor(rng.integers(0, 256, (n, side, side, channels)), dtype=torch.uint8)
    labels = torch.tensor(rng.integers(0, classes, n))
    mean, std = torch.tensor([0.2, 0.5, 0.7][:channels]), torch.tensor([0.3, 0.2, 0.1][:channels])
    return common.Data(images, labels, labels, torch.arange(n), images, labels, mean, std, classes, pad, flip,
                       dict(image=[side, side, channels], classes=classes))


@pytest.mark.parametrize("side, channels, pad, flip", [(32, 3, 4, True), (8, 1, 1, False)])
def test_every_view_equals_a_plain_per_image_crop_and_flip(side, channels, pad, flip):
    import torchvision.transforms.v2.functional as T
    data = random_data(3, side, channels, pad, flip)
    assert data.n_views == (162 if flip else 9)
    seen = set()
    for dy in range(2 * pad + 1):
        for dx in range(2 * pad + 1):
            for mirrored in (0, 1) if flip else (0,):
                view = data.view_id(dy, dx, mirrored)
                seen.add(view)
                got = data.batch(torch.tensor([0, 1, 2]), torch.full((3,), view))
                for k in range(3):
                    plain = T.pad(data.x_train[k].permute(2, 0, 1), [pad] * 4)[:, dy:dy + side, dx:dx + side]
                    plain = T.horizontal_flip(plain) if mirrored else plain
                    plain = T.normalize(T.to_dtype(plain, torch.float32, scale=True), data.mean.tolist(), data.std.tolist())
                    assert torch.allclose(got[k], plain, atol=1e-6)
    assert seen == set(range(data.n_views))
    centre = data.batch(torch.arange(3), torch.full((3,), data.view_id(pad, pad)))
    assert torch.equal(centre, data.normalise(data.x_train))
    assert centre.is_contiguous(memory_format=torch.channels_last)


def test_a_batch_mixes_images_and_views_independently():
    data = random_data()
    index, view = torch.tensor([7, 3, 7, 20]), torch.tensor([0, 161, 80, 81])
    together = data.batch(index, view)
    for k in range(4):
        assert torch.equal(together[k:k + 1], data.batch(index[k:k + 1], view[k:k + 1]))


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
    shared = [common.epoch_stream(data, "student", seed, 0, view_seed=9) for seed in (1, 2)]
    assert torch.equal(shared[0][1], shared[1][1]) and not torch.equal(shared[0][0], shared[1][0])


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
    assert torch.equal(small.y_train, noisy.y_train[small.index]) and torch.equal(small.x_train, noisy.x_train[small.index])
    assert not torch.equal(noisy.y_train, common.load_data("digits", label_noise=0.3, data_seed=1).y_train)
    assert common.load_data("digits").facts["label_noise"] == 0.3


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


def write_arrays(path, n=60, side=16, classes=4, channels=3):
    rng = np.random.default_rng(1)
    arrays = {f"x_{s}": rng.integers(0, 256, (n, side, side, channels), dtype=np.uint8) for s in ("train", "test")}
    arrays.update({f"y_{s}": np.arange(n) % classes for s in ("train", "test")})
    np.savez(path, **arrays)
    return arrays


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
            written[name] = dict(data=rng.integers(0, 256, (12, 3072), dtype=np.uint8), **{fine: (np.arange(12) % 10).tolist()})
            files.append([name, put(name, written[name])])
        monkeypatch.setattr(dataset, attribute, files)
    meta = dict(dataset.meta, md5=put(dataset.meta["filename"], {dataset.meta["key"]: [str(c) for c in range(10)]}))
    monkeypatch.setattr(dataset, "meta", meta)
    return written


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_loads_from_the_original_folder_and_keeps_a_prepared_copy(name, tmp_path, monkeypatch):
    from torchvision import datasets
    dataset = dict(cifar10=datasets.CIFAR10, cifar100=datasets.CIFAR100)[name]
    written = fake_cifar(tmp_path, dataset, monkeypatch)
    data = common.load_data(name, tmp_path)
    first = written[dataset.train_list[0][0]]
    assert np.array_equal(data.x_train[0].permute(2, 0, 1).flatten().numpy(), first["data"][0])
    assert len(data.x_train) == 12 * len(dataset.train_list) and data.x_train.shape[1:] == (32, 32, 3)
    with np.load(tmp_path / f"{name}.npz") as prepared:
        assert sorted(prepared.files) == sorted(common.ARRAYS)
    again = common.load_data(name, tmp_path)
    assert again.facts["sha256"] == data.facts["sha256"]


@pytest.fixture
def served(tmp_path):
    """A folder and the address on this machine under which a web server offers it."""
    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *args):
            pass
    (tmp_path / "served").mkdir()
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=tmp_path / "served"))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield tmp_path / "served", f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


def test_cifar_downloads_through_torchvision(tmp_path, monkeypatch, served):
    from torchvision import datasets
    fake_cifar(tmp_path / "source", datasets.CIFAR10, monkeypatch)
    folder, address = served
    archive = folder / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        tar.add(tmp_path / "source" / datasets.CIFAR10.base_folder, datasets.CIFAR10.base_folder)
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}/{archive.name}")
    monkeypatch.setattr(datasets.CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    (tmp_path / "data").mkdir()
    assert len(common.load_data("cifar10", tmp_path / "data").x_train) == 60
    monkeypatch.setattr(datasets.CIFAR10, "url", f"{address}/absent.tar.gz")
    (tmp_path / "empty").mkdir()
    with pytest.raises(common.InputError, match="could not be downloaded.*put cifar10.npz"):
        common.load_data("cifar10", tmp_path / "empty")


def fake_tiny_imagenet(root):
    rng, names = np.random.default_rng(3), ["n01443537", "n01629819"]
    def image(path, mode="RGB"):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).convert(mode).save(path)
    for c, name in enumerate(names):
        for k in range(3):
            image(root / "train" / name / "images" / f"{name}_{k}.JPEG", "L" if k == 2 else "RGB")
    for k in range(4):
        image(root / "val" / "images" / f"val_{k}.JPEG")
    (root / "val" / "val_annotations.txt").write_text("".join(f"val_{k}.JPEG\t{names[k % 2]}\t0\t0\t62\t62\n" for k in range(4)))


@pytest.mark.parametrize("layout", ["folder", "zip", "download"])
def test_tiny_imagenet_loads_from_folder_zip_and_download(layout, tmp_path, monkeypatch, served):
    source, data_dir = tmp_path / "source", tmp_path / "data"
    data_dir.mkdir()
    fake_tiny_imagenet((data_dir if layout == "folder" else source) / "tiny-imagenet-200")
    if layout != "folder":
        archive = (data_dir if layout == "zip" else served[0]) / "tiny-imagenet-200.zip"
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(source.rglob("*")):
                file.write(path, path.relative_to(source))
        monkeypatch.setattr(common, "TINY_IMAGENET_URL", f"{served[1]}/{archive.name}")
    data = common.load_data("tiny-imagenet", data_dir)
    assert data.x_train.shape == (6, 64, 64, 3) and data.y_train.tolist() == [0, 0, 0, 1, 1, 1]
    assert data.x_test.shape == (4, 64, 64, 3) and data.y_test.tolist() == [0, 1, 0, 1]
    assert (data_dir / "tiny-imagenet.npz").exists() and not list(data_dir.glob(".*"))


def test_folders_of_images_load_and_can_be_resized(tmp_path):
    rng = np.random.default_rng(4)
    for split in ("train", "val"):
        for c in ("cat", "dog"):
            (tmp_path / split / c).mkdir(parents=True)
            for k in range(2):
                Image.fromarray(rng.integers(0, 256, (20 + k, 24, 3), dtype=np.uint8)).save(tmp_path / split / c / f"{k}.png")
    data = common.load_data(f"folder:{tmp_path}", image_size=16)
    assert data.x_train.shape == (4, 16, 16, 3) and data.y_test.tolist() == [0, 0, 1, 1]
    with pytest.raises(common.InputError, match="--image-size"):
        common.load_data(f"folder:{tmp_path}")
    (tmp_path / "val" / "dog" / "0.png").write_bytes(b"not an image")
    with pytest.raises(common.InputError, match="0.png is not a readable image"):
        common.load_data(f"folder:{tmp_path}", image_size=16)


# ---------------------------------------------------------------- loss and schedule


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_kd_loss_and_its_gradient_match_the_float64_formula(temperature):
    rng = np.random.default_rng(5)
    student, teacher = rng.normal(0, 4, (2, 6, 10))
    p, q = (scipy.special.softmax(z / temperature, 1) for z in (teacher, student))
    logits = torch.tensor(student, dtype=torch.float32, requires_grad=True)
    loss = common.kd_loss(logits, torch.tensor(teacher, dtype=torch.float32), temperature)
    loss.backward()
    assert np.isclose(loss.item(), temperature ** 2 * scipy.stats.entropy(p, q, axis=1).mean(), rtol=1e-5)
    assert np.allclose(logits.grad.numpy(), temperature * (q - p) / 6, atol=1e-6)


def schedule(**flags):
    args = dict(data="cifar100", recipe="paper", seeds=[0], device="cpu", precision="fp32", fast=None, image_size=None, stop_epoch=None, **{k: None for k in common.RECIPES["paper"]})
    return common.resolve(SimpleNamespace(**dict(args, **flags)))


def test_learning_rates_of_the_recipes():
    args, per_epoch = schedule(), 48
    rate = lambda epoch: common.learning_rate(round(epoch * per_epoch), args, per_epoch)
    assert rate(0) < 0.01 and abs(rate(7.5) - 0.5) < 0.01
    assert [rate(e) for e in (15, 199, 200, 300, 400, 449)] == pytest.approx([1, 1, 0.1, 0.01, 0.001, 0.001])
    assert schedule(epochs=45).milestones == pytest.approx([20, 30, 40]) and schedule(epochs=45).warmup == 1.5
    tiny = schedule(data="tiny-imagenet")
    assert (tiny.epochs, tiny.lr, tiny.milestones) == (200, 0.1, [75, 135])
    args = schedule(recipe="short")
    assert common.learning_rate(5 * per_epoch, args, per_epoch) == 0.4 and common.learning_rate(80 * per_epoch - 1, args, per_epoch) < 1e-4


def test_student_loss_is_the_weighted_sum(runs, monkeypatch):
    """The loss that train_student.py hands to the engine is ce_weight·CE + kd_weight·T²·KL."""
    import train_student
    seen = {}
    monkeypatch.setattr(common, "training", lambda *args, **kwargs: seen.update(loss_fn=args[6], weights=args[7](0)) or iter(()))
    monkeypatch.chdir(runs)
    train_student.main([*TINY, "--teacher", "runs/teacher-s0", "--kd-weight", "0.7", "--ce-weight", "0.2", "--temperature", "3", "--out", "runs/weighted"])
    z, t, y = torch.randn(5, 10), torch.randn(5, 10), torch.arange(5)
    assert seen["weights"] == (0.2, 0.7)
    got = seen["loss_fn"](z, y, t, *seen["weights"])
    assert torch.isclose(got, 0.2 * F.cross_entropy(z, y) + 0.7 * common.kd_loss(z, t, 3.0))
    assert torch.isclose(seen["loss_fn"](z, y, None, 0.2, 0.0), 0.2 * F.cross_entropy(z, y))


# ---------------------------------------------------------------- runs from the command line


def test_a_run_folder_holds_what_was_trained(runs):
    for name in ("teacher", "kd", "onehot"):
        run = runs / "runs" / f"{name}-s0"
        assert sorted(file.name for file in run.iterdir()) == ["checkpoint.pt", "config.json", "logits.npz", "metrics.jsonl"]
        config = json.loads((run / "config.json").read_text())
        assert config["flags"]["epochs"] == 2 and config["data"]["flipped"] > 0 and config["versions"]["torch"] == torch.__version__
        data = common.load_data("digits", subset=300)
        assert config["data"]["sha256"] == data.facts["sha256"]
        model = common.build_model("resnet8", 10, (8, 8, 1), 0.25)
        model.load_state_dict(common.load_checkpoint(run / "checkpoint.pt")["model"])
        logits = common.read_npz(run / "logits.npz", common.LOGITS)
        assert logits["train_logits"].dtype == np.float32
        for split, images in (("train", data.x_train), ("test", data.x_test)):
            with torch.no_grad():
                assert np.allclose(logits[f"{split}_logits"], model.eval()(data.normalise(images)).numpy(), atol=1e-4)
        for key, tensor in (("train_labels", data.y_train), ("train_clean_labels", data.y_clean), ("train_index", data.index), ("test_labels", data.y_test)):
            assert np.array_equal(logits[key], tensor.numpy())
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        assert [line["epoch"] for line in lines] == [1, 2] and lines[-1]["best_test_acc"] == max(line["test_acc"] for line in lines)
        assert lines[-1]["test_acc"] == pytest.approx((logits["test_logits"].argmax(1) == logits["test_labels"]).mean())


def test_students_of_one_seed_are_paired_and_differ_from_the_teacher(runs, monkeypatch):
    import train_student
    import train_teacher
    keys = {}
    monkeypatch.chdir(runs)
    monkeypatch.setattr(common, "training", lambda run, model, data, args, role, seed, *rest, **more:
                        keys.update({run.name: (common.weights_hash(model), role, seed)}) or iter(()))
    train_teacher.main([*TINY, "--out", "runs/paired-teacher"])
    train_student.main([*TINY, "--teacher", "runs/teacher-s0", "--out", "runs/paired-kd"])
    train_student.main([*TINY, "--kd-weight", "0", "--ce-weight", "1", "--out", "runs/paired-onehot"])
    assert keys["paired-kd"] == keys["paired-onehot"] != keys["paired-teacher"]   # weights at the start, and the key of order and views
    assert keys["paired-kd"][0] != keys["paired-teacher"][0] and keys["paired-kd"][1:] != keys["paired-teacher"][1:]
    control, run = (json.loads((runs / "runs" / f"{name}-s0" / "config.json").read_text()) for name in ("onehot", "kd"))
    assert control["facts"]["teacher_sha256"] is None and run["facts"]["teacher_sha256"]
    finals = [common.load_checkpoint(runs / "runs" / f"{name}-s0" / "checkpoint.pt")["model"]["fc.weight"] for name in ("teacher", "kd", "onehot")]
    assert not torch.equal(finals[1], finals[2]) and not torch.equal(finals[0], finals[2])


def test_a_finished_run_is_left_alone_and_other_settings_are_refused(runs):
    run = runs / "runs" / "teacher-s0"
    before = hashes(run)
    command = [*TINY, "--seed", 0, "--out", "runs/teacher-s0"]
    assert "is finished already" in ok(run_cli("train_teacher.py", *command, cwd=runs)) and hashes(run) == before
    one_line_error(run_cli("train_teacher.py", *command, "--lr", 0.3, cwd=runs), "other settings", "lr", "--overwrite")
    one_line_error(run_cli("train_student.py", *command, "--teacher", "runs/teacher-s1", cwd=runs), "other settings", "role")
    assert hashes(run) == before


def test_overwrite_trains_again(runs, tmp_path):
    for extra in ([], ["--overwrite", "--lr", 0.05]):
        ok(run_cli("train_teacher.py", *TINY, "--out", "t", *extra, cwd=tmp_path))
    assert json.loads((tmp_path / "t" / "config.json").read_text())["flags"]["lr"] == 0.05
    assert common.last_metrics(tmp_path / "t")["lr"] < 0.05


def test_overwrite_discards_all_seeds_first_and_only_the_files_of_runs(tmp_path):
    ok(run_cli("train_teacher.py", *TINY, "--seeds", 0, 1, "--out", "t", cwd=tmp_path))
    (tmp_path / "t-s1" / "notes.txt").write_text("mine")
    (tmp_path / "t-s1" / ".draft.tmp").write_text("mine")
    # Seed 0 cannot be trained, so the command stops; what it says must go on without --overwrite.
    (tmp_path / "t-s0" / "config.json").unlink()
    one_line_error(run_cli("train_teacher.py", *TINY, "--seeds", 0, 1, "--lr", 0.2, "--out", "t", "--overwrite", cwd=tmp_path), "not a run folder")
    assert (tmp_path / "t-s0" / "checkpoint.pt").exists()   # a folder without config.json is not ours to empty
    ok(run_cli("train_teacher.py", *TINY, "--seed", 1, "--lr", 0.2, "--out", "t-s1", cwd=tmp_path))
    assert json.loads((tmp_path / "t-s1" / "config.json").read_text())["flags"]["lr"] == 0.2
    assert (tmp_path / "t-s1" / "notes.txt").read_text() == "mine" and (tmp_path / "t-s1" / ".draft.tmp").exists()


def test_bad_input_discards_nothing_even_with_overwrite(runs, tmp_path):
    copy_run(runs / "runs" / "kd-s0", tmp_path / "s")
    before = hashes(tmp_path / "s")
    for script, *extra in (("train_student.py", "--teacher", "absent"), ("train_teacher.py", "--arch", "resnet9"), ("train_teacher.py", "--subset", "9999")):
        one_line_error(run_cli(script, *TINY, "--out", "s", "--overwrite", *extra, cwd=tmp_path))
    assert hashes(tmp_path / "s") == before


def test_runs_need_no_git(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert common.versions()["git_commit"] is None and common.versions()["torch"] == torch.__version__


def test_one_control_serves_students_of_every_temperature(runs):
    run = runs / "runs" / "onehot-s0"
    before = hashes(run)
    ok(run_cli("train_student.py", *TINY, "--seed", 0, "--kd-weight", 0, "--ce-weight", 1, "--temperature", 2, "--out", "runs/onehot-s0", cwd=runs))
    assert hashes(run) == before


def test_runs_are_reproducible_across_processes(runs, tmp_path):
    ok(run_process("train_teacher.py", *TINY, "--seed", 1, "--out", "again", cwd=tmp_path))
    weights = [common.load_checkpoint(path / "checkpoint.pt")["model"] for path in (tmp_path / "again", runs / "runs" / "teacher-s1")]
    assert all(torch.equal(weights[0][key], weights[1][key]) for key in weights[0])


@pytest.mark.skipif("DISOBEY_TEST_DATA" not in os.environ, reason="DISOBEY_TEST_DATA does not name a folder with cifar10.npz")
def test_real_cifar10_trains_from_teacher_to_figure(tmp_path):
    flags = ["--data", "cifar10", "--data-dir", os.environ["DISOBEY_TEST_DATA"], "--subset", 500, "--epochs", 2, "--width", 0.5, "--eval-every", 2, "--quiet"]
    ok(run_cli("train_teacher.py", *flags, "--out", "t", cwd=tmp_path))
    ok(run_cli("train_student.py", *flags, "--teacher", "t", "--out", "s", cwd=tmp_path))
    ok(run_cli("analyze_deviation.py", "--teacher", "t", "--student", "s", "--out", "r", "--bootstrap", 100, cwd=tmp_path))
    assert common.last_metrics(tmp_path / "t")["test_acc"] > 0.12 and (tmp_path / "r" / "fig1a.png").exists()


# ---------------------------------------------------------------- interruption and resume


def engine(run, weights_at=lambda step: (1.0, 0.0), arch="resnet8", **changed):
    """Train a tiny run through common.train, as train_teacher.py does."""
    parser = common.Parser("")
    common.add_flags(parser)
    args = common.resolve(parser.parse_args([*TINY, "--epochs", "4", "--save-every", "2"]))
    vars(args).update(changed)
    data = common.data_from(args)
    model = common.build_model(arch, data.classes, data.facts["image"], args.width, ("teacher", 0))
    common.start_run(run, args, "teacher", 0, data, model)
    common.train(run, model, data, args, "teacher", 0, lambda z, y, t, ce, kd: ce * F.cross_entropy(z, y), weights_at)
    return model.state_dict(), [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


class Crash(BaseException):
    pass


@pytest.mark.parametrize("kind", ["signal", "crash"])
@pytest.mark.parametrize("stop_at", [1, 9, 13])   # four steps per epoch, checkpoints after epochs 2 and 4
def test_an_interrupted_run_ends_in_the_same_weights(kind, stop_at, tmp_path):
    whole, metrics = engine(tmp_path / "whole")

    def interrupt(step):
        if step == stop_at and kind == "signal":
            signal.raise_signal(signal.SIGTERM)
        if step == stop_at and kind == "crash":
            raise Crash
        return 1.0, 0.0
    with pytest.raises((SystemExit, Crash)) as caught:
        engine(tmp_path / "cut", interrupt)
    if kind == "signal":
        assert caught.value.code == 130
        assert common.load_checkpoint(tmp_path / "cut" / "checkpoint.pt")["step"] == stop_at + 1
    assert not (tmp_path / "cut" / "logits.npz").exists()
    (tmp_path / "cut" / ".checkpoint.pt.1234.tmp").write_bytes(b"half")   # as a kill during a write leaves it
    resumed, resumed_metrics = engine(tmp_path / "cut")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)
    assert without_times(metrics) == without_times(resumed_metrics)
    assert sorted(f.name for f in (tmp_path / "cut").iterdir()) == sorted(f.name for f in (tmp_path / "whole").iterdir())


def test_dropout_resumes_exactly(tmp_path, monkeypatch):
    build = common.build_model
    def with_dropout(*args):
        model = build("mlp", *args[1:])
        model.insert(1, torch.nn.Dropout(0.3))
        return model
    monkeypatch.setattr(common, "build_model", with_dropout)
    whole, _ = engine(tmp_path / "whole")
    with pytest.raises(SystemExit):
        engine(tmp_path / "cut", lambda step: (signal.raise_signal(signal.SIGINT) if step == 9 else None, (1.0, 0.0))[1])
    torch.manual_seed(123)   # what the process did in between must not matter
    resumed, _ = engine(tmp_path / "cut")
    assert all(torch.equal(whole[key], resumed[key]) for key in whole)


def test_ctrl_c_saves_and_prints_the_resume_command(tmp_path):
    command = [sys.executable, str(HERE / "train_teacher.py"), "--epochs", "1000000", "--width", "0.25", "--out", "t", "--overwrite"]
    process = subprocess.Popen(command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    while not (tmp_path / "t" / "checkpoint.pt").exists():   # endless run: only the signal ends it
        assert process.poll() is None
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate()
    assert process.returncode == 130
    assert output.splitlines()[-1].endswith("continue with: python train_teacher.py --epochs 1000000 --width 0.25 --out t")


def test_a_failed_write_keeps_the_old_file(tmp_path):
    common.write_text(tmp_path / "f", "old")
    def half(file):
        file.write(b"ne")
        raise OSError("disk full")
    with pytest.raises(OSError):
        common.write_atomic(tmp_path / "f", half)
    assert (tmp_path / "f").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- bad input


def test_bad_flags_and_data_get_one_line(runs, tmp_path):
    arrays = write_arrays(tmp_path / "good.npz")
    np.savez(tmp_path / "float.npz", **dict(arrays, x_train=arrays["x_train"] / 255))
    np.savez(tmp_path / "short.npz", **dict(arrays, y_train=arrays["y_train"][:-1]))
    np.savez(tmp_path / "keys.npz", x_train=arrays["x_train"])
    np.savez(tmp_path / "huge.npz", **dict(arrays, y_train=arrays["y_train"] + 10 ** 10))
    np.savez(tmp_path / "one.npz", **dict(arrays, y_train=arrays["y_train"] * 0, y_test=arrays["y_test"] * 0))
    np.save(tmp_path / "array.npy", arrays["x_train"])
    (tmp_path / "torn.npz").write_bytes((tmp_path / "good.npz").read_bytes()[:500])
    (tmp_path / "file").write_text("")
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "thesis.txt").write_text("dear")
    cases = [
        (["--arch", "resnet9"], "unknown --arch", "resnet20"), (["--arch", "torchvision:resnet19", "--width", "1"], "unknown --arch", "resnet18"),
        (["--arch", "torchvision:resnet18", "--width", "1"], "3-channel"), (["--arch", "torchvision:resnet18"], "--width"), (["--arch", "torchvision:alexnet", "--data", "npz:good.npz", "--subset", "0", "--width", "1"], "does not fit"),
        (["--data", "imagenet"], "unknown --data", "npz:PATH"), (["--data", "npz:absent.npz"], "absent.npz", "does not exist"),
        (["--data", "npz:float.npz"], "float64", "uint8"), (["--data", "npz:short.npz"], "y_train", "60"),
        (["--data", "npz:keys.npz"], "lacks", "y_train"), (["--data", "npz:torn.npz"], "torn.npz", "not a readable"),
        (["--data", "npz:huge.npz"], "large gaps"), (["--data", "npz:one.npz"], "at least 2 classes"), (["--data", "npz:array.npy"], "single array"),
        (["--batch-size", "1"], "--batch-size 1"), (["--data", "folder:notes"], "folder of class folders"), (["--subset", "9999"], "--subset 9999", "1297"),
        (["--label-noise", "1"], "--label-noise", "[0, 1)"), (["--label-noise", "nan"], "--label-noise"), (["--epochs", "0"], "--epochs"),
        (["--lr", "fast"], "--lr", "invalid"), (["--recipe", "slow"], "--recipe", "quick"), (["--epoch", "2"], "unrecognized arguments"),
        (["--warmup", "7"], "--warmup 7"), (["--seeds", "1", "1"], "twice"), (["--schedule", "step"], "--milestones"),
        (["--milestones", "1"], "--schedule step"), (["--image-size", "16"], "folder:PATH"),
        (["--out", "file/run"], "file/run"), (["--out", "/proc/run"], "/proc/run", "writable"), (["--out", "notes"], "not empty", "--out"),
    ] + ([] if torch.cuda.is_available() else [(["--device", "cuda"], "no CUDA device")])
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda case: run_cli("train_teacher.py", *TINY, "--out", "never", *case[0], cwd=tmp_path), cases)
        for (_, *words), process in zip(cases, results):
            one_line_error(process, *words)
    assert not (tmp_path / "never").exists() and (tmp_path / "notes" / "thesis.txt").read_text() == "dear"


def copy_run(source, target, **changed):
    """A copy of a run folder; changed maps a file name to a function of its bytes, or to None to leave it out."""
    target.mkdir()
    for file in source.iterdir():
        change = changed.get(file.name.split(".")[0], lambda content: content)
        if change is not None:
            (target / file.name).write_bytes(change(file.read_bytes()))


def test_bad_teachers_get_one_line_and_no_run_folder(runs, tmp_path):
    teacher, half = runs / "runs" / "teacher-s0", lambda content: content[:len(content) // 2]
    copy_run(teacher, tmp_path / "unfinished", logits=None)
    copy_run(teacher, tmp_path / "torn checkpoint", checkpoint=half)
    copy_run(teacher, tmp_path / "torn config", config=half)
    copy_run(teacher, tmp_path / "no metrics", metrics=lambda content: b"")
    copy_run(teacher, tmp_path / "list config", config=lambda content: b"[1, 2]")
    copy_run(teacher, tmp_path / "odd metrics", metrics=lambda content: b"[]\n")
    copy_run(teacher, tmp_path / "other arch", config=lambda content: content.replace(b'"arch": "resnet8"', b'"arch": "resnet14"'))
    copy_run(teacher, tmp_path / "other weights")
    state = common.load_checkpoint(tmp_path / "other weights" / "checkpoint.pt")
    state["model"]["fc.weight"] = -state["model"]["fc.weight"]
    torch.save(state, tmp_path / "other weights" / "checkpoint.pt")
    copy_run(teacher, tmp_path / "code inside")
    class Evil:
        def __reduce__(self):
            return (Path.touch, (tmp_path / "ran",))
    torch.save(dict(model=Evil()), tmp_path / "code inside" / "checkpoint.pt")
    write_arrays(tmp_path / "four.npz", side=8, channels=1)
    copy_run(teacher, tmp_path / "empty checkpoint", checkpoint=lambda content: b"")
    copy_run(teacher, tmp_path / "tensor checkpoint")
    torch.save(torch.zeros(3), tmp_path / "tensor checkpoint" / "checkpoint.pt")
    (tmp_path / "empty").mkdir()
    cases = [("absent", [], "not a run folder"), ("empty", [], "not a run folder"), ("unfinished", [], "not finished", "train_teacher.py"),
             ("torn checkpoint", [], "damaged", "checkpoint.pt"), ("empty checkpoint", [], "checkpoint.pt"), ("tensor checkpoint", [], "checkpoint.pt"), ("torn config", [], "config.json"), ("list config", [], "config.json"), ("odd metrics", [], "metrics.jsonl"), ("no metrics", [], "metrics.jsonl"),
             ("other arch", [], "does not fit resnet14"), ("other weights", [], "test accuracy here but recorded"), ("code inside", [], "damaged"),
             (teacher, ["--data", "npz:four.npz", "--subset", "0"], "classes 10", "4"), (teacher, ["--label-noise", "0.1"], "label_noise 0.3"),
             (teacher, ["--subset", "100"], "subset 300"), (teacher, ["--data-seed", "1"], "data_seed 0"),
             (teacher, ["--kd-weight", "0"], "no loss"), (teacher, ["--stop-epoch", "9"], "beyond --epochs 2"), (teacher, ["--temperature", "0"], "--temperature")]
    with ThreadPoolExecutor(2) as pool:
        results = pool.map(lambda case: run_cli("train_student.py", *TINY, "--out", "never", "--teacher", case[0], *case[1], cwd=tmp_path), cases)
        for (_, _, *words), process in zip(cases, results):
            one_line_error(process, *words)
    assert not (tmp_path / "never").exists() and not (tmp_path / "ran").exists()


def test_a_diverging_run_stops_and_keeps_its_checkpoint(tmp_path):
    with pytest.raises(SystemExit):   # a good first part
        engine(tmp_path / "t", lambda step: (signal.raise_signal(signal.SIGTERM) if step == 8 else None, (1.0, 0.0))[1])
    before = hashes(tmp_path / "t")
    with pytest.raises(common.InputError, match="NaN or infinite in epoch 3.*--lr.*good checkpoint is kept"):
        engine(tmp_path / "t", lambda step: (float("inf"), 0.0))
    assert hashes(tmp_path / "t")["checkpoint.pt"] == before["checkpoint.pt"] and not (tmp_path / "t" / "logits.npz").exists()
    # Even when only the very last step does it, after the last loss was seen.
    one_line_error(run_cli("train_teacher.py", *TINY, "--epochs", 1, "--batch-size", 300, "--lr", 1e38, "--warmup", 0, "--out", "n", cwd=tmp_path), "NaN", "--lr")
    assert not (tmp_path / "n" / "logits.npz").exists() and not (tmp_path / "n" / "checkpoint.pt").exists()


def test_a_torn_checkpoint_of_an_unfinished_run_is_not_lost(runs, tmp_path):
    copy_run(runs / "runs" / "teacher-s0", tmp_path / "t", logits=None, checkpoint=lambda content: content[:1000])
    before = hashes(tmp_path / "t")
    one_line_error(run_cli("train_teacher.py", *TINY, "--out", "t", cwd=tmp_path), "damaged", "--overwrite")
    assert hashes(tmp_path / "t") == before


# ---------------------------------------------------------------- deviation analysis


def test_phi_is_exact_for_saturated_and_ordinary_logits():
    z = np.array([[800.0, 0, 0], [-900.0, 5, 1], [1.0, 2, 0.5], [60, 0, -3]])
    assert np.allclose(analyze_deviation.phi_of_class(z, np.array([0, 0, 1, 0]))[:2], [800 - np.log(2), -900 - np.log(np.exp(5) + np.e)])
    p = scipy.special.softmax(z[2])[1]
    assert np.isclose(analyze_deviation.phi_of_class(z, np.array([0, 0, 1, 0]))[2], np.log(p / (1 - p)))


def random_points(n=400, classes=6, seed=0, spread=2.0):
    rng = np.random.default_rng(seed)
    teacher = rng.normal(0, spread, (n, classes))
    return dict(teacher=teacher, labels=rng.integers(0, classes, n),
                networks=dict(student=teacher + rng.normal(0, 1, teacher.shape), control=rng.normal(0, spread, (n, classes))))


def plain_statistics(x, y, low, high):
    """The statistics of one sample by their definitions, with scipy and numpy."""
    fit, low_fit = scipy.stats.linregress(x, y), scipy.stats.linregress(x[low], y[low])
    return dict(slope=fit.slope, intercept=fit.intercept, low_slope=low_fit.slope, low_below=np.mean(y[low] < x[low]),
                low_gap=np.mean(y[low] - x[low]), high_gap=np.mean(y[high] - x[high]))


def test_statistics_match_their_definitions():
    from sklearn.metrics import accuracy_score, log_loss
    point = random_points()
    got = analyze_deviation.replicates(point, 100)
    for kind, classes in (("predicted", point["teacher"].argmax(1)), ("label", point["labels"])):
        x = analyze_deviation.phi_of_class(point["teacher"], classes)
        for name in ("student", "control"):
            y = analyze_deviation.phi_of_class(point["networks"][name], classes)
            plain = plain_statistics(x, y, x <= np.quantile(x, 0.25), x >= np.quantile(x, 0.75))
            for key, value in plain.items():
                assert np.isclose(got[kind, name, key][0], value), (kind, name, key)
            assert np.isclose(got[kind, "student-control", "slope"][0], got[kind, "student", "slope"][0] - got[kind, "control", "slope"][0])
    p, q = (scipy.special.softmax(z, 1) for z in (point["teacher"], point["networks"]["student"]))
    value = lambda key: got["fidelity", "student", key][0]
    assert np.isclose(value("accuracy"), accuracy_score(point["labels"], q.argmax(1)))
    assert np.isclose(value("agreement"), accuracy_score(p.argmax(1), q.argmax(1)))
    assert np.isclose(value("nll"), log_loss(point["labels"], q, labels=range(6)))
    assert np.isclose(value("kl"), scipy.stats.entropy(p, q, axis=1).mean())
    confidence, correct, ece = q.max(1), q.argmax(1) == point["labels"], 0.0
    for b in range(15):
        inside = (confidence >= b / 15) & (confidence < (b + 1) / 15)
        ece += inside.mean() * abs(correct[inside].mean() - confidence[inside].mean()) if inside.any() else 0
    assert np.isclose(value("ece"), ece)


def test_weighted_bootstrap_equals_a_plain_bootstrap():
    point = random_points(200)
    point["teacher"] = point["teacher"] + 1e5   # a common offset changes no probability and must cost no digits
    got = analyze_deviation.replicates(point, 130, np.random.default_rng(7))   # more than one chunk of draws
    classes, rng = point["teacher"].argmax(1), np.random.default_rng(7)
    x, y = (analyze_deviation.phi_of_class(z, classes) for z in (point["teacher"], point["networks"]["student"]))
    low, high = x <= np.quantile(x, 0.25), x >= np.quantile(x, 0.75)
    for b in range(1, 131):
        draw = rng.integers(200, size=200)
        for key, value in plain_statistics(x[draw], y[draw], low[draw], high[draw]).items():
            assert np.isclose(got["predicted", "student", key][b], value), (b, key)


@pytest.mark.parametrize("count", [1, 2, 3, 5, 10])
@pytest.mark.parametrize("shared", [0.0, 0.9])   # share of the points' noise that all seeds have in common
def test_intervals_cover_the_truth_over_points_and_over_seeds(count, shared):
    rng, inside = np.random.default_rng(8), 0
    for trial in range(200):
        points = rng.normal(0, 1, 100)   # what is particular to these points, for all seeds
        columns = [0.3 * rng.normal() * (count > 1) + shared ** 0.5 * points + (1 - shared) ** 0.5 * rng.normal(0, 1, 100) for _ in range(count)]
        draws = [analyze_deviation.resampled_sums(column[:, None], 200, np.random.default_rng(trial))[:, 0] / 100 for column in columns]
        interval = analyze_deviation.combine(draws, np.random.default_rng([trial, 1]))
        inside += interval["low"] <= 0 <= interval["high"]
    assert inside >= 178   # 95% nominal: 190 of 200, standard deviation 3; wider is allowed


def test_an_undefined_statistic_has_an_undefined_interval_and_valid_json(tmp_path):
    interval = analyze_deviation.combine([np.array([1.0, np.nan, 1.1])])
    assert np.isnan(interval["low"]) and common.verdict((interval["low"], interval["high"]), 0) == "unclear"
    common.write_json(tmp_path / "x.json", dict(interval, more=[float("inf"), 1.5]))
    assert json.loads((tmp_path / "x.json").read_text(), parse_constant=lambda name: 1 / 0) == dict(value=1.0, low=None, high=None, seeds=[1.0], more=[None, 1.5])


def test_a_copy_of_the_teacher_has_no_deviation():
    point = random_points()
    point["networks"] = dict(student=point["teacher"] + 5.0)   # shifting all logits changes no probability
    row = {key: values[0] for (kind, _, key), values in analyze_deviation.replicates(point, 100).items() if kind == "predicted"}
    assert np.isclose(row["slope"], 1) and abs(row["low_gap"]) < 1e-9 and np.isclose(row["low_slope"], 1) and abs(row["high_gap"]) < 1e-9


def test_selection_alone_puts_an_independent_network_below_the_diagonal_and_the_control_shows_it():
    rng = np.random.default_rng(9)
    truth = rng.normal(0, 1.5, (4000, 8))
    network = lambda: truth + rng.normal(0, 1, truth.shape)
    point = dict(teacher=network(), labels=truth.argmax(1), networks=dict(student=network(), control=network()))
    table = analyze_deviation.measure([point], 500)["predicted"]
    assert table["student"]["low_below"]["low"] > 0.5 and table["student"]["low_gap"]["high"] < 0
    assert table["student-control"]["low_gap"]["low"] < 0 < table["student-control"]["low_gap"]["high"]
    rows = {row["claim"]: row["verdict"] for row in analyze_deviation.deviation_claims(dict(test=analyze_deviation.measure([point], 500)))}
    assert rows["test: most of the teacher's hardest quarter lies below y = x"] == "holds"
    assert rows["test: on the hardest quarter the student falls lower than the one-hot control"] == "unclear"


def test_figure_1a_from_runs_and_from_files_agree(runs, tmp_path):
    names = {role: [runs / "runs" / f"{run}-s{seed}" for seed in (0, 1)] for role, run in (("teacher", "teacher"), ("student", "kd"), ("control", "onehot"))}
    flags = ["--bootstrap", 200]
    output = ok(run_cli("analyze_deviation.py", *[word for role in names for word in (f"--{role}", names[role][0])], *flags, "--out", "one", cwd=tmp_path))
    assert sorted(f.name for f in (tmp_path / "one").iterdir()) == ["claims.json", "claims.md", "deviation.json", "fig1a.pdf", "fig1a.png"]
    assert "figure: one/fig1a.png" in output and "| train: slope of the student's fit exceeds 1 |" in output
    assert Image.open(tmp_path / "one" / "fig1a.png").size[0] > 800
    files = {role: names[role][0] / "logits.npz" for role in names}
    np.save(tmp_path / "s.npy", np.load(files["student"])["test_logits"])
    ok(run_cli("analyze_deviation.py", "--teacher-logits", f"{files['teacher']}:test_logits", "--student-logits", "s.npy", "--control-logits",
               f"{files['control']}:test_logits", "--labels", f"{files['teacher']}:test_labels", *flags, "--out", "files", cwd=tmp_path))
    one, from_files = (json.loads((tmp_path / name / "deviation.json").read_text()) for name in ("one", "files"))
    assert from_files["tables"] == {"test": one["tables"]["test"]}
    ok(run_cli("analyze_deviation.py", *[word for role in names for word in (f"--{role}", *names[role])], *flags, "--out", "two", cwd=tmp_path))
    two = json.loads((tmp_path / "two" / "deviation.json").read_text())
    slope = two["tables"]["train"]["predicted"]["student"]["slope"]
    assert two["seeds"] == 2 and slope["value"] == pytest.approx(np.mean(slope["seeds"])) and slope["seeds"][0] != slope["seeds"][1]
    assert slope["seeds"][0] == pytest.approx(one["tables"]["train"]["predicted"]["student"]["slope"]["value"])


def test_bad_logits_get_one_line(runs, tmp_path):
    point = random_points(50)
    for name, array in dict(t=point["teacher"], s=point["networks"]["student"], y=point["labels"], short=point["teacher"][:40], flat=np.zeros((50, 6)),
                            nan=np.where(np.arange(50)[:, None] == 7, np.nan, point["teacher"]), wide=np.zeros((50, 7)), giant=point["teacher"] * 1e160, y9=point["labels"] + 9,
                            yf=point["labels"] / 2, text=np.array(["a"] * 50)).items():
        np.save(tmp_path / f"{name}.npy", array)
    (tmp_path / "torn.npy").write_bytes((tmp_path / "t.npy").read_bytes()[:300])
    np.savez(tmp_path / "both.npz", a=point["teacher"], b=point["teacher"])
    (tmp_path / "pickled.npy").write_bytes(pickle.dumps([1, 2]))
    copy_run(runs / "runs" / "kd-s0", tmp_path / "torn run", logits=lambda content: content[:2000])
    copy_run(runs / "runs" / "kd-s0", tmp_path / "unfinished", logits=None)
    good, teacher = ["--teacher-logits", "t.npy", "--student-logits", "s.npy", "--labels", "y.npy"], runs / "runs" / "teacher-s0"
    cases = [(good + ["--student-logits", "nan.npy"], "nan.npy", "row 7"), (good + ["--student-logits", "short.npy"], "short.npy", "[40, 6]"),
             (good + ["--student-logits", "wide.npy"], "wide.npy"), (good + ["--labels", "y9.npy"], "y9.npy", "0..5"), (good + ["--labels", "yf.npy"], "yf.npy"),
             (good + ["--teacher-logits", "text.npy"], "text.npy"), (good + ["--teacher-logits", "torn.npy"], "torn.npy"), (good[:4], "--labels"),
             (good + ["--teacher-logits", "both.npz"], "both.npz:NAME"), (good + ["--teacher-logits", "both.npz:c"], "a, b"),
             (good + ["--teacher-logits", "absent.npy"], "does not exist"), (good + ["--teacher-logits", "pickled.npy"], "pickled.npy"),
             (good + ["--teacher-logits", "flat.npy"], "equally confident"), ([], "--teacher-logits"), (good + ["--control", "x"], "either"),
             (good + ["--student-logits", "giant.npy"], "no logits"), (["--teacher", teacher, "--student", teacher], "different runs"), (good + ["--teacher", "x", "--student", "y"], "either"),
             (["--teacher", teacher, "--student", "absent"], "not a run folder"), (["--teacher", teacher, "--student", "torn run"], "not a readable .npz"),
             (["--teacher", teacher, "--student", "unfinished"], "not finished"), (["--teacher", teacher, teacher, "--student", runs / "runs" / "kd-s0"], "paired"),
             (good + ["--bootstrap", "1"], "--bootstrap"), (good + ["--out", "/proc/figure"], "/proc/figure")]
    with ThreadPoolExecutor(2) as pool:
        for (_, *words), process in zip(cases, pool.map(lambda case: run_cli("analyze_deviation.py", "--out", "never", *case[0], cwd=tmp_path), cases)):
            one_line_error(process, *words)
    assert not (tmp_path / "never").exists()


# ---------------------------------------------------------------- loss switching


def test_switched_weights_are_abrupt_or_linear_over_the_window():
    abrupt = switch_distill.switched_weights((1.0, 0.0), (0.0, 1.0), 10)
    assert [abrupt(step) for step in (0, 9, 10, 11)] == [(1, 0), (1, 0), (0, 1), (0, 1)]
    gradual = switch_distill.switched_weights((0.0, 2.0), (1.0, 0.0), 10, window=4)
    assert [gradual(step) for step in (9, 10, 11, 13, 14, 99)] == [(0, 2), (0, 2), (0.25, 1.5), (0.75, 0.5), (1, 0), (1, 0)]


SWITCH = [*TINY, "--epochs", "4", "--switch-at", "0", "0.3", "0.5", "1", "--bootstrap", "100"]   # 16 steps; 0.3 is inside epoch 2


def weights_and_metrics(run):
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return common.load_checkpoint(run / "checkpoint.pt")["model"], without_times(lines)


def same_run(one, other):
    (weights, metrics), (other_weights, other_metrics) = weights_and_metrics(one), weights_and_metrics(other)
    return all(torch.equal(weights[key], other_weights[key]) for key in weights) and metrics == other_metrics


BRANCHES = [f"{direction}-{s}" for direction in switch_distill.SWITCHES for s in ("0.3", "0.5")]


@pytest.mark.parametrize("window", [0, 5])
def test_a_branch_equals_the_same_run_from_scratch_also_across_a_resume(window, runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ok(run_cli("train_teacher.py", *TINY, "--out", "t", cwd=tmp_path))
    flags = [*SWITCH, "--teacher", "t", "--window", window]
    ok(run_cli("switch_distill.py", *flags, "--out", "branched", "--results", "r1", cwd=tmp_path))
    # Trunks from train_student.py are accepted as they are; they keep no states, so the branches start from scratch.
    for name, weights in (("kd", []), ("onehot", ["--kd-weight", 0, "--ce-weight", 1])):
        ok(run_cli("train_student.py", *TINY, "--epochs", 4, "--teacher", "t", *weights, "--out", f"scratch-{name}-s0", cwd=tmp_path))
    trunks = {name: hashes(tmp_path / f"scratch-{name}-s0") for name in ("kd", "onehot")}
    ok(run_cli("switch_distill.py", *flags, "--out", "scratch", "--results", "r2", cwd=tmp_path))
    assert trunks == {name: hashes(tmp_path / f"scratch-{name}-s0") for name in trunks}

    real, calls = switch_distill.switched_weights, []
    def crash(*switch):
        weights_at = real(*switch)
        def at(step):
            if step == 11:   # inside the third epoch, after two checkpoints
                calls.append(switch)
                raise Crash
            return weights_at(step)
        return at
    monkeypatch.setattr(switch_distill, "switched_weights", crash)
    for _ in BRANCHES:
        with pytest.raises(Crash):
            switch_distill.main([str(flag) for flag in flags] + ["--out", "resumed", "--results", "r3"])
        monkeypatch.setattr(switch_distill, "switched_weights", lambda *switch: real(*switch) if switch in calls else crash(*switch))
    switch_distill.main([str(flag) for flag in flags] + ["--out", "resumed", "--results", "r3"])
    assert len(calls) == len(BRANCHES)

    suffix = f"-w{window}" if window else ""
    for name in ["kd", "onehot"] + [branch + suffix for branch in BRANCHES]:
        for way in ("scratch", "resumed"):
            assert same_run(tmp_path / f"branched-{name}-s0", tmp_path / f"{way}-{name}-s0"), (name, way)
    if not window:   # a torn state is passed over, and the branch is trained from further back
        for file in tmp_path.glob("branched-*/snapshot-8.pt"):
            file.write_bytes(file.read_bytes()[:200])
        for branch in BRANCHES:
            (tmp_path / f"branched-{branch}-s0").rename(tmp_path / f"kept-{branch}")
        assert "is damaged and not used" in ok(run_cli("switch_distill.py", *flags, "--out", "branched", "--results", "r1", cwd=tmp_path))
        assert all(same_run(tmp_path / f"branched-{branch}-s0", tmp_path / f"kept-{branch}") for branch in BRANCHES)
    finals = [weights_and_metrics(tmp_path / f"branched-{name}-s0")[0]["fc.weight"] for name in ["kd", "onehot"] + [b + suffix for b in BRANCHES]]
    assert all(not torch.equal(a, b) for k, a in enumerate(finals) for b in finals[:k])
    kinds = [line["kd_weight"] for line in weights_and_metrics(tmp_path / f"branched-onehot2kd-0.5{suffix}-s0")[1]]
    assert kinds[:2] == [0, 0] and kinds[-1] == 1


def test_switch_report_over_seeds_and_teachers(tmp_path):
    output = ok(run_cli("switch_distill.py", *SWITCH, "--seeds", 0, 1, "--teacher-epochs", 2, 4, cwd=tmp_path))
    results = tmp_path / "results" / "fig1b"
    report = json.loads((results / "switch.json").read_text())
    assert "2 seeds, each with its own teacher" in report["intervals"] and "Intervals: 95%" in output
    rows = {(row["direction"], row["s"]): row for row in report["rows"]}
    assert len(rows) == 8
    folder = tmp_path / "runs"
    accuracy = lambda name: np.mean([common.last_metrics(folder / f"digits-resnet8-{name}-s{seed}")["test_acc"] for seed in (0, 1)])
    for direction, pure in (("onehot2kd", ("kd", "onehot")), ("kd2onehot", ("onehot", "kd"))):
        for s, name in ((0, pure[0]), (0.3, f"{direction}-0.3"), (1, pure[1])):
            row = rows[direction, s]
            assert row["accuracy"]["value"] == pytest.approx(accuracy(name)) and row["accuracy"]["low"] < accuracy(name) < row["accuracy"]["high"]
            assert row["difference"]["value"] == pytest.approx(accuracy(name) - accuracy("onehot"))
    assert [row["epochs"] for row in report["teachers"]] == [2, 4]
    assert report["teachers"][1]["gain"] == rows["onehot2kd", 0]["gain"]
    assert len(common.read_json(folder / "digits-resnet8-teacher-e2-s0" / "config.json")["command"]) > 0
    assert common.last_metrics(folder / "digits-resnet8-teacher-e2-s0")["epoch"] == 2
    figures = {f.stem for f in results.glob("*.png")}
    assert figures == {"fig1b", "fig1b_curves", "fig1b_teachers"} and {f.stem for f in results.glob("*.pdf")} == figures
    assert "KD is more accurate than one-hot" in (results / "claims.md").read_text()


def sums_of(rng, seeds, onehot, kd, switched, n=2000):
    """What accuracy_sums returns for students of known accuracy that err on nested sets of points."""
    out = []
    for _ in range(seeds):
        luck = rng.random(n)[:, None]
        correct = (luck < np.array([switched, onehot, kd])).astype(float)
        out.append(analyze_deviation.resampled_sums(correct, 300, rng) / n)
    return out


def test_recovered_share_of_known_accuracies():
    rng = np.random.default_rng(0)
    row = switch_distill.recovered(sums_of(rng, 4, onehot=0.70, kd=0.80, switched=0.775), 0)
    assert row["recovered"]["low"] < 0.75 < row["recovered"]["high"] and row["recovered"]["high"] - row["recovered"]["low"] < 0.3
    assert row["accuracy"]["value"] == pytest.approx(0.775, abs=0.02) and row["gain"]["value"] == pytest.approx(0.1, abs=0.02)
    for sums, reason in ((sums_of(rng, 4, 0.7, 0.7, 0.7), "gain too small to divide"), (sums_of(rng, 4, 0.8, 0.7, 0.75), "KD loses accuracy here")):
        row = switch_distill.recovered(sums, 0)
        assert row["recovered"] is None and row["reason"] == reason


@pytest.mark.parametrize("onehot2kd, kd2onehot, kd, verdicts", [
    (0.79, 0.72, 0.80, ["holds", "holds", "holds"]), (0.72, 0.79, 0.80, ["holds", "fails", "fails"]), (0.70, 0.70, 0.70, ["unclear", "unclear", "unclear"])])
def test_switch_claims_follow_the_recovered_share(onehot2kd, kd2onehot, kd, verdicts):
    rng = np.random.default_rng(0)
    rows = [dict(direction=direction, s=0.5, deviation=dict.fromkeys(("train", "test"), {"student-control": {"low_gap": dict(value=-1, low=-2, high=-0.5)}}),
                 **switch_distill.recovered(sums_of(rng, 5, 0.70, kd, switched, 4000), 0)) for direction, switched in (("onehot2kd", onehot2kd), ("kd2onehot", kd2onehot))]
    claims = switch_distill.switch_claims(rows)
    assert [row["verdict"] for row in claims] == verdicts + ["holds", "holds"]


def test_bad_switches_get_one_line(runs, tmp_path):
    cases = [(["--kd-weight", 0], "--kd-weight 0"), (["--teacher", "x", "--teacher-epochs", 1], "--teacher-epochs"), (["--teacher-epochs", 9], "beyond --epochs 2"), (["--teacher-epochs", 1, "--stop-epoch", 1], "--stop-epoch"), (["--out", "q{seed}"], "prefix"),
             (["--switch-at", 1.5], "--switch-at", "[0, 1]"), (["--direction", "sideways"], "--direction", "kd2onehot"), (["--window", -1], "--window"),
             (["--teacher", "absent"], "not a run folder"), (["--results", "/proc/r"], "/proc/r")]
    for extra, *words in cases:
        one_line_error(run_cli("switch_distill.py", *TINY, *extra, cwd=tmp_path), *words)
    assert not (tmp_path / "runs").exists()


# ---------------------------------------------------------------- eigenspace


EIGENSPACE_TINY = ["--subset", "60", "--points", "30", "--seeds", "0", "--steps", "6", "--width", "0.1", "--batch-size", "20", "--archs", "linear", "cnn"]


@settings(max_examples=300, deadline=None)
@given(st.floats(0.01, 100), st.floats(1e-4, 0.99), st.floats(0.01, 10), st.floats(0.01, 0.99))
def test_student_progresses_less_along_the_lower_eigenvalue_at_equal_progress(top, ratio, reach, share):
    teacher, student = eigenspace.equal_progress(top, top * ratio, reach / top, share)
    assert 0 < student < teacher < 1
    # both stand where the docstring says: invert their lower progress, compute the top one
    time_of = lambda progress, eigenvalue: -np.log1p(-progress) / eigenvalue
    at_top = share * eigenspace.flow_filter(top, reach / top)
    assert eigenspace.flow_filter(top, time_of(teacher, top * ratio)) == pytest.approx(at_top, rel=1e-6)
    own = student / eigenspace.flow_filter(top * ratio, reach / top)
    assert eigenspace.flow_filter(top, time_of(own, top * ratio)) == pytest.approx(share, rel=1e-6)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.floats(1e-3, 1), min_size=2, max_size=6), st.floats(0.05, 0.99), st.integers(1, 200), st.integers(1, 200))
def test_student_progresses_less_in_whole_steps_of_gradient_descent(spectrum, rate, teacher_steps, student_steps):
    eigenvalues = np.sort(spectrum)[::-1]
    lr = rate / eigenvalues[0]
    student = eigenspace.gd_filter(eigenvalues, student_steps, lr) * eigenspace.gd_filter(eigenvalues, teacher_steps, lr)
    stops = np.array([eigenspace.gd_filter(eigenvalues, k, lr) for k in range(teacher_steps + 1)])
    for high, low in itertools.combinations(range(len(eigenvalues)), 2):
        if (1 - lr * eigenvalues[high]) ** min(teacher_steps, student_steps) < 1e-9:
            continue   # so near to 1 that float64 cannot tell which of the two is ahead
        ahead = stops[stops[:, high] >= student[high], low]   # every stop of the teacher that is at least as far along the top one
        assert len(ahead) and (ahead >= student[low] * (1 - 1e-12)).all()


def test_exaggeration_fails_where_gradient_descent_overshoots():
    rho = np.sqrt((np.sqrt(5) - 1) / 2)   # 1 − ηλ = −ρ solves (1 − ρ⁴)² = 1 − ρ²
    eigenvalues = np.array([1 + rho, 0.5])
    student, teacher = eigenspace.gd_filter(eigenvalues, 4, 1.0) ** 2, eigenspace.gd_filter(eigenvalues, 2, 1.0)
    assert student[0] == pytest.approx(teacher[0], abs=1e-12) and student[1] > teacher[1] + 0.1


def test_theorem_finds_no_violation_and_skips_equal_eigenvalues():
    cases, violations, ratio = eigenspace.theorem(np.array([2.0, 1.0, 1.0, 0.1]))
    assert (cases, violations) == (5 * 5 * 9, 0) and 0 < ratio < 1   # 6 pairs, one of them equal


@pytest.mark.parametrize("rate", [0.3, 0.95, 1.7])
@pytest.mark.parametrize("n", [15, 60])   # 15 points in 20 dimensions: 5 directions without data
def test_gradient_descent_matches_its_closed_form(rate, n):
    rng = np.random.default_rng(n)
    x, y = rng.standard_normal((n, 20)) * np.geomspace(1, 1e-3, 20), rng.standard_normal((n, 3))
    lr = rate / np.linalg.eigvalsh(x.T @ x / n)[-1]
    teacher, closed = eigenspace.gd_simulation(x, y, lr, 400), eigenspace.gd_solution(x, y, lr, 400)
    np.testing.assert_allclose(teacher, closed, rtol=0, atol=1e-9)
    np.testing.assert_allclose(eigenspace.gd_simulation(x, x @ teacher, lr, 400), eigenspace.gd_solution(x, x @ closed, lr, 400), rtol=0, atol=1e-9)
    moment, target = x.T @ x / n, np.linalg.pinv(x) @ y   # the filter of the docstring, I − (I − ηΣ)^k, in full matrices
    dense = (np.eye(20) - np.linalg.matrix_power(np.eye(20) - lr * moment, 400)) @ target
    np.testing.assert_allclose(teacher, dense, rtol=0, atol=1e-9)


def test_gd_filter_refuses_steps_that_diverge_and_keeps_tiny_eigenvalues():
    with pytest.raises(ValueError, match="0, 2"):
        eigenspace.gd_filter(np.array([3.0]), 5, 1.0)
    np.testing.assert_allclose(eigenspace.gd_filter(np.array([1e-18, 0.0]), 100, 0.5), [5e-17, 0], rtol=1e-12)


def test_excess_risk_matches_dense_matrices():
    rng = np.random.default_rng(0)
    eigenvalues, beta, n, noise = np.array([2.0, 0.5, 0.1]), rng.standard_normal(3), 12, 0.7
    x = eigenspace.fixed_design(rng, n, eigenvalues)
    np.testing.assert_allclose(x.T @ x / n, np.diag(eigenvalues), atol=1e-12)
    steps, lr = 9, 0.4
    # β̂ = M·y, with M the map that the plain loop applies to each unit vector
    hat = eigenspace.gd_simulation(x, np.eye(n), lr, steps)
    bias, variance = eigenspace.excess_risk(eigenspace.gd_filter(eigenvalues, steps, lr), eigenvalues, beta, noise, n)
    assert bias == pytest.approx(np.mean((x @ (hat @ x @ beta - beta)) ** 2), rel=1e-9)
    assert variance == pytest.approx(noise ** 2 * np.sum((x @ hat) ** 2) / n, rel=1e-9)


def test_bias_variance_helps_or_hurts_by_where_the_signal_lies():
    result = eigenspace.bias_variance(0, draws=200)
    risk = {signal: {name: np.sum(values, axis=1) for name, values in exact.items()} for signal, exact in result["exact"].items()}
    assert risk["top"]["student"][-1] < risk["top"]["teacher"][-1] and risk["low"]["student"][0] > risk["low"]["teacher"][0]
    for signal in ("top", "low"):
        for name in ("teacher", "student"):
            np.testing.assert_allclose(result["simulated"][signal][name], risk[signal][name], rtol=0.15)
        assert (risk[signal]["best early stop"] <= risk[signal]["teacher"] * (1 + 1e-9)).all()
        assert (risk[signal]["best student"] <= risk[signal]["student"] * 1.01).all()   # the best of a grid of times


@settings(max_examples=100, deadline=None)
@given(st.integers(2, 4000), st.integers(2, 12))
def test_eigen_buckets_partition_the_directions(count, buckets):
    ends = eigenspace.bucket_ends(count, buckets)
    assert [direction for start, end in ends for direction in range(start, end)] == list(range(count)) and 1 <= len(ends) <= buckets
    assert all(end > start for start, end in ends)


def test_at_top_takes_the_first_crossing():
    path = np.array([[0.0, 0, 0], [0.4, 1, 10], [0.2, 2, 20], [0.8, 3, 30], [0.5, 4, 40]])
    np.testing.assert_allclose(eigenspace.at_top(path, [0.2, 0.4, 0.5, 0.8]), [[0.2, 0.5, 5], [0.4, 1, 10], [0.5, 2.5, 25], [0.8, 3, 30]])
    assert np.isnan(eigenspace.at_top(path, [0.9])).all()
    np.testing.assert_array_equal(eigenspace.at_top(path + 0.1, [0.05]), path[:1] + 0.1)   # there from the start


def test_compare_is_one_for_the_same_path_and_right_for_the_linear_theory():
    times, eigenvalues = np.linspace(0, 4, 4000)[:, None], np.array([1.0, 0.3, 0.1])
    with_accuracy = lambda progress: np.concatenate([progress, progress[:, :1]], axis=1)
    teacher = eigenspace.flow_filter(eigenvalues, times)
    paths = dict(teacher=with_accuracy(teacher), same=with_accuracy(teacher), student=with_accuracy(teacher * teacher[-1]))
    result = eigenspace.compare(paths, 3)
    np.testing.assert_allclose(result["ratio"]["same"], 1)
    top = np.array(result["levels"])
    assert top[-1] == pytest.approx(teacher[-1, 0] ** 2) and len(top) == 20
    for b in (1, 2):
        exact = eigenspace.equal_progress(1.0, eigenvalues[b], 4.0, top / teacher[-1, 0])
        np.testing.assert_allclose(np.array(result["curves"]["student"])[:, b - 1], exact[1] / exact[0], rtol=1e-3)
    assert result["mean"]["student"] < 1 and result["accuracy"]["student"] == pytest.approx(top[-1])


def test_first_layer_inputs_reproduce_the_layer():
    torch.manual_seed(0)
    images = torch.randn(5, 3, 8, 8)
    for model, layer in ((nn.Sequential(nn.Conv2d(3, 4, 3, padding=1, stride=2)), 0), (nn.Sequential(nn.Flatten(), nn.Linear(192, 4)), 1)):
        rows = eigenspace.first_layer_inputs(model[layer], images)
        outputs = rows @ model[layer].weight.flatten(1).T + model[layer].bias
        expected = model(images)
        expected = expected.flatten(2).transpose(1, 2).flatten(0, 1) if expected.dim() == 4 else expected
        torch.testing.assert_close(outputs, expected)
    conv = nn.Conv2d(3, 4, 3, padding=1)
    assert len(eigenspace.first_layer_inputs(conv, images, limit=130)) == 2 * 64   # images 0 and 3
    with pytest.raises(common.InputError, match="first layer"):
        eigenspace.first_layer(nn.Conv2d(4, 4, 3, groups=4))


def test_second_moment_eigenvectors_and_bucket_norms():
    rows = torch.randn(50, 6, generator=torch.Generator().manual_seed(0)) * torch.arange(1, 7)
    values, vectors = eigenspace.second_moment_eigenvectors(rows)
    moment = rows.double().T @ rows.double() / 50
    assert (values.diff() <= 0).all()
    torch.testing.assert_close(moment @ vectors, vectors * values)
    weights = torch.randn(3, 6, dtype=torch.float64)
    norms = eigenspace.bucket_norms(weights @ vectors, [(0, 2), (2, 6)])
    assert np.sum(np.square(norms)) == pytest.approx(float(weights.square().sum()))
    assert norms[0] == pytest.approx(float((weights @ vectors[:, :2]).norm()))


def test_descend_is_plain_gradient_descent():
    rng = np.random.default_rng(0)
    x, y = rng.standard_normal((30, 4)), rng.standard_normal((30, 2))
    inputs, targets, model = torch.tensor(x), torch.tensor(y), nn.Linear(4, 2, bias=False).double()
    nn.init.zeros_(model.weight)
    seen = eigenspace.descend(model, inputs, lambda outputs, index: (outputs - targets[index]).square().sum() / (2 * len(index)), 0.1, 25, 0,
                              "key", lambda model: model.weight.detach().clone().numpy().T)
    assert not seen[0].any()
    for k, weights in enumerate(seen):   # 25 steps are few enough that the first ten are all observed
        if k < 10:
            np.testing.assert_allclose(weights, eigenspace.gd_solution(x, y, 0.1, k), atol=1e-12)
    np.testing.assert_allclose(seen[-1], eigenspace.gd_solution(x, y, 0.1, 25), atol=1e-12)


def test_self_distillation_pairs_its_networks():
    images, labels = torch.randn(40, 5, generator=torch.Generator().manual_seed(0)), torch.arange(40) % 3
    starts, orders = {}, {}

    def build(key):
        model = nn.Linear(5, 3)
        nn.init.normal_(model.weight, generator=common.generator("test", key))
        nn.init.zeros_(model.bias)
        return model

    observer = lambda model: lambda model: model.weight.detach().clone()
    models, seen = eigenspace.self_distil(build, images, labels, 0.1, 8, 10, 4.0, 0, observer)
    assert list(seen) == list(eigenspace.NETWORKS)
    first = {name: path[0] for name, path in seen.items()}
    assert all(torch.equal(first["teacher"], first[name]) for name in ("student", "control"))
    assert torch.equal(first["student fresh"], first["control fresh"]) and not torch.equal(first["student fresh"], first["teacher"])
    again = eigenspace.self_distil(build, images, labels, 0.1, 8, 10, 4.0, 0, observer, networks=("teacher", "student"))[1]
    assert torch.equal(again["student"][-1], seen["student"][-1])
    # by hand: the first step of the student is a step on the distillation loss, on the teacher's first batch
    order = torch.randperm(40, generator=common.generator("eigenspace order", ("teacher", 0), 0))[:10]
    student = build(("teacher", 0))
    common.kd_loss(student(images[order]), models["teacher"](images[order]).detach(), 4.0).backward()
    torch.testing.assert_close(seen["student"][1], first["student"] - 0.1 * student.weight.grad)
    student.zero_grad()
    F.cross_entropy(student(images[order]), labels[order]).backward()
    torch.testing.assert_close(seen["control"][1], first["control"] - 0.05 * student.weight.grad)


@pytest.mark.parametrize("arch", ["mlp", "resnet8"])
def test_empirical_ntk_matches_a_plain_loop(arch):
    model, images = common.build_model(arch, 3, (8, 8, 1), 0.1), torch.randn(7, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    eigenspace.calibrate(model, images)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    kernel = eigenspace.empirical_ntk(model, images, 3, chunk=3)
    model.eval()
    slow = torch.zeros(7, 7, dtype=torch.float64)
    for c in range(3):
        rows = [torch.cat([g.flatten() for g in torch.autograd.grad(model(image[None])[0, c], list(model.parameters()))]).double() for image in images]
        slow += torch.stack(rows) @ torch.stack(rows).T / 3
    torch.testing.assert_close(kernel, slow, rtol=1e-4, atol=1e-4 * float(slow.diagonal().mean()))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_calibrated_eval_mode_is_train_mode_on_the_same_points():
    model, images = common.build_model("resnet8", 4, (8, 8, 1), 0.2), torch.randn(200, 1, 8, 8, generator=torch.Generator().manual_seed(1))
    eigenspace.calibrate(model, images)
    with torch.no_grad():
        torch.testing.assert_close(eigenspace.evaluate(model, images), model.train()(images), rtol=0.01, atol=0.01)
    assert all(module.momentum == 0.1 for module in model.modules() if isinstance(module, nn.BatchNorm2d))


def test_share_fitted_and_centring():
    generator = torch.Generator().manual_seed(0)
    target = eigenspace.centre(torch.randn(12, 4, generator=generator))
    assert float(target.sum(0).abs().max()) < 1e-12 and float(target.sum(1).abs().max()) < 1e-12
    vectors = torch.linalg.qr(torch.randn(12, 12, dtype=torch.float64, generator=generator))[0]
    buckets = [(0, 3), (3, 11)]
    assert eigenspace.share_fitted(target, target, vectors, buckets) == pytest.approx([1, 1])
    first = vectors[:, :3] @ vectors[:, :3].T @ target
    assert eigenspace.share_fitted(0.5 * first, target, vectors, buckets) == pytest.approx([0.5, 0])


def test_the_constructed_examples_help_and_hurt():
    many, few, signal = (eigenspace.example(name, 0, 4.0) for name in eigenspace.EXAMPLES)
    assert all(result["ratio"] < 1 for result in (many, few, signal))
    assert all(result["accuracy"]["student"] > result["accuracy"]["teacher"] for result in (many, few))
    assert signal["accuracy"]["student"] < signal["accuracy"]["teacher"]
    assert many["train_accuracy"] == 1 > few["train_accuracy"] and many["low_gap"] < -0.2 < few["low_gap"]


def test_eigenspace_runs_caches_and_refuses_other_settings(tmp_path):
    out = tmp_path / "out"
    ok(run_cli("eigenspace.py", *EIGENSPACE_TINY, "--out", out, cwd=tmp_path))
    claims = json.loads((out / "claims.json").read_text())
    assert {row["claim"].split(":")[0] for row in claims} >= {"linear", "digits, linear", "digits, cnn", "digits, NTK of resnet8, init", "digits, NTK of resnet8, end"}
    for level in ("linear", "classifiers", "ntk"):
        assert (out / f"{level}.png").stat().st_size > 10_000 and (out / f"{level}.pdf").exists() and (out / f"{level}.json").exists()
    kept = {path: path.read_bytes() for path in out.glob("seeds/*.json")}
    assert len(kept) == 4
    eigenspace.main([*EIGENSPACE_TINY, "--out", str(out), "--level", "classifiers"])   # the table still covers all levels
    assert json.loads((out / "claims.json").read_text()) == claims
    assert {path: path.read_bytes() for path in out.glob("seeds/*.json")} == kept
    one_line_error(run_cli("eigenspace.py", *EIGENSPACE_TINY, "--out", out, "--temperature", 2, cwd=tmp_path), "temperature", "--overwrite")
    assert {path: path.read_bytes() for path in out.glob("seeds/*.json")} == kept
    seed, = out.glob("seeds/linear-s0.json")
    for damaged in ("[]", '{"settings": 3}', '{"settings": {}, "result": {}}', "{"):
        seed.write_text(damaged)
        one_line_error(run_cli("eigenspace.py", *EIGENSPACE_TINY, "--out", out, "--level", "linear", cwd=tmp_path), "linear-s0.json")
    seed.write_bytes(kept[seed])
    (out / "ntk.json").write_text('{"claims": [1]}')
    one_line_error(run_cli("eigenspace.py", *EIGENSPACE_TINY, "--out", out, "--level", "linear", cwd=tmp_path), "ntk.json", "remove it")
    (out / "ntk.json").unlink()
    eigenspace.main([*EIGENSPACE_TINY, "--out", str(out), "--temperature", "2", "--overwrite", "--level", "classifiers", "--archs", "linear"])
    assert (out / "seeds/classifiers-linear-s0.json").read_bytes() != kept[out / "seeds/classifiers-linear-s0.json"]


@pytest.mark.parametrize("flags, message", [
    (["--memory-gb", "0.1"], "--memory-gb"),
    (["--level", "ntk", "--points", "2000"], "--points 2000"),
    (["--level", "classifiers", "--archs", "cnn", "--lr", "1e30"], "lower --lr"),
    (["--level", "classifiers", "--archs", "resnet9"], "unknown --arch"),
    (["--seeds", "1", "1"], "twice"),
])
def test_eigenspace_refuses_bad_input_before_it_writes(tmp_path, flags, message):
    with pytest.raises(common.InputError, match=message) as refusal:
        eigenspace.main([*EIGENSPACE_TINY, "--out", str(tmp_path / "out"), *flags])
    assert "\n" not in str(refusal.value) and not list(tmp_path.rglob("*.json"))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_ntk_memory_estimate_covers_the_measured_peak():
    # VmHWM, not ru_maxrss: the latter is inherited from the process that starts this one.
    code = ("import re, sys; sys.path.insert(0, sys.argv[1]); import torch, common, eigenspace\n"
            "model, images = common.build_model('resnet8', 2, (8, 8, 1), 1.0), torch.randn(600, 1, 8, 8)\n"
            "eigenspace.empirical_ntk(model, images[:60], 1)\n"   # libraries and buffers are loaded
            "peak = lambda: 1024 * int(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])\n"
            "before = peak(); eigenspace.empirical_ntk(model, images, 1)\n"
            "print(peak() - before, eigenspace.ntk_bytes(600, sum(p.numel() for p in model.parameters())))")
    grown, estimate = map(int, subprocess.run([sys.executable, "-c", code, str(Path(eigenspace.__file__).parent)], capture_output=True, text=True,
                                              check=True).stdout.split())
    assert grown < estimate < 4 * grown + 2 ** 28


def test_a_kernel_that_does_not_fit_is_refused_with_the_size_needed():
    with pytest.raises(common.InputError, match=r"[\d,]+ parameters needs \d+\.\d GiB.*--memory-gb"):
        eigenspace.main(["--level", "ntk", "--points", "1297", "--width", "8"])


# ---------------------------------------------------------------- denoise


def denoise_setup(n=24, classes=10, width=0.25):
    """A small ResNet-8 in eval mode with lived-in batch norm, images, soft targets."""
    model = common.build_model("resnet8", classes, (8, 8, 1), width, "denoise test")
    random = torch.Generator().manual_seed(0)
    images = torch.randn(n, 1, 8, 8, generator=random)
    model.train()(images)
    targets = torch.softmax(torch.randn(n, classes, generator=random), 1)
    return model.eval(), images, targets


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_denoise_loss_has_the_gradient_of_kd_and_of_cross_entropy(temperature):
    logits = torch.randn(6, 5, dtype=torch.float64, requires_grad=True)
    teacher, labels = torch.randn(6, 5, dtype=torch.float64), torch.randint(5, (6,))
    ours = torch.autograd.grad(denoise_gradients.soft_loss(logits, F.softmax(teacher / temperature, 1), temperature).mean(), logits)[0]
    torch.testing.assert_close(ours, torch.autograd.grad(common.kd_loss(logits, teacher, temperature), logits)[0])
    one_hot = denoise_gradients.soft_loss(logits, F.one_hot(labels, 5).double(), 1.0)
    torch.testing.assert_close(one_hot, F.cross_entropy(logits, labels, reduction="none"))


def test_denoise_per_example_gradients_of_a_linear_softmax_model_by_hand():
    model = nn.Sequential(nn.Flatten(), nn.Linear(4, 3)).eval()
    images, target, T = torch.randn(5, 1, 2, 2), torch.softmax(torch.randn(5, 3), 1), 2.5
    weight, bias = denoise_gradients.per_example_gradients(model, ["1.weight", "1.bias"], images, target, T)
    error = T * (torch.softmax(model(images) / T, 1) - target).detach()   # d/dz of T²·CE(q, softmax(z/T))
    torch.testing.assert_close(weight.view(5, 3, 4), error[:, :, None] * images.view(5, 1, 4))
    torch.testing.assert_close(bias, error)


def test_denoise_stream_equals_one_example_at_a_time():
    model, images, targets = denoise_setup()
    names = denoise_gradients.measured_parameters(model)
    parameters = dict(model.named_parameters())
    plain = torch.stack([torch.cat([g.flatten() for g in torch.autograd.grad(
        denoise_gradients.soft_loss(model(images[k:k + 1]), targets[k:k + 1], 3.0).sum(), [parameters[name] for name in names])]) for k in range(24)])
    weights = torch.rand(3, 24)
    mean, squares, inner, batches = denoise_gradients.stream(model, names, images, targets, 3.0, weights, chunk=7)
    close = lambda a, b: torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4 * float(b.abs().max()))
    close(mean, plain.mean(0))
    close(squares, plain.square().sum(1))
    close(inner, plain @ plain.mean(0))
    close(batches, weights @ plain)


def test_denoise_last_parameters_are_the_tail_of_the_full_gradient():
    model, images, targets = denoise_setup()
    every = denoise_gradients.measured_parameters(model)
    assert every == [name for name, _ in model.named_parameters()]
    last = denoise_gradients.measured_parameters(model, 200)
    assert last == every[-len(last):] and "fc.bias" in last and sum(dict(model.named_parameters())[name].numel() for name in last) <= 200
    full, tail = (denoise_gradients.mean_gradient(model, names, images, targets, 1.0) for names in (every, last))
    torch.testing.assert_close(tail, full[-len(tail):])


def test_denoise_noise_scale_is_unbiased_and_agrees_with_brute_force():
    random = np.random.default_rng(0)
    mean, sigma, n = np.array([1.0, 0, 0, 0]), np.array([2.0, 1, 1, 0.5]), 8
    g = mean + sigma * random.normal(size=(20000, n, 4))
    square_of_mean = (g.mean(1) ** 2).sum(-1)
    trace, signal = np.mean([denoise_gradients.noise_scale(a, b, n)[:2] for a, b in zip((g ** 2).sum(-1).mean(1), square_of_mean)], axis=0)
    assert trace == pytest.approx((sigma ** 2).sum(), rel=0.02)
    assert signal == pytest.approx(1.0, abs=0.05) and square_of_mean.mean() > 1.7   # the plain ‖mean‖² is far off
    # Brute force: E‖batch mean‖² = ‖G‖² + tr(Σ)/B at two batch sizes gives both unknowns.
    points = mean + sigma * random.normal(size=(4000, 4))
    small, big = (np.mean([(points[random.integers(4000, size=B)].mean(0) ** 2).sum() for _ in range(20000)]) for B in (2, 32))
    brute_trace, brute_signal = (small - big) / (1 / 2 - 1 / 32), (32 * big - 2 * small) / 30
    scale = denoise_gradients.noise_scale((points ** 2).sum(1).mean(), (points.mean(0) ** 2).sum(), 4000)[2]
    assert scale == pytest.approx(brute_trace / brute_signal, rel=0.05)
    assert denoise_gradients.noise_scale(5.0, 0.0, 10)[2] == denoise_gradients.UNRESOLVED * 10


def test_denoise_smoothing_matches_the_entropy():
    for entropy in (0.01, 0.8, 2.2):
        targets = denoise_gradients.smoothed(torch.tensor([2, 0]), 10, denoise_gradients.smoothing_of_entropy(entropy, 10))
        assert torch.special.entr(targets).sum(1).tolist() == pytest.approx([entropy] * 2, rel=1e-4)
        assert targets.argmax(1).tolist() == [2, 0] and targets.sum(1).tolist() == pytest.approx([1, 1])
    assert denoise_gradients.smoothing_of_entropy(math.log(10), 10) == pytest.approx(1.0, abs=1e-6)
    assert denoise_gradients.smoothing_of_entropy(0.0, 10) == 0.0


def test_denoise_batches_are_means_over_their_own_points():
    groups = {"few": np.arange(50) < 5, "rest": np.arange(50) >= 5}
    rows = denoise_gradients.batch_weights(groups, 32, 6, torch.Generator().manual_seed(0))
    assert set(rows) == {*denoise_gradients.BATCH_SIZES, 32, "few", "rest"}
    for key, weights in rows.items():
        torch.testing.assert_close(weights.sum(1), torch.ones(len(weights)))
        if key in groups:
            assert not weights[:, ~groups[key]].any()
        else:
            counts = weights * key
            torch.testing.assert_close(counts, counts.round())


def test_denoise_measure_against_the_whole_gradient_matrix():
    model, images, targets = denoise_setup(n=40)
    names, one_hot = denoise_gradients.measured_parameters(model), F.one_hot(torch.arange(40) % 10, 10).float()
    groups = {"first": np.arange(40) < 10, "others": np.arange(40) >= 10}
    rows = denoise_gradients.batch_weights(groups, 16, 4, torch.Generator().manual_seed(1))
    held_out = images[:20] + 0.1, one_hot[:20]
    result = denoise_gradients.measure(model, names, images, held_out, (images, one_hot), {"kd": (targets, 2.0)}, groups, rows, 16)["kd"]
    g = torch.cat(denoise_gradients.per_example_gradients(model, names, images, targets, 2.0), 1).double()
    G, spread = g.mean(0), (g - g.mean(0)).square().sum(1)
    assert result["trace"] == pytest.approx(float(spread.sum() / 39), rel=1e-3)
    assert result["noise_scale"] == pytest.approx(result["trace"] / float(G @ G - spread.sum() / 39 / 40), rel=1e-2)
    np.testing.assert_allclose(result["deviation"] / result["deviation"].sum(), (spread / spread.sum()).numpy(), rtol=1e-2)
    assert 0.25 * result["noise first"] + 0.75 * result["noise others"] == pytest.approx(result["noise_scale"], rel=1e-4)
    h = denoise_gradients.mean_gradient(model, names, *held_out, 1.0)
    steps = F.normalize(rows[16] @ g.float(), dim=1)
    assert result["first_order"] == pytest.approx(float((steps @ h / h.norm()).mean()), abs=1e-4)
    # The first-order decrease is what a short step really gives; the real steps are as long as the best one along −h.
    labels, length = held_out[1].argmax(1), result["step_length"]
    fall = lambda move: result["held_out_loss"] - denoise_gradients.moved_loss(model, names, move, held_out[0], labels)
    assert fall(-1e-2 * steps[0]) == pytest.approx(1e-2 * float(steps[0] @ h), rel=0.1, abs=1e-4)
    best = fall(-length * h / h.norm())
    assert best == pytest.approx(result["best_decrease"], rel=1e-3) and best > 0
    assert result["decrease"] == pytest.approx(np.mean([fall(-length * step) for step in steps]) / best, rel=1e-2)


def test_denoise_best_step_finds_the_minimum_of_a_parabola():
    length, fall = denoise_gradients.best_step(lambda x: 2 * x - x * x, slope=2, loss=8)   # best at 1, reached by halving 4
    assert (length, fall) == (1, 1)


def denoise_seed(noise):
    """One seed's table: noise {loss: array [8]} at every checkpoint, the same decreases for all losses; points 0, 1 the hardest."""
    entry = lambda values: dict(noise_scale=values.mean(), deviation=values, first_order=0.1, decrease=0.1,
                                **{f"cos_held_out {group}": 0.2 for group in denoise_gradients.QUARTERS})
    table = {(run, percent): {loss: entry(np.array(values, float)) for loss, values in noise.items()}
             for run in denoise_gradients.LOSSES for percent in (0, 100)}
    return dict(table=table, x=np.arange(8.0), gap=np.arange(8.0))


def test_denoise_claims_tell_where_the_reduction_is_and_agree_or_are_mixed():
    seed = denoise_seed(dict(onehot=[10, 10, 2, 2, 2, 2, 2, 2], kd=[1, 1, 2, 2, 2, 2, 2, 1.5], smooth=[1, 1, 1, 1, 1, 1, 1, 1]))
    assert denoise_gradients.compare(seed, "onehot")["i"] > 0 > denoise_gradients.compare(seed, "smooth")["ii"]
    assert denoise_gradients.compare(seed, "onehot")["iii"] == 0
    assert denoise_gradients.compare_hardest(seed)["i"] > 0
    everywhere = denoise_seed(dict(onehot=[3] * 8, kd=[1] * 8, smooth=[1] * 8))
    increase = denoise_seed(dict(onehot=[3, 3, 1, 1, 1, 1, 1, 1], kd=[1, 1, 3, 3, 3, 3, 3, 3], smooth=[1] * 8))
    assert denoise_gradients.compare_hardest(everywhere)["ii"] < 0 and denoise_gradients.compare_hardest(increase)["i"] < 0
    joint = lambda *verdicts: denoise_gradients.joint_claim("x", dict(zip(("i", "ii", "iii"), verdicts)))["verdict"]
    assert joint("holds", "holds", "holds") == "holds" and joint("fails", "fails", "fails") == "fails"
    assert joint("holds", "holds", "unclear") == "mixed" and joint("holds", "fails", "holds") == "mixed"


DENOISE = ["--width", "0.25", "--subset", "200", "--epochs", "2", "--batches", "2", "--temperatures", "1", "--quiet"]


def test_denoise_cli_writes_reuses_and_shares_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    flags = [*DENOISE, "--seeds", "0", "1", "--percents", "25", "50", "--points", "80", "--held-out", "100"]
    denoise_gradients.main(flags)
    out = tmp_path / "results/denoise"
    assert {file.name for file in out.iterdir()} == {"denoise.png", "denoise.pdf", "denoise.json", "claims.json", "claims.md"}
    first = (out / "denoise.json").read_bytes()
    result = json.loads(first)
    assert "80 of 200 training images" in result["gradients"] and result["accuracy"].keys() == {"teacher", "teacher of 1 epochs", "onehot", "kd", "smooth"}
    assert result["tables"].keys() == {"onehot", "kd", "smooth"} and result["tables"]["kd"].keys() == {"0", "25", "50", "100"}
    claims = json.loads((out / "claims.json").read_text())
    assert len(claims) == 16 and {row["verdict"] for row in claims} <= {"holds", "fails", "unclear", "mixed"}

    # A second call trains nothing and measures the same.
    capsys.readouterr()
    denoise_gradients.main(flags)
    assert capsys.readouterr().out.count("is finished already") == 10 and (out / "denoise.json").read_bytes() == first

    # The runs are those of train_teacher.py and train_student.py, bit for bit.
    shared = ["--width", "0.25", "--subset", "200", "--epochs", "2", "--quiet", "--seeds", "1"]
    train_teacher.main([*shared, "--out", "teacher"])
    train_student.main([*shared, "--teacher", "teacher", "--out", "kd"])
    for ours, theirs in (("teacher", "teacher"), ("denoise-kd", "kd")):
        a, b = (common.load_checkpoint(tmp_path / run / "checkpoint.pt")["model"] for run in (f"runs/digits-resnet8-{ours}-s1", theirs))
        assert all(torch.equal(a[key], b[key]) for key in a)

    # A state of another model is named.
    torch.save({"model": {}}, next((tmp_path / "runs/digits-resnet8-denoise-kd-s0").glob("snapshot-*.pt")))
    with pytest.raises(common.InputError, match="snapshot-.*does not fit resnet8"):
        denoise_gradients.main(flags)

    # A run without the snapshots is named, with the way out.
    with pytest.raises(common.InputError, match="lacks snapshot-.*--kd"):
        denoise_gradients.main([*flags, "--seeds", "1", "--teacher", "teacher", "--kd", "kd"])


@pytest.mark.parametrize("flags, message", [
    (["--variants-at", "33"], "--variants-at 33 is not measured"),
    (["--points", "5"], "too few"),
    (["--stop-epoch", "1"], "--stop-epoch"),
    (["--teacher-epochs", "9"], "must be less than --epochs 2"),
    (["--seeds", "0", "1", "--kd", "fixed"], "two runs share a folder"),
    (["--kd", "same", "--onehot", "same", "--overwrite"], "two runs share a folder"),
    (["--teacher", "nowhere"], "nowhere is not a run folder"),
])
def test_denoise_bad_input_is_one_clear_line(tmp_path, monkeypatch, flags, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(common.InputError, match=message):
        denoise_gradients.main([*DENOISE, *flags])


# ---------------------------------------------------------------- glue_distill


# Before transformers is imported: otherwise every absent model is asked for over the network for half a minute. Imported
# here, so that the fork server of run_cli has it loaded.
os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast, RobertaForMaskedLM, RobertaForSequenceClassification  # noqa: E402, F401

LANGUAGE = ["--teacher", "1x16", "--subset", "160", "--epochs", "2", "--mlm-epochs", "1", "--max-length", "32", "--quiet", "--device", "cpu", "--bootstrap", "100"]


def language(*flags):
    """glue_distill.py in this process, in the working folder."""
    glue_distill.main([*LANGUAGE, *map(str, flags)])


def state_of(run):
    state = common.load_checkpoint(Path(run) / "checkpoint.pt")
    history = [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_s")} for line in state["history"]]
    return state["model"], history


def same_text_run(one, other):
    (weights, history), (others, other_history) = state_of(one), state_of(other)
    return history == other_history and weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder where the embedded task was distilled into two students, for two seeds, in every mode."""
    folder = tmp_path_factory.mktemp("texts")
    ok(run_cli("glue_distill.py", *LANGUAGE, "--student", "1x16", "1x8", "--seeds", 0, 1, cwd=folder))
    return folder


def parsed_score(text):
    """The score of an embedded review, read off its words: a second, plain implementation of its documented rules."""
    strength = {word: sign * s for sign, words in ((1, glue_distill.GOOD), (-1, glue_distill.BAD)) for s, group in words.items() for word in group}
    def clause(words):
        score = next(strength[word] for word in words if word in strength)
        score *= next((factor for word, factor in glue_distill.INTENSIFIERS.items() if word and word in words), 1.0)
        return score * (-0.6 if "not" in words else 1.0)
    parts = re.split(" and | but | , ", text.removesuffix(" .").removeprefix("although "))
    values = [clause(part.split()) for part in parts]
    return sum(values) if " and " in text or len(values) == 1 else 0.4 * values[0] + values[1]


def test_embedded_reviews_have_the_documented_probabilities_and_labels_drawn_from_them():
    split = glue_distill.sentiment(4000, "train", 3)
    plain = 1 / (1 + np.exp(-2 * np.array([parsed_score(text) for text in split.first])))
    assert np.allclose(split.probability[:, 1], plain) and np.allclose(split.probability.sum(1), 1)
    for low in np.arange(0, 1, 0.2):   # calibrated within 4 standard errors
        inside = (plain >= low) & (plain < low + 0.2)
        assert inside.sum() > 100 and abs(split.labels[inside].mean() - plain[inside].mean()) < 4 * np.sqrt(0.25 / inside.sum())
    assert split.first == glue_distill.sentiment(4000, "train", 3).first
    assert len({tuple(glue_distill.sentiment(50, part, seed).first) for part in ("train", "test") for seed in (0, 1)}) == 4


GLUE_ROWS = {   # folder, header (None: the file has none), rows as (label, first, second)
    "cola": (["source", "label", "star", "sentence"], "{i}\t{label}\t*\t{first}", ["0", "1"]),
    "sst-2": (["sentence", "label"], "{first}\t{label}", ["0", "1"]),
    "mrpc": (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], "{label}\t{i}\t{i}\t{first}\t{second}", ["0", "1"]),
    "rte": (["index", "sentence1", "sentence2", "label"], "{i}\t{first}\t{second}\t{label}", ["entailment", "not_entailment"]),
    "qnli": (["index", "question", "sentence", "label"], "{i}\t{first}\t{second}\t{label}", ["entailment", "not_entailment"]),
    "qqp": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], "{i}\t1\t2\t{first}\t{second}\t{label}", ["0", "1"]),
    "mnli": (["index", "genre", "sentence1", "sentence2", "gold_label"], "{i}\tfiction\t{first}\t{second}\t{label}", ["entailment", "neutral", "contradiction"]),
    "wnli": (["index", "sentence1", "sentence2", "label"], "{i}\t{first}\t{second}\t{label}", ["0", "1"]),
}


def write_glue(root, task, n=24):
    """Files of GLUE's original layout with literal quotes, a form feed and a lone carriage return inside a sentence."""
    header, row, labels = GLUE_ROWS[task]
    folder = root / glue_distill.GLUE[task][0]
    folder.mkdir(parents=True)
    lines = [row.format(i=i, label=labels[i % len(labels)], first=f'he said " no {i}\x0c twice\r or', second=f"she replied {i} \"\"") for i in range(n)]
    content = "\n".join(([] if task == "cola" else ["\t".join(header)]) + lines) + "\r\n"
    for name in ("train", "dev_matched", "dev_mismatched") if task == "mnli" else ("train", "dev"):
        (folder / f"{name}.tsv").write_bytes((b"\xef\xbb\xbf" if task == "mrpc" else b"") + content.encode())
    return folder


@pytest.mark.parametrize("task", list(GLUE_ROWS))
def test_glue_files_are_read_with_their_quirks(task, tmp_path):
    folder = write_glue(tmp_path, task)
    data = glue_distill.load_task(task, tmp_path)
    train = data.splits["train"]
    classes = len(GLUE_ROWS[task][2])
    assert len(train.first) == 24 and train.first[5] == 'he said " no 5\x0c twice\r or' and train.labels.tolist() == [k % classes for k in range(24)]
    assert (train.second is None) == (task in ("cola", "sst-2")) and (train.second is None or train.second[5] == 'she replied 5 ""')
    assert set(data.splits) == {"train", "test"} | ({"mismatched"} if task == "mnli" else set()) and data.classes == classes

    lines = (folder / "train.tsv").read_bytes().split(b"\n")
    lines[7] = lines[7].split(b"\t")[0]
    (folder / "train.tsv").write_bytes(b"\n".join(lines))
    if task == "qqp":   # its published file has such rows
        assert len(glue_distill.load_task(task, tmp_path).splits["train"].first) == 23
    else:
        with pytest.raises(common.InputError, match=r"train.tsv, line 8: "):
            glue_distill.load_task(task, tmp_path)


HUB_COLUMNS = {   # of nyu-mll/glue on the hub
    "cola": ["sentence"], "sst2": ["sentence"], "mrpc": ["sentence1", "sentence2"], "rte": ["sentence1", "sentence2"], "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"], "mnli": ["premise", "hypothesis"], "wnli": ["sentence1", "sentence2"], None: ["text"]}


@pytest.mark.parametrize("task", [*GLUE_ROWS, "imdb", "ag_news"])
def test_without_local_files_a_task_comes_from_the_hub(task, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    def load(repository, config, split):
        assert repository == glue_distill.HUB.get(task, "nyu-mll/glue") and split in ("train", "test" if config is None else "validation", "validation_matched", "validation_mismatched")
        columns = {column: [f"{column} {split} {k}" for k in range(20)] for column in HUB_COLUMNS[config]}
        return datasets.Dataset.from_dict(dict(columns, label=[k % 2 for k in range(20)]))
    monkeypatch.setattr(datasets, "load_dataset", load)
    data = glue_distill.load_task(task, tmp_path)
    columns = HUB_COLUMNS[None if task in glue_distill.HUB else task.replace("-", "")]
    assert data.splits["train"].first[7] == f"{columns[0]} train 7" and data.splits["train"].labels[7] == 1 and data.facts["n_test"] == 20
    assert data.splits["train"].second is None if len(columns) == 1 else data.splits["test"].second[3].startswith(f"{columns[1]} validation")


def test_subsets_of_texts_are_nested_and_keep_their_positions(tmp_path):
    write_glue(tmp_path / "glue", "rte")   # also below data_dir/glue
    whole, large, small = (glue_distill.load_task("rte", tmp_path, n) for n in (0, 16, 10))
    assert set(small.index) < set(large.index) < set(whole.index) and len(small.index) == 10
    assert small.splits["train"].second == [whole.splits["train"].second[k] for k in small.index] and whole.facts["sha256"] != small.facts["sha256"]


def test_csv_files_and_folders_load(tmp_path):
    rows = "".join(f'"text, number {k}",other {k},{"good" if k % 3 else "bad"}\n' for k in range(60))
    (tmp_path / "one.csv").write_text("text,text2,label\n" + rows)
    data = glue_distill.load_task(f"csv:{tmp_path / 'one.csv'}")
    assert data.facts["n_train"] == 48 and data.facts["n_test"] == 12 and data.splits["train"].first[0].startswith("text, number")
    texts = data.splits["train"].first + data.splits["test"].first
    assert len(set(texts)) == 60 and all((int(t.split()[-1]) % 3 > 0) == bool(y) for s in data.splits.values() for t, y in zip(s.first, s.labels))
    folder = tmp_path / "imdb"   # a local folder serves instead of the network
    folder.mkdir()
    for part in ("train", "test"):
        (folder / f"{part}.csv").write_text("label,text\n" + "".join(f"{10 - 8 * (k % 2)},film {part} {k}\n" for k in range(20)))
    data = glue_distill.load_task("imdb", tmp_path)
    assert data.splits["test"].first[3] == "film test 3" and data.splits["test"].labels[:2].tolist() == [1, 0]   # "2" before "10"


def test_batches_cover_every_text_once_by_key_and_pad_less_than_random_ones():
    lengths = torch.randint(3, 60, (1003,), generator=torch.Generator().manual_seed(0))
    plan = glue_distill.batches(lengths, 16, "student", 0, 4)
    assert sorted(torch.cat(plan).tolist()) == list(range(1003)) and len(plan) == 63
    padded = lambda plan: sum(len(index) * int(lengths[index].max()) for index in plan)
    assert padded(plan) < 1.1 * int(lengths.sum()) < padded(list(torch.randperm(1003).split(16)))
    again = glue_distill.batches(lengths, 16, "student", 0, 4)
    assert all(torch.equal(a, b) for a, b in zip(plan, again))
    for other in (("teacher", 0, 4), ("student", 1, 4), ("student", 0, 5)):
        assert not torch.equal(torch.cat(plan), torch.cat(glue_distill.batches(lengths, 16, *other)))
    means = [lengths[index].double().mean().item() for index in plan]
    assert np.corrcoef(means[:-1], means[1:])[0, 1] < 0.5   # long and short batches are mixed


def small_model(data, name="1x16"):
    return glue_distill.prepare(name, data, SimpleNamespace(tokenizer=None, vocab_size=8000, max_length=32, device="cpu"))


def test_logits_and_masked_loss_equal_the_librarys_plain_ones():
    data = glue_distill.load_task("sentiment", subset=60)
    model = small_model(data)
    network = glue_distill.build_classifier(model, ("student", 0)).eval()
    for weights in network.parameters():
        weights.data *= 2   # as initialised, a network says nearly the same of every text
    tokens, split = model.tokens["train"], data.splits["train"]
    fast = glue_distill.logits_of(network, tokens, batch=7)
    for k in (0, 11, 59):
        with torch.no_grad():
            plain = network(**model.tokenizer(split.first[k], return_tensors="pt")).logits[0]
        assert torch.allclose(fast[k], plain, atol=1e-5)
    assert not torch.allclose(fast[0], fast[11], atol=1e-3)

    masked = RobertaForMaskedLM(model.config).eval()
    inputs = tokens.batch(torch.arange(20))
    special = torch.tensor(model.tokenizer.all_special_ids)
    corrupted, chosen = glue_distill.mask_tokens(inputs["input_ids"], special, model.tokenizer.mask_token_id, len(model.tokenizer), 0, 0)
    got = glue_distill.masked_loss(masked.roberta, masked.lm_head, dict(inputs, input_ids=corrupted), chosen, inputs["input_ids"][chosen])
    plain = masked(**dict(inputs, input_ids=corrupted), labels=torch.where(chosen, inputs["input_ids"], -100)).loss
    assert torch.allclose(got, plain, atol=1e-5)


def test_masks_are_drawn_as_published_and_afresh_in_every_step():
    ids = torch.randint(5, 300, (400, 100), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, 60:] = 0, 1
    special = torch.tensor([0, 1, 2, 3, 4])
    corrupted, chosen = glue_distill.mask_tokens(ids, special, 4, 300, 0, 0)
    assert not chosen[:, 0].any() and not chosen[:, 60:].any() and torch.equal(corrupted[~chosen], ids[~chosen])
    assert chosen[:, 1:60].double().mean() == pytest.approx(0.15, abs=0.01)
    assert (corrupted[chosen] == 4).double().mean() == pytest.approx(0.8, abs=0.03)
    assert (corrupted[chosen] == ids[chosen]).double().mean() == pytest.approx(0.1, abs=0.02)
    assert not torch.equal(chosen, glue_distill.mask_tokens(ids, special, 4, 300, 0, 1)[1])


def test_learning_rate_warms_up_and_decays_linearly():
    rates = [glue_distill.learning_rate(step, 1.0, 0.1, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and max(rates) == pytest.approx(1.0, abs=0.02) and rates[55] == pytest.approx(0.5) and rates[-1] == pytest.approx(1 / 90)
    assert glue_distill.learning_rate(0, 1.0, 0.0, 10) == 1.0


def test_text_runs_hold_what_was_trained_and_teach_from_their_stored_logits(texts):
    folder = texts / "runs"
    for name in ("1x16-teacher", "1x16-onehot", "1x16-1x16-kd", "1x16-1x8-kd", "1x16-1x16-onehot2kd-0.5", "1x16-1x8-kd2onehot-0.5"):
        run = folder / f"sentiment-{name}-s1"
        assert {"config.json", "metrics.jsonl", "checkpoint.pt", "logits.npz"} <= {file.name for file in run.iterdir()}
        line = common.last_metrics(run)
        assert line["epoch"] == 2 and line["step"] == 10 and 0 <= line["padding_share"] < line["padding_share_to_max"] < 1 and line["tokens_per_s"] > 0
    data = glue_distill.load_task("sentiment", subset=160)
    model = small_model(data)
    network = glue_distill.build_classifier(model, ("teacher", 0))
    network.load_state_dict(common.load_checkpoint(folder / "sentiment-1x16-teacher-s0" / "checkpoint.pt")["model"])
    arrays = common.read_npz(folder / "sentiment-1x16-teacher-s0" / "logits.npz", (*common.LOGITS, "test_probability"))
    assert np.allclose(arrays["train_logits"], glue_distill.logits_of(network, model.tokens["train"]), atol=1e-5)
    assert np.array_equal(arrays["train_labels"], data.splits["train"].labels) and np.array_equal(arrays["train_clean_labels"], data.splits["train"].probability.argmax(1))
    assert np.mean(arrays["test_logits"].argmax(1) == arrays["test_labels"]) == pytest.approx(common.last_metrics(folder / "sentiment-1x16-teacher-s0")["test_acc"])
    kd = common.read_json(folder / "sentiment-1x16-1x8-kd-s0" / "config.json")
    assert kd["facts"]["teacher_sha256"] == glue_distill.teacher_logits(folder / "sentiment-1x16-teacher-s0", data)[1] and kd["flags"]["temperature"] == 2
    kinds = [json.loads(line) for line in (folder / "sentiment-1x16-1x16-onehot2kd-0.5-s0" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["ce_weight"], line["kd_weight"]) for line in kinds] == [(1, 0), (0, 1)]


def test_teacher_and_student_share_pretrained_weights_but_no_head_order_or_result(texts):
    data = glue_distill.load_task("sentiment", subset=160)
    model = small_model(data)
    pretrained = RobertaForMaskedLM(model.config).state_dict()
    teacher, student, again = (glue_distill.build_classifier(model, (role, 0), pretrained) for role in ("teacher", "student", "student"))
    parts = [dict(network.named_parameters()) for network in (teacher, student, again)]
    for key in parts[0]:
        assert torch.equal(parts[1][key], parts[2][key])
        if key.startswith("roberta."):
            assert torch.equal(parts[0][key], parts[1][key]) and torch.equal(parts[0][key], pretrained[key]), key
    assert not torch.equal(teacher.classifier.dense.weight, student.classifier.dense.weight)
    alone = glue_distill.build_classifier(model, ("teacher", 0)), glue_distill.build_classifier(model, ("student", 0))
    assert not torch.equal(alone[0].roberta.encoder.layer[0].output.dense.weight, alone[1].roberta.encoder.layer[0].output.dense.weight)
    runs = [state_of(texts / "runs" / f"sentiment-{name}-s0")[0] for name in ("1x16-teacher", "1x16-onehot", "1x16-1x16-kd")]
    assert all(not torch.equal(a["classifier.dense.weight"], b["classifier.dense.weight"]) for k, a in enumerate(runs) for b in runs[:k])


def test_the_language_report_agrees_with_the_runs(texts):
    results = texts / "results" / "glue-sentiment"
    for student in ("1x16", "1x8"):
        assert {"fig1a.png", "fig1a.pdf", "deviation.json", "claims.json"} <= {file.name for file in (results / student).iterdir()}
        assert {"fig1b.png", "fig1b_curves.png", "switch.json", "claims.json"} <= {file.name for file in (results / student / "switch").iterdir()}
        rows = {(row["direction"], row["s"]): row for row in common.read_json(results / student / "switch" / "switch.json")["rows"]}
        accuracy = lambda name: np.mean([common.last_metrics(texts / "runs" / f"sentiment-{name}-s{seed}")["test_acc"] for seed in (0, 1)])
        assert rows["kd2onehot", 0.5]["accuracy"]["value"] == pytest.approx(accuracy(f"1x16-{student}-kd2onehot-0.5"))
        assert rows["onehot2kd", 0]["difference"]["value"] == pytest.approx(accuracy(f"1x16-{student}-kd") - accuracy(f"{student}-onehot"))
    report = common.read_json(results / "glue.json")
    assert [row["network"] for row in report["rows"]][:3] == ["teacher", "1x16 onehot", "1x16 kd"] and len(report["rows"][0]["test_acc"]) == 2
    bayes = glue_distill.load_task("sentiment").splits["test"]
    assert report["task"]["bayes_accuracy"] == np.mean((bayes.probability[:, 1] > 0.5) == bayes.labels)
    claim = common.read_json(results / "claims.json")[0]
    assert claim["measured"] == pytest.approx(np.mean(report["rows"][0]["test_acc"]) / report["task"]["bayes_accuracy"])


def test_text_branches_equal_runs_from_scratch_and_a_teacher_run_serves_again(texts, tmp_path):
    before = hashes(texts / "runs" / "sentiment-1x16-teacher-s0")
    ok(run_cli("glue_distill.py", *LANGUAGE, "--student", "1x16", "--mode", "onehot2kd", "kd2onehot", "--teacher-run", texts / "runs/sentiment-1x16-teacher-s{seed}",
               "--out", "alone", cwd=tmp_path))
    for direction in ("onehot2kd", "kd2onehot"):
        run, = tmp_path.glob(f"alone-*{direction}-0.5-s0")
        assert same_text_run(run, texts / "runs" / f"sentiment-1x16-1x16-{direction}-0.5-s0")
    assert before == hashes(texts / "runs" / "sentiment-1x16-teacher-s0") and not list(tmp_path.glob("alone-*teacher-s0"))


@pytest.mark.parametrize("kind, at", [("crash", 8), ("crash", 14), ("SIGTERM", 3), ("SIGTERM", 17)])
def test_an_interrupted_text_run_ends_in_the_same_weights(kind, at, texts, tmp_path, monkeypatch):
    """Steps 1-5 are the pretraining's, 6-15 the teacher's, 16-25 the distilled student's."""
    monkeypatch.chdir(tmp_path)
    real, calls = torch.nn.utils.clip_grad_norm_, []
    def interrupt(*args):
        calls.append(1)
        if len(calls) == at:
            if kind == "crash":
                raise MemoryError
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)
    flags = ["--student", "1x16", "--mode", "kd"]
    with pytest.raises(MemoryError if kind == "crash" else SystemExit) as stopped:
        language(*flags)
    assert kind == "crash" or stopped.value.code == 130
    language(*flags)
    for name in ("1x16-mlm", "1x16-teacher", "1x16-1x16-kd"):
        assert same_text_run(f"runs/sentiment-{name}-s0", texts / "runs" / f"sentiment-{name}-s0"), name
    # A crash costs the steps since the last epoch's end, a signal none; finished runs are left alone.
    assert len(calls) == 25 + ({8: 3, 14: 4}[at] if kind == "crash" else 0)
    done = {run: hashes(run) for run in Path("runs").iterdir()}
    language(*flags)
    assert done == {run: hashes(run) for run in Path("runs").iterdir()}


def save_pretrained(folder, family, classes=None):
    """A tiny saved model of a family with its tokenizer, as a user would have it on disk."""
    import transformers
    from tokenizers import BertWordPieceTokenizer
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=42)
    words = [text for text in glue_distill.sentiment(200, "train", 0).first]
    torch.manual_seed(5)
    if family == "roberta":
        tokenizer = glue_distill.byte_level_bpe(None, words, 400)
        config = transformers.RobertaConfig(vocab_size=len(tokenizer), type_vocab_size=1, **shape)
    else:
        pieces = BertWordPieceTokenizer()
        pieces.train_from_iterator(words, vocab_size=400, show_progress=False)
        folder.mkdir(parents=True)
        pieces.save_model(str(folder))
        tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
        config = transformers.BertConfig(vocab_size=len(tokenizer), **shape)
    kind = ("ForSequenceClassification" if classes else "ForMaskedLM")
    if classes:
        config.num_labels = classes
    model = getattr(transformers, {"roberta": "Roberta", "bert": "Bert"}[family] + kind)(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_a_saved_pretrained_model_is_distilled(family, tmp_path):
    saved = save_pretrained(tmp_path / family, family)
    pairs = glue_distill.sentiment(60, "test", 1)
    (tmp_path / "pairs.csv").write_text("text,text2,label\n" + "".join(f'"{a}","{b}",{y}\n' for a, b, y in zip(pairs.first, pairs.first[1:] + pairs.first[:1], pairs.labels)))
    task = f"csv:{tmp_path / 'pairs.csv'}"
    data = glue_distill.load_task(task)
    model = small_model(data, str(tmp_path / family))
    networks = [glue_distill.build_classifier(model, (role, 0)) for role in ("teacher", "student", "student")]
    weights, original = [network.state_dict() for network in networks], saved.state_dict()
    shared = [key for key in original if key.startswith(f"{family}.embeddings.w") or key.startswith(f"{family}.encoder.")]
    assert len(shared) > 10 and all(torch.equal(w[key], original[key]) for w in weights for key in shared)
    head = next(key for key in weights[0] if key.startswith("classifier") and key.endswith("weight"))
    assert not torch.equal(weights[0][head], weights[1][head]) and torch.equal(weights[1][head], weights[2][head])
    inputs = model.tokens["train"].batch(torch.tensor([0, 3]))
    plain = model.tokenizer([data.splits["train"].first[k] for k in (0, 3)], [data.splits["train"].second[k] for k in (0, 3)], padding=True, truncation=True,
                            max_length=32, return_tensors="pt")
    assert inputs.keys() == plain.keys() and all(torch.equal(inputs[key], plain[key]) for key in plain)   # BERT's pairs have segment ids
    ok(run_cli("glue_distill.py", *LANGUAGE, "--subset", 0, "--task", task, "--teacher", family, "--mode", "kd", "--lr", 1e-3, cwd=tmp_path))
    before, after = weights[1], state_of(tmp_path / "runs" / f"pairs-{family}-{family}-kd-s0")[0]
    assert before.keys() == after.keys() and not torch.equal(before[shared[0]], after[shared[0]]) and not list(tmp_path.glob("runs/*mlm*"))


def test_mnli_reports_both_dev_sets_and_cola_its_correlation(tmp_path):
    for task, columns in (("mnli", ["test_acc", "mismatched_acc"]), ("cola", ["test_mcc"])):
        write_glue(tmp_path, task, 30)
        ok(run_cli("glue_distill.py", *LANGUAGE, "--subset", 0, "--task", task, "--data-dir", tmp_path, "--mode", "onehot", "--epochs", 1, cwd=tmp_path))
        row = common.read_json(tmp_path / "results" / f"glue-{task}" / "glue.json")["rows"][0]
        assert [key for key in row if key.startswith(("test", "mismatched"))] == columns
    logits = common.read_npz(tmp_path / "runs" / "mnli-1x16-onehot-s0" / "logits.npz", ("mismatched_logits", "mismatched_labels"))
    assert logits["mismatched_logits"].shape == (30, 3)


def test_scores_are_the_textbook_ones():
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 1])
    logits = torch.stack([torch.zeros(8), torch.tensor([2.0, 1, -1, 1, -1, -2, -1, 3])], 1)   # 3 hits, 1 miss; 1 false alarm, 3 rejections
    got = glue_distill.scores(logits, labels)
    assert got["acc"] == 6 / 8 and got["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1)) and got["mcc"] == pytest.approx((3 * 3 - 1) / 16)
    assert got["loss"] == pytest.approx(F.cross_entropy(logits, torch.tensor(labels)).item())


def test_bad_language_input_gets_one_line(texts, tmp_path):
    write_glue(tmp_path / "narrow", "sst-2")
    torn = tmp_path / "narrow" / "SST-2" / "train.tsv"
    torn.write_text(torn.read_text().replace("sentence\tlabel", "text\tlabel"))
    (tmp_path / "no.csv").write_text("review,label\na,1\n")
    (tmp_path / "torn.csv").write_text('text,label\n"a",1\nb\n')
    save_pretrained(tmp_path / "three", "roberta", 3)
    save_pretrained(tmp_path / "mixed", "roberta")
    save_pretrained(tmp_path / "other", "bert")
    for file in (tmp_path / "other").glob("*token*"):   # BERT's tokenizer beside RoBERTa's weights
        shutil.copy(file, tmp_path / "mixed" / file.name)
    save_pretrained(tmp_path / "swapped", "roberta")   # a config beside weights that are not its own
    (tmp_path / "swapped" / "model.safetensors").write_bytes((tmp_path / "other" / "model.safetensors").read_bytes())
    save_pretrained(tmp_path / "wordless", "bert")
    for file in (tmp_path / "wordless").iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "voc").mkdir()
    cases = [(["--task", "sst2x"], "unknown --task", "sst-2"), (["--task", "rte"], "nyu-mll/glue", "train.tsv", "RTE"), (["--task", "imdb"], "train.csv", "imdb"),
             (["--task", "sst-2", "--data-dir", "narrow"], "lacks the column sentence"), (["--task", "csv:no.csv"], "lacks the column text"),
             (["--task", "csv:torn.csv"], "line 3"), (["--task", "csv:absent.csv"], "absent.csv"), (["--subset", 9999], "--subset 9999", "4000"),
             (["--teacher", "three"], "3 labels", "2"), (["--teacher", "mixed"], "another family"), (["--teacher", "other", "--max-length", 64], "--max-length 64", "42"),
             (["--teacher", "roberta-base"], "roberta-base", "vocab.json"), (["--teacher", "./absent"], "not a folder"), (["--teacher", "2x50"], "multiple of 32"),
             (["--tokenizer", "voc"], "vocab.json and merges.txt"), (["--mlm-text", "empty.txt"], "empty"), (["--teacher-run", "absent"], "not a run folder"),
             (["--teacher-run", texts / "runs/sentiment-1x16-teacher-s0", "--subset", 100, "--student", "1x8"], "other texts"),
             (["--teacher", "swapped"], "lacks the weights"), (["--teacher", "wordless"], "tokenizer", "vocab.json"),
             (["--teacher", "x/m", "--student", "y/m"], "end alike"), (["--out", "q{seed}"], "prefix"),
             (["--kd-weight", 0], "--kd-weight 0"), (["--switch-at", 1], "--switch-at"), (["--mode", "both"], "--mode", "onehot2kd"), (["--seeds", 1, 1], "twice")]
    for extra, *words in cases:
        one_line_error(run_cli("glue_distill.py", *LANGUAGE, *extra, cwd=tmp_path), *words)
    before = hashes(texts / "runs" / "sentiment-1x16-teacher-s0")
    one_line_error(run_cli("glue_distill.py", *LANGUAGE, "--epochs", 3, cwd=texts), "other settings", "flags.epochs: 2 there, 3 now", "--overwrite")
    assert before == hashes(texts / "runs" / "sentiment-1x16-teacher-s0")


# ---------------------------------------------------------------- intervals and claims


def test_seed_intervals_are_students_t():
    values = [0.7, 0.72, 0.69, 0.75, 0.71]
    mean, low, high = common.mean_interval(values)
    assert (low, high) == pytest.approx(scipy.stats.t.interval(0.95, 4, np.mean(values), scipy.stats.sem(values)))
    assert mean == pytest.approx(np.mean(values)) and common.mean_interval([0.5])[1:] == (-np.inf, np.inf)


@pytest.mark.parametrize("interval, above, expected", [
    ((1.1, 1.3), True, "holds"), ((0.8, 0.9), True, "fails"), ((0.9, 1.1), True, "unclear"), ((float("nan"), 2.0), True, "unclear"),
    ((0.8, 0.9), False, "holds"), ((1.1, 1.3), False, "fails"), ((0.9, 1.1), False, "unclear")])
def test_verdicts(interval, above, expected):
    assert common.verdict(interval, 1.0, above) == expected


def test_results_are_shown_with_figures_and_claims(tmp_path, capsys):
    (tmp_path / "digits" / "fig1a").mkdir(parents=True)
    common.save_claims(tmp_path / "digits" / "fig1a", [common.claim("slope exceeds 1", "> 1", 1.2, 1.1, 1.3, 1)])
    (tmp_path / "digits" / "fig1a" / "fig1a.png").write_bytes(b"")
    capsys.readouterr()
    common.show_results(tmp_path)
    shown = capsys.readouterr().out
    assert "| digits/fig1a: slope exceeds 1 | > 1 | 1.200 | 1.100 to 1.300 | holds |" in shown and "figure: " in shown
