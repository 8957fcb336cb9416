"""The part of a run's result that repeated runs share."""


def without_times(result):
    """The metrics without times, the curves and the data of a result: equal in every run of one config."""
    metrics = {name: value for name, value in result["metrics"].items() if not name.endswith(("_s", "_ms"))}
    return metrics, result["curves"], result["data"]
