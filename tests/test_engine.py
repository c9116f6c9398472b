"""The engine by itself: exact resume, teachers, the table of their logits, compiled and captured steps."""

import contextlib
import dataclasses
import functools
import shutil
import signal
from types import SimpleNamespace

import common
import engine
import runs
import train_student

import numpy as np
import pytest
import torch
import torch.nn as nn
from helpers import SOAK, TINY, Crash, finished, hashes, weights_and_metrics, without_times, write_arrays

# ---------------------------------------------------------------- resume


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
        engine.train_images(run, model, data, args, "teacher", 0, common.student_loss, weights_at, **more)
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


def same_weights(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(run folder, weights, metrics) of the tiny run that nothing interrupted."""
    run = tmp_path_factory.mktemp("engine") / "whole"
    return run, *train(run, snapshots=(8, 9))


# After the last step of an epoch, a signal waits for its line. A crash may come before the first checkpoint.
@pytest.mark.parametrize("kind, seconds", [(signal.SIGINT, 1e9), (signal.SIGTERM, 1e9), (Crash, 0), (Crash, 1e9)])
@pytest.mark.parametrize("stop_at", [1, 9, 11])  # of 16
def test_an_interrupted_run_ends_in_the_same_weights(kind, seconds, stop_at, whole, tmp_path, monkeypatch):
    monkeypatch.setattr(engine, "SAVE_SECONDS", seconds)
    run = tmp_path / "cut"
    with pytest.raises((SystemExit, Crash)) as caught:
        train(run, interrupted(kind, stop_at), snapshots=(8, 9))
    assert not (run / "logits.npz").exists()
    if kind is not Crash:  # a signal lets the step end first
        assert caught.value.code == 130 and runs.load_checkpoint(run / "checkpoint.pt")["step"] == stop_at + 1
    elif seconds:
        assert not (run / "checkpoint.pt").exists()
    else:
        assert runs.load_checkpoint(run / "checkpoint.pt")["step"] == stop_at
    (run / ".checkpoint.pt.tmp").write_bytes(b"half")  # as a kill during a write leaves it
    resumed, metrics = train(run, snapshots=(8, 9))
    folder, weights, lines = whole
    assert same_weights(weights, resumed) and without_times(metrics) == without_times(lines)
    assert hashes(run).keys() == hashes(folder).keys() and hashes(run)["logits.npz"] == hashes(folder)["logits.npz"]
    state, other = (runs.load_checkpoint(place / "snapshot-9.pt") for place in (run, folder))
    assert same_weights(state["model"], other["model"])


def test_dropout_resumes_exactly(tmp_path):
    weights, _ = train(tmp_path / "whole", dropout=0.3)
    with pytest.raises(SystemExit):
        train(tmp_path / "cut", interrupted(signal.SIGINT, 9), dropout=0.3)
    torch.manual_seed(123)  # what the process did in between must not matter
    assert same_weights(weights, train(tmp_path / "cut", dropout=0.3)[0])


def test_a_diverging_run_stops_and_keeps_its_checkpoint(tmp_path):
    run = tmp_path / "t"
    with pytest.raises(SystemExit):  # a good first part
        train(run, interrupted(signal.SIGTERM, 8))
    before = hashes(run)
    with pytest.raises(runs.InputError, match="became NaN or infinite by step .*lower --lr.*good checkpoint is kept"):
        train(run, lambda step: (float("inf"), 0.0))
    assert hashes(run)["checkpoint.pt"] == before["checkpoint.pt"] and not (run / "logits.npz").exists()


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
    assert [epoch for epoch in range(1, 8) if engine.evaluated(epoch, SimpleNamespace(eval_every=3), data)] == [3, 6]


# ---------------------------------------------------------------- teachers and device


def test_a_teacher_is_loaded_as_it_was_at_its_end_or_before_a_step_that_was_kept(whole, tmp_path):
    source, weights, _ = whole
    run = tmp_path / "t"
    data = common.load_data("digits", subset=300)
    shutil.copytree(source, run)
    for step, kept in ((None, weights), (16, weights), (8, None), (9, None)):
        teacher = engine.load_teacher(run, data, step)
        kept = kept or runs.load_checkpoint(run / f"snapshot-{step}.pt")["model"]
        assert same_weights(teacher.state_dict(), kept) and not teacher.training
    with pytest.raises(runs.InputError, match="snapshot-5.pt does not exist: remove .* and train it again"):
        engine.load_teacher(run, data, 5)
    changed = runs.load_checkpoint(run / "snapshot-8.pt")
    changed["model"]["fc.weight"] = -changed["model"]["fc.weight"]
    torch.save(changed, run / "snapshot-8.pt")
    with pytest.raises(runs.InputError, match="test accuracy here but recorded"):  # at the end of the second epoch
        engine.load_teacher(run, data, 8)


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


# ---------------------------------------------------------------- the table of teacher logits


@pytest.fixture
def data(tmp_path):
    write_arrays(tmp_path / "d.npz", n=90, side=12, classes=4)
    return common.load_data(f"npz:{tmp_path / 'd.npz'}")


def small_teacher(data, precision="fp32", epochs=200):
    """A teacher of students of so many epochs: with 200 it makes a table of its 162 views, with 0 it is asked live."""
    model = common.build_model("resnet8", data.classes, data.facts["image"], 0.25, "teacher")
    model = model.to(data.device).to(memory_format=torch.channels_last).eval()
    return engine.TeacherLogits(model, data, precision, epochs)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_table_holds_the_logits_of_the_live_teacher_for_every_view(precision, data):
    live = small_teacher(data, precision, 0)
    cached = small_teacher(data, precision)
    for teacher in (live, cached):
        teacher.ready()
    table = cached.table
    index = torch.arange(len(data.y_train))
    assert live.table is None and table.shape[:2] == (len(index), data.n_views)
    for view in range(data.n_views):
        views = torch.full_like(index, view)
        expected, got = (teacher(data.batch(index, views), index, views) for teacher in (live, cached))
        assert got.dtype == expected.dtype == torch.float32 and expected.std() > 0.01
        tolerance = 1e-5 if precision == "fp32" else 0.05 * expected.abs().max().item()
        assert torch.allclose(got, expected, atol=tolerance)
    cached.ready()
    assert cached.table is table  # where a captured graph reads


def test_the_table_is_chosen_by_the_flags_and_a_fixed_limit_alone(data, monkeypatch):
    def chosen(epochs, precision="fp32"):
        return small_teacher(data, precision, epochs).all_views

    # Never by the memory that is free: a run that is continued must choose alike.
    assert data.n_views == 162 and [chosen(epochs) for epochs in (1, 162, 163)] == [False, False, True]
    size = len(data.y_train) * data.n_views * data.classes * 4
    monkeypatch.setattr(engine, "TABLE_BYTES", size)
    assert chosen(163)
    monkeypatch.setattr(engine, "TABLE_BYTES", size - 1)
    assert not chosen(163) and chosen(163, "bf16")


# ---------------------------------------------------------------- compiled and captured steps


def student_step(data, teacher, loss_fn=common.student_loss, lr=0.01, fast=False):
    """(model, optimizer, sums, take_step) of a student, put together as in `engine.train_images`."""
    model = common.build_model("resnet8", data.classes, data.facts["image"], 0.25, "student")
    model = model.to(data.device).to(memory_format=torch.channels_last)
    optimizer = torch.optim.SGD(model.parameters(), lr, 0.9, weight_decay=5e-4, nesterov=True)
    sums = torch.zeros(3, dtype=torch.float64, device=data.device)
    args = SimpleNamespace(precision="fp32", temperature=4.0)
    loss_of = engine.image_loss(torch.compile(model) if fast else model, data, loss_fn, teacher, args)
    return model, optimizer, sums, engine.optimiser_step(model, optimizer, loss_of, sums)


def taken_steps(data, fast=False, captured=False, wrap=lambda take_step: take_step):
    """Weights and sums after 20 steps of 20 epochs, with distillation in steps 7 to 13; `wrap` is of `FakeGraphs`."""
    teacher = small_teacher(data)
    lr = torch.tensor(0.01, device=data.device) if captured else 0.01
    teacher.ready()
    model, optimizer, sums, take_step = student_step(data, teacher, lr=lr, fast=fast)
    if captured:
        take_step = engine.captured_step(wrap(take_step), model, optimizer, 32, sums)
    for k in range(20):
        order, views = common.epoch_stream(data, "student", 0, k)
        engine.set_learning_rate(optimizer, 0.01 / (k + 1))
        weights = (0.25, 0.75) if 7 <= k < 14 else (1.0, 0.0)
        take_step([part.to(data.device) for part in (order[:32], views[order[:32]])], *weights)
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
    graphs = []
    folder = tiny_runs / "runs"
    for seed in (0, 1):
        flags = ["--fast", "--teacher", folder / f"teacher-s{seed}", "--seed", seed, "--out", tmp_path / f"kd-s{seed}"]
        finished(train_student, *TINY, *flags)
        graphs.append(counters["stats"]["unique_graphs"])
        compiled, eager = (weights_and_metrics(place / f"kd-s{seed}")[0] for place in (tmp_path, folder))
        assert all(torch.allclose(compiled[key].float(), eager[key].float(), atol=5e-4) for key in eager)
    # One for the student and one for the teacher; the next seed's models run the same code.
    assert graphs[0] > 1 and graphs[1] == graphs[0]


class FakeGraphs:
    """CUDA graphs on a CPU, as far as `captured_step` can tell: calls inside `graph` are kept, and made by replay."""

    def __init__(self, monkeypatch):
        self.kept = None  # calls
        self.used = []  # streams of warm-up steps and captures
        for name in ("Stream", "stream", "current_stream", "CUDAGraph", "graph"):
            monkeypatch.setattr(torch.cuda, name, getattr(self, name))

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda stream: None)

    current_stream = Stream

    @contextlib.contextmanager
    def stream(self, stream):
        self.used.append(stream)
        yield

    def CUDAGraph(self):
        kept = []
        return SimpleNamespace(kept=kept, replay=lambda: [call() for call in kept])

    @contextlib.contextmanager
    def graph(self, graph, stream=None):
        self.used.append(stream)
        self.kept = graph.kept
        yield
        self.kept = None

    def wrap(self, take_step):
        def wrapped(*args):
            if self.kept is None:
                take_step(*args)
            else:
                self.kept.append(functools.partial(take_step, *args))

        return wrapped


def test_the_captured_step_equals_the_eager_step(data, monkeypatch):
    """The logic around the capture, with simulated graphs: buffers, the table, what the warm-up has to put back."""
    eager, fake = taken_steps(data), FakeGraphs(monkeypatch)
    check_close(eager, taken_steps(data, captured=True, wrap=fake.wrap), 1e-6, 1e-5)
    # Two graphs, without and with the teacher, warmed up and captured on one stream that is theirs alone.
    assert len(fake.used) == 4 and all(stream is fake.used[0] for stream in fake.used)


@pytest.mark.parametrize("waiting", [None, torch.Tensor.item, torch.Tensor.cpu, torch.nonzero, torch.unique])
@pytest.mark.parametrize("epochs", [0, 200])  # a live teacher, and a table
def test_the_captured_step_never_waits_for_the_device(epochs, waiting, data, monkeypatch):
    """On the device `meta`, which has shapes alone; and what does wait is caught."""
    monkeypatch.setattr(engine, "autocast", lambda device, precision: contextlib.nullcontext())  # meta has none
    FakeGraphs(monkeypatch)

    def loss_fn(*args):
        loss, logits = common.student_loss(*args)
        if waiting:
            waiting(loss.detach())
        return loss, logits

    teacher = small_teacher(data, epochs=epochs)
    teacher.ready()
    teacher.model.to("meta")
    teacher.table = teacher.table.to("meta") if epochs else None
    fields = {field.name: getattr(data, field.name) for field in dataclasses.fields(data)}
    data = dataclasses.replace(data, **{name: x.to("meta") for name, x in fields.items() if torch.is_tensor(x)})
    model, optimizer, sums, take_step = student_step(data, teacher, loss_fn)
    step = engine.captured_step(take_step, model, optimizer, 32, sums)
    batch = [torch.zeros(32, dtype=torch.long, device="meta") for _ in range(2)]
    with pytest.raises((RuntimeError, NotImplementedError), match="(?i)meta") if waiting else contextlib.nullcontext():
        step(batch, 1.0, 0.0)
        step(batch, 0.25, 0.75)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
def test_cuda_graphs_equal_the_eager_step(tmp_path):
    write_arrays(tmp_path / "d.npz", n=90, side=12, classes=4)
    plain, data = (common.load_data(f"npz:{tmp_path / 'd.npz'}", device=device) for device in ("cpu", "cuda"))
    index = torch.arange(90)
    view = torch.arange(90) % data.n_views
    torch.testing.assert_close(data.batch(index.cuda(), view.cuda()).cpu(), plain.batch(index, view))
    for fast in (False, True):
        check_close(taken_steps(data), taken_steps(data, fast=fast, captured=True), 1e-3, 0.05, hits=2)
