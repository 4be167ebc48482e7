"""A Google Cloud Storage in this process, that enforces what the real one promises and fails on
purpose.

    with FakeGCS(buckets=("bucket",)) as gcs:
        subprocess.run([...], env=os.environ | gcs.environment())
        gcs.fail("applied_then_dropped", kind="insert", name="COMMIT")
        gcs.deny("storage.objects.delete")

Or for any program, until Ctrl-C:

    python -m datarax_dist.testing.fake_gcs --port 9000 --bucket bucket

It speaks the JSON API: objects with preconditions, checksums, permissions and resumable uploads,
listings, batches, buckets. Only live versions of objects are kept. Each request is applied in one
step. `gcs_conformance` states what it must keep, as checks that run on a real bucket too.
"""

from datarax_dist.testing.fake_gcs.server import (
    FAULT_MODES,
    REQUEST_KINDS,
    FakeGCS,
    Fault,
    Request,
)
from datarax_dist.testing.fake_gcs.service import StoredObject

__all__ = ["FAULT_MODES", "REQUEST_KINDS", "FakeGCS", "Fault", "Request", "StoredObject"]
