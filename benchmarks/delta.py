"""One base and small changes: a fine-tuned MiniLM as base and delta, a hard-cut ResNet-20 with a corrector beside it.

    python benchmarks/delta.py [mails|pictures] [--data FOLDER] [--rows N] [--seeds 3] [--errors 0.1,0.3] [--no-lora]
                              [--out NAME] [--threads N]

mails: all of MiniLM learns spam from ham for an epoch (64 tokens); the delta is extracted at several errors on training
mails, its labels unread, and merged into the base; `share` is the delta's file of the base's bytes. `lora` learns a delta
of rank 8 from the start. Mails are split by family (`inputs.kin`), the test is read at the end. Asked: a share of at most
2 %, at most 0.2 points below full fine-tuning.
pictures: ResNet-20 cut to a fifth of its MACs, as delivered without recovery and frozen; a corrector of at most 5 % of the cut
network's MACs learns beside it from the original's answers on unlabelled rows: one that reads the pictures, and one that reads
what flows into the cut network's layers. Asked: better than the source alone.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import flyweight as fw
from common import (
    RESULTS,
    accuracy,
    answers,
    arguments,
    facts,
    load_fashion_mnist,
    load_resnet20,
    print_table,
    write_csv,
)
from flyweight.graph.cost import total_macs
from flyweight.graph.trace import trace
from flyweight.recover.losses import soft_labels
from flyweight.train.descent import descend

BATCH = 32
SHARP = 20.0  # vectors of the encoder have length 1: logits of a linear layer on them would hardly differ
CALIB_ROWS = 512  # mails that the delta is weighed on
RANK = 8
DIVIDE = 5.0  # MACs of the cut network
COLUMNS = {
    "mails": ("form", "error", "kilobytes", "share", "accuracy", "sd", "drop_pt", "worst_pt", "seconds"),
    "pictures": ("form", "macs", "share", "accuracy", "sd", "least", "agreement", "seconds"),
}


class Spam(nn.Module):
    """Two logits of a mail: MiniLM's vector and a linear layer."""

    def __init__(self, encoder: nn.Module, seed: int) -> None:
        super().__init__()
        self.encoder = encoder
        torch.manual_seed(seed)
        self.head = nn.Linear(384, 2)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        """Logits of ham and spam."""
        return self.head(SHARP * self.encoder(input_ids, attention_mask))  # type: ignore[no-any-return]


def learned(
    model: nn.Module, parameters: Sequence[nn.Parameter], rows: tuple[Tensor, ...], epochs: int, lr: float, seed: int
) -> None:
    """Trains `parameters` on labelled mails, in place; the model stays in eval mode, so without dropout."""

    def batches(epoch: int) -> Iterator[tuple[Tensor, ...]]:
        order = torch.randperm(len(rows[0]), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for part in order.split(BATCH):
            yield tuple(x[part] for x in rows)

    def loss(batch: tuple[Tensor, ...]) -> Tensor:
        return cross_entropy(model(*batch[:-1]), batch[-1])

    descend(model, batches, loss, steps=-(-len(rows[0]) // BATCH), epochs=epochs, lr=lr, parameters=parameters)


@torch.inference_mode()
def right(model: nn.Module, rows: tuple[Tensor, ...]) -> Tensor:
    """Of every mail whether it is told rightly."""
    parts = zip(*(x.split(4 * BATCH) for x in rows), strict=True)
    return torch.cat([model(*inputs).argmax(1) == labels for *inputs, labels in parts])


def mails_rows(options: Any) -> list[dict[str, Any]]:
    """The table of the first part: every form, means over seeds."""
    from inputs import labelled_mails
    from networks import minilm

    roles = labelled_mails(options.data)
    train, test = (roles[name].inputs for name in ("calib", "test"))
    train, test = tuple(x[: options.rows] for x in train), tuple(x[: options.test_rows] for x in test)
    calib = [tuple(x[:-1]) for x in zip(*(x[:CALIB_ROWS].split(BATCH) for x in train), strict=True)]
    found: dict[tuple[str, float], list[dict[str, Any]]] = {}
    for seed in range(options.seeds):
        print(f"seed {seed}")
        base = Spam(minilm(), seed).eval()
        base_bytes = sum(x.numel() * x.element_size() for x in base.parameters())
        started = time.perf_counter()
        tuned = copy.deepcopy(base)
        learned(tuned, list(tuned.parameters()), train, options.epochs, options.lr, seed)
        full = right(tuned, test)

        def note(
            form: str,
            error: float,
            told: Tensor,
            size: int,
            *,
            since: float,
            full: Tensor = full,
            whole: int = base_bytes,
        ) -> None:
            row = {
                "accuracy": float(told.double().mean()),
                "drop_pt": 100 * float(full.double().mean() - told.double().mean()),
                "kilobytes": size / 1000,
                "share": size / whole,
                "seconds": time.perf_counter() - since,
            }
            found.setdefault((form, error), []).append(row)
            print(f"  {form} {error}: {row}", flush=True)

        note("full fine-tuning", 0.0, full, base_bytes, since=started)
        for error in options.errors:
            started = time.perf_counter()
            delta = fw.extract_delta(base, tuned, calib=calib, error=error)
            kinds = [entry.kind for entry in delta.entries.values()]
            print("  ", {kind: kinds.count(kind) for kind in sorted(set(kinds))})
            note("base + delta", error, right(fw.merge_delta(base, delta), test), delta.nbytes, since=started)
        if not options.lora:
            continue
        started = time.perf_counter()
        learning = fw.delta_parameters(base, RANK)
        learned(base, learning, train, options.epochs, 10 * options.lr, seed)
        delta = fw.collected_delta(base, bits=8)
        note("lora", 0.0, right(fw.merge_delta(base, delta), test), delta.nbytes, since=started)
    return [_over_seeds(form, error, rows) for (form, error), rows in found.items()]


def _over_seeds(form: str, error: float, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    mean = {key: statistics.fmean(row[key] for row in rows) for key in rows[0]}
    accuracies = [row["accuracy"] for row in rows]
    spread = statistics.stdev(accuracies) if len(rows) > 1 else 0.0
    return {"form": form, "error": error, **mean, "sd": spread, "worst_pt": max(row["drop_pt"] for row in rows)}


def pictures_rows(options: Any) -> list[dict[str, Any]]:
    """The table of the second part."""
    from recover_resnet20 import cuts

    data, model = load_fashion_mnist(options.data), load_resnet20(options.data)
    test = data.test
    teacher = trace(model, (test[0][:2],)).module
    source = cuts(model, data)[DIVIDE]
    rows, choose = data.calib(options.rows)[0], data.choose[0]
    whole = total_macs(trace(source, (test[0][:2],)).module)
    wanted = answers(teacher, test[0]).argmax(1)

    def row(form: str, macs: int, networks: Sequence[nn.Module], seconds: float) -> dict[str, Any]:
        accuracies = [accuracy(one, *test) for one in networks]
        agreement = [float((answers(one, test[0]).argmax(1) == wanted).double().mean()) for one in networks]
        return {
            "form": form, "macs": macs, "share": macs / whole, "accuracy": statistics.fmean(accuracies),
            "sd": statistics.stdev(accuracies) if len(accuracies) > 1 else 0.0, "least": min(accuracies),
            "agreement": statistics.fmean(agreement), "seconds": seconds,
        }  # fmt: skip

    table = [
        row("original", total_macs(teacher), [model], 0.0),
        row("source alone", whole, [source], 0.0),
    ]
    for reads in ("inputs", "layers"):
        started, made = time.perf_counter(), []
        for seed in range(options.seeds):
            torch.manual_seed(seed)
            beside = fw.corrector_like(source, test[0][:2], macs=0.05, reads=reads)
            both = fw.Corrected(copy.deepcopy(source), beside)
            corrected(both, teacher, rows, choose, options, seed)
            made.append(both.eval())
        macs = total_macs(trace(made[0], (test[0][:2],)).module)
        name = f"source + corrector of its {reads}"
        table.append(row(name, macs, made, (time.perf_counter() - started) / options.seeds))
    return table


def corrected(both: fw.Corrected, teacher: nn.Module, rows: Tensor, choose: Tensor, options: Any, seed: int) -> None:
    """Lets the corrector learn the teacher's answers, in place; the best epoch on `choose` is kept."""
    wanted, judged = answers(teacher, rows), answers(teacher, choose)

    def batches(epoch: int) -> Iterator[tuple[Tensor, Tensor]]:
        order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(1000 * seed + epoch))
        for part in order.split(128):
            yield rows[part], wanted[part]

    def loss(lesson: tuple[Tensor, Tensor]) -> Tensor:
        return soft_labels(both(lesson[0]), lesson[1])

    def judge() -> float:
        both.eval()
        found = float(soft_labels(answers(both, choose), judged))
        both.train()
        return found

    both.train()
    done = descend(
        both, batches, loss, steps=-(-len(rows) // 128), epochs=options.picture_epochs, lr=3e-3,
        parameters=list(both.corrector.parameters()), judge=judge,
    )  # fmt: skip
    print(f"  seed {seed}: divergence on choose {done.judged}", flush=True)


def main() -> None:
    """Prints the tables and writes them."""
    parser = arguments(__doc__.partition("\n")[0])
    parser.add_argument("part", nargs="?", choices=("mails", "pictures"), help="one part alone")
    parser.add_argument("--rows", type=int, default=0, help="training rows (default: 1,600 mails, 16,384 pictures)")
    parser.add_argument("--test-rows", type=int, default=None, help="test mails (default: all)")
    parser.add_argument("--epochs", type=int, default=1, help="over the mails")
    parser.add_argument("--picture-epochs", type=int, default=6)
    parser.add_argument(
        "--lr", type=float, default=5e-5, help="peak rate of full fine-tuning; that of lora is ten times as high"
    )
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument(
        "--errors", type=lambda text: tuple(map(float, text.split(","))), default=(0.1, 0.3), help="of the deltas"
    )
    parser.add_argument(
        "--lora", action=argparse.BooleanOptionalAction, default=True, help="a delta learned from the start"
    )
    parser.add_argument("--out", default="", help="what the names of the tables end in")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    given = options.rows
    for part, rows, table in (("mails", 1_600, mails_rows), ("pictures", 16_384, pictures_rows)):
        if options.part not in (None, part):
            continue
        options.rows = given or rows
        found = table(options)
        print_table(found, COLUMNS[part])
        about = {"training": f"{options.rows} rows, {options.seeds} seeds"}
        write_csv(RESULTS / f"delta_{part}{options.out}.csv", found, facts(options.threads, "transformers") | about)


if __name__ == "__main__":
    main()
