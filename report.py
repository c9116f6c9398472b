"""One page about everything in results/ and runs/: the headline claims, figures with their commands, all claims, runs.

    make report                                          # writes results/index.html
    python report.py --runs runs more/runs --results results more/results --out results/all
    python report.py --keep docs/results/digits.json     # the same as a small JSON and a picture, to be published
    python report.py --docs docs                         # docs/results.md and README's table from docs/results/*.json

Reads what the other scripts left and trains nothing. The page is one file without scripts that needs no network; its
layout is report.html.jinja. A damaged file or an unfinished run is left out, and the page names it.
"""

import base64
import io
import itertools
import json
import re
from pathlib import Path
from types import SimpleNamespace

import jinja2
from PIL import Image, ImageOps

import claims
import engine
import runs
from switch_distill import ARROWS

# Stem of a figure's file, in the order of the page, and its caption. A folder's first figure shows its headlines.
FIGURES = {
    "fig1a": "Figure 1a: the student's probability (φ) of the class that the teacher predicts, over the teacher's; "
    "colour is the log number of points.",
    "fig1b": "Figure 1b: test accuracy of students whose loss changes after a share s of training.",
    "fig1b_curves": "Figure 1b: test accuracy of the same students over training.",
    "pays": "When does it pay to disobey? Students of teachers that were stopped on the way.",
    "classifiers": "§4, classifiers: progress of first-layer weights along lower eigen-buckets against the top one's.",
    "ntk": "§4, empirical NTK: progress of logits along lower eigen-buckets of the kernel against the top one's.",
    "linear": "§4, least squares: progress along eigendirections, bias and variance, and where bias helps or hurts.",
    "denoise": "§5: noise scale, alignment and decrease of the held-out loss of one-hot, KD and smoothed labels.",
}
# (data, its subset, network, whether labels are noisy): the paper's test accuracy in percent; KD is from a network of
# the same kind. The network and share behind the noisy numbers are not known here.
PAPER = {
    ("cifar100", 0, "resnet56", False): {"teacher": "72.52", "one-hot": "72.52", "KD": "74.55"},
    ("cifar100", 0, "resnet56", True): {"teacher": "69.8", "one-hot": "69.8", "KD": "72.7"},
}
KINDS = ("teacher", "one-hot", "KD", "KD and one-hot", "switched", "other")

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


def files_below(roots, pattern):
    """The files in and below `roots` that match `pattern`."""
    return set().union(*(root.rglob(pattern) for root in roots))


def read_run(folder):
    """A finished run: all that is shown of it but its teacher, for which see `find_teachers`."""
    config = runs.read_config(folder)
    flags, facts, data, versions = config["flags"], config["facts"], config["data"], config["versions"]
    hits = None
    if config["role"] != "mlm":  # pretraining leaves no logits
        runs.finished_config(folder)
        arrays = runs.read_npz(folder / "logits.npz", ("test_logits", "test_labels"))
        hits = arrays["test_logits"].argmax(1) == arrays["test_labels"]
    lines = runs.read_metrics(folder)
    run = SimpleNamespace(path=folder, facts=facts, hits=hits, lines=lines, stopped=bool(flags.get("stop_epoch")))
    run.hardware = f"{versions['hardware']}, torch {versions['torch']}"
    run.teacher_sha256, run.teacher = str(facts.get("teacher_sha256") or ""), ""
    run.kind, run.text = kind_of(config, lines[-1]["step"])
    width = flags.get("width", 1)
    run.network = Path(config["arch"]).name + (f" ×{width:g}" if width != 1 else "")
    run.plan = f"{flags['epochs']} epochs, batch {flags['batch_size']}, lr {flags['lr']:g}, {flags['precision']}"
    run.plan += f", stopped after {flags['stop_epoch']}" if run.stopped else ""
    run.data = f"{data['name']}, {data['n_train']:,} training {'images' if 'image' in data else 'texts'}, "
    run.data += f"{100 * data['label_noise']:g}% label noise"
    setting = (data["name"], data["subset"], run.network, data["label_noise"] > 0)
    run.paper = PAPER.get(setting, {}).get(run.kind, "–")
    compared = {name: value for name, value in flags.items() if name not in runs.NOT_COMPARED and value is not None}
    seed = re.escape(str(config["seed"]))
    run.name = re.sub(rf"^(.*)(?<![\d.]){seed}(?![\w.])", r"\1*", folder.as_posix())  # the last place that names it
    # Flags do not say everything (pretraining, for example), so runs of other names are never pooled.
    alike = json.dumps([compared, config["role"], data, run.text], sort_keys=True)
    run.pooled = run.data, KINDS.index(run.kind), run.name, alike
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
    """Set `teacher` of each student: the network of the run in `trained` that it was distilled from, in words."""
    known, wanted = {"": ""}, {run.teacher_sha256 for run in trained}
    for run in sorted(trained, key=lambda run: KINDS.index(run.kind)):  # likely ones first, until all are found
        if wanted <= known.keys():
            break
        # The checkpoint, then snapshots on the way.
        for file in sorted(run.path.glob("logits.npz" if "tokens_sha256" in run.facts else "*.pt")):
            stopped = run.stopped or file.stem.startswith("snapshot")
            for found in read_all(engine.teacher_hash, [file], skipped):
                known.setdefault(found, f"{run.network} stopped on the way" if stopped else run.network)
    for run in trained:
        run.teacher = known.get(run.teacher_sha256, "teacher not among these runs")


def page_order(file):
    """Sort key of files in results: folders of one setting together, each where FIGURES has its first figure."""
    places, last = {stem: place for place, stem in enumerate(FIGURES)}, len(FIGURES)
    first = min([places.get(figure.stem, last) for figure in file.parent.glob("*.png")], default=last)
    return file.parent.parent, first, file.parent, places.get(file.stem, last), file


def read_claims(file):
    """A claims table; `over` is what the notes of all its rows end with: of what intervals are."""
    rows = claims.checked_claims(runs.read_json(file), file)
    ends = {row["note"].rpartition("; ")[2] for row in rows}
    over = ends.pop() if len(ends) == 1 else ""
    for row in rows:
        row["note"] = row["note"].removesuffix(over).removesuffix("; ")
        # A single seed has no interval.
        row["ours"] = claims.cell(dict(row, value=row["measured"])).replace(" [?, ?]", ", no interval")
        if row["low"] == row["measured"] == row["high"]:  # counted or proved, not measured
            row["ours"] = claims.decimal(row["measured"]).rstrip("0").rstrip(".")
    return SimpleNamespace(folder=file.parent, rows=rows, over=over, verdicts=claims.verdicts_in_words(rows))


def webp(picture, side):
    """A picture of at most `side` pixels as the text of a URL; that it is WebP keeps the page small."""
    content, picture = io.BytesIO(), picture.copy()
    picture.thumbnail((side, side))
    picture.save(content, "WEBP", quality=70, method=6)
    return "data:image/webp;base64," + base64.b64encode(content.getvalue()).decode()


def read_figure(file):
    """A figure: caption, picture, thumbnail, and the command that made it (empty when not recorded)."""
    image = Image.open(file)
    picture = image.convert("RGBA")
    found = SimpleNamespace(folder=file.parent, caption=FIGURES.get(file.stem, file.stem))
    found.command = image.info.get("Command", "")
    found.source, found.thumbnail = webp(picture, 1600), webp(picture, 200)
    return found


# ---------------------------------------------------------------- tables


def parts_of(figures, tables):
    """A part of the page for each folder of results: its figures, numbered over the page, and claims table or None."""
    folders = dict.fromkeys(found.folder for found in (*figures, *tables))
    parts = {folder: SimpleNamespace(folder=folder, figures=[], table=None) for folder in folders}
    for number, figure in enumerate(figures, 1):
        figure.number = number
        parts[figure.folder].figures.append(figure)
    for table in tables:
        parts[table.folder].table = table
    return list(parts.values())


def run_tables(trained):
    """{data in words: a row for each setting}: runs of one name but for the seed, of one setting and one teacher."""
    groups, tables = {}, {}
    for run in trained:
        if run.hits is not None:
            groups.setdefault((*run.pooled, run.teacher), []).append(run)
    for (data, *_), group in sorted(groups.items()):
        run = group[0]
        paper = run.paper if run.teacher in ("", run.network) else "–"
        row = dict(plan=run.plan, seeds=len(group), paper=paper)
        row["name"] = run.name if len(group) > 1 else run.path.as_posix()
        row["what"] = f"{run.text}, {run.teacher and run.teacher + ' → '}{run.network}"
        row["ours"] = claims.cell(claims.accuracy([run.hits for run in group]), 100, 2)
        tables.setdefault(data, []).append(row)
    return tables


# ---------------------------------------------------------------- results to publish

OVERVIEW = ("fig1a", "classifiers", "fig1b", "pays")
MARKS = ("<!-- headlines: written by make docs -->", "<!-- end of headlines -->")


def keep(file, title, trained, tables, texts, pictures, skipped):
    """Write claims, runs and the Markdown files `texts` as the JSON `file`; beside it OVERVIEW of `pictures` as one."""
    lines = {json.dumps(line): line["seconds"] for run in trained for line in run.lines}
    kept = dict(title=title, hardware=sorted({run.hardware for run in trained}), training_seconds=sum(lines.values()))
    kept |= dict(runs=run_tables(trained), claims={}, tables={})
    for table in tables:
        kept["claims"][table.folder.as_posix()] = runs.read_json(table.folder / "claims.json")
    for text in [text for text in texts if text.stem != "claims"]:
        kept["tables"][text.with_suffix("").as_posix()] = text.read_text(encoding="utf-8")
    runs.write_json(file, kept)
    files = {picture.stem: picture for picture in reversed(pictures)}
    overview = [files[stem] for stem in OVERVIEW if stem in files]
    shown = read_all(lambda picture: Image.open(picture).convert("RGB"), overview, skipped)
    if shown:
        runs.write_atomic(file.with_suffix(".webp"), lambda out: sheet(shown).save(out, "WEBP", quality=80, method=6))
    print("\n".join([*(f"left out: {line}" for line in skipped), f"kept: {file}"]))


def sheet(pictures, width=1000):
    """One picture of `pictures`, two in a row."""
    fitted = [ImageOps.contain(picture, (width, width)) for picture in pictures]
    rows = [fitted[k : k + 2] for k in range(0, len(fitted), 2)]
    heights = [max(picture.height for picture in row) for row in rows]
    whole, top = Image.new("RGB", (width * len(rows[0]), sum(heights)), "white"), 0
    for row, height in zip(rows, heights, strict=True):
        for column, picture in enumerate(row):
            whole.paste(ImageOps.pad(picture, (width, height), color="white"), (column * width, top))
        top += height
    return whole


def most_seeds(setting):
    """How many seeds there are at most behind a number of a kept setting."""
    return max([row["seeds"] for row in itertools.chain(*setting["runs"].values())], default=0)


def side_by_side(kept):
    """The headlines of all `kept` settings in one Markdown table, a column for each setting."""
    rows, cells = {}, {}
    for k, setting in enumerate(kept):
        for table in setting["claims"].values():
            for row in claims.headlines(table):
                control = f" ({row['control']})" if row["control"] else ""
                key = row["section"], row["claim"]
                rows.setdefault(key, row)
                cells[key, k] = f"{row['shown']}{control}, **{row['verdict']}**"
    keys = [(row["section"], row["claim"]) for row in claims.headlines(rows.values())]
    lines = [[*key, *(cells.get((key, k), "") for k in range(len(kept)))] for key in keys]
    return claims.markdown_table(["", "claim (its control)", *(setting["title"] for setting in kept)], lines)


def write_docs(folder):
    """Write results.md into `folder`, and the table of headlines into the README above, from folder/results/*.json."""
    files = (folder / "results").glob("*.json")
    files = sorted(files, key=lambda file: (file.stem == "earlier", file.stem != "digits", file))
    kept = {file: runs.read_json(file) for file in files}
    text = "# Results\n\nWritten by `make docs` from the JSON files in `docs/results/`. Brackets are 95% intervals.\n"
    for file, setting in kept.items():
        text += f"\n## {setting['title']}\n\n"
        if setting["hardware"]:
            hours = f", {setting['training_seconds'] / 3600:.1f} hours" if setting["training_seconds"] else ""
            text += f"Trained on {'; '.join(setting['hardware'])}{hours}.\n\n"
        if file.with_suffix(".webp").exists():
            text += f"![Figures of {setting['title']}](results/{file.stem}.webp)\n\n"
        for data, rows in setting["runs"].items():
            lines = [[row["what"], row["plan"], row["seeds"], row["ours"], row["paper"]] for row in rows]
            text += f"{data}:\n\n"
            text += claims.markdown_table(["network", "schedule", "seeds", "test accuracy %", "paper %"], lines) + "\n"
        for name, table in setting["tables"].items():
            text += f"### {name}\n\n{table.strip()}\n\n"
        for name, rows in setting["claims"].items():
            text += f"### {name}: all claims\n\n{claims.claims_markdown(rows)}\n"
    runs.write_text(folder / "results.md", text)
    readme = folder.parent / "README.md"
    before, _, rest = readme.read_text(encoding="utf-8").partition(MARKS[0])
    # One seed has intervals over points alone: it stays out of README.
    table = side_by_side([setting for setting in kept.values() if setting["claims"] and most_seeds(setting) > 1])
    runs.write_text(readme, f"{before}{MARKS[0]}\n\n{table}\n{MARKS[1]}{rest.partition(MARKS[1])[2]}")
    print(f"written: {folder / 'results.md'} and the table in {readme}")


def main(argv=None):
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add("--runs", nargs="+", type=Path, default=[Path("runs")], help="where run folders lie")
    add("--results", nargs="+", type=Path, default=[Path("results")], help="where figures and claims lie")
    add("--out", type=Path, default=Path("results"), help="folder for index.html")
    add("--keep", type=Path, metavar="FILE", help="write a small JSON and a picture instead, to be published")
    add("--title", help="what the kept results are of (default: the name of FILE)")
    add("--docs", type=Path, metavar="DIR", help="write DIR/results.md and README's table from DIR/results/*.json")
    args = parser.parse_args(argv)
    if args.docs:
        return write_docs(args.docs)
    if args.keep and args.keep.suffix != ".json":
        raise runs.InputError(f"--keep {args.keep} must end in .json: it would be overwritten")
    for folder in (*args.runs, *args.results):
        if not folder.is_dir() and folder not in (Path("runs"), Path("results")):
            raise runs.InputError(f"{folder} is not a folder: check --runs and --results")

    skipped = []
    trained = read_all(read_run, sorted(file.parent for file in files_below(args.runs, "config.json")), skipped)
    find_teachers(trained, skipped)
    tables = read_all(read_claims, sorted(files_below(args.results, "claims.json"), key=page_order), skipped)
    pictures, texts = (sorted(files_below(args.results, f"*.{ending}"), key=page_order) for ending in ("png", "md"))
    if not (trained or tables or pictures or texts or skipped):
        raise runs.InputError("nothing to report: run make reproduce first, or give --runs and --results")
    if args.keep:
        args.keep.parent.mkdir(parents=True, exist_ok=True)
        return keep(args.keep, args.title or args.keep.stem, trained, tables, texts, pictures, skipped)
    figures = read_all(read_figure, pictures, skipped)
    templates = jinja2.FileSystemLoader(Path(__file__).parent)
    layout = jinja2.Environment(loader=templates, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True)
    parts = parts_of(figures, tables)
    rows = [dict(row, part=part) for part in parts if part.table for row in part.table.rows]
    found = dict(headlines=claims.headlines(rows), parts=parts, tables=run_tables(trained), skipped=skipped)
    found["hardware"] = sorted({run.hardware for run in trained})
    page = layout.get_template("report.html.jinja").render(found)
    args.out.mkdir(parents=True, exist_ok=True)
    runs.write_text(args.out / "index.html", page)
    left_out = f"; {len(skipped)} damaged or unfinished left out" if skipped else ""
    if found["headlines"]:
        print(claims.headlines_markdown(found["headlines"]))
    print(f"{len(rows)} claims ({claims.verdicts_in_words(rows)}): claims.md beside each figure in the results")
    print(f"report: {args.out / 'index.html'}, of {len(trained)} runs and {len(figures)} figures{left_out}")


if __name__ == "__main__":
    runs.cli(main)
