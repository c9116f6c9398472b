"""One page about everything in results/ and runs/: claims, figures with their commands, runs beside the paper.

    make report                                          # writes results/index.html
    python report.py --runs runs more/runs --results results more/results --out results/all

Reads what the other scripts left and trains nothing. The page is one file without scripts that needs no network; its
layout is report.html.jinja. What is damaged or unfinished is left out, and the page says so. The same inputs give the
same bytes. The paper's accuracies stand beside a run only where data, network and label noise match.
"""

import base64
import hashlib
import io
import json
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import jinja2
from PIL import Image

import claims
import common
import engine
import runs
from switch_distill import ARROWS

# Stem of a figure's file, in the order of the paper, and its caption.
FIGURES = {
    "fig1a": "Figure 1a: density of Y = φ(student probability) over X = φ(teacher probability) of the class that the "
    "teacher predicts, with y = x (dashed) and the mean fit; beside it the one-hot control.",
    "fig1b": "Figure 1b: test accuracy of students whose loss changes after a share s of training.",
    "fig1b_curves": "Figure 1b: test accuracy over training, of the unswitched runs and of the switched ones.",
    "fig1b_teachers": "Figure 1b: gain of distillation, and slope, against how well the teacher fits.",
    "linear": "§4, least squares: progress along eigendirections, bias and variance, and where bias helps or hurts.",
    "classifiers": "§4, classifiers: progress of first-layer weights along lower eigen-buckets against the top one's.",
    "ntk": "§4, empirical NTK: progress of logits along lower eigen-buckets of the kernel against the top one's.",
    "denoise": "§5: noise scale, alignment and decrease of the held-out loss of one-hot, KD and smoothed labels.",
    "benchmark": "Images per second of the ways to train.",
}
# (data, network, whether labels are noisy): the paper's test accuracy in percent, trained on labels and distilled from
# a network of the same kind. The network and share behind the noisy numbers are not known here.
PAPER = {("cifar100", "resnet56", False): (72.52, 74.55), ("cifar100", "resnet56", True): (69.8, 72.7)}
SLOPE_CLAIM = "slope of the student's fit exceeds 1"  # of analyze_deviation.py
# (kind, split): in how many of the paper's settings the slope of Figure 1a exceeds 1.
SLOPES = {("image", "test"): "18 of 18", ("image", "train"): "13 of 18", ("language", "test"): "7 of 12"}
KINDS = ("teacher", "one-hot", "KD", "KD and one-hot", "switched", "other")
WIDTH, QUALITY = 1600, 80  # of a figure on the page, in pixels and for WebP; the files beside it hold all of it

# ---------------------------------------------------------------- reading


def read_all(read, paths, skipped):
    """[read(path)] of all that can be read; of each other one, `skipped` gets a line that says why not."""
    results = []
    for path in paths:
        try:
            with runs.reading(path, "make it again"):
                results.append(read(path))
        except runs.InputError as error:
            skipped.append(str(error))
    return results


def folders_with(roots, *patterns):
    """The folders in and below `roots` that hold a file of one of these patterns, sorted."""
    found = set()
    for root in roots:
        for pattern in patterns:
            found.update(file.parent for file in root.rglob(pattern))
    return sorted(found)


def read_run(folder):
    """A finished run. All that the page shows of it is worked out here, so that a damaged file is found here."""
    config = runs.read_config(folder)
    flags, facts, data = config["flags"], config["facts"], config["data"]
    pretraining = config["role"] == "mlm"  # which leaves no logits, and has no accuracy
    if not pretraining:
        runs.finished_config(folder)
    elif not (folder / "metrics.jsonl").exists() or len(runs.read_metrics(folder)) < flags["epochs"]:
        raise runs.InputError(f"{folder} is not finished: continue it with: {config['command']}")
    lines = runs.read_metrics(folder)
    accuracy = None if pretraining else runs.last_metrics(folder)["test_acc"]
    run = SimpleNamespace(path=folder, config=config, lines=lines, accuracy=accuracy, versions=dict(config["versions"]))
    time_of([run])  # a line without a time is found here
    run.teacher, run.teacher_sha256 = None, str(facts.get("teacher_sha256") or "")  # see `find_teachers`
    run.kind, run.text = kind_of(config, lines[-1]["step"])
    width = flags.get("width", 1)
    run.network = Path(config["arch"]).name + (f" ×{width:g}" if width != 1 else "")
    run.plan = f"{flags['epochs']} epochs, batch {flags['batch_size']}, lr {flags['lr']:g}, {flags['precision']}"
    run.plan += f", stopped after {flags['stop_epoch']}" if flags.get("stop_epoch") else ""
    run.data = f"{data['name']}, {data['n_train']:,} training {'images' if 'image' in data else 'texts'}, "
    run.data += f"{100 * data['label_noise']:g}% label noise (sha256 {data['sha256'][:12]})"
    in_full = not data["subset"] and width == 1
    run.paper = PAPER.get((data["name"], config["arch"], data["label_noise"] > 0)) if in_full else None
    compared = {name: value for name, value in flags.items() if name not in runs.NOT_COMPARED and value is not None}
    run.setting = json.dumps([compared, config["role"], data, run.text], sort_keys=True)
    seed = re.escape(str(config["seed"]))
    run.name = re.sub(rf"^(.*)(?<![\d.]){seed}(?![\w.])", r"\1*", folder.as_posix())  # the last place that names it
    return run


def kind_of(config, last_step):
    """(one of KINDS, the same in more words) of how a run was trained."""
    flags, facts = config["flags"], config["facts"]
    if config["role"] != "student":
        return "teacher", "teacher"
    if facts.get("targets"):
        return "other", str(facts["targets"])
    if facts.get("switch"):
        switch = facts["switch"]
        window = f" over {switch['window']} steps" if switch.get("window") else ""
        return "switched", f"{ARROWS[switch['direction']]} at s = {switch['step'] / last_step:.2g}{window}"
    if not flags["kd_weight"]:
        return "one-hot", "one-hot"
    kind = "KD and one-hot" if flags["ce_weight"] else "KD"
    return kind, f"{kind}, T = {flags['temperature']:g}"


def find_teachers(trained, skipped):
    """Set `teacher` of each student to the run it was distilled from, where that is among `trained`.

    Students know their teacher by the hash of its weights, or for text of its training logits.
    """

    def read_hash(file):
        if file.name == "checkpoint.pt":
            return engine.weights_hash(runs.load_checkpoint(file)["model"])
        return hashlib.sha256(runs.read_npz(file, ("train_logits",))["train_logits"].tobytes()).hexdigest()

    known, wanted = {}, {run.teacher_sha256 for run in trained} - {""}
    for run in sorted(trained, key=lambda run: KINDS.index(run.kind)):  # likely ones first, until all are found
        file = run.path / ("logits.npz" if "tokens_sha256" in run.config["facts"] else "checkpoint.pt")
        if wanted and file.exists():
            for found in read_all(read_hash, [file], skipped):
                known.setdefault(found, run)
                wanted.discard(found)
    for run in trained:
        run.teacher = known.get(run.teacher_sha256)


def read_results(path, skipped):
    """A folder's claims and figures; `over` is what the notes of all its claims end with: of what intervals are."""
    language = any((above / "glue.json").exists() for above in (path, *path.parents))
    kind, order = "language" if language else "image", list(FIGURES)

    def place(file):
        return order.index(file.stem) if file.stem in order else len(order)

    files = sorted(path.glob("*.png"), key=lambda file: (place(file), file))
    tables = read_all(lambda file: read_claims(file, kind), sorted(path.glob("claims.json")), skipped)
    rows = tables[0] if tables else []
    ends = {row["note"].rpartition("; ")[2] for row in rows}
    over = ends.pop() if len(ends) == 1 and rows[1:] else ""
    for row in rows:
        row["note"] = row["note"].removesuffix(over).removesuffix("; ")
    first = len(order) if language else min(map(place, files), default=len(order))
    figures = read_all(read_figure, files, skipped)
    return SimpleNamespace(path=path, kind=kind, rows=rows, over=over, figures=figures, place=(first, path))


def read_claims(file, kind):
    """The rows of a claims.json, each with our number as text and with how many of the paper's settings agree."""
    rows = claims.checked_claims(runs.read_json(file), file)
    for row in rows:
        if not all(isinstance(row[key], str) for key in ("claim", "expected", "verdict", "note")):
            raise ValueError("a claim is not text")
        split, _, text = row["claim"].partition(": ")
        row["count"] = SLOPES.get((kind, split), "") if text == SLOPE_CLAIM else ""
        value, low, high = row["measured"], row["low"], row["high"]
        row["ours"] = in_words(value, low, high)
        if value is not None and low == value == high:  # counted or proved, not measured
            row["ours"] = claims.decimal(value).rstrip("0").rstrip(".")
    return rows


def read_figure(file):
    """A figure: caption, picture, and the command that made it (empty when not recorded)."""
    image = Image.open(file)
    command = str(image.info.get("Command", ""))
    image = image.convert("RGBA")  # reads all of it: a torn one ends here
    image.thumbnail((WIDTH, 10 * WIDTH))
    content = io.BytesIO()
    image.save(content, "WEBP", quality=QUALITY)
    source = "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()
    caption = FIGURES.get(file.stem, file.stem)
    return SimpleNamespace(caption=caption, command=command, source=source, width=image.width, height=image.height)


def read_analysis(file):
    """Time and versions of one seed of an analysis, as `runs.kept_result` keeps them."""
    kept = runs.read_json(file)
    one = SimpleNamespace(versions=dict(kept["versions"]), lines=[dict(file=str(file), seconds=kept["seconds"])])
    time_of([one])  # as above
    return one


# ---------------------------------------------------------------- tables


def in_words(value, low, high, scale=1.0, digits=3):
    """A number with its interval as text; that of a single seed has none."""
    return claims.cell(dict(value=value, low=low, high=high), scale, digits).replace(" [?, ?]", ", no interval")


def time_of(group):
    """The time of training as text. A switched run carries the epochs of the run it began as, and each counts once."""
    epochs = {}
    for run in group:
        epochs.update((json.dumps(line), line["seconds"]) for line in run.lines)
    seconds = sum(epochs.values())
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


def run_tables(trained):
    """{data in words: a row for each setting}: runs named alike but for the seed, of the same flags, data and teacher.

    Flags do not say everything (pretraining, the seed's own teacher), so runs of other names are never pooled.
    """
    groups, tables = {}, {}
    for run in trained:
        if run.accuracy is not None:
            teacher = run.teacher.setting if run.teacher else run.teacher_sha256 and "unknown"
            groups.setdefault((run.data, KINDS.index(run.kind), run.name, run.setting, teacher), []).append(run)
    for key in sorted(groups):
        group = groups[key]
        run, teacher = group[0], group[0].teacher
        source = f"{teacher.network} → " if teacher else "teacher not among these runs → " if run.teacher_sha256 else ""
        row = dict(what=f"{run.text}, {source}{run.network}", plan=run.plan, seeds=len(group), time=time_of(group))
        row["name"] = run.name if group[1:] else run.path.as_posix()
        if teacher and teacher.plan != run.plan:
            row["plan"] += f"; teacher {teacher.plan}"
        row["ours"] = in_words(*claims.mean_interval([run.accuracy for run in group]), 100, 2)
        row["paper"], row["note"] = papers_accuracy(run)
        tables.setdefault(run.data, []).append(row)
    return tables


def papers_accuracy(run):
    """The paper's accuracy in percent for what a run trained, and whether its schedule is another one, both as text."""
    distilled = run.kind == "KD" and run.teacher and run.teacher.paper == run.paper  # from a network like itself
    if not run.paper or not (distilled or run.kind in ("teacher", "one-hot")):
        return "–", ""
    recipe = json.loads(json.dumps(dict(common.RECIPES["paper"], stop_epoch=None)))  # as config.json holds it
    same = all(run.config["flags"].get(name) == value for name, value in recipe.items())
    return str(run.paper[1 if distilled else 0]), "" if same else "with another schedule"


def slope_counts(folders):
    """(kind, split, the paper's count of settings whose slope exceeds 1, ours)."""
    counts = []
    for (kind, split), count in SLOPES.items():
        slopes = set()  # the same runs analysed into two folders count once
        for folder in folders:
            found = [row for row in folder.rows if row["claim"] == f"{split}: {SLOPE_CLAIM}"]
            slopes.update((row["measured"] or 0, row["ours"]) for row in found if folder.kind == kind)
        above = sum(value > 1 for value, _ in slopes)
        counts.append((kind, split, count, f"{above} of {len(slopes)}" if slopes else "not run"))
    return counts


def hardware_rows(trained, analyses):
    """(hardware, threads, torch, Python, commit, work, time)."""
    groups = {}
    for work, ones in (("training runs", trained), ("seeds of analyses", analyses)):
        for one in ones:
            names = ("hardware", "threads", "torch", "python", "git_commit")
            key = (*(str(one.versions.get(name) or "?") for name in names), work)
            groups.setdefault(key, []).append(one)
    return [(*key[:-1], f"{len(group)} {key[-1]}", time_of(group)) for key, group in sorted(groups.items())]


def main(argv=None):
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add("--runs", nargs="+", type=Path, default=[Path("runs")], help="folders in which run folders lie")
    add("--results", nargs="+", type=Path, default=[Path("results")], help="folders in which figures and claims lie")
    add("--out", type=Path, default=Path("results"), help="folder for index.html")
    args = parser.parse_args(argv)
    for folder in (*args.runs, *args.results):
        if not folder.is_dir() and folder not in (Path("runs"), Path("results")):
            raise runs.InputError(f"{folder} is not a folder: check --runs and --results")

    skipped = []
    trained = read_all(read_run, folders_with(args.runs, "config.json", "metrics.jsonl", "logits.npz"), skipped)
    folders = [read_results(path, skipped) for path in folders_with(args.results, "claims.json", "*.png")]
    folders = sorted((folder for folder in folders if folder.rows or folder.figures), key=lambda folder: folder.place)
    if not trained and not folders:
        first = f" ({len(skipped)} left out, the first: {skipped[0]})" if skipped else ""
        nothing = "nothing to report: no finished run below --runs, no figure or claim below --results"
        raise runs.InputError(f"{nothing}{first}; run make reproduce first, or give --runs and --results")
    find_teachers(trained, skipped)
    seeds = sorted(set().union(*(root.rglob("seeds/*.json") for root in args.results)))
    analyses = read_all(read_analysis, seeds, skipped)

    verdicts = Counter()
    for folder in folders:
        verdicts.update(row["verdict"] for row in folder.rows)
    blocks = dict(trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True)
    templates = jinja2.FileSystemLoader(Path(__file__).parent)
    layout = jinja2.Environment(loader=templates, autoescape=True, undefined=jinja2.StrictUndefined, **blocks)
    page = layout.get_template("report.html.jinja").render(
        folders=folders,
        verdicts=verdicts,
        slopes=slope_counts(folders),
        tables=run_tables(trained),
        hardware=hardware_rows(trained, analyses),
        skipped=skipped,
    )
    args.out.mkdir(parents=True, exist_ok=True)
    runs.write_text(args.out / "index.html", page)
    figures = sum(len(folder.figures) for folder in folders)
    left_out = f"; {len(skipped)} damaged or unfinished left out" if skipped else ""
    print(f"report: {args.out / 'index.html'}, of {len(trained)} runs and {figures} figures{left_out}")


if __name__ == "__main__":
    runs.cli(main)
