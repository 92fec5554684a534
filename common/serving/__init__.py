"""Hardware catalogue, latency models and the cluster simulator."""
