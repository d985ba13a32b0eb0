"""A SLURM for the session, and a small checkout on it."""

from __future__ import annotations

from collections.abc import Iterator

import cluster as slurm
import pytest
from cluster_checkout import ClusterCheckout


@pytest.fixture(scope="session")
def cluster() -> Iterator[slurm.Cluster]:
    reason = slurm.why_not()
    if reason:
        pytest.skip(reason)
    with slurm.running() as started:
        yield started


@pytest.fixture(scope="session")
def home(cluster, tmp_path_factory) -> ClusterCheckout:
    made = ClusterCheckout(tmp_path_factory.mktemp("checkout"), cluster)
    made.save_base()
    return made
