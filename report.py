"""One page about everything in results/ and runs/: claims, figures with their commands, settings beside the paper's, time.

    make report                                          # writes results/index.html and results/report.md
    python report.py --runs runs more/runs --results results more/results --out results/all

Reads what the other scripts left and trains nothing: claims.json, deviation.json and the figures below --results, and the
run folders below --runs. What is damaged or unfinished is left out, and the page says so. index.html is one file without
scripts that needs no network; report.md says the same, with links to the figures. The same inputs give the same bytes.
The paper's accuracies stand beside a run only where data, network and label noise match. About 5 s for 150 runs.
"""
import base64
import hashlib
import html
import io
import json
import os
import re
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import NamedTuple
from urllib.parse import quote

import common
from switch_distill import ARROWS

# Stem of a figure's file, in the order of the paper: title, what it shows, make target.
FIGURES = {
    "fig1a": ("Figure 1a: student against teacher confidence", "Density of Y = φ(student probability) over X = φ(teacher probability) "
              "of the class that the teacher predicts, with y = x (dashed) and the mean fit; beside it the one-hot control.", "fig1a"),
    "fig1b": ("Figure 1b: accuracy against the time of the switch", "Test accuracy of students whose loss changes after a share s of training.", "fig1b"),
    "fig1b_curves": ("Figure 1b over training", "Test accuracy over training, of the unswitched runs and of the switched ones.", "fig1b"),
    "fig1b_teachers": ("Figure 1b, teachers stopped on the way", "Gain of distillation, and slope, against how well the teacher fits.", "fig1b"),
    "linear": ("§4: least squares", "Progress along eigendirections, bias and variance, and examples where the bias helps or hurts.", "fig-eigenspace"),
    "classifiers": ("§4: classifiers", "Progress of first-layer weights along lower eigen-buckets against the top one's.", "fig-eigenspace"),
    "ntk": ("§4: empirical NTK", "Progress of logits along lower eigen-buckets of the tangent kernel against the top one's.", "fig-eigenspace"),
    "denoise": ("§5: noise of gradients", "Noise scale, alignment and decrease of the held-out loss of one-hot, KD and smoothed labels.", "fig-denoise"),
    "benchmark": ("Speed of training", "Images per second of the ways to train.", "benchmark"),
}
# The paper's test accuracy in percent of a network trained on labels, and of one distilled from it.
PAPER = (dict(name="CIFAR-100, ResNet-56 self-distillation", data="cifar100", arch="resnet56", noisy=False, onehot=72.52, kd=74.55),
         dict(name="Noisy CIFAR-100, self-distillation", data="cifar100", arch="resnet56", noisy=True, onehot=69.8, kd=72.7))
SLOPE_CLAIM = "slope of the student's fit exceeds 1"   # of analyze_deviation.py
# (kind, split): in how many of the paper's settings the slope of Figure 1a exceeds 1.
SLOPES = {("image", "test"): "18 of 18", ("image", "train"): "13 of 18", ("language", "test"): "7 of 12"}
VERDICTS = {"holds": "✓", "fails": "✗", "unclear": "?", "mixed": "±"}
KINDS = ("teacher", "one-hot", "KD", "KD and one-hot", "switched", "other")
DAMAGED = (LookupError, TypeError, AttributeError, ValueError, ArithmeticError)   # what reading JSON of another shape than a script's raises


class Cell(NamedTuple):
    """A table cell: its text, a note in small print, the anchor that it links to, and the verdict that it shows."""
    text: str
    note: str = ""
    link: str = ""
    verdict: str = ""


# ---------------------------------------------------------------- reading


def attempt(skipped, read, path):
    """read(path), or None with a line in `skipped` that says why it could not be read."""
    try:
        return read(path)
    except common.InputError as error:
        skipped.append(str(error))
    except (*DAMAGED, OSError) as error:
        skipped.append(f"{path} is not what the scripts write ({common.first_line(error)}): make it again")


def read_run(folder):
    """A finished run as a dict: path, config, lines of its metrics.jsonl, and in words its kind, network, plan and data."""
    config = common.read_config(folder)
    flags, facts, data, pretraining = config["flags"], config["facts"], config["data"], config["role"] == "mlm"   # which leaves no logits
    if pretraining and (not (folder / "metrics.jsonl").exists() or common.read_metrics(folder)[-1]["epoch"] < flags["epochs"]):
        raise common.InputError(f"{folder} is not finished: continue it with: {config['command']}")
    if not pretraining:
        common.finished_config(folder)
    accuracy, lines = None if pretraining else common.last_metrics(folder)["test_acc"], common.read_metrics(folder)
    plan = f"{flags['recipe']}: " if "recipe" in flags else ""
    plan += f"{flags['epochs']} epochs, batch {flags['batch_size']}, lr {flags['lr']:g}" + (", bf16" if flags["precision"] == "bf16" else "")
    plan += f", stopped after {flags['stop_epoch']}" if flags.get("stop_epoch") else ""
    network = re.sub(r"^resnet(\d+)$", r"ResNet-\1", Path(config["arch"]).name)
    network += f" ×{flags['width']:g}" if flags.get("width", 1) != 1 else ""
    words = f"{data['name']}, {data['n_train']:,} training {'images' if 'image' in data else 'texts'}"
    words += f" (subset {data['subset']})" if data["subset"] else ""
    words += f", {100 * data['label_noise']:g}% label noise" + (f", data seed {data['data_seed']}" if data["data_seed"] else "")
    kind, text = kind_of(config, lines[-1]["step"])
    sum(line["seconds"] for line in lines)   # a line without is found here, and leaves out this run alone
    return dict(path=folder, config=config, lines=lines, accuracy=accuracy, kind=kind, text=text, plan=plan, network=network,
                data=Cell(words, f"sha256 {data['sha256'][:12]}"), versions=dict(config["versions"]),
                teacher_sha256=facts.get("teacher_sha256") and str(facts["teacher_sha256"]))


def kind_of(config, last_step):
    """(one of KINDS, the same in more words) of how a run was trained."""
    flags, switch = config["flags"], config["facts"].get("switch")
    if config["role"] != "student":
        return "teacher", "teacher"
    if config["facts"].get("targets"):
        return "other", str(config["facts"]["targets"])
    if switch:
        window = f" over {switch['window']} steps" if switch.get("window") else ""
        return "switched", f"{ARROWS[switch['direction']]} at s = {switch['step'] / last_step:.2g}{window}"
    kind = "one-hot" if not flags["kd_weight"] else "KD and one-hot" if flags["ce_weight"] else "KD"
    return kind, kind if kind == "one-hot" else f"{kind}, T = {flags['temperature']:g}"


def find_teachers(runs):
    """Set run["teacher"] to the run that a student was distilled from, or to None when that is not among `runs`.

    Students know their teacher by the hash of its weights, or for text of its training logits.
    """
    def sha256(run):
        if "tokens_sha256" in run["config"]["facts"]:
            return hashlib.sha256(common.read_npz(run["path"] / "logits.npz", ("train_logits",))["train_logits"].tobytes()).hexdigest()
        state = common.load_checkpoint(run["path"] / "checkpoint.pt")["model"]
        return common.weights_hash(SimpleNamespace(state_dict=lambda: state))

    wanted, known = {run["teacher_sha256"] for run in runs} - {None}, {}
    for run in sorted((run for run in runs if run["accuracy"] is not None), key=lambda run: KINDS.index(run["kind"])):
        if wanted - set(known):
            known.setdefault(attempt([], sha256, run), run)   # a damaged one is nobody's teacher
    for run in runs:
        run["teacher"] = known.get(run["teacher_sha256"]) if run["teacher_sha256"] else None


def read_results(roots, skipped):
    """Result folders below `roots`, in the order of the paper, as dicts: label, anchor, kind, claims, figures."""
    found = {file.parent: root for root in roots for name in ("claims.json", "*.png") for file in root.rglob(name)}
    folders = []
    for path, root in sorted(found.items()):
        claims = attempt(skipped, read_claims, path / "claims.json") if (path / "claims.json").exists() else None
        figures = [figure for file in sorted(path.glob("*.png")) if (figure := attempt(skipped, read_figure, file))]
        language = any((above / "glue.json").exists() for above in (path, *path.parents) if above.is_relative_to(root))
        label = path if len(roots) > 1 else path.relative_to(root) if path != root else root.name
        if claims or figures:
            place = min((list(FIGURES).index(figure["stem"]) for figure in figures if figure["stem"] in FIGURES), default=len(FIGURES))
            folders.append(dict(label=Path(label).as_posix(), kind="language" if language else "image", claims=claims or [],
                                figures=figures, place=len(FIGURES) if language else place))
    folders.sort(key=lambda folder: folder["place"])   # stable, so by path within a place
    for k, folder in enumerate(folders):
        folder["anchor"] = f"result-{k + 1}" if folder["figures"] else ""
    return folders


def read_claims(file):
    """The rows of a claims.json; `over` is what all their notes end with: of what the intervals are."""
    def ours(value, low, high):   # what was counted or proved is exact
        return f"{value:.3f}".rstrip("0").rstrip(".") if value is not None and low == high == value else measured(value, low, high)
    rows = [dict(row, ours=ours(row["measured"], row["low"], row["high"])) for row in common.read_json(file)]
    if not all(isinstance(row[key], str) for row in rows for key in ("claim", "expected", "verdict", "note")):
        raise ValueError("a claim is not text")
    ends = {row["note"].rpartition("; ")[2] for row in rows}
    over = ends.pop() if len(ends) == 1 and len(rows) > 1 else ""
    return [dict(row, over=over, note=row["note"].removesuffix(over).removesuffix("; ")) for row in rows]


def read_figure(file):
    """A figure as a dict: path, stem, content, size in CSS pixels, and the command that made it, empty when not recorded."""
    from PIL import Image
    content = file.read_bytes()
    try:
        image = Image.open(io.BytesIO(content))
        image.load()   # a torn one ends here
    except Exception as error:   # PIL raises many kinds on a damaged file
        raise common.InputError(f"{file} is not a readable image ({common.first_line(error)}): draw it again") from None
    width, height = (round(side * 96 / 150) for side in image.size)   # from the dots per inch of common.save_figure to CSS's
    return dict(path=file, stem=file.stem, content=content, width=width, height=height, command=str(image.info.get("Command", "")))


# ---------------------------------------------------------------- numbers


def measured(value, low, high, scale=1.0, digits=3):
    """A number with its interval as text; that of a single seed has none."""
    return common.cell(dict(value=value, low=low, high=high), scale, digits).replace(" [?, ?]", ", no interval")


def settings(runs):
    """[runs of one setting], sorted: the same flags, data and teacher's flags, and folders named alike but for the seed."""
    def compared(run):
        flags = {name: value for name, value in run["config"]["flags"].items() if name not in common.NOT_COMPARED and value is not None}
        return [flags, run["config"]["role"], run["config"]["data"], run["text"]]
    groups = {}
    for run in (run for run in runs if run["accuracy"] is not None):
        # Flags do not say everything (pretraining, the seed's own teacher), so runs of other names are never pooled.
        run["name"] = re.sub(rf"^(.*)(?<![\d.]){re.escape(str(run['config'].get('seed')))}(?![\w.])", r"\1*", run["path"].as_posix())
        key = [run["name"], compared(run), compared(run["teacher"]) if run["teacher"] else run["teacher_sha256"] and "unknown"]
        groups.setdefault(json.dumps(key, sort_keys=True), []).append(run)
    return sorted(groups.values(), key=lambda group: (group[0]["data"], KINDS.index(group[0]["kind"]), group[0]["name"]))


def paper_entry(run):
    """The entry of PAPER whose data, network and noise are those of a run, or None. The paper's switches have no such number."""
    flags, data, teacher = run["config"]["flags"], run["config"]["data"], run["teacher"]
    same = [entry for entry in PAPER if (data["name"], run["config"]["arch"], data["label_noise"] > 0) == (entry["data"], entry["arch"], entry["noisy"])]
    alone = run["kind"] in ("teacher", "one-hot") or run["kind"] == "KD" and teacher and teacher["config"]["arch"] == run["config"]["arch"]
    return same[0] if same and alone and not data["subset"] and flags.get("width") == 1 else None


def seconds_of(runs):
    """Seconds of training. A switched run carries the epochs of the run that it began as along: an epoch counts once."""
    return sum(json.loads(line)["seconds"] for line in {json.dumps(line) for run in runs for line in run["lines"]})


def duration(seconds):
    return f"{seconds:.0f} s" if seconds < 120 else f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


# ---------------------------------------------------------------- the page: a list of blocks (what, …), which both outputs render


def claims_blocks(folders):
    groups, counts = [], Counter(row["verdict"] for folder in folders for row in folder["claims"])
    for folder in (folder for folder in folders if folder["claims"]):
        rows = []
        for row in folder["claims"]:
            split, _, text = row["claim"].partition(": ")
            count = SLOPES.get((folder["kind"], split)) if text == SLOPE_CLAIM else None
            rows.append([Cell(row["claim"], row["note"]), Cell(row["expected"], f"{count} settings" if count else ""),
                         row["ours"], Cell(f"{VERDICTS.get(row['verdict'], '?')} {row['verdict']}", verdict=row["verdict"])])
        groups.append((Cell(folder["label"], folder["claims"][0]["over"], folder["anchor"]), rows))
    summary = ", ".join(f"{verdict} {counts[verdict]}" for verdict in sorted(counts, key=[*VERDICTS, *sorted(counts)].index))
    return [("p", f"{sum(counts.values())} claims: {summary or 'none yet'}. Brackets are 95% intervals. A claim holds when its whole interval is on the "
             "paper's side of the threshold, fails when it is on the other side, and is unclear otherwise; mixed: its comparisons disagree."),
            ("table", "Claims", ("Claim", "Paper", "Ours", "Verdict"), groups)]


def figure_blocks(folders):
    for folder in (folder for folder in folders if folder["figures"]):
        yield "h3", folder["label"], folder["anchor"]
        for figure in folder["figures"]:
            title, caption, target = FIGURES.get(figure["stem"], (figure["stem"], "", ""))
            target = "fig-glue" if folder["kind"] == "language" else target
            note = "Made again by:" if figure["command"] else "The figure does not record its command. " + ("Its make target, with the settings of its runs:" if target else "")
            yield "figure", figure, f"{title} ({folder['label']})", caption, note, figure["command"] or (f"make {target}" if target else "")


def settings_blocks(folders, runs):
    groups, paper, tables = settings(runs), [], {}
    for entry in PAPER:
        ours = [f"{accuracy_of(group)} {group[0]['text']} ({group[0]['plan']})" for group in groups if paper_entry(group[0]) is entry]
        paper.append([f"{entry['name']}: test accuracy %, trained on labels → distilled", f"{entry['onehot']} → {entry['kd']}", "; ".join(ours) or "not run here"])
    for (kind, split), count in SLOPES.items():
        # A set: the same runs analysed into two folders count once.
        found = {(row["measured"], row["ours"], row["verdict"]) for folder in folders if folder["kind"] == kind for row in folder["claims"]
                 if row["claim"] == f"{split}: {SLOPE_CLAIM}"}
        counts = Counter(verdict for _, _, verdict in found)
        above = (f"{sum((value or 0) > 1 for value, _, _ in found)} of {len(found)} (interval wholly above 1: {counts['holds']}, "
                 f"wholly below: {counts['fails']})")
        paper.append([f"{kind.capitalize()} settings with a {split} slope above 1", count, above if found else "not run here"])
    for group in groups:
        run, entry, teacher = group[0], paper_entry(group[0]), group[0]["teacher"]
        network = (f"{teacher['network']} → " if teacher else "teacher not among these runs → " if run["kind"] not in ("teacher", "one-hot") else "") + run["network"]
        plan = run["plan"] + (f"; teacher {teacher['plan']}" if teacher and teacher["plan"] != run["plan"] else "")
        recipe = dict(stop_epoch=None, **common.RECIPES["paper"])
        same = all(run["config"]["flags"].get(name) == (list(value) if isinstance(value, tuple) else value) for name, value in recipe.items())
        known = Cell(str(entry["kd" if run["kind"] == "KD" else "onehot"]), "" if same else "with another schedule") if entry else "–"
        hardware = "; ".join(sorted({f"{one['versions'].get('hardware')}, torch {one['versions'].get('torch')}" for one in group}))
        tables.setdefault(run["data"], []).append([Cell(f"{run['text']}, {network}", run["name"] if group[1:] else run["path"].as_posix()), plan, str(len(group)), accuracy_of(group), known,
                                                   duration(seconds_of(group)), hardware])
    return [("h3", "The paper's numbers", "paper"), ("table", "The paper's numbers", ("Quantity", "Paper", "Ours"), [(None, paper)]),
            ("p", "The share of noisy labels and the network behind the paper's noisy number are not recorded in this project: a noisy "
                  "ResNet-56 self-distillation stands beside it whatever its share. Slopes are those of the class that the teacher predicts."),
            ("h3", "Runs", "runs"), ("p", "Means over seeds with Student's t intervals. Time is that of training, of all seeds together; a "
                                     "switched run's holds that of its part before the switch."),
            ("table", "Runs", ("Network", "Schedule", "Seeds", "Test accuracy %", "Paper %", "Time", "Hardware"), list(tables.items()))]


def accuracy_of(group):
    return measured(*common.mean_interval([run["accuracy"] for run in group]), 100, 2)


def hardware_blocks(runs, roots):
    """Time by hardware and software, of training and of the analyses that record theirs (eigenspace.py, in seeds/*.json)."""
    def read_analysis(file):
        one = common.read_json(file)
        return dict(versions=dict(one["versions"]), lines=[dict(file=str(file), seconds=float(one["seconds"]))])

    rows, analyses = {}, [attempt([], read_analysis, file) for root in roots for file in root.rglob("seeds/*.json")]
    for what, ones in (("training runs", runs), ("eigenspace analyses", filter(None, analyses))):
        for one in ones:
            get = lambda name: str(one["versions"].get(name) or "?")
            group, commits = rows.setdefault((get("hardware"), get("threads"), f"torch {get('torch')}, Python {get('python')}", what), ([], set()))
            group.append(one)
            commits.add(re.sub(r"^([0-9a-f]{9})[0-9a-f]{31}", r"\1", get("git_commit")))
    cells = [[*key, ", ".join(sorted(commits)), f"{what}: {len(group)}", duration(seconds_of(group))]
             for (*key, what), (group, commits) in sorted(rows.items(), key=lambda row: row[0])]
    return [("table", "Hardware and time", ("Hardware", "Threads", "Software", "Code", "Work", "Time"), [(None, cells)])]


# ---------------------------------------------------------------- output

STYLE = """
:root { color-scheme: light dark; --text: #1c1f24; --soft: #59616e; --back: #fff; --card: #f4f5f7; --line: #d5d9e0; --link: #0b57a8;
  --holds: #14672f; --fails: #a3211b; --unclear: #6b5200; --mixed: #5b3a9b }
@media (prefers-color-scheme: dark) { :root { --text: #e4e6ea; --soft: #a5adba; --back: #15181d; --card: #20242b; --line: #3a404a;
  --link: #82b8f5; --holds: #77d495; --fails: #ff9a92; --unclear: #e6c65c; --mixed: #c5abf7 } }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 74rem; font: 1rem/1.5 system-ui, sans-serif; color: var(--text); background: var(--back); overflow-wrap: anywhere }
h1, h2, h3 { line-height: 1.25; margin: 2rem 0 .6rem } h2 { padding-top: 1rem; border-top: 1px solid var(--line) }
p, ul { max-width: 52rem } a { color: var(--link) } small { display: block; color: var(--soft); font-weight: 400; overflow-wrap: anywhere }
nav, pre, th[scope=rowgroup] { background: var(--card) } nav { padding: .1rem 1rem; border-radius: 8px } .sub { margin-left: 1.2rem }
.scroll { overflow-x: auto; margin: 1rem 0 } .scroll:focus-visible { outline: 2px solid var(--link) }
table { border-collapse: collapse; width: 100%; font-size: .92rem; overflow-wrap: break-word } .wide { min-width: 60rem }
th, td { padding: .4rem .6rem; text-align: left; vertical-align: top; border-bottom: 1px solid var(--line) } th[scope=row] { font-weight: 400 }
.holds, .fails, .unclear, .mixed { white-space: nowrap; font-weight: 600; color: var(--unclear) } .interval { white-space: nowrap }
.holds { color: var(--holds) } .fails { color: var(--fails) } .mixed { color: var(--mixed) }
figure { margin: 1.2rem 0 2.2rem } .card { background: #fff; border: 1px solid var(--line); border-radius: 8px; padding: .5rem }
img { display: block; height: auto; max-width: 100%; margin: 0 auto } pre { padding: .6rem .8rem; border-radius: 6px; white-space: pre-wrap }
@media (max-width: 40rem) { table { font-size: .88rem } .stack tr { display: grid; grid-template-columns: 5fr 8fr 5rem; border-bottom: 1px solid var(--line) }
  .stack th, .stack td { border: 0; padding: .2rem .4rem } .stack tr > :first-child { grid-column: 1 / -1 } td.interval { white-space: normal } }
"""


def html_cell(cell, tag):
    cell = cell if isinstance(cell, Cell) else Cell(cell)
    text = re.sub(r"(\[[^\[\]]*\])", r'<span class="interval">\1</span>', html.escape(cell.text))
    text = f'<a href="#{cell.link}">{text}</a>' if cell.link else text
    kind = cell.verdict if cell.verdict in VERDICTS else "unclear" if cell.verdict else "interval" if re.fullmatch(r"\S+ (\[.*\]|s|min|h)", cell.text) else ""
    note = f"<small>{html.escape(cell.note)}</small>" if cell.note else ""
    return f"<{tag}{f' class={kind}' if kind else ''}>{text}{note}</{tag.split()[0]}>"


def html_block(block):
    what, text, *rest = block
    if what in ("h1", "h2", "h3"):
        return f'<{what} id="{rest[0]}">{html.escape(text)}</{what}>'
    if what == "list":
        return "<ul>" + "".join(f"<li>{html.escape(item)}</li>" for item in text) + "</ul>"
    if what == "table":
        headers, groups = rest
        body = "".join("<tbody>\n" + (f"<tr>{html_cell(head, f'th colspan={len(headers)} scope=rowgroup')}</tr>\n" if head else "") + "".join(
            "<tr>" + "".join(html_cell(cell, "td" if k else "th scope=row") for k, cell in enumerate(row)) + "</tr>\n" for row in rows) + "</tbody>\n"
            for head, rows in groups)
        return (f'<div class="scroll" tabindex="0" role="region" aria-label="{html.escape(text)}"><table class={"wide" if len(headers) > 5 else "stack"}>\n<thead><tr>'
                + "".join(f"<th scope=col>{html.escape(header)}</th>" for header in headers) + f"</tr></thead>\n{body}</table></div>")
    if what == "figure":
        title, caption, note, command = map(html.escape, rest)
        # On a phone a figure keeps half of its size and scrolls inside its card: shrunk to the screen it could not be read.
        return (f'<figure><figcaption><strong>{title}</strong></figcaption><div class="scroll card" tabindex="0" role="region" aria-label="{title}">'
                f'<img src="data:image/png;base64,{base64.b64encode(text["content"]).decode()}" width="{text["width"]}" height="{text["height"]}" '
                f'style="min-width:{round(0.55 * text["width"])}px" alt="{title}. {caption}"></div><p>{caption}</p><p>{note}</p>'
                + (f"<pre><code>{command}</code></pre>" if command else "") + "</figure>")
    return f"<p>{html.escape(text)}</p>"


def to_html(title, blocks):
    """The page as one HTML file, with its headings as contents."""
    contents = "\n".join(f'<li{" class=sub" if tag == "h3" else ""}><a href="#{rest[0]}">{html.escape(text)}</a></li>'
                         for tag, text, *rest in blocks if tag in ("h2", "h3"))
    start = next(k for k, block in enumerate(blocks) if block[0] == "h2")
    head, main = ("\n".join(map(html_block, part)) for part in (blocks[:start], blocks[start:]))
    return (f'<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n<meta name="viewport" content="width=device-width, initial-scale=1">\n'
            f'<link rel="icon" href="data:,">\n<title>{html.escape(title)}</title>\n<style>{STYLE}</style>\n</head>\n<body>\n<header>\n{head}\n</header>\n'
            f'<nav aria-label="Contents"><ul>\n{contents}\n</ul></nav>\n<main>\n{main}\n</main>\n</body>\n</html>\n')


def md_text(text):
    return re.sub(r"([\\`*_\[\]|#~])", r"\\\1", html.escape(" ".join(str(text).split()), quote=False))


def md_block(block, out):
    what, text, *rest = block
    cell = lambda cell: md_text(cell.text) + (f" ({md_text(cell.note)})" if cell.note else "") if isinstance(cell, Cell) else md_text(cell)
    if what in ("h1", "h2", "h3"):
        return f"{'#' * int(what[1])} {md_text(text)}"
    if what == "list":
        return "\n".join(f"- {md_text(item)}" for item in text)
    if what == "table":
        headers, groups = rest
        lines = [headers, ["---"] * len(headers)]
        for head, rows in groups:
            lines += ([[f"**{cell(head)}**"] + [""] * (len(headers) - 1)] if head else []) + [[cell(one) for one in row] for row in rows]
        return "\n".join(f"| {' | '.join(line)} |" for line in lines)
    if what == "figure":
        title, caption, note, command = rest
        link = quote(Path(os.path.relpath(text["path"], out)).as_posix())
        code = "".join(f"\n    {line}" for line in command.splitlines())
        return f"**{md_text(title)}**\n\n![{md_text(title)}]({link})\n\n{md_text(f'{caption} {note}')}" + (f"\n{code}" if code else "")
    return md_text(text)


def main(argv=None):
    parser = common.Parser(__doc__)
    add = parser.add_argument
    add("--runs", nargs="+", default=["runs"], help="folders in which run folders lie")
    add("--results", nargs="+", default=["results"], help="folders in which figures and claims lie")
    add("--out", default="results", help="folder for index.html and report.md")
    args = parser.parse_args(argv)
    for folder in (args.runs if args.runs != ["runs"] else []) + (args.results if args.results != ["results"] else []):
        if not Path(folder).is_dir():
            raise common.InputError(f"{folder} is not a folder: check --runs and --results")
    skipped, of_runs, of_results = [], sorted(set(map(Path, args.runs))), sorted(set(map(Path, args.results)))
    marks = {"config.json", "metrics.jsonl", "logits.npz"}
    found = sorted({Path(folder) for root in of_runs for folder, _, files in os.walk(root) if marks & set(files)})
    runs = [run for folder in found if (run := attempt(skipped, read_run, folder))]
    folders = read_results(of_results, skipped)
    if not runs and not folders:
        raise common.InputError(f"nothing to report: no finished run in {', '.join(args.runs)}, no figure or claim in {', '.join(args.results)}"
                                + (f" ({len(skipped)} left out, the first: {skipped[0]})" if skipped else "")
                                + "; run make reproduce first, or give --runs and --results")
    find_teachers(runs)

    title = "disobey: which claims hold here"
    blocks = [("h1", title, "top"),
              ("p", "Results of an independent reproduction of “On student-teacher deviations in distillation: does it pay to disobey?” (Nagarajan, "
                    "Menon, Bhojanapalli, Mobahi, Kumar; NeurIPS 2023, arXiv 2301.12923), collected by report.py from what the other scripts left."),
              ("h2", "Claims", "claims"), *claims_blocks(folders), ("h2", "Figures", "figures"), *figure_blocks(folders),
              ("h2", "Settings, beside the paper's numbers", "settings"), *settings_blocks(folders, runs),
              ("h2", "Hardware and time", "hardware"), *hardware_blocks(runs, of_results)]
    if skipped:
        blocks += [("h2", "Left out", "left-out"), ("p", f"{len(skipped)} damaged or unfinished:"), ("list", skipped)]
    out = Path(args.out)
    out.mkdir(parents=True, exist_ok=True)
    for name, text in (("report.md", "\n\n".join(md_block(block, out) for block in blocks) + "\n"), ("index.html", to_html(title, blocks))):
        common.write_text(out / name, text.encode(errors="replace").decode())   # a file's name need not be Unicode
    print(f"report: {out / 'index.html'} and report.md, of {len(runs)} runs and {sum(len(folder['figures']) for folder in folders)} figures"
          + (f"; {len(skipped)} damaged or unfinished left out" if skipped else ""))


if __name__ == "__main__":
    common.cli(main)
