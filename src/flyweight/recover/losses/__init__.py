"""What a student is taught by: one file, one loss, one function of the file's name; the folder is the registry.

    from flyweight.recover import losses
    loss = losses.soft_labels(student(x), teacher(x), temperature=2.0) + losses.hint(inner, inner_of_teacher)

A loss takes what the student and the teacher (which gets no gradient) computed of the same batch, samples in dimension 0,
and gives one number that is 0 where both agree: a mean over samples, in the precision of the student. All fit into a loop of
your own. They raise DataError for shapes that do not go together. Files whose names begin with `_` are what they share.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Callable, Mapping

from torch import Tensor

from flyweight.recover.losses.attention import attention
from flyweight.recover.losses.attribution import attribution
from flyweight.recover.losses.bernoulli import bernoulli
from flyweight.recover.losses.cosine import cosine
from flyweight.recover.losses.hint import hint
from flyweight.recover.losses.relations import relations
from flyweight.recover.losses.soft_labels import soft_labels
from flyweight.recover.losses.value_relations import value_relations

__all__ = [
    "ALL",
    "Loss",
    "attention",
    "attribution",
    "bernoulli",
    "cosine",
    "hint",
    "relations",
    "soft_labels",
    "value_relations",
]

Loss = Callable[..., Tensor]


def _found() -> dict[str, Loss]:
    names = sorted(one.name for one in pkgutil.iter_modules(__path__) if not one.name.startswith("_"))
    return {name: getattr(importlib.import_module(f"{__name__}.{name}"), name) for name in names}


ALL: Mapping[str, Loss] = _found()
