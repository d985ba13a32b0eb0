"""Generic text of a base: what drift from it is measured on."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ballast.data import load_split
from ballast.models import Base

TOKENS, BLOCK = 2000, 256
BATCH_TOKENS, BATCH_MEMORY = 1024, 64 * 2**20


@dataclass(frozen=True)
class Text:
    """Token ids of one text, and the places whose predictions are compared.

    types: token types, where the base tells two sentences apart; image: its row of `features`.
    """

    ids: list[int]
    scored: list[int]
    types: list[int] | None = None
    image: int | None = None


@dataclass(frozen=True)
class Texts:
    """Texts of a base; features: those stored of the images, [images, tokens, width]."""

    rows: tuple[Text, ...]
    features: Tensor | None = None

    @property
    def tokens(self) -> int:
        return sum(len(row.ids) for row in self.rows)


def texts(
    base: Base,
    folders: Mapping[str, Path],
    entries: Mapping[str, Mapping[str, Any]],
    limit: int = TOKENS,
    delimiter: str = " ",
) -> Texts:
    """Generic text of a base, `limit` tokens or one text more, the same for all its cells.

    Running text (for an encoder: text with gaps) if upstream tasks or probes have it, otherwise the
    test questions of the upstream tasks with their answers, of the probes where there is no
    upstream task. As many tokens from each task, from its first row on; a target gives none.

    folders: {task: folder of its prepared data}; entries: {task: {"role": ...}}, as in a cell's
    spec; delimiter: what stands between prompt and response.
    """
    roles = {name: entry["role"] for name, entry in sorted(entries.items())}
    tables = {
        name: load_split(Path(folders[name]), "test")
        for name, role in roles.items()
        if role != "target"
    }
    wanted = "positions" if base.anatomy.encoder else "text"
    names = [name for name, (table, _) in tables.items() if wanted in table.column_names]
    if not names:
        asked = [name for name, (table, _) in tables.items() if "prompt" in table.column_names]
        names = [name for name in asked if roles[name] == "upstream"] or asked
    return _evenly({name: _rows(base, *tables[name], delimiter) for name in names}, limit)


Rows = Iterator[tuple[Text, Tensor | None]]


def _rows(base: Base, table: Any, features: Tensor | None, delimiter: str) -> Rows:
    """A task's texts, each with the features of its image."""
    image_token = getattr(base.model.config, "image_token_id", None)
    for row in table:
        if "positions" in row:
            yield Text(row["input_ids"], row["positions"], row.get("token_type_ids")), None
        elif "text" in row:
            yield _decoded(_running(base, row["text"])), None
        else:
            ids = _answered(base, row["prompt"] + delimiter + row["response"])
            image = features[row["image"]] if features is not None else None
            yield _decoded(ids, image_token), image


def _answered(base: Base, text: str) -> list[int]:
    """Tokens of a question with its answer; special ones are added as `Template.encode` does."""
    bos = base.tokenizer.bos_token
    return base.tokenizer.encode(text, add_special_tokens=not (bos and text.startswith(bos)))


def _running(base: Base, text: str) -> list[int]:
    """The first block of a running text, with the token in front that lm-eval puts there."""
    tokenizer = base.tokenizer
    first = tokenizer.bos_token_id
    first = tokenizer.eos_token_id if first is None else first
    longest = getattr(base.model.config.get_text_config(), "max_position_embeddings", BLOCK)
    ids = tokenizer.encode(text, add_special_tokens=False)
    return [first, *ids][: min(BLOCK, longest)]


def _decoded(ids: list[int], image_token: int | None = None) -> Text:
    """A decoder's text: each place that predicts a token of it counts, but no part of an image."""
    return Text(ids, [i for i, following in enumerate(ids[1:]) if following != image_token])


def _evenly(rows: Mapping[str, Rows], limit: int) -> Texts:
    """Texts of the tasks, the next always from the task with the fewest tokens so far."""
    taken: dict[str, int] = dict.fromkeys(rows, 0)
    found: list[Text] = []
    features: list[Tensor] = []
    while taken and sum(len(text.ids) for text in found) < limit:
        name = min(taken, key=taken.__getitem__)
        drawn = next(rows[name], None)
        if drawn is None:
            del taken[name]
            continue
        text, image = drawn
        if image is not None:
            text = replace(text, image=len(features))
            features.append(image)
        taken[name] += len(text.ids)
        found.append(text)
    return Texts(tuple(found), torch.stack(features) if features else None)


def batches(base: Base, texts: Texts) -> list[dict[str, Tensor]]:
    """The texts in their order, as right-padded inputs of a model on the CPU.

    `scored` [rows, tokens] is 1 where a prediction counts; it is no input.
    """
    vocabulary = base.model.config.get_text_config().vocab_size
    most = min(BATCH_TOKENS, BATCH_MEMORY // (4 * vocabulary))
    groups: list[list[Text]] = []
    longest = 0
    for row in texts.rows:
        longest = max(longest, len(row.ids))
        if not groups or longest * (len(groups[-1]) + 1) > most:
            groups.append([])
            longest = len(row.ids)
        groups[-1].append(row)
    return [_batch(base, rows, texts.features) for rows in groups]


def _batch(base: Base, rows: Sequence[Text], features: Tensor | None) -> dict[str, Tensor]:
    def padded(columns: Sequence[Sequence[int]], value: int = 0) -> Tensor:
        tensors = [torch.tensor(column, dtype=torch.long) for column in columns]
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=value)

    ids = padded([row.ids for row in rows], base.tokenizer.pad_token_id or 0)
    scored = torch.zeros_like(ids)
    for place, row in enumerate(rows):
        scored[place, row.scored] = 1
    found = {
        "input_ids": ids,
        "attention_mask": padded([[1] * len(row.ids) for row in rows]),
        "scored": scored,
    }
    if rows[0].types is not None:
        found["token_type_ids"] = padded([row.types or [] for row in rows])
    if features is not None:
        images = features[[row.image for row in rows]]
        found["pixel_values"] = images.to(base.model.dtype)
    return found
