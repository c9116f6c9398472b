"""Train a student to match a teacher: the second step of Figure 1a (paper §3.1), and its one-hot control.

    python train_student.py --teacher runs/digits-resnet8-teacher-s0                     # distillation alone
    python train_student.py --kd-weight 0 --ce-weight 1                                  # the one-hot control
    python train_student.py --teacher 'runs/teacher-s{seed}' --seeds 0 1 2 --out runs/kd # a teacher for each seed
    python train_student.py --teacher weights.pth --teacher-arch torchvision:resnet18    # anyone's teacher
    python train_student.py --teacher-logits logits.npy                                  # its logits alone

The loss is ce_weight·CE + kd_weight·T²·KL(teacher_T ‖ student_T): `common.student_loss`, which is there to be changed.
A student never shares initialisation, order or augmentation with a teacher of the same seed; students of the same seed
share all three, so that they are paired. A one-hot student depends on no teacher: one control serves those of any.
"""

import common
import engine
import runs
from runs import InputError


def main(argv=None):
    parser = runs.Parser(__doc__)
    common.add_flags(parser)
    common.add_teacher_flags(parser)
    common.add_student_flags(parser)
    args = engine.resolve(parser.parse_args(argv))
    if not args.kd_weight and not args.ce_weight:
        raise InputError("--kd-weight and --ce-weight are both 0, so there is no loss: give one of them")
    what = "onehot"
    if args.kd_weight:
        what = "kd+ce" if args.ce_weight else "kd"
    data = common.data_from(args)
    kept = common.snapshot_steps(args, data)
    folders = {seed: runs.run_folder(args, seed, f"{runs.default_name(args)}-{what}") for seed in args.seeds}
    engine.check_folders([dict(student=run) for run in folders.values()], args, data)
    for seed, run in folders.items():
        teacher = None
        loss_fn = common.one_hot_loss
        if args.kd_weight:
            teacher = engine.open_teacher(args, seed, data)
            loss_fn = common.student_loss
        engine.train_student(run, args, seed, data, loss_fn, teacher, snapshots=kept)


if __name__ == "__main__":
    runs.cli(main)
