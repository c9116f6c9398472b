"""Train a student to match a teacher: the second step of Figure 1a (paper §3.1), and its one-hot control.

    python train_student.py --teacher runs/digits-resnet8-teacher-s0                     # distillation alone
    python train_student.py --kd-weight 0 --ce-weight 1                                  # the one-hot control
    python train_student.py --teacher 'runs/teacher-s{seed}' --seeds 0 1 2 --out runs/kd # a teacher for each seed

The loss is ce_weight·CE + kd_weight·T²·KL(teacher_T ‖ student_T): see `loss_fn`, which is there to be changed. A
student never shares initialisation, order or augmentation with a teacher of the same seed; students of the same seed
share all three, so that they are paired. Several seeds: --jobs trains them side by side; torchrun splits one over GPUs.
"""

import torch.nn.functional as F

import common
import engine
import runs
from runs import number


def add_student_flags(parser):
    """The flags of distillation, beside those of `common.add_flags`. What is defined here goes into config.json."""
    add = parser.add_argument_group("distillation").add_argument
    add("--teacher", help="run folder of a finished teacher; {seed} in it stands for the seed")
    add("--kd-weight", type=number(float, 0), default=1.0, help="weight of the distillation term")
    add("--ce-weight", type=number(float, 0), default=0.0, help="weight of the one-hot term")
    temperature = "softens both teacher and student in the distillation term"
    add("--temperature", type=number(float, 0, 1e6, open_low=True), default=4.0, help=temperature)
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
    more = dict(teacher=teacher, snapshots=snapshots, start_from=start_from)
    facts["teacher_sha256"] = teacher.sha256 if teacher else None
    with runs.locked(run):
        if runs.start_run(run, args, "student", seed, data, student, **facts):
            weights_at = weights_at or flags_throughout
            engine.train_images(run, student, data, args, "student", seed, loss_fn, weights_at, **more)


def main(argv=None):
    parser = runs.Parser(__doc__)
    common.add_flags(parser)
    add_student_flags(parser)
    common.add_process_flags(parser)
    args = engine.resolve(parser.parse_args(argv), distributed=True)
    if not args.kd_weight and not args.ce_weight:
        raise runs.InputError("--kd-weight and --ce-weight are both 0, so there is no loss: give one of them")
    if args.kd_weight and not args.teacher:
        one_hot = "--kd-weight 0 --ce-weight 1 for a one-hot student"
        raise runs.InputError(f"--teacher is missing: give the run folder of a teacher, or {one_hot}")
    data = common.data_from(args)
    common.check_model(args, data)  # a wrong one fails before anything is discarded
    what = "onehot" if not args.kd_weight else "kd" if not args.ce_weight else "kd+ce"
    seeds = engine.shard_of(args)
    folders = {seed: runs.run_folder(args, seed, f"{runs.default_name(args)}-{what}") for seed in seeds}
    # A one-hot student depends on no teacher, so one control serves the students of any teacher.
    names = {seed: args.teacher.replace("{seed}", str(seed)) for seed in seeds} if args.kd_weight else {}
    models = {name: engine.load_teacher(name, data) for name in sorted(set(names.values()))}
    for name in models:
        print(f"{name}: {engine.teacher_fit(name)}")
    per_epoch, total = common.total_steps(args, data)
    students = total / per_epoch * len(seeds) / max(1, len(models))  # epochs of the students of one teacher
    tables = runs.run_folder(args, 0, "").parent / "teacher-logits"
    source = engine.teacher_source(args, data, students, students, tables)
    runs.discard_runs(args, folders.values(), models)

    engine.run_jobs(args)
    snapshots = common.snapshot_steps(args, data)
    teachers = {
        name: engine.TeacherLogits(model, data, args.precision, source, tables) for name, model in models.items()
    }
    for seed in seeds:
        train_student(folders[seed], args, seed, data, teachers.get(names.get(seed)), snapshots=snapshots)


if __name__ == "__main__":
    runs.cli(main)
