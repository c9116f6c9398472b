"""A new user's walk, command by command: own pictures, own teacher, students and controls, Figure 1a; a notebook."""

from pathlib import Path

import runs

import numpy as np
import pytest
import torch
from helpers import HERE, ok, run_cli, run_process
from PIL import Image
from torchvision import models
from torchvision.transforms import functional

MEAN, STD = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
PICTURES = ["--data", "folder:pictures", "--image-size", 32, "--device", "cpu", "--quiet"]
STUDENT = [*PICTURES, "--arch", "mlp", "--width", 0.25, "--epochs", 2, "--batch-size", 16, "--seeds", 0, 1]


def plain(picture):
    """A picture as torchvision's own transforms give it to a network of 32×32 pixels."""
    image = functional.center_crop(functional.resize(picture, 32), 32)
    return functional.normalize(functional.to_tensor(image), MEAN, STD)


@pytest.fixture(scope="module")
def user(tmp_path_factory):
    """A folder with pictures of 48×40 pixels and a teacher in weights.pth, which plain PyTorch has trained on them."""
    folder = tmp_path_factory.mktemp("user")
    rng = np.random.default_rng(0)
    pictures = dict(train=[], val=[])
    for split, count in (("train", 24), ("val", 8)):
        for label, name in enumerate(("dark", "light")):
            place = folder / "pictures" / split / name
            place.mkdir(parents=True)
            for k in range(count):
                pixels = rng.integers(0, 160, (40, 48, 3)) + 95 * label
                Image.fromarray(pixels.astype(np.uint8)).save(place / f"{k:02}.png")
                pictures[split].append((Image.open(place / f"{k:02}.png").convert("RGB"), label))
    torch.manual_seed(0)
    model = models.shufflenet_v2_x0_5(num_classes=2)
    images = {split: torch.stack([plain(picture) for picture, _ in found]) for split, found in pictures.items()}
    labels = torch.tensor([label for _, label in pictures["train"]])
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(25):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(model(images["train"]), labels).backward()
        optimizer.step()
    model.eval()
    torch.save(dict(model=model.state_dict(), best_acc=np.float64(99.0)), folder / "weights.pth")
    with torch.no_grad():
        logits = {split: model(images[split]).numpy() for split in images}
    return folder, logits


def test_pictures_a_torchvision_teacher_students_controls_and_figure_1a(user):
    folder, logits = user
    teacher = ["--teacher", "weights.pth", "--teacher-arch", "torchvision:shufflenet_v2_x0_5", "--teacher-size", 32]
    said = ok(run_cli("train_student.py", *STUDENT, *teacher, "--out", "runs/kd", cwd=folder))
    assert "mean 0.485 0.456 0.406, std 0.229 0.224 0.225, size 32×32" in said and "of its training labels" in said
    seen = runs.read_npz(folder / "runs/kd-s1/teacher.npz")
    for split, expected in logits.items():
        name = "train_logits" if split == "train" else "test_logits"
        assert np.abs(seen[name] - expected).max() < 0.01, split
    ok(run_cli("train_student.py", *STUDENT, "--kd-weight", 0, "--ce-weight", 1, "--out", "runs/onehot", cwd=folder))
    students, controls = ([f"runs/{name}-s{seed}" for seed in (0, 1)] for name in ("kd", "onehot"))
    figure = ["--student", *students, "--bootstrap", 100]
    said = ok(run_cli("analyze_deviation.py", *figure, "--control", *controls, "--out", "figure", cwd=folder))
    assert "2 seeds" in said and "of its training labels" in said and (folder / "figure/fig1a.png").exists()


def test_own_logits_in_csv_with_labels_in_words(user):
    folder, logits = user
    np.savetxt(folder / "t.csv", logits["train"], delimiter=",")
    student = ["--teacher-logits", "t.csv", "--out", "runs/csv-s{seed}"]
    ok(run_cli("train_student.py", *STUDENT, *student, cwd=folder))
    arrays = runs.read_npz(folder / "runs/csv-s0/logits.npz")
    mine = logits["train"] + np.random.default_rng(1).normal(size=logits["train"].shape)
    torch.save({"logits": torch.from_numpy(mine), "epoch": 2}, folder / "mine.pt")
    words = np.array(["dark", "light"])[arrays["train_labels"]]
    np.savetxt(folder / "y.csv", words, fmt="%s")
    files = ["--teacher-logits", "t.csv", "--student-logits", "mine.pt:logits", "--labels", "y.csv", "--split", "val"]
    said = ok(run_cli("analyze_deviation.py", *files, "--bootstrap", 100, "--out", "own", cwd=folder))
    assert "dark = 0, light = 1" in said
    rows = runs.read_json(folder / "own/claims.json")
    assert rows[0]["claim"].startswith("val: slope") and rows[0]["verdict"] == "unclear: no control"


def test_a_script_runs_in_a_notebook(tmp_path):
    """Its standard output has no .reconfigure."""
    Path(tmp_path, "notebook.py").write_text(
        "import io, runpy, sys\n"
        "sys.argv, screen, sys.stdout = sys.argv[1:], sys.stdout, io.StringIO()\n"
        "sys.path.insert(0, sys.argv[0].rpartition('/')[0])\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "text, sys.stdout = sys.stdout.getvalue(), screen\n"
        "print(text)\n"
    )
    flags = [HERE / "train_teacher.py", "--epochs", 1, "--warmup", 0, "--subset", 200, "--width", 0.25, "--quiet"]
    flags += ["--device", "cpu"]
    said = ok(run_process(tmp_path / "notebook.py", *flags, cwd=tmp_path))
    assert "runs/digits-resnet8-teacher-s0: test" in said
