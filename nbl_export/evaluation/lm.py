"""An exported decoder graph as a model of lm-evaluation-harness: `--model nbl-onnx --model_args path=DIR/model`.

`torch_lm` is the harness' own class over a loaded torch model.

Tokenisation is that of the harness' own class for transformers (`lm_eval.models.huggingface.HFLM`), so scores are
comparable. The tokenizer adds special tokens, unless the text already begins with one.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from nbl_export.errors import NblError
from nbl_export.evaluation.reader import near_of, open_graph, torch_reader
from nbl_export.evaluation.scorer import GraphScorer, Request, TokenScores
from nbl_export.model.checkpoint.load import load_tokenizer

__all__ = ["OnnxLM", "torch_lm"]

_NEW_TOKENS = 256
_ROWS = 16
_TORCH_ROWS = 4  # small, because the harness computes log-probabilities of every position of a batch


@register_model("nbl-onnx")
class OnnxLM(TemplateLM):
    """Scores and greedy text of one graph on the CPU.

    Args:
        path: a model directory, such as `model` or `original` of a run.
        batch_size: most sequences of a batch; "auto" is 16. A batch is also bounded by the size of its logits.
        max_length: most tokens read at once; None means the model's positions.
        threads: of ONNX Runtime; None lets ONNX Runtime choose.
        progress: called with (done, total) requests; None draws the harness' own progress bars.

    Raises:
        NblError: there is no such graph, or the graph gives logits of the last position only.
    """

    def __init__(
        self,
        path: str,
        batch_size: int | str | None = "auto",
        max_length: int | None = None,
        threads: int | None = None,
        progress: Callable[[int, int], None] | None = None,
        **_of_other_models: Any,  # the harness passes device and max_batch_size to every model
    ) -> None:
        super().__init__()
        decoder, positions = open_graph(Path(path), int(threads) if threads else None)
        self.tokenizer = load_tokenizer(Path(path))
        self.max_length = min(int(max_length or positions), positions)
        rows = _ROWS if str(batch_size).startswith("auto") or batch_size is None else int(batch_size)
        self.scorer = GraphScorer(decoder, self.max_length, rows, near_of(Path(path)))
        self.batch_size = rows
        self.max_gen_toks = _NEW_TOKENS
        self._path = Path(path).absolute()
        self.progress = progress

    # -- tokens ----------------------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        """The id that ends a text."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The id before a text without context."""
        begin = self.tokenizer.bos_token_id
        return int(self.tokenizer.eos_token_id if begin is None else begin)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_kwargs: Any) -> list[int]:
        """Token ids of a text."""
        if add_special_tokens is None and string.startswith(self.tokenizer.decode(self.prefix_token_id)):
            add_special_tokens = False
        asked = {} if add_special_tokens is None else {"add_special_tokens": add_special_tokens}
        return [int(i) for i in self.tokenizer.encode(string, **asked)]

    def tok_decode(self, tokens: list[int]) -> str:
        """Text of token ids without special tokens."""
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))

    @property
    def tokenizer_name(self) -> str:
        """The key of the harness' cache of chat prompts."""
        return str(self._path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """A conversation as one text, by the model's own template."""
        return str(
            self.tokenizer.apply_chat_template(
                chat_history,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
            )
        )

    # -- requests --------------------------------------------------------------------------------------

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy?) of each continuation after its context."""
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=self.progress is not None)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy?) of each request; TemplateLM.loglikelihood calls this after tokenisation."""
        wanted = [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        found = self.scorer.score(wanted, self.progress or (lambda _done, _total: None))
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def token_scores(self, request: Request) -> TokenScores:
        """Scores of the tokens of one continuation, which may be long."""
        return self.scorer.token_scores(request)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the full length; each token is predicted once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            rolled = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            for pair in rolled:
                windows.append((None, *utils.make_disjoint_window(pair)))
                owners.append(owner)
        totals = [0.0] * len(requests)
        for owner, (loglikelihood, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            totals[owner] += loglikelihood
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy text until a stop sequence, the end of text or the limit.

        Raises:
            NblError: the task asks for sampling.
        """
        eos = str(self.tokenizer.decode([self.eot_token_id]))
        groups: dict[tuple[tuple[str, ...], int], list[int]] = {}
        for index, request in enumerate(requests):
            asked = normalize_gen_kwargs(request.args[1], self.max_gen_toks)
            if asked.get("do_sample"):
                raise NblError("nbl-onnx decodes greedily, but the task asks for sampling; give do_sample=False")
            until = handle_stop_sequences(asked.get("until"), eos=eos)
            groups.setdefault((tuple(until), asked["max_gen_toks"]), []).append(index)
        texts = [""] * len(requests)
        for (until_, limit), indices in groups.items():
            stops = [stop for stop in until_ if stop]
            prompts = [self.tok_encode(requests[i].args[0]) for i in indices]
            for i, ids in zip(indices, self.scorer.generate(prompts, limit, self._ended(stops)), strict=True):
                texts[i] = postprocess_generated_text(self.tok_decode(ids), stops, None)
                self.cache_hook.add_partial("generate_until", requests[i].args, texts[i])
        return texts

    def _ended(self, stops: list[str]) -> Callable[[list[int]], bool]:
        def ended(ids: list[int]) -> bool:
            return ids[-1] == self.eot_token_id or any(stop in self.tok_decode(ids) for stop in stops)

        return ended


def torch_lm(model: Any, tokenizer: Any, max_length: int) -> Any:
    """`lm_eval.models.huggingface.HFLM` over `model`, on the model's device.

    The class draws no progress bars; it calls its `progress` with (done, total) requests. Its `token_scores` is that of
    `OnnxLM`.
    """
    from lm_eval.models.huggingface import HFLM

    class QuietHFLM(HFLM):
        progress: Any = None
        _asked = _read = 0

        loglikelihood = functools.partialmethod(HFLM.loglikelihood, disable_tqdm=True)
        loglikelihood_rolling = functools.partialmethod(HFLM.loglikelihood_rolling, disable_tqdm=True)
        generate_until = functools.partialmethod(HFLM.generate_until, disable_tqdm=True)

        def token_scores(self, request: Request) -> TokenScores:
            return torch_reader(model, tokenizer).token_scores(request)

        def _loglikelihood_tokens(self, requests: Any, **settings: Any) -> Any:
            self._asked, self._read = len(requests), 0
            return super()._loglikelihood_tokens(requests, **{**settings, "disable_tqdm": True})

        def _model_call(self, inps: Any, **kwargs: Any) -> Any:
            logits = super()._model_call(inps, **kwargs)
            self._read += len(inps)
            if self.progress is not None and self._read <= self._asked:
                self.progress(self._read, self._asked)
            return logits

    return QuietHFLM(
        pretrained=model,
        tokenizer=tokenizer,
        backend="causal",
        batch_size=_TORCH_ROWS,
        max_length=max_length,
        device=str(model.device),
    )
