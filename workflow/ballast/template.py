"""Prompts: one function renders them, for training and evaluation alike."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import Any

from ballast.errors import DataError

IMAGE = "<image>"


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
