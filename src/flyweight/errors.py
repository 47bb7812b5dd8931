"""The error tree: every mistake a user can make has a type, an exit code and a way out.

    FlyweightError                101  our bug, if it reaches the user bare
    ├── UsageError                  2  options, budget text, unknown names
    │   └── BudgetError             2  a budget that cannot be read, is ambiguous or contradicts itself
    ├── UnsafeFileError             3  pickle, a damaged or foreign file or folder
    ├── ModelError                  4  the model or target is not supported
    │   └── TraceError              4  the model cannot become a graph (operator and place are named)
    ├── DataError                   5  batches that do not fit, labels where inputs belong, NaN
    ├── VerificationError           6  the artifact does not compute what the model computes
    ├── RuntimeMissing              7  a runtime or extra is not installed
    ├── ResourceError               8  disk, memory or time ran out; the run can be resumed
    ├── FolderInUse                 9  another run holds the folder
    ├── Interrupted               130  the user stopped the run; it can be resumed
    └── NumericsError             101  a factorisation failed although the input was checked

A message has up to four parts: what (the law that was broken, and what was got), where, why it matters, how to fix it.
"""

from __future__ import annotations


class FlyweightError(Exception):
    """Base of all errors that flyweight raises on purpose; `str(error)` is what the user reads."""

    exit_code = 101

    def __init__(self, what: str, *, where: str = "", why: str = "", fix: str = "") -> None:
        self.what, self.where, self.why, self.fix = what, where, why, fix
        super().__init__(what)

    def __str__(self) -> str:
        parts = [self.what]
        parts += [f"  where: {self.where}"] if self.where else []
        parts += [f"  why:   {self.why}"] if self.why else []
        parts += [f"  fix:   {self.fix}"] if self.fix else []
        return "\n".join(parts)

    def __reduce__(self) -> tuple[object, ...]:
        # keyword-only arguments do not survive the default reduction between processes
        return (_rebuild, (type(self), self.what, self.where, self.why, self.fix))


def _rebuild(kind: type[FlyweightError], what: str, where: str, why: str, fix: str) -> FlyweightError:
    return kind(what, where=where, why=why, fix=fix)


class UsageError(FlyweightError):
    """Options that do not fit together, unknown names, features that come with a later version."""

    exit_code = 2


class BudgetError(UsageError):
    """A budget that cannot be read, is ambiguous, or asks for two things at once."""


class UnsafeFileError(FlyweightError):
    """A file that could run code when read, is damaged, or is not what its name says."""

    exit_code = 3


class ModelError(FlyweightError):
    """A model or target that is not supported."""

    exit_code = 4


class TraceError(ModelError):
    """A model that cannot become a graph."""


class DataError(FlyweightError):
    """Data that does not fit the model or its role."""

    exit_code = 5


class VerificationError(FlyweightError):
    """The exported artifact does not compute what the compressed model computes; it was set aside."""

    exit_code = 6


class RuntimeMissing(FlyweightError):
    """A runtime or an extra is not installed; the message holds the install line."""

    exit_code = 7


class ResourceError(FlyweightError):
    """Disk, memory or time ran out; nothing half-written has a final name and the run can be resumed."""

    exit_code = 8


class FolderInUse(FlyweightError):
    """Another live run holds the folder."""

    exit_code = 9


class Interrupted(FlyweightError):
    """The user stopped the run; what was finished is saved."""

    exit_code = 130


class NumericsError(FlyweightError):
    """A factorisation failed although its input was checked: please report it."""
