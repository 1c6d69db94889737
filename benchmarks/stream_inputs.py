"""Merge models that a server sends by ranges, against a plain download of the same files, one after another.

    python benchmarks/stream_inputs.py                           # 2 models of 0.8 GB, about a minute
    python benchmarks/stream_inputs.py --size 0.05 --repeats 1   # a smoke test

The server is a process of this machine that speaks S3; each of its answers begins 50 ms after the request, and its link
carries so many bytes a second. A download is one request for each file and keeps nothing. `streamed` reads the models
with --stream-inputs, merges them and writes the result; `downloaded` brings them into the cache first. Numbers are MB
of the models a second, medians; the share is that of the download.
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from shutil import rmtree
from typing import Any
from urllib.request import urlopen

import torch
from safetensors.torch import save_file

BUCKET, LATENCY_S = "models", 0.05
SERVER = """
import sys
from pathlib import Path
from range_server import RangeServer
with RangeServer(Path(sys.argv[1]), float(sys.argv[2]), float(sys.argv[3]) or None) as server:
    print(server.url, flush=True)
    sys.stdin.read()
"""
METHODS = ("linear", "slerp", "ties")


def make_models(folder: Path, gigabytes: float) -> None:
    """Two models of matrices of 2048 columns in bfloat16, each in two shards."""
    rows = max(1, int(gigabytes * 1e9 / 2 / 2048 / 40))
    for seed, name in enumerate("ab"):
        (folder / BUCKET / name).mkdir(parents=True)
        draw = torch.Generator().manual_seed(seed)
        for half in range(2):
            tensors = {f"{half}.{i:02}": torch.randn(rows, 2048, generator=draw).bfloat16() for i in range(20)}
            save_file(tensors, folder / BUCKET / name / f"model-{half + 1:05}-of-00002.safetensors")
        names = {f"{half}.{i:02}": f"model-{half + 1:05}-of-00002.safetensors" for half in range(2) for i in range(20)}
        index = folder / BUCKET / name / "model.safetensors.index.json"
        index.write_text(str({"weight_map": names}).replace("'", '"'))


def download(url: str, files: list[str]) -> None:
    """Ask for each file, and keep nothing."""
    buffer = memoryview(bytearray(1 << 20))
    for file in files:
        with urlopen(f"{url}/{BUCKET}/{file}") as answer:
            while answer.readinto(buffer):
                pass


def merging(method: str, folder: Path, *, stream: bool) -> Callable[[], None]:
    """A merge of the models by a method, from nothing."""
    from mergekit_lfm import merge
    from mergekit_lfm.store.buckets.client import open_store

    refs = [f"s3://{BUCKET}/{name}" for name in "ab"]
    recipe: dict[str, Any] = {"merge_method": method, "models": [{"model": ref} for ref in refs]}
    recipe |= {"linear": {"parameters": {"weight": 0.5}}, "slerp": {"parameters": {"t": 0.5}}}.get(method, {})
    if method != "linear":
        recipe["base_model"] = refs[0]
    if method == "ties":
        recipe |= {"models": [{"model": refs[1]}], "parameters": {"weight": 1, "density": 0.3}}

    def run() -> None:
        rmtree(folder / "cache", ignore_errors=True)
        rmtree(folder / "out", ignore_errors=True)
        open_store.cache_clear()
        merge(recipe, folder / "out", stream_inputs=stream, card=False, compile="never")

    return run


def seconds_of(work: Callable[[], None], repeats: int) -> float:
    """The median of the times that the work takes."""
    times = []
    for _ in range(repeats):
        started = time.monotonic()
        work()
        times.append(time.monotonic() - started)
    return statistics.median(times)


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=float, default=0.8, help="GB of a model")
    parser.add_argument("--link", type=float, default=250.0, help="MB a second that the link carries, 0 for no limit")
    parser.add_argument("--repeats", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        folder = Path(place)
        make_models(folder, options.size)
        command = [sys.executable, "-c", SERVER, str(folder), str(LATENCY_S), str(options.link * 1e6)]
        pipe, here = subprocess.PIPE, {**os.environ, "PYTHONPATH": str(Path(__file__).parent)}
        with subprocess.Popen(command, stdin=pipe, stdout=pipe, env=here, text=True) as server:
            assert server.stdout is not None
            url = server.stdout.readline().strip()
            os.environ |= {"AWS_ENDPOINT_URL": url, "AWS_SKIP_SIGNATURE": "true", "AWS_REGION": "us-east-1"}
            os.environ["XDG_CACHE_HOME"] = str(folder / "cache")
            files = [path.relative_to(folder / BUCKET) for path in sorted((folder / BUCKET).rglob("*.safetensors"))]
            size = sum((folder / BUCKET / file).stat().st_size for file in files)
            merging("linear", folder, stream=True)()  # loads what is loaded once
            plain = seconds_of(lambda: download(url, list(map(str, files))), options.repeats)
            print(f"2 models of {size / 2e9:.2f} GB, {options.link:g} MB/s, {LATENCY_S * 1000:g} ms")
            print("| | MB/s | share |\n|---|--:|--:|")
            print(f"| download | {size / plain / 1e6:.0f} | 1.00 |", flush=True)
            for method in METHODS:
                for stream in (True, False):
                    took = seconds_of(merging(method, folder, stream=stream), options.repeats)
                    label = f"{method}, {'streamed' if stream else 'downloaded'}"
                    print(f"| {label} | {size / took / 1e6:.0f} | {plain / took:.2f} |", flush=True)
            server.kill()


if __name__ == "__main__":
    main()
