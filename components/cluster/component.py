from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def cluster(
    stats: dsl.Input[dsl.Artifact],
    clusters: dsl.Output[dsl.Artifact],
    similarity: str = "outputs",
    algorithm: str = "ward",
    clusters_per_layer: str = "published",
    model: str = "",
    trust_remote_code: bool = False,
) -> None:
    """Group the experts of each layer by how alike they are.

    Args:
        stats: What the experts do, from calibrate.
        similarity: Which experts are alike: those with the same outputs, with the same parameters (outputs,
            parameters), or both.
        algorithm: How to cluster: ward, average or k-means.
        clusters_per_layer: How many clusters: a number, published (12 for every 64 experts), or auto (for each layer
            what suits it best, by the silhouette).
        model: The original model; it is read only for the similarity of parameters.
        trust_remote_code: Run modelling code that the model brings along.

    Returns:
        clusters: Per layer, which experts belong together and how similar they are (safetensors).
    """
    from moeprune.steps import cluster as step

    made = step.cluster(
        stats.path,
        clusters.path,
        similarity=similarity,
        algorithm=algorithm,
        clusters_per_layer=clusters_per_layer,
        model=model or None,
        trust_remote_code=trust_remote_code,
    )
    clusters.metadata.update(
        similarity=similarity,
        algorithm=algorithm,
        clusters_per_layer=made.counts,
        layers=len(made.layers),
    )
