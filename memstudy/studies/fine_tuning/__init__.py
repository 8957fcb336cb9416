"""Ways of fine-tuning: what each holds in memory, which cards it fits, what it costs in quality."""
