"""What others published: their figures (``*.csv``), and their readings of GPUs' memory, predicted (`rows`)."""

# The GPU that each table of readings was taken on. Which one it was for "inference" is not published, and no rule of
# that time depends on it.
GPUS = {"ops": "A100-80GB", "inference": "V100-16GB", "bert": "V100-16GB"}
