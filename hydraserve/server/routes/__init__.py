"""Our HTTP routes, beside vLLM's."""
