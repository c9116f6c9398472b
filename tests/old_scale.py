"""Speed and scale: every fast path against the slow one, several runs and processes, images in files, the benchmark.

Helpers and fixtures are those of test_smoke.py. No test depends on time; those that need CUDA are skipped without it.
"""
import contextlib
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import common
from test_smoke import HERE, TINY, hashes, ok, one_line_error, run_cli, runs, same_run, weights_and_metrics, write_arrays   # noqa: F401


# ---------------------------------------------------------------- speed


def small_teacher(data, precision="fp32", source="live", seed="teacher"):
    model = common.build_model("resnet8", data.classes, data.facts["image"], 0.25, seed).to(memory_format=torch.channels_last).eval()
    return common.TeacherLogits(model, data, precision, source)


@pytest.fixture
def image_data(tmp_path):
    write_arrays(tmp_path / "d.npz", n=90, side=12, classes=4)
    return common.load_data(f"npz:{tmp_path / 'd.npz'}")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("source", ["views", "epochs"])
def test_tables_hold_the_logits_of_a_live_teacher(source, precision, image_data, tmp_path):
    data = image_data
    live, cached = (small_teacher(data, precision, kind) for kind in ("live", source))
    for epoch in range(2):
        order, views = common.epoch_stream(data, "student", 3, epoch)
        table = cached.epoch_table(tmp_path / "logits", ("student", 3), epoch, views)
        assert live.epoch_table(tmp_path / "logits", ("student", 3), epoch, views) is None
        for index in order.split(32):
            images = data.batch(index, views[index])
            expected = live(images, index, views[index], None)
            got = cached(images, index, views[index], table)
            assert got.dtype == expected.dtype == torch.float32 and expected.std() > 0.01
            assert torch.allclose(got, expected, atol=1e-5 if precision == "fp32" else 0.05 * expected.abs().max())
    assert len(list((tmp_path / "logits").rglob("*.npz"))) == (2 if source == "epochs" else 0)


def test_epoch_tables_are_reused_and_damaged_ones_made_again(image_data, tmp_path, capsys):
    data, stream, folder = image_data, ("student", 0), tmp_path / "logits"
    views = common.epoch_stream(data, *stream, 0)[1]
    first = small_teacher(data, source="epochs").epoch_table(folder, stream, 0, views)
    file, = folder.rglob("*.npz")
    second = small_teacher(data, source="epochs")
    second.fill = None   # calling it would fail
    assert torch.equal(second.epoch_table(folder, stream, 0, views), first)
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    with open(tmp_path / "short.npz", "wb") as short:
        np.savez(short, float32=first.numpy()[:-1])
    for bad in (good[:100], bytes(flipped), (tmp_path / "short.npz").read_bytes()):
        file.write_bytes(bad)
        assert torch.equal(small_teacher(data, source="epochs").epoch_table(folder, stream, 0, views), first)
        assert "made again" in capsys.readouterr().out and file.read_bytes() == good
    # Another teacher, another stream, another epoch and another precision have tables of their own.
    small_teacher(data, source="epochs", seed=5).epoch_table(folder, stream, 0, views)
    small_teacher(data, source="epochs").epoch_table(folder, ("student", 1), 0, views)
    small_teacher(data, source="epochs").epoch_table(folder, stream, 1, views)
    small_teacher(data, "bf16", source="epochs").epoch_table(folder, stream, 0, views)
    assert len(list(folder.rglob("epoch-*.npz"))) == 5


def test_the_source_of_teacher_logits_is_the_one_with_fewest_passes(image_data, tmp_path, monkeypatch):
    args = SimpleNamespace(precision="fp32")
    choose = lambda choice, students, streams: common.teacher_source(choice, image_data, args, students, streams, tmp_path / "runs" / "r")
    assert image_data.n_views == 162
    assert choose("auto", 80, 80) == "live" and choose("auto", 160, 80) == "epochs" and choose("auto", 400, 200) == "views"
    assert choose("off", 400, 200) == "live" and choose("on", 80, 80) == "epochs" and choose("on", 0, 0) == "live"
    monkeypatch.setattr(common, "free_memory", lambda device: 100)
    assert choose("auto", 400, 400) == "live" and choose("on", 400, 400) == "epochs"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    assert choose("auto", 400, 200) == "live"
    with pytest.raises(common.InputError, match="neither into memory nor on the disk: use auto"):
        choose("on", 400, 200)


def last_weights(run):
    return common.load_checkpoint(run / "checkpoint.pt")["model"]


def close(one, other, atol):
    return all(torch.allclose(one[key].float(), other[key].float(), atol=atol) for key in one)


def test_students_end_the_same_with_and_without_a_table_and_together(runs):
    """--teacher-cache and --together change the speed and nothing else."""
    common_flags = [*TINY, "--seeds", 0, 1, "--teacher", "runs/teacher-s{seed}"]
    output = ok(run_cli("train_student.py", *common_flags, "--teacher-cache", "on", "--out", "runs/table", cwd=runs))
    assert "a table of each epoch's views" in output
    ok(run_cli("train_student.py", *common_flags, "--teacher-cache", "off", "--together", "--out", "runs/side", cwd=runs))
    for seed in (0, 1):
        alone = last_weights(runs / "runs" / f"kd-s{seed}")
        assert close(alone, last_weights(runs / "runs" / f"table-s{seed}"), 1e-5)
        side = last_weights(runs / "runs" / f"side-s{seed}")
        assert all(torch.equal(alone[key], side[key]) for key in alone)
    # The table of all views, which pays from nine epochs on digits.
    args = [*TINY, "--epochs", 12, "--subset", 100, "--teacher", "runs/tiny-teacher"]
    ok(run_cli("train_teacher.py", *TINY, "--subset", 100, "--out", "runs/tiny-teacher", cwd=runs))
    assert "a table of all 9 views" in ok(run_cli("train_student.py", *args, "--out", "runs/views", cwd=runs))
    assert "teacher forward in every step" in ok(run_cli("train_student.py", *args, "--teacher-cache", "off", "--out", "runs/live", cwd=runs))
    assert close(last_weights(runs / "runs" / "views"), last_weights(runs / "runs" / "live"), 1e-4)


def test_runs_of_one_view_seed_share_views_and_tables(runs):
    flags = [*TINY, "--seeds", 0, 1, "--teacher", "runs/teacher-s0", "--view-seed", 7]
    assert "2 passes of the teacher for 4 epochs" in ok(run_cli("train_student.py", *flags, "--out", "shared/kd", cwd=runs))
    assert len(list((runs / "shared" / "teacher-logits").rglob("*.npz"))) == 2   # one for each epoch, for both seeds
    ok(run_cli("train_student.py", *flags, "--teacher-cache", "off", "--out", "shared/live", cwd=runs))
    for seed in (0, 1):
        shared = last_weights(runs / "shared" / f"kd-s{seed}")
        assert close(shared, last_weights(runs / "shared" / f"live-s{seed}"), 1e-5)
        assert not close(shared, last_weights(runs / "runs" / f"kd-s{seed}"), 1e-5)
    one_line_error(run_cli("train_student.py", *flags, "--view-seed", 8, "--out", "shared/kd", cwd=runs), "view_seed: 7 there, 8 now")


def test_runs_side_by_side_stop_together_and_go_on(tmp_path):
    flags = [*TINY, "--epochs", "300", "--subset", "64", "--eval-every", "300", "--save-every", "300"]   # a step in each epoch
    command = [*flags, "--seeds", "0", "1", "2", "--together", "--out", "t"]
    process = subprocess.Popen([sys.executable, str(HERE / "train_teacher.py"), *command], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               text=True, env=dict(os.environ, OMP_NUM_THREADS="1"))
    while len(list(tmp_path.glob("t-s?/metrics.jsonl"))) < min(2, common.cores()):
        assert process.poll() is None
        time.sleep(0.02)
    process.send_signal(signal.SIGTERM)
    output, errors = process.communicate()
    assert process.returncode == 130 and "continue with: python train_teacher.py" in output and "Traceback" not in errors, output + errors
    assert all(common.load_checkpoint(run / "checkpoint.pt")["step"] > 0 for run in tmp_path.glob("t-s?"))
    ok(run_cli("train_teacher.py", *command, cwd=tmp_path))
    ok(run_cli("train_teacher.py", *flags, "--seed", 0, "--out", "alone", cwd=tmp_path))
    assert same_run(tmp_path / "t-s0", tmp_path / "alone") and (tmp_path / "t-s2" / "logits.npz").exists()


def test_an_error_in_one_of_several_runs_is_one_line(tmp_path):
    write_arrays(tmp_path / "d.npz")
    (tmp_path / "t-s1").mkdir()
    (tmp_path / "t-s1" / "notes.txt").write_text("mine")
    one_line_error(run_cli("train_teacher.py", *TINY, "--data", f"npz:{tmp_path}/d.npz", "--subset", 60, "--seeds", 0, 1, "--together", "--out", "t", cwd=tmp_path), "not a run folder")
    assert (tmp_path / "t-s1" / "notes.txt").read_text() == "mine"


def stepper(data, fast=False, captured=False, steps=20):
    """Weights and sums after `steps` steps with KD from step 7 to 14, from a table that changes in step 12."""
    device = data.device
    model = common.build_model("resnet8", data.classes, data.facts["image"], 0.25, "student").to(device).to(memory_format=torch.channels_last)
    teacher = small_teacher(data, source="epochs")
    teacher.model.to(device)
    lr = torch.tensor(0.01, device=device)
    optimizer = torch.optim.SGD(model.parameters(), lr if captured else 0.01, 0.9, weight_decay=5e-4, nesterov=True)
    sums = torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.long, device=device)
    loss_fn = lambda z, y, t, ce, kd: ce * F.cross_entropy(z, y) + (kd * common.kd_loss(z, t, 4.0) if t is not None else 0.0)
    step = common.training_step(model, optimizer, data, loss_fn, teacher, "fp32", sums, fast)
    if captured:
        step = common.captured_step(step, model, optimizer, 32, sums)
    streams = [[part.to(device) for part in common.epoch_stream(data, "student", 0, epoch)] for epoch in range(steps)]
    tables = [teacher.fill(torch.arange(len(views), device=device), views) for _, views in streams]
    for k, (order, views) in enumerate(streams):
        for group in optimizer.param_groups:
            group["lr"] = lr.fill_(0.01 / (k + 1)) if captured else 0.01 / (k + 1)
        index = order[:32]
        ce, kd = (0.25, 0.75) if 7 <= k < 14 else (1.0, 0.0)
        step(index, views[index], ce, kd, tables[k] if kd else False)
    return model.state_dict(), sums


@pytest.mark.skipif(not (shutil.which("c++") or shutil.which("g++")), reason="torch.compile needs a C++ compiler")
def test_the_compiled_step_equals_the_eager_step_and_is_compiled_once(image_data):
    from torch._dynamo.utils import counters
    weights, sums = stepper(image_data)
    fast, fast_sums = stepper(image_data, fast=True)
    assert close(weights, fast, 5e-4) and torch.allclose(sums[0], fast_sums[0], atol=1e-3) and abs(sums[1] - fast_sums[1]) <= 2
    compiled = counters["stats"]["unique_graphs"]
    stepper(image_data, fast=True)
    if hasattr(torch._dynamo.config, "inline_inbuilt_nn_modules") and torch._dynamo.config.inline_inbuilt_nn_modules:   # torch >= 2.5
        assert counters["stats"]["unique_graphs"] == compiled   # another model of the same architecture runs the same code


class FakeGraphs:
    """CUDA graphs as far as `captured_step` can tell, on a CPU: what is called inside `graph` is kept, not run; replay runs it."""

    def __init__(self, monkeypatch):
        self.capturing = None
        nothing = SimpleNamespace(wait_stream=lambda stream: None)
        for name, value in dict(Stream=lambda: nothing, current_stream=lambda: nothing, stream=lambda stream: contextlib.nullcontext(),
                                CUDAGraph=lambda: SimpleNamespace(kept=[]), graph=self.graph).items():
            monkeypatch.setattr(torch.cuda, name, value)

    @contextlib.contextmanager
    def graph(self, graph):
        self.capturing = graph
        graph.replay = lambda: [call() for call in graph.kept]
        yield
        self.capturing = None

    def wrap(self, real):
        def training_step(*setup):
            step = real(*setup)
            return lambda *args: self.capturing.kept.append(lambda: step(*args)) if self.capturing else step(*args)
        return training_step


def test_the_captured_step_equals_the_eager_step(image_data, monkeypatch):
    """The logic around the capture, with graphs that are simulated: buffers, tables, and what the warm-up has to put back."""
    weights, sums = stepper(image_data)
    fake = FakeGraphs(monkeypatch)
    monkeypatch.setattr(common, "training_step", fake.wrap(common.training_step))
    captured, captured_sums = stepper(image_data, captured=True)
    assert close(weights, captured, 1e-6) and torch.allclose(sums[0], captured_sums[0]) and sums[1] == captured_sums[1]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graphs_equal_the_eager_step(tmp_path):
    write_arrays(tmp_path / "d.npz", n=90, side=12, classes=4)
    data = common.load_data(f"npz:{tmp_path / 'd.npz'}", device="cuda")
    weights, sums = stepper(data)
    for fast in (False, True):
        captured, captured_sums = stepper(data, fast=fast, captured=True)
        assert close(weights, captured, 1e-3) and torch.allclose(sums[0], captured_sums[0], atol=1e-2)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_runs_together_equal_runs_alone(tmp_path):
    flags = ["--epochs", 2, "--width", 0.25, "--subset", 300, "--quiet", "--precision", "fp32", "--seeds", 0, 1]
    for name, more in (("eager", ["--no-fast"]), ("alone", []), ("together", ["--together"])):
        ok(run_cli("train_teacher.py", *flags, *more, "--out", name, cwd=tmp_path))
    for seed in (0, 1):
        eager = last_weights(tmp_path / f"eager-s{seed}")
        assert close(eager, last_weights(tmp_path / f"alone-s{seed}"), 1e-3) and close(eager, last_weights(tmp_path / f"together-s{seed}"), 1e-3)


def test_bf16_is_chosen_only_where_the_cpu_has_it(monkeypatch):
    parser = common.Parser("")
    common.add_flags(parser)
    chosen = lambda *flags: common.resolve(parser.parse_args(["--device", "cpu", *flags])).precision
    for hardware in (False, True):
        monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: hardware, raising=False)
        monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)
        assert chosen("--data", "cifar100") == ("bf16" if hardware else "fp32")
        assert chosen("--data", "digits") == "fp32" and chosen("--precision", "bf16") == "bf16"


def test_benchmark_compares_the_ways_of_training(tmp_path):
    ok(run_cli("benchmark.py", "--arch", "resnet8", "--epochs", 1, "--device", "cpu", "--together", 2, "--workers", 1, "--out", "b", cwd=tmp_path))
    report = json.loads((tmp_path / "b" / "benchmark.json").read_text())
    assert [(row["loss"], row["way"]) for row in report["rows"]] == [
        (loss, way) for loss in ("one-hot", "KD") for way in ("peers", "peers, no workers", "eager", *["cache"] * (loss == "KD"), "2 together")]
    for row in report["rows"]:
        assert row["images_per_s"] == pytest.approx(sum(1297 / seconds[0] for seconds in row["seconds"]))
        assert 0 < row["share_of_bandwidth"] and 0 < row["share_of_matmul"] < 1 and row["speedup"] > 0
    assert (tmp_path / "b" / "benchmark.md").read_text().count("\n| resnet8") == 9 and (tmp_path / "b" / "benchmark.png").stat().st_size > 1000


def test_benchmark_counts_the_work_of_a_model():
    """ResNet-20 on CIFAR: 41M multiply-adds forward (He et al. 2016)."""
    import benchmark
    flops, elements = benchmark.costs("resnet20", benchmark.random_data(128, "cpu"))
    assert flops == pytest.approx(2 * 40.8e6, rel=0.01) and 3e5 < elements < 4e5


# ---------------------------------------------------------------- several processes, files instead of memory


def hold(folder, go, held):
    with common.locked(Path(folder)):
        held.set()
        go.wait()


def test_a_run_folder_serves_one_process_at_a_time(runs, tmp_path):
    context = multiprocessing.get_context("forkserver")
    go, held = context.Event(), context.Event()
    shutil.copytree(runs / "runs" / "teacher-s0", tmp_path / "t")
    (tmp_path / "t" / "logits.npz").unlink()   # unfinished
    before = hashes(tmp_path / "t")
    process = context.Process(target=hold, args=(str(tmp_path / "t"), go, held))
    process.start()
    held.wait()
    for extra in ([], ["--overwrite"]):
        refused = run_cli("train_teacher.py", *TINY, *extra, "--out", "t", cwd=tmp_path)
        one_line_error(refused, "being trained by another process", f"process {process.pid} on", "--out")
    assert {name: digest for name, digest in hashes(tmp_path / "t").items() if name != ".lock"} == before
    process.kill()   # it cannot remove its lock file: the next one is not kept out by that
    process.join()
    assert (tmp_path / "t" / ".lock").exists()
    ok(run_cli("train_teacher.py", *TINY, "--out", "t", cwd=tmp_path))
    assert sorted(hashes(tmp_path / "t")) == ["checkpoint.pt", "config.json", "logits.npz", "metrics.jsonl"]
    with pytest.raises(ZeroDivisionError), common.locked(tmp_path / "new"):
        1 / 0
    assert not (tmp_path / "new").exists()   # nothing was written into it


def test_shards_train_every_seed_once(tmp_path):
    """As jobs of a Slurm array do, without knowing of each other."""
    seeds = ["--seeds", 0, 1, 2]
    for i in range(2):
        ok(run_cli("train_teacher.py", *TINY, *seeds, "--shard", f"{i}/2", "--out", "t", cwd=tmp_path))
        assert {run.name for run in tmp_path.glob("t*")} == ({"t-s0", "t-s2"} if i == 0 else {"t-s0", "t-s1", "t-s2"})
    assert "no seed is left" in ok(run_cli("train_teacher.py", *TINY, "--seeds", 0, "--shard", "1/2", "--out", "t", cwd=tmp_path))
    switch = [*TINY, *seeds[:3], "--switch-at", 0, 1, "--bootstrap", 100, "--out", "sw"]
    for i in range(3):
        output = ok(run_cli("switch_distill.py", *switch, "--shard", f"{i}/3", cwd=tmp_path))
        assert "no seed is left" in output if i == 2 else "this shard is trained" in output
    assert not list(tmp_path.rglob("*.png"))
    before = {run: hashes(run) for run in tmp_path.glob("sw-*")}
    assert len(before) == 6
    assert ok(run_cli("switch_distill.py", *switch, cwd=tmp_path)).count("is finished already") == 6
    assert {run: hashes(run) for run in tmp_path.glob("sw-*")} == before and list(tmp_path.rglob("fig1b.png"))
    for bad in ("2/2", "-1/2", "1", "a/b", "1/0"):
        one_line_error(run_cli("train_teacher.py", *TINY, "--shard", bad, cwd=tmp_path), "--shard")


def write_images(root, counts=(20, 6), classes=3):
    for split, count in zip(("train", "val"), counts):
        for c in range(classes):
            (root / split / f"class{c}").mkdir(parents=True)
            for k in range(count):
                pixels = np.random.RandomState(1000 * c + k + count).randint(0, 256, (14 + k % 3, 12, 3)).astype(np.uint8)
                Image.fromarray(pixels).save(root / split / f"class{c}" / f"{k}.png")


def test_images_streamed_from_files_train_as_those_in_memory(tmp_path, monkeypatch):
    write_images(tmp_path / "images")
    shared = ["--data", "folder:images", "--image-size", 12, "--width", 0.25, "--epochs", 2, "--batch-size", 16, "--subset", 48, "--device", "cpu", "--quiet", "--precision", "fp32"]
    for loader in ("device", "stream"):
        ok(run_cli("train_teacher.py", *shared, "--loader", loader, "--out", f"t-{loader}", cwd=tmp_path))
    # 60 images are fewer than the sample of the statistics, so that all numbers are the same.
    assert same_run(tmp_path / "t-device", tmp_path / "t-stream")
    logits = [common.read_npz(tmp_path / f"t-{loader}" / "logits.npz", common.LOGITS) for loader in ("device", "stream")]
    assert all(np.array_equal(logits[0][key], logits[1][key]) for key in common.LOGITS)
    ok(run_cli("train_student.py", *shared, "--loader", "stream", "--teacher", "t-stream", "--teacher-cache", "on", "--out", "kd", cwd=tmp_path))
    one_line_error(run_cli("train_student.py", *shared, "--loader", "device", "--teacher", "t-stream", "--out", "kd2", cwd=tmp_path), "sha256", "--data")
    one_line_error(run_cli("train_teacher.py", *TINY, "--loader", "stream", "--out", "x", cwd=tmp_path), "--loader stream", "folder:PATH")
    for free, streams in ((10 ** 9, False), (10 ** 4, True)):   # auto
        monkeypatch.setattr(common, "free_memory", lambda device: free)
        assert common.load_data(f"folder:{tmp_path / 'images'}", image_size=12, loader="auto").streams == streams


def test_torchrun_gives_the_same_result_as_one_process(tmp_path):
    flags = ["--arch", "cnn", "--epochs", 3, "--width", 0.5, "--subset", 300, "--batch-size", 64, "--quiet", "--device", "cpu"]   # no batch normalisation
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    run = lambda script, *args: subprocess.run([*torchrun, str(HERE / script), *map(str, flags), *args], cwd=tmp_path, capture_output=True, text=True,
                                               env=dict(os.environ, OMP_NUM_THREADS="1"))
    output = ok(run("train_teacher.py", "--out", "two"))
    assert output.count("two: test") == 1   # the first process speaks and writes for both
    ok(run_cli("train_teacher.py", *flags, "--out", "one", cwd=tmp_path))
    ok(run("train_student.py", "--teacher", "one", "--out", "kd-two"))
    ok(run_cli("train_student.py", *flags, "--teacher", "one", "--out", "kd-one", cwd=tmp_path))
    for name in ("", "kd-"):
        (one, lines), (two, other_lines) = (weights_and_metrics(tmp_path / f"{name}{count}") for count in ("one", "two"))
        assert close(one, two, 1e-5) and [line["train_acc"] for line in lines] == [line["train_acc"] for line in other_lines]
        assert [line["train_loss"] for line in lines] == pytest.approx([line["train_loss"] for line in other_lines], rel=1e-5)
    assert "is finished already" in ok(run("train_teacher.py", "--out", "two"))
    refused = run("switch_distill.py", "--out", "sw")
    assert refused.returncode and "start this script without it" in refused.stderr and not list(tmp_path.glob("sw*"))
    assert "does not split over 2 processes" in run("train_teacher.py", "--batch-size", "63", "--out", "odd").stderr
