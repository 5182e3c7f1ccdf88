"""HydraLoRA as a PEFT method."""
