"""How many questions models answer as the original does, asked by lm-eval: which of four pieces goes on with a text?

    python benchmarks/tasks.py --model NAME=CHECKPOINT --model NAME=CHECKPOINT ... [--domain NAME=TRAIN,HELD ...]
        [--questions 200]

The first model is what the others are held against. The questions are made of the domains' held-out texts
(`continuations.py`); the model's answer is the likeliest for its length in characters, lm-eval's `acc_norm`. Nothing is
generated and nothing fetched.
"""

from __future__ import annotations

import argparse
import math
import statistics
from dataclasses import asdict
from typing import Any

import lm_eval
from continuations import Question, questions
from datasets import Dataset
from lm_eval.api.task import ConfigurableTask
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager
from measuring import publish
from quality_table.texts import BUILTIN, Domain

from moeprune import places
from moeprune.checkpoint.loading import Checkpoint
from moeprune.steps.machine import quieten
from moeprune.texts import read_documents

_METRIC = "acc_norm"
_LEAST_QUESTIONS = 2  # of which an error can be told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="NAME=CHECKPOINT")
    parser.add_argument("--domain", action="append", default=[], metavar="NAME=TRAIN,HELD")
    parser.add_argument("--questions", type=int, default=200, help="of each domain, at most")
    parser.add_argument("--batch", type=int, default=16, help="answers in a pass")
    parser.add_argument("--name", default="reference", help="of the results")
    options = parser.parse_args()
    quieten()
    domains = [Domain.parse(text) for text in options.domain] or BUILTIN
    models = dict(one.partition("=")[::2] for one in options.model)
    if not all(models.values()):
        parser.error("--model takes NAME=CHECKPOINT")
    asked = {domain.name: questions(list(read_documents(domain.held)), options.questions) for domain in domains}
    if few := [name for name, some in asked.items() if len(some) < _LEAST_QUESTIONS]:
        parser.error(
            f"the held-out text of {few[0]} makes less than {_LEAST_QUESTIONS} questions; ask more, of more text"
        )
    right = {name: answer(address, asked, options.batch) for name, address in models.items()}
    original = next(iter(right.values()))
    rows = [_row(name, found, original) for name, found in right.items()]
    count = ", ".join(f"{len(some)} of {name}" for name, some in asked.items())
    notes = (
        f"Questions: {count}; by chance a quarter is answered right. The mean is over the domains; the share of the "
        "original's comes with its standard error, by question (both answer the same ones)."
    )
    publish(f"tasks-{options.name}", "Questions answered right", rows, right, notes, script="tasks")


def answer(address: str, asked: dict[str, list[Question]], batch: int) -> dict[str, list[bool]]:
    """Which questions of each domain the model at an address answers right."""
    with places.local_model(address) as directory:
        checkpoint = Checkpoint(directory)
        model = HFLM(pretrained=checkpoint.load().eval(), tokenizer=checkpoint.tokenizer(), batch_size=batch)
        found = lm_eval.simple_evaluate(
            model,
            tasks=[_task(name, some) for name, some in asked.items()],
            task_manager=TaskManager(include_defaults=False),  # which would read the files of thousands
            bootstrap_iters=0,
        )
    by_domain: dict[str, list[Any]] = found["samples"]
    return {
        name: [bool(sample[_METRIC]) for sample in sorted(by_domain[name], key=lambda sample: sample["doc_id"])]
        for name in asked
    }


def _task(name: str, some: list[Question]) -> ConfigurableTask:
    documents = Dataset.from_list([asdict(question) for question in some])
    return ConfigurableTask(
        config={
            "task": name,
            "custom_dataset": lambda **_: {"test": documents},
            "test_split": "test",
            "output_type": "multiple_choice",
            "doc_to_text": "{{context}}",
            "doc_to_choice": "{{answers}}",
            "doc_to_target": "{{right}}",
            "target_delimiter": "",  # an answer brings its whitespace
            "metric_list": [{"metric": _METRIC}],
        }
    )


def _row(name: str, found: dict[str, list[bool]], original: dict[str, list[bool]]) -> dict[str, str]:
    mean = statistics.mean(map(statistics.mean, found.values()))
    whole = statistics.mean(map(statistics.mean, original.values()))
    # A mean of means, so the squares of the domains' errors add up.
    errors = [_error(found[domain], original[domain]) for domain in found]
    error = math.sqrt(sum(square**2 for square in errors)) / len(errors)
    return {
        "model": name,
        **{domain: f"{statistics.mean(some):.1%}" for domain, some in found.items()},
        "mean": f"{mean:.1%}",
        "of the original's": f"{mean / whole:.1%} ± {error / whole:.1%}",
    }


def _error(found: list[bool], original: list[bool]) -> float:
    """Standard error of the difference of two means over the same questions."""
    differences = [int(one) - int(other) for one, other in zip(found, original, strict=True)]
    return statistics.stdev(differences) / math.sqrt(len(differences))


if __name__ == "__main__":
    main()
