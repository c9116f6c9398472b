"""Train a student to match a teacher: the second step of Figure 1a (paper §3.1), and its one-hot control.

    python train_student.py --teacher runs/digits-resnet8-teacher-s0                     # distillation alone
    python train_student.py --kd-weight 0 --ce-weight 1                                  # the one-hot control
    python train_student.py --teacher 'runs/teacher-s{seed}' --seeds 0 1 2 --out runs/kd # a teacher for each seed

The loss is ce_weight·CE + kd_weight·T²·KL(teacher_T ‖ student_T). A student never shares initialisation, order or
augmentation with a teacher of the same seed; students of the same seed share all three, so that they are paired.
Several seeds: --together trains them side by side, --shard i/n splits them over jobs; torchrun splits one run over GPUs.
Expected: digits with 30% label noise, ResNet-8, `--recipe quick`: 93.8% ± 1.5 for distillation, 89.8% ± 2.1 for the
control (95% intervals over 5 seeds). CIFAR-100, ResNet-56 self-distillation, `--recipe short`: 73.5% against 71.8% for
the control (one seed, a prototype on one H100).
"""
import argparse
import functools

import torch.nn.functional as F

import common


def add_student_flags(parser):
    """The flags of distillation, beside those of `common.add_flags`."""
    parser.add_argument("--teacher", help="run folder of a finished teacher; {seed} in it stands for the seed")
    parser.add_argument("--kd-weight", type=common.number(float, 0), default=1.0, help="weight of the distillation term")
    parser.add_argument("--ce-weight", type=common.number(float, 0), default=0.0, help="weight of the one-hot term")
    parser.add_argument("--temperature", type=common.number(float, 0, 1e6, open_low=True), default=4.0, help="softens both teacher and student in the distillation term")
    parser.add_argument("--teacher-cache", choices=("auto", "on", "off"), default="auto", help="look teacher logits up in a table instead of computing them in every step; auto: where that saves time")
    parser.add_argument("--snapshot-at", type=common.number(float, 0, 1), nargs="*", default=[], help="shares of training at which to keep the state, for switch_distill.py and denoise_gradients.py")


def train_student(run, args, seed, data, teacher, weights_at=None, snapshots=(), start_from=None, **facts):
    """Generator, for `common.run_jobs`, that trains one student in the run folder `run`, unless it is finished already.

    teacher: `common.TeacherLogits`, or None for a one-hot student. weights_at(step) -> (ce_weight, kd_weight), by
    default the two flags throughout. facts go into config.json and are compared. The rest as in `common.training`.
    """
    if teacher is None:   # no distillation term: one control serves all temperatures
        args = argparse.Namespace(**dict(vars(args), temperature=None))
    def loss_fn(student_logits, labels, teacher_logits, ce_weight, kd_weight):
        ce = F.cross_entropy(student_logits, labels)
        kd = common.kd_loss(student_logits, teacher_logits, args.temperature) if teacher_logits is not None else 0.0
        return ce_weight * ce + kd_weight * kd

    weights_at = weights_at or (lambda step: (args.ce_weight, args.kd_weight))
    model = common.build_model(args.arch, data.classes, data.facts["image"], args.width, ("student", seed))
    facts["teacher_sha256"] = teacher.sha256 if teacher else None
    with common.locked(run):
        if common.start_run(run, args, "student", seed, data, model, **facts):
            yield from common.training(run, model, data, args, "student", seed, loss_fn, weights_at, teacher, snapshots, start_from)


def main(argv=None):
    parser = common.Parser(__doc__)
    common.add_flags(parser)
    add_student_flags(parser)
    common.add_shard_flag(parser)
    options = common.resolve(parser.parse_args(argv), distributed=True)
    args = common.only_flags(options, common.add_flags, add_student_flags)
    if not args.kd_weight and not args.ce_weight:
        raise common.InputError("--kd-weight and --ce-weight are both 0, so there is no loss: give one of them")
    if args.kd_weight and not args.teacher:
        raise common.InputError("--teacher is missing: give the run folder of a teacher, or --kd-weight 0 --ce-weight 1 for a one-hot student")
    data = common.data_from(args)
    per_epoch, total = common.total_steps(args, data)
    snapshots = {round(share * total) for share in args.snapshot_at}

    what = "onehot" if not args.kd_weight else "kd" if not args.ce_weight else "kd+ce"
    runs = {seed: common.run_folder(args, seed, f"{common.default_name(args)}-{what}") for seed in common.shard_of(options)}
    # A one-hot student depends on no teacher, so one control serves the students of any teacher.
    names = {seed: args.teacher.replace("{seed}", str(seed)) if args.kd_weight else None for seed in runs}
    models = {name: common.load_teacher(name, data) for name in sorted(set(names.values()) - {None})}
    common.check_model(args, data)   # a wrong one fails before anything is discarded
    source = None
    if models:
        students = total / per_epoch * len(runs) / len(models)   # epochs of the students of one teacher
        source = common.teacher_source(args.teacher_cache, data, args, students, students if args.view_seed is None else total / per_epoch, next(iter(runs.values())))
    common.discard_runs(args, runs.values(), models)
    teachers = {name: common.TeacherLogits(model, data, args.precision, source) for name, model in models.items()}
    common.run_jobs([functools.partial(train_student, run, args, seed, data, teachers.get(names[seed]), snapshots=snapshots)
                     for seed, run in runs.items()], args.device, args.together)


if __name__ == "__main__":
    common.cli(main)
