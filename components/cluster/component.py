from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def cluster(
    stats: dsl.Input[dsl.Artifact],
    clusters: dsl.Output[dsl.Artifact],
    algorithm: str = "ward",
    clusters_per_layer: int = 0,
) -> None:
    """Group the experts of each layer by what they put out.

    Args:
        stats: What the experts do, from calibrate.
        algorithm: How to cluster: ward, or one of the others that `moeprune cluster --help` lists.
        clusters_per_layer: How many clusters; 0 means 12 for every 64 experts.

    Returns:
        clusters: Per layer, which experts belong together and how similar they are (safetensors).
    """
    from moeprune.steps import cluster as step

    made = step.cluster(stats.path, clusters.path, algorithm=algorithm, clusters_per_layer=clusters_per_layer)
    clusters.metadata.update(
        algorithm=algorithm,
        clusters_per_layer=made.clusters_per_layer,
        layers=len(made.layers),
    )
