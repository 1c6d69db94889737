"""What holds for every test: one thread, no network, no terminal colours, and a cache of its own."""

import atexit
import os
import shutil
import tempfile

# Set before torch is imported, and inherited by the processes that tests start.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="cache-of-tests-")
atexit.register(shutil.rmtree, os.environ["XDG_CACHE_HOME"], ignore_errors=True)

from helpers_hub import hub, xet_hub  # noqa: E402, F401  # fixtures of several modules
