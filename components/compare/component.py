from kfp import dsl

from ..image import IMAGE


@dsl.component(base_image=IMAGE, install_kfp_package=False)
def compare(
    reports: dsl.Input[list[dsl.Artifact]],
    report: dsl.Output[dsl.Artifact],
    page: dsl.Output[dsl.HTML],
) -> list[str]:
    """Put what several evaluations measured side by side, and find those that no other is smaller and better than.

    Args:
        reports: What was measured, from evaluate, of the same original on the same texts.

    Returns:
        report: All of it as one (JSON).
        page: The same as one HTML page, with the Pareto front of quality against size.
        Output: The names of those on the front, the smallest first.
    """
    from moeprune.steps import compare as step

    named = {f"{it.metadata['method']} {it.metadata['ratio']:g}": it.path for it in reports}
    compared = step.compare(named, report.path, page_out=page.path)
    front = [candidate.name for candidate in compared.front]
    report.metadata.update(domain=compared.domain, front=", ".join(front))
    return front
