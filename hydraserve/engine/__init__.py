"""The vLLM engine, extended. The only importer of vllm's internals."""
