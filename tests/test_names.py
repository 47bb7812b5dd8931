"""`flyweight.compress` and `flyweight.data` are functions and modules: the public names are the functions, always."""

import subprocess
import sys

import pytest

CHECK = (
    "\nimport flyweight as fw\nfor name in ('compress', 'data', 'plan'):\n    assert callable(getattr(fw, name)), name"
)


@pytest.mark.parametrize(
    "before",
    [
        "",
        "import flyweight as fw\nfw.compress, fw.data",  # the second look must find what the first found
        "import flyweight.compress, flyweight.data",
        "from flyweight.compress import Result\nfrom flyweight.data import roles",
    ],
)
def test_a_verb_is_a_function_whatever_was_imported_before(before):
    done = subprocess.run([sys.executable, "-c", before + CHECK], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
