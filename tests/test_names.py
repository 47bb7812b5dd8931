"""`flyweight.compress` and `flyweight.data` are functions and modules: the public names are the functions, always."""

import os
import subprocess
import sys

import pytest

CHECK = (
    "\nimport flyweight as fw\nfor name in ('compress', 'data', 'plan'):\n    assert callable(getattr(fw, name)), name"
)
# A process that knows what flyweight needs, but nothing of flyweight, is forked for each case: most of the time is its imports.
FORKING = """
import os, sys, torch, torch.export, torch.onnx
import jinja2, matplotlib.figure, msgspec, onnx, onnxscript.optimizer, onnxscript.rewriter, scipy.optimize, scipy.sparse.csgraph
assert not [name for name in sys.modules if name.startswith("flyweight")]
for code in sys.argv[1:]:
    child = os.fork()
    if child == 0:
        exec(code)
        os._exit(0)
    if os.waitpid(child, 0)[1] != 0:
        sys.exit(f"failed after {code!r}")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="a child is forked for each case")
def test_a_verb_is_a_function_whatever_was_imported_before():
    before = [
        "",
        "import flyweight as fw\nfw.compress, fw.data",  # the second look must find what the first found
        "import flyweight.compress, flyweight.data",
        "from flyweight.compress import Result\nfrom flyweight.data import roles",
    ]
    done = subprocess.run(
        [sys.executable, "-c", FORKING, *(one + CHECK for one in before)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
