"""Compress a network, train what came back in a plain loop, and export it again.

    python examples/digits.py

`result.model` is an ordinary module: its layers are nn.Conv2d and nn.Linear under their old names, `.train()`,
optimizers and hooks work on it, and where it was quantized the rounding of values is simulated,
so that it trains (weights leave their grid: compress again afterwards).
"""

from pathlib import Path

import onnxruntime
import torch
from torch import nn

import flyweight as fw
from flyweight.deploy.formats.onnx import export
from flyweight.face.digits import accuracy, load_digits, trained


def main(folder: Path = Path("out-digits")) -> None:
    digits = load_digits()
    model = trained(seed=0, digits=digits)
    result = fw.compress(
        model,
        calib=digits.calib,
        tune=digits.tune,
        test=digits.test,
        budget="size<=5%, drop<=3pt",
        workdir=folder,
    )
    print(result)

    images, labels = digits.train
    student = fw.load(folder)  # the same as result.model, from the folder: needs no class of yours
    print(f"before training {accuracy(student, *digits.test):.2%}")
    optimizer = torch.optim.SGD(student.parameters(), lr=1e-3, momentum=0.9)
    student.train()
    for rows in torch.randperm(len(images), generator=torch.Generator().manual_seed(0)).split(32):
        loss = nn.functional.cross_entropy(student(images[rows]), labels[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    print(f"after one epoch {accuracy(student, *digits.test):.2%}")

    file = folder.with_name("digits-trained.onnx")  # not inside: the folder's files are listed in its manifest
    export(student.eval(), (images[:2],), file)
    session = onnxruntime.InferenceSession(file)
    (logits,) = session.run(None, {session.get_inputs()[0].name: digits.test[0].numpy()})
    right = float((torch.from_numpy(logits).argmax(1) == digits.test[1]).double().mean())
    print(f"in ONNX Runtime {right:.2%}, {file.stat().st_size:,} bytes")


if __name__ == "__main__":
    main()
