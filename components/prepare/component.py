from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def prepare(method: str, baselines: list[str], shards: int = 1) -> list[dict]:
    """Tell calibration what to do.

    Args:
        method: How the experts that stay will be chosen.
        baselines: Other methods that will choose from the same statistics, as a JSON list.
        shards: How many calibrations share the data.

    Returns:
        Output: One entry for each calibration: the number of its shard, and the statistics that the methods need.
    """
    from moeprune.steps.prepare import prepare as step

    return [share._asdict() for share in step(method, baselines, shards=shards)]
