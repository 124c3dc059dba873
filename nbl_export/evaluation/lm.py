"""A decoder as a model of lm-evaluation-harness; an exported graph is `--model nbl-onnx --model_args path=DIR/model`.

Tokenisation is that of the harness' own class for transformers (`lm_eval.models.huggingface.HFLM`), so scores are
comparable. The tokenizer adds special tokens, unless the text already begins with one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from lm_eval import utils
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs, postprocess_generated_text

from nbl_export.errors import NblError
from nbl_export.evaluation.reader import TextReader, graph_reader
from nbl_export.evaluation.scorer import Request

__all__ = ["DecoderLM", "OnnxLM"]

_NEW_TOKENS = 256
_ROWS = 16


class DecoderLM(TemplateLM):
    """Scores and greedy text of a decoder.

    Attributes:
        progress: called with (done, total) requests; None draws the harness' own progress bars.
    """

    def __init__(self, reader: TextReader, name: str = "") -> None:
        super().__init__()
        self.tokenizer, self.scorer, self.max_length = reader.tokenizer, reader.scorer, reader.scorer.max_length
        self.batch_size, self.max_gen_toks = reader.scorer.rows, _NEW_TOKENS
        self._name = name
        self.progress: Callable[[int, int], None] | None = None

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


@register_model("nbl-onnx")
class OnnxLM(DecoderLM):
    """One graph on the CPU.

    Args:
        path: a model directory, such as `model` or `original` of a run.
        batch_size: most sequences of a batch; "auto" is 16. A batch is also bounded by the size of its logits.
        max_length: most tokens read at once; None means the model's positions.
        threads: of ONNX Runtime; None lets ONNX Runtime choose.

    Raises:
        NblError: there is no such graph, or the graph gives logits of the last position only.
    """

    def __init__(
        self,
        path: str,
        batch_size: int | str | None = "auto",
        max_length: int | None = None,
        threads: int | None = None,
        **_of_other_models: Any,  # the harness passes device and max_batch_size to every model
    ) -> None:
        rows = _ROWS if str(batch_size).startswith("auto") or batch_size is None else int(batch_size)
        asked = (int(threads) if threads else None, int(max_length) if max_length else None)
        super().__init__(graph_reader(Path(path), *asked, rows), str(Path(path).absolute()).replace("/", "__"))
