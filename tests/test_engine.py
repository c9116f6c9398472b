"""The engine by itself: exact resume, what a checkpoint holds, teacher logits from tables, compiled and captured steps.

No test depends on time; those that need CUDA are skipped without it.
"""

import contextlib
import dataclasses
import functools
import shutil
import signal
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn as nn
import torch.nn.functional as F
from helpers import (
    SOAK,
    TINY,
    Crash,
    hashes,
    outcome,
    weights_and_metrics,
    without_times,
    write_arrays,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import common
import engine
import runs
import train_student
import train_teacher

# ---------------------------------------------------------------- resume


def loss_fn(model, images, labels, teacher_logits, ce_weight, kd_weight):
    logits = model(images).float()
    return ce_weight * F.cross_entropy(logits, labels), logits


def train(run, weights_at=engine.one_hot, dropout=0.0, **more):
    """Train four epochs of four steps as train_teacher.py does; returns the weights and the lines of metrics."""
    parser = runs.Parser("")
    common.add_flags(parser)
    args = engine.resolve(parser.parse_args([*TINY, "--epochs", "4"]))
    data = common.data_from(args)
    model = common.build_model("mlp" if dropout else "resnet8", 10, data.facts["image"], args.width, ("teacher", 0))
    if dropout:
        model.insert(1, nn.Dropout(dropout))
    with runs.locked(run):
        runs.start_run(run, args, "teacher", 0, data, model)
        engine.train_images(run, model, data, args, "teacher", 0, loss_fn, weights_at, **more)
    return model.state_dict(), runs.read_metrics(run)


def interrupted(kind, stop_at):
    """A weights_at of one-hot training that is interrupted in the step `stop_at`. kind: a signal, or `Crash`."""

    def weights_at(step):
        if step == stop_at and kind is Crash:
            raise Crash
        if step == stop_at:
            signal.raise_signal(kind)
        return 1.0, 0.0

    return weights_at


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(run folder, weights, metrics) of the tiny run that nothing interrupted."""
    run = tmp_path_factory.mktemp("engine") / "whole"
    return run, *train(run, snapshots=(8, 9))


@pytest.mark.parametrize("kind", [signal.SIGINT, signal.SIGTERM, Crash])
@pytest.mark.parametrize("stop_at", [1, 9, 11])  # of 16; after the last step of an epoch, a signal waits for its line
def test_an_interrupted_run_ends_in_the_same_weights(kind, stop_at, whole, tmp_path, monkeypatch):
    if kind is Crash:
        monkeypatch.setattr(engine, "SAVE_SECONDS", 0)
    run = tmp_path / "cut"
    with pytest.raises((SystemExit, Crash)) as caught:
        train(run, interrupted(kind, stop_at), snapshots=(8, 9))
    assert kind is Crash or caught.value.code == 130
    # A signal lets the step end first.
    assert runs.load_checkpoint(run / "checkpoint.pt")["step"] == (stop_at if kind is Crash else stop_at + 1)
    assert not (run / "logits.npz").exists()
    (run / ".checkpoint.pt.tmp").write_bytes(b"half")  # as a kill during a write leaves it
    resumed, metrics = train(run, snapshots=(8, 9))
    folder, weights, lines = whole
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)
    assert without_times(metrics) == without_times(lines)
    assert hashes(run).keys() == hashes(folder).keys() and hashes(run)["logits.npz"] == hashes(folder)["logits.npz"]
    state, other = (runs.load_checkpoint(place / "snapshot-9.pt") for place in (run, folder))
    assert all(torch.equal(state["model"][key], other["model"][key]) for key in weights)


def test_a_crash_before_the_first_checkpoint_begins_again(whole, tmp_path):
    with pytest.raises(Crash):
        train(tmp_path / "cut", interrupted(Crash, 9))  # less than SAVE_SECONDS after the start
    assert sorted(hashes(tmp_path / "cut")) == ["config.json", "metrics.jsonl"]
    weights, metrics = train(tmp_path / "cut")
    assert all(torch.equal(weights[key], whole[1][key]) for key in weights)
    assert without_times(metrics) == without_times(whole[2])


def test_dropout_resumes_exactly(tmp_path):
    weights, _ = train(tmp_path / "whole", dropout=0.3)
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", interrupted(signal.SIGINT, 9), dropout=0.3)
    torch.manual_seed(123)  # what the process did in between must not matter
    resumed, _ = train(tmp_path / "cut", dropout=0.3)
    assert all(torch.equal(weights[key], resumed[key]) for key in weights)


def test_a_diverging_run_stops_and_keeps_its_checkpoint(tmp_path):
    run = tmp_path / "t"
    with pytest.raises(SystemExit):  # a good first part
        train(run, interrupted(signal.SIGTERM, 8))
    before = hashes(run)
    with pytest.raises(runs.InputError, match="became NaN or infinite by step .*lower --lr.*good checkpoint is kept"):
        train(run, lambda step: (float("inf"), 0.0))
    assert hashes(run)["checkpoint.pt"] == before["checkpoint.pt"] and not (run / "logits.npz").exists()


def test_a_checkpoint_holds_the_random_state_of_its_own_device_alone(tmp_path):
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1, 0.9)
    torch.manual_seed(7)
    engine.save_state(tmp_path / "c.pt", model, optimizer, step=3, history=[], spent=0.5, sums=torch.ones(3))
    state = runs.load_checkpoint(tmp_path / "c.pt")
    assert sorted(state) == ["history", "model", "optimizer", "rng", "spent", "step", "sums"]  # no cuda_rng
    expected = torch.rand(3)
    restored = engine.restore_state(tmp_path / "c.pt", model, optimizer, 4, 8, torch.device("cpu"))
    assert torch.equal(torch.rand(3), expected) and restored[:3] == (3, [], 0.5)


@pytest.mark.parametrize("epochs", [1, 2, 7, 20, 21, 50, 100, 450])
@pytest.mark.parametrize("images", [500, 10_000, 50_000])
def test_a_share_of_the_epochs_is_evaluated_evenly_the_first_and_the_last_among_them(epochs, images):
    data = SimpleNamespace(y_train=range(images), y_test=range(10_000))
    args = SimpleNamespace(epochs=epochs, eval_every=None)
    chosen = [epoch for epoch in range(1, epochs + 1) if engine.evaluated(epoch, args, data)]
    assert chosen[0] == 1 and chosen[-1] == epochs and min(epochs, 5) <= len(chosen) <= 21
    if len(chosen) > 6:  # 5, and the first
        assert len(chosen) == min(epochs, 21) or (len(chosen) - 1.5) * 10_000 / 3 < 0.04 * epochs * images
    gaps = np.diff(chosen[1:])  # beyond the first
    assert not len(gaps) or gaps.max() - gaps.min() <= 1
    args.eval_every = 3
    assert [epoch for epoch in range(1, 8) if engine.evaluated(epoch, args, data)] == [3, 6]


def test_metrics_have_a_test_accuracy_where_it_was_measured(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = [*TINY, "--subset", 64, "--epochs", 5, "--stop-epoch", 4, "--eval-every", 3, "--out", "t"]
    assert outcome(train_teacher, *flags)[0] == "finished"
    lines = runs.read_metrics("t")
    assert [line["epoch"] for line in lines if "test_acc" in line] == [3, 4]  # the last one always
    assert lines[3]["best_test_acc"] == max(lines[2]["test_acc"], lines[3]["test_acc"])


# ---------------------------------------------------------------- teachers


def test_a_teacher_is_loaded_as_it_was_at_its_end_or_before_a_step_that_was_kept(whole, tmp_path):
    source, weights, lines = whole
    run, data = tmp_path / "t", common.load_data("digits", subset=300)
    shutil.copytree(source, run)
    for step, kept in ((None, weights), (16, weights), (8, None), (9, None)):
        teacher = engine.load_teacher(run, data, step)
        kept = kept or runs.load_checkpoint(run / f"snapshot-{step}.pt")["model"]
        assert engine.weights_hash(teacher.state_dict()) == engine.weights_hash(kept) and not teacher.training
    with pytest.raises(runs.InputError, match="snapshot-5.pt does not exist: .*--snapshot-at 0.3125"):
        engine.load_teacher(run, data, 5)
    changed = runs.load_checkpoint(run / "snapshot-8.pt")
    changed["model"]["fc.weight"] = -changed["model"]["fc.weight"]
    torch.save(changed, run / "snapshot-8.pt")
    with pytest.raises(runs.InputError, match="test accuracy here but recorded"):  # at the end of the second epoch
        engine.load_teacher(run, data, 8)


def test_metrics_without_steps_load_or_are_one_line(whole, tmp_path):
    run, data = tmp_path / "t", common.load_data("digits", subset=300)
    shutil.copytree(whole[0], run)
    runs.write_metrics(run, [{key: value for key, value in line.items() if key != "step"} for line in whole[2]])
    for step in (None, 9):
        with contextlib.suppress(runs.InputError):
            engine.load_teacher(run, data, step)


# ---------------------------------------------------------------- device


@pytest.mark.parametrize("hardware", [False, True])
def test_bf16_is_chosen_only_where_the_cpu_has_it(hardware, monkeypatch):
    parser = runs.Parser("")
    common.add_flags(parser)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: hardware, raising=False)
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False)

    def chosen(*flags):
        return engine.resolve(parser.parse_args(["--device", "cpu", *flags])).precision

    assert chosen("--data", "cifar100") == ("bf16" if hardware else "fp32")
    assert chosen("--data", "digits") == "fp32" and chosen("--precision", "bf16") == "bf16"


# ---------------------------------------------------------------- teacher logits


@pytest.fixture
def data(tmp_path):
    write_arrays(tmp_path / "d.npz", n=90, side=12, classes=4)
    return common.load_data(f"npz:{tmp_path / 'd.npz'}")


def small_teacher(data, precision="fp32", source="live", folder="nowhere", seed="teacher"):
    model = common.build_model("resnet8", data.classes, data.facts["image"], 0.25, seed)
    model = model.to(data.device).to(memory_format=torch.channels_last).eval()
    return engine.TeacherLogits(model, data, precision, source, folder)


def table_of(teacher, stream=("student", 0), epoch=0):
    """The table that a teacher makes or reads for an epoch of a stream."""
    teacher.follow(stream, epoch, common.epoch_stream(teacher.data, *stream, epoch)[1])
    teacher.ready()
    return teacher.table


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("source", ["views", "epochs"])
def test_tables_hold_the_logits_of_a_live_teacher(source, precision, data, tmp_path):
    live = small_teacher(data, precision)
    cached = small_teacher(data, precision, source, tmp_path / "logits")
    places = set()
    for epoch in range(2):
        order, views = common.epoch_stream(data, "student", 3, epoch)
        assert table_of(live, ("student", 3), epoch) is None
        places.add(table_of(cached, ("student", 3), epoch).data_ptr())
        for index in order.split(32):
            images = data.batch(index, views[index])
            expected, got = (teacher(images, index, views[index]) for teacher in (live, cached))
            assert got.dtype == expected.dtype == torch.float32 and expected.std() > 0.01
            tolerance = 1e-5 if precision == "fp32" else 0.05 * expected.abs().max().item()
            assert torch.allclose(got, expected, atol=tolerance)
    assert len(places) == 1  # where a captured graph reads
    assert len(list((tmp_path / "logits").rglob("*.npz"))) == (2 if source == "epochs" else 0)


def test_epoch_tables_are_reused_and_damaged_ones_made_again(data, tmp_path, capsys):
    folder = tmp_path / "logits"
    first = table_of(small_teacher(data, source="epochs", folder=folder))
    (file,) = folder.rglob("*.npz")
    second = small_teacher(data, source="epochs", folder=folder)
    second._fill = None  # calling it would fail
    assert torch.equal(table_of(second), first)
    good = file.read_bytes()
    flipped = bytearray(good)
    flipped[len(good) // 2] ^= 1
    np.savez(tmp_path / "short.npz", float32=first.numpy()[:-1])
    np.savez(tmp_path / "odd.npz", no_such_type=first.numpy())
    others = [(tmp_path / name).read_bytes() for name in ("short.npz", "odd.npz")]
    for bad in (good[:100], bytes(flipped), *others):
        file.write_bytes(bad)
        assert torch.equal(table_of(small_teacher(data, source="epochs", folder=folder)), first)
        assert "made again" in capsys.readouterr().out and file.read_bytes() == good
    # Another teacher, another stream, another epoch and another precision have tables of their own.
    table_of(small_teacher(data, source="epochs", folder=folder, seed=5))
    table_of(small_teacher(data, source="epochs", folder=folder), ("student", 1))
    table_of(small_teacher(data, source="epochs", folder=folder), epoch=1)
    table_of(small_teacher(data, "bf16", source="epochs", folder=folder))
    assert len(list(folder.rglob("epoch-*.npz"))) == 5


def test_the_source_of_teacher_logits_is_the_one_with_fewest_passes(data, tmp_path, monkeypatch):
    def choose(cache, students, streams):
        args = SimpleNamespace(precision="fp32", teacher_cache=cache, epochs=1, stop_epoch=None)
        return engine.teacher_source(args, data, students, streams, tmp_path / "runs" / "teacher-logits")

    assert data.n_views == 162
    assert choose("auto", 80, 80) == "live"
    assert choose("auto", 160, 80) == "epochs"
    assert choose("auto", 400, 200) == "views"
    assert choose("off", 400, 200) == "live" and choose("on", 80, 80) == "epochs"
    monkeypatch.setattr(common, "free_memory", lambda device: 100)
    assert choose("auto", 400, 400) == "live" and choose("on", 400, 400) == "epochs"
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    assert choose("auto", 400, 200) == "live"
    with pytest.raises(runs.InputError, match="neither into memory nor on the disk: use auto"):
        choose("on", 400, 200)


# ---------------------------------------------------------------- compiled and captured steps


def weighted_loss(network, images, labels, teacher_logits, ce_weight, kd_weight):
    logits = network(images).float()
    loss = ce_weight * F.cross_entropy(logits, labels)
    if teacher_logits is not None:
        loss = loss + kd_weight * common.kd_loss(logits, teacher_logits, 4.0)
    return loss, logits


def taken_steps(data, folder, fast=False, captured=False, fake=None, steps=20):
    """Weights and sums after `steps` steps, with distillation from step 7 to 14, each from an epoch of its own.

    captured: as CUDA graphs, which the `fake` ones stand for on a CPU.
    """
    device = data.device
    model = common.build_model("resnet8", data.classes, data.facts["image"], 0.25, "student")
    model = model.to(device).to(memory_format=torch.channels_last)
    teacher = small_teacher(data, source="epochs", folder=folder)
    lr = torch.tensor(0.01, device=device) if captured else 0.01
    more = dict(weight_decay=5e-4, nesterov=True, fused=device.type == "cuda")
    optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, **more)
    sums = torch.zeros(3, dtype=torch.float64, device=device)
    network = torch.compile(model) if fast else model
    loss_of = engine.image_loss(network, data, weighted_loss, teacher, "fp32")
    take_step = engine.optimiser_step(model, optimizer, loss_of, sums)
    if captured:
        take_step = engine.captured_step(fake.wrap(take_step) if fake else take_step, model, optimizer, 32, sums)
    for k in range(steps):
        order, views = common.epoch_stream(data, "student", 0, k)
        engine.set_learning_rate(optimizer, 0.01 / (k + 1))
        distils = 7 <= k < 14
        if distils:
            teacher.follow(("student", 0), k, views)
            teacher.ready()
        index = order[:32]
        batch = index.to(device), views[index].to(device)
        take_step(batch, *((0.25, 0.75) if distils else (1.0, 0.0)))
    return model.state_dict(), sums


def check_close(one, other, weights_atol, loss_atol, hits=0):
    (weights, sums), (other_weights, other_sums) = one, other
    assert all(torch.allclose(weights[key].float(), other_weights[key].float(), atol=weights_atol) for key in weights)
    assert torch.allclose(sums[0], other_sums[0], atol=loss_atol)
    assert abs(sums[1] - other_sums[1]) <= hits and sums[2] == other_sums[2] == 20 * 32


def test_compiled_runs_end_close_to_eager_ones_and_compile_once(tiny_runs, tmp_path, monkeypatch):
    """Without C++ code: building that takes half a minute, so that only `make soak` does."""
    from torch._dynamo.utils import counters

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="inductor" if SOAK else "aot_eager"))
    graphs, folder = [], tiny_runs / "runs"
    for seed in (0, 1):
        flags = ["--fast", "--teacher-cache", "off", "--teacher", folder / f"teacher-s{seed}", "--seed", seed]
        assert outcome(train_student, *TINY, *flags, "--out", tmp_path / f"kd-s{seed}")[0] == "finished"
        graphs.append(counters["stats"]["unique_graphs"])
        compiled, eager = (weights_and_metrics(place / f"kd-s{seed}")[0] for place in (tmp_path, folder))
        assert all(torch.allclose(compiled[key].float(), eager[key].float(), atol=5e-4) for key in eager)
    # One for the student and one for the teacher; the next seed's models run the same code.
    assert graphs[0] > 1 and (graphs[1] == graphs[0] or torch.__version__ < "2.5")


class FakeGraphs:
    """CUDA graphs as far as `captured_step` can tell, on a CPU.

    What is called inside `graph` is kept, not run; replay runs it. `streams` are those made, `used` those that warm-up
    steps (w) and captures (c) ran on.
    """

    def __init__(self, monkeypatch):
        self.capturing, self.streams, self.used = None, [], []
        for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda stream: None)

    def Stream(self):
        self.streams.append(self.current_stream())
        return self.streams[-1]

    @contextlib.contextmanager
    def stream(self, stream):
        self.used.append(("w", stream))
        yield

    def CUDAGraph(self):
        graph = SimpleNamespace(kept=[])
        graph.replay = functools.partial(self.replay, graph)
        return graph

    def replay(self, graph):
        for call in graph.kept:
            call()

    @contextlib.contextmanager
    def graph(self, graph, stream=None):
        self.used.append(("c", stream))
        self.capturing = graph
        yield
        self.capturing = None

    def wrap(self, take_step):
        def wrapped(*args):
            if self.capturing:
                self.capturing.kept.append(functools.partial(take_step, *args))
            else:
                take_step(*args)

        return wrapped


def test_the_captured_step_equals_the_eager_step(data, tmp_path, monkeypatch):
    """The logic around the capture, with simulated graphs: buffers, tables, what the warm-up has to put back."""
    eager = taken_steps(data, tmp_path / "logits")
    fake = FakeGraphs(monkeypatch)
    captured = taken_steps(data, tmp_path / "logits", captured=True, fake=fake)
    check_close(eager, captured, 1e-6, 1e-5)
    # Two graphs, without and with the teacher, warmed up and captured on one stream that is theirs alone.
    assert len(fake.streams) == 1
    assert [(what, stream is fake.streams[0]) for what, stream in fake.used] == [("w", True), ("c", True)] * 2


class NotCapturable(Exception):
    """A CUDA graph cannot hold this operation."""


class Capturable(TorchDispatchMode):
    """Records all operations, backward ones too; refuses those that wait for the device's numbers or leave it."""

    def __init__(self, device):
        super().__init__()
        self.device, self.seen = device, set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.add(str(func))
        inputs = tree_leaves((args, kwargs))
        # By its tags .item(), nonzero, masked_select, unique …; an index has a size of its own only where it is a mask.
        waits = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags)
        masks = any(torch.is_tensor(value) and value.dtype == torch.bool for value in inputs)
        if waits and (masks or func is not torch.ops.aten.index.Tensor):
            raise NotCapturable(func)
        self.check_devices(func, inputs)
        output = func(*args, **kwargs or {})
        self.check_devices(func, tree_leaves(output))
        return output

    def check_devices(self, func, values):
        places = [value.device if torch.is_tensor(value) else value for value in values]
        if any(isinstance(place, torch.device) and place.type != self.device for place in places):
            raise NotCapturable(func)


def dry_capture(data, source, loss_fn):
    """The operations of steps that are captured without and with a teacher, on a device that has shapes alone."""
    teacher = small_teacher(data, source=source)
    teacher.model.to("meta")
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    tensors = {name: value.to("meta") for name, value in fields.items() if torch.is_tensor(value)}
    teacher.data = data = dataclasses.replace(data, **tensors)
    if source == "views":
        teacher.table = torch.zeros(len(data.y_train) * data.n_views, data.classes, device="meta")
    model = common.build_model("resnet8", data.classes, data.facts["image"], 0.25, "student").to("meta")
    optimizer = torch.optim.SGD(model.parameters(), 0.01, 0.9)
    sums, operations = torch.zeros(3, dtype=torch.float64, device="meta"), Capturable("meta")
    loss_of = engine.image_loss(model, data, loss_fn, teacher, "fp32")
    take_step = engine.optimiser_step(model, optimizer, loss_of, sums)

    def recorded_step(*args):
        with operations:
            take_step(*args)

    step = engine.captured_step(recorded_step, model, optimizer, 32, sums)
    for weights in ((1.0, 0.0), (0.25, 0.75)):
        step([torch.zeros(32, dtype=torch.long, device="meta") for _ in range(2)], *weights)
    return operations.seen


@pytest.fixture
def no_device(monkeypatch):
    FakeGraphs(monkeypatch)
    monkeypatch.setattr(engine, "autocast", lambda device, precision: contextlib.nullcontext())  # meta has none


@pytest.mark.parametrize("source", ["live", "views"])
def test_the_captured_step_never_waits_for_the_device(source, data, no_device):
    seen = dry_capture(data, source, weighted_loss)
    assert {"aten.index_select.default", "aten.convolution_backward.default"} <= seen
    assert any("add_" in name for name in seen)  # the optimiser


@pytest.mark.parametrize(
    "waiting",
    [
        torch.Tensor.item,
        torch.Tensor.cpu,
        torch.nonzero,
        torch.unique,
        lambda loss: loss[loss > 0],
        torch.Tensor.tolist,
    ],
)
def test_a_step_that_waits_for_the_device_is_caught(waiting, data, no_device):
    def bad_loss(*args):
        loss, logits = weighted_loss(*args)
        waiting(loss.detach())
        return loss, logits

    with pytest.raises(NotCapturable):
        dry_capture(data, "live", bad_loss)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graphs_equal_the_eager_step(tmp_path):
    write_arrays(tmp_path / "d.npz", n=90, side=12, classes=4)
    data = common.load_data(f"npz:{tmp_path / 'd.npz'}", device="cuda")
    eager = taken_steps(data, tmp_path / "logits")
    for fast in (False, True):
        check_close(eager, taken_steps(data, tmp_path / "logits", fast=fast, captured=True), 1e-3, 0.05, hits=2)
