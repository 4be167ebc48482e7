"""Serves a fake bucket until Ctrl-C, and prints the environment that sends clients here."""

import argparse
import threading

from datarax_dist.testing.fake_gcs import FakeGCS


def main() -> None:
    """Serves until Ctrl-C, and prints the environment that sends clients here."""
    parser = argparse.ArgumentParser(prog="python -m datarax_dist.testing.fake_gcs")
    parser.add_argument("--port", type=int, default=0, help="on 127.0.0.1; default: a free one")
    parser.add_argument("--bucket", action="append", help="a bucket; default: bucket")
    options = parser.parse_args()
    with FakeGCS(buckets=options.bucket or ("bucket",), port=options.port) as gcs:
        for key, value in gcs.environment().items():
            print(f"export {key}={value!r}", flush=True)
        try:
            threading.Event().wait()
        except KeyboardInterrupt:
            pass


if __name__ == "__main__":
    main()
