"""A metric of one's own in the budget, and an evaluation that is no mean over samples in the report.

python examples/own_metric.py
"""

from collections.abc import Callable
from pathlib import Path

import torch
from sklearn.metrics import f1_score
from torch import Tensor

import flyweight as fw
from flyweight.face.digits import load_digits, trained

DIGITS = load_digits()


def top2(outputs: Tensor, labels: Tensor) -> Tensor:
    """One number per sample: whether the label is among the two largest logits. Means get intervals."""
    return (outputs.topk(2).indices == labels[:, None]).any(1).double()


def macro_f1(predict: Callable[[Tensor], Tensor]) -> float:
    """One number for a whole model, computed as you always do: it is shown, but cannot have an interval."""
    images, labels = DIGITS.tune
    with torch.no_grad():
        return float(f1_score(labels, predict(images).argmax(1), average="macro"))


def main(folder: Path = Path("out-own-metric")) -> None:
    result = fw.compress(
        trained(seed=0, digits=DIGITS),
        calib=DIGITS.calib,
        tune=DIGITS.tune,
        test=DIGITS.test,
        metric=top2,
        evaluate=macro_f1,
        budget="size<=10%, top2>=97%",  # the metric's name is the function's
        workdir=folder,
    )
    print(result)
    for claim in result.results.claims:
        if claim.kind != "proof":
            print(f"{claim.state:>9}  {claim.name}: {claim.measured}")


if __name__ == "__main__":
    main()
