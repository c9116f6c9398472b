"""Language (paper §3, GLUE): distil RoBERTa into itself and a smaller one, with deviations and the loss switch.

    python glue_distill.py --seeds 0 1 2                                                  # embedded synthetic sentiment
    python glue_distill.py --task sst-2 --teacher roberta-base --student roberta-base distilroberta/distilroberta-base
    python glue_distill.py --task cola --teacher mini --student mini tiny --mlm-epochs 20 # no weights needed
    python glue_distill.py --task csv:reviews.csv --mode onehot kd                        # columns text[,text2],label

A model from scratch (tiny, mini, … or LAYERSxHIDDEN) first learns the task's sentences by masked-language modelling,
once per size and seed: teacher and self-distilled student continue the same weights, as in the paper, with their own
heads, orders and dropout. Teacher logits come from its logits.npz: text is not augmented, so they are exact. Writes
into --results, for each student: fig1a, statistics, claims, and switch/ with fig1b; for all glue.json and glue.md.
Departures from the paper: sentence order is by length within pools of 50 batches; the switch is abrupt; GLUE's dev set
is the test set (its labels are public).
"""

import argparse
import csv
import hashlib
import math
import re
from dataclasses import dataclass
from decimal import Decimal
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F

import analyze_deviation
import claims
import common
import engine
import runs
import switch_distill
from runs import InputError, number
from switch_distill import SWITCHES

# ---------------------------------------------------------------- texts


class GlueTask(NamedTuple):
    """GLUE's original TSV layout: folder, columns of the sentences, column of the label, and names of the classes in
    the order of Hugging Face, whose own columns are hub_columns where they have other names."""

    folder: str
    columns: tuple
    label: str
    classes: tuple = ("0", "1")
    hub_columns: tuple = ()


ENTAILMENT = ("entailment", "not_entailment")
PAIR = ("sentence1", "sentence2")
GLUE = {
    "cola": GlueTask("CoLA", ("sentence",), "label"),
    "sst-2": GlueTask("SST-2", ("sentence",), "label"),
    "mrpc": GlueTask("MRPC", ("#1 String", "#2 String"), "Quality", hub_columns=PAIR),
    "rte": GlueTask("RTE", PAIR, "label", ENTAILMENT),
    "qnli": GlueTask("QNLI", ("question", "sentence"), "label", ENTAILMENT),
    "qqp": GlueTask("QQP", ("question1", "question2"), "is_duplicate"),
    "mnli": GlueTask("MNLI", PAIR, "gold_label", ("entailment", "neutral", "contradiction"), ("premise", "hypothesis")),
}
METRICS = {"cola": ("mcc",), "mrpc": ("acc", "f1"), "qqp": ("acc", "f1")}  # of other tasks: accuracy
HUB = {
    "imdb": ("stanfordnlp/imdb", ("neg", "pos")),
    "ag_news": ("fancyzhx/ag_news", ("World", "Sports", "Business", "Sci/Tech")),
}
TASKS = ("sentiment", *GLUE, *HUB)
MODES = ("onehot", "kd", *SWITCHES)


@dataclass
class Split:
    """Texts of one split: first and second (None for single sentences) lists of N str, labels int64 [N].

    probability [N, 2]: the true probabilities of the classes, known for the embedded task alone.
    """

    first: list
    labels: np.ndarray
    second: list | None = None
    probability: np.ndarray | None = None

    def take(self, index):
        first, second = (texts and [texts[k] for k in index] for texts in (self.first, self.second))
        probability = None if self.probability is None else self.probability[index]
        return Split(first, self.labels[index], second, probability)

    def sentences(self):
        return self.first + (self.second or [])


@dataclass
class Texts:
    """One task: splits train, test and, for MNLI, mismatched; index [n_train] into the full training set; facts for
    config.json."""

    splits: dict
    classes: int
    index: np.ndarray
    facts: dict


def load_task(name, data_dir="data", subset=0, data_seed=0):
    """Load a task as `Texts`: sentiment, a GLUE task, imdb, ag_news, or csv:PATH.

    Local files in data_dir come first, else Hugging Face `datasets`. subset: that many training texts, a seeded and
    nested draw; 0 for all. InputError for an unknown task, a torn or missing file, or too few texts.
    """
    splits, names = load_splits(name, Path(data_dir), data_seed)
    n = len(splits["train"].labels)
    if subset > n:
        raise InputError(f"--subset {subset} is larger than the {n} training texts of {name}: use at most {n}, or 0")
    order = torch.randperm(n, generator=common.generator("subset", data_seed)).numpy()
    index = np.sort(order[: subset or n])
    splits["train"], test = splits["train"].take(index), splits["test"]
    if min(len(np.unique(split.labels)) for split in splits.values()) < 2 or len(test.labels) < 8:
        needed = "train and test need two classes each, and 8 test texts at least"
        raise InputError(f"{name}: {needed}: give more data or a larger --subset")
    digest = hashlib.sha256(repr([(key, s.first, s.second, s.labels.tolist()) for key, s in splits.items()]).encode())
    facts = dict(name=name, classes=len(names), class_names=list(names), subset=subset, label_noise=0.0)
    facts |= dict(data_seed=data_seed, sha256=digest.hexdigest())
    facts |= {f"n_{key}": len(split.labels) for key, split in splits.items()}
    if test.probability is not None:
        facts["bayes_accuracy"] = float((test.probability.argmax(1) == test.labels).mean())
    return Texts(splits, len(names), index, facts)


def load_splits(name, data_dir, data_seed):
    """({split: Split}, names of the classes) of a task, before the subset is drawn."""
    if name == "sentiment":
        parts = (("train", 4000), ("test", 2000))
        return {part: sentiment(n, part, data_seed) for part, n in parts}, ("negative", "positive")
    if name in GLUE:
        return glue(name, data_dir), GLUE[name].classes
    if name.startswith("csv:"):
        return csv_splits(Path(name[4:]), data_seed)
    if name not in HUB:
        raise InputError(f"unknown --task {name!r}: use {', '.join(TASKS)} or csv:PATH")
    if (data_dir / name).is_dir():
        return csv_splits(data_dir / name, data_seed)
    repository, classes = HUB[name]
    instead = f"train.csv and test.csv (columns text,label) into {data_dir / name}"
    return hub(repository, None, ("text",), dict(train="train", test="test"), instead), classes


def glue(name, data_dir):
    """The splits of a GLUE task, from its original folder in data_dir or data_dir/glue, else from the hub."""
    task, parts = GLUE[name], dict(train="train", test="dev")
    if name == "mnli":
        parts |= dict(test="dev_matched", mismatched="dev_mismatched")
    for folder in (data_dir / task.folder, data_dir / "glue" / task.folder):
        if folder.is_dir():
            return {key: read_tsv(folder / f"{part}.tsv", name) for key, part in parts.items()}
    instead = f"{', '.join(f'{part}.tsv' for part in parts.values())} of GLUE into {data_dir / task.folder}"
    parts = {key: part.replace("dev", "validation") for key, part in parts.items()}
    return hub("nyu-mll/glue", name.replace("-", ""), task.hub_columns or task.columns, parts, instead)


def hub(repository, config, columns, parts, instead):
    """Splits through Hugging Face `datasets`; `instead` says which files serve without a network."""
    import datasets

    splits = {}
    with runs.reading(repository, f"put {instead}"):
        for key, part in parts.items():
            loaded = datasets.load_dataset(repository, config, split=part)
            first, *second = (list(loaded[column]) for column in columns)
            splits[key] = Split(first, np.array(loaded["label"], np.int64), *second)
    return splits


def read_tsv(path, name):
    """One file of GLUE's TSV layout as a Split. Quotes are literal; a torn row is an InputError that names its line.

    QQP's published file has a few torn rows; they are skipped and counted, as Hugging Face's loader does.
    """
    task, fix = GLUE[name], "put GLUE's original file there"
    with runs.reading(path, fix):
        # Not splitlines(): it also breaks at form feeds and Unicode separators, which occur within sentences.
        lines = Path(path).read_bytes().decode("utf-8-sig").split("\n")
    rows = [(k, line.rstrip("\r").split("\t")) for k, line in enumerate(lines, 1) if line.strip("\r")]
    if name == "cola":  # has no header
        rows.insert(0, (0, ["source", "label", "star", "sentence"]))
    header = rows.pop(0)[1] if rows else []
    missing = [column for column in (*task.columns, task.label) if column not in header]
    if missing:
        raise InputError(f"{path} lacks the column {missing[0]} in its header ({', '.join(header)[:120]}): {fix}")
    label, whole = header.index(task.label), []
    for k, row in rows:
        if len(row) == len(header) and row[label] in task.classes:
            whole.append(row)
        elif name != "qqp":
            what = f"the row has not {len(header)} columns, or not the label {' or '.join(task.classes)}"
            raise InputError(f"{path}, line {k}: {what}: repair or remove that line")
    if len(whole) < len(rows):
        print(f"{path}: {len(rows) - len(whole)} torn rows skipped")
    first, *second = ([row[header.index(column)] for row in whole] for column in task.columns)
    return Split(first, np.array([task.classes.index(row[label]) for row in whole], np.int64), *second)


def csv_splits(path, data_seed):
    """(splits, class names) of a folder with train.csv and test.csv, or of one file, of which a seeded fifth is the
    test split. Prints the classes."""
    if path.is_dir():
        train, test = (read_csv(path / f"{part}.csv") for part in ("train", "test"))
        if (train.second is None) != (test.second is None):
            raise InputError(f"{path}: one of the two files has a column text2, the other has none: give both the same")
    else:
        table = read_csv(path)
        order = torch.randperm(len(table.labels), generator=common.generator("split", data_seed)).numpy()
        test, train = (table.take(np.sort(part)) for part in np.split(order, [len(order) // 5]))
    names = {}  # {class: the shortest way in which it is written}
    for label in sorted(set(train.labels), key=lambda label: (class_of(label), len(label), label)):
        names.setdefault(class_of(label), label)
    values = [value for is_word, value, _ in names if not is_word]
    if len(values) > 20 and any(value != value.to_integral_value() for value in values):
        what = f"{path}: the label is a regression target ({len(values)} different numbers, some of them not whole)"
        raise InputError(f"{what}: give classes, such as its values in a few bins")
    unseen = [label for label in test.labels if class_of(label) not in names]
    if unseen:
        raise InputError(f"{path}: the label {min(unseen)!r} is in no training text: give some, or remove these texts")
    numbers = {key: k for k, key in enumerate(names)}
    for split in (train, test):
        split.labels = np.array([numbers[class_of(label)] for label in split.labels], np.int64)
    counts = np.bincount(np.concatenate([train.labels, test.labels]))
    shown = [f"{name[:40]} ({count})" for name, count in zip(names.values(), counts, strict=True)][:20]
    print(f"{path}: {len(names)} classes; the first ones, with their numbers of texts: {', '.join(shown)}")
    return dict(train=train, test=test), list(names.values())


def class_of(label):
    """The class of a csv label, for sorting: numbers come first, by size; 1, 1.0 and 01 are one class."""
    if re.fullmatch(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)(e[+-]?[0-9]{1,4})?", label, re.IGNORECASE):
        return 0, Decimal(label), ""
    return 1, Decimal(0), label


def read_csv(path):
    """A CSV file with the columns text[,text2],label as a Split, whose labels are still words.

    InputError names the line in which a row begins that is torn, or that a stray quote joins with others.
    """
    rows, start = [], 1
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
    if header.count("text") != 1 or header.count("label") != 1 or header.count("text2") > 1:
        needed = "it must name the columns text[,text2],label, with commas between, not tabs or semicolons"
        raise InputError(f"{path}, line 1 is {','.join(header)[:80]!r}: {needed}")
    width, label = len(header), header.index("label")
    rows = [(start, row) for start, row in rows if row]  # without blank lines
    known = {row[label] for _, row in rows if len(row) == width}
    for start, row in rows:
        if len(row) != width or not row[label].strip():
            what = f"the row has {len(row)} columns instead of {width}, or no label"
            raise InputError(f"{path}, line {start}: {what}: repair or remove it")
        # Two stray quotes join rows to a cell of several lines, of which one has all columns and a known label.
        lines = "\n".join(cell for cell in row if len(cell.splitlines()) > 1).splitlines()
        if any(len(cells) == width and cells[label] in known for cells in (line.split(",") for line in lines)):
            raise InputError(f"{path}, line {start}: a cell holds whole rows: close the quote that opens there")
    table = {name: [row[k] for _, row in rows] for k, name in enumerate(header)}
    labels = np.array([word.strip() for word in table["label"]], dtype=object)
    return Split(table["text"], labels, table.get("text2"))


# The embedded task. Strong words count 2, mild ones 1.
GOOD = {
    2: "brilliant superb wonderful gripping moving hilarious dazzling splendid".split(),
    1: "pleasant decent solid charming neat likeable fresh tidy".split(),
}
BAD = {
    2: "dreadful awful tedious painful hollow clumsy lifeless hideous".split(),
    1: "weak bland uneven thin dull stale slow loose".split(),
}
THINGS = "plot acting dialogue score pacing ending cast photography humour script premise lead editing romance villain"
THINGS, VERBS = THINGS.split(), "is was seems feels looked remains".split()
INTENSIFIERS = {"": 1.0, "very": 1.5, "truly": 1.5, "rather": 0.75, "slightly": 0.5}


def sentiment(n, part, data_seed):
    """n generated film reviews with labels drawn from known probabilities (synthetic; not a corpus of anyone's words).

    A clause scores ±1 or ±2 by its adjective, times its intensifier, times −0.6 when negated. "A and B" joins clauses
    of the same sign and scores A + B; "A but B" and "although A, B" join opposite ones and score 0.4·A + B, so that the
    main clause wins. The probability of a positive label is 1/(1 + exp(−2·score)): near score 0 nobody can do better
    than guess.
    """
    rng = np.random.default_rng(common.stream_seed("sentiment", part, data_seed))

    def pick(words):
        return words[rng.integers(len(words))]

    def clause(sign):
        negated, strength = rng.random() < 0.3, int(rng.integers(1, 3))
        intensifier = pick(list(INTENSIFIERS)) if rng.random() < 0.6 else ""
        adjectives = (GOOD if (sign > 0) != negated else BAD)[strength]
        score = sign * strength * INTENSIFIERS[intensifier] * (0.6 if negated else 1.0)
        words = ("the", pick(THINGS), pick(VERBS), "not" * negated, intensifier, pick(adjectives))
        return " ".join(filter(None, words)), score

    texts, scores = [], []
    for _ in range(n):
        sign, form = rng.choice((-1, 1)), rng.random()
        text, score = clause(sign)
        if form < 0.25:
            other, more = clause(sign)
            text, score = f"{text} and {other}", score + more
        elif form < 0.6:
            other, less = clause(-sign)
            text, score = f"{other} but {text}" if form < 0.45 else f"although {other} , {text}", score + 0.4 * less
        texts.append(f"{text} .")
        scores.append(score)
    positive = 1 / (1 + np.exp(-2 * np.array(scores)))
    labels = (rng.random(n) < positive).astype(np.int64)
    return Split(texts, labels, probability=np.stack([1 - positive, positive], axis=1))


# ---------------------------------------------------------------- tokens and batches


def byte_level_bpe(texts, vocab_size):
    """A tokenizer of RoBERTa's kind (Liu et al. 2019, §4.4), trained on `texts` up to vocab_size tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import PreTrainedTokenizerFast

    special = dict(bos_token="<s>", pad_token="<pad>", eos_token="</s>", unk_token="<unk>", mask_token="<mask>")
    bpe = ByteLevelBPETokenizer()
    bpe.train_from_iterator(texts, vocab_size, 2, show_progress=False, special_tokens=list(special.values()))
    bpe._tokenizer.post_processor = RobertaProcessing(*((word, bpe.token_to_id(word)) for word in ("</s>", "<s>")))
    special |= dict(cls_token="<s>", sep_token="</s>", model_input_names=["input_ids", "attention_mask"])
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


def encode(tokenizer, first, second, max_length, device):
    """Texts as `Tokens`, truncated to max_length (the longer of a pair first)."""
    tokenizer.padding_side = "right"
    options = dict(truncation=True, max_length=max_length, padding=True, return_tensors="pt")
    inputs = tokenizer(first, second, return_attention_mask=True, **options)
    return Tokens({name: rows.int().to(device) for name, rows in inputs.items()}, inputs["attention_mask"].sum(1))


def length_batches(lengths, batch, *key, pool=50):
    """List of index tensors, one per step of an epoch, in which every text comes once; it depends on the key alone.

    Texts are shuffled and sorted by length within pools of batches, which keeps padding low; then batches are shuffled.
    """
    random = common.generator("order", *key)
    parts = []
    for chunk in torch.randperm(len(lengths), generator=random).split(pool * batch):
        parts += chunk[lengths[chunk].argsort(stable=True)].split(batch)
    return [parts[k] for k in torch.randperm(len(parts), generator=random).tolist()]


# ---------------------------------------------------------------- networks

# layers, hidden units, heads. Smaller at the small end than those of Turc et al. 2019, so that a CPU trains them fast.
SIZES = {"tiny": (2, 64, 2), "mini": (4, 128, 4), "small": (4, 256, 4), "medium": (8, 512, 8), "base": (12, 768, 12)}
VOCABULARY = 8000  # most tokens of a model from scratch
TOKENIZERS = "tokenizer.json, or vocab.txt, or vocab.json and merges.txt"
MODEL_FIX = f"give a folder (config.json, model.safetensors, {TOKENIZERS}), a hub id, or a size: tiny, …, LAYERSxHIDDEN"


def size_of(name):
    """(layers, hidden units, heads) of a model from scratch, or None when `name` is a hub id or a folder."""
    match = re.fullmatch(r"([1-9][0-9]{0,2})x([1-9][0-9]{0,3})", name)
    if not match:
        return SIZES.get(name)
    layers, hidden = map(int, match.groups())
    if hidden > 32 and hidden % 32:
        raise InputError(f"--student or --teacher {name}: hidden units must be below 32, or a multiple of 32")
    return layers, hidden, max(1, hidden // (64 if hidden % 64 == 0 else 32))


@dataclass
class Model:
    """What every run of one model shares. tokens: {split: Tokens}; epochs, lr: defaults; facts: for config.json."""

    name: str
    scratch: bool
    config: object
    tokenizer: object
    tokens: dict
    epochs: int
    lr: float
    facts: dict


def prepare(name, data, args):
    """The `Model` of a size, hub id or local folder for this task; InputError when they do not fit each other."""
    scratch = size_of(name) is not None
    config, tokenizer = scratch_model(name, data, args) if scratch else saved_model(name, data, args)
    tokens = {}
    with runs.reading(f"the tokenizer of {name}", MODEL_FIX):
        for key, split in data.splits.items():
            tokens[key] = encode(tokenizer, split.first, split.second, args.max_length, args.device)
    truncated = (tokens["train"].lengths >= args.max_length).double().mean().item()
    facts = dict(model_type=config.model_type, layers=config.num_hidden_layers, hidden=config.hidden_size)
    facts |= dict(heads=config.num_attention_heads, vocabulary=config.vocab_size, max_length=args.max_length)
    shown = ", ".join(f"{key} {value}" for key, value in facts.items())
    print(f"{name}: {shown}; {100 * truncated:.1f}% of the training texts have that length or are truncated to it")
    every = b"".join(part.inputs["input_ids"].cpu().numpy().tobytes() for part in tokens.values())
    facts["tokens_sha256"] = hashlib.sha256(every).hexdigest()
    # From scratch 1e-3 for tiny, inversely with the width above it; pretrained: within Liu et al. 2019, table 10.
    epochs, lr = (6, min(1e-3, 0.064 / config.hidden_size)) if scratch else (3, 2e-5)
    return Model(name, scratch, config, tokenizer, tokens, epochs, lr, facts)


def scratch_model(name, data, args):
    """(config, tokenizer) of a RoBERTa of a given size."""
    from transformers import RobertaConfig

    tokenizer = byte_level_bpe(data.splits["train"].sentences(), VOCABULARY)
    layers, hidden, heads = size_of(name)
    shape = dict(hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, intermediate_size=4 * hidden)
    shape |= dict(vocab_size=len(tokenizer), type_vocab_size=1, num_labels=data.classes)
    shape["max_position_embeddings"] = args.max_length + tokenizer.pad_token_id + 1
    # RoBERTa's 0.02 suits 768 units; scaled to the width, or a narrow model's layers would begin as almost nothing.
    return RobertaConfig(**shape, initializer_range=0.02 * math.sqrt(768 / hidden)), tokenizer


def saved_model(name, data, args):
    """(config, tokenizer) of a hub id or local folder, checked against each other and against the task."""
    from transformers import AutoConfig, AutoTokenizer

    with runs.reading(f"model {name}", MODEL_FIX):
        config, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        texts = data.splits["train"].first[:200]
        # Where files are missing, transformers makes up an empty tokenizer, to which every text is unknown.
        unknown = sum(tokenizer.unk_token_id in ids for ids in tokenizer(texts)["input_ids"])
        whole = len(tokenizer) >= 50 and unknown <= 0.9 * len(texts) and tokenizer.pad_token_id is not None
        # A number beyond the vocabulary would read past the embedding's end.
        within = max(tokenizer.get_vocab().values(), default=0) < config.vocab_size
        if not whole or not within or config.pad_token_id not in (None, tokenizer.pad_token_id):
            what = f"the tokenizer in {name} is of another family than its model, or incomplete"
            raise InputError(f"{what}: put the model's own there ({TOKENIZERS})")
        classifies = any("SequenceClassification" in kind for kind in config.architectures or ())
        if classifies and config.num_labels != data.classes:
            what = f"model {name} has {config.num_labels} labels but {data.facts['name']} has {data.classes}"
            raise InputError(f"{what}: give its base model, whose head is new")
        config.num_labels = data.classes
        # RoBERTa's family numbers positions from the padding token on, so the first ones are unused.
        unused = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
        positions = getattr(config, "max_position_embeddings", math.inf) - unused
        if args.max_length > positions:
            raise InputError(f"--max-length {args.max_length} is too long for {name}: give at most {positions}")
        return config, tokenizer


def build_classifier(model, key, pretrained=None):
    """A sequence classifier whose new weights depend on `key` alone; a saved classifier keeps its head.

    pretrained: state dict of a masked-language model of the same size, whose encoder is taken.
    """
    from transformers import AutoModelForSequenceClassification, RobertaForSequenceClassification

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(common.stream_seed("init", *key))
        if model.scratch:
            network = RobertaForSequenceClassification(model.config)
        else:
            options = dict(config=model.config, output_loading_info=True)
            with runs.reading(f"model {model.name}", "check its weights and its config.json"):
                network, info = AutoModelForSequenceClassification.from_pretrained(model.name, **options)
            network = network.float()
            encoder = f"{network.base_model_prefix}."  # the head, and BERT's pooler, may be new
            lost = sorted(name for name in info["missing_keys"] if name.startswith(encoder) and "pooler" not in name)
            if lost:
                what = f"model {model.name} lacks the weights {lost[0]} and {len(lost) - 1} more"
                raise InputError(f"{what}: its config.json and its weights do not belong together")
    if pretrained:
        encoder = {name: weights for name, weights in pretrained.items() if name.startswith("roberta.")}
        network.load_state_dict(encoder, strict=False)
    return network


# ---------------------------------------------------------------- losses and training


def learning_rate(step, peak, warmup, total):
    """Linear warm-up over the share `warmup` of training, then linear decay to 0 (Devlin et al. 2019)."""
    rise = warmup * total
    return peak * min((step + 1) / (rise + 1), (total - step) / (total - rise))


def run_flags(args, model, lr, epochs, **more):
    """The flags that a run depends on, as `runs.start_run` compares them, and those that `engine.train` reads."""
    kept = {name: getattr(args, name) for name in ("batch_size", "warmup", "precision", "device", "overwrite", "quiet")}
    return argparse.Namespace(arch=model.name, lr=lr, epochs=epochs, **kept, **more)


def train_texts(run, network, tokens, flags, key, loss_of, weights_at, evaluate, **more):
    """Train `network` with AdamW on `tokens` in the run folder `run`; orders and dropout follow `key`.

    loss_of((step, index [B]), ce_weight, kd_weight) as for `engine.optimiser_step`; the rest as for `engine.train`.
    """
    per_epoch = math.ceil(len(tokens.lengths) / flags.batch_size)
    total = per_epoch * flags.epochs
    groups = [  # biases and layer norms do not decay, as in BERT
        dict(params=[p for p in network.parameters() if p.ndim > 1], weight_decay=0.1),
        dict(params=[p for p in network.parameters() if p.ndim < 2], weight_decay=0.0),
    ]
    optimizer = torch.optim.AdamW(groups, flags.lr, betas=(0.9, 0.98), eps=1e-6, fused=True)  # Liu et al. 2019
    torch.manual_seed(common.stream_seed("dropout", *key))
    sums = torch.zeros(3, dtype=torch.float64, device=flags.device)
    take_step = engine.optimiser_step(network, optimizer, loss_of, sums, clip=1.0)

    def batches(epoch):
        return list(enumerate(length_batches(tokens.lengths, flags.batch_size, *key, epoch), epoch * per_epoch))

    def lr_at(step):
        return learning_rate(step, flags.lr, flags.warmup, total)

    loop = ((per_epoch, total), batches, take_step, sums, lr_at, weights_at, evaluate)
    engine.train(run, flags, network, optimizer, *loop, amount=("tokens", int(tokens.lengths.sum())), **more)


def mask_tokens(ids, special, mask_id, vocabulary, *key):
    """(corrupted ids, which of them to predict) of ids [B, L]: 15% of the tokens that are not `special`; of these 80%
    become mask_id, 10% a random token and 10% stay (Devlin et al. 2019, §3.1). Drawn from the key alone."""
    random = common.generator("mask", *key)
    draw, fate = torch.rand(2, *ids.shape, generator=random)
    words = torch.randint(vocabulary, ids.shape, generator=random)
    chosen = (draw < 0.15) & ~torch.isin(ids, special)
    return torch.where(chosen & (fate < 0.8), mask_id, torch.where(chosen & (fate >= 0.9), words, ids)), chosen


def masked_loss(encoder, head, inputs, chosen, targets):
    """(mean cross-entropy, hits) of the chosen tokens [B, L]. The head sees no others, a seventh of the work."""
    logits = head(encoder(**inputs).last_hidden_state[chosen])
    loss = F.cross_entropy(logits.float(), targets, reduction="sum") / max(1, len(targets))
    return loss, (logits.detach().argmax(1) == targets).sum()


def pretrain(run, model, args, seed, data):
    """Masked-language modelling of the training sentences, at twice the classifier's rate; returns the weights.

    The masks are drawn afresh in every step (dynamic masking, Liu et al. 2019, §4.1).
    """
    from transformers import RobertaForMaskedLM

    tokens = encode(model.tokenizer, data.splits["train"].sentences(), None, args.max_length, args.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(common.stream_seed("init", "mlm", seed))
        network = RobertaForMaskedLM(model.config).to(args.device)
    special = torch.tensor(model.tokenizer.all_special_ids)

    def loss_of(batch, ce_weight, kd_weight):
        step, index = batch
        inputs = tokens.batch(index)
        ids = inputs["input_ids"].cpu()
        corrupted, chosen = mask_tokens(ids, special, model.tokenizer.mask_token_id, len(model.tokenizer), seed, step)
        inputs["input_ids"], targets = corrupted.to(args.device), ids[chosen].to(args.device)
        with engine.autocast(args.device, args.precision):
            loss, hits = masked_loss(network.roberta, network.lm_head, inputs, chosen.to(args.device), targets)
        return loss, hits, max(1, len(targets))

    flags = run_flags(args, model, 2 * model.lr, args.mlm_epochs)
    with runs.locked(run):
        runs.start_run(run, flags, "mlm", seed, data, network, **model.facts)
        train_texts(run, network, tokens, flags, ("mlm", seed), loss_of, engine.one_hot, evaluate=lambda *when: {})
    return network.state_dict()


def train_classifier(run, model, args, role, seed, data, pretrained, mode="onehot", teacher=None, step=0, **more):
    """Train a teacher or student in the run folder `run`, and leave logits.npz there, unless it is finished already.

    mode: one of MODES; teacher: logits [n_train, C] of the training texts, where it distils; step: of a switch; more:
    snapshots, start_from of `engine.train`.
    """
    network = build_classifier(model, (role, seed), pretrained).to(args.device)
    tokens = model.tokens["train"]
    labels = torch.as_tensor(data.splits["train"].labels).to(args.device)
    cached = None if teacher is None else torch.as_tensor(teacher).to(args.device)

    def loss_of(batch, ce_weight, kd_weight):
        _, index = batch
        where = index.to(args.device)
        with engine.autocast(args.device, args.precision):
            logits = network(**tokens.batch(index)).logits
        logits = logits.float()
        ce = F.cross_entropy(logits, labels[where]) if ce_weight else 0.0
        kd = common.kd_loss(logits, cached[where], args.temperature) if kd_weight else 0.0
        return ce_weight * ce + kd_weight * kd, (logits.detach().argmax(1) == labels[where]).sum(), len(index)

    def evaluate(epoch, at_end):
        line = {}
        for key in [key for key in data.splits if key != "train"]:
            found = scores(logits_of(network, model.tokens[key]), data.splits[key].labels)
            line |= {f"{key}_{name}": value for name, value in found.items()}
        return line

    weights = dict(onehot=(1.0, 0.0), kd=(args.ce_weight, args.kd_weight))
    before, after = (weights[name] for name in SWITCHES.get(mode, (mode, mode)))
    weights_at = switch_distill.switched_weights(before, after, step)
    facts = dict(model.facts, initial_sha256=engine.weights_hash(network.state_dict()), teacher_sha256=None)
    flags = run_flags(args, model, args.lr or model.lr, args.epochs or model.epochs, temperature=None)
    flags.ce_weight, flags.kd_weight = weights.get(mode, weights["kd"])
    if mode != "onehot":  # whose one run serves all teachers and temperatures
        facts["teacher_sha256"], flags.temperature = hashlib.sha256(teacher.tobytes()).hexdigest(), args.temperature
    if mode in SWITCHES:
        facts["switch"] = dict(direction=mode, step=step)
    with runs.locked(run):
        if runs.start_run(run, flags, role, seed, data, network, **facts):
            train_texts(run, network, tokens, flags, (role, seed), loss_of, weights_at, evaluate, **more)
            save_logits(run, network, model, data)


@torch.no_grad()
def logits_of(network, tokens, batch=256):
    """float32 logits [N, classes] of all texts in their order, in eval mode and full precision."""
    network.eval()  # `engine.train` begins every epoch in train mode
    order = tokens.lengths.argsort(stable=True)
    logits = torch.cat([network(**tokens.batch(index)).logits.float() for index in order.split(batch)])
    return logits[order.argsort().to(logits.device)]


def save_logits(run, network, model, data):
    """logits.npz as of images (see `engine.save_logits`), for every split; clean labels are the more probable ones."""
    train = data.splits["train"]
    clean = train.labels if train.probability is None else train.probability.argmax(1)
    arrays = dict(train_labels=train.labels, train_clean_labels=clean, train_index=data.index)
    for key, split in data.splits.items():
        arrays |= {f"{key}_logits": logits_of(network, model.tokens[key]).cpu().numpy(), f"{key}_labels": split.labels}
    runs.write_npz(run / "logits.npz", arrays)


def scores(logits, labels):
    """Accuracy, Matthews correlation and F1 (of class 1; macro for more classes) as shares, and mean log-loss, of
    logits [N, C]."""
    from sklearn.metrics import f1_score, matthews_corrcoef

    predicted = logits.argmax(1).cpu().numpy()
    f1 = f1_score(labels, predicted, average="binary" if logits.shape[1] == 2 else "macro", zero_division=0)
    accuracy, mcc = float((predicted == labels).mean()), float(matthews_corrcoef(labels, predicted))
    loss = F.cross_entropy(logits.cpu(), torch.as_tensor(labels)).item()
    return dict(acc=accuracy, mcc=mcc, f1=float(f1), loss=loss)


# ---------------------------------------------------------------- all networks of a seed


def run_folders(args, base, seed, models):
    """{what: run folder} of one seed; what: "<model> mlm", "teacher", "<student> <mode>" (with a switch's share)."""

    def folder(*words):
        return Path("-".join([base, *words, f"s{seed}"]))

    masked = [name for name, model in models.items() if model.scratch and args.mlm_epochs]
    folders = {f"{name} mlm": folder(Path(name).name, "mlm") for name in masked}
    teacher, whats = Path(args.teacher).name, []
    folders["teacher"] = folder(teacher, "teacher")
    for mode in args.mode:
        whats += [f"{mode} {s:g}" for s in args.switch_at] if mode in SWITCHES else [mode]
    for student in args.student:
        for what in whats:
            given = [] if what == "onehot" else [teacher]
            folders[f"{student} {what}"] = folder(*given, Path(student).name, *what.split())
    return folders


def train_seed(args, seed, data, models, folders):
    """Train all networks of one seed, where they are not finished: pretraining, teacher, each student in every mode."""
    masked = [name for name in models if f"{name} mlm" in folders]
    pretrained = {name: pretrain(folders[f"{name} mlm"], models[name], args, seed, data) for name in masked}

    def train(what, name, role="student", **more):
        train_classifier(folders[what], models[name], args, role, seed, data, pretrained.get(name), **more)

    train("teacher", args.teacher, "teacher")
    teacher = runs.read_npz(folders["teacher"] / "logits.npz", ("train_logits",))["train_logits"]
    for student in args.student:
        total = math.ceil(data.facts["n_train"] / args.batch_size) * (args.epochs or models[student].epochs)
        steps = {s: round(s * total) for s in args.switch_at}
        kept = set(steps.values()) if set(SWITCHES) & set(args.mode) else ()
        for mode in args.mode:  # the pure ones first
            more = dict(mode=mode, teacher=None if mode == "onehot" else teacher)
            if mode not in SWITCHES:
                train(f"{student} {mode}", student, **more, snapshots=kept)
                continue
            trunk = folders.get(f"{student} {SWITCHES[mode][0]}")
            for s, step in steps.items():
                # From the state that the unswitched run had at the switch: half the time, and on a CPU the same
                # weights. Where that run is not among the modes, from the start.
                start = trunk and switch_distill.latest_snapshot(trunk, step)
                train(f"{student} {mode} {s:g}", student, **more, step=step, start_from=start)


# ---------------------------------------------------------------- report


def save_metrics(folder, named, data):
    """glue.json and glue.md: the task's metrics of every network in `named`, {what: [run folder per seed]}, in the
    table in percent, with Student's t intervals over seeds. Returns {what: {metric: [value per seed]}}."""
    rows, lines, names = {}, [], []
    for split in [split for split in data.splits if split != "train"]:
        names += [f"{split}_{name}" for name in METRICS.get(data.facts["name"], ("acc",))]
    for what, folders in named.items():
        last = [runs.last_metrics(run) for run in folders]
        rows[what] = {name: [line[name] for line in last] for name in names}
        lines.append([what, *(claims.cell(claims.over_seeds(rows[what][name]), 100, 2) for name in names)])
    every = [dict(network=what, **row) for what, row in rows.items()]
    runs.write_json(folder / "glue.json", dict(task=data.facts, rows=every))
    table = claims.markdown_table(["network", *names], lines)
    runs.write_text(folder / "glue.md", table)
    print(table)
    return rows


def glue_claims(rows, data):
    """Claims in the task's own metric, where that is not accuracy; for the embedded task against the Bayes accuracy."""
    found, bayes, metric = [], data.facts.get("bayes_accuracy"), METRICS.get(data.facts["name"], ("acc",))[-1]
    if bayes:
        interval = claims.mean_interval(np.divide(rows["teacher"]["test_acc"], bayes))
        note = f"Bayes accuracy {100 * bayes:.2f}% on the test texts"
        found.append(claims.claim("the teacher reaches 90% of the Bayes accuracy", "> 0.9", *interval, 0.9, note=note))
    for name in rows:
        control = f"{name.removesuffix(' kd')} onehot"
        if metric != "acc" and name.endswith(" kd") and control in rows:
            gain = np.subtract(rows[name][f"test_{metric}"], rows[control][f"test_{metric}"])
            text = f"{name}: KD has the higher {metric.upper()} on the dev set"
            found.append(claims.claim(text, "> 0", *claims.mean_interval(gain), 0, note="KD minus one-hot"))
    return found


def report(folder, student, named, args):
    """Figure 1a, and Figure 1b where there are switches, of one student over all seeds, with claims, into `folder`."""
    onehot, kd, teachers = named[f"{student} onehot"], named[f"{student} kd"], named["teacher"]
    title, seeds = f"{args.task}, {args.teacher} → {student}", f"{len(args.seeds)} seed{'s' * (len(args.seeds) > 1)}"
    points = analyze_deviation.points_from_runs(teachers, kd, onehot)
    section = "language" if student == args.student[0] else None  # one headline for a task
    analyze_deviation.report(points, folder, f"{title}, {seeds}", args.bootstrap, section, quiet=args.quiet, full=False)
    each = {}  # {(direction, share of training before the switch): run folders}
    for direction in [mode for mode in args.mode if mode in SWITCHES]:
        before, after = SWITCHES[direction]
        each |= {(direction, 0): named[f"{student} {after}"], (direction, 1): named[f"{student} {before}"]}
        each |= {(direction, s): named[f"{student} {direction} {s:g}"] for s in args.switch_at}
    if not each:
        return
    by_seed = list(enumerate(args.seeds))
    trunks = {seed: dict(onehot=onehot[k], kd=kd[k]) for k, seed in by_seed}
    folders = {seed: {key: of_seeds[k] for key, of_seeds in each.items()} for k, seed in by_seed}
    given = dict(zip(args.seeds, teachers, strict=True))
    switch_distill.report(folders, trunks, given, args.seeds, folder / "switch", title, args, section=None)


# ---------------------------------------------------------------- main


def parse(argv):
    parser = runs.Parser(__doc__)
    inside, positive = number(float, 0, 1, open_high=True, open_low=True), number(float, 0, 1e38, open_low=True)
    add = parser.add_argument_group("texts").add_argument
    add("--task", default="sentiment", help=f"{', '.join(TASKS)} or csv:PATH (columns text[,text2],label)")
    add("--data-dir", default="data", help="where GLUE's folders (CoLA, …) lie, or glue/CoLA, …; else downloaded")
    add("--subset", type=number(int, 0), default=0, help="train on that many texts; 0 for all")
    add("--data-seed", type=number(int, 0), default=0, help="seed of subset, embedded task and split of a csv file")
    add("--max-length", type=number(int, 8, 100_000), default=128, help="tokens of a text, at most")
    add = parser.add_argument_group("networks and losses").add_argument
    add("--teacher", default="tiny", help=f"hub id, folder, or size from scratch: {', '.join(SIZES)}, LAYERSxHIDDEN")
    add("--student", nargs="+", default=[], help="likewise (default: the teacher's; for tiny also 1x32)")
    how = f"how students are trained, of {', '.join(MODES)} (default: all)"
    add("--mode", nargs="+", choices=MODES, default=MODES, metavar="MODE", help=how)
    add("--switch-at", type=inside, nargs="+", default=[0.5], metavar="S", help="shares of training before the switch")
    add("--kd-weight", type=positive, default=1.0, help="weight of the distillation term")
    add("--ce-weight", type=number(float, 0), default=0.0, help="weight of the one-hot term beside it")
    temperature = number(float, 0, 1e6, open_low=True)
    add("--temperature", type=temperature, default=2.0, help="softens teacher and student in the distillation term")
    add = parser.add_argument_group("training").add_argument
    add("--mlm-epochs", type=number(int, 0), default=8, help="masked-language modelling before, from scratch alone")
    add("--epochs", type=number(int, 1), help="passes over the training texts (default: 6 from scratch, else 3)")
    add("--batch-size", type=number(int, 1), default=32, help="texts per step")
    rates = "0.064/hidden units, at most 1e-3, from scratch; else 2e-5"
    add("--lr", type=positive, help=f"peak learning rate of AdamW (default: {rates})")
    add("--warmup", type=number(float, 0, 1, open_high=True), default=0.06, help="share with a linear rise; then decay")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 autocast on CUDA, else fp32")
    add = parser.add_argument_group("run").add_argument
    add("--seeds", "--seed", type=number(int, 0), nargs="+", default=[0], help="all is trained once for each seed")
    add("--out", help="prefix of the run folders: <out>-tiny-teacher-s0, … (default: runs/<task>)")
    add("--overwrite", action="store_true", help="discard what is in the run folders and start afresh")
    add("--quiet", action="store_true", help="one line per run instead of one per epoch")
    add("--bootstrap", type=number(int, 100, 1_000_000), default=1000, metavar="N", help="draws behind each interval")
    add("--results", help="folder for figures, tables and claims (default: results/glue-<task>)")
    common.add_device_flag(parser)
    common.add_process_flags(parser)
    args = parser.parse_args(argv)
    runs.check_seeds(args.seeds)
    runs.check_prefix(args)
    args.device = engine.use_device(args.device)
    if args.precision == "auto":
        args.precision = "bf16" if args.device == "cuda" else "fp32"
    args.student = args.student or ([args.teacher, "1x32"] if args.teacher == "tiny" else [args.teacher])
    args.student, args.switch_at = (list(dict.fromkeys(named)) for named in (args.student, args.switch_at))
    args.mode = [mode for mode in MODES if mode in args.mode]
    names = {args.teacher, *args.student}
    if len({Path(name).name for name in names}) < len(names):
        what = f"two of {', '.join(sorted(names))} end alike, and their run folders are named by that"
        raise InputError(f"{what}: rename one folder")
    return args


def main(argv=None):
    args = parse(argv)
    import huggingface_hub
    import transformers

    for library in (transformers, huggingface_hub):  # they warn of every new head, which is what is meant, and retries
        library.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()

    data = load_task(args.task, args.data_dir, args.subset, args.data_seed)
    task = Path(args.task.partition(":")[2] or args.task).stem
    results = Path(args.results or f"results/glue-{task}")
    models = {name: prepare(name, data, args) for name in dict.fromkeys([args.teacher, *args.student])}
    seeds = engine.shard_of(args)
    folders = {seed: run_folders(args, args.out or f"runs/{task}", seed, models) for seed in args.seeds}
    results.mkdir(parents=True, exist_ok=True)
    runs.discard_runs(args, [run for seed in seeds for run in folders[seed].values()])

    engine.run_jobs(args)
    for seed in seeds:
        train_seed(args, seed, data, models, folders[seed])
    if engine.only_a_shard(args):
        return

    named = {what: [folders[seed][what] for seed in seeds] for what in folders[seeds[0]] if not what.endswith(" mlm")}
    if {"onehot", "kd"} <= set(args.mode):
        for student in args.student:
            report(results / Path(student).name, student, named, args)
    found = glue_claims(save_metrics(results, named, data), data)
    if found:
        claims.save_claims(results, found, f"Student's t over {len(seeds)} seeds")


if __name__ == "__main__":
    runs.cli(main)
