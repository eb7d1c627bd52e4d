"""The metrics of this node's processes, as Ray's exporter gives them to Prometheus."""

from __future__ import annotations

import urllib.request

import ray

SECONDS = 5.0
MEDIA_TYPE = "text/plain; version=0.0.4; charset=utf-8"


def node_metrics() -> bytes:
    """Prometheus' text format. Raises OSError where the exporter does not answer in time."""
    here = ray.get_runtime_context().get_node_id()
    (node,) = [node for node in ray.nodes() if node["NodeID"] == here]
    url = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    with urllib.request.urlopen(url, timeout=SECONDS) as answer:
        return answer.read()
