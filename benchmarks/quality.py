"""What every method keeps of a model, at every size: `make bench-quality`.

    python benchmarks/quality.py
    python benchmarks/quality.py --model M --domain law=law.jsonl,law-held.jsonl --domain code=c.jsonl,c-held.jsonl
    python benchmarks/quality.py --method reap --method c-prune:representative=nearest --method reap+recovery

Each method is calibrated on equal parts of all domains (with --alone also on each domain by itself, and judged on
it), cut, and measured on held-out text, for several draws of the calibration text. Whatever was measured is kept below
--state: the same command goes on where it was stopped, and another method or draw adds its own part only. The table,
the numbers and the picture are written to --out as quality-NAME.md, .json and .png.
"""

if __name__ == "__main__":  # the processes that measure read this file, too, and need nothing of it
    from quality_table.command import main

    main(__doc__)
