"""The settings of every test: one thread, no network, no terminal colours, a cache of its own, Triton's interpreter."""

import atexit
import os
import shutil
import tempfile

# Set before torch is imported, and inherited by the processes that tests start.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-of-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

import torch  # noqa: E402

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # kernels run on the processor, slowly; Triton reads this on import

from helpers_hub import hub, xet_hub  # noqa: E402, F401  # fixtures of several modules
