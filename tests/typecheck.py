"""The type checker that conftest puts on the floors of tensors: beartype, which takes an int where a float is asked."""

from beartype import BeartypeConf, beartype

checked = beartype(conf=BeartypeConf(is_pep484_tower=True))
