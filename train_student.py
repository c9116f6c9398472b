"""Train a student to match a teacher: the second step of Figure 1a (paper §3.1), and its one-hot control.

    python train_student.py --teacher runs/digits-resnet8-teacher-s0                     # distillation alone
    python train_student.py --kd-weight 0 --ce-weight 1                                  # the one-hot control
    python train_student.py --teacher 'runs/teacher-s{seed}' --seeds 0 1 2 --out runs/kd # a teacher for each seed
    python train_student.py --teacher weights.pth --teacher-arch torchvision:resnet18    # anyone's teacher
    python train_student.py --teacher-logits logits.npy                                  # its logits alone

The loss is ce_weight·CE + kd_weight·T²·KL(teacher_T ‖ student_T): see `loss_fn`, which is there to be changed. A
student never shares initialisation, order or augmentation with a teacher of the same seed; students of the same seed
share all three, so that they are paired. Several seeds: --jobs trains them side by side; torchrun splits one over GPUs.
"""

import shlex
from pathlib import Path

import torch
import torch.nn.functional as F

import claims
import common
import engine
import runs
from analyze_deviation import check_logits, load_array
from runs import number


def add_student_flags(parser):
    """The flags of distillation, beside those of `common.add_flags`. What is defined here goes into config.json."""
    add = parser.add_argument_group("distillation").add_argument
    add("--teacher", help="run folder of a finished teacher; {seed} in it stands for the seed")
    add("--kd-weight", type=number(float, 0), default=1.0, help="weight of the distillation term")
    add("--ce-weight", type=number(float, 0), default=0.0, help="weight of the one-hot term")
    add("--temperature", type=number(float, 0, 1e6, open_low=True), default=4.0, help="softens both in the KD term")
    cache = "look teacher logits up in a table instead of computing them in every step (auto: where that saves time)"
    add("--teacher-cache", choices=("auto", "on", "off"), default="auto", help=cache)


def train_student(run, args, seed, data, teacher=None, weights_at=None, snapshots=(), start_from=None, **facts):
    """Train one student in the run folder `run`, unless it is finished already.

    args: all flags of a script; teacher: `engine.TeacherLogits`, or None for a one-hot student; weights_at(step) ->
    (ce_weight, kd_weight), by default the two flags throughout; snapshots, start_from as in `engine.train`; facts go
    into config.json and are compared.
    """
    args = common.only_flags(args, common.add_flags, add_student_flags)
    if teacher is None:
        args.temperature = None  # no distillation term: one control serves all temperatures

    def loss_fn(student, images, labels, teacher_logits, ce_weight, kd_weight):
        logits = student(images).float()
        loss = ce_weight * F.cross_entropy(logits, labels)
        if teacher_logits is not None:
            loss = loss + kd_weight * common.kd_loss(logits, teacher_logits, args.temperature)
        return loss, logits

    def flags_throughout(step):
        return args.ce_weight, args.kd_weight

    student = common.build_model(args.arch, data.classes, data.facts["image"], args.width, ("student", seed))
    facts |= dict(teacher.facts, teacher_sha256=teacher.sha256) if teacher else dict(teacher_sha256=None)
    with runs.locked(run):
        if runs.start_run(run, args, "student", seed, data, student, **facts):
            if teacher and teacher.logits and not runs.ranks()[0]:
                arrays = {name: value.cpu().numpy() for name, value in teacher.logits.items()}
                runs.write_npz(Path(run) / "teacher.npz", arrays)
            more = dict(teacher=teacher, snapshots=snapshots, start_from=start_from)
            weights_at = weights_at or flags_throughout
            engine.train_images(run, student, data, args, "student", seed, loss_fn, weights_at, **more)


def add_teacher_flags(parser):
    """The flags of a teacher from elsewhere: what it is stands in config.json among the facts."""
    add = parser.add_argument_group("a teacher from elsewhere").add_argument
    archs = ", ".join(common.ARCHS)
    add("--teacher-arch", help=f"--teacher is a file of weights (.pth, .safetensors) of {archs} or torchvision:<name>")
    unit = "of the images it was trained on, in 0..1 units: 1 number, or 1 for each channel (default: those of --data)"
    add("--teacher-mean", type=number(float, 0, 1), nargs="+", help=f"mean {unit}")
    add("--teacher-std", type=number(float, 0, 1, open_low=True), nargs="+", help=f"standard deviation {unit}")
    size = "resize the images to this side for it (default: for torchvision:<name> the size it was made for)"
    add("--teacher-size", type=number(int, 8, 4096), help=size)
    add("--teacher-logits", help="its logits [N, C] of the un-augmented training images, in their order (.npy, .npz)")


def check_flags(args):
    """InputError where the flags above do not fit together."""
    if not args.kd_weight and not args.ce_weight:
        raise runs.InputError("--kd-weight and --ce-weight are both 0, so there is no loss: give one of them")
    if args.kd_weight and bool(args.teacher) == bool(args.teacher_logits):
        one_hot = "--kd-weight 0 --ce-weight 1 for a one-hot student"
        raise runs.InputError(f"give one of --teacher (a run folder, or weights) and --teacher-logits, or {one_hot}")
    if args.teacher_logits and args.teacher_arch:
        raise runs.InputError("--teacher-arch is of a file of weights, not of --teacher-logits: leave one out")
    for name in ("mean", "std", "size"):
        if getattr(args, f"teacher_{name}") and not args.teacher_arch:
            raise runs.InputError(f"--teacher-{name} is of a file of weights: give its --teacher-arch too")


def open_teacher(name, args, data, **more):
    """`engine.TeacherLogits` of a run folder, a file of weights, or a file of logits. more: source and folder of it."""
    if not args.teacher_logits and not args.teacher_arch:
        if Path(name).is_file():
            raise runs.InputError(f"{name} is a file: give --teacher-arch too, what network its weights are of")
        teacher = engine.TeacherLogits(engine.load_teacher(name, data), data, args.precision, **more)
        print(f"{name}: {engine.teacher_fit(name)}")
        return teacher
    if args.teacher_logits:
        logits = check_logits(load_array(name), name)
        if logits.shape != (len(data.y_train), data.classes):
            here = f"{len(data.y_train)} training images and {data.classes} classes here"
            raise runs.InputError(f"{name} is {list(logits.shape)}: it must have the {here}, in their order")
        logits = dict(train_logits=torch.from_numpy(logits).float().to(data.device))
        facts = dict(teacher_views="every view has the teacher logits of the un-augmented image")
        advice = "give the rows in the order of the training images, un-augmented"
        teacher = engine.TeacherLogits(None, data, plain=logits["train_logits"])
    else:
        facts = dict(teacher_arch=args.teacher_arch, teacher_mean=args.teacher_mean, teacher_std=args.teacher_std)
        model = engine.load_weights(
            name, args.teacher_arch, data, args.teacher_mean, args.teacher_std, args.teacher_size
        )
        parts = dict(train_logits=data.x_train, test_logits=data.x_test)
        logits = {key: engine.logits_of(model, data, images) for key, images in parts.items()}
        advice = "check --teacher-arch, --teacher-mean, --teacher-std, --teacher-size and the order of its classes"
        accuracy = engine.check_above_chance(name, logits["test_logits"], data.y_test, advice)
        facts |= dict(teacher_size=model.size, teacher_test_acc=accuracy)
        side = model.size or data.facts["image"][0]
        print(f"{name}: {100 * accuracy:.2f}% test accuracy here, on images of {side}×{side}")
        teacher = engine.TeacherLogits(model, data, args.precision, **more)
    fit = engine.check_above_chance(name, logits["train_logits"], data.y_train, advice)
    print(f"{name}: {claims.fit_note(fit)}")
    teacher.logits, teacher.facts = logits, dict(facts, teacher_train_acc=fit)
    return teacher


def print_next(args, folders, teachers):
    """Print the commands that lead from the student in each of `folders` and its teacher to Figure 1a."""
    if args.teacher_logits or args.teacher_arch:
        for run in [shlex.quote(str(run)) for run in folders.values()]:
            files = f"--teacher-logits {run}/teacher.npz:train_logits --student-logits {run}/logits.npz:train_logits"
            print(f"next: python analyze_deviation.py {files} --labels {run}/logits.npz:train_labels --split train")
        return
    runs.print_next(args, "train_student.py", "--kd-weight", "0", "--ce-weight", "1")
    controls = [f"runs/{runs.default_name(args)}-onehot-s{seed}" for seed in folders]
    words = ["--teacher", *teachers.values(), "--student", *map(str, folders.values()), "--control", *controls]
    print("then:", shlex.join(["python", "analyze_deviation.py", *words]))


def main(argv=None):
    parser = runs.Parser(__doc__)
    common.add_flags(parser)
    add_student_flags(parser)
    add_teacher_flags(parser)
    common.add_process_flags(parser)
    args = engine.resolve(parser.parse_args(argv), distributed=True)
    check_flags(args)
    data = common.data_from(args)
    common.check_model(args, data)  # a wrong one fails before anything is discarded
    what = "onehot" if not args.kd_weight else "kd" if not args.ce_weight else "kd+ce"
    seeds = engine.shard_of(args)
    folders = {seed: runs.run_folder(args, seed, f"{runs.default_name(args)}-{what}") for seed in seeds}
    # A one-hot student depends on no teacher, so one control serves the students of any teacher.
    pattern = args.teacher or args.teacher_logits
    names = {seed: pattern.replace("{seed}", str(seed)) for seed in seeds} if args.kd_weight else {}
    different = sorted(set(names.values()))
    students = len(seeds) / max(1, len(different))  # of one teacher
    tables = runs.run_folder(args, 0, "").parent / "teacher-logits"
    source = engine.teacher_source(args, data, students, students, tables)
    teachers = {name: open_teacher(name, args, data, source=source, folder=tables) for name in different}
    runs.discard_runs(args, folders.values(), teachers)

    engine.run_jobs(args)
    for seed in seeds:
        teacher = teachers.get(names.get(seed))
        train_student(folders[seed], args, seed, data, teacher, snapshots=common.snapshot_steps(args, data))
    if names and args.shard == (0, 1) and not args.quiet:
        print_next(args, folders, names)


if __name__ == "__main__":
    runs.cli(main)
