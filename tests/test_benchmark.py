"""benchmark.py: its rows."""

import statistics

import benchmark
import runs

import pytest


def test_ways_of_training_are_compared_with_the_best_peer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "WORKERS", (0, 2))
    benchmark.main(["--arch", "mlp", "--images", "128", "--epochs", "1", "--device", "cpu", "--out", f"{tmp_path}/b"])
    text = capsys.readouterr().out
    rows = runs.read_json(tmp_path / "b" / "benchmark.json")["rows"]
    peers = [f"peers, {workers} workers" for workers in (0, 2)]
    ways = [("one-hot", way) for way in (*peers, "eager", "two processes")]
    ways += [("KD", way) for way in (*peers, "eager", "table", "two processes")]
    assert [(row["loss"], row["way"]) for row in rows] == ways
    for row in rows:
        assert len(row["rates"]) == 1 + ("processes" in row["way"]) and {len(part) for part in row["rates"]} == {1}
        assert row["images_per_s"] == pytest.approx(sum(statistics.median(part) for part in row["rates"]))
        of_peers = [one for one in rows if one["loss"] == row["loss"] and one["way"] in peers]
        best = max(one["images_per_s"] for one in of_peers)
        assert row["speedup"] == pytest.approx(row["images_per_s"] / best)
    table = (tmp_path / "b" / "benchmark.md").read_text()
    assert table.count("\n| mlp") == 9 and table.strip() in text


def test_ours_are_measured_at_each_batch_size(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "WORKERS", (0,))
    monkeypatch.setattr(benchmark, "ours", lambda flags, images, **more: [[float(flags.batch_size)]])
    size = ["--arch", "mlp", "--images", "128", "--epochs", "1", "--device", "cpu", "--batch-size", "16", "512"]
    benchmark.main([*size, "--out", f"{tmp_path}/b"])
    rows = runs.read_json(tmp_path / "b" / "benchmark.json")["rows"]
    ours = [(row["loss"], row["way"], row["batch"]) for row in rows if not row["way"].startswith("peers")]
    ways = dict(KD=("eager", "table", "two processes")) | {"one-hot": ("eager", "two processes")}
    assert ours == [(loss, way, batch) for loss in ("one-hot", "KD") for batch in (16, 128) for way in ways[loss]]
