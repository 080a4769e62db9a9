from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def spread(shards: int) -> list[int]:
    """Number the tasks that share some work.

    Args:
        shards: How many.

    Returns:
        Output: Their numbers, from 0.
    """
    if shards < 1:
        raise ValueError(f"nothing can be split into {shards} shards; 1 is the whole")
    return list(range(shards))
