"""Starts a Ray cluster of two machines on this one, on loopback; says its address, and ends it with its input."""

from __future__ import annotations

import os
import sys

from ray.cluster_utils import Cluster

STORE_BYTES = 80 << 20


def main() -> None:
    # Ray prints where it is; the address alone goes to standard output.
    address_to = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    machine = {"num_cpus": 1, "object_store_memory": STORE_BYTES}
    cluster = Cluster(initialize_head=True, head_node_args={**machine, "include_dashboard": False})
    cluster.add_node(**machine)
    cluster.wait_for_nodes()
    address_to.write(f"{cluster.address}\n")
    address_to.flush()
    sys.stdin.read()
    cluster.shutdown()


if __name__ == "__main__":
    main()
