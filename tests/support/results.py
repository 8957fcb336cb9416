"""What of a run's result two runs of the same config share."""


def without_times(result):
    """What of a result must be the same each time."""
    metrics = {name: value for name, value in result["metrics"].items() if not name.endswith(("_s", "_ms"))}
    return metrics, result["curves"], result["data"]
