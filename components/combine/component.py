from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def combine(methods: list[str], ratios: list[float], options: dict = {}) -> list[dict]:  # noqa: B006 (as Kubeflow wants)
    """Say which models a sweep makes.

    Args:
        methods: How to choose what stays, as a JSON list.
        ratios: Fractions to remove, as a JSON list.
        options: Options of each method by its name, as a JSON object.

    Returns:
        Output: Every method at every ratio, with its options.
    """
    from moeprune.steps.combine import combine as step

    return [choice._asdict() for choice in step(methods, ratios, options)]
