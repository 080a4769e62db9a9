"""Tables from token to expert, whatever they hold and whatever stays."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from moeprune.checkpoint.expert_tables import renumbered


@given(data=st.data())
def test_what_stays_is_kept_and_what_goes_is_replaced_by_another(data: st.DataObject) -> None:
    experts = data.draw(st.integers(2, 12))
    chosen = data.draw(st.integers(1, experts))
    keep = sorted(data.draw(st.sets(st.integers(0, experts - 1), min_size=chosen)))
    seed, tokens = data.draw(st.integers(0, 1000)), data.draw(st.integers(1, 30))
    order_VE = torch.rand((tokens, experts), generator=torch.Generator().manual_seed(seed)).argsort()
    table_VK = order_VE[:, :chosen].to(torch.int32)
    before = table_VK.clone()

    new_VK = renumbered(table_VK, keep, experts)

    assert torch.equal(table_VK, before)
    assert (new_VK.dtype, new_VK.shape) == (table_VK.dtype, table_VK.shape)
    for old, new in zip(table_VK.tolist(), new_VK.tolist(), strict=True):
        assert len(set(new)) == chosen
        assert all(0 <= number < len(keep) for number in new)
        assert all(keep[number] == expert for number, expert in zip(new, old, strict=True) if expert in keep)
