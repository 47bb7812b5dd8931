"""A clock that measures for real but shortly: two processes of 60 ms a shape. No test asserts how fast something is.

A process that a test starts calls `shorten()` first; `tests/end_to_end/conftest.py` does so for those in this process.
"""

import functools

SHORT = {"processes": 2, "seconds_per_shape": 0.06}
FIRST = f"import sys; sys.path.insert(0, {__file__.rpartition('/')[0]!r}); import shortclock; shortclock.shorten(); "


def places():
    """The modules that time what was made, and the short clock they should have."""
    from flyweight.stages import again, make, weigh

    return (make, again), functools.partial(weigh.clocked, **SHORT)


def shorten():
    """For the rest of this process."""
    modules, clocked = places()
    for module in modules:
        module.clocked = clocked
