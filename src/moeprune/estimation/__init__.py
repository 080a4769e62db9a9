"""What a run will need, before it starts: memory, disk, time and pods of each step.

headers        a model's config and the headers of its weights, wherever it lies, and nothing else of it
anatomy        what it is made of: how many parameters are where
expected_plan  a Plan of the size that a method will make
work           what the run is asked to do
machines       what will do it, and how fast that is
needs          a file for each step: what it holds, computes and moves
estimate       all of these together; `table` shows it to people

Every number carries its basis (`amounts`): computed from the model, measured, or assumed.
"""
