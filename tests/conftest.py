"""Every test sees four CPU devices, before JAX is imported; and a bucket server, where it asks for
one.
"""

from __future__ import annotations

import itertools
import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=4"
sys.path.insert(0, str(Path(__file__).parent))

from datarax_dist.testing.fake_gcs import FakeGCS

# fsspec and gcsfs read their settings when they are imported, which the modules of tests do;
# the addresses are read when they are used.
os.environ |= {k: v for k, v in FakeGCS().environment().items() if not v.startswith("http:")}

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def _gcs_server() -> Iterator[FakeGCS]:
    """One for all tests of this process: gcsfs and TensorStore keep the address they see first."""
    with FakeGCS() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment().items():
            patch.setenv(name, value)
        yield server


@pytest.fixture
def gcs(_gcs_server: FakeGCS) -> Iterator[FakeGCS]:
    """A bucket server that works; what a test breaks is mended after it."""
    yield _gcs_server
    _gcs_server.heal()
    _gcs_server.allow_all()
    _gcs_server.latency_seconds = _gcs_server.clock_skew_seconds = 0.0
    _gcs_server.requests_per_second, _gcs_server.one_write_per_second = None, False
    _gcs_server.clear_requests()


@pytest.fixture
def bucket(gcs: FakeGCS) -> str:
    """The name of an empty bucket."""
    name = f"bucket-{next(_numbers)}"
    gcs.make_bucket(name)
    return name
