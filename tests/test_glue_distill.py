"""glue_distill.py: texts and tables, tokens, losses, runs, report, bad input."""

import hashlib
import itertools
import math
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import claims
import common
import engine
import glue_distill
import runs

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import transformers
from helpers import Malicious, damage_to, fuzz, hashes, input_error, same_run, save_pretrained, valid_or_refused
from hypothesis import given
from hypothesis import strategies as st

LANGUAGE = "--teacher 1x16 --subset 160 --epochs 2 --max-length 32 --quiet --device cpu --bootstrap 100".split()


def language(*flags):
    """glue_distill.py in this process, in the working folder."""
    glue_distill.main([*LANGUAGE, *map(str, flags)])


def run_of(name, seed=0, folder="."):
    return Path(folder) / "runs" / f"sentiment-{name}-s{seed}"


def weights_of(run):
    return runs.load_checkpoint(Path(run) / "checkpoint.pt")["model"]


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder where the embedded task was distilled into two students, for two seeds."""
    folder = tmp_path_factory.mktemp("texts")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        language("--student", "1x16", "1x8", "--seeds", 0, 1)
    return folder


# ---------------------------------------------------------------- texts


def parsed_score(text):
    """The score of an embedded review, read off its words: a second, plain implementation of its documented rules."""
    strength = {}
    for points, adjectives in glue_distill.ADJECTIVES.items():
        strength.update(dict.fromkeys(adjectives, points))

    def clause(words):
        score = next(strength[word] for word in words if word in strength)
        score *= next((factor for word, factor in glue_distill.INTENSIFIERS.items() if word and word in words), 1.0)
        return score * (-0.6 if "not" in words else 1.0)

    parts = re.split(" and | but | , ", text.removesuffix(" .").removeprefix("although "))
    values = [clause(part.split()) for part in parts]
    return sum(values) if " and " in text or len(values) == 1 else 0.4 * values[0] + values[1]


def test_embedded_reviews_have_the_documented_probabilities_and_labels_drawn_from_them():
    split = glue_distill.sentiment(4000, "train", 3)
    plain = 1 / (1 + np.exp(-2 * np.array([parsed_score(text) for (text,) in split.texts])))
    assert np.array_equal(split.clean, plain > 0.5)
    for low in np.arange(0, 1, 0.2):  # calibrated within 4 standard errors
        inside = (plain >= low) & (plain < low + 0.2)
        error = abs(split.labels[inside].mean() - plain[inside].mean())
        assert inside.sum() > 100 and error < 4 * np.sqrt(0.25 / inside.sum())
    assert split.texts == glue_distill.sentiment(4000, "train", 3).texts
    keys = itertools.product(("train", "test"), (0, 1))
    assert len({tuple(glue_distill.sentiment(50, *key).texts) for key in keys}) == 4


ENTAILMENT = ["entailment", "not_entailment"]
NLI = ["entailment", "neutral", "contradiction"]
GLUE_ROWS = {  # header, row, labels
    "cola": ("source label star sentence", "{i}|{label}|*|{first}", ["0", "1"]),
    "sst-2": ("sentence label", "{first}|{label}", ["0", "1"]),
    "mrpc": ("Quality,#1 ID,#2 ID,#1 String,#2 String", "{label}|{i}|{i}|{first}|{second}", ["0", "1"]),
    "rte": ("index sentence1 sentence2 label", "{i}|{first}|{second}|{label}", ENTAILMENT),
    "qnli": ("index question sentence label", "{i}|{first}|{second}|{label}", ENTAILMENT),
    "qqp": ("id qid1 qid2 question1 question2 is_duplicate", "{i}|1|2|{first}|{second}|{label}", ["0", "1"]),
    "mnli": ("index genre sentence1 sentence2 gold_label", "{i}|fiction|{first}|{second}|{label}", NLI),
}


def write_glue(root, task, n=24):
    """Files of GLUE's original layout with literal quotes, a form feed and a lone carriage return inside a sentence."""
    header, row, labels = GLUE_ROWS[task]
    folder = root / glue_distill.PUBLISHED[task].folder
    folder.mkdir(parents=True)
    lines = [] if task == "cola" else ["\t".join(header.split("," if "," in header else None))]
    for i in range(n):
        sentences = dict(first=f'he said " no {i}\x0c twice\r or', second=f'she replied {i} ""')
        lines.append(row.replace("|", "\t").format(i=i, label=labels[i % len(labels)], **sentences))
    content = (b"\xef\xbb\xbf" if task == "mrpc" else b"") + ("\n".join(lines) + "\r\n").encode()
    for name in ("train", "dev_matched", "dev_mismatched") if task == "mnli" else ("train", "dev"):
        (folder / f"{name}.tsv").write_bytes(content)
    return folder


@pytest.mark.parametrize("task", list(GLUE_ROWS))
def test_glue_files_are_read_with_their_quirks(task, tmp_path):
    folder = write_glue(tmp_path, task)
    data = glue_distill.load_task(task, tmp_path)
    shutil.copytree(folder, tmp_path / "below" / "glue" / folder.name)  # where GLUE's folders have one of their own
    assert glue_distill.load_task(task, tmp_path / "below").facts == data.facts
    train = data.splits["train"]
    labels = GLUE_ROWS[task][2]
    text = ('he said " no 5\x0c twice\r or', 'she replied 5 ""')
    assert len(train.texts) == 24 and train.texts[5] == (text[:1] if task in ("cola", "sst-2") else text)
    assert train.labels.tolist() == [k % len(labels) for k in range(24)] and data.facts["class_names"] == labels
    assert set(data.splits) == {"train", "test"} | ({"mismatched"} if task == "mnli" else set())
    lines = (folder / "train.tsv").read_bytes().split(b"\n")
    lines[7] = lines[7].split(b"\t")[0]
    (folder / "train.tsv").write_bytes(b"\n".join(lines))
    if task == "qqp":  # its published file has such rows
        assert len(glue_distill.load_task(task, tmp_path).splits["train"].texts) == 23
    else:
        with pytest.raises(runs.InputError, match=r"train.tsv, line 8: "):
            glue_distill.load_task(task, tmp_path)


HUB_COLUMNS = dict(cola="sentence", sst2="sentence", mrpc="sentence1 sentence2", rte="sentence1 sentence2")
HUB_COLUMNS.update(qnli="question sentence", qqp="question1 question2", mnli="premise hypothesis", text="text")


@pytest.mark.parametrize("task", [*GLUE_ROWS, "imdb", "ag_news"])
def test_without_local_files_a_task_comes_from_the_hub(task, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    config = None if task in ("imdb", "ag_news") else task.replace("-", "")
    repository = dict(imdb="stanfordnlp/imdb", ag_news="fancyzhx/ag_news").get(task, "nyu-mll/glue")
    columns = HUB_COLUMNS[config or "text"].split()

    def load(*what, split):
        test = "validation" if config else "test"
        assert what == (repository, config) and split in ("train", test, "validation_matched", "validation_mismatched")
        texts = {column: [f"{column} {split} {k}" for k in range(20)] for column in columns}
        return datasets.Dataset.from_dict(dict(texts, label=[k % 2 for k in range(20)]))

    monkeypatch.setattr(datasets, "load_dataset", load)
    data = glue_distill.load_task(task, tmp_path)
    train = data.splits["train"]
    assert train.texts[7] == tuple(f"{column} train 7" for column in columns)
    assert train.labels[7] == 1 and data.facts["n_test"] == 20


def test_subsets_of_texts_are_nested_and_keep_their_positions(tmp_path):
    write_glue(tmp_path, "rte")
    whole, large, small = (glue_distill.load_task("rte", tmp_path, n) for n in (0, 16, 10))
    assert set(small.index) < set(large.index) < set(whole.index) and len(small.index) == 10
    assert small.splits["train"].texts == [whole.splits["train"].texts[k] for k in small.index]
    assert whole.facts["sha256"] != small.facts["sha256"]


def load_csv(path, content, **columns):
    path.write_bytes(content.encode())
    return glue_distill.load_task(f"csv:{path}", columns=columns)


def all_texts(data):
    """{text: its label} of both splits."""
    found = {}
    for split in data.splits.values():
        found.update(zip(split.texts, split.labels.tolist(), strict=True))
    return found


def test_csv_files_and_folders_load(tmp_path):
    rows = [f'"text, number {k}",other {k},{"good" if k % 3 else "bad"}' for k in range(60)]
    data = load_csv(tmp_path / "one.csv", "\n".join(["text,text2,label", *rows]))
    assert (data.facts["n_train"], data.facts["n_test"]) == (48, 12)
    texts = all_texts(data)
    assert texts == {(f"text, number {k}", f"other {k}"): int(k % 3 > 0) for k in range(60)}
    (tmp_path / "imdb").mkdir()  # a local folder serves instead of the network
    for part in ("train", "test"):
        rows = [f"{10 - 8 * (k % 2)},film {part} {k}" for k in range(20)]
        (tmp_path / "imdb" / f"{part}.csv").write_text("\n".join(["label,text", *rows, ""]))
    data = glue_distill.load_task("imdb", tmp_path)
    assert data.splits["test"].texts[3] == ("film test 3",)
    assert data.splits["test"].labels[:2].tolist() == [1, 0]  # "2" before "10"
    (tmp_path / "imdb" / "test.csv").write_text("text,text2,label\n" + "a,b,2\nc,d,10\n" * 9)
    with pytest.raises(runs.InputError, match="text2"):
        glue_distill.load_task("imdb", tmp_path)
    (tmp_path / "imdb" / "test.csv").write_text("text,label\n" + "a,2\nb,10\nc,7\n" * 9)
    with pytest.raises(runs.InputError, match="the label '7' is in no training text"):
        glue_distill.load_task("imdb", tmp_path)


def table(labels):
    return "\n".join(["text,label", *(f"text {k},{label}" for k, label in enumerate(labels))])


def test_csv_labels_that_are_a_regression_target_are_refused_by_that_name(tmp_path):
    with pytest.raises(runs.InputError, match="regression target.*26 different numbers"):
        load_csv(tmp_path / "sts.csv", table([k % 26 / 5 for k in range(200)]))
    assert load_csv(tmp_path / "ids.csv", table([k % 26 for k in range(400)])).facts["classes"] == 26
    assert load_csv(tmp_path / "halves.csv", table([k % 9 / 2 for k in range(200)])).facts["classes"] == 9


def test_csv_labels_that_are_equal_numbers_are_one_class_and_counts_are_printed(tmp_path, capsys):
    data = load_csv(tmp_path / "d.csv", table([("1", "1.0", "01", "0", "-0.0", "word")[k % 6] for k in range(60)]))
    labels = all_texts(data)
    assert [labels[f"text {k}",] for k in range(6)] == [1, 1, 1, 0, 0, 2] and data.facts["classes"] == 3
    assert re.search(r"3 classes.*0 \(20\), 1 \(30\), word \(10\)", capsys.readouterr().out)
    # Of any length, signed by size, and characters that only look like digits or numbers.
    odd = ("²", "9" * 5000, "10", "-3", "1_0", "٣", "nan")
    names = load_csv(tmp_path / "d.csv", table([odd[k % 7] for k in range(140)])).facts["class_names"]
    assert names == ["-3", "10", "9" * 5000, "1_0", "nan", "²", "٣"]


def test_csv_columns_go_by_usual_names_without_case_and_spaces_or_by_flags(tmp_path):
    rows = [f"{k % 2},word {k},{k}" for k in range(60)]
    wanted = {(f"word {k}",): k % 2 for k in range(60)}
    for header in ("label,text,id", "Label,Text,id", " sentiment , Review,id", "label,sentence,sentiment"):
        assert all_texts(load_csv(tmp_path / "d.csv", "\n".join([header, *rows]))) == wanted
    named = load_csv(tmp_path / "d.csv", "\n".join(["Y,X,label", *rows]), text=" x", label="y")
    assert all_texts(named) == wanted
    with pytest.raises(runs.InputError, match="'Y,X,label'.* one column text or sentence or review.*--text-column"):
        load_csv(tmp_path / "d.csv", "\n".join(["Y,X,label", *rows]))


def test_a_text_that_comes_twice_is_in_one_split_or_counted(tmp_path, capsys):
    rows = [f"text {k % 40},{k % 2}" for k in range(100)]
    data = load_csv(tmp_path / "d.csv", "\n".join(["text,label", *rows]))
    train, test = (set(split.texts) for split in data.splits.values())
    assert len(train) == 32 and len(test) == 8 and not train & test and data.facts["n_test"] > 8
    assert "60 rows repeat a text" in capsys.readouterr().out
    for part, start in (("train", 0), ("test", 30)):
        lines = [f"text {k},{k % 2}" for k in range(start, start + 40)]
        (tmp_path / f"{part}.csv").write_text("\n".join(["text,label", *lines]))
    glue_distill.load_task(f"csv:{tmp_path}")
    assert "10 of the 40 test texts are among the training texts too" in capsys.readouterr().out


ROWS = [f'"text {k}",{k % 2}' for k in range(60)]


@pytest.mark.parametrize(
    "change, line, what",
    [
        ({7: '"text 7,1'}, 9, "close the quote"),  # the next quote opens a cell
        ({59: '"text 59,1'}, 61, "unexpected end"),  # there is none
        ({7: 'text 7,"1', **{k: f"text {k},1" for k in range(8, 60)}}, 9, "unexpected end"),
        ({7: '"text 7,1', 8: "text 8,0", 9: 'text 9",1'}, 9, "holds whole rows"),  # a second stray quote
        ({7: '0,"text 7', 8: '1,text 8",1'}, 9, "has 3"),
        ({7: '"so-called" text,1'}, 9, "close the quote"),
        ({7: f"{'long ' * 30_000},1"}, 9, "shorten"),
        ({3: '"two\nlines, in a cell",1', 7: "text 7;1"}, 10, "must have 2 columns (it has 1)"),  # lines of the file
        ({7: "text 7,1,"}, 9, "has 3"),
        ({7: "text 7, "}, 9, "a text and a label"),
        ({7: " ,1"}, 9, "a text and a label"),
        ({-1: "text\tlabel"}, 1, "not tabs"),
        ({-1: "text;label"}, 1, "semicolons"),
        ({-1: "text,Text,label"}, 1, "one column text"),
    ],
)
def test_what_spreadsheets_write_never_drops_or_merges_rows(change, line, what, tmp_path):
    rows = ["text,label", *ROWS]
    for k, row in change.items():
        rows[k + 1] = row
    for end in ("\n", "\r\n"):
        with pytest.raises(runs.InputError, match=rf"d.csv, line {line}\b.*{re.escape(what)}"):
            load_csv(tmp_path / "d.csv", end.join(rows))


def test_cells_of_several_lines_blank_lines_and_doubled_quotes_are_read_as_they_are(tmp_path):
    rows = ["text,label", '"good,\n\nsaid ""he"", 1",1', "", '5" screen,0', *ROWS]
    data = load_csv(tmp_path / "d.csv", "\ufeff" + "\r\n".join(rows) + "\r\n")
    texts = {text for (text,) in all_texts(data)}
    assert len(texts) == 62 and {'good,\n\nsaid "he", 1', '5" screen'} <= texts


# ---------------------------------------------------------------- tokens, networks, losses


def test_batches_cover_every_text_once_by_key_and_pad_less_than_random_ones():
    lengths = torch.randint(3, 60, (1003,), generator=torch.Generator().manual_seed(0))
    keys = [("student", 0, 4), ("student", 0, 4), ("teacher", 0, 4), ("student", 1, 4), ("student", 0, 5)]
    plan, again, *others = (glue_distill.length_batches(lengths, 16, *key) for key in keys)
    assert sorted(torch.cat(plan).tolist()) == list(range(1003)) and len(plan) == 63
    assert all(torch.equal(a, b) for a, b in zip(plan, again, strict=True))
    assert not any(torch.equal(torch.cat(plan), torch.cat(other)) for other in others)

    def padded(plan):
        return sum(len(index) * int(lengths[index].max()) for index in plan)

    assert padded(plan) < 1.1 * int(lengths.sum()) < padded(torch.randperm(1003).split(16))
    means = [lengths[index].double().mean().item() for index in plan]
    assert np.corrcoef(means[:-1], means[1:])[0, 1] < 0.5  # long and short batches are mixed


def small_model(data, name="1x16"):
    return glue_distill.prepare(name, data, SimpleNamespace(max_length=32, device="cpu"))


def test_logits_equal_the_librarys_plain_ones():
    data = glue_distill.load_task("sentiment", subset=60)
    model = small_model(data)
    network = glue_distill.build_classifier(model, ("student", 0)).eval()
    for weights in network.parameters():
        weights.data *= 2  # as initialised, a network says nearly the same of every text
    split = data.splits["train"]
    fast = glue_distill.logits_of(network, model.tokens["train"])
    tokenizer = glue_distill.byte_level_bpe(split.columns()[0], glue_distill.VOCABULARY)
    for k in (0, 11, 59):
        with torch.no_grad():
            plain = network(**tokenizer(split.texts[k][0], return_tensors="pt")).logits[0]
        assert torch.allclose(fast[k], plain, atol=1e-5)
    assert not torch.allclose(fast[0], fast[11], atol=1e-3)
    half = glue_distill.logits_of(network, model.tokens["train"], "bf16")
    assert not torch.equal(half, fast) and torch.allclose(half, fast, atol=0.1)


def test_scores_are_the_textbook_ones_and_paired():
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 1])  # 3 hits, 1 miss; 1 false alarm, 3 rejections
    predicted = np.array([1, 1, 0, 1, 0, 0, 0, 1])
    found = glue_distill.scores(predicted, labels, 200)
    assert found["acc"][0] == 6 / 8 and found["f1"][0] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1))
    assert found["mcc"][0] == pytest.approx((3 * 3 - 1) / 16)
    wrong = glue_distill.scores(1 - predicted, labels, 200)  # on the same draws
    assert np.allclose(found["acc"] + wrong["acc"], 1) and np.allclose(found["mcc"], -wrong["mcc"])
    always = glue_distill.scores(np.ones(8, int), labels, 200)
    assert not always["mcc"].any() and always["f1"][0] == pytest.approx(2 / 3)


# ---------------------------------------------------------------- runs


def test_text_runs_hold_what_was_trained_and_teach_from_their_stored_logits(texts):
    for name in ("1x16-teacher", "1x16-onehot", "1x8-onehot", "1x16-1x16-kd", "1x16-1x8-kd"):
        run = run_of(name, 1, texts)
        assert {"config.json", "metrics.jsonl", "checkpoint.pt", "logits.npz"} <= {file.name for file in run.iterdir()}
        first, last = runs.read_metrics(run)
        assert (last["epoch"], last["step"]) == (2, 10) and last["tokens_per_s"] > 0
        assert (last["ce_weight"], last["kd_weight"]) == ((0, 1) if name.endswith("kd") else (1, 0))
        rates = [line["lr"] / 1e-3 for line in (first, last)]  # up to step 0.6, then linearly to 0 after the tenth
        assert rates == pytest.approx([6 / 9.4, 1 / 9.4])
    assert len(list((texts / "runs").iterdir())) == 10
    data = glue_distill.load_task("sentiment", subset=160)
    model = small_model(data)
    train = data.splits["train"]
    run = run_of("1x16-teacher", 0, texts)
    network = glue_distill.build_classifier(model, ("teacher", 0))
    network.load_state_dict(weights_of(run))
    arrays = runs.read_npz(run / "logits.npz", runs.LOGITS)
    assert np.allclose(arrays["train_logits"], glue_distill.logits_of(network, model.tokens["train"]), atol=1e-5)
    assert np.array_equal(arrays["train_labels"], train.labels)
    assert np.array_equal(arrays["train_clean_labels"], train.clean)
    accuracy = np.mean(arrays["test_logits"].argmax(1) == arrays["test_labels"])
    assert accuracy == pytest.approx(runs.read_metrics(run)[-1]["test_acc"])
    kd, onehot = (runs.read_config(run_of(name, 0, texts)) for name in ("1x16-1x16-kd", "1x16-onehot"))
    assert kd["facts"]["teacher_sha256"] == hashlib.sha256(arrays["train_logits"].tobytes()).hexdigest()
    assert kd["flags"]["temperature"] == 2 and onehot["flags"]["temperature"] is None
    starts = [config["facts"]["initial_sha256"] for config in (runs.read_config(run), kd, onehot)]
    assert starts[1] == starts[2] != starts[0]
    # Of these earlier runs are known, too: with one more or less none would count as finished.
    names = {*"arch lr epochs batch_size warmup precision device overwrite quiet label_noise".split()}
    assert kd["flags"].keys() == onehot["flags"].keys() == names | {"ce_weight", "kd_weight", "temperature"}
    assert kd["facts"].keys() >= {"tokens_sha256", "initial_sha256", "max_length", "vocabulary"}
    assert kd["facts"]["loss"] == runs.source_of(common.student_loss)
    assert onehot["facts"]["loss"] == runs.source_of(common.one_hot_loss)


def test_text_students_have_the_loss_of_common(texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)

    def doubled(model, images, labels, teacher_logits, ce_weight, kd_weight, args):
        loss, logits = real(model, images, labels, teacher_logits, ce_weight, kd_weight, args)
        return 2 * loss, logits

    real = common.student_loss
    shutil.copytree(texts / "runs", "runs")
    monkeypatch.setattr(common, "student_loss", doubled)
    assert "facts.loss" in input_error(glue_distill, *LANGUAGE, "--student", "1x16")
    shutil.rmtree(run_of("1x16-1x16-kd"))
    language("--student", "1x16", "--train-only")
    losses = [runs.read_metrics(run_of("1x16-1x16-kd", 0, folder))[0]["train_loss"] for folder in (".", texts)]
    assert losses[0] == pytest.approx(2 * losses[1], rel=0.2)


def test_the_language_report_agrees_with_the_runs(texts):
    results = texts / "results" / "glue-sentiment"
    for student in ("1x16", "1x8"):
        figures = {"fig1a.png", "fig1a.pdf", "deviation.json", "statistics.md", "claims.json"}
        assert figures <= {file.name for file in (results / student).iterdir()}
    report = runs.read_json(results / "glue.json")
    rows = {row["network"]: row for row in report["rows"]}
    assert list(rows) == ["teacher", "1x16 onehot", "1x16 kd", "1x8 onehot", "1x8 kd"]
    for network, name in (("teacher", "1x16-teacher"), ("1x8 kd", "1x16-1x8-kd")):
        accuracies = [runs.read_metrics(run_of(name, seed, texts))[-1]["test_acc"] for seed in (0, 1)]
        assert rows[network]["test_acc"]["seeds"] == pytest.approx(accuracies)
    test = glue_distill.load_task("sentiment").splits["test"]
    bayes = report["task"]["bayes_accuracy"]
    assert bayes == np.mean(test.clean == test.labels)
    marked = {}
    for file in results.rglob("claims.json"):
        marked.update({row["section"]: file.parent.name for row in claims.headlines(runs.read_json(file))})
    assert marked == dict(language="1x16")  # of the first student
    claim = runs.read_json(results / "claims.json")[0]
    assert claim["measured"] == pytest.approx(rows["teacher"]["test_acc"]["value"] / bayes)
    assert "the teacher fits" in (results / "glue.md").read_text() and "the teacher fits" in claim["note"]


DROPOUT = ["--teacher", "roberta", "--student", "roberta", "--lr", 1e-3, "--train-only"]  # saved models have it


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """A folder where a saved model was distilled into itself."""
    folder = tmp_path_factory.mktemp("uninterrupted")
    save_pretrained(folder / "roberta", "roberta")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        language(*DROPOUT)
    return folder


@pytest.mark.parametrize("kind, at, lost", [("crash", 8, 8), ("crash", 29, 1), ("SIGTERM", 3, 0)])
def test_an_interrupted_text_run_ends_in_the_same_weights(kind, at, lost, uninterrupted, tmp_path, monkeypatch):
    """Steps 1-10 are the teacher's, 11-20 the one-hot student's, 21-30 the distilled student's."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(uninterrupted / "roberta", "roberta")
    monkeypatch.setattr(engine, "SAVE_SECONDS", 0 if at == 29 else math.inf)
    real = torch.nn.utils.clip_grad_norm_
    calls = []

    def interrupt(*args):
        calls.append(1)
        if len(calls) == at:
            if kind == "crash":
                raise MemoryError
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)

    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)
    with pytest.raises(MemoryError if kind == "crash" else SystemExit) as stopped:
        language(*DROPOUT)
    assert kind == "crash" or stopped.value.code == 130
    for _ in range(2):  # the second time all runs are finished
        language(*DROPOUT)
    for name in ("roberta-teacher", "roberta-onehot", "roberta-roberta-kd"):
        assert same_run(run_of(name), run_of(name, 0, uninterrupted)), name
    assert len(calls) == 30 + lost  # a crash costs the steps since the last save, a signal none
    assert not Path("results").exists()


def test_precision_is_chosen_by_the_processor_but_fp32_for_the_embedded_task(monkeypatch):
    for half in (True, False):
        monkeypatch.setattr(engine, "bf16_in_hardware", lambda half=half: half)
        for task, chosen in (("sentiment", "fp32"), ("cola", "bf16" if half else "fp32")):
            assert glue_distill.parse(["--task", task, "--device", "cpu"]).precision == chosen


# ---------------------------------------------------------------- other tasks and models


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_a_saved_pretrained_model_is_distilled(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    saved = save_pretrained(tmp_path / family, family)
    reviews = glue_distill.sentiment(60, "test", 1)
    first = reviews.columns()[0]
    pairs = zip(first, first[1:] + first[:1], reviews.labels, strict=True)
    Path("pairs.csv").write_text("text,text2,label\n" + "".join(f'"{a}","{b}",{y}\n' for a, b, y in pairs))
    data = glue_distill.load_task("csv:pairs.csv")
    model = small_model(data, family)
    columns = data.splits["train"].columns()
    networks = [glue_distill.build_classifier(model, (role, 0)) for role in ("teacher", "student", "student")]
    weights = [network.state_dict() for network in networks]
    original = saved.state_dict()
    starts = (f"{family}.embeddings.w", f"{family}.encoder.")
    shared = [key for key in original if key.startswith(starts)]
    pairs = itertools.product(weights, shared)
    assert len(shared) > 10 and all(torch.equal(state[key], original[key]) for state, key in pairs)
    head = next(key for key in weights[0] if key.startswith("classifier") and key.endswith("weight"))
    assert not torch.equal(weights[0][head], weights[1][head]) and torch.equal(weights[1][head], weights[2][head])
    inputs = model.tokens["train"].batch(torch.tensor([0, 3]))
    both = [[texts[k] for k in (0, 3)] for texts in columns]
    tokenizer = transformers.AutoTokenizer.from_pretrained(family)
    plain = tokenizer(*both, padding=True, truncation=True, max_length=32, return_tensors="pt")
    assert inputs.keys() == plain.keys()  # BERT's pairs have segment ids
    assert all(torch.equal(inputs[key], plain[key]) for key in plain)
    language("--subset", 0, "--task", "csv:pairs.csv", "--teacher", family, "--lr", 1e-3, "--train-only")
    after = weights_of(f"runs/pairs-{family}-{family}-kd-s0")
    assert weights[1].keys() == after.keys() and not torch.equal(weights[1][shared[0]], after[shared[0]])


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_a_saved_classifier_keeps_its_head_by_the_names_of_its_classes(family, tmp_path, capsys):
    write_glue(tmp_path, "mnli")
    data = glue_distill.load_task("mnli", tmp_path)
    there = ["Contradiction", "ENTAILMENT", "neutral "]
    saved = save_pretrained(tmp_path / "saved", family, there).eval()
    for weights in saved.parameters():
        weights.data += 0.1 * torch.randn_like(weights)
    saved.save_pretrained(tmp_path / "saved")
    model = small_model(data, str(tmp_path / "saved"))
    assert "its head is kept" in capsys.readouterr().out
    ours = glue_distill.logits_of(glue_distill.build_classifier(model, ("teacher", 0)), model.tokens["test"])
    plain = glue_distill.logits_of(saved, model.tokens["test"])
    order = [[name.strip().lower() for name in there].index(name) for name in NLI]
    assert torch.equal(ours, plain[:, order]) and not torch.allclose(ours, plain, atol=0.01)


@pytest.mark.parametrize("names", [["LABEL_0", "LABEL_1"], ["negative", "positive"], NLI])
@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_a_saved_classifier_of_other_classes_gets_a_new_head(family, names, tmp_path, capsys):
    write_glue(tmp_path, "rte")
    saved = save_pretrained(tmp_path / "saved", family, names).state_dict()
    model = small_model(glue_distill.load_task("rte", tmp_path), str(tmp_path / "saved"))
    assert "a new head" in capsys.readouterr().out
    one, again, other = (glue_distill.build_classifier(model, ("teacher", k)).state_dict() for k in (0, 0, 1))
    for key in one:
        assert torch.equal(one[key], again[key])
        if key.startswith(f"{family}."):
            assert torch.equal(one[key], saved[key])
        elif key.endswith("weight"):
            assert len({runs.weights_hash({"head": state[key]}) for state in (one, other, saved)}) == 3
    assert one["classifier.weight" if family == "bert" else "classifier.out_proj.weight"].shape == (2, 16)


def test_mnli_reports_both_dev_sets_and_cola_its_correlation(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for task, columns in (("mnli", ["train_acc", "test_acc", "mismatched_acc"]), ("cola", ["train_acc", "test_mcc"])):
        write_glue(tmp_path, task, 30)
        language("--subset", 0, "--task", task, "--data-dir", ".", "--epochs", 1, "--student", "1x8")
        row = runs.read_json(f"results/glue-{task}/glue.json")["rows"][0]
        assert list(row) == ["network", *columns]
    logits = runs.read_npz("runs/mnli-1x8-onehot-s0/logits.npz", ("mismatched_logits", "mismatched_labels"))
    assert logits["mismatched_logits"].shape == (30, 3)


def test_the_claim_of_cola_is_kd_minus_one_hot(tmp_path):
    write_glue(tmp_path, "cola", 30)
    data = glue_distill.load_task("cola", tmp_path)
    folders = {}
    labels = data.splits["test"].labels
    for name, right in (("teacher", 30), ("1x8 onehot", 20), ("1x8 kd", 29)):
        folders[name] = tmp_path / name
        folders[name].mkdir()
        logits = np.eye(2)[np.where(np.arange(30) < right, labels, 1 - labels)]
        runs.write_npz(folders[name] / "logits.npz", dict(train_logits=logits, test_logits=logits))
    glue_distill.report_scores([folders], data, SimpleNamespace(bootstrap=200, results=tmp_path, student=["1x8"]))
    (claim,) = runs.read_json(tmp_path / "claims.json")
    assert "higher MCC on the dev set" in claim["claim"] and claim["verdict"] == "holds" and claim["measured"] > 0.3


def test_a_text_network_learns_the_labels_and_teacher_logits_of_its_own_texts(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    args = glue_distill.parse("--subset 160 --epochs 1 --lr 1e-30 --max-length 32 --quiet --device cpu".split())
    data = glue_distill.load_task("sentiment", subset=160)
    model = glue_distill.prepare("1x16", data, args)
    taught = np.random.default_rng(0).normal(0, 3, (160, 2))
    logits = glue_distill.logits_of(glue_distill.build_classifier(model, ("student", 0)), model.tokens["train"])
    one_hot = F.cross_entropy(logits, torch.from_numpy(data.splits["train"].labels))
    distilled = common.kd_loss(logits, torch.from_numpy(taught), 2.0)
    for teacher, wanted in ((None, one_hot), (taught.astype(np.float32), distilled)):
        glue_distill.train_text(Path(f"run {wanted}"), model, args, "student", 0, data, teacher)
        assert runs.read_metrics(f"run {wanted}")[-1]["train_loss"] == pytest.approx(wanted.item(), rel=1e-4)


# ---------------------------------------------------------------- bad input


def test_bad_language_input_gets_one_line(texts, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_glue(tmp_path / "narrow", "sst-2")
    torn = Path("narrow/SST-2/train.tsv")
    torn.write_text(torn.read_text().replace("sentence\tlabel", "text\tlabel"))
    Path("no.csv").write_text("opinion,label\na,1\n")
    for name, family in (("mixed", "roberta"), ("other", "bert")):
        save_pretrained(tmp_path / name, family)
    for file in Path("other").glob("*token*"):  # BERT's tokenizer beside RoBERTa's weights
        shutil.copy(file, Path("mixed") / file.name)
    save_pretrained(tmp_path / "swapped", "roberta")  # a config beside weights that are not its own
    shutil.copy("other/model.safetensors", "swapped/model.safetensors")
    Path("wordless").mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(f"other/{name}", f"wordless/{name}")
    save_pretrained(tmp_path / "evil", "roberta")
    Path("evil/model.safetensors").unlink()
    torch.save({"roberta.embeddings.word_embeddings.weight": Malicious()}, "evil/pytorch_model.bin")
    taught = run_of("1x16-teacher", 0, texts)
    cases = [
        (["--task", "sst2x"], "unknown --task", "sst-2"),
        (["--task", "rte"], "nyu-mll/glue", "train.tsv", "RTE"),
        (["--task", "imdb"], "train.csv", "imdb"),
        (["--task", "sst-2", "--data-dir", "narrow"], "lacks the column sentence"),
        (["--task", "csv:no.csv"], "line 1", "'opinion,label'", "--text-column"),
        (["--task", "rte", "--text-column", "opinion"], "--text-column", "csv:PATH"),
        (["--task", "csv:absent.csv"], "absent.csv"),
        (["--subset", 9999], "--subset 9999", "4000"),
        (["--teacher", "mixed"], "another model"),
        (["--teacher", "other", "--max-length", 64], "--max-length 64", "42"),
        (["--teacher", "roberta-base"], "roberta-base", "vocab.json"),
        (["--teacher", "./absent"], "./absent", "folder"),
        (["--teacher", "9" * 50 + "x16"], "LAYERSxHIDDEN"),
        (["--teacher", "swapped"], "swapped lacks", "config.json"),
        (["--teacher", "evil"], "model evil cannot be read"),
        (["--teacher", "wordless"], "tokenizer", "vocab.json"),
        (["--teacher", "x/m", "--student", "y/m"], "end alike"),
    ]
    for flags, *words in cases:
        line = input_error(glue_distill, *LANGUAGE, *flags)
        assert all(word in line for word in words), line
    assert not Path("ran").exists()  # no code of a model's weights
    monkeypatch.chdir(texts)
    before = hashes(taught)
    line = input_error(glue_distill, *LANGUAGE, "--data-seed", 1)  # a teacher of other texts is none
    assert "data.data_seed: 0 there, 1 now" in line
    # All planned folders are compared first: seed 2 is not trained before seed 1 is refused.
    line = input_error(glue_distill, *LANGUAGE, "--student", "1x8", "--temperature", 3, "--seeds", 2, 1)
    assert "1x8-kd-s1 holds a run with other settings (flags.temperature: 2.0 there, 3.0 now)" in line
    assert not run_of("1x16-teacher", 2).exists()
    assert before == hashes(taught)


@pytest.mark.parametrize("task", ["cola", "sst-2", "qqp", "mnli"])
def test_damaged_tsv_files_are_refused_or_whole(task, tmp_path):
    file = write_glue(tmp_path, task) / "train.tsv"
    good = file.read_bytes()

    @fuzz(30)
    @given(st.sampled_from((b"", b"\n", b"\t", b"\xff")) | damage_to(good))
    def check(content):
        file.write_bytes(content)
        data = valid_or_refused(lambda: glue_distill.load_task(task, tmp_path))
        for split in data.splits.values() if data else ():
            assert len(split.texts) == len(split.labels) and len({len(text) for text in split.texts}) == 1
            assert 0 <= split.labels.min() <= split.labels.max() < data.facts["classes"]

    check()


LABELS = st.sampled_from(("0", "1", "²", "02", "9" * 5000, "1e9999", "", "good")) | st.text(max_size=5)
CSV_ROW = st.tuples(st.text(max_size=10), LABELS).map(lambda pair: '"{}",{}'.format(*pair))
HEADER = st.sampled_from(("text,label", "text,label", "label,text", "text", "", "text,text,label", "\ufefftext,label"))


@fuzz(40)
@given(HEADER, st.lists(CSV_ROW | st.just("a,0") | st.just('b,"1"') | st.just('"'), max_size=80))
def test_csv_files_of_any_content_are_refused_or_whole(tmp_path_factory, header, rows):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    data = valid_or_refused(lambda: load_csv(path, "\n".join([header, *rows])))
    for split in data.splits.values() if data else ():
        assert len(split.texts) == len(split.labels) and all(text.strip() for (text,) in split.texts)
        assert 0 <= split.labels.min() <= split.labels.max() < data.facts["classes"]


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "model.safetensors"])
def test_a_damaged_saved_model_is_refused_or_read(name, tmp_path):
    save_pretrained(tmp_path / "model", "roberta")
    data = glue_distill.load_task("sentiment", subset=40)
    file = tmp_path / "model" / name
    data.splits["test"] = data.splits["test"].take(np.arange(20))
    good = file.read_bytes()

    def read():
        model = small_model(data, str(tmp_path / "model"))
        return glue_distill.logits_of(glue_distill.build_classifier(model, ("student", 0)), model.tokens["test"])

    @fuzz(6)
    @given(damage_to(good))
    def check(content):
        file.write_bytes(content)
        logits = valid_or_refused(read)
        assert logits is None or logits.shape == (20, 2)

    check()
