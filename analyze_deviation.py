"""Figure 1a: where does a student deviate from its teacher? From run folders, or from anyone's logits (paper §3.1).

    python analyze_deviation.py --teacher runs/t-s0 --student runs/kd-s0 --control runs/onehot-s0
    python analyze_deviation.py --student runs/kd-s0 runs/kd-s1 --control runs/onehot-s0 runs/onehot-s1
    python analyze_deviation.py --teacher-logits T.npy --student-logits S.npy --labels y.npy --out results/mine

What is measured stands in deviation.py. Several seeds: give the runs in the same order; one teacher, or one control,
may serve all. Without --teacher (one from a file of weights or logits) its logits are those in the students'
folders. Writes fig1a.png/.pdf, deviation.json and statistics.md (all statistics, also for the label's class),
claims.json and claims.md into --out.
"""

import os
from pathlib import Path

import deviation
import runs
from runs import InputError

# Flags that say what network is trained how, of images and texts.
RECIPE = "arch width epochs batch_size lr warmup schedule milestones momentum weight_decay".split()


def at_chance(point):
    """Why nothing can be claimed of a point of `deviation.replicates`, or None: networks no better than chance."""
    networks = dict(teacher=point["teacher"], **point["networks"])
    predicted = {name: logits.argmax(1) for name, logits in networks.items()}
    pairs = [(name, "the labels", point["labels"]) for name in predicted]
    pairs += [(name, "the teacher", predicted["teacher"]) for name in point["networks"]]
    for name, whom, other in pairs:
        agreed, chance, above = runs.agreement(predicted[name], other, point["teacher"].shape[1])
        if not above:
            what = f"{name} agrees with {whom} on {100 * agreed:.0f}% of the points, {100 * chance:.0f}% is chance"
            return f"no claims: {what}; are the rows of all files in the same order?"
    return None


def points_from_files(args):
    """One split of one seed from --teacher-logits and its companions."""
    if not (args.teacher_logits and args.student_logits and args.labels):
        raise InputError("of files --teacher-logits, --student-logits and --labels are needed together")
    files = dict(teacher=args.teacher_logits, student=args.student_logits, control=args.control_logits)
    given = [os.path.realpath(file) for file in files.values() if file]
    if len(set(given)) < len(given):
        raise InputError("a file of logits is given twice: teacher, student and control are different networks")
    logits = {}
    for name, file in files.items():
        if file:
            logits[name] = runs.check_logits(runs.read_array(file), file, logits.get("teacher"))
    teacher = logits.pop("teacher")
    labels = runs.check_labels(runs.read_array(args.labels), args.labels, teacher)
    return {args.split: [dict(teacher=teacher, labels=labels, networks=logits)]}


def paired(args):
    """[{role: run folder}] of each seed; one teacher, or one control, may serve all. InputError where roles mix."""
    if not args.student:
        raise InputError("--student is missing: which student is it about?")
    teachers, students, controls = args.teacher, args.student, args.control
    # Teachers and controls alone may serve several seeds.
    given = [os.path.realpath(run) for run in (*set(teachers), *students, *set(controls))]
    if len(set(given)) < len(given):
        raise InputError("a run folder is named twice: teachers, students and controls are different runs")
    if len(teachers) == 1:
        teachers = teachers * len(students)
    if len(controls) == 1:
        controls = controls * len(students)
    if len(teachers) not in (0, len(students)) or len(controls) not in (0, len(students)):
        counts = f"{len(teachers)} teachers, {len(students)} students and {len(controls)} controls"
        raise InputError(f"{counts} cannot be paired: give the same number of each, or one teacher for all")
    seeds = []
    for k, student in enumerate(students):
        roles = dict(student=student)
        if teachers:
            roles["teacher"] = teachers[k]
        if controls:
            roles["control"] = controls[k]
        check_roles(roles, same_seeds=len(args.control) > 1)
        seeds.append(roles)
    configs = [runs.read_config(student) for student in students]
    fix = "several students are seeds of one setting: analyse others apart"
    if len({config.get("seed") for config in configs}) < len(configs):
        raise InputError(f"two of the students have the same seed: {fix}")
    flags = sorted(set(configs[0]["flags"]) - set(runs.NOT_COMPARED))
    facts = [[config["facts"].get(name) for name in ("loss", "switch", "targets")] for config in configs]
    for k, student in enumerate(students):
        found = differing(configs[0], configs[k], flags)
        if facts[k] != facts[0]:
            found.append("loss")
        if found:
            raise InputError(f"{students[0]} and {student} differ in {', '.join(found)}: {fix}")
    return seeds


def differing(one, other, flags):
    """Those of the `flags` in which two runs' configs differ, and "data" where that does."""
    found = [flag for flag in flags if one["flags"].get(flag) != other["flags"].get(flag)]
    if one["data"].get("sha256") != other["data"].get("sha256"):
        found.append("data")
    return found


def check_roles(folders, same_seeds):
    """InputError when a run folder of {role: folder}, which a user named, was not trained for its role.

    same_seeds: whether student and control must be of the same seed.
    """
    configs = {role: runs.finished_config(run) for role, run in folders.items()}
    student, control = configs["student"], configs.get("control")
    taught_by = student["facts"].get("teacher_sha256")
    if "teacher" in configs:
        if taught_by != runs.teacher_hash(folders["teacher"]):
            fix = "name teachers and students of the same seeds in the same order"
            raise InputError(f"{folders['student']} was not distilled from {folders['teacher']}: {fix}")
    elif not (Path(folders["student"]) / "teacher.npz").exists():
        fix = f"give --teacher, the run folder that it was distilled from ({student['facts'].get('teacher') or '?'})"
        raise InputError(f"{folders['student']} has no teacher.npz, the logits of a teacher from elsewhere: {fix}")
    if not control:
        return
    if control["facts"].get("teacher_sha256"):
        raise InputError(f"{folders['control']} was distilled: the control is a one-hot network")
    found = differing(student, control, RECIPE)
    if same_seeds and student.get("seed") != control.get("seed"):
        found.append("seed")
    if found:
        fix = "the control is the student's network and recipe, of the same seed"
        raise InputError(f"{folders['control']} and {folders['student']} differ in {', '.join(found)}: {fix}")


def main(argv=None):
    parser = runs.Parser(__doc__)
    add = parser.add_argument_group("run folders, several for several seeds").add_argument
    add("--teacher", nargs="+", metavar="RUN", default=[], help="teachers, one per seed or one for all")
    add("--student", nargs="+", metavar="RUN", default=[], help="students")
    add("--control", nargs="+", metavar="RUN", default=[], help="independently seeded one-hot networks")
    forms = ".npy, .csv, .npz, FILE.npz:NAME, .pt or .safetensors (log-probabilities serve too)"
    add = parser.add_argument_group("or files of anyone's logits").add_argument
    add("--teacher-logits", metavar="FILE", help=f"the teacher's [N, C]: {forms}")
    add("--student-logits", metavar="FILE", help="the student's of the same points")
    add("--control-logits", metavar="FILE", help="a one-hot network's of the same points")
    add("--labels", metavar="FILE", help="true class of each point, whole numbers or words [N]")
    add("--split", default="test", help="what to call these points")
    add = parser.add_argument_group("output").add_argument
    add("--title", help="title of the figure")
    draws = runs.number(int, 100, 1_000_000)
    add("--bootstrap", type=draws, default=2000, metavar="N", help="bootstrap draws behind each interval")
    add("--out", type=Path, default=Path("results/fig1a"), metavar="FOLDER", help="folder for figure and tables")
    args = parser.parse_args(argv)
    by_files = any((args.teacher_logits, args.student_logits, args.control_logits, args.labels))
    by_runs = any((args.teacher, args.student, args.control))
    if by_files == by_runs:
        files = "--teacher-logits, --student-logits and --labels (and --control-logits)"
        raise InputError(f"give either --teacher and --student run folders (and --control), or {files}")
    if by_files:
        points = points_from_files(args)
        seeds = 1
        why_not = at_chance(points[args.split][0])
    else:  # rows in another order are found there: the labels of the runs are compared
        points = deviation.points_from_runs(paired(args))
        seeds = len(args.student)
        why_not = None
    title = args.title or f"Student–teacher deviations, {seeds} seed{'s' if seeds > 1 else ''}"
    deviation.report(points, args.out, title, args.bootstrap, why_not=why_not)


if __name__ == "__main__":
    runs.cli(main)
