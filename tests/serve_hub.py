#!/usr/bin/env python3
"""A Hub on this machine to try things out on, with the quick start's models: org/base, org/docs, org/code (tag v1).

    python tests/serve_hub.py &

It prints the line that leads programs of a shell to it. Pushed files are gone when it ends (by Ctrl-C, or `kill`).
"""

from __future__ import annotations

import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from hub_server import TOKEN, HubServer

QUICKSTART = Path(__file__).parents[1] / "recipes" / "quickstart"
CARD = b"---\nlicense: apache-2.0\nlibrary_name: transformers\n---\n\n# A model of the quick start\n"


def main() -> None:
    """Serve until the process is stopped."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    with TemporaryDirectory(prefix="hub-") as folder, HubServer(Path(folder) / "hub") as server:
        for name in ("base", "docs", "code"):
            files = {path.name: path.read_bytes() for path in (QUICKSTART / name).iterdir()}
            server.tag(f"org/{name}", "v1", server.create(f"org/{name}", {**files, "README.md": CARD}))
        print(f"export HF_ENDPOINT={server.url} HF_TOKEN={TOKEN} HF_HUB_DISABLE_XET=1", flush=True)
        try:
            signal.pause()
        except KeyboardInterrupt:
            print("ended")


if __name__ == "__main__":
    main()
