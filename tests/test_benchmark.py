"""benchmark.py: its rows, and the one function that times a step."""

import statistics

import pytest

import benchmark
import runs


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


def test_a_step_is_timed_for_each_network_once():
    network = ("cnn", "mlp", 8, 10, 1024, "fp32", "cpu", 0.25)
    seconds = benchmark.seconds_per_image(*network)
    assert 0 < seconds == benchmark.seconds_per_image(*network)
    assert benchmark.seconds_per_image("cnn", None, 8, 10, 16, "fp32", "cpu", 0.25) > 0


def test_an_unwritable_folder_is_refused_before_the_work(tmp_path):
    (tmp_path / "file").write_text("mine")
    for place in ("/dev/null/x", "/proc/x", f"{tmp_path}/file/x"):
        with pytest.raises(OSError, match=place):
            benchmark.main(["--device", "cpu", "--out", place])
    with pytest.raises(SystemExit):
        benchmark.main(["--arch", "resnet9", "--out", f"{tmp_path}/b"])
    assert (tmp_path / "file").read_text() == "mine" and not (tmp_path / "b").exists()
