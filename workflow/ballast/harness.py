"""lm-eval's language models over a model in memory: text, and images by stored features."""

from __future__ import annotations

import copy
from collections import defaultdict
from typing import Any

import torch
from lm_eval import utils
from lm_eval.models.hf_vlms import HFMultimodalLM
from lm_eval.models.huggingface import HFLM
from torch import Tensor

from ballast.encoders import EncoderLM
from ballast.models import Base
from ballast.template import parted


class _Whole:
    """Parts the tokens of a whole text as training does (`Template.encode`).

    lm-eval encodes the context again by itself: where a token lies across the seam, its context and
    continuation do not add up to the text.
    """

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        head, _ = super()._encode_pair(context, continuation)
        return parted(self.tok_encode(context + continuation), len(head))


class TextLM(_Whole, HFLM):
    """HFLM that also counts, in rolling requests, the tokens that the model ranked first.

    `rolling[text]` is (tokens, of them ranked first) after `loglikelihood_rolling`.
    """

    rolling: dict[str, tuple[int, int]]

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = False) -> list[float]:
        """Log-probability of each text, windows of the model's length, BOS before the first."""
        self.rolling = {}
        windows: list[tuple[int, list[int], list[int]]] = []
        for place, request in enumerate(requests):
            tokens = self.tok_encode(request.args[0], add_special_tokens=False)
            parts = utils.get_rolling_token_windows(
                token_list=tokens,
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            )
            windows += [(place, *utils.make_disjoint_window(part)) for part in parts]
        windows.sort(key=lambda window: -len(window[1]) - len(window[2]))
        sums = [[0.0, 0, 0] for _ in requests]
        for start in range(0, len(windows), self.batch_size):
            chunk = windows[start : start + self.batch_size]
            inputs = [torch.tensor((head + tail)[:-1]) for _, head, tail in chunk]
            padded = torch.nn.utils.rnn.pad_sequence(inputs, batch_first=True).to(self.device)
            logits = self._model_call(padded)
            for (place, _, tail), ids, row in zip(chunk, inputs, logits, strict=True):
                scored = row[len(ids) - len(tail) : len(ids)].float()
                wanted = torch.tensor(tail, device=scored.device)
                found = scored.log_softmax(-1).gather(1, wanted[:, None])
                sums[place][0] += float(found.double().sum())
                sums[place][1] += len(tail)
                sums[place][2] += int((scored.argmax(-1) == wanted).sum())
        for request, (_, tokens, hits) in zip(requests, sums, strict=True):
            self.rolling[request.args[0]] = (int(tokens), int(hits))
        return [total for total, _, _ in sums]


class ImageLM(_Whole, HFMultimodalLM):
    """lm-eval's multimodal model with log-likelihoods, in batches, over stored tower features.

    The `visual` of a request is the row of `features` [images, tokens, width] that its image has;
    set `features` before each task. Prompts carry their image placeholders already.
    """

    features: Tensor

    def _create_tokenizer(self, pretrained: Any, tokenizer: Any, **_: Any) -> None:
        self.processor, self.tokenizer = tokenizer, tokenizer.tokenizer

    def loglikelihood(
        self, requests: list[Any], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Log-probability of each continuation, and whether greedy decoding would give it.

        Requests that share image, context and all but the last token share one forward pass.
        """
        if requests and len(requests[0].args) < 3:
            return super().loglikelihood(requests, disable_tqdm)
        groups: dict[tuple[int, tuple[int, ...]], list[tuple[int, list[int]]]] = defaultdict(list)
        for place, request in enumerate(requests):
            context, continuation, aux = request.args
            head, tail = self._encode_pair(context, continuation)
            groups[aux["visual"], tuple(head + tail[:-1])].append((place, tail))
        answers: list[tuple[float, bool]] = [(0.0, False)] * len(requests)
        keys = sorted(groups, key=lambda key: (-len(key[1]), key))
        for start in range(0, len(keys), self.batch_size):
            chunk = keys[start : start + self.batch_size]
            inputs = [torch.tensor(tokens) for _, tokens in chunk]
            padded = torch.nn.utils.rnn.pad_sequence(
                inputs, batch_first=True, padding_value=self.tokenizer.pad_token_id
            )
            images = self.features[[image for image, _ in chunk]]
            with torch.no_grad():
                logits = self.model(
                    input_ids=padded.to(self.device),
                    pixel_values=images.to(self.device, self.model.dtype),
                ).logits
            for key, ids, row in zip(chunk, inputs, logits, strict=True):
                logs = row[: len(ids)].float().log_softmax(-1)
                for place, tail in groups[key]:
                    wanted = torch.tensor(tail, device=logs.device)
                    scored = logs[len(ids) - len(tail) :]
                    found = scored.gather(1, wanted[:, None]).sum()
                    greedy = bool((scored.argmax(-1) == wanted).all())
                    answers[place] = (float(found), greedy)
        return answers

    def generate_until(self, requests: list[Any], disable_tqdm: bool = False) -> list[str]:
        """Greedy continuations, left-padded batches of like generation settings."""
        if requests and len(requests[0].args) < 3:
            return super().generate_until(requests, disable_tqdm)
        answers = [""] * len(requests)
        order = sorted(range(len(requests)), key=lambda i: -len(requests[i].args[0]))
        for start in range(0, len(order), self.batch_size):
            chunk = [requests[i] for i in order[start : start + self.batch_size]]
            settings = copy.deepcopy(chunk[0].args[1])
            stops = [stop for stop in settings.pop("until", []) if stop]
            room = settings.pop("max_gen_toks", self.max_gen_toks)
            ids, mask = self.tok_batch_encode([r.args[0] for r in chunk], padding_side="left")
            images = self.features[[r.args[2]["visual"] for r in chunk]]
            made = self._model_multimodal_generate(
                {
                    "input_ids": ids.to(self.device),
                    "attention_mask": mask.to(self.device),
                    "pixel_values": images.to(self.device, self.model.dtype),
                },
                max_length=ids.shape[1] + room,
                stop=[*stops, self.tokenizer.eos_token],
                **settings,
            )
            for place, tokens in zip(order[start:], made.tolist(), strict=False):
                text = self.tok_decode(tokens[ids.shape[1] :])
                for stop in stops:
                    text = text.split(stop)[0]
                answers[place] = text
        return answers


def language_model(base: Base, batch_size: int) -> TextLM | ImageLM | EncoderLM:
    """What asks a base: lm-eval's model, text or images, or our own for an encoder."""
    if base.anatomy.kind == "encoder":
        return EncoderLM(base, batch_size)
    options = {"pretrained": base.model, "batch_size": batch_size, "softmax_dtype": torch.float32}
    if base.multimodal:
        return ImageLM(tokenizer=base.processor, **options)
    return TextLM(tokenizer=base.tokenizer, backend="causal", **options)
