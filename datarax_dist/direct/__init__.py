"""Arrays straight from and to their files, without Orbax and TensorStore: where they are not
compressed, on a file system.
"""

from datarax_dist.direct.layout import (
    StoredArray,
    describe_array,
    describe_stored,
    find_description,
    parse_array,
    threads,
    value_key,
)
from datarax_dist.direct.reading import Buffer, Reading, Region, region
from datarax_dist.direct.writing import Writing

__all__ = [
    "Buffer",
    "Reading",
    "Region",
    "StoredArray",
    "Writing",
    "describe_array",
    "describe_stored",
    "find_description",
    "parse_array",
    "region",
    "threads",
    "value_key",
]
