"""Prompts: one function renders them, for training and evaluation alike."""

from __future__ import annotations

import hashlib
import random
from dataclasses import dataclass
from typing import Any

from ballast.errors import DataError

IMAGE = "<image>"
GAP = "<mask>"  # how rows write a masked word, whatever the tokenizer's mask is
MASKED = 0.15  # share of the tokens of plain text that are masked (Devlin et al. 2019)


@dataclass(frozen=True)
class Template:
    """How a base is asked.

    tokenizer: transformers tokenizer, or the processor's; text: "chat" for its own chat template,
    or a text with {question}; delimiter: what stands between prompt and response, and belongs to
    the response; end: text that ends a response in training, where the base has no end token that
    it knows; image_tokens: placeholders per image.
    """

    tokenizer: Any
    text: str
    delimiter: str
    end: str | None = None
    image_token: str = IMAGE
    image_tokens: int = 0

    def prompt(self, question: str, image: bool) -> str:
        """The rendered prompt, up to where the response begins."""
        if self.text == "chat":
            content: Any = question
            if image:
                content = [{"type": "image"}, {"type": "text", "text": question}]
            prompt = self.tokenizer.apply_chat_template(
                [{"role": "user", "content": content}],
                add_generation_prompt=True,
                tokenize=False,
                **({"chat_template": self.tokenizer.chat_template}),
            )
        else:
            prompt = (self.image_token if image else "") + self.text.format(question=question)
        if image:
            if prompt.count(self.image_token) != 1:
                raise DataError(f"the chat template placed no image in {prompt!r}")
            prompt = prompt.replace(self.image_token, self.image_token * self.image_tokens)
        return prompt.rstrip(" ")

    def encode(self, prompt: str, response: str) -> tuple[list[int], list[int]]:
        """Token ids of prompt and response (with its delimiter), split as lm-eval splits them.

        The whole is encoded at once, so that a word at the seam is tokenised as the model will see
        it, and white space at the prompt's end (a chat template's line break) goes to the response;
        special tokens are added only where the prompt does not start with them.
        """
        special = not (self.tokenizer.bos_token and prompt.startswith(self.tokenizer.bos_token))
        whole = self.tokenizer.encode(
            prompt + self.delimiter + response, add_special_tokens=special
        )
        head = self.tokenizer.encode(prompt.rstrip(), add_special_tokens=special)
        return parted(whole, len(head))

    def example(self, prompt: str, response: str) -> tuple[list[int], int]:
        """Token ids of a training example with its end, and how many of them are the prompt."""
        head, tail = self.encode(prompt, response + (self.end or ""))
        last = [] if self.end else [self.tokenizer.eos_token_id]
        return [*head, *tail, *last], len(head)

    def marker(self) -> tuple[int, ...]:
        """Token ids that every prompt ends with, after the question; may be none."""
        words = [self.tokenizer.decode([len(self.tokenizer) // 2 + i]).strip() for i in (0, 1)]
        ends = [self.encode(self.prompt(word, False), words[0])[0] for word in words]
        common = []
        for left, right in zip(*(reversed(ids) for ids in ends), strict=False):
            if left != right:
                break
            common.append(left)
        return tuple(reversed(common))

    def digest(self) -> str:
        """Hash of the rendered template on a fixed question: provenance of what was asked."""
        shown = self.prompt("QUESTION", bool(self.image_tokens)) + self.delimiter + "RESPONSE"
        return hashlib.sha256(shown.encode()).hexdigest()[:16]


def parted(whole: list[int], prompt: int) -> tuple[list[int], list[int]]:
    """A text's tokens, parted after the prompt's; a token across the seam is the prompt's.

    The response has at least one, or nothing would be left to learn or to score.
    """
    prompt = min(prompt, len(whole) - 1)
    return whole[:prompt], whole[prompt:]


def template_for(tokenizer: Any, spec: dict[str, Any], image_tokens: int = 0) -> Template:
    """The template of a base by its spec (`template`, `delimiter`).

    Raises DataError if the chat template is asked for and the tokenizer has none.
    """
    text = spec.get("template") or "chat"
    if text == "chat" and not tokenizer.chat_template:
        raise DataError(
            "template: chat, but the base's tokenizer has no chat template; "
            "give the suite's base a template such as 'Q: {question} A:'"
        )
    delimiter = spec.get("delimiter")
    token = getattr(tokenizer, "image_token", None) or IMAGE
    delimiter = " " if delimiter is None else delimiter
    return Template(tokenizer, text, delimiter, spec.get("end"), token, image_tokens)


@dataclass(frozen=True)
class Encoding:
    """How an encoder reads a row: its sentence, or two, as its tokenizer joins them.

    text: None or "chat" for the question as it is, or a text with {question}.
    """

    tokenizer: Any
    text: str | None = None

    @property
    def longest(self) -> int:
        """The most tokens that the encoder reads."""
        return self.tokenizer.model_max_length

    def example(self, row: dict[str, Any]) -> dict[str, list[int]]:
        """input_ids of a row, and token_type_ids if the tokenizer tells two sentences apart."""
        return self._encode(self._sentences(row))[0]

    def masked(self, row: dict[str, Any]) -> dict[str, list[int]]:
        """input_ids of a row with its gaps masked, their positions, and the answers there.

        A word of several tokens is masked token by token. Of plain text a fixed share of tokens is
        masked, chosen by the text alone.
        """
        sentences = [row["text"]] if "text" in row else self._sentences(row)
        words = iter(str(row.get("response", "")).split())
        filled, gaps = [], []
        for number, sentence in enumerate(sentences):
            parts = sentence.split(GAP) if "text" not in row else [sentence]
            text = parts[0]
            for part in parts[1:]:
                word = next(words)
                gaps.append((number, len(text), len(text) + len(word)))
                text += word + part
            filled.append(text)
        inputs, places = self._encode(filled)
        if "text" in row:
            inner = [i for i, (number, _, _) in enumerate(places) if number is not None]
            count = max(1, round(MASKED * len(inner)))
            positions = sorted(random.Random(row["text"]).sample(inner, min(count, len(inner))))
        else:
            positions = [
                i
                for i, (number, start, end) in enumerate(places)
                if any(number == n and start < last and end > first for n, first, last in gaps)
            ]
        ids = list(inputs["input_ids"])
        answers = [ids[i] for i in positions]
        for i in positions:
            ids[i] = self.tokenizer.mask_token_id
        return inputs | {"input_ids": ids, "positions": positions, "answers": answers}

    def digest(self) -> str:
        """Hash of how a fixed pair is encoded: provenance of what was asked."""
        shown = self.example({"question": "QUESTION", "pair": "PAIR"})["input_ids"]
        return hashlib.sha256(f"{self.text} {shown}".encode()).hexdigest()[:16]

    def _sentences(self, row: dict[str, Any]) -> list[str]:
        question = row["question"]
        if self.text not in (None, "chat"):
            question = self.text.format(question=question)
        return [question, row["pair"]] if row.get("pair") else [question]

    def _encode(
        self, sentences: list[str]
    ) -> tuple[dict[str, list[int]], list[tuple[int | None, int, int]]]:
        """Model inputs, and by token its sentence (None: a special token), start and end in it."""
        if not self.tokenizer.is_fast:
            raise DataError(
                f"{type(self.tokenizer).__name__}: a fast tokenizer is needed, to find masked words"
            )
        encoded = self.tokenizer(*sentences, return_offsets_mapping=True)
        names = [
            k for k in ("input_ids", "token_type_ids") if k in self.tokenizer.model_input_names
        ]
        spans = zip(encoded.sequence_ids(), encoded["offset_mapping"], strict=True)
        places = [(number, start, end) for number, (start, end) in spans]
        return {name: encoded[name] for name in names}, places
