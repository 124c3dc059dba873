"""Time of a step of several rows behind a prompt, in ONNX Runtime on a CPU: what rows beside a decoded one cost.

    python bench/step_rows.py DIR > bench/results/step-rows-NAME.json

DIR is a folder of ONNX Runtime GenAI without an exit layer, such as `original/` of a run. The sizes take turns. Times
are in ms, of all layers: a row that only runs above an exit layer costs its share of them.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import onnxruntime_genai as og

PROMPT, ROUNDS = 768, 15
ROWS = (1, 5, 9, 17)  # a decoded token, and 4, 8 or 16 rows beside it
THREADS = 2


def main(folder: Path) -> None:
    config = og.Config(str(folder))
    config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": THREADS}}}}))
    model = og.Model(config)
    params = og.GeneratorParams(model)
    params.set_search_options(max_length=PROMPT + 64, do_sample=False)
    generator = og.Generator(model, params)
    generator.append_tokens([1000 + n for n in range(PROMPT)])
    times: dict[int, list[float]] = {rows: [] for rows in ROWS}
    for _ in range(ROUNDS + 1):
        for rows in ROWS:
            started = time.perf_counter()
            generator.append_tokens([500 + n for n in range(rows)])
            times[rows].append(1000 * (time.perf_counter() - started))
            generator.rewind_to(PROMPT)
    kept = {rows: [round(t, 3) for t in each[1:]] for rows, each in times.items()}  # the first round warms up
    print(json.dumps({"model": folder.resolve().parent.name, "prompt": PROMPT, "threads": THREADS, "ms": kept}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
