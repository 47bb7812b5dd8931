"""Rows wait in one block; none is lost, and none is out of turn."""

from __future__ import annotations

import pytest
import torch

from flyweight.graph.waiting import LEAST, MOST, Waiting


@pytest.mark.parametrize(("columns", "room"), [(3, LEAST), (2000, 2000), (9000, MOST)])
@pytest.mark.parametrize("parts", [(5,), (1024, 1024), (3000, 1, 700), (9001, 4096)])
def test_rows_come_back_as_they_went_in(columns: int, room: int, parts: tuple[int, ...]):
    rows = torch.randn(sum(parts), 4)
    waiting, found = Waiting(columns), []
    for part in rows.split(list(parts)):
        for block in waiting.add(part):
            assert len(block) == room
            found.append(block.clone())
    left = waiting.rest()
    found += [] if left is None else [left]
    assert torch.equal(torch.cat(found), rows)
    assert waiting.rest() is None
