"""Before any test: one thread, shapes and types checked in every call of flyweight, a seed for each test.

The suite runs in several processes on few cores; more threads would only fight (and reorder sums).
"""

import os
import sys
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # children too

import jaxtyping

# Installed before the first import of the package: on the floors of tensors every annotation, shapes too, is enforced.
# Higher floors are left out: beartype cannot read their `np.ndarray[Any, Any]`, and what users pass them is checked by
# our own errors, which the tests want to see.
sys.path.insert(0, str(Path(__file__).parent))
# `methods.int8` takes a Protocol, which no runtime checker can check. `graph` passes nodes, hardly any tensors with named
# axes, and checking them in every call took a tenth of the suite's time.
ROOMS = ("numerics", "methods.channels", "methods.lowrank", "methods.pricing", "recover")
CHECKED = [f"flyweight.{room}" for room in ROOMS]
HOOK = jaxtyping.install_import_hook(CHECKED, "typecheck.checked")

import hypothesis  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
# The same examples each time, and no clock: a busy machine is no failing law
hypothesis.settings.register_profile("suite", deadline=None, derandomize=True, database=None)
hypothesis.settings.load_profile("suite")


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """The same random numbers whatever ran before, so that a test fails alone as it fails in the suite."""
    torch.manual_seed(0)
    np.random.seed(0)
