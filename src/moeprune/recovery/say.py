"""How much each token has to say in a fit.

A few tokens, such as the first of a text, make experts put out a hundred times what they usually do; in squares they
would be all that a fit hears. Yet what they put out is what attention rests on in every layer after it, so they cannot
go unheard either, as they would if every token's error counted relative to its output. A token's square is divided by
its output's norm, from the median upwards: half way between the two.

Axes: T tokens of a batch, padding included, H hidden size.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


def roots(output: Sequence[torch.Tensor], counts: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The square roots of the tokens' weights, float32 `[T]` for each batch; 0 for padding.

    Args:
        output: what the layer puts out, `[T, H]` for each batch.
        counts: bool `[T]` for each batch; False is padding.
    """
    square = [out_TH.float().square().sum(1) for out_TH in output]
    real = torch.cat([square_T[counts_T] for square_T, counts_T in zip(square, counts, strict=True)])
    if not len(real):
        return [torch.zeros_like(square_T) for square_T in square]
    usual = real.median().clamp_min(torch.finfo(torch.float32).tiny)
    return [weights(square_T, usual).sqrt() * counts_T for square_T, counts_T in zip(square, counts, strict=True)]


def weights(square_T: torch.Tensor, usual: torch.Tensor | float) -> torch.Tensor:
    """By what each token's squares are multiplied, `[T]`.

    Args:
        square_T: of what is put out.
        usual: the median of such squares.
    """
    return (usual / square_T.clamp_min(usual)).sqrt()
