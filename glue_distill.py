"""Language (paper §3, GLUE): distil a text classifier into itself and a smaller one, with Figure 1a of each student.

    python glue_distill.py --seeds 0 1 2                                                  # embedded synthetic sentiment
    python glue_distill.py --task sst-2 --teacher roberta-base --student roberta-base distilroberta/distilroberta-base
    python glue_distill.py --task cola --teacher mini --student mini tiny                 # from scratch
    python glue_distill.py --task csv:reviews.csv --teacher FOLDER                        # columns text[,text2],label

Each seed trains a teacher on the labels and, for each student, a one-hot control and a network distilled from the
teacher's logits.npz. Text is not augmented, so these logits are exact. Teacher and student of a saved model begin from
its weights, each with a head, an order and dropout of its own. --results gets glue.json and glue.md with all
scores, and a folder for each student: fig1a, statistics and claims. Departures from the paper: sentence order is by
length within pools of 50 batches; GLUE's dev set is the test set (its labels are public).
"""

import csv
import hashlib
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple

import claims
import common
import deviation
import engine
import runs
from runs import InputError, number

import numpy as np
import torch
import torch.nn.functional as F

# ---------------------------------------------------------------- texts and tokens

GLUE = "nyu-mll/glue"


class Published(NamedTuple):
    """A published task, in files and on the hub."""

    folder: str  # in --data-dir
    columns: list  # of the texts, in its files
    label: str  # the label's column there
    classes: list  # in the order of Hugging Face
    hub_columns: list  # of the texts, on the hub
    repository: str = GLUE


PAIR = ["sentence1", "sentence2"]
BINARY = ["0", "1"]
ENTAILMENT = ["entailment", "not_entailment"]
NLI = ["entailment", "neutral", "contradiction"]
TOPICS = ["World", "Sports", "Business", "Sci/Tech"]
PUBLISHED = {
    "cola": Published("CoLA", ["sentence"], "label", BINARY, ["sentence"]),
    "sst-2": Published("SST-2", ["sentence"], "label", BINARY, ["sentence"]),
    "mrpc": Published("MRPC", ["#1 String", "#2 String"], "Quality", BINARY, PAIR),
    "rte": Published("RTE", PAIR, "label", ENTAILMENT, PAIR),
    "qnli": Published("QNLI", ["question", "sentence"], "label", ENTAILMENT, ["question", "sentence"]),
    "qqp": Published("QQP", ["question1", "question2"], "is_duplicate", BINARY, ["question1", "question2"]),
    "mnli": Published("MNLI", PAIR, "gold_label", NLI, ["premise", "hypothesis"]),
    "imdb": Published("imdb", ["text"], "label", ["neg", "pos"], ["text"], "stanfordnlp/imdb"),
    "ag_news": Published("ag_news", ["text"], "label", TOPICS, ["text"], "fancyzhx/ag_news"),
}
METRICS = {"cola": ["mcc"], "mrpc": ["acc", "f1"], "qqp": ["acc", "f1"]}  # of other tasks: accuracy
TASKS = ("sentiment", *PUBLISHED)
COLUMNS = dict(text=["text", "sentence", "review"], label=["label", "sentiment"], text2=["text2"])  # of csv: best first


@dataclass
class Split:
    """N texts of one split, each a tuple of one or two str, with labels int64 [N]."""

    texts: list
    labels: np.ndarray
    clean: np.ndarray  # the labels; for the embedded task the more probable class

    def take(self, index):
        return Split([self.texts[k] for k in index], self.labels[index], self.clean[index])

    def columns(self):
        """The first texts, and the second ones or None, as lists."""
        columns = [list(column) for column in zip(*self.texts, strict=True)]
        if len(columns) == 1:
            columns.append(None)
        return columns


def load_task(name, data_dir="data", subset=0, data_seed=0, columns=None):
    """One of TASKS, or csv:PATH, as a namespace of splits, index and facts.

    splits is {name: Split}: train, test and, for MNLI, mismatched. index [n_train] has the place of each training text
    in the full training set. facts go into config.json. subset is the number of training texts, 0 for all. It is a
    seeded draw, and smaller ones lie within larger ones. columns: see `read_csv`.
    InputError for an unknown task, a torn or missing file, or too few texts.
    """
    if name == "sentiment":
        names = ["negative", "positive"]
        splits = dict(train=sentiment(4000, "train", data_seed), test=sentiment(2000, "test", data_seed))
    elif name.startswith("csv:"):
        names, splits = csv_splits(Path(name[4:]), data_seed, columns)
    elif name in PUBLISHED:
        names, splits = published(name, Path(data_dir), data_seed)
    else:
        raise InputError(f"unknown --task {name!r}: use {', '.join(TASKS)} or csv:PATH")
    n = len(splits["train"].labels)
    if subset > n:
        raise InputError(f"--subset {subset} is larger than the {n} training texts of {name}: use at most {n}, or 0")
    order = torch.randperm(n, generator=common.generator("subset", data_seed)).numpy()
    index = np.sort(order[: subset or n])
    splits["train"] = splits["train"].take(index)
    test = splits["test"]
    if min(len(np.unique(split.labels)) for split in splits.values()) < 2 or len(test.labels) < 8:
        raise InputError(f"{name}: each split needs two classes, and test 8 texts: give more data or a larger --subset")
    known = set(splits["train"].texts)
    for key, split in splits.items():
        shared = sum(text in known for text in split.texts)
        if shared and key != "train":
            print(f"note: {shared} of the {len(split.texts)} {key} texts are among the training texts too")
    content = repr([(key, *split.columns(), split.labels.tolist()) for key, split in splits.items()])
    facts = dict(name=name, classes=len(names), class_names=list(names), subset=subset, label_noise=0.0)
    facts.update(data_seed=data_seed, sha256=hashlib.sha256(content.encode()).hexdigest())
    facts.update({f"n_{key}": len(split.labels) for key, split in splits.items()})
    if name == "sentiment":
        facts["bayes_accuracy"] = float((test.clean == test.labels).mean())
    return SimpleNamespace(splits=splits, index=index, facts=facts)


def published(name, data_dir, data_seed):
    """(class names, splits) of a published task, from its files in data_dir or data_dir/glue, else from the hub."""
    task = PUBLISHED[name]
    if task.repository == GLUE:
        config = name.replace("-", "")
        ending = "tsv"
        parts = dict(train="train", test="dev")
    else:
        config = None
        ending = "csv"
        parts = dict(train="train", test="test")
    if name == "mnli":
        parts.update(test="dev_matched", mismatched="dev_mismatched")
    for folder in (data_dir / task.folder, data_dir / "glue" / task.folder):
        if folder.is_dir() and ending == "csv":
            return csv_splits(folder, data_seed)
        if folder.is_dir():
            return task.classes, {key: read_tsv(folder / f"{part}.tsv", name) for key, part in parts.items()}
    import datasets

    splits = {}
    files = ", ".join(f"{part}.{ending}" for part in parts.values())
    with runs.reading(task.repository, f"put {files} into {data_dir / task.folder}"):
        for key, part in parts.items():
            loaded = datasets.load_dataset(task.repository, config, split=part.replace("dev", "validation"))
            texts = list(zip(*(list(loaded[column]) for column in task.hub_columns), strict=True))
            labels = np.array(loaded["label"], np.int64)
            splits[key] = Split(texts, labels, labels)
    return task.classes, splits


def read_tsv(path, name):
    """One file of GLUE's TSV layout as a Split. Quotes are literal; InputError names the line of a torn row.

    QQP's published file has a few torn rows; they are skipped and counted, as Hugging Face's loader does.
    """
    task = PUBLISHED[name]
    fix = "put GLUE's original file there"
    with runs.reading(path, fix):
        # Not splitlines(): it also breaks at form feeds and Unicode separators, which occur within sentences.
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    rows = [(k, line.rstrip("\r").split("\t")) for k, line in enumerate(lines, 1) if line.strip("\r")]
    if name == "cola":  # has no header
        header = ["source", "label", "star", "sentence"]
    else:
        header = rows.pop(0)[1] if rows else []
    missing = [column for column in (*task.columns, task.label) if column not in header]
    if missing:
        raise InputError(f"{path} lacks the column {missing[0]} in its header ({', '.join(header)[:120]}): {fix}")
    places = [header.index(column) for column in task.columns]
    label = header.index(task.label)
    texts = []
    labels = []
    for k, row in rows:
        if len(row) == len(header) and row[label] in task.classes:
            texts.append(tuple(row[place] for place in places))
            labels.append(task.classes.index(row[label]))
        elif name != "qqp":
            what = f"the row does not have {len(header)} columns, or its label is not {' or '.join(task.classes)}"
            raise InputError(f"{path}, line {k}: {what}: repair or remove that line")
    if len(texts) < len(rows):
        print(f"{path}: {len(rows) - len(texts)} torn rows skipped")
    labels = np.array(labels, np.int64)
    return Split(texts, labels, labels)


def csv_splits(path, data_seed, columns=None):
    """(class names, splits) of a folder's train.csv and test.csv, or of a file; there a seeded fifth is test."""
    if path.is_dir():
        texts, words = read_csv(path / "train.csv", columns)
        more, more_words = read_csv(path / "test.csv", columns)
        in_test = np.repeat([False, True], [len(texts), len(more)])
        texts = texts + more
        words = words + more_words
        if len({len(text) for text in texts}) > 1:
            raise InputError(f"{path}: one of the two files has a column text2, the other has none: give both the same")
    else:
        texts, words = read_csv(path, columns)
        different = list(dict.fromkeys(texts))
        order = torch.randperm(len(different), generator=common.generator("split", data_seed)).tolist()
        drawn = {different[k] for k in order[: len(order) // 5]}
        in_test = np.array([text in drawn for text in texts], bool)
        if len(different) < len(texts):
            print(f"{path}: {len(texts) - len(different)} rows repeat a text; all rows of a text go into one split")
    classes = [class_of(word) for word in words]
    names = {}  # {class: the shortest way in which it is written}
    train = np.flatnonzero(~in_test)
    test = np.flatnonzero(in_test)
    for known, _, word in sorted({(classes[k], len(words[k]), words[k]) for k in train}):
        names.setdefault(known, word)
    if len(names) > 20 and any(value != value.to_integral_value() for _, value, _ in names):
        what = f"{path}: the label is a regression target ({len(names)} different numbers, some of them not whole)"
        raise InputError(f"{what}: give classes, such as its values in a few bins")
    unseen = [word for word, known in zip(words, classes, strict=True) if known not in names]
    if unseen:
        raise InputError(f"{path}: the label {min(unseen)!r} is in no training text: give some, or remove these texts")
    places = {known: k for k, known in enumerate(names)}
    labels = np.array([places[known] for known in classes], np.int64)
    shown = [f"{word[:40]} ({count})" for word, count in zip(names.values(), np.bincount(labels), strict=True)][:20]
    print(f"{path}: {len(names)} classes; the first ones, with their numbers of texts: {', '.join(shown)}")
    every = Split(texts, labels, labels)
    return list(names.values()), dict(train=every.take(train), test=every.take(test))


def class_of(word):
    """The class of a csv label, for sorting: numbers come first, by size; 1, 1.0 and 01 are one class."""
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,4})?", word, re.IGNORECASE):
        return 0, Decimal(word), ""
    return 1, Decimal(0), word


def read_csv(path, columns=None):
    """(texts as `Split` has them, labels as words) of a CSV file with the columns text[,text2],label.

    columns: {column: its name, where that is none of COLUMNS}. InputError names the line in which a row begins that is
    torn, that lacks a text, or that a stray quote joins with others.
    """
    rows = []
    start = 1
    columns = columns or {}
    fix = "save it as UTF-8 CSV with the columns text[,text2],label"
    with runs.reading(path, fix), open(path, newline="", encoding="utf-8-sig") as file:
        reader = csv.reader(file, strict=True)  # not strict, the rest of the file may end up in one cell
        try:
            for row in reader:
                rows.append((start, row))
                start = reader.line_num + 1
        except csv.Error as error:
            fix = 'close the quote that opens there, double quotes inside of a cell (""), or shorten the cell'
            raise InputError(f"{path}, line {start}: the row cannot be read ({error}): {fix}") from None
    header = rows.pop(0)[1] if rows else []
    names = [name.strip().casefold() for name in header]
    places = {}
    for kind, wanted in COLUMNS.items():
        if columns.get(kind):
            wanted = [columns[kind].strip().casefold()]
        found = [name for name in wanted if name in names]
        if found and names.count(found[0]) == 1:
            places[kind] = names.index(found[0])
        elif found or kind != "text2":
            what = f"{path}, line 1 is {','.join(header)[:80]!r}: it must name one column {' or '.join(wanted)}"
            fix = "rename it, or give --text-column and --label-column"
            raise InputError(f"{what}, with commas between, not tabs or semicolons: {fix}")
    label = places.pop("label")
    rows = [(start, row) for start, row in rows if row]  # without blank lines
    known = {row[label] for _, row in rows if len(row) == len(header)}
    for start, row in rows:
        if len(row) != len(header) or not all(row[k].strip() for k in (label, *places.values())):
            what = f"the row must have {len(header)} columns (it has {len(row)}), a text and a label"
            raise InputError(f"{path}, line {start}: {what}: repair or remove it")
        # Two stray quotes join rows to a cell of several lines, of which one has all columns and a known label.
        for cell in row:
            lines = [line.split(",") for line in cell.splitlines()]
            if len(lines) > 1 and any(len(cells) == len(header) and cells[label] in known for cells in lines):
                raise InputError(f"{path}, line {start}: a cell holds whole rows: close the quote that opens there")
    texts = [tuple(row[k] for k in places.values()) for _, row in rows]
    return texts, [row[label].strip() for _, row in rows]


# The embedded task: adjectives by what they count, things and verbs, and factors.
ADJECTIVES = {
    2: "brilliant superb wonderful gripping moving hilarious dazzling splendid".split(),
    1: "pleasant decent solid charming neat likeable fresh tidy".split(),
    -1: "weak bland uneven thin dull stale slow loose".split(),
    -2: "dreadful awful tedious painful hollow clumsy lifeless hideous".split(),
}
THINGS = "plot acting dialogue score pacing ending cast photography humour script premise lead editing romance villain"
THINGS = THINGS.split()
VERBS = "is was seems feels looked remains".split()
INTENSIFIERS = {"": 1.0, "very": 1.5, "truly": 1.5, "rather": 0.75, "slightly": 0.5}


def sentiment(n, part, data_seed):
    """A Split of n generated film reviews with labels drawn from known probabilities (synthetic, of no corpus).

    A clause scores ±1 or ±2 by its adjective, times its intensifier, times −0.6 when negated. "A and B" joins clauses
    of the same sign and scores A + B; "A but B" and "although A, B" join opposite ones and score 0.4·A + B, so that the
    main clause wins. The probability of a positive label is 1/(1 + exp(−2·score)).
    """
    rng = np.random.default_rng(common.stream_seed("sentiment", part, data_seed))

    def pick(words):
        return words[rng.integers(len(words))]

    def clause(sign):
        negated = rng.random() < 0.3
        points = sign * int(rng.integers(1, 3))
        intensifier = ""
        if rng.random() < 0.6:
            intensifier = pick(list(INTENSIFIERS))
        words = ["the", pick(THINGS), pick(VERBS)]
        score = points * INTENSIFIERS[intensifier]
        if negated:
            points = -points
            score *= 0.6
            words.append("not")
        words += [intensifier, pick(ADJECTIVES[points])]
        return " ".join(filter(None, words)), score

    texts = []
    totals = []
    for _ in range(n):
        sign = rng.choice((-1, 1))
        form = rng.random()
        text, score = clause(sign)
        if form < 0.25:
            other, more = clause(sign)
            text = f"{text} and {other}"
            score += more
        elif form < 0.6:
            other, less = clause(-sign)
            text = f"{other} but {text}" if form < 0.45 else f"although {other} , {text}"
            score += 0.4 * less
        texts.append((f"{text} .",))
        totals.append(score)
    positive = 1 / (1 + np.exp(-2 * np.array(totals)))
    labels = (rng.random(n) < positive).astype(np.int64)
    return Split(texts, labels, (positive > 0.5).astype(np.int64))


def byte_level_bpe(texts, vocab_size):
    """A tokenizer of RoBERTa's kind (Liu et al. 2019, §4.4), trained on `texts` up to vocab_size tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import PreTrainedTokenizerFast

    special = dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size, 2, show_progress=False, special_tokens=list(special.values()))
    end = ("</s>", bpe.token_to_id("</s>"))
    start = ("<s>", bpe.token_to_id("<s>"))
    bpe._tokenizer.post_processor = RobertaProcessing(end, start)
    special.update(cls_token="<s>", sep_token="</s>", model_input_names=["input_ids", "attention_mask"])
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, **special)


@dataclass
class Tokens:
    """Model inputs of N texts on one device, {name: int32 [N, L]}, padded at the end; lengths int64 [N] on the CPU."""

    inputs: dict
    lengths: torch.Tensor

    def batch(self, index):
        """Model inputs of the texts `index` [B] (on the CPU), padded to the longest of them."""
        longest = int(self.lengths[index].max())
        return {name: rows[index.to(rows.device), :longest].long() for name, rows in self.inputs.items()}


def length_batches(lengths, batch, *key, pool=50):
    """Index tensors of an epoch's steps, from the key alone: shuffled texts, by length within pools of batches."""
    random = common.generator("order", *key)
    parts = []
    for chunk in torch.randperm(len(lengths), generator=random).split(pool * batch):
        parts += chunk[lengths[chunk].argsort(stable=True)].split(batch)  # little padding
    return [parts[k] for k in torch.randperm(len(parts), generator=random).tolist()]


# ---------------------------------------------------------------- networks

# layers, hidden units, heads. Smaller at the small end than those of Turc et al. 2019, so that a CPU trains them fast.
SIZES = {"tiny": (2, 64, 2), "mini": (4, 128, 4), "small": (4, 256, 4), "medium": (8, 512, 8), "base": (12, 768, 12)}
VOCABULARY = 8000  # most tokens of a model from scratch
FORWARD_TOKENS = dict(cpu=2048, cuda=65536)  # of a forward without a step: more leave a CPU's cache, which takes longer
TOKENIZERS = "tokenizer.json, or vocab.txt, or vocab.json and merges.txt"
MODEL_FIX = f"give a folder (config.json, model.safetensors, {TOKENIZERS}), a hub id, or a size: tiny, …, LAYERSxHIDDEN"


def size_of(name):
    """(layers, hidden units, heads) of a model from scratch, or None when `name` is a hub id or a folder."""
    match = re.fullmatch(r"([1-9][0-9]{0,2})x([1-9][0-9]{0,3})", name)
    if not match:
        return SIZES.get(name)
    layers, hidden = map(int, match.groups())
    per_head = next(units for units in (64, 32, hidden) if hidden % units == 0)
    return layers, hidden, hidden // per_head


def prepare(name, data, args):
    """What all runs of one model share, as a namespace; name is a size, a hub id or a local folder.

    config is that of transformers. tokens is {split: Tokens}; of a pair the longer text is cut first. facts go into
    config.json. rows are those of a saved classifier's head in the task's order of classes: [] where that head is for
    other classes, None where there is no head. InputError where the model does not fit.
    """
    make = scratch_model if size_of(name) else saved_model
    config, tokenizer, rows = make(name, data, args)
    tokens = {}
    tokenizer.padding_side = "right"
    options = dict(truncation=True, max_length=args.max_length, padding=True, return_attention_mask=True)
    with runs.reading(f"tokenizer or config.json of {name}", MODEL_FIX):
        for key, split in data.splits.items():
            inputs = tokenizer(*split.columns(), return_tensors="pt", **options)
            rows_of = {kind: values.int().to(args.device) for kind, values in inputs.items()}
            tokens[key] = Tokens(rows_of, inputs["attention_mask"].sum(1))
        facts = dict(model_type=config.model_type, layers=config.num_hidden_layers, hidden=config.hidden_size)
        facts.update(heads=config.num_attention_heads, vocabulary=config.vocab_size, max_length=args.max_length)
    truncated = (tokens["train"].lengths >= args.max_length).double().mean().item()
    shown = ", ".join(f"{key} {value}" for key, value in facts.items())
    print(f"{name}: {shown}; {100 * truncated:.1f}% of the training texts have that length or are truncated to it")
    every = b"".join(part.inputs["input_ids"].cpu().numpy().tobytes() for part in tokens.values())
    facts["tokens_sha256"] = hashlib.sha256(every).hexdigest()
    if size_of(name):
        facts["dropout"] = config.hidden_dropout_prob
    return SimpleNamespace(name=name, config=config, rows=rows, tokens=tokens, facts=facts)


def scratch_model(name, data, args):
    """(config, tokenizer, None) of a RoBERTa of a given size."""
    from transformers import RobertaConfig

    first, second = data.splits["train"].columns()
    tokenizer = byte_level_bpe(first + (second or []), VOCABULARY)
    layers, hidden, heads = size_of(name)
    shape = dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden)
    shape.update(vocab_size=len(tokenizer), type_vocab_size=1, num_labels=data.facts["classes"])
    shape["max_position_embeddings"] = args.max_length + tokenizer.pad_token_id + 1
    # With RoBERTa's dropout of 0.1 some seeds of a narrow model stay at what single words say of a text.
    shape.update(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    # RoBERTa's 0.02 suits 768 units; scaled to the width, or a narrow model's layers would begin as almost nothing.
    return RobertaConfig(**shape, initializer_range=0.02 * math.sqrt(768 / hidden)), tokenizer, None


def saved_model(name, data, args):
    """(config, tokenizer, rows) of a hub id or local folder, checked against each other and the task; see `prepare`."""
    from transformers import AutoConfig, AutoTokenizer

    with runs.reading(f"model {name}", MODEL_FIX):
        config = AutoConfig.from_pretrained(name)
        tokenizer = AutoTokenizer.from_pretrained(name)
        texts = data.splits["train"].columns()[0][:200]
        # Where files are missing, transformers makes up an empty tokenizer, to which every text is unknown.
        tokens = tokenizer(texts, add_special_tokens=False)["input_ids"]
        unknown = sum(set(ids) == {tokenizer.unk_token_id} for ids in tokens)
        whole = len(tokenizer) >= 50 and unknown <= 0.9 * len(texts) and tokenizer.pad_token_id is not None
        # A number beyond the vocabulary would read past the embedding's end.
        within = max(tokenizer.get_vocab().values(), default=0) < config.vocab_size
        if not whole or not within or config.pad_token_id not in (None, tokenizer.pad_token_id):
            raise InputError(f"the tokenizer in {name} is of another model, or incomplete: give its own ({TOKENIZERS})")
        config.pad_token_id = tokenizer.pad_token_id  # without it decoders do not find the last token of a text
        rows = None
        if any("SequenceClassification" in kind for kind in config.architectures or ()):
            rows = head_rows(name, config, data.facts["class_names"])
        if not rows:
            config.num_labels = data.facts["classes"]
        # RoBERTa's family numbers positions from the padding token on, so the first ones are unused.
        unused = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
        positions = getattr(config, "max_position_embeddings", math.inf) - unused
        if args.max_length > positions:
            raise InputError(f"--max-length {args.max_length} is too long for {name}: give at most {positions}")
        return config, tokenizer, rows


def head_rows(name, config, names):
    """The rows (see `prepare`) of a saved classifier for classes of these `names`; says what becomes of its head."""
    there = [str(config.id2label[k]).strip().casefold() for k in range(config.num_labels)]
    here = [word.strip().casefold() for word in names]
    if sorted(there) != sorted(here) or len(set(here)) < len(here):
        print(f"{name}: a new head, for its own is of {', '.join(there)[:80]}, and this task of {', '.join(here)[:80]}")
        return []
    print(f"{name}: its head is kept, with its classes ({', '.join(there)[:80]}) in the task's order")
    return [there.index(word) for word in here]


def build_classifier(model, key):
    """A sequence classifier whose new weights depend on `key` alone; a saved classifier of the task keeps its head."""
    from transformers import AutoModelForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(common.stream_seed("init", *key))
        if size_of(model.name):
            return AutoModelForSequenceClassification.from_config(model.config)
        options = dict(config=model.config, output_loading_info=True, ignore_mismatched_sizes=model.rows == [])
        with runs.reading(f"model {model.name}", "check its weights and its config.json"):
            network, info = AutoModelForSequenceClassification.from_pretrained(model.name, **options)
        encoder = f"{network.base_model_prefix}."  # the head, and BERT's pooler, may be new
        odd = {*info["missing_keys"], *(mismatch[0] for mismatch in info["mismatched_keys"])}
        lost = sorted(name for name in odd if name.startswith(encoder) and "pooler" not in name)
        if lost:
            raise InputError(f"model {model.name} lacks {len(lost)} weights, as {lost[0]}: give its own config.json")
        # A head of other classes, though maybe of as many: the encoder alone goes into a network with a new one.
        if model.rows == []:
            saved = {name: weights for name, weights in network.state_dict().items() if name.startswith(encoder)}
            network = AutoModelForSequenceClassification.from_config(model.config)
            network.load_state_dict(saved, strict=False)
    if model.rows:
        layers = [part for part in network.modules() if getattr(part, "out_features", 0) == len(model.rows)]
        for weights in layers[-1].parameters():  # weight and bias of the last one, which gives the logits
            weights.data = weights.data[model.rows]
    return network.float()


# ---------------------------------------------------------------- training and scores


def run_folders(args, seed):
    """{network: run folder} of one seed: the teacher, and of each student its control and the distilled one."""
    teacher = Path(args.teacher).name
    folders = dict(teacher=Path(f"{args.out}-{teacher}-teacher-s{seed}"))
    for student in args.student:
        name = Path(student).name
        folders[f"{student} onehot"] = Path(f"{args.out}-{name}-onehot-s{seed}")
        folders[f"{student} kd"] = Path(f"{args.out}-{teacher}-{name}-kd-s{seed}")
    return folders


def text_flags(model, args, distils):
    """The flags of one run of `model`, filled in where they depend on it; one that does not distil is one-hot."""
    flags = SimpleNamespace(ce_weight=1.0, kd_weight=0.0, temperature=None)  # one control serves all temperatures
    if distils:
        flags = common.only_flags(args, common.add_student_flags)
    flags.arch = model.name
    for name in "batch_size warmup precision device overwrite quiet".split():
        setattr(flags, name, getattr(args, name))
    # Pretrained: within Liu et al. 2019, table 10. From scratch 1e-3 for tiny, inversely with the width above it.
    scratch = size_of(model.name) is not None
    flags.lr = args.lr or (min(1e-3, 0.064 / model.config.hidden_size) if scratch else 2e-5)
    flags.epochs = args.epochs or (6 if scratch else 3)
    return flags


def train_text(run, model, args, role, seed, data, teacher_logits=None):
    """Train a teacher or student in the run folder `run`, and leave logits.npz there, unless it is finished already.

    The loss is `common.student_loss` with teacher_logits (float32 [n_train, C]), else `common.one_hot_loss`.
    """
    network = build_classifier(model, (role, seed)).to(args.device)
    flags = text_flags(model, args, teacher_logits is not None)
    facts = dict(model.facts, initial_sha256=runs.weights_hash(network.state_dict()), teacher_sha256=None)
    loss_fn = common.one_hot_loss
    if teacher_logits is not None:
        loss_fn = common.student_loss
        facts["teacher_sha256"] = hashlib.sha256(teacher_logits.tobytes()).hexdigest()
        teacher_logits = torch.as_tensor(teacher_logits).to(args.device)
    facts["loss"] = runs.source_of(loss_fn)
    tokens = model.tokens["train"]
    labels = torch.as_tensor(data.splits["train"].labels).to(args.device)
    per_epoch = math.ceil(len(labels) / flags.batch_size)
    total = per_epoch * flags.epochs
    groups = [  # biases and layer norms do not decay, as in BERT
        dict(params=[p for p in network.parameters() if p.ndim > 1], weight_decay=0.1),
        dict(params=[p for p in network.parameters() if p.ndim < 2], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, flags.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)  # Liu et al. 2019
    sums = torch.zeros(3, dtype=torch.float64, device=args.device)

    def classify(inputs):
        return network(**inputs).logits

    def loss_of(index, ce_weight, kd_weight):
        where = index.to(args.device)
        taught = None if teacher_logits is None else teacher_logits[where]
        with engine.autocast(args.device, args.precision):
            loss, logits = loss_fn(classify, tokens.batch(index), labels[where], taught, ce_weight, kd_weight, args)
        return loss, (logits.detach().argmax(1) == labels[where]).sum(), len(index)

    def batches(epoch):
        return length_batches(tokens.lengths, flags.batch_size, role, seed, epoch)

    def rates(step):  # linear warm-up, then linear decay to 0 (Devlin et al. 2019)
        rise = flags.warmup * total
        lr = flags.lr * min((step + 1) / (rise + 1), (total - step) / (total - rise))
        return lr, flags.ce_weight, flags.kd_weight

    def evaluate(epoch, at_end):
        line = {}
        precision = "fp32" if at_end else args.precision  # what a run ends with is quoted
        for key, split in data.splits.items():
            if key == "train":
                continue
            logits = logits_of(network, model.tokens[key], precision)
            targets = torch.as_tensor(split.labels)
            line[f"{key}_acc"] = (logits.argmax(1) == targets).double().mean().item()
            line[f"{key}_loss"] = F.cross_entropy(logits, targets).item()
        return line

    take_step = engine.optimiser_step(network, optimizer, loss_of, sums, clip=1.0)
    amount = ("tokens", int(tokens.lengths.sum()))
    with runs.locked(run):
        if runs.start_run(run, flags, role, seed, data, network, **facts):
            torch.manual_seed(common.stream_seed("dropout", role, seed))
            loop = (per_epoch, batches, take_step, sums, rates, evaluate)
            engine.train(run, flags, network, optimizer, *loop, amount=amount)
            # As `engine.save_logits` writes them of images, in fp32: φ needs all bits of the logits.
            arrays = dict(train_clean_labels=data.splits["train"].clean, train_index=data.index)
            for key, split in data.splits.items():
                arrays[f"{key}_logits"] = logits_of(network, model.tokens[key]).numpy()
                arrays[f"{key}_labels"] = split.labels
            runs.write_npz(run / "logits.npz", arrays)


@torch.no_grad()
def logits_of(network, tokens, precision="fp32"):
    """float32 logits [N, classes] on the CPU of all texts in their order, in eval mode; batches are of like lengths."""
    network.eval()  # `engine.train` begins every epoch in train mode
    device = next(network.parameters()).device
    order = tokens.lengths.argsort(stable=True)
    batch = max(1, FORWARD_TOKENS[device.type] // int(tokens.lengths.max()))
    with engine.autocast(device.type, precision):
        logits = torch.cat([network(**tokens.batch(index)).logits.float() for index in order.split(batch)])
    return logits.cpu()[order.argsort()]


def scores(predicted, labels, resamples):
    """{score: array [1 + resamples]} on the texts and on bootstrap draws of them, the same for all of a split.

    acc: accuracy; mcc, f1: Matthews correlation and F1 of class 1, 0 where all are of one class, or predicted to be.
    """
    positive = labels == 1
    told = predicted == 1
    columns = np.stack([np.ones(len(labels)), predicted == labels, positive, told, positive & told], axis=1)
    n, right, ones, told_ones, both = claims.resampled_sums(columns, resamples, np.random.default_rng(0)).T
    spread = np.sqrt(ones * (n - ones)) * np.sqrt(told_ones * (n - told_ones))
    mcc = (n * both - ones * told_ones) / np.maximum(spread, 1)
    return dict(acc=right / n, mcc=mcc, f1=2 * both / np.maximum(ones + told_ones, 1))


def report_scores(folders, data, args):
    """Write and print glue.json and glue.md, every network's scores in percent, and what can be claimed of them.

    folders: {network: run folder} of each seed. Claims: of the score where that is not accuracy, and of the best
    accuracy that the labels of the embedded task allow.
    """
    names = METRICS.get(data.facts["name"], ["acc"])
    draws = {}
    rows = []
    for network in folders[0]:
        row = dict(network=network)
        files = [of_seed[network] / "logits.npz" for of_seed in folders]
        for key, split in data.splits.items():
            logits = [runs.read_npz(file, [f"{key}_logits"])[f"{key}_logits"] for file in files]
            found = [scores(of_seed.argmax(1), split.labels, args.bootstrap) for of_seed in logits]
            shown = names
            if key == "train":
                shown = ["acc"]
            for name in shown:
                column = f"{key}_{name}"
                draws[network, column] = [of_seed[name] for of_seed in found]
                lowest = -1.0 if name == "mcc" else 0.0
                row[column] = claims.within(claims.combine(draws[network, column]), lowest)
        rows.append(row)
    over = f"{claims.scope(len(folders), len(folders))}; {runs.fit_note(rows[0]['train_acc']['value'])}"
    runs.write_json(args.results / "glue.json", dict(task=data.facts, intervals=f"95%, {over}", rows=rows))
    lines = []
    for row in rows:
        cells = [claims.cell(row[column], 100, 2) for column in row if column != "network"]
        lines.append([row["network"], *cells])
    table = claims.markdown_table(list(rows[0]), lines)
    runs.write_text(args.results / "glue.md", f"Intervals: 95%, {over}.\n\n{table}")
    print(table)
    found = []
    test = data.splits["test"]
    if "bayes_accuracy" in data.facts:
        bayes = scores(test.clean, test.labels, args.bootstrap)["acc"]
        share = claims.ratio(draws["teacher", "test_acc"], [bayes] * len(folders))
        found.append(claims.claim("the teacher reaches 90% of the Bayes accuracy", "> 0.9", share, 0.9))
    if names[-1] != "acc":
        for student in args.student:
            kd = np.stack(draws[f"{student} kd", f"test_{names[-1]}"])
            onehot = np.stack(draws[f"{student} onehot", f"test_{names[-1]}"])
            text = f"{student}: KD has the higher {names[-1].upper()} on the dev set"
            found.append(claims.claim(text, "KD minus one-hot > 0", claims.combine(kd - onehot), 0))
    if found:
        claims.save_claims(args.results, found, over)


def parse(argv):
    parser = runs.Parser(__doc__)
    add = parser.add_argument_group("texts").add_argument
    add("--task", default="sentiment", help=f"{', '.join(TASKS)} or csv:PATH (columns text[,text2],label)")
    add("--text-column", metavar="NAME", help=f"of a csv file (default: {', '.join(COLUMNS['text'])})")
    add("--label-column", metavar="NAME", help=f"of a csv file (default: {', '.join(COLUMNS['label'])})")
    add("--data-dir", default="data", help="where GLUE's folders (CoLA, …) lie, or glue/CoLA, …; else downloaded")
    add("--subset", type=number(int, 0), default=0, help="train on that many texts; 0 for all")
    add("--data-seed", type=number(int, 0), default=0, help="seed of subset, embedded task and split of a csv file")
    add("--max-length", type=number(int, 8, 100_000), default=128, help="tokens of a text, at most")
    add = parser.add_argument_group("networks").add_argument
    add("--teacher", default="tiny", help=f"hub id, folder, or size from scratch: {', '.join(SIZES)}, LAYERSxHIDDEN")
    add("--student", nargs="+", default=[], help="likewise (default: the teacher's; for tiny also 1x32)")
    common.add_student_flags(parser, distils=True)
    parser.set_defaults(temperature=2.0)
    add = parser.add_argument_group("training").add_argument
    add("--epochs", type=number(int, 1), help="passes over the training texts (default: 6 from scratch, else 3)")
    add("--batch-size", type=number(int, 1), default=32, help="texts per step")
    rates = "peak learning rate of AdamW (default: 0.064/hidden units, at most 1e-3, from scratch; else 2e-5)"
    add("--lr", type=number(float, 0, 1e38, open_low=True), help=rates)
    add("--warmup", type=number(float, 0, 1, open_high=True), default=0.06, help="share with a linear rise; then decay")
    half = "auto: bf16 autocast on CUDA and on CPUs that multiply it, fp32 for the embedded task; final logits are fp32"
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help=half)
    group = parser.add_argument_group("run")
    add = group.add_argument
    add("--seeds", "--seed", type=number(int, 0), nargs="+", default=[0], help="all is trained once for each seed")
    add("--out", help="prefix of the run folders: <out>-tiny-teacher-s0, … (default: runs/<task>)")
    add("--overwrite", action="store_true", help="train all again, from the start")
    add("--quiet", action="store_true", help="one line per run instead of one per epoch")
    common.add_device_flag(group)
    common.add_figure_flags(parser, "results/glue-TASK")
    args = parser.parse_args(argv)
    if (args.text_column or args.label_column) and not args.task.startswith("csv:"):
        raise InputError("--text-column and --label-column are of csv files: give --task csv:PATH, or leave them out")
    if not args.student:
        args.student = [args.teacher, "1x32"] if args.teacher == "tiny" else [args.teacher]
    args.student = list(dict.fromkeys(args.student))
    names = {args.teacher, *args.student}
    if len({Path(name).name for name in names}) < len(names):
        what = f"two of {', '.join(sorted(names))} end alike, which names their run folders"
        raise InputError(f"{what}: copy one to another name")
    engine.use_machine(args, embedded=args.task == "sentiment")
    task = Path(args.task.partition(":")[2] or args.task).stem
    args.out = args.out or f"runs/{task}"
    if args.results == parser.get_default("results"):
        args.results = Path(f"results/glue-{task}")
    return args


def main(argv=None):
    args = parse(argv)
    import huggingface_hub
    import transformers

    for library in (transformers, huggingface_hub):  # no warnings of new heads, which are meant, nor of retries
        library.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    columns = dict(text=args.text_column, label=args.label_column)
    data = load_task(args.task, args.data_dir, args.subset, args.data_seed, columns)
    models = {name: prepare(name, data, args) for name in dict.fromkeys([args.teacher, *args.student])}
    if not args.train_only:
        args.results.mkdir(parents=True, exist_ok=True)

    folders = [run_folders(args, seed) for seed in args.seeds]
    for seed, run in zip(args.seeds, folders, strict=True):
        runs.check_planned(run["teacher"], text_flags(models[args.teacher], args, False), "teacher", seed, data)
        for student in args.student:
            for what in ("onehot", "kd"):
                flags = text_flags(models[student], args, what == "kd")
                runs.check_planned(run[f"{student} {what}"], flags, "student", seed, data)
    for seed, run in zip(args.seeds, folders, strict=True):
        train_text(run["teacher"], models[args.teacher], args, "teacher", seed, data)
        teacher_logits = runs.read_npz(run["teacher"] / "logits.npz", ["train_logits"])["train_logits"]
        for student in args.student:
            train_text(run[f"{student} onehot"], models[student], args, "student", seed, data)
            train_text(run[f"{student} kd"], models[student], args, "student", seed, data, teacher_logits)
    if args.train_only:
        return

    for student in args.student:
        roles = dict(teacher="teacher", student=f"{student} kd", control=f"{student} onehot")
        points = deviation.points_from_runs([{role: run[name] for role, name in roles.items()} for run in folders])
        title = f"{args.task}, {args.teacher} → {student}, {len(folders)} seed{'s' * (len(folders) > 1)}"
        section = "language" if student == args.student[0] else None  # one headline for a task
        out = args.results / Path(student).name
        deviation.report(points, out, title, args.bootstrap, section, quiet=args.quiet, full=False)
    report_scores(folders, data, args)


if __name__ == "__main__":
    runs.cli(main)
