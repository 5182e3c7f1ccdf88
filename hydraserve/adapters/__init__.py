"""Adapters on disk and in memory; torch and safetensors only."""
