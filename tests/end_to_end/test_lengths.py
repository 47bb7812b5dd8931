"""Whole runs on batches padded to their own longest sample: every length is taken, judged and timed."""

from __future__ import annotations

import functools

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import flyweight as fw
from flyweight.deploy import latency
from flyweight.errors import DataError, TraceError
from flyweight.stages import timing

WIDTH, WORDS = 16, 40


class Reader(nn.Module):
    """A sentence classifier with attention under a padding mask; also gives back what it thinks of every token."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(WORDS, WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.up, self.down = nn.Linear(WIDTH, 2 * WIDTH), nn.Linear(2 * WIDTH, WIDTH)
        self.head = nn.Linear(WIDTH, 4)

    def forward(self, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
        x = self.table(ids)
        rows, steps, _ = x.shape
        q, k, v = (part(x).view(rows, steps, 4, 4).transpose(1, 2) for part in (self.query, self.key, self.value))
        share = (q @ k.transpose(2, 3) / 2).masked_fill(mask[:, None, None] == 0, -1e9).softmax(-1)
        x = x + (share @ v).transpose(1, 2).reshape(rows, steps, WIDTH)
        x = x + self.down(F.relu(self.up(x)))
        real = mask[:, :, None].to(x.dtype)
        return {"logits": self.head((x * real).sum(1) / real.sum(1)), "tokens": x}


class Listener(nn.Module):
    """Convolutions over a sequence of any length, and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv1d(3, 12, 3, padding=1), nn.BatchNorm1d(12)
        self.second, self.head = nn.Conv1d(12, 12, 3, padding=1), nn.Linear(12, 4)

    def forward(self, wave: Tensor) -> Tensor:
        return self.head(F.relu(self.second(F.relu(self.norm(self.first(wave))))).mean(2))


def sentences(seed: int, *lengths: int, rows: int = 12, labels: bool = True) -> list[dict[str, Tensor]]:
    """One batch for each length; every third sentence is two tokens shorter."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for length in lengths:
        mask = torch.ones(rows, length, dtype=torch.long)
        mask[::3, length - 2 :] = 0
        batch = {"ids": torch.randint(1, WORDS, (rows, length), generator=draw) * mask, "mask": mask}
        truth = {"labels": torch.randint(0, 4, (rows,), generator=draw)} if labels else {}
        made.append({**batch, **truth})
    return made


def waves(seed: int, *lengths: int) -> list[Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(12, 3, length, generator=draw) for length in lengths]


@pytest.fixture(scope="module")
def read(world):
    torch.manual_seed(0)
    return world.made(
        "lengths", Reader().eval(), calib=sentences(0, 5, 9, 14, 9, 5, 9, 14, 9, labels=False),
        tune=sentences(1, 3, 7, 11), test=sentences(2, 4, 14, 20), budget="macs<=60%, agreement>=20%",
        shapes=["batch=2,seq=7", "batch=1"], methods=["channels"],
    )  # fmt: skip


def ends(batch: dict[str, Tensor]) -> list[Tensor]:
    return [batch["ids"], batch["mask"]]


def test_a_reader_of_any_length_is_cut_and_proven_at_several(read):
    assert read.results.rows[1].macs < 0.6 * read.results.rows[0].macs
    proofs = [claim for claim in read.results.claims if claim.kind == "proof"]
    assert {claim.state for claim in proofs} == {"holds"}
    assert all("rows of 2 shapes" in claim.how for claim in proofs)  # 12 of 4 tokens, 12 of 20
    assert [c.state for c in read.results.claims if c.kind == "promise"] == ["holds", "holds"]
    assert read.results.behaviour.items == 36


def test_the_file_and_the_stored_model_answer_at_a_length_never_seen(read):
    (batch,) = sentences(5, 33, rows=3)
    expected = read.model(*ends(batch))
    again = fw.load(read.folder)(*ends(batch))
    session = onnxruntime.InferenceSession(read.folder / "model.onnx")
    found = dict(zip(expected, session.run(None, {n: batch[n].numpy() for n in ("ids", "mask")}), strict=True))
    for name, value in expected.items():
        assert torch.equal(again[name], value)
        np.testing.assert_allclose(found[name], value.detach(), rtol=1e-4, atol=1e-5)
    assert expected["tokens"].shape == (3, 33, WIDTH)


def test_agreement_is_that_of_every_sample_whatever_its_length(read):
    torch.manual_seed(0)
    model, same = Reader().eval(), []
    with torch.no_grad():
        for batch in sentences(2, 4, 14, 20):
            before, after = (one(*ends(batch))["logits"].argmax(1) for one in (model, read.model))
            same += (before == after).tolist()
    (claim,) = [c for c in read.results.claims if c.name.startswith("agreement")]
    assert claim.measured == pytest.approx(sum(same) / 36, abs=1.5 / 36)  # the runtime rounds otherwise: a tie may fall


def test_times_are_told_at_the_lengths_asked_for_and_at_the_median(read):
    assert read.results.shapes == ("batch=2,seq=7", "batch=1,seq=9")
    assert set(read.results.rows[1].latency_s) == set(read.results.shapes)
    (note,) = [note for note in read.notes if note.code == "data.lengths"]
    assert "seq (axis 1 of ids, mask) from 5 to 14, counted at 9" in note.text
    layer = {look.name: look for look in fw.inspect(Reader(), calib=sentences(0, 5, 9, 14), progress=False).layers}[
        "up"
    ]
    assert layer.macs == 9 * WIDTH * 2 * WIDTH


def test_a_folder_is_weighed_again_on_other_lengths(read):
    again = fw.verify(read.folder, test=sentences(7, 6, 25, 13), progress=False)
    assert again.behaviour.items == 36
    assert again.budget_met
    with pytest.raises(DataError, match="5×1 here"):
        fw.verify(read.folder, test=[{n: x[:, :, None] for n, x in sentences(7, 5)[0].items() if n != "labels"}])


def test_a_split_role_in_int8_with_a_limit_at_a_length(world, monkeypatch):
    short = functools.partial(latency.compare, processes=2)
    monkeypatch.setattr(latency, "compare", short)  # nothing is asserted of how fast anything is
    monkeypatch.setattr(timing, "measure_table", functools.partial(timing.measure_table, seconds_per_shape=0.03))
    torch.manual_seed(0)
    made = world.made(
        "lengths-split", Listener().eval(), calib=waves(0, 6, 10, 16, 10), methods=["int8"],
        shapes=["batch=2,seq=7"], budget="latency@batch=2,seq=7<=900%, agreement>=20%",
        rules=[fw.rule("first", bits=8), fw.rule("second", bits=8)],
    )  # fmt: skip
    assert made.budget_met
    assert made.results.data == {"calib": 29, "tune": 9, "test": 10}
    assert made.results.shapes == ("batch=2,seq=7",)
    assert made.results.artifact.executed_int8 > 0
    limits = [c.name for c in made.results.claims if c.kind == "promise"]
    assert "latency@batch=2,seq=7<=900%" in limits
    (wave,) = waves(3, 41)
    session = onnxruntime.InferenceSession(made.folder / "model.onnx")
    with torch.no_grad():
        expected = made.model(wave).numpy()
    (found,) = session.run(None, {"wave": wave.numpy()})
    assert float(np.abs(found - expected).max()) < 0.1 * float(expected.std())


def refused(model: nn.Module, kind: type[Exception], tmp_path, *words: str, **data: object) -> None:
    with pytest.raises(kind) as caught:
        fw.plan(model.eval(), **data, budget="size<=60%", workdir=tmp_path / "out", progress=False)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_forward_that_fixes_the_length_is_told_to_pad(tmp_path):
    class Recurrent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.cell = nn.GRU(3, 5, batch_first=True)

        def forward(self, wave: Tensor) -> Tensor:
            return self.cell(wave.transpose(1, 2))[0][:, -1]

    words = ["fixes the size of axis 2 of input `wave`", "pad all inputs to one length"]
    refused(Recurrent(), TraceError, tmp_path, *words, calib=waves(0, 6, 10, 16))


def test_a_branch_on_the_length_is_told_to_pad(tmp_path):
    class Branch(Listener):
        def forward(self, wave: Tensor) -> Tensor:
            x = F.relu(self.norm(self.first(wave)))
            return self.head(x.mean(2) if wave.shape[2] > 8 else x.amax(2))

    words = ["(samples of 3×6)", "pad all inputs to one length"]
    refused(Branch(), TraceError, tmp_path, *words, calib=waves(0, 6, 10, 16))


def test_lengths_that_only_the_judging_data_have_are_refused(tmp_path):
    words = ["samples of wave are 3×12 here and 3×10 elsewhere", "test, batch 0", "into calib too"]
    refused(Listener(), DataError, tmp_path, *words, calib=waves(0, 10), tune=waves(1, 10), test=waves(2, 12))


def test_a_length_beyond_the_models_table_is_named_with_its_batch(tmp_path):
    class Placed(Listener):
        def __init__(self) -> None:
            super().__init__()
            self.places = nn.Parameter(torch.zeros(1, 3, 20))

        def forward(self, wave: Tensor) -> Tensor:
            return super().forward(wave + self.places[:, :, : wave.shape[2]])

    words = ["12×3×21 float32", "test, batch 1"]
    data = {"calib": waves(0, 6, 10, 16), "tune": waves(1, 6), "test": waves(2, 8, 21)}
    refused(Placed(), DataError, tmp_path, *words, **data)
