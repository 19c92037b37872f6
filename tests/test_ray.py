"""A Ray cluster: the same bytes, also when one of its nodes is killed. Skipped where Ray is not installed."""

from __future__ import annotations

import threading
import time
from collections import Counter
from pathlib import Path

import pytest
from runs import KINDS, data, events, train, weights

from fxinvert.errors import DataError
from fxinvert.scheduling.executor import executor_named

ray = pytest.importorskip("ray", reason="Ray is not installed: pip install 'fxinvert[ray]'")


def test_a_cluster_that_reads_the_data_gives_the_same_bytes() -> None:
    """One that is started here finds the modules that are found here."""
    assert weights(train(lambda: data(), executor="ray", workers=2, sweeps=1)) == weights(train(sweeps=1))


@pytest.mark.slow
def test_every_kind_of_run_gives_the_same_bytes_on_a_cluster() -> None:
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False)
    try:
        for kind, settings in KINDS.items():
            once = settings | {"sweeps": 1}
            there = train(**once, executor="ray", workers=2)
            assert weights(there) == weights(train(**once)), kind
    finally:
        ray.shutdown()


def test_a_cluster_that_cannot_be_reached() -> None:
    with pytest.raises(DataError, match=r"127\.0\.0\.1:1 cannot be reached"):
        train(executor=executor_named("ray", address="127.0.0.1:1"))


@pytest.mark.slow
def test_killing_a_node_changes_nothing(tmp_path: Path) -> None:
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    node = cluster.add_node(num_cpus=1)

    def kill() -> None:
        while not events(tmp_path, "task"):
            time.sleep(0.02)
        cluster.remove_node(node, allow_graceful=False)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    try:
        executor = executor_named("ray", 2, cluster.address)
        result = train(data(640), chunk=1, executor=executor, run_directory=tmp_path, sweeps=1, retries=5)
        killer.join()
    finally:
        cluster.shutdown()
    assert weights(result) == weights(train(data(640), chunk=1, sweeps=1))
    assert set(Counter(line["key"] for line in events(tmp_path, "task")).values()) == {1}
