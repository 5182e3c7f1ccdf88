"""What /metrics shows of a server, beside vLLM's own series: filled in (`series`), named (`labels`), and derived
(`collapse`, `gateway`). The list of the series is `hydraserve.metrics`."""
