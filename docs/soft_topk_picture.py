"""Draws docs/soft_topk.svg: the soft top-k of one row of scores at several ε."""

from pathlib import Path

import matplotlib
import torch

from modeling_colt5.op_soft_topk import soft_topk

matplotlib.use("svg")
from matplotlib import pyplot  # noqa: E402

EPSILONS = (0.03, 0.1, 0.3, 1.0, 3.0)
K = 8


def main() -> None:
    # ids of the drawing in fixed order: the same picture is the same file
    matplotlib.rcParams["svg.hashsalt"] = "soft_topk"
    torch.manual_seed(0)
    scores = torch.randn(64, dtype=torch.float64).sort().values
    figure, axes = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    for epsilon in EPSILONS:
        axes.plot(scores, soft_topk(scores, K, epsilon=epsilon), marker=".", markersize=4, label=f"ε = {epsilon}")
    axes.axvline((scores[-K] + scores[-K - 1]) / 2, color="grey", linestyle=":", label=f"the {K} largest")
    axes.set_xlabel("score")
    axes.set_ylabel("weight")
    axes.set_title(f"Soft top-k of 64 scores, k = {K}: every curve sums to {K}")
    axes.legend()
    figure.savefig(Path(__file__).with_name("soft_topk.svg"), metadata={"Date": None})


if __name__ == "__main__":
    main()
