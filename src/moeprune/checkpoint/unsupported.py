"""What cannot be pruned, and why: the one list. Whatever is not here is expected to work."""

from __future__ import annotations

from transformers import PretrainedConfig

from moeprune.errors import InputError

# How weights may be quantised: transformers can undo these on any device, which calibration needs, and each expert's
# numbers lie apart from the others'.
READABLE_QUANTISATIONS = frozenset({"fp8", "mxfp4"})

UNREADABLE_QUANTISATION = (
    "its weights are quantised as {method}, which transformers cannot undo on every device; "
    "prune the unquantised original and quantise the result (readable are: {readable})"
)
PRUNED_UNEVENLY = (
    "its layers have {counts} experts, which only its own modelling file knows; "
    "calibrate and prune the original that it was made from"
)
CONDENSED = (
    "some of its layers are condensed, which only its own modelling file knows; calibrate and prune the original that "
    "it was made from"
)
UNEVEN = "its layers have {counts} experts; moeprune reads models whose layers have the same number"
SHARED_ROUTER = "{tensor} belongs to the experts of several layers at once"
UNKNOWN_COUNT = "no number in its config sets how many routed experts there are"
UNKNOWN_GROWTH = "the shape of {tensor} depends on the number of experts in a way that moeprune does not know"
UNKNOWN_PROJECTION = "{tensor} holds its experts' weights in an order that moeprune does not know"
QUANTISED_MERGED = (
    "its weights are quantised as {method}, of which no means can be taken; merge the unquantised original, and "
    "quantise the result"
)
QUANTISED_CONSTANTS = (
    "its weights are quantised as {method}, and the modules that compute with these know of no constants; put them "
    "into the unquantised original"
)
QUANTISED_CONDENSED = (
    "its weights are quantised as {method}, which no weighted sum of them would be; condense layers of the unquantised "
    "original, and quantise the result"
)
QUANTISED_SPARSELY = (
    "its weights are quantised as {method}, in which single weights cannot be zeroed; make the unquantised original "
    "sparse, and quantise the result"
)


def refusal(config: PretrainedConfig, reason: str) -> InputError:
    """The error that tells a user why this model cannot be pruned."""
    return InputError(f"the model ({config.model_type}) cannot be pruned: {reason}")


def refuse_quantisation(config: PretrainedConfig) -> None:
    """Raise InputError where the weights are quantised in a way that cannot be undone everywhere."""
    method = quantisation(config)
    if method and method not in READABLE_QUANTISATIONS:
        readable = ", ".join(sorted(READABLE_QUANTISATIONS))
        raise refusal(config, UNREADABLE_QUANTISATION.format(method=method, readable=readable))


def refuse_to_sparsify_quantised(config: PretrainedConfig) -> None:
    """Raise InputError where the weights are quantised at all, however well that can be undone."""
    if method := quantisation(config):
        raise refusal(config, QUANTISED_SPARSELY.format(method=method))


def quantisation(config: PretrainedConfig) -> str | None:
    """The method by which the stored weights are quantised, as the config names it; None where they are not."""
    stated = getattr(config, "quantization_config", None)
    if stated is None:
        return None
    return str(stated["quant_method"] if isinstance(stated, dict) else stated.quant_method.value)
