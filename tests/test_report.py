"""The Report on disk, in a terminal, in figures and as a page."""

from __future__ import annotations

import io
import json
import math
import re
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from pydantic import ValidationError
from rich.console import Console

from moeprune.errors import InputError
from moeprune.evaluation import figures, page
from moeprune.evaluation.report import Candidate, DataSet, Quality, Report
from moeprune.evaluation.table import show

DOMAINS = ("arithmetic", "code", "prose")


def quality(loss: float, accuracy: float = 0.7) -> Quality:
    return Quality(loss_nats=loss, perplexity=math.exp(loss), accuracy=accuracy, tokens=4096)


def candidate(name: str, counts: list[int], losses: tuple[float, float, float], **changes: object) -> Candidate:
    known: dict[str, object] = {
        "name": name,
        "address": f"s3://bucket/{name}",
        "weights": name,
        "method": None if name == "original" else "c-prune",
        "experts_per_layer": {f"model.layers.{layer}.mlp.experts": count for layer, count in enumerate(counts)},
        "parameters": 100_000 * sum(counts),
        "bytes_on_disk": 200_000 * sum(counts),
        "peak_memory_bytes": 300_000 * sum(counts),
        "tokens_per_second": 9000.0,
        "quality": {domain: quality(loss) for domain, loss in zip(DOMAINS, losses, strict=True)},
    }
    return Candidate.model_validate(known | changes)


def report(*candidates: Candidate, layers: int = 3, experts: int = 8, domain: str = "code") -> Report:
    random = np.random.default_rng(0)
    uneven = [experts - 1 - layer % 3 for layer in range(layers)]
    paths = [f"model.layers.{layer}.mlp.experts" for layer in range(layers)]
    return Report(
        domain=domain,
        data=[
            DataSet(name=each, address=f"builtin://{each}", blocks=8, tokens=4096, fingerprint="sha256:0a1b")
            for each in DOMAINS
        ],
        candidates=list(candidates)
        or [
            candidate("original", [experts] * layers, (0.6, 1.2, 1.9)),
            candidate("pruned", uneven, (1.6, 1.3, 2.9), tokens_per_second=9900.0),
            candidate("distilled", uneven, (1.4, 1.21, 2.6)),
            candidate("random", [experts // 2] * layers, (1.5, 2.5, 2.8), peak_memory_bytes=None),
        ],
        expert_use={each: {path: random.dirichlet(np.ones(experts)).tolist() for path in paths} for each in DOMAINS},
        machine={"device": "cpu", "dtype": "float32"},
    )


def similarity(layers: int = 3, experts: int = 8) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    random = np.random.default_rng(1)
    result = {}
    for layer in range(layers):
        directions = random.normal(size=(experts, 4))
        directions /= np.linalg.norm(directions, axis=1, keepdims=True)
        result[f"model.layers.{layer}.mlp.experts"] = (directions @ directions.T, random.integers(0, 3, size=experts))
    return result


def keep(of: Report) -> dict[str, list[int]]:
    return {layer: list(range(count)) for layer, count in of.candidates[1].experts_per_layer.items()}


def printed(of: Report, width: int | None = None) -> str:
    out = io.StringIO()
    show(of, Console(file=out), width)
    return out.getvalue()


@pytest.fixture(scope="module")
def drawn() -> page.Figures:
    """All figures of the default report; drawing them is what takes the time of these tests."""
    return figures.all_of(report(), similarity(), keep(report()))


class Elements(HTMLParser):
    """What a browser would make of a page: the elements with their attributes, and the text."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, {name: value or "" for name, value in attributes}))

    def handle_data(self, data: str) -> None:
        self.text += data


# On disk


def test_what_is_saved_is_what_is_loaded(tmp_path: Path) -> None:
    path = tmp_path / "new" / "report.json"
    report().save(path)
    assert Report.load(path) == report()
    assert [each.name for each in path.parent.iterdir()] == ["report.json"], "something was left beside it"


def test_a_ruined_model_survives_the_round_trip(tmp_path: Path) -> None:
    ruined = candidate("pruned", [4, 4, 4], (1, 1, 1), quality={each: quality(1.0) for each in DOMAINS} | {
        "code": Quality(loss_nats=math.nan, perplexity=math.inf, accuracy=0.0, tokens=1)
    })  # fmt: skip
    path = tmp_path / "report.json"
    report(candidate("original", [8, 8, 8], (1, 1, 1)), ruined).save(path)
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    code = Report.load(path).candidates[1].quality["code"]
    assert math.isnan(code.loss_nats)
    assert math.isinf(code.perplexity)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (None, "Cannot read the report"),
        ("not json {", "it is not JSON"),
        ("[1, 2]", "no field moeprune_report"),
        ('{"domain": "code"}', "no field moeprune_report"),
        ('{"moeprune_report": 1}', "of version 1, and this moeprune reads version 2"),
        ('{"moeprune_report": 2}', "damaged at domain"),
    ],
)
def test_what_is_not_a_report_is_refused_with_a_sentence(tmp_path: Path, content: str | None, says: str) -> None:
    path = tmp_path / "report.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(InputError, match=says) as refused:
        Report.load(path)
    assert str(path) in str(refused.value)


def test_a_damaged_field_is_named(tmp_path: Path) -> None:
    content = report().model_dump(mode="json")
    content["candidates"][1]["quality"]["code"]["accuracy"] = 71.9
    path = tmp_path / "report.json"
    path.write_text(json.dumps(content))
    with pytest.raises(InputError, match=r"damaged at candidates\.1\.quality\.code\.accuracy"):
        Report.load(path)


def test_an_interrupted_save_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "report.json"
    report().save(path)
    before = path.read_bytes()

    def interrupted(written: Path, *_: object, **__: object) -> None:
        written.touch()
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_text", interrupted)
    with pytest.raises(KeyboardInterrupt):
        report(domain="prose").save(path)
    assert path.read_bytes() == before
    assert list(tmp_path.iterdir()) == [path]


def test_candidates_that_cannot_be_compared_are_refused() -> None:
    original = candidate("original", [8, 8, 8], (1, 1, 1))
    with pytest.raises(ValidationError, match="same name"):
        report(original, original)
    with pytest.raises(ValidationError, match="'law' was not measured"):
        report(domain="law")
    with pytest.raises(ValidationError, match="not measured on the same domains"):
        report(original, candidate("pruned", [4, 4, 4], (1, 1, 1), quality={"code": quality(1.0)}))


def test_layers_without_a_router_are_told() -> None:
    condensed = candidate("pruned", [8, 8], (1, 4, 0.9), method="cd-moe")
    measured = report(candidate("original", [8] * 3, (1, 1, 1)), condensed)
    assert measured.experts_label(condensed) == "8 in 2 layers"
    text = page.render(measured, {}, {})
    assert "<td>8 in 2 layers</td>" in text
    assert "cd-moe condensed 1 of 3 layers" in text


def test_ratios_are_against_the_original() -> None:
    measured = report()
    pruned, ignorant = measured.candidate("pruned"), measured.candidate("random")
    assert measured.bytes_ratio(pruned) == pytest.approx(18 / 24)
    assert measured.parameters_ratio(pruned) == pytest.approx(18 / 24)
    assert measured.speed_ratio(pruned) == pytest.approx(1.1)
    assert measured.memory_ratio(pruned) == pytest.approx(18 / 24)
    assert measured.memory_ratio(ignorant) is None
    assert measured.loss_increase(pruned) == pytest.approx(0.1)
    assert measured.loss_increase(pruned, "prose") == pytest.approx(1.0)
    assert measured.domains == ["code", "arithmetic", "prose"]
    assert measured.headline.name == "distilled"
    assert pruned.experts_label == "5-7 (mean 6.0)"
    assert ignorant.experts_label == "4"
    assert measured.experts_label(ignorant) == "4"
    with pytest.raises(InputError, match="no candidate 'best'; it has: original, pruned"):
        measured.candidate("best")


# In a terminal


def test_the_table_says_what_was_measured() -> None:
    lines = printed(report(), width=120).splitlines()
    row = {line[:20].strip(): line[20:].split() for line in lines}
    first = next(index for index, line in enumerate(lines) if "perplexity" in line)
    assert row["experts per layer"] == ["8", *["5-7", "(mean", "6.0)"] * 2, "4"]
    assert row["on disk, MB"] == ["4.80", *["3.60", "-25.0%"] * 2, "2.40", "-50.0%"]
    assert row["tokens per second"] == ["9,000", "9,900", "+10.0%", "9,000", "0.0%", "9,000", "0.0%"]
    assert row["peak memory, MiB"][-1] == "-", "what was not measured is not a number"
    assert lines[first - 1].startswith("code (pruned for)"), "the domain pruned for comes first"
    assert lines[first].split() == ["perplexity", "3.320", "3.669", "+10.5%", "3.353", "+1.0%", "12.18", "+267%"]


def test_the_table_follows_other_numbers() -> None:
    bigger = report(
        candidate("original", [128] * 3, (1, 1, 1), bytes_on_disk=61_000_000_000, parameters=30_500_000_000),
        candidate("pruned", [64] * 3, (1, 4, 0.9), bytes_on_disk=32_000_000_000, parameters=16_000_000_000),
        domain="arithmetic",
    )
    text = printed(bigger, width=120)
    assert re.search(r"on disk, GB +61\.0 +32\.0 +-47\.5%", text)
    assert re.search(r"parameters, B +30\.5 +16\.0 +-47\.5%", text)
    assert re.search(r"arithmetic \(pruned for\) *\n *perplexity +2\.718 +2\.718 +0\.0%", text)
    assert re.search(r"code *\n *perplexity +2\.718 +54\.60 +x20", text)
    assert re.search(r"prose *\n *perplexity +2\.718 +2\.460 +-9\.5%", text)


def test_the_table_fits_and_never_folds_a_number(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("COLUMNS", raising=False)
    for width in (None, 100, 120):
        lines = printed(report(), width=width).splitlines()
        assert max(map(len, lines)) <= (width or 120)
        assert sum("experts per layer" in line for line in lines) == 1, "all candidates fit side by side"
    many = [candidate(f"candidate-{index}", [4, 5, 6], (1, 1, 1)) for index in range(9)]
    text = printed(report(candidate("original", [8, 8, 8], (1, 1, 1)), *many), width=80)
    assert max(map(len, text.splitlines())) <= 80
    assert text.count("4-6 (mean 5.0)") == 9
    assert len(re.findall(r"^ +original", text, re.MULTILINE)) > 1, "the original is in front of each part"


def test_the_table_prints_where_only_ascii_can_be(tmp_path: Path) -> None:
    named = candidate("[red]50%[/red]", [4, 4, 4], (1, 1, 1))
    with (tmp_path / "out").open("w", encoding="ascii") as out:
        show(report(candidate("original", [8, 8, 8], (1, 1, 1)), named), Console(file=out))
    assert "[red]50%[/red]" in (tmp_path / "out").read_text(), "a name is not markup"


# In figures


@pytest.mark.parametrize(("layers", "experts"), [(1, 4), (61, 256)])
def test_figures_fit_a_page_whatever_the_model(layers: int, experts: int) -> None:
    measured = report(layers=layers, experts=experts)
    drawn = figures.all_of(measured, similarity(layers, experts), keep(measured))
    assert len(drawn) == 5
    for figure, caption in drawn.values():
        width, height = figure.get_size_inches()
        assert width == 10
        assert 1 < height <= 13
        assert caption.endswith(".")


def test_figures_show_the_numbers_of_the_report() -> None:
    measured = report()
    bars = figures.loss_increase(measured)
    first = bars.axes[0]
    assert first.get_title(loc="left") == "code (pruned for)"
    assert [text.get_text() for text in first.texts] == ["+0.100", "+0.010", "+1.300"]
    lines = figures.experts_kept(measured).axes[0].lines
    assert [line.get_ydata().tolist() for line in lines] == [[8, 8, 8], [7, 6, 5], [4, 4, 4]]  # type: ignore[union-attr]
    use = figures.expert_use(measured, keep(measured)).axes[0].images[0].get_array()
    assert use is not None
    assert (np.diff(use, axis=1) <= 0).all(), "experts are in the order of their use on the domain pruned for"


def test_experts_that_were_removed_are_struck_out() -> None:
    measured = report(candidate("original", [4], (1, 1, 1)), candidate("pruned", [2], (1, 1, 1)), layers=1, experts=4)
    use = {"code": {"model.layers.0.mlp.experts": [0.1, 0.2, 0.3, 0.4]}}
    measured = measured.model_copy(update={"expert_use": use})
    panel = figures.expert_use(measured, {"model.layers.0.mlp.experts": [1, 3]}).axes[0]
    assert [text.get_text() for text in panel.texts] == ["3", "2", "1", "0"]
    spans = np.asarray(panel.lines[0].get_xdata(), dtype=float).reshape(-1, 3)[:, :2]
    assert spans.round().tolist() == [[1, 1], [3, 3]], "experts 2 and 0, in second and fourth place"


def test_one_model_alone_has_no_comparison_to_draw() -> None:
    alone = report(candidate("original", [8, 8, 8], (0.6, 1.2, 1.9)))
    drawn = figures.all_of(alone)
    assert list(drawn) == ["Which experts each domain uses"]
    assert "nothing was pruned" in page.render(alone, drawn, {})


def test_figures_bear_what_is_not_a_number_and_odd_names() -> None:
    lost = {each: Quality(loss_nats=math.nan, perplexity=math.inf, accuracy=0.0, tokens=1) for each in DOMAINS}
    odd = report(
        candidate("original", [8, 8, 8], (1, 1, 1)),
        candidate("_50$% of $x^", [4, 4, 4], (1, 1, 1), quality=lost),
        candidate("n" * 80, [8, 8, 8], (1, 1, 1)),
    )
    flat = {"layer": (np.full((8, 8), np.nan), np.zeros(8, dtype=int))}
    html = page.render(odd, figures.all_of(odd, flat), {})
    assert "_50$% of $x^" in Elements(html).text


# As a page


def test_the_page_is_the_same_each_time(drawn: page.Figures) -> None:
    first = page.render(report(), drawn, {"seed": "0"})
    drawn["Quality against size"][0].savefig(io.BytesIO(), format="png")
    assert page.render(report(), drawn, {"seed": "0"}) == first, "drawing a figure changed it"
    again = figures.all_of(report(), similarity(), keep(report()))
    assert page.render(report(), again, {"seed": "0"}) == first


def test_the_page_needs_nothing_else_and_runs_nothing() -> None:
    measured = report()
    html = page.render(
        measured, figures.all_of(measured, similarity(), keep(measured)), {"run": "http://localhost:5000/#/1"}
    )
    elements = Elements(html).found
    assert not {tag for tag, _ in elements} & {"script", "link", "iframe", "object", "embed", "base"}
    for tag, attributes in elements:
        loaded = [attributes.get("src"), attributes.get("xlink:href"), attributes.get("href") if tag != "a" else None]
        assert all(not address or address.startswith(("#", "data:image/png;base64,")) for address in loaded)
    assert "@import" not in html
    assert all(address.startswith("#") for address in re.findall(r"url\(([^)]*)\)", html))
    assert ("a", "http://localhost:5000/#/1") in [(tag, attributes.get("href")) for tag, attributes in elements]


def test_every_id_is_there_once_and_every_reference_leads_to_one(drawn: page.Figures) -> None:
    html = page.render(report(), drawn, {"seed": "0"})
    found = Elements(html).found
    ids = Counter(attributes["id"] for _, attributes in found if "id" in attributes)
    assert ids.most_common(1)[0][1] == 1
    named = {
        attributes[key]
        for _, attributes in found
        for key in ("aria-labelledby", "aria-describedby")
        if key in attributes
    }
    assert named | set(re.findall(r'(?:url\(|href=")#([^")]+)', html)) <= set(ids)
    figures_in_page = [attributes for tag, attributes in found if tag == "svg"]
    assert len(figures_in_page) == 5
    assert all(each["role"] == "img" and each["aria-labelledby"] for each in figures_in_page)


def test_what_users_named_is_text_and_never_markup() -> None:
    evil = '<script>alert("1")</script>'
    measured = report(
        candidate("original", [8, 8, 8], (1, 1, 1)),
        candidate(evil, [4, 4, 4], (1, 1, 1), address=evil, method=evil),
    )
    drawn = {evil: (figures.loss_increase(measured), evil), "size": (figures.quality_and_size(measured), "")}
    html = page.render(measured, drawn, {evil: "javascript:alert(1)", "run": f'https://x"{evil}'})
    elements = Elements(html)
    assert "script" not in {tag for tag, _ in elements.found}
    assert evil in elements.text
    assert all(attributes["href"].startswith("https://") for tag, attributes in elements.found if tag == "a")


def test_the_page_says_in_one_sentence_what_was_done() -> None:
    text = Elements(page.render(report(), {}, {})).text
    assert (
        "For code, c-prune removed 6 of 24 routed experts (25.0%): the distilled model needs 3.60 instead of 4.80 MB "
        "on disk, and its loss on code is 0.010 nats per token higher than the original's, against +0.70 to +0.80 on "
        "the other domains."
    ) in text
    better = report(
        candidate("original", [8, 8, 8], (1, 1, 1)),
        candidate("tuned", [8, 8, 8], (1, 0.8, 1), method="fine-tuning"),
    )
    text = Elements(page.render(better, {}, {})).text
    assert "fine-tuning kept all 24 routed experts: the tuned model is as large as the original" in text
    assert "0.200 nats per token lower than the original's, against +0.00 on the other domains." in text


def test_the_page_is_written_whole(tmp_path: Path) -> None:
    path = tmp_path / "report.html"
    page.write(path, report(), {}, {"seed": "0"})
    assert path.read_text(encoding="utf-8") == page.render(report(), {}, {"seed": "0"})
    assert list(tmp_path.iterdir()) == [path]
