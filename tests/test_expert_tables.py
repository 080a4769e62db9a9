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


def test_a_stand_in_comes_before_any_other() -> None:
    table_VK = torch.tensor([[0, 3], [0, 1], [2, 5], [5, 0], [4, 4]])
    changed_VK = renumbered(table_VK, [1, 3, 5], 6, {0: 1, 2: 5})
    # 1, 3 and 5 are now 0, 1 and 2. In the third and second rows the token has its stand-in already; 4 has none.
    assert changed_VK[0].tolist() == [0, 1]
    assert changed_VK[1, 1] == 0
    assert changed_VK[1, 0] in (1, 2)
    assert changed_VK[2, 1] == 2
    assert changed_VK[2, 0] in (0, 1)
    assert changed_VK[3].tolist() == [2, 0]
    assert len(set(changed_VK[4].tolist())) == 2
