"""What a run will need: exact where it can be, a bound where it is measured, and what the command makes of it."""

from __future__ import annotations

import copy
import json
import math
import re
import shlex
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kfp.pipeline_spec.pipeline_spec_pb2 import ParameterType
from safetensors import safe_open
from torch.utils.flop_counter import FlopCounterMode
from transformers import PreTrainedModel, Qwen3MoeConfig

from moeprune.budget import Budget
from moeprune.checkpoint.loading import Checkpoint
from moeprune.checkpoint.surgery import apply
from moeprune.errors import InputError
from moeprune.estimation.amounts import Amount, Basis, Term
from moeprune.estimation.anatomy import Anatomy
from moeprune.estimation.estimate import Estimate
from moeprune.estimation.estimate import estimate as add_up
from moeprune.estimation.expected_plan import expected_plan
from moeprune.estimation.headers import describe
from moeprune.estimation.machines import gpu as known_gpu
from moeprune.estimation.needs.case import Case, forward
from moeprune.estimation.statistics_size import bytes_of_stats
from moeprune.estimation.units import in_bytes, in_time
from moeprune.estimation.work import END_TO_END, LAYER_LOCAL, Work
from moeprune.pipelines.requests import GROUPS, MARGIN, parameters, quantity
from moeprune.plan import LayerPlan, Plan
from moeprune.statistics.calibration import calibrate
from moeprune.statistics.collectors import COLLECTORS
from moeprune.statistics.passes import InMemoryPass
from moeprune.steps import estimate as step

ROOT = Path(__file__).parents[1]
FAMILIES = sorted(tiny.FAMILIES)


@lru_cache
def described(directory: Path) -> tuple[Checkpoint, Anatomy]:
    """A model's headers, read once for all tests."""
    with describe(str(directory)) as found:
        return found.checkpoint, Anatomy.of(found.checkpoint)


def estimated(directory: Path, gpu: str = "H100-80GB", **asked: Any) -> Estimate:
    """As `steps.estimate`, for a model whose headers are read once."""
    checkpoint, anatomy = described(directory)
    work = Work(**asked)
    plan = expected_plan(checkpoint, anatomy, work.budget, work.method, work.options)
    case = Case(anatomy, anatomy.pruned(plan, checkpoint), plan, work, known_gpu(gpu), is_here=True)
    return add_up(case, str(directory), stored=True)


def files_of(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def plan_that_keeps(checkpoint: Checkpoint, kept: dict[str, int], constants: bool = False) -> Plan:
    layers = {}
    for name, layer in checkpoint.layout.layers.items():
        keep = list(range(kept[name]))
        constant = [expert for expert in range(layer.experts) if expert not in keep] if constants else []
        layers[name] = LayerPlan(experts=layer.experts, top_k=tiny.TOP_K, keep=keep, constant=constant)
    return Plan(method="x", options={}, ratio=0.5, model=checkpoint.fingerprint, data="1" * 32, layers=layers)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_are_counted_as_they_are_loaded(
    family: str, model_of: Callable[[str], PreTrainedModel], checkpoint_of: Callable[[str], Path]
) -> None:
    model = model_of(family)
    anatomy = Anatomy.of(Checkpoint(checkpoint_of(family)))
    assert anatomy.parameters == sum(parameter.numel() for parameter in model.parameters())
    card = checkpoint_of(family) / "README.md"  # which tells of the original alone, and is not carried over
    assert anatomy.bytes_on_disk == files_of(checkpoint_of(family)) - card.stat().st_size


def test_a_tied_head_is_counted_once(tmp_path: Path) -> None:
    config = tiny.FAMILIES["qwen2_moe"]()
    config.tie_word_embeddings = True
    checkpoint = Checkpoint(tiny.write(tmp_path / "tied", config))
    anatomy = Anatomy.of(checkpoint)
    assert anatomy.ties
    assert anatomy.parameters == sum(parameter.numel() for parameter in checkpoint.load().parameters())


@given(data=st.data())
@settings(max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_what_any_plan_makes_is_known_to_the_byte(
    data: st.DataObject, checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> None:
    checkpoint, anatomy = described(checkpoint_of(data.draw(st.sampled_from(FAMILIES))))
    names = list(checkpoint.layout.layers)
    kept = {name: data.draw(st.integers(tiny.TOP_K, tiny.EXPERTS)) for name in names}
    plan = plan_that_keeps(checkpoint, kept)
    pruned = anatomy.pruned(plan, checkpoint)
    out = tmp_path_factory.mktemp("pruned") / "model"
    model = apply(checkpoint, plan, out).load()
    assert pruned.bytes_on_disk == files_of(out)
    assert pruned.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert [layer.experts for layer in pruned.layers.values()] == [kept[name] for name in names]


@given(ratio=st.floats(0, 0.75), family=st.sampled_from(FAMILIES), method=st.sampled_from(["reap", "fuse", "random"]))
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_the_expected_plan_is_of_the_size_that_the_method_makes(
    ratio: float, family: str, method: str, checkpoint_of: Callable[[str], Path]
) -> None:
    from moeprune.methods import make_plan

    checkpoint, anatomy = described(checkpoint_of(family))
    stats = tiny.make_stats([[9] * tiny.EXPERTS] * len(anatomy.layers))
    stats.layers = dict(zip(anatomy.layers, stats.layers.values(), strict=True))
    made = make_plan(method, ratio, stats)
    expected = expected_plan(checkpoint, anatomy, Budget(ratio=ratio), method, {})
    assert expected.experts_per_layer == made.experts_per_layer
    assert (expected.recovery is None) == (made.recovery is None)
    made_of, expected_of = (anatomy.pruned(plan, checkpoint) for plan in (made, expected))
    assert expected_of.parameters == made_of.parameters
    assert expected_of.layers == made_of.layers


def test_a_size_is_kept_by_the_expected_plan(qwen: Path) -> None:
    checkpoint, anatomy = described(qwen)
    size = int(0.8 * anatomy.bytes_on_disk)
    plan = expected_plan(checkpoint, anatomy, Budget(size=size), "reap", {})
    assert 0.7 * size < anatomy.pruned(plan, checkpoint).bytes_on_disk <= size


@pytest.mark.parametrize("method", ["mone", "cd-moe", "moe-pruner"])
def test_methods_that_do_not_drop_experts(method: str, qwen: Path) -> None:
    checkpoint, anatomy = described(qwen)
    pruned = anatomy.pruned(expected_plan(checkpoint, anatomy, Budget(ratio=0.5), method, {}), checkpoint)
    if method == "moe-pruner":  # zeros take the same room
        assert pruned.parameters == anatomy.parameters
    else:
        assert pruned.parameters < anatomy.parameters
    if method == "cd-moe":  # one of three layers, the 6 experts of which and the shared one become dense
        assert sorted(layer.experts for layer in pruned.layers.values()) == [0, tiny.EXPERTS, tiny.EXPERTS]


@pytest.mark.parametrize("options", [{"variant": "S"}, {"routed": 2}, {}])
def test_condensed_layers_keep_what_the_options_say(options: dict[str, Any], qwen: Path) -> None:
    checkpoint, anatomy = described(qwen)
    plan = expected_plan(checkpoint, anatomy, Budget(ratio=0.34), "cd-moe", options)
    kept = {"S": 0}.get(options.get("variant", ""), options.get("routed", 6))
    assert [len(layer.keep) for layer in plan.layers.values()] == [tiny.EXPERTS, tiny.EXPERTS, kept]


def test_constants_take_the_place_of_all_that_go(qwen: Path) -> None:
    checkpoint, anatomy = described(qwen)
    plan = expected_plan(checkpoint, anatomy, Budget(ratio=0.5), "mone", {})
    assert all(layer.constant == layer.drop != [] for layer in plan.layers.values())


def test_groups_of_experts_stay_equal(tmp_path: Path) -> None:
    checkpoint = Checkpoint(tiny.write(tmp_path / "grouped", tiny.group_limited_config()))
    plan = expected_plan(checkpoint, Anatomy.of(checkpoint), Budget(ratio=0.5), "reap", {})
    for name, layer in plan.layers.items():
        assert set(checkpoint.layout.groups.of_each(layer.keep, tiny.EXPERTS)) == {1}, name


def test_stats_are_known_to_the_byte(qwen: Path, model_of: Callable[[str], PreTrainedModel], tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    ids_BS = torch.randint(1, tiny.VOCABULARY, (4, tiny.BLOCK_TOKENS), generator=generator)
    stats = calibrate(InMemoryPass(model_of("qwen2_moe")), "f" * 64, ids_BS, statistics=COLLECTORS, groups=3)
    stats.save(tmp_path / "stats")
    with safe_open(tmp_path / "stats", "pt") as file:
        stored = sum(file.get_tensor(key).nbytes for key in file.keys())  # noqa: SIM118 (a file handle, not a dict)
    assert bytes_of_stats(Anatomy.of(Checkpoint(qwen)), COLLECTORS, 3) == stored


@pytest.mark.parametrize("family", ["qwen2_moe", "mixtral", "deepseek_v2"])
def test_operations_are_those_that_torch_counts(
    family: str, checkpoint_of: Callable[[str], Path], model_of: Callable[[str], PreTrainedModel]
) -> None:
    """The small products of norms, rotations and masks aside."""
    model = copy.deepcopy(model_of(family))
    model.set_experts_implementation("eager")
    model.set_attn_implementation("eager")  # torch knows what these do
    with FlopCounterMode(display=False) as counter, torch.inference_mode():
        model(torch.randint(1, tiny.VOCABULARY, (8, 16)), use_cache=False)
    _, anatomy = described(checkpoint_of(family))
    assert forward(anatomy, 8 * 16, 16, head=True) == pytest.approx(counter.get_total_flops(), rel=0.08)


def test_the_estimate_bounds_what_a_step_takes(tmp_path: Path) -> None:
    """A model that is large beside the libraries, calibrated in a process of its own."""
    config = Qwen3MoeConfig(
        **(tiny._SIZES | {"hidden_size": 384, "num_attention_heads": 6, "head_dim": 64}),
        num_hidden_layers=4,
        num_experts=32,
        moe_intermediate_size=384,
    )
    model = tiny.write(tmp_path / "model", config)
    text = tiny.write_jsonl(tmp_path / "text.jsonl", tiny.sentences(1, 300))
    work = Work(calibration_blocks=16, block_tokens=128, method="reap", baselines=("frequency",))
    found = step.estimate(str(model), work).step("calibrate")
    assert found is not None
    took = peak_of_calibration(model, text, work)
    assert took["before"] < took["peak"]
    weights = next(part.value for part in found.memory.parts if part.what == "the original")
    assert took["peak"] - took["before"] > weights  # or else the libraries are all that is seen
    assert took["peak"] <= found.memory.value <= 2 * took["peak"]


def peak_of_calibration(model: Path, text: Path, work: Work) -> dict[str, int]:
    import subprocess

    told = subprocess.run(
        [
            sys.executable,
            "-c",
            _CALIBRATION,
            str(model),
            str(text),
            str(work.calibration_blocks),
            str(work.block_tokens),
        ],
        check=True,
        capture_output=True,
        text=True,
    ).stdout
    return dict(json.loads(told.splitlines()[-1]))


_CALIBRATION = """
import json, sys, tempfile, threading, time
from moeprune.methods import statistics_of_run
from moeprune.steps.calibrate import calibrate
from moeprune.streaming.room import memory_in_use
told = {"before": memory_in_use(), "peak": 0}
def look():
    while True:
        told["peak"] = max(told["peak"], memory_in_use())
        time.sleep(0.002)
threading.Thread(target=look, daemon=True).start()
model, text, blocks, tokens = sys.argv[1:]
statistics = statistics_of_run(["reap", "frequency"])
with tempfile.TemporaryDirectory() as folder:
    calibrate(model, text, folder + "/stats", statistics=statistics, max_blocks=int(blocks), block_tokens=int(tokens))
print(json.dumps(told))
"""


def test_every_step_of_the_pipeline_is_estimated(qwen: Path) -> None:
    from moeprune.pipelines.prune import prune

    tasks = set(_names(prune().pipeline_spec.root.dag.tasks, prune().pipeline_spec.components))
    steps = {one.name for one in estimated(qwen).steps}
    assert steps <= tasks
    assert {"calibrate", "merge-stats", "cluster", "global-prune", "distill", "merge-distilled", "evaluate"} <= steps


def _names(tasks: Any, components: Any) -> list[str]:
    found: list[str] = []
    for name, task in tasks.items():
        inner = components[task.component_ref.name].dag.tasks
        found += _names(inner, components) if inner else [name]
    return found


def test_shards_share_the_work_and_not_the_memory(qwen: Path) -> None:
    work: dict[str, Any] = {"calibration_blocks": 512, "method": "reap"}
    alone = estimated(qwen, **work).step("calibrate")
    shared = estimated(qwen, **work, calibration_shards=4).step("calibrate")
    assert alone is not None
    assert shared is not None
    assert (alone.pods, shared.pods) == (1, 4)
    assert shared.gpu_memory.value == alone.gpu_memory.value

    def computing(one: Any) -> float:
        return sum(part.value for part in one.seconds.parts if part.what == "passes")

    assert computing(shared) == pytest.approx(computing(alone) / 4)


@given(blocks=st.integers(8, 4096), more=st.integers(1, 4096))
@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_more_text_never_takes_less(blocks: int, more: int, qwen: Path) -> None:
    less, larger = (
        estimated(qwen, "L4", calibration_blocks=count, distillation_blocks=count, recovery_blocks=count)
        for count in (blocks, blocks + more)
    )
    for one, other in zip(less.steps, larger.steps, strict=True):
        for what in ("memory", "gpu_memory", "disk", "seconds"):
            assert getattr(one, what).value <= getattr(other, what).value * (1 + 1e-9), (one.name, what)


def test_a_limit_is_what_streaming_takes(qwen: Path) -> None:
    found = estimated(qwen, calibration_memory_limit=3 << 30).step("calibrate")
    assert found is not None
    device = found.gpu_memory.value - sum(part.value for part in found.gpu_memory.parts if "CUDA" in part.what)
    assert device < 3 << 30
    here = step.estimate(str(qwen), Work(calibration_memory_limit=3 << 30)).step("calibrate")
    assert here is not None
    assert here.memory.value == 3 << 30


@pytest.mark.parametrize("which", ["calibration", "distillation"])
def test_a_limit_that_is_too_small_is_refused(which: str, qwen: Path) -> None:
    with pytest.raises(InputError, match=f"a {which} memory limit of 600 MiB is too small"):
        estimated(qwen, "L4", **{f"{which}_memory_limit": 600 << 20})


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The config of a model of 29 billion parameters and few layers; no weights."""
    directory = tmp_path_factory.mktemp("large")
    config = Qwen3MoeConfig(
        num_hidden_layers=6, hidden_size=4096, moe_intermediate_size=3072, num_experts=128, num_experts_per_tok=8
    )
    config.dtype = torch.bfloat16
    config.save_pretrained(directory)
    return directory


def test_a_config_alone_will_do(large: Path) -> None:
    found = step.estimate(str(large), Work(), gpu="H100-80GB")
    experts = 6 * 128 * 3 * 4096 * 3072
    assert experts < found.original.parameters < 1.1 * experts
    assert found.original.bytes_on_disk == pytest.approx(2 * found.original.parameters, rel=1e-3)
    assert any("no weights beside this config" in warning for warning in found.warnings)


def test_what_does_not_fit_a_gpu_is_spread_or_warned_of(large: Path) -> None:
    found = estimated(large, gpu="L4")
    gpus = {one.name: one.gpus for one in found.steps}
    assert gpus["calibrate"] == gpus["evaluate"] == 4  # 58 GB of weights, and passes, on GPUs of 24 GiB
    assert gpus["merge-stats"] == 0
    assert [warning for warning in found.warnings if warning.startswith("global-prune needs")]
    assert "recover=false" in " ".join(found.warnings)
    without = estimated(large, gpu="L4", method="reap")
    assert not [warning for warning in without.warnings if warning.startswith("global-prune")]


def test_end_to_end_takes_both_models_and_adam(large: Path) -> None:
    whole = estimated(large, how=END_TO_END, distillation_processes=8)
    found, layers = whole.step("distill"), estimated(large).step("distill")
    assert found is not None
    assert layers is not None
    assert found.gpus == 8
    least = 2 * whole.original.parameters + 4 * 4 * 0.9 * whole.pruned.parameters
    assert found.gpu_memory.value > least > layers.gpu_memory.value
    thrifty = estimated(large, how=END_TO_END, gradient_checkpointing=True).step("distill")
    dear = estimated(large, how=END_TO_END).step("distill")
    assert thrifty is not None
    assert dear is not None
    assert thrifty.gpu_memory.value < dear.gpu_memory.value
    assert thrifty.seconds.value > dear.seconds.value


def test_a_quantised_config_alone_is_refused(tmp_path: Path) -> None:
    config = Qwen3MoeConfig(num_hidden_layers=1, num_experts=4)
    config.quantization_config = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    config.save_pretrained(tmp_path)
    with pytest.raises(InputError, match="quantised as fp8: only their headers tell"):
        step.estimate(str(tmp_path), Work(), gpu="H100-80GB")


def test_a_plan_is_taken_as_it_is(qwen: Path, tmp_path: Path) -> None:
    checkpoint = Checkpoint(qwen)
    kept = dict(zip(checkpoint.layout.layers, (2, 5, 7), strict=True))
    plan = plan_that_keeps(checkpoint, kept).model_copy(update={"ratio": 0.4})
    plan.save(tmp_path / "plan.json")
    found = step.estimate(str(qwen), Work(), plan=str(tmp_path / "plan.json"), gpu="L4")
    out = tmp_path / "out"
    apply(checkpoint, plan, out)
    assert found.pruned.bytes_on_disk == files_of(out)
    assert found.pruned.experts == 14
    assert (found.method, found.budget) == ("x", "without 0.4 of the experts")
    other = plan.model_copy(update={"model": "0" * 64})
    other.save(tmp_path / "other.json")
    with pytest.raises(InputError, match="made for another model"):
        step.estimate(str(qwen), Work(), plan=str(tmp_path / "other.json"), gpu="L4")


def test_a_sum_is_worth_its_weakest_term() -> None:
    computed, measured = Term("a", 1), Term("b", 2, Basis.MEASURED)
    assert Amount.of(computed).basis is Basis.COMPUTED
    assert Amount.of(computed, measured).basis is Basis.MEASURED
    assert (Amount.of(measured) + Amount.of(Term("c", 3, Basis.ASSUMED))).basis is Basis.ASSUMED
    assert Amount.of(computed, Term("nothing", 0, Basis.ASSUMED)).basis is Basis.COMPUTED


@given(st.integers(1, 1 << 45))
def test_a_quantity_holds_the_margin_and_little_more(size: int) -> None:
    asked = int(quantity(size).removesuffix("Gi")) << 30
    assert size * MARGIN <= asked + 1 < size * MARGIN + (1 << 30) + 2
    assert math.isfinite(float(in_bytes(size).split()[0].replace(",", "")))


@pytest.mark.parametrize(
    ("seconds", "shown"), [(0.2, "1 s"), (119, "119 s"), (150, "2.5 min"), (7200, "2.0 h"), (1e6, "12 d")]
)
def test_times_for_people(seconds: float, shown: str) -> None:
    assert in_time(seconds) == shown


@pytest.mark.parametrize("how", [LAYER_LOCAL, END_TO_END])
def test_the_parameter_file_is_one_of_the_pipeline(how: str, qwen: Path) -> None:
    from moeprune.pipelines.prune import prune

    work = Work(budget=Budget(size=10**6), calibration_memory_limit=1 << 30, options={"recover": False}, how=how)
    made = parameters(estimated(qwen, "L4", **vars(work)), work)
    known = prune().pipeline_spec.root.input_definitions.parameters
    assert set(made) <= set(known)
    for name, value in made.items():
        assert isinstance(value, _TYPES[known[name].parameter_type]), name
    assert made["size"] == "1000000B"
    assert made["calibration_memory_limit"] == f"{1 << 30}B"
    assert made["baselines"] == ["reap", "frequency"]
    assert made["method_options"] == {"recover": False}
    assert made["calibration_gpus"] == "1"
    assert made["evaluation_memory"].endswith("Gi")
    assert made.get("distillation_nodes", 0) == (how == END_TO_END)
    assert "ratio" not in made
    json.dumps(made)


def test_what_is_asked_for_covers_every_step(large: Path) -> None:
    """The heavy steps by their own requests, the light ones by what the pipeline always gives them."""
    from moeprune.pipelines.placement import LIGHT_MEMORY

    found = estimated(large)
    made = parameters(found, Work())
    for one in found.steps:
        group = next((group for group, names in GROUPS.items() if one.name in names), "")
        asked = made[f"{group}_memory"] if group else LIGHT_MEMORY
        assert int(asked.removesuffix("Gi")) << 30 >= one.memory.value, one.name


_TYPES = {
    ParameterType.ParameterTypeEnum.STRING: str,
    ParameterType.ParameterTypeEnum.NUMBER_INTEGER: int,
    ParameterType.ParameterTypeEnum.NUMBER_DOUBLE: float,
    ParameterType.ParameterTypeEnum.BOOLEAN: bool,
    ParameterType.ParameterTypeEnum.LIST: list,
    ParameterType.ParameterTypeEnum.STRUCT: dict,
}


def test_the_command_shows_and_writes(qwen: Path, run_cli: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    out = tmp_path / "run.json"
    code, shown, error = run_cli(
        "estimate", "--model", qwen, "--gpu", "l4", "--explain", "distill", "--parameters-out", out
    )
    assert code == 0, error
    for part in ("global-prune", "GPU memory", "a: assumed", "30% of the published 121", "hidden states of all tokens"):
        assert part in " ".join(shown.split())
    assert json.loads(out.read_text())["model"] == str(qwen)
    code, shown, _ = run_cli("estimate", "--model", qwen, "--json", "--ratio", "0.25")
    made = Estimate.model_validate_json(shown)
    assert code == 0
    assert made.pruned.experts == 3 * 6
    assert "measured" in made.speed
    assert {part.basis for part in made.steps[1].memory.parts} == set(Basis)


@pytest.mark.parametrize("example", ["qwen3-30b-a3b", "deepseek-v3"])
def test_the_page_shows_what_the_command_says(
    example: str, run_cli: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("COLUMNS", "100")
    page = (ROOT / "docs/estimate.md").read_text()
    found = re.search(rf"    moeprune (estimate --model docs/examples/{example} .*?)\n\n```\n(.*?)```", page, re.DOTALL)
    assert found
    code, shown, error = run_cli(*shlex.split(found[1].replace("\\\n", "")))
    assert code == 0, error
    assert _words(shown) == _words(found[2])


def _words(text: str) -> list[str]:
    return text.replace("─", "").split()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--gpu", "A1000"], "nothing is known of the GPU 'A1000'; known: T4, L4"),
        (["--explain", "lunch"], "there is no step lunch; there are prepare, calibrate"),
        (["--how", "sideways"], "layer-local or end-to-end, not 'sideways'"),
        (["--calibration-shards", "0"], "calibration shards: 0; it must be at least 1"),
        (["--method", "unknown"], "unknown method"),
        (["--ratio", "0.9"], "leaves fewer than the 2 that run"),
        (["--size", "1kB"], "no allocation makes"),
        (["--plan", "plan.json", "--parameters-out", "run.json"], "the pipeline makes a plan of its own"),
    ],
)
def test_what_cannot_be_estimated_is_said(
    options: list[str], says: str, qwen: Path, run_cli: Callable[..., tuple[int, str, str]]
) -> None:
    code, _, error = run_cli("estimate", "--model", qwen, *options)
    assert code == 1
    assert says in error
    assert error.count("\n") == 1


def test_no_weight_is_read(qwen: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moeprune.checkpoint.files import CheckpointFiles

    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(CheckpointFiles, "read_values", refuse)
    step.estimate(str(qwen), Work(), gpu="L4")
