"""Teachers from elsewhere: files of weights, of other normalisations and sizes too, and files of logits."""

import json
import shlex

import numpy as np
import pytest
import torch
from helpers import Malicious, finished, ok, refused, run_cli, same_run, write_arrays

import analyze_deviation
import common
import engine
import runs
import train_student

DATA = ["--subset", "300", "--device", "cpu", "--quiet"]
FLAGS = [*DATA, "--epochs", "2", "--arch", "mlp", "--width", "0.25"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with a teacher of 8 epochs in t, and its student in kd."""
    folder = tmp_path_factory.mktemp("trained")
    ok(run_cli("train_teacher.py", *DATA, "--epochs", 8, "--out", "t", cwd=folder))
    ok(run_cli("train_student.py", *FLAGS, "--teacher", "t", "--out", "kd", cwd=folder))
    return folder


@pytest.fixture
def state(trained, tmp_path, monkeypatch):
    """The weights of that teacher; the working folder is empty."""
    monkeypatch.chdir(tmp_path)
    return runs.load_checkpoint(trained / "t" / "checkpoint.pt")["model"]


def distil(file, *more, arch="resnet8"):
    return [*FLAGS, "--teacher", file, "--teacher-arch", arch, "--out", "kd", *more]


@pytest.mark.parametrize("prefix, key", [("", None), ("module._orig_mod.", "state_dict")])
def test_a_file_of_weights_teaches_as_its_run_folder_does(prefix, key, state, trained):
    state = {prefix + name: value for name, value in state.items() if "num_batches_tracked" not in name}
    torch.save({key: state, "epoch": 3} if key else state, "t.pth")
    printed = finished(train_student, *distil("t.pth"))
    assert same_run(trained / "kd", "kd")
    facts = runs.read_config("kd")["facts"]
    recorded = runs.last_metrics(trained / "t")["test_acc"]
    assert facts["teacher_arch"] == "resnet8" and abs(facts["teacher_test_acc"] - recorded) < 1e-9
    assert f"{100 * recorded:.2f}% test accuracy here" in printed and "of its training labels" in printed
    assert "is finished already" in finished(train_student, *distil("t.pth"))


def test_the_figure_is_drawn_with_the_command_that_is_printed(state, trained):
    torch.save(state, "t.pth")
    printed = finished(train_student, *[word for word in distil("t.pth") if word != "--quiet"])
    words = shlex.split(printed.partition("next: python analyze_deviation.py ")[2].splitlines()[0])
    finished(analyze_deviation, *words, "--bootstrap", 100)
    drawn = json.load(open("results/fig1a/deviation.json"))["tables"]
    accuracy = drawn["train"]["fidelity"]["teacher"]["accuracy"]["value"]
    expected = runs.read_npz(trained / "t" / "logits.npz")
    assert np.isclose(accuracy, (expected["train_logits"].argmax(1) == expected["train_labels"]).mean())


def test_teachers_of_images_of_other_sizes_share_no_table(tmp_path):
    write_arrays(tmp_path / "rgb.npz")
    data = common.load_data(f"npz:{tmp_path / 'rgb.npz'}")
    torch.save(common.build_model("resnet8", 4, [16, 16, 3]).state_dict(), tmp_path / "t.pth")
    views, found = torch.zeros(len(data.y_train), dtype=torch.long), []
    for size in (16, 24, 16):
        model = engine.load_weights(tmp_path / "t.pth", "resnet8", data, size=size)
        teacher = engine.TeacherLogits(model, data, source="epochs", folder=tmp_path / "tables")
        teacher.follow(("student", 0), 0, views)
        teacher.ready()
        found.append((teacher.passes, teacher.table))
    assert [passes for passes, _ in found] == [1, 1, 0]
    assert torch.equal(found[0][1], found[2][1]) and not torch.allclose(found[0][1], found[1][1])


def test_another_normalisation_is_undone(tmp_path):
    write_arrays(tmp_path / "rgb.npz")
    data = common.load_data(f"npz:{tmp_path / 'rgb.npz'}")
    mean, std = [0.1, 0.2, 0.3], [0.5, 0.6, 0.7]
    model = common.build_model("mlp", 4, [16, 16, 3]).eval()
    torch.save(model.state_dict(), tmp_path / "t.pth")
    teacher = engine.load_weights(tmp_path / "t.pth", "mlp", data, mean, std)
    pixels = data.x_test.float() / 255
    wanted = model(((pixels - torch.tensor(mean)) / torch.tensor(std)).permute(0, 3, 1, 2))
    torch.testing.assert_close(engine.logits_of(teacher, data, data.x_test), wanted.detach(), rtol=1e-4, atol=1e-5)
    other = engine.load_weights(tmp_path / "t.pth", "mlp", data)
    assert engine.weights_hash(teacher.state_dict()) != engine.weights_hash(other.state_dict())


@pytest.mark.parametrize("size, side", [(None, 224), (64, 64)])
def test_a_torchvision_teacher_gets_images_of_its_own_size(size, side, tmp_path):
    write_arrays(tmp_path / "rgb.npz", n=4, side=32)
    data = common.load_data(f"npz:{tmp_path / 'rgb.npz'}")
    arch = "torchvision:shufflenet_v2_x0_5"
    torch.save(common.build_model(arch, 4, [64, 64, 3]).state_dict(), tmp_path / "t.pth")
    teacher = engine.load_weights(tmp_path / "t.pth", arch, data, size=size)
    shapes = []
    teacher.model.register_forward_pre_hook(lambda module, inputs: shapes.append(inputs[0].shape[-2:]))
    assert engine.logits_of(teacher, data, data.x_test).shape == (4, 4)
    assert shapes == [(side, side)]


@pytest.mark.parametrize(
    "file, more, words",
    [
        ("t.pth", ["--teacher-arch", "mlp"], ["t.pth does not fit mlp", "and", "check --teacher-arch"]),
        ("t.pth", ["--teacher-mean", "0.5"], ["--teacher-mean and --teacher-std belong together"]),
        ("t.pth", ["--teacher-mean", "1", "2", "--teacher-std", "1"], ["2 is outside [0, 1]"]),
        ("t.pth", ["--teacher-mean", ".1", ".2", "--teacher-std", "1"], ["--teacher-mean has 2 numbers: give 1"]),
        ("t.pth", ["--data", "npz:few.npz", "--subset", "0"], ["fc.weight is [10, 64] there and [4, 64] here"]),
        ("random.pth", [], ["random.pth is no better than chance here", "--teacher-arch"]),
        ("nan.pth", [], ["nan.pth gives NaN or infinite logits"]),
        ("list.pth", [], ["list.pth cannot be read (it holds no state dict)"]),
        ("evil.pth", [], ["evil.pth cannot be read", "never loaded"]),
        ("missing.pth", [], ["missing.pth does not exist"]),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(file, more, words, state, tmp_path):
    write_arrays("few.npz", side=8, channels=1)
    torch.save(state, "t.pth")
    torch.save(common.build_model("resnet8", 10, [8, 8, 1], seed=3).state_dict(), "random.pth")
    torch.save({name: value * float("nan") for name, value in state.items()}, "nan.pth")
    torch.save([1, 2], "list.pth")
    torch.save(dict(model=Malicious()), "evil.pth")
    line = refused(train_student, *distil(file, *more))
    assert all(word in line for word in words), line
    assert not (tmp_path / "kd").exists() and not (tmp_path / "ran").exists()


def test_the_architecture_of_a_file_must_be_given(state):
    torch.save(state, "t.pth")
    assert "give --teacher-arch" in refused(train_student, *FLAGS, "--teacher", "t.pth")
    line = refused(train_student, *FLAGS, "--teacher", "t", "--teacher-std", "1")
    assert "--teacher-std" in line and "--teacher-arch" in line


def test_logits_of_plain_images_stand_for_every_view(state, trained):
    data = common.load_data("digits", subset=300)
    logits = torch.randn(300, 10)
    teacher = engine.TeacherLogits(None, data, plain=logits)
    index, view = torch.tensor([5, 2, 5]), torch.tensor([0, 4, 8])
    teacher.follow(("student", 0), 0, None)
    teacher.ready()
    assert torch.equal(teacher(data.batch(index, view), index, view), logits[index])

    printed = finished(
        train_student, *FLAGS, "--teacher-logits", trained / "t" / "logits.npz:train_logits", "--out", "p"
    )
    facts = runs.read_config("p")["facts"]
    assert "un-augmented" in facts["teacher_views"] and facts["teacher_train_acc"] > 0.2
    assert "of its training labels" in printed and not same_run(trained / "kd", "p")
    # Of images without another view, they are what the live teacher gives.
    one_view = train_student.common.DATASETS["digits"]._replace(pad=0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(common.DATASETS, "digits", one_view)
        finished(train_student, *FLAGS, "--teacher", trained / "t", "--out", "live")
        finished(train_student, *FLAGS, "--teacher-logits", trained / "t" / "logits.npz:train_logits", "--out", "file")
    for name, weights in runs.load_checkpoint("live/checkpoint.pt")["model"].items():
        torch.testing.assert_close(runs.load_checkpoint("file/checkpoint.pt")["model"][name], weights)


@pytest.mark.parametrize(
    "change, words",
    [
        (lambda logits: logits[::-1].copy(), "is no better than chance here"),
        (lambda logits: np.exp(logits) / np.exp(logits).sum(1, keepdims=True), "has probabilities"),
        (lambda logits: 100 * np.exp(logits) / np.exp(logits).sum(1, keepdims=True), "rows that sum to 100"),
        (lambda logits: logits[:-1], "is [299, 10]: it must have the 300 training images and 10 classes"),
    ],
)
def test_logits_that_are_something_else_are_refused(change, words, state, trained):
    np.save("x.npy", change(runs.read_npz(trained / "t" / "logits.npz")["train_logits"]))
    assert words in refused(train_student, *FLAGS, "--teacher-logits", "x.npy", "--out", "p")


def test_a_run_that_was_stopped_goes_on(trained, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*FLAGS, "--epochs", "4", "--teacher", trained / "t"]
    finished(train_student, *flags, "--out", "whole")
    finished(train_student, *flags, "--stop-epoch", "1", "--out", "stopped")
    assert "is finished already" in finished(train_student, *flags, "--stop-epoch", "1", "--out", "stopped")
    finished(train_student, *flags, "--stop-epoch", "3", "--out", "stopped")
    assert "stop_epoch: 3 there, 2 now" in refused(train_student, *flags, "--stop-epoch", "2", "--out", "stopped")
    finished(train_student, *flags, "--out", "stopped")
    assert len(runs.read_metrics("stopped")) == 4
    whole, stopped = (runs.load_checkpoint(f"{name}/checkpoint.pt")["model"] for name in ("whole", "stopped"))
    assert all(torch.equal(whole[name], stopped[name]) for name in whole)
    assert "stop_epoch: None there, 3 now" in refused(train_student, *flags, "--stop-epoch", "3", "--out", "stopped")
