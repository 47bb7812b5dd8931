"""A clock that measures for real but shortly: two processes of 60 ms a shape. No test asserts how fast something is.

A process that a test starts calls `shorten()` first; `tests/end_to_end/conftest.py` does so for those in this process.
"""

SHORT = {"processes": 2, "seconds_per_shape": 0.06}
FIRST = f"import sys; sys.path.insert(0, {__file__.rpartition('/')[0]!r}); import shortclock; shortclock.shorten(); "


def clocked_once(graph, files, data, shapes, runtime, threads, *_, deadline_s=None, **__):
    """In place of `weigh.clocked` and `clocked_until_decided`: what two short processes leave undecided stays so here."""
    from flyweight.stages import weigh

    return weigh.clocked(graph, files, data, shapes, runtime, threads, deadline_s=deadline_s, **SHORT)


def places():
    """What is replaced: (module, name, by what). Tables take a third of their usual time."""
    from flyweight.deploy import clock, latency
    from flyweight.stages import again, buy, choose, make

    name = "clocked_until_decided"
    return [
        (make, name, clocked_once),
        (again, name, clocked_once),
        (buy, "clocked", clocked_once),
        (choose, "ROUNDS", 1),
        (clock, "QUICK_S", clock.LEAST_S),
        (latency, "COPIES", 2),  # the fewest that scatter
        (latency, "BASE_PROCESSES", 2),
    ]


def shorten():
    """For the rest of this process."""
    for module, name, value in places():
        setattr(module, name, value)
