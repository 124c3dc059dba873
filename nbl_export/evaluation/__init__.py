"""Quality of the exported graphs and of the torch models on benchmarks and texts.

    scorer.py      log-likelihoods and greedy text on a graph         lm.py   the same for lm-evaluation-harness
    reader.py      a graph or a torch model that scores texts
    tasks.py       benchmark by name, from the hub or from local files
    measure.py     a benchmark, or a text in windows, on a model, with standard errors
    length.py      loss by position, retrieval and copying in long windows
    results.py     eval.json: the figures, and which of them are still valid

lm-evaluation-harness makes prompts and computes metrics. This package brings models, documents of local files, paired
differences and quality at length. `python -m nbl_export.evaluation` is the harness' own command line with the model
`nbl-onnx`.
"""
