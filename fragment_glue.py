import json
import os
import re
import shutil
import signal
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import common
import glue_distill
from test_smoke import hashes, ok, one_line_error, run_cli

# Before transformers is imported: otherwise every absent model is asked for over the network for half a minute. Imported
# here, so that the fork server of run_cli has it loaded.
os.environ["HF_HUB_OFFLINE"] = "1"
from transformers import BertForSequenceClassification, PreTrainedTokenizerFast, RobertaForMaskedLM, RobertaForSequenceClassification  # noqa: E402, F401

LANGUAGE = ["--teacher", "1x16", "--subset", "160", "--epochs", "2", "--mlm-epochs", "1", "--max-length", "32", "--quiet", "--device", "cpu", "--bootstrap", "100"]


def language(*flags):
    """glue_distill.py in this process, in the working folder."""
    glue_distill.main([*LANGUAGE, *map(str, flags)])


def state_of(run):
    state = common.load_checkpoint(Path(run) / "checkpoint.pt")
    history = [{key: value for key, value in line.items() if key not in ("seconds", "tokens_per_s")} for line in state["history"]]
    return state["model"], history


def same_text_run(one, other):
    (weights, history), (others, other_history) = state_of(one), state_of(other)
    return history == other_history and weights.keys() == others.keys() and all(torch.equal(weights[key], others[key]) for key in weights)


@pytest.fixture(scope="session")
def texts(tmp_path_factory):
    """A folder where the embedded task was distilled into two students, for two seeds, in every mode."""
    folder = tmp_path_factory.mktemp("texts")
    ok(run_cli("glue_distill.py", *LANGUAGE, "--student", "1x16", "1x8", "--seeds", 0, 1, cwd=folder))
    return folder


def parsed_score(text):
    """The score of an embedded review, read off its words: a second, plain implementation of its documented rules."""
    strength = {word: sign * s for sign, words in ((1, glue_distill.GOOD), (-1, glue_distill.BAD)) for s, group in words.items() for word in group}
    def clause(words):
        score = next(strength[word] for word in words if word in strength)
        score *= next((factor for word, factor in glue_distill.INTENSIFIERS.items() if word and word in words), 1.0)
        return score * (-0.6 if "not" in words else 1.0)
    parts = re.split(" and | but | , ", text.removesuffix(" .").removeprefix("although "))
    values = [clause(part.split()) for part in parts]
    return sum(values) if " and " in text or len(values) == 1 else 0.4 * values[0] + values[1]


def test_embedded_reviews_have_the_documented_probabilities_and_labels_drawn_from_them():
    split = glue_distill.sentiment(4000, "train", 3)
    plain = 1 / (1 + np.exp(-2 * np.array([parsed_score(text) for text in split.first])))
    assert np.allclose(split.probability[:, 1], plain) and np.allclose(split.probability.sum(1), 1)
    for low in np.arange(0, 1, 0.2):   # calibrated within 4 standard errors
        inside = (plain >= low) & (plain < low + 0.2)
        assert inside.sum() > 100 and abs(split.labels[inside].mean() - plain[inside].mean()) < 4 * np.sqrt(0.25 / inside.sum())
    assert split.first == glue_distill.sentiment(4000, "train", 3).first
    assert len({tuple(glue_distill.sentiment(50, part, seed).first) for part in ("train", "test") for seed in (0, 1)}) == 4


GLUE_ROWS = {   # folder, header (None: the file has none), rows as (label, first, second)
    "cola": (["source", "label", "star", "sentence"], "{i}\t{label}\t*\t{first}", ["0", "1"]),
    "sst-2": (["sentence", "label"], "{first}\t{label}", ["0", "1"]),
    "mrpc": (["Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"], "{label}\t{i}\t{i}\t{first}\t{second}", ["0", "1"]),
    "rte": (["index", "sentence1", "sentence2", "label"], "{i}\t{first}\t{second}\t{label}", ["entailment", "not_entailment"]),
    "qnli": (["index", "question", "sentence", "label"], "{i}\t{first}\t{second}\t{label}", ["entailment", "not_entailment"]),
    "qqp": (["id", "qid1", "qid2", "question1", "question2", "is_duplicate"], "{i}\t1\t2\t{first}\t{second}\t{label}", ["0", "1"]),
    "mnli": (["index", "genre", "sentence1", "sentence2", "gold_label"], "{i}\tfiction\t{first}\t{second}\t{label}", ["entailment", "neutral", "contradiction"]),
    "wnli": (["index", "sentence1", "sentence2", "label"], "{i}\t{first}\t{second}\t{label}", ["0", "1"]),
}


def write_glue(root, task, n=24):
    """Files of GLUE's original layout with literal quotes, a form feed and a lone carriage return inside a sentence."""
    header, row, labels = GLUE_ROWS[task]
    folder = root / glue_distill.GLUE[task][0]
    folder.mkdir(parents=True)
    lines = [row.format(i=i, label=labels[i % len(labels)], first=f'he said " no {i}\x0c twice\r or', second=f"she replied {i} \"\"") for i in range(n)]
    content = "\n".join(([] if task == "cola" else ["\t".join(header)]) + lines) + "\r\n"
    for name in ("train", "dev_matched", "dev_mismatched") if task == "mnli" else ("train", "dev"):
        (folder / f"{name}.tsv").write_bytes((b"\xef\xbb\xbf" if task == "mrpc" else b"") + content.encode())
    return folder


@pytest.mark.parametrize("task", list(GLUE_ROWS))
def test_glue_files_are_read_with_their_quirks(task, tmp_path):
    folder = write_glue(tmp_path, task)
    data = glue_distill.load_task(task, tmp_path)
    train = data.splits["train"]
    classes = len(GLUE_ROWS[task][2])
    assert len(train.first) == 24 and train.first[5] == 'he said " no 5\x0c twice\r or' and train.labels.tolist() == [k % classes for k in range(24)]
    assert (train.second is None) == (task in ("cola", "sst-2")) and (train.second is None or train.second[5] == 'she replied 5 ""')
    assert set(data.splits) == {"train", "test"} | ({"mismatched"} if task == "mnli" else set()) and data.classes == classes

    lines = (folder / "train.tsv").read_bytes().split(b"\n")
    lines[7] = lines[7].split(b"\t")[0]
    (folder / "train.tsv").write_bytes(b"\n".join(lines))
    if task == "qqp":   # its published file has such rows
        assert len(glue_distill.load_task(task, tmp_path).splits["train"].first) == 23
    else:
        with pytest.raises(common.InputError, match=r"train.tsv, line 8: "):
            glue_distill.load_task(task, tmp_path)


HUB_COLUMNS = {   # of nyu-mll/glue on the hub
    "cola": ["sentence"], "sst2": ["sentence"], "mrpc": ["sentence1", "sentence2"], "rte": ["sentence1", "sentence2"], "qnli": ["question", "sentence"],
    "qqp": ["question1", "question2"], "mnli": ["premise", "hypothesis"], "wnli": ["sentence1", "sentence2"], None: ["text"]}


@pytest.mark.parametrize("task", [*GLUE_ROWS, "imdb", "ag_news"])
def test_without_local_files_a_task_comes_from_the_hub(task, tmp_path, monkeypatch):
    datasets = pytest.importorskip("datasets")
    def load(repository, config, split):
        assert repository == glue_distill.HUB.get(task, "nyu-mll/glue") and split in ("train", "test" if config is None else "validation", "validation_matched", "validation_mismatched")
        columns = {column: [f"{column} {split} {k}" for k in range(20)] for column in HUB_COLUMNS[config]}
        return datasets.Dataset.from_dict(dict(columns, label=[k % 2 for k in range(20)]))
    monkeypatch.setattr(datasets, "load_dataset", load)
    data = glue_distill.load_task(task, tmp_path)
    columns = HUB_COLUMNS[None if task in glue_distill.HUB else task.replace("-", "")]
    assert data.splits["train"].first[7] == f"{columns[0]} train 7" and data.splits["train"].labels[7] == 1 and data.facts["n_test"] == 20
    assert data.splits["train"].second is None if len(columns) == 1 else data.splits["test"].second[3].startswith(f"{columns[1]} validation")


def test_subsets_of_texts_are_nested_and_keep_their_positions(tmp_path):
    write_glue(tmp_path / "glue", "rte")   # also below data_dir/glue
    whole, large, small = (glue_distill.load_task("rte", tmp_path, n) for n in (0, 16, 10))
    assert set(small.index) < set(large.index) < set(whole.index) and len(small.index) == 10
    assert small.splits["train"].second == [whole.splits["train"].second[k] for k in small.index] and whole.facts["sha256"] != small.facts["sha256"]


def test_csv_files_and_folders_load(tmp_path):
    rows = "".join(f'"text, number {k}",other {k},{"good" if k % 3 else "bad"}\n' for k in range(60))
    (tmp_path / "one.csv").write_text("text,text2,label\n" + rows)
    data = glue_distill.load_task(f"csv:{tmp_path / 'one.csv'}")
    assert data.facts["n_train"] == 48 and data.facts["n_test"] == 12 and data.splits["train"].first[0].startswith("text, number")
    texts = data.splits["train"].first + data.splits["test"].first
    assert len(set(texts)) == 60 and all((int(t.split()[-1]) % 3 > 0) == bool(y) for s in data.splits.values() for t, y in zip(s.first, s.labels))
    folder = tmp_path / "imdb"   # a local folder serves instead of the network
    folder.mkdir()
    for part in ("train", "test"):
        (folder / f"{part}.csv").write_text("label,text\n" + "".join(f"{10 - 8 * (k % 2)},film {part} {k}\n" for k in range(20)))
    data = glue_distill.load_task("imdb", tmp_path)
    assert data.splits["test"].first[3] == "film test 3" and data.splits["test"].labels[:2].tolist() == [1, 0]   # "2" before "10"


def test_batches_cover_every_text_once_by_key_and_pad_less_than_random_ones():
    lengths = torch.randint(3, 60, (1003,), generator=torch.Generator().manual_seed(0))
    plan = glue_distill.batches(lengths, 16, "student", 0, 4)
    assert sorted(torch.cat(plan).tolist()) == list(range(1003)) and len(plan) == 63
    padded = lambda plan: sum(len(index) * int(lengths[index].max()) for index in plan)
    assert padded(plan) < 1.1 * int(lengths.sum()) < padded(list(torch.randperm(1003).split(16)))
    again = glue_distill.batches(lengths, 16, "student", 0, 4)
    assert all(torch.equal(a, b) for a, b in zip(plan, again))
    for other in (("teacher", 0, 4), ("student", 1, 4), ("student", 0, 5)):
        assert not torch.equal(torch.cat(plan), torch.cat(glue_distill.batches(lengths, 16, *other)))
    means = [lengths[index].double().mean().item() for index in plan]
    assert np.corrcoef(means[:-1], means[1:])[0, 1] < 0.5   # long and short batches are mixed


def small_model(data, name="1x16"):
    return glue_distill.prepare(name, data, SimpleNamespace(tokenizer=None, vocab_size=8000, max_length=32, device="cpu"))


def test_logits_and_masked_loss_equal_the_librarys_plain_ones():
    data = glue_distill.load_task("sentiment", subset=60)
    model = small_model(data)
    network = glue_distill.build_classifier(model, ("student", 0)).eval()
    for weights in network.parameters():
        weights.data *= 2   # as initialised, a network says nearly the same of every text
    tokens, split = model.tokens["train"], data.splits["train"]
    fast = glue_distill.logits_of(network, tokens, batch=7)
    for k in (0, 11, 59):
        with torch.no_grad():
            plain = network(**model.tokenizer(split.first[k], return_tensors="pt")).logits[0]
        assert torch.allclose(fast[k], plain, atol=1e-5)
    assert not torch.allclose(fast[0], fast[11], atol=1e-3)

    masked = RobertaForMaskedLM(model.config).eval()
    inputs = tokens.batch(torch.arange(20))
    special = torch.tensor(model.tokenizer.all_special_ids)
    corrupted, chosen = glue_distill.mask_tokens(inputs["input_ids"], special, model.tokenizer.mask_token_id, len(model.tokenizer), 0, 0)
    got = glue_distill.masked_loss(masked.roberta, masked.lm_head, dict(inputs, input_ids=corrupted), chosen, inputs["input_ids"][chosen])
    plain = masked(**dict(inputs, input_ids=corrupted), labels=torch.where(chosen, inputs["input_ids"], -100)).loss
    assert torch.allclose(got, plain, atol=1e-5)


def test_masks_are_drawn_as_published_and_afresh_in_every_step():
    ids = torch.randint(5, 300, (400, 100), generator=torch.Generator().manual_seed(1))
    ids[:, 0], ids[:, 60:] = 0, 1
    special = torch.tensor([0, 1, 2, 3, 4])
    corrupted, chosen = glue_distill.mask_tokens(ids, special, 4, 300, 0, 0)
    assert not chosen[:, 0].any() and not chosen[:, 60:].any() and torch.equal(corrupted[~chosen], ids[~chosen])
    assert chosen[:, 1:60].double().mean() == pytest.approx(0.15, abs=0.01)
    assert (corrupted[chosen] == 4).double().mean() == pytest.approx(0.8, abs=0.03)
    assert (corrupted[chosen] == ids[chosen]).double().mean() == pytest.approx(0.1, abs=0.02)
    assert not torch.equal(chosen, glue_distill.mask_tokens(ids, special, 4, 300, 0, 1)[1])


def test_learning_rate_warms_up_and_decays_linearly():
    rates = [glue_distill.learning_rate(step, 1.0, 0.1, 100) for step in range(100)]
    assert rates[0] == pytest.approx(1 / 11) and max(rates) == pytest.approx(1.0, abs=0.02) and rates[55] == pytest.approx(0.5) and rates[-1] == pytest.approx(1 / 90)
    assert glue_distill.learning_rate(0, 1.0, 0.0, 10) == 1.0


def test_text_runs_hold_what_was_trained_and_teach_from_their_stored_logits(texts):
    folder = texts / "runs"
    for name in ("1x16-teacher", "1x16-onehot", "1x16-1x16-kd", "1x16-1x8-kd", "1x16-1x16-onehot2kd-0.5", "1x16-1x8-kd2onehot-0.5"):
        run = folder / f"sentiment-{name}-s1"
        assert {"config.json", "metrics.jsonl", "checkpoint.pt", "logits.npz"} <= {file.name for file in run.iterdir()}
        line = common.last_metrics(run)
        assert line["epoch"] == 2 and line["step"] == 10 and 0 <= line["padding_share"] < line["padding_share_to_max"] < 1 and line["tokens_per_s"] > 0
    data = glue_distill.load_task("sentiment", subset=160)
    model = small_model(data)
    network = glue_distill.build_classifier(model, ("teacher", 0))
    network.load_state_dict(common.load_checkpoint(folder / "sentiment-1x16-teacher-s0" / "checkpoint.pt")["model"])
    arrays = common.read_npz(folder / "sentiment-1x16-teacher-s0" / "logits.npz", (*common.LOGITS, "test_probability"))
    assert np.allclose(arrays["train_logits"], glue_distill.logits_of(network, model.tokens["train"]), atol=1e-5)
    assert np.array_equal(arrays["train_labels"], data.splits["train"].labels) and np.array_equal(arrays["train_clean_labels"], data.splits["train"].probability.argmax(1))
    assert np.mean(arrays["test_logits"].argmax(1) == arrays["test_labels"]) == pytest.approx(common.last_metrics(folder / "sentiment-1x16-teacher-s0")["test_acc"])
    kd = common.read_json(folder / "sentiment-1x16-1x8-kd-s0" / "config.json")
    assert kd["facts"]["teacher_sha256"] == glue_distill.teacher_logits(folder / "sentiment-1x16-teacher-s0", data)[1] and kd["flags"]["temperature"] == 2
    kinds = [json.loads(line) for line in (folder / "sentiment-1x16-1x16-onehot2kd-0.5-s0" / "metrics.jsonl").read_text().splitlines()]
    assert [(line["ce_weight"], line["kd_weight"]) for line in kinds] == [(1, 0), (0, 1)]


def test_teacher_and_student_share_pretrained_weights_but_no_head_order_or_result(texts):
    data = glue_distill.load_task("sentiment", subset=160)
    model = small_model(data)
    pretrained = RobertaForMaskedLM(model.config).state_dict()
    teacher, student, again = (glue_distill.build_classifier(model, (role, 0), pretrained) for role in ("teacher", "student", "student"))
    parts = [dict(network.named_parameters()) for network in (teacher, student, again)]
    for key in parts[0]:
        assert torch.equal(parts[1][key], parts[2][key])
        if key.startswith("roberta."):
            assert torch.equal(parts[0][key], parts[1][key]) and torch.equal(parts[0][key], pretrained[key]), key
    assert not torch.equal(teacher.classifier.dense.weight, student.classifier.dense.weight)
    alone = glue_distill.build_classifier(model, ("teacher", 0)), glue_distill.build_classifier(model, ("student", 0))
    assert not torch.equal(alone[0].roberta.encoder.layer[0].output.dense.weight, alone[1].roberta.encoder.layer[0].output.dense.weight)
    runs = [state_of(texts / "runs" / f"sentiment-{name}-s0")[0] for name in ("1x16-teacher", "1x16-onehot", "1x16-1x16-kd")]
    assert all(not torch.equal(a["classifier.dense.weight"], b["classifier.dense.weight"]) for k, a in enumerate(runs) for b in runs[:k])


def test_the_language_report_agrees_with_the_runs(texts):
    results = texts / "results" / "glue-sentiment"
    for student in ("1x16", "1x8"):
        assert {"fig1a.png", "fig1a.pdf", "deviation.json", "claims.json"} <= {file.name for file in (results / student).iterdir()}
        assert {"fig1b.png", "fig1b_curves.png", "switch.json", "claims.json"} <= {file.name for file in (results / student / "switch").iterdir()}
        rows = {(row["direction"], row["s"]): row for row in common.read_json(results / student / "switch" / "switch.json")["rows"]}
        accuracy = lambda name: np.mean([common.last_metrics(texts / "runs" / f"sentiment-{name}-s{seed}")["test_acc"] for seed in (0, 1)])
        assert rows["kd2onehot", 0.5]["accuracy"]["value"] == pytest.approx(accuracy(f"1x16-{student}-kd2onehot-0.5"))
        assert rows["onehot2kd", 0]["difference"]["value"] == pytest.approx(accuracy(f"1x16-{student}-kd") - accuracy(f"{student}-onehot"))
    report = common.read_json(results / "glue.json")
    assert [row["network"] for row in report["rows"]][:3] == ["teacher", "1x16 onehot", "1x16 kd"] and len(report["rows"][0]["test_acc"]) == 2
    bayes = glue_distill.load_task("sentiment").splits["test"]
    assert report["task"]["bayes_accuracy"] == np.mean((bayes.probability[:, 1] > 0.5) == bayes.labels)
    claim = common.read_json(results / "claims.json")[0]
    assert claim["measured"] == pytest.approx(np.mean(report["rows"][0]["test_acc"]) / report["task"]["bayes_accuracy"])


def test_text_branches_equal_runs_from_scratch_and_a_teacher_run_serves_again(texts, tmp_path):
    before = hashes(texts / "runs" / "sentiment-1x16-teacher-s0")
    ok(run_cli("glue_distill.py", *LANGUAGE, "--student", "1x16", "--mode", "onehot2kd", "kd2onehot", "--teacher-run", texts / "runs/sentiment-1x16-teacher-s{seed}",
               "--out", "alone", cwd=tmp_path))
    for direction in ("onehot2kd", "kd2onehot"):
        run, = tmp_path.glob(f"alone-*{direction}-0.5-s0")
        assert same_text_run(run, texts / "runs" / f"sentiment-1x16-1x16-{direction}-0.5-s0")
    assert before == hashes(texts / "runs" / "sentiment-1x16-teacher-s0") and not list(tmp_path.glob("alone-*teacher-s0"))


@pytest.mark.parametrize("kind, at", [("crash", 8), ("crash", 14), ("SIGTERM", 3), ("SIGTERM", 17)])
def test_an_interrupted_text_run_ends_in_the_same_weights(kind, at, texts, tmp_path, monkeypatch):
    """Steps 1-5 are the pretraining's, 6-15 the teacher's, 16-25 the distilled student's."""
    monkeypatch.chdir(tmp_path)
    real, calls = torch.nn.utils.clip_grad_norm_, []
    def interrupt(*args):
        calls.append(1)
        if len(calls) == at:
            if kind == "crash":
                raise MemoryError
            os.kill(os.getpid(), signal.SIGTERM)
        return real(*args)
    monkeypatch.setattr(torch.nn.utils, "clip_grad_norm_", interrupt)
    flags = ["--student", "1x16", "--mode", "kd"]
    with pytest.raises(MemoryError if kind == "crash" else SystemExit) as stopped:
        language(*flags)
    assert kind == "crash" or stopped.value.code == 130
    language(*flags)
    for name in ("1x16-mlm", "1x16-teacher", "1x16-1x16-kd"):
        assert same_text_run(f"runs/sentiment-{name}-s0", texts / "runs" / f"sentiment-{name}-s0"), name
    # A crash costs the steps since the last epoch's end, a signal none; finished runs are left alone.
    assert len(calls) == 25 + ({8: 3, 14: 4}[at] if kind == "crash" else 0)
    done = {run: hashes(run) for run in Path("runs").iterdir()}
    language(*flags)
    assert done == {run: hashes(run) for run in Path("runs").iterdir()}


def save_pretrained(folder, family, classes=None):
    """A tiny saved model of a family with its tokenizer, as a user would have it on disk."""
    import transformers
    from tokenizers import BertWordPieceTokenizer
    shape = dict(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=32, max_position_embeddings=42)
    words = [text for text in glue_distill.sentiment(200, "train", 0).first]
    torch.manual_seed(5)
    if family == "roberta":
        tokenizer = glue_distill.byte_level_bpe(None, words, 400)
        config = transformers.RobertaConfig(vocab_size=len(tokenizer), type_vocab_size=1, **shape)
    else:
        pieces = BertWordPieceTokenizer()
        pieces.train_from_iterator(words, vocab_size=400, show_progress=False)
        folder.mkdir(parents=True)
        pieces.save_model(str(folder))
        tokenizer = transformers.BertTokenizerFast(str(folder / "vocab.txt"))
        config = transformers.BertConfig(vocab_size=len(tokenizer), **shape)
    kind = ("ForSequenceClassification" if classes else "ForMaskedLM")
    if classes:
        config.num_labels = classes
    model = getattr(transformers, {"roberta": "Roberta", "bert": "Bert"}[family] + kind)(config)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return model


@pytest.mark.parametrize("family", ["roberta", "bert"])
def test_a_saved_pretrained_model_is_distilled(family, tmp_path):
    saved = save_pretrained(tmp_path / family, family)
    pairs = glue_distill.sentiment(60, "test", 1)
    (tmp_path / "pairs.csv").write_text("text,text2,label\n" + "".join(f'"{a}","{b}",{y}\n' for a, b, y in zip(pairs.first, pairs.first[1:] + pairs.first[:1], pairs.labels)))
    task = f"csv:{tmp_path / 'pairs.csv'}"
    data = glue_distill.load_task(task)
    model = small_model(data, str(tmp_path / family))
    networks = [glue_distill.build_classifier(model, (role, 0)) for role in ("teacher", "student", "student")]
    weights, original = [network.state_dict() for network in networks], saved.state_dict()
    shared = [key for key in original if key.startswith(f"{family}.embeddings.w") or key.startswith(f"{family}.encoder.")]
    assert len(shared) > 10 and all(torch.equal(w[key], original[key]) for w in weights for key in shared)
    head = next(key for key in weights[0] if key.startswith("classifier") and key.endswith("weight"))
    assert not torch.equal(weights[0][head], weights[1][head]) and torch.equal(weights[1][head], weights[2][head])
    inputs = model.tokens["train"].batch(torch.tensor([0, 3]))
    plain = model.tokenizer([data.splits["train"].first[k] for k in (0, 3)], [data.splits["train"].second[k] for k in (0, 3)], padding=True, truncation=True,
                            max_length=32, return_tensors="pt")
    assert inputs.keys() == plain.keys() and all(torch.equal(inputs[key], plain[key]) for key in plain)   # BERT's pairs have segment ids
    ok(run_cli("glue_distill.py", *LANGUAGE, "--subset", 0, "--task", task, "--teacher", family, "--mode", "kd", "--lr", 1e-3, cwd=tmp_path))
    before, after = weights[1], state_of(tmp_path / "runs" / f"pairs-{family}-{family}-kd-s0")[0]
    assert before.keys() == after.keys() and not torch.equal(before[shared[0]], after[shared[0]]) and not list(tmp_path.glob("runs/*mlm*"))


def test_mnli_reports_both_dev_sets_and_cola_its_correlation(tmp_path):
    for task, columns in (("mnli", ["test_acc", "mismatched_acc"]), ("cola", ["test_mcc"])):
        write_glue(tmp_path, task, 30)
        ok(run_cli("glue_distill.py", *LANGUAGE, "--subset", 0, "--task", task, "--data-dir", tmp_path, "--mode", "onehot", "--epochs", 1, cwd=tmp_path))
        row = common.read_json(tmp_path / "results" / f"glue-{task}" / "glue.json")["rows"][0]
        assert [key for key in row if key.startswith(("test", "mismatched"))] == columns
    logits = common.read_npz(tmp_path / "runs" / "mnli-1x16-onehot-s0" / "logits.npz", ("mismatched_logits", "mismatched_labels"))
    assert logits["mismatched_logits"].shape == (30, 3)


def test_scores_are_the_textbook_ones():
    labels = np.array([1, 1, 1, 0, 0, 0, 0, 1])
    logits = torch.stack([torch.zeros(8), torch.tensor([2.0, 1, -1, 1, -1, -2, -1, 3])], 1)   # 3 hits, 1 miss; 1 false alarm, 3 rejections
    got = glue_distill.scores(logits, labels)
    assert got["acc"] == 6 / 8 and got["f1"] == pytest.approx(2 * 3 / (2 * 3 + 1 + 1)) and got["mcc"] == pytest.approx((3 * 3 - 1) / 16)
    assert got["loss"] == pytest.approx(F.cross_entropy(logits, torch.tensor(labels)).item())


def test_bad_language_input_gets_one_line(texts, tmp_path):
    write_glue(tmp_path / "narrow", "sst-2")
    torn = tmp_path / "narrow" / "SST-2" / "train.tsv"
    torn.write_text(torn.read_text().replace("sentence\tlabel", "text\tlabel"))
    (tmp_path / "no.csv").write_text("review,label\na,1\n")
    (tmp_path / "torn.csv").write_text('text,label\n"a",1\nb\n')
    save_pretrained(tmp_path / "three", "roberta", 3)
    save_pretrained(tmp_path / "mixed", "roberta")
    save_pretrained(tmp_path / "other", "bert")
    for file in (tmp_path / "other").glob("*token*"):   # BERT's tokenizer beside RoBERTa's weights
        shutil.copy(file, tmp_path / "mixed" / file.name)
    (tmp_path / "empty.txt").write_text("\n")
    (tmp_path / "voc").mkdir()
    cases = [(["--task", "sst2x"], "unknown --task", "sst-2"), (["--task", "rte"], "nyu-mll/glue", "train.tsv", "RTE"), (["--task", "imdb"], "train.csv", "imdb"),
             (["--task", "sst-2", "--data-dir", "narrow"], "lacks the column sentence"), (["--task", "csv:no.csv"], "lacks the column text"),
             (["--task", "csv:torn.csv"], "line 3"), (["--task", "csv:absent.csv"], "absent.csv"), (["--subset", 9999], "--subset 9999", "4000"),
             (["--teacher", "three"], "3 labels", "2"), (["--teacher", "mixed"], "another family"), (["--teacher", "other", "--max-length", 64], "--max-length 64", "42"),
             (["--teacher", "roberta-base"], "roberta-base", "vocab.json"), (["--teacher", "./absent"], "not a folder"), (["--teacher", "2x50"], "multiple of 32"),
             (["--tokenizer", "voc"], "vocab.json and merges.txt"), (["--mlm-text", "empty.txt"], "empty"), (["--teacher-run", "absent"], "not a run folder"),
             (["--teacher-run", texts / "runs/sentiment-1x16-teacher-s0", "--subset", 100, "--student", "1x8"], "other texts"),
             (["--kd-weight", 0], "--kd-weight 0"), (["--switch-at", 1], "--switch-at"), (["--mode", "both"], "--mode", "onehot2kd"), (["--seeds", 1, 1], "twice")]
    for extra, *words in cases:
        one_line_error(run_cli("glue_distill.py", *LANGUAGE, *extra, cwd=tmp_path), *words)
    before = hashes(texts / "runs" / "sentiment-1x16-teacher-s0")
    one_line_error(run_cli("glue_distill.py", *LANGUAGE, "--epochs", 3, cwd=texts), "other settings", "flags.epochs: 2 there, 3 now", "--overwrite")
    assert before == hashes(texts / "runs" / "sentiment-1x16-teacher-s0")
