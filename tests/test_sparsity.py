"""Zeros inside experts: exactly as many as asked for, where the score says, in whatever form a family stores them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import combinations
from pathlib import Path
from typing import Any

import families
import numpy as np
import pytest
import tiny
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masking import experts_modules
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from moeprune.checkpoint.card import ZEROS_TAKE_ROOM
from moeprune.checkpoint.files import SINGLE_NAME
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.projections import find_projections
from moeprune.checkpoint.surgery import apply, cut
from moeprune.checkpoint.targets import LocalTarget
from moeprune.errors import InputError
from moeprune.methods import make_plan, statistics_for
from moeprune.plan import LayerPlan, Plan, Recovery, Sparsity
from moeprune.sparsity import compared, zeros
from moeprune.statistics import ExactSum, Stats
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.passes import InMemoryPass
from moeprune.steps.prune import prune

SCORES = ["moe-pruner", "wanda", "magnitude"]
ENERGIES: dict[str, tuple[str, ...]] = {
    "moe-pruner": ("gated_input_square", "gated_hidden_square"),
    "wanda": ("input_square", "hidden_square"),
    "magnitude": (),
}

# A tensor per expert under two kinds of names; fused; fused, interleaved, input axis first and with biases; fused and
# input axis first; without a gate. The experts are as wide as the model: no axis can be told by its length.
LAYOUTS: dict[str, Callable[[], PretrainedConfig]] = {
    "qwen2_moe": lambda: families.tiny_config("qwen2_moe", moe_intermediate_size=32),
    "mixtral": lambda: families.tiny_config("mixtral", intermediate_size=32),
    "granitemoe": lambda: families.tiny_config("granitemoe", intermediate_size=32),
    "gpt_oss": lambda: families.tiny_config("gpt_oss", intermediate_size=32),
    "aria_text": lambda: families.tiny_config("aria_text", intermediate_size=32),
    "nemotron_h": lambda: families.tiny_config("nemotron_h", moe_intermediate_size=32),
}
PLANS = {
    "qwen2_moe": [("moe-pruner", "0.5"), ("moe-pruner", "2:4"), ("wanda", "0.37"), ("magnitude", "4:8")],
    "gpt_oss": [("moe-pruner", "0.5"), ("wanda", "1:4")],
}
CASES = [(family, *case) for family in LAYOUTS for case in PLANS.get(family, [("moe-pruner", "0.5")])]


@dataclass
class Original:
    checkpoint: Checkpoint
    stats: Stats


def calibrated(directory: Path, model: PreTrainedModel, blocks: int = 6) -> Original:
    checkpoint = Checkpoint(directory)
    run = InMemoryPass(model)
    stats = calibrate(run, checkpoint.fingerprint, tiny.token_ids(5, blocks), statistics=statistics_for(SCORES))
    return Original(checkpoint, stats)


@pytest.fixture(scope="module")
def original_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Original]:
    """A checkpoint of a family and what calibration saw of it; made once."""
    root, made = tmp_path_factory.mktemp("originals"), dict[str, Original]()

    def get(family: str) -> Original:
        if family not in made:
            model = tiny.build(LAYOUTS[family]())
            for parameter in model.parameters():  # biases, which some begin as zeros, must be seen to stay
                parameter.data += 0.1 * torch.randn(parameter.shape)
            model.save_pretrained(root / family)
            made[family] = calibrated(root / family, model)
        return made[family]

    return get


def plan_of(original: Original, score: Any, pattern: str) -> Plan:
    plan = make_plan(score, 0.5, original.stats)
    return plan.model_copy(update={"sparsity": Sparsity(pattern=pattern, score=score)})


def load(directory: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()


def weights_by_row(module: Any, parameter: str) -> np.ndarray[Any, Any]:
    """The weights of a projection as its contract says that they lie: `[experts, outputs, features]`."""
    weight = getattr(module, parameter).detach()
    return (weight.mT if module.is_transposed else weight).double().numpy()


def reference_zeros(
    weight_EOI: np.ndarray[Any, Any], energy_EI: np.ndarray[Any, Any] | None, pattern: str
) -> np.ndarray[Any, Any]:
    """Row by row, by sorting; among equals the first."""
    mask_EOI = np.zeros(weight_EOI.shape, dtype=bool)
    features = weight_EOI.shape[2]
    count, of = map(int, pattern.split(":")) if ":" in pattern else (int(float(pattern) * features), features)
    for expert, output in np.ndindex(*weight_EOI.shape[:2]):
        score_I = np.abs(weight_EOI[expert, output])
        if energy_EI is not None and energy_EI[expert].any():
            score_I = score_I * np.sqrt(energy_EI[expert])
        for start in range(0, features, of):
            mask_EOI[expert, output, start + np.argsort(score_I[start : start + of], kind="stable")[:count]] = True
    return mask_EOI


@pytest.mark.parametrize(("family", "score", "pattern"), CASES)
def test_the_lowest_scores_are_zero_and_all_else_is_as_it_was(
    family: str, score: Any, pattern: str, original_of: Callable[[str], Original], tmp_path: Path
) -> None:
    original = original_of(family)
    source = original.checkpoint.directory
    sparse = apply(original.checkpoint, plan_of(original, score, pattern), tmp_path / "sparse", stats=original.stats)
    before, after = load(source), load(sparse.directory)
    projections = set()
    for name, module in experts_modules(before).items():
        first = "gate_up_proj" if module.has_gate else "up_proj"
        for place, parameter in enumerate((first, "down_proj")):
            projections.add(f"{name}.{parameter}")
            energy = original.stats.layers[name].sum(ENERGIES[score][place]).numpy() if ENERGIES[score] else None
            whole_EOI = weights_by_row(module, parameter)
            expected = np.where(reference_zeros(whole_EOI, energy, pattern), 0, whole_EOI)
            assert (expected == 0).any()
            assert np.array_equal(weights_by_row(after.get_submodule(name), parameter), expected), (name, parameter)
    assert len(projections) >= 4
    for name, parameter in before.named_parameters():
        if name not in projections:
            assert torch.equal(parameter, after.get_parameter(name)), name
    assert not list(sparse.directory.glob("*.py"))


def test_what_stays_keeps_its_bits(tmp_path: Path) -> None:
    source = tiny.write(tmp_path / "source", LAYOUTS["qwen2_moe"](), dtype="bfloat16")
    original = calibrated(source, load(source))
    apply(original.checkpoint, plan_of(original, "wanda", "0.5"), tmp_path / "sparse", stats=original.stats)
    before, after = (load_file(each / "model.safetensors") for each in (source, tmp_path / "sparse"))
    changed = 0
    for name, tensor in after.items():
        assert tensor.dtype == before[name].dtype
        same = tensor.view(torch.int16) == before[name].view(torch.int16)
        assert not tensor[~same].any(), name
        changed += int((~same).sum())
    experts = [tensor for name, tensor in after.items() if ".mlp.experts." in name]
    assert changed == sum(tensor.numel() for tensor in experts) // 2


def test_experts_may_go_and_others_become_sparse(original_of: Callable[[str], Original], tmp_path: Path) -> None:
    """Of those that stay, each has the zeros that it has where all stay."""
    for family in ("qwen2_moe", "gpt_oss"):
        original = original_of(family)
        plan = plan_of(original, "moe-pruner", "2:4")
        keep = [1, 2, 5, 7]
        fewer = {
            name: LayerPlan(experts=layer.experts, top_k=layer.top_k, keep=keep) for name, layer in plan.layers.items()
        }
        whole, cut_down = tmp_path / family / "whole", tmp_path / family / "fewer"
        apply(original.checkpoint, plan, whole, stats=original.stats)
        plan = plan.model_copy(update={"layers": fewer})
        written = cut(original.checkpoint, plan, LocalTarget(cut_down), stats=original.stats)
        assert written.zeros == sum(int((tensor == 0).sum()) for tensor in load_file(cut_down / SINGLE_NAME).values())
        before, after = load(whole), load(cut_down)
        for name, module in experts_modules(after).items():
            for parameter, tensor in module.named_parameters():
                assert torch.equal(tensor, before.get_submodule(name).get_parameter(parameter)[keep]), parameter


def test_experts_without_tokens_are_ranked_by_magnitude(original_of: Callable[[str], Original], tmp_path: Path) -> None:
    original, said = original_of("mixtral"), list[str]()
    layers, unseen = {}, 0
    for name, layer in original.stats.layers.items():
        sums = {statistic: ExactSum(layer.sums[statistic].limbs.clone()) for statistic in ENERGIES["wanda"]}
        for total in sums.values():
            total.limbs[:, 3] = 0
        unseen += int((sums["input_square"].value() == 0).all(1).sum())
        layers[name] = replace(layer, sums=sums)
    assert unseen >= len(layers)
    stats = replace(original.stats, layers=layers)
    for score in ("wanda", "magnitude"):
        plan, target = plan_of(original, score, "0.5"), LocalTarget(tmp_path / score)
        cut(original.checkpoint, plan, target, stats=stats, say=said.append)
    assert said == [f"{unseen} experts received no tokens in calibration; their weights are ranked by magnitude alone"]
    wanda, magnitude = (load_file(tmp_path / score / "model.safetensors") for score in ("wanda", "magnitude"))
    equal = {name: torch.equal(wanda[name], magnitude[name]) for name in wanda if ".experts." in name}
    assert all(same for name, same in equal.items() if ".experts.3." in name)
    assert sum(equal.values()) == 3 * unseen


def test_an_interrupted_cut_does_not_go_on_with_other_numbers(
    original_of: Callable[[str], Original], tmp_path: Path
) -> None:
    """Stats of the same model and data, but for example computed in another dtype."""
    original, said = original_of("mixtral"), list[str]()
    layers = {
        name: replace(layer, sums={key: ExactSum(total.limbs.flip(-1)) for key, total in layer.sums.items()})
        for name, layer in original.stats.layers.items()
    }
    others = replace(original.stats, layers=layers)
    plan, target = plan_of(original, "wanda", "0.5"), LocalTarget(tmp_path / "out")

    def interrupt(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    run = partial(cut, original.checkpoint, plan, target, shard_bytes=20_000, say=said.append)
    with pytest.raises(KeyboardInterrupt):
        run(stats=others, on_tensor=interrupt)
    assert "are kept" in said[-1]
    run(stats=original.stats)
    assert not any("continuing" in text for text in said)
    expected = load(apply(original.checkpoint, plan, tmp_path / "whole", stats=original.stats).directory)
    for name, parameter in load(tmp_path / "out").named_parameters():
        assert torch.equal(parameter, expected.get_parameter(name)), name


class TestZeros:
    """The masks themselves, for all inputs."""

    @settings(max_examples=80, deadline=None)
    @given(data=st.data(), of=st.integers(2, 9), groups=st.integers(1, 4), rows=st.integers(1, 5))
    def test_exactly_n_of_every_m_for_ties_too(self, data: st.DataObject, of: int, groups: int, rows: int) -> None:
        count = data.draw(st.integers(1, of - 1))
        values = st.lists(st.integers(-2, 2), min_size=rows * groups * of, max_size=rows * groups * of)
        weight_OI = torch.tensor(data.draw(values), dtype=torch.float32).view(rows, -1)
        energy_I = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=groups * of, max_size=groups * of)))
        mask_OI = zeros(weight_OI, energy_I.double(), f"{count}:{of}")
        assert (mask_OI.view(rows, groups, of).sum(-1) == count).all()
        expected = reference_zeros(weight_OI[None].numpy(), energy_I[None].numpy(), f"{count}:{of}")
        assert np.array_equal(mask_OI.numpy(), expected[0])

    @settings(max_examples=80, deadline=None)
    @given(data=st.data(), features=st.integers(1, 40), rows=st.integers(1, 4), percent=st.integers(0, 99))
    def test_the_same_number_in_every_row(self, data: st.DataObject, features: int, rows: int, percent: int) -> None:
        values = st.lists(st.integers(-3, 3), min_size=rows * features, max_size=rows * features)
        weight_OI = torch.tensor(data.draw(values), dtype=torch.float32).view(rows, features)
        mask_OI = zeros(weight_OI, None, str(percent / 100))
        assert (mask_OI.sum(1) == percent * features // 100).all()
        largest = weight_OI.abs().where(mask_OI, -1).amax(1)
        assert (largest <= weight_OI.abs().where(~mask_OI, 9).amin(1)).all()

    @pytest.mark.parametrize("pattern", ["0.5", "2:4"])
    def test_no_other_choice_moves_the_gated_output_less(self, pattern: str) -> None:
        """Exactly so where a token has one feature; then the squared error is the sum of the scores' squares."""
        generator = torch.Generator().manual_seed(0)
        x_TI = torch.zeros(60, 8)
        place_T = torch.randint(0, 8, (60,), generator=generator)
        x_TI[torch.arange(60), place_T] = torch.randn(60, generator=generator) * 4 ** (place_T % 3)
        gate_T1 = torch.rand(60, 1, generator=generator) ** 4
        weight_OI = torch.randn(6, 8, generator=generator)
        energy_I = (gate_T1 * x_TI).double().square().sum(0)

        def error_of(mask_OI: torch.Tensor) -> torch.Tensor:
            return (gate_T1 * (x_TI @ weight_OI.where(mask_OI, 0).T)).square().sum(0)

        chosen_O = error_of(zeros(weight_OI, energy_I, pattern))
        for places in combinations(range(8), 4):
            if pattern == "2:4" and sum(place < 4 for place in places) != 2:
                continue
            other_OI = torch.zeros(6, 8, dtype=torch.bool)
            other_OI[:, list(places)] = True
            assert (chosen_O <= error_of(other_OI) * (1 + 1e-5)).all()
        for worse_I in (None, x_TI.double().square().sum(0)):  # magnitude, and without the gate
            assert (error_of(zeros(weight_OI, worse_I, pattern)).sum() > chosen_O.sum()).all()

    @pytest.mark.parametrize("pattern", ["half", "1.0", "-0.1", "4:4", "0:4", "5:4", "2:", ":4", "2:4:8", "nan", "1/0"])
    def test_no_pattern(self, pattern: str) -> None:
        with pytest.raises(ValueError, match="is no pattern of zeros: give a fraction"):
            compared(pattern, 8)


@contextmanager
def inputs_of(blocks: dict[str, torch.nn.Module]) -> Iterator[dict[str, torch.Tensor]]:
    seen: dict[str, torch.Tensor] = {}

    def hook(name: str) -> Callable[..., None]:
        return lambda module, args, *rest: seen.update({name: args[0].detach()})

    handles = [block.register_forward_hook(hook(name)) for name, block in blocks.items()]
    yield seen
    for handle in handles:
        handle.remove()


@pytest.mark.parametrize("seed", range(2))
def test_moe_pruner_hurts_the_blocks_less_than_magnitude(seed: int, tmp_path: Path) -> None:
    """Where the inputs' features have unequal energy, on text that calibration did not see, in every layer."""
    model = tiny.build(LAYOUTS["qwen2_moe"](), seed)
    for name, parameter in model.named_parameters():
        if name.endswith("post_attention_layernorm.weight"):
            parameter.data *= torch.logspace(-1, 1, len(parameter))[torch.randperm(len(parameter))]
    model.save_pretrained(tmp_path / "source")
    original = calibrated(tmp_path / "source", model, blocks=16)
    names = [name.removesuffix(".experts") for name in original.stats.layers]
    with inputs_of({name: model.get_submodule(name) for name in names}) as inputs, torch.no_grad():
        model(input_ids=tiny.token_ids(99, 8), use_cache=False)
    errors: dict[str, list[float]] = {}
    for score in ("moe-pruner", "magnitude"):
        out = tmp_path / score
        sparse = load(apply(original.checkpoint, plan_of(original, score, "0.5"), out, stats=original.stats).directory)
        with torch.no_grad():
            errors[score] = [
                float((sparse.get_submodule(name)(x) - model.get_submodule(name)(x)).square().mean())
                for name, x in inputs.items()
            ]
    assert len(names) >= 2
    for ours, by_magnitude in zip(errors["moe-pruner"], errors["magnitude"], strict=True):
        assert ours < 0.8 * by_magnitude


class TestRefusals:
    @pytest.fixture
    def original(self, original_of: Callable[[str], Original]) -> Original:
        return original_of("qwen2_moe")

    def refused(self, original: Original, plan: Plan, stats: Stats | None, out: Path, match: str) -> None:
        with pytest.raises(InputError, match=match):
            apply(original.checkpoint, plan, out, stats=stats)
        assert not out.exists()
        assert not list(out.parent.glob(f".{out.name}*"))

    def test_stats_that_are_missing(self, original: Original, tmp_path: Path) -> None:
        plan = plan_of(original, "wanda", "0.5")
        self.refused(original, plan, None, tmp_path / "out", r"takes numbers from the Stats .*`--stats FILE`")

    def test_magnitude_takes_no_stats(self, original: Original, tmp_path: Path) -> None:
        assert apply(original.checkpoint, plan_of(original, "magnitude", "0.5"), tmp_path / "out").files.entries

    @pytest.mark.parametrize(("what", "said"), [("model", "another model"), ("data", "other data")])
    def test_stats_of_another(self, what: str, said: str, original: Original, tmp_path: Path) -> None:
        changes: dict[str, Any] = {what: "0" * 64}
        other = replace(original.stats, **changes)
        match = f"these Stats are of {said} .* than the plan was made from"
        self.refused(original, plan_of(original, "wanda", "0.5"), other, tmp_path / "out", match)

    def test_stats_that_were_collected_for_another_method(self, original: Original, tmp_path: Path) -> None:
        layers = {
            name: replace(layer, sums={key: value for key, value in layer.sums.items() if "gated" in key})
            for name, layer in original.stats.layers.items()
        }
        match = "do not hold hidden_square, input_square, .*`moeprune calibrate --for wanda`"
        stats = replace(original.stats, layers=layers)
        self.refused(original, plan_of(original, "wanda", "0.5"), stats, tmp_path / "out", match)

    def test_a_width_that_does_not_divide(self, original: Original, tmp_path: Path) -> None:
        match = r"layers\.0\.mlp\.experts\.\d\.\w+_proj\.weight cannot be made sparse: rows of 32 weights .*groups of 5"
        self.refused(original, plan_of(original, "wanda", "2:5"), original.stats, tmp_path / "out", match)
        # Where the Stats know the widths, no plan is made.
        with pytest.raises(InputError, match=r"cannot be made sparse: rows of 32 weights .* choose another pattern"):
            make_plan("wanda", 0.4, original.stats, options={"pattern": "2:5"})

    def test_zeros_in_what_else_changes(self, original: Original, tmp_path: Path) -> None:
        plan = plan_of(original, "magnitude", "0.5")
        name, layer = next(iter(plan.layers.items()))
        merged = layer.model_copy(update={"merged": {0: {0: 1.0, 1: 1.0}}})
        for changes, what in (
            ({"layers": {**plan.layers, name: merged}}, "merges experts"),
            ({"recovery": Recovery()}, "fits what stays"),
        ):
            match = f"the plan {what} and makes weights zero"
            self.refused(original, plan.model_copy(update=changes), original.stats, tmp_path / "out", match)

    def test_quantised_weights(self, tmp_path: Path) -> None:
        from test_quantised import FORMS, write

        for form in FORMS:
            checkpoint = Checkpoint(write(tmp_path / form, *FORMS[form]))
            names = list(checkpoint.layout.layers)
            plan = tiny.plan_for(names, [list(range(8))] * len(names), checkpoint.fingerprint)
            plan = plan.model_copy(update={"sparsity": Sparsity(pattern="0.5", score="magnitude")})
            with pytest.raises(InputError, match=f"quantised as {form}, in which single weights cannot be zeroed"):
                apply(checkpoint, plan, tmp_path / "out")

    def test_an_order_of_weights_that_is_not_known(self, original: Original, monkeypatch: pytest.MonkeyPatch) -> None:
        from moeprune.checkpoint import projections

        real = projections.stored_ways

        def shuffled(model: PreTrainedModel, state: dict[str, torch.Tensor]) -> list[dict[str, torch.Tensor]]:
            return [{name: tensor.flip(-1) for name, tensor in way.items()} for way in real(model, state)]

        monkeypatch.setattr(projections, "stored_ways", shuffled)
        with pytest.raises(InputError, match="in an order that moeprune does not know"):
            find_projections(original.checkpoint.config, original.checkpoint.layout, original.checkpoint.files)

    @pytest.mark.parametrize(
        ("ratio", "options", "match"),
        [
            (
                0.3,
                {"pattern": "2:4"},
                r"2:4 makes 2 of every 4 .*ratio of 0\.5, not 0\.3; .*`--ratio 0\.5`",
            ),
            (0.75, {"pattern": "1:4"}, r"ratio of 0\.25, not 0\.75"),
            (0.5, {"pattern": "0.5"}, "neither unstructured nor N:M"),
            (0.5, {"pattern": "4:2"}, "no pattern of zeros"),
            (1.0, {}, "at least 0 and below 1"),
        ],
    )
    def test_a_pattern_and_a_ratio_that_disagree(
        self, ratio: float, options: dict[str, str], match: str, original: Original
    ) -> None:
        with pytest.raises(InputError, match=match):
            make_plan("wanda", ratio, original.stats, options=options)

    def test_stats_without_what_the_method_needs(self) -> None:
        with pytest.raises(InputError, match=r"do not hold .*gated_hidden_square.*--for moe-pruner"):
            make_plan("moe-pruner", 0.5, replace_sums(tiny.make_stats([[1] * 8])))


def replace_sums(stats: Stats) -> Stats:
    layers = {name: replace(layer, sums={"gate": layer.sums["gate"]}) for name, layer in stats.layers.items()}
    return replace(stats, layers=layers)


class TestPlans:
    def test_what_the_ratio_says_is_the_pattern(self, original_of: Callable[[str], Original]) -> None:
        stats = original_of("mixtral").stats
        for ratio, options, pattern in (
            (0.37, {}, "0.37"),
            (0.5, {"pattern": "4:8"}, "4:8"),
            (0.375, {"pattern": "3:8"}, "3:8"),
        ):
            plan = make_plan("moe-pruner", ratio, stats, options=options)
            assert plan.sparsity == Sparsity(pattern=pattern, score="moe-pruner")
            assert all(layer.keep == list(range(layer.experts)) for layer in plan.layers.values())
        assert make_plan("moe-pruner", 0, stats).sparsity is None

    def test_it_is_read_as_it_is_written(self, original_of: Callable[[str], Original], tmp_path: Path) -> None:
        plan = plan_of(original_of("mixtral"), "wanda", "2:4")
        plan.save(tmp_path / "plan.json")
        assert Plan.load(tmp_path / "plan.json") == plan
        text = (tmp_path / "plan.json").read_text()
        (tmp_path / "plan.json").write_text(text.replace("2:4", "4:2"))
        with pytest.raises(InputError, match=r"sparsity\.pattern: .*'4:2' is no pattern of zeros"):
            Plan.load(tmp_path / "plan.json")


Run = Callable[..., tuple[int, str, str]]


class TestCommandLine:
    def test_from_calibration_to_a_checkpoint(self, qwen: Path, corpus: Path, run_cli: Run, tmp_path: Path) -> None:
        stats, plan, out = tmp_path / "stats", tmp_path / "plan.json", tmp_path / "out"
        blocks = ("--block-tokens", tiny.BLOCK_TOKENS, "--max-blocks", 4)
        steps: list[tuple[Any, ...]] = [
            ("calibrate", "--model", qwen, "--data", corpus, "--for", "moe-pruner", "--out", stats, *blocks),
            ("plan", "make", "--method", "moe-pruner", "--ratio", 0.5, "--set", "pattern=2:4", "--stats", stats),
            ("apply", "--model", qwen, "--plan", plan, "--stats", stats, "--out", out),
        ]
        steps[1] += ("--out", plan)
        outputs = []
        for step in steps:
            code, told, err = run_cli(*step)
            assert code == 0, err
            outputs.append(told)
        assert "2 of every 4 weights inside the experts that stay become zero" in outputs[1]
        tensors = load_file(out / "model.safetensors")
        of_experts = [tensor for name, tensor in tensors.items() if ".mlp.experts." in name]
        zeros = sum(int((tensor == 0).sum()) for tensor in of_experts)
        assert zeros == sum(tensor.numel() for tensor in of_experts) // 2
        total = sum(tensor.numel() for tensor in tensors.values())
        assert f"{zeros:,} of {total:,} parameters were made zero. {ZEROS_TAKE_ROOM}" in told
        assert (out / "model.safetensors").stat().st_size == (qwen / "model.safetensors").stat().st_size
        card = (out / "README.md").read_text()
        assert "2 of every 4 weights are zero: those of the least magnitude times the norm" in card
        assert ZEROS_TAKE_ROOM in card
        code, _, err = run_cli("apply", "--model", qwen, "--plan", plan, "--out", tmp_path / "other")
        assert (code, err.count("\n")) == (1, 1)
        assert "give them, `--stats FILE`" in err

    def test_one_step_for_the_method_and_its_baselines(
        self, original_of: Callable[[str], Original], tmp_path: Path
    ) -> None:
        original, stats, out = original_of("mixtral"), tmp_path / "stats", tmp_path / "out"
        original.stats.save(stats)
        arguments: dict[str, Any] = {
            "baselines": ["wanda", "magnitude"],
            "baselines_out": str(tmp_path / "baselines"),
            "data": "",
        }
        places = (str(stats), str(tmp_path / "plan.json"), str(out))
        made = prune(str(original.checkpoint.directory), "moe-pruner", 0.5, *places, **arguments)
        written = [out, tmp_path / "baselines" / "wanda", tmp_path / "baselines" / "magnitude"]
        found = [load_file(each / "model.safetensors") for each in written]
        for tensors in found:
            experts = [tensor for name, tensor in tensors.items() if ".experts." in name]
            assert sum(int((tensor == 0).sum()) for tensor in experts) == made.zeros
        name = next(name for name in found[0] if ".experts." in name)
        assert len({tuple(tensors[name].flatten().tolist()) for tensors in found}) == len(found)
