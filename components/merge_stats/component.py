from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def merge_stats(
    parts: dsl.Input[list[dsl.Artifact]],
    stats: dsl.Output[dsl.Artifact],
) -> None:
    """Add up what the calibrations of several shards, or of several data sets, took down of the same model.

    Args:
        parts: The Stats, from calibrate.

    Returns:
        stats: Their sum: what one calibration over all the data would have taken down.
    """
    from moeprune.steps import calibrate as step

    merged = step.merge_stats([part.path for part in parts], stats.path)
    stats.metadata.update(tokens=merged.tokens, layers=len(merged.layers), shards=len(parts))
