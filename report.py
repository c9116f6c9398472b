"""One page about everything in results/ and runs/: the headline claims, figures with their commands, all claims, runs.

    make report                                          # writes results/index.html
    python report.py --keep docs/results/digits.json     # the same as a small JSON and a picture, to be published
    python report.py --docs docs                         # docs/results.md and README's tables from docs/results/*.json

Reads what the other scripts left and trains nothing. The page is one file without scripts that needs no network; its
layout is report.html.jinja. A damaged file or an unfinished run is left out, and the page names it.
"""

import base64
import io
import json
import os
import re
from pathlib import Path
from types import SimpleNamespace

import claims
import deviation
import runs

import jinja2
import numpy as np
from PIL import Image

# Stem of a figure's file, in the order of the page, and its caption. A folder's first figure shows its headlines.
FIGURES = {
    "fig1a": "Figure 1a: φ of the class that a teacher predicts, its student's over its own; colour is the log count.",
    "fig1b": "Figure 1b: test accuracy of students whose loss changes after a share s of training.",
    "fig1b_curves": "Figure 1b: test accuracy of the same students over training.",
    "pays": "When does it pay to disobey? Students of teachers that were stopped on the way.",
    "classifiers": "§4, classifiers: bias of first-layer progress to the top eigendirections; right, its tie to §3.",
    "linear": "§4, least squares: progress along eigendirections, and what the bias does to the risk.",
    "denoise": "§5: noise of one-hot, KD and smoothed labels, decrease of the held-out loss, where the noise falls.",
}
ARROWS = {"onehot2kd": "one-hot → KD", "kd2onehot": "KD → one-hot"}
# JSON files of docs/results: settings on real data, a row each, and the columns of README's headlines.
ROWS = ("cifar10", "cifar100", "cifar100-noisy", "resnet56", "resnet56-resnet20", "resnet56-mobilenetv2")
ROWS += ("tiny-imagenet", "sst-2", "cola", "mrpc", "rte")
COLUMNS = ("digits", "cifar10", "cifar100", "sst-2")
HERE = Path(__file__).parent
FILES = jinja2.FileSystemLoader([HERE, HERE / "docs"])
ESCAPED = jinja2.select_autoescape(["html.jinja"])
LAYOUTS = jinja2.Environment(loader=FILES, autoescape=ESCAPED, undefined=jinja2.StrictUndefined, trim_blocks=True)

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


def page_order(file):
    """Sort key of files in results: folders of one setting together, each where FIGURES has its first figure."""
    places = {stem: place for place, stem in enumerate(FIGURES)}
    last = len(FIGURES)
    first = min([places.get(figure.stem, last) for figure in file.parent.glob("*.png")], default=last)
    return file.parent.parent, first, file.parent, places.get(file.stem, last), file


def files_below(roots, pattern):
    """The files in and below `roots` that match `pattern`, in the order of the page."""
    return sorted(set().union(*(root.rglob(pattern) for root in roots)), key=page_order)


def read_run(folder):
    """All that is shown of a finished run."""
    config = runs.finished_config(folder)
    flags, facts, data, versions = (config[key] for key in ("flags", "facts", "data", "versions"))
    arrays = runs.read_npz(folder / "logits.npz", ("test_logits", "test_labels"))
    lines = runs.read_metrics(folder)
    run = SimpleNamespace(path=folder, lines=lines, command=config["command"], commit=versions["git_commit"])
    run.hits = arrays["test_logits"].argmax(1) == arrays["test_labels"]
    run.made = ", ".join([versions["hardware"], *(f"{name} {versions[name]}" for name in ("python", "torch", "numpy"))])
    run.data = f"{data['name']}, {data['n_train']:,} training points, {100 * data['label_noise']:g}% label noise"
    run.plan = f"{lines[-1]['epoch']} epochs, batch {flags['batch_size']}, lr {flags['lr']:g}, {flags['precision']}"
    run.what = f"{how_trained(config['role'], flags, facts, lines[-1]['step'])}, {Path(config['arch']).name}"
    if flags.get("width", 1) != 1:
        run.what += f" ×{flags['width']:g}"
    seed = re.compile(rf"^(.*)(?<![\d.]){config['seed']}(?![\w.])")  # the last place that names it
    run.name = seed.sub(r"\1*", folder.as_posix())
    run.teacher = seed.sub(r"\1*", facts.get("teacher", ""))
    if facts.get("teacher_arch"):
        run.teacher += f" ({facts['teacher_arch']})"
    # A name does not say everything: runs are pooled where all flags are the same too.
    compared = {name: value for name, value in flags.items() if name not in runs.NOT_COMPARED and value is not None}
    alike = json.dumps([compared, data, run.what, run.teacher, facts.get("loss")], sort_keys=True)
    run.setting = run.data, config["role"] != "teacher", run.name, alike
    return run


def how_trained(role, flags, facts, last_step):
    """In words how a run was trained, as its config.json has it."""
    if role != "student":
        return role
    if facts.get("targets"):
        return str(facts["targets"])
    if facts.get("switch"):
        return f"{ARROWS[facts['switch']['direction']]} at s = {facts['switch']['step'] / last_step:.2g}"
    if not flags["kd_weight"]:
        return "one-hot"
    name = "student_loss"
    if facts.get("loss"):  # its first line; some have no source
        name = facts["loss"][0].removeprefix("def ").partition("(")[0]
    if name == "student_loss":
        name = "KD and one-hot" if flags["ce_weight"] else "KD"
    return f"{name}, T = {flags['temperature']:g}"


def read_claims(file):
    """A claims table; `over` is what the notes of all rows end with: what intervals are of, what the teacher fits."""
    rows = runs.read_json(file)
    claims.claims_markdown(rows)  # for the errors of what is no table of claims
    claims.headlines_markdown(claims.headlines(rows))
    # What all notes end with; commonprefix takes lists too.
    shared = os.path.commonprefix([row["note"].split("; ")[::-1] for row in rows])
    over = "; ".join(shared[::-1])
    for row in rows:
        row["note"] = row["note"].removesuffix(over).removesuffix("; ")
        row.update(over=over, folder=file.parent)
    return SimpleNamespace(folder=file.parent, rows=rows, over=over, verdicts=claims.verdicts_in_words(rows))


def read_figure(file):
    """A figure: caption, picture, and the command that made it (empty when not recorded)."""
    image = Image.open(file)
    content = io.BytesIO()
    image.convert("RGBA").save(content, "WEBP", quality=70, method=6)  # it keeps the page small
    found = SimpleNamespace(folder=file.parent, caption=FIGURES.get(file.stem, file.stem), webp=content.getvalue())
    found.command = image.info.get("Command", "")
    found.source = base64.b64encode(found.webp).decode()
    return found


def read_row(file):
    """The row of the Figure 1a whose deviation.json is `file`: test accuracies, all else of training points.

    None without a control, or without one of the two splits, as logits of a user's own may be.
    """
    kept = runs.read_json(file)
    if set(kept["tables"]) != {"train", "test"} or "control" not in kept["tables"]["test"]["predicted"]:
        return None
    train = kept["tables"]["train"]
    test = kept["tables"]["test"]
    slope, below = deviation.deviation_claims({"train": train})[:2]
    row = {name: test["fidelity"][name]["accuracy"]["value"] for name in ("teacher", "control", "student")}
    row.update(fit=train["fidelity"]["teacher"]["accuracy"]["value"], seeds=kept["seeds"], slope=slope, below=below)
    row["drawn"] = runs.read_json(file.with_name("fig1a.json"))["train"]
    return row


# ---------------------------------------------------------------- output


def run_tables(trained):
    """{data in words: a row for each setting}: runs of one name but for the seed are one row."""
    groups = {}
    tables = {}
    for run in trained:
        groups.setdefault(run.setting, []).append(run)
    for (data, *_), group in sorted(groups.items()):
        run = group[0]
        name = run.name if len(group) > 1 else run.path.as_posix()
        row = dict(what=run.what, name=name, teacher=run.teacher, plan=run.plan, seeds=len(group))
        row["accuracy"] = claims.cell(claims.accuracy([run.hits for run in group]), 100, 2)
        tables.setdefault(data, []).append(row)
    return tables


def keep(file, title, trained, tables, figures, args, skipped):
    """Write claims, runs and rows as the JSON `file`; beside it the first figure."""
    seconds = {}
    for run in trained:
        seconds.update({json.dumps(line): line["seconds"] for line in run.lines})  # branches share some
    kept = dict(title=title, made=sorted({run.made for run in trained}), training_seconds=sum(seconds.values()))
    kept["commits"] = sorted(filter(None, {*(run.commit for run in trained), runs.versions()["git_commit"]}))
    kept["commands"] = sorted(filter(None, {made.command for made in (*trained, *figures)}))
    kept["claims"] = {table.folder.as_posix(): runs.read_json(table.folder / "claims.json") for table in tables}
    kept["rows"] = list(filter(None, read_all(read_row, files_below(args.results, "deviation.json"), skipped)))
    runs.write_json(file, dict(kept, runs=run_tables(trained)))
    if figures:
        runs.write_atomic(file.with_suffix(".webp"), figures[0].webp)
    for line in skipped:
        print(f"left out: {line}")
    print(f"kept: {file}")


def side_by_side(kept):
    """The headlines of `kept` settings as [(section, claim), its row in each setting or None], in the paper's order."""
    found = {}
    for k, setting in enumerate(kept):
        for row in claims.headlines(sum(setting["claims"].values(), [])):
            cells = found.setdefault((row["section"], row["claim"]), [None] * len(kept))
            if cells[k]:
                raise runs.InputError(f"{setting['title']} has {row['claim']!r} twice: keep one setting in a file")
            cells[k] = row
    return sorted(found.items(), key=lambda item: claims.SECTIONS.index(item[0][0]))


def draw_rows(kept, file):
    """Figure 1a of the training points of `kept` settings, six at most, as one picture."""
    figure = claims.pyplot().figure(figsize=(10, 7))
    for k, setting in enumerate(kept, 1):
        row = setting["rows"][0]
        axis = figure.add_subplot(2, 3, k)
        counts = np.array([line.split() for line in row["drawn"]["student"]["counts"]], float)
        counts[counts == 0] = np.nan
        axis.imshow(np.log(counts), extent=row["drawn"]["student"]["extent"], origin="lower", aspect="auto", zorder=1)
        axis.axline((0, 0), slope=1, color="black", ls="--", lw=1, label="y = x")
        for name, colour in (("student", "other"), ("control", "onehot")):
            slope, intercept = row["drawn"][name]["fit"]
            axis.axline((0, intercept), slope=slope, color=claims.COLOURS[colour], label=f"fit of the {name}")
        axis.set(xlabel="X = φ(teacher probability)", ylabel="Y = φ(student probability)")
        axis.set_title(f"{setting['title']}\nslope {row['slope']['shown']}, teacher fits {100 * row['fit']:.1f} %")
    claims.legend_below(figure, figure.axes[0])
    content = io.BytesIO()
    figure.savefig(content, format="webp", dpi=110)
    runs.write_atomic(file, content.getvalue())


def write_docs(folder):
    """Write results.md into `folder`, and above it README's tables, each between its markers, from folder/results."""
    kept = {file.stem: runs.read_json(file) for file in (folder / "results").glob("*.json")}
    tables = {}
    for file in (folder / "results").glob("*.md"):  # in README without the spaces around cells, as its other tables
        tables[file.stem] = re.sub(" *[|] *", "|", file.read_text(encoding="utf-8"))
    readme = folder.parent / "README.md"
    layout = LAYOUTS.get_template("results.md.jinja")
    with runs.reading(folder / "results", "keep its settings again"):
        rows = [kept[name] for name in ROWS if name in kept]
        drawn = [setting for setting in rows if setting["rows"][0]["drawn"]][:6]
        if drawn:
            draw_rows(drawn, folder / "results" / "fig1a-rows.webp")
        settings = {name: kept[name] for name in ("digits", *ROWS) if name in kept}
        given = dict(rows=rows, settings=settings, drawn=drawn, side_by_side=side_by_side)
        text = layout.render(given)
        parts = layout.make_module(given)
        columns = [kept[name] for name in COLUMNS if name in kept]
        tables.update(headlines=parts.headlines(columns, side_by_side(columns)), rows=parts.rows_table(rows))
        content = readme.read_text(encoding="utf-8")
    for name, table in tables.items():
        before, start, rest = content.partition(f"<!-- {name}: written by make docs -->\n")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        if end:
            content = f"{before}{start}\n{table}\n{end}{after}"
    runs.write_text(folder / "results.md", text)
    runs.write_text(readme, content)
    print(f"written: {folder / 'results.md'} and the tables in {readme}")


def main(argv=None):
    parser = runs.Parser(__doc__)
    add = parser.add_argument
    add("--runs", nargs="+", type=Path, default=[Path("runs")], help="where run folders lie")
    add("--results", nargs="+", type=Path, default=[Path("results")], help="where figures and claims lie")
    add("--out", type=Path, default=Path("results"), help="folder for index.html")
    add("--keep", type=Path, metavar="FILE", help="write a small JSON and a picture instead, to be published")
    add("--title", help="what the kept results are of (default: the name of FILE)")
    add("--docs", type=Path, metavar="DIR", help="write DIR/results.md and README's tables from DIR/results/*.json")
    args = parser.parse_args(argv)
    if args.docs:
        return write_docs(args.docs)
    if args.keep and args.keep.suffix != ".json":
        raise runs.InputError(f"--keep {args.keep} must end in .json: it would be overwritten")
    for folder in (*args.runs, *args.results):
        if not folder.is_dir() and folder not in (Path("runs"), Path("results")):
            raise runs.InputError(f"{folder} is not a folder: check --runs and --results")
    skipped = []
    trained = read_all(read_run, [file.parent for file in files_below(args.runs, "config.json")], skipped)
    tables = read_all(read_claims, files_below(args.results, "claims.json"), skipped)
    figures = read_all(read_figure, files_below(args.results, "*.png"), skipped)
    if not (trained or tables or figures or skipped):
        raise runs.InputError("nothing to report: run make reproduce first, or give --runs and --results")
    if args.keep:
        args.keep.parent.mkdir(parents=True, exist_ok=True)
        return keep(args.keep, args.title or args.keep.stem, trained, tables, figures, args, skipped)
    rows = sum((table.rows for table in tables), [])
    found = dict(headlines=claims.headlines(rows), figures=figures, tables=tables, skipped=skipped)
    found.update(runs=run_tables(trained), made=sorted({run.made for run in trained}))
    args.out.mkdir(parents=True, exist_ok=True)
    runs.write_text(args.out / "index.html", LAYOUTS.get_template("report.html.jinja").render(found))
    if found["headlines"]:
        print(claims.headlines_markdown(found["headlines"]))
    read = f"{len(trained)} runs, {len(figures)} figures and {len(rows)} claims"
    print(f"report: {args.out / 'index.html'}, of {read}; {len(skipped)} damaged or unfinished left out")


if __name__ == "__main__":
    runs.cli(main)
