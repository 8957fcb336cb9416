"""Fine-tuning on GLUE's tasks."""
