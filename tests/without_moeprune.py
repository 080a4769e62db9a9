"""Run as a program of its own: load checkpoints where moeprune cannot be imported, run them, save and load them again.

    python -I without_moeprune.py cases.json results.pt

Each case: {"name", "directory", "trust", "ids"}. The results, by name: the logits, those after saving and
loading again, the generated ids, the experts of each layer; or the error.
"""

import json
import sys
import traceback
from importlib.abc import MetaPathFinder
from pathlib import Path


class _NotInstalled(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):  # type: ignore[no-untyped-def]
        if name.partition(".")[0] == "moeprune":
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, _NotInstalled())

import torch  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer  # noqa: E402


def is_expert_table(tensor):  # type: ignore[no-untyped-def]
    return tensor.dim() == 2 and not tensor.is_floating_point()


def run(case, scratch):  # type: ignore[no-untyped-def]
    ids = torch.tensor(case["ids"])

    def load(directory):  # type: ignore[no-untyped-def]
        model, info = AutoModelForCausalLM.from_pretrained(
            directory, dtype=torch.float32, trust_remote_code=case["trust"], output_loading_info=True
        )
        problems = {kind: sorted(map(str, keys)) for kind, keys in info.items() if keys}
        assert not problems, f"{directory}: {problems}"
        return model.eval()

    model = load(case["directory"])
    if (Path(case["directory"]) / "tokenizer.json").is_file():
        tokenizer = AutoTokenizer.from_pretrained(case["directory"])
        assert tokenizer.decode(tokenizer("of the people")["input_ids"]) == "of the people"
    model.save_pretrained(scratch / case["name"])
    again = load(scratch / case["name"])
    with torch.inference_mode():
        return {
            "logits": model(input_ids=ids, use_cache=False).logits,
            "again": again(input_ids=ids, use_cache=False).logits,
            "generated": model.generate(ids, do_sample=False, max_new_tokens=case.get("new_tokens")),
            "experts": [module.num_experts for name, module in model.named_modules() if name.endswith(".experts")],
            "class": type(model).__name__,
            "tables": {name: table for name, table in model.named_buffers() if is_expert_table(table)},
        }


def main(cases_path, results_path):  # type: ignore[no-untyped-def]
    torch.set_num_threads(1)
    results = {}
    for case in json.loads(Path(cases_path).read_text()):
        try:
            results[case["name"]] = run(case, Path(results_path).parent / "again")
        except Exception:
            results[case["name"]] = {"error": traceback.format_exc()}
    try:
        import moeprune  # noqa: F401
    except ModuleNotFoundError:
        assert not [name for name in sys.modules if name.partition(".")[0] == "moeprune"]
    else:
        raise AssertionError("moeprune can be imported")
    torch.save(results, results_path)


if __name__ == "__main__":
    main(*sys.argv[1:])
