#!/usr/bin/env python3
"""What pre-training gives: localisation from the quickstart's model, beside random weights and k-mer baselines.

    python benchmarks/finetune.py --from runs/quickstart --runs /tmp/localisation --seeds 2

All take the same training sequences and the same test split. The two encoders take the same steps, schedule and
checkpoint choice (`configs/finetune_localisation.yaml`); the baselines are multinomial logistic regressions, their
L2 penalty chosen on validation. Intervals: 95 %, bootstrap over the test sequences. Prints a Markdown table. Runs
that are in `--runs` already are not trained again.
"""

import argparse
import itertools
import json
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F

from pretrain.cli import main as pretrain
from pretrain.downstream.finetune.data import FineTuneDataModule
from pretrain.downstream.finetune.metrics import Answers, bootstrap, metrics

CONFIG = Path(__file__).parents[1] / "configs" / "finetune_localisation.yaml"
TABLE = Path(__file__).parents[1] / "data" / "localisation" / "localisation.csv.gz"
RESIDUES = "ACDEFGHIKLMNPQRSTVWY"
SHOWN = ("accuracy", "mcc", "f1")


def kmer_shares(sequences, longest):
    """Shares of all k-mers of 1 to `longest` residues, [N, features]."""
    columns = []
    for k in range(1, longest + 1):
        place = {"".join(kmer): i for i, kmer in enumerate(itertools.product(RESIDUES, repeat=k))}
        counts = np.zeros((len(sequences), len(place)), np.float32)
        for row, sequence in enumerate(sequences):
            for start in range(len(sequence) - k + 1):
                if (column := place.get(sequence[start : start + k])) is not None:
                    counts[row, column] += 1
        columns.append(counts / counts.sum(1, keepdims=True).clip(1))
    return np.concatenate(columns, 1)


def one_hot(sequences, ends):
    """The first and the last residues, one-hot, [N, 2 * ends * 20]: where signals for transport stand."""
    found = np.zeros((len(sequences), 2, ends, len(RESIDUES)), np.float32)
    for row, sequence in enumerate(sequences):
        for side, part in enumerate((sequence[:ends], sequence[::-1][:ends])):
            for place, residue in enumerate(part):
                if residue in RESIDUES:
                    found[row, side, place, RESIDUES.index(residue)] = 1
    return found.reshape(len(sequences), -1)


def logistic(features, labels, classes, penalty):
    """Weights of a multinomial logistic regression with an L2 penalty, by L-BFGS."""
    weight = torch.zeros(features.shape[1], classes, requires_grad=True)
    bias = torch.zeros(classes, requires_grad=True)
    optimizer = torch.optim.LBFGS([weight, bias], max_iter=200, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        loss = F.cross_entropy(features @ weight + bias, labels) + penalty * weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return weight.detach(), bias.detach()


def baseline(data, features):
    """Test metrics and intervals of the regression whose penalty does best on validation."""
    x = {split: torch.from_numpy(value) for split, value in features.items()}
    mean, std = x["train"].mean(0), x["train"].std(0).clamp(min=1e-6)
    x = {split: (value - mean) / std for split, value in x.items()}
    y = {split: torch.from_numpy(part.labels.values) for split, part in data.splits.items()}
    best = None
    for penalty in (1e-4, 1e-3, 1e-2, 1e-1):
        weight, bias = logistic(x["train"], y["train"], len(data.spec.classes), penalty)
        loss = float(F.cross_entropy(x["validation"] @ weight + bias, y["validation"]))
        if best is None or loss < best[0]:
            best = loss, x["test"] @ weight + bias
    ones = np.ones(len(y["test"]), np.int64)
    answers = Answers(np.arange(len(ones)), ones, best[1], y["test"])
    values, intervals = metrics(data.spec, answers), bootstrap(data.spec, answers)
    return {name: {"value": values[name], "interval": intervals[name]} for name in values}


def row(name, test):
    cells = [f"{test[m]['value']:.3f} [{test[m]['interval'][0]:.3f}, {test[m]['interval'][1]:.3f}]" for m in SHOWN]
    print(f"| {name} | {' | '.join(cells)} |", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--from", dest="source", required=True, help="the quickstart's run")
    parser.add_argument("--runs", type=Path, required=True, help="where the fine-tuning runs are, or will be")
    parser.add_argument("--seeds", type=int, default=2)
    options = parser.parse_args()

    variants = {
        "pre-trained": [],
        "random weights": ["--model.from_scratch", "true"],
        "pre-trained, frozen": ["--model.tune", "frozen", "--model.learning_rate", "5e-3"],
        "pre-trained, LoRA": ["--model.tune", "lora", "--model.learning_rate", "3e-3"],
    }
    tests = {}
    for name, arguments in variants.items():
        for seed in range(options.seeds if name in ("pre-trained", "random weights") else 1):
            run = options.runs / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
            given = ["-c", str(CONFIG), "--from", options.source, "--run", str(run), "--seed_everything", str(seed)]
            quiet = ["--trainer.enable_progress_bar", "false", "--data.train", str(TABLE)]
            if not (run / "result.json").is_file() and pretrain(["finetune", *given, *arguments, *quiet]):
                raise SystemExit(f"{run} failed")
            tests[f"{name}, seed {seed}"] = json.loads((run / "result.json").read_text())["test"]

    data = FineTuneDataModule(str(TABLE), max_length=512)
    data.setup("fit")
    residues = {
        split: ["".join(data.tokenizer.tokens[i] for i in part.corpus.tokens(n)[1:-1]) for n in range(len(part.corpus))]
        for split, part in data.splits.items()
    }
    for k in (1, 2, 3):
        shares = {split: kmer_shares(sequences, k) for split, sequences in residues.items()}
        tests[f"logistic regression, k-mers up to {k}"] = baseline(data, shares)
    ends = {split: one_hot(sequences, 40) for split, sequences in residues.items()}
    tests["logistic regression, one-hot of 40 residues at each end"] = baseline(data, ends)
    print(f"| | {' | '.join(SHOWN)} |\n| --- | {' | '.join('---' for _ in SHOWN)} |")
    for name, test in tests.items():
        row(name, test)


if __name__ == "__main__":
    main()
