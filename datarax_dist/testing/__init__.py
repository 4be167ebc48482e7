"""What users need to test their own jobs: real local hosts, faults at named phases, hosts and
stores in memory, a bucket on this machine, and conformance suites.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from datarax_dist.testing.conformance import HOST_GROUP_CHECKS, STORE_CHECKS, check_host_group
from datarax_dist.testing.exactly_once import (
    ExactlyOnceError,
    ExactlyOnceReport,
    check_exactly_once,
)
from datarax_dist.testing.faults import PHASES, fail_at, kill_at
from datarax_dist.testing.launcher import HostError, HostResult, free_port, run_hosts
from datarax_dist.testing.simulated import (
    FakeClock,
    MemoryArrays,
    MemoryBucket,
    MemoryStore,
    SimulatedHosts,
)

if TYPE_CHECKING:
    from datarax_dist.testing.fake_gcs import FakeGCS

__all__ = [
    "HOST_GROUP_CHECKS",
    "STORE_CHECKS",
    "check_exactly_once",
    "check_host_group",
    "PHASES",
    "ExactlyOnceError",
    "ExactlyOnceReport",
    "FakeClock",
    "FakeGCS",
    "HostError",
    "HostResult",
    "MemoryArrays",
    "MemoryBucket",
    "MemoryStore",
    "SimulatedHosts",
    "fail_at",
    "free_port",
    "kill_at",
    "run_hosts",
]


def __getattr__(name: str) -> Any:
    if name == "FakeGCS":  # needs aiohttp, which `datarax-dist launch` does not
        from datarax_dist.testing.fake_gcs import FakeGCS

        return FakeGCS
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
