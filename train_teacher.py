"""Train a teacher with one-hot labels: the first step of every figure (paper §3).

    python train_teacher.py                                             # ResNet-8, noisy digits, seconds on a CPU
    python train_teacher.py --data cifar100 --arch resnet56 --recipe short --out runs/teacher

Writes a run folder: config.json, metrics.jsonl (one line per epoch), checkpoint.pt, logits.npz. Interrupt it at any
time; the same command continues it. Several seeds: --jobs trains them side by side; torchrun splits one over GPUs.
"""

import torch.nn.functional as F

import common
import engine
import runs


def loss_fn(model, images, labels, teacher_logits, ce_weight, kd_weight):
    logits = model(images).float()
    return F.cross_entropy(logits, labels), logits


def train_teacher(run, args, seed, data):
    """Train one teacher in the run folder `run`, unless it is finished already. args: all flags of a script."""
    args = common.only_flags(args, common.add_flags)
    model = common.build_model(args.arch, data.classes, data.facts["image"], args.width, ("teacher", seed))
    with runs.locked(run):
        if runs.start_run(run, args, "teacher", seed, data, model):
            snapshots = common.snapshot_steps(args, data)
            engine.train_images(run, model, data, args, "teacher", seed, loss_fn, snapshots=snapshots)


def main(argv=None):
    parser = runs.Parser(__doc__)
    common.add_flags(parser)
    common.add_process_flags(parser)
    args = engine.resolve(parser.parse_args(argv), distributed=True)
    data = common.data_from(args)
    common.check_model(args, data)  # a wrong one fails before anything is discarded
    seeds = engine.shard_of(args)
    folders = {seed: runs.run_folder(args, seed, f"{runs.default_name(args)}-teacher") for seed in seeds}
    runs.discard_runs(args, folders.values())

    engine.run_jobs(args)
    for seed in seeds:
        train_teacher(folders[seed], args, seed, data)
    pattern = runs.run_pattern(args, f"{runs.default_name(args)}-teacher")
    runs.print_next(args, "train_student.py", "--teacher", pattern)


if __name__ == "__main__":
    runs.cli(main)
