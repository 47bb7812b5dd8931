"""Data roles: any re-iterable becomes checked, streamed batches that fit the model's signature."""

from flyweight.data.binding import Spec, bind_example, data
from flyweight.data.files import load_data, load_model
from flyweight.data.made import Synthetic
from flyweight.data.records import Batch, Batches, Roles, Shape, fingerprint, first_batch
from flyweight.data.roles import joined, learning, role, roles

__all__ = [
    "Batch",
    "Batches",
    "Roles",
    "Shape",
    "Spec",
    "Synthetic",
    "bind_example",
    "data",
    "fingerprint",
    "first_batch",
    "joined",
    "learning",
    "load_data",
    "load_model",
    "role",
    "roles",
]
