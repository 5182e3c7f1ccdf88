"""HydraServe: many router-mixed LoRA adapters (HydraLoRA) over one base model, on vLLM."""
