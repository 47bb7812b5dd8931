"""The laws that every compression method keeps, for ours and for a stranger's: `laws.check_method(method)`."""

from flyweight.testing.builtin import CHANNELS, INT8, LOWRANK
from flyweight.testing.laws import check_method
from flyweight.testing.subject import Method, Subject, small_network, subject

__all__ = ["CHANNELS", "INT8", "LOWRANK", "Method", "Subject", "check_method", "small_network", "subject"]
