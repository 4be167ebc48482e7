"""Serves a fake bucket until Ctrl-C, and prints the environment that sends clients here."""

from __future__ import annotations

import argparse
import signal
import sys
import threading

from datarax_dist.testing.fake_gcs import FakeGCS


def main() -> None:
    """Serves until Ctrl-C or SIGTERM, and prints the environment that sends clients here."""
    parser = argparse.ArgumentParser(prog="python -m datarax_dist.testing.fake_gcs")
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; default: a free one")
    parser.add_argument("--bucket", action="append", help="a bucket; default: bucket")
    options = parser.parse_args()
    stop = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM):  # also where a shell has it ignored
        signal.signal(number, lambda *_: stop.set())
    buckets = options.bucket or ["bucket"]
    with FakeGCS(buckets=buckets, port=options.port) as gcs:
        print("serving", *(f"gs://{name}" for name in buckets), file=sys.stderr)
        for key, value in gcs.environment().items():
            print(f"export {key}={value!r}", flush=True)
        stop.wait()


if __name__ == "__main__":
    main()
