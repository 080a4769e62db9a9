"""The commands, their options and their help. What they do is in `steps`."""

from __future__ import annotations

from typing import Annotated, Any

import typer
from rich.console import Console

import moeprune
from moeprune.checkpoint.card import ZEROS_TAKE_ROOM
from moeprune.clustering import ALGORITHMS, AUTO, PUBLISHED, SIMILARITIES
from moeprune.methods import BASELINES, DEFAULT, METHODS, statistics_for
from moeprune.places import REFERENCE_MODEL

app = typer.Typer(
    help="Make a Mixture-of-Experts LLM smaller for a domain, and prove what it kept. MODEL is a local directory, an "
    f"s3:// address, a hub id or {REFERENCE_MODEL}; DATA is JSONL, plain text or Parquet in the same places, a hub "
    "data set id, or builtin://code, builtin://prose, builtin://arithmetic (held-out texts: builtin://code/held-out). "
    "Several sources, separated by commas, are mixed, in equal shares or by weights: code.jsonl*3,prose.txt*1 takes "
    "three blocks of the first for each of the second. A comma, star or percent sign in a name is %2C, %2A or %25.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
console = Console(soft_wrap=True)  # a line is a line, also for whoever reads it by a program

ModelOption = Annotated[str, typer.Option("--model", metavar="MODEL", help="the original model")]
DataOption = Annotated[str, typer.Option("--data", metavar="DATA", help="text of the domain to prune for")]
StatsOption = Annotated[str, typer.Option("--stats", metavar="FILE", help="Stats, from `moeprune calibrate`")]
PlanOption = Annotated[str, typer.Option("--plan", metavar="FILE", help="the Plan, from `moeprune plan make`")]
FieldOption = Annotated[str, typer.Option(help="field of JSONL or Parquet that holds the text")]
BlockOption = Annotated[int, typer.Option(help="tokens per block; texts are joined and cut into blocks")]
BatchOption = Annotated[int, typer.Option(help="blocks per forward pass")]
SEQUENCES_HELP = (
    "packed: documents are joined and cut into full blocks; documents: one document per block, padded, a long one in "
    "several"
)
SIMILARITY_HELP = (
    f"whether experts are alike in what they put out, in their weights, or both: {', '.join(SIMILARITIES)}"
)
ALGORITHM_HELP = f"how to cluster experts: {', '.join(ALGORITHMS)}"
CLUSTERS_HELP = (
    f"a number; {PUBLISHED}: 12 for every 64 experts; {AUTO}: for each layer what suits it best, by the silhouette"
)
DTYPE_HELP = "of the model in memory: float32, bfloat16, or auto (bfloat16 on a GPU, float32 on a CPU)"
TrustOption = Annotated[
    bool, typer.Option("--trust-remote-code", help="run modelling code that the model brings along")
]
RatioOption = Annotated[
    float | None,
    typer.Option(
        "--ratio",
        help="fraction to remove, at least 0 and below 1: of the routed experts, or of what else the method is for",
    ),
]
ParametersRatioOption = Annotated[
    float,
    typer.Option("--parameters-ratio", help="instead of --ratio: fraction of all parameters to remove, at least"),
]
SizeOption = Annotated[
    str,
    typer.Option(
        "--size", metavar="SIZE", help="instead of --ratio: most bytes of the pruned checkpoint, such as 400MB or 12GiB"
    ),
]
MethodOption = Annotated[
    str, typer.Option("--method", help="; ".join(f"{method.name}: {method.summary}" for method in METHODS.values()))
]
SettingOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="NAME=VALUE",
        help="an option of the method, repeatable; "
        + "; ".join(
            f"{method.name}: {name} ({field.description}; default {field.default})"
            for method in METHODS.values()
            for name, field in method.options.model_fields.items()
        ),
    ),
]


def parse_settings(settings: list[str] | None) -> dict[str, Any]:
    """`--set NAME=VALUE ...` as options by name."""
    pairs = [setting.partition("=") for setting in settings or []]
    for name, equals, _ in pairs:
        if not equals:
            raise typer.BadParameter(f"{name!r} is not of the form NAME=VALUE")
    return {name: value for name, _, value in pairs}


def parse_names(text: str) -> list[str]:
    """What commas separate, each once."""
    return list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))


@app.command()
def calibrate(
    model: ModelOption,
    data: DataOption,
    out: Annotated[str, typer.Option(metavar="FILE", help="where to write the Stats")],
    text_field: FieldOption = "text",
    block_tokens: BlockOption = 256,
    max_blocks: Annotated[int, typer.Option(help="blocks to read at most")] = 128,
    sequences: Annotated[str, typer.Option(help=SEQUENCES_HELP)] = "packed",
    batch_blocks: Annotated[
        int | None,
        typer.Option(
            help="blocks per forward pass, halved where memory runs out; default: as many as make 8,192 tokens",
            show_default=False,
        ),
    ] = None,
    methods: Annotated[
        list[str] | None,
        typer.Option(
            "--for",
            metavar="METHOD",
            help="method to collect statistics for, repeatable; default: " + ", ".join([DEFAULT, *BASELINES]),
        ),
    ] = None,
    groups: Annotated[int, typer.Option(help="groups of blocks that vote on C-Prune's clusters, each for itself")] = 8,
    shard: Annotated[int, typer.Option(help="which shard of the data to take, from 0")] = 0,
    shards: Annotated[int, typer.Option(help="how many shards there are; `merge-stats` adds them up")] = 1,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "auto",
    memory_limit: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE",
            help="stay below SIZE, for example 2GiB, whatever the model's: layers are brought in one at a time",
        ),
    ] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Run DATA through MODEL once and take down what its experts do (Stats)."""
    from moeprune.steps import calibrate as step

    stats = step.calibrate(
        model,
        data,
        out,
        statistics=statistics_for(methods) if methods else None,
        text_field=text_field,
        sequences=sequences,
        block_tokens=block_tokens,
        max_blocks=max_blocks,
        batch_blocks=batch_blocks,
        groups=groups,
        shard=shard,
        shards=shards,
        dtype=dtype,
        memory_limit=memory_limit,
        trust_remote_code=trust_remote_code,
    )
    console.print(f"{out}: {len(stats.layers)} MoE layers over {stats.tokens:,} tokens")


@app.command()
def merge_stats(
    parts: Annotated[
        list[str], typer.Argument(metavar="STATS...", help="Stats of shards or of several data sets, same model")
    ],
    out: Annotated[str, typer.Option(metavar="FILE", help="where to write their sum")],
) -> None:
    """Add Stats up: the sum is what one calibration over all the data would have given."""
    from moeprune.steps import calibrate as step

    stats = step.merge_stats(parts, out)
    console.print(f"{out}: {stats.tokens:,} tokens from {len(parts)} files")


@app.command()
def cluster(
    stats: StatsOption,
    out: Annotated[str, typer.Option(metavar="FILE", help="where to write the Clusters")],
    similarity: Annotated[str, typer.Option(help=SIMILARITY_HELP)] = "outputs",
    algorithm: Annotated[str, typer.Option(help=ALGORITHM_HELP)] = "ward",
    clusters_per_layer: Annotated[str, typer.Option(help=CLUSTERS_HELP)] = PUBLISHED,
    model: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="the original model; needed for the similarity of parameters"),
    ] = None,
    trust_remote_code: TrustOption = False,
) -> None:
    """Group the experts of each layer by how alike they are (Clusters)."""
    from moeprune.steps import cluster as step

    clusters = step.cluster(
        stats,
        out,
        similarity=similarity,
        algorithm=algorithm,
        clusters_per_layer=clusters_per_layer,
        model=model,
        trust_remote_code=trust_remote_code,
    )
    console.print(f"{out}: {clusters.counts} clusters in each of {len(clusters.layers)} layers")


@app.command()
def apply(
    model: ModelOption,
    plan: PlanOption,
    out: Annotated[str, typer.Option(metavar="DIR", help="where to write the pruned model")],
    stats: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="the Stats that the Plan was made from, where it takes numbers from them"),
    ] = None,
    shard_megabytes: Annotated[
        int, typer.Option(min=1, help="most bytes of tensors in one file; to or from S3, two of them lie here")
    ] = 1024,
    trust_remote_code: TrustOption = False,
) -> None:
    """Carry out a Plan: write the pruned model. Interrupted, the same command goes on where it was."""
    from moeprune.steps import prune as step

    made = step.apply(
        model, plan, out, stats=stats, shard_bytes=shard_megabytes << 20, trust_remote_code=trust_remote_code
    )
    needs_code = ""
    if made.needs_code:
        needs_code = "; it brings a modelling file, so load it with trust_remote_code=True"
    console.print(f"{out}: written{needs_code}")
    if made.plan.recovery:
        console.print("The plan asks for what stays to be fitted next: `moeprune recover`; until then it is worse.")
    if made.plan.sparsity:
        console.print(f"{made.zeros:,} of {made.parameters:,} parameters were made zero. {ZEROS_TAKE_ROOM}")


@app.command()
def recover(
    model: ModelOption,
    pruned: Annotated[str, typer.Option(metavar="MODEL", help="what `moeprune apply` made of it by the plan")],
    plan: PlanOption,
    data: DataOption,
    out: Annotated[str, typer.Option(metavar="DIR", help="where to write the recovered model")],
    text_field: FieldOption = "text",
    block_tokens: BlockOption = 256,
    max_blocks: Annotated[int, typer.Option(help="blocks to fit on at most")] = 128,
    trust_remote_code: TrustOption = False,
) -> None:
    """Fit what a plan left, layer after layer, to what the original puts out: least squares, no training."""
    from moeprune.steps import recover as step

    result = step.recover(
        model,
        pruned,
        plan,
        data,
        out,
        text_field=text_field,
        block_tokens=block_tokens,
        max_blocks=max_blocks,
        trust_remote_code=trust_remote_code,
    )
    before, after = (sum(errors.values()) / len(errors) for errors in (result.error_before, result.error_after))
    console.print(
        f"{out}: the experts' outputs on text held out miss {before:.3f} -> {after:.3f} of what they were (squares)"
    )


@app.command()
def evaluate(
    model: Annotated[
        list[str],
        typer.Option(
            metavar="[NAME=]MODEL",
            help="repeatable; the original first. Without a name: original, then the directory's",
        ),
    ],
    data: Annotated[list[str], typer.Option(metavar="DATA", help="repeatable; the pruned-for domain first")],
    out: Annotated[str, typer.Option(metavar="FILE", help="where to write the Report (JSON)")],
    page: Annotated[str | None, typer.Option(metavar="FILE", help="where to write its page (HTML)")] = None,
    clusters: Annotated[
        str | None, typer.Option(metavar="FILE", help="Clusters of the original, to show on the page")
    ] = None,
    text_field: FieldOption = "text",
    block_tokens: BlockOption = 256,
    max_blocks: Annotated[int, typer.Option(help="blocks of each text at most")] = 32,
    batch_blocks: BatchOption = 8,
    trust_remote_code: TrustOption = False,
) -> None:
    """Measure models on the same texts: quality per domain, size, memory, speed (a Report)."""
    from moeprune.evaluation.table import show
    from moeprune.steps import evaluate as step

    report = step.evaluate(
        [_named(place, given) for place, given in enumerate(model)],
        data,
        out,
        page_out=page,
        clusters=clusters,
        text_field=text_field,
        block_tokens=block_tokens,
        max_blocks=max_blocks,
        batch_blocks=batch_blocks,
        trust_remote_code=trust_remote_code,
    )
    show(report, console)
    console.print(f"{out}: written" + (f", and its page {page}" if page else ""))


def _named(place: int, given: str) -> Any:
    from moeprune.steps.evaluate import Named

    name, equals, address = given.partition("=")
    if equals:
        return Named(name, address)
    return Named("original" if place == 0 else given.rstrip("/").rpartition("/")[2], given)


@app.command()
def promote(
    report: Annotated[str, typer.Option(metavar="FILE", help="the Report that measured the model")],
    model: Annotated[str, typer.Option(metavar="MODEL", help="the checkpoint to register")],
    name: Annotated[str, typer.Option(help="of the registered model")],
    candidate: Annotated[
        str, typer.Option(help="its name in the Report; default: the one that the Report is about")
    ] = "",
    max_loss_increase: Annotated[
        float, typer.Option(metavar="NATS", help="most it may lose on the pruned-for domain, per token")
    ] = 0.25,
    alias: Annotated[str, typer.Option(help="moved to the new version")] = "champion",
) -> None:
    """Register the model in MLflow if it lost little enough. Exit code 3 where it did not."""
    from moeprune.steps import promote as step

    verdict = step.promote(
        report, model, name, candidate=candidate, max_loss_increase_nats=max_loss_increase, alias=alias
    )
    console.print(verdict.sentence)
    if not verdict.passed:
        raise typer.Exit(3)


def _print_version(wanted: bool) -> None:
    if wanted:
        console.print(moeprune.__version__)
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass
