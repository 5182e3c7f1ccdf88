"""The HTTP side: our routes beside vLLM's."""
