"""Language (paper §3, GLUE): distil RoBERTa into itself and into a smaller one, with the deviations and the loss switch.

    python glue_distill.py --seeds 0 1 2                                                  # embedded synthetic sentiment
    python glue_distill.py --task sst-2 --teacher roberta-base --student roberta-base distilroberta/distilroberta-base
    python glue_distill.py --task cola --teacher mini --student mini tiny --mlm-epochs 20 # from scratch, no weights needed
    python glue_distill.py --task csv:reviews.csv --mode onehot kd                        # columns text[,text2],label

Trains, where not finished already, a teacher for every seed and its students in each --mode; the run folders are those of
train_teacher.py and train_student.py, so analyze_deviation.py takes them. A size (tiny, mini, … or LAYERSxHIDDEN) starts
from random weights; then the task's own sentences are learnt first by masked-language modelling (--mlm-epochs), once for
each size and seed: teacher and self-distilled student continue the same pretrained weights, as in the paper, with their
own heads, orders and dropout. Teacher logits are read from its logits.npz: text is not augmented, so they are exact.

Writes into --results, for each student: fig1a, deviation.json and claims; fig1b and switch.json (for the switches); and
glue.json, glue.md (metrics, slopes, speed, padding) for all. Departures from the paper: sentence order is by length within
pools of 50 batches; the switch is abrupt unless --window is given; GLUE's dev set is the test set (its labels are public).
The paper's language results are mixed: 7 of its 12 slopes exceed 1. Expected on the embedded, synthetic task, 3 seeds, about
2 minutes on a CPU: the teacher reaches 85.0% where nobody can exceed 88.0% (Bayes); neither the self-distilled student's gain
(-0.6 points, interval -4.9 to 2.9) nor its slope (0.96 on train, 0.84 to 1.13) is settled, nor by how much the smaller
student's slope exceeds its control's (0.33, -0.07 to 1.04). In its hardest quarter 65% (52 to 79) of the training points lie
below y = x.
"""
import argparse
import csv
import hashlib
import math
import os
import re
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

import analyze_deviation
import common
import switch_distill

# ---------------------------------------------------------------- data

# GLUE's original TSV layout: folder, columns of the sentences, column of the label, names of the classes in the order that
# Hugging Face numbers them. CoLA has no header, so its columns are positions.
GLUE = {
    "cola": ("CoLA", (3,), 1, ("0", "1")),
    "sst-2": ("SST-2", ("sentence",), "label", ("0", "1")),
    "mrpc": ("MRPC", ("#1 String", "#2 String"), "Quality", ("0", "1")),
    "rte": ("RTE", ("sentence1", "sentence2"), "label", ("entailment", "not_entailment")),
    "qnli": ("QNLI", ("question", "sentence"), "label", ("entailment", "not_entailment")),
    "qqp": ("QQP", ("question1", "question2"), "is_duplicate", ("0", "1")),
    "mnli": ("MNLI", ("sentence1", "sentence2"), "gold_label", ("entailment", "neutral", "contradiction")),
    "wnli": ("WNLI", ("sentence1", "sentence2"), "label", ("0", "1")),
}
METRICS = {"cola": ("mcc",), "mrpc": ("acc", "f1"), "qqp": ("acc", "f1")}   # accuracy for every other task
HUB = {"imdb": "stanfordnlp/imdb", "ag_news": "fancyzhx/ag_news"}
TASKS = ("sentiment", *GLUE, *HUB)


@dataclass
class Split:
    """Texts of one split: first and second (None for single sentences) lists of N str, labels int64 [N].

    probability [N, 2]: the true probabilities of the classes, known for the embedded task alone.
    """
    first: list
    second: list | None
    labels: np.ndarray
    probability: np.ndarray | None = None

    def take(self, index):
        part = lambda values: None if values is None else [values[k] for k in index]
        return Split(part(self.first), part(self.second), self.labels[index], None if self.probability is None else self.probability[index])


@dataclass
class Texts:
    """One task: splits train, test and, for MNLI, mismatched; index [n_train] into the full training set; facts for config.json."""
    splits: dict
    classes: int
    index: np.ndarray
    facts: dict


def load_task(name, data_dir="data", subset=0, data_seed=0):
    """Load a task as `Texts`: sentiment, a GLUE task, imdb, ag_news, or csv:PATH.

    Local files in data_dir come first, else Hugging Face `datasets`. subset: that many training texts, a seeded and nested
    draw; 0 for all. InputError for an unknown task, missing columns, a torn row, or when nothing can be had.
    """
    data_dir = Path(data_dir)
    if name == "sentiment":
        classes, splits = 2, dict(train=sentiment(4000, "train", data_seed), test=sentiment(2000, "test", data_seed))
    elif name in GLUE:
        splits, classes = glue(name, data_dir), len(GLUE[name][3])
    elif name in HUB:
        folder = data_dir / name
        splits = csv_splits(folder, data_seed) if folder.is_dir() else hub_splits(
            HUB[name], None, ("text", None, "label"), dict(train="train", test="test"), f"train.csv and test.csv (columns text,label) into {folder}")
        classes = int(splits["train"].labels.max()) + 1
    elif name.startswith("csv:"):
        splits = csv_splits(Path(name[4:]), data_seed)
        classes = int(splits["train"].labels.max()) + 1
    else:
        raise common.InputError(f"unknown --task {name!r}: use {', '.join(TASKS)} or csv:PATH")
    n = len(splits["train"].labels)
    if subset > n:
        raise common.InputError(f"--subset {subset} is larger than the {n} training texts of {name}: use at most {n}, or 0 for all")
    index = np.sort(torch.randperm(n, generator=common.generator("subset", data_seed)).numpy()[:subset]) if subset else np.arange(n)
    splits["train"] = splits["train"].take(index)
    if min(len(np.unique(split.labels)) for split in splits.values()) < 2 or len(splits["test"].labels) < 8:
        raise common.InputError(f"{name}: train and test need two classes each, and 8 test texts at least: give more data or a larger --subset")
    digest = hashlib.sha256(repr([(key, s.first, s.second, s.labels.tolist()) for key, s in splits.items()]).encode())
    facts = dict(name=name, classes=classes, subset=subset, label_noise=0.0, data_seed=data_seed, sha256=digest.hexdigest(),
                 **{f"n_{key}": len(split.labels) for key, split in splits.items()})
    if splits["test"].probability is not None:
        facts["bayes_accuracy"] = float((splits["test"].probability.argmax(1) == splits["test"].labels).mean())
    return Texts(splits, classes, index, facts)


def glue(name, data_dir):
    """The splits of a GLUE task, from its original folder in data_dir (or data_dir/glue), else from the hub."""
    folder, columns, label, classes = GLUE[name]
    files = dict(train="train.tsv", test="dev_matched.tsv" if name == "mnli" else "dev.tsv")
    if name == "mnli":
        files["mismatched"] = "dev_mismatched.tsv"
    root = next((root / folder for root in (data_dir, data_dir / "glue") if (root / folder).is_dir()), None)
    if root:
        return {key: read_tsv(root / file, name) for key, file in files.items()}
    hub_columns = {"cola": ("sentence",), "mrpc": ("sentence1", "sentence2"), "mnli": ("premise", "hypothesis")}.get(name, columns)
    parts = {"train": "train", "test": "validation"} if name != "mnli" else {
        "train": "train", "test": "validation_matched", "mismatched": "validation_mismatched"}
    return hub_splits("nyu-mll/glue", name.replace("-", ""), (*hub_columns, None)[:2] + ("label",), parts,
                      f"{', '.join(files.values())} of GLUE into {data_dir / folder}")


def read_tsv(path, name):
    """One file of GLUE's TSV layout as a Split. Quotes are literal; a torn row is an InputError that names its line.

    QQP's published file has a few torn rows; they are skipped and counted, as Hugging Face's loader does.
    """
    _, columns, label, classes = GLUE[name]
    try:
        # Not splitlines(): it also breaks at form feeds and Unicode separators, which occur within sentences.
        rows = [line.rstrip("\r").split("\t") for line in Path(path).read_bytes().decode("utf-8-sig").split("\n")]
    except (OSError, UnicodeDecodeError) as error:
        raise common.InputError(f"{path} cannot be read as UTF-8 text ({error}): put GLUE's original file there") from None
    start = 0 if name == "cola" else 1
    width = 4 if name == "cola" else len(rows[0])
    if start:
        missing = [column for column in (*columns, label) if column not in rows[0]]
        if missing:
            raise common.InputError(f"{path} lacks the column {', '.join(missing)} in its header ({', '.join(rows[0])[:120]}): put GLUE's original file there")
        columns, label = [rows[0].index(column) for column in columns], rows[0].index(label)
    texts, labels, torn = [[] for _ in columns], [], 0
    for number, row in enumerate(rows[start:], start + 1):
        if row == [""]:
            continue
        if len(row) != width or row[label] not in classes:
            if name == "qqp":
                torn += 1
                continue
            why = f"has {len(row)} columns instead of {width}" if len(row) != width else f"has the label {row[label]!r} instead of {' or '.join(classes)}"
            raise common.InputError(f"{path}, line {number}: the row {why}: repair or remove that line")
        for text, column in zip(texts, columns):
            text.append(row[column])
        labels.append(classes.index(row[label]))
    if torn:
        print(f"{path}: {torn} torn rows skipped")
    return Split(texts[0], texts[1] if len(texts) > 1 else None, np.array(labels, np.int64))


def csv_splits(path, data_seed):
    """Splits of a folder with train.csv and test.csv or dev.csv, or of one file of which a seeded fifth is the test split."""
    if path.is_dir():
        test = next((path / file for file in ("test.csv", "dev.csv") if (path / file).exists()), path / "test.csv")
        rows = read_csv(path / "train.csv"), read_csv(test)
    else:
        every = read_csv(path)
        order = torch.randperm(len(every), generator=common.generator("split", data_seed)).tolist()
        fifth = len(every) // 5
        rows = [every[k] for k in sorted(order[fifth:])], [every[k] for k in sorted(order[:fifth])]

    def order(label):   # numbers first, by their size; of any length, which int() does not take
        digits = label.lstrip("0") if label.isdecimal() else ""
        return not label.isdecimal(), len(digits), digits, label
    names = sorted({row[2] for part in rows for row in part}, key=order)
    unknown = {row[2] for row in rows[1]} - {row[2] for row in rows[0]}
    if unknown:
        raise common.InputError(f"{path}: the label {sorted(unknown)[0]!r} is in the test split alone: give training texts of it")
    make = lambda part: Split([row[0] for row in part], [row[1] for row in part] if part[0][1] is not None else None,
                              np.array([names.index(row[2]) for row in part], np.int64))
    if min(map(len, rows)) == 0:
        raise common.InputError(f"{path} holds too few rows for a train and a test split: give at least 40")
    return dict(train=make(rows[0]), test=make(rows[1]))


def read_csv(path):
    """[(text, text2 or None, label)] of a CSV file with the columns text[,text2],label."""
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file)
            header, rows = next(reader, []), [(reader.line_num, row) for row in reader if row]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise common.InputError(f"{path} cannot be read as UTF-8 CSV ({error}): give a file with the columns text[,text2],label") from None
    missing = [column for column in ("text", "label") if column not in header]
    if missing:
        raise common.InputError(f"{path} lacks the column {', '.join(missing)}: its first line must name text[,text2],label")
    at = {column: header.index(column) for column in ("text", "text2", "label") if column in header}
    for number, row in rows:
        if len(row) != len(header) or not row[at["label"]].strip():
            raise common.InputError(f"{path}, line {number}: the row has {len(row)} columns instead of {len(header)}, or no label: repair or remove it")
    return [(row[at["text"]], row[at["text2"]] if "text2" in at else None, row[at["label"]].strip()) for _, row in rows]


def hub_splits(repository, config, columns, parts, instead):
    """Splits through Hugging Face `datasets`; `instead` says which files serve without a network."""
    import datasets
    import huggingface_hub
    huggingface_hub.utils.logging.set_verbosity_error()   # it announces every retry
    try:
        loaded = {key: datasets.load_dataset(repository, config, split=part) for key, part in parts.items()}
    except Exception as error:   # connection, offline mode, cache: whatever went wrong, the fix is the same
        raise common.InputError(f"{repository} could not be fetched ({' '.join(str(error).split())[:120]}): put {instead}") from None
    first, second, label = columns
    return {key: Split(list(d[first]), list(d[second]) if second else None, np.array(d[label], np.int64)) for key, d in loaded.items()}


# The embedded task. Strong words count 2, mild ones 1.
GOOD = {2: "brilliant superb wonderful gripping moving hilarious dazzling splendid".split(), 1: "pleasant decent solid charming neat likeable fresh tidy".split()}
BAD = {2: "dreadful awful tedious painful hollow clumsy lifeless hideous".split(), 1: "weak bland uneven thin dull stale slow loose".split()}
THINGS = "plot acting dialogue score pacing ending cast photography humour script premise lead editing romance villain".split()
VERBS = "is was seems feels looked remains".split()
INTENSIFIERS = {"": 1.0, "very": 1.5, "truly": 1.5, "rather": 0.75, "slightly": 0.5}
CERTAINTY = 2.0   # log-odds per point of sentiment


def sentiment(n, part, data_seed):
    """n generated film reviews with labels drawn from known probabilities (synthetic; not a corpus of anyone's words).

    A clause scores ±1 or ±2 by its adjective, times its intensifier, times −0.6 when negated. "A and B" joins clauses of
    the same sign and scores A + B; "A but B" and "although A, B" join opposite ones and score 0.4·A + B, so that the main
    clause wins. The probability of a positive label is 1/(1 + exp(−2·score)): near score 0 nobody can do better than guess.
    """
    rng = np.random.default_rng(common.stream_seed("sentiment", part, data_seed))
    pick = lambda words: words[rng.integers(len(words))]

    def clause(sign):
        negated, strength = rng.random() < 0.3, int(rng.integers(1, 3))
        intensifier = pick(list(INTENSIFIERS)) if rng.random() < 0.6 else ""
        words = (GOOD if (sign > 0) != negated else BAD)[strength]
        score = sign * strength * INTENSIFIERS[intensifier] * (0.6 if negated else 1.0)
        return " ".join(filter(None, ("the", pick(THINGS), pick(VERBS), "not" * negated, intensifier, pick(words)))), score

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
    positive = 1 / (1 + np.exp(-CERTAINTY * np.array(scores)))
    return Split(texts, None, (rng.random(n) < positive).astype(np.int64), np.stack([1 - positive, positive], axis=1))


# ---------------------------------------------------------------- tokens

SPECIAL = ("<s>", "<pad>", "</s>", "<unk>", "<mask>")


def byte_level_bpe(files=None, texts=(), vocab_size=8000):
    """RoBERTa's tokenizer (Liu et al. 2019): from (vocab.json, merges.txt), else trained on `texts` up to vocab_size tokens."""
    from tokenizers import ByteLevelBPETokenizer
    from tokenizers.processors import RobertaProcessing
    from transformers import PreTrainedTokenizerFast
    if files:
        try:
            bpe = ByteLevelBPETokenizer(*map(str, files))
        except Exception as error:   # tokenizers raises bare Exception
            raise common.InputError(f"{files[0]} and {files[1].name} cannot be read as a byte-level BPE ({error}): restore them") from None
        bpe.add_special_tokens([token for token in SPECIAL if bpe.token_to_id(token) is not None])
        missing = [token for token in SPECIAL if bpe.token_to_id(token) is None]
        if missing:
            raise common.InputError(f"{files[0]} lacks the tokens {' '.join(missing)}: give RoBERTa's vocab.json and merges.txt")
    else:
        bpe = ByteLevelBPETokenizer()
        bpe.train_from_iterator(texts, vocab_size=vocab_size, min_frequency=2, special_tokens=list(SPECIAL), show_progress=False)
    bpe._tokenizer.post_processor = RobertaProcessing(("</s>", bpe.token_to_id("</s>")), ("<s>", bpe.token_to_id("<s>")))
    names = dict(bos_token="<s>", cls_token="<s>", pad_token="<pad>", eos_token="</s>", sep_token="</s>", unk_token="<unk>", mask_token="<mask>")
    return PreTrainedTokenizerFast(tokenizer_object=bpe._tokenizer, model_input_names=["input_ids", "attention_mask"], **names)


@dataclass
class Tokens:
    """Tokens of N texts on one device: ids int32 [N, L] padded with `pad`, types int32 [N, L] or None, lengths int64 [N] on the CPU."""
    ids: torch.Tensor
    types: torch.Tensor | None
    lengths: torch.Tensor
    pad: int

    def batch(self, index):
        """Model inputs of the texts `index` [B] (on the CPU), padded to the longest of them."""
        longest = int(self.lengths[index].max())
        where = index.to(self.ids.device)
        ids = self.ids[where, :longest].long()
        inputs = dict(input_ids=ids, attention_mask=(torch.arange(longest) < self.lengths[index, None]).to(ids.device).long())
        return dict(inputs, token_type_ids=self.types[where, :longest].long()) if self.types is not None else inputs


def encode(tokenizer, first, second, max_length, device):
    """Texts as `Tokens`, truncated to max_length (the longer of a pair first)."""
    coded = tokenizer(first, second, truncation=True, max_length=max_length) if second else tokenizer(first, truncation=True, max_length=max_length)
    lengths = torch.tensor([len(ids) for ids in coded["input_ids"]])

    def matrix(rows, fill):
        padded = np.full((len(rows), int(lengths.max())), fill, np.int32)
        for k, row in enumerate(rows):
            padded[k, :len(row)] = row
        return torch.as_tensor(padded).to(device)
    types = matrix(coded["token_type_ids"], 0) if "token_type_ids" in coded else None
    return Tokens(matrix(coded["input_ids"], tokenizer.pad_token_id), types, lengths, tokenizer.pad_token_id)


def batches(lengths, batch, *key, pool=50):
    """List of index tensors, one per step of an epoch: shuffled, sorted by length within pools of batches, batches shuffled.

    Every text comes once; the order depends on the key alone. Sorting keeps padding low, the pools keep batches random.
    """
    random = common.generator("order", *key)
    order = torch.randperm(len(lengths), generator=random)
    parts = [part for chunk in order.split(pool * batch) for part in chunk[lengths[chunk].argsort(stable=True)].split(batch)]
    return [parts[k] for k in torch.randperm(len(parts), generator=random).tolist()]


# ---------------------------------------------------------------- models

# layers, hidden units, heads. Smaller at the small end than those of Turc et al. 2019, so that a CPU trains them in seconds.
SIZES = {"tiny": (2, 64, 2), "mini": (4, 128, 4), "small": (4, 256, 4), "medium": (8, 512, 8), "base": (12, 768, 12)}


def size_of(name):
    """(layers, hidden units, heads) of a model from scratch, or None when `name` is a hub id or a folder."""
    match = re.fullmatch(r"([0-9]+)x([0-9]+)", name)
    if match:
        layers, hidden = (int(digits) if len(digits) < 10 else 0 for digits in match.groups())
        if not 0 < layers <= 1000 or not 0 < hidden <= 2 ** 16 or hidden > 32 and hidden % 32:
            raise common.InputError(f"--student or --teacher {name}: hidden units must be a multiple of 32, or below 32, and layers at least 1; "
                                    "at most 1000 layers and 65536 units")
        return layers, hidden, max(1, hidden // 64 if hidden % 64 == 0 else hidden // 32)
    return SIZES.get(name)


@dataclass
class Model:
    """What every run of one model shares: its name, config, tokenizer, tokens of each split, and what config.json records."""
    name: str
    config: object
    tokenizer: object
    tokens: dict
    facts: dict

    @property
    def scratch(self):
        return size_of(self.name) is not None

    @property
    def epochs(self):
        return 6 if self.scratch else 3

    @property
    def lr(self):
        # From scratch 1e-3 for tiny, and inversely with the width above it; pretrained: within Liu et al. 2019, table 10.
        return min(1e-3, 0.064 / self.config.hidden_size) if self.scratch else 2e-5


def prepare(name, data, args):
    """The `Model` of a size, hub id or local folder for this task; InputError when they do not fit each other."""
    from transformers import AutoConfig, AutoTokenizer, RobertaConfig
    size = size_of(name)
    train = data.splits["train"]
    if size:
        folder = Path(args.tokenizer) if args.tokenizer else None
        files = [folder / "vocab.json", folder / "merges.txt"] if folder else None
        if files and not all(file.is_file() for file in files):
            raise common.InputError(f"--tokenizer {folder} must be a folder with vocab.json and merges.txt")
        tokenizer = byte_level_bpe(files, train.first + (train.second or []), args.vocab_size)
        layers, hidden, heads = size
        # RoBERTa's 0.02 suits 768 units; scaled to the width, or a narrow model's layers would begin as almost nothing.
        special = {f"{kind}_token_id": getattr(tokenizer, f"{kind}_token_id") for kind in ("pad", "bos", "eos")}
        config = RobertaConfig(vocab_size=len(tokenizer), hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads,
                               intermediate_size=4 * hidden, max_position_embeddings=args.max_length + tokenizer.pad_token_id + 1,
                               type_vocab_size=1, initializer_range=0.02 * math.sqrt(768 / hidden), num_labels=data.classes, **special)
    else:
        if not Path(name).is_dir() and (name.startswith((".", "/")) or name.count("/") > 1 or not re.fullmatch(r"[\w.\-]+(/[\w.\-]+)?", name)):
            raise common.InputError(f"{name} is not a folder: give a hub id, a folder of a saved model, or one of {', '.join(SIZES)}, LAYERSxHIDDEN")
        try:
            config, tokenizer = AutoConfig.from_pretrained(name), AutoTokenizer.from_pretrained(name)
        except Exception as error:   # connection, missing files, unknown model type: one fix
            raise common.InputError(f"model {name} could not be loaded ({' '.join(str(error).split())[:120]}): put config.json, model.safetensors and the "
                                    f"tokenizer's files (for RoBERTa vocab.json and merges.txt) into a folder and give its path, or use one of {', '.join(SIZES)}") from None
        if any("SequenceClassification" in a for a in config.architectures or ()) and config.num_labels != data.classes:
            raise common.InputError(f"model {name} has {config.num_labels} labels but {data.facts['name']} has {data.classes}: give its base model, whose head is new")
        words = list(dict.fromkeys(data.splits["train"].first[:200]))
        unknown = [text for text in words if tokenizer.unk_token_id is not None and tokenizer.unk_token_id in tokenizer(text)["input_ids"]]
        if len(tokenizer) < 50 or len(unknown) > 0.9 * len(words):   # transformers makes up an empty one where the files are missing
            raise common.InputError(f"{name} has no usable tokenizer: put the model's own there (vocab.txt, vocab.json and merges.txt, or tokenizer.json)")
        if tokenizer.pad_token_id is None or len(tokenizer) > config.vocab_size or config.pad_token_id not in (None, tokenizer.pad_token_id):
            raise common.InputError(f"the tokenizer in {name} ({len(tokenizer)} tokens, padding {tokenizer.pad_token_id}) is of another family than its model "
                                    f"({config.vocab_size} tokens, padding {config.pad_token_id}): put the model's own tokenizer there")
        config.num_labels = data.classes
        # RoBERTa's family numbers positions from the padding token on, so the first ones are unused.
        unused = config.pad_token_id + 1 if config.model_type in ("roberta", "xlm-roberta", "camembert") else 0
        positions = getattr(config, "max_position_embeddings", args.max_length) - unused
        if args.max_length > positions:
            raise common.InputError(f"--max-length {args.max_length} is more than the {positions} positions of {name}: give at most {positions}")
    tokens = {key: encode(tokenizer, split.first, split.second, args.max_length, args.device) for key, split in data.splits.items()}
    if max(int(part.ids.max()) for part in tokens.values()) >= config.vocab_size:
        raise common.InputError(f"the tokenizer in {name} gives token numbers beyond the {config.vocab_size} of its model: put the model's own tokenizer there")
    cut = float((tokens["train"].lengths >= args.max_length).double().mean())
    if cut > 0.01:
        print(f"{name}: {100 * cut:.1f}% of the training texts reach --max-length {args.max_length} and may be truncated")
    digest = hashlib.sha256(b"".join(t.ids.cpu().numpy().tobytes() for t in tokens.values())).hexdigest()
    facts = dict(model_type=config.model_type, layers=config.num_hidden_layers, hidden=config.hidden_size, heads=config.num_attention_heads,
                 vocabulary=config.vocab_size, max_length=args.max_length, at_max_length=cut, tokens_sha256=digest)
    print(f"{name}: " + ", ".join(f"{key} {value}" for key, value in facts.items() if key not in ("tokens_sha256", "at_max_length")))
    return Model(name, config, tokenizer, tokens, facts)


def build_classifier(model, key, pretrained=None):
    """A sequence classifier whose new weights depend on `key` alone; a saved classifier keeps its head.

    pretrained: state dict of a masked-language model of the same size, whose encoder is taken.
    """
    from transformers import AutoModelForSequenceClassification, RobertaForSequenceClassification
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(common.stream_seed("init", *key))
        if not model.scratch:
            try:
                network, info = AutoModelForSequenceClassification.from_pretrained(model.name, config=model.config, output_loading_info=True)
            except Exception as error:   # missing weights, shapes that do not fit, no classifier of this type
                raise common.InputError(f"model {model.name} cannot be loaded as a classifier ({' '.join(str(error).split())[:160]}): check its files") from None
            encoder = {name for name in network.base_model.state_dict() if "pooler" not in name}   # the head, and BERT's pooler, may be new
            lost = sorted(name for name in info["missing_keys"] if name.removeprefix(network.base_model_prefix + ".") in encoder)
            if lost:
                raise common.InputError(f"model {model.name} lacks the weights {lost[0]} and {len(lost) - 1} more: its config.json and its weights "
                                        "do not belong together")
            return network.float().train()
        network = RobertaForSequenceClassification(model.config)
    if pretrained:
        encoder = {name.removeprefix("roberta."): value for name, value in pretrained.items() if name.startswith("roberta.")}
        network.roberta.load_state_dict(encoder)
    return network.train()


# ---------------------------------------------------------------- training engine


def learning_rate(step, peak, warmup, total):
    """Linear warm-up over the share `warmup` of training, then linear decay to 0 (Devlin et al. 2019)."""
    rise = warmup * total
    return peak * min((step + 1) / (rise + 1), (total - step) / (total - rise))


def fit(run, network, tokens, args, key, epochs, peak, loss_at, evaluate, snapshots=(), start_from=None):
    """Train `network` in the run folder `run`, from its checkpoint if it has one; returns the metrics of every epoch.

    loss_at(step, index, forward) -> (scalar loss, number of correct texts or None, dict for the log); evaluate() -> dict.
    Orders follow `key`. snapshots: steps before which the state is kept as snapshot-<step>.pt; start_from: a checkpoint
    to begin with when the run folder has none. SIGINT or SIGTERM saves and exits 130; on a CPU the continued run ends in
    the same weights, bit for bit.
    """
    device, n = torch.device(args.device), len(tokens.lengths)
    per_epoch = math.ceil(n / args.batch_size)
    total = per_epoch * epochs
    network = network.to(device)
    forward = torch.compile(network, dynamic=True) if args.compile else network
    decayed = [p for p in network.parameters() if p.ndim > 1]   # not biases and layer norms, as BERT does
    groups = [dict(params=decayed, weight_decay=args.weight_decay), dict(params=[p for p in network.parameters() if p.ndim < 2], weight_decay=0.0)]
    optimizer = torch.optim.AdamW(groups, peak, betas=(0.9, 0.98), eps=1e-6, fused=True)   # betas, eps: Liu et al. 2019
    torch.manual_seed(common.stream_seed("dropout", *key))
    step, history, spent = 0, [], 0.0
    loss_sum, correct = torch.zeros((), dtype=torch.float64, device=device), torch.zeros((), dtype=torch.long, device=device)

    def save(path):
        common.save_state(path, network, optimizer, step=step, history=history, loss_sum=loss_sum, correct=correct,
                          spent=spent + time.perf_counter() - started)

    checkpoint = run / "checkpoint.pt"
    source = checkpoint if checkpoint.exists() else start_from
    if source is not None:
        step, history, spent, loss_sum, correct = common.restore_state(source, network, optimizer, per_epoch, total, device)
        if source == checkpoint and step < total and not args.quiet:
            print(f"{run}: continuing at step {step} of {total}")

    bar = tqdm(total=total, initial=step, desc=run.name, unit="step", disable=True if args.quiet else None)
    with bar, common.interruptible() as stop:
        for epoch in range(step // per_epoch, epochs):
            plan = batches(tokens.lengths, args.batch_size, *key, epoch)
            padded = sum(len(index) * int(tokens.lengths[index].max()) for index in plan)
            real = int(tokens.lengths.sum())
            network.train()
            started = time.perf_counter()
            for index in plan[step % per_epoch:]:
                lr = learning_rate(step, peak, args.warmup, total)
                for group in optimizer.param_groups:
                    group["lr"] = lr
                if step in snapshots:   # with this step's learning rate, also where the run was continued just here
                    save(run / f"snapshot-{step}.pt")
                loss, hits, logged = loss_at(step, index, forward)
                optimizer.zero_grad(set_to_none=True)
                loss.backward()
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimizer.step()
                loss_sum += loss.detach() * len(index)
                if hits is not None:
                    correct += hits
                step += 1
                bar.update()
                if stop:
                    break
            # Weights too: the loss of a step is older than what the step did to them.
            if not torch.isfinite(torch.stack([loss_sum, *(p.detach().double().sum() for p in network.parameters())])).all():
                raise common.InputError(f"the loss or the weights became NaN or infinite in epoch {epoch + 1} of {run}: lower --lr (now {peak:g}) "
                                        "or lengthen --warmup; the last checkpoint is kept")
            if step % per_epoch == 0:
                seconds = spent + time.perf_counter() - started
                line = dict(epoch=epoch + 1, step=step, lr=lr, **logged, train_loss=loss_sum.item() / n, seconds=round(seconds, 3),
                            tokens_per_s=round(real / seconds), padding_share=1 - real / padded, padding_share_to_max=1 - real / (n * args.max_length))
                if hits is not None:
                    line["train_acc"] = correct.item() / n
                line |= evaluate()
                history.append(line)
                loss_sum, correct, spent = torch.zeros_like(loss_sum), torch.zeros_like(correct), 0.0
                started = time.perf_counter()
                common.write_metrics(run, history)
                if not args.quiet:
                    bar.write("  ".join([f"epoch {epoch + 1:3d}/{epochs}", f"train {line['train_loss']:.3f}", f"{line['seconds']:.1f} s"]
                                        + [f"{name} {value:.4g}" for name, value in line.items() if name.startswith("test_")]))
            if stop or step == total or (epoch + 1) % args.save_every == 0:
                save(checkpoint)
            if stop:
                print(f"{run}: saved at step {step} of {total}")
                common.exit_interrupted()
    common.write_metrics(run, history)
    return history


@torch.no_grad()
def logits_of(network, tokens, batch=256):
    """float32 logits [N, classes] of all texts in their order, in eval mode and full precision."""
    training = network.training
    network.eval()
    order = tokens.lengths.argsort(stable=True)
    logits = torch.cat([network(**tokens.batch(index)).logits.float() for index in order.split(batch)])
    network.train(training)
    return logits[order.argsort().to(logits.device)]


def scores(logits, labels):
    """Accuracy, Matthews correlation and F1 (of class 1; macro for more classes) as shares, and mean log-loss, of logits [N, C]."""
    from sklearn.metrics import f1_score, matthews_corrcoef
    predicted, labels = logits.argmax(1).cpu().numpy(), np.asarray(labels)
    return dict(acc=float((predicted == labels).mean()), mcc=float(matthews_corrcoef(labels, predicted)),
                f1=float(f1_score(labels, predicted, average="binary" if logits.shape[1] == 2 else "macro", zero_division=0)),
                loss=F.cross_entropy(logits.cpu(), torch.as_tensor(labels)).item())


def run_flags(args, arch, **more):
    """The flags that a run depends on, as `common.start_run` compares them."""
    names = ("task", "data_dir", "subset", "data_seed", "max_length", "batch_size", "warmup", "weight_decay", "precision", "device",
             "seeds", "out", "overwrite", "quiet", "save_every")
    return argparse.Namespace(arch=arch, **{name: getattr(args, name) for name in names}, **more)


def mask_tokens(ids, special, mask_id, vocabulary, *key):
    """(corrupted ids, which of them to predict) of ids [B, L]: 15% of the tokens that are not `special`; of these 80%
    become mask_id, 10% a random token and 10% stay (Devlin et al. 2019, §3.1). Drawn from the key alone."""
    random = common.generator("mask", *key)
    draw, fate = torch.rand(2, *ids.shape, generator=random)
    words = torch.randint(vocabulary, ids.shape, generator=random)
    chosen = (draw < 0.15) & ~torch.isin(ids, special)
    return torch.where(chosen & (fate < 0.8), mask_id, torch.where(chosen & (fate >= 0.9), words, ids)), chosen


def masked_loss(encoder, head, inputs, chosen, targets):
    """Mean cross-entropy of the chosen tokens [B, L]. The head sees these alone: a seventh of the library's own work."""
    logits = head(encoder(**inputs).last_hidden_state[chosen])
    return F.cross_entropy(logits.float(), targets, reduction="sum") / max(1, len(targets))


def pretrain(run, model, args, seed, data):
    """Masked-language modelling of the training sentences (or --mlm-text); returns the weights, or None without it.

    The masks are drawn afresh in every step (dynamic masking, Liu et al. 2019, §4.1).
    """
    if not model.scratch or not args.mlm_epochs:
        return None
    from transformers import RobertaForMaskedLM
    sentences = data.splits["train"].first + (data.splits["train"].second or [])
    if args.mlm_text:
        try:
            sentences = [line for line in Path(args.mlm_text).read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise common.InputError(f"--mlm-text {args.mlm_text} cannot be read as UTF-8 text ({error}): give a file with one sentence per line") from None
        if not sentences:
            raise common.InputError(f"--mlm-text {args.mlm_text} is empty: give a file with one sentence per line")
    tokens = encode(model.tokenizer, sentences, None, args.max_length, args.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(common.stream_seed("init", "mlm", seed))
        network = RobertaForMaskedLM(model.config)
    texts_sha256 = hashlib.sha256(tokens.ids.cpu().numpy().tobytes()).hexdigest()
    lr = args.mlm_lr or 2 * model.lr
    with common.locked(run):
        return train_masked(run, network, model, args, seed, data, tokens, lr, texts_sha256)


def train_masked(run, network, model, args, seed, data, tokens, lr, texts_sha256):
    """Train `network` on `tokens` as `pretrain` says; returns its state dict."""
    common.start_run(run, run_flags(args, model.name, epochs=args.mlm_epochs, lr=lr), "mlm", seed, data, network, texts_sha256=texts_sha256, **model.facts)
    encoder = torch.compile(network.roberta, dynamic=True) if args.compile else network.roberta
    special = torch.tensor(sorted(model.tokenizer.all_special_ids))

    def loss_at(step, index, forward):
        inputs = tokens.batch(index)
        ids = inputs["input_ids"].cpu()
        corrupted, chosen = mask_tokens(ids, special, model.tokenizer.mask_token_id, len(model.tokenizer), seed, step)
        inputs["input_ids"] = corrupted.to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            return masked_loss(encoder, network.lm_head, inputs, chosen.to(args.device), ids[chosen].to(args.device)), None, {}

    finished = (run / "checkpoint.pt").exists() and (run / "metrics.jsonl").exists() and common.read_metrics(run)[-1]["epoch"] == args.mlm_epochs
    history = fit(run, network, tokens, args, ("mlm", seed), args.mlm_epochs, lr, loss_at, dict)
    if not finished:
        print(f"{run}: masked-token loss {history[0]['train_loss']:.2f} in the first epoch, {history[-1]['train_loss']:.2f} in the last")
    return network.state_dict()


def train_classifier(run, model, args, role, seed, data, pretrained, teacher=None, weights=(1.0, 0.0), switch=None, snapshots=(), start_from=None):
    """Train a teacher or student in the run folder `run`, and leave logits.npz there; nothing happens when it is finished.

    teacher: (logits [n_train, C] of the training texts, their sha256), or None for one-hot training; weights: (ce_weight,
    kd_weight); switch: (direction, step of the switch) replaces them by those of `switch_distill.switched_weights`.
    """
    network = build_classifier(model, (role, seed), pretrained)
    epochs, lr = args.epochs or model.epochs, args.lr or model.lr
    ends = {"onehot": (1.0, 0.0), "kd": (args.ce_weight, args.kd_weight)}
    facts = dict(model.facts, initial_sha256=common.weights_hash(network), teacher_sha256=teacher[1] if teacher else None)
    weights_at = lambda step: weights
    if switch:
        direction, at = switch
        weights_at = switch_distill.switched_weights(*(ends[name] for name in switch_distill.SWITCHES[direction]), at, args.window)
        facts |= dict(switch=dict(direction=direction, step=at, window=args.window))
    flags = run_flags(args, model.name, epochs=epochs, lr=lr, ce_weight=weights[0], kd_weight=weights[1], temperature=args.temperature if teacher else None)
    if not common.start_run(run, flags, role, seed, data, network, **facts):
        return
    labels = torch.as_tensor(data.splits["train"].labels).to(args.device)
    cached = torch.as_tensor(teacher[0]).to(args.device) if teacher else None

    def loss_at(step, index, forward):
        ce_weight, kd_weight = weights_at(step)
        where = index.to(args.device)
        with torch.autocast(args.device, torch.bfloat16, enabled=args.precision == "bf16"):
            logits = forward(**model.tokens["train"].batch(index)).logits
        logits = logits.float()
        ce = F.cross_entropy(logits, labels[where]) if ce_weight else 0.0
        kd = common.kd_loss(logits, cached[where], args.temperature) if kd_weight else 0.0
        loss = ce_weight * ce + kd_weight * kd
        return loss, (logits.detach().argmax(1) == labels[where]).sum(), dict(ce_weight=ce_weight, kd_weight=kd_weight)

    def evaluate():
        line = {}
        for key in [key for key in data.splits if key != "train"]:
            line |= {f"{key}_{name}": value for name, value in scores(logits_of(network, model.tokens[key]), data.splits[key].labels).items()}
        return line

    history = fit(run, network, model.tokens["train"], args, (role, seed), epochs, lr, loss_at, evaluate, snapshots, start_from)
    clean = data.splits["train"].labels if data.splits["train"].probability is None else data.splits["train"].probability.argmax(1)
    arrays = dict(train_labels=data.splits["train"].labels, train_clean_labels=clean, train_index=data.index)
    for key, split in data.splits.items():
        arrays |= {f"{key}_logits": logits_of(network, model.tokens[key]).cpu().numpy(), f"{key}_labels": split.labels}
        if split.probability is not None:
            arrays[f"{key}_probability"] = split.probability
    common.write_atomic(run / "logits.npz", lambda file: np.savez(file, **arrays))
    print(f"{run}: test " + ", ".join(f"{name} {100 * history[-1][f'test_{name}']:.2f}" for name in METRICS.get(data.facts["name"], ("acc",)))
          + f", train acc {100 * history[-1]['train_acc']:.2f}, {sum(line['seconds'] for line in history):.0f} s")


def teacher_logits(run, data):
    """(float32 logits [n_train, C], sha256) of a finished teacher run, checked against `data`."""
    config = common.finished_config(run)
    if config["data"].get("sha256") != data.facts["sha256"]:
        raise common.InputError(f"teacher {run} was trained on other texts than --task {data.facts['name']} gives here: use the same --task, --subset, "
                                "--data-seed and files")
    logits = common.read_npz(Path(run) / "logits.npz", ("train_logits",))["train_logits"]
    if logits.shape != (data.facts["n_train"], data.classes) or logits.dtype != np.float32 or not np.isfinite(logits).all():
        raise common.InputError(f"{run}/logits.npz has train_logits {logits.dtype} {list(logits.shape)} or values that are not finite: train it again with --overwrite")
    return logits, hashlib.sha256(np.ascontiguousarray(logits).tobytes()).hexdigest()


# ---------------------------------------------------------------- report


def metric_rows(named, data):
    """One row per trained network: the task's metrics with Student's t interval over seeds, speed and padding.

    named: {what: [run folder per seed]}.
    """
    rows = []
    for what, runs in named.items():
        lines = [common.last_metrics(run) for run in runs]
        row = dict(network=what, runs=[str(run) for run in runs], parameters=common.read_config(runs[0]).get("parameters", 0))
        metrics = [f"{split}_{name}" for split in data.splits if split != "train" for name in METRICS.get(data.facts["name"], ("acc",))]
        means = ("train_acc", "tokens_per_s", "padding_share", "padding_share_to_max")
        lacking = [(run, name) for run, line in zip(runs, lines) for name in (*metrics, *means) if name not in line]
        if lacking:
            raise common.InputError(f"{lacking[0][0]}/metrics.jsonl ends without a {lacking[0][1]}: train that run again with --overwrite")
        row |= {name: [line[name] for line in lines] for name in metrics} | {name: float(np.mean([line[name] for line in lines])) for name in means}
        rows.append(row)
    return rows


def metrics_markdown(rows):
    """The rows of `metric_rows` as a Markdown table, in percent."""
    names = [name for name in rows[0] if name.startswith(("test_", "mismatched_"))]
    text = f"| network | parameters | {' | '.join(name.replace('_', ' ') + ' %' for name in names)} | train acc % | tokens/s | padding % | padding % to max length |\n"
    text += "|---" * (len(names) + 6) + "|\n"
    for row in rows:
        cells = []
        for name in names:
            mean, low, high = common.mean_interval(row[name])
            cells.append(f"{100 * mean:.2f}" + (f" [{100 * low:.2f}, {100 * high:.2f}]" if len(row[name]) > 1 else ""))
        text += (f"| {row['network']} | {row['parameters']:,} | {' | '.join(cells)} | {100 * row['train_acc']:.2f} | {row['tokens_per_s']:.0f} | "
                 f"{100 * row['padding_share']:.1f} | {100 * row['padding_share_to_max']:.1f} |\n")
    return text


def deviations_markdown(tables):
    """Slope and low quarter of each student beside its control as Markdown. tables: {student: tables of deviation.json}."""
    text = "| student | split | slope | control's | low quarter below y = x | control's | low gap minus control's |\n" + "|---" * 7 + "|\n"
    for student, splits in tables.items():
        for split, table in splits.items():
            of = table["predicted"]
            cells = [of[network][key] for key in ("slope", "low_below") for network in ("student", "control")] + [of["student-control"]["low_gap"]]
            text += f"| {student} | {split} | " + " | ".join(map(common.cell, cells)) + " |\n"
    return text


def glue_claims(rows, data):
    """Claims in the task's own metric, where that is not accuracy, and for the embedded task against the Bayes accuracy."""
    claims, by_name = [], {row["network"]: row for row in rows}
    if "bayes_accuracy" in data.facts:
        value, low, high = common.mean_interval([acc / data.facts["bayes_accuracy"] for acc in by_name["teacher"]["test_acc"]])
        claims.append(common.claim("the teacher reaches 90% of the Bayes accuracy", "> 0.9", value, low, high, 0.9,
                                   note=f"Bayes accuracy {100 * data.facts['bayes_accuracy']:.2f}% on the test texts"))
    metric = METRICS.get(data.facts["name"], ("acc",))[-1]
    for name in [name for name in by_name if name.endswith(" kd") and metric != "acc" and f"{name[:-3]} onehot" in by_name]:
        gain = np.subtract(by_name[name][f"test_{metric}"], by_name[f"{name[:-3]} onehot"][f"test_{metric}"])
        claims.append(common.claim(f"{name}: KD has the higher {metric.upper()} on the dev set", "> 0", *common.mean_interval(gain), 0, note="KD minus one-hot"))
    return claims


def resolve(args):
    """Fill in what depends on the machine, and refuse what does not fit together; returns args."""
    common.check_seeds(args.seeds)
    if not args.kd_weight and set(args.mode) != {"onehot"}:
        raise common.InputError("--kd-weight 0 leaves nothing to distil: give it a weight above 0, or --mode onehot")
    args.device = common.resolve_device(args.device)
    if args.precision == "auto":
        args.precision = "bf16" if args.device == "cuda" else "fp32"
    args.student = args.student or ([args.teacher, "1x32"] if args.teacher == "tiny" else [args.teacher])
    for flag in ("student", "mode", "switch_at"):   # named twice is trained once
        setattr(args, flag, list(dict.fromkeys(getattr(args, flag))))
    names = list(dict.fromkeys([args.teacher, *args.student]))
    if len({Path(name).name for name in names}) < len(names):
        raise common.InputError(f"two of {', '.join(names)} end alike, and their run folders are named by that: rename one folder")
    if "{seed}" in (args.out or ""):
        raise common.InputError("--out is a prefix here, to which the seed is appended: leave {seed} out of it")
    return args


def main(argv=None):
    parser = common.Parser(__doc__)
    add, number = parser.add_argument, common.number
    add("--task", default="sentiment", help=f"{', '.join(TASKS)} or csv:PATH (columns text[,text2],label)")
    add("--data-dir", default="data", help="where GLUE's folders (CoLA, SST-2, …) lie; what is missing comes through Hugging Face datasets")
    add("--subset", type=number(int, 0), default=0, help="train on that many texts; 0 for all")
    add("--data-seed", type=number(int, 0), default=0, help="seed of the subset, of the embedded task and of a csv file's split")
    add("--teacher", default="tiny", help=f"hub id or folder of a model, or a size from scratch: {', '.join(SIZES)}, LAYERSxHIDDEN")
    add("--student", nargs="+", default=[], help="the same for the students (default: the teacher's; for tiny also 1x32)")
    add("--teacher-run", help="run folder of a finished teacher instead of training one; {seed} in it stands for the seed")
    add("--mode", nargs="+", choices=("onehot", "kd", *switch_distill.SWITCHES), default=["onehot", "kd", *switch_distill.SWITCHES], help="how students are trained")
    add("--switch-at", type=number(float, 0, 1, True, True), nargs="+", default=[0.5], help="shares of training before the switch")
    add("--window", type=number(int, 0), default=0, help="steps over which the weights move linearly to the new loss; 0 switches at once")
    add("--kd-weight", type=number(float, 0), default=1.0, help="weight of the distillation term")
    add("--ce-weight", type=number(float, 0), default=0.0, help="weight of the one-hot term beside it")
    add("--temperature", type=number(float, 0, 1e6, open_low=True), default=2.0, help="softens both teacher and student in the distillation term")
    add("--tokenizer", help="folder with vocab.json and merges.txt for models from scratch (default: a byte-level BPE of the training texts)")
    add("--vocab-size", type=number(int, 300, 1_000_000), default=8000, help="largest vocabulary of that BPE")
    add("--max-length", type=number(int, 8, 100_000), default=128, help="texts are truncated to that many tokens")
    add("--mlm-epochs", type=number(int, 0), default=8, help="epochs of masked-language modelling before a model from scratch")
    add("--mlm-text", help="file of sentences, one per line, for it (default: the training texts)")
    add("--mlm-lr", type=number(float, 0, 1e38, open_low=True), help="its peak learning rate (default: twice the classifier's)")
    add("--epochs", type=number(int, 1), help="passes over the training texts (default: 6 from scratch, 3 for a pretrained model)")
    add("--batch-size", type=number(int, 1), default=32, help="texts per step")
    add("--lr", type=number(float, 0, 1e38, open_low=True), help="peak learning rate of AdamW (default: 0.064/hidden units, at most 1e-3, from scratch; 2e-5 for a pretrained model)")
    add("--warmup", type=number(float, 0, 1, open_high=True), default=0.06, help="share of training with linear warm-up; then linear decay to 0")
    add("--weight-decay", type=number(float, 0, 1e38), default=0.1, help="decoupled weight decay of the matrices")
    add("--precision", choices=("auto", "fp32", "bf16"), default="auto", help="auto: bf16 autocast on CUDA, fp32 on CPU")
    add("--device", choices=("auto", "cpu", "cuda"), default="auto", help="auto takes CUDA where it is")
    add("--compile", action="store_true", help="torch.compile the model (pays off for long runs on CUDA)")
    add("--seeds", "--seed", type=number(int, 0), nargs="+", default=[0], help="everything is trained once for each seed")
    add("--out", help="prefix of the run folders: <out>-tiny-teacher-s0, <out>-tiny-onehot-s0, … (default: runs/<task>)")
    add("--overwrite", action="store_true", help="discard what is in the run folders and start afresh")
    add("--save-every", type=number(int, 1), default=1, help="epochs between checkpoints")
    add("--quiet", action="store_true", help="one line per run instead of one per epoch")
    add("--bootstrap", type=number(int, 100, 1_000_000), default=1000, help="bootstrap draws behind each interval")
    add("--results", help="folder for figures, tables and claims (default: results/glue-<task>)")
    args = resolve(parser.parse_args(argv))
    import transformers
    transformers.utils.logging.set_verbosity_error()   # it warns of every new head, which is what is meant
    transformers.utils.logging.disable_progress_bar()
    warnings.filterwarnings("ignore", category=FutureWarning, module="huggingface_hub")   # between its own versions

    data = load_task(args.task, args.data_dir, args.subset, args.data_seed)
    task = Path(args.task.partition(":")[2] or args.task).stem
    base, results = args.out or f"runs/{task}", Path(args.results or f"results/glue-{task}")
    label = lambda name: Path(name).name
    models = {name: prepare(name, data, args) for name in dict.fromkeys(([] if args.teacher_run else [args.teacher]) + args.student)}
    total = math.ceil(data.facts["n_train"] / args.batch_size)
    named = {}   # what: run folder of each seed
    for seed in args.seeds if args.teacher_run else ():   # a wrong one is refused before anything is discarded
        teacher_logits(args.teacher_run.replace("{seed}", str(seed)), data)
    results.mkdir(parents=True, exist_ok=True)

    for seed in args.seeds:
        pretrained = {name: pretrain(Path(f"{base}-{label(name)}-mlm-s{seed}"), model, args, seed, data) for name, model in models.items()}

        def train(what, run, name, role="student", **more):
            named.setdefault(what, []).append(run)
            if args.overwrite and args.teacher_run and os.path.realpath(run) == os.path.realpath(args.teacher_run.replace("{seed}", str(seed))):
                raise common.InputError(f"--overwrite would discard the teacher {args.teacher_run} of this command: choose another --out")
            with common.locked(run):
                train_classifier(run, models[name], args, role, seed, data, pretrained[name], **more)
            return run

        if args.teacher_run:
            named.setdefault("teacher", []).append(Path(args.teacher_run.replace("{seed}", str(seed))))
        else:
            train("teacher", Path(f"{base}-{label(args.teacher)}-teacher-s{seed}"), args.teacher, "teacher")
        teacher = teacher_logits(named["teacher"][-1], data)
        for student in args.student:
            steps = {s: round(s * total * (args.epochs or models[student].epochs)) for s in args.switch_at}
            kept = set(steps.values()) if set(args.mode) & set(switch_distill.SWITCHES) else set()
            pair = f"{base}-{label(args.teacher_run or args.teacher)}-{label(student)}".replace("{seed}", "")
            trunks = {}
            if "onehot" in args.mode:
                trunks["onehot"] = train(f"{student} onehot", Path(f"{base}-{label(student)}-onehot-s{seed}"), student, snapshots=kept)
            if "kd" in args.mode:
                trunks["kd"] = train(f"{student} kd", Path(f"{pair}-kd-s{seed}"), student, teacher=teacher,
                                     weights=(args.ce_weight, args.kd_weight), snapshots=kept)
            for direction in [mode for mode in args.mode if mode in switch_distill.SWITCHES]:
                for s, step in steps.items():
                    # From the state that the unswitched run had at the switch: half the time, and the same weights on a CPU.
                    state = trunks.get(switch_distill.SWITCHES[direction][0], Path()) / f"snapshot-{step}.pt"
                    window = f"-w{args.window}" if args.window else ""
                    train(f"{student} {direction} {s:g}", Path(f"{pair}-{direction}-{s:g}{window}-s{seed}"), student, teacher=teacher,
                          switch=(direction, step), start_from=state if state.exists() else None)

    rows, tables = metric_rows(named, data), {}
    if {"onehot", "kd"} <= set(args.mode):
        for student in args.student:
            title = f"{args.task}, {args.teacher_run or args.teacher} → {student}, {len(args.seeds)} seed(s)"
            tables[student] = report(results / label(student), student, named, args, title)
    text = metrics_markdown(rows) + (f"\n{deviations_markdown(tables)}" if tables else "")
    common.write_json(results / "glue.json", dict(task=data.facts, rows=rows))
    common.write_text(results / "glue.md", text)
    print(text)
    claims = glue_claims(rows, data)
    if claims:
        common.save_claims(results, claims)


def report(folder, student, named, args, title):
    """Figure 1a, and Figure 1b where there are switches, of one student over all seeds, with their claims, into `folder`.

    Returns the tables of deviation.json.
    """
    onehot, kd, teachers = named[f"{student} onehot"], named[f"{student} kd"], named["teacher"]
    analyze_deviation.main(["--teacher", *map(str, teachers), "--student", *map(str, kd), "--control", *map(str, onehot),
                            "--bootstrap", str(args.bootstrap), "--title", title, "--out", str(folder)])
    tables = common.read_json(folder / "deviation.json")["tables"]
    directions = [mode for mode in args.mode if mode in switch_distill.SWITCHES]
    if not directions:
        return tables
    plt = common.pyplot()
    trunks = {seed: dict(onehot=onehot[k], kd=kd[k]) for k, seed in enumerate(args.seeds)}
    folders = {}
    for k, seed in enumerate(args.seeds):
        folders[seed] = {}
        for direction in directions:
            before, after = switch_distill.SWITCHES[direction]
            folders[seed] |= {(direction, 0): trunks[seed][after], (direction, 1): trunks[seed][before]}
            folders[seed] |= {(direction, s): named[f"{student} {direction} {s:g}"][k] for s in args.switch_at}
    rows = switch_distill.switch_table(folders, trunks, dict(zip(args.seeds, teachers)), args.seeds, args.bootstrap)
    (folder / "switch").mkdir(exist_ok=True)
    common.write_json(folder / "switch" / "switch.json", dict(rows=rows))
    common.write_text(folder / "switch" / "switch.md", switch_distill.table_markdown(rows))
    print(switch_distill.table_markdown(rows))
    common.save_claims(folder / "switch", switch_distill.switch_claims(rows), common.scope(len(args.seeds), len(set(teachers))))
    switch_distill.plot_switches(plt, rows, folder / "switch", title)
    switch_distill.plot_curves(plt, folders, trunks, args.seeds, folder / "switch", title)
    return tables


if __name__ == "__main__":
    common.cli(main)
