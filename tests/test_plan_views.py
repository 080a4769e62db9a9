"""Plans for people: what a plan says is shown, compared, drawn and exported, and fits a terminal of 80 columns."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from matplotlib.image import imread
from matplotlib.patches import Rectangle
from rich.console import Console

from moeprune.errors import InputError
from moeprune.plan import LayerPlan, Plan, Recovery, Sparsity
from moeprune.plan_views import wording
from moeprune.plan_views.diff import diff, overlap
from moeprune.plan_views.export import FORMATS, export
from moeprune.plan_views.figure import figure
from moeprune.plan_views.show import WIDTH, one_layer, overview

Run = Callable[..., tuple[int, str, str]]
LAYER = "model.layers.{}.mlp.experts".format


def make(layers: list[LayerPlan], **changes: Any) -> Plan:
    fields: dict[str, Any] = {"method": "reap", "options": {}, "ratio": 0.5, "model": "f" * 64, "data": "0" * 32}
    return Plan(**fields | changes, layers={LAYER(place): layer for place, layer in enumerate(layers)})


def text(shown: Any) -> str:
    console = Console(width=WIDTH)
    with console.capture() as captured:
        console.print(shown, highlight=False)
    return captured.get()


scores = st.floats(-1e9, 1e9)


@st.composite
def layer_plans(draw: st.DrawFn, kinds: Sequence[str] = ("plain", "condensed", "changed")) -> LayerPlan:
    experts = draw(st.sampled_from([2, 8, 24, 60, 256]))
    keep = sorted(draw(st.sets(st.integers(0, experts - 1), min_size=min(2, experts))))
    gone = [expert for expert in range(experts) if expert not in keep]
    fields: dict[str, Any] = {}
    kind = draw(st.sampled_from(kinds))
    if kind == "condensed":
        fields["condensed"] = {expert: draw(st.floats(0, 1)) for expert in keep}
    elif kind == "changed":
        merged = draw(st.sets(st.sampled_from(keep)))
        fields["merged"] = {expert: {expert: 0.25, (expert + 1) % experts: 0.75} for expert in merged}
        fields["constant"] = sorted(draw(st.sets(st.sampled_from(gone)))) if gone else []
    if draw(st.booleans()):
        fields["scores"] = draw(st.lists(scores, min_size=experts, max_size=experts))
    return LayerPlan(experts=experts, top_k=2, keep=keep, **fields)


any_layers = st.lists(layer_plans(), min_size=1, max_size=3) | st.lists(layer_plans(["plain"]), min_size=1, max_size=3)


class TestShow:
    @settings(max_examples=60, deadline=None)
    @given(layers=any_layers, score=st.sampled_from(["", "what it is worth"]))
    def test_any_plan_fits_80_columns(self, layers: list[LayerPlan], score: str) -> None:
        plan = make(layers, score=score)
        for shown in (overview(plan), *(one_layer(plan, name) for name in plan.layers)):
            assert all(len(line) <= WIDTH for line in text(shown).splitlines())
            assert "\N{HORIZONTAL ELLIPSIS}" not in text(shown), "something was cut off to make it fit"
        rows = [line.split() for line in text(overview(plan)).splitlines()]
        for place, layer in enumerate(layers):
            assert [str(place), f"{len(layer.keep)}/{layer.experts}"] in [row[:2] for row in rows]

    def test_each_layer_has_a_row(self) -> None:
        layers = [
            LayerPlan(experts=8, top_k=2, keep=[0, 1, 6], scores=[9, 8, 1, 2, 3, 4, 7, 5]),
            LayerPlan(experts=8, top_k=2, keep=[2, 3, 4, 5], scores=[4, 0, 1, 1, 1, 1, 0, 0]),
        ]
        said = text(overview(make(layers, score="what it is worth", options={"seed": 3})))
        assert "reap, ratio 0.5; seed=3" in said
        assert "7 of 16 routed experts stay (56.2% go), 3 to 4 in each of 2 layers" in said
        rows = [line.split() for line in said.splitlines() if "/8" in line]
        # Lowest kept: 6 with 7; highest dropped: 7 with 5. In the other layer something else than scores decided.
        assert rows == [
            ["0", "3/8", "██····█·", "6", "7", "7", "5", "+28.6%"],
            ["1", "4/8", "··████··", "2", "1", "0", "4", "-75.0%"],
        ]
        assert "what it is worth" in said

    def test_what_else_becomes_of_experts_is_said(self) -> None:
        layers = [
            LayerPlan(
                experts=8,
                top_k=2,
                keep=[0, 1],
                merged={1: {1: 0.6, 2: 0.4}},
                merged_router=True,
                constant=[4, 7],
                stands_for={0: [3, 5, 6]},
            ),
            LayerPlan(experts=8, top_k=2, keep=[5], condensed={5: 0.125}, shared_scale=0.5),
        ]
        plan = make(
            layers,
            sparsity=Sparsity(pattern="2:4", score="wanda"),
            recovery=Recovery(router=True),
        )
        said = text(overview(plan))
        assert "█+··o··o 1 merged, 1 stand for others, 2 constant" in " ".join(said.split())
        assert "condensed" in said
        joined = " ".join(said.split())
        assert "2 of every 4 weights inside the experts that stay become zero, the lowest by wanda" in joined
        assert "what stays is fitted, after the cut, to what the original puts out (router=True" in joined
        first, second = (text(one_layer(plan, name)) for name in plan.layers)
        assert "1 becomes 0.6 of 1 + 0.4 of 2, its router row, too" in first
        assert "0 for 3, 5-6" in first
        assert "4, 7, by their mean output" in first
        assert "no router; for every token 5 times 0.125" in second
        assert "the shared experts times 0.5" in second

    def test_a_layer_in_full(self) -> None:
        layer = LayerPlan(experts=256, top_k=8, keep=list(range(0, 256, 2)), scores=[float(e) for e in range(256)])
        said = text(one_layer(make([layer]), LAYER(0)))
        ranked = [line.split() for line in said.split("by score")[1].splitlines()[1:]]
        entries = [tuple(row[start : start + 3]) for row in ranked for start in range(0, len(row), 3)]
        assert sorted(entries) == sorted((str(e), str(e), "goes" if e % 2 else "stays") for e in range(256))
        assert [row[0] for row in ranked[:3]] == ["255", "254", "253"]

    def test_many_experts_share_a_cell(self) -> None:
        keep = [*range(16), 16, *range(24, 31), *range(248, 256)]
        row = next(
            line
            for line in text(overview(make([LayerPlan(experts=256, top_k=2, keep=keep)]))).splitlines()
            if "/256" in line
        )
        drawn = row.split()[2]
        assert len(drawn) == 32
        assert (drawn[:5], drawn[-1]) == ("██▁▇·", "█")


class TestDiff:
    one = make([LayerPlan(experts=8, top_k=2, keep=[0, 1, 2, 3]), LayerPlan(experts=8, top_k=2, keep=[4, 5])])
    other = make(
        [
            LayerPlan(experts=8, top_k=2, keep=[0, 1, 2, 7]),
            LayerPlan(experts=8, top_k=2, keep=[4, 5], scores=[1.0] * 8),
        ],
        data="1" * 32,
        method="frequency",
    )

    def test_what_one_keeps_and_the_other_not(self) -> None:
        said = text(diff(self.one, self.other))
        assert "A: reap" in said
        assert "B: frequency" in said
        assert "the same model from different data" in said
        assert "both keep 5 of the 7 experts" in said
        assert ["0", "4", "4", "3", "60%", "3", "7"] in [line.split() for line in said.splitlines()]
        assert "1 of 2 layers are decided alike" in said

    def test_other_layers_and_other_ends(self) -> None:
        merged = make([LayerPlan(experts=8, top_k=2, keep=[0, 1, 2, 3], merged={0: {0: 0.5, 4: 0.5}})], model="a" * 64)
        said = text(diff(self.one, merged))
        assert "different models" in said
        assert f"only A has 1 layers, {LAYER(1)} first" in said
        assert ["0", "4", "4", "4", "100%", "none", "none", "merged"] in [line.split() for line in said.splitlines()]

    @settings(max_examples=50, deadline=None)
    @given(one=layer_plans(), other=layer_plans())
    def test_overlap_is_a_fraction_and_both_ways_the_same(self, one: LayerPlan, other: LayerPlan) -> None:
        assert 0 <= overlap(one, other) == overlap(other, one) <= 1
        assert (overlap(one, other) == 1) == (one.keep == other.keep)
        said = text(diff(make([one]), make([other])))
        assert all(len(line) <= WIDTH for line in said.splitlines())
        assert "\N{HORIZONTAL ELLIPSIS}" not in said, "something was cut off to make it fit"


class TestExport:
    plan = make([]).model_copy(
        update={
            "layers": {
                LAYER(3): LayerPlan(experts=4, top_k=2, keep=[0, 3]),
                LAYER(11): LayerPlan(experts=4, top_k=2, keep=[0, 1, 2]),
            }
        }
    )

    def test_layers_go_by_their_numbers(self) -> None:
        assert json.loads(export(self.plan, "json")) == {"3": [1, 2], "11": [3]}
        profile = json.loads(export(self.plan, "vllm"))
        assert profile == {"version": 1, "pruned_experts": [[3, 1], [3, 2], [11, 3]]}

    @pytest.mark.parametrize("form", FORMATS)
    @pytest.mark.parametrize(
        ("change", "said"),
        [
            ({"sparsity": Sparsity(pattern="0.5", score="wanda")}, "makes weights zero"),
            ({"recovery": Recovery(router=False)}, "fits the experts that stay"),
            ({"layers": {"3": LayerPlan(experts=4, top_k=2, keep=[0, 3], constant=[1])}}, "puts mean outputs"),
            ({"layers": {"3": LayerPlan(experts=4, top_k=2, keep=[0, 3], merged={0: {1: 1.0}})}}, "merges experts"),
            ({"layers": {"3": LayerPlan(experts=4, top_k=2, keep=[0], condensed={0: 1.0})}}, "condenses layers"),
        ],
    )
    def test_what_a_list_cannot_say_is_refused(self, form: str, change: dict[str, Any], said: str) -> None:
        with pytest.raises(InputError, match=said):
            export(self.plan.model_copy(update=change), form)

    def test_engines_that_read_no_list_are_named(self) -> None:
        for form, said in (
            ("llama.cpp", "convert_hf_to_gguf"),
            ("sglang", "serve the checkpoint"),
            ("x", "known: json"),
        ):
            with pytest.raises(InputError, match=said):
                export(self.plan, form)


class TestFigure:
    def test_what_is_drawn(self) -> None:
        layers = [
            LayerPlan(experts=8, top_k=2, keep=[0, 1, 6], scores=[9, 8, 1, 2, 3, 4, 7, 5], constant=[2]),
            LayerPlan(experts=8, top_k=2, keep=[5], condensed={5: 0.5}),
        ]
        drawn = figure(make(layers))
        experts, counts = drawn.axes
        shade_LE = np.asarray(experts.images[0].get_array())
        assert shade_LE[0].argsort().tolist() == [2, 3, 4, 5, 7, 6, 1, 0]
        assert [bar.get_width() for bar in counts.patches if isinstance(bar, Rectangle)] == [3, 1]
        struck = experts.lines[0].get_xydata()
        assert isinstance(struck, np.ndarray)
        ends = struck[np.isfinite(struck[:, 0])].round().astype(int).tolist()
        assert ends == [[2, 0], [5, 0], [7, 0], [7, 0], [0, 1], [4, 1], [6, 1], [7, 1]]
        labels = {entry.get_text() for entry in drawn.legends[0].get_texts()}
        assert labels == {"goes", "its mean output stays", "condensed: no router"}

    def test_of_many_experts_and_layers(self) -> None:
        figure(make([LayerPlan(experts=256, top_k=8, keep=list(range(128)))] * 60))


@pytest.mark.parametrize(
    ("value", "said"),
    [(0, "0"), (12, "12"), (12345.6, "12346"), (0.1234567, "0.123"), (3.14159, "3.14"), (1.5e7, "1.5e+07"),
     (2.34e-5, "2.3e-05"), (float("inf"), "inf"), (-0.5, "-0.5")],
)  # fmt: skip
def test_numbers_are_short(value: float, said: str) -> None:
    assert wording.number(value) == said


class TestCommands:
    @pytest.fixture
    def plan(self, tmp_path: Path) -> Path:
        layer = LayerPlan(experts=8, top_k=2, keep=[0, 1, 6], scores=[9, 8, 1, 2, 3, 4, 7, 5])
        make([layer] * 3).save(tmp_path / "plan.json")
        return tmp_path / "plan.json"

    def test_they_show_compare_export_and_draw(self, plan: Path, tmp_path: Path, run_cli: Run) -> None:
        assert "9 of 24 routed experts stay" in run_cli("plan", "show", plan)[1]
        assert "0-1, 6" in run_cli("plan", "show", plan, "--layer", 2)[1]
        assert "3 of 3 layers are decided alike" in run_cli("plan", "diff", plan, plan)[1]
        assert "100%" in run_cli("plan", "diff", plan, plan, "--layer", LAYER(1))[1]
        assert run_cli("plan", "export", plan, "--format", "vllm", "--out", tmp_path / "out.json")[0] == 0
        assert json.loads((tmp_path / "out.json").read_text())["pruned_experts"][:2] == [[0, 2], [0, 3]]
        assert run_cli("plan", "figure", plan, "--out", tmp_path / "plan.png")[0] == 0
        assert imread(tmp_path / "plan.png").ndim == 3

    @pytest.mark.parametrize(
        ("arguments", "said"),
        [
            (["show", "{plan}", "--layer", "7"], "no layer '7'; its layers: 0, 1, 2"),
            (["show", "{out}"], "there is no file"),
            (["diff", "{plan}", "{plan}", "--layer", "x"], "no layer 'x'"),
            (["export", "{plan}", "--format", "gguf", "--out", "{out}"], "unknown format 'gguf'; known: json, vllm"),
            (["figure", "{plan}", "--out", "{out}.doc"], "ends with its format, one of"),
            (["figure", "{plan}", "--out", "{out}"], "ends with its format, one of"),
        ],
    )
    def test_wrong_use_is_a_sentence(
        self, arguments: list[str], said: str, plan: Path, tmp_path: Path, run_cli: Run
    ) -> None:
        given = [argument.format(plan=plan, out=tmp_path / "out") for argument in arguments]
        code, _, err = run_cli("plan", *given)
        assert (code, err.count("\n")) == (1, 1), err
        assert said in err
        assert [path.name for path in tmp_path.iterdir()] == ["plan.json"]
