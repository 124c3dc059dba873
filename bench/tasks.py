"""Complete LAMBADA, ARC-Easy and PIQA on the original, and on models with closed-form maps, other maps or none.

    python bench/tasks.py MODEL DATA RESULT.json --rows "paper 8=cca:0,7,24-29" "ours 8=maps:DIR/maps.safetensors"

DATA has the tasks' files (`stock_rows.py`). A row is NAME=HOW:WHAT with one of these values of HOW:WHAT:

    cca:LAYERS     the closed form on the residual stream, on 65,536 tokens of the default text
    drop:LAYERS    attention dropped
    maps:FILE      maps of a run

RESULT.json is written after each task, and finished rows of a task are not computed again. The models run in torch with
float32 weights, and with bfloat16 products if the processor has them (not with --float32). All rows of one task use the
same batches, and the original is computed once. Prompts, splits and metrics are those of lm-evaluation-harness. Errors
are of the paired difference on the same items.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bed import Bed, log

TASKS = ("lambada_openai", "arc_easy", "piqa")
FIGURES = {"lambada_openai": ("acc", "perplexity"), "arc_easy": ("acc", "acc_norm"), "piqa": ("acc", "acc_norm")}
_TOKENS = 4096  # in a batch


def _read(request: Any) -> tuple[int, ...]:
    """The tokens that a model reads for a request: all but the last one, which is only predicted."""
    return (*request.context, *request.continuation[:-1])


class Row:
    """A model with maps in place of some layers' attention."""

    def __init__(self, name: str, maps: Mapping[int, Any], tap: str, about: dict[str, Any]) -> None:
        self.name, self.maps, self.tap, self.about = name, maps, tap, {"layers": sorted(maps), "tap": tap, **about}


class Everyone:
    """Scores of all rows and of the original for the same requests, computed together."""

    def __init__(self, model: Any, rows: Sequence[Row], bf16_matmul: bool) -> None:
        self.model, self.decoder, self.rows, self.bf16_matmul = model, model.get_decoder(), rows, bf16_matmul
        self.modules = {row.name: {i: m.module().eval() for i, m in row.maps.items()} for row in rows}

    def score(self, requests: Sequence[Any]) -> dict[str, dict[Any, Any]]:
        """Row (and "original") -> request -> score."""
        found: dict[str, dict[Any, Any]] = {"original": {}, **{row.name: {} for row in self.rows}}
        waiting = sorted(set(requests), key=lambda r: (-len(_read(r)), _read(r), r.continuation))
        total, started = len(waiting), time.monotonic()
        while waiting:
            size = max(1, _TOKENS // len(_read(waiting[0])))
            batch, waiting = waiting[:size], waiting[size:]
            for name, scores in self._batch(batch).items():
                found[name].update(zip(batch, scores, strict=True))
            done = total - len(waiting)
            if done * 10 // total > (done - size) * 10 // total:
                log(f"  {done} of {total} requests, {time.monotonic() - started:.0f} s")
        return found

    def _batch(self, batch: Sequence[Any]) -> dict[str, list[Any]]:
        import torch

        from nbl_export.methods.applied import run_from, switched

        ids = torch.zeros(len(batch), len(_read(batch[0])), dtype=torch.long)
        for place, request in enumerate(batch):  # right padding: no earlier token attends to it
            ids[place, : len(_read(request))] = torch.tensor(_read(request))
        first = {row.name: min(row.maps) for row in self.rows}
        seen: dict[int, Any] = {}
        hooks = [
            self.decoder.layers[i].register_forward_pre_hook(lambda _m, args, i=i: seen.__setitem__(i, args[0]))
            for i in set(first.values())
        ]
        with torch.inference_mode(), torch.autocast("cpu", torch.bfloat16, enabled=self.bf16_matmul):
            last = self.decoder(input_ids=ids, use_cache=False).last_hidden_state
            for hook in hooks:
                hook.remove()
            found = {"original": self._scores(last, batch)}
            for row in self.rows:
                with switched(self.decoder, self.modules[row.name], row.tap, first[row.name]):
                    found[row.name] = self._scores(run_from(self.decoder, seen[first[row.name]]), batch)
        return found

    def _scores(self, last_BTD: Any, batch: Sequence[Any]) -> list[Any]:
        import torch

        from nbl_export.model.head import logits_of

        places = [(b, len(r.context) - 1 + k) for b, r in enumerate(batch) for k in range(len(r.continuation))]
        wanted = torch.tensor([token for r in batch for token in r.continuation])
        rows, at = map(torch.tensor, zip(*places, strict=True))
        logits = logits_of(self.model, last_BTD[rows, at])
        said = logits.log_softmax(-1).gather(1, wanted[:, None])[:, 0].double()
        greedy = logits.argmax(-1) == wanted
        scores, begin = [], 0
        for request in batch:
            end = begin + len(request.continuation)
            scores.append((said[begin:end].sum().item(), bool(greedy[begin:end].all())))
            begin = end
        return scores


def answering(tokenizer: Any, max_length: int) -> Any:
    """A model of the harness that answers from given scores; without scores it records the requests."""
    from nbl_export.evaluation.lm import DecoderLM

    class Answers(DecoderLM):  # uses its tokenisation without a decoder
        def __init__(self) -> None:
            super(DecoderLM, self).__init__()
            self.tokenizer, self.max_length = tokenizer, max_length
            self.progress = lambda _done, _total: None
            self.asked: list[Any] = []
            self.scores: dict[Any, Any] | None = None
            self.scorer = self

        def score(self, requests: Sequence[Any], _progress: Any) -> list[Any]:
            self.asked = list(requests)
            return [(0.0, False) if self.scores is None else self.scores[r] for r in requests]

    return Answers()


def measured(outcome: Any, original: Any, names: Sequence[str]) -> dict[str, Any]:
    """Figures with their errors, and their differences from the original's on the same items."""
    from nbl_export.evaluation.measure import paired_difference

    found = {}
    for name in names:
        ours, theirs = outcome.metrics[name], original.metrics[name]
        change, error = paired_difference(ours.aggregation, ours.items, theirs.items)
        found[name] = {"value": ours.value, "stderr": ours.stderr, "change": change, "change_stderr": error}
    return found


def rows_of(named: Sequence[str], bed: Any) -> list[Row]:
    from nbl_export.methods.linear.maps import Linear
    from nbl_export.methods.maps_file import load_maps, maps_in
    from nbl_export.options.goals import parse_layers

    rows = []
    for text in named:
        name, _, what = text.partition("=")
        how, _, which = what.partition(":")
        if how == "maps":
            layers, tap = maps_in(Path(which))
            rows.append(Row(name, load_maps(Path(which), layers), tap or "residual", {"how": how}))
            continue
        layers = tuple(parse_layers(which, bed.spec.num_layers))  # type: ignore[arg-type]
        dropped = Linear.zeros(bed.spec.hidden_size)
        maps = dict.fromkeys(layers, dropped) if how == "drop" else bed.maps("residual", layers)
        rows.append(Row(name, maps, "residual", {"how": how}))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("result", type=Path)
    parser.add_argument("--rows", nargs="+", required=True)
    parser.add_argument("--tasks", default=",".join(TASKS))
    parser.add_argument("--limit", type=int, help="documents of each task (default all)")
    parser.add_argument("--float32", action="store_true")
    options = parser.parse_args()
    import torch

    from nbl_export.evaluation import tasks
    from nbl_export.files import versions, write_json
    from nbl_export.measure.benchmark import machine
    from nbl_export.model import bfloat16

    result = json.loads(options.result.read_text(encoding="utf-8")) if options.result.exists() else {"tasks": {}}
    bed = Bed(
        options.model, options.data, "default", 1, taps=("residual",) if any("=cca:" in r for r in options.rows) else ()
    )
    rows = rows_of(options.rows, bed)
    bf16_matmul = not options.float32 and bfloat16.has_native_bf16(torch.device("cpu"))
    result |= {"machine": machine(), "versions": versions(("torch", "transformers", "lm_eval"))}
    result |= {"products": "bfloat16" if bf16_matmul else "float32", "calibration": bed.text}
    names = options.tasks.split(",")
    subjects = tasks.load_tasks(tuple(f"{options.data}/{name}.yaml" for name in names), options.limit)
    for name, subject in zip(names, subjects, strict=True):
        entry = result["tasks"].setdefault(name, {"documents": 0, "rows": {}})
        documents = subject.limit or subject.data["documents"]
        if entry["documents"] != documents:
            entry.update(documents=documents, rows={})
        missing = [row for row in rows if row.name not in entry["rows"]]
        if not missing:
            continue
        lm = answering(bed.tokenizer, bed.spec.max_positions)
        tasks.run_task(subject.value, lm, subject.limit)
        log(f"{name}: {len(lm.asked)} requests, {sum(len(_read(r)) for r in lm.asked)} tokens")
        scores = Everyone(bed.model, missing, bf16_matmul).score(lm.asked)
        outcomes = {}
        for row, lm.scores in scores.items():
            outcomes[row] = tasks.run_task(subject.value, lm, subject.limit)
        about = {"original": {}, **{row.name: row.about for row in missing}}
        for row, outcome in outcomes.items():
            entry["rows"][row] = {**about[row], **measured(outcome, outcomes["original"], FIGURES[name])}
            log(f"{name}, {row}: {entry['rows'][row]}")
        write_json(options.result, result)


if __name__ == "__main__":
    main()
