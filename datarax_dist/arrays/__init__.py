"""Arrays through Orbax and TensorStore: the only package that imports Orbax.

`engine` saves and restores; `hooks` is what stands in for functions of Orbax while we save;
`leaves` says what of a tree is read, and how; `failures` makes the errors of both libraries one.
"""

from datarax_dist.arrays.engine import NEEDED, ORBAX_VERSION, OrbaxArrays
from datarax_dist.arrays.leaves import default_sharding, describe_foreign

__all__ = ["NEEDED", "ORBAX_VERSION", "OrbaxArrays", "default_sharding", "describe_foreign"]
