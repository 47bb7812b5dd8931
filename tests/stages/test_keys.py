"""What tells one run from another."""

from functools import partial

from flyweight.stages.keys import code_of


def power(outputs, wanted, exponent=2, of=None):
    return (outputs - wanted).abs() ** exponent


def test_functions_of_one_name_are_told_by_their_code():
    assert len({code_of(lambda a, b: a - b), code_of(lambda a, b: a + b)}) == 2
    assert len({code_of(lambda a, b: a - b) for _ in range(3)}) == 1


def test_a_partial_is_told_by_its_function_and_its_plain_values_not_by_addresses():
    assert code_of(partial(power, exponent=3)) != code_of(partial(power, exponent=4)) != code_of(power)
    assert code_of(partial(power, of=object())) == code_of(partial(power, of=object()))
    assert code_of(partial(power, of=lambda a: a - 1)) != code_of(partial(power, of=lambda a: a + 1))
