"""A decoder graph as a model of lm-evaluation-harness: `--model nbl-onnx --model_args path=DIR/model`.

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
from nbl_export.evaluation.scorer import GraphScorer, Request, graph_scorer

__all__ = ["DecoderLM", "OnnxLM"]

_NEW_TOKENS = 256


class DecoderLM(TemplateLM):
    """Scores and greedy text of a decoder. `progress` is called with (done, total) requests."""

    def __init__(self, scorer: GraphScorer, name: str = "") -> None:
        super().__init__()
        self.scorer = scorer
        self.tokenizer = scorer.tokenizer
        self.max_length = scorer.max_length
        self._name = name
        self.progress: Callable[[int, int], None] = lambda _done, _total: None

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

    @property
    def tokenizer_name(self) -> str:
        """The key of the harness' cache of chat prompts."""
        return self._name

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
        found: list[tuple[float, bool]] = super().loglikelihood(requests, disable_tqdm=True)
        return found

    def _loglikelihood_tokens(
        self, requests: list[tuple[Any, list[int], list[int]]], **_kwargs: Any
    ) -> list[tuple[float, bool]]:
        """(log-likelihood, greedy?) of each request; TemplateLM.loglikelihood calls this after tokenisation."""
        wanted = [Request(tuple(context), tuple(continuation)) for _, context, continuation in requests]
        found = self.scorer.score(wanted, self.progress)
        for (texts, _, _), answer in zip(requests, found, strict=True):
            if texts is not None:
                self.cache_hook.add_partial("loglikelihood", texts, answer)
        return found

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-likelihood of whole texts, in windows of the full length; each token is predicted once."""
        totals = []
        for request in requests:
            rolled = utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows = [(None, *utils.make_disjoint_window(pair)) for pair in rolled]
            totals.append(sum(loglikelihood for loglikelihood, _ in self._loglikelihood_tokens(windows)))
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, totals[-1])
        return totals

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy text until a stop sequence, the end of text or the limit.

        Raises:
            NblError: the task asks for sampling.
        """
        eos = str(self.tokenizer.decode([self.eot_token_id]))
        texts = list[str]()
        for request in requests:
            asked = normalize_gen_kwargs(request.args[1], _NEW_TOKENS)
            if asked.get("do_sample"):
                raise NblError("nbl-onnx decodes greedily, but the task asks for sampling; give do_sample=False")
            stops = [stop for stop in handle_stop_sequences(asked.get("until"), eos=eos) if stop]
            ended = functools.partial(self._ended, stops)
            ids = self.scorer.generate(self.tok_encode(request.args[0]), asked["max_gen_toks"], ended)
            texts.append(postprocess_generated_text(self._decoded(ids), stops, None))
            self.cache_hook.add_partial("generate_until", request.args, texts[-1])
            self.progress(len(texts), len(requests))
        return texts

    def _ended(self, stops: list[str], ids: list[int]) -> bool:
        return ids[-1] == self.eot_token_id or any(stop in self._decoded(ids) for stop in stops)

    def _decoded(self, ids: list[int]) -> str:
        return str(self.tokenizer.decode(ids, skip_special_tokens=True))


@register_model("nbl-onnx")
class OnnxLM(DecoderLM):
    """One graph on the CPU.

    Args:
        path: a model directory, such as `model` or `original` of a run.
        max_length: most tokens read at once; None means the model's positions.
        threads: of ONNX Runtime; None lets ONNX Runtime choose.

    Raises:
        NblError: there is no such graph, or the graph gives logits of the last position only.
    """

    def __init__(
        self,
        path: str,
        max_length: int | None = None,
        threads: int | None = None,
        **_of_other_models: Any,  # the harness passes device and batch sizes to every model
    ) -> None:
        asked = (int(threads) if threads else None, int(max_length) if max_length else None)
        super().__init__(graph_scorer(Path(path), *asked), str(Path(path).absolute()).replace("/", "__"))
