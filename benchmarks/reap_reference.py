"""What `llmcompressor` keeps by REAP, as numbers that the tests hold ours against.

    make reap-reference         (or: python benchmarks/reap_reference.py --peer-python build/peer/bin/python)

Models and tokens are made from a seed, by generators whose numbers are the same in every release
(`tests/reap_models.py`). `llmcompressor` prunes each at several ratios, and what it keeps, layer by layer, goes into
`tests/reference/reap.json` with the versions that said so. `tests/test_reap_reference.py` then needs no llmcompressor.

It runs each model as a whole (its pipeline `basic`). By default it goes layer by layer, and shows each layer what the
layers before it, pruned already, put out; the paper's scores, like ours, are of the original model, whatever the ratio.
And in that default, release 0.14.0.1 with transformers 5.17 traces Qwen3-MoE and Mixtral without their causal mask, so
that tokens see those after them: what it counts there is of another model.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

from measuring import run

from moeprune.steps import machine

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
import reap_models as reference
import tiny

_PEER = Path(__file__).parent / "peer_reap_kept.py"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer-python", required=True, type=Path)
    arguments = parser.parse_args()
    machine.quieten()
    with tempfile.TemporaryDirectory(prefix="moeprune-reap-") as scratch:
        tokens = Path(scratch) / "tokens.json"
        tokens.write_text(json.dumps(reference.token_ids().tolist()))
        models = [reference.write(Path(scratch) / family, family) for family in reference.FAMILIES]
        for model in models:
            tiny.tokenizer().save_pretrained(model)  # without which it reads no model
        ratios = ",".join(map(str, reference.RATIOS))
        ran = run([arguments.peer_python, _PEER, tokens, ratios, *models], OMP_NUM_THREADS="1")
    told = json.loads(next(line for line in reversed(ran.output.splitlines()) if line.startswith("{")))
    reference.FILE.parent.mkdir(exist_ok=True)
    reference.FILE.write_text(as_text(told))
    sys.stdout.write(f"written: {reference.FILE}\n")


def as_text(told: dict[str, Any]) -> str:
    """JSON with a line for each layer."""
    text = json.dumps(told, indent=1)
    return re.sub(r"\[\s+([\d,\s]+?)\s+\]", lambda found: f"[{' '.join(found[1].split())}]", text) + "\n"


if __name__ == "__main__":
    main()
