"""Experiments on training that makes decoding parallel, read in docs/learning.md: ``python -m benchmarks.learning``.

`problems`: word problems, their tokenizer and scores; `setting`: sizes, models and ways of decoding; `stages`: the
experiments, a function each; `gsm`: supervised fine-tuning; `runner`: which of them are run, and where they are kept.
`choice` and `exponents` are commands of their own. `benchmarks.learning_tables`, `benchmarks.choice_tables` and
`benchmarks.learning_figures` show the results.
"""
