"""What the large networks are measured on: tones with a known pitch, e-mails, photographs; split by where they come from.

The roles share no source: a picture's crops, a thread's mails and what quotes them lie in one role together.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from networks import FRAME, TOKENS, folder_of, minilm_folder

RATE = 16_000  # samples a second
LOWEST_CENTS = 1997.379  # of the first pitch bin, above 10 Hz
CENTS_PER_BIN = 20.0
LOW_HZ, HIGH_HZ = 32.7, 1_975.5  # the range of CREPE: C1 to B6
SHARES = {"calib": 0.5, "choose": 0.15, "test": 0.35}
SHINGLE = 8  # words in a row that make two mails kin


@dataclass(frozen=True, eq=False)
class Sample:
    """Inputs (rows in dimension 0) of one role and the number of each row's source."""

    inputs: tuple[Tensor, ...]
    source: Tensor

    def batches(self, size: int) -> list[tuple[Tensor, ...]]:
        """The inputs in consecutive batches."""
        return list(zip(*(x.split(size) for x in self.inputs), strict=True))

    def first(self, rows: int) -> Sample:
        """The first rows alone."""
        return Sample(tuple(x[:rows] for x in self.inputs), self.source[:rows])


def tones(rows: int, seed: int) -> tuple[Tensor, Tensor]:
    """Frames (rows, 1024) of harmonic tones in noise, mean 0 and deviation 1, and the pitch of each in Hz.

    The pitch is uniform in cents between LOW_HZ and HIGH_HZ; up to 30 partials fall off as k^-p with p in 0.5 … 2, each
    with its own strength (x 0.5 … 1.5) and phase; white noise lies 15 … 40 dB below.
    """
    random = np.random.default_rng(seed)
    pitch = LOW_HZ * (HIGH_HZ / LOW_HZ) ** random.random(rows)
    slope, quiet_db = random.uniform(0.5, 2.0, rows), random.uniform(15.0, 40.0, rows)
    wave = np.zeros((rows, FRAME))
    seconds = np.arange(FRAME) / RATE
    for k in range(1, 31):
        strength = k**-slope * random.uniform(0.5, 1.5, rows) * (k * pitch < RATE / 2)
        angle = 2 * np.pi * k * pitch[:, None] * seconds + random.uniform(0, 2 * np.pi, (rows, 1))
        wave += strength[:, None] * np.sin(angle)
    loud = wave.std(1, keepdims=True)
    wave += loud * 10 ** (-quiet_db[:, None] / 20) * random.standard_normal((rows, FRAME))
    wave = (wave - wave.mean(1, keepdims=True)) / wave.std(1, keepdims=True)
    return torch.from_numpy(wave.astype(np.float32)), torch.from_numpy(pitch)


def pitch_of(probabilities: Tensor) -> Tensor:
    """The pitch in Hz: the mean of the bins around the largest one, weighted by their probabilities (as in CREPE)."""
    bins = torch.arange(probabilities.shape[1])
    near = (bins - probabilities.argmax(1)[:, None]).abs() <= 4
    weights = probabilities.double() * near
    cents = LOWEST_CENTS + CENTS_PER_BIN * (weights * bins).sum(1) / weights.sum(1)
    return 10 * 2 ** (cents / 1200)


def within(probabilities: Tensor, pitch: Tensor, cents: float = 50.0) -> Tensor:
    """For each row whether the pitch found is no further than `cents` from the true one: bool (rows,)."""
    return 1200 * (pitch_of(probabilities) / pitch).log2().abs() <= cents


def mails(folder: Path, tokens: int = TOKENS) -> dict[str, Sample]:
    """Token numbers and masks (n, tokens) of the mails by role; mails that share a subject or eight words in a row are kin."""
    numbers, mask, _, family = _mails(folder, tokens)
    return _by_source((numbers, mask), family)


def further_mails(folder: Path, tokens: int = TOKENS) -> Sample:
    """What stands behind the first tokens of the mails that calibrate, in windows of as many: more to learn from, no labels."""
    *inputs, _, family = _mails(folder, tokens, further=True)
    known = set(mails(folder, tokens)["calib"].source.tolist())
    rows = torch.tensor([i for i, one in enumerate(family) if one in known])
    return Sample(tuple(x[rows] for x in inputs), torch.tensor(family)[rows])


def labelled_mails(folder: Path, tokens: int = TOKENS) -> dict[str, Sample]:
    """The same with a third input, the label of each mail: 1 is spam."""
    *inputs, family = _mails(folder, tokens)
    return _by_source(tuple(inputs), family)


def _mails(folder: Path, tokens: int, further: bool = False) -> tuple[Tensor, Tensor, Tensor, list[int]]:
    """Token numbers, masks, labels and families of all mails, or of what is `further` behind their first tokens."""
    path = folder / "spam_assassin.jsonl.gz"
    if not path.is_file():
        raise SystemExit(f"{path.name} is not in {folder}\n  fix: pass the folder that holds it with --data FOLDER")
    folder_of("tokenizers")
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(minilm_folder() / "tokenizer.json"))
    tokenizer.enable_truncation(tokens)
    tokenizer.enable_padding(length=tokens)
    with gzip.open(path, "rt", encoding="utf-8") as lines:
        found = [json.loads(line) for line in lines]
    texts = [one["text"] for one in found]
    coded = [
        (i, c) for i, one in enumerate(tokenizer.encode_batch(texts)) for c in (one.overflowing if further else [one])
    ]
    numbers = torch.tensor([c.ids for _, c in coded])
    mask = torch.tensor([c.attention_mask for _, c in coded])
    family = kin(texts)
    return numbers, mask, torch.tensor([int(found[i]["spam"]) for i, _ in coded]), [family[i] for i, _ in coded]


def kin(texts: Sequence[str]) -> list[int]:
    """The number of each text's family: texts that share a subject line or SHINGLE words in a row belong together."""
    family = list(range(len(texts)))
    seen: dict[str, int] = {}

    def head(i: int) -> int:
        while family[i] != i:
            family[i] = family[family[i]]
            i = family[i]
        return i

    for i, text in enumerate(texts):
        words = re.findall(r"\w+", text.lower())
        subject = re.sub(r"^((re|fwd?|aw)\s*:\s*|\[[^\]]*\]\s*)+", "", text.lower()).split(". ")[0]
        marks = {" ".join(words[k : k + SHINGLE]) for k in range(len(words) - SHINGLE + 1)} | {f"subject {subject}"}
        for mark in sorted(marks):  # a set of texts has another order in every process
            other = seen.setdefault(mark, i)
            family[head(i)] = head(other)
    return [head(i) for i in range(len(texts))]


def photos(folder: Path) -> dict[str, Sample]:
    """Images (n, 3, 224, 224) in bytes, by role; all crops of one picture are in one role. `Pictures` makes them numbers."""
    from PIL import Image

    files = sorted((folder / "photos").glob("*.jpg"))
    if not files:
        raise SystemExit(f"no photos in {folder / 'photos'}\n  fix: pass the folder that holds them with --data FOLDER")
    pixels = [np.asarray(Image.open(file).convert("RGB")).transpose(2, 0, 1) for file in files]
    images = torch.from_numpy(np.stack(pixels))
    names = {name: i for i, name in enumerate(dict.fromkeys(file.stem.split("_")[0] for file in files))}
    return _by_source((images,), [names[file.stem.split("_")[0]] for file in files])


class Pictures(Sequence[tuple[Tensor]]):
    """Batches of images as a network takes them, (x - 127) / 128, made when they are asked for: all at once are a gigabyte.

    With `mirrored` every batch is followed by its mirror image: twice the statistics from the same pictures.
    """

    def __init__(self, images: Tensor, size: int, mirrored: bool = False) -> None:
        self.parts = [(part, flip) for part in images.split(size) for flip in ((False, True) if mirrored else (False,))]

    def __len__(self) -> int:
        return len(self.parts)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[i] for i in range(*number.indices(len(self)))]
        part, flip = self.parts[number]
        x = (part.float() - 127) / 128
        return (x.flip(3) if flip else x,)


def _by_source(inputs: tuple[Tensor, ...], source: Sequence[int]) -> dict[str, Sample]:
    """The rows dealt to the roles, whole sources at a time, the largest sources first to the role that lacks most."""
    sources = torch.as_tensor(source)
    rows = {role: _rows(sources, chosen) for role, chosen in _dealt(sources).items()}
    return {role: Sample(tuple(x[index] for x in inputs), sources[index]) for role, index in rows.items()}


def _dealt(sources: Tensor) -> Mapping[str, list[int]]:
    names, counts = sources.unique(return_counts=True)
    order = torch.randperm(len(names), generator=torch.Generator().manual_seed(0))
    order = order[counts[order].argsort(descending=True, stable=True)]
    held, dealt = dict.fromkeys(SHARES, 0), {role: [] for role in SHARES}
    for i in order.tolist():
        role = min(SHARES, key=lambda name: held[name] / SHARES[name])
        held[role] += int(counts[i])
        dealt[role].append(int(names[i]))
    return dealt


def _rows(sources: Tensor, chosen: Sequence[int]) -> Tensor:
    """The rows of the chosen sources, shuffled."""
    rows = torch.isin(sources, torch.tensor(chosen)).nonzero()[:, 0]
    return rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(1))]
