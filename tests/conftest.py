"""Shapes in signatures are checked at run time, in tests only."""

import os
import sys

import torch
from jaxtyping import install_import_hook

# Before anything of these packages is imported: the hook rewrites modules as they load.
assert not any(name.startswith("flowalign.core") for name in sys.modules)
install_import_hook(["flowalign.core", "flowalign.estimators"], "beartype.beartype")
# Workers that share the cores would wait for each other.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)
