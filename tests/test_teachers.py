"""Teachers from elsewhere: files of weights, of other normalisations and sizes too, and files of logits."""

import argparse
from pathlib import Path

import analyze_deviation
import common
import denoise_gradients
import deviation
import engine
import runs
import switch_distill
import train_student

import numpy as np
import pytest
import torch
from helpers import Reached, finished, ok, outcome, refused, run_cli, same_run, write_arrays
from torchvision.transforms import functional

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
    """The weights of that teacher, also in t.pth of the working folder."""
    monkeypatch.chdir(tmp_path)
    weights = runs.load_checkpoint(trained / "t" / "checkpoint.pt")["model"]
    torch.save(weights, "t.pth")
    return weights


def distil(file, *more, arch="resnet8"):
    return [*FLAGS, "--teacher", file, "--teacher-arch", arch, "--out", "kd", *more]


def test_every_script_takes_a_run_folder_weights_and_logits(state, trained, monkeypatch):
    taught = []
    index = torch.arange(300)
    plain = torch.full((300,), 4)  # the view that is not shifted
    expected = torch.from_numpy(runs.read_npz(trained / "t" / "logits.npz")["train_logits"])

    def train(run, args, seed, data, loss_fn, teacher=None, *rest, **more):
        if teacher:  # the one-hot control comes first
            taught.append(teacher(data.batch(index, plain), index, plain))
            raise Reached

    monkeypatch.setattr(engine, "train_student", train)
    forms = (["--teacher", trained / "t"], ["--teacher", "t.pth", "--teacher-arch", "resnet8"])
    for module in (train_student, switch_distill, denoise_gradients):
        for form in (*forms, ["--teacher-logits", trained / "t" / "logits.npz:train_logits"]):
            assert outcome(module, *FLAGS, *form, "--out", "x")[0] == "accepted"
            torch.testing.assert_close(taught.pop(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("prefix, key", [("", None), ("module._orig_mod.", "state_dict"), ("net.", "model")])
def test_a_file_of_weights_teaches_as_its_run_folder_does(prefix, key, state, trained):
    state = {prefix + name: value for name, value in state.items() if "num_batches_tracked" not in name}
    beside = dict(epoch=np.float64(3), args=argparse.Namespace(lr=0.1))
    torch.save({key: state, **beside} if key else state, "t.pth")
    printed = finished(train_student, *distil("t.pth"))
    assert same_run(trained / "kd", "kd") and (f"under '{prefix}'" in printed) == bool(prefix)
    facts = runs.read_config("kd")["facts"]
    recorded = runs.read_metrics(trained / "t")[-1]["test_acc"]
    assert facts["teacher_arch"] == "resnet8" and abs(facts["teacher_test_acc"] - recorded) < 1e-9
    assert "of its training labels" in printed


def test_figure_1a_of_such_students_needs_no_teacher_flag(state, trained, monkeypatch):
    """Of weights on train and test points, of logits on the training points that they are of."""
    monkeypatch.setattr(deviation, "plot", lambda *_: None)
    expected = runs.read_npz(trained / "t" / "logits.npz")
    logits = ["--teacher-logits", trained / "t" / "logits.npz:train_logits", "--out", "file"]
    finished(train_student, *FLAGS, "--kd-weight", 0, "--ce-weight", 1, "--out", "onehot")
    for flags, name, splits in ((distil("t.pth"), "kd", ["train", "test"]), ([*FLAGS, *logits], "file", ["train"])):
        finished(train_student, *flags)
        finished(analyze_deviation, "--student", name, "--control", "onehot", "--bootstrap", 100, "--out", "r")
        drawn = runs.read_json("r/deviation.json")["tables"]
        assert list(drawn) == splits
        for split in splits:
            fit = (expected[f"{split}_logits"].argmax(1) == expected[f"{split}_labels"]).mean()
            assert np.isclose(drawn[split]["fidelity"]["teacher"]["accuracy"]["value"], fit)
    assert "give --teacher" in refused(analyze_deviation, "--student", trained / "kd", "--out", "never")


IMAGENET = dict(mean=[0.485, 0.456, 0.406], std=[0.229, 0.224, 0.225])
OTHER = dict(mean=[0.1, 0.2, 0.3], std=[0.5, 0.6, 0.7])


@pytest.mark.parametrize(
    "arch, flags, seen, side",
    [
        ("mlp", OTHER, OTHER, 40),
        ("torchvision:shufflenet_v2_x0_5", {}, IMAGENET, 224),
        ("torchvision:shufflenet_v2_x0_5", dict(size=64), IMAGENET, 64),
    ],
)
def test_a_teacher_sees_images_as_plain_pytorch_shows_them(arch, flags, seen, side, tmp_path, capsys):
    write_arrays(tmp_path / "rgb.npz", n=6, side=40)
    data = common.load_data(f"npz:{tmp_path / 'rgb.npz'}")
    model = common.build_model(arch, 4, [side, side, 3]).eval()
    torch.save(model.state_dict(), tmp_path / "t.pth")
    teacher = engine.load_weights(tmp_path / "t.pth", arch, data, **flags)
    images = functional.resize(data.x_test.permute(0, 3, 1, 2) / 255, [side, side], antialias=True)
    wanted = model(functional.normalize(images, **seen))
    torch.testing.assert_close(engine.logits_of(teacher, data, data.x_test), wanted, rtol=1e-3, atol=1e-4)
    numbers = [" ".join(map(str, seen[name])) for name in ("mean", "std")]
    assert f"mean {numbers[0]}, std {numbers[1]}, size {side}×{side}" in capsys.readouterr().out


@pytest.mark.parametrize(
    "file, more, words",
    [
        ("t.pth", ["--teacher-arch", "mlp"], ["t.pth does not fit mlp", "check --teacher-arch"]),
        ("t.pth", ["--teacher-mean", "0.5"], ["--teacher-mean and --teacher-std belong together"]),
        ("t.pth", ["--teacher-mean", ".1", ".2", "--teacher-std", "1"], ["--teacher-mean has 2 numbers: give 1"]),
        ("t.pth", ["--data", "npz:few.npz", "--subset", "0"], ["fc.weight", "number of classes (4 here)"]),
        ("two.pth", [], ["two.pth holds the network more than once, under 'a.' and 'b.'"]),
        ("random.pth", [], ["random.pth is no better than chance here", "--teacher-arch"]),
        ("nan.pth", [], ["nan.pth gives NaN or infinite logits"]),
        ("list.pth", [], ["list.pth cannot be read (it holds no state dict)"]),
        ("numbered.pth", [], ["numbered.pth cannot be read (it holds no state dict)"]),
        ("script.pt", [], ["it is a TorchScript archive", "torch.save(model.state_dict(), FILE)"]),
    ],
)
def test_weights_that_do_not_fit_are_refused_in_one_line(file, more, words, state, tmp_path):
    write_arrays("few.npz", side=8, channels=1)
    twice = {f"a.{name}": value for name, value in state.items()}
    twice.update({f"b.{name}": value for name, value in state.items()})
    torch.save(twice, "two.pth")
    torch.save(common.build_model("resnet8", 10, [8, 8, 1], seed=3).state_dict(), "random.pth")
    torch.save({name: value * float("nan") for name, value in state.items()}, "nan.pth")
    torch.save([1, 2], "list.pth")
    torch.save(dict(enumerate(state.values())), "numbered.pth")
    torch.jit.script(torch.nn.Linear(2, 2)).save("script.pt")
    line = refused(train_student, *distil(file, *more))
    assert all(word in line for word in words), line
    assert not (tmp_path / "kd").exists()


def test_flags_and_logits_of_a_teacher_that_do_not_fit_are_refused(state, trained):
    assert "give --teacher-arch" in refused(train_student, *FLAGS, "--teacher", "t.pth")
    line = refused(train_student, *FLAGS, "--teacher", trained / "t", "--teacher-std", "1")
    assert "--teacher-std" in line and "--teacher-arch" in line
    assert "give one of" in refused(train_student, *FLAGS, "--teacher", trained / "t", "--teacher-logits", "t.pth")
    assert "--teacher-arch" in refused(switch_distill, *FLAGS, "--teacher-arch", "mlp", "--out", "x")
    assert not Path("x-teacher-s0").exists()  # refused before it trains a teacher of its own
    good = runs.read_npz(trained / "t" / "logits.npz")["train_logits"]
    for changed, words in ((good[::-1], "is no better than chance here"), (good[:-1], "must have the 300")):
        np.save("x.npy", changed)
        assert words in refused(train_student, *FLAGS, "--teacher-logits", "x.npy", "--out", "p")


def test_logits_of_plain_images_stand_for_every_view(state, trained, monkeypatch):
    data = common.load_data("digits", subset=300)
    logits = torch.randn(300, 10)
    teacher = engine.TeacherLogits(None, data, plain=logits)
    index, view = torch.tensor([5, 2, 5]), torch.tensor([0, 4, 8])
    assert torch.equal(teacher(data.batch(index, view), index, view), logits[index])

    file = ["--teacher-logits", trained / "t" / "logits.npz:train_logits"]
    finished(train_student, *FLAGS, *file, "--out", "p")
    assert "un-augmented" in runs.read_config("p")["facts"]["teacher_views"] and not same_run(trained / "kd", "p")
    # Of images without another view, they are what the live teacher gives.
    monkeypatch.setitem(common.DATASETS, "digits", common.DATASETS["digits"]._replace(pad=0))
    finished(train_student, *FLAGS, "--teacher", trained / "t", "--out", "live")
    finished(train_student, *FLAGS, *file, "--out", "file")
    for name, weights in runs.load_checkpoint("live/checkpoint.pt")["model"].items():
        torch.testing.assert_close(runs.load_checkpoint("file/checkpoint.pt")["model"][name], weights)
