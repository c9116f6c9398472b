"""Train a teacher with one-hot labels: the first step of every figure (paper §3).

    python train_teacher.py                                             # ResNet-8, noisy digits, seconds on a CPU
    python train_teacher.py --data cifar100 --arch resnet56 --recipe short --out runs/teacher

Expected: digits with 30% label noise, ResNet-8, `--recipe quick`: 88.4% ± 1.7 (95% interval over 5 seeds).
CIFAR-100, ResNet-56, `--recipe short`: 71.6% in 80 epochs (one seed, a prototype on one H100).

Writes a run folder: config.json, metrics.jsonl (one line per epoch), checkpoint.pt, logits.npz. Interrupt it at any
time; the same command continues it.
"""
import functools

import torch.nn.functional as F

import common


def train_teacher(run, args, seed, data):
    """Generator, for `common.run_jobs`, that trains one teacher in the run folder `run`, unless it is finished already."""
    def loss_fn(logits, labels, teacher_logits, ce_weight, kd_weight):
        return F.cross_entropy(logits, labels)

    model = common.build_model(args.arch, data.classes, data.facts["image"], args.width, ("teacher", seed))
    with common.locked(run):
        if common.start_run(run, args, "teacher", seed, data, model):
            yield from common.training(run, model, data, args, "teacher", seed, loss_fn, weights_at=lambda step: (1.0, 0.0))


def main(argv=None):
    parser = common.Parser(__doc__)
    common.add_flags(parser)
    common.add_shard_flag(parser)
    options = common.resolve(parser.parse_args(argv), distributed=True)
    args = common.only_flags(options, common.add_flags)
    data = common.data_from(args)
    runs = {seed: common.run_folder(args, seed, f"{common.default_name(args)}-teacher") for seed in common.shard_of(options)}
    common.check_model(args, data)   # a wrong one fails before anything is discarded
    common.discard_runs(args, runs.values())
    common.run_jobs([functools.partial(train_teacher, run, args, seed, data) for seed, run in runs.items()], args.device, args.together)


if __name__ == "__main__":
    common.cli(main)
