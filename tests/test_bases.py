"""Bases: downloaded from a hub, pointed at, and converted from llama2.c's files."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import struct
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote, urlsplit

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from ballast.bases.build import READY, make_base
from ballast.bases.llama2c import convert
from ballast.errors import DataError
from ballast.files import read_sealed, sha256_file
from ballast.models import load_base, pick_device
from checkout import Checkout
from tiny_models import BUILDERS

REVISIONS = {"v1": "1" * 40, "main": "2" * 40}
without_data = pytest.mark.skipif(
    not os.environ.get("BALLAST_DATA"), reason="BALLAST_DATA names no folder of real data"
)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A tiny model as a transformers folder, with files beside it that are not wanted."""
    folder = tmp_path_factory.mktemp("saved")
    torch.manual_seed(0)
    BUILDERS["llama"]().save_pretrained(folder)
    (folder / "tokenizer_config.json").write_text('{"chat_template": "x"}')
    (folder / "pytorch_model.bin").write_bytes(b"a pickle, never fetched")
    (folder / "README.md").write_text("never fetched")
    return folder


class Hub(BaseHTTPRequestHandler):
    """What `snapshot_download` asks of a hub: revision, tree, and files by commit."""

    protocol_version = "HTTP/1.1"
    repositories: dict[str, dict[str, dict[str, bytes]]]
    asked: list[str]

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.asked.append(f"{self.command} {path}")
        api, _, rest = path.strip("/").partition("api/models/")
        name = "/".join((rest or api).split("/")[:2])
        tail = (rest or api).split("/")[2:]
        if name == "tiny/gated":
            return self._answer(401, b"{}", {"X-Error-Code": "GatedRepo"})
        commits = self.repositories.get(name)
        if commits is None:
            return self._answer(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        commit = REVISIONS.get(tail[1], tail[1])
        if commit not in commits:
            return self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        files = commits[commit]
        if tail[0] == "resolve":
            content = files["/".join(tail[2:])]
            etag = hashlib.sha256(content).hexdigest()
            return self._answer(200, content, {"ETag": f'"{etag}"', "X-Repo-Commit": commit})
        tree = [
            {"type": "file", "path": path, "size": len(content), "oid": "0" * 40}
            for path, content in files.items()
        ]
        about = {"id": name, "sha": commit, "siblings": [{"rfilename": p} for p in files]}
        made = tree if tail[0] == "tree" else about
        return self._answer(200, json.dumps(made).encode(), {"Content-Type": "application/json"})

    def _answer(self, status: int, content: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def hub(saved):
    """(address, requests asked) of a hub on the loopback with two revisions of tiny/llama."""
    files = {p.name: p.read_bytes() for p in saved.iterdir()}
    older = files | {"config.json": files["config.json"] + b"\n"}
    pickled = {k: v for k, v in files.items() if not k.endswith(".safetensors")}

    repositories = {
        "tiny/llama": {REVISIONS["v1"]: older, REVISIONS["main"]: files},
        "tiny/pickled": {REVISIONS["main"]: pickled},
    }
    handler = type("Here", (Hub,), {"repositories": repositories, "asked": []})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}", handler.asked
    server.shutdown()
    server.server_close()


CHILD = """
import json, sys
from itertools import pairwise
from pathlib import Path
from ballast.bases.build import make_base
from ballast.errors import DataError
made = []
for source, folder in json.loads(sys.argv[1]):
    try:
        made.append(make_base({"source": source}, Path(folder), lambda line: None))
    except DataError as error:
        made.append(str(error))
print("RESULT" + json.dumps(made))
"""


def in_a_child(endpoint: str, tmp_path: Path, *jobs: tuple[dict, Path]) -> list:
    """make_base of each (source, folder) in a process that knows this hub; results or messages."""
    environment = {
        key: value
        for key, value in os.environ.items()
        if not key.startswith("HF_") and not key.lower().endswith("_proxy")
    }
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "hf_home")}
    arguments = json.dumps([(source, str(folder)) for source, folder in jobs])
    done = subprocess.run(
        [sys.executable, "-c", CHILD, arguments], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.partition("RESULT")[2])


def test_a_base_is_downloaded_at_its_revision(hub, saved, tmp_path):
    endpoint, asked = hub
    jobs = [
        ({"hub": "tiny/llama", "revision": "v1"}, tmp_path / "v1"),
        ({"hub": "tiny/llama"}, tmp_path / "latest"),
        ({"hub": "tiny/llama", "revision": REVISIONS["v1"]}, tmp_path / "commit"),
        ({"hub": "tiny/llama"}, tmp_path / "latest"),
    ]
    old, new, commit, again = in_a_child(endpoint, tmp_path, *jobs)
    names = {"config.json", "generation_config.json", "model.safetensors", "tokenizer_config.json"}
    for made, folder in ((old, "v1"), (new, "latest"), (commit, "commit")):
        model = tmp_path / folder / "model"
        assert made["model"] == str(model)
        assert {p.name for p in model.iterdir()} == set(made["files"]) == names
        assert made["files"] == {name: sha256_file(model / name) for name in names}
        assert read_sealed(tmp_path / folder / READY) == made
        assert made["commit"] == REVISIONS["main" if folder == "latest" else "v1"]
    assert new["files"] == {name: sha256_file(saved / name) for name in names}
    assert old["files"] == commit["files"]
    assert {n for n in names if old["files"][n] != new["files"][n]} == {"config.json"}
    assert again == new  # made once
    fetched = [line for line in asked if "/resolve/" in line and line.startswith("GET")]
    assert len(fetched) == 3 * len(names)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "latest" / "model")
    assert loaded.config.hidden_size == 32


def test_a_killed_download_goes_on_and_never_mixes_two_commits(hub, saved, tmp_path):
    """What a kill left of a download is used where it is of the same commit, and only there."""
    endpoint, asked = hub
    weights = "model.safetensors"
    for name, commit in (("same", REVISIONS["main"]), ("moved", REVISIONS["v1"])):
        part = tmp_path / name / "model.part"
        notes = part / ".cache/huggingface/download"
        notes.mkdir(parents=True)
        shutil.copy(saved / weights, part)
        etag = sha256_file(saved / weights)
        (notes / f"{weights}.metadata").write_text(f"{commit}\n{etag}\n{time.time() + 1}\n")
        (part / "left.json").write_text("{}")
        (notes / "left.json.metadata").write_text(f"{commit}\n0\n{time.time() + 1}\n")
    asked.clear()
    same, moved = (
        in_a_child(endpoint, tmp_path, ({"hub": "tiny/llama"}, tmp_path / name))[0]
        for name in ("same", "moved")
    )
    fetched = [line for line in asked if line.startswith("GET") and line.endswith(weights)]
    assert len(fetched) == 1
    assert moved["files"].keys() == {p.name for p in (tmp_path / "moved/model").iterdir()}
    assert "left.json" not in moved["files"]
    assert same["files"][weights] == moved["files"][weights] == etag


def test_a_branch_that_moves_changes_no_base_that_is_there(hub, tmp_path, monkeypatch):
    """Its stored copy is used, and a damaged one is downloaded again from the commit it had."""
    endpoint, asked = hub
    job = ({"hub": "tiny/llama"}, tmp_path / "base")
    [made] = in_a_child(endpoint, tmp_path, job)
    monkeypatch.setitem(REVISIONS, "main", REVISIONS["v1"])
    asked.clear()
    assert in_a_child(endpoint, tmp_path, job) == [made]
    assert asked == []
    weights = tmp_path / "base/model/model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    (again,) = in_a_child(endpoint, tmp_path, job)
    assert again["files"] == made["files"]
    assert again["commit"] == made["commit"] != REVISIONS["v1"]
    (new,) = in_a_child(endpoint, tmp_path, (job[0], tmp_path / "new"))
    assert new["commit"] == REVISIONS["v1"]


def test_what_cannot_be_downloaded_names_the_way_out(hub, tmp_path):
    endpoint, _ = hub
    jobs = [
        ({"hub": "tiny/nobody"}, tmp_path / "a"),
        ({"hub": "tiny/llama", "revision": "v9"}, tmp_path / "b"),
        ({"hub": "not a name"}, tmp_path / "c"),
        ({"hub": "tiny/pickled"}, tmp_path / "d"),
        ({"hub": "tiny/gated"}, tmp_path / "e"),
    ]
    nobody, revision, name, pickled, gated = in_a_child(endpoint, tmp_path, *jobs)
    for message, repository in (
        (nobody, "tiny/nobody"),
        (revision, "tiny/llama"),
        (name, "not a name"),
    ):
        assert message.startswith(f"{repository}: cannot be downloaded")
        assert "give the base a `path:` to a local transformers folder" in message
    assert "no .safetensors file" in pickled
    assert gated.startswith("tiny/gated: cannot be downloaded (GatedRepoError: ")
    assert "its owner asks for your consent" in gated
    assert "`hf auth login` or set HF_TOKEN" in gated
    assert not list(tmp_path.rglob(READY))


def test_a_plan_asks_the_hub_for_the_size_alone(hub, saved, tmp_path):
    """The configuration is fetched, no weights; what cannot be had is named with what to do."""
    endpoint, asked = hub
    home = Checkout(tmp_path / "home")
    tasks = {"upstream": ["tiny_keep"], "targets": ["tiny_learn"]}
    names = {"known": "tiny/llama", "gated": "tiny/gated", "nobody": "tiny/nobody-7b"}
    bases = {base: {"source": {"hub": name}} | tasks for base, name in names.items()}
    home.write_suite(bases=bases, tuning=None)
    before = len(asked)
    environment = {k: v for k, v in home.environment.items() if not k.lower().endswith("_proxy")}
    environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "0"}
    command = ["ballast", "plan", "--json"]
    done = subprocess.run(command, cwd=home.root, env=environment, capture_output=True, check=True)
    found = json.loads(done.stdout)
    weights = load_file(saved / "model.safetensors")
    assert found["bases"]["known"]["parameters"] == sum(v.numel() for v in weights.values())
    assert found["bases"]["nobody"]["parameters"] == 7e9
    notes = "\n".join(found["warnings"])
    assert "tiny/gated: its size is not known (GatedRepoError); its owner asks" in notes
    assert "tiny/nobody-7b: its size is not known (RepositoryNotFoundError); without" in notes
    assert not [line for line in asked[before:] if "safetensors" in line]


def test_a_hub_that_is_not_there_names_the_way_out(tmp_path):
    (message,) = in_a_child("http://127.0.0.1:9", tmp_path, ({"hub": "a/b"}, tmp_path / "x"))
    assert message.startswith("a/b: cannot be downloaded")
    assert "`path:`" in message


def test_a_local_folder_is_pointed_at_not_copied(saved, tmp_path):
    made = make_base({"source": {"path": str(saved)}}, tmp_path / "base", print)
    assert made["model"] == str(saved.resolve())
    assert made["files"]["model.safetensors"] == sha256_file(saved / "model.safetensors")
    assert [p.name for p in (tmp_path / "base").iterdir()] == [READY]


def test_a_folder_without_safetensors_is_refused(saved, tmp_path):
    pickled = tmp_path / "pickled"
    shutil.copytree(saved, pickled, ignore=shutil.ignore_patterns("*.safetensors"))
    with pytest.raises(DataError, match=r"no \.safetensors file"):
        make_base({"source": {"path": str(pickled)}}, tmp_path / "base", print)
    with pytest.raises(DataError, match="no such file or folder"):
        make_base({"source": {"path": str(tmp_path / "none")}}, tmp_path / "base", print)
    source = {"path": str(saved / "config.json")}
    with pytest.raises(DataError, match="is not a folder"):
        make_base({"source": source}, tmp_path / "base", print)
    assert not (tmp_path / "base" / READY).exists()


def test_an_absent_gpu_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert pick_device("auto").type == "cpu"
    with pytest.raises(DataError, match="torch sees no GPU"):
        pick_device("cuda")


# --- llama2.c ------------------------------------------------------------------------------------

SIZES = {
    "dim": 16,
    "hidden": 20,
    "layers": 2,
    "heads": 4,
    "kv_heads": 2,
    "words": 300,
    "length": 24,
}


def checkpoint(tied: bool) -> tuple[bytes, dict[str, np.ndarray]]:
    """A random checkpoint in llama2.c's format, and its weights by llama2.c's names."""
    d, h, n, heads, kv, words, length = SIZES.values()
    head, random = d // heads, np.random.default_rng(3)
    shapes = {
        "embedding": (words, d),
        "rms_att": (n, d),
        "wq": (n, d, d),
        "wk": (n, kv * head, d),
        "wv": (n, kv * head, d),
        "wo": (n, d, d),
        "rms_ffn": (n, d),
        "w1": (n, h, d),
        "w2": (n, d, h),
        "w3": (n, h, d),
        "rms_final": (d,),
        "freq_cos": (length, head // 2),
        "freq_sin": (length, head // 2),
    }
    if not tied:
        shapes["wcls"] = (words, d)
    weights = {k: random.normal(0, 0.4, s).astype("<f4") for k, s in shapes.items()}
    header = struct.pack("<7i", d, h, n, heads, kv, words if tied else -words, length)
    return header + b"".join(w.tobytes() for w in weights.values()), weights


def run_c(weights: dict[str, np.ndarray], tokens: list[int]) -> np.ndarray:
    """llama2.c's run.c in numpy, token by token: neighbouring rows of a head turn together."""
    d, _, layers, heads, kv_heads, _, _ = SIZES.values()
    head, group = d // heads, heads // kv_heads
    w = {name: value.astype(np.float64) for name, value in weights.items()}
    keys = [[] for _ in range(layers)]
    values = [[] for _ in range(layers)]
    logits = []

    def norm(x, weight):
        return weight * x / np.sqrt((x * x).mean() + 1e-5)

    def turned(x, position):
        x = x.copy()
        for i in range(0, len(x), 2):
            angle = position / 10000 ** ((i % head) / head)
            a, b = x[i], x[i + 1]
            x[i] = a * np.cos(angle) - b * np.sin(angle)
            x[i + 1] = a * np.sin(angle) + b * np.cos(angle)
        return x

    for position, token in enumerate(tokens):
        x = w["embedding"][token]
        for layer in range(layers):
            y = norm(x, w["rms_att"][layer])
            q = turned(w["wq"][layer] @ y, position)
            keys[layer].append(turned(w["wk"][layer] @ y, position))
            values[layer].append(w["wv"][layer] @ y)
            mixed = []
            for h in range(heads):
                part = slice((h // group) * head, (h // group + 1) * head)
                scores = np.array([q[h * head : (h + 1) * head] @ k[part] for k in keys[layer]])
                scores = np.exp((scores - scores.max()) / np.sqrt(head))
                scores /= scores.sum()
                mixed.append(sum(s * v[part] for s, v in zip(scores, values[layer], strict=True)))
            x = x + w["wo"][layer] @ np.concatenate(mixed)
            y = norm(x, w["rms_ffn"][layer])
            gate = w["w1"][layer] @ y
            x = x + w["w2"][layer] @ (gate / (1 + np.exp(-gate)) * (w["w3"][layer] @ y))
        logits.append(w.get("wcls", w["embedding"]) @ norm(x, w["rms_final"]))
    return np.array(logits)


PIECES = [" ", "a", "b", "c", " a", "ab", "bc", "aba", " ab", "é", "cc", "aa"]
PIECES += [chr(0x3040 + i) for i in range(SIZES["words"] - 259 - len(PIECES))]


def tokenizer_bytes() -> bytes:
    """A tokenizer in llama2.c's format: special tokens, bytes, and pieces with scores."""
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n", *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
    scores = [0.0] * 259 + [-1000.0 - i for i in range(len(PIECES))]
    scores[pieces.index("bc")] = -1.0  # merged before " a", though it comes later
    packed = [
        struct.pack("<fi", score, len(piece.encode())) + piece.encode()
        for score, piece in zip(scores, pieces, strict=True)
    ]
    return struct.pack("<i", 9) + b"".join(packed)


def encode_c(text: str) -> list[int]:
    """llama2.c's `encode`: characters, or their bytes, then the best-scored pair until none."""
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), *PIECES]
    scores = {p: -1000.0 - i for i, p in enumerate(PIECES)} | {"bc": -1.0}
    tokens: list[int] = []
    for letter in " " + text if text else "":
        if letter in PIECES:
            tokens.append(pieces.index(letter, 259))
        else:
            tokens += [byte + 3 for byte in letter.encode()]
    while True:
        joined = [pieces[a] + pieces[b] for a, b in pairwise(tokens)]
        found = [(scores[p], -i) for i, p in enumerate(joined) if p in scores]
        if not found:
            return [1, *tokens]
        place = -max(found)[1]
        tokens[place : place + 2] = [pieces.index(joined[place], 259)]


@pytest.fixture
def files(tmp_path):
    """write(tied) -> (model .bin, tokenizer .bin, weights)."""

    def write(tied=True):
        raw, weights = checkpoint(tied)
        (tmp_path / "model.bin").write_bytes(raw)
        (tmp_path / "tok.bin").write_bytes(tokenizer_bytes())
        return tmp_path / "model.bin", tmp_path / "tok.bin", weights

    return write


@pytest.mark.parametrize("tied", [True, False])
def test_a_converted_checkpoint_computes_what_run_c_computes(tied, files, tmp_path):
    model, tokenizer, weights = files(tied)
    convert(model, tokenizer, tmp_path / "hf")
    base = load_base(tmp_path / "hf")
    assert base.model.config.tie_word_embeddings == tied
    tokens = [1, 270, 5, 262, 299, 17, 261, 2]
    with torch.no_grad():
        found = base.model(torch.tensor([tokens])).logits[0].numpy()
    expected = run_c(weights, tokens)
    assert np.abs(expected).max() > 1
    assert np.allclose(found, expected, atol=1e-4)


def test_a_converted_tokenizer_merges_by_score(files, tmp_path):
    model, tokenizer, _ = files()
    convert(model, tokenizer, tmp_path / "hf")
    made = load_base(tmp_path / "hf").tokenizer
    random = np.random.default_rng(0)
    texts = ["", "abc", "babcc", "aaaa bc", "  a", "é € 😀", "x\ny", "<0x41>", "a</b>"]
    texts += ["".join(random.choice(list("abc é1"), 12)) for _ in range(100)]
    for text in texts:
        assert made.encode(text) == encode_c(text), text
        assert made.decode(made.encode(text), skip_special_tokens=True) == text
    assert (made.bos_token_id, made.eos_token_id, made.unk_token_id) == (1, 2, 0)


def test_files_that_are_not_llama2c_are_refused(files, tmp_path):
    model, tokenizer, _ = files()
    raw, words = model.read_bytes(), tokenizer.read_bytes()
    odd = tmp_path / "odd.bin"
    for content, message in (
        (raw[:-4], "bytes are due|are due"),
        (raw + b"\0\0\0\0", "are due"),
        (raw[:20], "too short"),
        (struct.pack("<7i", 7, *[3] * 6) + raw[28:], "no sizes of a model"),
        (b"PK\x03\x04" + raw[4:], "are due|no sizes"),
    ):
        odd.write_bytes(content)
        with pytest.raises(DataError, match=message):
            convert(odd, tokenizer, tmp_path / "hf")
    for content, message in (
        (words[:-3], "damaged"),
        (words[:2000], "damaged|tokens"),
        (words[:4], "0 tokens"),
        (words + struct.pack("<fi", 0.0, 1) + b"z", "has 301 tokens, model.bin 300"),
    ):
        odd.write_bytes(content)
        with pytest.raises(DataError, match=message):
            convert(model, odd, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_suite_may_name_llama2c_files(files, tmp_path):
    model, tokenizer, _ = files()
    source = {"llama2c": {"model": str(model), "tokenizer": str(tokenizer)}}
    made = make_base({"source": source}, tmp_path / "base", print)
    assert made["model"] == str(tmp_path / "base" / "model")
    assert {"model.safetensors", "config.json", "tokenizer.json"} <= set(made["files"])


ODD_TEXTS = (
    *("", " ", "  two  spaces ", "3.14 and 1,000", "007", "ünï çödé — “quotes” …"),
    *("日本語 😀", "tab\tand\nline\r\n", "<s>", "a </s> b", "<unk>", "<0x41>", "The the THE"),
    "a" * 60,
)


@pytest.mark.data
@without_data
def test_converted_stories260k_is_the_reference(tmp_path):
    folder = Path(os.environ["BALLAST_DATA"])
    stories = folder / "stories260K"
    convert(stories / "stories260K.bin", stories / "tok512.bin", tmp_path)
    ours, theirs = load_base(tmp_path), load_base(stories / "hf")
    reference = AutoTokenizer.from_pretrained(stories / "hf")
    text = (folder / "tinystories" / "validation_0.8MB.txt").read_text(encoding="utf-8")
    texts = [*text.split("\n\n")[:50], *ODD_TEXTS]
    for piece in texts:
        assert ours.tokenizer.encode(piece) == reference.encode(piece), piece
    for piece in texts[:5]:
        ids = torch.tensor([reference.encode(piece)[:512]])
        with torch.no_grad():
            found, expected = ours.model(ids).logits, theirs.model(ids).logits
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"):
        assert getattr(ours.tokenizer, name) == getattr(theirs.tokenizer, name)
