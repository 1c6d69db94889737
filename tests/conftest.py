"""What holds for every test: one thread, no network, no terminal colours."""

import os

# Set before torch is imported, and inherited by the processes that tests start.
os.environ |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "NO_COLOR": "1"}
