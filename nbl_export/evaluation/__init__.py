"""Quality of the exported graphs on benchmarks and texts.

scorer.py      log-likelihoods and greedy text on a graph
lm.py          the same as a model of lm-evaluation-harness, which makes prompts and computes metrics
tasks.py       tasks of the harness, and their samples as items
measure.py     standard errors, of paired differences too, and a text in windows
length.py      loss by position, retrieval and copying in long windows
results.py     eval.json: the figures, and which of them are still valid
"""
