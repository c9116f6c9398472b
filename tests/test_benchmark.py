"""benchmark.py: its rows."""

import statistics

import benchmark
import runs

import pytest
from helpers import refused, save_pretrained


def test_ways_of_training_are_compared_with_the_best_peer(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(benchmark, "WORKERS", (0, 2))
    size = ["--images", "128", "--batch-size", "512", "--epochs", "1"]
    benchmark.main(["--arch", "mlp", *size, "--device", "cpu", "--out", f"{tmp_path}/b"])
    text = capsys.readouterr().out
    rows = runs.read_json(tmp_path / "b" / "benchmark.json")["rows"]
    peers = [f"peers, {workers} workers" for workers in (0, 2)]
    ways = [("one-hot", way) for way in (*peers, "eager", "two processes")]
    ways += [("KD", way) for way in (*peers, "eager", "table", "two processes")]
    assert [(row["loss"], row["way"]) for row in rows] == ways
    for row in rows:
        assert len(row["rates"]) == 1 + ("processes" in row["way"]) and {len(part) for part in row["rates"]} == {1}
        assert row["per_second"] == pytest.approx(sum(statistics.median(part) for part in row["rates"]))
        assert row["batch"] == (64 if row["way"] in peers else 128)  # no larger than there are images
        of_peers = [one for one in rows if one["loss"] == row["loss"] and one["way"] in peers]
        best = max(one["per_second"] for one in of_peers)
        assert row["speedup"] == pytest.approx(row["per_second"] / best)
    table = (tmp_path / "b" / "benchmark.md").read_text()
    assert table.count("\n| mlp") == 7 and table.count("peers") == 2 and table.strip() in text  # the best workers alone


def test_the_text_script_is_timed_beside_the_trainer(tmp_path, monkeypatch):
    monkeypatch.setattr(benchmark, "SENTENCES", 20)
    monkeypatch.setattr(benchmark, "measure_images", lambda *given, **more: [])
    seen = []

    def trainer_rates(args, sentences, settings):  # it needs accelerate, which is no requirement
        seen.append(sentences)
        return [0.01 if settings else 0.005]

    monkeypatch.setattr(benchmark, "trainer_rates", trainer_rates)
    save_pretrained(tmp_path / "encoder", "bert", positions=128)
    lines = [f"a {'good' if k % 2 else 'bad'} film , part {k}\t{k % 2}" for k in range(30)]
    (tmp_path / "train.tsv").write_text("\n".join(["sentence\tlabel", *lines, ""]))
    words = ["--encoder", tmp_path / "encoder", "--epochs", 1, "--device", "cpu", "--out", tmp_path / "b"]
    benchmark.main([str(word) for word in (*words, "--sentences", tmp_path / "train.tsv")])
    assert seen[0] == seen[-1] == [(line[:-2], k % 2) for k, line in enumerate(lines[:20])]
    kept = runs.read_json(tmp_path / "b" / "benchmark.json")
    assert kept["versions"]["transformers"] in (tmp_path / "b" / "benchmark.md").read_text()
    rows = kept["rows"]
    ours = [("one-hot", "glue_distill.py"), ("KD", "glue_distill.py (peer: one-hot)")]
    assert [(row["loss"], row["way"]) for row in rows] == [("one-hot", way) for way in benchmark.TRAINERS] + ours
    assert [row["speedup"] for row in rows[:3]] == [0.5, 1, 1]
    for row in rows[3:]:
        assert len(row["rates"][0]) == 1 and row["speedup"] > 1
        assert row["speedup"] == pytest.approx(row["per_second"] / 0.01)
    assert "give SST-2's train.tsv as --sentences" in refused(benchmark, *words, "--sentences", tmp_path / "none.tsv")
    monkeypatch.setattr(benchmark, "SENTENCES", 1)
    assert "glue_distill.py: error: " in refused(benchmark, *words, "--sentences", tmp_path / "train.tsv")
