"""Train a teacher with one-hot labels: the first step of every figure (paper §3).

    python train_teacher.py                                             # ResNet-8, noisy digits, seconds on a CPU
    python train_teacher.py --data cifar100 --arch resnet56 --recipe short --seeds 0 1 2 --out 'runs/teacher-s{seed}'

Writes a run folder: config.json, metrics.jsonl (one line per epoch), checkpoint.pt, logits.npz. Interrupt it at any
time; the same command continues it.
"""

import common
import engine
import runs


def main(argv=None):
    parser = runs.Parser(__doc__)
    common.add_flags(parser)
    args = engine.resolve(parser.parse_args(argv))
    data = common.data_from(args)
    folders = {seed: runs.run_folder(args, seed, f"{runs.default_name(args)}-teacher") for seed in args.seeds}
    engine.check_folders([dict(teacher=run) for run in folders.values()], args, data)
    for seed, run in folders.items():
        engine.train_teacher(run, args, seed, data)  # cross-entropy on the labels


if __name__ == "__main__":
    runs.cli(main)
